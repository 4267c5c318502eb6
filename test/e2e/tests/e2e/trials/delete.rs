//! Delete is complete: what is on the host after a pod is what was there before.

use anyhow::{Result, bail};
use dyad_e2e::host::Snapshot;
use serde_json::json;

use super::{Case, case};
use crate::context::{Context, SOON, refusal};
use dyad_e2e::wait::until;

pub const CASES: &[Case] = &[
    case!(nothing_is_left_of_a_removed_pod).alone().short(),
    case!(nothing_is_left_of_a_pod_removed_by_force_while_it_works).alone(),
    case!(nothing_is_left_of_a_create_that_failed_half_way).alone(),
    case!(nothing_is_left_of_a_pod_whose_process_was_killed_from_outside).alone(),
];

/// The host before. One pod goes first: it fills the caches that stay by design.
fn warmed_up(context: &Context<'_>) -> Result<Snapshot> {
    let pod = context.pod()?;
    pod.output_of("true")?;
    pod.output_with("true", |config| {
        config["image"]["image"] = json!("dyad.test/multi:1")
    })?;
    pod.remove()?;
    Ok(Snapshot::take(&context.env.dir))
}

fn nothing_is_left_of_a_removed_pod(context: &Context<'_>) -> Result<()> {
    let before = warmed_up(context)?;
    let pod = context.pod()?;
    let volume = format!(
        "kubelet/pods/{}/volumes/kubernetes.io~empty-dir/shared",
        pod.uid()
    );
    let folder = context.folder(&volume)?;
    let (one, two) = (
        pod.run_with("trap 'exit 0' TERM; sleep 1000 & wait", |config| {
            config["mounts"] = json!([{"container_path": "/shared", "host_path": folder}]);
        })?,
        pod.run("dd if=/dev/zero of=/file bs=1M count=8; echo wrote; sleep 1000")?,
    );
    one.output("echo x >/shared/file")?;
    two.says("wrote")?;
    context.crictl.stop(&one.id, 10)?;
    context.crictl.rm(&one.id)?;
    // As kubelet does: the volumes go when nothing runs any more.
    context.crictl.stopp(&pod.id)?;
    std::fs::remove_dir_all(&folder)?;
    pod.remove()?;
    before.nothing_new("a pod's removal")
}

fn nothing_is_left_of_a_pod_removed_by_force_while_it_works(context: &Context<'_>) -> Result<()> {
    let before = warmed_up(context)?;
    let pod = context.pod()?;
    let busy = "while :; do dd if=/dev/zero of=/file bs=1M count=4 2>/dev/null; echo again; done";
    let container = pod.run(busy)?;
    container.says("again")?;
    let result = std::thread::scope(|scope| {
        // An exec is under way when the pod goes.
        let exec = scope.spawn(|| container.exec("sleep 1000"));
        until(SOON, "the exec to run", || {
            let table = container.output("ps -o args")?;
            Ok(table.contains("sleep 1000").then_some(()))
        })?;
        let removed = context.crictl.rmp_force(&pod.id);
        drop(exec.join());
        removed
    });
    result?;
    context.remove_cgroup_of(&pod.config)?;
    before.nothing_new("a pod's removal by force")
}

fn nothing_is_left_of_a_create_that_failed_half_way(context: &Context<'_>) -> Result<()> {
    let before = warmed_up(context)?;
    let pod = context.pod()?;
    let mut no_program = pod.container_config("");
    no_program["command"] = json!(["/no/such/program"]);
    let mut no_user = pod.container_config("true");
    no_user["mounts"] =
        json!([{"container_path": "/proc/self/never", "host_path": context.folder("file")?}]);
    for config in [no_program, no_user] {
        let failed = pod.create(&config).and_then(|container| {
            let started = context.crictl.start(&container.id);
            context.crictl.rm(&container.id)?;
            started
        });
        refusal(failed)?;
    }
    pod.remove()?;
    before.nothing_new("creates that failed")
}

fn nothing_is_left_of_a_pod_whose_process_was_killed_from_outside(
    context: &Context<'_>,
) -> Result<()> {
    let before = warmed_up(context)?;
    let pod = context.pod()?;
    let container = pod.idle()?;
    // A container's init, or the machine itself.
    let pid = context.crictl.inspect(&container.id)?["info"]["pid"]
        .as_i64()
        .unwrap_or(0);
    if pid <= 1 {
        bail!("container {} has pid {pid}", container.id);
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let status = container.exited()?;
    if status.exit_code == 0 {
        bail!("a killed container exits with 0");
    }
    pod.remove()?;
    before.nothing_new("a kill from outside and the pod's removal")
}
