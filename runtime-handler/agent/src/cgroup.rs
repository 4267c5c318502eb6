//! The guest's cgroup v2 tree: `/pod` for all, `/pod/<container>` for each.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_agent_api::task_api::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;

use crate::notify::FileWatch;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all containers.
const POD: &str = "pod";
/// How long the freezer may take.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);

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

/// One container's group.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The group of `container`, whose id the caller has checked.
    pub fn of(container: &str) -> Self {
        Self(Path::new(ROOT).join(POD).join(container))
    }

    /// The group of all containers.
    pub fn pod() -> Self {
        Self(Path::new(ROOT).join(POD))
    }

    /// What `linux.cgroupsPath` says for `container`.
    pub fn spec_path(container: &str) -> PathBuf {
        Path::new("/").join(POD).join(container)
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Makes it. libcontainer only joins a group that exists, and so does not walk
    /// and enable controllers from the root for every container.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).context(|| format!("create {}", self.0.display()))
    }

    /// Ends every process in it and below, and waits until they are gone.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `limit`.
    pub async fn kill(&self, limit: Duration) -> Result<()> {
        match fs::write(self.file("cgroup.kill"), "1") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            result => result.context(|| format!("kill {}", self.0.display()))?,
        }
        self.wait_event("populated 0", limit).await
    }

    /// Removes it and what the container made below it; no process is in it.
    ///
    /// # Errors
    /// Something is still in it.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.0).context(|| format!("remove {}", self.0.display()))
    }

    /// Freezes or thaws every process in it, and waits until it is so.
    ///
    /// # Errors
    /// `DeadlineExceeded`; then it is thawed.
    pub async fn freeze(&self, freeze: bool) -> Result<()> {
        let write = |freeze| {
            let file = self.file("cgroup.freeze");
            fs::write(&file, if freeze { "1" } else { "0" })
                .context(|| format!("write {}", file.display()))
        };
        write(freeze)?;
        let wanted = if freeze { "frozen 1" } else { "frozen 0" };
        let done = self.wait_event(wanted, FREEZE_WITHIN).await;
        if done.is_err() && freeze {
            write(false)?;
        }
        done
    }

    /// Thaws without waiting, where there is anything to thaw.
    pub fn thaw(&self) {
        let _ = fs::write(self.file("cgroup.freeze"), "0");
    }

    /// Waits until `cgroup.events` has the line `wanted`, or the group is gone.
    async fn wait_event(&self, wanted: &str, limit: Duration) -> Result<()> {
        let file = self.file("cgroup.events");
        let what = || format!("wait for {wanted:?} in {}", file.display());
        let watch = FileWatch::new().context(what)?;
        match watch.add(&file) {
            Err(Errno::ENOENT) => return Ok(()),
            result => result.context(what)?,
        };
        let wait = async {
            loop {
                match fs::read_to_string(&file) {
                    Ok(text) if text.lines().any(|line| line == wanted) => return Ok(()),
                    Ok(_) => {}
                    Err(_) if !self.0.exists() => return Ok(()),
                    Err(error) => return Err(error).context(what),
                }
                watch.changed().await.context(what)?;
            }
        };
        tokio::time::timeout(limit, wait).await.unwrap_or_else(|_| {
            Err(Error::DeadlineExceeded(format!(
                "{wanted:?} did not come within {} s in {}",
                limit.as_secs(),
                file.display()
            )))
        })
    }

    /// Processes in it and below.
    pub fn processes(&self) -> Vec<u32> {
        let mut found = Vec::new();
        collect_processes(&self.0, &mut found);
        found
    }

    /// How many processes the kernel killed for memory in it.
    pub fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.file("memory.events"))
            .map(|text| flat_keyed(&text).get("oom_kill").copied().unwrap_or(0))
            .unwrap_or(0)
    }

    /// Usage now, as containerd's message. A file that is not there counts as zero.
    ///
    /// # Errors
    /// `NotFound` when the group is gone.
    pub fn metrics(&self) -> Result<Metrics> {
        if !self.0.exists() {
            return Err(Error::NotFound(format!("cgroup {}", self.0.display())));
        }
        Ok(metrics(|name| {
            fs::read_to_string(self.file(name)).unwrap_or_default()
        }))
    }

    /// Sets the limits that `resources` names; leaves the others.
    ///
    /// # Errors
    /// `InvalidArgument` for a value the kernel does not take, naming file and value.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        for (name, value) in settings(resources)? {
            let file = self.file(&name);
            fs::write(&file, &value).map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL | libc::ERANGE) => Error::InvalidArgument(format!(
                    "{name}: the guest's kernel does not take {value:?}"
                )),
                Some(libc::ENOENT) => Error::FailedPrecondition(format!(
                    "{name}: the guest's kernel has no such control"
                )),
                _ => Error::other(format!("write {value:?} to {}", file.display()), error),
            })?;
        }
        Ok(())
    }
}

