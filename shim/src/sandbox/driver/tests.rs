//! The driver over a scripted backend: order of effects, events and answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_fake::{Fake, Reply as FakeReply};
use dyad_runtime_handler::migration::MigrationParameters;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::config::Config;
use crate::fence::Tombstones;
use crate::migration::{ContainerState, Outcome, PodState};
use crate::sandbox::pod::Operation;
use crate::sandbox::state::TaskStatus;
use crate::sandbox::{CreateRequest, ExecRequest, Sandbox};
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
            checkpoint: None,
            id: id.into(),
            bundle,
            rootfs: Vec::new(),
            stdio: StdioUris::default(),
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
            TaskEvent::Checkpointed { container, .. } => format!("checkpointed {container}"),
            TaskEvent::OutOfMemory { container } => format!("oom {container}"),
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

#[tokio::test]
async fn a_life_is_told_in_order_and_leaves_nothing() {
    let mut pod = TestPod::new(Kind::Container);
    let init = || ProcessId::init("pod");
    pod.create("pod", "sandbox").await.unwrap();
    assert_eq!(pod.status("pod").await, TaskStatus::Created);
    assert!(launch_file(&pod.bundle("pod")).exists());
    let waiting = tokio::spawn({
        let sandbox = pod.sandbox.clone();
        async move { sandbox.wait(ProcessId::init("pod")).await }
    });
    let pid = pod.sandbox.run(init()).await.unwrap();
    assert_eq!(pod.sandbox.state(init()).await.unwrap().pid, pid);
    pod.sandbox
        .signal(init(), libc::SIGKILL, false)
        .await
        .unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().status, 137);
    assert_eq!(pod.status("pod").await, TaskStatus::Stopped);
    let gone = pod.sandbox.delete(init()).await.unwrap();
    assert_eq!((gone.pid, gone.exit.status), (pid, 137));
    assert!(!launch_file(&pod.bundle("pod")).exists());
    pod.expect_events(&[
        "create pod",
        "start pod",
        "exit container pod 137",
        "delete pod",
    ])
    .await;
    assert!(matches!(
        pod.sandbox.state(init()).await,
        Err(Error::NotFound(_))
    ));
    pod.sandbox.shutdown().await.unwrap();
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn a_process_that_dies_at_once_is_told_to_have_started_first() {
    let mut pod = TestPod::new(Kind::Container);
    pod.create("pod", "sandbox").await.unwrap();
    let end = pod.fake.hold("start");
    let (started, ()) = tokio::join!(pod.sandbox.run(ProcessId::init("pod")), async {
        pod.fake.called("start pod").await;
        pod.fake.event(Event::Exited {
            process: ProcessId::init("pod"),
            exit: Exit {
                status: 3,
                at: SystemTime::now(),
            },
        });
        // Reads are answered in between.
        assert_eq!(pod.status("pod").await, TaskStatus::Created);
        end.send(Ok(())).unwrap();
    });
    started.unwrap();
    pod.expect_events(&["create pod", "start pod", "exit container pod 3"])
        .await;
    assert_eq!(pod.status("pod").await, TaskStatus::Stopped);
}

