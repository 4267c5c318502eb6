//! A pod's disk outlives its machine, as its emptyDirs do.
//!
//! kubelet makes a pod's emptyDirs before its first sandbox and removes them with the pod. In
//! between it may make the sandbox anew (its machine ended), and with it a new machine. What
//! the emptyDirs hold lies on the pod's disk, so that disk goes from one machine to the next:
//!
//! ```text
//!   machines/<uuid>/{disk.img, volumes.json}           while there is a machine
//!        |  its delete, or the pod's next sandbox,      ^  the pod's next sandbox
//!        v  while an emptyDir's folder is there         |
//!   kept/<pod>/{disk.img, volumes.json}  ---------------'
//!        |  none of the folders is there any more: the pod is gone
//!        v
//!   removed: by the shim of the machine that was deleted, which waits for it a little, or
//!   at the begin or end of any other machine of the host
//! ```
//! No call of CRI's says that a pod is gone; that kubelet has removed its folders does.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_linux::files::{self, PRIVATE, write_atomically};
use dyad_runtime_handler::error::{Context, Result};
use log::{debug, info, warn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::storage::apply::walkable_dir;

/// Namespace of pods' keys.
const PODS: Uuid = Uuid::from_u128(0x6479_6164_0000_5000_8000_0070_6f64_7573);
const DISK: &str = "disk.img";
const VOLUMES: &str = "volumes.json";
/// kubelet removes an ended pod's emptyDirs within seconds.
const GONE_WITHIN: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Whose disk it is, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volumes {
    /// The pod, as [`key`] has it.
    pod: Uuid,
    /// The host's folders of the emptyDirs that are on the disk.
    empty_dirs: BTreeSet<PathBuf>,
}

impl Volumes {
    fn is_wanted(&self) -> bool {
        self.empty_dirs.iter().any(|dir| dir.exists())
    }
}

/// A pod's key, however often its sandbox is made anew; `None` without a uid.
pub fn key(containerd_namespace: &str, pod_uid: &str) -> Option<Uuid> {
    let name = format!("{containerd_namespace}/{pod_uid}");
    (!pod_uid.is_empty()).then(|| Uuid::new_v5(&PODS, name.as_bytes()))
}

/// The disks that wait for their pods' next machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    dir: PathBuf,
}

impl Kept {
    /// Those below the cache's folder.
    pub fn new(cache_dir: &Path) -> Self {
        Self {
            dir: cache_dir.join("kept"),
        }
    }

    fn of(&self, pod: Uuid) -> PathBuf {
        self.dir.join(pod.to_string())
    }

    /// Makes their folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(&self) -> Result<()> {
        walkable_dir(&self.dir)
    }

    /// Whether the disk of the machine in that folder is the pod's.
    pub fn is_of(machine_dir: &Path, pod: Uuid) -> bool {
        machine_dir.join(DISK).exists() && read(machine_dir).is_some_and(|its| its.pod == pod)
    }

    /// Notes in the machine's folder that its disk holds these emptyDirs.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn note(machine_dir: &Path, pod: Uuid, dirs: impl Iterator<Item = PathBuf>) -> Result<()> {
        let before = read(machine_dir).filter(|volumes| volumes.pod == pod);
        let mut volumes = before.clone().unwrap_or(Volumes {
            pod,
            empty_dirs: BTreeSet::new(),
        });
        volumes.empty_dirs.extend(dirs);
        if volumes.empty_dirs.is_empty() || before.as_ref() == Some(&volumes) {
            return Ok(());
        }
        write(machine_dir, &volumes)
    }

    /// The disk of the machine in that folder goes with it.
    pub fn forget(machine_dir: &Path) {
        let path = machine_dir.join(VOLUMES);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                warn!("remove {}: {error}", path.display());
            }
            _ => {}
        }
    }

    /// Takes the disk out of the folder of a machine that is off for good, if its pod may live
    /// on.
    ///
    /// # Errors
    /// It cannot be moved.
    pub fn keep(&self, machine_dir: &Path) -> Result<()> {
        let disk = machine_dir.join(DISK);
        let wanted = read(machine_dir).filter(Volumes::is_wanted);
        let Some(volumes) = wanted.filter(|_| disk.exists()) else {
            return Ok(());
        };
        let to = self.of(volumes.pod);
        walkable_dir(&to)?;
        // First what says how long it is wanted: who sweeps meanwhile must not take it.
        write(&to, &volumes)?;
        match files::rename(&disk, &to.join(DISK)) {
            Ok(()) => {
                debug!("{} is kept for the pod's next sandbox", disk.display());
                Ok(())
            }
            // It was kept already by who was here before.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).context(|| format!("keep {}", disk.display())),
        }
    }

    /// Gives the pod's disk, if there is one, to the machine of its new sandbox. Says whether
    /// there was.
    ///
    /// # Errors
    /// It cannot be moved.
    pub fn take(&self, pod: Uuid, machine_dir: &Path) -> Result<bool> {
        let from = self.of(pod);
        let Some(volumes) = read(&from) else {
            return Ok(false);
        };
        write(machine_dir, &volumes)?;
        let disk = from.join(DISK);
        let taken = match files::rename(&disk, &machine_dir.join(DISK)) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(error).context(|| format!("take {}", disk.display())),
        };
        remove(&from);
        Ok(taken)
    }

    /// Removes the disks of pods that are gone.
    pub fn sweep(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let dir = entry.path();
            match read(&dir) {
                Some(volumes) if volumes.is_wanted() => {}
                Some(_) => {
                    info!("{}: the pod is gone", dir.display());
                    remove(&dir);
                }
                // Somebody is just making it, or it is of nobody who could ask for it.
                None if is_fresh(&dir) => {}
                None => remove(&dir),
            }
        }
    }

    /// Waits, though not for ever, until the pod is gone or has its disk again, and removes
    /// what is left.
    pub async fn settled(&self, pod: Uuid) {
        let dir = self.of(pod);
        let wait = async {
            while read(&dir).is_some_and(|volumes| volumes.is_wanted()) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        if tokio::time::timeout(GONE_WITHIN, wait).await.is_err() {
            debug!("{}: the pod lives on", dir.display());
        }
        self.sweep();
    }
}

