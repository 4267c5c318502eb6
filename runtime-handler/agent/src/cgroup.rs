//! The guest's cgroup v2 tree: `/pod` for all, `/pod/<container>` for each.

use std::fs;
use std::path::{Path, PathBuf};

use dyad_linux::cgroup::Cgroup;
use dyad_runtime_handler::{Error, Result, error::Context};
use oci_spec::runtime::LinuxResources;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all containers.
const POD: &str = "pod";

/// Lets every controller through to the containers' groups.
///
/// # Errors
/// The hierarchy is not there.
pub fn enable_controllers() -> Result<()> {
    let pod = Path::new(ROOT).join(POD);
    fs::create_dir_all(&pod).context(|| format!("create {}", pod.display()))?;
    for folder in [Path::new(ROOT), &pod] {
        let list = folder.join("cgroup.controllers");
        let controllers =
            fs::read_to_string(&list).context(|| format!("read {}", list.display()))?;
        for controller in controllers.split_ascii_whitespace() {
            // One by one: a controller that refuses must not keep the others away.
            let file = folder.join("cgroup.subtree_control");
            if let Err(error) = fs::write(&file, format!("+{controller}")) {
                log::warn!("enable {controller} in {}: {error}", file.display());
            }
        }
    }
    Ok(())
}

/// The group of `container`, whose id the caller has checked. libcontainer only joins a
/// group that exists, and so does not walk and enable controllers from the root for every
/// container: [`create`] makes it.
pub fn of(container: &str) -> Cgroup {
    Cgroup::v2(dir_of(container))
}

/// The group of all containers.
pub fn pod() -> Cgroup {
    Cgroup::v2(Path::new(ROOT).join(POD))
}

/// What `linux.cgroupsPath` says for `container`.
pub fn spec_path(container: &str) -> PathBuf {
    Path::new("/").join(POD).join(container)
}

/// Makes the group of `container`.
///
/// # Errors
/// The kernel refused.
pub fn create(container: &str) -> Result<()> {
    let dir = dir_of(container);
    fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))
}

fn dir_of(container: &str) -> PathBuf {
    Path::new(ROOT).join(POD).join(container)
}

/// Sets the limits of `container` that `resources` names; leaves the others.
///
/// # Errors
/// `InvalidArgument` for a value the kernel does not take, naming file and value.
pub fn apply(container: &str, resources: &LinuxResources) -> Result<()> {
    for (name, value) in settings(resources)? {
        let file = dir_of(container).join(&name);
        fs::write(&file, &value).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::ERANGE) => Error::InvalidArgument(format!(
                "{name}: the guest's kernel does not take {value:?}"
            )),
            Some(libc::ENOENT) => {
                Error::FailedPrecondition(format!("{name}: the guest's kernel has no such control"))
            }
            _ => Error::other(format!("write {value:?} to {}", file.display()), error),
        })?;
    }
    Ok(())
}

/// The files to write for `resources`, in order. Conversions from v1 terms are those
/// of runc (libcontainer/cgroups/utils.go).
fn settings(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let mut set: Vec<(String, String)> = Vec::new();
    let mut put = |name: &str, value: String| set.push((name.into(), value));
    if let Some(memory) = resources.memory() {
        let limit = memory.limit();
        if let Some(swap) = memory.swap() {
            put("memory.swap.max", swap_max(swap, limit)?);
        }
        if let Some(limit) = limit {
            put("memory.max", limit_text(limit));
        }
        if let Some(reservation) = memory.reservation() {
            put("memory.low", limit_text(reservation));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            put("cpu.weight", weight(shares).to_string());
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = match cpu.quota() {
                Some(quota) if quota > 0 => quota.to_string(),
                _ => "max".into(),
            };
            let period = cpu
                .period()
                .filter(|period| *period != 0)
                .unwrap_or(100_000);
            put("cpu.max", format!("{quota} {period}"));
        }
        if let Some(idle) = cpu.idle() {
            put("cpu.idle", idle.to_string());
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            put("cpuset.cpus", cpus.clone());
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            put("cpuset.mems", mems.clone());
        }
    }
    if let Some(pids) = resources.pids() {
        put("pids.max", limit_text(pids.limit()));
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        put(
            &file_name(&format!("hugetlb.{}.max", huge.page_size()))?,
            huge.limit().to_string(),
        );
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (name, value) in unified {
        put(&file_name(name)?, value.clone());
    }
    Ok(set)
}

/// A control's name comes from the host and must stay one.
fn file_name(name: &str) -> Result<String> {
    let fine = name.contains('.')
        && !name.starts_with("cgroup.")
        && !name.contains("..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
    if fine {
        Ok(name.into())
    } else {
        Err(Error::InvalidArgument(format!(
            "{name:?} is no cgroup v2 control"
        )))
    }
}

/// Zero and below mean no limit, as in v1.
fn limit_text(limit: i64) -> String {
    if limit <= 0 {
        "max".into()
    } else {
        limit.to_string()
    }
}

/// v1's limit of memory and swap together into v2's limit of swap.
fn swap_max(memory_and_swap: i64, memory: Option<i64>) -> Result<String> {
    match (memory_and_swap, memory) {
        (..=0, _) => Ok("max".into()),
        (both, Some(memory)) if memory > 0 && both >= memory => Ok((both - memory).to_string()),
        (both, memory) => Err(Error::InvalidArgument(format!(
            "memory.swap {both} with memory.limit {memory:?}: must be at least the memory limit"
        ))),
    }
}

/// [2, 262144] onto [1, 10000].
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use oci_spec::runtime::{
        LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder,
    };

    use super::*;

    #[test]
    fn limits_become_v2_controls() {
        let resources = LinuxResourcesBuilder::default()
            .memory(
                LinuxMemoryBuilder::default()
                    .limit(100)
                    .swap(150)
                    .build()
                    .unwrap(),
            )
            .cpu(
                LinuxCpuBuilder::default()
                    .shares(1024u64)
                    .quota(50_000)
                    .period(100_000u64)
                    .cpus("0-1")
                    .build()
                    .unwrap(),
            )
            .pids(LinuxPidsBuilder::default().limit(-1).build().unwrap())
            .unified(HashMap::from([("memory.high".into(), "90".into())]))
            .build()
            .unwrap();
        let expected = [
            ("memory.swap.max", "50"),
            ("memory.max", "100"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0-1"),
            ("pids.max", "max"),
            ("memory.high", "90"),
        ];
        let found = settings(&resources).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_unset_stays_as_it_is() {
        let resources: LinuxResources = serde_json::from_str(r#"{"cpu":{"shares":2}}"#).unwrap();
        assert_eq!(
            settings(&resources).unwrap(),
            [("cpu.weight".into(), "1".into())]
        );
    }

    #[test]
    fn controls_that_would_leave_the_group_are_refused() {
        for name in [
            "../x.y",
            "cgroup.procs",
            "memory/max.x",
            "",
            "memory",
            "a..b",
        ] {
            assert!(file_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn swap_below_memory_is_refused() {
        assert!(swap_max(50, Some(100)).is_err());
        assert!(swap_max(50, None).is_err());
        assert_eq!(swap_max(-1, None).unwrap(), "max");
    }
}
