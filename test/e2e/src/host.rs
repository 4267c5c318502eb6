//! Snapshots of what an environment has on the host: what a pod must not leave.
//!
//! Other environments may live on the same host. What is this one's is told by the mark
//! that `hack/up` gives every daemon (`DYAD_ENVIRONMENT=<folder>`, handed down to
//! shims), by the folder in mounts and command lines, and by the pods' cgroup parent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use crate::command;
use crate::env::ctr_command;
use crate::wait::until;

/// libvirt and containerd remove a few things a moment after they answered.
const SETTLE: Duration = Duration::from_secs(20);

/// Processes, mounts, links, cgroups, sockets and files, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    dir: PathBuf,
    known: Known,
    lines: BTreeSet<String>,
}

/// Names that are the environment's, as its folder tells while it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Known {
    /// Machines that its libvirtd has started.
    machines: BTreeSet<String>,
    /// The CNI configuration, which names its bridge.
    network: String,
}

impl Known {
    fn update(&mut self, dir: &Path) {
        let logs = entries(dir.join("libvirt/log/qemu"));
        self.machines.extend(
            logs.iter()
                .filter_map(|log| log.file_stem())
                .map(|name| name.to_string_lossy().into_owned()),
        );
        if let Ok(text) = fs::read_to_string(dir.join("etc/cni/net.d/10-dyad.conflist")) {
            self.network = text;
        }
    }
}

impl Snapshot {
    /// What the environment in `dir` has now.
    pub fn take(dir: &Path) -> Self {
        Self::with(dir, Known::default())
    }

    fn with(dir: &Path, mut known: Known) -> Self {
        known.update(dir);
        let mut lines = BTreeSet::new();
        let processes = processes(dir).into_iter();
        lines.extend(processes.map(|(pid, command)| format!("process {pid} {command}")));
        lines.extend(mounts(dir));
        lines.extend(links(&known.network));
        lines.extend(cgroups(dir, &known.machines));
        lines.extend(loop_devices(dir));
        for folder in [dir, Path::new("/run/dyad"), Path::new("/var/lib/dyad")] {
            files(folder, dir, &mut lines);
        }
        Self {
            dir: dir.to_path_buf(),
            known,
            lines,
        }
    }

    /// Remembers what belongs to the environment, before the folder that tells it goes.
    pub fn remember(&mut self) {
        self.known.update(&self.dir);
    }

