//! What goes into [`Model::step`](super::Model::step) and what comes out of it. Data only.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::Result;
use dyad_runtime_handler::handler::{Exit, MachineEvent, ProcessId};
use dyad_runtime_handler::migration::{Arrival, Hurry, MigrationParameters, Sent};
use dyad_runtime_handler::spec::{Checkpoint, ContainerSpec, Resources, RootMount};

use super::lane::{Class, Ticket};
use super::task::Made;
use crate::fence::Tombstone;
use crate::migration::{Outcome, PodState};
use crate::pod::lifecycle::Operation;
use crate::pod::{CreateRequest, ExecRequest, Gone, TaskEvent, Transition};
use crate::pod_spec::PodConfig;
use crate::spec::Identity;

/// Names who asked and is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Token {
    /// A caller of the pod's.
    Caller(u64),
    /// One change of an operation that consists of several.
    Member { group: u64, index: usize },
    /// Nobody.
    Nobody,
}

/// What a caller is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Pid(u32),
    Gone(Gone),
    /// The number of a migration.
    Number(u64),
}

/// A change that has begun: whom to answer, and what it holds of its container's lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) container: String,
    pub(crate) ticket: Ticket,
    pub(crate) token: Token,
}

/// A change of a container: ordered by its lane.
#[derive(Debug)]
pub(crate) enum Change {
    Init(InitChange),
    Exec(String, ExecChange),
}

/// A change of a container and its init process.
#[derive(Debug)]
pub(crate) enum InitChange {
    Run,
    Signal {
        signal: i32,
        all: bool,
    },
    Delete,
    Pause,
    Resume,
    Stop {
        grace: Duration,
    },
    Start,
    Restart {
        force: bool,
        grace: Duration,
    },
    Update(Box<Resources>),
    Checkpoint(Box<Checkpoint>),
    /// Of the sandbox: the pod moves away.
    Migrate(Arc<MigrationParameters>),
    /// Of the sandbox: its machine must run for a signal to one of its containers to take
    /// effect.
    ThawFor(Signal),
    Resize {
        width: u16,
        height: u16,
    },
    CloseStdin,
}

/// A change of a further process of a container.
#[derive(Debug)]
pub(crate) enum ExecChange {
    Add(Box<ExecRequest>),
    Run,
    Signal(i32),
    Delete,
    Resize { width: u16, height: u16 },
    CloseStdin,
}

impl Change {
    /// What it needs of its container's lane.
    pub(super) fn class(&self) -> Class {
        match self {
            // An exec that is being added to what is paused may hang until that is resumed.
            Self::Init(InitChange::Signal { .. } | InitChange::ThawFor(_)) => Class::Signal(None),
            Self::Init(
                InitChange::Stop { .. } | InitChange::Restart { .. } | InitChange::Migrate(_),
            ) => Class::Interruptible,
            Self::Init(InitChange::Resize { .. } | InitChange::CloseStdin) => Class::Process(None),
            Self::Init(_) => Class::Whole,
            Self::Exec(exec, ExecChange::Signal(_)) => Class::Signal(Some(exec.clone())),
            Self::Exec(exec, _) => Class::Process(Some(exec.clone())),
        }
    }
}

/// A signal that waits until it can take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signal {
    pub(crate) job: Job,
    pub(crate) signal: i32,
    pub(crate) all: bool,
}

/// A container to create, as it was read from its bundle or from the Sandbox API.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) request: CreateRequest,
    pub(crate) identity: Identity,
    pub(crate) spec: ContainerSpec,
    /// Where the Sandbox API asks: what the pod is to be.
    pub(crate) bare: Option<Box<PodConfig>>,
    /// The fence that this pod stands behind.
    pub(crate) fenced: Option<Tombstone>,
    /// It waits for a migration's source.
    pub(crate) is_target: bool,
    /// The pod's init containers that have done their work on the migration's source.
    pub(crate) done_on_source: BTreeSet<String>,
}

/// What comes after a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterStop {
    /// It stays stopped.
    Stay,
    /// It runs again.
    Start,
}

/// How an init process is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    First,
    /// In place, after a stop.
    Again,
    /// Not at all: its work is done on the migration's source.
    DoneOnSource,
}

