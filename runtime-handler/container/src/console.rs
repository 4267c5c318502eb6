//! The terminal of a process: the OCI runtime makes it and sends its master side over
//! a socket (runc's `docs/terminals.md`, detached mode).

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// A socket that waits for one terminal; its file goes with it.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    file: PathBuf,
    path: PathBuf,
    /// Keeps `path` alive.
    _dir: File,
}

impl ConsoleSocket {
    /// Listens in `dir`, under the file name `name`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn listen(dir: &Path, name: &str) -> io::Result<Self> {
        // A bundle's path is longer than a socket address may be (108 bytes). Through
        // the open directory it is short, for the OCI runtime's process too.
        let open = File::open(dir)?;
        let path = PathBuf::from(format!(
            "/proc/{}/fd/{}/{name}",
            std::process::id(),
            open.as_raw_fd()
        ));
        let file = dir.join(name);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            file,
            path,
            _dir: open,
        })
    }

    /// What the OCI runtime connects to.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master side. The runtime has sent it when it ends well, so this does
    /// not wait.
    ///
    /// # Errors
    /// It was not sent.
    pub(crate) fn receive(&self) -> io::Result<OwnedFd> {
        let (connection, _) = self.listener.accept()?;
        // The runtime puts the terminal's name beside it.
        let mut name = [0; 4096];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(
            connection.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control
                && let Some(fd) = fds.first()
            {
                // SAFETY: the kernel has just made this descriptor for us (there is
                // room for one only), so nobody else owns it.
                return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the OCI runtime sent no terminal",
        ))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Nothing to do about it here; the bundle goes as a whole.
        let _ = fs::remove_file(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    use nix::pty::openpty;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use nix::unistd::ttyname;

    use super::*;

    #[test]
    fn the_terminal_arrives_even_in_a_directory_with_a_long_name() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("x".repeat(120));
        fs::create_dir(&dir).unwrap();
        let socket = ConsoleSocket::listen(&dir, "console-1").unwrap();
        let pty = openpty(None, None).unwrap();
        let client = UnixStream::connect(socket.path()).unwrap();
        sendmsg::<()>(
            client.as_raw_fd(),
            &[IoSlice::new(b"/dev/ptmx")],
            &[ControlMessage::ScmRights(&[pty.master.as_raw_fd()])],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let master = socket.receive().unwrap();
        nix::unistd::write(&master, b"x\n").unwrap();
        let mut line = [0; 2];
        nix::unistd::read(&pty.slave, &mut line).unwrap();
        assert_eq!(&line, b"x\n", "{:?}", ttyname(&pty.slave));
        drop(socket);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "no file is left");
    }

    #[test]
    fn a_runtime_that_sends_nothing_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::listen(dir.path(), "c").unwrap();
        assert!(socket.receive().is_err());
        let socket = ConsoleSocket::listen(dir.path(), "c").unwrap();
        drop(UnixStream::connect(socket.path()).unwrap());
        assert!(socket.receive().is_err());
    }
}