#[tokio::test]
async fn a_slow_create_blocks_no_read_and_no_other_container() {
    let pod = TestPod::running(Kind::Container).await;
    let end = pod.fake.hold("create");
    let slow = tokio::spawn({
        let sandbox = pod.sandbox.clone();
        let request = pod.request("slow", "container");
        async move { sandbox.create(request).await }
    });
    pod.fake.called("create slow").await;
    assert_eq!(pod.status("c").await, TaskStatus::Running);
    assert!(matches!(
        pod.sandbox.state(ProcessId::init("slow")).await,
        Err(Error::NotFound(_))
    ));
    pod.create("quick", "container").await.unwrap();
    assert!(matches!(
        pod.create("slow", "container").await,
        Err(Error::AlreadyExists(_))
    ));
    end.send(Ok(())).unwrap();
    slow.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_no_task_and_no_record() {
    let pod = TestPod::new(Kind::Container);
    pod.fake.next(
        "create",
        FakeReply::Fail(Error::InvalidArgument("hostPID".into())),
    );
    let error = pod.create("pod", "sandbox").await.unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    assert!(!launch_file(&pod.bundle("pod")).exists());
    // The same id may be tried again.
    pod.create("pod", "sandbox").await.unwrap();
}

#[tokio::test]
async fn a_failed_start_can_only_be_deleted() {
    let mut pod = TestPod::new(Kind::Container);
    pod.create("pod", "sandbox").await.unwrap();
    pod.fake.next(
        "start",
        FakeReply::Fail(Error::NotFound("no such program".into())),
    );
    pod.sandbox.run(ProcessId::init("pod")).await.unwrap_err();
    assert_eq!(pod.status("pod").await, TaskStatus::Stopped);
    let again = pod.sandbox.run(ProcessId::init("pod")).await.unwrap_err();
    assert!(again.to_string().contains("can only be deleted"), "{again}");
    pod.sandbox.delete(ProcessId::init("pod")).await.unwrap();
    pod.expect_events(&["create pod", "delete pod"]).await;
}

#[tokio::test]
async fn a_container_needs_its_running_pod() {
    let pod = TestPod::new(Kind::Container);
    let error = pod.create("c", "container").await.unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    pod.create("pod", "sandbox").await.unwrap();
    let error = pod.create("c", "container").await.unwrap_err();
    assert!(
        error.to_string().contains("has not been started"),
        "{error}"
    );
}

#[tokio::test]
async fn an_exec_lives_beside_init() {
    let mut pod = TestPod::running(Kind::Container).await;
    let exec = || ProcessId::exec("c", "e");
    pod.sandbox
        .add_exec("c".into(), exec_request("e"))
        .await
        .unwrap();
    assert!(matches!(
        pod.sandbox.add_exec("c".into(), exec_request("e")).await,
        Err(Error::AlreadyExists(_))
    ));
    assert!(matches!(
        pod.sandbox.signal(exec(), 15, false).await,
        Err(Error::FailedPrecondition(_))
    ));
    pod.sandbox.run(exec()).await.unwrap();
    assert!(matches!(
        pod.sandbox.delete(exec()).await,
        Err(Error::FailedPrecondition(_))
    ));
    assert!(pod.fake.exit(&exec(), 7));
    assert_eq!(pod.sandbox.wait(exec()).await.unwrap().status, 7);
    assert_eq!(pod.sandbox.delete(exec()).await.unwrap().exit.status, 7);
    for _ in 0..4 {
        pod.next_event().await;
    }
    pod.expect_events(&[
        "exec-added c/e",
        "exec-started c/e",
        "exit exec e of container c 7",
    ])
    .await;
}

#[tokio::test]
async fn a_paused_container_refuses_execs_and_dies_when_killed() {
    let mut pod = TestPod::running(Kind::Container).await;
    pod.sandbox.pause("c".into()).await.unwrap();
    pod.sandbox.pause("c".into()).await.unwrap();
    assert_eq!(
        pod.status("c").await,
        TaskStatus::Running,
        "CRI must not see it"
    );
    let error = pod
        .sandbox
        .add_exec("c".into(), exec_request("e"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    pod.sandbox
        .signal(ProcessId::init("c"), libc::SIGKILL, false)
        .await
        .unwrap();
    assert_eq!(
        pod.sandbox.wait(ProcessId::init("c")).await.unwrap().status,
        137
    );
    for _ in 0..4 {
        pod.next_event().await;
    }
    pod.expect_events(&["paused c", "resumed c", "exit container c 137"])
        .await;
    let pauses = pod
        .fake
        .calls()
        .iter()
        .filter(|call| *call == "pause c")
        .count();
    assert_eq!(pauses, 1, "asked twice, done once");
}

#[tokio::test]
async fn what_holds_for_the_machine_holds_for_its_containers() {
    let mut pod = TestPod::running(Kind::Machine).await;
    pod.fake.event(Event::Machine(MachineEvent::Suspended));
    for _ in 0..4 {
        pod.next_event().await;
    }
    assert_eq!(pod.next_event().await, "paused pod");
    let error = pod
        .sandbox
        .add_exec("c".into(), exec_request("e"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("resume it first"), "{error}");
    // The machine is destroyed: its containers are over too.
    assert!(pod.fake.exit(&ProcessId::init("pod"), 137));
    pod.expect_events(&["exit container pod 137", "exit container c 137"])
        .await;
    assert_eq!(
        pod.sandbox.wait(ProcessId::init("c")).await.unwrap().status,
        137
    );
}

#[tokio::test]
async fn an_out_of_memory_kill_is_told() {
    let mut pod = TestPod::running(Kind::Container).await;
    pod.fake.event(Event::OutOfMemory {
        container: "c".into(),
    });
    for _ in 0..4 {
        pod.next_event().await;
    }
    assert_eq!(pod.next_event().await, "oom c");
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container() {
    let pod = TestPod::running(Kind::Container).await;
    pod.sandbox.shutdown().await.unwrap();
    assert_eq!(pod.status("c").await, TaskStatus::Running);
    for id in ["c", "pod"] {
        pod.sandbox
            .signal(ProcessId::init(id), libc::SIGKILL, true)
            .await
            .unwrap();
        pod.sandbox.wait(ProcessId::init(id)).await.unwrap();
        pod.sandbox.delete(ProcessId::init(id)).await.unwrap();
    }
    pod.sandbox.shutdown().await.unwrap();
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn a_container_that_outlives_its_pods_task_is_the_last() {
    let pod = TestPod::running(Kind::Container).await;
    for id in ["c", "pod"] {
        pod.sandbox
            .signal(ProcessId::init(id), libc::SIGKILL, true)
            .await
            .unwrap();
        pod.sandbox.wait(ProcessId::init(id)).await.unwrap();
    }
    // As containerd 2.x does where both end at once: it asks after the pod's delete alone.
    pod.sandbox.delete(ProcessId::init("pod")).await.unwrap();
    pod.sandbox.shutdown().await.unwrap();
    pod.sandbox.delete(ProcessId::init("c")).await.unwrap();
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn the_record_says_what_is_there() {
    let pod = TestPod::running(Kind::Container).await;
    let dir = pod.dir.path().join("state/k8s.io/pod");
    let record::Found::Record(found) = record::read(&dir).unwrap() else {
        panic!("no record");
    };
    let states: Vec<_> = found
        .containers
        .iter()
        .map(|container| (container.id.as_str(), container.state.as_str()))
        .collect();
    assert_eq!(states, [("c", "running"), ("pod", "running")]);
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

#[tokio::test]
async fn a_container_stopped_in_place_stays_for_containerd_and_starts_again() {
    let mut pod = TestPod::running(Kind::Container).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    for _ in 0..2 {
        pod.operate(Operation::Stop { grace: GRACE }, "")
            .await
            .unwrap();
    }
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "stopped"), ("pod", "running")])
    );
    assert_eq!(
        pod.status("c").await,
        TaskStatus::Running,
        "CRI must not see it"
    );
    let pids = pod.sandbox.pids("c".into()).await.unwrap();
    assert_eq!(
        pids,
        [(std::process::id(), None)],
        "it must not look leaked"
    );
    let error = pod
        .sandbox
        .add_exec("c".into(), exec_request("e"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("start it first"), "{error}");
    pod.no_event();

    for _ in 0..2 {
        pod.operate(Operation::Start, "").await.unwrap();
    }
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
    pod.operate(
        Operation::Restart {
            force: false,
            grace: GRACE,
        },
        "c",
    )
    .await
    .unwrap();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
    let view = pod.sandbox.view().await.unwrap();
    assert_eq!(view.tasks[0].starts, 2);
    pod.no_event();
    let calls = pod.fake.calls();
    let of = |name: &str| calls.iter().filter(|call| *call == name).count();
    assert_eq!((of("stop c"), of("start c")), (2, 3));
}

#[tokio::test]
async fn the_usage_of_what_is_paused_or_kept_is_told_without_asking_its_machine() {
    let pod = TestPod::running(Kind::Machine).await;
    let stats = || pod.sandbox.stats("c".into());
    let running = stats().await.unwrap();
    assert!(running.cpu.usage_ns > 0 && running.memory.usage > 0);
    let reads = || {
        let calls = pod.fake.calls();
        calls.iter().filter(|call| *call == "stats c").count()
    };
    assert_eq!(reads(), 1);

    pod.operate(Operation::Pause, "").await.unwrap();
    assert_eq!(stats().await.unwrap(), running, "it stands still");
    pod.operate(Operation::Resume, "").await.unwrap();
    pod.operate(Operation::Stop { grace: GRACE }, "")
        .await
        .unwrap();
    let kept = stats().await.unwrap();
    assert_eq!((kept.cpu, kept.memory.usage), (running.cpu, 0));
    assert_eq!(reads(), 1);

    pod.operate(Operation::Start, "").await.unwrap();
    stats().await.unwrap();
    assert_eq!(reads(), 2);
}

#[tokio::test]
async fn what_is_kept_stopped_ends_when_containerd_kills_it() {
    let mut pod = TestPod::running(Kind::Container).await;
    pod.operate(Operation::Stop { grace: GRACE }, "c")
        .await
        .unwrap();
    pod.sandbox
        .signal(ProcessId::init("c"), libc::SIGTERM, false)
        .await
        .unwrap();
    assert_eq!(
        pod.sandbox.wait(ProcessId::init("c")).await.unwrap().status,
        143
    );
    pod.sandbox.delete(ProcessId::init("c")).await.unwrap();
    for _ in 0..4 {
        pod.next_event().await;
    }
    pod.expect_events(&["exit container c 143", "delete c"])
        .await;
}

#[tokio::test]
async fn a_kill_during_a_long_stop_ends_it_for_good() {
    let pod = TestPod::running(Kind::Container).await;
    let end = pod.fake.hold("stop");
    let stopping = tokio::spawn({
        let sandbox = pod.sandbox.clone();
        async move { sandbox.operate(Operation::Stop { grace: GRACE }, "c").await }
    });
    pod.fake.called("stop c").await;
    assert_eq!(pod.states().await[0].1, "stopping");
    pod.sandbox
        .signal(ProcessId::init("c"), libc::SIGTERM, false)
        .await
        .unwrap();
    assert_eq!(
        pod.sandbox.wait(ProcessId::init("c")).await.unwrap().status,
        137
    );
    end.send(Ok(())).unwrap();
    let error = stopping.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("was killed while"), "{error}");
    assert_eq!(pod.states().await[0].1, "exited");
}

#[tokio::test]
async fn a_stop_that_fails_leaves_it_running() {
    let pod = TestPod::running(Kind::Container).await;
    pod.fake.next(
        "stop",
        FakeReply::Fail(Error::DeadlineExceeded("stop c".into())),
    );
    pod.operate(Operation::Stop { grace: GRACE }, "c")
        .await
        .unwrap_err();
    assert_eq!(pod.states().await[0].1, "running");
    pod.operate(Operation::Stop { grace: GRACE }, "c")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_start_in_place_that_fails_leaves_it_stopped() {
    let pod = TestPod::running(Kind::Container).await;
    pod.operate(Operation::Stop { grace: GRACE }, "c")
        .await
        .unwrap();
    pod.fake.next(
        "start",
        FakeReply::Fail(Error::FailedPrecondition("no memory".into())),
    );
    pod.operate(Operation::Start, "c").await.unwrap_err();
    assert_eq!(pod.states().await[0].1, "stopped");
    pod.operate(Operation::Start, "c").await.unwrap();
    assert_eq!(pod.states().await[0].1, "running");
}

#[tokio::test]
async fn a_stopped_machine_keeps_its_containers_and_brings_them_back() {
    let mut pod = TestPod::running(Kind::Machine).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    pod.operate(Operation::Stop { grace: GRACE }, "")
        .await
        .unwrap();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "stopped"), ("pod", "stopped")])
    );
    pod.no_event();
    let error = pod.operate(Operation::Start, "c").await.unwrap_err();
    assert!(error.to_string().contains("start the pod"), "{error}");
    pod.operate(Operation::Start, "").await.unwrap();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
    pod.operate(
        Operation::Restart {
            force: true,
            grace: GRACE,
        },
        "",
    )
    .await
    .unwrap();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
    pod.no_event();
}

#[tokio::test]
async fn a_restarted_machine_reboots_and_its_containers_run_again() {
    let mut pod = TestPod::running(Kind::Machine).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    for (force, call) in [(false, "reboot pod"), (true, "reboot pod force")] {
        let restart = Operation::Restart {
            force,
            grace: GRACE,
        };
        pod.operate(restart, "").await.unwrap();
        assert!(pod.fake.calls().iter().any(|made| made == call), "{call}");
        assert_eq!(
            pod.states().await,
            pairs(&[("c", "running"), ("pod", "running")])
        );
    }
    assert!(!pod.fake.calls().iter().any(|made| made == "stop pod"));
    let view = pod.sandbox.view().await.unwrap();
    let starts: Vec<u32> = view.tasks.iter().map(|task| task.starts).collect();
    assert_eq!(starts, [2, 2]);
    pod.no_event();
}

#[tokio::test]
async fn a_machine_that_cannot_reboot_runs_on_and_one_that_ends_at_it_is_kept() {
    let mut pod = TestPod::running(Kind::Machine).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    let restart = Operation::Restart {
        force: false,
        grace: GRACE,
    };
    pod.fake.next(
        "reboot",
        FakeReply::Fail(Error::FailedPrecondition("no".into())),
    );
    let forced = Operation::Restart {
        force: true,
        grace: GRACE,
    };
    pod.operate(forced, "").await.unwrap_err();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
    let held = pod.fake.hold("reboot");
    let sandbox = pod.sandbox.clone();
    let asked = tokio::spawn(async move { sandbox.operate(restart, "").await.map(drop) });
    pod.fake.called("reboot pod").await;
    pod.fake.exit(&ProcessId::init("pod"), 255);
    let error = Error::FailedPrecondition("it does not boot".into());
    held.send(Err(error)).unwrap();
    let error = asked.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("does not boot"), "{error}");
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "stopped"), ("pod", "stopped")])
    );
    pod.no_event();
    pod.operate(Operation::Start, "").await.unwrap();
    assert_eq!(
        pod.states().await,
        pairs(&[("c", "running"), ("pod", "running")])
    );
}

