//! What happened in the guest that the host did not ask for: processes that the
//! kernel killed for memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dyad_agent_api::proto::agent::{GuestEvent, guest_event};
use dyad_runtime_handler::{Result, error::Context};
use nix::sys::inotify::WatchDescriptor;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::notify::FileWatch;

/// Events kept for a host that comes back; older ones are told by nobody.
const KEPT: usize = 256;

/// Numbered events and the watches that make them.
pub struct Events {
    files: FileWatch,
    table: Mutex<Table>,
    last: watch::Sender<u64>,
}

#[derive(Default)]
struct Table {
    kept: VecDeque<(u64, String)>,
    sequence: u64,
    watched: HashMap<String, Watched>,
}

struct Watched {
    cgroup: Cgroup,
    descriptor: WatchDescriptor,
    kills: u64,
}

impl Events {
    /// Watches from now on, on the current tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no inotify.
    pub fn start() -> Result<Arc<Self>> {
        let events = Arc::new(Self {
            files: FileWatch::new().context(|| "watch for events".into())?,
            table: Mutex::default(),
            last: watch::Sender::new(0),
        });
        tokio::spawn(Arc::clone(&events).run());
        Ok(events)
    }

    /// Tells of kills in the container's cgroup from now on.
    ///
    /// # Errors
    /// The cgroup has no memory controller.
    pub fn watch(&self, container: &str, cgroup: &Cgroup) -> Result<()> {
        let file = cgroup.file("memory.events");
        let descriptor = self
            .files
            .add(&file)
            .context(|| format!("watch {}", file.display()))?;
        self.lock().watched.insert(
            container.into(),
            Watched {
                cgroup: cgroup.clone(),
                descriptor,
                kills: cgroup.oom_kills(),
            },
        );
        Ok(())
    }

    /// Tells now of a kill that the watch has not told of yet, so that it precedes
    /// the exit that it caused.
    pub fn check(&self, container: &str) {
        let mut table = self.lock();
        let Some(watched) = table.watched.get_mut(container) else {
            return;
        };
        let kills = watched.cgroup.oom_kills();
        if kills > watched.kills {
            watched.kills = kills;
            table.push(container);
            self.last.send_replace(table.sequence);
        }
    }

    /// Ends the watch, after a last look.
    pub fn forget(&self, container: &str) {
        self.check(container);
        if let Some(watched) = self.lock().watched.remove(container) {
            self.files.remove(watched.descriptor);
        }
    }

    /// The events after `sequence`, as soon as there is one. Numbers start at 1 with
    /// each boot.
    pub async fn after(&self, sequence: u64) -> Vec<GuestEvent> {
        let mut last = self.last.subscribe();
        // Never an error: the sender lives as long as we do.
        let _ = last.wait_for(|last| *last > sequence).await;
        self.lock()
            .kept
            .iter()
            .filter(|(number, _)| *number > sequence)
            .map(|(number, container)| GuestEvent {
                sequence: *number,
                event: Some(guest_event::Event::Oom(container.clone())),
                ..Default::default()
            })
            .collect()
    }

    async fn run(self: Arc<Self>) {
        loop {
            if let Err(error) = self.files.changed().await {
                log::error!("watch for events: {error}");
                return;
            }
            let watched: Vec<String> = self.lock().watched.keys().cloned().collect();
            for container in watched {
                self.check(&container);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn push(&mut self, container: &str) {
        self.sequence += 1;
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((self.sequence, container.into()));
        log::info!("out of memory in container {container}");
    }
}
