//! What a look at this host finds of all that a machine needs: `dyadctl check`.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use dyad_runtime_handler::check::Check;
use dyad_runtime_handler::config::{AcceleratorChoice, Channel, MachineConfig};
use tokio::time::timeout;

use crate::accelerator;
use crate::host::{self, Capabilities};
use crate::libvirt::Libvirt;

/// libvirt asks QEMU for its capabilities when it first hears of it, which takes seconds.
const LIBVIRT_BOUND: Duration = Duration::from_secs(20);
/// Below the bound of whoever asks us.
const PROBE_BOUND: Duration = Duration::from_secs(38);
const GUEST_MEND: &str = "build it with hack/guest, or set its path in section [machine]";

/// How it stands with what `config` names. Takes [`LIBVIRT_BOUND`] and [`PROBE_BOUND`] at
/// most, where libvirt or KVM hang.
pub async fn check(config: &MachineConfig, cache_dir: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    let capabilities = match timeout(LIBVIRT_BOUND, libvirt(&config.libvirt_uri)).await {
        Ok(Ok((found, capabilities))) => {
            checks.extend(found);
            Some(capabilities)
        }
        Ok(Err(check)) => {
            checks.push(check);
            None
        }
        Err(_) => {
            let seconds = LIBVIRT_BOUND.as_secs();
            checks.push(Check::fail(
                "libvirt",
                format!("{} did not answer within {seconds} s", config.libvirt_uri),
                "see its log (journalctl -u libvirtd), or restart it",
            ));
            None
        }
    };
    if let Some(capabilities) = capabilities {
        let work = accelerator(config, &capabilities, cache_dir);
        checks.push(timeout(PROBE_BOUND, work).await.unwrap_or_else(|_| {
            Check::fail(
                "accelerator",
                "the probe of KVM hangs",
                "set accelerator = \"tcg\"",
            )
        }));
    }
    checks.push(channel(config.channel, Path::new("/dev/vhost-vsock")));
    checks.push(kernel(&config.kernel));
    checks.push(initramfs(&config.initramfs));
    checks.push(modules(config));
    checks
}

async fn libvirt(uri: &str) -> Result<(Vec<Check>, Capabilities), Check> {
    let failed = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut next = error.source();
        while let Some(cause) = next {
            text.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        let mend = "start libvirtd (Debian: package libvirt-daemon-system), or set libvirt_uri \
                    in section [machine]";
        Check::fail("libvirt", text, mend)
    };
    let libvirt = Libvirt::new(uri);
    let versions = libvirt.versions().await.map_err(|error| failed(&error))?;
    let mut checks = vec![Check::ok(
        "libvirt",
        format!("{} at {uri}", versions.libvirt),
    )];
    match host::capabilities(&libvirt).await {
        Ok(capabilities) => {
            let emulator = capabilities.emulator.display();
            let user = match capabilities.qemu_user {
                Some(user) => format!("as user {}", user.uid),
                None => "as libvirt's own user".to_owned(),
            };
            let found = format!("{} ({emulator}), runs {user}", versions.qemu);
            checks.push(match &capabilities.qemu_user {
                Some(user) if user.uid == 0 => Check::warn(
                    "qemu",
                    found,
                    "set `user` in libvirt's qemu.conf: QEMU should not run as root",
                ),
                _ => Check::ok("qemu", found),
            });
            Ok((checks, capabilities))
        }
        Err(error) => Err(Check::fail(
            "qemu",
            error.chain(),
            "install qemu-system-x86 and restart libvirtd",
        )),
    }
}

async fn accelerator(
    config: &MachineConfig,
    capabilities: &Capabilities,
    cache_dir: &Path,
) -> Check {
    let mend = if Path::new("/dev/kvm").exists() {
        "where this host is a virtual machine itself, mend nested virtualization in the \
         hypervisor above; where it was busy, ask again in ten minutes"
    } else {
        "switch on virtualization in the firmware (or nested virtualization in the hypervisor \
         above) and load kvm_intel or kvm_amd"
    };
    if config.accelerator == AcceleratorChoice::Tcg {
        let found = "tcg, as configured: machines are emulated, several times slower";
        return Check::ok("accelerator", found);
    }
    let probed = if capabilities.kvm {
        accelerator::probe(&capabilities.emulator, &config.kernel, cache_dir).await
    } else {
        Ok((false, "libvirt finds no KVM on this host".to_owned()))
    };
    match (probed, config.accelerator) {
        (Ok((true, _)), _) => Check::ok("accelerator", "kvm: a guest was run with it"),
        (Ok((false, reason)), AcceleratorChoice::Kvm) => Check::fail(
            "accelerator",
            format!("kvm is configured, and runs no guest: {reason}"),
            format!("{mend}; or set accelerator = \"auto\""),
        ),
        (Ok((false, reason)), _) => Check::warn(
            "accelerator",
            format!("tcg: machines are emulated, several times slower ({reason})"),
            mend,
        ),
        (Err(error), _) => Check::fail("accelerator", error.chain(), "mend what it names"),
    }
}

