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
    case!(a_guest_that_reboots_powers_off_or_panics_by_itself_is_seen_to).on(MACHINES),
    case!(reboot_in_a_container_ends_the_container_and_not_its_machine).on(MACHINES),
    case!(a_machine_that_is_suspended_reset_and_shut_down_by_virsh_is_seen_to_be).on(MACHINES),
    case!(a_machine_that_ends_otherwise_has_an_exit_code_that_says_so).on(MACHINES),
];

/// dyadctl's exit code for what there is not, and for what the state does not allow.
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;

/// A container's whole life, as containerd is told of it.
const LIFE: &[&str] = &[
    "/tasks/create",
    "/tasks/start",
    "/tasks/exit",
    "/tasks/delete",
];

fn kill_init(context: &Context<'_>, container: &Container<'_>) -> Result<()> {
    let pid = context.crictl.inspect(&container.id)?["info"]["pid"].to_string();
    kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL).context("kill the container's init")
}

fn a_process_that_is_killed_from_outside_ends_its_container_only(
    context: &Context<'_>,
) -> Result<()> {
    let events = Events::listen(context)?;
    let pod = context.pod()?;
    let neighbour = pod.idle()?;
    let container = pod.run("echo up; exec sleep 1000")?;
    container.says("up\n")?;
    kill_init(context, &container)?;
    same("exit code", container.exited()?.exit_code, 137)?;
    events.expect(&container.id, LIFE)?;
    same("pod", pod.status()?.state.as_str(), "SANDBOX_READY")?;
    neighbour.output("true")?;
    // It is over for good: what comes next is another container, as kubelet makes it.
    let start = context.env.dyadctl(&["start", &container.id])?;
    same(
        &format!("dyadctl start of what has ended: {}", start.stderr),
        [NOT_FOUND, REFUSED].contains(&start.code()),
        true,
    )?;
    names(&start.stderr, &[&container.id[..12]])?;

    // So is one in its second life.
    let again = pod.run("echo up; exec sleep 1000")?;
    again.says("up\n")?;
    for args in [
        &["stop", &again.id, "--grace", "0"][..],
        &["start", &again.id],
    ] {
        context.env.dyadctl(args)?.success("dyadctl")?;
    }
    again.says("up\nup\n")?;
    state_pid_kill(context, &pod, &again)?;
    same("exit code", again.exited()?.exit_code, 137)?;
    events.expect(&again.id, LIFE)?;
    neighbour.output("true").map(drop)
}

/// containerd knows the pid of a container's first life only.
fn state_pid_kill(context: &Context<'_>, pod: &Pod<'_>, container: &Container<'_>) -> Result<()> {
    let told = context
        .env
        .dyadctl(&["state", &pod.id, "-o", "json"])?
        .success("dyadctl state")?
        .text();
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let pid = told["tasks"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| entry["container_id"] == json!(container.id))
        .and_then(|entry| entry["pid"].as_i64())
        .with_context(|| format!("no pid in {told}"))?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL).context("kill its init")
}

/// CONTAINER in CRI's NamespaceMode: what kubelet asks for.
const CONTAINER: u8 = 1;

/// In a machine pod such a container is root of the guest, and of nothing else.
fn privileged(config: &mut serde_json::Value) {
    config["linux"]["security_context"] = json!({"privileged": true});
}

fn over(pod: &Pod<'_>) -> Result<()> {
    until(SOON, "the pod to be over", || {
        Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
    })
}

fn a_guest_that_reboots_powers_off_or_panics_by_itself_is_seen_to(
    context: &Context<'_>,
) -> Result<()> {
    // By sysrq: reboot(2) ends only the PID namespace that a container is in.
    for (what, exit_code, goes_on) in [
        ("echo b > /proc/sysrq-trigger", 137, true),
        ("echo o > /proc/sysrq-trigger", 0, false),
        ("echo c > /proc/sysrq-trigger", 255, false),
    ] {
        let events = Events::listen(context)?;
        let pod = context.pod_with(privileged)?;
        let address = pod.status()?.ip;
        let container = pod.run("echo up; exec sleep 1000")?;
        container.says("up\n")?;
        let trigger = pod.run_with(
            &format!(
                "echo armed; until [ -e /dev/shm/go ]; do usleep 50000; done; {what}; sleep 1000"
            ),
            privileged,
        )?;
        trigger.says("armed\n")?;
        // Nobody may be left to tell how this ended.
        drop(trigger.exec("touch /dev/shm/go")?);
        same(what, container.exited()?.exit_code, exit_code)?;
        same(what, trigger.exited()?.exit_code, exit_code)?;
        events.expect(&container.id, LIFE).context(what)?;
        if goes_on {
            let next = ready_again(&pod)?;
            same("address", pod.status()?.ip, address)?;
            next.output("true")?;
        } else {
            over(&pod)?;
            state_of_what_is_over(context, &pod)?;
        }
        pod.remove()?;
    }
    Ok(())
}

/// Its domain is gone with it, or off.
fn state_of_what_is_over(context: &Context<'_>, pod: &Pod<'_>) -> Result<()> {
    let Ok(domain) = context.env.domain_of(pod.name()) else {
        return Ok(());
    };
    until(SOON, "the machine to be off", || {
        match context.env.virsh(&["domstate", &domain]) {
            Ok(state) => Ok((state.trim() == "shut off").then_some(())),
            Err(_) => Ok(context.env.domain_of(pod.name()).is_err().then_some(())),
        }
    })
}

/// reboot(2) of a process in a PID namespace of its own ends that namespace's init, by SIGHUP
/// or SIGINT.
fn reboot_in_a_container_ends_the_container_and_not_its_machine(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod_with(|config| {
        privileged(config);
        config["linux"]["security_context"]["namespace_options"] = json!({"pid": CONTAINER});
    })?;
    let neighbour = pod.idle()?;
    let boot = neighbour.output("cat /proc/sys/kernel/random/boot_id")?;
    for (command, exit_code) in [("reboot -f", 129), ("poweroff -f", 130)] {
        let container = pod.run_with(&format!("{command}; sleep 1000"), |config| {
            privileged(config);
            config["linux"]["security_context"]["namespace_options"] = json!({"pid": CONTAINER});
        })?;
        same(command, container.exited()?.exit_code, exit_code)?;
    }
    same(
        "boot",
        neighbour.output("cat /proc/sys/kernel/random/boot_id")?,
        boot,
    )
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
    over(&pod)
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
        over(&pod)?;
        pod.remove()?;
    }
    Ok(())
}
