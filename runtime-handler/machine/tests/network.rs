//! The wiring of a tap into a pod's namespace, in namespaces of our own: what arrives at the
//! pod's eth0 is read by the machine, what the machine sends leaves by eth0, and the
//! namespace's own kernel answers nothing.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dyad_machine::network::{apply, plan};
use futures::TryStreamExt;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(10);
const POD: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 5);
const WORLD: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// A network namespace with a name, gone when dropped.
struct Netns {
    path: PathBuf,
}

impl Netns {
    fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        File::create(&path).expect("mount point");
        let to = path.clone();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
            let none: Option<&str> = None;
            mount(
                Some("/proc/thread-self/ns/net"),
                &to,
                none,
                MsFlags::MS_BIND,
                none,
            )
            .expect("bind the namespace");
        })
        .join()
        .expect("thread");
        Self { path }
    }

    fn enter(&self) {
        let file = File::open(&self.path).expect("namespace");
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
    }

    /// Runs netlink requests in it.
    fn with<F>(&self, work: impl FnOnce(Handle) -> F + Send) -> F::Output
    where
        F: Future,
        F::Output: Send,
    {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter();
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .expect("runtime");
                    runtime.block_on(async {
                        let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
                        tokio::spawn(connection);
                        work(handle).await
                    })
                })
                .join()
                .expect("thread")
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

async fn index(handle: &Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name).execute();
    links
        .try_next()
        .await
        .expect("link")
        .expect("link")
        .header
        .index
}

async fn up(handle: &Handle, name: &str) -> u32 {
    let index = index(handle, name).await;
    let message = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(message).execute().await.expect("up");
    index
}

/// What QEMU's end of a tap is.
fn open_tap(name: &str) -> File {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads the ifreq, which lives over the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &request) };
    assert_eq!(made, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    tun
}

/// A raw socket that sends and receives whole frames on a link of this thread's namespace.
fn raw_socket(index: u32) -> File {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: plain socket call; the result is checked.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(protocol),
        )
    };
    assert!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    // SAFETY: the fd was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the address lives over the call and its size is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(bound, 0, "bind: {}", std::io::Error::last_os_error());
    socket.into()
}

const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

fn arp(operation: u8, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, from.octets()[3]]);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, operation]);
    frame.extend([2, 0, 0, 0, 0, from.octets()[3]]);
    frame.extend(from.octets());
    frame.extend([0; 6]);
    frame.extend(to.octets());
    frame.resize(60, 0);
    frame
}

fn is_arp(frame: &[u8], operation: u8, from: Ipv4Addr) -> bool {
    frame.len() >= 42
        && frame[12..14] == [0x08, 0x06]
        && frame[21] == operation
        && frame[28..32] == from.octets()
}

/// The next frame that is wanted, out of all that pass; `None` after the time.
fn await_frame(
    file: &mut File,
    wanted: impl Fn(&[u8]) -> bool,
    bound: Duration,
) -> Option<Vec<u8>> {
    let deadline = Instant::now() + bound;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).expect("timeout");
        if left.is_zero() || poll(&mut fds, timeout).expect("poll") == 0 {
            return None;
        }
        match file.read(&mut buffer) {
            Ok(count) if wanted(&buffer[..count]) => return Some(buffer[..count].to_vec()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("read: {error}"),
        }
    }
}

