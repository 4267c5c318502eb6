//! Stop, start and restart in place, and those who watch.

use super::*;

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
