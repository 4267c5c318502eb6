//! Puts QEMU into the pod's cgroup, so that the pod pays for its machine.
//!
//! libvirt makes a cgroup of its own for every domain and cannot be told the kubelet's;
//! while the domain is still paused, its process is moved. On v1 and hybrid hosts the v1
//! controllers only: libvirt's counters stay right then. `devices` stays with libvirt,
//! which keeps QEMU's allowed devices there and changes them when one is plugged in.

use std::fs;
use std::io;

use dyad_linux::cgroup::{Cgroup, Hierarchies};
use dyad_runtime_handler::error::{Context, Result};

/// cgroup v1's `cpu.shares` may not be less.
const SHARES_MIN: u64 = 2;

/// The pod's cgroup, made where it is missing.
///
/// `cpu_shares` are the pod's: the spec of a pause container asks for the least there is,
/// but this group holds all that the pod runs.
///
/// # Errors
/// The path is not usable, or a directory cannot be made; then none stays that was made.
pub async fn create(cgroups_path: &str, cpu_shares: Option<u64>) -> Result<Cgroup> {
    let hierarchies = Hierarchies::of_host()?;
    let ours = |controller: &str| is_ours(&hierarchies, controller);
    let group = hierarchies.make(cgroups_path, ours).await?;
    if let Err(error) = share(&hierarchies, &group, cpu_shares) {
        if let Err(error) = group.remove().await {
            log::warn!("{}", error.chain());
        }
        return Err(error).context(|| format!("set the CPU shares of {cgroups_path}"));
    }
    Ok(group)
}

fn share(hierarchies: &Hierarchies, group: &Cgroup, cpu_shares: Option<u64>) -> io::Result<()> {
    let Some(shares) = cpu_shares else {
        return Ok(());
    };
    let shares = shares.max(SHARES_MIN);
    for (controller, dir) in group.places() {
        if !is_ours(hierarchies, &controller) {
            continue;
        }
        if controller == "cpu" {
            fs::write(dir.join("cpu.shares"), shares.to_string())?;
        } else if controller.is_empty() {
            // The controller may not be enabled for this level.
            let weight = weight_of(shares);
            if let Err(error) = fs::write(dir.join("cpu.weight"), weight.to_string()) {
                log::debug!("{}: {error}", dir.join("cpu.weight").display());
            }
        }
    }
    Ok(())
}

/// Moves the process with all its threads.
///
/// # Errors
/// The process is gone, or a controller does not take it.
pub fn place(group: &Cgroup, pid: u32) -> Result<()> {
    let hierarchies = Hierarchies::of_host()?;
    for (controller, dir) in group.places() {
        if is_ours(&hierarchies, &controller) {
            let procs = dir.join("cgroup.procs");
            fs::write(&procs, pid.to_string())
                .context(|| format!("move QEMU (pid {pid}) to {}", dir.display()))?;
        }
    }
    Ok(())
}

fn is_ours(hierarchies: &Hierarchies, controller: &str) -> bool {
    if hierarchies.is_v1() {
        !controller.is_empty() && controller != "devices"
    } else {
        controller.is_empty()
    }
}

/// The kernel's and the OCI runtimes' mapping of v1 shares (2..262144) to v2 weight (1..10000).
fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_map_to_weights_at_both_ends() {
        assert_eq!(weight_of(2), 1);
        assert_eq!(weight_of(1024), 39);
        assert_eq!(weight_of(262_144), 10_000);
        assert_eq!(weight_of(0), 1);
    }

    #[test]
    fn on_v1_every_controller_but_libvirts_own_is_moved() {
        let mountinfo = "30 20 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            31 20 0:2 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
            32 20 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            33 20 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let hybrid = Hierarchies::parse(mountinfo).expect("hierarchies");
        let group = hybrid.at("/k8s.io/pod").expect("cgroup");
        let moved: Vec<String> = group
            .places()
            .into_iter()
            .map(|(controller, _)| controller)
            .filter(|controller| is_ours(&hybrid, controller))
            .collect();
        assert_eq!(moved, ["cpu"]);
    }
}
