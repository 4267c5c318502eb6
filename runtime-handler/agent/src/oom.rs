//! What happened in the guest that the host did not ask for: processes that the
//! kernel killed for memory.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dyad_agent_api::proto::agent::{GuestEvent, guest_event};
use tokio::sync::watch;

/// Events kept for a host that comes back; older ones are told by nobody.
const KEPT: usize = 256;

/// Numbered events.
#[derive(Default)]
pub struct Events {
    table: Mutex<Table>,
    last: watch::Sender<u64>,
}

#[derive(Default)]
struct Table {
    kept: VecDeque<(u64, String)>,
    sequence: u64,
}

impl Events {
    /// The kernel killed a process of `container` for memory.
    pub fn out_of_memory(&self, container: &str) {
        let mut table = self.lock();
        table.push(container);
        self.last.send_replace(table.sequence);
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