#[tokio::test]
async fn a_machine_killed_while_it_reboots_ends_for_good() {
    let mut pod = TestPod::running(Kind::Machine).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    let held = pod.fake.hold("reboot");
    let sandbox = pod.sandbox.clone();
    let restart = Operation::Restart {
        force: true,
        grace: GRACE,
    };
    let asked = tokio::spawn(async move { sandbox.operate(restart, "").await.map(drop) });
    pod.fake.called("reboot pod force").await;
    pod.sandbox
        .signal(ProcessId::init("pod"), libc::SIGKILL, false)
        .await
        .unwrap();
    held.send(Err(Error::FailedPrecondition("off".into())))
        .unwrap();
    let error = asked.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("killed"), "{error}");
    pod.expect_events(&["exit container pod 137", "exit container c 137"])
        .await;
}

#[tokio::test]
async fn a_stopped_machine_that_is_killed_ends_with_all_in_it() {
    let mut pod = TestPod::running(Kind::Machine).await;
    pod.operate(Operation::Stop { grace: GRACE }, "")
        .await
        .unwrap();
    pod.sandbox
        .signal(ProcessId::init("pod"), libc::SIGKILL, false)
        .await
        .unwrap();
    for _ in 0..4 {
        pod.next_event().await;
    }
    pod.expect_events(&["exit container pod 137", "exit container c 137"])
        .await;
}

