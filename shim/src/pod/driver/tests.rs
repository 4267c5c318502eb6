//! The driver over a scripted backend: order of effects, events and answers.

mod execs;
mod in_place;
mod life;
mod machine;
mod migration;
mod sandbox_api;

use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_fake::{Fake, Reply as FakeReply};
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::migration::MigrationParameters;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::config::Config;
use crate::fence::Tombstones;
use crate::migration::{ContainerState, Outcome, PodState};
use crate::pod::lifecycle::Operation;
use crate::pod::state::TaskStatus;
use crate::pod::{CreateRequest, ExecRequest, Sandbox};
use crate::stdio::StdioUris;

struct TestPod {
    dir: TempDir,
    sandbox: Sandbox,
    fake: Arc<Fake>,
    events: mpsc::UnboundedReceiver<TaskEvent>,
    driver: tokio::task::JoinHandle<()>,
}

impl TestPod {
    fn new(kind: Kind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            kind,
            state_dir: dir.path().join("state"),
            cache_dir: dir.path().join("cache"),
            annotations: crate::config::AnnotationsConfig {
                allow: vec![
                    "dyad.dev/migration-init-containers".into(),
                    "dyad.dev/migration-source".into(),
                ],
            },
            ..Config::default()
        };
        let launch = Launch::new(
            "k8s.io".into(),
            "pod".into(),
            "pod".into(),
            Role::Sandbox,
            dir.path().join("socket"),
            String::new(),
            (String::new(), String::new()),
            false,
            config,
        );
        let (sandbox, commands) = Sandbox::new();
        let (backend_events, seen) = mpsc::unbounded_channel();
        let fake = Fake::new(kind, backend_events);
        let (publisher, events) = mpsc::unbounded_channel();
        let driver = Driver::new(Pod { launch }, fake.handler(), commands, seen, publisher);
        Self {
            dir,
            sandbox,
            fake,
            events,
            driver: tokio::spawn(driver.run()),
        }
    }

    /// A pod whose sandbox and container `c` run.
    async fn running(kind: Kind) -> Self {
        let pod = Self::new(kind);
        pod.create("pod", "sandbox").await.unwrap();
        pod.sandbox.run(ProcessId::init("pod")).await.unwrap();
        pod.create("c", "container").await.unwrap();
        pod.sandbox.run(ProcessId::init("c")).await.unwrap();
        pod
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.dir.path().join(id)
    }

    fn request(&self, id: &str, kind: &str) -> CreateRequest {
        let bundle = self.bundle(id);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(
            bundle.join("config.json"),
            format!(
                r#"{{"ociVersion":"1.0.2","annotations":{{
                    "io.kubernetes.cri.container-type":"{kind}",
                    "io.kubernetes.cri.sandbox-id":"pod"}}}}"#
            ),
        )
        .unwrap();
        CreateRequest {
            id: id.into(),
            bundle,
            rootfs: Vec::new(),
            stdio: StdioUris::default(),
            checkpoint: None,
        }
    }

    /// What is to be created, with these annotations beside CRI's.
    fn annotated(&self, id: &str, kind: &str, annotations: &[(&str, &str)]) -> CreateRequest {
        let request = self.request(id, kind);
        let config = request.bundle.join("config.json");
        let mut text = std::fs::read_to_string(&config).unwrap();
        for (name, value) in annotations {
            let start = "\"annotations\":{";
            text = text.replacen(start, &format!("{start}\"{name}\":\"{value}\","), 1);
        }
        std::fs::write(config, text).unwrap();
        request
    }

    /// Makes it a pod that waits for its source.
    async fn wait_for_source(&self, annotations: &[(&str, &str)]) {
        let source = (
            "dyad.dev/migration-source",
            "11111111-2222-5333-8444-555555555555",
        );
        let annotations = [&[source], annotations].concat();
        let request = self.annotated("pod", "sandbox", &annotations);
        self.sandbox.create(request).await.unwrap();
        self.sandbox.run(ProcessId::init("pod")).await.unwrap();
    }

    async fn create(&self, id: &str, kind: &str) -> Result<u32> {
        self.sandbox.create(self.request(id, kind)).await
    }

    async fn status(&self, id: &str) -> TaskStatus {
        self.sandbox
            .state(ProcessId::init(id))
            .await
            .unwrap()
            .status
    }

    /// The next of containerd's events.
    async fn next_event(&mut self) -> String {
        loop {
            let event = timeout(Duration::from_secs(10), self.events.recv())
                .await
                .expect("an event in time")
                .expect("the driver runs");
            if !matches!(event, TaskEvent::Transition(_)) {
                return Self::event_text(event);
            }
        }
    }

    fn event_text(event: TaskEvent) -> String {
        match event {
            TaskEvent::Transition(transition) => format!("{transition:?}"),
            TaskEvent::Create { container, .. } => format!("create {container}"),
            TaskEvent::Start { container, .. } => format!("start {container}"),
            TaskEvent::Exit { process, exit, .. } => format!("exit {process} {}", exit.status),
            TaskEvent::Delete { container, .. } => format!("delete {container}"),
            TaskEvent::ExecAdded { container, exec } => format!("exec-added {container}/{exec}"),
            TaskEvent::ExecStarted {
                container, exec, ..
            } => {
                format!("exec-started {container}/{exec}")
            }
            TaskEvent::Paused { container } => format!("paused {container}"),
            TaskEvent::Resumed { container } => format!("resumed {container}"),
            TaskEvent::OutOfMemory { container } => format!("oom {container}"),
            TaskEvent::Checkpointed { container, .. } => format!("checkpointed {container}"),
        }
    }

    async fn expect_events(&mut self, expected: &[&str]) {
        for event in expected {
            assert_eq!(self.next_event().await, *event);
        }
    }
}

fn exec_request(id: &str) -> ExecRequest {
    ExecRequest {
        exec_id: id.into(),
        process: oci_spec::runtime::Process::default(),
        stdio: StdioUris::default(),
    }
}

fn launch_file(bundle: &Path) -> PathBuf {
    bundle.join("dyad.json")
}

const GRACE: Duration = Duration::from_secs(1);

impl TestPod {
    async fn states(&self) -> Vec<(String, &'static str)> {
        let view = self.sandbox.view().await.unwrap();
        view.tasks
            .iter()
            .map(|task| (task.id.clone(), state::outside(&task.state).name))
            .collect()
    }

    async fn operate(&self, operation: Operation, target: &str) -> Result<()> {
        self.sandbox.operate(operation, target).await.map(drop)
    }

    /// No event of containerd's is left.
    fn no_event(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            assert!(matches!(event, TaskEvent::Transition(_)), "{event:?}");
        }
    }
}

fn pairs(states: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
    states
        .iter()
        .map(|(id, state)| ((*id).to_owned(), *state))
        .collect()
}
