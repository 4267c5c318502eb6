//! The master side of a terminal, which stays readable while its process closes it and
//! opens it again.
//!
//! ```text
//!  open --last slave closed--> hung up: reads and writes fail with EIO
//!   ^                             |
//!   +------opened again-----------+--process_ended()--> EIO is the end
//! ```
//! Programs do that: systemd and getty open `/dev/console`, daemons their tty, after they
//! closed what they were started with. tokio takes a hang-up for the end, and from then on
//! reports such a descriptor as ready for ever. So each direction waits for an epoll
//! instance of its own, which reports edges, and of which the reactor sees no hang-up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::fd::register;

/// Between two attempts to write to a terminal that nobody has open, at first and at most:
/// the kernel does not tell its master that somebody opened it.
const OPENED_AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(320));

#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    readable: Edges,
    writable: Edges,
    process_ended: watch::Sender<bool>,
}

impl Terminal {
    /// Takes the master, which is non-blocking.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            readable: Edges::of(master.as_fd(), EpollFlags::EPOLLIN)?,
            writable: Edges::of(master.as_fd(), EpollFlags::EPOLLOUT)?,
            master,
            process_ended: watch::Sender::new(false),
        })
    }

    /// Nobody is left who could open it again.
    pub fn process_ended(&self) {
        self.process_ended.send_replace(true);
    }

    /// Does `act` as soon as it would not block, waiting while the terminal is hung up.
    /// One task at a time for each direction.
    pub async fn when<T>(
        &self,
        interest: Interest,
        mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut process_ended = self.process_ended.subscribe();
        let (mut pause, longest) = OPENED_AGAIN;
        loop {
            // Looked at first: what was written before the end is read before it counts.
            let is_last_turn = *process_ended.borrow_and_update();
            let edges = match act(self.master.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if interest.is_readable() {
                        &self.readable
                    } else {
                        &self.writable
                    }
                }
                Err(error) if is_hang_up(&error) && !is_last_turn => {
                    if !interest.is_readable() {
                        tokio::select! {
                            () = tokio::time::sleep(pause) => {}
                            _ = process_ended.changed() => {}
                        }
                        pause = (pause * 2).min(longest);
                        continue;
                    }
                    &self.readable
                }
                other => {
                    tokio::task::consume_budget().await;
                    return other;
                }
            };
            tokio::select! {
                edge = edges.next() => edge?,
                // The sender is ours.
                _ = process_ended.changed() => {}
            }
        }
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

/// Whether the error is a terminal's that nobody has open.
pub(super) fn is_hang_up(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EIO as i32)
}

/// What becomes ready, told once for each change.
#[derive(Debug)]
struct Edges {
    instance: Epoll,
    /// The same instance, for the reactor.
    ready: AsyncFd<OwnedFd>,
}

impl Edges {
    fn of(fd: BorrowedFd<'_>, wanted: EpollFlags) -> io::Result<Self> {
        let instance = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        instance.add(fd, EpollEvent::new(wanted | EpollFlags::EPOLLET, 0))?;
        let duplicate = instance.0.try_clone()?;
        Ok(Self {
            instance,
            ready: register(duplicate, Interest::READABLE)?,
        })
    }

    /// Returns when something has changed since the last call.
    async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.ready.readable().await?;
            let mut events = [EpollEvent::empty()];
            match self.instance.wait(&mut events, EpollTimeout::ZERO) {
                Ok(0) => ready.clear_ready(),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
