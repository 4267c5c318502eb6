//! Moving away, and being moved to.

use super::*;

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