fn remove_tree(folder: &Path) -> std::io::Result<()> {
    // Only folders: the kernel's files go with theirs.
    if let Ok(entries) = fs::read_dir(folder) {
        for entry in entries.filter_map(std::result::Result::ok) {
            if entry.file_type()?.is_dir() {
                remove_tree(&entry.path())?;
            }
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn collect_processes(folder: &Path, found: &mut Vec<u32>) {
    if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
        found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.filter_map(std::result::Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), found);
        }
    }
}

/// `key value` lines; others are left out.
fn flat_keyed(text: &str) -> HashMap<&str, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.trim().parse().ok()?))
        })
        .collect()
}

/// One number, or `max`.
fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// containerd's message from the group's files (kernel: admin-guide/cgroup-v2.rst).
fn metrics(read: impl Fn(&str) -> String) -> Metrics {
    let cpu = read("cpu.stat");
    let cpu = flat_keyed(&cpu);
    let memory = read("memory.stat");
    let memory = flat_keyed(&memory);
    let events = read("memory.events");
    let events = flat_keyed(&events);
    let cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let memory = |key: &str| memory.get(key).copied().unwrap_or(0);
    let events = |key: &str| events.get(key).copied().unwrap_or(0);
    let number = |name: &str| single(&read(name));
    Metrics {
        pids: Some(PidsStat {
            current: number("pids.current"),
            limit: number("pids.max"),
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            nr_bursts: cpu("nr_bursts"),
            burst_usec: cpu("burst_usec"),
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            workingset_refault: memory("workingset_refault_anon")
                + memory("workingset_refault_file"),
            workingset_activate: memory("workingset_activate_anon")
                + memory("workingset_activate_file"),
            workingset_nodereclaim: memory("workingset_nodereclaim"),
            pgrefill: memory("pgrefill"),
            pgscan: memory("pgscan"),
            pgsteal: memory("pgsteal"),
            pgactivate: memory("pgactivate"),
            pgdeactivate: memory("pgdeactivate"),
            pglazyfree: memory("pglazyfree"),
            pglazyfreed: memory("pglazyfreed"),
            thp_fault_alloc: memory("thp_fault_alloc"),
            thp_collapse_alloc: memory("thp_collapse_alloc"),
            usage: number("memory.current"),
            usage_limit: number("memory.max"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            max_usage: number("memory.peak"),
            ..Default::default()
        })
        .into(),
        io: Some(IOStat {
            usage: io_entries(&read("io.stat")),
            ..Default::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            low: events("low"),
            high: events("high"),
            max: events("max"),
            oom: events("oom"),
            oom_kill: events("oom_kill"),
            oom_group_kill: events("oom_group_kill"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// Lines such as `8:0 rbytes=90112 wbytes=0 rios=3 wios=0 dbytes=0 dios=0`.
fn io_entries(text: &str) -> Vec<IOEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut entry = IOEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
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
    use oci_spec::runtime::{
        LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder,
    };

    use super::*;

    #[test]
    fn files_that_are_missing_or_strange_count_as_zero() {
        let empty = metrics(|_| String::new());
        assert_eq!(empty.memory.usage, 0);
        assert!(empty.io.usage.is_empty());
        let strange = metrics(|_| "\u{0} max\n8:0\nx y z\n=1 : \n9:x rbytes=1\n".into());
        assert_eq!(strange.cpu.usage_usec, 0);
        assert_eq!(strange.io.usage.len(), 1, "8:0 without figures");
    }

    #[test]
    fn the_kernels_figures_land_where_containerd_looks() {
        let found = metrics(|name| {
            match name {
                "cpu.stat" => "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_periods 0",
                "memory.stat" => "anon 4096\nfile 8192\ninactive_file 100\nworkingset_refault_anon 1\nworkingset_refault_file 2",
                "memory.current" => "12345\n",
                "memory.max" => "max\n",
                "memory.peak" => "99999\n",
                "memory.events" => "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1",
                "pids.current" => "2\n",
                "io.stat" => "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:16 rbytes=1 wbytes=0 rios=1 wios=0",
                _ => "",
            }
            .into()
        });
        assert_eq!((found.cpu.usage_usec, found.cpu.system_usec), (10, 3));
        assert_eq!(
            (found.memory.usage, found.memory.usage_limit),
            (12345, u64::MAX)
        );
        assert_eq!(
            (found.memory.max_usage, found.memory.workingset_refault),
            (99999, 3)
        );
        assert_eq!(
            (found.memory_events.max, found.memory_events.oom_kill),
            (3, 1)
        );
        assert_eq!(found.pids.current, 2);
        let io = &found.io.usage;
        assert_eq!((io[0].major, io[0].rbytes, io[0].wios), (8, 10, 2));
        assert_eq!((io[1].major, io[1].minor), (254, 16));
    }

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
