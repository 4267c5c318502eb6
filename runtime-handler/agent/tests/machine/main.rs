//! The agent in a real guest: QEMU under emulation, a kernel and an initramfs from
//! `hack/guest`, a busybox image on an EROFS disk, a pod disk, and the link's host side.
//!
//! `DYAD_GUEST` names the folder that `hack/guest --out` made:
//! ```text
//! hack/guest --out target/guest-image
//! DYAD_GUEST=$PWD/target/guest-image cargo test -p dyad-agent --test machine -- --ignored
//! ```
//! Needs qemu-system-x86_64, mkfs.erofs, mkfs.ext4 and a static busybox. All tests but
//! those about the machine's end share one machine.

mod guest;
mod modules;
mod processes;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use dyad_agent_api::link::host::CallError;
use dyad_agent_api::proto::agent::file::Content;
use dyad_agent_api::proto::agent::{
    CreateOptions, File, Filesystem, GetFileRequest, GetFileResponse, PutFilesRequest,
    PutFilesResponse, ResourcesRequest, ResourcesResponse, StreamsRequest, StreamsResponse,
    WaitEventsRequest, WaitEventsResponse, guest_event,
};
use dyad_agent_api::protobuf::{Message, MessageField};
use dyad_agent_api::task_api::api::{
    CloseIORequest, Empty, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest,
    ResumeRequest, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
};
use dyad_agent_api::task_api::cgroups_v2::metrics::Metrics;
use dyad_agent_api::ttrpc::Code;
use guest::{Container, Machine, Pod, SANDBOX, TASK, code, on_machine, text};
use serde_json::json;

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn exit_codes_and_signals_come_through() {
    on_machine(|machine| async move {
        for (id, script, expected) in [("exit0", "exit 0", 0), ("exit37", "exit 37", 37)] {
            let container = machine.create(id, &["sh", "-c", script]).await;
            container.start().await;
            assert_eq!(container.wait().await, expected);
            container.delete().await;
        }
        for (id, signal, expected) in [("term", 15, 143), ("kill", 9, 137), ("rt", 40, 168)] {
            // tail installs no handler; a shell without a PID namespace's protection.
            let container = machine.create(id, &["sh", "-c", "exec sleep 1000"]).await;
            container.start().await;
            if signal == 9 {
                container.kill(signal).await.unwrap();
                assert_eq!(container.wait().await, expected);
            } else {
                // An init of its namespace ignores what it does not handle: as an exec it ends.
                container.add_exec("x", &["sleep", "1000"], |_| {}).await;
                container.start_exec("x").await.unwrap();
                container.kill_exec("x", signal).await.unwrap();
                assert_eq!(container.wait_exec("x").await, expected);
                container.delete_exec("x").await;
                container.kill(9).await.unwrap();
                container.wait().await;
            }
            let gone = container.kill(15).await.unwrap_err();
            assert_eq!(code(&gone), Code::NOT_FOUND);
            container.delete().await;
        }
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn init_and_exec_run_under_the_filter_with_the_specs_capabilities() {
    on_machine(|machine| async move {
        // CAP_CHOWN and CAP_KILL.
        const MASK: &str = "0000000000000021";
        let report = "grep -E '^(Seccomp|NoNewPrivs|Cap(Eff|Prm|Bnd))' /proc/self/status; mkdir /tmp/denied 2>&1";
        for no_new_privileges in [true, false] {
            let id = format!("seccomp-{no_new_privileges}");
            let change = |process: &mut serde_json::Value| {
                process["noNewPrivileges"] = no_new_privileges.into();
                let set = json!(["CAP_CHOWN", "CAP_KILL"]);
                process["capabilities"] =
                    json!({"bounding": set, "effective": set, "permitted": set});
            };
            let script = format!("{report}; sleep 1000");
            let container = machine
                .create_with(&id, &["sh", "-c", &script], |spec, options| {
                    change(&mut spec["process"]);
                    options.seccomp_filter = guest::filter_without_mkdir();
                })
                .await
                .unwrap();
            container.start().await;
            let init = container.read_until("denied").await;
            container.add_exec("x", &["sh", "-c", report], change).await;
            container.start_exec("x").await.unwrap();
            let exec = container.read_exec("x").await;
            container.wait_exec("x").await;
            for status in [&init, &exec] {
                assert!(status.contains("Seccomp:\t2"), "{status}");
                assert!(status.contains("Operation not permitted"), "{status}");
                for set in ["CapEff", "CapPrm", "CapBnd"] {
                    assert!(status.contains(&format!("{set}:\t{MASK}")), "{status}");
                }
                let flag = format!("NoNewPrivs:\t{}", u8::from(no_new_privileges));
                assert!(status.contains(&flag), "{status}");
            }
            container.end().await;
        }
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_process_without_capabilities_has_none() {
    on_machine(|machine| async move {
        let container = machine
            .create_with(
                "nocaps",
                &["grep", "Cap", "/proc/self/status"],
                |spec, _| {
                    spec["process"]["capabilities"] = json!({});
                },
            )
            .await
            .unwrap();
        container.start().await;
        let status = container.read().await;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(
                status.contains(&format!("{set}:\t0000000000000000")),
                "{status}"
            );
        }
        container.wait().await;
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn ambient_capabilities_reach_a_user_who_is_not_root() {
    on_machine(|machine| async move {
        let container = machine
            .create_with(
                "ambient",
                &["grep", "Cap", "/proc/self/status"],
                |spec, options| {
                    let set = json!(["CAP_NET_BIND_SERVICE"]);
                    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
                    spec["process"]["capabilities"] = json!({
                        "bounding": set, "effective": set, "permitted": set,
                        "inheritable": set, "ambient": set
                    });
                    options.seccomp_filter = guest::filter_without_mkdir();
                },
            )
            .await
            .unwrap();
        container.start().await;
        let status = container.read().await;
        assert!(status.contains("CapEff:\t0000000000000400"), "{status}");
        assert!(status.contains("CapAmb:\t0000000000000400"), "{status}");
        container.wait().await;
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn the_spec_is_honoured() {
    on_machine(|machine| async move {
        let script = "id; pwd; hostname; ulimit -n; cat /proc/self/oom_score_adj; umask; \
            echo HOME=$HOME PATH=$PATH A=$A; \
            echo out >/dev/stdout; echo err >/dev/stderr; \
            touch /file 2>&1; touch /proc/sys/kernel/domainname 2>&1; cat /proc/keys | wc -c; \
            cat /proc/sys/net/ipv4/ip_local_port_range; echo $$";
        let container = machine
            .create_with("spec", &["sh", "-c", script], |spec, options| {
                spec["process"]["user"] = json!({
                    "uid": 1000, "gid": 1000, "additionalGids": [44, 1000], "umask": 63
                });
                spec["process"]["cwd"] = json!("/made/for/it");
                spec["process"]["env"] = json!(["A=b c"]);
                spec["process"]["oomScoreAdj"] = json!(500);
                spec["process"]["rlimits"] =
                    json!([{"type": "RLIMIT_NOFILE", "hard": 333, "soft": 222}]);
                spec["hostname"] = json!("ignored");
                spec["linux"]["maskedPaths"] = json!(["/proc/keys"]);
                spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
                options.readonly_root = true;
            })
            .await
            .unwrap();
        container.start().await;
        let out = container.read().await;
        let lines: Vec<&str> = out.lines().collect();
        assert!(
            lines[0].starts_with("uid=1000(user) gid=1000") && lines[0].contains("44"),
            "{out}"
        );
        assert_eq!(lines[1], "/made/for/it");
        assert_eq!(lines[2], "pod-of-tests");
        assert_eq!(lines[3], "222");
        assert_eq!(lines[4], "500");
        assert_eq!(lines[5], "0077");
        assert_eq!(
            lines[6],
            "HOME=/home/user PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin A=b c"
        );
        assert_eq!(lines[7], "out");
        assert!(lines[8].contains("Read-only file system"), "{out}");
        assert!(lines[9].contains("Read-only file system"), "{out}");
        assert_eq!(lines[10], "0", "a masked file is empty");
        assert_eq!(
            lines[11].split_whitespace().next(),
            Some("20000"),
            "the pod's sysctl"
        );
        assert_eq!(lines[12], "1", "pid namespace of its own");
        assert_eq!(container.read_stderr().await, "err\n");
        assert_eq!(container.wait().await, 0);
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_terminal_has_its_size_before_the_program_runs_and_can_be_resized() {
    on_machine(|machine| async move {
        let script =
            "stty size; trap 'stty size' WINCH; while true; do read line && echo got $line; done";
        let container = machine
            .create_with("tty", &["sh", "-c", script], |spec, _| {
                spec["process"]["terminal"] = json!(true);
                spec["process"]["consoleSize"] = json!({"height": 33, "width": 111});
            })
            .await
            .unwrap();
        container.start().await;
        container.read_until("33 111").await;
        let input = container.input();
        input.write(b"hello\n").await.unwrap();
        container.read_until("got hello").await;

        let resize = ResizePtyRequest {
            id: "tty".into(),
            width: 80,
            height: 25,
            ..Default::default()
        };
        let _: Empty = machine.call(TASK, "ResizePty", &resize).await.unwrap();
        // The shell runs its trap behind the read that it is in.
        input.write(b"again\n").await.unwrap();
        container.read_until("25 80").await;

        container
            .add_exec(
                "x",
                &["sh", "-c", "stty size; tty; test -c /dev/console && exit 3"],
                |process| {
                    process["terminal"] = json!(true);
                    process["consoleSize"] = json!({"height": 7, "width": 9});
                },
            )
            .await;
        container.start_exec("x").await.unwrap();
        let exec = container.read_exec("x").await;
        assert!(exec.starts_with("7 9\r\n/dev/pts/"), "{exec:?}");
        assert_eq!(container.wait_exec("x").await, 3);
        container.end().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_process_that_opens_its_terminal_again_goes_on_being_read() {
    on_machine(|machine| async move {
        let script = "echo first; exec </dev/null >/dev/null 2>&1; sleep 1; \
                      exec </dev/console >/dev/console 2>&1; seq 20000; echo again; read end; \
                      echo \"<$end>\"; exit 3";
        let container = machine
            .create_with("console", &["sh", "-c", script], |spec, _| {
                spec["process"]["terminal"] = json!(true);
            })
            .await
            .unwrap();
        container.start().await;
        container.read_until("again").await;
        container.input().write(b"end\n").await.unwrap();
        container.read_until("<end>").await;
        assert_eq!(container.wait().await, 3);
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn input_reaches_the_process_and_ends() {
    on_machine(|machine| async move {
        let container = machine.create("stdin", &["md5sum"]).await;
        container.start().await;
        let input = container.input();
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        input.write(&bytes).await.unwrap();
        input.close();
        let sum = container.read().await;
        assert_eq!(sum.trim(), format!("{}  -", guest::md5(&bytes)));
        assert_eq!(container.wait().await, 0);
        container.delete().await;

        let container = machine.create("closeio", &["cat"]).await;
        container.start().await;
        container.input().write(b"before").await.unwrap();
        container.read_until("before").await;
        let close = CloseIORequest {
            id: "closeio".into(),
            stdin: true,
            ..Default::default()
        };
        let _: Empty = machine.call(TASK, "CloseIO", &close).await.unwrap();
        assert_eq!(container.wait().await, 0);
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn output_that_nobody_takes_slows_the_process_down_and_none_is_lost() {
    on_machine(|machine| async move {
        // 16 times what the guest keeps for a stream.
        let container = machine.create("flood", &["sh", "-c", "seq 1 600000"]).await;
        container.start().await;
        let streams = machine.streams().await;
        let stream = streams
            .iter()
            .find(|stream| stream.container_id == "flood" && stream.fd == 1);
        assert!(stream.is_some(), "{streams:?}");
        let out = container.read().await;
        let expected: String = (1..=600_000).map(|n| format!("{n}\n")).collect();
        assert!(out == expected, "{} of {} bytes", out.len(), expected.len());
        assert_eq!(container.wait().await, 0);
        container.delete().await;
        assert!(
            machine
                .streams()
                .await
                .iter()
                .all(|stream| stream.container_id != "flood")
        );
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_kill_for_memory_is_told_before_the_exit() {
    on_machine(|machine| async move {
        let container = machine
            .create_with("oom", &["sh", "-c", "tail /dev/zero"], |spec, _| {
                spec["linux"]["resources"]["memory"] = json!({"limit": 24 << 20, "swap": 24 << 20});
            })
            .await
            .unwrap();
        container.start().await;
        assert_ne!(container.wait().await, 0);
        let wait = WaitEventsRequest::default();
        let events: WaitEventsResponse = machine.call(SANDBOX, "WaitEvents", &wait).await.unwrap();
        let expected = Some(guest_event::Event::Oom("oom".into()));
        assert!(
            events.events.iter().any(|event| event.event == expected),
            "{events:?}"
        );
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn usage_is_told_and_limits_change() {
    on_machine(|machine| async move {
        let script =
            "while true; do dd if=/dev/zero of=/tmp/f bs=1M count=4 2>/dev/null; sleep 1; done";
        let container = machine.create("stats", &["sh", "-c", script]).await;
        container.start().await;
        let stats = |id: &str| {
            let request = StatsRequest {
                id: id.into(),
                ..Default::default()
            };
            let machine = machine.clone();
            async move {
                let stats: StatsResponse = machine.call(TASK, "Stats", &request).await.unwrap();
                assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
                Metrics::parse_from_bytes(&stats.stats.value).unwrap()
            }
        };
        let found = stats("stats").await;
        assert!(found.memory.usage > 0 && found.cpu.usage_usec > 0 && found.pids.current > 0);
        assert_eq!(found.memory.usage_limit, u64::MAX);
        assert!(
            stats("").await.memory.usage >= found.memory.usage / 2,
            "all containers"
        );

        let update = UpdateTaskRequest {
            id: "stats".into(),
            resources: MessageField::some(dyad_agent_api::protobuf::well_known_types::any::Any {
                value: br#"{"memory":{"limit":67108864},"cpu":{"quota":20000,"period":100000},"pids":{"limit":9}}"#.to_vec(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let _: Empty = machine.call(TASK, "Update", &update).await.unwrap();
        let found = stats("stats").await;
        assert_eq!((found.memory.usage_limit, found.pids.limit), (64 << 20, 9));

        let pids = PidsRequest {
            id: "stats".into(),
            ..Default::default()
        };
        let pids: PidsResponse = machine.call(TASK, "Pids", &pids).await.unwrap();
        assert!(!pids.processes.is_empty());
        container.end().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_paused_container_stands_still_and_takes_no_exec() {
    on_machine(|machine| async move {
        let script = "while true; do echo tick; done";
        let container = machine.create("pause", &["sh", "-c", script]).await;
        container.start().await;
        let request = PauseRequest {
            id: "pause".into(),
            ..Default::default()
        };
        let _: Empty = machine.call(TASK, "Pause", &request).await.unwrap();
        let _: Empty = machine.call(TASK, "Pause", &request).await.unwrap();
        assert_eq!(container.status().await, Status::PAUSED);
        container.add_exec("x", &["true"], |_| {}).await;
        let refused = container.start_exec("x").await.unwrap_err();
        assert_eq!(code(&refused), Code::FAILED_PRECONDITION);
        let request = ResumeRequest {
            id: "pause".into(),
            ..Default::default()
        };
        let _: Empty = machine.call(TASK, "Resume", &request).await.unwrap();
        assert_eq!(container.status().await, Status::RUNNING);
        container.start_exec("x").await.unwrap();
        assert_eq!(container.wait_exec("x").await, 0);
        container.delete_exec("x").await;
        container.end().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn volumes_follow_the_host() {
    on_machine(|machine| async move {
        let put = |files: Vec<File>, prune: &[&str]| {
            let request = PutFilesRequest {
                files,
                prune: prune.iter().map(ToString::to_string).collect(),
                ..Default::default()
            };
            let machine = machine.clone();
            async move {
                machine
                    .call::<_, PutFilesResponse>(SANDBOX, "PutFiles", &request)
                    .await
            }
        };
        let file = |path: &str, content: Content| File {
            path: path.into(),
            mode: 0o644,
            content: Some(content),
            ..Default::default()
        };
        let data = |path: &str, text: &str| file(path, Content::Data(text.into()));
        let base = "/run/dyad/volumes/v";
        let version = |number: u32| {
            vec![
                file(
                    &format!("{base}/..data"),
                    Content::Symlink(format!("..{number}")),
                ),
                file(
                    &format!("{base}/key"),
                    Content::Symlink("..data/key".into()),
                ),
                data(
                    &format!("{base}/..{number}/key"),
                    &format!("version {number}\n"),
                ),
                data("/run/dyad/volumes/hosts", &format!("10.0.0.{number} me\n")),
            ]
        };
        put(version(1), &[base]).await.unwrap();
        let mut memory = file(
            "/run/dyad/volumes/memory",
            Content::Filesystem(Filesystem {
                kind: "tmpfs".into(),
                options: vec!["size=1m".into()],
                ..Default::default()
            }),
        );
        memory.mode = 0o1777;
        put(vec![memory.clone()], &[]).await.unwrap();
        put(vec![memory], &[]).await.unwrap();

        let script = "cat; cat /v/key /etc/hosts; ls -a /v; echo ended > /empty/message; \
            df /memory | tail -1; stat -c %a /memory /empty; pwd";
        let container = machine
            .create_with("volumes", &["sh", "-c", script], |spec, _| {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                for (source, destination) in [
                    (base, "/v"),
                    ("/run/dyad/volumes/hosts", "/etc/hosts"),
                    ("/run/dyad/pod/volumes/empty", "/empty"),
                    ("/run/dyad/volumes/memory", "/memory"),
                ] {
                    mounts.push(json!({
                        "source": source, "destination": destination, "type": "bind",
                        "options": ["rbind", "rw"]
                    }));
                }
                spec["process"]["cwd"] = json!("/empty/work");
            })
            .await
            .unwrap();
        container.start().await;
        put(version(2), &[base]).await.unwrap();
        container.input().close();
        let out = container.read().await;
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[..2], ["version 2", "10.0.0.2 me"], "{out}");
        assert!(!lines.contains(&"..1"), "pruned: {out}");
        assert!(out.contains("1024"), "{out}");
        assert!(out.ends_with("1777\n777\n/empty/work\n"), "{out}");
        container.wait().await;

        let get = |path: &str, max_bytes| {
            let request = GetFileRequest {
                path: path.into(),
                max_bytes,
                ..Default::default()
            };
            let machine = machine.clone();
            async move {
                machine
                    .call::<_, GetFileResponse>(SANDBOX, "GetFile", &request)
                    .await
            }
        };
        let message = get("/run/dyad/pod/volumes/empty/message", 100)
            .await
            .unwrap();
        assert_eq!(message.data, b"ended\n");
        let message = get("/run/dyad/pod/volumes/empty/message", 2).await.unwrap();
        assert_eq!(message.data, b"d\n", "the end of it");
        for (path, expected) in [
            ("/run/dyad/volumes/none", Code::NOT_FOUND),
            ("/proc/1/environ", Code::INVALID_ARGUMENT),
        ] {
            assert_eq!(code(&get(path, 9).await.unwrap_err()), expected, "{path}");
        }
        let escape = data("/run/dyad/volumes/../containers/x", "x");
        let refused = put(vec![escape], &[]).await.unwrap_err();
        assert_eq!(code(&refused), Code::INVALID_ARGUMENT);
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn refusals_have_their_codes_and_leave_nothing() {
    on_machine(|machine| async move {
        let refused = |args: &'static [&'static str]| {
            let machine = machine.clone();
            async move {
                machine
                    .create_with("refused", args, |_, _| {})
                    .await
                    .map(|_| ())
                    .unwrap_err()
            }
        };
        let error = refused(&["no-such-program"]).await;
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{error}");
        assert!(
            text(&error).contains(r#"exec: "no-such-program": executable file not found in $PATH"#),
            "{error}"
        );
        let error = refused(&["/etc"]).await;
        assert!(text(&error).contains("is a directory"), "{error}");
        assert_eq!(
            code(&machine.state("refused").await.unwrap_err()),
            Code::NOT_FOUND
        );

        let container = machine.create("twice", &["sleep", "1000"]).await;
        let again = machine
            .create_with("twice", &["sleep", "1000"], |_, _| {})
            .await;
        assert_eq!(
            again.unwrap().pid(),
            container.pid(),
            "not started: the same answer"
        );
        assert_eq!(container.start().await, container.start().await);
        let again = machine
            .create_with("twice", &["sleep", "1000"], |_, _| {})
            .await;
        assert_eq!(code(&again.map(|_| ()).unwrap_err()), Code::ALREADY_EXISTS);
        let running = container.try_delete().await.unwrap_err();
        assert_eq!(code(&running), Code::FAILED_PRECONDITION);

        container.add_exec("x", &["no-such-program"], |_| {}).await;
        let error = container.start_exec("x").await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{error}");
        assert!(
            text(&error).contains("executable file not found in $PATH"),
            "{error}"
        );
        container.delete_exec("x").await;
        let missing = container.start_exec("x").await.unwrap_err();
        assert_eq!(code(&missing), Code::NOT_FOUND);
        container.end().await;
        assert_eq!(
            code(&machine.state("twice").await.unwrap_err()),
            Code::NOT_FOUND
        );

        // Nothing of the refused ones is in the way of a good one.
        let container = machine.create("refused", &["true"]).await;
        container.start().await;
        assert_eq!(container.wait().await, 0);
        container.delete().await;
        let left = machine.streams().await;
        for id in ["refused", "twice"] {
            assert!(
                left.iter().all(|stream| stream.container_id != id),
                "{left:?}"
            );
        }
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn an_id_can_be_used_again() {
    on_machine(|machine| async move {
        for word in ["first-of-some-length", "second", "third"] {
            let container = machine.create("again", &["echo", word]).await;
            container.start().await;
            assert_eq!(container.read().await, format!("{word}\n"));
            assert_eq!(container.wait().await, 0);
            container.delete().await;
        }
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_container_sees_its_own_cgroup() {
    on_machine(|machine| async move {
        let args = ["cat", "/proc/self/cgroup", "/sys/fs/cgroup/memory.max"];
        let container = machine
            .create_with("cgroup", &args, |spec, _| {
                // As CRI asks for it on a host with cgroup v1.
                spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
                spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
            })
            .await
            .unwrap();
        container.start().await;
        assert_eq!(container.read().await, "0::/\n67108864\n");
        container.wait().await;
        container.delete().await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn an_init_that_was_not_started_can_be_deleted() {
    on_machine(|machine| async move {
        let container = machine.create("unstarted", &["sleep", "1000"]).await;
        assert_eq!(container.status().await, Status::CREATED);
        assert_eq!(container.try_delete().await.unwrap().exit_status, 137);
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn the_pods_processes_share_its_network_and_memory() {
    on_machine(|machine| async move {
        let mounts = |spec: &mut serde_json::Value| {
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "source": "/run/dyad/shm", "destination": "/dev/shm", "type": "bind", "options": ["rbind"]
            }));
        };
        let first = machine
            .create_with("first", &["sh", "-c", "echo hello > /dev/shm/word; ip -4 addr show eth0; ip route; cat /sys/class/net/eth0/mtu; echo shown; exec nc -l -p 7000"], |spec, _| mounts(spec))
            .await
            .unwrap();
        first.start().await;
        let shown = first.read_until("shown").await;
        assert!(shown.contains("inet 10.0.2.15/24"), "{shown}");
        assert!(shown.contains("default via 10.0.2.2 dev eth0"), "{shown}");
        assert!(shown.contains("169.254.1.1 dev eth0"), "{shown}");
        assert!(shown.contains("\n1400\n"), "{shown}");
        let script =
            "cat /dev/shm/word; until echo over the net | nc 127.0.0.1 7000; do true; done";
        let second = machine
            .create_with("second", &["sh", "-c", script], |spec, _| mounts(spec))
            .await
            .unwrap();
        second.start().await;
        assert_eq!(second.read().await, "hello\n");
        second.wait().await;
        first.wait().await;
        first.delete().await;
        second.delete().await;
    });
}

async fn later<'a>(machine: &'a Machine, id: &str) -> Result<Container<'a>, CallError> {
    let args = ["cat", "/etc/hosts"];
    machine
        .create_with(id, &args, |_, options| {
            options.root_disk_serial = "image-later".into()
        })
        .await
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn an_image_that_is_plugged_in_later_is_found_and_let_go() {
    on_machine(|machine| async move {
        // The create comes first and waits for the disk.
        let (container, ()) =
            tokio::join!(later(&machine, "later"), machine.plug_in("image-later"));
        let container = container.unwrap();
        let second = later(&machine, "later2").await.unwrap();
        container.start().await;
        assert_eq!(container.wait().await, 0);
        container.delete().await;
        second.start().await;
        assert_eq!(second.wait().await, 0);
        second.delete().await;
        machine.unplug("image-later").await;

        let (container, ()) =
            tokio::join!(later(&machine, "later"), machine.plug_in("image-later"));
        let container = container.unwrap();
        container.start().await;
        assert_eq!(container.wait().await, 0);
        container.delete().await;
        machine.unplug("image-later").await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_host_that_comes_back_goes_on_where_the_other_was() {
    guest::run(async {
        let pod = Pod::new();
        let machine = Machine::boot(&pod).await;
        let script = "i=0; while read line; do echo $line $((i = i + 1)); done; exit 4";
        let container = machine.create("takeover", &["sh", "-c", script]).await;
        container.start().await;
        let input = container.input();
        input.write(b"one\ntwo\n").await.unwrap();
        container.read_until("two 2\n").await;
        input.write(b"three\n").await.unwrap();
        drop((container, input));

        let machine = machine.with_new_host().await;
        let streams = machine.streams().await;
        let stream = |fd| streams.iter().find(|stream| stream.fd == fd).unwrap();
        let container = machine.container("takeover");
        let mut seen = String::new();
        let mut output = container.output_from(stream(1).offset);
        let input = container.input_from(stream(0).offset);
        // The last line may have been lost with the first host, before it left it.
        if stream(0).offset < 14 {
            input.write(b"three\n").await.unwrap();
        }
        input.write(b"four\n").await.unwrap();
        guest::read_more(&mut output, &mut seen, "four 4\n").await;
        // All that the first host had not acknowledged comes, and nothing twice.
        let all = "one 1\ntwo 2\nthree 3\nfour 4\n";
        assert_eq!(seen, all[usize::try_from(stream(1).offset).unwrap()..]);
        input.close();
        assert_eq!(container.wait().await, 4);
        machine.shut_down(Duration::ZERO).await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn resources_are_told() {
    on_machine(|machine| async move {
        let request = ResourcesRequest::default();
        let found: ResourcesResponse = machine.call(SANDBOX, "Resources", &request).await.unwrap();
        assert_eq!(found.online_vcpus, 1);
        assert!(
            (100 << 20..256 << 20).contains(&found.memory_bytes),
            "{found:?}"
        );
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn what_a_container_wrote_is_there_after_the_machine_was_stopped() {
    guest::run(async {
        let pod = Pod::new();
        let machine = Machine::boot(&pod).await;
        let script = "trap 'echo bye >> /kept; exit 5' TERM; echo first > /kept; echo ready; while true; do sleep 0.1; done";
        let container = machine.create("kept", &["sh", "-c", script]).await;
        container.start().await;
        container.read_until("ready").await;
        machine.shut_down(Duration::from_secs(20)).await;

        let machine = Machine::boot(&pod).await;
        let container = machine.create("kept", &["cat", "/kept"]).await;
        container.start().await;
        assert_eq!(container.read().await, "first\nbye\n");
        container.wait().await;
        container.delete().await;
        machine.shut_down(Duration::ZERO).await;
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn a_disk_of_the_pods_last_sandbox_has_its_volumes_and_not_its_containers() {
    guest::run(async {
        let pod = Pod::new();
        let volumes = |spec: &mut serde_json::Value, _: &mut CreateOptions| {
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "source": "/run/dyad/pod/volumes", "destination": "/volumes", "type": "bind",
                "options": ["rbind", "rw"]
            }));
        };
        let write = "echo stays > /volumes/file; echo goes > /own; sync";
        let read = "cat /volumes/file; ls /own 2>/dev/null; true";
        for (inherited, script, expected) in [
            (false, write, ""),
            // The same sandbox's machine, started again.
            (false, read, "stays\n/own\n"),
            (true, read, "stays\n"),
        ] {
            let machine = Machine::boot_on(&pod, inherited).await;
            let args = ["sh", "-c", script];
            let container = machine.create_with("c", &args, volumes).await.unwrap();
            container.start().await;
            assert_eq!(container.read().await, expected);
            assert_eq!(container.wait().await, 0);
            // Not deleted: a machine that ends takes no leave of its containers.
            machine.shut_down(Duration::ZERO).await;
        }
    });
}

/// Prints what the issue measures: create, start to first output, exec to output.
#[test]
#[ignore = "a measurement; needs DYAD_GUEST and QEMU"]
fn measure_create_start_and_exec() {
    on_machine(|machine| async move {
        let mut times: HashMap<&str, Vec<Duration>> = HashMap::new();
        let mut note = |what, since: Instant| times.entry(what).or_default().push(since.elapsed());
        for round in 0..15 {
            let at = Instant::now();
            let container = machine
                .create_with(
                    &format!("time{round}"),
                    &["sh", "-c", "echo up; exec sleep 1000"],
                    |_, options| {
                        options.seccomp_filter = guest::filter_without_mkdir();
                    },
                )
                .await
                .unwrap();
            note("create", at);
            let at = Instant::now();
            container.start().await;
            note("start", at);
            container.read_until("up").await;
            note("start to output", at);
            let at = Instant::now();
            container.add_exec("x", &["echo", "up"], |_| {}).await;
            container.start_exec("x").await.unwrap();
            note("exec", at);
            container.read_exec("x").await;
            note("exec to output", at);
            container.wait_exec("x").await;
            let at = Instant::now();
            container.end().await;
            note("kill, wait and delete", at);
        }
        for (what, times) in &mut times {
            times.sort();
            println!(
                "{what}: median {:?}, least {:?}",
                times[times.len() / 2],
                times[0]
            );
        }
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn many_containers_come_and_go_at_once() {
    on_machine(|machine| async move {
        let one = |number: u32| {
            let machine = machine.clone();
            async move {
                let container = machine
                    .create(&format!("many{number}"), &["echo", "done"])
                    .await;
                container.start().await;
                assert_eq!(container.read().await, "done\n");
                assert_eq!(container.wait().await, 0);
                container.delete().await;
            }
        };
        futures::future::join_all((0..12).map(one)).await;
        let request = StreamsRequest::default();
        let left: StreamsResponse = machine.call(SANDBOX, "Streams", &request).await.unwrap();
        assert!(
            left.streams
                .iter()
                .all(|stream| !stream.container_id.starts_with("many"))
        );
    });
}
