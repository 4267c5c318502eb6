//! What an image's root consists of, from the snapshotter's mounts. Pure.

use std::path::{Path, PathBuf};

use dyad_runtime_handler::spec::RootMount;
use uuid::Uuid;

/// Identifies converted images; the version changes when their layout does.
const IMAGE_NAMESPACE: Uuid = Uuid::from_u128(0x6479_6164_0000_5000_8000_696d_6167_6503);

/// The directories that make a container's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootPlan {
    /// Topmost first, as overlayfs names them.
    pub layers: Vec<PathBuf>,
    /// The container's own writable layer. Usually empty at create, as the guest has one of
    /// its own; where it holds something, that belongs to the root.
    pub upper: Option<PathBuf>,
    /// Only this container uses these directories, so the image is not kept for others.
    pub private: bool,
}

/// Why a root cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootPlanError {
    /// More than one mount makes the root.
    #[error(
        "the snapshotter describes the root with {0} mounts, a machine takes one; use the overlayfs or native snapshotter"
    )]
    SeveralMounts(usize),
    /// Not overlay, not bind.
    #[error(
        "the snapshotter mounts the root as {0:?}, which a machine cannot take; use the overlayfs or native snapshotter"
    )]
    UnknownType(String),
    /// An overlay without its lower directories.
    #[error("the snapshotter's overlay mount has no lowerdir")]
    NoLowerDir,
    /// An option that changes what the layers mean.
    #[error("the snapshotter's overlay option {0:?} is not supported for machines")]
    Option(String),
}

/// Reads the snapshotter's mounts; `rootfs` is the bundle's, for when there are none.
///
/// # Errors
/// A mount that is neither an overlay nor a bind mount.
pub fn plan(mounts: &[RootMount], rootfs: &Path) -> Result<RootPlan, RootPlanError> {
    let mount = match mounts {
        [] => {
            return Ok(RootPlan {
                layers: vec![rootfs.to_owned()],
                upper: None,
                private: true,
            });
        }
        [one] => one,
        several => return Err(RootPlanError::SeveralMounts(several.len())),
    };
    match mount.fstype.as_str() {
        "overlay" => overlay(&mount.options),
        "bind" | "rbind" => bind(mount),
        "" | "none" if mount.options.iter().any(|o| o == "bind" || o == "rbind") => bind(mount),
        other => Err(RootPlanError::UnknownType(other.to_owned())),
    }
}

/// Reads what containerd mounted on `target` for an image that is a volume; anything but an
/// overlay with absolute layers is taken as it is seen there.
pub fn mounted(mount: Option<RootMount>, target: &Path) -> RootPlan {
    mount
        .filter(|mount| mount.fstype == "overlay")
        .and_then(|mount| overlay(&mount.options).ok())
        .filter(|root| root.layers.iter().all(|layer| layer.is_absolute()))
        .unwrap_or_else(|| RootPlan {
            layers: vec![target.to_owned()],
            upper: None,
            private: true,
        })
}

fn bind(mount: &RootMount) -> Result<RootPlan, RootPlanError> {
    Ok(RootPlan {
        layers: vec![PathBuf::from(&mount.source)],
        upper: None,
        // A read-only view is a layer of the image; a writable one the container's own copy.
        private: !mount.options.iter().any(|option| option == "ro"),
    })
}

fn overlay(options: &[String]) -> Result<RootPlan, RootPlanError> {
    let mut layers = Vec::new();
    let mut upper = None;
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => layers = split_layers(dirs),
            Some(("upperdir", dir)) => upper = Some(PathBuf::from(dir)),
            Some(("workdir", _) | ("index" | "xino" | "metacopy", "off")) => {}
            // The snapshotter's marks are read as they were written.
            Some(("redirect_dir" | "index" | "xino" | "metacopy", _)) => {}
            Some(("uidmap" | "gidmap", _)) => return Err(RootPlanError::Option(option.clone())),
            Some(("uuid" | "verity" | "fsync", _)) => {}
            _ if matches!(option.as_str(), "userxattr" | "volatile" | "ro" | "rw") => {}
            _ => return Err(RootPlanError::Option(option.clone())),
        }
    }
    if layers.is_empty() {
        return Err(RootPlanError::NoLowerDir);
    }
    Ok(RootPlan {
        layers,
        upper,
        private: false,
    })
}

/// Splits at `:`, minding overlayfs's `\:`.
fn split_layers(dirs: &str) -> Vec<PathBuf> {
    let mut layers = Vec::new();
    let mut current = String::new();
    let mut chars = dirs.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => current.extend(chars.next()),
            ':' => layers.push(PathBuf::from(std::mem::take(&mut current))),
            other => current.push(other),
        }
    }
    layers.push(PathBuf::from(current));
    layers.retain(|layer| !layer.as_os_str().is_empty());
    layers
}

