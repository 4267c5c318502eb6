//! `containerd.task.v3.Task` in the guest.

mod container;
mod process;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use dyad_agent_api::protobuf::well_known_types::any::Any;
use dyad_agent_api::protobuf::well_known_types::timestamp::Timestamp;
use dyad_agent_api::protobuf::{EnumOrUnknown, Message, MessageField};
use dyad_agent_api::stats;
use dyad_agent_api::task_api::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use dyad_agent_api::task_api::shim::oci::ProcessDetails;
use dyad_agent_api::task_api::shim_async::Task;
use dyad_agent_api::ttrpc::Result as RpcResult;
use dyad_agent_api::ttrpc::r#async::TtrpcContext;
use dyad_runtime_handler::{Error, Result};
use tokio::sync::OnceCell;

use self::container::{Container, Layer};
use self::process::Phase;
use crate::cgroup;
use crate::guest::Agent;
use crate::power;
use crate::rpc::{answer, detached};

/// Containers' folders.
pub const CONTAINERS: &str = "/run/dyad/containers";

/// How Shutdown ends containers that are left.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Every container by id. An entry without a container is one that is being created.
#[derive(Default)]
pub struct Containers {
    slots: Mutex<HashMap<String, Arc<OnceCell<Arc<Container>>>>>,
}

