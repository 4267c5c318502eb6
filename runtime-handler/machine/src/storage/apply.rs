//! Makes the disks that [`super::plan`] decided on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_linux::owner::Owner;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{Whence, lseek};

use super::plan::{LayerIdentity, RootPlan, image_key};
use super::{cache, view};

/// Every image's file system has this UUID; nothing looks images up by it.
const IMAGE_UUID: &str = "64796164-0000-5000-8000-696d61676502";
/// When every image's file system was made, in seconds: the end of the year 9999.
const MADE_AT: &str = "253402300799";

/// The file and mode of the user that QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A root converted to EROFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Names it; the file's stem.
    pub key: String,
    /// The EROFS file.
    pub file: PathBuf,
    /// To be removed with the container.
    pub private: bool,
}

/// Creates `dir` so that QEMU's user can walk through it but not list it.
///
/// # Errors
/// It cannot be made.
pub fn walkable_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).context(|| format!("create {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))
        .context(|| format!("set the mode of {}", dir.display()))
}

/// Refuses a directory that lies in memory: disks there would take from the host what the
/// pod's size does not count.
///
/// # Errors
/// `FailedPrecondition` on tmpfs, naming the key to set.
pub fn check_on_disk(dir: &Path) -> Result<()> {
    let kind = statfs(dir).context(|| format!("look at the filesystem of {}", dir.display()))?;
    if kind.filesystem_type() == TMPFS_MAGIC {
        return Err(Error::FailedPrecondition(format!(
            "{} is on tmpfs, so machines' disks would fill the host's memory; set `cache_dir` to a directory on disk",
            dir.display()
        )));
    }
    Ok(())
}

/// The image's EROFS file, converted unless it is there. Two that ask at once convert once.
///
/// `private_dir` receives what only this container uses.
///
/// # Errors
/// `mkfs.erofs` is missing or failed; nothing half-made stays.
pub async fn image(
    plan: RootPlan,
    cache_dir: PathBuf,
    private_dir: PathBuf,
    owner: Option<QemuUser>,
) -> Result<Image> {
    // The thread gets a mount namespace of its own and must not be used for anything else.
    let (answer, answered) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("image-convert".into())
        .spawn(move || {
            // The asker may have gone.
            let _ = answer.send(image_blocking(&plan, &cache_dir, &private_dir, owner));
        })
        .context(|| "start the conversion thread".into())?;
    answered
        .await
        .map_err(|_| Error::Unavailable("the conversion thread died".into(), None))?
}

fn image_blocking(
    plan: &RootPlan,
    cache_dir: &Path,
    private_dir: &Path,
    owner: Option<QemuUser>,
) -> Result<Image> {
    let mut layers = plan.layers.clone();
    let mut private = plan.private;
    if let Some(upper) = &plan.upper
        && has_entries(upper)?
    {
        layers.insert(0, upper.clone());
        private = true;
    }
    let identities = layers
        .iter()
        .map(|layer| identity(layer))
        .collect::<Result<Vec<_>>>()?;
    let key = image_key(&identities);
    let dir = if private { private_dir } else { cache_dir };
    let file = dir.join(format!("{key}.{}", cache::IMAGE));
    let image = Image { key, file, private };
    if !private && image.file.exists() {
        return Ok(image);
    }
    walkable_dir(dir)?;

    // One lock file per image: converting one does not hold up another.
    let lock_path = dir.join(format!("{}.{}", image.key, cache::LOCK));
    let _converting =
        Owner::wait_for(&lock_path).context(|| format!("lock {}", lock_path.display()))?;
    if !image.file.exists() {
        if !private {
            cache::note(&image.file, &layers)?;
        }
        let partial = dir.join(format!("{}.{}", image.key, cache::PARTIAL));
        let made = convert(&layers, private, dir, &partial, owner).and_then(|()| {
            std::fs::rename(&partial, &image.file)
                .context(|| format!("move the image to {}", image.file.display()))
        });
        if let Err(error) = made {
            let _ = std::fs::remove_file(&partial);
            return Err(error);
        }
    }
    // A late-comer that opened the lock before this makes a new one, finds the image, and is done.
    let _ = std::fs::remove_file(&lock_path);
    Ok(image)
}

fn has_entries(dir: &Path) -> Result<bool> {
    let mut entries = std::fs::read_dir(dir).context(|| format!("list {}", dir.display()))?;
    Ok(entries.next().is_some())
}

fn identity(layer: &Path) -> Result<LayerIdentity> {
    let meta = std::fs::metadata(layer)
        .context(|| format!("look at the image's layer {}", layer.display()))?;
    Ok(LayerIdentity {
        path: layer.to_owned(),
        device: meta.dev(),
        inode: meta.ino(),
        changed_ns: i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()),
    })
}

/// Writes the layers, merged, as EROFS. What is not `private` is equal to the byte wherever the
/// image is converted.
fn convert(
    layers: &[PathBuf],
    private: bool,
    dir: &Path,
    to: &Path,
    owner: Option<QemuUser>,
) -> Result<()> {
    let source = match layers {
        [only] if private => only.clone(),
        layers => {
            let view = dir.join(".view");
            std::fs::create_dir_all(&view).context(|| format!("create {}", view.display()))?;
            let merged = view::merge(layers, &view)?;
            if !private {
                view::settle_times(&merged, layers)?;
            }
            merged
        }
    };
    let _ = std::fs::remove_file(to);
    // Files keep the times that the image gives them; the file system itself has a fixed time,
    // later than any of them since they are cut to it, and a fixed UUID where mkfs.erofs would
    // draw one.
    run(Command::new("mkfs.erofs")
        .env("SOURCE_DATE_EPOCH", MADE_AT)
        .args(["-d0", "-U", IMAGE_UUID])
        .arg(to)
        .arg(&source))
    .context(|| format!("convert the image's root to {}", to.display()))?;
    let file = File::open(to).context(|| format!("open {}", to.display()))?;
    if let Some(owner) = owner {
        std::os::unix::fs::fchown(&file, Some(0), Some(owner.gid))
            .context(|| format!("set the owner of {}", to.display()))?;
    }
    let mode = if owner.is_some() { 0o440 } else { 0o444 };
    file.set_permissions(std::fs::Permissions::from_mode(mode))
        .context(|| format!("set the mode of {}", to.display()))?;
    file.sync_all()
        .context(|| format!("write {}", to.display()))
}

