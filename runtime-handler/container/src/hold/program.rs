//! The two stages, each a process of its own. Single-threaded: namespaces are a thread's.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dyad_runtime_handler::error::{Context as _, Error, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use super::order::Order;

/// The word that makes the program the maker.
pub const MAKE: &str = "-hold-make";
/// The word that makes the program the holder.
pub const HOLD: &str = "-hold";

/// What the holder says when the pod is as ordered.
pub(super) const READY: &str = "ready";
/// The pause image's user.
const NOBODY: u32 = 65535;
/// A pause container's: the last to go when memory is short. Not every host lets us.
const OOM_SCORE: &str = "-998";
/// The empty root is mounted over this directory, which every host has; seen by nobody
/// else. The holder's standard streams are open already.
const ROOT: &str = "/dev";
/// The holder's own executable in its root.
const EXECUTABLE: &str = "/dev/holder";
/// No order is longer.
const ORDER_BYTES: usize = 1 << 20;

/// The first stage. Its order is the first line on stdin, which it leaves to the holder;
/// tells the holder's pid on stdout.
///
/// # Errors
/// What the kernel refused.
pub fn make() -> Result<()> {
    let order = read_order()?;
    for file in &order.procs_files {
        fs::write(file, "0").context(|| format!("join the cgroup: write {}", file.display()))?;
    }
    if let Some(path) = &order.netns {
        let namespace =
            File::open(path).context(|| format!("open network namespace {}", path.display()))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)
            .context(|| format!("join network namespace {}", path.display()))?;
    }
    let mut new = CloneFlags::CLONE_NEWNS;
    new.set(CloneFlags::CLONE_NEWNET, order.network);
    new.set(CloneFlags::CLONE_NEWUTS, order.uts);
    new.set(CloneFlags::CLONE_NEWIPC, order.ipc);
    // Of our child, not of ourselves.
    new.set(CloneFlags::CLONE_NEWPID, order.pid);
    unshare(new).context(|| format!("make the pod's namespaces ({new:?})"))?;
    if let Some(name) = order.hostname.as_ref().filter(|_| order.uts) {
        nix::unistd::sethostname(name).context(|| format!("set the host name {name:?}"))?;
    }
    if order.network {
        loopback_up().context(|| "bring the pod's loopback interface up".into())?;
    }
    for (file, value) in &order.sysctls {
        fs::write(file, value).context(|| format!("write {value:?} to {}", file.display()))?;
    }
    // Lowering it takes a right that the shim may lack.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    make_root().context(|| "make the holder's root".into())?;
    let holder = Command::new(EXECUTABLE)
        .arg0("dyad-pod")
        .args([HOLD, &order.name])
        .env_clear()
        .spawn()
        .context(|| "run the holder".into())?;
    println!("{}", holder.id());
    io::stdout()
        .flush()
        .context(|| "tell the holder's pid".into())
}

/// As in any new network namespace (netdevice(7)): `lo` has its addresses once it is up.
fn loopback_up() -> nix::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes are a valid ifreq: numbers, bytes, and pointers that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the descriptor is open, and the kernel only reads the whole ifreq it is given.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
    Errno::result(done).map(drop)
}

/// Byte by byte: what follows the line is not ours.
fn read_order() -> Result<Order> {
    let mut line = Vec::new();
    let mut stdin = io::stdin().lock();
    loop {
        let mut byte = [0];
        let read = stdin.read(&mut byte).context(|| "read the order".into())?;
        if read == 0 || byte == *b"\n" {
            break;
        }
        line.push(byte[0]);
        if line.len() > ORDER_BYTES {
            return Err(Error::InvalidArgument(format!(
                "the holder's order is longer than {ORDER_BYTES} bytes"
            )));
        }
    }
    serde_json::from_slice(&line)
        .map_err(|error| Error::InvalidArgument(format!("the holder's order: {error}")))
}

/// A read-only file system with nothing in it but our executable.
fn make_root() -> nix::Result<()> {
    let none: Option<&str> = None;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // What we mount here is nobody else's.
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    mount(
        Some("dyad-pod"),
        ROOT,
        Some("tmpfs"),
        quiet,
        Some("mode=755,size=4k"),
    )?;
    File::create(EXECUTABLE).map_err(|error| errno(&error))?;
    // By its path: the file that we run is of the mount namespace that we left.
    let own = own_path().map_err(|error| errno(&error))?;
    mount(Some(&own), EXECUTABLE, none, MsFlags::MS_BIND, none)?;
    let read_only = quiet | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, EXECUTABLE, none, read_only | MsFlags::MS_BIND, none)?;
    mount(none, ROOT, none, read_only, none)
}

/// Where this program lies, or the newer one that has replaced it meanwhile.
fn own_path() -> io::Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe")?;
    let replaced = path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"))
        .map(PathBuf::from);
    Ok(replaced.unwrap_or(path))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// The second stage: returns when the pod is over.
///
/// # Errors
/// What the kernel refused, before it was ready.
pub fn hold() -> Result<()> {
    // Before anything can happen: a signal is kept until it is read.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block().context(|| "block signals".into())?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "watch for signals".into())?;
    leave_root().context(|| "leave the host's root".into())?;
    give_up_rights().context(|| "become nobody".into())?;

    println!("{READY}");
    io::stdout()
        .flush()
        .context(|| "tell that the pod is ready".into())?;
    // Whoever reads them sees the end. stdin stays: its end is the shim's.
    let stdin = io::stdin();
    nix::unistd::dup2_stdout(stdin.as_fd()).context(|| "close stdout".into())?;
    nix::unistd::dup2_stderr(stdin.as_fd()).context(|| "close stderr".into())?;
    wait_for_the_end(&signals);
    Ok(())
}

fn leave_root() -> nix::Result<()> {
    chdir(ROOT)?;
    // The old root comes to lie over the new one, and goes.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir(Path::new("/"))
}

fn give_up_rights() -> nix::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    // Takes all capabilities along.
    setresuid(user, user, user)
}

fn wait_for_the_end(signals: &SignalFd) {
    let stdin = io::stdin();
    loop {
        let mut both = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut both, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        if both[1]
            .revents()
            .is_some_and(|events| events.intersects(gone))
        {
            return;
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo == Signal::SIGCHLD as u32 {
                reap();
            } else {
                return;
            }
        }
    }
}

/// All that have ended: many ends may make one signal.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
