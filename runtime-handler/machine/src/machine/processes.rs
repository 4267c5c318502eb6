//! The pod's processes, as far as the host tells of them: each end exactly once.

use std::time::{Duration, SystemTime};

use dyad_runtime_handler::handler::{Event, Exit, ProcessId};
use tokio::sync::watch;

use super::{Machine, lock};

impl Machine {
    pub(super) fn end_all(&self, status: u32, which: impl Fn(&ProcessId) -> bool) {
        let ended: Vec<ProcessId> = lock(&self.running)
            .keys()
            .filter(|process| which(process))
            .cloned()
            .collect();
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        for process in ended {
            self.finished(&process, exit);
        }
    }

    /// A process runs; from now on its end is told exactly once.
    pub fn started(&self, process: ProcessId) {
        lock(&self.running).insert(process, watch::Sender::new(()));
    }

    /// A process that was to run does not; nobody is told.
    pub fn withdrawn(&self, process: &ProcessId) {
        lock(&self.running).remove(process);
    }

    /// Waits for the end of a started process, at most `bound`; says whether it ended.
    pub async fn await_end(&self, process: &ProcessId, bound: Duration) -> bool {
        let Some(mut alive) = lock(&self.running)
            .get(process)
            .map(watch::Sender::subscribe)
        else {
            return true;
        };
        // Nothing is ever sent: the only change is the sender's end.
        tokio::time::timeout(bound, async { while alive.changed().await.is_ok() {} })
            .await
            .is_ok()
    }

    /// A process that [`Self::started`] ended.
    pub fn finished(&self, process: &ProcessId, exit: Exit) {
        if lock(&self.running).remove(process).is_some() {
            // The driver ends with the shim.
            let _ = self.events.send(Event::Exited {
                process: process.clone(),
                exit,
            });
        }
    }

    /// Whether the process runs.
    pub fn is_running(&self, process: &ProcessId) -> bool {
        lock(&self.running).contains_key(process)
    }
}