    /// What is there now and was not when this snapshot was taken.
    pub fn new_since(&self) -> Vec<String> {
        let now = Self::with(&self.dir, self.known.clone());
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
                if left.iter().any(|line| line.contains("/snapshots/")) {
                    collect_garbage(&self.dir);
                }
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

/// Has containerd collect what was removed: by itself it does so after a hundred changes. It
/// answers the removal of a lease, where asked to, once that is done.
fn collect_garbage(dir: &Path) {
    for verb in [&["create", "--id"][..], &["delete", "--sync"]] {
        let mut ctr = ctr_command(dir, "k8s.io");
        ctr.arg("leases").args(verb).arg("e2e-collect");
        // Where it fails, what is left stays so.
        let _ = command::run(&mut ctr, b"", SETTLE);
    }
}

/// The pod's shim, of whichever make.
///
/// # Errors
/// There is none.
pub fn shim_of(pod: &str) -> Result<Pid> {
    process(|command| command.contains("containerd-shim-") && command.contains(pod))
        .with_context(|| format!("the shim of pod {pod}"))
}

/// The first process whose command line is `wanted`.
///
/// # Errors
/// There is none.
pub fn process(wanted: impl Fn(&str) -> bool) -> Result<Pid> {
    let found = all_processes().find(|(_, _, command)| wanted(command));
    Ok(found.context("no such process")?.0)
}

/// The environment's processes, with their command lines.
pub(crate) fn processes(dir: &Path) -> Vec<(Pid, String)> {
    let dir = dir.to_string_lossy();
    let (mark, inside) = (format!("DYAD_ENVIRONMENT={dir}"), format!("{dir}/"));
    let is_ours = |folder: &Path, command: &str| {
        // The line of a container's root names the folder of its snapshots.
        let root_is_inside = || {
            let mounts = words(&folder.join("mountinfo"));
            let root = mounts
                .lines()
                .find(|line| line.split(' ').nth(4) == Some("/"));
            root.is_some_and(|line| line.contains(&inside))
        };
        command.contains(&inside)
            || words(&folder.join("environ"))
                .split(' ')
                .any(|entry| entry == mark)
            || root_is_inside()
    };
    all_processes()
        .filter(|(_, folder, command)| is_ours(folder, command))
        .map(|(pid, _, command)| (pid, command))
        .collect()
}

/// Every process but this one: its pid, its folder in /proc, its command line.
fn all_processes() -> impl Iterator<Item = (Pid, PathBuf, String)> {
    entries("/proc").into_iter().filter_map(|folder| {
        let pid = Pid::from_raw(folder.file_name()?.to_str()?.parse().ok()?);
        let command = words(&folder.join("cmdline"));
        (pid != Pid::this()).then_some((pid, folder, command))
    })
}

/// What a file of /proc holds, whose words end with zeros.
fn words(file: &Path) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
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

/// Network interfaces of the host's namespace: bridges, taps, and what hangs on the
/// environment's bridge. A pod's own namespace shows as a mount.
fn links(network: &str) -> Vec<String> {
    let mut links = Vec::new();
    for folder in entries("/sys/class/net") {
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let master = fs::read_link(folder.join("master"))
            .ok()
            .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        let is_ours = match &master {
            Some(master) => network.contains(master.as_str()),
            // Another environment's bridge comes and goes as it likes.
            None => !name.starts_with("dyad") || network.contains(&name),
        };
        if is_ours {
            links.push(format!("link {name}"));
        }
    }
    links
}

/// cgroups of the environment's pods and machines, in every hierarchy.
fn cgroups(dir: &Path, machines: &BTreeSet<String>) -> Vec<String> {
    let parent = cgroup_parent(dir);
    let mut found = Vec::new();
    for top in hierarchies() {
        leaves(&top.join(&parent), &mut found);
        // Where libvirt keeps a machine until it is moved into its pod's.
        for folder in ["machine", "machine.slice"] {
            let mut of_libvirt = Vec::new();
            leaves(&top.join(folder), &mut of_libvirt);
            found.extend(of_libvirt.into_iter().filter(|path| {
                let path = path.to_string_lossy().replace("\\x2d", "-");
                machines
                    .iter()
                    .any(|machine| path.contains(machine.as_str()))
            }));
        }
    }
    found
        .iter()
        .filter(|path| !path.ends_with(&parent))
        .map(|path| format!("cgroup {}", path.display()))
        .collect()
}

/// cgroup v2's only one, or v1's, a folder each.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() {
        return vec![root];
    }
    subfolders(&root)
}

/// Folders without folders in them.
fn leaves(folder: &Path, found: &mut Vec<PathBuf>) {
    if !folder.exists() {
        return;
    }
    let below = subfolders(folder);
    if below.is_empty() {
        found.push(folder.to_path_buf());
    }
    for folder in below {
        leaves(&folder, found);
    }
}

/// The cgroup below which the pods of the environment in `dir` have theirs. It stays
/// until [`remove_cgroup_parent`].
pub fn cgroup_parent(dir: &Path) -> String {
    // The whole path: every pair of nodes has a folder `n1`.
    let name = dir.to_string_lossy().replace(['/', '.'], "-");
    format!("pods-of{name}")
}

/// Removes [`cgroup_parent`] where it is empty.
pub fn remove_cgroup_parent(dir: &Path) {
    remove_cgroup(&cgroup_parent(dir));
}

/// Removes an empty cgroup from every hierarchy, as kubelet does with a pod's.
pub fn remove_cgroup(path: &str) {
    for top in hierarchies() {
        // Not there, or what is in it is told of by who looks for it.
        let _ = fs::remove_dir(top.join(path));
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
    entries("/sys/block")
        .into_iter()
        .filter_map(|device| {
            let file = fs::read_to_string(device.join("loop/backing_file")).ok()?;
            Path::new(file.trim())
                .starts_with(dir)
                .then(|| format!("loop device {} on {}", device.display(), file.trim()))
        })
        .collect()
}

fn entries(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
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
        // The host's boot slots: as many as processors, each made when it is taken first.
        || text.starts_with("dyad/lib/boot")
        // And of sweeps: there from the first one on.
        || text.starts_with("dyad/lib/sweep-")
        || (text.starts_with("cni/ipam")
            && (text.contains("last_reserved") || text.ends_with("lock")))
}

/// A snapshot's own tree, or a container's root: its presence counts, not its files.
fn is_image_content(path: &Path) -> bool {
    path.parent()
        .is_some_and(|parent| parent.ends_with("snapshots"))
        || path.ends_with("rootfs")
}
