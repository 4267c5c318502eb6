//! What is changed behind the shim's back ends in the right state, exit code and event.

use anyhow::{Context as _, Result};
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::events::Events;
use super::{Case, MACHINES, case};
use crate::context::{Container, Context, Handler, Pod, SOON, names, same};

pub const CASES: &[Case] = &[
    case!(a_process_that_is_killed_from_outside_ends_its_container_only).on(&[Handler::Dyad]),
    case!(a_machine_that_is_suspended_reset_and_shut_down_by_virsh_is_seen_to_be).on(MACHINES),
    case!(a_machine_that_ends_otherwise_has_an_exit_code_that_says_so).on(MACHINES),
];

fn a_process_that_is_killed_from_outside_ends_its_container_only(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    let neighbour = pod.idle()?;
    let container = pod.run("echo up; exec sleep 1000")?;
    container.says("up\n")?;
    let pid = context.crictl.inspect(&container.id)?["info"]["pid"].to_string();
    kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL)?;
    same("exit code", container.exited()?.exit_code, 137)?;
    same("pod", pod.status()?.state.as_str(), "SANDBOX_READY")?;
    neighbour.output("true").map(drop)
}

fn state(context: &Context<'_>, pod: &Pod<'_>, word: &str) -> Result<()> {
    until(SOON, &format!("dyadctl to tell of {word}"), || {
        let told = context.env.dyadctl(&["state", &pod.id])?;
        Ok(told.text().contains(word).then_some(()))
    })
}

fn ready_again<'a>(pod: &'a Pod<'_>) -> Result<Container<'a>> {
    same("pod", pod.status()?.state.as_str(), "SANDBOX_READY")?;
    let next = pod.idle().context("a container after a reboot")?;
    next.output("true")?;
    Ok(next)
}

fn a_machine_that_is_suspended_reset_and_shut_down_by_virsh_is_seen_to_be(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let before = pod.status()?.ip;
    let domain = context.env.domain_of(pod.name())?;
    let events = Events::listen(context)?;

    context.env.virsh(&["suspend", &domain])?;
    state(context, &pod, "its machine was suspended")?;
    let exec = container.exec("true")?;
    names(&exec.stderr, &["paused", "resume it first"])?;
    context.env.virsh(&["resume", &domain])?;
    state(context, &pod, "its machine was resumed")?;
    container.output("true")?;
    events.expect(&pod.id, &["/tasks/paused", "/tasks/resumed"])?;

    // What ran in it is over, as in a node that is reset; the pod is not.
    context.env.virsh(&["reset", &domain])?;
    same("exit code after reset", container.exited()?.exit_code, 137)?;
    let second = ready_again(&pod)?;
    context.env.virsh(&["reboot", &domain])?;
    second.exited()?;
    let third = ready_again(&pod)?;
    same("address", pod.status()?.ip, before)?;

    context.env.virsh(&["shutdown", &domain])?;
    same("exit code after shutdown", third.exited()?.exit_code, 0)?;
    until(SOON, "the pod to be over", || {
        Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
    })
}

fn a_machine_that_ends_otherwise_has_an_exit_code_that_says_so(
    context: &Context<'_>,
) -> Result<()> {
    for (how, exit_code) in [("destroy", 137), ("inject-nmi", 255)] {
        let pod = context.pod_with(|config| {
            // What makes a guest's kernel panic from outside.
            config["linux"]["sysctls"] = json!({"kernel.unknown_nmi_panic": "1"});
        })?;
        let container = pod.idle()?;
        container.output("true")?;
        let domain = context.env.domain_of(pod.name())?;
        context.env.virsh(&[how, &domain])?;
        same(how, container.exited()?.exit_code, exit_code)?;
        until(SOON, "the pod to be over", || {
            Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
        })?;
        pod.remove()?;
    }
    Ok(())
}
