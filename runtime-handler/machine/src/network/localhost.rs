//! How the pod's namespace reaches the guest's own 127.0.0.0/8. Pure.
//!
//! containerd forwards a port by dialling `localhost` in the pod's namespace, and what
//! listens there listens in the guest. So the namespace gives its 127.0.0.0/8 away: a route
//! sends it through the tap, from a link-local address that only the two of them know.
//!
//! ```text
//!  pod's namespace                        guest
//!   127.0.0.0/8 via GUEST, src HOST -> tap -> eth0 (route_localnet): 127.0.0.1:PORT
//!   HOST on the tap <- to the stack <- tap <- HOST/32 on eth0, from 127.0.0.1
//! ```
//! Both neighbours are static, so nothing is asked on the wire. IPv6 has no such way: a
//! kernel drops `::1` on every link but the loopback.

use std::net::{IpAddr, Ipv4Addr};

use super::plan::{Address, Interface, Route};

/// The tap's own hardware address, the same in every pod: a guest that moves to another
/// host keeps its neighbour.
const TAP_MAC: [u8; 6] = [0x02, 0x64, 0x79, 0x61, 0x64, 0x01];

/// The last 256 addresses of 169.254.0.0/16 are reserved (RFC 3927, 2.1): nobody gives
/// himself one, and the clouds' and CNI plugins' own services are elsewhere.
const FIRST: Ipv4Addr = Ipv4Addr::new(169, 254, 255, 0);

/// The way to the guest's localhost, through its first interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Localhost {
    /// The interface's name in the guest.
    pub interface: String,
    /// On the tap: what connections come from, as the guest sees them.
    pub host: Ipv4Addr,
    /// The next hop to the guest; nobody has it.
    pub guest: Ipv4Addr,
    /// The tap's hardware address.
    pub host_mac: String,
}

/// Chooses two addresses that the pod does not know by any other way. `None`: it has no
/// interface, or routes of its own to each pair.
pub fn plan(
    interfaces: &[Interface],
    addresses: &[Address],
    routes: &[Route],
) -> Option<Localhost> {
    let interface = interfaces.first()?;
    let is_taken = |ip: Ipv4Addr| {
        let known = addresses.iter().any(|address| address.ip == ip);
        known || routes.iter().any(|route| names(route, ip))
    };
    (0..=126_u8).rev().find_map(|pair| {
        let [a, b, c, _] = FIRST.octets();
        // Downwards from .254 and .253.
        let guest = Ipv4Addr::new(a, b, c, pair * 2 + 2);
        let host = Ipv4Addr::new(a, b, c, pair * 2 + 1);
        (!is_taken(host) && !is_taken(guest)).then(|| Localhost {
            interface: interface.name.clone(),
            host,
            guest,
            host_mac: super::plan::format_mac(&TAP_MAC),
        })
    })
}

/// Whether the route leads to that very address or its neighbourhood, or through it. A
/// wider one (169.254.0.0/16 as a whole) says nothing of a single address.
fn names(route: &Route, ip: Ipv4Addr) -> bool {
    let leads_there = matches!(route.destination, Some((IpAddr::V4(to), prefix))
        if prefix >= 24 && shares_prefix(to, ip, prefix));
    leads_there || route.gateway == Some(IpAddr::V4(ip)) || route.source == Some(IpAddr::V4(ip))
}

fn shares_prefix(a: Ipv4Addr, b: Ipv4Addr, prefix: u8) -> bool {
    let differ = a.to_bits() ^ b.to_bits();
    differ.checked_shr(32 - u32::from(prefix.min(32))) == Some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            tap: "dy01234567890".into(),
            mac: "0a:58:0a:58:00:05".into(),
            mtu: 1450,
            addresses: vec!["10.88.0.5/16".into()],
        }
    }

    fn route(destination: Option<(&str, u8)>, gateway: Option<&str>) -> Route {
        Route {
            link: 2,
            destination: destination.map(|(ip, prefix)| (ip.parse().expect("ip"), prefix)),
            gateway: gateway.map(|ip| ip.parse().expect("ip")),
            source: None,
            metric: 0,
            scope: 0,
            family: 4,
            by_kernel: false,
        }
    }

    fn host(addresses: &[&str], routes: &[Route]) -> Option<String> {
        let addresses: Vec<Address> = addresses
            .iter()
            .map(|ip| Address {
                link: 2,
                ip: ip.parse().expect("ip"),
                prefix: 32,
                is_link_local: false,
            })
            .collect();
        plan(&[interface()], &addresses, routes).map(|found| found.host.to_string())
    }

    #[test]
    fn the_first_pair_is_taken_through_the_first_interface() {
        let found = plan(&[interface()], &[], &[]).expect("plan");
        assert_eq!(
            found,
            Localhost {
                interface: "eth0".into(),
                host: Ipv4Addr::new(169, 254, 255, 253),
                guest: Ipv4Addr::new(169, 254, 255, 254),
                host_mac: "02:64:79:61:64:01".into(),
            }
        );
        assert_eq!(plan(&[], &[], &[]), None);
    }

    #[test]
    fn what_the_pod_knows_by_another_way_is_not_taken() {
        let second = Some("169.254.255.251".to_owned());
        let cases: [(&[&str], Vec<Route>); 5] = [
            (&["169.254.255.253"], vec![]),
            (&["169.254.255.254"], vec![]),
            (&[], vec![route(None, Some("169.254.255.254"))]),
            (&[], vec![route(Some(("169.254.255.253", 32)), None)]),
            (&[], vec![route(Some(("169.254.255.254", 31)), None)]),
        ];
        for (addresses, routes) in cases {
            assert_eq!(host(addresses, &routes), second, "{addresses:?} {routes:?}");
        }
    }

    #[test]
    fn a_route_to_all_link_local_addresses_or_to_other_ones_takes_none() {
        let first = Some("169.254.255.253".to_owned());
        let routes = [
            route(Some(("169.254.0.0", 16)), None),
            route(Some(("169.254.1.1", 32)), None),
            route(None, Some("169.254.1.1")),
        ];
        assert_eq!(host(&["169.254.20.10"], &routes), first);
    }

    #[test]
    fn a_pod_that_routes_them_all_gets_none() {
        assert_eq!(host(&[], &[route(Some(("169.254.255.0", 24)), None)]), None);
    }
}
