//! The container kind with a real OCI runtime.

mod common;

use std::fs;
use std::time::Duration;

use common::{BOUND, Pod, cgroups_named, read_now, read_until, run};
use dyad_linux::cgroup::Hierarchies;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::handler::{ContainerRef, Event};
use dyad_runtime_handler::spec::{Checkpoint, Resources, Role, Stdio};
use serde_json::json;
use tokio::time::timeout;

#[test]
fn output_and_exit_code_come_through_and_nothing_is_left() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "echo out; echo err >&2; exit 37");
        let (container, ends) = pod.start().await;
        assert_eq!(pod.next_exit(None).await.status, 37);
        container.delete().await.unwrap();
        assert_eq!(read_now(&ends.stdout), "out\n");
        assert_eq!(read_now(&ends.stderr), "err\n");
        pod.assert_nothing_left();
        container.delete().await.expect("again");
    });
}

#[test]
fn no_byte_is_lost_when_a_container_ends_with_a_full_pipe() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "dd if=/bin/busybox bs=1000 count=900 2>/dev/null");
        let (container, ends) = pod.start().await;
        let mut got = Vec::new();
        let mut buffer = vec![0; 3000];
        while got.len() < 900_000 {
            let read = timeout(BOUND, ends.stdout.read(&mut buffer)).await;
            got.extend_from_slice(&buffer[..read.unwrap().unwrap()]);
        }
        let expected = fs::read(pod.temp.path().join("image/bin/busybox")).unwrap();
        assert!(got == expected[..900_000], "bytes differ");
        pod.next_exit(None).await;
        container.delete().await.unwrap();
        assert_eq!(read_now(&ends.stdout), "");
    });
}

#[test]
fn stdin_is_handed_over_and_closed() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "cat; echo end");
        let (container, ends) = pod.start().await;
        ends.stdin.write_all(b"some words\n").await.unwrap();
        container.close_stdin(None).await.unwrap();
        assert_eq!(read_until(&ends.stdout, "end\n").await, "some words\nend\n");
        assert_eq!(pod.next_exit(None).await.status, 0);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn execs_run_beside_init_and_end_by_themselves() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000");
        let (container, _ends) = pod.start().await;
        let (stdio, ends) = pod.stdio("e1", false);
        let exec = pod.exec_spec("e1", "cat; exit 5", stdio);
        container.exec(exec).await.unwrap();
        let again = pod.exec_spec("e1", "true", Stdio::default());
        let refused = container.exec(again).await.unwrap_err();
        assert!(matches!(refused, Error::AlreadyExists(_)), "{refused}");

        let pid = container.start_exec("e1").await.unwrap();
        let pids = container.pids().await.unwrap();
        assert!(pids.contains(&(pid, Some("e1".into()))), "{pids:?}");
        assert!(pids.contains(&(container.pid().unwrap(), None)), "{pids:?}");
        let running = container.delete_exec("e1").await.unwrap_err();
        assert!(matches!(running, Error::FailedPrecondition(_)), "{running}");

        ends.stdin.write_all(b"hello").await.unwrap();
        container.close_stdin(Some("e1")).await.unwrap();
        assert_eq!(pod.next_exit(Some("e1")).await.status, 5);
        container.delete_exec("e1").await.unwrap();
        assert_eq!(read_now(&ends.stdout), "hello");
        let gone = container.delete_exec("e1").await.unwrap_err();
        assert!(matches!(gone, Error::NotFound(_)), "{gone}");

        container.signal(None, libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        let late = pod.exec_spec("e2", "true", Stdio::default());
        container.exec(late).await.unwrap();
        let late = container.start_exec("e2").await.unwrap_err();
        assert!(matches!(late, Error::FailedPrecondition(_)), "{late}");
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn the_exit_of_a_process_that_ends_at_once_is_never_missed() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000");
        let (container, _ends) = pod.start().await;
        for n in 0..20 {
            let exec_id = format!("e{n}");
            let script = format!("exit {n}");
            let exec = pod.exec_spec(&exec_id, &script, Stdio::default());
            container.exec(exec).await.unwrap();
            container.start_exec(&exec_id).await.unwrap();
            assert_eq!(pod.next_exit(Some(&exec_id)).await.status, n);
            container.delete_exec(&exec_id).await.unwrap();
        }
        container.delete().await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137, "killed by delete");
        pod.assert_nothing_left();
    });
}

