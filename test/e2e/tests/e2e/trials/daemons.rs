//! Daemons die; pods go on, or end with the right exit and leave nothing.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::{Build, runs};
use dyad_e2e::host::{Snapshot, shim_of};
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::resources::machine_of;
use super::{Case, DYAD, EVERY, MACHINES, OURS, case};
use crate::context::{Context, Handler, Pod, SOON, names, same};

/// A trial that makes pods of all handlers itself.
const ONCE: &[Handler] = &[Handler::Dyad];

pub const CASES: &[Case] = &[
    case!(pods_survive_containerds_kill_and_restart)
        .on(EVERY)
        .alone()
        .short(),
    case!(paused_and_kept_pods_of_every_kind_stay_so_over_containerds_restart)
        .on(ONCE)
        .alone(),
    // containerd gives up a stock shim whose task has no process left (core/runtime/v2/shim_load.go): 255.
    case!(an_exit_while_containerd_is_down_is_told_afterwards)
        .on(DYAD)
        .alone(),
    case!(machines_survive_libvirtds_kill_and_restart)
        .on(MACHINES)
        .alone(),
    case!(a_resized_machine_keeps_its_size_over_libvirtds_restart)
        .on(MACHINES)
        .alone(),
    case!(a_killed_shim_is_cleaned_up).on(OURS).alone().short(),
    case!(a_shim_that_hangs_is_ended_when_containerd_gives_it_up)
        .on(DYAD)
        .alone(),
    case!(damaged_records_lose_neither_the_pod_nor_its_traces)
        .on(DYAD)
        .alone(),
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

/// How long nothing may change after a restart: CRI and kubelet look again within a minute.
const WATCHED: Duration = Duration::from_secs(60);
const BETWEEN: Duration = Duration::from_secs(5);

/// A pod with one container, and the state it was brought to.
struct Kept<'a> {
    pod: Pod<'a>,
    container: String,
    address: String,
    state: &'static str,
    wake: &'static str,
}

impl Kept<'_> {
    /// As crictl and dyadctl see it now.
    fn check(&self, context: &Context<'_>) -> Result<()> {
        let name = self.pod.name();
        let pod = self.pod.status()?;
        same(&format!("{name}: pod"), pod.state.as_str(), "SANDBOX_READY")?;
        same(&format!("{name}: address"), &pod.ip, &self.address)?;
        let container = context.crictl.status(&self.container)?;
        same(
            &format!("{name}: container, {}", self.state),
            container.state.as_str(),
            "CONTAINER_RUNNING",
        )?;
        let state = context
            .env
            .dyadctl(&["state", &self.pod.id, "-o", "json"])?;
        let state = state.success("dyadctl state")?.text();
        names(&state, &[&format!("\"{}\"", self.state)])
    }
}

fn kept<'a>(
    context: &'a Context<'_>,
    handler: Handler,
    (state, verb, wake): (&'static str, &'static str, &'static str),
) -> Result<Kept<'a>> {
    let mut config = context.pod_config();
    config["metadata"]["name"] = json!(format!("{}-{state}", handler.name()));
    let pod = context.run_pod(handler, config)?;
    let container =
        pod.run("trap 'exit 42' TERM; echo started; while :; do sleep 1000 & wait $!; done")?;
    container.says("started")?;
    let (container, address) = (container.id.clone(), pod.status()?.ip);
    if !verb.is_empty() {
        let done = context.env.dyadctl(&[verb, &pod.id])?;
        done.success(&format!("dyadctl {verb}"))?;
    }
    Ok(Kept {
        pod,
        container,
        address,
        state,
        wake,
    })
}

