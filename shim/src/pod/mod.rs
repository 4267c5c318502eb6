//! One pod: the handle that the services hold, and what they ask and are told.
//!
//! ```text
//! rpc --Command--> queue --> driver --Input--> model (pure: all state, every decision)
//!                              ^  ^               |
//!                backend events'  |            Actions
//!                                 |               v
//!                                 +-- effects (calls of the backend, work on files)
//! ```
//! The driver never waits for an effect, so reads are answered while a slow change is
//! under way; changes of one container are done in the order in which they came
//! (`model/lane.rs`).

mod close;
mod driver;
mod effects;
pub mod lifecycle;
mod model;
mod prepare;
mod usage;

use std::path::PathBuf;
use std::time::SystemTime;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, MachineInfo, ProcessId};
use dyad_runtime_handler::migration::MigrationParameters;
use dyad_runtime_handler::spec::{Checkpoint, PodInfo, Resources, RootMount};
use dyad_runtime_handler::stats::Stats;
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Process;
use tokio::sync::{mpsc, oneshot, watch};

pub use driver::{Driver, Pod};
pub use model::state;

use crate::migration::MigrationView;
use crate::pod_spec::PodConfig;
use crate::stdio::StdioUris;
use lifecycle::Operation;
use model::change::{Answer, Change, ExecChange, InitChange};
use state::{State, TaskStatus};

/// A container to create.
#[derive(Debug)]
pub struct CreateRequest {
    /// Its id.
    pub id: String,
    /// Its OCI bundle.
    pub bundle: PathBuf,
    /// Mounts of its root.
    pub rootfs: Vec<RootMount>,
    /// Its init process's stdio.
    pub stdio: StdioUris,
    /// A checkpoint that it goes on from.
    pub checkpoint: Option<PathBuf>,
}

/// A pod without a pause container, to create.
#[derive(Debug)]
pub struct SandboxRequest {
    /// Its sandbox id.
    pub id: String,
    /// Its bundle, which holds no spec.
    pub bundle: PathBuf,
    /// What it is to be.
    pub pod: PodConfig,
}

/// A pod, as the Sandbox API shows it.
#[derive(Debug, Clone)]
pub struct SandboxView {
    /// Its host pid, whose namespaces are the pod's; 0 where there is none.
    pub pid: u32,
    /// Whether containers can be made in it.
    pub ready: bool,
    /// Since when it is there.
    pub created_at: SystemTime,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// A process to add.
#[derive(Debug)]
pub struct ExecRequest {
    /// Its id.
    pub exec_id: String,
    /// What to run.
    pub process: Process,
    /// Its stdio.
    pub stdio: StdioUris,
}

/// A process, as Task `State` shows it.
#[derive(Debug, Clone)]
pub struct ProcessView {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// Its host pid; 0 where there is none.
    pub pid: u32,
    /// Its status.
    pub status: TaskStatus,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Its stdio.
    pub stdio: StdioUris,
}

/// What a deleted process leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    /// Its last pid.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

/// What containerd's subscribers are told.
#[derive(Debug, Clone)]
pub enum TaskEvent {
    /// A container was created.
    Create {
        /// Its id.
        container: String,
        /// Its bundle.
        bundle: PathBuf,
        /// Mounts of its root.
        rootfs: Vec<RootMount>,
        /// Its stdio.
        stdio: StdioUris,
        /// Its pid.
        pid: u32,
    },
    /// Its init process runs.
    Start {
        /// Its id.
        container: String,
        /// Its pid.
        pid: u32,
    },
    /// A process ended.
    Exit {
        /// Which.
        process: ProcessId,
        /// Its pid.
        pid: u32,
        /// How.
        exit: Exit,
    },
    /// A container was deleted.
    Delete {
        /// Its id.
        container: String,
        /// Its last pid.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// A process was added.
    ExecAdded {
        /// Its container.
        container: String,
        /// Its id.
        exec: String,
    },
    /// An added process runs.
    ExecStarted {
        /// Its container.
        container: String,
        /// Its id.
        exec: String,
        /// Its pid.
        pid: u32,
    },
    /// A container was frozen.
    Paused {
        /// Its id.
        container: String,
    },
    /// A container was thawed.
    Resumed {
        /// Its id.
        container: String,
    },
    /// A container was written down.
    Checkpointed {
        /// Its id.
        container: String,
        /// Where.
        images: PathBuf,
    },
    /// The kernel killed for memory.
    OutOfMemory {
        /// The container's id.
        container: String,
    },
    /// A task changed its state: an event of our own.
    Transition(Box<Transition>),
}

impl TaskEvent {
    /// Whose life as a containerd task it tells of.
    fn of_task(&self) -> Option<&str> {
        match self {
            Self::Create { container, .. }
            | Self::Start { container, .. }
            | Self::Delete { container, .. } => Some(container),
            Self::Exit { process, .. } => Some(&process.container),
            Self::ExecAdded { .. }
            | Self::ExecStarted { .. }
            | Self::Paused { .. }
            | Self::Resumed { .. }
            | Self::Checkpointed { .. }
            | Self::OutOfMemory { .. }
            | Self::Transition(_) => None,
        }
    }
}

/// A task as it truly is: what the Lifecycle service tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskView {
    /// Its id.
    pub id: String,
    /// Kubernetes' name of the container; empty for the sandbox and outside CRI.
    pub name: String,
    /// Whether it is the pod itself.
    pub is_sandbox: bool,
    /// Its own state, also where the pod's machine is paused or stopped.
    pub state: State,
    /// Why it is in it, for people.
    pub reason: String,
    /// Since when.
    pub since: SystemTime,
    /// Its host pid; 0 where there is none.
    pub pid: u32,
    /// How often it was started in place.
    pub starts: u32,
    /// It ended with the pod's machine and comes back with it.
    pub stopped_with_pod: bool,
}

/// A change of a task's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Counts up by one per transition of this pod's server.
    pub sequence: u64,
    /// When.
    pub at: SystemTime,
    /// What was before.
    pub from: State,
    /// The task after it.
    pub task: TaskView,
}