fn channel(choice: Channel, vhost: &Path) -> Check {
    match (choice, vhost.exists()) {
        (Channel::VirtioSerial, _) => Check::ok("channel", "virtio-serial, as configured"),
        (Channel::Vsock, true) => Check::ok("channel", "vsock, as configured"),
        (Channel::Vsock, false) => Check::fail(
            "channel",
            format!("vsock is configured, and there is no {}", vhost.display()),
            "load vhost_vsock, or set channel = \"virtio-serial\"",
        ),
        (Channel::Auto, _) => Check::ok("channel", "virtio-serial"),
    }
}

/// An ELF image is what PVH boots; its absence is how a bzImage shows.
fn kernel(path: &Path) -> Check {
    match head(path) {
        Err(error) => Check::fail("kernel", error, GUEST_MEND),
        Ok(head) if head.starts_with(b"\x7fELF") => Check::ok("kernel", path.display().to_string()),
        Ok(head) if head.get(0x202..0x206) == Some(b"HdrS") => Check::fail(
            "kernel",
            format!("{} is a bzImage, not an ELF vmlinux", path.display()),
            GUEST_MEND,
        ),
        Ok(_) => Check::fail(
            "kernel",
            format!("{} is no ELF image", path.display()),
            GUEST_MEND,
        ),
    }
}

fn modules(config: &MachineConfig) -> Check {
    match crate::modules::disk(config) {
        Ok(Some(disk)) => Check::ok("guest modules", disk.file.display().to_string()),
        Ok(None) => Check::warn(
            "guest modules",
            "none: no iptables, tun, bridge, wireguard or NFS in machines",
            GUEST_MEND,
        ),
        Err(error) => Check::fail("guest modules", error.chain(), GUEST_MEND),
    }
}

fn initramfs(path: &Path) -> Check {
    const MAGIC: [&[u8]; 6] = [
        b"\x28\xb5\x2f\xfd", // zstd
        b"\x1f\x8b",         // gzip
        b"\x02\x21\x4c\x18", // lz4, as the kernel reads it
        b"\xfd7zXZ",
        b"070701",
        b"070702",
    ];
    match head(path) {
        Err(error) => Check::fail("initramfs", error, GUEST_MEND),
        Ok(head) if MAGIC.iter().any(|magic| head.starts_with(magic)) => {
            Check::ok("initramfs", path.display().to_string())
        }
        Ok(_) => Check::fail(
            "initramfs",
            format!("{} is no cpio archive that a kernel reads", path.display()),
            GUEST_MEND,
        ),
    }
}

/// The first kilobyte of a regular file.
fn head(path: &Path) -> Result<Vec<u8>, String> {
    let read = || {
        // Before the open: a FIFO would keep us.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        let mut head = Vec::new();
        File::open(path)?.take(1024).read_to_end(&mut head)?;
        Ok(head)
    };
    read().map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use dyad_runtime_handler::check::Status;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_kernel_is_an_elf_image() {
        let mut bz_image = vec![0; 1024];
        bz_image[0x202..0x206].copy_from_slice(b"HdrS");
        for (bytes, status, text) in [
            (&b"\x7fELF..."[..], Status::Ok, "/"),
            (&bz_image, Status::Fail, "bzImage"),
            (b"hello", Status::Fail, "no ELF"),
            (b"", Status::Fail, "no ELF"),
        ] {
            let check = kernel(file(bytes).path());
            assert_eq!(check.status, status);
            assert!(check.found.contains(text), "{check:?}");
        }
        let check = kernel(Path::new("/nonexistent/vmlinux"));
        assert!(
            check.found.contains("/nonexistent/vmlinux: No such file"),
            "{check:?}"
        );
        assert_eq!(kernel(Path::new("/")).status, Status::Fail);
    }

    #[test]
    fn an_initramfs_is_an_archive() {
        assert_eq!(
            initramfs(file(b"\x28\xb5\x2f\xfd.").path()).status,
            Status::Ok
        );
        assert_eq!(initramfs(file(b"070701").path()).status, Status::Ok);
        assert_eq!(initramfs(file(b"PK").path()).status, Status::Fail);
    }

    #[test]
    fn vsock_needs_its_device_where_it_is_demanded() {
        let (here, gone) = (Path::new("/"), Path::new("/nonexistent"));
        assert_eq!(channel(Channel::Auto, gone).found, "virtio-serial");
        assert_eq!(channel(Channel::Auto, here).found, "virtio-serial");
        assert_eq!(channel(Channel::Vsock, gone).status, Status::Fail);
        assert_eq!(channel(Channel::Vsock, here).status, Status::Ok);
    }

    #[tokio::test]
    async fn a_libvirt_that_is_not_there_is_named() {
        let config = MachineConfig {
            libvirt_uri: "qemu+unix:///system?socket=/nonexistent/libvirt-sock".into(),
            ..MachineConfig::default()
        };
        let checks = check(&config, Path::new("/nonexistent")).await;
        let libvirt = checks.iter().find(|check| check.name == "libvirt").unwrap();
        assert_eq!(libvirt.status, Status::Fail);
        assert!(
            libvirt.found.contains("/nonexistent/libvirt-sock"),
            "{libvirt:?}"
        );
    }
}
