//! Kernel modules on demand: the agent as the kernel's `modprobe -q -- ALIAS`.
//!
//! ```text
//! open /dev/net/tun, mount -t nfs, nft, ip link add type bridge ...
//!   -> kernel: request_module("char-major-10-200") -> /sbin/modprobe, this binary again
//!      -> modules.alias, modules.dep on the modules disk -> finit_module, dependencies first
//! ```
//! The disk is the host's, read-only, with all modules of its kernel (`hack/guest`). A machine
//! without it has those of the initramfs and no more.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dyad_runtime_handler::{Error, Result, error::Context};
use nix::mount::{MsFlags, mount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{disk, modules};

/// The first argument that the kernel gives (`call_modprobe` of kernel/module/kmod.c).
pub const ARGUMENT: &str = "-q";

const DISK: &str = "/run/dyad/modules";
/// What the kernel runs, by its own configuration.
const MODPROBE: &str = "/sbin/modprobe";
const INIT: &str = "/init";

/// Mounts the modules disk where there is one, and from then on answers the kernel. Blocks, on
/// a thread that does not run the event loop.
///
/// # Errors
/// The disk cannot be mounted.
pub fn serve(runtime: &tokio::runtime::Handle) -> Result<()> {
    let Some(serial) = disk::scan_for_modules() else {
        return Ok(());
    };
    let node = runtime.block_on(disk::by_serial(&serial))?;
    fs::create_dir_all(DISK).context(|| format!("create {DISK}"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(&node), DISK, Some("erofs"), flags, None::<&str>)
        .context(|| format!("mount the modules on {} at {DISK}", node.display()))?;
    let what = || format!("make {MODPROBE}");
    fs::create_dir_all("/sbin").context(what)?;
    std::os::unix::fs::symlink(INIT, MODPROBE).context(what)
}

/// The `main` of a call by the kernel.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(alias) = arguments.last().and_then(|alias| alias.into_string().ok()) else {
        return ExitCode::from(2);
    };
    // What the kernel starts has the initial root, below all that init has mounted.
    let entered = pidfd_open(Pid::INIT, PidfdFlags::empty()).and_then(|init| {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&init),
            Some(LinkNameSpaceType::Mount),
        )
    });
    if entered.is_ok() && load(&alias) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Loads what the kernel calls so, by alias or by name. Says whether there is such a module.
pub fn load(alias: &str) -> bool {
    let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease") else {
        return false;
    };
    let folder = Path::new(DISK).join("lib/modules").join(release.trim());
    let text = |name| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let files = find(alias, &text("modules.dep"), || text("modules.alias"));
    for file in &files {
        modules::load(&folder.join(file));
    }
    !files.is_empty()
}

/// The minor number of /dev/kvm, whose driver is the processor's and has no alias.
const KVM_MINOR: i64 = 232;

/// Has a driver for a miscellaneous device, by its minor number, unless there is one. Blocks.
///
/// # Errors
/// `InvalidArgument`, naming the device: the guest has none.
pub fn drive(device: &Path, minor: i64) -> Result<()> {
    let is_there = || {
        let registered = fs::read_to_string("/proc/misc").unwrap_or_default();
        has_minor(&registered, minor)
    };
    if is_there() {
        return Ok(());
    }
    if minor == KVM_MINOR {
        for driver in ["kvm-intel", "kvm-amd"] {
            load(driver);
        }
    } else {
        load(&format!("char-major-10-{minor}"));
    }
    if is_there() {
        return Ok(());
    }
    let way_out = if minor == KVM_MINOR {
        "the machine's processor has no virtualization of its own; remove the device"
    } else {
        "the guest's kernel has no driver for it; give the machine its modules (hack/guest, machine.modules)"
    };
    Err(Error::InvalidArgument(format!(
        "device {}: {way_out}, or run the pod as containers (runtimeClassName: dyad)",
        device.display()
    )))
}

/// Whether `/proc/misc` lists the device.
fn has_minor(registered: &str, minor: i64) -> bool {
    registered
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok())
        .any(|number: i64| number == minor)
}

/// What the kernel does not ask for by itself: iptables' own socket options, by which its
/// older programs find everything else. Blocks.
pub fn serve_iptables() {
    for module in ["ip_tables", "ip6_tables"] {
        if !Path::new("/sys/module").join(module).exists() {
            load(module);
        }
    }
}

/// The files of the modules that are called so, each behind those it depends on: depmod's
/// `modules.dep` names them last first, and a name goes before an alias (modprobe(8)).
fn find(wanted: &str, dependencies: &str, aliases: impl FnOnce() -> String) -> Vec<PathBuf> {
    let of_module = |name: &str| -> Vec<PathBuf> {
        dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| modules::is_named(Path::new(file), name))
            .map(|(file, needed)| {
                let needed = needed.split_ascii_whitespace().rev();
                needed.chain([file]).map(PathBuf::from).collect()
            })
            .unwrap_or_default()
    };
    let named = of_module(wanted);
    if !named.is_empty() {
        return named;
    }
    let wanted = normal(wanted);
    aliases()
        .lines()
        .filter_map(|line| line.strip_prefix("alias ")?.rsplit_once(' '))
        .filter(|(pattern, _)| matches(normal(pattern).as_bytes(), wanted.as_bytes()))
        .flat_map(|(_, module)| of_module(module))
        .collect()
}

/// `-` and `_` are the same in names of modules.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Whether a pattern with `*` and `?` is of this name; other patterns are of devices, which
/// are found otherwise.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            matches(rest, name)
                || name
                    .split_first()
                    .is_some_and(|(_, less)| matches(pattern, less))
        }
        (Some((b'?', rest)), Some((_, less))) => matches(rest, less),
        (Some((wanted, rest)), Some((found, less))) => wanted == found && matches(rest, less),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/net/llc/llc.ko:\n\
        kernel/net/802/stp.ko: kernel/net/llc/llc.ko\n\
        kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\n\
        kernel/drivers/net/tun.ko:\n\
        kernel/net/netfilter/xt_comment.ko:\n";
    const ALIASES: &str = "alias char-major-10-200 tun\nalias devname:net/tun tun\n\
        alias rtnl-link-bridge bridge\nalias ipt_comment xt_comment\nalias ax25-* tun\n";

    fn files(wanted: &str) -> Vec<String> {
        find(wanted, DEPENDENCIES, || ALIASES.to_owned())
            .iter()
            .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
            .collect()
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        assert_eq!(files("bridge"), ["llc", "stp", "bridge"]);
        assert_eq!(files("rtnl-link-bridge"), ["llc", "stp", "bridge"]);
    }

    #[test]
    fn a_device_is_there_by_its_minor_number() {
        let registered = "200 tun\n 60 cpu_dma_latency\n229 fuse\n";
        assert!(has_minor(registered, 200) && has_minor(registered, 60));
        assert!(!has_minor(registered, 20) && !has_minor("", 200));
    }

    #[test]
    fn names_and_aliases_are_found_with_either_dash_and_patterns_match() {
        assert_eq!(files("char-major-10-200"), ["tun"]);
        assert_eq!(files("xt-comment"), ["xt_comment"]);
        assert_eq!(files("ipt_comment"), ["xt_comment"]);
        assert_eq!(files("ax25-anything"), ["tun"]);
        assert!(files("char-major-10-20").is_empty());
        assert!(files("").is_empty());
    }
}
