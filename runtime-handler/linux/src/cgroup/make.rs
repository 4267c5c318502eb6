//! Makes the cgroup of what no OCI runtime runs.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Cgroup, Hierarchies};
use dyad_runtime_handler::error::{Context, Result};

/// Names the controllers that the cgroups below a v2 cgroup have.
const SUBTREE_CONTROL: &str = "cgroup.subtree_control";

impl Hierarchies {
    /// The cgroup at `cgroups_path` (see [`Hierarchies::at`]), made where it is missing, with
    /// the `wanted` ones of its [`Cgroup::places`]. On v2 it has the controllers that the
    /// levels above can give it.
    ///
    /// # Errors
    /// The path is not usable, or a directory cannot be made; then none stays that was made.
    pub async fn make(&self, cgroups_path: &str, wanted: impl Fn(&str) -> bool) -> Result<Cgroup> {
        let cgroup = self.at(cgroups_path)?;
        let mut places = cgroup.places().into_iter();
        let made = places.try_for_each(|(name, dir)| {
            if !wanted(&name) {
                return Ok(());
            }
            if name == "cpuset" && self.is_v1() {
                make_cpuset(&dir)
            } else {
                fs::create_dir_all(&dir)?;
                if let Self::V2(mount) = self {
                    delegate(mount.point(), &dir);
                }
                Ok(())
            }
        });
        if made.is_err()
            && let Err(error) = cgroup.remove().await
        {
            log::warn!("{}", error.chain());
        }
        made.context(|| format!("make cgroup {cgroups_path}"))?;
        Ok(cgroup)
    }
}

impl Cgroup {
    /// The directories that a process of ours can be put into, by controller (v2's is ""):
    /// all but v1's named hierarchies, which are other people's.
    pub fn places(&self) -> Vec<(String, PathBuf)> {
        self.controllers()
            .into_iter()
            .filter(|(name, _)| !name.starts_with("name="))
            .map(|(name, dir)| (name.to_owned(), dir.to_owned()))
            .collect()
    }

    /// The files that take a process's pid.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        let places = self.places().into_iter();
        places.map(|(_, dir)| dir.join(super::PROCS)).collect()
    }

    /// The cgroup that this one is in; `None` where that is the root.
    pub fn parent(&self) -> Option<Cgroup> {
        let up = |(name, dir): (&str, &Path)| Some((name.to_owned(), dir.parent()?.to_owned()));
        Cgroup::of_dirs(self.controllers().into_iter().filter_map(up).collect())
    }
}

/// Hands every controller that `root` has down to `dir`: a v2 cgroup has those that its
/// parent names in `cgroup.subtree_control`. What a level does not give is missing below it,
/// which its statistics show as 0 (`admin-guide/cgroup-v2.rst`, "Controlling Controllers").
fn delegate(root: &Path, dir: &Path) {
    let Ok(below) = dir.strip_prefix(root) else {
        return;
    };
    let mut level = root.to_owned();
    for part in below {
        enable(&level);
        level.push(part);
    }
}

fn enable(level: &Path) {
    let words = |file: &str| {
        let text = fs::read_to_string(level.join(file)).unwrap_or_default();
        let words = text.split_ascii_whitespace().map(str::to_owned);
        words.collect::<Vec<_>>()
    };
    let given = words(SUBTREE_CONTROL);
    let missing: Vec<String> = words("cgroup.controllers")
        .into_iter()
        .filter(|controller| !given.contains(controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    let file = level.join(SUBTREE_CONTROL);
    let write = |text: &str| {
        fs::OpenOptions::new()
            .write(true)
            .open(&file)?
            .write_all(text.as_bytes())
    };
    // All at once is all or nothing.
    if missing.is_empty() || write(&missing.join(" ")).is_ok() {
        return;
    }
    for controller in &missing {
        match write(controller) {
            Ok(()) => {}
            // A level with processes of its own gives none; one that goes needs none.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EBUSY | libc::ENOENT | libc::ENODEV)
                ) =>
            {
                log::debug!("{controller} to {}: {error}", file.display());
            }
            Err(error) => log::warn!("write {controller} to {}: {error}", file.display()),
        }
    }
}

/// A v1 cpuset is empty until told, at every level, and takes no process before.
fn make_cpuset(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        make_cpuset(dir.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
        fs::create_dir(dir)?;
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = dir.join(file);
        if fs::read_to_string(&own)?.trim().is_empty()
            && let Some(parent) = dir.parent()
        {
            fs::write(&own, fs::read_to_string(parent.join(file))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_cpuset_has_what_its_parent_has_at_every_level() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cpuset.cpus"), "0-1\n").unwrap();
        fs::write(root.path().join("cpuset.mems"), "0\n").unwrap();
        // The kernel would make the files with the directory.
        let dir = root.path().join("a");
        fs::create_dir(&dir).unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            fs::write(dir.join(file), "\n").unwrap();
        }
        make_cpuset(&dir).unwrap();
        assert_eq!(
            fs::read_to_string(dir.join("cpuset.cpus")).unwrap(),
            "0-1\n"
        );
        assert!(
            make_cpuset(&root.path().join("b")).is_err(),
            "no kernel here"
        );
    }

    #[test]
    fn every_level_above_hands_down_what_it_has_and_the_group_itself_nothing() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("kubepods/pod1/s1");
        fs::create_dir_all(&group).unwrap();
        let level = |below: &str, controllers: &str, given: &str| {
            let dir = root.path().join(below);
            fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
            fs::write(dir.join(SUBTREE_CONTROL), given).unwrap();
        };
        level("", "cpuset cpu io memory pids\n", "cpu\n");
        level("kubepods", "cpu memory\n", "cpu memory\n");
        level("kubepods/pod1", "cpu memory\n", "\n");
        level("kubepods/pod1/s1", "cpu memory\n", "\n");
        delegate(root.path(), &group);
        let given = |below: &str| {
            fs::read_to_string(root.path().join(below).join(SUBTREE_CONTROL)).unwrap()
        };
        // No kernel here, so a file has what was written last.
        assert_eq!(given(""), "+cpuset +io +memory +pids");
        assert_eq!(given("kubepods"), "cpu memory\n", "has them already");
        assert_eq!(given("kubepods/pod1"), "+cpu +memory");
        assert_eq!(given("kubepods/pod1/s1"), "\n");
    }

    #[test]
    fn a_level_that_is_gone_or_outside_of_the_hierarchy_gives_nothing() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu\n").unwrap();
        delegate(root.path(), &root.path().join("gone/s1"));
        delegate(&root.path().join("a"), root.path());
        assert!(!root.path().join(SUBTREE_CONTROL).exists());
    }

    #[test]
    fn the_parent_of_a_group_below_the_root_is_nobodys() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        let pod = root.path().join("pod");
        fs::create_dir_all(pod.join("s1")).unwrap();
        fs::write(pod.join("cgroup.procs"), "").unwrap();
        let own = Cgroup::v2(pod.join("s1"));
        assert_eq!(own.procs_files(), [pod.join("s1/cgroup.procs")]);
        assert_eq!(own.parent(), Some(Cgroup::v2(&pod)));
        assert_eq!(own.parent().and_then(|pod| pod.parent()), None);
    }
}