#[test]
fn the_machine_takes_over_the_pod_s_interface_and_the_kernel_stays_silent() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let host = Netns::new(dir.path(), "host");
    let pod = Netns::new(dir.path(), "pod");
    let world = Netns::new(dir.path(), "world");

    // What CNI does.
    let world_fd = File::open(&world.path).expect("namespace");
    pod.with(|handle| async move {
        let mac = vec![0x0a, 0x58, 10, 99, 0, 5];
        let pair = LinkVeth::new("eth0", "peer0")
            .address(mac)
            .mtu(1400)
            .build();
        handle.link().add(pair).execute().await.expect("veth");
        let peer = index(&handle, "peer0").await;
        let moved = LinkUnspec::new_with_index(peer)
            .setns_by_fd(world_fd.as_raw_fd())
            .build();
        handle.link().set(moved).execute().await.expect("move");
        let eth0 = up(&handle, "eth0").await;
        handle
            .address()
            .add(eth0, IpAddr::V4(POD), 24)
            .execute()
            .await
            .expect("address");
    });
    world.with(|handle| async move {
        let peer = up(&handle, "peer0").await;
        handle
            .address()
            .add(peer, IpAddr::V4(WORLD), 24)
            .execute()
            .await
            .expect("address");
    });
    pod.with(|handle| async move {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(WORLD)
            .build();
        handle.route().add(route).execute().await.expect("route");
    });

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    // This thread is the shim, in the host's namespace.
    host.enter();
    let machine = Uuid::from_u128(0xabcd_ef01_2345_6789_abcd_ef01_2345_6789);
    let plan = runtime.block_on(async {
        let found = apply::read(&pod.path).await.expect("read");
        plan::plan(machine, &found.links, &found.addresses, &found.routes).expect("plan")
    });
    let [interface] = &plan.interfaces[..] else {
        panic!("one interface, not {plan:?}");
    };
    assert_eq!(interface.name, "eth0");
    assert_eq!(interface.mac, "0a:58:0a:63:00:05");
    assert_eq!(interface.mtu, 1400);
    assert_eq!(interface.addresses, ["10.99.0.5/24"]);
    let [route] = &plan.routes[..] else {
        panic!("one route, not {plan:?}");
    };
    assert_eq!(
        (route.destination.as_str(), route.gateway.as_str()),
        ("", "10.99.0.1")
    );

    let localhost = plan.localhost.as_ref().expect("a way to localhost");
    let mut guest = open_tap(&interface.tap);
    runtime.block_on(async {
        // A create that is asked again finds the tap in the pod already.
        for _ in 0..2 {
            apply::wire(&pod.path, interface, Some(localhost))
                .await
                .expect("wire");
        }
    });
    the_pod_s_localhost_is_the_guest_s(&pod, &mut guest);
    let loopback = Ipv4Addr::new(127, 0, 0, 1);

    let mut outside = std::thread::scope(|scope| {
        let opened = scope.spawn(|| {
            world.enter();
            // SAFETY: the name is NUL-terminated.
            let index = unsafe { libc::if_nametoindex(c"peer0".as_ptr()) };
            raw_socket(index)
        });
        opened.join().expect("thread")
    });
    // Nobody on the wire reaches the guest's loopback, or passes for it.
    for (from, to) in [(WORLD, loopback), (Ipv4Addr::new(127, 0, 0, 2), POD)] {
        let frame = syn([0x0a, 0x58, 10, 99, 0, 5], from, to);
        outside.write_all(&frame).expect("send");
    }
    outside
        .write_all(&arp(ARP_REQUEST, Ipv4Addr::new(10, 99, 0, 77), POD))
        .expect("send");
    let is_loopback =
        |frame: &[u8]| frame[12..14] == [8, 0] && (frame[26] == 127 || frame[30] == 127);
    let asked_or_loopback = |frame: &[u8]| {
        is_loopback(frame) || is_arp(frame, ARP_REQUEST, Ipv4Addr::new(10, 99, 0, 77))
    };
    let first = await_frame(&mut guest, asked_or_loopback, PATIENCE).expect("a frame");
    assert!(
        !is_loopback(&first),
        "from the wire to the loopback: {first:x?}"
    );
    outside
        .write_all(&arp(ARP_REQUEST, Ipv4Addr::new(10, 99, 0, 77), POD))
        .expect("send");
    let asked = |frame: &[u8]| is_arp(frame, ARP_REQUEST, Ipv4Addr::new(10, 99, 0, 77));
    await_frame(&mut guest, asked, PATIENCE).expect("the guest sees who asks for the pod");

    // Only now the guest answers; had the kernel, its answer would be first.
    guest
        .write_all(&arp(ARP_REPLY, Ipv4Addr::new(10, 99, 0, 200), WORLD))
        .expect("send");
    let any_reply =
        |frame: &[u8]| frame.len() > 21 && frame[12..14] == [8, 6] && frame[21] == ARP_REPLY;
    let first = await_frame(&mut outside, any_reply, PATIENCE).expect("the guest's answer arrives");
    assert!(
        is_arp(&first, ARP_REPLY, Ipv4Addr::new(10, 99, 0, 200)),
        "the namespace's kernel answered for the pod: {first:x?}"
    );

    // Undone, the kernel answers again.
    runtime.block_on(async {
        apply::unwire(&pod.path, vec!["eth0".into(), "gone0".into()])
            .await
            .expect("unwire");
    });
    outside
        .write_all(&arp(ARP_REQUEST, WORLD, POD))
        .expect("send");
    let kernels = |frame: &[u8]| is_arp(frame, ARP_REPLY, POD);
    await_frame(&mut outside, kernels, PATIENCE).expect("the pod's kernel answers again");
    std::thread::scope(|scope| {
        let own = scope.spawn(|| {
            pod.enter();
            std::net::TcpListener::bind("127.0.0.1:0").map(drop)
        });
        let bound = own.join().expect("thread");
        bound.expect("the pod has its own localhost again");
    });
}