#[test]
fn an_exec_of_what_is_not_there_fails_with_the_runtimes_words() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000");
        let (container, _ends) = pod.start().await;
        let mut exec = pod.exec_spec("e", "", Stdio::default());
        exec.process.set_args(Some(vec!["/no/such/file".into()]));
        container.exec(exec).await.unwrap();
        let error = container.start_exec("e").await.unwrap_err().chain();
        assert!(error.contains("/no/such/file"), "{error}");
        assert!(error.contains("no such file or directory"), "{error}");
        container.delete_exec("e").await.unwrap();
        container.delete().await.unwrap();
        pod.next_exit(None).await;
        pod.assert_nothing_left();
    });
}

#[test]
fn a_terminal_is_one_and_can_be_resized() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "read go; stty size; read go; exit 3");
        let (stdio, ends) = pod.stdio("init", true);
        let container = pod.create(stdio).await.unwrap();
        container.resize(None, 123, 45).await.unwrap();
        container.start(None).await.unwrap();
        ends.stdin.write_all(b"\n").await.unwrap();
        read_until(&ends.stdout, "45 123\r\n").await;

        let (stdio, exec_ends) = pod.stdio("e", true);
        let exec = pod.exec_spec("e", "stty size; read x; echo \"<$x>\"", stdio);
        container.exec(exec).await.unwrap();
        // kubectl and crictl tell the size before the start.
        container.resize(Some("e"), 77, 11).await.unwrap();
        container.start_exec("e").await.unwrap();
        exec_ends.stdin.write_all(b"word\n").await.unwrap();
        let text = read_until(&exec_ends.stdout, "<word>\r\n").await;
        assert!(text.contains("word\r\n"), "no echo in {text:?}");
        pod.next_exit(Some("e")).await;
        container.delete_exec("e").await.unwrap();

        ends.stdin.write_all(b"\n").await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 3);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn a_process_that_opens_its_terminal_again_goes_on_being_read() {
    run(|reaper| async move {
        let script = "echo first; exec </dev/null >/dev/null 2>&1; sleep 0.5; \
                      exec </dev/console >/dev/console 2>&1; seq 20000; echo again; read end; \
                      echo \"<$end>\"; exit 3";
        let mut pod = Pod::new(reaper, script);
        let (stdio, ends) = pod.stdio("init", true);
        let container = pod.create(stdio).await.unwrap();
        container.start(None).await.unwrap();
        read_until(&ends.stdout, "first\r\n").await;
        read_until(&ends.stdout, "again\r\n").await;
        ends.stdin.write_all(b"end\n").await.unwrap();
        read_until(&ends.stdout, "<end>\r\n").await;
        assert_eq!(pod.next_exit(None).await.status, 3);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn only_a_terminal_can_be_resized() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000");
        let (container, _ends) = pod.start().await;
        let error = container.resize(None, 1, 1).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        container.delete().await.unwrap();
        pod.next_exit(None).await;
    });
}

#[test]
fn a_user_that_is_not_root_can_open_its_stdio_again() {
    run(|reaper| async move {
        let mut pod = Pod::new(
            reaper,
            "echo one > /proc/self/fd/1; echo two > /proc/self/fd/2",
        );
        pod.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (container, ends) = pod.start().await;
        assert_eq!(pod.next_exit(None).await.status, 0);
        container.delete().await.unwrap();
        assert_eq!(read_now(&ends.stdout), "one\n");
        assert_eq!(read_now(&ends.stderr), "two\n");
    });
}

#[test]
fn signals_reach_init_or_all() {
    run(|reaper| async move {
        let script = "trap 'echo init; exit 9' TERM; sh -c 'trap \"echo child\" TERM; echo ready; while :; do sleep 0.01; done' & while :; do sleep 0.01; done";
        let mut pod = Pod::new(reaper, script);
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        container.signal(None, libc::SIGTERM, true).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 9);
        container.delete().await.unwrap();
        let text = read_now(&ends.stdout);
        assert!(text.contains("init\n"), "{text:?}");
        let ended = container.signal(None, libc::SIGTERM, false).await;
        assert!(matches!(ended, Err(Error::NotFound(_))), "{ended:?}");
        pod.assert_nothing_left();
    });
}

