//! Pods without a pause container.

use super::*;

/// A pod that needs no mount: all in the host's namespaces.
fn bare(pod: &TestPod, id: &str) -> crate::pod::SandboxRequest {
    let bundle = pod.bundle(id);
    std::fs::create_dir_all(&bundle).unwrap();
    crate::pod::SandboxRequest {
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
