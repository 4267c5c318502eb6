//! A pod's and a container's way from create to removal.

use std::time::Duration;

use anyhow::{Result, bail};
use dyad_e2e::wait::{unchanged, until};

use super::{Case, case};
use crate::context::{Container, Context, Pod, SOON, names, same};

pub const CASES: &[Case] = &[
    case!(a_pod_goes_through_its_whole_life).short(),
    case!(the_exit_code_comes_through).short(),
    case!(stop_sends_sigterm_and_its_handler_decides_the_exit_code).short(),
    case!(a_process_that_ignores_sigterm_is_killed_after_the_grace).short(),
    case!(a_process_killed_by_a_signal_exits_with_128_and_its_number),
    case!(a_command_that_does_not_exist_is_named),
    case!(a_container_is_started_again_in_the_same_pod),
    case!(stopping_a_pod_stops_its_containers),
    case!(stop_and_remove_may_be_asked_twice),
    case!(a_paused_container_stands_still_until_resumed).short(),
    case!(many_pods_come_and_go_at_once).alone(),
];

fn a_pod_goes_through_its_whole_life(context: &Context<'_>) -> Result<()> {
    let crictl = &context.crictl;
    let pod = context.pod()?;
    same("pod state", pod.status()?.state.as_str(), "SANDBOX_READY")?;

    let container =
        pod.create(&pod.container_config("echo hello; trap 'exit 0' TERM; sleep 1000 & wait"))?;
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_CREATED",
    )?;
    crictl.start(&container.id)?;
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;
    container.says("hello\n")?;
    let told = crictl
        .run(&["logs", &container.id], b"")?
        .success("crictl logs")?;
    same("logs", told.text().as_str(), "hello\n")?;
    same(
        "exec",
        container.output("echo $((6 * 7))")?.as_str(),
        "42\n",
    )?;

    crictl.stop(&container.id, 30)?;
    let status = container.status()?;
    same("state", status.state.as_str(), "CONTAINER_EXITED")?;
    same(
        "exit code and reason",
        (status.exit_code, status.reason.as_str()),
        (0, "Completed"),
    )?;
    crictl.rm(&container.id)?;
    same(
        "container is listed",
        crictl.containers()?.contains(&container.id),
        false,
    )?;

    crictl.stopp(&pod.id)?;
    same(
        "pod state",
        pod.status()?.state.as_str(),
        "SANDBOX_NOTREADY",
    )?;
    crictl.rmp(&pod.id)?;
    same("pod is listed", crictl.pods()?.contains(&pod.id), false)
}

fn the_exit_code_comes_through(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let status = pod.run("exit 3")?.exited()?;
    same(
        "exit code and reason",
        (status.exit_code, status.reason.as_str()),
        (3, "Error"),
    )
}

fn stop_sends_sigterm_and_its_handler_decides_the_exit_code(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("trap 'echo bye; exit 42' TERM; echo ready; sleep 1000 & wait")?;
    container.says("ready")?;
    context.crictl.stop(&container.id, 60)?;
    same("exit code", container.status()?.exit_code, 42)?;
    same("output", container.logs()?.out().as_str(), "ready\nbye\n")
}

fn a_process_that_ignores_sigterm_is_killed_after_the_grace(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("trap '' TERM; echo ready; while :; do sleep 1000; done")?;
    container.says("ready")?;
    context.crictl.stop(&container.id, 1)?;
    same("exit code", container.status()?.exit_code, 137)
}

fn a_process_killed_by_a_signal_exits_with_128_and_its_number(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("exec sleep 1000")?;
    // PID 1 takes no unhandled signal from inside its namespace, but all from outside.
    context
        .env
        .ctr(&["tasks", "kill", "--signal", "SIGUSR1", &container.id])?;
    same("exit code", container.exited()?.exit_code, 128 + 10)
}

fn a_command_that_does_not_exist_is_named(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let mut config = pod.container_config("");
    config["command"] = serde_json::json!(["/no/such/program"]);
    let started = pod
        .create(&config)
        .and_then(|container| context.crictl.start(&container.id));
    names(&crate::context::refusal(started)?, &["/no/such/program"])?;
    // The pod is none the worse for it.
    same(
        "output",
        pod.output_of("echo still here")?.as_str(),
        "still here\n",
    )
}

fn a_container_is_started_again_in_the_same_pod(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    for attempt in 0..3 {
        let out = pod.output_with(&format!("echo attempt {attempt}"), |config| {
            config["metadata"] = serde_json::json!({"name": "again", "attempt": attempt});
        })?;
        same("output", out, format!("attempt {attempt}\n"))?;
    }
    Ok(())
}

fn stopping_a_pod_stops_its_containers(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let (one, two) = (pod.idle()?, pod.idle()?);
    context.crictl.stopp(&pod.id)?;
    for container in [one, two] {
        same(
            "state",
            container.status()?.state.as_str(),
            "CONTAINER_EXITED",
        )?;
    }
    Ok(())
}

fn stop_and_remove_may_be_asked_twice(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    for _ in 0..2 {
        context.crictl.stop(&container.id, 10)?;
    }
    for _ in 0..2 {
        context.crictl.stopp(&pod.id)?;
    }
    context.crictl.rmp(&pod.id)
}

fn a_paused_container_stands_still_until_resumed(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("i=0; while :; do i=$((i + 1)); echo $i; usleep 20000; done")?;
    container.says("3\n")?;
    let length = |container: &Container<'_>| Ok(std::fs::metadata(&container.log)?.len());

    context.env.ctr(&["tasks", "pause", &container.id])?;
    // What it wrote before may still be on its way.
    let mut last = 0;
    until(SOON, "the output to stop", || {
        let now = length(&container)?;
        std::thread::sleep(Duration::from_millis(200));
        Ok((std::mem::replace(&mut last, now) == now).then_some(()))
    })?;
    unchanged(Duration::from_secs(1), "the paused container's log", || {
        length(&container)
    })?;

    context.env.ctr(&["tasks", "resume", &container.id])?;
    let paused_at = length(&container)?;
    until(SOON, "the output to go on", || {
        Ok((length(&container)? > paused_at + 100).then_some(()))
    })?;

    // Nothing is missing and nothing came twice.
    let out = container.logs()?.out();
    for (line, number) in out.lines().zip(1..) {
        same("line", line.to_owned(), number.to_string())?;
    }
    Ok(())
}

fn many_pods_come_and_go_at_once(context: &Context<'_>) -> Result<()> {
    let count = if context.handler.is_machine() { 3 } else { 8 };
    let live = |_| -> Result<()> {
        let pod: Pod<'_> = context.pod()?;
        let name = pod.name().to_owned();
        same("hostname", pod.output_of("hostname")?, format!("{name}\n"))?;
        pod.remove()
    };
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..count)
            .map(|number| scope.spawn(move || live(number)))
            .collect();
        lives.into_iter().try_for_each(|life| {
            life.join()
                .unwrap_or_else(|_| bail!("a pod's thread panicked"))
        })
    })
}
