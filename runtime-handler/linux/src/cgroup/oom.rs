//! Tells when the kernel kills a process of a cgroup for memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Cgroup, Dirs};
use crate::fd::register;
use dyad_runtime_handler::error::{Context, Result};

/// Watches one cgroup. v2: `poll(2)` on `memory.events`, which costs no inotify
/// instance (a host has 128 of them); v1: an eventfd on `memory.oom_control`.
#[derive(Debug)]
pub struct OomWatch {
    cgroup: Cgroup,
    source: Source,
    /// Kills (v1: notifications) told so far.
    told: u64,
}

#[derive(Debug)]
enum Source {
    /// The open `memory.events`.
    V2(AsyncFd<OwnedFd>),
    V1(AsyncFd<OwnedFd>),
}

impl OomWatch {
    /// Begins to watch `cgroup`; kills from before are not told.
    ///
    /// # Errors
    /// The cgroup has no memory controller, or is gone.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(cgroup: &Cgroup) -> Result<Self> {
        let source = match &cgroup.dirs {
            Dirs::V2(dir) => {
                let file = dir.join("memory.events");
                let events = File::open(&file).context(|| format!("open {}", file.display()))?;
                // kernfs tells of a change since the last read as an exceptional
                // condition; the first read sets that point.
                let watch = register(events.into(), Interest::PRIORITY)
                    .context(|| format!("watch {}", file.display()))?;
                Source::V2(watch)
            }
            Dirs::V1(_) => {
                let file = cgroup.v1_file("memory", "memory.oom_control")?;
                let control = cgroup.v1_file("memory", "cgroup.event_control")?;
                let what = || format!("watch {}", file.display());
                let oom = File::open(&file).context(what)?;
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                    .context(what)?;
                let order = format!("{} {}", event.as_fd().as_raw_fd(), oom.as_raw_fd());
                fs::write(&control, order).context(what)?;
                Source::V1(register(event.into(), Interest::READABLE).context(what)?)
            }
        };
        let told = cgroup.oom_kills()?;
        Ok(Self {
            cgroup: cgroup.clone(),
            source,
            told,
        })
    }

    /// Returns at the next kill; `None` when the cgroup is gone.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            match &self.source {
                Source::V2(events) => {
                    // Clear first: a change after the read below shows again.
                    events.ready(Interest::PRIORITY).await.ok()?.clear_ready();
                    rearm(events.get_ref()).ok()?;
                    if self.missed() {
                        return Some(());
                    }
                }
                Source::V1(event) => {
                    let mut count = [0; 8];
                    let read = event.async_io(Interest::READABLE, |fd| {
                        Ok(nix::unistd::read(fd, &mut count)?)
                    });
                    read.await.ok()?;
                    // Removal of the cgroup wakes us too.
                    if !self.cgroup.exists() {
                        return None;
                    }
                    // It comes before the kernel counts the kill, which `missed` must
                    // not tell once more.
                    self.told += 1;
                    return Some(());
                }
            }
        }
    }

    /// As [`Self::next`], of a watch that may be missing; one that has ended is dropped,
    /// and nothing comes from none.
    pub async fn next_of(watch: &mut Option<Self>) {
        if let Some(oom) = watch {
            if oom.next().await.is_some() {
                return;
            }
            *watch = None;
        }
        std::future::pending().await
    }

    /// Whether there were kills that [`Self::next`] has not told; they count as told
    /// from now on. To be asked when a process ended, before its end is reported.
    pub fn missed(&mut self) -> bool {
        let kills = self.cgroup.oom_kills().unwrap_or(0);
        let missed = kills > self.told;
        self.told = self.told.max(kills);
        missed
    }
}

/// Reads the file, from when on the next change is a new one.
fn rearm(fd: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 512];
    nix::sys::uio::pread(fd, &mut buffer, 0)?;
    Ok(())
}
