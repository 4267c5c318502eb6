//! Ending a pod whatever its state, as containerd asks through its Sandbox API.

use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::{Error, Result};

use super::model::state::State;
use super::{Sandbox, TaskView};

impl Sandbox {
    /// Ends all that is left of the pod, whatever its state, and then the server.
    ///
    /// # Errors
    /// What could not be ended or removed; then the server stays, to be asked again.
    pub async fn close(&self) -> Result<()> {
        let view = self.view().await?;
        let (sandboxes, containers): (Vec<_>, Vec<_>) =
            view.tasks.iter().partition(|task| task.is_sandbox);
        for task in containers.into_iter().chain(sandboxes) {
            self.end(task).await?;
            match self.delete(ProcessId::init(&task.id)).await {
                Ok(_) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.shutdown().await
    }

    /// Kills what may run, and waits for its end.
    async fn end(&self, task: &TaskView) -> Result<()> {
        match task.state {
            State::Created | State::Exited(_) | State::Migrated | State::Failed(_) => Ok(()),
            State::Running
            | State::Paused
            | State::Stopping
            | State::Stopped
            | State::Migrating
            | State::Incoming => self.kill(&task.id).await,
        }
    }

    /// Kills a task's process, kept or running, and waits until it has ended for good.
    ///
    /// # Errors
    /// Of the backend. A task that has ended is no error.
    pub async fn kill(&self, id: &str) -> Result<()> {
        let process = ProcessId::init(id);
        match self.signal(process.clone(), libc::SIGKILL, false).await {
            Ok(()) => {}
            // It has ended meanwhile.
            Err(Error::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
        match self.wait(process).await {
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
