//! A directory's files, as they travel: scanned and sent here, made again there.
//!
//! It goes twice: once while the pod runs, and then, when it is frozen, what changed
//! since. What changed is told by inode, change time and size.
//!
//! The receiver believes no path: each is resolved below the tree's root by the kernel
//! (openat2, `RESOLVE_BENEATH`), without following any link.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::error::{Context, Error, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use serde::{Deserialize, Serialize};

use super::wire::{CHUNK, Message, Place, Wire, broken};

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

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Below the tree's root, [`escape`]d; `.`: the root itself.
    pub path: String,
    pub kind: Kind,
    /// Permissions, with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Values escaped as paths are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Dir,
    File {
        size: u64,
    },
    Symlink {
        target: String,
    },
    /// Another name of a file that came before.
    Hard {
        to: String,
    },
    Fifo,
    Socket,
    /// Overlay's mark that a lower layer's file is gone (a character device 0:0).
    Whiteout,
}

/// What tells a changed file from one that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    ctime: (i64, i64),
    size: u64,
}

/// What was sent of a tree.
#[derive(Debug, Default)]
pub(crate) struct Sent(BTreeMap<PathBuf, Option<Stamp>>);

impl Sent {
    /// Files may have changed without a trace (memory that is mapped from them).
    pub(crate) fn distrust(&mut self) {
        self.0.values_mut().for_each(|stamp| *stamp = None);
    }
}

/// Text of any bytes: what is not UTF-8, and `%`, as `%XX`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '%' | '\0' => text.push_str(&format!("%{:02x}", c as u32)),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("%{byte:02x}"));
        }
    }
    text
}

fn unescape(text: &str) -> Result<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let byte = after
            .get(..2)
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .ok_or_else(|| broken(format!("{text:?} is badly escaped")))?;
        bytes.push(byte);
        rest = &after[2..];
    }
    Ok(OsString::from_vec(bytes))
}