/// The pod as it truly is.
#[derive(Debug, Clone)]
pub struct PodView {
    /// What runs it.
    pub kind: Kind,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// Its sandbox id.
    pub sandbox_id: String,
    /// Kubernetes' names for it.
    pub info: PodInfo,
    /// Its tasks, by id.
    pub tasks: Vec<TaskView>,
    /// Its machine.
    pub machine: Option<MachineInfo>,
}

/// Where an answer goes; nobody may be there any more.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// What the driver is asked.
pub(crate) enum Command {
    Create(CreateRequest, Reply<u32>),
    CreateSandbox(Box<SandboxRequest>, Reply<u32>),
    ViewSandbox(String, Reply<SandboxView>),
    /// A change of the container of this id.
    Change(String, Change, Pending),
    /// Of this task, or (an empty id) of the whole pod.
    Operate(Operation, String, Reply<PodView>),
    Migrate(Box<MigrationParameters>, Reply<u64>),
    State(ProcessId, Reply<ProcessView>),
    Wait(ProcessId, Reply<Exit>),
    Pids(String, Reply<Vec<(u32, Option<String>)>>),
    Stats(String, Reply<Stats>),
    View(Reply<PodView>),
    /// Transitions from now on, preceded by one for each task as it is.
    Watch(mpsc::Sender<Transition>),
    /// The migration under way, or the last one.
    Migration(Reply<watch::Receiver<MigrationView>>),
    CancelMigration(Reply<PodView>),
    Shutdown(Reply<()>),
}

/// A caller that waits for a change, by what the answer is.
pub(crate) enum Pending {
    Done(Reply<()>),
    Pid(Reply<u32>),
    Gone(Reply<Gone>),
    Number(Reply<u64>),
    /// The pod as it is then.
    View(Reply<PodView>),
}

impl Pending {
    /// Answers; nobody may be there any more. Returns an answer that is of another sort.
    fn send(self, result: Result<Answer>, view: impl FnOnce() -> PodView) -> Option<Answer> {
        match (self, result) {
            (Self::Done(reply), Err(error)) => drop(reply.send(Err(error))),
            (Self::Pid(reply), Err(error)) => drop(reply.send(Err(error))),
            (Self::Gone(reply), Err(error)) => drop(reply.send(Err(error))),
            (Self::Number(reply), Err(error)) => drop(reply.send(Err(error))),
            (Self::View(reply), Err(error)) => drop(reply.send(Err(error))),
            (Self::Done(reply), Ok(_)) => drop(reply.send(Ok(()))),
            (Self::View(reply), Ok(_)) => drop(reply.send(Ok(view()))),
            (Self::Pid(reply), Ok(Answer::Pid(pid))) => drop(reply.send(Ok(pid))),
            (Self::Gone(reply), Ok(Answer::Gone(gone))) => drop(reply.send(Ok(gone))),
            (Self::Number(reply), Ok(Answer::Number(number))) => drop(reply.send(Ok(number))),
            (Self::Pid(_) | Self::Gone(_) | Self::Number(_), Ok(other)) => return Some(other),
        }
        None
    }
}

/// A pod, for those who ask. Cheap to clone.
#[derive(Clone)]
pub struct Sandbox {
    commands: mpsc::UnboundedSender<Command>,
}

impl Sandbox {
    /// The handle, and the end of the queue for the driver.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        (Self { commands }, receiver)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::Unavailable("the pod's server is shutting down".into(), None);
        self.commands.send(command(reply)).map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn init<T>(
        &self,
        container: String,
        change: InitChange,
        pending: impl FnOnce(Reply<T>) -> Pending,
    ) -> Result<T> {
        let change = Change::Init(change);
        self.ask(|reply| Command::Change(container, change, pending(reply)))
            .await
    }

