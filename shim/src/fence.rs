//! The fence: what keeps a pod that was migrated away from running here again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_runtime_handler::error::{Context as _, Error, Result};
use serde::{Deserialize, Serialize};

/// A pod that runs on another node and must not run here again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// containerd's namespace and the sandbox's id.
    pub containerd_namespace: String,
    /// The sandbox that left.
    pub sandbox_id: String,
    /// Its Kubernetes UID: kubelet makes another sandbox for the same pod.
    pub pod_uid: String,
    /// Its Kubernetes namespace and name, for people.
    pub pod: String,
    /// Where it went.
    pub destination: String,
    /// Whether it is known to run there. Put up as `false` before anything is given away,
    /// so that the fence holds whoever dies; taken away when the migration fails.
    pub settled: bool,
    /// When, in seconds since the epoch.
    pub unix_s: u64,
}

/// The fence: tombstones in `<cache_dir>/migrated`, one file each, on disk, so that they
/// outlive shim, containerd and node.
///
/// A Kubernetes pod UID is never used twice, so a tombstone stays right for ever; those
/// older than [`Tombstones::KEEP`] are removed as litter. A machine that comes back does so as a
/// pod of another UID, which the fence does not hold.
#[derive(Debug, Clone)]
pub struct Tombstones {
    dir: PathBuf,
}

impl Tombstones {
    /// How long a tombstone is kept.
    pub const KEEP: Duration = Duration::from_secs(90 * 24 * 3600);

    /// The fence of the host whose cache this is.
    pub fn new(cache_dir: &Path) -> Self {
        Self {
            dir: cache_dir.join("migrated"),
        }
    }

    fn path(&self, containerd_namespace: &str, sandbox_id: &str) -> PathBuf {
        self.dir
            .join(format!("{containerd_namespace}.{sandbox_id}.json"))
    }

    /// Puts one up; on disk when this returns.
    ///
    /// # Errors
    /// It could not be written. The pod must not be given away then.
    pub fn put(&self, tombstone: &Tombstone) -> Result<()> {
        let path = self.path(&tombstone.containerd_namespace, &tombstone.sandbox_id);
        let what = || format!("write {}", path.display());
        let text = serde_json::to_vec_pretty(tombstone).context(what)?;
        std::fs::create_dir_all(&self.dir).context(what)?;
        write_atomically(&path, &text, PRIVATE)
    }