impl Containers {
    /// The container of that id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.lock()
            .get(id)
            .and_then(|slot| slot.get().cloned())
            .ok_or_else(|| Error::NotFound(format!("container {id:?}")))
    }

    /// Every container.
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.lock()
            .values()
            .filter_map(|slot| slot.get().cloned())
            .collect()
    }

    /// Files of the guest that containers have mounted as files.
    pub fn mounted_files(&self) -> HashSet<PathBuf> {
        self.all()
            .iter()
            .flat_map(|container| container.mounted_files().cloned().collect::<Vec<_>>())
            .collect()
    }

    /// Creates a container, once: who asks while that goes on gets its end.
    async fn create(&self, agent: &Arc<Agent>, request: CreateTaskRequest) -> Result<u32> {
        let id = request.id.clone();
        if container::is_made_again(&request)? {
            self.release_ended(agent, &id).await?;
        }
        let slot = Arc::clone(self.lock().entry(id.clone()).or_default());
        let made = slot
            .get_or_try_init(|| Container::create(agent, request))
            .await;
        match made.map(|container| container.init().phase()) {
            Ok(Phase::Created { pid }) => Ok(pid),
            Ok(_) => Err(Error::AlreadyExists(format!("container {id}"))),
            Err(error) => {
                let mut slots = self.lock();
                // Not that of somebody who tried again meanwhile and succeeded.
                if slots.get(&id).is_some_and(|there| !there.initialized()) {
                    slots.remove(&id);
                }
                Err(error)
            }
        }
    }

    /// Makes room for a container that is made again, keeping its writable layer.
    async fn release_ended(&self, agent: &Agent, id: &str) -> Result<()> {
        match self.get(id) {
            Ok(ended) if matches!(ended.init().phase(), Phase::Stopped { .. }) => {
                ended.delete(agent, Layer::Keep).await?;
                self.forget(id);
                Ok(())
            }
            // Made again already, runs, or was never here.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<OnceCell<Arc<Container>>>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the calls that concern one container.
pub struct TaskService {
    agent: Arc<Agent>,
}

impl TaskService {
    /// A service of `agent`.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.agent.containers.get(id)
    }

    fn state_of(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let wanted = process.wanted();
        let marker = |wanted: bool| if wanted { "1" } else { "" }.to_owned();
        let mut response = StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: container.bundle().display().to_string(),
            stdin: marker(wanted.stdin),
            stdout: marker(wanted.stdout),
            stderr: marker(wanted.stderr),
            terminal: wanted.terminal,
            ..Default::default()
        };
        let status = match process.phase() {
            Phase::Added => Status::CREATED,
            Phase::Created { pid } => {
                response.pid = pid;
                Status::CREATED
            }
            Phase::Running { pid } => {
                response.pid = pid;
                if container.is_paused() {
                    Status::PAUSED
                } else {
                    Status::RUNNING
                }
            }
            Phase::Stopped { pid, exit } => {
                response.pid = pid;
                response.exit_status = exit.status;
                response.exited_at = timestamp(exit.at);
                Status::STOPPED
            }
        };
        response.status = EnumOrUnknown::new(status);
        Ok(response)
    }

    async fn delete_process(agent: Arc<Agent>, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = agent.containers.get(&request.id)?;
        let end = if request.exec_id.is_empty() {
            let end = container.delete(&agent, Layer::Remove).await?;
            agent.containers.forget(&request.id);
            Some(end)
        } else {
            container.delete_exec(&agent, &request.exec_id).await?
        };
        let Some((pid, exit)) = end else {
            return Ok(DeleteResponse::default());
        };
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    fn kill_process(&self, request: &KillRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let signal = i32::try_from(request.signal)
            .map_err(|_| Error::InvalidArgument(format!("{} is no signal", request.signal)))?;
        if request.all && request.exec_id.is_empty() {
            return container.signal_all(signal);
        }
        let process = container.process(&request.exec_id)?;
        container.signal(&self.agent.reaper, &process, signal)
    }

    fn pids_of(&self, id: &str) -> Result<PidsResponse> {
        let container = self.container(id)?;
        let execs: HashMap<u32, String> = container
            .execs()
            .iter()
            .filter_map(|process| Some((process.pid()?, process.id().exec.clone()?)))
            .collect();
        let mut processes = Vec::new();
        for pid in container.cgroup().procs()? {
            let details = execs.get(&pid).map(|exec_id| {
                any(&ProcessDetails {
                    exec_id: exec_id.clone(),
                    ..Default::default()
                })
            });
            processes.push(ProcessInfo {
                pid,
                info: details.transpose()?.into(),
                ..Default::default()
            });
        }
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    /// The usage of a container; of all together for the empty id.
    fn stats_of(&self, id: &str) -> Result<StatsResponse> {
        let cgroup = if id.is_empty() {
            cgroup::pod()
        } else {
            self.container(id)?.cgroup().clone()
        };
        Ok(StatsResponse {
            stats: MessageField::some(any(&stats::encode(&cgroup.stats()?))?),
            ..Default::default()
        })
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> RpcResult<StateResponse> {
        answer("State", self.state_of(&request))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> RpcResult<CreateTaskResponse> {
        let agent = Arc::clone(&self.agent);
        let pid = detached(async move { agent.containers.create(&agent, request).await }).await;
        answer(
            "Create",
            pid.map(|pid| CreateTaskResponse {
                pid,
                ..Default::default()
            }),
        )
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> RpcResult<StartResponse> {
        let agent = Arc::clone(&self.agent);
        let pid = detached(async move {
            let container = agent.containers.get(&request.id)?;
            if request.exec_id.is_empty() {
                agent.modules_on_demand().await;
                container.start().await
            } else {
                container.start_exec(&agent, &request.exec_id).await
            }
        })
        .await;
        answer(
            "Start",
            pid.map(|pid| StartResponse {
                pid,
                ..Default::default()
            }),
        )
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> RpcResult<DeleteResponse> {
        let agent = Arc::clone(&self.agent);
        answer(
            "Delete",
            detached(Self::delete_process(agent, request)).await,
        )
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> RpcResult<PidsResponse> {
        answer("Pids", self.pids_of(&request.id))
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> RpcResult<Empty> {
        let agent = Arc::clone(&self.agent);
        let done = detached(async move { agent.containers.get(&request.id)?.pause().await }).await;
        answer("Pause", done.map(|()| Empty::new()))
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> RpcResult<Empty> {
        let agent = Arc::clone(&self.agent);
        let done = detached(async move { agent.containers.get(&request.id)?.resume().await }).await;
        answer("Resume", done.map(|()| Empty::new()))
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> RpcResult<Empty> {
        answer(
            "Checkpoint",
            Err(Error::Unimplemented(
                "containers in a machine cannot be checkpointed: save or migrate the machine"
                    .into(),
            )),
        )
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> RpcResult<Empty> {
        answer("Kill", self.kill_process(&request).map(|()| Empty::new()))
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> RpcResult<Empty> {
        let done = self
            .container(&request.id)
            .and_then(|container| container.add_exec(&self.agent, &request));
        answer("Exec", done.map(|()| Empty::new()))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> RpcResult<Empty> {
        let done = self
            .container(&request.id)
            .and_then(|container| container.process(&request.exec_id))
            .and_then(|process| {
                process.resize(
                    request.width.try_into().unwrap_or(u16::MAX),
                    request.height.try_into().unwrap_or(u16::MAX),
                )
            });
        answer("ResizePty", done.map(|()| Empty::new()))
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> RpcResult<Empty> {
        let done = self
            .container(&request.id)
            .and_then(|container| container.process(&request.exec_id))
            .map(|process| {
                if request.stdin {
                    process.close_stdin();
                }
            });
        answer("CloseIO", done.map(|()| Empty::new()))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> RpcResult<Empty> {
        let done = self
            .container(&request.id)
            .and_then(|container| container.update(&request.resources.value));
        answer("Update", done.map(|()| Empty::new()))
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> RpcResult<WaitResponse> {
        let process = self
            .container(&request.id)
            .and_then(|container| container.process(&request.exec_id));
        let process = answer("Wait", process)?;
        let (_, exit) = process.ended().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> RpcResult<StatsResponse> {
        answer("Stats", self.stats_of(&request.id))
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> RpcResult<ConnectResponse> {
        let container = self.container(&request.id);
        answer(
            "Connect",
            container.map(|container| ConnectResponse {
                shim_pid: std::process::id(),
                task_pid: container.init().pid().unwrap_or_default(),
                version: env!("CARGO_PKG_VERSION").into(),
                ..Default::default()
            }),
        )
    }

    /// Ends the machine when nothing is left in it, or at once with `now`.
    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> RpcResult<Empty> {
        if request.now || self.agent.containers.all().is_empty() {
            let agent = Arc::clone(&self.agent);
            power::shut_down_soon(agent, power::Kind::Off, SHUTDOWN_GRACE);
        }
        Ok(Empty::new())
    }
}

fn any<M: Message + dyad_agent_api::protobuf::MessageFull>(message: &M) -> Result<Any> {
    Ok(Any {
        // containerd's typeurl has no host part.
        type_url: M::descriptor().full_name().to_owned(),
        value: message
            .write_to_bytes()
            .map_err(|error| Error::other("encode the answer", error))?,
        ..Default::default()
    })
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(at.into())
}
