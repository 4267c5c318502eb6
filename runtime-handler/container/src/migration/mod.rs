//! Moves a pod of containers to another node: checkpoint, copy, restore.
//!
//! ```text
//!  source (send)                                target (receive)
//!    check: CRIU, blockers ---- Manifest ------->  compare
//!           <------------------ Accept | Refuse -
//!    layers, volumes, memory (pre-dumps) ------->  into place          it runs here
//!    freeze; drain output; dump --------------->                       it stands still
//!    what changed since, images --------------->
//!    Commit ----------------------------------->  restore              only there it
//!           <------------------ Running | Aborted                      may run
//!    Running: kill here     Aborted: thaw here
//! ```
//! **Exactly one.** Until `Commit` is sent the pod runs here, whatever breaks: the target
//! restores nothing without it. From then on the target decides, once, and remembers; the
//! source stays frozen until it has heard the answer, over a new connection where the old
//! one broke (`source::resolve`), for as long as it takes. What is said and when is
//! in [`source`] and [`target`], what on the way in [`wire`] and [`tree`], what forbids
//! it in [`plan`].

mod checkpoint;
mod criu;
mod destination;
mod meter;
mod plan;
mod sockets;
mod source;
mod target;
mod transport;
mod tree;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::migration::{
    Arrival, Hurry, Migration, MigrationParameters, MigrationProgress, Sent,
};
use tokio::sync::watch;

pub(crate) use self::criu::{Criu, check, find as find_criu, words};
use self::plan::{Manifest, Volume};
use crate::container::Container;
use crate::handler::{Containers, Folders};

/// Where a pod that waits for `source` (see [`dyad_runtime_handler::identity`]) listens; a file beside it,
/// `<source>.address`, says where on the network, where it does.
pub fn socket_path(state_dir: &Path, source: &str) -> PathBuf {
    sockets_dir(state_dir).join(format!("{source}.sock"))
}

pub(crate) fn sockets_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("migration")
}

/// Where a pod keeps what it sends, and what it receives: its memory. Named by its own
/// identity, also as a target, so that whoever cleans up after it knows both.
fn scratches(folders: &Folders, identity: &str) -> [PathBuf; 2] {
    ["out", "in"].map(|way| folders.checkpoints.join(format!("{way}-{identity}")))
}

/// Removes what an attempt of a shim that died left.
pub(crate) fn remove_leftovers(folders: &Folders, identity: &str) {
    for dir in scratches(folders, identity) {
        let lock = owner_lock(&dir);
        if let Err(error) = remove_all(&dir).and_then(|()| remove_file(&lock)) {
            log::warn!("remove {}: {error}", dir.display());
        }
    }
}

/// What a migration under way can be told.
#[derive(Debug, Default)]
pub(crate) struct Job {
    cancelled: watch::Sender<bool>,
    hurried: watch::Sender<bool>,
    /// The target has been told to run it.
    committed: Mutex<bool>,
}

impl Job {
    async fn cancelled(&self) {
        // The sender lives as long as we.
        let _ = self.cancelled.subscribe().wait_for(|told| *told).await;
    }

    fn is_hurried(&self) -> bool {
        *self.hurried.borrow()
    }

    /// From here on it cannot be given up.
    fn commit(&self) -> Result<()> {
        let mut committed = lock(&self.committed);
        if *self.cancelled.borrow() {
            return Err(given_up());
        }
        *committed = true;
        Ok(())
    }

    fn cancel(&self) -> Result<()> {
        let committed = lock(&self.committed);
        if *committed {
            return Err(Error::FailedPrecondition(
                "the target has been told to run the pod: wait for its answer".into(),
            ));
        }
        self.cancelled.send_replace(true);
        Ok(())
    }
}

fn given_up() -> Error {
    Error::FailedPrecondition("the migration was given up".into())
}

#[async_trait]
impl Migration for Containers {
    async fn check(&self, parameters: &MigrationParameters) -> Result<()> {
        self.check_move(parameters).await
    }

    async fn send(
        &self,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent> {
        let job = Arc::new(Job::default());
        *lock(&self.job) = Some(Arc::clone(&job));
        let sent = self.send_pod(parameters, pod, progress, &job).await;
        *lock(&self.job) = None;
        sent
    }

    async fn cancel(&self) -> Result<()> {
        let job = lock(&self.job).clone();
        job.map_or(Ok(()), |job| job.cancel())
    }

    async fn hurry(&self, how: Hurry) -> Result<()> {
        if how == Hurry::PostCopy {
            return Err(Error::FailedPrecondition(
                "containers have no post-copy: their memory moves while they stand still".into(),
            ));
        }
        if let Some(job) = &*lock(&self.job) {
            job.hurried.send_replace(true);
        }
        Ok(())
    }

    async fn receive(&self) -> Result<Arrival> {
        self.receive_pod().await
    }
}

impl Containers {
    /// The containers of the pod beside its sandbox, by Kubernetes' name.
    pub(crate) fn members(&self) -> BTreeMap<String, Arc<Container>> {
        let mut pod = lock(&self.pod);
        pod.retain(|container| container.strong_count() > 0);
        pod.iter()
            .filter_map(std::sync::Weak::upgrade)
            // A deleted one may be held still.
            .filter(|container| container.waits() || container.init().is_ok())
            .map(|container| (container.about.name.clone(), container))
            .collect()
    }

