//! Makes the cgroup of what no OCI runtime runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Cgroup, Hierarchies};
use dyad_runtime_handler::error::{Context, Result};

impl Hierarchies {
    /// The cgroup at `cgroups_path` (see [`Hierarchies::at`]), made where it is missing, with
    /// the `wanted` ones of its [`Cgroup::places`].
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
                fs::create_dir_all(&dir)
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