/// All pods of all kinds and states at once, so that the minute is waited for once.
fn paused_and_kept_pods_of_every_kind_stay_so_over_containerds_restart(
    context: &Context<'_>,
) -> Result<()> {
    let mut all = Vec::new();
    for &handler in OURS {
        for state in [
            ("running", "", ""),
            ("paused", "pause", "resume"),
            ("stopped", "stop", "start"),
        ] {
            // Running ones are the next trial's.
            if !(handler.is_sandboxed() && state.1.is_empty()) {
                all.push(kept(context, handler, state)?);
            }
        }
    }
    context.env.kill_and_restart("containerd")?;
    let end = Instant::now() + WATCHED;
    while Instant::now() < end {
        for pod in &all {
            pod.check(context)?;
        }
        std::thread::sleep(BETWEEN);
    }
    for pod in &all {
        if !pod.wake.is_empty() {
            let done = context.env.dyadctl(&[pod.wake, &pod.pod.id])?;
            done.success(&format!("dyadctl {} {}", pod.wake, pod.pod.name()))?;
        }
        let exec = context.crictl.exec(&pod.container, &["echo", "again"])?;
        same(
            "exec",
            exec.success(pod.pod.name())?.text().as_str(),
            "again\n",
        )?;
        context.crictl.stop(&pod.container, 30)?;
        same(
            &format!("{}: exit code", pod.pod.name()),
            context.crictl.status(&pod.container)?.exit_code,
            42,
        )?;
        pod.pod.remove()?;
    }
    Ok(())
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
    let (pod, doomed) = (context.pod()?, context.pod()?);
    let container = pod.run("trap 'exit 42' TERM; echo started; sleep 1000 & wait")?;
    container.says("started")?;
    let lost = doomed.idle()?;
    let qemu = doomed.status()?.all["info"]["pid"].as_i64();
    let qemu = Pid::from_raw(i32::try_from(qemu.context("no pid")?)?);
    let libvirtd = context.env.daemon("libvirtd")?;
    kill(libvirtd, Signal::SIGKILL)?;
    until(SOON, "libvirtd to be gone", || {
        Ok((!runs(libvirtd)).then_some(()))
    })?;
    // What happens while nobody tells is seen afterwards.
    kill(qemu, Signal::SIGKILL)?;
    context.env.refresh(Build::AsIs)?;
    same("exit code is 0", lost.exited()?.exit_code == 0, false)?;
    until(SOON, "the ended machine's pod to be not ready", || {
        Ok((doomed.status()?.state == "SANDBOX_NOTREADY").then_some(()))
    })?;
    doomed.remove()?;

    same("exec", container.output("echo again")?.as_str(), "again\n")?;
    same("output", pod.output_of("echo new")?.as_str(), "new\n")?;
    context.crictl.stop(&container.id, 30)?;
    same("exit code", container.status()?.exit_code, 42)?;
    pod.remove()
}

/// One vCPU and that much memory for the container.
fn resize(context: &Context<'_>, container: &str, mib: u64) -> Result<()> {
    let memory = (mib << 20).to_string();
    context.crictl.update(container, &["--memory", &memory])
}

fn a_resized_machine_keeps_its_size_over_libvirtds_restart(context: &Context<'_>) -> Result<()> {
    let limit = |mib: u64| json!({"memory_limit_in_bytes": mib << 20});
    let pod = context.pod_with(|config| config["linux"]["resources"] = limit(256))?;
    let container = pod.run_with("trap 'exit 42' TERM; sleep 1000 & wait", |config| {
        config["linux"]["resources"] = limit(128);
    })?;
    let told = |mib: u64| -> Result<()> {
        let state = context.env.dyadctl(&["state", &pod.id])?;
        names(&state.text(), &[&format!("{mib} MiB")])
    };
    // What the guest has; its kernel keeps a part, the same at each size.
    let guest = || -> Result<u64> {
        let kib = container.output("sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")?;
        Ok(kib.trim().parse::<u64>().context("MemTotal")? >> 10)
    };
    let at_boot = guest()?;
    resize(context, &container.id, 256)?;
    told(machine_of(384))?;
    let grown = guest()?;
    if (at_boot + machine_of(384) - machine_of(256)).abs_diff(grown) > 4 {
        bail!("the guest had {at_boot} MiB, and has {grown} after 128 MiB more");
    }

    context.env.kill_and_restart("libvirtd")?;
    told(machine_of(384))?;
    same("the guest's memory", guest()?, grown)?;
    resize(context, &container.id, 160)?;
    told(machine_of(288))?;
    let shrunk = guest()?;
    if (at_boot + machine_of(288) - machine_of(256)).abs_diff(shrunk) > 4 {
        bail!("the guest had {at_boot} MiB at boot, and has {shrunk} with 32 MiB more");
    }
    resize(context, &container.id, 320)?;
    told(machine_of(448))?;
    context.crictl.stop(&container.id, 30)?;
    same("exit code", container.status()?.exit_code, 42)?;
    pod.remove()
}

