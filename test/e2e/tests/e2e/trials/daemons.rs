//! Daemons die; pods go on, or end with the right exit and leave nothing.

use std::io::Read;
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::{Build, runs};
use dyad_e2e::host::Snapshot;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Case, DYAD, MACHINES, case, shim_of};
use crate::context::{Context, SOON, same};

pub const CASES: &[Case] = &[
    case!(pods_survive_containerds_kill_and_restart)
        .alone()
        .short(),
    // containerd gives up a stock shim whose task has no process left (core/runtime/v2/shim_load.go): 255.
    case!(an_exit_while_containerd_is_down_is_told_afterwards)
        .on(DYAD)
        .alone(),
    case!(machines_survive_libvirtds_kill_and_restart)
        .on(MACHINES)
        .alone(),
    case!(a_killed_shim_is_cleaned_up).on(DYAD).alone().short(),
];

fn pods_survive_containerds_kill_and_restart(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("trap 'exit 42' TERM; echo started; sleep 1000 & wait")?;
    container.says("started")?;
    context.env.kill_and_restart("containerd")?;

    same("pod state", pod.status()?.state.as_str(), "SANDBOX_READY")?;
    same(
        "state",
        container.status()?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;
    same("exec", container.output("echo again")?.as_str(), "again\n")?;
    // A new container in the old pod.
    same("output", pod.output_of("echo new")?.as_str(), "new\n")?;
    context.crictl.stop(&container.id, 30)?;
    same("exit code", container.status()?.exit_code, 42)?;
    pod.remove()
}

fn an_exit_while_containerd_is_down_is_told_afterwards(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // It ends when somebody has connected and hung up.
    let container = pod.run("echo started; nc -l -p 9000 >/dev/null </dev/null; exit 5")?;
    container.says("started")?;
    let address = format!("{}:9000", pod.status()?.ip);
    kill(context.env.daemon("containerd")?, Signal::SIGKILL)?;
    let mut connection = until(SOON, "the container to listen", || {
        Ok(TcpStream::connect(&address).ok())
    })?;
    connection.shutdown(std::net::Shutdown::Write)?;
    connection.set_read_timeout(Some(SOON))?;
    connection
        .read_to_end(&mut Vec::new())
        .context("wait for the process to hang up")?;

    context.env.refresh(Build::AsIs)?;
    same("exit code", container.exited()?.exit_code, 5)?;
    same("pod state", pod.status()?.state.as_str(), "SANDBOX_READY")?;
    pod.remove()
}

fn machines_survive_libvirtds_kill_and_restart(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run("trap 'exit 42' TERM; echo started; sleep 1000 & wait")?;
    container.says("started")?;
    context.env.kill_and_restart("libvirtd")?;

    same("exec", container.output("echo again")?.as_str(), "again\n")?;
    same("output", pod.output_of("echo new")?.as_str(), "new\n")?;
    context.crictl.stop(&container.id, 30)?;
    same("exit code", container.status()?.exit_code, 42)?;
    pod.remove()
}

fn a_killed_shim_is_cleaned_up(context: &Context<'_>) -> Result<()> {
    let warm = context.pod()?;
    warm.output_of("true")?;
    warm.remove()?;
    let before = Snapshot::take(&context.env.dir);

    let pod = context.pod()?;
    let container = pod.idle()?;
    let shim = shim_of(&pod.id)?;
    let process = context.crictl.inspect(&container.id)?["info"]["pid"]
        .as_i64()
        .context("no pid")?;
    kill(shim, Signal::SIGKILL)?;
    let status = container.exited()?;
    if status.exit_code == 0 {
        bail!("a container whose shim was killed exits with 0");
    }
    until(SOON, "the pod to be not ready", || {
        Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
    })?;
    let process = Pid::from_raw(i32::try_from(process)?);
    until(SOON, "the container's process to be gone", || {
        Ok((!runs(process)).then_some(()))
    })?;
    pod.remove()?;
    before.nothing_new("a shim's kill and the pod's removal")
}