#[tokio::test]
async fn watchers_are_told_what_is_and_then_what_changes() {
    let pod = TestPod::running(Kind::Container).await;
    let mut watch = pod.sandbox.watch().unwrap();
    for id in ["c", "pod"] {
        let now = watch.recv().await.unwrap();
        assert_eq!((now.task.id.as_str(), &now.from), (id, &State::Running));
    }
    pod.operate(Operation::Pause, "").await.unwrap();
    let change = watch.recv().await.unwrap();
    assert_eq!(
        (change.from, change.task.state),
        (State::Running, State::Paused)
    );
    pod.operate(Operation::Resume, "").await.unwrap();
    let next = watch.recv().await.unwrap();
    assert_eq!(next.sequence, change.sequence + 1);
}

#[tokio::test]
async fn requests_that_cannot_be_are_refused_with_the_way_out() {
    let pod = TestPod::running(Kind::Container).await;
    let day = Operation::Stop {
        grace: Duration::from_secs(25 * 3600),
    };
    for (operation, target, part) in [
        (day, "c", "at most 86400 s"),
        (Operation::Start, "nobody", "nobody not found"),
    ] {
        let error = pod
            .operate(operation, target)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(pod.fake.exit(&ProcessId::init("c"), 0));
    pod.sandbox.wait(ProcessId::init("c")).await.unwrap();
    let error = pod
        .operate(Operation::Pause, "")
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("no container of it is running"), "{error}");
}

