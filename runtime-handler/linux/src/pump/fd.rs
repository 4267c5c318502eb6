//! A descriptor that is read and written without blocking, and what can be asked of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::terminal::{Terminal, is_hang_up};
use crate::fd::try_register;

/// A file descriptor to be read or written without blocking the thread: a pipe, FIFO,
/// terminal or socket; or a file, which never blocks and cannot be polled.
#[derive(Debug)]
pub struct Fd(Kind);

#[derive(Debug)]
enum Kind {
    Polled(AsyncFd<OwnedFd>),
    /// epoll refuses it: a regular file or a device like `/dev/null`.
    Plain(OwnedFd),
    Terminal(Terminal),
}

impl Fd {
    /// Takes `fd` and sets it to non-blocking.
    ///
    /// # Errors
    /// `fcntl` or `epoll_ctl` refused.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_non_blocking(&fd)?;
        // Not every fd can be written or read, but epoll takes interest in both.
        match try_register(fd, Interest::READABLE | Interest::WRITABLE) {
            Ok(polled) => Ok(Self(Kind::Polled(polled))),
            Err(error) => match error.into_parts() {
                (fd, cause) if cause.raw_os_error() == Some(libc::EPERM) => {
                    Ok(Self(Kind::Plain(fd)))
                }
                (_, cause) => Err(cause),
            },
        }
    }

    /// Takes the master of a terminal and sets it to non-blocking. That nobody has the
    /// terminal open is not its end before [`Self::process_ended`]: reads and writes wait
    /// until somebody opens it again.
    ///
    /// # Errors
    /// `fcntl` or `epoll_create1` refused.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        set_non_blocking(&master)?;
        Ok(Self(Kind::Terminal(Terminal::new(master)?)))
    }

    /// Says that the process on the other side has ended, so that a terminal ends with
    /// its last user. For others the kernel says so.
    pub fn process_ended(&self) {
        if let Kind::Terminal(terminal) = &self.0 {
            terminal.process_ended();
        }
    }

    /// Reads what there is, waiting for the first byte; 0 is the end (a terminal's
    /// `EIO`, which tells that nobody has it open any more, is that too).
    ///
    /// # Errors
    /// What `read(2)` says.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.when(Interest::READABLE, |fd| read_some(fd, buffer));
        read.await.or_else(end_of_terminal)
    }

    /// Reads what is there now; `None`: nothing.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match read_some(self.as_fd(), buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            other => other.or_else(end_of_terminal).map(Some),
        }
    }

    /// Writes all of `bytes`, waiting for room.
    ///
    /// # Errors
    /// What `write(2)` says (`EPIPE`: the reader is gone); a part may be written.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .when(Interest::WRITABLE, |fd| write_some(fd, bytes))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Returns when the other end of this pipe is closed; never for other fds.
    pub(super) async fn reader_is_gone(&self) {
        match &self.0 {
            Kind::Polled(polled) => {
                if polled.ready(Interest::ERROR).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Kind::Plain(_) | Kind::Terminal(_) => std::future::pending().await,
        }
    }

    pub(super) async fn when<T>(
        &self,
        interest: Interest,
        mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.0 {
            Kind::Polled(polled) => polled.async_io(interest, |fd| act(fd.as_fd())).await,
            Kind::Plain(fd) => {
                // A file never makes us wait, so make room for others here.
                tokio::task::consume_budget().await;
                act(fd.as_fd())
            }
            Kind::Terminal(terminal) => terminal.when(interest, act).await,
        }
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Polled(polled) => polled.get_ref().as_fd(),
            Kind::Plain(fd) => fd.as_fd(),
            Kind::Terminal(terminal) => terminal.as_fd(),
        }
    }
}

fn set_non_blocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

fn end_of_terminal(error: io::Error) -> io::Result<usize> {
    if is_hang_up(&error) {
        Ok(0)
    } else {
        Err(error)
    }
}

/// What the pipe at `path` (in `/proc/PID/fd`) holds, which stays in it.
///
/// # Errors
/// It is no pipe, or what tee(2) says.
pub fn peek(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let pipe = open(path, flags, Mode::empty())?;
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let room = fcntl(&pipe, FcntlArg::F_GETPIPE_SZ)?;
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(room))?;
    let room = usize::try_from(room).unwrap_or(0);
    match tee(&pipe, &writer, room, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(errno) => return Err(errno.into()),
    }
    drop(writer);
    let mut bytes = Vec::new();
    let mut buffer = vec![0; room];
    loop {
        match read_some(reader.as_fd(), &mut buffer)? {
            0 => return Ok(bytes),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
    }
}

pub(super) fn read_some(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        return match read(fd, buffer) {
            Err(Errno::EINTR) => continue,
            other => Ok(other?),
        };
    }
}

/// Writes as much of `bytes` as fits now; an error only where not one byte did.
pub(super) fn write_some(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        return match write(fd, bytes) {
            Err(Errno::EINTR) => continue,
            other => Ok(other?),
        };
    }
}
