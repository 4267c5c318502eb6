//! Reads a tree and sends what is new in it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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
pub(crate) fn scan(root: &Path) -> io::Result<Vec<(PathBuf, Metadata)>> {
    let mut found = vec![(PathBuf::from("."), fs::symlink_metadata(root)?)];
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(root.join(&dir)) {
            Ok(entries) => entries,
            // It runs: what was there may be gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            let Some(metadata) = gone_is_none(entry.metadata())? else {
                continue;
            };
            if metadata.is_dir() {
                dirs.push(path.clone());
            }
            found.push((path, metadata));
        }
    }
    found[1..].sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
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
    let from = root.to_owned();
    let started = SystemTime::now();
    let files = tokio::task::spawn_blocking(move || scan(&from))
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        .context(|| format!("read {}", root.display()))?;
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
    for (path, metadata) in files {
        let full = root.join(&path);
        let first = (metadata.is_file() && metadata.nlink() > 1).then(|| {
            let inode = (metadata.dev(), metadata.ino());
            first_names.entry(inode).or_insert_with(|| path.clone())
        });
        if sent.0.get(&path) == Some(&Some(stamp(&metadata))) {
            continue;
        }
        let other_name = first.filter(|first| **first != path).cloned();
        let described = describe(&full, &path, &metadata, other_name.as_deref());
        let Some(entry) = gone_is_none(described).context(|| format!("read {}", full.display()))?
        else {
            continue;
        };
        let size = match entry.kind {
            Kind::File { size } => size,
            _ => 0,
        };
        if size == 0 {
            wire.send(&Message::Entry(entry)).await?;
            continue;
        }
        let Some(file) =
            gone_is_none(File::open(&full)).context(|| format!("open {}", full.display()))?
        else {
            // The next pass tells.
            now.0.remove(&path);
            continue;
        };
        wire.send(&Message::Entry(entry)).await?;
        send_file(wire, file, size, &on_bytes)
            .await
            .context(|| format!("send {}", full.display()))?;
    }
    *sent = now;
    wire.send(&Message::End).await
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

fn describe(
    full: &Path,
    path: &Path,
    metadata: &Metadata,
    other_name: Option<&Path>,
) -> io::Result<Entry> {
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
            target: escape(fs::read_link(full)?.as_os_str().as_bytes()),
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
    for name in unsupported_is_none(xattr::list(full))?
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
            && let Some(value) = xattr::get(full, &name)?
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
        let metadata = fs::symlink_metadata(temp.path().join("null")).unwrap();
        let error = describe(
            &temp.path().join("null"),
            Path::new("null"),
            &metadata,
            None,
        );
        assert!(error.unwrap_err().to_string().contains("device file"));
    }
}
