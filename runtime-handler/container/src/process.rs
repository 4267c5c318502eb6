//! One process of a container, from the moment it is our child to its end.
//!
//! ```text
//!              exit           output read, gate
//!  supervised -----> ended ---------------------> Event::Exited
//!                      |   held: the start is not answered yet
//!                      |   dropped: the start failed, so there is no exit to tell
//!                      +--> Process::ended() wakes up
//! ```

use std::sync::Arc;
use std::time::Duration;

use dyad_linux::cgroup::{Cgroup, OomWatch};
use dyad_linux::outlet::Outlet;
use dyad_linux::pump::Pump;
use dyad_linux::reaper::{Reaper, Waiter};
use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::handler::{Event, EventSender, Exit, ProcessId};
use nix::errno::Errno;
use tokio::sync::watch;

use crate::runtime::Made;

/// How long output may still come after a process's end; containerd's own shim gives
/// as much.
const DRAIN: Duration = Duration::from_secs(2);

/// Whether the end of a process may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Not before the start has been answered.
    Held,
    Open,
    /// Never.
    Dropped,
}

/// What belongs to the end of a container's init.
#[derive(Debug, Default)]
pub(crate) struct AtEnd {
    /// To be watched, and looked at once more at the end.
    pub oom: Option<OomWatch>,
    /// Init has no pid namespace of its own, which would take the others along: all
    /// that is left in here has to be killed.
    pub kill: Option<Cgroup>,
}

#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    pub pid: u32,
    pub pump: Pump,
    reaper: Arc<Reaper>,
    ended: watch::Receiver<Option<Exit>>,
    gate: watch::Sender<Gate>,
}

impl Process {
    pub(crate) fn new(
        id: ProcessId,
        made: Made,
        mut pump: Pump,
        gate: Gate,
        at_end: AtEnd,
        reaper: &Arc<Reaper>,
        events: &EventSender,
    ) -> Self {
        let (ended_sender, ended) = watch::channel(None);
        let (gate, gate_receiver) = watch::channel(gate);
        tokio::spawn(supervise(
            id.clone(),
            made.exit,
            at_end,
            pump.take_outlet(),
            ended_sender,
            gate_receiver,
            events.clone(),
        ));
        Self {
            id,
            pid: made.pid,
            pump,
            reaper: Arc::clone(reaper),
            ended,
            gate,
        }
    }

    pub(crate) fn id(&self) -> &ProcessId {
        &self.id
    }

    /// How it ended, where it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.ended.borrow()
    }

    /// Returns when it has ended.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The supervisor lives until it has told.
        let _ = ended.wait_for(Option::is_some).await;
    }

    /// The same, at most `bound`; whether it has.
    pub(crate) async fn ended_within(&self, bound: Duration) -> bool {
        tokio::time::timeout(bound, self.ended()).await.is_ok()
    }

    pub(crate) fn set_gate(&self, gate: Gate) {
        self.gate.send_replace(gate);
    }

    /// Signals this process alone.
    ///
    /// # Errors
    /// `NotFound` when it has ended; `InvalidArgument` for what is no signal.
    pub(crate) fn signal(&self, signal: i32) -> Result<()> {
        match self.reaper.kill(self.pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(self.not_found()),
            Err(Errno::EINVAL) => Err(Error::InvalidArgument(format!("no such signal: {signal}"))),
            Err(errno) => Err(Error::other(
                format!("send signal {signal} to {}", self.id),
                errno,
            )),
        }
    }

    pub(crate) fn not_found(&self) -> Error {
        Error::NotFound(format!("running process: {}", self.id))
    }

    /// Waits for the rest of its output, not for ever.
    pub(crate) async fn drain(&self) {
        if !self.pump.drained(DRAIN).await {
            log::debug!("{}: something still holds its output", self.id);
        }
    }
}

async fn supervise(
    id: ProcessId,
    waiter: Waiter,
    mut at_end: AtEnd,
    outlet: Outlet,
    ended: watch::Sender<Option<Exit>>,
    mut gate: watch::Receiver<Gate>,
    events: EventSender,
) {
    let out_of_memory = || {
        // A driver that is gone wants no events; so below.
        let _ = events.send(Event::OutOfMemory {
            container: id.container.clone(),
        });
    };
    let mut exit = std::pin::pin!(waiter.wait());
    let exit = loop {
        tokio::select! {
            biased;
            exit = &mut exit => break exit,
            () = OomWatch::next_of(&mut at_end.oom) => out_of_memory(),
        }
    };
    if let Some(cgroup) = at_end.kill {
        match cgroup.signal_all(libc::SIGKILL).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => log::error!("{id}: kill what it left: {}", error.chain()),
        }
    }
    if at_end.oom.as_mut().is_some_and(OomWatch::missed) {
        out_of_memory();
    }
    ended.send_replace(Some(exit));
    if !outlet.taken().await {
        log::debug!("{id}: told of its end before its output was read");
    }
    let may_tell = gate.wait_for(|gate| *gate != Gate::Held).await;
    // Its `Process` is gone: deleted, so nobody asks.
    if may_tell.is_ok_and(|gate| *gate == Gate::Open) {
        let _ = events.send(Event::Exited { process: id, exit });
    }
}
