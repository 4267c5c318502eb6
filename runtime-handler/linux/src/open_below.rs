//! The one way in which a host process opens what a pod can change.
//!
//! A pod may swap any file below its own directories for a symlink, a pipe or a device
//! between two system calls of ours, and we are root. So nothing here is looked at by
//! path and then opened by path:
//!
//! ```text
//! Root::open(dir) --openat2: beneath the root, through no link, into no other file
//!      |            system--> Node (O_PATH: opened for nothing yet)
//!      |                        | fstat of this very inode: what is it?
//!      |                        +-> file()          regular, read without waiting
//!      |                        +-> read_at_most()  the same, bounded
//!      |                        +-> link(), proc_path() for attributes
//!      +-- scan(): all below, each directory opened anew from the root
//! ```
//! What was swapped while we looked is refused (`ELOOP`, `ENOTDIR`, `EXDEV`), never
//! followed; [`is_gone`] tells such an answer from a failure of the disk.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

/// Files that [`Root::scan`] finds at most, so that a pod cannot grow the process that
/// looks at its files without a bound. One takes about 300 bytes.
pub const SCAN_MAX: usize = 1 << 20;

/// How often a directory may leave the root while it is being opened.
const TRIES: u32 = 16;

/// A directory below which a pod may change anything at any moment.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Opens it. The path up to it must be the host's own: kubelet's, containerd's or ours.
    ///
    /// # Errors
    /// It is no directory, or its last name is a link.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(nix::fcntl::open(path, flags, Mode::empty())?))
    }

    /// Opens `path` below it as `flags` say. For whoever makes files there; who reads them
    /// takes a [`Node`].
    ///
    /// # Errors
    /// A name on the way is a link, leads out or to another file system; as openat2(2).
    pub fn open_below(&self, path: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .mode(mode)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        // A directory that leaves the root just now is found to have left: that is how a
        // mount point below it looks, too, but one of them is there the next time.
        let mut tries = 0;
        loop {
            tries += 1;
            match openat2(&self.0, path, how) {
                Err(Errno::EXDEV | Errno::EAGAIN) if tries < TRIES => {}
                other => return other,
            }
        }
    }

    /// What is at `path` below it; `.`: itself.
    ///
    /// # Errors
    /// As [`Self::open_below`].
    pub fn node(&self, path: &Path) -> io::Result<Node> {
        // A link itself may be looked at: O_PATH opens that, and follows nothing.
        Node::of(self.open_below(path, OFlag::O_PATH, Mode::empty())?)
    }

    /// All files below it by their paths, sorted, `.` for itself first. What vanishes or is
    /// swapped meanwhile is left out.
    ///
    /// # Errors
    /// A directory cannot be read; there are more than [`SCAN_MAX`] files.
    pub fn scan(&self) -> io::Result<Vec<(PathBuf, Metadata)>> {
        self.scan_at_most(SCAN_MAX)
    }

    /// [`Self::scan`] for at most `max` files.
    ///
    /// # Errors
    /// So.
    pub fn scan_at_most(&self, max: usize) -> io::Result<Vec<(PathBuf, Metadata)>> {
        let mut found = vec![(PathBuf::from("."), self.node(Path::new("."))?.metadata)];
        let mut dirs = vec![PathBuf::new()];
        while let Some(dir) = dirs.pop() {
            let at = if dir == Path::new("") {
                Path::new(".")
            } else {
                &dir
            };
            let opened = self.open_below(at, OFlag::O_DIRECTORY, Mode::empty());
            let opened = match opened.map_err(io::Error::from) {
                Err(error) if is_gone(&error) => continue,
                other => other.map_err(|error| named(error, at))?,
            };
            // By our own descriptor, so the entries are of this very directory.
            for entry in fs::read_dir(proc_path(opened.as_fd()))? {
                let entry = entry?;
                let path = dir.join(entry.file_name());
                // By the directory's descriptor, and no link is followed.
                let metadata = match entry.metadata() {
                    Err(error) if is_gone(&error) => continue,
                    other => other.map_err(|error| named(error, &path))?,
                };
                if found.len() >= max {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!(
                            "there are more than {max} files, which is the most that are handled"
                        ),
                    ));
                }
                if metadata.is_dir() {
                    dirs.push(path.clone());
                }
                found.push((path, metadata));
            }
        }
        found[1..].sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found)
    }
}

