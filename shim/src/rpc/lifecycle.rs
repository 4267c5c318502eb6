//! `dyad.lifecycle.v1.Lifecycle`: what Kubernetes cannot ask for.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dyad_api::lifecycle as wire;
use dyad_api::lifecycle_ttrpc::Lifecycle;
use dyad_linux::pump::Fd;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::handler::{MachineInfo, RuntimeHandler};
use dyad_runtime_handler::{Error, Result};
use log::info;
use protobuf::{EnumOrUnknown, MessageField};
use tokio::sync::Semaphore;
use ttrpc::r#async::{ServerStream, ServerStreamSender, TtrpcContext};

use super::migration;
use super::status::status;
use crate::pod::lifecycle::Operation;
use crate::pod::state::State;
use crate::pod::{PodView, Sandbox, TaskView, Transition};

/// Where a request names none (lifecycle.proto).
const GRACE_DEFAULT: Duration = Duration::from_secs(30);
/// One console message.
const CONSOLE_BYTES: usize = 4096;
/// How often an idle console finds out whether its client is still there. ttrpc does not
/// tell a stream's handler that the connection has ended; sending on it fails.
const PRESENCE: Duration = Duration::from_secs(1);

/// Serves the Lifecycle of one pod.
pub struct LifecycleService {
    sandbox: Sandbox,
    handler: Arc<dyn RuntimeHandler>,
    /// Held by the one client that is attached to the console.
    console: Semaphore,
}

impl LifecycleService {
    /// Over this pod; the console is the handler's own.
    pub fn new(sandbox: Sandbox, handler: Arc<dyn RuntimeHandler>) -> Self {
        Self {
            sandbox,
            handler,
            console: Semaphore::new(1),
        }
    }

    async fn operate(
        &self,
        operation: Operation,
        target: MessageField<wire::Target>,
    ) -> ttrpc::Result<wire::StateResponse> {
        let target = target.into_option().unwrap_or_default().container_id;
        match self.sandbox.operate(operation, &target).await {
            Ok(view) => Ok(state_response(view)),
            Err(error) => {
                info!("{operation:?} of {target:?} refused: {}", error.chain());
                Err(status(&error))
            }
        }
    }

    async fn pump_console(
        &self,
        stream: ServerStream<wire::ConsoleData, wire::ConsoleData>,
    ) -> Result<()> {
        let Ok(_attached) = self.console.try_acquire() else {
            return Err(Error::FailedPrecondition(
                "another console is attached to this machine: leave that one first".into(),
            ));
        };
        let console = Fd::new(self.handler.console().await?)
            .context(|| "attach the machine's console".into())?;
        let (to_client, mut from_client) = stream.split();
        let output = async {
            let mut buffer = vec![0; CONSOLE_BYTES];
            loop {
                let read = console
                    .read(&mut buffer)
                    .await
                    .context(|| "read the machine's console".into())?;
                let data = buffer[..read].to_vec();
                let message = wire::ConsoleData {
                    data,
                    ..Default::default()
                };
                // A client that went away is an end like any other.
                if read == 0 || to_client.send(&message).await.is_err() {
                    return Ok(());
                }
            }
        };
        let input = async {
            while let Ok(Some(message)) = from_client.recv().await {
                console
                    .write_all(&message.data)
                    .await
                    .context(|| "write the machine's console".into())?;
            }
            Ok(())
        };
        let presence = async {
            let mut ticks = tokio::time::interval(PRESENCE);
            loop {
                ticks.tick().await;
                if to_client.send(&wire::ConsoleData::new()).await.is_err() {
                    return Ok(());
                }
            }
        };
        tokio::select! {
            result = output => result,
            result = input => result,
            result = presence => result,
        }
    }
}

