//! Pods without a pause container: containerd asks the shim for the pod itself. What such
//! a pod does like any other is tried by the other themes' trials, for these handlers too.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::runs;
use dyad_e2e::host::Snapshot;
use dyad_e2e::wait::until;
use nix::unistd::Pid;
use serde_json::json;

use super::{Case, SANDBOXED, case};
use crate::context::{Context, Handler, Pod, SOON, names, refusal, same};

const CONTAINERS: &[Handler] = &[Handler::DyadSandboxed];
const MACHINES: &[Handler] = &[Handler::DyadVmSandboxed];

pub const CASES: &[Case] = &[
    case!(a_pod_without_a_pause_container_comes_and_goes)
        .on(SANDBOXED)
        .alone(),
    case!(what_a_pod_without_a_pause_container_cannot_be_is_named).on(SANDBOXED),
    case!(the_holder_reaps_and_shows_nothing_of_the_host).on(CONTAINERS),
    case!(the_size_of_a_machine_follows_the_pods_resources).on(MACHINES),
];

/// The process that holds the pod.
fn holder(pod: &Pod<'_>) -> Result<Pid> {
    let pid = pod.status()?.all["info"]["pid"]
        .as_i64()
        .context("the pod has no pid")?;
    Ok(Pid::from_raw(i32::try_from(pid)?))
}

fn a_pod_without_a_pause_container_comes_and_goes(context: &Context<'_>) -> Result<()> {
    let crictl = &context.crictl;
    let warm = context.pod()?;
    warm.output_of("true")?;
    warm.remove()?;
    let before = Snapshot::take(&context.env.dir);

    let pod = context.pod()?;
    let status = pod.status()?;
    same("pod state", status.state.as_str(), "SANDBOX_READY")?;
    let kind = if context.handler.is_machine() {
        "machine"
    } else {
        "container"
    };
    same("kind", &status.all["dyad"]["kind"], &json!(kind))?;
    let holder = holder(&pod)?;
    same("the holder runs", runs(holder), true)?;
    let (tasks, containers) = (
        context.env.ctr(&["tasks", "ls"])?.text(),
        context.env.ctr(&["containers", "ls"])?.text(),
    );
    same("a pause task", tasks.contains(&pod.id), false)?;
    same("a pause container", containers.contains(&pod.id), false)?;

    let writer =
        pod.run("echo shared > /dev/shm/x; echo done; trap 'exit 3' TERM; sleep 1000 & wait")?;
    writer.says("done\n")?;
    same(
        "/dev/shm",
        pod.output_of("cat /dev/shm/x")?.as_str(),
        "shared\n",
    )?;
    names(
        &pod.output_of("cat /etc/hosts; cat /etc/hostname")?,
        &["localhost", pod.name()],
    )?;
    same("exec", writer.output("echo $((6 * 7))")?.as_str(), "42\n")?;
    let failed = pod.run("exit 9")?;
    same("exit code", failed.exited()?.exit_code, 9)?;
    let usage = crictl.stats(&writer.id)?;
    if usage["memory"]["workingSetBytes"]["value"]
        .as_str()
        .is_none_or(|value| value == "0")
    {
        bail!("no working set in {usage}");
    }
    let of_pod = crictl.pod_stats(&pod.id)?;
    same(
        "pod in its stats",
        &of_pod["attributes"]["id"],
        &json!(pod.id),
    )?;
    names(
        &context
            .env
            .dyadctl(&["state", &pod.id])?
            .success("dyadctl state")?
            .text(),
        &[kind, "running"],
    )?;

    crictl.stop(&writer.id, 30)?;
    same("exit code", writer.status()?.exit_code, 3)?;
    crictl.stopp(&pod.id)?;
    same(
        "pod state",
        pod.status()?.state.as_str(),
        "SANDBOX_NOTREADY",
    )?;
    // Asked again, as kubelet does.
    crictl.stopp(&pod.id)?;
    crictl.rmp(&pod.id)?;
    context.remove_cgroup_of(&pod.config)?;
    until(SOON, "the holder to be gone", || {
        Ok((!runs(holder)).then_some(()))
    })?;
    before.nothing_new("the pod's removal")
}

fn what_a_pod_without_a_pause_container_cannot_be_is_named(context: &Context<'_>) -> Result<()> {
    let mut config = context.pod_config();
    config["linux"]["sysctls"] = json!({"kernel.panic": "7"});
    if !context.handler.is_machine() {
        let error = refusal(context.run_pod(context.handler, config))?;
        names(&error, &["sysctl kernel.panic", "host"])?;
        let panic = fs::read_to_string("/proc/sys/kernel/panic")?;
        same("the host's own changed", panic.trim() == "7", false)?;
        let mut config = context.pod_config();
        let map = json!([{"container_id": 0, "host_id": 100_000, "length": 65_536}]);
        config["linux"]["security_context"] = json!({"namespace_options":
            {"userns_options": {"mode": 0, "uids": map, "gids": map}}});
        let error = refusal(context.run_pod(context.handler, config))?;
        return names(&error, &["hostUsers"]);
    }
    let mut config = context.pod_config();
    config["linux"]["security_context"] = json!({"namespace_options": {"network": 2}});
    let error = refusal(context.run_pod(context.handler, config))?;
    names(&error, &["hostNetwork"])?;
    let mut config = context.pod_config();
    config["annotations"] = json!({"dyad.dev/vcpus": "none"});
    let error = refusal(context.run_pod(context.handler, config))?;
    names(&error, &["dyad.dev/vcpus", "none"])
}

fn the_holder_reaps_and_shows_nothing_of_the_host(context: &Context<'_>) -> Result<()> {
    let options = json!({"namespace_options": {"pid": 0}});
    let pod = context.pod_with(|config| config["linux"]["security_context"] = options.clone())?;
    let holder = PathBuf::from(format!("/proc/{}", holder(&pod)?));
    let status = fs::read_to_string(holder.join("status"))?;
    names(
        &status,
        &[
            "Uid:\t65535\t65535",
            "CapPrm:\t0000000000000000",
            "NoNewPrivs:\t1",
        ],
    )?;
    let root: Vec<_> = fs::read_dir(holder.join("root"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    same("the holder's root", root, vec!["holder".into()])?;

    // A child whose parent ends comes to PID 1, and goes: no zombie stays.
    let container = pod.run_with(
        "(sh -c 'sleep 0.2' & echo $! > /orphan); o=$(cat /orphan); \
         while [ -e /proc/$o ]; do usleep 50000; done; echo reaped; tr '\\0' ' ' </proc/1/cmdline",
        |config| config["linux"]["security_context"] = options.clone(),
    )?;
    names(&container.says("reaped\n")?, &["reaped"])?;
    let logs = until(SOON, "PID 1 to be named", || {
        Ok(Some(container.logs()?.out()).filter(|out| out.contains("dyad-pod")))
    })?;
    names(&logs, &[&pod.id])
}

fn the_size_of_a_machine_follows_the_pods_resources(context: &Context<'_>) -> Result<()> {
    let pod = context.pod_with(|config| {
        config["linux"]["resources"] = json!({
            "cpu_period": 100_000, "cpu_quota": 150_000, "memory_limit_in_bytes": 201_326_592,
        });
    })?;
    let machine = &pod.status()?.all["dyad"]["machine"];
    same("vCPUs", &machine["vcpus"], &json!(2))?;
    same("CPUs in the guest", pod.output_of("nproc")?.trim(), "2")
}
