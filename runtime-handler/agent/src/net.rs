//! The guest's network: what CNI gave the pod, set up again. The only module that
//! speaks rtnetlink.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use dyad_agent_api::proto::agent::{Interface, Localhost, Route};
use dyad_runtime_handler::{Error, Result, error::Context};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder, new_connection};
use tokio::task::JoinSet;

use crate::uevent;

/// How long a network card may take to appear.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);

/// `IFNAMSIZ` without its zero.
const NAME_MAX: usize = 15;

/// An address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    fn parse(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let address: IpAddr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let max = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= max).then_some(Self { address, prefix })
        });
        parsed.ok_or_else(|| {
            Error::InvalidArgument(format!("{text:?} is no address with a prefix length"))
        })
    }
}

/// A route, read and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan<'a> {
    destination: Option<Cidr>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    interface: &'a str,
    metric: u32,
    scope: u8,
    is_v4: bool,
}

/// Sets up loopback, interfaces, routes and the host's way to the loopback. Asking again
/// changes nothing.
///
/// # Errors
/// `InvalidArgument` for an address that is none; `DeadlineExceeded` for an interface
/// that did not appear; what the kernel refused, naming interface or route.
pub async fn set_up(
    interfaces: &[Interface],
    routes: &[Route],
    localhost: Option<&Localhost>,
) -> Result<()> {
    for interface in interfaces {
        check_name(&interface.name)?;
    }
    let routes = plan(routes)?;
    let neighbour = localhost.map(plan_localhost).transpose()?;
    let (handle, _driver) = open_rtnetlink()?;
    let up = LinkUnspec::new_with_name("lo").up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .context(|| "bring up lo".into())?;
    for interface in interfaces {
        set_up_interface(&handle, interface).await?;
    }
    for route in &routes {
        add_route(&handle, route).await?;
    }
    match &neighbour {
        Some(neighbour) => admit(&handle, neighbour).await,
        None => Ok(()),
    }
}

/// Takes addresses and routes away, where they are. An interface's other addresses stay.
///
/// # Errors
/// `InvalidArgument` for an address that is none; what the kernel refused.
pub async fn take_away(interfaces: &[Interface], routes: &[Route]) -> Result<()> {
    let mut addresses = Vec::new();
    for Interface {
        name,
        addresses: gone,
        ..
    } in interfaces
    {
        check_name(name)?;
        for address in gone {
            addresses.push((name.as_str(), Cidr::parse(address)?));
        }
    }
    let routes = plan(routes)?;
    if addresses.is_empty() && routes.is_empty() {
        return Ok(());
    }
    let (handle, _driver) = open_rtnetlink()?;
    // Those through gateways first.
    for route in routes.iter().rev() {
        remove_route(&handle, route).await?;
    }
    for (name, cidr) in addresses {
        remove_address(&handle, name, cidr).await?;
    }
    Ok(())
}

/// A handle, and the task that drives its connection: it ends when it is dropped.
fn open_rtnetlink() -> Result<(Handle, JoinSet<()>)> {
    let (connection, handle, _) = new_connection().context(|| "open rtnetlink".into())?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    Ok((handle, driver))
}

async fn remove_route(handle: &Handle, route: &Plan<'_>) -> Result<()> {
    let what = || format!("remove route {}", describe(route));
    let Some(index) = index_of(handle, route.interface).await.context(what)? else {
        return Ok(());
    };
    let message = message(route, index).context(what)?;
    match handle.route().del(message).execute().await {
        Err(error) if is_absent(&error) => Ok(()),
        removed => removed.context(what),
    }
}

async fn remove_address(handle: &Handle, name: &str, cidr: Cidr) -> Result<()> {
    let Cidr { address, prefix } = cidr;
    let what = || format!("remove address {address}/{prefix} from {name}");
    // Else the kernel takes the others of its subnet away, too.
    let file = format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries");
    std::fs::write(file, "1").context(what)?;
    let Some(index) = index_of(handle, name).await.context(what)? else {
        return Ok(());
    };
    let found: Vec<_> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .set_address_filter(address)
        .set_prefix_length_filter(prefix)
        .execute()
        .try_collect()
        .await
        .context(what)?;
    for message in found {
        handle
            .address()
            .del(message)
            .execute()
            .await
            .context(what)?;
    }
    Ok(())
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else {
        return false;
    };
    message.code.is_some_and(|code| -code.get() == libc::ESRCH)
}

