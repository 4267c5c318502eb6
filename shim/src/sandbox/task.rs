//! What the driver knows of a container and its processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use dyad_runtime_handler::handler::{Exit, Instance, ProcessId};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::stats::Stats;
use dyad_runtime_handler::{Error, Result};

use super::lane::{Lane, Ticket};
use super::state::State;
use super::{Change, ProcessView, Reply};
use crate::stdio::{OpenStdio, StdioUris};

/// Exit status of a process that could not be run.
const NEVER_RAN: u32 = 255;

/// Where a container's init process is in its life, finer than [`State`]: the driver
/// also remembers what is under way.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// The backend makes it.
    Creating,
    Created,
    /// The backend runs it. It may end before the backend has said that it runs.
    Starting {
        early: Option<Exit>,
        /// How it ended the last time, where it is started again.
        stopped: Option<Exit>,
    },
    Running {
        pid: u32,
    },
    Paused {
        pid: u32,
    },
    /// The backend ends it. Its exit and the backend's word may come in either order.
    Stopping {
        pid: u32,
        exit: Option<Exit>,
        /// Not so when somebody killed it meanwhile.
        keep: bool,
    },
    /// Ended, and kept.
    Stopped {
        exit: Exit,
    },
    /// The backend moves the pod away; it runs here.
    Migrating {
        pid: u32,
    },
    /// A migration target that waits; the pid is that of who keeps it.
    Incoming {
        pid: u32,
    },
    Exited {
        pid: u32,
        exit: Exit,
    },
    /// It runs on another node.
    Migrated {
        pid: u32,
        exit: Exit,
    },
    Failed {
        reason: String,
        at: SystemTime,
    },
}

impl Phase {
    pub(super) fn state(&self) -> State {
        match self {
            Self::Creating | Self::Created | Self::Starting { stopped: None, .. } => State::Created,
            Self::Starting {
                stopped: Some(_), ..
            }
            | Self::Stopped { .. } => State::Stopped,
            Self::Running { .. } => State::Running,
            Self::Paused { .. } => State::Paused,
            Self::Stopping { .. } => State::Stopping,
            Self::Migrating { .. } => State::Migrating,
            Self::Incoming { .. } => State::Incoming,
            Self::Exited { exit, .. } => State::Exited(exit.status),
            Self::Migrated { .. } => State::Migrated,
            Self::Failed { reason, .. } => State::Failed(reason.clone()),
        }
    }

    /// How it ended for good.
    pub(super) fn exit(&self) -> Option<Exit> {
        match self {
            Self::Exited { exit, .. } | Self::Migrated { exit, .. } => Some(*exit),
            Self::Failed { at, .. } => Some(Exit {
                status: NEVER_RAN,
                at: *at,
            }),
            _ => None,
        }
    }
}

/// A further process of a container.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) phase: ExecPhase,
    pub(super) uris: StdioUris,
    /// Open until the process has ended.
    pub(super) stdio: Option<OpenStdio>,
    pub(super) waiters: Vec<Reply<Exit>>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum ExecPhase {
    /// The backend adds it.
    Adding,
    Added,
    Starting {
        early: Option<Exit>,
    },
    Running {
        pid: u32,
    },
    Exited {
        pid: u32,
        exit: Exit,
    },
}

impl ExecPhase {
    pub(super) fn exit(self) -> Option<Exit> {
        match self {
            Self::Exited { exit, .. } => Some(exit),
            _ => None,
        }
    }

    pub(super) fn pid(self) -> u32 {
        match self {
            Self::Running { pid } | Self::Exited { pid, .. } => pid,
            _ => 0,
        }
    }
}

/// What comes after a stop.
pub(super) enum AfterStop {
    /// Nothing: it stays stopped.
    Stay(Reply<()>),
    /// It runs again.
    Start(Reply<()>),
}

impl AfterStop {
    pub(super) fn into_reply(self) -> Reply<()> {
        match self {
            Self::Stay(reply) | Self::Start(reply) => reply,
        }
    }
}

/// A change that waits in a container's lane.
pub(super) struct Job {
    pub(super) process: ProcessId,
    pub(super) change: Change,
}

