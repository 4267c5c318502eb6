//! The process gets what the spec says: user, capabilities, environment, confinement.

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::{Case, case};
use crate::context::{Context, Handler, names, same};

/// What the pod's holder does where there is no pause container.
const AND_HELD: &[Handler] = &[
    Handler::Runc,
    Handler::Dyad,
    Handler::DyadVm,
    Handler::DyadSandboxed,
];

pub const CASES: &[Case] = &[
    case!(a_process_runs_as_the_user_and_groups_asked_for),
    case!(capabilities_are_added_and_dropped),
    case!(environment_and_working_directory_are_set),
    case!(a_read_only_root_refuses_writes),
    case!(masked_and_readonly_paths_are_so),
    case!(sigpipe_ends_who_writes_for_nobody),
    case!(seccomp_and_no_new_privs_hold_for_init_and_exec).short(),
    case!(containers_of_a_pod_see_each_other_as_its_namespaces_say).on(AND_HELD),
    case!(sysctls_of_the_pod_are_set).on(AND_HELD),
];

/// A value of /proc/self/status.
fn field(status: &str, name: &str) -> Result<String> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("no {name} in {status}"))
}

fn a_process_runs_as_the_user_and_groups_asked_for(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let script = "id -u; id -g; id -G | tr ' ' '\\n' | sort -n | xargs echo; sleep 1000 & trap 'exit 0' TERM; wait";
    let container = pod.run_with(script, |config| {
        config["linux"]["security_context"] = json!({
            "run_as_user": {"value": 1000},
            "run_as_group": {"value": 1000},
            "supplemental_groups": [3000],
        });
    })?;
    let out = container.says("3000")?;
    same(
        "uid and gid",
        out.lines().take(2).collect::<Vec<_>>(),
        vec!["1000", "1000"],
    )?;
    // /etc/group of the image adds 2000 to what was asked for.
    names(&out, &["1000 2000 3000"])?;
    same(
        "exec",
        container.output("id -u; id -g")?.as_str(),
        "1000\n1000\n",
    )
}

/// execve keeps what is ignored, and both the shim and the guest's agent ignore it themselves.
fn sigpipe_ends_who_writes_for_nobody(context: &Context<'_>) -> Result<()> {
    const PIPE: u64 = 1 << 12;
    let pod = context.pod()?;
    let script = "cat /proc/self/status; echo end; sleep 1000 & trap 'exit 0' TERM; wait";
    let container = pod.run(script)?;
    let of_init = container.says("end")?;
    let of_exec = container.output("cat /proc/self/status")?;
    for (who, status) in [("init", of_init), ("exec", of_exec)] {
        let ignored = u64::from_str_radix(&field(&status, "SigIgn")?, 16)?;
        same(&format!("SIGPIPE of {who} is ignored"), ignored & PIPE, 0)?;
    }
    same(
        "yes | head",
        container.output("yes 2>&1 | head -n 1")?.as_str(),
        "y\n",
    )
}

