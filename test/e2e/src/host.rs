//! Snapshots of what an environment has on the host: what a pod must not leave.
//!
//! Other environments may live on the same host. What is theirs is told apart by
//! the mark that `hack/up` gives every daemon (`DYAD_ENVIRONMENT=<folder>`, handed
//! down to shims and QEMU) and by the folder in mounts and command lines.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::wait::until;

/// libvirt and containerd remove a few things a moment after they answered.
const SETTLE: Duration = Duration::from_secs(20);

/// Processes, mounts, links, cgroups, sockets and files, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    dir: PathBuf,
    lines: BTreeSet<String>,
}

impl Snapshot {
    /// What the environment in `dir` has now.
    pub fn take(dir: &Path) -> Self {
        let mut lines = BTreeSet::new();
        let processes = Processes::read(dir);
        lines.extend(processes.ours.iter().map(|line| format!("process {line}")));
        lines.extend(mounts(dir));
        lines.extend(links());
        lines.extend(cgroups(&processes.foreign));
        lines.extend(loop_devices(dir));
        lines.extend(stale_shim_sockets());
        for folder in [
            dir,
            Path::new("/run/dyad"),
            Path::new("/var/lib/dyad"),
            Path::new("/var/lib/cni"),
        ] {
            files(folder, dir, &mut lines);
        }
        Self {
            dir: dir.to_path_buf(),
            lines,
        }
    }

    /// What is there now and was not when this snapshot was taken.
    pub fn new_since(&self) -> Vec<String> {
        let now = Self::take(&self.dir);
        now.lines.difference(&self.lines).cloned().collect()
    }

    /// Waits until nothing is there any more that was not there before.
    ///
    /// # Errors
    /// Something stayed; it is named.
    pub fn nothing_new(&self, after: &str) -> Result<()> {
        let mut left = Vec::new();
        let gone = until(
            SETTLE,
            &format!("the host to be clean after {after}"),
            || {
                left = self.new_since();
                Ok(left.is_empty().then_some(()))
            },
        );
        gone.map_err(|error| {
            error.context(format!(
                "left behind after {after}:\n  {}",
                left.join("\n  ")
            ))
        })
    }
}

struct Processes {
    /// `pid command line` of each of ours.
    ours: Vec<String>,
    /// Pids that carry another environment's mark.
    foreign: BTreeSet<String>,
}

impl Processes {
    fn read(dir: &Path) -> Self {
        let dir = dir.to_string_lossy();
        let (mut ours, mut foreign) = (Vec::new(), BTreeSet::new());
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|byte| byte.is_ascii_digit())
                || pid == std::process::id().to_string()
            {
                continue;
            }
            let read = |name: &str| {
                let bytes = fs::read(entry.path().join(name)).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            let environ = read("environ");
            let mark = environ
                .split(' ')
                .find_map(|entry| entry.strip_prefix("DYAD_ENVIRONMENT="));
            let command = read("cmdline");
            let mounts = read("mountinfo");
            // The line of a container's root names the folder of its snapshots.
            let root = mounts
                .lines()
                .find(|line| line.split(' ').nth(4) == Some("/"))
                .unwrap_or_default();
            let inside = format!("{dir}/");
            let is_pods = root.contains("/io.containerd.") || command.contains("qemu-system-");
            if mark == Some(&dir) || command.contains(&inside) || root.contains(&inside) {
                ours.push(format!("{pid} {command}"));
            } else if mark.is_some() || is_pods {
                foreign.insert(pid);
            }
        }
        Self { ours, foreign }
    }
}

fn mounts(dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(dir))
        .map(|point| format!("mount {point}"))
        .collect()
}

/// Network interfaces of the host's namespace, without those that hang on another
/// environment's bridge. A pod's own namespace shows as a mount.
fn links() -> Vec<String> {
    let mut links = Vec::new();
    for entry in fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let master = fs::read_link(entry.path().join("master"))
            .ok()
            .and_then(|link| {
                link.file_name()
                    .map(|name| name.to_string_lossy().into_owned())
            });
        links.push(format!(
            "link {name}{}",
            master.map_or_else(String::new, |name| format!(" on {name}"))
        ));
    }
    links
}

