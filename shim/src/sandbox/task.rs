//! What the driver knows of a container and its processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use dyad_runtime_handler::handler::{Exit, Instance, ProcessId};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::lane::Lane;
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
    },
    Running {
        pid: u32,
    },
    Paused {
        pid: u32,
    },
    Exited {
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
            Self::Creating | Self::Created | Self::Starting { .. } => State::Created,
            Self::Running { .. } => State::Running,
            Self::Paused { .. } => State::Paused,
            Self::Exited { exit, .. } => State::Exited(exit.status),
            Self::Failed { reason, .. } => State::Failed(reason.clone()),
        }
    }

    pub(super) fn exit(&self) -> Option<Exit> {
        match self {
            Self::Exited { exit, .. } => Some(*exit),
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

/// A change that waits in a container's lane.
pub(super) struct Job {
    pub(super) process: ProcessId,
    pub(super) change: Change,
}

/// A container.
pub(super) struct Task {
    pub(super) role: Role,
    pub(super) bundle: PathBuf,
    /// Whether CRI made it.
    pub(super) cri: bool,
    /// The backend's side, once created.
    pub(super) instance: Option<Arc<dyn Instance>>,
    pub(super) phase: Phase,
    pub(super) uris: StdioUris,
    /// Open until the process has ended for good.
    pub(super) stdio: Option<OpenStdio>,
    pub(super) execs: BTreeMap<String, Exec>,
    pub(super) waiters: Vec<Reply<Exit>>,
    pub(super) lane: Lane<Job>,
}

impl Task {
    pub(super) fn new(role: Role, bundle: PathBuf, cri: bool, uris: StdioUris) -> Self {
        Self {
            role,
            bundle,
            cri,
            instance: None,
            phase: Phase::Creating,
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
        self.execs.get_mut(exec).ok_or_else(|| {
            Error::NotFound(format!("exec {exec} of container {container}"))
        })
    }

    /// Host pid of the init process, or 0.
    pub(super) fn pid(&self) -> u32 {
        match &self.phase {
            Phase::Running { pid } | Phase::Paused { pid } | Phase::Exited { pid, .. } => *pid,
            Phase::Creating | Phase::Failed { .. } => 0,
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
