//! What a machine's guest makes of the pod's size and volumes, several at once in one machine.

use std::fs;

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::{Case, DYAD, case};
use crate::context::{Context, same};

pub const CASES: &[Case] = &[
    case!(the_smallest_pod_can_use_its_whole_limit).on(DYAD),
    case!(volumes_are_what_their_place_says_and_not_their_name).on(DYAD),
];

const MIB: u64 = 1 << 20;

fn limit(mib: u64) -> impl FnOnce(&mut Value) {
    move |config| config["linux"]["resources"] = json!({"memory_limit_in_bytes": mib * MIB})
}

fn the_smallest_pod_can_use_its_whole_limit(context: &Context<'_>) -> Result<()> {
    let pod = context.pod_with(limit(32))?;
    let script = |mib: u64| {
        format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null && echo fits")
    };
    let out = pod.output_with(&script(24), limit(32))?;
    same("within the limit", out.as_str(), "fits\n")?;
    // One without a limit beside it has the configured 256 MiB on top.
    let out = pod.output_of(&script(160))?;
    same("without a limit", out.as_str(), "fits\n")
}

fn volumes_are_what_their_place_says_and_not_their_name(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // kubelet's root may have any name.
    let root = format!("volumes/kubelet/pods/{}", pod.uid());
    let shm = context.folder(&format!("{root}/volumes/kubernetes.io~empty-dir/shm"))?;
    let none: Option<&str> = None;
    mount(
        Some("tmpfs"),
        &shm,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=8m,mode=1777"),
    )?;
    let cache = context.folder(&format!("{root}/volumes/kubernetes.io~empty-dir/cache"))?;
    fs::create_dir_all(cache.join("deep/er"))?;
    let sub = context.folder(&format!("{root}/volume-subpaths/cache/app/0"))?;
    mount(
        Some(&cache.join("deep/er")),
        &sub,
        none,
        MsFlags::MS_BIND,
        none,
    )?;
    let ran = (|| {
        let mounts = |config: &mut Value| {
            config["mounts"] = json!([
                {"container_path": "/dev/shm", "host_path": shm},
                {"container_path": "/cache", "host_path": cache},
                {"container_path": "/sub", "host_path": sub},
            ]);
        };
        let script = "df -kP /dev/shm | awk 'NR == 2 { print $2 }'; echo x >/sub/file && cat /cache/deep/er/file";
        let out = pod.output_with(script, mounts)?;
        same("asked for", out.as_str(), "8192\nx\n")?;
        let out = pod.output_of("df -kP /dev/shm | awk 'NR == 2 { print $2 }'")?;
        same("by default", out.as_str(), "65536\n")
    })();
    for target in [&sub, &shm] {
        umount2(target, MntFlags::MNT_DETACH)?;
    }
    ran
}
