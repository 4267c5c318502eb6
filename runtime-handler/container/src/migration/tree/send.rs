//! Reads a tree and sends what is new in it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dyad_linux::open_below::{Node, Root, is_gone};
use dyad_runtime_handler::error::{Context, Error, Result};

use super::super::wire::{CHUNK, Message, Place, Wire};
use super::{Entry, Kind, escape};

/// A change younger than this may be followed by another with the same time.
const SETTLED: Duration = Duration::from_secs(1);
/// Overlay's own notes that hold on this host alone.
const LOCAL_XATTRS: [&str; 4] = [
    "trusted.overlay.origin",
    "trusted.overlay.impure",
    "trusted.overlay.nlink",
    "trusted.overlay.uuid",
];
/// A file whose content is in a lower layer: here its name is all there is to send.
const METACOPY: &str = "trusted.overlay.metacopy";

/// What tells a changed file from one that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    ctime: (i64, i64),
    size: u64,
}

/// What was sent of a tree.
#[derive(Debug, Default)]
pub(crate) struct Sent(pub(super) BTreeMap<PathBuf, Option<Stamp>>);

impl Sent {
    /// Files may have changed without a trace (memory that is mapped from them).
    pub(crate) fn distrust(&mut self) {
        self.0.values_mut().for_each(|stamp| *stamp = None);
    }
}

/// All files below `root`, parents first, with `.` for itself.
///
/// # Errors
/// It cannot be read; there are too many.
pub(crate) fn scan(root: &Path) -> io::Result<Vec<(PathBuf, Metadata)>> {
    Root::open(root)?.scan()
}

fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if is_gone(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// Bytes of the regular files below `root`.
///
/// # Errors
/// It cannot be read.
pub(crate) fn size(root: &Path) -> io::Result<u64> {
    let files = scan(root)?;
    Ok(files
        .iter()
        .filter(|(_, metadata)| metadata.is_file())
        .map(|(_, metadata)| metadata.len())
        .sum())
}

/// What is in the way of sending a tree, by name: device files.
///
/// # Errors
/// It cannot be read.
pub(crate) fn devices(root: &Path) -> io::Result<Vec<PathBuf>> {
    let is_device = |metadata: &Metadata| {
        let kind = metadata.file_type();
        kind.is_block_device() || (kind.is_char_device() && metadata.rdev() != 0)
    };
    Ok(scan(root)?
        .into_iter()
        .filter(|(_, metadata)| is_device(metadata))
        .map(|(path, _)| path)
        .collect())
}

/// Sends what is new or changed below `root` since `sent`, which is brought up to date.
/// `on_bytes` is told of the bytes of files.
///
/// # Errors
/// A file that cannot be read or sent; the connection broke.
pub(crate) async fn send(
    wire: &mut Wire,
    place: Place,
    root: &Path,
    sent: &mut Sent,
    on_bytes: impl Fn(u64),
) -> Result<()> {
    let started = SystemTime::now();
    let reading = || format!("read {}", root.display());
    let opened = Root::open(root).context(reading)?;
    let (opened, files) = tokio::task::spawn_blocking(move || {
        let files = opened.scan();
        (opened, files)
    })
    .await
    .map_err(|panic| Error::other(reading(), panic))?;
    let files = files.context(reading)?;
    wire.send(&Message::Tree { place }).await?;
    let mut now = Sent::default();
    for (path, metadata) in &files {
        let trusted = is_settled(metadata, started).then(|| stamp(metadata));
        now.0.insert(path.clone(), trusted);
    }
    for path in sent.0.keys().rev() {
        if !now.0.contains_key(path) {
            let path = escape(path.as_os_str().as_bytes());
            wire.send(&Message::Removed { path }).await?;
        }
    }
    let mut first_names: HashMap<(u64, u64), PathBuf> = HashMap::new();
    for (path, seen) in files {
        if sent.0.get(&path) == Some(&Some(stamp(&seen))) {
            if let Some(inode) = linked(&seen) {
                first_names.entry(inode).or_insert(path);
            }
            continue;
        }
        let full = root.join(&path);
        // From here on it is one file, whatever becomes of its name.
        let node = gone_is_none(opened.node(&path));
        let Some(node) = node.context(|| format!("read {}", full.display()))? else {
            // The next pass tells.
            now.0.remove(&path);
            continue;
        };
        if stamp(node.metadata()) != stamp(&seen) {
            now.0.insert(path.clone(), None);
        }
        let inode = linked(node.metadata());
        let first = inode.and_then(|inode| first_names.get(&inode));
        let entry = describe(&node, &path, first.map(PathBuf::as_path))
            .context(|| format!("read {}", full.display()))?;
        if let (Some(inode), None) = (inode, first) {
            first_names.insert(inode, path);
        }
        let size = match entry.kind {
            Kind::File { size } => size,
            _ => 0,
        };
        if size == 0 {
            wire.send(&Message::Entry(entry)).await?;
            continue;
        }
        let file = node.file().context(|| format!("open {}", full.display()))?;
        wire.send(&Message::Entry(entry)).await?;
        send_file(wire, file, size, &on_bytes)
            .await
            .context(|| format!("send {}", full.display()))?;
    }
    *sent = now;
    wire.send(&Message::End).await
}

/// What tells a regular file that has several names.
fn linked(metadata: &Metadata) -> Option<(u64, u64)> {
    (metadata.is_file() && metadata.nlink() > 1).then(|| (metadata.dev(), metadata.ino()))
}

/// Sends `size` bytes: zeros where the file became shorter, in which case it has changed.
async fn send_file(
    wire: &mut Wire,
    mut file: File,
    size: u64,
    on_bytes: &impl Fn(u64),
) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let want = left.min(CHUNK as u64) as usize;
        let mut got = 0;
        while got < want {
            match file.read(&mut buffer[got..want]) {
                Ok(0) => {
                    buffer[got..want].fill(0);
                    got = want;
                }
                Ok(length) => got += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::other("read", error)),
            }
        }
        wire.data(&buffer[..want]).await?;
        left -= want as u64;
        on_bytes(want as u64);
    }
    Ok(())
}