async fn set_up_interface(handle: &Handle, interface: &Interface) -> Result<()> {
    let name = &interface.name;
    let what = || format!("set up interface {name} ({})", interface.mac);
    let mac = parse_mac(&interface.mac)?;
    let addresses = interface
        .addresses
        .iter()
        .map(|text| Cidr::parse(text))
        .collect::<Result<Vec<_>>>()?;
    let waited_for = format!("the network card {}", interface.mac);
    uevent::wait_for(&waited_for, APPEARS_WITHIN, || {
        Ok(has_mac(&interface.mac).then_some(()))
    })
    .await?;
    let link = find(handle, &mac).await?.ok_or_else(|| {
        Error::FailedPrecondition(format!("the network card {} is gone", interface.mac))
    })?;
    let index = link.header.index;
    let has_name = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::IfName(found) if found == name));
    if !has_name {
        // A name can be changed only while the interface is down.
        let renamed = LinkUnspec::new_with_index(index)
            .down()
            .name(name.clone())
            .build();
        handle.link().set(renamed).execute().await.context(what)?;
    }
    // The address was the pod's before we came, and no router shall add others.
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("autoconf", "0")] {
        let file = format!("/proc/sys/net/ipv6/conf/{name}/{key}");
        // A kernel without IPv6 has none.
        let _ = std::fs::write(file, value);
    }
    let mut up = LinkUnspec::new_with_index(index).up();
    if interface.mtu != 0 {
        up = up.mtu(interface.mtu);
    }
    handle
        .link()
        .set(up.build())
        .execute()
        .await
        .context(what)?;
    for cidr in addresses {
        let mut request = handle
            .address()
            .add(index, cidr.address, cidr.prefix)
            .replace();
        if cidr.address.is_ipv6() {
            let attributes = &mut request.message_mut().attributes;
            attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request
            .execute()
            .await
            .context(|| format!("add address {}/{} to {name}", cidr.address, cidr.prefix))?;
    }
    Ok(())
}

async fn find(handle: &Handle, mac: &[u8]) -> Result<Option<LinkMessage>> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context(|| "list interfaces".into())?;
    Ok(links.into_iter().find(|link| {
        link.attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::Address(found) if found == mac))
    }))
}

/// sysfs says it sooner than a netlink dump, and needs no await between looks.
fn has_mac(mac: &str) -> bool {
    let Ok(cards) = std::fs::read_dir("/sys/class/net") else {
        return false;
    };
    cards.filter_map(std::result::Result::ok).any(|card| {
        std::fs::read_to_string(card.path().join("address"))
            .is_ok_and(|found| found.trim().eq_ignore_ascii_case(mac))
    })
}

/// Who reaches the guest's loopback from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Neighbour<'a> {
    interface: &'a str,
    address: Ipv4Addr,
    mac: Vec<u8>,
}

fn plan_localhost(localhost: &Localhost) -> Result<Neighbour<'_>> {
    check_name(&localhost.interface)?;
    let address: Ipv4Addr = localhost.host.parse().map_err(|_| {
        Error::InvalidArgument(format!("localhost: {:?} is no address", localhost.host))
    })?;
    if !address.is_link_local() {
        // Whatever it is, it may be somebody else's: the guest would lose the way there.
        return Err(Error::InvalidArgument(format!(
            "localhost: {address} is not link-local"
        )));
    }
    Ok(Neighbour {
        interface: &localhost.interface,
        address,
        mac: parse_mac(&localhost.host_mac)?,
    })
}