/// Creates the pod's writable disk: sparse, and (`format`) ext4, tables written lazily by
/// the guest.
///
/// # Errors
/// `mkfs.ext4` is missing or failed; nothing half-made stays.
pub async fn pod_disk(
    file: PathBuf,
    gib: u64,
    owner: Option<QemuUser>,
    format: bool,
) -> Result<()> {
    tokio::task::spawn_blocking(move || {
        let made = pod_disk_blocking(&file, gib, owner, format);
        if made.is_err() {
            let _ = std::fs::remove_file(&file);
        }
        made
    })
    .await
    .map_err(|error| Error::Unavailable(format!("make the pod's disk: {error}"), None))?
}

fn pod_disk_blocking(file: &Path, gib: u64, owner: Option<QemuUser>, format: bool) -> Result<()> {
    let disk = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(file)
        .context(|| format!("create {}", file.display()))?;
    disk.set_permissions(std::fs::Permissions::from_mode(0o600))
        .context(|| format!("set the mode of {}", file.display()))?;
    disk.set_len(gib << 30)
        .context(|| format!("set the size of {}", file.display()))?;
    if !format {
        return set_owner(&disk, file, owner);
    }
    // No journal: the filesystem does not outlive a crash of the host. Few inodes per group
    // and uninitialised tables keep the file sparse and the call short.
    run(Command::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-O",
            "^has_journal,^resize_inode",
            "-E",
        ])
        .arg("lazy_itable_init=1,nodiscard,root_owner=0:0")
        .arg(file))
    .context(|| format!("format {}", file.display()))?;
    set_owner(&disk, file, owner)
}

fn set_owner(disk: &File, file: &Path, owner: Option<QemuUser>) -> Result<()> {
    if let Some(owner) = owner {
        std::os::unix::fs::fchown(disk, Some(owner.uid), Some(owner.gid))
            .context(|| format!("set the owner of {}", file.display()))?;
    }
    Ok(())
}

/// SHA-256 of an image, in hexadecimal digits. Images never change, so it is kept beside
/// the file once it is known.
///
/// # Errors
/// The image cannot be read.
pub async fn digest(image: PathBuf) -> Result<String> {
    tokio::task::spawn_blocking(move || digest_blocking(&image))
        .await
        .map_err(|error| Error::Unavailable(format!("digest of an image: {error}"), None))?
}

fn digest_blocking(image: &Path) -> Result<String> {
    use sha2::{Digest as _, Sha256};
    let kept = image.with_extension("sha256");
    if let Ok(known) = std::fs::read_to_string(&kept)
        && known.len() == 64
    {
        return Ok(known);
    }
    let reading = || format!("read {}", image.display());
    let mut file = File::open(image).context(reading)?;
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash).context(reading)?;
    let digest: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    // Only saves time.
    if let Err(error) = write_atomically(&kept, digest.as_bytes(), PRIVATE) {
        log::debug!("{}", error.chain());
    }
    Ok(digest)
}

/// Why a helper program failed.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("{program} cannot be run; install the package that has it ({package})")]
    Missing {
        program: String,
        package: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{program} failed with {status}: {stderr}")]
    Failed {
        program: String,
        status: std::process::ExitStatus,
        stderr: String,
    },
}

fn run(command: &mut Command) -> Result<Output, HelperError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HelperError::Missing {
            package: if program == "mkfs.erofs" {
                "erofs-utils"
            } else {
                "e2fsprogs"
            },
            program: program.clone(),
            source,
        })?;
    if output.status.success() {
        return Ok(output);
    }
    Err(HelperError::Failed {
        program,
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// How much of a file is data: neither holes nor what is allocated but reads as zeroes, as
/// a disk that QEMU has copied is where it was empty.
///
/// # Errors
/// It cannot be read.
pub fn data_bytes(file: &Path) -> io::Result<u64> {
    let file = File::open(file)?;
    let (mut bytes, mut at) = (0, 0);
    loop {
        let data = match lseek(&file, at, Whence::SeekData) {
            Ok(data) => data,
            // Only a hole follows.
            Err(Errno::ENXIO) => return Ok(bytes),
            Err(error) => return Err(error.into()),
        };
        at = lseek(&file, data, Whence::SeekHole)?;
        bytes += (at - data).unsigned_abs();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_and_empty_is_no_data() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("disk");
        let file = File::create(&path).expect("file");
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 8 << 20)
            .expect("allocated");
        file.sync_all().expect("on disk");
        assert_eq!(data_bytes(&path).expect("read"), 0);
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 64 << 10], 1 << 20).expect("written");
        file.sync_all().expect("on disk");
        assert_eq!(data_bytes(&path).expect("read"), 64 << 10);
        file.set_len(64 << 20).expect("longer");
        assert_eq!(data_bytes(&path).expect("read"), 64 << 10);
    }
}
