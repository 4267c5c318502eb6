//! Reads the pod's network and wires the machine's taps into it, by netlink alone.
//!
//! The only module that speaks netlink. Work in the pod's namespace runs on a thread of
//! its own that joins the namespace and ends afterwards, so that no other thread is ever
//! in a foreign namespace.

use std::fs::File;
use std::future::Future;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use tokio::task::JoinSet;

use super::localhost::Localhost;
use super::plan::{Address, Interface, Link, Route};

mod localhost;

/// The ingress qdisc's handle.
const INGRESS: u32 = 0xffff_0000;
/// The exceptions come before.
const REDIRECT_PRIORITY: u16 = 2;
/// `ETH_P_ALL`.
const ALL_PROTOCOLS: u16 = 0x0003;

/// What the pod's namespace holds.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// All links.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<Address>,
    /// Unicast routes of the main table.
    pub routes: Vec<Route>,
}

/// Reads links, addresses and routes of the namespace.
///
/// # Errors
/// The namespace cannot be joined, or netlink refused.
pub async fn read(netns: &Path) -> Result<Inventory> {
    let netns = open_netns(netns)?;
    in_netns(netns, "read the pod's network", |handle| async move {
        read_here(&handle).await
    })
    .await
}

/// Moves the interface's tap from this process's namespace into the pod's and joins the
/// two: whatever arrives at one leaves by the other. With `localhost`, the tap is the way
/// to the guest's localhost too. Repeating it is harmless.
///
/// # Errors
/// The tap or the interface does not exist, or netlink refused; then the interface is as
/// before.
pub async fn wire(
    netns: &Path,
    interface: &Interface,
    localhost: Option<&Localhost>,
) -> Result<()> {
    let target = open_netns(netns)?;
    let (handle, _driver) = open_rtnetlink()?;
    move_link(&handle, &interface.tap, &target).await?;

    let (interface, localhost) = (interface.clone(), localhost.cloned());
    in_netns(target, "wire the machine's tap", move |handle| async move {
        let Interface { name, tap, mac, .. } = &interface;
        silence(tap);
        let tap_index = index_of(&handle, tap)
            .await?
            .ok_or_else(|| Error::NotFound(format!("tap {tap} in the pod's network namespace")))?;
        let index = index_of(&handle, name).await?.ok_or_else(|| {
            Error::NotFound(format!("interface {name} in the pod's network namespace"))
        })?;
        let up = LinkUnspec::new_with_index(tap_index)
            .mtu(interface.mtu)
            .up()
            .build();
        handle
            .link()
            .set(up)
            .execute()
            .await
            .context(|| format!("bring up tap {tap}"))?;
        let both = async {
            redirect(&handle, index, tap_index).await?;
            localhost::guard(&handle, name, index).await?;
            redirect(&handle, tap_index, index).await
        };
        let wired = async {
            both.await
                .context(|| format!("redirect between {name} and {tap}"))?;
            match &localhost {
                Some(localhost) => localhost::open(&handle, tap, tap_index, mac, localhost).await,
                None => Ok(()),
            }
        };
        let wired = wired.await;
        if wired.is_err() {
            remove_ingress(&handle, index).await;
            localhost::close(&handle).await;
        }
        wired
    })
    .await
}

/// Takes the redirection off the interfaces again, and gives the namespace its own
/// localhost back; the tap goes with QEMU.
///
/// # Errors
/// The namespace exists but cannot be joined.
pub async fn unwire(netns: &Path, interfaces: Vec<String>) -> Result<()> {
    if !netns.exists() {
        return Ok(());
    }
    let netns = open_netns(netns)?;
    in_netns(netns, "unwire the machine's tap", |handle| async move {
        for interface in interfaces {
            if let Some(index) = index_of(&handle, &interface).await? {
                remove_ingress(&handle, index).await;
            }
        }
        localhost::close(&handle).await;
        Ok(())
    })
    .await
}

/// Takes the pod's interfaces down for good: the machine that had their addresses answers
/// elsewhere now.
///
/// # Errors
/// The namespace exists but cannot be joined, or netlink refused.
pub async fn quiet(netns: &Path, interfaces: Vec<String>) -> Result<()> {
    if !netns.exists() {
        return Ok(());
    }
    let netns = open_netns(netns)?;
    in_netns(
        netns,
        "take the pod's interfaces down",
        |handle| async move {
            for interface in interfaces {
                if let Some(index) = index_of(&handle, &interface).await? {
                    let down = LinkUnspec::new_with_index(index).down().build();
                    handle
                        .link()
                        .set(down)
                        .execute()
                        .await
                        .context(|| format!("take {interface} down"))?;
                }
            }
            Ok(())
        },
    )
    .await
}

/// Removes a link of this process's namespace, if it is there: a tap that was made but
/// never moved.
///
/// # Errors
/// Netlink refused.
pub async fn remove_tap(name: &str) -> Result<()> {
    let (handle, _driver) = open_rtnetlink()?;
    match index_of(&handle, name).await? {
        None => Ok(()),
        Some(index) => handle
            .link()
            .del(index)
            .execute()
            .await
            .context(|| format!("remove tap {name}")),
    }
}

