//! containerd's Task service: decodes, asks the sandbox, encodes.

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use log::{debug, info};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use ttrpc::r#async::TtrpcContext;

use super::convert::{
    checkpoint, create_request, exec_request, process_id, resources, stats, status as task_status,
    timestamp,
};
use super::status::status;
use crate::pod::Sandbox;

/// Serves both versions of Task.
pub struct TaskService {
    sandbox: Sandbox,
}

impl TaskService {
    /// Over this pod.
    pub fn new(sandbox: Sandbox) -> Self {
        Self { sandbox }
    }
}

/// Turns the error of a read into what containerd reads. It asks all the time, also for
/// what is gone: nobody wants that in a log.
pub(super) fn read<T>(what: &str, result: Result<T>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        debug!("{what}: {}", error.chain());
        status(&error)
    })
}

/// Logs a refused change once, and turns its error into what containerd reads.
pub(super) fn answer<T>(what: &str, result: Result<T>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        match &error {
            // Part of containerd's ordinary doing.
            Error::NotFound(_) => debug!("{what}: {}", error.chain()),
            Error::InvalidArgument(_)
            | Error::AlreadyExists(_)
            | Error::FailedPrecondition(_)
            | Error::Unimplemented(_) => info!("{what} refused: {}", error.chain()),
            Error::Unavailable(..) | Error::DeadlineExceeded(_) | Error::Other { .. } => {
                log::error!("{what}: {}", error.chain());
            }
        }
        status(&error)
    })
}

fn done(what: &str, result: Result<()>) -> ttrpc::Result<Empty> {
    answer(what, result.map(|()| Empty::default()))
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let StateRequest { id, exec_id, .. } = request;
        let process = process_id(id.clone(), exec_id.clone());
        let view = read("state", self.sandbox.state(process).await)?;
        let (exit_status, exited_at) = match view.exit {
            Some(exit) => (exit.status, Some(timestamp(exit.at))),
            None => (0, None),
        };
        Ok(StateResponse {
            id,
            exec_id,
            bundle: view.bundle.display().to_string(),
            pid: view.pid,
            status: task_status(view.status),
            stdin: view.stdio.stdin,
            stdout: view.stdio.stdout,
            stderr: view.stdio.stderr,
            terminal: view.stdio.terminal,
            exit_status,
            exited_at: exited_at.into(),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let what = format!("create {}", request.id);
        let result = async { self.sandbox.create(create_request(request)?).await }.await;
        let pid = answer(&what, result)?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let process = process_id(request.id, request.exec_id);
        let what = format!("start {process}");
        let pid = answer(&what, self.sandbox.run(process).await)?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let process = process_id(request.id, request.exec_id);
        let what = format!("delete {process}");
        let gone = answer(&what, self.sandbox.delete(process).await)?;
        Ok(DeleteResponse {
            pid: gone.pid,
            exit_status: gone.exit.status,
            exited_at: Some(timestamp(gone.exit.at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let result = async {
            let pids = self.sandbox.pids(request.id).await?;
            pids.into_iter().map(process_info).collect::<Result<_>>()
        };
        Ok(PidsResponse {
            processes: read("pids", result.await)?,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let what = format!("pause {}", request.id);
        done(&what, self.sandbox.pause(request.id).await)
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let what = format!("resume {}", request.id);
        done(&what, self.sandbox.resume(request.id).await)
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let what = format!("checkpoint of {}", request.id);
        let result = async {
            let (container, to) = checkpoint(request)?;
            self.sandbox.checkpoint(container, to).await
        };
        done(&what, result.await)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let process = process_id(request.id, request.exec_id);
        let what = format!("signal {} to {process}", request.signal);
        let result = async {
            let signal = i32::try_from(request.signal)
                .ok()
                .filter(|signal| (1..=64).contains(signal))
                .ok_or_else(|| {
                    Error::InvalidArgument(format!("signal {} does not exist", request.signal))
                })?;
            self.sandbox.signal(process, signal, request.all).await
        };
        done(&what, result.await)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let what = format!("exec {} in {}", request.exec_id, request.id);
        let result = async {
            let (container, exec) = exec_request(request)?;
            self.sandbox.add_exec(container, exec).await
        };
        done(&what, result.await)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let process = process_id(request.id, request.exec_id);
        let what = format!("resize terminal of {process}");
        let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let (width, height) = (size(request.width), size(request.height));
        done(&what, self.sandbox.resize(process, width, height).await)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = process_id(request.id, request.exec_id);
        let what = format!("close stdin of {process}");
        // Output cannot be closed from here; containerd asks only for stdin.
        if !request.stdin {
            return Ok(Empty::default());
        }
        done(&what, self.sandbox.close_stdin(process).await)
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let what = format!("update {}", request.id);
        let result = async {
            let resources = resources(request.resources, request.annotations)?;
            self.sandbox.update(request.id, resources).await
        };
        done(&what, result.await)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = process_id(request.id, request.exec_id);
        let exit = read("wait", self.sandbox.wait(process).await)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let result = async { stats(&self.sandbox.stats(request.id).await?) };
        Ok(StatsResponse {
            stats: Some(read("stats", result.await)?).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // Reconnecting containerds ask before they know what is here: an unknown task
        // is no error.
        let view = self
            .sandbox
            .state(process_id(request.id, String::new()))
            .await;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: view.map_or(0, |view| view.pid),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let what = format!("shutdown of {}", request.id);
        done(&what, self.sandbox.shutdown().await)
    }
}

fn process_info((pid, exec): (u32, Option<String>)) -> Result<ProcessInfo> {
    let info = match exec {
        None => None,
        Some(exec_id) => Some(Any {
            type_url: "containerd.runc.v1.ProcessDetails".into(),
            value: ProcessDetails {
                exec_id,
                ..Default::default()
            }
            .write_to_bytes()
            .context(|| "encode process details".into())?,
            ..Default::default()
        }),
    };
    Ok(ProcessInfo {
        pid,
        info: info.into(),
        ..Default::default()
    })
}
