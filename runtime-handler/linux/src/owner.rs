//! Says that a live process owns something on disk: a lock on a file, which the kernel lets go
//! when the process dies, however it dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The ownership; let go when dropped.
#[derive(Debug)]
pub struct Owner {
    _lock: Flock<File>,
}

impl Owner {
    /// Takes the ownership that the file at `path` stands for, making the file for root alone.
    /// `None`: another process has it, or this one already.
    ///
    /// # Errors
    /// The file can be neither made nor opened.
    pub fn take(path: &Path) -> io::Result<Option<Self>> {
        match lock(path, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { _lock: lock })),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Owner::take`], once whoever has it lets go. Blocks the thread.
    ///
    /// # Errors
    /// As for [`Owner::take`].
    pub fn wait_for(path: &Path) -> io::Result<Self> {
        let lock = lock(path, FlockArg::LockExclusive)?;
        Ok(Self { _lock: lock })
    }

    /// Whether a live process has it. Without the file nobody does.
    ///
    /// # Errors
    /// The file is there and cannot be opened.
    pub fn is_alive(path: &Path) -> io::Result<bool> {
        match path.try_exists()? {
            true => Ok(Self::take(path)?.is_none()),
            false => Ok(false),
        }
    }
}

fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EINTR)) => file = same,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_owns_it_until_it_lets_go() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner.lock");
        assert!(!Owner::is_alive(&path).unwrap(), "there is no file");
        let owner = Owner::take(&path).unwrap().expect("it is free");
        assert!(Owner::take(&path).unwrap().is_none());
        assert!(Owner::is_alive(&path).unwrap());
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Owner::wait_for(&path).unwrap()
        });
        drop(owner);
        drop(waiting.join().unwrap());
        assert!(!Owner::is_alive(&path).unwrap());
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "no other user may hold it up");
    }

    #[test]
    fn a_killed_process_owns_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner.lock");
        let script = format!("exec 9>{}; flock -n 9; echo held; read _", path.display());
        let mut child = std::process::Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line).unwrap();
        assert_eq!(line, "held\n");
        assert!(Owner::is_alive(&path).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!Owner::is_alive(&path).unwrap());
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("owner.lock"), dir.path().join("other"));
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(Owner::take(&path).is_err());
        assert!(!other.exists());
    }
}
