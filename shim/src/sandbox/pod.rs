//! Lifecycle operations on one task or the whole pod, in terms of changes of tasks.
//!
//! A machine pod's machine is its sandbox task: what is done to it holds for all in
//! it. In a container pod the operation is done to each container; the pause container
//! stays as it is, and with it the pod's address.

use std::time::Duration;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::{Error, Result};
use futures::future::join_all;
use tokio::sync::mpsc;

use super::state::State;
use super::{Change, Command, PodView, Sandbox, TaskView, Transition};

/// Transitions that a slow watcher may be behind before it is let go.
const WATCH_QUEUE: usize = 256;
/// Longest grace that makes sense.
const GRACE_MAX: Duration = Duration::from_secs(24 * 3600);

/// A Lifecycle operation that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// End the processes, keep the rest.
    Stop {
        /// How long they may take to end by themselves.
        grace: Duration,
    },
    /// Run again what was stopped.
    Start,
    /// Stop and start.
    Restart {
        /// Without asking the processes.
        force: bool,
        /// As for stop.
        grace: Duration,
    },
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop { .. } => "stop",
            Self::Start => "start",
            Self::Restart { .. } => "restart",
        }
    }

    /// Whether an operation on the whole pod concerns a container in this state: one
    /// that has ended, or was never started, is not part of it.
    fn concerns(state: &State) -> bool {
        matches!(
            state,
            State::Running | State::Paused | State::Stopping | State::Stopped | State::Migrating
        )
    }

    fn check(self) -> Result<()> {
        match self {
            Self::Stop { grace } | Self::Restart { grace, .. } if grace > GRACE_MAX => {
                Err(Error::InvalidArgument(format!(
                    "grace of {} s: at most {} s (24 h)",
                    grace.as_secs(),
                    GRACE_MAX.as_secs()
                )))
            }
            _ => Ok(()),
        }
    }
}

impl Sandbox {
    /// The pod as it truly is.
    ///
    /// # Errors
    /// The server is shutting down.
    pub async fn view(&self) -> Result<PodView> {
        self.ask(Command::View).await
    }

    /// Transitions from now on, preceded by one for each task as it is. Ends when the
    /// server does, or when the reader is too far behind.
    ///
    /// # Errors
    /// The server is shutting down.
    pub fn watch(&self) -> Result<mpsc::Receiver<Transition>> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        self.commands
            .send(Command::Watch(sender))
            .map(|()| receiver)
            .map_err(|_| Error::Unavailable("the pod's server is shutting down".into(), None))
    }

    /// Does `operation` to a task, or (an empty id) to the whole pod, and returns the
    /// pod as it is then. What is so already is done.
    ///
    /// # Errors
    /// A refusal of the state, with the way out; of the backend.
    pub async fn operate(&self, operation: Operation, target: &str) -> Result<PodView> {
        operation.check()?;
        if target.is_empty() {
            self.operate_pod(operation).await?;
        } else {
            self.operate_task(operation, target).await?;
        }
        self.view().await
    }

    async fn operate_task(&self, operation: Operation, id: &str) -> Result<()> {
        let process = ProcessId::init(id);
        match operation {
            Operation::Pause => self.change(process, Change::Pause).await,
            Operation::Resume => self.change(process, Change::Resume).await,
            Operation::Stop { grace } => {
                self.change(process, |reply| Change::Stop { grace, reply })
                    .await
            }
            Operation::Start => self.change(process, Change::Start).await,
            Operation::Restart { force, grace } => {
                self.change(process, |reply| Change::Restart {
                    force,
                    grace,
                    reply,
                })
                .await
            }
        }?;
        self.start_what_the_machine_took(operation, id).await
    }

    async fn operate_pod(&self, operation: Operation) -> Result<()> {
        let view = self.view().await?;
        let sandbox = view.tasks.iter().find(|task| task.is_sandbox);
        let containers: Vec<&TaskView> =
            view.tasks.iter().filter(|task| !task.is_sandbox).collect();
        if let Some(sandbox) = sandbox
            // Outside CRI the one task is its own pod.
            && (view.kind == Kind::Machine || (containers.is_empty() && view.info.name.is_empty()))
        {
            return self.operate_task(operation, &sandbox.id).await;
        }
        let concerned: Vec<&TaskView> = containers
            .into_iter()
            .filter(|task| Operation::concerns(&task.state))
            .collect();
        if concerned.is_empty() {
            return Err(Error::FailedPrecondition(format!(
                "cannot {} pod {}: no container of it is running",
                operation.name(),
                view.sandbox_id
            )));
        }
        all(concerned
            .iter()
            .map(|task| self.operate_task(operation, &task.id)))
        .await
    }

    /// A machine that comes up again has none of its containers' processes.
    async fn start_what_the_machine_took(&self, operation: Operation, id: &str) -> Result<()> {
        if !matches!(operation, Operation::Start | Operation::Restart { .. }) {
            return Ok(());
        }
        let view = self.view().await?;
        let is_machine = view.kind == Kind::Machine
            && view
                .tasks
                .iter()
                .any(|task| task.is_sandbox && task.id == id);
        if !is_machine {
            return Ok(());
        }
        let taken = view.tasks.iter().filter(|task| task.stopped_with_pod);
        all(taken.map(|task| self.change(ProcessId::init(&task.id), Change::Start))).await
    }
}

/// All of them side by side; the first error, when all have ended.
async fn all(changes: impl Iterator<Item = impl Future<Output = Result<()>>>) -> Result<()> {
    join_all(changes).await.into_iter().collect()
}
