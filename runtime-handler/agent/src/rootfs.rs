//! Root file systems: an image's EROFS disk below, a writable layer on the pod's disk
//! above, so that a restarted machine finds what its containers wrote.
//!
//! ```text
//! /run/dyad/images/<serial>                  erofs, read-only, one mount for all its containers
//! /run/dyad/pod/containers/<id>/{upper,work} the writable layer
//! /run/dyad/containers/<id>/rootfs           overlay of both
//! ```

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use dyad_runtime_handler::{Error, Result, error::Context};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};

use crate::{disk, rpc};

/// Mount points of images.
pub const IMAGES: &str = "/run/dyad/images";
/// Mount point of the pod's writable disk.
pub const POD_DISK: &str = "/run/dyad/pod";

/// Mounted images and how many containers use each.
#[derive(Default)]
pub struct Images {
    /// The lock of one image is held while it is mounted or unmounted; the lock of the
    /// table never is.
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<usize>>>>,
}

impl Images {
    /// Mounts the image, or counts one more user of it.
    ///
    /// # Errors
    /// No such disk, or no EROFS on it.
    pub async fn acquire(&self, serial: &str) -> Result<PathBuf> {
        disk::check_serial(serial)?;
        let target = Path::new(IMAGES).join(serial);
        let slot = self.slot(serial);
        let mut users = slot.lock().await;
        if *users == 0 {
            let node = disk::by_serial(serial).await?;
            let target = target.clone();
            rpc::blocking(move || mount_image(&node, &target)).await?;
        }
        *users += 1;
        Ok(target)
    }

    /// Counts one user less and unmounts with the last, so that the host may detach
    /// the disk.
    ///
    /// # Errors
    /// Something still holds it.
    pub async fn release(&self, serial: &str) -> Result<()> {
        let slot = self.slot(serial);
        let mut users = slot.lock().await;
        *users = users.saturating_sub(1);
        if *users > 0 {
            return Ok(());
        }
        let target = Path::new(IMAGES).join(serial);
        rpc::blocking(move || {
            unmount(&target)?;
            remove_if_there(fs::remove_dir(&target), &target)
        })
        .await
    }

    fn slot(&self, serial: &str) -> Arc<tokio::sync::Mutex<usize>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(serial.into()).or_default())
    }
}

fn mount_image(node: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target).context(|| format!("create {}", target.display()))?;
    mount(
        Some(node),
        target,
        Some("erofs"),
        MsFlags::MS_RDONLY | MsFlags::MS_NODEV,
        None::<&str>,
    )
    .context(|| {
        format!(
            "mount the EROFS on {} at {}",
            node.display(),
            target.display()
        )
    })
}

/// One container's root.
#[derive(Debug, Clone)]
pub struct Rootfs {
    layer: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
}

impl Rootfs {
    /// The root of a container whose folder is `bundle`.
    pub fn of(container: &str, bundle: &Path) -> Self {
        Self {
            layer: Path::new(POD_DISK).join("containers").join(container),
            target: bundle.join("rootfs"),
        }
    }

    /// Mounts it over `image`. What an earlier container of the same id wrote, before
    /// the machine was restarted, is there again. Blocks.
    ///
    /// # Errors
    /// `FailedPrecondition` without the pod's disk.
    pub fn mount(&self, image: &Path) -> Result<()> {
        if !is_mount_point(Path::new(POD_DISK)) {
            return Err(Error::FailedPrecondition(
                "the pod's disk is not mounted: Setup must come first".into(),
            ));
        }
        let (upper, work) = (self.layer.join("upper"), self.layer.join("work"));
        for folder in [&upper, &work, &self.target] {
            fs::create_dir_all(folder).context(|| format!("create {}", folder.display()))?;
        }
        copy_root_attributes(image, &upper)?;
        // Serials and ids have no character that these options would need escaped.
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            image.display(),
            upper.display(),
            work.display()
        );
        mount(
            Some("overlay"),
            &self.target,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .context(|| format!("mount overlay on {}", self.target.display()))
    }

    /// Whether a container of this id has written before.
    pub fn has_layer(&self) -> bool {
        self.layer.exists()
    }

    /// Unmounts it, or lets it go where something still holds it. Blocks.
    pub fn unmount(&self) {
        if let Err(error) = unmount(&self.target) {
            log::warn!("{}", error.chain());
            let _ = umount2(&self.target, MntFlags::MNT_DETACH);
        }
    }

    /// Removes what the container wrote. Blocks.
    ///
    /// # Errors
    /// The disk.
    pub fn remove_layer(&self) -> Result<()> {
        remove_if_there(fs::remove_dir_all(&self.layer), &self.layer)
    }
}

/// The overlay's root directory is the upper one's: give it the image's mode and owner.
fn copy_root_attributes(image: &Path, upper: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let what = || format!("read {}", image.display());
    let root = fs::metadata(image).context(what)?;
    chown(upper, Some(root.uid()), Some(root.gid()))
        .context(|| format!("change owner of {}", upper.display()))?;
    fs::set_permissions(upper, root.permissions())
        .context(|| format!("change mode of {}", upper.display()))
}

/// Makes `path` and what is missing on the way, with every link resolved inside of
/// `root`. Blocks.
///
/// # Errors
/// Something on the way is no folder.
pub fn make_folder_in(root: &Path, path: &Path) -> Result<()> {
    let what = || format!("create {} in {}", path.display(), root.display());
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(root, flags, Mode::empty()).context(what)?;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut walked = PathBuf::from("/");
    let mut parent = root.try_clone().context(what)?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        walked.push(name);
        parent = match openat2(&root, &walked, how) {
            Ok(folder) => folder,
            Err(Errno::ENOENT) => {
                mkdirat(&parent, name, Mode::from_bits_truncate(0o755)).context(what)?;
                openat2(&root, &walked, how).context(what)?
            }
            Err(error) => return Err(error).context(what),
        };
    }
    Ok(())
}

/// Unmounts; fine where nothing is mounted.
///
/// # Errors
/// Something holds it.
pub fn unmount(target: &Path) -> Result<()> {
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(error) => Err(error).context(|| format!("unmount {}", target.display())),
    }
}

fn remove_if_there(result: std::io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.context(|| format!("remove {}", path.display())),
    }
}

/// Whether something is mounted there: its device differs from its parent's.
pub fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|at| at.dev()).ok();
    match (device(path), path.parent().and_then(device)) {
        (Some(own), Some(parent)) => own != parent,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_directory_is_made_inside_whatever_the_image_links_to() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("root");
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink("/srv", root.join("link")).unwrap();
        fs::create_dir(root.join("srv")).unwrap();
        std::os::unix::fs::symlink("../../../..", root.join("up")).unwrap();

        make_folder_in(&root, Path::new("/a/b")).unwrap();
        make_folder_in(&root, Path::new("/link/c")).unwrap();
        make_folder_in(&root, Path::new("/up/d")).unwrap();
        make_folder_in(&root, Path::new("/")).unwrap();
        assert!(root.join("a/b").is_dir());
        assert!(root.join("srv/c").is_dir());
        assert!(root.join("d").is_dir());

        fs::write(root.join("file"), "").unwrap();
        assert!(make_folder_in(&root, Path::new("/file/x")).is_err());
    }
}