/// A pod that needs no mount: all in the host's namespaces.
fn bare(pod: &TestPod, id: &str) -> crate::sandbox::SandboxRequest {
    let bundle = pod.bundle(id);
    std::fs::create_dir_all(&bundle).unwrap();
    crate::sandbox::SandboxRequest {
        id: id.into(),
        bundle,
        pod: crate::pod_spec::PodConfig {
            name: "web".into(),
            shares: crate::pod_spec::HostNamespaces {
                network: true,
                pid: true,
                ipc: true,
            },
            ..Default::default()
        },
    }
}

#[tokio::test]
async fn a_pod_without_a_pause_container_lives_like_one_with() {
    let mut pod = TestPod::new(Kind::Container);
    assert!(matches!(
        pod.sandbox.view_sandbox("pod".into()).await,
        Err(Error::NotFound(_))
    ));
    pod.sandbox.create_sandbox(bare(&pod, "pod")).await.unwrap();
    let again = pod.sandbox.create_sandbox(bare(&pod, "pod")).await;
    assert!(matches!(again, Err(Error::AlreadyExists(_))));
    assert!(!pod.sandbox.view_sandbox("pod".into()).await.unwrap().ready);
    let pid = pod.sandbox.run(ProcessId::init("pod")).await.unwrap();
    let view = pod.sandbox.view_sandbox("pod".into()).await.unwrap();
    assert_eq!((view.ready, view.pid), (true, pid));
    let as_task = pod.sandbox.state(ProcessId::init("pod")).await;
    assert!(matches!(as_task, Err(Error::NotFound(_))));
    assert_eq!(pod.sandbox.view().await.unwrap().info.name, "web");

    pod.create("c", "container").await.unwrap();
    let config = std::fs::read_to_string(pod.bundle("c").join("config.json")).unwrap();
    assert!(config.contains("/pod-files/hosts"), "{config}");
    pod.sandbox.run(ProcessId::init("c")).await.unwrap();
    // To containerd's subscribers there is one task.
    pod.expect_events(&["create c", "start c"]).await;

    pod.sandbox.kill("c").await.unwrap();
    pod.sandbox.kill("pod").await.unwrap();
    pod.sandbox.kill("pod").await.unwrap();
    let view = pod.sandbox.view_sandbox("pod".into()).await.unwrap();
    assert_eq!(view.exit.unwrap().status, 137);
    assert!(!view.ready);
    pod.sandbox.close().await.unwrap();
    pod.expect_events(&["exit container c 137", "delete c"])
        .await;
    assert!(!launch_file(&pod.bundle("pod")).exists());
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn closing_a_pod_ends_whatever_is_left_of_it() {
    let pod = TestPod::new(Kind::Container);
    pod.sandbox.create_sandbox(bare(&pod, "pod")).await.unwrap();
    pod.sandbox.run(ProcessId::init("pod")).await.unwrap();
    for id in ["paused", "kept", "exited", "created"] {
        pod.create(id, "container").await.unwrap();
        if id != "created" {
            pod.sandbox.run(ProcessId::init(id)).await.unwrap();
        }
    }
    pod.sandbox.pause("paused".into()).await.unwrap();
    let grace = Duration::ZERO;
    let stop = Operation::Stop { grace };
    pod.sandbox.operate(stop, "kept").await.unwrap();
    pod.fake.exit(&ProcessId::init("exited"), 3);
    pod.sandbox.wait(ProcessId::init("exited")).await.unwrap();
    pod.sandbox.close().await.unwrap();
    assert!(pod.fake.containers().is_empty());
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn closing_what_could_not_be_made_ends_the_server() {
    let pod = TestPod::new(Kind::Machine);
    let refusal = FakeReply::Fail(Error::InvalidArgument("hostNetwork".into()));
    pod.fake.next("create", refusal);
    let created = pod.sandbox.create_sandbox(bare(&pod, "pod")).await;
    assert!(matches!(created, Err(Error::InvalidArgument(_))));
    pod.sandbox.close().await.unwrap();
    pod.driver.await.unwrap();
}

#[tokio::test]
async fn a_sandbox_of_another_id_is_refused_by_name() {
    let pod = TestPod::new(Kind::Container);
    let error = pod.sandbox.create_sandbox(bare(&pod, "x")).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("sandbox_id: \"x\""), "{error}");
}

#[tokio::test]
async fn an_absurd_grace_is_refused_with_the_bound_and_none_is_taken() {
    let pod = TestPod::running(Kind::Container).await;
    let stop = |grace| Operation::Stop { grace };
    let absurd = Duration::from_secs(24 * 3600 + 1);
    let error = pod.sandbox.operate(stop(absurd), "c").await.unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    assert!(error.to_string().contains("24 h"), "{error}");
    pod.sandbox
        .operate(stop(Duration::ZERO), "c")
        .await
        .unwrap();
    let view = pod.sandbox.view().await.unwrap();
    let task = view.tasks.iter().find(|task| task.id == "c").unwrap();
    assert_eq!(task.state, State::Stopped);
}

// --- Migration -----------------------------------------------------------------------

fn to_node2() -> MigrationParameters {
    MigrationParameters {
        destination: "qemu+tls://node2/system".into(),
        ..MigrationParameters::default()
    }
}

impl TestPod {
    async fn true_states(&self) -> Vec<State> {
        let view = self.sandbox.view().await.unwrap();
        view.tasks.into_iter().map(|task| task.state).collect()
    }

    fn fence(&self) -> Tombstones {
        Tombstones::new(&self.dir.path().join("cache"))
    }

    fn is_fenced(&self) -> bool {
        self.fence().find("k8s.io", "pod", "").is_some()
    }

    async fn migration_ended(&self) -> Outcome {
        let mut views = self.sandbox.migration().await.unwrap();
        let ended = views.wait_for(|view| view.outcome.is_some()).await.unwrap();
        ended.outcome.clone().unwrap()
    }
}

#[tokio::test]
async fn a_pod_that_moved_ends_with_zero_and_must_not_come_back() {
    let pod = TestPod::running(Kind::Machine).await;
    let send = pod.fake.hold("send");
    assert_eq!(pod.sandbox.migrate(to_node2()).await.unwrap(), 1);
    assert!(pod.is_fenced(), "the fence is up before it is given away");
    assert_eq!(pod.true_states().await, [State::Running, State::Migrating]);
    // At once, and not after the migration.
    for refused in [
        pod.sandbox.migrate(to_node2()).await.map(drop),
        pod.sandbox.pause("pod".into()).await,
        pod.sandbox.add_exec("c".into(), exec_request("e")).await,
    ] {
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("migrating"), "{text}");
    }
    send.send(Ok(())).unwrap();
    for id in ["c", "pod"] {
        let exit = pod.sandbox.wait(ProcessId::init(id)).await.unwrap();
        assert_eq!(exit.status, 0, "{id}");
    }
    assert_eq!(pod.migration_ended().await, Outcome::Completed);
    assert_eq!(pod.true_states().await, [State::Migrated, State::Migrated]);
    pod.sandbox.delete(ProcessId::init("c")).await.unwrap();
    pod.sandbox.delete(ProcessId::init("pod")).await.unwrap();
    assert!(pod.is_fenced());
    let again = pod.create("pod", "sandbox").await.unwrap_err().to_string();
    assert!(again.contains("must not run here again"), "{again}");
}

