//! Create, run, signal, delete, and the order in which that is told.

use super::*;

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
async fn a_backend_that_floods_holds_up_nobody_and_is_told_once() {
    const FLOOD: usize = 20_000;
    let mut pod = TestPod::running(Kind::Machine).await;
    for _ in 0..4 {
        pod.next_event().await;
    }
    let fake = Arc::clone(&pod.fake);
    let flood = tokio::spawn(async move {
        loop {
            for _ in 0..FLOOD {
                for container in ["c", "somebody-elses"] {
                    fake.event(Event::OutOfMemory {
                        container: container.into(),
                    });
                }
                fake.event(Event::Machine(MachineEvent::Rebooted));
            }
            tokio::task::yield_now().await;
        }
    });
    let answered = async {
        assert_eq!(pod.status("c").await, TaskStatus::Running);
        for id in ["c", "pod"] {
            let process = || ProcessId::init(id);
            pod.sandbox
                .signal(process(), libc::SIGKILL, false)
                .await
                .unwrap();
            assert_eq!(pod.sandbox.wait(process()).await.unwrap().status, 137);
            pod.sandbox.delete(process()).await.unwrap();
        }
        pod.sandbox.shutdown().await.unwrap();
    };
    timeout(Duration::from_secs(60), answered).await.unwrap();
    flood.abort();
    let mut told = Vec::new();
    while let Ok(event) = pod.events.try_recv() {
        if let TaskEvent::OutOfMemory { container } = event {
            told.push(container);
        }
    }
    assert!(told.iter().all(|container| container == "c"), "{told:?}");
    assert!((1..=30).contains(&told.len()), "{}", told.len());
}

#[tokio::test]
async fn an_exit_that_came_before_the_end_of_a_stop_is_taken_first() {
    let pod = TestPod::running(Kind::Container).await;
    // The fake tells the exit and then returns, a hundred times in one go.
    for _ in 0..100 {
        pod.operate(Operation::Stop { grace: GRACE }, "c")
            .await
            .unwrap();
        assert_eq!(pod.states().await[0].1, "stopped");
        pod.operate(Operation::Start, "c").await.unwrap();
    }
}
