//! What the model knows of a container and its processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::change::{AfterStop, Change, Job, Token};
use super::lane::Lane;
use super::state::{State, TaskStatus};
use crate::pod::{ProcessView, TaskView, Transition};
use crate::stdio::StdioUris;

/// Exit status of a process that could not be run.
pub(super) const NEVER_RAN: u32 = 255;

/// Where a container's init process is in its life, finer than [`State`]: the model also
/// remembers which call of the backend is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The backend makes it.
    Creating,
    Created,
    /// The backend runs it. The process may end before the backend has said that it runs.
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
    /// The backend ends it. Its exit and the end of the backend's call come in either order.
    Stopping {
        pid: u32,
        exit: Option<Exit>,
        /// False when somebody killed it meanwhile.
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
    /// A migration target that waits; the pid is that of the server which keeps it.
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
    pub(crate) fn state(&self) -> State {
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
    pub(crate) fn exit(&self) -> Option<Exit> {
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
pub(crate) struct Exec {
    pub(super) phase: ExecPhase,
    pub(super) uris: StdioUris,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExecPhase {
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

/// What the backend made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Made {
    /// Host pid of the init process; 0 where there is none yet.
    pub(crate) pid: u32,
    /// It restarts without an end of its own.
    pub(crate) reboots: bool,
}

/// A change that waits in a container's lane.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) change: Change,
    pub(super) token: Token,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) role: Role,
    pub(crate) bundle: PathBuf,
    /// Kubernetes' name of the container; empty for the sandbox and outside CRI.
    pub(crate) name: String,
    /// Whether CRI made it.
    pub(crate) cri: bool,
    /// Made through the Sandbox API: to containerd's subscribers it is no task.
    pub(crate) is_bare: bool,
    pub(crate) created_at: SystemTime,
    /// The backend's side, once created.
    pub(super) made: Option<Made>,
    /// Only [`Task::enter`] writes it.
    phase: Phase,
    /// Why it is in its state, for people.
    reason: String,
    /// Since when it is in its state.
    since: SystemTime,
    /// How often it was started in place.
    pub(super) starts: u32,
    /// The stop whose process has not been seen to end.
    pub(super) stopping: Option<(AfterStop, Job)>,
    /// A pause or a resume of our own is under way: what the backend tells of it meanwhile
    /// was asked for.
    pub(super) is_freezing: bool,
    /// It ended because the pod's machine was stopped, and comes back with it.
    pub(super) stopped_with_pod: bool,
    /// Somebody killed it while its machine was being stopped.
    pub(super) killed_with_pod: bool,
    /// When its last kill for want of memory was published.
    pub(super) oom_at: Option<SystemTime>,
    uris: StdioUris,
    pub(super) execs: BTreeMap<String, Exec>,
    pub(super) lane: Lane<Queued>,
}

/// What a new [`Task`] is, whoever makes it.
#[derive(Debug, Clone)]
pub(super) struct Description {
    pub(super) role: Role,
    pub(super) bundle: PathBuf,
    pub(super) name: String,
    pub(super) cri: bool,
    pub(super) is_bare: bool,
    pub(super) uris: StdioUris,
}

impl Task {
    pub(super) fn new(description: Description, at: SystemTime) -> Self {
        Self {
            role: description.role,
            bundle: description.bundle,
            name: description.name,
            cri: description.cri,
            is_bare: description.is_bare,
            created_at: at,
            made: None,
            phase: Phase::Creating,
            reason: String::new(),
            since: at,
            starts: 0,
            stopping: None,
            is_freezing: false,
            stopped_with_pod: false,
            killed_with_pod: false,
            oom_at: None,
            uris: description.uris,
            execs: BTreeMap::new(),
            lane: Lane::default(),
        }
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Its own state, whatever its pod's machine is in.
    pub(crate) fn state(&self) -> State {
        self.phase.state()
    }

    /// The one place where a task's phase is set. Returns the state before, where it changed.
    pub(super) fn enter(&mut self, phase: Phase, reason: String, at: SystemTime) -> Option<State> {
        let from = self.phase.state();
        if self.phase == Phase::Creating {
            // Nobody was told of it before.
            self.since = at;
        }
        self.phase = phase;
        if from == self.phase.state() {
            return None;
        }
        self.since = at;
        self.reason = reason;
        Some(from)
    }

    /// Says why it is still in its state.
    pub(super) fn explain(&mut self, reason: String) {
        self.reason = reason;
    }

    pub(crate) fn is_made(&self) -> bool {
        self.made.is_some()
    }

    pub(crate) fn exec(&self, container: &str, exec: &str) -> Result<&Exec> {
        self.execs
            .get(exec)
            .ok_or_else(|| exec_not_found(container, exec))
    }

    /// Host pid of the init process, or 0.
    pub(crate) fn pid(&self) -> u32 {
        match &self.phase {
            Phase::Running { pid }
            | Phase::Paused { pid }
            | Phase::Stopping { pid, .. }
            | Phase::Migrating { pid }
            | Phase::Incoming { pid }
            | Phase::Migrated { pid, .. }
            | Phase::Exited { pid, .. } => *pid,
            Phase::Creating | Phase::Stopped { .. } | Phase::Failed { .. } => 0,
            Phase::Created | Phase::Starting { .. } => self.made.map_or(0, |made| made.pid),
        }
    }

    /// How the init process, or this exec, ended for good.
    pub(crate) fn exit_of(&self, process: &ProcessId) -> Result<Option<Exit>> {
        match &process.exec {
            None => Ok(self.phase.exit()),
            Some(exec) => Ok(self.exec(&process.container, exec)?.phase.exit()),
        }
    }

    pub(crate) fn view(&self, id: &str) -> TaskView {
        TaskView {
            id: id.to_owned(),
            name: self.name.clone(),
            is_sandbox: self.role == Role::Sandbox,
            state: self.state(),
            reason: self.reason.clone(),
            since: self.since,
            pid: self.pid(),
            starts: self.starts,
            stopped_with_pod: self.stopped_with_pod,
        }
    }

    /// What was, and what is now.
    pub(crate) fn transition(&self, id: &str, from: State, sequence: u64) -> Transition {
        Transition {
            sequence,
            at: self.since,
            from,
            task: self.view(id),
        }
    }

    /// The init process as Task `State` shows it.
    pub(crate) fn init_view(&self, status: TaskStatus) -> ProcessView {
        ProcessView {
            bundle: self.bundle.clone(),
            pid: self.pid(),
            status,
            exit: self.phase.exit(),
            stdio: self.uris.clone(),
        }
    }

    /// The exec as Task `State` shows it.
    pub(crate) fn exec_view(&self, exec: &Exec) -> ProcessView {
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

pub(super) fn exec_not_found(container: &str, exec: &str) -> Error {
    Error::NotFound(format!("exec {exec} of container {container}"))
}
