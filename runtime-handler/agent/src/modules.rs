//! Kernel modules, in the order that the initramfs lists them.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// The list: one absolute path a line, in load order; `#` starts a comment.
pub const LIST: &str = "/etc/dyad/modules";

/// The paths of a list. Lines that are no absolute path are left out.
pub fn parse(list: &str) -> Vec<PathBuf> {
    list.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| line.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

/// Whether `module` is file `name.ko`; `-` and `_` are the same in module names.
pub fn is_named(module: &Path, name: &str) -> bool {
    module
        .file_stem()
        .and_then(|stem| stem.to_str())
        .is_some_and(|stem| stem.replace('-', "_") == name.replace('-', "_"))
}

/// Drivers that are left out when their device is not on the virtio bus, by its id
/// (virtio 1.2, 5). Drivers of what is hot-plugged (disks on a controller that is
/// there, network cards) are not among them.
const OPTIONAL: &[(u32, &[&str])] = &[
    (4, &["rng_core", "virtio_rng"]),
    (5, &["virtio_balloon"]),
    (8, &["scsi_common", "scsi_mod", "virtio_scsi", "sd_mod"]),
    (
        19,
        &[
            "vsock",
            "vmw_vsock_virtio_transport_common",
            "vmw_vsock_virtio_transport",
        ],
    ),
    (24, &["virtio_mem"]),
    (26, &["fuse", "virtiofs"]),
];

/// What a module is loaded with. The scan that a controller begins with asks all of its 256
/// targets, 0.1 s under software emulation: [`crate::disk::scan_controllers`] asks the one
/// that the host uses.
const PARAMETERS: &[(&str, &CStr)] = &[("scsi_mod", c"scan=manual")];

/// Whether a module has anything to drive, given the ids on the virtio bus.
pub fn is_of_use(module: &Path, present: &HashSet<u32>) -> bool {
    OPTIONAL
        .iter()
        .find(|(_, names)| names.iter().any(|name| is_named(module, name)))
        .is_none_or(|(device, _)| present.contains(device))
}

/// Loads one module. What fails is logged: whoever needs it fails by its own name.
pub fn load(module: &Path) {
    let parameters = PARAMETERS
        .iter()
        .find(|(name, _)| is_named(module, name))
        .map_or(c"", |(_, parameters)| *parameters);
    let loaded = File::open(module)
        .map_err(|error| error.to_string())
        .and_then(|file| {
            match finit_module(file, parameters, ModuleInitFlags::empty()) {
                // Loaded already, or there is no such device here.
                Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        });
    match loaded {
        Ok(()) => log::debug!("loaded {}", module.display()),
        Err(error) => log::warn!("load module {}: {error}", module.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_noise_is_not() {
        let list = "# the bus\n/lib/a.ko\n\n  /lib/b-c.ko # comment\nrelative.ko\n/lib/d.ko";
        let paths = parse(list);
        assert_eq!(
            paths,
            ["/lib/a.ko", "/lib/b-c.ko", "/lib/d.ko"].map(PathBuf::from)
        );
        assert!(is_named(&paths[1], "b_c"));
        assert!(!is_named(&paths[1], "b"));
    }

    #[test]
    fn drivers_without_a_device_are_left_out() {
        let of_use = |name: &str, present: &[u32]| {
            is_of_use(Path::new(name), &present.iter().copied().collect())
        };
        assert!(of_use("/lib/erofs.ko", &[]));
        assert!(of_use("/lib/virtio_net.ko", &[]));
        assert!(!of_use("/lib/virtio-rng.ko", &[8]));
        assert!(of_use("/lib/virtio-rng.ko", &[4, 8]));
        assert!(of_use("/lib/sd_mod.ko", &[8]));
        assert!(!of_use("/lib/fuse.ko", &[8]));
        assert!(of_use("/lib/fuse.ko", &[26]));
    }
}