#[tokio::test]
async fn a_migration_that_fails_leaves_the_pod_as_it_was() {
    let pod = TestPod::running(Kind::Container).await;
    let error = Error::Unavailable("the network is down".into(), None);
    pod.fake.next("send", FakeReply::Fail(error));
    pod.sandbox.migrate(to_node2()).await.unwrap();
    let Outcome::Abandoned(reason) = pod.migration_ended().await else {
        panic!("not given up");
    };
    assert!(reason.contains("network is down"), "{reason}");
    assert_eq!(pod.true_states().await, [State::Running, State::Running]);
    assert!(!pod.is_fenced());

    let error = Error::FailedPrecondition("no target waits".into());
    pod.fake.next("check", FakeReply::Fail(error));
    let refused = pod.sandbox.migrate(to_node2()).await.unwrap_err();
    assert!(refused.to_string().contains("no target waits"));
    assert!(!pod.is_fenced());
    // A pod with a kept container does not move.
    let grace = Duration::ZERO;
    pod.sandbox
        .operate(Operation::Stop { grace }, "c")
        .await
        .unwrap();
    let refused = pod.sandbox.migrate(to_node2()).await.unwrap_err();
    assert!(refused.to_string().contains("stopped and kept"));
}

#[tokio::test]
async fn a_kill_cancels_the_migration_and_comes_through() {
    let pod = TestPod::running(Kind::Machine).await;
    let send = pod.fake.hold("send");
    pod.sandbox.migrate(to_node2()).await.unwrap();
    let sandbox = pod.sandbox.clone();
    let killed = tokio::spawn(async move {
        sandbox
            .signal(ProcessId::init("pod"), libc::SIGKILL, false)
            .await
    });
    pod.fake.called("cancel ").await;
    send.send(Err(Error::Unavailable("aborted".into(), None)))
        .unwrap();
    killed.await.unwrap().unwrap();
    let exit = pod.sandbox.wait(ProcessId::init("pod")).await.unwrap();
    assert_eq!(exit.status, 137);
    assert!(!pod.is_fenced());
}