fn capabilities_are_added_and_dropped(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let effective = |capabilities: serde_json::Value| -> Result<u64> {
        let status = pod.output_with("cat /proc/self/status", |config| {
            config["linux"]["security_context"] = json!({"capabilities": capabilities});
        })?;
        Ok(u64::from_str_radix(&field(&status, "CapEff")?, 16)?)
    };
    // Bits of linux/capability.h.
    const CHOWN: u64 = 1;
    const NET_ADMIN: u64 = 1 << 12;
    const NET_RAW: u64 = 1 << 13;
    let usual = effective(json!({}))?;
    same("usual set", (usual & CHOWN, usual & NET_ADMIN), (CHOWN, 0))?;
    let more =
        effective(json!({"add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["NET_RAW"]}))?;
    same("changed set", more, (usual | NET_ADMIN) & !NET_RAW)?;
    same(
        "empty set",
        effective(json!({"drop_capabilities": ["ALL"]}))?,
        0,
    )
}

fn environment_and_working_directory_are_set(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run_with(
        "pwd; echo \"$GREETING\"; trap 'exit 0' TERM; sleep 1000 & wait",
        |config| {
            config["envs"] = json!([{"key": "GREETING", "value": "hello, 'world' = \"ok\""}]);
            config["working_dir"] = json!("/srv/made here");
        },
    )?;
    container.says("/srv/made here\nhello, 'world' = \"ok\"\n")?;
    same(
        "exec",
        container
            .output("pwd; echo \"$GREETING\"; echo $PATH | cut -d: -f1")?
            .as_str(),
        "/srv/made here\nhello, 'world' = \"ok\"\n/usr/local/sbin\n",
    )
}

fn a_read_only_root_refuses_writes(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let out = pod.output_with(
        "touch /file 2>&1 || true; echo x >/dev/shm/file && cat /dev/shm/file",
        |config| {
            config["linux"]["security_context"] = json!({"readonly_rootfs": true});
        },
    )?;
    names(&out, &["Read-only file system", "x\n"])?;
    same(
        "writable root",
        pod.output_of("touch /file && ls /file")?.as_str(),
        "/file\n",
    )
}

fn masked_and_readonly_paths_are_so(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let out = pod.output_with(
        "wc -c </proc/meminfo; ls /var/www | wc -l; echo 1 >/etc/group 2>/dev/null && echo written || echo refused",
        |config| {
            config["linux"]["security_context"] = json!({
                "masked_paths": ["/proc/meminfo", "/var/www"],
                "readonly_paths": ["/etc"],
            });
        },
    )?;
    same("output", out.as_str(), "0\n0\nrefused\n")
}

fn seccomp_and_no_new_privs_hold_for_init_and_exec(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // unshare(CLONE_NEWUSER) is refused by containerd's default profile.
    let script = "cat /proc/self/status; unshare -U true 2>&1 && echo unshared; trap 'exit 0' TERM; sleep 1000 & wait";
    let container = pod.run_with(script, |config| {
        config["linux"]["security_context"] = json!({
            "seccomp": {"profile_type": 0},
            "no_new_privs": true,
        });
    })?;
    let init = container.says("unshare: ")?;
    let exec = container
        .exec("cat /proc/self/status; unshare -U true 2>&1 && echo unshared")?
        .text();
    for (who, status) in [("init", init), ("exec", exec)] {
        same(
            who,
            (
                field(&status, "Seccomp")?.as_str(),
                field(&status, "NoNewPrivs")?.as_str(),
            ),
            ("2", "1"),
        )?;
        if status.contains("unshared") {
            bail!("{who} may make a user namespace");
        }
    }
    let unconfined = pod.output_with("cat /proc/self/status", |config| {
        config["linux"]["security_context"] = json!({"seccomp": {"profile_type": 1}});
    })?;
    same(
        "unconfined",
        (
            field(&unconfined, "Seccomp")?.as_str(),
            field(&unconfined, "NoNewPrivs")?.as_str(),
        ),
        ("0", "0"),
    )
}

fn containers_of_a_pod_see_each_other_as_its_namespaces_say(context: &Context<'_>) -> Result<()> {
    // POD = 0, CONTAINER = 1 (CRI's NamespaceMode).
    for (pid_mode, shared) in [(1, false), (0, true)] {
        let options = json!({"namespace_options": {"pid": pid_mode}});
        let pod =
            context.pod_with(|config| config["linux"]["security_context"] = options.clone())?;
        let container = |script: &str| {
            pod.run_with(script, |config| {
                config["linux"]["security_context"] = options.clone()
            })
        };
        let _sleeper = container("exec sleep 7654")?;
        let looker = container(
            "ps -o args; echo looked; ls -l /proc/self/ns/ipc; trap 'exit 0' TERM; sleep 1 & wait",
        )?;
        let seen = looker.says("looked")?.contains("sleep 7654");
        same(
            &format!("with pid mode {pid_mode}, the other's process is seen"),
            seen,
            shared,
        )?;
    }
    Ok(())
}

fn sysctls_of_the_pod_are_set(context: &Context<'_>) -> Result<()> {
    let pod = context.pod_with(|config| {
        config["linux"]["sysctls"] = json!({"net.ipv4.ip_local_port_range": "20000 30000", "kernel.shm_rmid_forced": "1"});
    })?;
    let out = pod
        .output_of("cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced")?;
    same(
        "sysctls",
        out.split_whitespace().collect::<Vec<_>>(),
        vec!["20000", "30000", "1"],
    )
}
