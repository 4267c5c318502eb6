//! The image's content and what is mounted over it.

use std::fs;

use anyhow::Result;
use dyad_e2e::host::shim_of;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use serde_json::json;

use super::{Case, case};
use crate::context::{Context, Handler, SOON, same};

pub const CASES: &[Case] = &[
    case!(a_layered_image_shows_whiteouts_and_opaque_folders),
    case!(what_a_container_writes_is_its_own),
    case!(an_empty_dir_is_shared_by_the_containers_of_a_pod),
    case!(an_empty_dir_outlives_the_pods_sandbox_and_not_the_pod).on(&[
        Handler::Dyad,
        Handler::DyadVm,
        Handler::DyadVmSandboxed,
    ]),
    case!(config_map_and_hosts_files_are_there_and_read_only),
    case!(the_termination_message_comes_back),
];

fn a_layered_image_shows_whiteouts_and_opaque_folders(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let script = "cd /layers && ls -R . && cat one two three changed link opaque/new && \
                  stat -c '%a %u %g %h' three a && [ a -ef b ] && echo linked";
    let out = pod.output_with(script, |config| {
        config["image"]["image"] = json!("dyad.test/multi:1")
    })?;
    let expected = ".:\na\nb\nchanged\nlink\none\nopaque\nthree\ntwo\n\n./opaque:\nnew\n\
                    one\ntwo\nthree\nnew\none\nnew\n640 1000 1000 1\n644 0 0 2\nlinked\n";
    same("content", out.as_str(), expected)
}

fn what_a_container_writes_is_its_own(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let writer = pod.run(
        "echo mine >/file; rm /etc/group; echo ready; trap 'exit 0' TERM; sleep 1000 & wait",
    )?;
    writer.says("ready")?;
    same(
        "another container",
        pod.output_of("ls /file /etc/group 2>/dev/null; true")?
            .as_str(),
        "/etc/group\n",
    )?;
    same(
        "the same one",
        writer
            .output("cat /file; ls /etc/group 2>/dev/null; true")?
            .as_str(),
        "mine\n",
    )
}

/// kubelet's folder of a volume.
fn volume(uid: &str, plugin: &str, name: &str) -> String {
    format!("kubelet/pods/{uid}/volumes/kubernetes.io~{plugin}/{name}")
}

fn an_empty_dir_is_shared_by_the_containers_of_a_pod(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let folder = context.folder(&volume(pod.uid(), "empty-dir", "shared"))?;
    let mount = |config: &mut serde_json::Value| {
        config["mounts"] = json!([{"container_path": "/shared", "host_path": folder}]);
    };
    let reader = pod.run_with(
        "until [ -e /shared/file ]; do usleep 50000; done; cat /shared/file",
        mount,
    )?;
    pod.output_with(
        "echo from the other >/shared/new && mv /shared/new /shared/file",
        mount,
    )?;
    same("exit code", reader.exited()?.exit_code, 0)?;
    same("read", reader.logs()?.out().as_str(), "from the other\n")
}

/// The disks that the environment's machines left for their pods' next sandboxes, and the
/// pod's folder is named in them.
fn kept_disks(context: &Context<'_>, uid: &str) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(context.env.dir.join("dyad/lib/kept"))
        .into_iter()
        .flatten()
    {
        // One may go while we look.
        let volumes = fs::read_to_string(entry?.path().join("volumes.json")).unwrap_or_default();
        count += usize::from(volumes.contains(uid));
    }
    Ok(count)
}

fn an_empty_dir_outlives_the_pods_sandbox_and_not_the_pod(context: &Context<'_>) -> Result<()> {
    let mut config = context.pod_config();
    let uid = config["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let folder = context.folder(&volume(&uid, "empty-dir", "kept"))?;
    let mount = |config: &mut serde_json::Value| {
        config["mounts"] = json!([{"container_path": "/kept", "host_path": folder}]);
    };
    let script = "echo $((1 + $(cat /kept/lives 2>/dev/null || echo 0))) > /kept/lives; sync; \
                  cat /kept/lives; exec sleep 1000";
    let mut pods = Vec::new();
    for life in 1..=3 {
        config["metadata"]["attempt"] = json!(life);
        let pod = context.run_pod(context.handler, config.clone())?;
        let container = pod.run_with(script, mount)?;
        same(
            "lives",
            container.says(&format!("{life}\n"))?,
            format!("{life}\n"),
        )?;
        if life == 2 {
            // A dead shim's pod lives on as well.
            kill(shim_of(&pod.id)?, Signal::SIGKILL)?;
            container.exited()?;
            until(SOON, "the pod to be not ready", || {
                Ok((pod.status()?.state == "SANDBOX_NOTREADY").then_some(()))
            })?;
        }
        context.crictl.stopp(&pod.id)?;
        if life == 2 {
            context.crictl.rmp(&pod.id)?;
        } else {
            // As kubelet leaves an earlier one for a while.
            pods.push(pod);
        }
        if life < 3 && !context.handler.is_sandboxed() {
            let kept = usize::from(context.handler.is_machine());
            until(SOON, "the disk to be kept", || {
                Ok((kept_disks(context, &uid)? == kept).then_some(()))
            })?;
        }
    }
    fs::remove_dir_all(&folder)?;
    for pod in &pods {
        context.crictl.rmp(&pod.id)?;
    }
    context.remove_cgroup_of(&config)?;
    until(SOON, "the pod's disk to go with its folder", || {
        Ok((kept_disks(context, &uid)? == 0).then_some(()))
    })?;
    Ok(())
}

fn config_map_and_hosts_files_are_there_and_read_only(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let map = context.folder(&volume(pod.uid(), "configmap", "settings"))?;
    // As kubelet's atomic writer lays it out.
    let data = map.join("..2026_01_01");
    fs::create_dir_all(&data)?;
    fs::write(data.join("colour"), "blue\n")?;
    std::os::unix::fs::symlink("..2026_01_01", map.join("..data"))?;
    std::os::unix::fs::symlink("..data/colour", map.join("colour"))?;
    let hosts = context
        .folder(&format!("kubelet/pods/{}", pod.uid()))?
        .join("etc-hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.7 seven\n")?;
    let script = "cat /settings/colour; cat /etc/hosts; echo x 2>/dev/null >/settings/colour && echo written; true";
    let out = pod.output_with(script, |config| {
        config["mounts"] = json!([
            {"container_path": "/settings", "host_path": map, "readonly": true},
            {"container_path": "/etc/hosts", "host_path": hosts},
        ]);
    })?;
    same(
        "read",
        out.as_str(),
        "blue\n127.0.0.1 localhost\n192.0.2.7 seven\n",
    )
}

fn the_termination_message_comes_back(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let folder = context.folder(&format!("kubelet/pods/{}/containers/main", pod.uid()))?;
    let file = folder.join("0123abcd");
    fs::write(&file, "")?;
    let container = pod.run_with("echo that is why >/dev/termination-log; exit 1", |config| {
        config["mounts"] = json!([{"container_path": "/dev/termination-log", "host_path": file}]);
        config["annotations"] =
            json!({"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"});
    })?;
    same("exit code", container.exited()?.exit_code, 1)?;
    same(
        "message",
        fs::read_to_string(&file)?.as_str(),
        "that is why\n",
    )
}