/// The host as it is once a pod has been there.
pub fn warm(context: &Context<'_>) -> Result<Snapshot> {
    let warm = context.pod()?;
    warm.output_of("true")?;
    warm.remove()?;
    Ok(Snapshot::take(&context.env.dir))
}

fn process_of(context: &Context<'_>, container: &str) -> Result<Pid> {
    let process = context.crictl.inspect(container)?["info"]["pid"]
        .as_i64()
        .context("no pid")?;
    Ok(Pid::from_raw(i32::try_from(process)?))
}

pub fn gone(what: &str, pid: Pid) -> Result<()> {
    until(SOON, &format!("{what} to be gone"), || {
        Ok((!runs(pid)).then_some(()))
    })
}

fn a_killed_shim_is_cleaned_up(context: &Context<'_>) -> Result<()> {
    let before = warm(context)?;

    let pod = context.pod()?;
    let container = pod.idle()?;
    let shim = shim_of(&pod.id)?;
    let process = process_of(context, &container.id)?;
    kill(shim, Signal::SIGKILL)?;
    let status = container.exited()?;
    if status.exit_code == 0 {
        bail!("a container whose shim was killed exits with 0");
    }
    until(SOON, "the pod to be not ready", || {
        Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
    })?;
    gone("the container's process", process)?;
    pod.remove()?;
    before.nothing_new("a shim's kill and the pod's removal")
}

fn a_shim_that_hangs_is_ended_when_containerd_gives_it_up(context: &Context<'_>) -> Result<()> {
    let before = warm(context)?;

    let pod = context.pod()?;
    let container = pod.idle()?;
    let shim = shim_of(&pod.id)?;
    let process = process_of(context, &container.id)?;
    kill(shim, Signal::SIGSTOP)?;
    // A containerd that starts asks every shim, waits for some seconds, and gives it up.
    let restarted = context.env.kill_and_restart("containerd");
    let ended = gone("the hanging shim", shim);
    if ended.is_err() {
        // Nothing else would end it, nor what it holds.
        let _ = kill(shim, Signal::SIGKILL);
    }
    restarted.and(ended)?;
    gone("the container's process", process)?;
    same("state", container.exited()?.exit_code == 0, false)?;
    same("pod", pod.status()?.state.as_str(), "SANDBOX_NOTREADY")?;
    pod.remove()?;
    // containerd is another process now.
    until(SOON, "the host to be clean but for processes", || {
        let left = before.new_since();
        Ok(left
            .iter()
            .all(|line| line.starts_with("process "))
            .then_some(()))
    })
    .with_context(|| format!("left: {:?}", before.new_since()))?;
    same("the pod has a shim", shim_of(&pod.id).is_ok(), false)
}

fn damaged_records_lose_neither_the_pod_nor_its_traces(context: &Context<'_>) -> Result<()> {
    const DAMAGED: &str = "{\"version\": 1, \"ki";
    const NEWER: &str = "{\"version\": 9, \"all\": {\"is\": \"different\"}}";
    let warm = context.pod()?;
    warm.output_of("true")?;
    warm.remove()?;
    for record in [DAMAGED, NEWER] {
        let before = Snapshot::take(&context.env.dir);
        let pod = context.pod()?;
        let container = pod.idle()?;
        container.output("true")?;
        for verb in ["pause", "resume"] {
            context.env.dyadctl(&[verb, &pod.id])?.success(verb)?;
        }
        // With the machine's record damaged, a dead shim's pod is cleaned up; a container pod's
        // shim keeps none, as what `delete` has to know lies in the bundle.
        if context.handler.is_machine() {
            let domain = context.env.domain_of(pod.name())?;
            let machines = context.env.dir.join("dyad/lib/machines");
            let of_machine = machines
                .join(domain.trim_start_matches("dyad-"))
                .join("machine.json");
            names(&std::fs::read_to_string(&of_machine)?, &[&pod.id])?;
            std::fs::write(&of_machine, record)?;
        }
        let process = context.crictl.inspect(&container.id)?["info"]["pid"].as_i64();
        let process = Pid::from_raw(i32::try_from(process.context("no pid")?)?);
        kill(shim_of(&pod.id)?, Signal::SIGKILL)?;
        same("exit code is 0", container.exited()?.exit_code == 0, false)?;
        gone("the container's process", process)?;
        pod.remove()?;
        before.nothing_new("the end of a pod with damaged records")?;
    }
    Ok(())
}