/// The identity of one layer's directory. A layer never changes once it is committed, and
/// a snapshot's number is never used again; inode and change time tell two states of one
/// path apart, should containerd have been set up anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerIdentity {
    /// Where it lies.
    pub path: PathBuf,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// `st_ctime` in nanoseconds.
    pub changed_ns: i128,
}

/// The converted image's name, from its layers' identities.
pub fn image_key(layers: &[LayerIdentity]) -> String {
    let mut name = String::new();
    for layer in layers {
        name.push_str(&format!(
            "{}\0{}\0{}\0{}\0\0",
            layer.path.display(),
            layer.device,
            layer.inode,
            layer.changed_ns
        ));
    }
    Uuid::new_v5(&IMAGE_NAMESPACE, name.as_bytes())
        .simple()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fstype: &str, source: &str, options: &[&str]) -> RootMount {
        RootMount {
            fstype: fstype.into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).into()).collect(),
        }
    }

    #[test]
    fn an_overlay_gives_its_layers_topmost_first() {
        let mounts = [mount(
            "overlay",
            "overlay",
            &[
                "index=off",
                "workdir=/s/3/work",
                "upperdir=/s/3/fs",
                "lowerdir=/s/2/fs:/s/1/fs",
            ],
        )];
        let plan = plan(&mounts, Path::new("/b/rootfs")).expect("plan");
        assert_eq!(plan.layers, [PathBuf::from("/s/2/fs"), "/s/1/fs".into()]);
        assert_eq!(plan.upper, Some("/s/3/fs".into()));
        assert!(!plan.private);
    }

    #[test]
    fn an_escaped_colon_does_not_split_a_layer() {
        let layers = split_layers(r"/a\:b:/c\\d");
        assert_eq!(layers, [PathBuf::from("/a:b"), r"/c\d".into()]);
    }

    #[test]
    fn a_read_only_bind_is_shared_and_a_writable_one_is_private() {
        let ro = [mount("bind", "/s/1/fs", &["ro", "rbind"])];
        assert!(!plan(&ro, Path::new("/r")).expect("plan").private);
        let rw = [mount("bind", "/s/1/fs", &["rw", "rbind"])];
        assert!(plan(&rw, Path::new("/r")).expect("plan").private);
    }

    #[test]
    fn without_mounts_the_bundle_s_rootfs_is_the_root() {
        let plan = plan(&[], Path::new("/b/rootfs")).expect("plan");
        assert_eq!(plan.layers, [PathBuf::from("/b/rootfs")]);
        assert!(plan.private);
    }

    #[test]
    fn what_cannot_be_converted_is_refused_by_name() {
        let odd = [mount("ext4", "/dev/loop0", &[])];
        assert!(
            plan(&odd, Path::new("/r"))
                .expect_err("refused")
                .to_string()
                .contains("ext4")
        );
        let mapped = [mount(
            "overlay",
            "overlay",
            &["lowerdir=/a", "uidmap=0:1:2"],
        )];
        let error = plan(&mapped, Path::new("/r")).expect_err("refused");
        assert!(error.to_string().contains("uidmap"));
        let empty = [mount("overlay", "overlay", &["workdir=/w"])];
        assert_eq!(
            plan(&empty, Path::new("/r")),
            Err(RootPlanError::NoLowerDir)
        );
    }

    #[test]
    fn an_image_that_is_mounted_has_the_layers_of_its_overlay_or_is_taken_as_seen() {
        let target = Path::new("/s/image-volumes/s1/d");
        let layers = |options: &[&str]| {
            let root = mounted(Some(mount("overlay", "overlay", options)), target);
            (root.layers, root.private)
        };
        let of_image = [
            "rw",
            "lowerdir=/l/2/fs:/l/1/fs",
            "upperdir=/l/9/fs",
            "workdir=/l/9/work",
            "volatile",
        ];
        assert_eq!(
            layers(&of_image),
            (vec!["/l/2/fs".into(), "/l/1/fs".into()], false)
        );
        let as_seen = (vec![target.to_owned()], true);
        assert_eq!(layers(&["rw", "lowerdir=2/fs:1/fs"]), as_seen);
        assert_eq!(mounted(None, target).layers, as_seen.0);
    }

    #[test]
    fn the_key_follows_every_part_of_a_layer_s_identity() {
        let layer = |path: &str, inode| LayerIdentity {
            path: path.into(),
            device: 1,
            inode,
            changed_ns: 5,
        };
        let one = image_key(&[layer("/a", 1), layer("/b", 2)]);
        assert_eq!(one, image_key(&[layer("/a", 1), layer("/b", 2)]));
        assert_ne!(one, image_key(&[layer("/b", 2), layer("/a", 1)]));
        assert_ne!(one, image_key(&[layer("/a", 1), layer("/b", 3)]));
        assert_eq!(one.len(), 32);
    }
}
