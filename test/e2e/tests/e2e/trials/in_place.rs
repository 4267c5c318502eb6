//! What Kubernetes has no word for, asked of the shim: pause, stop and start in place.

use std::fs;

use anyhow::Result;

use super::{Case, DYAD, OURS, case};
use crate::context::{Context, names, same};

/// dyadctl's exit code for what the state does not allow.
const REFUSED: i32 = 4;

pub const CASES: &[Case] = &[
    case!(a_container_starts_again_on_its_writable_layer_and_its_log)
        .on(OURS)
        .short(),
    case!(a_pod_that_is_stopped_and_started_keeps_its_address).on(OURS),
    case!(a_restarted_pod_runs_again_in_place).on(DYAD),
    case!(a_paused_pod_refuses_exec_and_looks_running_to_cri).on(OURS),
    case!(what_is_so_already_is_no_error).on(DYAD),
    case!(a_checkpoint_leaves_a_container_running_and_a_machine_refuses_it).on(DYAD),
];

/// Tells in which life it is, and keeps count in its writable layer.
const LIVES: &str = "trap 'echo stopped; exit 7' TERM; echo x >> /lives; \
     echo life $(wc -l < /lives); while :; do sleep 1000 & wait $!; done";

fn dyadctl(context: &Context<'_>, args: &[&str]) -> Result<String> {
    let done = context.env.dyadctl(args)?;
    Ok(done.success(&format!("dyadctl {args:?}"))?.text())
}

fn a_container_starts_again_on_its_writable_layer_and_its_log(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let neighbour = pod.idle()?;
    let container = pod.run(LIVES)?;
    container.says("life 1\n")?;

    dyadctl(context, &["stop", &container.id, "--grace", "20s"])?;
    container.says("stopped\n")?;
    // Neither containerd nor kubelet is told of an end.
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;
    let exec = container.exec("true")?;
    same(
        "exec in a stopped container succeeds",
        exec.status.success(),
        false,
    )?;
    names(&exec.stderr, &["stopped and kept", "start it first"])?;
    neighbour.output("true")?;

    dyadctl(context, &["start", &container.id])?;
    same(
        "log",
        container.says("life 2\n")?.as_str(),
        "life 1\nstopped\nlife 2\n",
    )?;
    container.output("true")?;

    context.crictl.stop(&container.id, 20)?;
    same("exit code", container.exited()?.exit_code, 7)
}

fn a_checkpoint_leaves_a_container_running_and_a_machine_refuses_it(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("n=0; while :; do n=$((n + 1)); echo n=$n; sleep 0.1; done")?;
    container.says("n=2\n")?;
    let archive = context.env.dir.join(format!("{}.tar", container.id));
    let export = format!("--export={}", archive.display());
    let args = ["checkpoint", export.as_str(), container.id.as_str()];
    let done = context.crictl.run(&args, b"")?;
    if context.handler.is_machine() {
        same("checkpoint succeeds", done.status.success(), false)?;
        names(&done.stderr, &["only containers of kind container"])?;
    } else {
        done.success("crictl checkpoint")?;
        let size = fs::metadata(&archive)?.len();
        fs::remove_file(&archive)?;
        same("the archive has something in it", size > 0, true)?;
    }
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;
    container.says("n=40\n")?;
    Ok(())
}

fn a_pod_that_is_stopped_and_started_keeps_its_address(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run(LIVES)?;
    container.says("life 1\n")?;
    let before = pod.status()?;

    dyadctl(context, &["stop", &pod.id, "--grace", "20s"])?;
    let stopped = pod.status()?;
    same("pod state", stopped.state.as_str(), "SANDBOX_READY")?;
    same("address", &stopped.ip, &before.ip)?;
    if context.handler.is_machine() {
        let domain = context.env.domain_of(pod.name())?;
        same(
            "domain",
            context.env.virsh(&["domstate", &domain])?.trim(),
            "shut off",
        )?;
    }

    dyadctl(context, &["start", &pod.id])?;
    container.says("life 2\n")?;
    let addresses = container.output("ip -4 addr show eth0")?;
    names(&addresses, &[&before.ip])
}

fn a_restarted_pod_runs_again_in_place(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run(LIVES)?;
    container.says("life 1\n")?;
    let before = pod.status()?;
    // The number of a domain is new with each power-on.
    let domain = |context: &Context<'_>| match context.handler.is_machine() {
        true => {
            let name = context.env.domain_of(pod.name())?;
            context.env.virsh(&["domid", &name])
        }
        false => Ok(String::new()),
    };
    let number = domain(context)?;
    dyadctl(context, &["restart", &pod.id, "--grace", "20s"])?;
    container.says("life 2\n")?;
    // A reset is a power cut: what was not written out is lost.
    container.output("sync")?;
    dyadctl(context, &["restart", &pod.id, "--force"])?;
    container.says("life 3\n")?;
    same("domain", domain(context)?, number)?;
    let after = pod.status()?;
    same("address", &after.ip, &before.ip)?;
    same("pod", after.state.as_str(), "SANDBOX_READY")?;
    same(
        "container",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )
}

fn a_paused_pod_refuses_exec_and_looks_running_to_cri(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    dyadctl(context, &["pause", &pod.id])?;
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;
    names(&dyadctl(context, &["state", &pod.id])?, &["paused"])?;
    let exec = container.exec("true")?;
    names(&exec.stderr, &["paused", "resume it first"])?;
    let stop = context.env.dyadctl(&["stop", &pod.id])?;
    same("dyadctl stop", stop.code(), REFUSED)?;
    names(&stop.stderr, &["resume it first"])?;
    dyadctl(context, &["resume", &pod.id])?;
    container.output("true")?;
    Ok(())
}

fn what_is_so_already_is_no_error(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run(LIVES)?;
    container.says("life 1\n")?;
    for verb in ["start", "resume", "pause", "pause", "resume", "resume"] {
        dyadctl(context, &[verb, &pod.id])?;
    }
    for verb in ["stop", "stop", "start", "start"] {
        dyadctl(context, &[verb, &container.id])?;
    }
    container.says("life 2\n")?;
    let log = fs::read_to_string(&container.log)?;
    same("lives", log.matches("life").count(), 2)
}
