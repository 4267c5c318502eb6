//! What holds for a machine and what runs in it.

use super::*;

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
async fn a_pause_that_was_asked_for_is_told_so_though_libvirt_tells_of_it_first() {
    let pod = TestPod::running(Kind::Machine).await;
    let returns = pod.fake.hold("pause");
    let mut watch = pod.sandbox.watch().unwrap();
    let sandbox = pod.sandbox.clone();
    let asked = tokio::spawn(async move { sandbox.operate(Operation::Pause, "").await });
    pod.fake.called("pause pod").await;
    pod.fake.event(Event::Machine(MachineEvent::Suspended));
    let paused = loop {
        let told = watch.recv().await.unwrap();
        if told.task.state == State::Paused {
            break told;
        }
    };
    assert_eq!(paused.task.reason, "asked for");
    returns.send(Ok(())).unwrap();
    let view = asked.await.unwrap().unwrap();
    let reasons: Vec<&str> = view
        .tasks
        .iter()
        .filter(|task| task.is_sandbox)
        .map(|task| task.reason.as_str())
        .collect();
    assert_eq!(reasons, ["asked for"]);
}

#[tokio::test]
async fn a_usage_that_was_asked_for_while_its_machine_stopped_is_what_was_read_last() {
    let pod = TestPod::running(Kind::Machine).await;
    let running = pod.sandbox.stats("c".into()).await.unwrap();
    let read = pod.fake.hold("stats");
    let sandbox = pod.sandbox.clone();
    let asked = tokio::spawn(async move { sandbox.stats("c".into()).await });
    while pod
        .fake
        .calls()
        .iter()
        .filter(|call| *call == "stats c")
        .count()
        < 2
    {
        tokio::task::yield_now().await;
    }
    pod.operate(Operation::Stop { grace: GRACE }, "")
        .await
        .unwrap();
    let closed = "the link to the guest is closed".into();
    read.send(Err(Error::Unavailable(closed, None))).unwrap();
    let kept = asked.await.unwrap().unwrap();
    assert_eq!((kept.cpu, kept.memory.usage), (running.cpu, 0));
}
