//! Gives the namespace's 127.0.0.0/8 to the guest.

use std::net::{IpAddr, Ipv4Addr};

use dyad_runtime_handler::error::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::tc::{TcFilterU32Option, TcU32Key, TcU32Selector, TcU32SelectorFlags};
use rtnetlink::{Error, Handle, LinkUnspec, RouteMessageBuilder};

use super::{INGRESS, index_of};
use crate::network::localhost::Localhost;
use crate::network::plan::parse_mac;

/// Before the redirection of everything else.
const PRIORITY: u16 = 1;
const IPV4: u16 = libc::ETH_P_IP as u16;
/// Where the tap's route is not, because the machine is off, a dial fails at once.
const LAST_RESORT: u32 = 0x7fff_ffff;
/// Offsets in an IPv4 header.
const PROTOCOL: i32 = 8;
const SOURCE: i32 = 12;
const DESTINATION: i32 = 16;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
const LOOPBACK_NET: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 0);
const LOOPBACK_MASK: u32 = 0xff00_0000;

/// The tap's own part: address, next hop, route, and the guest's answers to the stack.
/// The tap is up and has its redirection.
pub(super) async fn open(
    handle: &Handle,
    tap: &str,
    index: u32,
    guest_mac: &str,
    localhost: &Localhost,
) -> Result<()> {
    let doing = || format!("give the pod's localhost to the guest, by tap {tap}");
    set(tap, "route_localnet", "1").context(doing)?;
    // What comes from elsewhere than the addresses routed there is dropped.
    set(tap, "rp_filter", "1").context(doing)?;
    let mac = parse_mac(&localhost.host_mac).context(doing)?;
    let link = LinkUnspec::new_with_index(index).address(mac).build();
    handle.link().set(link).execute().await.context(doing)?;
    handle
        .address()
        .add(index, IpAddr::V4(localhost.host), 32)
        .replace()
        .execute()
        .await
        .context(doing)?;
    handle
        .neighbours()
        .add(index, IpAddr::V4(localhost.guest))
        .link_layer_address(&parse_mac(guest_mac).context(doing)?)
        .replace()
        .execute()
        .await
        .context(doing)?;
    let answers = [
        key(SOURCE, LOOPBACK_NET.to_bits(), LOOPBACK_MASK),
        key(DESTINATION, localhost.host.to_bits(), u32::MAX),
        key(PROTOCOL, (libc::IPPROTO_TCP as u32) << 16, 0x00ff_0000),
    ];
    to_stack(handle, index, &answers).await.context(doing)?;

    // Last, for now the namespace has none of its own.
    take_address(handle).await.context(doing)?;
    let way = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(LOOPBACK_NET, 8)
        .gateway(localhost.guest)
        .output_interface(index)
        .pref_source(localhost.host)
        .onlink()
        .build();
    let nowhere = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(LOOPBACK_NET, 8)
        .kind(RouteType::Unreachable)
        .priority(LAST_RESORT)
        .build();
    for route in [way, nowhere] {
        let added = handle.route().add(route).replace().execute().await;
        added.context(doing)?;
    }
    Ok(())
}

/// Keeps 127.0.0.0/8 off the wire: the guest would take such a packet for one of the
/// pod's own. The namespace's stack drops it instead.
pub(super) async fn guard(
    handle: &Handle,
    interface: &str,
    index: u32,
) -> std::result::Result<(), Error> {
    for name in ["all", interface] {
        // A host's own setting (kube-proxy's) is inherited.
        if let Err(error) = set(name, "route_localnet", "0") {
            log::warn!("route_localnet of {interface}: {error}");
        }
    }
    for offset in [SOURCE, DESTINATION] {
        let loopback = key(offset, LOOPBACK_NET.to_bits(), LOOPBACK_MASK);
        to_stack(handle, index, &[loopback]).await?;
    }
    Ok(())
}

/// The namespace has its own localhost again.
pub(super) async fn close(handle: &Handle) {
    let restored = async {
        let Some(lo) = index_of(handle, "lo").await? else {
            return Ok(());
        };
        let add = handle.address().add(lo, IpAddr::V4(LOOPBACK), 8).replace();
        add.execute().await.context(|| "add 127.0.0.1 to lo".into())
    };
    let restored: Result<()> = restored.await;
    if let Err(error) = restored {
        log::debug!("{}", error.chain());
    }
}

/// Takes 127.0.0.0/8 off the loopback, and with it the kernel's own routes there.
async fn take_address(handle: &Handle) -> std::result::Result<(), Error> {
    let found: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    let is_loopback = |message: &AddressMessage| {
        message.attributes.iter().any(|attribute| {
            matches!(attribute, AddressAttribute::Local(IpAddr::V4(ip)) if ip.is_loopback())
        })
    };
    for message in found.into_iter().filter(is_loopback) {
        handle.address().del(message).execute().await?;
    }
    Ok(())
}

/// A filter without an action ends the classification: the packet goes on to the stack.
async fn to_stack(
    handle: &Handle,
    index: u32,
    keys: &[TcU32Key],
) -> std::result::Result<(), Error> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = keys.len() as u8;
    selector.keys = keys.to_vec();
    handle
        .traffic_filter(index.cast_signed())
        .add()
        .parent(INGRESS)
        .priority(PRIORITY)
        .protocol(IPV4.to_be())
        .u32(&[TcFilterU32Option::Selector(selector)])?
        .execute()
        .await
}

fn key(offset: i32, value: u32, mask: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.val = value;
    key.mask = mask;
    key
}

fn set(interface: &str, name: &str, value: &str) -> std::io::Result<()> {
    std::fs::write(format!("/proc/sys/net/ipv4/conf/{interface}/{name}"), value)
}