/// A path below a root, as a peer names it.
fn below(text: &str) -> Result<PathBuf> {
    let path = PathBuf::from(unescape(text)?);
    let bytes = path.as_os_str().as_bytes();
    let plain = path
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if bytes.is_empty() || bytes.len() > 4095 || bytes.contains(&0) || !plain {
        return Err(broken(format!("{text:?} is no path below a directory")));
    }
    Ok(path)
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

fn stamp(metadata: &Metadata) -> Stamp {
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

/// Makes a tree's files again.
pub(crate) struct Receiver {
    root: OwnedFd,
    /// Only files, and the link to the set before.
    images: bool,
    /// Directories, whose times are set when nothing changes in them any more.
    dirs: Vec<(PathBuf, Entry)>,
}

impl Receiver {
    /// Below the directory `root`, which is there.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn new(root: &Path) -> Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(root, flags, Mode::empty())
            .context(|| format!("open {}", root.display()))?;
        Ok(Self {
            root,
            images: false,
            dirs: Vec::new(),
        })
    }

    /// Takes nothing but what CRIU writes.
    pub(crate) fn images(mut self) -> Self {
        self.images = true;
        self
    }

    /// Receives entries until the tree's end; `on_bytes` is told of the bytes of files.
    ///
    /// # Errors
    /// The connection broke; what came is no tree; a file cannot be made.
    pub(crate) async fn receive(mut self, wire: &mut Wire, on_bytes: impl Fn(u64)) -> Result<()> {
        loop {
            match wire.receive().await? {
                Message::Entry(entry) => {
                    let name = entry.path.clone();
                    let made = self.make(&entry).context(|| format!("make {name}"))?;
                    if let (Some(file), Kind::File { size }) = (made, &entry.kind) {
                        receive_file(wire, &file, *size, &on_bytes).await?;
                        self.finish(&file, &entry)
                            .context(|| format!("make {name}"))?;
                    }
                }
                Message::Removed { path } => {
                    let below = below(&path)?;
                    self.remove(&below).context(|| format!("remove {path}"))?;
                }
                Message::End => return self.end().context(|| "set times of directories".into()),
                other => return Err(other.unexpected("an entry of a tree")),
            }
        }
    }

    fn open(&self, path: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .mode(mode)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        openat2(&self.root, path, how)
    }

    /// The directory that `path` is in, and its name there.
    fn parent<'a>(&self, path: &'a Path) -> nix::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(Errno::EINVAL)?;
        let dir = match path.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH;
        Ok((self.open(dir, flags, Mode::empty())?, name))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (dir, name) = match self.parent(path) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other?,
        };
        match unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            // It follows no link below.
            Err(Errno::EISDIR) => fs::remove_dir_all(at(&dir, name)),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes one; a regular file is to be filled and then [`Self::finish`]ed.
    fn make(&mut self, entry: &Entry) -> Result<Option<File>> {
        if entry.path == "." {
            if entry.kind != Kind::Dir {
                return Err(broken("the root of a tree is no directory".into()));
            }
            self.dirs.push((PathBuf::from("."), entry.clone()));
            return Ok(None);
        }
        let path = below(&entry.path)?;
        if self.images && !is_image(entry) {
            return Err(broken("it is none of CRIU's images".into()));
        }
        let context = || "cannot".to_owned();
        if entry.kind == Kind::Dir {
            let (dir, name) = self.parent(&path).context(context)?;
            match mkdirat(&dir, name, Mode::S_IRWXU) {
                Err(Errno::EEXIST)
                    if self
                        .open(&path, OFlag::O_DIRECTORY | OFlag::O_PATH, Mode::empty())
                        .is_err() =>
                {
                    self.remove(&path).context(context)?;
                    mkdirat(&dir, name, Mode::S_IRWXU).context(context)?;
                }
                Err(Errno::EEXIST) => {}
                other => other.context(context)?,
            }
            self.dirs.push((path, entry.clone()));
            return Ok(None);
        }
        self.remove(&path).context(context)?;
        let (dir, name) = self.parent(&path).context(context)?;
        let node = |kind| mknodat(&dir, name, kind, Mode::from_bits_truncate(0o600), 0);
        match &entry.kind {
            Kind::Dir => {}
            Kind::File { .. } => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR;
                let file = self.open(&path, flags, Mode::from_bits_truncate(0o600));
                let file = File::from(file.context(context)?);
                if entry.kind == (Kind::File { size: 0 }) {
                    self.finish(&file, entry).context(context)?;
                    return Ok(None);
                }
                return Ok(Some(file));
            }
            Kind::Hard { to } => {
                let to = below(to)?;
                let (to_dir, to_name) = self.parent(&to).context(context)?;
                linkat(&to_dir, to_name, &dir, name, AtFlags::empty()).context(context)?;
                return Ok(None);
            }
            Kind::Symlink { target } => {
                let target = unescape(target)?;
                symlinkat(target.as_os_str(), &dir, name).context(context)?;
            }
            Kind::Fifo => node(SFlag::S_IFIFO).context(context)?,
            Kind::Socket => node(SFlag::S_IFSOCK).context(context)?,
            Kind::Whiteout => node(SFlag::S_IFCHR).context(context)?,
        }
        self.set(&at(&dir, name), entry).context(context)?;
        Ok(None)
    }

    fn finish(&self, file: &File, entry: &Entry) -> Result<()> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // Followed: it is the kernel's link to this very file.
        set_attributes(&path, entry, true).context(|| "set its attributes".into())
    }

    fn set(&self, path: &Path, entry: &Entry) -> io::Result<()> {
        set_attributes(path, entry, false)
    }

    fn end(&mut self) -> io::Result<()> {
        for (path, entry) in std::mem::take(&mut self.dirs).iter().rev() {
            let dir = match self.open(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY, Mode::empty()) {
                // Removed by a later entry.
                Err(Errno::ENOENT) => continue,
                other => other?,
            };
            let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
            set_attributes(&path, entry, true)?;
        }
        Ok(())
    }
}

/// A set of images is flat; `parent` leads to the set before it.
fn is_image(entry: &Entry) -> bool {
    match &entry.kind {
        Kind::File { .. } => !entry.path.contains('/'),
        Kind::Symlink { target } => {
            let set = target.strip_prefix("../pre-");
            let number = set.is_some_and(|set| set.parse::<u8>().is_ok());
            entry.path == "parent" && number
        }
        _ => false,
    }
}

async fn receive_file(
    wire: &mut Wire,
    mut file: &File,
    size: u64,
    on_bytes: &impl Fn(u64),
) -> Result<()> {
    let context = || "write".to_owned();
    let mut left = size;
    while left > 0 {
        let part = wire.receive_data(left).await?;
        left -= part.len() as u64;
        on_bytes(part.len() as u64);
        if part.iter().all(|byte| *byte == 0) {
            // Holes stay holes.
            file.seek(SeekFrom::Current(part.len() as i64))
                .context(context)?;
        } else {
            file.write_all(&part).context(context)?;
        }
    }
    file.set_len(size).context(context)
}

