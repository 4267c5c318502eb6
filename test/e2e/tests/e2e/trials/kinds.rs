//! What makes a kind a kind.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::host::{cgroup_parent, shim_of};
use serde_json::json;

use super::{Case, MACHINES, case};
use crate::context::{Context, Handler, Pod, same};

const ONLY_DYAD: &[Handler] = &[Handler::Dyad];

pub const CASES: &[Case] = &[
    case!(a_container_pods_shim_knows_no_libvirt).on(ONLY_DYAD),
    case!(a_machine_pod_has_a_kernel_of_its_own)
        .on(MACHINES)
        .short(),
    case!(a_machine_is_named_by_its_uuid_and_titled_by_its_pod).on(MACHINES),
    case!(qemu_runs_unprivileged_in_the_pods_cgroup).on(MACHINES),
    case!(an_allowed_annotation_sets_the_vcpus).on(MACHINES),
];

fn a_container_pods_shim_knows_no_libvirt(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", shim_of(&pod.id)?))?;
    same("libvirt is mapped", maps.contains("libvirt"), false)
}

fn a_machine_pod_has_a_kernel_of_its_own(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let guest = pod.output_of("cat /proc/sys/kernel/random/boot_id")?;
    same("the same boot", host == guest, false)
}

fn a_machine_is_named_by_its_uuid_and_titled_by_its_pod(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let name = context.env.domain_of(pod.name())?;
    let uuid = context.env.virsh(&["domuuid", &name])?;
    same("name", name, format!("dyad-{}", uuid.trim()))
}

/// QEMU's folder in /proc: a pod's pid is its machine's.
fn qemu(pod: &Pod<'_>) -> Result<PathBuf> {
    let pid = pod.status()?.all["info"]["pid"]
        .as_i64()
        .context("the pod has no pid")?;
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let program = fs::read_link(folder.join("exe"))?;
    if !program.to_string_lossy().contains("qemu-system") {
        bail!("the pod's process is {}", program.display());
    }
    Ok(folder)
}

fn qemu_runs_unprivileged_in_the_pods_cgroup(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let process = qemu(&pod)?;
    if fs::metadata(&process)?.uid() == 0 {
        bail!("QEMU runs as root");
    }
    let cgroups = fs::read_to_string(process.join("cgroup"))?;
    let ours = format!("/{}/{}", cgroup_parent(&context.env.dir), pod.name());
    // v1: the controller that pays for memory; v2: the only line.
    let line = cgroups
        .lines()
        .find(|line| line.contains(":memory:"))
        .or_else(|| cgroups.lines().find(|line| line.starts_with("0::")))
        .context("no cgroup")?;
    same("in the pod's cgroup", line.contains(&ours), true).with_context(|| line.to_owned())
}

fn an_allowed_annotation_sets_the_vcpus(context: &Context<'_>) -> Result<()> {
    let pod = context.pod_with(|config| config["annotations"] = json!({"dyad.dev/vcpus": "2"}))?;
    same(
        "processors",
        pod.output_of("grep -c ^processor /proc/cpuinfo")?.as_str(),
        "2\n",
    )
}