#[test]
fn what_shares_the_hosts_pid_namespace_ends_with_its_init() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000 & sleep 1000 & echo ready; wait");
        pod.share_pid_namespace();
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        assert_eq!(container.pids().await.unwrap().len(), 3);
        container.signal(None, libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn a_kill_for_memory_is_told_before_the_exit() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "exec tail /dev/zero");
        pod.spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        let (container, _ends) = pod.start().await;
        let expected = Event::OutOfMemory {
            container: pod.id.clone(),
        };
        assert_eq!(pod.next_event().await, expected);
        // The kernel may tell of more than one attempt before the kill works.
        let exit = loop {
            match pod.next_event().await {
                Event::Exited { exit, .. } => break exit,
                event => assert_eq!(event, expected),
            }
        };
        assert_eq!(exit.status, 137);
        assert!(container.stats().await.unwrap().memory.oom_kills >= 1);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn stats_and_limits_are_the_cgroups() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "echo ready; sleep 1000");
        pod.spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        let stats = container.stats().await.unwrap();
        assert!(stats.cpu.usage_ns > 0);
        assert!(stats.memory.usage > 0);
        assert_eq!(stats.memory.limit, 64 << 20);
        assert!(stats.pids.current >= 1);
        let linux = serde_json::from_value(json!({"memory": {"limit": 80 << 20}})).unwrap();
        let resources = Resources {
            linux,
            annotations: Default::default(),
        };
        container.update(&resources).await.unwrap();
        assert_eq!(container.stats().await.unwrap().memory.limit, 80 << 20);
        // Its next process has the limits that its last one had in the end.
        container.stop(Duration::ZERO).await.unwrap();
        pod.next_exit(None).await;
        container.start(None).await.unwrap();
        assert_eq!(container.stats().await.unwrap().memory.limit, 80 << 20);
        container.delete().await.unwrap();
        pod.next_exit(None).await;
        let gone = container.stats().await.unwrap_err();
        assert!(matches!(gone, Error::NotFound(_)), "{gone}");
    });
}

#[test]
fn a_paused_container_is_frozen_until_resumed() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "sleep 1000");
        let (container, _ends) = pod.start().await;
        let cgroup = Hierarchies::of_host()
            .unwrap()
            .at(&format!("/{}", pod.id))
            .unwrap();
        container.pause().await.unwrap();
        assert!(cgroup.is_frozen());
        let exec = pod.exec_spec("e", "true", Stdio::default());
        container.exec(exec).await.unwrap();
        let error = container.start_exec("e").await.unwrap_err();
        assert!(
            matches!(error, Error::FailedPrecondition(_)),
            "{}",
            error.chain()
        );
        container.resume().await.unwrap();
        assert!(!cgroup.is_frozen());

        container.pause().await.unwrap();
        container.signal(None, libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137, "also while paused");
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn a_stopped_container_runs_again_with_its_files_and_new_stdio() {
    run(|reaper| async move {
        let script = "trap 'exit 8' TERM; echo x >> /tmp/runs; cat /tmp/runs; echo ready; while :; do sleep 0.01; done";
        let mut pod = Pod::new(reaper, script);
        let (container, ends) = pod.start().await;
        assert_eq!(read_until(&ends.stdout, "ready\n").await, "x\nready\n");
        let first = container.pid().unwrap();
        container.stop(BOUND).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 8);
        container.stop(BOUND).await.expect("again");

        let (stdio, _) = pod.stdio("init", false);
        let second = container.start(Some(stdio)).await.unwrap();
        assert_ne!(first, second);
        assert_eq!(container.start(None).await.unwrap(), second, "runs already");
        assert_eq!(read_until(&ends.stdout, "ready\n").await, "x\nx\nready\n");
        container.stop(BOUND).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 8);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn what_does_not_heed_the_stop_signal_is_killed_after_the_grace() {
    run(|reaper| async move {
        let mut pod = Pod::new(
            reaper,
            "trap '' TERM; echo ready; while :; do sleep 0.01; done",
        );
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        container.stop(Duration::from_millis(50)).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn one_that_is_killed_before_its_start_tells_its_end_once() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "true");
        let (stdio, _ends) = pod.stdio("init", false);
        let container = pod.create(stdio).await.unwrap();
        container.signal(None, libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        let error = container.start(None).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        container.delete().await.unwrap();
        pod.assert_nothing_left();
        assert!(pod.events.try_recv().is_err(), "no second end");
    });
}

#[test]
fn a_create_that_fails_leaves_nothing_and_says_why() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "");
        pod.spec["process"]["args"] = json!(["/no/such/program"]);
        let (stdio, _ends) = pod.stdio("init", false);
        let Err(error) = pod.create(stdio).await else {
            panic!("created");
        };
        let error = error.chain();
        assert!(error.starts_with("OCI runtime create failed: "), "{error}");
        assert!(error.contains("/no/such/program"), "{error}");
        pod.assert_nothing_left();
        assert!(pod.events.try_recv().is_err());
    });
}

