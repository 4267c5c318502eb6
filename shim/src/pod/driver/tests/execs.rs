//! Further processes of a container.

use super::*;

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