fn read(dir: &Path) -> Option<Volumes> {
    let path = dir.join(VOLUMES);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            warn!("{}: {error}", path.display());
            return None;
        }
    };
    serde_json::from_slice(&text)
        .inspect_err(|error| warn!("{}: {error}", path.display()))
        .ok()
}

fn is_fresh(dir: &Path) -> bool {
    let changed = std::fs::metadata(dir).and_then(|meta| meta.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < GONE_WITHIN))
}

fn write(dir: &Path, volumes: &Volumes) -> Result<()> {
    let path = dir.join(VOLUMES);
    let json = serde_json::to_vec(volumes).context(|| format!("write {VOLUMES}"))?;
    write_atomically(&path, &json, PRIVATE)
}

fn remove(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            warn!("remove {}: {error}", dir.display());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    struct Host {
        root: TempDir,
        kept: Kept,
        pod: Uuid,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().expect("dir");
            let kept = Kept::new(root.path());
            Self {
                root,
                kept,
                pod: key("k8s.io", "uid").expect("key"),
            }
        }

        fn folder(&self, name: &str) -> PathBuf {
            let folder = self.root.path().join(name);
            fs::create_dir_all(&folder).expect("folder");
            folder
        }

        /// A machine with a disk that holds that emptyDir.
        fn machine(&self, name: &str, empty_dir: &Path) -> PathBuf {
            let machine = self.folder(name);
            fs::write(machine.join(DISK), name).expect("disk");
            Kept::note(&machine, self.pod, [empty_dir.to_owned()].into_iter()).expect("note");
            machine
        }

        fn is_empty(&self) -> bool {
            fs::read_dir(&self.kept.dir).map_or(true, |mut entries| entries.next().is_none())
        }
    }

    #[test]
    fn a_disk_goes_from_machine_to_machine_while_the_pod_lives() {
        let host = Host::new();
        let empty_dir = host.folder("pods/uid/volumes/kubernetes.io~empty-dir/v");
        let first = host.machine("first", &empty_dir);
        assert!(Kept::is_of(&first, host.pod));
        for _ in 0..2 {
            host.kept.keep(&first).expect("keep");
        }
        assert!(!Kept::is_of(&first, host.pod), "it has none any more");
        host.kept.sweep();
        let second = host.folder("second");
        assert!(host.kept.take(host.pod, &second).expect("take"));
        assert_eq!(
            fs::read_to_string(second.join(DISK)).expect("disk"),
            "first"
        );
        assert!(host.is_empty());
        assert!(!host.kept.take(host.pod, &second).expect("none left"));
        // The first one's delete, which may come late, changes nothing.
        host.kept.keep(&first).expect("keep");
        assert!(host.is_empty());
        // The second machine knows it without having been told.
        host.kept.keep(&second).expect("keep");
        assert!(!host.is_empty());
    }

    #[test]
    fn the_disk_of_a_pod_that_is_gone_is_not_kept_and_one_that_was_is_swept() {
        let host = Host::new();
        let empty_dir = host.folder("pods/uid/volumes/kubernetes.io~empty-dir/v");
        let machine = host.machine("m", &empty_dir);
        host.kept.keep(&machine).expect("keep");
        fs::remove_dir(&empty_dir).expect("kubelet removes it");
        host.kept.sweep();
        assert!(host.is_empty());
        let late = host.machine("late", &empty_dir);
        host.kept.keep(&late).expect("keep");
        assert!(host.is_empty());
        assert!(late.join(DISK).exists(), "it goes with the machine");
    }

    #[test]
    fn a_disk_that_is_given_up_or_has_no_empty_dirs_is_nobody_elses() {
        let host = Host::new();
        let doubtful = host.machine("doubtful", host.root.path());
        Kept::forget(&doubtful);
        host.kept.keep(&doubtful).expect("keep");
        assert!(host.is_empty());
        let machine = host.folder("m");
        fs::write(machine.join(DISK), "").expect("disk");
        Kept::note(&machine, host.pod, std::iter::empty()).expect("note");
        host.kept.keep(&machine).expect("keep");
        assert!(host.is_empty());
        assert_eq!(key("k8s.io", ""), None);
        assert_ne!(key("k8s.io", "a"), key("other", "a"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_when_the_pod_is_gone_and_not_never() {
        let host = Host::new();
        let empty_dir = host.folder("pods/uid/volumes/kubernetes.io~empty-dir/v");
        let machine = host.machine("m", &empty_dir);
        host.kept.keep(&machine).expect("keep");
        // The pod lives: the wait is bounded, and the disk stays.
        host.kept.settled(host.pod).await;
        assert!(!host.is_empty());
        let (_, ()) = tokio::join!(host.kept.settled(host.pod), async {
            tokio::time::sleep(LOOK_AGAIN).await;
            fs::remove_dir(&empty_dir).expect("kubelet removes it");
        });
        assert!(host.is_empty());
    }
}
