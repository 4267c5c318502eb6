//! A pod without a pause container: containerd asks for the pod itself, through its
//! Sandbox API. In the driver it is a task like any other, of the sandbox's role.

use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::spec::{ContainerSpec, Role, Stdio};
use dyad_runtime_handler::{Error, Result};

use super::driver::{Driver, not_found};
use super::init::Origin;
use super::state::{self, Request, State, TaskStatus};
use super::{CreateRequest, Reply, Sandbox, SandboxRequest, SandboxView, TaskView};
use crate::pod_files::{self, PodFiles};
use crate::pod_spec;
use crate::spec::{self, Identity};
use crate::stdio::StdioUris;

impl Driver {
    pub(super) fn create_sandbox(&mut self, request: SandboxRequest, reply: Reply<u32>) {
        match self.prepare_sandbox(&request) {
            Err(error) => drop(reply.send(Err(error))),
            Ok((files, prepared)) => {
                self.files = Some(files);
                let request = CreateRequest {
                    id: request.id,
                    bundle: request.bundle,
                    rootfs: Vec::new(),
                    stdio: StdioUris::default(),
                };
                self.start_create(request, prepared, Origin::SandboxApi, reply);
            }
        }
    }

    fn prepare_sandbox(
        &self,
        request: &SandboxRequest,
    ) -> Result<(PodFiles, (Identity, ContainerSpec))> {
        let id = &request.id;
        let launch = &self.pod.launch;
        if *id != launch.sandbox_id {
            return Err(Error::InvalidArgument(format!(
                "sandbox_id: {id:?}; this server was started for {:?}",
                launch.sandbox_id
            )));
        }
        if self.tasks.contains_key(id) {
            // Always a refusal.
            self.decide(id, Request::Create)?;
        }
        let oci = pod_spec::spec(id, &request.pod)?;
        let no_annotations = std::collections::HashMap::new();
        let annotations = oci.annotations().as_ref().unwrap_or(&no_annotations);
        let identity = Identity::of(id, annotations)?;
        let mut pod = spec::pod_info(&identity, annotations, &launch.config)?;
        pod.size = request.pod.size;
        self.check_fence(id, &pod.uid)?;
        let spec = ContainerSpec {
            id: id.clone(),
            name: String::new(),
            containerd_namespace: launch.containerd_namespace.clone(),
            role: Role::Sandbox,
            pod,
            bundle: request.bundle.clone(),
            rootfs: Vec::new(),
            oci,
            stdio: Stdio::default(),
        };
        let pod_dir = launch.pod_dir();
        // Of an earlier try.
        pod_files::unmount(&pod_dir)?;
        Ok((PodFiles::make(&pod_dir, &request.pod)?, (identity, spec)))
    }

    pub(super) fn view_sandbox(&self, id: &str) -> Result<SandboxView> {
        let task = self
            .tasks
            .get(id)
            .filter(|task| task.role == Role::Sandbox && task.instance.is_some())
            .ok_or_else(|| not_found(id))?;
        Ok(SandboxView {
            pid: task.pid(),
            ready: state::status(&task.phase.state(), true) == TaskStatus::Running,
            created_at: task.created_at,
            exit: task.phase.exit(),
        })
    }
}

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