pub(super) fn stamp(metadata: &Metadata) -> Stamp {
    Stamp {
        inode: metadata.ino(),
        ctime: (metadata.ctime(), metadata.ctime_nsec()),
        size: metadata.len(),
    }
}

/// Whether a change from `now` on would show in its [`Stamp`].
fn is_settled(metadata: &Metadata, now: SystemTime) -> bool {
    let seconds = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |passed| passed.as_secs() as i64);
    metadata.ctime() + (SETTLED.as_secs() as i64) < seconds
}

fn describe(node: &Node, path: &Path, other_name: Option<&Path>) -> io::Result<Entry> {
    let metadata = node.metadata();
    let kind = metadata.file_type();
    let kind = if let Some(other) = other_name {
        Kind::Hard {
            to: escape(other.as_os_str().as_bytes()),
        }
    } else if kind.is_dir() {
        Kind::Dir
    } else if kind.is_file() {
        Kind::File {
            size: metadata.len(),
        }
    } else if kind.is_symlink() {
        Kind::Symlink {
            target: escape(node.link()?.as_os_str().as_bytes()),
        }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else if kind.is_char_device() && metadata.rdev() == 0 {
        Kind::Whiteout
    } else {
        return Err(io::Error::other(
            "a device file, which does not migrate: remove it from the container",
        ));
    };
    let mut xattrs = BTreeMap::new();
    let its_own = node.proc_path();
    for name in unsupported_is_none(xattr::list_deref(&its_own))?
        .into_iter()
        .flatten()
    {
        let name = name.to_string_lossy().into_owned();
        if name == METACOPY {
            return Err(io::Error::other(
                "its content is in a lower layer: mount overlays with metacopy=off",
            ));
        }
        if !LOCAL_XATTRS.contains(&name.as_str())
            && let Some(value) = xattr::get_deref(&its_own, &name)?
        {
            xattrs.insert(name, escape(&value));
        }
    }
    Ok(Entry {
        path: escape(path.as_os_str().as_bytes()),
        kind,
        mode: metadata.permissions().mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        xattrs,
    })
}

fn unsupported_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::fcntl::AT_FDCWD;
    use nix::sys::stat::{Mode, SFlag, mknodat};

    use super::super::tests::needs_root;
    use super::*;

    #[test]
    fn a_change_that_is_too_young_is_not_trusted() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("f");
        fs::write(&file, "x").unwrap();
        let metadata = fs::metadata(&file).unwrap();
        let now = SystemTime::now();
        assert!(!is_settled(&metadata, now));
        assert!(is_settled(&metadata, now + 3 * SETTLED));
    }

    #[test]
    fn device_files_are_named() {
        needs_root();
        let temp = tempfile::tempdir().unwrap();
        let dev = nix::sys::stat::makedev(1, 3);
        mknodat(
            AT_FDCWD,
            &temp.path().join("null"),
            SFlag::S_IFCHR,
            Mode::empty(),
            dev,
        )
        .unwrap();
        mknodat(
            AT_FDCWD,
            &temp.path().join("gone"),
            SFlag::S_IFCHR,
            Mode::empty(),
            0,
        )
        .unwrap();
        assert_eq!(devices(temp.path()).unwrap(), [PathBuf::from("null")]);
        let node = Node::open(&temp.path().join("null")).unwrap();
        let error = describe(&node, Path::new("null"), None);
        assert!(error.unwrap_err().to_string().contains("device file"));
    }
}