#[tokio::test]
async fn a_target_waits_and_becomes_the_pod() {
    let mut pod = TestPod::new(Kind::Machine);
    let came = pod.fake.hold("receive");
    pod.wait_for_source(&[]).await;
    pod.create("c", "container").await.unwrap();
    pod.sandbox.run(ProcessId::init("c")).await.unwrap();
    assert_eq!(pod.true_states().await, [State::Incoming, State::Incoming]);
    let exec = pod.sandbox.add_exec("c".into(), exec_request("e")).await;
    assert!(exec.unwrap_err().to_string().contains("waits for its"));

    pod.fake.brings(
        PodState::new(vec![ContainerState {
            name: String::new(),
            starts: 2,
        }])
        .encode(),
    );
    came.send(Ok(())).unwrap();
    let mut transitions = pod.sandbox.watch().unwrap();
    while pod.true_states().await != [State::Running, State::Running] {
        transitions.recv().await.unwrap();
    }
    assert_eq!(pod.sandbox.view().await.unwrap().tasks[0].starts, 2);
    pod.expect_events(&["create pod", "start pod", "create c", "start c"])
        .await;
}

#[tokio::test]
async fn an_init_container_of_a_target_ends_without_running() {
    let mut pod = TestPod::new(Kind::Machine);
    let _came = pod.fake.hold("receive");
    pod.wait_for_source(&[("dyad.dev/migration-init-containers", "load")])
        .await;
    let named = |id, name| {
        pod.annotated(
            id,
            "container",
            &[("io.kubernetes.cri.container-name", name)],
        )
    };
    for (id, name) in [("i", "load"), ("c", "app")] {
        pod.sandbox.create(named(id, name)).await.unwrap();
        pod.sandbox.run(ProcessId::init(id)).await.unwrap();
    }
    let exit = pod.sandbox.wait(ProcessId::init("i")).await.unwrap();
    assert_eq!(exit.status, 0);
    assert_eq!(
        pod.true_states().await,
        [State::Incoming, State::Exited(0), State::Incoming]
    );
    pod.sandbox.delete(ProcessId::init("i")).await.unwrap();
    pod.expect_events(&[
        "create pod",
        "start pod",
        "create i",
        "start i",
        "exit container i 0",
        "create c",
        "start c",
        "delete i",
    ])
    .await;
    assert!(!pod.fake.calls().contains(&"start i".to_owned()));
}

#[tokio::test]
async fn a_target_whose_source_fails_has_failed() {
    let pod = TestPod::new(Kind::Machine);
    let came = pod.fake.hold("receive");
    pod.wait_for_source(&[]).await;
    came.send(Err(Error::Unavailable("its source gave up".into(), None)))
        .unwrap();
    let exit = pod.sandbox.wait(ProcessId::init("pod")).await.unwrap();
    assert_eq!(exit.status, 255);
    let states = pod.true_states().await;
    assert!(matches!(&states[..], [State::Failed(why)] if why.contains("gave up")));
    pod.sandbox.delete(ProcessId::init("pod")).await.unwrap();
}