/// The path of a name in an open directory.
fn at(dir: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)
}

/// Owner first: changing it drops setuid and capabilities.
fn set_attributes(path: &Path, entry: &Entry, follow: bool) -> io::Result<()> {
    let at = if follow {
        AtFlags::empty()
    } else {
        AtFlags::AT_SYMLINK_NOFOLLOW
    };
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchownat(AT_FDCWD, path, Some(uid), Some(gid), at)?;
    if !matches!(entry.kind, Kind::Symlink { .. }) {
        // Nothing else than what was made just now, so no link is followed.
        fs::set_permissions(path, fs::Permissions::from_mode(entry.mode & 0o7777))?;
    }
    for (name, value) in &entry.xattrs {
        let value = unescape(value).map_err(|error| io::Error::other(error.chain()))?;
        let value = value.as_bytes();
        let set = if follow {
            xattr::set_deref(path, name, value)
        } else {
            xattr::set(path, name, value)
        };
        // A label is the policy's of this host.
        if let Err(error) = set
            && name != "security.selinux"
        {
            return Err(io::Error::new(error.kind(), format!("{name}: {error}")));
        }
    }
    let mtime = TimeSpec::new(entry.mtime.0, entry.mtime.1);
    let flags = if follow {
        UtimensatFlags::FollowSymlink
    } else {
        UtimensatFlags::NoFollowSymlink
    };
    Ok(utimensat(AT_FDCWD, path, &mtime, &mtime, flags)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry {
            path: path.into(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (1_000_000, 5),
            xattrs: BTreeMap::new(),
        }
    }

    fn place() -> Place {
        Place::Layer {
            container: "c".into(),
        }
    }

    /// One pass from `from` to `to`; how many bytes of files went.
    async fn pass(from: &Path, to: &Path, sent: &mut Sent) -> Result<u64> {
        let (a, b) = tokio::io::duplex(64 << 10);
        let (mut a, mut b) = (Wire::new(a), Wire::new(b));
        let (sending, receiving) = tokio::join!(send(&mut a, place(), from, sent, |_| {}), async {
            assert_eq!(b.receive().await?, Message::Tree { place: place() });
            Receiver::new(to)?.receive(&mut b, |_| {}).await
        });
        sending?;
        receiving?;
        Ok(a.data_bytes)
    }

    fn listing(root: &Path) -> Vec<String> {
        scan(root)
            .unwrap()
            .iter()
            .map(|(path, metadata)| {
                let content = match metadata.is_file() {
                    true => fs::read(root.join(path)).unwrap().len(),
                    false => 0,
                };
                format!(
                    "{} {:o} {}:{} {}.{} {} {} {:?}",
                    path.display(),
                    metadata.mode(),
                    metadata.uid(),
                    metadata.gid(),
                    metadata.mtime(),
                    metadata.mtime_nsec(),
                    metadata.rdev(),
                    content,
                    metadata.is_file().then(|| metadata.nlink())
                )
            })
            .collect()
    }

    fn needs_root() {
        assert!(nix::unistd::geteuid().is_root(), "makes device files");
    }

    #[tokio::test]
    async fn a_tree_is_made_again_and_then_only_what_changed_goes() {
        needs_root();
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("a"), temp.path().join("b"));
        fs::create_dir_all(from.join("d/e")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("d/big"), vec![7; 3 * CHUNK + 5]).unwrap();
        File::create(from.join("sparse"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        fs::write(from.join("empty"), "").unwrap();
        fs::hard_link(from.join("d/big"), from.join("hard")).unwrap();
        symlink("/etc/shadow", from.join("link")).unwrap();
        let odd = OsStr::from_bytes(b"odd%\xff name");
        fs::write(from.join(odd), "x").unwrap();
        fs::set_permissions(from.join(odd), fs::Permissions::from_mode(0o4711)).unwrap();
        std::os::unix::fs::chown(from.join("d/e"), Some(1000), Some(1001)).unwrap();
        mknodat(
            AT_FDCWD,
            &from.join("gone"),
            SFlag::S_IFCHR,
            Mode::empty(),
            0,
        )
        .unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), Mode::S_IRUSR).unwrap();
        xattr::set(from.join("d/e"), "trusted.overlay.opaque", b"y").unwrap();
        xattr::set(from.join("d/e"), "trusted.overlay.origin", b"here").unwrap();

        let mut sent = Sent::default();
        pass(&from, &to, &mut sent).await.unwrap();
        assert_eq!(listing(&to), listing(&from));
        let opaque = xattr::get(to.join("d/e"), "trusted.overlay.opaque").unwrap();
        assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
        assert_eq!(
            xattr::get(to.join("d/e"), "trusted.overlay.origin").unwrap(),
            None
        );
        assert_eq!(fs::metadata(to.join("sparse")).unwrap().blocks(), 0);

        // As if those were older than a moment.
        for (path, metadata) in scan(&from).unwrap() {
            sent.0.insert(path, Some(stamp(&metadata)));
        }
        fs::write(from.join("d/new"), "12345").unwrap();
        fs::remove_dir_all(from.join("d/e")).unwrap();
        fs::remove_file(from.join("link")).unwrap();
        fs::create_dir(from.join("link")).unwrap();
        fs::remove_file(from.join("fifo")).unwrap();
        assert_eq!(pass(&from, &to, &mut sent).await.unwrap(), 5);
        assert_eq!(listing(&to), listing(&from));

        sent.distrust();
        let all = pass(&from, &to, &mut sent).await.unwrap();
        assert!(all > 3 * CHUNK as u64, "{all}");
        assert_eq!(listing(&to), listing(&from));
    }

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
    fn any_bytes_survive_as_text() {
        for bytes in [
            &b""[..],
            b"a b",
            b"%",
            b"\xff\xfe%41",
            "ü\n\"".as_bytes(),
            b"\0x",
        ] {
            let text = escape(bytes);
            assert_eq!(unescape(&text).unwrap().as_bytes(), bytes, "{text}");
        }
        for text in ["%", "%4", "%zz", "a%+1", "%é"] {
            assert!(unescape(text).is_err(), "{text}");
        }
    }

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for path in [
            "",
            "/",
            "/etc",
            "..",
            "a/../b",
            "../x",
            "./..",
            "a%00b",
            "a/./../..",
            "%2e%2e/x",
        ] {
            assert!(below(path).is_err(), "{path}");
        }
        for path in ["a", "a/b", "..a", "a..", " "] {
            assert!(below(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn no_link_leads_out_of_the_tree() {
        needs_root();
        let temp = tempfile::tempdir().unwrap();
        let (root, outside) = (temp.path().join("root"), temp.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "s").unwrap();
        let mut receiver = Receiver::new(&root).unwrap();
        let link = |name: &str, target: &str| {
            entry(
                name,
                Kind::Symlink {
                    target: target.into(),
                },
            )
        };
        receiver
            .make(&link("out", outside.to_str().unwrap()))
            .unwrap();
        receiver.make(&link("up", "..")).unwrap();
        for path in ["out/x", "up/outside/x"] {
            for kind in [
                Kind::File { size: 1 },
                Kind::Dir,
                Kind::Fifo,
                Kind::Symlink { target: "t".into() },
                Kind::Hard {
                    to: "out/secret".into(),
                },
            ] {
                assert!(
                    receiver.make(&entry(path, kind.clone())).is_err(),
                    "{path} {kind:?}"
                );
            }
        }
        let stolen = entry(
            "mine",
            Kind::Hard {
                to: "out/secret".into(),
            },
        );
        assert!(receiver.make(&stolen).is_err());
        assert!(receiver.remove(Path::new("out/secret")).is_err());
        // A link itself is replaced, and not what it leads to.
        let file = receiver
            .make(&entry("out", Kind::File { size: 1 }))
            .unwrap()
            .unwrap();
        (&file).write_all(b"x").unwrap();
        receiver
            .finish(&file, &entry("out", Kind::File { size: 1 }))
            .unwrap();
        receiver.end().unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "s");
        assert_eq!(fs::read_to_string(root.join("out")).unwrap(), "x");
        assert!(receiver.make(&entry(".", Kind::Fifo)).is_err());
    }

    #[test]
    fn among_images_there_is_nothing_else() {
        let temp = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(temp.path()).unwrap().images();
        let link = |target: &str| Kind::Symlink {
            target: target.into(),
        };
        for (path, kind, fine) in [
            ("pages-1.img", Kind::File { size: 0 }, true),
            ("parent", link("../pre-1"), true),
            ("parent", link("../../etc"), false),
            ("parent", link("../pre-1/../../x"), false),
            ("other", link("../pre-1"), false),
            ("d", Kind::Dir, false),
            ("d/x.img", Kind::File { size: 0 }, false),
            ("fifo", Kind::Fifo, false),
        ] {
            assert_eq!(receiver.make(&entry(path, kind)).is_ok(), fine, "{path}");
        }
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