#[async_trait]
impl Lifecycle for LifecycleService {
    async fn state(
        &self,
        _: &TtrpcContext,
        _: wire::StateRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        let view = self.sandbox.view().await;
        view.map(state_response).map_err(|error| status(&error))
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        _: wire::WatchRequest,
        to_client: ServerStreamSender<wire::Transition>,
    ) -> ttrpc::Result<()> {
        let mut transitions = self.sandbox.watch().map_err(|error| status(&error))?;
        while let Some(told) = transitions.recv().await {
            // A client that went away is the usual end.
            if to_client.send(&transition(&told)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: wire::PauseRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        self.operate(Operation::Pause, request.target).await
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: wire::ResumeRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        self.operate(Operation::Resume, request.target).await
    }

    async fn stop(
        &self,
        _: &TtrpcContext,
        request: wire::StopRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        let grace = grace(request.grace_ms);
        self.operate(Operation::Stop { grace }, request.target)
            .await
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: wire::StartRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        self.operate(Operation::Start, request.target).await
    }

    async fn restart(
        &self,
        _: &TtrpcContext,
        request: wire::RestartRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        let operation = Operation::Restart {
            force: request.force,
            grace: grace(request.grace_ms),
        };
        self.operate(operation, request.target).await
    }

    async fn migrate(
        &self,
        _: &TtrpcContext,
        request: wire::MigrateRequest,
    ) -> ttrpc::Result<wire::MigrateResponse> {
        let asked = match migration::parameters(request) {
            Ok(parameters) => self.sandbox.migrate(parameters).await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(migration) => Ok(wire::MigrateResponse {
                migration,
                ..Default::default()
            }),
            Err(error) => Err(status(&error)),
        }
    }

    async fn migration_status(
        &self,
        _: &TtrpcContext,
        _: wire::MigrationStatusRequest,
        to_client: ServerStreamSender<wire::MigrationProgress>,
    ) -> ttrpc::Result<()> {
        let watched = self.sandbox.migration().await;
        let mut views = watched.map_err(|error| status(&error))?;
        loop {
            let view = views.borrow_and_update().clone();
            let over = view.number == 0 || view.outcome.is_some();
            // A client that went away is the usual end.
            if to_client.send(&migration::progress(&view)).await.is_err()
                || over
                || views.changed().await.is_err()
            {
                return Ok(());
            }
        }
    }

    async fn cancel_migration(
        &self,
        _: &TtrpcContext,
        _: wire::CancelMigrationRequest,
    ) -> ttrpc::Result<wire::StateResponse> {
        let view = self.sandbox.cancel_migration().await;
        view.map(state_response).map_err(|error| status(&error))
    }

    async fn console(
        &self,
        _: &TtrpcContext,
        stream: ServerStream<wire::ConsoleData, wire::ConsoleData>,
    ) -> ttrpc::Result<()> {
        self.pump_console(stream).await.map_err(|error| {
            info!("console: {}", error.chain());
            status(&error)
        })
    }
}

fn grace(grace_ms: Option<u64>) -> Duration {
    grace_ms.map_or(GRACE_DEFAULT, Duration::from_millis)
}

/// A transition as it is told.
pub fn transition(transition: &Transition) -> wire::Transition {
    wire::Transition {
        sequence: transition.sequence,
        unix_ns: unix_ns(transition.at),
        task: MessageField::some(task(&transition.task)),
        from: task_state(&transition.from),
        ..Default::default()
    }
}

fn state_response(view: PodView) -> wire::StateResponse {
    wire::StateResponse {
        containerd_namespace: view.containerd_namespace,
        sandbox_id: view.sandbox_id,
        pod_namespace: view.info.namespace,
        pod_name: view.info.name,
        pod_uid: view.info.uid,
        kind: view.kind.to_string(),
        tasks: view.tasks.iter().map(task).collect(),
        machine: view.machine.map(machine).into(),
        shim_pid: std::process::id(),
        shim_version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    }
}

fn task(view: &TaskView) -> wire::Task {
    wire::Task {
        container_id: view.id.clone(),
        name: view.name.clone(),
        sandbox: view.is_sandbox,
        state: task_state(&view.state),
        reason: view.reason.clone(),
        pid: view.pid,
        exit_status: match view.state {
            State::Exited(status) => status,
            _ => 0,
        },
        since_unix_ns: unix_ns(view.since),
        starts: view.starts,
        ..Default::default()
    }
}

fn machine(info: MachineInfo) -> wire::Machine {
    wire::Machine {
        uuid: info.uuid,
        domain: info.domain,
        libvirt_uri: info.libvirt_uri,
        accelerator: info.accelerator,
        vcpus: info.vcpus,
        memory_bytes: info.memory_bytes,
        kernel_release: info.kernel_release,
        notes: info.notes,
        ..Default::default()
    }
}

fn task_state(state: &State) -> EnumOrUnknown<wire::TaskState> {
    EnumOrUnknown::new(match state {
        State::Created => wire::TaskState::CREATED,
        State::Running => wire::TaskState::RUNNING,
        State::Paused => wire::TaskState::PAUSED,
        State::Stopping => wire::TaskState::STOPPING,
        State::Stopped => wire::TaskState::STOPPED,
        State::Migrating => wire::TaskState::MIGRATING,
        State::Incoming => wire::TaskState::INCOMING,
        State::Exited(_) => wire::TaskState::EXITED,
        State::Migrated => wire::TaskState::MIGRATED,
        State::Failed(_) => wire::TaskState::FAILED,
    })
}

fn unix_ns(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_grace_is_thirty_seconds_and_zero_is_zero() {
        assert_eq!(grace(None), Duration::from_secs(30));
        assert_eq!(grace(Some(0)), Duration::ZERO);
    }

    #[test]
    fn an_exit_status_is_told_only_of_what_exited() {
        let view = TaskView {
            id: "c".into(),
            name: "web".into(),
            is_sandbox: false,
            state: State::Exited(3),
            reason: String::new(),
            since: UNIX_EPOCH + Duration::from_secs(1),
            pid: 0,
            starts: 2,
            stopped_with_pod: false,
        };
        let told = task(&view);
        assert_eq!((told.exit_status, told.since_unix_ns), (3, 1_000_000_000));
        assert_eq!(told.state, wire::TaskState::EXITED.into());
        let running = TaskView {
            state: State::Running,
            ..view
        };
        assert_eq!(task(&running).exit_status, 0);
    }
}
