//! What the guest's network is to be, from what the pod's namespace has. Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::localhost::{self, Localhost};

/// Taps' names begin so.
const TAP_PREFIX: &str = "dy";

/// PCI slots 08..1d carry interfaces.
pub const MAX_INTERFACES: usize = 16;

/// A link of the pod's namespace, as netlink tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Ethernet and not loopback.
    pub is_ethernet: bool,
    /// Hardware address.
    pub mac: Vec<u8>,
    /// Largest packet.
    pub mtu: u32,
}

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The link's index.
    pub link: u32,
    /// The address itself.
    pub ip: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// Made by the kernel from the MAC; the guest makes its own.
    pub is_link_local: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The link's index.
    pub link: u32,
    /// `None`: the default route.
    pub destination: Option<(IpAddr, u8)>,
    /// `None`: directly on the link.
    pub gateway: Option<IpAddr>,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// Priority.
    pub metric: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// 4 or 6.
    pub family: u8,
    /// The kernel made it for an address; the guest's makes its own.
    pub by_kernel: bool,
}

/// One interface that the guest takes over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The name in the pod, and in the guest.
    pub name: String,
    /// Host-unique name of its tap.
    pub tap: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Largest packet.
    pub mtu: u32,
    /// CIDR notation.
    pub addresses: Vec<String>,
}

/// A route for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRoute {
    /// CIDR; empty: the default route.
    pub destination: String,
    /// Empty: directly on the link.
    pub gateway: String,
    /// Interface name.
    pub interface: String,
    /// Empty: the kernel's choice.
    pub source: String,
    /// Priority.
    pub metric: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// 4 or 6.
    pub family: u8,
}

/// The guest's network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkPlan {
    /// In the order of the pod's links.
    pub interfaces: Vec<Interface>,
    /// In the order to be added: a gateway is reachable before it is named.
    pub routes: Vec<GuestRoute>,
    /// The way to the guest's localhost.
    pub localhost: Option<Localhost>,
}

/// Addresses and routes of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Held {
    /// Each interface's name and addresses, in the order of the pod's links.
    pub interfaces: Vec<(String, Vec<String>)>,
    /// Its routes.
    pub routes: Vec<GuestRoute>,
}

impl Held {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty() && self.interfaces.iter().all(|(_, held)| held.is_empty())
    }

    /// What a guest has when it was made by this plan and has `former` still.
    pub fn of(plan: &NetworkPlan, former: &Self) -> Self {
        let interfaces = plan.interfaces.iter().enumerate().map(|(at, interface)| {
            let more = former.interfaces.get(at).map(|(_, more)| more.clone());
            let all = [interface.addresses.clone(), more.unwrap_or_default()].concat();
            (interface.name.clone(), all)
        });
        Self {
            interfaces: interfaces.collect(),
            routes: [plan.routes.clone(), former.routes.clone()].concat(),
        }
    }

    /// What of it is not in the plan, by the plan's names of the interfaces.
    #[must_use]
    pub fn beyond(self, plan: &NetworkPlan) -> Self {
        let names: Vec<String> = self
            .interfaces
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let renamed = |name: &str| {
            let at = names.iter().position(|old| old == name)?;
            Some(plan.interfaces.get(at)?.name.clone())
        };
        let routes = self.routes.into_iter().filter_map(|mut route| {
            route.interface = renamed(&route.interface)?;
            (!plan.routes.contains(&route)).then_some(route)
        });
        let interfaces = plan.interfaces.iter().zip(self.interfaces);
        let interfaces = interfaces.map(|(own, (_, mut addresses))| {
            addresses.retain(|address| !own.addresses.contains(address));
            (own.name.clone(), addresses)
        });
        Self {
            routes: routes.collect(),
            interfaces: interfaces.collect(),
        }
    }
}

/// Why the pod's network cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkPlanError {
    /// More than the machine has slots for.
    #[error(
        "the pod has {0} network interfaces, a machine takes at most {MAX_INTERFACES}; attach fewer networks to the pod"
    )]
    TooManyInterfaces(usize),
    /// Netlink told no usable hardware address.
    #[error("interface {0} has no Ethernet address")]
    NoMac(String),
}