#[test]
fn an_id_that_is_taken_is_refused_and_its_owner_left_alone() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "echo ready; sleep 1000");
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        let (stdio, _second) = pod.stdio("second", false);
        let Err(error) = pod.create(stdio).await else {
            panic!("created twice");
        };
        assert!(
            matches!(error, Error::AlreadyExists(_)),
            "{}",
            error.chain()
        );
        container
            .signal(None, 0, false)
            .await
            .expect("it still runs");
        container.delete().await.unwrap();
        pod.next_exit(None).await;
    });
}

#[test]
fn what_a_dead_shim_left_is_cleaned_up_by_name() {
    run(|reaper| async move {
        for share in [false, true] {
            let mut pod = Pod::new(reaper.clone(), "sleep 1000 & echo ready; wait");
            if share {
                pod.share_pid_namespace();
            }
            let (container, ends) = pod.start().await;
            read_until(&ends.stdout, "ready\n").await;
            assert!(!cgroups_named(&pod.id).is_empty());
            drop(container);
            pod.handler.cleanup(&pod.reference()).await.unwrap();
            pod.assert_nothing_left();
            pod.handler.cleanup(&pod.reference()).await.expect("again");
        }
    });
}

#[test]
fn cleaning_up_a_sandbox_takes_all_containers_of_its_pod_along() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper, "echo ready; sleep 1000");
        pod.sandbox_id = "the-sandbox".into();
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "ready\n").await;
        drop(container);
        let other = ContainerRef {
            id: pod.sandbox_id.clone(),
            role: Role::Sandbox,
            // Its bundle is gone, and so is what lies beside it.
            bundle: pod.temp.path().join("gone/the-sandbox"),
            ..pod.reference()
        };
        pod.handler.cleanup(&other).await.unwrap();
        assert!(cgroups_named(&pod.id).is_empty());
        pod.handler.cleanup(&pod.reference()).await.unwrap();
        pod.assert_nothing_left();
    });
}

