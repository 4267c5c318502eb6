//! inotify on the event loop: the kernel says when one of its files has changed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use dyad_linux::fd::register;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches files for changes.
pub struct FileWatch {
    inotify: Inotify,
    /// A duplicate, for the reactor.
    ready: AsyncFd<OwnedFd>,
}

impl FileWatch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// The kernel gives no inotify.
    pub fn new() -> io::Result<Self> {
        let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
        let inotify = Inotify::init(flags)?;
        let duplicate = inotify.as_fd().try_clone_to_owned()?;
        Ok(Self {
            inotify,
            ready: register(duplicate, Interest::READABLE)?,
        })
    }

    /// Watches `file` too.
    ///
    /// # Errors
    /// There is no such file.
    pub fn add(&self, file: &Path) -> nix::Result<WatchDescriptor> {
        self.inotify.add_watch(file, AddWatchFlags::IN_MODIFY)
    }

    /// Ends one watch. Fine where it went with its file.
    pub fn remove(&self, watch: WatchDescriptor) {
        let _ = self.inotify.rm_watch(watch);
    }

    /// Waits until a watched file has changed since the last call.
    ///
    /// # Errors
    /// The event loop ends.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.ready.readable().await?;
            match self.inotify.read_events() {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
