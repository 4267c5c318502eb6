//! From the kernel's hand-over to a system that can run containers.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dyad_runtime_handler::{Result, error::Context};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot};

use crate::cgroup;
use crate::cmdline::Cmdline;
use crate::logger;

/// What a daemon that runs containers usually has; containers inherit it.
const OPEN_FILES: u64 = 1_048_576;

/// A file system that init mounts.
struct Mount {
    target: &'static str,
    fstype: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const fn fs(
    target: &'static str,
    fstype: &'static str,
    flags: MsFlags,
    data: &'static str,
) -> Mount {
    Mount {
        target,
        fstype,
        flags,
        data,
    }
}

const MOUNTS: &[Mount] = &[
    fs("/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755"),
    fs("/proc", "proc", SAFE, ""),
    fs("/sys", "sysfs", SAFE, ""),
    fs("/run", "tmpfs", NO_DEVICES, "mode=0755"),
    fs("/tmp", "tmpfs", NO_DEVICES, "mode=1777"),
    fs(
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "gid=5,mode=0620,ptmxmode=0666",
    ),
    fs("/dev/shm", "tmpfs", NO_DEVICES, "mode=1777"),
    fs(cgroup::ROOT, "cgroup2", SAFE, ""),
];

/// Folders of our own.
const FOLDERS: &[&str] = &[
    crate::files::VOLUMES,
    crate::rootfs::IMAGES,
    crate::task::CONTAINERS,
    crate::helper::LIBCONTAINER,
];

/// Makes the system. What fails is logged and the boot goes on as far as it can.
pub fn run() -> Cmdline {
    umask(Mode::from_bits_truncate(0o022));
    let mut failed = Vec::new();
    let mut attempt = |result: Result<()>| failed.extend(result.err().map(|error| error.chain()));

    attempt(leave_initial_root());
    for entry in MOUNTS {
        attempt(mount_one(entry));
    }
    attempt(adopt_console());
    let cmdline = Cmdline::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    logger::to_console(cmdline.log);
    // Not a log record: the host measures boots by it, whatever the level.
    eprintln!("[{}] dyad-agent: init", logger::uptime());

    attempt(cgroup::enable_controllers());
    attempt(raise_limits());
    for folder in FOLDERS {
        attempt(fs::create_dir_all(folder).context(|| format!("create {folder}")));
    }
    attempt(
        fs::set_permissions("/run/dyad", fs::Permissions::from_mode(0o711))
            .context(|| "protect /run/dyad".into()),
    );
    // Hot-plugged memory serves without being asked for; kernels without it have no such file.
    let _ = fs::write("/sys/devices/system/memory/auto_online_blocks", "online");

    for error in failed {
        log::error!("boot: {error}");
    }
    cmdline
}

/// `pivot_root` refuses the kernel's initial root, so put a copy of its mount over it.
fn leave_initial_root() -> Result<()> {
    const NEW: &str = "/newroot";
    let move_root = || -> io::Result<()> {
        fs::create_dir_all(NEW)?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some("/"), NEW, None::<&str>, bind, None::<&str>)?;
        chdir(NEW)?;
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
        chroot(".")?;
        chdir("/")?;
        Ok(())
    };
    move_root().context(|| "leave the initial root".into())
}

fn mount_one(entry: &Mount) -> Result<()> {
    let what = || format!("mount {} on {}", entry.fstype, entry.target);
    fs::create_dir_all(entry.target).context(what)?;
    let data = Some(entry.data).filter(|data| !data.is_empty());
    match mount(
        Some(entry.fstype),
        entry.target,
        Some(entry.fstype),
        entry.flags,
        data,
    ) {
        // The kernel may have mounted devtmpfs itself.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error).context(what),
    }
}

/// The initramfs may have had no `/dev/console`; then the kernel left us without stdio.
fn adopt_console() -> Result<()> {
    let open = |path: &str| {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .context(|| format!("open {path}"))
    };
    let null = open("/dev/null")?;
    let console = open("/dev/console")?;
    for (fd, onto) in [(&null, 0), (&console, 1), (&console, 2)] {
        if fd.as_raw_fd() == onto {
            continue;
        }
        // SAFETY: dup2 onto 0, 1 or 2 replaces stdio only, which no owned descriptor
        // of ours stands for; `fd` is open.
        Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), onto) })
            .context(|| "adopt the console".into())?;
    }
    // Where the kernel left a gap, the files above are stdio themselves: keep them open.
    for file in [null, console] {
        if file.as_raw_fd() <= 2 {
            std::mem::forget(file);
        }
    }
    Ok(())
}

fn raise_limits() -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .context(|| "raise the limit of open files".into())?;
    setrlimit(
        Resource::RLIMIT_NPROC,
        libc::RLIM_INFINITY,
        libc::RLIM_INFINITY,
    )
    .context(|| "raise the limit of processes".into())
}

/// The kernel's random name of this boot.
///
/// # Errors
/// proc is not there.
pub fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    Ok(fs::read_to_string(path)
        .context(|| format!("read {}", path.display()))?
        .trim()
        .to_owned())
}