/// Decides what the guest gets.
///
/// # Errors
/// An interface that cannot be taken over, by name.
pub fn plan(
    machine: Uuid,
    links: &[Link],
    addresses: &[Address],
    routes: &[Route],
) -> Result<NetworkPlan, NetworkPlanError> {
    let mut taken: Vec<&Link> = links
        .iter()
        .filter(|link| link.is_ethernet && !link.name.starts_with(TAP_PREFIX))
        // A dummy or a bridge inside the pod has no address of the pod; only what has one counts.
        .filter(|link| addresses.iter().any(|a| a.link == link.index))
        .collect();
    taken.sort_by_key(|link| link.index);
    if taken.len() > MAX_INTERFACES {
        return Err(NetworkPlanError::TooManyInterfaces(taken.len()));
    }

    let mut interfaces = Vec::new();
    for (position, link) in taken.iter().enumerate() {
        if link.mac.len() != 6 {
            return Err(NetworkPlanError::NoMac(link.name.clone()));
        }
        interfaces.push(Interface {
            name: link.name.clone(),
            tap: tap_name(machine, position),
            mac: format_mac(&link.mac),
            mtu: link.mtu,
            addresses: addresses
                .iter()
                .filter(|a| a.link == link.index && !a.is_link_local)
                .map(|a| format!("{}/{}", a.ip, a.prefix))
                .collect(),
        });
    }

    let mut wanted: Vec<(&Route, &Link)> = routes
        .iter()
        .filter(|route| !route.by_kernel)
        .filter_map(|route| {
            let link = taken.iter().find(|link| link.index == route.link)?;
            Some((route, *link))
        })
        .collect();
    wanted.sort_by_key(|(route, _)| route.gateway.is_some());
    let localhost = localhost::plan(&interfaces, addresses, routes);
    let routes = wanted
        .into_iter()
        .map(|(route, link)| GuestRoute {
            destination: route
                .destination
                .map(|(ip, prefix)| format!("{ip}/{prefix}"))
                .unwrap_or_default(),
            gateway: route.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
            interface: link.name.clone(),
            source: route.source.map(|ip| ip.to_string()).unwrap_or_default(),
            metric: route.metric,
            scope: route.scope,
            family: route.family,
        })
        .collect();
    Ok(NetworkPlan {
        interfaces,
        routes,
        localhost,
    })
}

/// At most 13 of the kernel's 15 characters, unique per machine and interface: libvirt
/// creates the tap in the host's namespace, where all pods' taps meet.
pub fn tap_name(machine: Uuid, position: usize) -> String {
    let id = machine.simple().to_string();
    format!("{TAP_PREFIX}{}{position:x}", &id[..10])
}

