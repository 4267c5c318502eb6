//! Mounts whose files have other owners than on disk, for pods in a user namespace
//! (mount_setattr(2), `MOUNT_ATTR_IDMAP`; Linux 5.12, below an overlay 5.19).

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{ForkResult, fork, pipe2};

/// Ids in the container, on the host, and how many.
type Range = (u32, u32, u32);

/// The two maps of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdMap {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl IdMap {
    /// From the options `uidmap=` and `gidmap=` of a containerd mount:
    /// `container:host:size`, separated by commas.
    pub(crate) fn parse(uids: &str, gids: &str) -> Option<Self> {
        Some(Self {
            uids: parse_ranges(uids)?,
            gids: parse_ranges(gids)?,
        })
    }

    /// A user namespace with these maps, which lives as long as the descriptor.
    ///
    /// # Errors
    /// The kernel gives no user namespace, or refuses the maps.
    fn user_namespace(&self) -> io::Result<OwnedFd> {
        let (mut ready, tell_ready) = pipe(OFlag::O_CLOEXEC)?;
        let (wait, done) = pipe(OFlag::O_CLOEXEC)?;
        // SAFETY: the child makes nothing but system calls (no allocation, no lock),
        // and ends by _exit, so it meets none of what a fork may leave broken. Its end
        // is the reaper's, as that of any other child.
        let child = match unsafe { fork() }? {
            ForkResult::Child => namespace_holder(&tell_ready, &wait, done.as_raw_fd()),
            ForkResult::Parent { child } => child,
        };
        drop((tell_ready, wait));
        let mut byte = [0];
        if ready.read(&mut byte)? == 0 {
            return Err(io::Error::other("no user namespace"));
        }
        let proc = Path::new("/proc").join(child.to_string());
        fs::write(proc.join("uid_map"), lines(&self.uids))?;
        fs::write(proc.join("gid_map"), lines(&self.gids))?;
        let namespace = File::open(proc.join("ns/user"))?;
        // Now it may go.
        drop(done);
        Ok(namespace.into())
    }
}

fn pipe(flags: OFlag) -> io::Result<(File, File)> {
    let (reader, writer) = pipe2(flags)?;
    Ok((reader.into(), writer.into()))
}

/// The child: enters a new user namespace, says so, and stays until `wait` ends.
fn namespace_holder(ready: &File, wait: &File, done: i32) -> ! {
    // SAFETY: plain system calls on descriptors that are open in this process, with
    // buffers that live through the call; `done` is closed here because it would keep
    // `wait` from its end, and nothing in this process uses it again.
    unsafe {
        libc::close(done);
        if libc::unshare(libc::CLONE_NEWUSER) == 0 {
            let mut byte = [0_u8];
            libc::write(ready.as_raw_fd(), byte.as_ptr().cast(), 1);
            libc::read(wait.as_raw_fd(), byte.as_mut_ptr().cast(), 1);
        }
        libc::_exit(0)
    }
}

/// Mounts on `target` what is at `source`, with the owners mapped.
///
/// # Errors
/// The kernel or the file system cannot map ids.
pub(crate) fn mount_mapped(
    source: &Path,
    target: &Path,
    ids: &IdMap,
    read_only: bool,
) -> io::Result<()> {
    let namespace = ids.user_namespace()?;
    let source = c_path(source)?;
    let target = c_path(target)?;
    let clone = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as u32;
    // SAFETY: open_tree(2) reads a path, which ends with NUL and outlives the call.
    let tree = Errno::result(unsafe {
        libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), clone)
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
    let read_only = if read_only {
        libc::MOUNT_ATTR_RDONLY
    } else {
        0
    };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | read_only,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    // SAFETY: mount_setattr(2) reads an empty path and one mount_attr of the size that
    // is told, both of which outlive the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    // SAFETY: move_mount(2) reads two paths that end with NUL and outlive the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn parse_ranges(text: &str) -> Option<Vec<Range>> {
    text.split(',')
        .map(|range| {
            let mut parts = range.split(':').map(|part| part.parse().ok());
            let range = (parts.next()??, parts.next()??, parts.next()??);
            parts.next().is_none().then_some(range)
        })
        .collect()
}

/// As `/proc/PID/uid_map` takes them.
fn lines(ranges: &[Range]) -> String {
    let line = |(container, host, size): &Range| format!("{container} {host} {size}\n");
    ranges.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_as_containerd_writes_them() {
        let map = IdMap::parse("0:65536:65536", "0:1:2,10:20:30").unwrap();
        assert_eq!(lines(&map.uids), "0 65536 65536\n");
        assert_eq!(lines(&map.gids), "0 1 2\n10 20 30\n");
        for bad in ["", "0", "0:1", "0:1:2:3", "0:1:-2", "a:b:c", "0:1:2,"] {
            assert_eq!(IdMap::parse(bad, "0:1:2"), None, "{bad}");
        }
    }
}
