//! Whose processes a container sees, as whom it runs, and what its kernel gives it: a machine's
//! guest does as the host does.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Case, DYAD, MACHINES, case};
use crate::context::{Context, names, same};

pub const CASES: &[Case] = &[
    case!(a_debug_container_joins_its_target_and_both_are_found_by_their_pids).on(DYAD),
    case!(who_shares_the_pods_processes_sees_them_and_an_init_only).on(MACHINES),
    case!(a_user_without_a_name_has_a_home_and_its_terminal).on(DYAD),
    case!(a_machine_has_the_devices_and_the_modules_that_are_asked_for).on(MACHINES),
];

/// CRI's NamespaceMode.
const POD: u8 = 0;
const CONTAINER: u8 = 1;
const TARGET: u8 = 3;

fn pid_mode(config: &mut Value, options: Value) {
    config["linux"]["security_context"]["namespace_options"] = options;
}

fn a_debug_container_joins_its_target_and_both_are_found_by_their_pids(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    // As kubelet asks for it.
    let own = |config: &mut Value| pid_mode(config, json!({"pid": CONTAINER}));
    let target = pod.run_with("exec sleep 4321", own)?;
    let script =
        "tr '\\0' ' ' </proc/1/cmdline; echo; ls -d /proc/1/root/etc; echo looked; exec sleep 1000";
    let debug = pod.run_with(script, |config| {
        pid_mode(config, json!({"pid": TARGET, "target_id": target.id}));
        config["linux"]["security_context"]["capabilities"] =
            json!({"add_capabilities": ["SYS_PTRACE"]});
    })?;
    names(
        &debug.says("looked")?,
        &["sleep 4321", "/proc/1/root/etc\n"],
    )?;
    names(&debug.output("cat /proc/1/cmdline")?, &["4321"])?;

    let netns = netns_of(&pod.status()?.all)?;
    let mut pids = Vec::new();
    for container in [&target, &debug] {
        let pid = context.crictl.inspect(&container.id)?["info"]["pid"].to_string();
        let found = fs::metadata(format!("/proc/{pid}/ns/net"))
            .with_context(|| format!("the namespace of {pid}"))?;
        same(&format!("namespace of {pid}"), found.ino(), netns)?;
        pids.push(pid);
    }
    same("pids of two containers are one", pids[0] == pids[1], false)?;

    context.crictl.stop(&target.id, 0)?;
    same("exit code of who joined", debug.exited()?.exit_code, 137)
}

/// The inode of the pod's network namespace.
fn netns_of(status: &Value) -> Result<u64> {
    let path = status["info"]["runtimeSpec"]["linux"]["namespaces"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|namespace| namespace["type"] == "network")
        .and_then(|namespace| namespace["path"].as_str())
        .context("no network namespace in the pod's status")?;
    Ok(fs::metadata(path).with_context(|| path.to_owned())?.ino())
}

fn who_shares_the_pods_processes_sees_them_and_an_init_only(context: &Context<'_>) -> Result<()> {
    let shared = |config: &mut Value| pid_mode(config, json!({"pid": POD}));
    let pod = context.pod_with(shared)?;
    let mate = pod.run_with("exec sleep 4322", shared)?;
    let script = "(usleep 1000 &); usleep 500000; for p in /proc/[0-9]*; do read -r name <$p/comm; \
        echo \"proc ${p#/proc/} $name\"; done 2>/dev/null; echo looked; exec sleep 1000";
    let looker = pod.run_with(script, shared)?;
    let out = looker.says("looked")?;
    names(&out, &["proc 1 pause\n", " sleep\n", " sh\n"])?;
    // The pause process, its mate and itself: nobody of the guest, and no orphan.
    same(
        "processes",
        out.lines().filter(|line| line.starts_with("proc ")).count(),
        3,
    )?;
    names(
        &looker.output("read -r name </proc/1/comm; echo $name")?,
        &["pause"],
    )?;
    context.crictl.stop(&looker.id, 0)?;
    looker.exited()?;
    same("its mate's exec", mate.output("echo on")?.as_str(), "on\n")
}

fn a_user_without_a_name_has_a_home_and_its_terminal(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let script = "env | grep ^HOME=; exec sleep 1000";
    let container = pod.run_with(script, |config| {
        config["linux"]["security_context"]["run_as_user"] = json!({"value": 4242});
    })?;
    same("at start", container.says("HOME")?.as_str(), "HOME=/\n")?;
    names(&container.output("env")?, &["HOME=/\n"])?;
    let command = "stat -c %u $(tty); echo again >$(tty)";
    let args = ["exec", "-it", &container.id, "sh", "-c", command];
    let said = context.crictl.on_a_terminal(&args, b"")?.text();
    names(&said, &["4242", "again"])?;
    let failed = context.crictl.exec(&container.id, &["/no/such"])?;
    names(&failed.stderr, &["/no/such"])?;
    same(
        "the helper's lines",
        failed.stderr.contains("helper"),
        false,
    )
}

fn a_machine_has_the_devices_and_the_modules_that_are_asked_for(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod_with(|config| {
        config["linux"]["security_context"] = json!({"privileged": true});
    })?;
    let script = "true <>/dev/vpn && echo opened; exec sleep 1000";
    let vpn = pod.run_with(script, |config| {
        config["devices"] = json!([
            {"container_path": "/dev/vpn", "host_path": "/dev/net/tun", "permissions": "rwm"}
        ]);
    })?;
    vpn.says("opened")?;
    let script = "for kind in bridge wireguard veth; do ip link add test0 type $kind && \
        ip link del test0 && echo $kind; done";
    let out = pod.output_with(script, |config| {
        config["linux"]["security_context"]["privileged"] = json!(true);
    })?;
    same("modules", out.as_str(), "bridge\nwireguard\nveth\n")
}