    /// Takes one away: the pod did not leave after all.
    ///
    /// # Errors
    /// It is there and cannot be removed.
    pub fn remove(&self, containerd_namespace: &str, sandbox_id: &str) -> Result<()> {
        let path = self.path(containerd_namespace, sandbox_id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::other(format!("remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// The tombstone of this sandbox, or of another one of the same Kubernetes pod. One that
    /// cannot be read is reported, and holds the sandbox that its file is named after: it was put
    /// up for a reason. It says nothing of other pods.
    pub fn find(
        &self,
        containerd_namespace: &str,
        sandbox_id: &str,
        pod_uid: &str,
    ) -> Option<Tombstone> {
        let path = self.path(containerd_namespace, sandbox_id);
        let mut all = self.all();
        if path.exists() && !all.contains_key(&path) {
            return Some(Tombstone {
                containerd_namespace: containerd_namespace.to_owned(),
                sandbox_id: sandbox_id.to_owned(),
                pod_uid: pod_uid.to_owned(),
                pod: sandbox_id.to_owned(),
                destination: format!(
                    "a node that {}, which is damaged, does not tell",
                    path.display()
                ),
                settled: true,
                unix_s: 0,
            });
        }
        all.remove(&path).or_else(|| {
            all.into_values()
                .find(|tombstone| !pod_uid.is_empty() && tombstone.pod_uid == pod_uid)
        })
    }

    /// Removes those that are older than [`Self::KEEP`] at `now`.
    pub fn prune(&self, now: SystemTime) {
        for (path, tombstone) in self.all() {
            // A time that no clock can show is none that has passed.
            let age = SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_secs(tombstone.unix_s))
                .and_then(|at| now.duration_since(at).ok());
            if age.is_some_and(|age| age > Self::KEEP)
                && let Err(error) = std::fs::remove_file(&path)
            {
                log::warn!("remove {}: {error}", path.display());
            }
        }
    }

    fn all(&self) -> BTreeMap<PathBuf, Tombstone> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .filter_map(|path| {
                let read = std::fs::read(&path)
                    .map_err(|error| error.to_string())
                    .and_then(|text| {
                        serde_json::from_slice(&text).map_err(|error| error.to_string())
                    });
                match read {
                    Ok(tombstone) => Some((path, tombstone)),
                    Err(error) => {
                        log::warn!("tombstone {}: {error}", path.display());
                        None
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tombstone(sandbox: &str, uid: &str, unix_s: u64) -> Tombstone {
        Tombstone {
            containerd_namespace: "k8s.io".into(),
            sandbox_id: sandbox.into(),
            pod_uid: uid.into(),
            pod: "default/web".into(),
            destination: "qemu+tls://node2/system".into(),
            settled: true,
            unix_s,
        }
    }

    #[test]
    fn the_fence_holds_the_sandbox_and_every_other_of_its_pod() {
        let dir = tempfile::tempdir().unwrap();
        let fence = Tombstones::new(dir.path());
        assert_eq!(fence.find("k8s.io", "s1", "u1"), None);
        fence.put(&tombstone("s1", "u1", 1)).unwrap();
        fence.put(&tombstone("s9", "", 1)).unwrap();
        for (namespace, sandbox, uid, held) in [
            ("k8s.io", "s1", "", true),
            ("k8s.io", "s2", "u1", true),
            ("k8s.io", "s2", "u2", false),
            ("k8s.io", "s2", "", false),
            ("other", "s1", "", false),
        ] {
            assert_eq!(
                fence.find(namespace, sandbox, uid).is_some(),
                held,
                "{namespace} {sandbox} {uid}"
            );
        }
        fence.remove("k8s.io", "s1").unwrap();
        fence.remove("k8s.io", "s1").unwrap();
        assert_eq!(fence.find("k8s.io", "s1", "u1"), None);
    }

    #[test]
    fn a_damaged_tombstone_does_not_hide_the_others_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let fence = Tombstones::new(dir.path());
        fence.put(&tombstone("old", "u1", 1)).unwrap();
        let now = SystemTime::UNIX_EPOCH + Tombstones::KEEP + Duration::from_secs(10);
        fence
            .put(&tombstone("new", "u2", Tombstones::KEEP.as_secs()))
            .unwrap();
        std::fs::write(dir.path().join("migrated/x.json"), "{").unwrap();
        fence.prune(now);
        assert_eq!(fence.find("k8s.io", "old", "u1"), None);
        assert!(fence.find("k8s.io", "new", "u2").is_some());
    }

    #[test]
    fn a_damaged_tombstone_holds_its_own_sandbox_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let fence = Tombstones::new(dir.path());
        fence.put(&tombstone("s1", "u1", 1)).unwrap();
        for damaged in ["", "{", "[]", "{\"sandbox_id\": 7}"] {
            std::fs::write(dir.path().join("migrated/k8s.io.s1.json"), damaged).unwrap();
            fence.prune(SystemTime::now());
            let held = fence.find("k8s.io", "s1", "u1").expect("it holds its own");
            assert!(held.destination.contains("k8s.io.s1.json"), "{held:?}");
            assert_eq!(fence.find("k8s.io", "s2", "u1"), None);
            assert_eq!(fence.find("other", "s1", "u1"), None);
        }
        fence.remove("k8s.io", "s1").unwrap();
        assert_eq!(fence.find("k8s.io", "s1", "u1"), None);
    }
}
