//! The guest's end of a virtio-serial port.
//!
//! ```text
//! port fd --edge-triggered--> inner epoll --readable--> tokio --> watcher task
//!                                                                   | state, wakers
//!                                              PortReader, PortWriter, host_connected
//! ```
//! While no host is connected the port polls as POLLHUP (and reads as end of file),
//! and does so until one comes. tokio takes a hang-up as final and would return at
//! once for ever. The inner epoll instance, edge triggered, tells each change once
//! instead, and never hangs up itself.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use dyad_linux::fd::register;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Where the kernel lists the ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// An open virtio-serial port. Must be used in a tokio runtime.
#[derive(Debug)]
pub struct Port {
    shared: Arc<Shared>,
    watcher: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    file: File,
    state: Mutex<State>,
    host: watch::Sender<Host>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    Here,
    Away,
    /// The watcher failed.
    Unwatched(Errno),
}

#[derive(Debug, Default)]
struct State {
    readable: bool,
    writable: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the port polls as now.
    fn edge(&self, flags: EpollFlags) {
        let mut state = self.lock();
        state.readable |= flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP);
        state.writable |= flags.contains(EpollFlags::EPOLLOUT);
        let reader = if state.readable {
            state.reader.take()
        } else {
            None
        };
        let writer = if state.writable {
            state.writer.take()
        } else {
            None
        };
        let host = if flags.contains(EpollFlags::EPOLLHUP) {
            Host::Away
        } else {
            Host::Here
        };
        self.host
            .send_if_modified(|was| std::mem::replace(was, host) != host);
        drop(state);
        reader.into_iter().chain(writer).for_each(Waker::wake);
    }
}

impl Port {
    /// Opens the port called `name`.
    ///
    /// # Errors
    /// `NotFound`: the kernel does not list it yet. Else it is already open, or cannot
    /// be opened.
    pub fn open(name: &str) -> io::Result<Self> {
        let device = find(Path::new(PORTS), name)?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such virtio-serial port"))?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK);
        Self::new(options.open(device)?)
    }

    fn new(file: File) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&file, EpollEvent::new(wanted, 0))?;
        let shared = Arc::new(Shared {
            file,
            state: Mutex::default(),
            // No event at once means that it does not hang up.
            host: watch::Sender::new(Host::Here),
        });
        if let Some(flags) = take_edge(&epoll)? {
            shared.edge(flags);
        }
        let epoll = register(epoll.0, Interest::READABLE)?;
        let watched = Arc::clone(&shared);
        let watcher = tokio::spawn(async move {
            if let Err(error) = watch(&epoll, &watched).await {
                log::error!("watch virtio-serial port: {error}");
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                watched.host.send_replace(Host::Unwatched(errno));
            }
        });
        Ok(Self {
            shared,
            watcher: watcher.abort_handle(),
        })
    }

    /// Waits until a host is connected. Cancel safe.
    ///
    /// # Errors
    /// The port can no longer be watched.
    pub async fn host_connected(&self) -> io::Result<()> {
        let mut host = self.shared.host.subscribe();
        match *host
            .wait_for(|host| *host != Host::Away)
            .await
            .map_err(io::Error::other)?
        {
            Host::Unwatched(errno) => Err(errno.into()),
            Host::Here | Host::Away => Ok(()),
        }
    }

    /// Both directions. The reader ends when the host leaves; after
    /// [`Port::host_connected`] the port can be split anew.
    pub fn split(&self) -> (PortReader, PortWriter) {
        (
            PortReader(Arc::clone(&self.shared)),
            PortWriter(Arc::clone(&self.shared)),
        )
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

async fn watch(epoll: &AsyncFd<OwnedFd>, shared: &Shared) -> io::Result<()> {
    // AsyncFd needs the descriptor, Epoll the methods: both are the same instance.
    let instance = Epoll(epoll.get_ref().try_clone()?);
    loop {
        let mut ready = epoll.readable().await?;
        match take_edge(&instance)? {
            Some(flags) => shared.edge(flags),
            None => ready.clear_ready(),
        }
    }
}

fn take_edge(epoll: &Epoll) -> io::Result<Option<EpollFlags>> {
    let mut events = [EpollEvent::empty()];
    loop {
        match epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(events[0].events())),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The device file of the port called `name`.
fn find(ports: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(ports) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // A port that is just made, or without a name, has no such file.
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim_end() == name)
        {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Reads what the host writes.
#[derive(Debug)]
pub struct PortReader(Arc<Shared>);

impl AsyncRead for PortReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Held over the read, so that an edge comes wholly before or after it.
        let mut state = self.0.lock();
        while state.readable {
            match nix::unistd::read(self.0.file.as_fd(), buf.initialize_unfilled()) {
                // No host. The edge of its leaving may not have been seen yet.
                Ok(0) => {
                    state.readable = false;
                    self.0.host.send_replace(Host::Away);
                    return Poll::Ready(Ok(()));
                }
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EAGAIN) => state.readable = false,
                Err(Errno::EINTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Writes to the host.
#[derive(Debug)]
pub struct PortWriter(Arc<Shared>);

impl AsyncWrite for PortWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.lock();
        while state.writable {
            match nix::unistd::write(self.0.file.as_fd(), buf) {
                Ok(count) => return Poll::Ready(Ok(count)),
                // Full, or no host.
                Err(Errno::EAGAIN) => state.writable = false,
                Err(Errno::EINTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