/// cgroups of pods and machines in every hierarchy, without those that hold another
/// environment's processes.
fn cgroups(foreign: &BTreeSet<String>) -> Vec<String> {
    let mut found = Vec::new();
    let root = Path::new("/sys/fs/cgroup");
    let mut tops = vec![root.to_path_buf()];
    // cgroup v1: one hierarchy a folder.
    tops.extend(
        subfolders(root)
            .into_iter()
            .filter(|path| path.join("cgroup.procs").exists()),
    );
    for top in tops {
        for folder in subfolders(&top) {
            let name = folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if [
                "k8s.io",
                "machine",
                "machine.slice",
                "dyad",
                "default",
                CGROUP_PARENT,
            ]
            .contains(&name.as_str())
            {
                walk_cgroup(&folder, foreign, &mut found);
            }
        }
    }
    found
}

/// The cgroup below which the tests' pods have theirs; it stays until
/// [`remove_cgroup_parent`].
pub const CGROUP_PARENT: &str = "dyad-e2e";

/// Removes [`CGROUP_PARENT`] where it is empty.
pub fn remove_cgroup_parent() {
    let root = Path::new("/sys/fs/cgroup");
    for top in subfolders(root).into_iter().chain([root.to_path_buf()]) {
        // In use by another run, or not there.
        let _ = fs::remove_dir(top.join(CGROUP_PARENT));
    }
}

fn walk_cgroup(folder: &Path, foreign: &BTreeSet<String>, found: &mut Vec<String>) {
    let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    if procs.lines().any(|pid| foreign.contains(pid)) {
        return;
    }
    let below = subfolders(folder);
    if below.is_empty() && !folder.ends_with(CGROUP_PARENT) {
        found.push(format!("cgroup {}", folder.display()));
    }
    for folder in below {
        walk_cgroup(&folder, foreign, found);
    }
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn loop_devices(dir: &Path) -> Vec<String> {
    subfolders_of_links("/sys/block")
        .into_iter()
        .filter_map(|device| {
            let file = fs::read_to_string(device.join("loop/backing_file")).ok()?;
            Path::new(file.trim())
                .starts_with(dir)
                .then(|| format!("loop device {} on {}", device.display(), file.trim()))
        })
        .collect()
}

fn subfolders_of_links(folder: &str) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

/// Sockets of shims that nobody listens on. Those that are served show as processes.
fn stale_shim_sockets() -> Vec<String> {
    let served = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    subfolders_of_links("/run/containerd/s")
        .into_iter()
        .filter(|path| !served.contains(&path.display().to_string()))
        .map(|path| format!("socket {}", path.display()))
        .collect()
}

fn files(folder: &Path, dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if grows_by_design(&path, dir) {
            continue;
        }
        found.insert(format!("file {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !is_image_content(&path) {
            files(&path, dir, found);
        }
    }
}

/// Logs, caches of the daemons and what a daemon keeps for itself.
fn grows_by_design(path: &Path, dir: &Path) -> bool {
    let Ok(inside) = path.strip_prefix(dir) else {
        return false;
    };
    let text = inside.to_string_lossy();
    ["log", "bin", "libvirt/log", "libvirt/cache", "pid", "e2e"].contains(&text.as_ref())
        || text.starts_with("containerd/root/io.containerd.content.")
        || text.starts_with("containerd/root/io.containerd.metadata.")
        || text.starts_with("containerd/root/tmpmounts")
        || text.starts_with("containerd/tmpmounts")
        || (text.starts_with("cni/ipam")
            && (text.contains("last_reserved") || text.ends_with("lock")))
}

/// A snapshot's own tree, or a container's root: its presence counts, not its files.
fn is_image_content(path: &Path) -> bool {
    path.parent()
        .is_some_and(|parent| parent.ends_with("snapshots"))
        || path.ends_with("rootfs")
}