/// A container.
pub(super) struct Task {
    pub(super) role: Role,
    pub(super) bundle: PathBuf,
    /// Kubernetes' name of the container; empty for the sandbox and outside CRI.
    pub(super) name: String,
    /// Whether CRI made it.
    pub(super) cri: bool,
    /// Made through the Sandbox API: to containerd's subscribers it is no task.
    pub(super) is_bare: bool,
    /// When it was made.
    pub(super) created_at: SystemTime,
    /// The backend's side, once created.
    pub(super) instance: Option<Arc<dyn Instance>>,
    pub(super) phase: Phase,
    /// Why it is in its state, for people.
    pub(super) reason: String,
    /// Since when it is in its state.
    pub(super) since: SystemTime,
    /// How often it was started in place.
    pub(super) starts: u32,
    /// What waits for the end of a stop: its exit has not been told yet.
    pub(super) stopping: Option<(AfterStop, Ticket)>,
    /// It ended because the pod's machine was stopped, and comes back with it.
    pub(super) stopped_with_pod: bool,
    /// Somebody killed it while its machine was being stopped.
    pub(super) killed_with_pod: bool,
    /// As it was read last.
    pub(super) usage: Option<Stats>,
    pub(super) uris: StdioUris,
    /// Open until the process has ended for good.
    pub(super) stdio: Option<OpenStdio>,
    pub(super) execs: BTreeMap<String, Exec>,
    pub(super) waiters: Vec<Reply<Exit>>,
    pub(super) lane: Lane<Job>,
}

impl Task {
    pub(super) fn new(
        role: Role,
        bundle: PathBuf,
        name: String,
        cri: bool,
        uris: StdioUris,
    ) -> Self {
        Self {
            role,
            bundle,
            name,
            cri,
            is_bare: false,
            created_at: SystemTime::now(),
            instance: None,
            phase: Phase::Creating,
            reason: String::new(),
            since: SystemTime::now(),
            starts: 0,
            stopping: None,
            stopped_with_pod: false,
            killed_with_pod: false,
            usage: None,
            uris,
            stdio: None,
            execs: BTreeMap::new(),
            waiters: Vec::new(),
            lane: Lane::default(),
        }
    }

    /// The backend's side.
    ///
    /// # Errors
    /// `NotFound` while it is being created: nobody was told of it yet.
    pub(super) fn instance(&self, id: &str) -> Result<Arc<dyn Instance>> {
        self.instance
            .clone()
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    pub(super) fn exec(&mut self, container: &str, exec: &str) -> Result<&mut Exec> {
        self.execs
            .get_mut(exec)
            .ok_or_else(|| Error::NotFound(format!("exec {exec} of container {container}")))
    }

    /// Host pid of the init process, or 0.
    pub(super) fn pid(&self) -> u32 {
        match &self.phase {
            Phase::Running { pid }
            | Phase::Paused { pid }
            | Phase::Stopping { pid, .. }
            | Phase::Migrating { pid }
            | Phase::Incoming { pid }
            | Phase::Migrated { pid, .. }
            | Phase::Exited { pid, .. } => *pid,
            Phase::Creating | Phase::Stopped { .. } | Phase::Failed { .. } => 0,
            Phase::Created | Phase::Starting { .. } => self
                .instance
                .as_ref()
                .and_then(|instance| instance.pid())
                .unwrap_or(0),
        }
    }

    /// The exec as Task `State` shows it.
    pub(super) fn exec_view(&self, exec: &Exec) -> ProcessView {
        use super::state::TaskStatus;
        ProcessView {
            bundle: self.bundle.clone(),
            pid: exec.phase.pid(),
            status: match exec.phase {
                ExecPhase::Adding | ExecPhase::Added | ExecPhase::Starting { .. } => {
                    TaskStatus::Created
                }
                ExecPhase::Running { .. } => TaskStatus::Running,
                ExecPhase::Exited { .. } => TaskStatus::Stopped,
            },
            exit: exec.phase.exit(),
            stdio: exec.uris.clone(),
        }
    }
}

/// Answers everybody who waits, where there is an answer.
pub(super) fn answer_waiters(waiters: &mut Vec<Reply<Exit>>, exit: Exit) {
    for waiter in waiters.drain(..) {
        let _ = waiter.send(Ok(exit));
    }
}