    pub(crate) async fn criu(&self) -> Result<Criu> {
        let criu = self
            .criu
            .get_or_try_init(async || Criu::ask(criu::find(&self.config)?, &self.reaper).await);
        criu.await.cloned()
    }

    /// Where what goes is kept.
    fn scratch_out(&self) -> Result<Scratch> {
        let [dir, _] = scratches(&self.folders, &self.identity()?);
        Scratch::new(dir)
    }

    /// Where what comes is kept.
    fn scratch_in(&self) -> Result<Scratch> {
        let [_, dir] = scratches(&self.folders, &self.identity()?);
        Scratch::new(dir)
    }

    /// What both sides say of themselves.
    async fn describe(
        &self,
        criu: &Criu,
        members: &BTreeMap<String, Arc<Container>>,
    ) -> Result<Manifest> {
        let mut containers = BTreeMap::new();
        for (name, container) in members {
            containers.insert(name.clone(), container.describe().await?);
        }
        Ok(Manifest {
            kubernetes_namespace: self.kubernetes_namespace.get().cloned().unwrap_or_default(),
            dyad: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            cpu_flags: cpu_flags()?,
            criu: criu.version,
            addresses: BTreeSet::new(),
            bytes: 0,
            containers,
        })
    }

    /// Directories that several containers may share, each once: by the first container
    /// that has it.
    fn copied_volumes(
        members: &BTreeMap<String, Arc<Container>>,
    ) -> Result<Vec<(String, String, PathBuf)>> {
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for (name, container) in members {
            for (destination, source, volume) in container.volumes()? {
                if volume == Volume::Copied && seen.insert(source.clone()) {
                    found.push((name.clone(), destination, source));
                }
            }
        }
        Ok(found)
    }
}

/// What this host's processors can.
fn cpu_flags() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string("/proc/cpuinfo").context(|| "read /proc/cpuinfo".into())?;
    let flags = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        matches!(name.trim(), "flags" | "Features").then_some(value)
    });
    Ok(flags
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect())
}

/// Addresses of the network namespace of `pid`.
fn addresses_of(pid: u32) -> Result<BTreeSet<IpAddr>> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))
        .context(|| format!("open the network namespace of {pid}"))?;
    // A thread of our own goes there; getifaddrs tells of the thread's namespace.
    let look = || -> io::Result<BTreeSet<IpAddr>> {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(nix::ifaddrs::getifaddrs()?
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
            })
            .collect())
    };
    std::thread::scope(|scope| scope.spawn(look).join())
        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        .context(|| format!("list the addresses of {pid}"))
}

/// Free bytes of the file system that `dir`, or the nearest directory above it, is on.
fn free_bytes(dir: &Path) -> Result<u64> {
    let there = dir
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there)
        .context(|| format!("ask for the space on {}", there.display()))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory that goes, with all in it, when it is no longer needed.
struct Scratch {
    dir: PathBuf,
    /// Whoever sweeps leaves it alone.
    _owner: Owner,
}

impl Scratch {
    /// Makes it, empty, for root alone: it holds a pod's memory.
    fn new(dir: PathBuf) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        let what = || format!("make {}", dir.display());
        private.create(dir.parent().unwrap_or(&dir)).context(what)?;
        let owner = Owner::take(&owner_lock(&dir)).context(what)?;
        let owner = owner.ok_or_else(|| {
            Error::FailedPrecondition(format!(
                "{} is in use: another migration of this pod is under way, wait for its end",
                dir.display()
            ))
        })?;
        remove_all(&dir)
            .and_then(|()| private.create(&dir))
            .context(what)?;
        Ok(Self { dir, _owner: owner })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lock = owner_lock(&self.dir);
        if let Err(error) = remove_all(&self.dir).and_then(|()| remove_file(&lock)) {
            log::warn!("remove {}: {error}", self.dir.display());
        }
    }
}

/// What the process that works on the checkpoint in `dir` has locked; beside it, for all that is
/// in it goes to the other side.
pub(crate) fn owner_lock(dir: &Path) -> PathBuf {
    dir.with_extension("lock")
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn remove_all(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_committed_cannot_be_given_up_and_the_other_way_round() {
        let job = Job::default();
        job.cancel().unwrap();
        job.cancelled().await;
        assert!(job.commit().is_err());
        let job = Job::default();
        job.commit().unwrap();
        let error = job.cancel().unwrap_err().to_string();
        assert!(error.contains("wait for its answer"), "{error}");
    }

    #[test]
    fn nothing_of_a_pod_s_memory_stays_after_a_source_or_a_target_died() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::below(&dir.path().join("run"), dir.path());
        let scratch = |identity: &str| scratches(&folders, identity).map(Scratch::new);
        let died = scratch("1111").map(Result::unwrap);
        let other = scratch("2222").map(Result::unwrap);
        died.into_iter().for_each(std::mem::forget);
        remove_leftovers(&folders, "1111");
        let mut left: Vec<_> = fs::read_dir(&folders.checkpoints)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .map(|path| path.file_name().unwrap().to_owned())
            .collect();
        left.sort();
        assert_eq!(left, ["in-2222", "out-2222"]);
        drop(other);
    }

    #[test]
    fn this_host_knows_itself() {
        assert!(!cpu_flags().unwrap().is_empty());
        assert!(free_bytes(Path::new("/nowhere/at/all")).unwrap() > 0);
        let own = std::process::id();
        assert!(addresses_of(own).unwrap().iter().any(IpAddr::is_loopback));
    }
}