/// A handle to the thread's network namespace, and the task that drives its connection: it
/// ends when it is dropped.
fn open_rtnetlink() -> Result<(Handle, JoinSet<()>)> {
    let (connection, handle, _) =
        rtnetlink::new_connection().context(|| "open a netlink socket".into())?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    Ok((handle, driver))
}

fn open_netns(path: &Path) -> Result<File> {
    File::open(path).context(|| format!("open network namespace {}", path.display()))
}

/// Runs `work` on a thread in the namespace, with a netlink handle made there.
async fn in_netns<T, F, Fut>(netns: File, what: &'static str, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(Handle) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>>,
{
    let (answer, answered) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("pod-netns".into())
        .spawn(move || {
            let result = (|| {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
                    .context(|| format!("{what}: join its namespace"))?;
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_io()
                    .enable_time()
                    .build()
                    .context(|| format!("{what}: start a runtime"))?;
                runtime.block_on(async {
                    let (handle, _driver) = open_rtnetlink().context(|| what.into())?;
                    work(handle).await
                })
            })();
            // The asker may have gone.
            let _ = answer.send(result);
        })
        .context(|| format!("{what}: start a thread"))?;
    answered
        .await
        .map_err(|_| Error::Unavailable(format!("{what}: its thread died"), None))?
}

async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(Error::other(format!("look up interface {name}"), error)),
    }
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else {
        return false;
    };
    let code = message.code.map_or(0, |code| -code.get());
    code == libc::ENODEV || code == libc::ENOENT
}

/// A tap appears a moment after libvirt answered at the latest, never later; one look is
/// enough. It may already be in the pod's namespace.
async fn move_link(handle: &Handle, name: &str, target: &File) -> Result<()> {
    let Some(index) = index_of(handle, name).await? else {
        return Ok(());
    };
    let moved = LinkUnspec::new_with_index(index)
        .setns_by_fd(target.as_raw_fd())
        .build();
    handle
        .link()
        .set(moved)
        .execute()
        .await
        .context(|| format!("move tap {name} into the pod's network namespace"))
}

/// Keeps the namespace's own stack from sending router solicitations and the like into
/// the guest. Without IPv6 there is nothing to silence.
fn silence(tap: &str) {
    let knob = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"));
    if let Err(error) = std::fs::write(&knob, "1") {
        log::debug!("{}: {error}", knob.display());
    }
}

async fn redirect(
    handle: &Handle,
    from: u32,
    to: u32,
) -> std::result::Result<(), rtnetlink::Error> {
    remove_ingress(handle, from).await;
    handle
        .qdisc()
        .add(from.cast_signed())
        .ingress()
        .execute()
        .await?;
    handle
        .traffic_filter(from.cast_signed())
        .add()
        .parent(INGRESS)
        .priority(REDIRECT_PRIORITY)
        .protocol(ALL_PROTOCOLS.to_be())
        .redirect(to)?
        .execute()
        .await
}

async fn remove_ingress(handle: &Handle, index: u32) {
    let mut request = handle.qdisc().del(index.cast_signed());
    let header = &mut request.message_mut().header;
    header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    header.handle = INGRESS.into();
    // Most often there is none.
    if let Err(error) = request.execute().await {
        log::trace!("remove ingress qdisc of interface {index}: {error}");
    }
}

async fn read_here(handle: &Handle) -> Result<Inventory> {
    let mut inventory = Inventory::default();
    let mut links = handle.link().get().execute();
    while let Some(message) = links.try_next().await.context(|| "list links".into())? {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            is_ethernet: message.header.link_layer_type == LinkLayerType::Ether
                && !message.header.flags.contains(LinkFlags::Loopback),
            mac: Vec::new(),
            mtu: 0,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                _ => {}
            }
        }
        inventory.links.push(link);
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses
        .try_next()
        .await
        .context(|| "list addresses".into())?
    {
        // On a point-to-point link `Address` is the peer; `Local` is ours where it exists.
        let mut ip = None;
        let mut local = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(address) => ip = Some(*address),
                AddressAttribute::Local(address) => local = Some(*address),
                _ => {}
            }
        }
        if let Some(ip) = local.or(ip) {
            inventory.addresses.push(Address {
                link: message.header.index,
                ip,
                prefix: message.header.prefix_len,
                is_link_local: message.header.scope == AddressScope::Link
                    && matches!(ip, IpAddr::V6(_)),
            });
        }
    }
    let all = [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ];
    for request in all {
        let mut routes = handle.route().get(request).execute().boxed_local();
        while let Some(message) = routes.try_next().await.context(|| "list routes".into())? {
            inventory.routes.extend(route_of(&message));
        }
    }
    Ok(inventory)
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let family = match header.address_family {
        AddressFamily::Inet => 4,
        AddressFamily::Inet6 => 6,
        _ => return None,
    };
    if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let mut route = Route {
        link: 0,
        destination: None,
        gateway: None,
        source: None,
        metric: 0,
        scope: header.scope.into(),
        family,
        by_kernel: header.protocol == RouteProtocol::Kernel,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.link = *index,
            RouteAttribute::Destination(to) => {
                route.destination = ip_of(to).map(|ip| (ip, header.destination_prefix_length));
            }
            RouteAttribute::Gateway(via) => route.gateway = ip_of(via),
            RouteAttribute::PrefSource(source) => route.source = ip_of(source),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    (route.link != 0).then_some(route)
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