    /// A change that a container's init process and its execs have in common.
    async fn process<T>(
        &self,
        process: ProcessId,
        init: InitChange,
        exec: ExecChange,
        pending: impl FnOnce(Reply<T>) -> Pending,
    ) -> Result<T> {
        let change = match process.exec {
            None => Change::Init(init),
            Some(id) => Change::Exec(id, exec),
        };
        self.ask(|reply| Command::Change(process.container, change, pending(reply)))
            .await
    }

    /// Creates a container; returns its init process's pid.
    ///
    /// # Errors
    /// Of the backend; `AlreadyExists`; `FailedPrecondition` for a container whose pod
    /// does not run.
    pub async fn create(&self, request: CreateRequest) -> Result<u32> {
        self.ask(|reply| Command::Create(request, reply)).await
    }

    /// Creates the pod itself, where no pause container does; returns its host pid.
    ///
    /// # Errors
    /// Of the backend; `AlreadyExists`; `InvalidArgument` for another pod's id, or what
    /// this kind cannot give.
    pub async fn create_sandbox(&self, request: SandboxRequest) -> Result<u32> {
        self.ask(|reply| Command::CreateSandbox(Box::new(request), reply))
            .await
    }

    /// The pod as the Sandbox API shows it.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn view_sandbox(&self, id: String) -> Result<SandboxView> {
        self.ask(|reply| Command::ViewSandbox(id, reply)).await
    }

    /// Runs a created process; returns its pid.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn run(&self, process: ProcessId) -> Result<u32> {
        self.process(process, InitChange::Run, ExecChange::Run, Pending::Pid)
            .await
    }

    /// Sends a signal; `all`: to every process of the container.
    ///
    /// # Errors
    /// `NotFound` when the process has ended.
    pub async fn signal(&self, process: ProcessId, signal: i32, all: bool) -> Result<()> {
        let init = InitChange::Signal { signal, all };
        self.process(process, init, ExecChange::Signal(signal), Pending::Done)
            .await
    }

    /// Removes a process that ended or never ran; the init process with its container.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn delete(&self, process: ProcessId) -> Result<Gone> {
        self.process(
            process,
            InitChange::Delete,
            ExecChange::Delete,
            Pending::Gone,
        )
        .await
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn pause(&self, container: String) -> Result<()> {
        self.init(container, InitChange::Pause, Pending::Done).await
    }

    /// Undoes [`Self::pause`].
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn resume(&self, container: String) -> Result<()> {
        self.init(container, InitChange::Resume, Pending::Done)
            .await
    }

    /// Applies new limits.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn update(&self, container: String, resources: Resources) -> Result<()> {
        let update = InitChange::Update(Box::new(resources));
        self.init(container, update, Pending::Done).await
    }

    /// Writes a container down.
    ///
    /// # Errors
    /// Of the backend; `FailedPrecondition` for one that does not run.
    pub async fn checkpoint(&self, container: String, to: Checkpoint) -> Result<()> {
        let checkpoint = InitChange::Checkpoint(Box::new(to));
        self.init(container, checkpoint, Pending::Done).await
    }

    /// Adds a process.
    ///
    /// # Errors
    /// `AlreadyExists`; of the backend; a refusal of the state.
    pub async fn add_exec(&self, container: String, exec: ExecRequest) -> Result<()> {
        let change = Change::Exec(exec.exec_id.clone(), ExecChange::Add(Box::new(exec)));
        self.ask(|reply| Command::Change(container, change, Pending::Done(reply)))
            .await
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// Of the backend; `NotFound`.
    pub async fn resize(&self, process: ProcessId, width: u16, height: u16) -> Result<()> {
        let init = InitChange::Resize { width, height };
        let exec = ExecChange::Resize { width, height };
        self.process(process, init, exec, Pending::Done).await
    }

    /// Closes a process's stdin after what it still holds.
    ///
    /// # Errors
    /// Of the backend; `NotFound`.
    pub async fn close_stdin(&self, process: ProcessId) -> Result<()> {
        self.process(
            process,
            InitChange::CloseStdin,
            ExecChange::CloseStdin,
            Pending::Done,
        )
        .await
    }

    /// A process as it is now.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn state(&self, process: ProcessId) -> Result<ProcessView> {
        self.ask(|reply| Command::State(process, reply)).await
    }

    /// Returns when the process has ended for good.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn wait(&self, process: ProcessId) -> Result<Exit> {
        self.ask(|reply| Command::Wait(process, reply)).await
    }

    /// Host pids in a container, with the exec that each belongs to where known.
    ///
    /// # Errors
    /// `NotFound`; of the backend.
    pub async fn pids(&self, container: String) -> Result<Vec<(u32, Option<String>)>> {
        self.ask(|reply| Command::Pids(container, reply)).await
    }

    /// Resource usage of a container.
    ///
    /// # Errors
    /// `NotFound`; of the backend.
    pub async fn stats(&self, container: String) -> Result<Stats> {
        self.ask(|reply| Command::Stats(container, reply)).await
    }

    /// Ends the server, unless a container is left.
    ///
    /// # Errors
    /// None that matters: a server that is gone has shut down.
    pub async fn shutdown(&self) -> Result<()> {
        self.ask(Command::Shutdown).await
    }
}