/// One file, held: whatever happens to its name, this is still it.
#[derive(Debug)]
pub struct Node {
    fd: OwnedFd,
    metadata: Metadata,
}

impl Node {
    fn of(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        Ok(Self {
            fd: file.into(),
            metadata,
        })
    }

    /// What is at a path of the host in which there was no link when it was resolved
    /// (`fs::canonicalize`), and through none that is there now. The last name may be one,
    /// which then is what this is.
    ///
    /// # Errors
    /// There is a link on the way; as openat2(2).
    pub fn open(path: &Path) -> io::Result<Self> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        Self::of(openat2(AT_FDCWD, path, how)?)
    }

    /// As it was when it was opened.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Where a link leads to, in the pod's words.
    ///
    /// # Errors
    /// It is no link.
    pub fn link(&self) -> io::Result<PathBuf> {
        Ok(nix::fcntl::readlinkat(&self.fd, c"")?.into())
    }

    /// A path of this very file for calls that want one (extended attributes); to be
    /// followed, for it is the kernel's link to our descriptor.
    pub fn proc_path(&self) -> PathBuf {
        proc_path(self.fd.as_fd())
    }

    /// Opens a regular file to be read.
    ///
    /// # Errors
    /// `InvalidInput`: it is something else, which is not opened.
    pub fn file(&self) -> io::Result<File> {
        self.reopen(File::options().read(true))
    }

    /// Opens a regular file to be written from its beginning; what it held is gone.
    ///
    /// # Errors
    /// `InvalidInput`: it is something else, which is not opened.
    pub fn overwrite(&self) -> io::Result<File> {
        self.reopen(File::options().write(true).truncate(true))
    }

    fn reopen(&self, how: &mut fs::OpenOptions) -> io::Result<File> {
        if !self.metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no regular file",
            ));
        }
        // A lease or a FUSE file system may make even a regular file wait.
        how.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(self.proc_path())
    }

    /// The content of a regular file that has at most `max` bytes.
    ///
    /// # Errors
    /// `InvalidInput`: it is something else. `InvalidData`: it is longer, also where it grew
    /// only now.
    pub fn read_at_most(&self, max: u64) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        self.file()?
            .take(max.saturating_add(1))
            .read_to_end(&mut content)?;
        if content.len() as u64 > max {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has more than {max} bytes"),
            ));
        }
        Ok(content)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether an error says that what was looked for is not there any more: removed, or
/// swapped for something else.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR)
    )
}

fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn named(error: io::Error, path: &Path) -> io::Error {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EXDEV) => "another file system is mounted there".to_owned(),
        _ => error.to_string(),
    };
    io::Error::new(error.kind(), format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use nix::unistd::mkfifo;

    use super::*;

    const SECRET: &[u8] = b"root's alone";

    /// A root with a directory `d` and a file `d/shadow`, and another directory beside it
    /// whose `shadow` is a secret.
    fn pod_and_secret() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let (pod, secrets) = (temp.path().join("pod"), temp.path().join("secrets"));
        fs::create_dir_all(pod.join("d")).unwrap();
        fs::create_dir(&secrets).unwrap();
        fs::write(pod.join("d/shadow"), "own").unwrap();
        fs::write(secrets.join("shadow"), SECRET).unwrap();
        (temp, pod, secrets)
    }

    #[test]
    fn no_link_and_no_dots_lead_out() {
        let (_temp, pod, secrets) = pod_and_secret();
        symlink(&secrets, pod.join("out")).unwrap();
        symlink("d", pod.join("inside")).unwrap();
        symlink("d/shadow", pod.join("file")).unwrap();
        let root = Root::open(&pod).unwrap();
        for path in [
            "out/shadow",
            "inside/shadow",
            "../secrets/shadow",
            "d/../../secrets/shadow",
            secrets.join("shadow").to_str().unwrap(),
        ] {
            assert!(root.node(Path::new(path)).is_err(), "{path}");
        }
        let link = root.node(Path::new("file")).unwrap();
        assert_eq!(link.link().unwrap(), Path::new("d/shadow"));
        let error = link.file().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(Root::open(&pod.join("inside")).is_err());
        let found: Vec<_> = root.scan().unwrap().into_iter().map(|(p, _)| p).collect();
        let found: Vec<_> = found.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(found, [".", "d", "d/shadow", "file", "inside", "out"]);
    }

    #[test]
    fn what_is_no_file_is_never_opened() {
        let (_temp, pod, _) = pod_and_secret();
        mkfifo(&pod.join("fifo"), Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(pod.join("socket")).unwrap();
        let root = Root::open(&pod).unwrap();
        // A plain open of the pipe would wait for a writer, for ever.
        for name in ["fifo", "socket", "d"] {
            let node = root.node(Path::new(name)).unwrap();
            let error = node.read_at_most(10).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
            let node = Node::open(&pod.join(name)).unwrap();
            assert!(node.overwrite().is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_read_is_bounded_whatever_the_size_said() {
        let (_temp, pod, _) = pod_and_secret();
        let node = Node::open(&pod.join("d/shadow")).unwrap();
        assert_eq!(node.read_at_most(3).unwrap(), b"own");
        let error = node.read_at_most(2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        fs::write(pod.join("d/shadow"), "grown since").unwrap();
        assert_eq!(node.metadata().len(), 3);
        assert!(node.read_at_most(3).is_err());
        let root = Root::open(&pod).unwrap();
        let error = root.scan_at_most(2).unwrap_err().to_string();
        assert!(error.contains("more than 2 files"), "{error}");
        assert_eq!(root.scan_at_most(3).unwrap().len(), 3);
    }

    #[test]
    fn a_host_path_is_opened_through_no_link() {
        let (_temp, pod, secrets) = pod_and_secret();
        symlink(secrets.join("shadow"), pod.join("log")).unwrap();
        assert!(Node::open(&pod.join("log")).unwrap().overwrite().is_err());
        symlink(&secrets, pod.join("dir")).unwrap();
        let error = Node::open(&pod.join("dir/shadow")).unwrap_err();
        assert!(is_gone(&error), "{error}");
        assert_eq!(fs::read(secrets.join("shadow")).unwrap(), SECRET);
    }

    #[test]
    fn a_directory_swapped_for_a_link_again_and_again_never_shows_another_ones_file() {
        let (_temp, pod, secrets) = pod_and_secret();
        /// Also where an assertion fails: the scope waits for its threads.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stop = AtomicBool::new(false);
        let (dir, aside) = (pod.join("d"), pod.join("aside"));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    fs::rename(&dir, &aside).unwrap();
                    symlink(&secrets, &dir).unwrap();
                    fs::remove_file(&dir).unwrap();
                    fs::rename(&aside, &dir).unwrap();
                }
            });
            let _stop = Stop(&stop);
            let root = Root::open(&pod).unwrap();
            let started = Instant::now();
            let (mut read, mut gone) = (0, 0);
            // Until the swap was met often enough, on a busy host too.
            while (read < 100 || gone < 100) && started.elapsed() < Duration::from_secs(30) {
                match root
                    .node(Path::new("d/shadow"))
                    .and_then(|node| node.read_at_most(100))
                {
                    Ok(content) => {
                        assert_eq!(content, b"own");
                        read += 1;
                    }
                    Err(error) => {
                        assert!(is_gone(&error), "{error}");
                        gone += 1;
                    }
                }
                for (path, metadata) in root.scan().unwrap() {
                    assert_ne!(metadata.len(), SECRET.len() as u64, "{}", path.display());
                }
            }
            assert!(read >= 100 && gone >= 100, "{read} {gone}");
        });
    }
}