/// Takes packets to 127.0.0.0/8 from the neighbour. The host lets none of anybody else
/// through, see the host's `network::localhost`.
async fn admit(handle: &Handle, neighbour: &Neighbour<'_>) -> Result<()> {
    let Neighbour {
        interface, address, ..
    } = neighbour;
    let what = || format!("admit {address} to the loopback by {interface}");
    let index = index_of(handle, interface).await.context(what)?;
    let index = index.ok_or_else(|| {
        Error::InvalidArgument(format!("localhost: there is no interface {interface}"))
    })?;
    for (key, value) in [("route_localnet", "1"), ("rp_filter", "0")] {
        let file = format!("/proc/sys/net/ipv4/conf/{interface}/{key}");
        std::fs::write(file, value).context(what)?;
    }
    handle
        .neighbours()
        .add(index, IpAddr::V4(*address))
        .link_layer_address(&neighbour.mac)
        .replace()
        .execute()
        .await
        .context(what)?;
    let back = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(*address, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    let added = handle.route().add(back).replace().execute().await;
    added.context(what)
}

async fn index_of(
    handle: &Handle,
    name: &str,
) -> std::result::Result<Option<u32>, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    Ok(links.try_next().await?.map(|link| link.header.index))
}

async fn add_route(handle: &Handle, route: &Plan<'_>) -> Result<()> {
    let what = || format!("add route {}", describe(route));
    let index = index_of(handle, route.interface)
        .await
        .context(what)?
        .ok_or_else(|| {
            Error::InvalidArgument(format!(
                "route {}: there is no such interface",
                describe(route)
            ))
        })?;
    let message = message(route, index).context(what)?;
    handle
        .route()
        .add(message)
        .replace()
        .execute()
        .await
        .context(what)
}

fn message(
    route: &Plan<'_>,
    index: u32,
) -> std::result::Result<RouteMessage, Box<dyn std::error::Error + Send + Sync>> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .scope(RouteScope::from(route.scope));
    // A default route has no destination to take the family from.
    let any = if route.is_v4 {
        Cidr {
            address: IpAddr::from([0; 4]),
            prefix: 0,
        }
    } else {
        Cidr {
            address: IpAddr::from([0; 16]),
            prefix: 0,
        }
    };
    let destination = route.destination.unwrap_or(any);
    builder = builder.destination_prefix(destination.address, destination.prefix)?;
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway)?;
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source)?;
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    let mut message = builder.build();
    if route.gateway.is_some() && route.scope == 0 {
        // CNI plugins point at gateways outside of the interface's prefix
        // (169.254.1.1), for which the host has a link route of its own.
        message.header.flags |= rtnetlink::packet_route::route::RouteFlags::Onlink;
    }
    Ok(message)
}

fn describe(route: &Plan<'_>) -> String {
    let mut text = route.destination.map_or("default".into(), |cidr| {
        format!("{}/{}", cidr.address, cidr.prefix)
    });
    if let Some(gateway) = route.gateway {
        text.push_str(&format!(" via {gateway}"));
    }
    text.push_str(&format!(" dev {}", route.interface));
    text
}

/// Reads the routes; those to links come before those through gateways on them.
fn plan(routes: &[Route]) -> Result<Vec<Plan<'_>>> {
    let mut plans = routes.iter().map(plan_one).collect::<Result<Vec<_>>>()?;
    plans.sort_by_key(|plan| plan.gateway.is_some());
    Ok(plans)
}

fn plan_one(route: &Route) -> Result<Plan<'_>> {
    let address = |text: &str| -> Result<Option<IpAddr>> {
        if text.is_empty() {
            return Ok(None);
        }
        text.parse()
            .map(Some)
            .map_err(|_| Error::InvalidArgument(format!("route: {text:?} is no address")))
    };
    check_name(&route.interface)?;
    let destination = match route.destination.as_str() {
        "" => None,
        text => Some(Cidr::parse(text)?),
    };
    let (gateway, source) = (address(&route.gateway)?, address(&route.source)?);
    let is_v4 = match route.family {
        4 => true,
        6 => false,
        other => {
            return Err(Error::InvalidArgument(format!(
                "route: family {other} is neither 4 nor 6"
            )));
        }
    };
    let foreign = [destination.map(|cidr| cidr.address), source]
        .into_iter()
        .flatten()
        .any(|address| address.is_ipv4() != is_v4);
    if foreign {
        return Err(Error::InvalidArgument(format!(
            "route {:?}: its addresses are not all of family {}",
            route.destination, route.family
        )));
    }
    let scope = u8::try_from(route.scope)
        .map_err(|_| Error::InvalidArgument(format!("route: {} is no scope", route.scope)))?;
    Ok(Plan {
        destination,
        gateway,
        source,
        interface: &route.interface,
        metric: route.metric,
        scope,
        is_v4,
    })
}

