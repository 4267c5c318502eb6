//! Finding a disk by the serial that the host gave it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_runtime_handler::{Error, Result, error::Context};

use crate::uevent;

/// virtio-blk's configuration space holds no more of a serial.
const VIRTIO_BLK_SERIAL_MAX: usize = 20;

/// How long a hot-plugged disk may take to appear.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);

/// The device node of the disk with this serial; waits for it to appear.
///
/// # Errors
/// `InvalidArgument` for a serial that can be none; `DeadlineExceeded`.
pub async fn by_serial(serial: &str) -> Result<PathBuf> {
    check_serial(serial)?;
    let what = format!("the disk with serial {serial:?}");
    uevent::wait_for(&what, APPEARS_WITHIN, || {
        let node = find(Path::new("/sys/block"), serial)?;
        // sysfs shows a disk a moment before it can be opened (ENXIO); its uevent comes after.
        Ok(node.filter(|node| std::fs::File::open(node).is_ok()))
    })
    .await
}

/// Ends the manual mode that SCSI's core was loaded in, and looks for the disks that were
/// there before the driver of their controller. All of them are units of target 0, by the
/// machine's definition.
pub fn scan_controllers() {
    let write = |file: &Path, text: &str| {
        if let Err(error) = std::fs::write(file, text) {
            log::warn!(
                "look for disks: write {text:?} to {}: {error}",
                file.display()
            );
        }
    };
    let Ok(hosts) = std::fs::read_dir("/sys/class/scsi_host") else {
        return;
    };
    // In manual mode the kernel does not look at a unit 0 that is plugged.
    write(Path::new("/sys/module/scsi_mod/parameters/scan"), "sync");
    for host in hosts.flatten() {
        // Channel, target and unit; `-`: all.
        write(&host.path().join("scan"), "0 0 -");
    }
}

/// Looks for the disk with the kernel's modules, the only unit of target 1, and gives its
/// serial. Its node comes a moment later: see [`by_serial`].
pub fn scan_for_modules() -> Option<String> {
    let hosts = std::fs::read_dir("/sys/class/scsi_host").ok()?;
    for host in hosts.flatten() {
        // A controller without that target has no such disk.
        let _ = std::fs::write(host.path().join("scan"), "0 1 0");
    }
    let devices = std::fs::read_dir("/sys/class/scsi_device").ok()?;
    devices
        .flatten()
        .filter(|device| device.file_name().to_string_lossy().ends_with(":0:1:0"))
        .find_map(|device| {
            let page = std::fs::read(device.path().join("device/vpd_pg80")).ok()?;
            Some(std::str::from_utf8(scsi_serial(&page)?).ok()?.to_owned())
        })
}

/// Serials become file names below `/run/dyad/images`.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_serial(serial: &str) -> Result<()> {
    let fine = !serial.is_empty()
        && serial.len() <= 128
        && serial
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if fine {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "disk serial {serial:?}: must be 1 to 128 letters, digits, - or _"
        )))
    }
}

fn find(blocks: &Path, serial: &str) -> Result<Option<PathBuf>> {
    for block in std::fs::read_dir(blocks).context(|| format!("list {}", blocks.display()))? {
        let block = block.context(|| format!("list {}", blocks.display()))?;
        let has_it = match std::fs::read(block.path().join("serial")) {
            Ok(found) => is_virtio_blk_serial(&found, serial),
            Err(_) => std::fs::read(block.path().join("device/vpd_pg80"))
                .is_ok_and(|page| scsi_serial(&page) == Some(serial.as_bytes())),
        };
        if has_it {
            return Ok(Some(Path::new("/dev").join(block.file_name())));
        }
    }
    Ok(None)
}

fn is_virtio_blk_serial(found: &[u8], serial: &str) -> bool {
    let wanted = serial.as_bytes();
    found.trim_ascii() == &wanted[..wanted.len().min(VIRTIO_BLK_SERIAL_MAX)]
}

/// SCSI's unit serial number page: peripheral, page code 0x80, length (big endian),
/// text padded with spaces (SPC-4, 7.8.16).
fn scsi_serial(page: &[u8]) -> Option<&[u8]> {
    let [_, 0x80, high, low, text @ ..] = page else {
        return None;
    };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    Some(text.get(..length)?.trim_ascii())
}

/// Major and minor number of a block device node.
///
/// # Errors
/// It cannot be looked at.
pub fn device_number(node: &Path) -> Result<(i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let number = std::fs::metadata(node)
        .context(|| format!("look at {}", node.display()))?
        .rdev();
    Ok((
        i64::try_from(nix::sys::stat::major(number)).unwrap_or_default(),
        i64::try_from(nix::sys::stat::minor(number)).unwrap_or_default(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scsi_serial_survives_foreign_bytes() {
        assert_eq!(scsi_serial(b"\x00\x80\x00\x05abc  rest"), Some(&b"abc"[..]));
        assert_eq!(scsi_serial(b"\x00\x80\x00\x00"), Some(&b""[..]));
        for bad in [
            &b""[..],
            b"\x00\x80\x00",
            b"\x00\x80\x00\x09abc",
            b"\x00\x83\x00\x03abc",
        ] {
            assert_eq!(scsi_serial(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn virtio_blk_serials_are_compared_as_far_as_they_are_kept() {
        assert!(is_virtio_blk_serial(b"pod\n", "pod"));
        assert!(is_virtio_blk_serial(
            b"01234567890123456789\n",
            "0123456789012345678901234"
        ));
        assert!(!is_virtio_blk_serial(b"po\n", "pod"));
        assert!(!is_virtio_blk_serial(b"", "pod"));
    }

    #[test]
    fn a_disk_is_found_by_either_kind_of_serial() {
        let blocks = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(blocks.path().join("vda")).unwrap();
        std::fs::write(blocks.path().join("vda/serial"), "pod").unwrap();
        std::fs::create_dir_all(blocks.path().join("sdb/device")).unwrap();
        std::fs::write(
            blocks.path().join("sdb/device/vpd_pg80"),
            b"\x00\x80\x00\x03img",
        )
        .unwrap();
        std::fs::create_dir_all(blocks.path().join("loop0")).unwrap();
        let find = |serial| find(blocks.path(), serial).unwrap();
        assert_eq!(find("pod"), Some("/dev/vda".into()));
        assert_eq!(find("img"), Some("/dev/sdb".into()));
        assert_eq!(find("other"), None);
    }

    #[test]
    fn serials_that_would_leave_the_folder_are_refused() {
        for bad in ["", "../x", "a/b", "a b", &"x".repeat(129)] {
            assert!(check_serial(bad).is_err(), "{bad:?}");
        }
        check_serial("dyad-Pod_1").unwrap();
    }
}
