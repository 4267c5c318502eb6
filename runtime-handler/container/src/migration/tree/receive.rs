//! Makes again what a peer sent, below one directory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use dyad_linux::open_below::Root;
use dyad_runtime_handler::error::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};

use super::super::wire::{Message, Wire, broken};
use super::{Entry, Kind, below, unescape};

/// Bytes of the directories' attributes that are kept to a tree's end.
const DIRS_MAX: usize = 128 << 20;

/// Makes a tree's files again.
pub(crate) struct Receiver {
    root: Root,
    /// Only files, and the link to the set before.
    images: bool,
    /// Directories, whose times are set when nothing changes in them any more.
    dirs: Vec<(PathBuf, Entry)>,
    /// About what they take.
    dirs_bytes: usize,
}

impl Receiver {
    /// Below the directory `root`, which is there.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn new(root: &Path) -> Result<Self> {
        let root = Root::open(root).context(|| format!("open {}", root.display()))?;
        Ok(Self {
            root,
            images: false,
            dirs: Vec::new(),
            dirs_bytes: 0,
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
        self.root.open_below(path, flags, mode)
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
            self.keep(PathBuf::from("."), entry)?;
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
            self.keep(path, entry)?;
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

    /// Keeps a directory's attributes for the end.
    fn keep(&mut self, path: PathBuf, entry: &Entry) -> Result<()> {
        let xattrs = entry.xattrs.iter();
        let xattrs: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
        self.dirs_bytes += size_of::<(PathBuf, Entry)>() + 2 * entry.path.len() + xattrs;
        if self.dirs_bytes > DIRS_MAX {
            return Err(broken(format!(
                "the tree's directories take more than {} MiB to describe",
                DIRS_MAX >> 20
            )));
        }
        self.dirs.push((path, entry.clone()));
        Ok(())
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
    use std::collections::BTreeMap;

    use super::super::tests::needs_root;
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
    fn directories_without_end_are_refused() {
        needs_root();
        let temp = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(temp.path()).unwrap();
        let mut dir = entry("d", Kind::Dir);
        let value = "x".repeat(4 << 20);
        dir.xattrs.insert("user.x".into(), value);
        let refused = (0..100).find_map(|_| receiver.make(&dir).err());
        let error = refused.expect("refused").chain();
        assert!(error.contains("MiB to describe"), "{error}");
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

    proptest::proptest! {
        /// Nothing that a peer sends as entries changes or shows a file outside the tree.
        #[test]
        fn fuzz_tree_entries(entries in proptest::collection::vec(
            ("(out|up|d|[./%a0]{0,6})(/(x|secret|[./%a2e]{0,5})){0,2}", 0_u8..6, "(/|\\.\\.|out/secret|[./a]{0,4})", 0_u32..0o10000),
            0..24,
        )) {
            needs_root();
            let temp = tempfile::tempdir().unwrap();
            let (root, outside) = (temp.path().join("root"), temp.path().join("outside"));
            fs::create_dir(&root).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("secret"), "s").unwrap();
            std::os::unix::fs::symlink(&outside, root.join("out")).unwrap();
            std::os::unix::fs::symlink("..", root.join("up")).unwrap();
            let mut receiver = Receiver::new(&root).unwrap();
            for (path, kind, target, mode) in entries {
                let kind = match kind {
                    0 => Kind::Dir,
                    1 => Kind::File { size: 1 },
                    2 => Kind::Symlink { target },
                    3 => Kind::Hard { to: target },
                    4 => Kind::Fifo,
                    _ => Kind::Whiteout,
                };
                let entry = Entry { mode, ..entry(&path, kind) };
                if let Ok(Some(file)) = receiver.make(&entry) {
                    (&file).write_all(b"x").unwrap();
                    let _ = receiver.finish(&file, &entry);
                }
                if let Ok(path) = below(&entry.path) && entry.mode.is_multiple_of(7) {
                    let _ = receiver.remove(&path);
                }
            }
            let _ = receiver.end();
            let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
            proptest::prop_assert_eq!(left, ["secret"]);
            proptest::prop_assert_eq!(fs::read(outside.join("secret")).unwrap(), b"s");
            proptest::prop_assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
        }
    }
}