fn check_name(name: &str) -> Result<()> {
    let fine = (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if fine {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "{name:?} is no interface name"
        )))
    }
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            let is_hex = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            is_hex.then(|| u8::from_str_radix(part, 16).ok())?
        })
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| Error::InvalidArgument(format!("{text:?} is no MAC address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, gateway: &str) -> Route {
        Route {
            destination: destination.into(),
            gateway: gateway.into(),
            interface: "eth0".into(),
            family: 4,
            ..Default::default()
        }
    }

    #[test]
    fn links_come_before_gateways() {
        let routes = [
            route("", "10.1.0.1"),
            route("10.1.0.0/16", ""),
            route("10.2.0.0/16", "10.1.0.1"),
        ];
        let planned: Vec<String> = plan(&routes).unwrap().iter().map(describe).collect();
        assert_eq!(
            planned,
            [
                "10.1.0.0/16 dev eth0",
                "default via 10.1.0.1 dev eth0",
                "10.2.0.0/16 via 10.1.0.1 dev eth0"
            ]
        );
    }

    #[test]
    fn a_default_route_has_its_family() {
        let mut v6 = route("", "fd00::1");
        v6.family = 6;
        let built = message(&plan_one(&v6).unwrap(), 3).unwrap();
        assert_eq!(built.header.destination_prefix_length, 0);
        assert_eq!(u8::from(built.header.address_family), libc::AF_INET6 as u8);
        let built = message(&plan_one(&route("", "10.1.0.1")).unwrap(), 3).unwrap();
        assert_eq!(u8::from(built.header.address_family), libc::AF_INET as u8);
    }

    #[tokio::test]
    async fn what_is_to_be_taken_away_must_be_an_address() {
        for (name, address) in [("eth0", "10.0.0.1"), ("eth0", ""), ("a/b", "10.0.0.1/24")] {
            let interface = Interface {
                name: name.into(),
                addresses: vec![address.into()],
                ..Default::default()
            };
            assert!(
                take_away(&[interface], &[]).await.is_err(),
                "{name} {address:?}"
            );
        }
        assert!(take_away(&[], &[route("10.0.0.0", "")]).await.is_err());
        take_away(&[], &[]).await.unwrap();
    }

    #[test]
    fn foreign_bytes_are_refused() {
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1/33",
            "::/129",
            "x/8",
            "10.0.0.1/-1",
            "/8",
        ] {
            assert!(Cidr::parse(bad).is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "aa:bb:cc:dd:ee",
            "aa:bb:cc:dd:ee:fg",
            "aabbccddeeff",
            "+1:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            parse_mac("0A:00:00:00:00:ff").unwrap(),
            [10, 0, 0, 0, 0, 255]
        );
        for bad in ["", "a/b", "..", "an-interface-too-long", "a b", "e\0"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        let mut mixed = route("10.0.0.0/8", "");
        mixed.family = 6;
        assert!(plan_one(&mixed).is_err());
        mixed.family = 0;
        assert!(plan_one(&mixed).is_err());
    }

    #[test]
    fn the_neighbour_of_the_loopback_is_a_link_local_one() {
        let fine = Localhost {
            interface: "eth0".into(),
            host: "169.254.255.253".into(),
            host_mac: "02:64:79:61:64:01".into(),
            ..Default::default()
        };
        let neighbour = plan_localhost(&fine).unwrap();
        assert_eq!(neighbour.address, Ipv4Addr::new(169, 254, 255, 253));
        for host in ["", "10.0.0.1", "127.0.0.1", "169.254.255", "fe80::1"] {
            let bad = Localhost {
                host: host.into(),
                ..fine.clone()
            };
            assert!(plan_localhost(&bad).is_err(), "{host:?}");
        }
        let bad = Localhost {
            host_mac: "02:64".into(),
            ..fine
        };
        assert!(plan_localhost(&bad).is_err());
    }
}
