//! Moves bytes between a process's stdio and the link.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use dyad_agent_api::link::fd::register;
use dyad_agent_api::link::guest::{InputSource, OutputSink};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::sync::watch;

/// What one read takes at most; the link's frames carry as much.
const CHUNK: usize = 32 << 10;

/// Copies everything that the process writes to the host; waits while the host does
/// not take it, so that a full pipe slows the process down. Ends with the last writer.
pub async fn output(mut from: impl AsyncRead + Unpin, sink: Arc<OutputSink>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                if sink.write(&buffer[..length]).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                log::warn!("read a process's output: {error}");
                break;
            }
        }
    }
    sink.close();
}

/// Copies the host's bytes to the process, until the host closes the stream or
/// `close` says so; what has arrived by then still goes through. Bytes for a process
/// that reads no more are dropped, so that the host need not care.
pub async fn input(
    mut source: InputSource,
    mut to: impl AsyncWrite + Unpin,
    mut close: watch::Receiver<bool>,
) {
    let mut reads = true;
    loop {
        let bytes = tokio::select! {
            biased;
            bytes = source.read() => bytes,
            _ = close.wait_for(|close| *close) => None,
        };
        let Some(bytes) = bytes else { return };
        if reads && let Err(error) = to.write_all(&bytes).await {
            log::debug!("a process reads no more: {error}");
            reads = false;
        }
    }
}

/// The master of a pseudo-terminal.
#[derive(Debug, Clone)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// Takes over a master.
    ///
    /// # Errors
    /// It cannot be polled.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(Arc::new(register(
            master,
            Interest::READABLE | Interest::WRITABLE,
        )?)))
    }

    /// Sets the size in characters.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn resize(&self, width: u16, height: u16) -> nix::Result<()> {
        set_size(self.0.get_ref().as_fd(), width, height)
    }
}

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);

/// Sets a terminal's size in characters, from either end.
///
/// # Errors
/// It is no terminal.
pub fn set_size(terminal: std::os::fd::BorrowedFd<'_>, width: u16, height: u16) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` is what the call reads, and the descriptor is open.
    unsafe { set_window_size(terminal.as_raw_fd(), &size) }.map(drop)
}

/// Whether nobody has given the terminal a size yet.
pub fn has_no_size(terminal: std::os::fd::BorrowedFd<'_>) -> bool {
    use std::os::fd::AsRawFd;
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` is what the call writes, and the descriptor is open.
    let known = unsafe { get_window_size(terminal.as_raw_fd(), &mut size) };
    known.is_ok() && (size.ws_row, size.ws_col) == (0, 0)
}

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| {
                Ok(nix::unistd::read(
                    fd.get_ref(),
                    buffer.initialize_unfilled(),
                )?)
            });
            match read {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                // The last process closed its side.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