/// A call that needs no transition when it ends.
#[derive(Debug)]
pub(crate) enum Plain {
    Signal { signal: i32, all: bool },
    Resize { width: u16, height: u16 },
    CloseStdin,
    Update(Box<Resources>),
}

/// An effect to begin: a call of the backend, or work on files. Its end comes back as the
/// [`Ended`] of the same name.
#[derive(Debug)]
pub(crate) enum Call {
    Create(Job, Box<Prepared>),
    Start(Job, Start),
    Stop(Job, Duration, AfterStop),
    Reboot {
        job: Job,
        force: bool,
        grace: Duration,
    },
    Pause(Job),
    Checkpoint(Job, Box<Checkpoint>),
    Resume(Job),
    /// Resumes `holder`'s container, for the signal that waits for it. Without a holder it is
    /// the signal's own container.
    ThawFor {
        holder: Option<Job>,
        signal: Signal,
    },
    /// Lets go of what waits for its migration source.
    LetGo {
        job: Job,
        signal: i32,
    },
    Plain {
        job: Job,
        exec: Option<String>,
        what: Plain,
    },
    Delete(Job),
    AddExec(Job, String, Box<ExecRequest>),
    StartExec(Job, String),
    DeleteExec(Job, String),
    /// Of the migration of this number, as all that follow.
    CheckMigration(u64, Arc<MigrationParameters>),
    PutFence(u64),
    /// Marks the fence as settled: the pod is known to run elsewhere.
    SettleFence(u64),
    LiftFence(u64),
    Send(u64, Arc<MigrationParameters>, PodState),
    /// Ends after the time that the migration may take.
    Deadline(u64, Duration),
    /// Cancels, or (with a way) brings the migration to an end.
    AskMover(u64, Option<Hurry>),
    /// Waits for the migration's source.
    Receive,
}

/// How a [`Call`] ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Create(Job, Vec<RootMount>, Result<Made>),
    Start(Job, Start, Result<u32>),
    Stop(Job, AfterStop, Result<()>),
    Reboot(Job, Result<u32>),
    Pause(Job, Result<()>),
    /// With the folder of its images.
    Checkpoint(Job, PathBuf, Result<()>),
    Resume(Job, Result<()>),
    ThawFor {
        holder: Option<Job>,
        signal: Signal,
        result: Result<()>,
    },
    LetGo {
        job: Job,
        signal: i32,
    },
    Plain(Job, Result<()>),
    Delete(Job, Result<()>),
    AddExec(Job, String, Result<()>),
    StartExec(Job, String, Result<u32>),
    DeleteExec(Job, String, Result<()>),
    CheckMigration(u64, Result<()>),
    PutFence(u64, Result<()>),
    SettleFence(u64),
    LiftFence(u64),
    Send(u64, Result<Sent>),
    Deadline(u64, Duration),
    AskMover(u64, Option<Hurry>, Result<()>),
    Receive(Result<(Arrival, PodState)>),
}

/// What a pod is asked, is told, or has done.
#[derive(Debug)]
pub(crate) enum Input {
    Create(Box<Prepared>, Token),
    /// A change of the container of this id.
    Change(String, Change, Token),
    /// A Lifecycle operation on a task, or (an empty id) on the whole pod.
    Operate(Operation, String, Token),
    Migrate(Arc<MigrationParameters>, Token),
    CancelMigration(Token),
    Shutdown(Token),
    /// An effect has ended.
    Ended(Ended),
    /// The backend saw a process end.
    Exited(ProcessId, Exit),
    /// The backend saw that the kernel killed for memory in this container.
    OutOfMemory(String),
    Machine(MachineEvent),
}

/// What the driver does.
#[derive(Debug)]
pub(crate) enum Action {
    Begin(Call),
    Answer(u64, Result<Answer>),
    /// To containerd's subscribers.
    Publish(TaskEvent),
    /// To those who watch transitions.
    Tell(Transition),
    /// A process ended for good: its stdio closes, and who waits for it is answered.
    Over(ProcessId, Exit),
    /// A container is gone, or never came to be. What still waits for one of its processes
    /// is answered.
    Forget(String, Exit),
    /// What is known of the migration changed.
    Migration(News),
    Shutdown,
}

/// A change of what people are told of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum News {
    Began { number: u64, destination: String },
    Ended(Outcome),
}
