//! What the Lifecycle service asks of a pod.

use std::time::Duration;

use dyad_runtime_handler::migration::MigrationParameters;
use dyad_runtime_handler::{Error, Result};
use tokio::sync::{mpsc, watch};

use super::{Command, PodView, Sandbox, Transition};
use crate::migration::{MigrationView, request};

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
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop { .. } => "stop",
            Self::Start => "start",
            Self::Restart { .. } => "restart",
        }
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
        let target = target.to_owned();
        self.ask(|reply| Command::Operate(operation, target, reply))
            .await
    }

    /// Moves the pod away. Answers with the migration's number once the refusals are
    /// past.
    ///
    /// # Errors
    /// `InvalidArgument` for parameters that are none; the blocker, by name.
    pub async fn migrate(&self, parameters: MigrationParameters) -> Result<u64> {
        request::check(&parameters)?;
        self.ask(|reply| Command::Migrate(Box::new(parameters), reply))
            .await
    }

    /// The migration under way or the last one, and every change of it.
    ///
    /// # Errors
    /// The server is shutting down.
    pub async fn migration(&self) -> Result<watch::Receiver<MigrationView>> {
        self.ask(Command::Migration).await
    }

    /// Gives the migration up; returns when the pod runs here as before.
    ///
    /// # Errors
    /// `FailedPrecondition`: there is none, or it cannot be given up any more.
    pub async fn cancel_migration(&self) -> Result<PodView> {
        self.ask(Command::CancelMigration).await
    }
}
