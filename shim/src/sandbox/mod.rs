//! One pod: the handle that the services hold, and what they ask and are told.
//!
//! ```text
//! rpc --Command--> queue --> driver (owns all state, decides by `state`)
//!                    ^          |  spawns
//!                    |          v
//!                    +---- effects (calls of the backend) and backend events
//! ```
//! The driver never waits for an effect, so reads are answered while a slow change is
//! under way; changes of one container are done in the order in which they came
//! ([`lane`]).

mod bare;
mod driver;
mod execs;
mod init;
mod lane;
mod lifecycle;
mod migration;
pub mod pod;
pub mod record;
pub mod state;
mod task;
mod usage;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, MachineInfo, ProcessId};
use dyad_runtime_handler::migration::MigrationParameters;
use dyad_runtime_handler::spec::{Checkpoint, PodInfo, Resources, RootMount};
use dyad_runtime_handler::stats::Stats;
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Process;
use tokio::sync::{mpsc, oneshot, watch};

pub use driver::{Driver, Pod};

use crate::migration::MigrationView;
use crate::pod_spec::PodConfig;
use crate::stdio::StdioUris;
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
#[derive(Debug, Clone, Copy)]
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
    Change(ProcessId, Change),
    State(ProcessId, Reply<ProcessView>),
    Wait(ProcessId, Reply<Exit>),
    Pids(String, Reply<Vec<(u32, Option<String>)>>),
    Stats(String, Reply<Stats>),
    View(Reply<PodView>),
    /// Transitions from now on, preceded by one for each task as it is.
    Watch(mpsc::Sender<Transition>),
    /// The migration under way, or the last one.
    Migration(Reply<watch::Receiver<MigrationView>>),
    CancelMigration(Reply<()>),
    Shutdown(Reply<()>),
}

/// A change of one process or its container: ordered by the container's lane.
pub(crate) enum Change {
    Run(Reply<u32>),
    Signal {
        signal: i32,
        all: bool,
        reply: Reply<()>,
    },
    Delete(Reply<Gone>),
    Pause(Reply<()>),
    Resume(Reply<()>),
    Stop {
        grace: Duration,
        reply: Reply<()>,
    },
    Start(Reply<()>),
    /// Of the sandbox: the pod moves away.
    Migrate(Box<MigrationParameters>, Reply<u64>),
    Restart {
        force: bool,
        grace: Duration,
        reply: Reply<()>,
    },
    Update(Box<Resources>, Reply<()>),
    Checkpoint(Box<Checkpoint>, Reply<()>),
    AddExec(Box<ExecRequest>, Reply<()>),
    Resize {
        width: u16,
        height: u16,
        reply: Reply<()>,
    },
    CloseStdin(Reply<()>),
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

    async fn change<T>(
        &self,
        process: ProcessId,
        change: impl FnOnce(Reply<T>) -> Change,
    ) -> Result<T> {
        self.ask(|reply| Command::Change(process, change(reply)))
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
        self.change(process, Change::Run).await
    }

    /// Sends a signal; `all`: to every process of the container.
    ///
    /// # Errors
    /// `NotFound` when the process has ended.
    pub async fn signal(&self, process: ProcessId, signal: i32, all: bool) -> Result<()> {
        self.change(process, |reply| Change::Signal { signal, all, reply })
            .await
    }

    /// Removes a process that ended or never ran; the init process with its container.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn delete(&self, process: ProcessId) -> Result<Gone> {
        self.change(process, Change::Delete).await
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn pause(&self, container: String) -> Result<()> {
        self.change(ProcessId::init(container), Change::Pause).await
    }

    /// Undoes [`Self::pause`].
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn resume(&self, container: String) -> Result<()> {
        self.change(ProcessId::init(container), Change::Resume)
            .await
    }

    /// Applies new limits.
    ///
    /// # Errors
    /// Of the backend; a refusal of the state.
    pub async fn update(&self, container: String, resources: Resources) -> Result<()> {
        self.change(ProcessId::init(container), |reply| {
            Change::Update(Box::new(resources), reply)
        })
        .await
    }

    /// Writes a container down.
    ///
    /// # Errors
    /// Of the backend; `FailedPrecondition` for one that does not run.
    pub async fn checkpoint(&self, container: String, to: Checkpoint) -> Result<()> {
        self.change(ProcessId::init(container), |reply| {
            Change::Checkpoint(Box::new(to), reply)
        })
        .await
    }

    /// Adds a process.
    ///
    /// # Errors
    /// `AlreadyExists`; of the backend; a refusal of the state.
    pub async fn add_exec(&self, container: String, exec: ExecRequest) -> Result<()> {
        let process = ProcessId::exec(container, exec.exec_id.clone());
        self.change(process, |reply| Change::AddExec(Box::new(exec), reply))
            .await
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// Of the backend; `NotFound`.
    pub async fn resize(&self, process: ProcessId, width: u16, height: u16) -> Result<()> {
        self.change(process, |reply| Change::Resize {
            width,
            height,
            reply,
        })
        .await
    }

    /// Closes a process's stdin after what it still holds.
    ///
    /// # Errors
    /// Of the backend; `NotFound`.
    pub async fn close_stdin(&self, process: ProcessId) -> Result<()> {
        self.change(process, Change::CloseStdin).await
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