/// An OCI runtime of the name `runtime` in `dir`, a shell script; in it `runc` is the real one.
fn wrapper(dir: &std::path::Path, script: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join("runtime");
    let text = format!("#!/bin/sh\nrunc={}\n{script}\n", common::runc().display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_root_that_pods_share_is_the_runtimes_and_cleaned_up_by_pod() {
    run(|reaper| async move {
        let root = tempfile::tempdir().unwrap();
        let shared = |config: &mut dyad_runtime_handler::config::ContainerConfig| {
            config.root = Some(root.path().to_owned());
        };
        let mut other = Pod::with_config(reaper.clone(), "sleep 1000", shared);
        let (survivor, _ends) = other.start().await;
        let mut pod = Pod::with_config(reaper, "sleep 1000", shared);
        pod.sandbox_id = "the-pod".into();
        let (_container, _ends) = pod.start().await;
        let state = root.path().join(common::NAMESPACE);
        assert!(state.join(&pod.id).exists() && state.join(&other.id).exists());
        let sandbox = ContainerRef {
            id: "the-pod".into(),
            containerd_namespace: common::NAMESPACE.into(),
            sandbox_id: "the-pod".into(),
            role: Role::Sandbox,
            bundle: pod.temp.path().join("sandbox"),
        };
        pod.handler.cleanup(&sandbox).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        assert!(!state.join(&pod.id).exists());
        assert!(
            state.join(&other.id).exists(),
            "another pod's is left alone"
        );
        survivor.delete().await.unwrap();
        other.next_exit(None).await;
        other.assert_nothing_left();
        assert!(!state.join(&other.id).exists());
    });
}

#[test]
fn what_the_runtime_no_longer_knows_is_not_found_and_can_be_deleted() {
    run(|reaper| async move {
        let mut pod = Pod::new(reaper.clone(), "sleep 1000");
        let (container, _ends) = pod.start().await;
        let root = pod
            .temp
            .path()
            .join("oci")
            .join(common::NAMESPACE)
            .join(&pod.id);
        let mut delete = std::process::Command::new(common::runc());
        delete
            .arg("--root")
            .arg(&root)
            .args(["delete", "--force", &pod.id]);
        let deleted = reaper.spawn(&mut delete).unwrap().exit.wait().await;
        assert_eq!(deleted.status, 0);
        let error = container
            .signal(None, libc::SIGKILL, false)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error}");
        assert_eq!(pod.next_exit(None).await.status, 137);
        container.delete().await.unwrap();
    });
}

#[test]
fn one_that_dies_between_create_and_start_has_ended_and_cannot_start() {
    run(|reaper| async move {
        let dir = tempfile::tempdir().unwrap();
        // As containerd's own tests have it (integration/failpoint/cmd/runc-fp).
        let runtime = wrapper(
            dir.path(),
            r#"$runc "$@" || exit
case "$*" in
*" create "*)
    while [ "$1" != --bundle ]; do shift; done
    kill -9 "$(cat "$2/init.pid")"
    ;;
esac"#,
        );
        let mut pod = Pod::with_config(reaper, "sleep 1000", |config| {
            config.runtime = Some(runtime);
        });
        let (stdio, _ends) = pod.stdio("init", false);
        let container = pod.create(stdio).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        assert!(container.start(None).await.is_err());
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn an_exec_whose_container_dies_meanwhile_fails_and_the_rest_can_be_deleted() {
    run(|reaper| async move {
        let dir = tempfile::tempdir().unwrap();
        let gate = dir.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let runtime = wrapper(
            dir.path(),
            &format!(
                r#"case "$*" in *" exec "*) read -r _ <{} ;; esac
exec $runc "$@""#,
                gate.display()
            ),
        );
        let mut pod = Pod::with_config(reaper, "sleep 1000", |config| {
            config.runtime = Some(runtime);
        });
        let (container, _ends) = pod.start().await;
        let exec = pod.exec_spec("e1", "sleep 1000", Stdio::default());
        container.exec(exec).await.unwrap();
        let starting = container.clone();
        let started = tokio::spawn(async move { starting.start_exec("e1").await });
        // Opens once the exec's runtime waits there.
        let opened = tokio::task::spawn_blocking(move || fs::File::create(gate).unwrap());
        let mut opened = timeout(BOUND, opened).await.unwrap().unwrap();
        container.signal(None, libc::SIGKILL, false).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        std::io::Write::write_all(&mut opened, b"\n").unwrap();
        assert!(timeout(BOUND, started).await.unwrap().unwrap().is_err());
        container.delete_exec("e1").await.unwrap();
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}

#[test]
fn a_checkpointed_container_runs_on_or_ends_and_another_goes_on_from_it() {
    run(|reaper| async move {
        const COUNT: &str = "n=0; while :; do n=$((n+1)); echo n=$n; sleep 0.1; done";
        let images = tempfile::tempdir().unwrap();
        let mut pod = Pod::new(reaper.clone(), COUNT);
        let (container, ends) = pod.start().await;
        read_until(&ends.stdout, "n=3\n").await;
        let mut to = Checkpoint {
            images: images.path().join("one"),
            work: Some(images.path().join("work")),
            ..Checkpoint::default()
        };
        container.checkpoint(&to).await.unwrap();
        assert!(images.path().join("work/dump.log").exists());
        read_until(&ends.stdout, "n=").await;
        assert!(container.pids().await.is_ok_and(|pids| !pids.is_empty()));
        to.images = images.path().join("two");
        to.exit = true;
        container.checkpoint(&to).await.unwrap();
        assert_eq!(pod.next_exit(None).await.status, 137);
        let last = read_now(&ends.stdout);
        let error = container.checkpoint(&to).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        container.delete().await.unwrap();

        let mut next = Pod::new(reaper, COUNT);
        next.share_image(&pod);
        next.checkpoint = Some(to.images);
        let (stdio, ends) = next.stdio("init", false);
        let restored = next.create(stdio).await.unwrap();
        assert_eq!(restored.pid(), None, "it has no process before its start");
        restored.start(None).await.unwrap();
        let number = |line: &str| line.strip_prefix("n=").and_then(|n| n.parse::<u32>().ok());
        let before = last.lines().filter_map(number).max().unwrap_or(3);
        let goes_on = format!("n={}\n", before + 2);
        read_until(&ends.stdout, &goes_on).await;
        restored.delete().await.unwrap();
        next.next_exit(None).await;
        next.assert_nothing_left();
    });
}

#[test]
fn a_restore_from_nothing_fails_with_criu_s_words_and_can_be_deleted() {
    run(|reaper| async move {
        let empty = tempfile::tempdir().unwrap();
        let mut pod = Pod::new(reaper, "sleep 1000");
        pod.checkpoint = Some(empty.path().to_owned());
        let (stdio, _ends) = pod.stdio("init", false);
        let container = pod.create(stdio).await.unwrap();
        assert!(container.start(None).await.is_err());
        container.delete().await.unwrap();
        pod.assert_nothing_left();
    });
}
