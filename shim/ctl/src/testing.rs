//! A state folder and fake shims in it, served by ttrpc in this process.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use dyad_api::lifecycle::{
    ConsoleData, PauseRequest, RestartRequest, ResumeRequest, StartRequest, StateRequest,
    StateResponse, StopRequest, Task, TaskState, Transition, WatchRequest,
};
use dyad_api::lifecycle_ttrpc::{Lifecycle, create_lifecycle};
use dyad_api::protobuf::MessageField;
use dyad_api::ttrpc::r#async::{Server, ServerStream, ServerStreamSender, TtrpcContext};
use dyad_api::ttrpc::{self, Code, get_status};

/// A state folder with a short path.
pub struct State(tempfile::TempDir);

impl State {
    pub fn new() -> Self {
        Self(
            tempfile::Builder::new()
                .prefix("dyadctl")
                .tempdir_in("/tmp")
                .unwrap(),
        )
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The folder of a sandbox, made.
    pub fn place(&self, namespace: &str, sandbox_id: &str) -> PathBuf {
        let dir = self.path().join(namespace).join(sandbox_id);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub fn write_address(&self, place: &Path, socket: &Path) {
        std::fs::write(
            place.join("address"),
            format!("unix://{}\n", socket.display()),
        )
        .unwrap();
    }
}

/// What a shim of a running pod with one container, `app`, says of it.
pub fn state_of(sandbox_id: &str, pod_name: &str) -> StateResponse {
    let task = |id: &str, name: &str, sandbox| Task {
        container_id: id.into(),
        name: name.into(),
        sandbox,
        state: TaskState::RUNNING.into(),
        pid: 42,
        since_unix_ns: 1,
        ..Task::default()
    };
    StateResponse {
        sandbox_id: sandbox_id.into(),
        pod_namespace: "default".into(),
        pod_name: pod_name.into(),
        pod_uid: format!("uid-{sandbox_id}"),
        kind: "container".into(),
        tasks: vec![
            task(sandbox_id, "", true),
            task(&format!("c-{sandbox_id}"), "app", false),
        ],
        shim_pid: std::process::id(),
        shim_version: "0.1.0".into(),
        ..StateResponse::default()
    }
}

/// A shim that does what it is asked to its own words only. `stop` of a paused pod is
/// refused; its console echoes and, typed `end`, ends.
pub struct FakeShim {
    pub socket: PathBuf,
    /// The changes asked for, in order: `stop c-1 500`.
    pub calls: Arc<Mutex<Vec<String>>>,
    server: Server,
}

struct Service {
    state: Mutex<StateResponse>,
    calls: Arc<Mutex<Vec<String>>>,
    console_taken: Mutex<bool>,
}

impl FakeShim {
    pub async fn serve(state: &State, namespace: &str, mut says: StateResponse) -> Self {
        says.containerd_namespace = namespace.into();
        let sandbox_id = says.sandbox_id.clone();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let service = create_lifecycle(Arc::new(Service {
            state: Mutex::new(says),
            calls: Arc::clone(&calls),
            console_taken: Mutex::new(false),
        }));
        Self::listen(state, namespace, &sandbox_id, calls, |server| {
            server.register_service(service)
        })
        .await
    }

    /// A ttrpc server without any service.
    pub async fn serve_nothing(state: &State, namespace: &str, sandbox_id: &str) -> Self {
        Self::listen(state, namespace, sandbox_id, Arc::default(), |server| {
            server
        })
        .await
    }

    async fn listen(
        state: &State,
        namespace: &str,
        sandbox_id: &str,
        calls: Arc<Mutex<Vec<String>>>,
        register: impl FnOnce(Server) -> Server,
    ) -> Self {
        let place = state.place(namespace, sandbox_id);
        let socket = place.join("s");
        let server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap();
        let mut server = register(server);
        server.start().await.unwrap();
        state.write_address(&place, &socket);
        Self {
            socket,
            calls,
            server,
        }
    }

    /// Ends it as a crash would: no file is removed.
    pub async fn end(mut self) {
        self.server.stop_listen().await;
        drop(self.server);
    }
}

impl Service {
    fn change(
        &self,
        call: &str,
        target: MessageField<dyad_api::lifecycle::Target>,
        to: TaskState,
    ) -> ttrpc::Result<StateResponse> {
        let id = target.container_id.clone();
        self.calls
            .lock()
            .unwrap()
            .push(format!("{call} {id}").trim().to_owned());
        let mut state = self.state.lock().unwrap();
        let tasks = state.tasks.iter_mut();
        let mut tasks: Vec<_> = tasks
            .filter(|t| id.is_empty() || t.container_id == id)
            .collect();
        let paused = TaskState::PAUSED.into();
        if to == TaskState::STOPPED && tasks.iter().any(|task| task.state == paused) {
            let text = "the pod is paused; resume it first".to_owned();
            return Err(ttrpc::Error::RpcStatus(get_status(
                Code::FAILED_PRECONDITION,
                text,
            )));
        }
        for task in &mut tasks {
            task.state = to.into();
        }
        Ok(state.clone())
    }
}

#[async_trait]
impl Lifecycle for Service {
    async fn state(&self, _: &TtrpcContext, _: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.state.lock().unwrap().clone())
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        _: WatchRequest,
        to: ServerStreamSender<Transition>,
    ) -> ttrpc::Result<()> {
        let tasks = self.state.lock().unwrap().tasks.clone();
        for (sequence, task) in (1..).zip(tasks) {
            let transition = Transition {
                sequence,
                from: task.state,
                task: MessageField::some(task),
                ..Transition::default()
            };
            to.send(&transition).await?;
        }
        Ok(())
    }

    async fn pause(&self, _: &TtrpcContext, ask: PauseRequest) -> ttrpc::Result<StateResponse> {
        self.change("pause", ask.target, TaskState::PAUSED)
    }

    async fn resume(&self, _: &TtrpcContext, ask: ResumeRequest) -> ttrpc::Result<StateResponse> {
        self.change("resume", ask.target, TaskState::RUNNING)
    }

    async fn stop(&self, _: &TtrpcContext, ask: StopRequest) -> ttrpc::Result<StateResponse> {
        let call = format!("stop {:?}", ask.grace_ms);
        self.change(&call, ask.target, TaskState::STOPPED)
    }

    async fn start(&self, _: &TtrpcContext, ask: StartRequest) -> ttrpc::Result<StateResponse> {
        self.change("start", ask.target, TaskState::RUNNING)
    }

    async fn restart(&self, _: &TtrpcContext, ask: RestartRequest) -> ttrpc::Result<StateResponse> {
        let call = format!("restart {} {:?}", ask.force, ask.grace_ms);
        self.change(&call, ask.target, TaskState::RUNNING)
    }

    async fn console(
        &self,
        _: &TtrpcContext,
        stream: ServerStream<ConsoleData, ConsoleData>,
    ) -> ttrpc::Result<()> {
        if std::mem::replace(&mut *self.console_taken.lock().unwrap(), true) {
            let text = "another console is attached".to_owned();
            return Err(ttrpc::Error::RpcStatus(get_status(
                Code::FAILED_PRECONDITION,
                text,
            )));
        }
        let (to, mut from) = stream.split();
        while let Some(data) = from.recv().await? {
            if data.data == b"end" {
                break;
            }
            to.send(&data).await?;
        }
        *self.console_taken.lock().unwrap() = false;
        Ok(())
    }
}