/// A dial of 127.0.0.1 in the pod arrives at the guest, and its answer at who dialled;
/// only so much of the guest's reaches the pod's stack.
fn the_pod_s_localhost_is_the_guest_s(pod: &Netns, guest: &mut File) {
    let loopback = Ipv4Addr::new(127, 0, 0, 1);
    let host = Ipv4Addr::new(169, 254, 255, 253);
    let dialled = std::thread::scope(|scope| {
        let dial = scope.spawn(|| {
            pod.enter();
            let to = std::net::SocketAddr::from((loopback, 8080));
            std::net::TcpStream::connect_timeout(&to, PATIENCE)
        });
        let is_syn = |frame: &[u8]| frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6;
        let asked = await_frame(guest, is_syn, PATIENCE).expect("the dial arrives");
        assert_eq!(
            asked[..6],
            [0x0a, 0x58, 10, 99, 0, 5],
            "the guest's own MAC"
        );
        assert_eq!(asked[26..30], host.octets());
        assert_eq!(asked[30..34], loopback.octets());
        // Nobody listens: what the guest's kernel would answer.
        guest.write_all(&reset(&asked)).expect("send");
        dial.join().expect("thread")
    });
    let error = dialled.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

const TCP_RST_ACK: u8 = 0x14;
const TCP_SYN: u8 = 0x02;

/// An Ethernet frame with a TCP segment without data.
fn tcp(
    macs: ([u8; 6], [u8; 6]),
    ips: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    numbers: (u32, u32),
    flags: u8,
) -> Vec<u8> {
    let sum = |bytes: &[u8], start: u32| {
        let words = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let mut sum = start + words.sum::<u32>();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    };
    let mut segment = Vec::new();
    segment.extend(ports.0.to_be_bytes());
    segment.extend(ports.1.to_be_bytes());
    segment.extend(numbers.0.to_be_bytes());
    segment.extend(numbers.1.to_be_bytes());
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let mut pseudo = Vec::new();
    pseudo.extend(ips.0.octets());
    pseudo.extend(ips.1.octets());
    pseudo.extend([0, 6, 0, segment.len() as u8]);
    pseudo.extend(&segment);
    let check = sum(&pseudo, 0);
    segment[16..18].copy_from_slice(&check.to_be_bytes());
    let mut header = vec![
        0x45,
        0,
        0,
        20 + segment.len() as u8,
        0,
        1,
        0,
        0,
        64,
        6,
        0,
        0,
    ];
    header.extend(ips.0.octets());
    header.extend(ips.1.octets());
    let check = sum(&header, 0);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    let mut frame = Vec::new();
    frame.extend(macs.1);
    frame.extend(macs.0);
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend(segment);
    frame
}

fn syn(to_mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let macs = ([2, 0, 0, 0, 0, 9], to_mac);
    tcp(macs, (from, to), (40000, 8080), (1, 0), TCP_SYN)
}

/// The answer to `asked` of a kernel where nobody listens.
fn reset(asked: &[u8]) -> Vec<u8> {
    let field = |at: usize| u32::from_be_bytes(asked[at..at + 4].try_into().expect("4 bytes"));
    let port = |at: usize| u16::from_be_bytes([asked[at], asked[at + 1]]);
    let mac = |at: usize| asked[at..at + 6].try_into().expect("6 bytes");
    tcp(
        (mac(0), mac(6)),
        (Ipv4Addr::from(field(30)), Ipv4Addr::from(field(26))),
        (port(36), port(34)),
        (0, field(38).wrapping_add(1)),
        TCP_RST_ACK,
    )
}

#[test]
fn a_tap_that_was_never_moved_is_removed_and_an_absent_one_is_fine() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let host = Netns::new(dir.path(), "host");
    host.enter();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    let _guest = open_tap("dytest0");
    runtime.block_on(async {
        apply::remove_tap("dytest0").await.expect("remove");
        apply::remove_tap("dytest0").await.expect("remove again");
        let interface = plan::Interface {
            name: "eth0".into(),
            tap: "dytest0".into(),
            mac: "0a:58:0a:63:00:05".into(),
            mtu: 1500,
            addresses: Vec::new(),
        };
        let error = apply::wire(&host.path, &interface, None)
            .await
            .expect_err("no tap");
        assert!(error.to_string().contains("dytest0"), "{error}");
        let gone = Path::new("/run/netns/no-such-namespace");
        apply::unwire(gone, vec!["eth0".into()])
            .await
            .expect("nothing to undo");
        assert!(apply::read(gone).await.is_err());
    });
}
