//! What nobody's `delete` could remove is swept, and what somebody owns is not.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::command;
use dyad_e2e::env::Build;
use dyad_e2e::host::shim_of;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::daemons::{gone, warm};
use super::{Case, case};
use crate::context::{Context, Handler, Pod, SOON, names};

pub const CASES: &[Case] = &[
    case!(a_dead_shims_machine_is_ended_though_libvirtd_hangs)
        .on(&[Handler::DyadVm])
        .alone(),
    case!(what_a_power_cut_leaves_is_swept_and_what_runs_is_not)
        .on(&[Handler::DyadVm])
        .alone(),
];

/// QEMU, whose pid is the pod's.
fn qemu_of(pod: &Pod<'_>) -> Result<Pid> {
    let pid = pod.status()?.all["info"]["pid"].as_i64();
    Ok(Pid::from_raw(i32::try_from(pid.context("no pid")?)?))
}

fn a_dead_shims_machine_is_ended_though_libvirtd_hangs(context: &Context<'_>) -> Result<()> {
    let before = warm(context)?;
    let pod = context.pod()?;
    let container = pod.idle()?;
    let qemu = qemu_of(&pod)?;
    let libvirtd = context.env.daemon("libvirtd")?;

    kill(libvirtd, Signal::SIGSTOP)?;
    kill(shim_of(&pod.id)?, Signal::SIGKILL)?;
    // Else the same pod would run twice as soon as kubelet has made it anew.
    let ended = gone("QEMU, with libvirtd stopped", qemu);
    kill(libvirtd, Signal::SIGCONT)?;
    ended?;
    // Its `delete` has given up; what it left to do is done by the sweep that it began.
    let domain = format!("{}/{}", "default", pod.name());
    until(Duration::from_secs(60), "the domain to be gone", || {
        let table = context.env.virsh(&["list", "--all", "--title"])?;
        Ok((!table.contains(&domain)).then_some(()))
    })?;
    container.exited()?;
    pod.remove()?;
    before.nothing_new("a dead shim and a libvirtd that hung")
}

/// Kills what serves the pod, and takes away what is in memory on a host.
fn cut_power(context: &Context<'_>, pod: &Pod<'_>, qemu: Pid) -> Result<()> {
    let containerd = context.env.daemon("containerd")?;
    let shim = shim_of(&pod.id)?;
    for pid in [containerd, shim, qemu] {
        kill(pid, Signal::SIGKILL)?;
        gone("a killed process", pid)?;
    }
    let forget = "for dir; do \
         awk -v dir=\"$dir\" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r | xargs -r umount -l; \
         rm -rf \"$dir\"; done";
    let tasks = context
        .env
        .dir
        .join("containerd/state/io.containerd.runtime.v2.task/k8s.io");
    let of_pod = std::fs::read_dir(&tasks)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|bundle| {
            let launch = std::fs::read_to_string(bundle.join("dyad.json"));
            launch.is_ok_and(|text| text.contains(&pod.id))
        });
    let mut shell = Command::new("sh");
    shell
        .args(["-ec", forget, "sh"])
        .args(of_pod)
        .arg(context.env.dir.join("dyad/run/k8s.io").join(&pod.id));
    command::run(&mut shell, b"", SOON)?.success("forget the pod's bundles")?;
    context.env.refresh(Build::AsIs)
}

/// What `dyadctl sweep` says, with the configurations of the environment's handlers.
fn sweep(context: &Context<'_>) -> Result<String> {
    let endpoint = format!(
        "unix://{}/containerd/containerd.sock",
        context.env.dir.display()
    );
    let done = context
        .env
        .dyadctl(&["sweep", "--runtime-endpoint", &endpoint])?;
    Ok(done.success("dyadctl sweep")?.text())
}

fn what_a_power_cut_leaves_is_swept_and_what_runs_is_not(context: &Context<'_>) -> Result<()> {
    let before = warm(context)?;
    let (lost, lives) = (context.pod()?, context.pod()?);
    lost.idle()?;
    let in_lives = lives.idle()?;
    let domain = context.env.domain_of(lost.name())?;
    let folder = context
        .env
        .dir
        .join("dyad/lib/machines")
        .join(domain.trim_start_matches("dyad-"));
    cut_power(context, &lost, qemu_of(&lost)?)?;
    if !folder.join("disk.img").exists() {
        bail!("{} went with the power", folder.display());
    }

    let swept = sweep(context)?;
    names(
        &swept,
        &["removed machine", domain.trim_start_matches("dyad-")],
    )?;
    if folder.exists() {
        bail!("{} was swept, and is there", folder.display());
    }
    let table = context.env.virsh(&["list", "--all", "--name"])?;
    if table.contains(&domain) {
        bail!("domain {domain} was swept, and is there");
    }
    // The other one has noticed nothing.
    in_lives.output("true")?;
    names(&sweep(context)?, &["nothing was left"])?;
    in_lives.output("true")?;
    lost.remove()?;
    lives.remove()?;
    until(SOON, "the host to be clean but for containerd", || {
        let left = before.new_since();
        Ok(left
            .iter()
            .all(|line| line.starts_with("process "))
            .then_some(()))
    })
    .with_context(|| format!("left: {:?}", before.new_since()))
}
