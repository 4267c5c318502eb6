//! Who sees whose processes, and as whom a process runs.

use dyad_agent_api::proto::agent::create_options::Pids;
use dyad_agent_api::ttrpc::Code;
use serde_json::json;

use crate::guest::{code, on_machine, text};

/// Every process in sight: number and name.
const LIST: &str = "for p in /proc/[0-9]*; do read name <$p/comm; echo ${p#/proc/} $name; done";

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn containers_that_share_the_pods_processes_see_each_other_and_nothing_of_the_guest() {
    on_machine(|machine| async move {
        let mate = machine
            .create_with("pids-mate", &["sleep", "4322"], |_, options| {
                options.pids = Some(Pids::PodPids(true));
            })
            .await
            .unwrap();
        mate.start().await;
        // An orphan of each becomes the pause process's child, which reaps it.
        let script = format!(
            "(sleep 0.2 & ) ; sleep 1; {LIST}; ls -A /proc/1/root 2>&1; cat /proc/1/status | grep -E '^(Uid|CapPrm)'; echo shown; exec sleep 600"
        );
        let app = machine
            .create_with("pids-app", &["sh", "-c", &script], |_, options| {
                options.pids = Some(Pids::PodPids(true));
            })
            .await
            .unwrap();
        app.start().await;
        let shown = app.read_until("shown").await;
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "1 pause", "{shown}");
        let names = |wanted: &str| {
            lines
                .iter()
                .filter(|line| line.split(' ').nth(1) == Some(wanted))
                .count()
        };
        assert_eq!(names("sleep"), 1, "its mate, and no orphan: {shown}");
        assert!(
            !shown.contains("kthreadd") && !shown.contains("init"),
            "{shown}"
        );
        assert!(shown.contains("Permission denied"), "its root: {shown}");
        assert!(shown.contains("Uid:\t65535\t65535"), "{shown}");
        assert!(shown.contains("CapPrm:\t0000000000000000"), "{shown}");

        app.add_exec(
            "x",
            &["sh", "-c", "read name </proc/1/comm; echo $name"],
            |_| {},
        )
        .await;
        app.start_exec("x").await.unwrap();
        assert_eq!(app.read_exec("x").await, "pause\n");
        app.wait_exec("x").await;

        // The end of one is not that of the other.
        app.kill(9).await.unwrap();
        assert_eq!(app.wait().await, 137);
        app.delete().await;
        mate.kill(15).await.unwrap();
        assert_eq!(
            mate.wait().await,
            143,
            "it is no PID 1, and ends by a signal"
        );
        mate.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_container_joins_the_processes_of_its_target() {
    on_machine(|machine| async move {
        let target = machine.create("pids-target", &["sleep", "4321"]).await;
        target.start().await;
        let script =
            "tr '\\0' ' ' </proc/1/cmdline; ls -d /proc/1/root/etc; echo shown; exec sleep 600";
        let debug = machine
            .create_with("pids-debug", &["sh", "-c", script], |spec, options| {
                options.pids = Some(Pids::TargetPids("pids-target".into()));
                for set in ["bounding", "effective", "permitted"] {
                    let set = &mut spec["process"]["capabilities"][set];
                    set.as_array_mut().unwrap().push(json!("CAP_SYS_PTRACE"));
                }
            })
            .await
            .unwrap();
        debug.start().await;
        let shown = debug.read_until("shown").await;
        assert!(shown.starts_with("sleep 4321 "), "{shown}");
        assert!(shown.contains("/proc/1/root/etc"), "{shown}");
        // With PID 1 go all of its namespace.
        target.kill(9).await.unwrap();
        assert_eq!(debug.wait().await, 137);
        target.wait().await;
        let late = machine
            .create_with("pids-late", &["true"], |_, options| {
                options.pids = Some(Pids::TargetPids("pids-target".into()));
            })
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(code(&late), Code::FAILED_PRECONDITION);
        assert!(text(&late).contains("pids-target"), "{}", text(&late));
        debug.delete().await;
        target.delete().await;
        let unknown = machine
            .create_with("pids-late", &["true"], |_, options| {
                options.pids = Some(Pids::TargetPids("pids-target".into()));
            })
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(code(&unknown), Code::NOT_FOUND);
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_user_has_the_home_of_its_own_and_owns_its_terminal() {
    on_machine(|machine| async move {
        let script = "echo HOME=$HOME; id -G; echo shown; exec sleep 600";
        let container = machine
            .create_with("user", &["sh", "-c", script], |spec, _| {
                spec["process"]["user"] =
                    json!({"uid": 4242, "gid": 4343, "additionalGids": [4343, 44]});
            })
            .await
            .unwrap();
        container.start().await;
        let shown = container.read_until("shown").await;
        assert!(shown.starts_with("HOME=/\n4343 44\n"), "{shown}");
        for (uid, env, home) in [
            (4242, json!([]), "/"),
            (1000, json!(["HOME="]), "/home/user"),
            (0, json!(["HOME=/given"]), "/given"),
        ] {
            let id = format!("x{uid}");
            let script = "echo HOME=$HOME; stat -c %u $(tty); echo again >$(tty)";
            container
                .add_exec(&id, &["sh", "-c", script], |process| {
                    process["user"] = json!({"uid": uid, "gid": uid});
                    process["terminal"] = json!(true);
                    process["env"] = env;
                })
                .await;
            container.start_exec(&id).await.unwrap();
            let said = container.read_exec(&id).await.replace('\r', "");
            assert_eq!(said, format!("HOME={home}\n{uid}\nagain\n"));
            container.wait_exec(&id).await;
        }
        container.end().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn an_exec_goes_into_the_group_that_an_init_has_made_for_itself() {
    on_machine(|machine| async move {
        // As systemd and dockerd do it: no process may be beside groups that have controllers.
        let script = "cd /sys/fs/cgroup && mkdir init.scope && echo 1 >init.scope/cgroup.procs && \
            echo +memory +pids >cgroup.subtree_control && echo made; exec sleep 600";
        let container = machine
            .create_with("nested", &["sh", "-c", script], |spec, _| {
                for mount in spec["mounts"].as_array_mut().unwrap() {
                    if mount["type"] == "cgroup" {
                        mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
                    }
                }
            })
            .await
            .unwrap();
        container.start().await;
        container.read_until("made").await;
        container
            .add_exec("x", &["cat", "/proc/self/cgroup"], |_| {})
            .await;
        container.start_exec("x").await.unwrap();
        assert_eq!(container.read_exec("x").await, "0::/init.scope\n");
        container.wait_exec("x").await;
        container.end().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn an_exec_that_cannot_run_says_why_and_nothing_else() {
    on_machine(|machine| async move {
        let container = machine.create("reason", &["sleep", "600"]).await;
        container.start().await;
        container
            .add_exec("x", &["true"], |process| process["cwd"] = json!("/no/such"))
            .await;
        let error = container.start_exec("x").await.unwrap_err();
        let said = text(&error);
        assert!(
            said.contains("ENOENT") || said.contains("No such file"),
            "{said}"
        );
        assert!(!said.contains("helper") && !said.contains(" | "), "{said}");
        container.end().await;
    });
}