pub(super) fn format_mac(mac: &[u8]) -> String {
    let parts: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

/// The six bytes of `aa:bb:cc:dd:ee:ff`.
///
/// # Errors
/// The text is none.
pub(super) fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkPlanError> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| NetworkPlanError::NoMac(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            is_ethernet: name != "lo",
            mac: vec![0x0a, 0x58, 0x0a, 0x58, 0, 5],
            mtu: 1450,
        }
    }

    fn address(link: u32, ip: &str, prefix: u8) -> Address {
        Address {
            link,
            ip: ip.parse().expect("ip"),
            prefix,
            is_link_local: ip.starts_with("fe80"),
        }
    }

    fn route(link: u32, destination: Option<(&str, u8)>, gateway: Option<&str>) -> Route {
        Route {
            link,
            destination: destination.map(|(ip, prefix)| (ip.parse().expect("ip"), prefix)),
            gateway: gateway.map(|ip| ip.parse().expect("ip")),
            source: None,
            metric: 0,
            scope: if gateway.is_some() { 0 } else { 253 },
            family: 4,
            by_kernel: false,
        }
    }

    #[test]
    fn the_guest_gets_what_cni_gave_the_pod() {
        let links = [link(1, "lo"), link(2, "eth0")];
        let addresses = [
            address(1, "127.0.0.1", 8),
            address(2, "10.88.0.5", 16),
            address(2, "fe80::1", 64),
        ];
        let mut kernel = route(2, Some(("10.88.0.0", 16)), None);
        kernel.by_kernel = true;
        let routes = [kernel, route(2, None, Some("10.88.0.1"))];
        let plan = plan(MACHINE, &links, &addresses, &routes).expect("plan");
        assert_eq!(
            plan.interfaces,
            [Interface {
                name: "eth0".into(),
                tap: "dy01234567890".into(),
                mac: "0a:58:0a:58:00:05".into(),
                mtu: 1450,
                addresses: vec!["10.88.0.5/16".into()],
            }]
        );
        assert_eq!(plan.routes.len(), 1);
        assert_eq!(plan.routes[0].gateway, "10.88.0.1");
        assert_eq!(plan.routes[0].destination, "");
    }

    #[test]
    fn a_gateway_s_own_route_comes_before_the_route_through_it() {
        let links = [link(2, "eth0")];
        let addresses = [address(2, "10.1.2.3", 32)];
        let routes = [
            route(2, None, Some("169.254.1.1")),
            route(2, Some(("169.254.1.1", 32)), None),
        ];
        let plan = plan(MACHINE, &links, &addresses, &routes).expect("plan");
        assert_eq!(plan.routes[0].destination, "169.254.1.1/32");
        assert_eq!(plan.routes[0].scope, 253);
        assert_eq!(plan.routes[1].gateway, "169.254.1.1");
    }

    #[test]
    fn our_own_tap_and_links_without_address_are_not_taken_over() {
        let links = [link(2, "eth0"), link(3, "dy01234567890"), link(4, "dummy0")];
        let addresses = [address(2, "10.1.2.3", 24), address(3, "fe80::2", 64)];
        let plan = plan(MACHINE, &links, &addresses, &[]).expect("plan");
        assert_eq!(plan.interfaces.len(), 1);
    }

    #[test]
    fn two_interfaces_keep_their_order_and_get_taps_of_their_own() {
        let links = [link(5, "net1"), link(2, "eth0")];
        let addresses = [address(5, "10.2.0.9", 24), address(2, "10.1.2.3", 24)];
        let plan = plan(MACHINE, &links, &addresses, &[]).expect("plan");
        let names: Vec<&str> = plan.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"]);
        assert_ne!(plan.interfaces[0].tap, plan.interfaces[1].tap);
        assert!(plan.interfaces.iter().all(|i| i.tap.len() <= 15));
    }

    #[test]
    fn what_only_the_source_had_is_what_goes() {
        let at = |name: &str, ip: &str, gateway: &str| {
            let links = [link(2, name)];
            let routes = [route(2, None, Some(gateway))];
            plan(MACHINE, &links, &[address(2, ip, 24)], &routes).expect("plan")
        };
        let none = Held::default();
        let first = at("eth0", "10.1.0.2", "10.1.0.1");
        let came = Held::of(&first, &none);
        assert!(came.clone().beyond(&first).is_empty());

        // On another node, under another name.
        let second = at("net0", "10.1.0.9", "10.1.0.1");
        let former = came.beyond(&second);
        assert_eq!(
            former.interfaces,
            [("net0".into(), vec!["10.1.0.2/24".into()])]
        );
        assert_eq!(former.routes, [], "the gateway is the same");

        // On again, before it went: both go; and back to where the first address is.
        let came = Held::of(&second, &former);
        let third = at("eth0", "10.2.0.2", "10.2.0.1");
        let former = came.clone().beyond(&third);
        let both = vec!["10.1.0.9/24".to_owned(), "10.1.0.2/24".into()];
        assert_eq!(former.interfaces, [("eth0".into(), both)]);
        assert_eq!(former.routes[0].gateway, "10.1.0.1");
        let former = came.beyond(&first);
        assert_eq!(
            former.interfaces,
            [("eth0".into(), vec!["10.1.0.9/24".into()])]
        );
    }

    #[test]
    fn too_many_interfaces_are_refused_with_the_number() {
        let links: Vec<Link> = (1..=17).map(|i| link(i, &format!("net{i}"))).collect();
        let addresses: Vec<Address> = (1..=17).map(|i| address(i, "10.0.0.1", 24)).collect();
        let error = plan(MACHINE, &links, &addresses, &[]).expect_err("refused");
        assert!(error.to_string().contains("17"));
    }

    #[test]
    fn a_link_without_ethernet_address_is_refused_by_name() {
        let mut bad = link(2, "eth0");
        bad.mac = vec![0; 4];
        let error = plan(MACHINE, &[bad], &[address(2, "10.0.0.1", 24)], &[]).expect_err("refused");
        assert!(error.to_string().contains("eth0"));
    }
}
