//! The handler: chooses the OCI runtime once, makes containers, cleans up after others.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use async_trait::async_trait;
use dyad_linux::cgroup::{Cgroup, Hierarchies, is_systemd};
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::config::{ContainerConfig, Kind};
use dyad_runtime_handler::error::{Context as _, Error, Result};
use dyad_runtime_handler::handler::{ContainerRef, EventSender, Instance, RuntimeHandler};
use dyad_runtime_handler::identity;
use dyad_runtime_handler::migration::{Migration, source_of};
use dyad_runtime_handler::spec::{ContainerSpec, Role};
use tokio::sync::OnceCell;

use crate::choose::{Need, checkpoints, choose};
use crate::container::Container;
use crate::hold::{self, Holder};
use crate::left::{self, Left};
use crate::migration::{self, Criu, Job};
use crate::rootfs;
use crate::runtime::{Runtime, StateDirs};

/// What runs containers of a spec whose version nobody knows any more.
const OLDEST_SPEC: &str = "1.0.0";

/// The container kind.
pub struct Containers {
    pub(crate) config: Arc<ContainerConfig>,
    pub(crate) folders: Folders,
    pub(crate) reaper: Arc<Reaper>,
    events: EventSender,
    binary: OnceCell<PathBuf>,
    hierarchies: OnceLock<Arc<Hierarchies>>,
    pub(crate) criu: OnceCell<Criu>,
    /// Who the pod is ([`dyad_runtime_handler::identity`]).
    pub(crate) identity: OnceLock<String>,
    /// The pod's namespace; empty outside Kubernetes.
    pub(crate) kubernetes_namespace: OnceLock<String>,
    /// Whom it waits for, as a migration's target.
    pub(crate) source: OnceLock<String>,
    /// Its source has come.
    source_came: AtomicBool,
    /// What holds the pod's namespaces, and its id.
    sandbox: Mutex<Option<(String, Weak<dyn Instance>)>>,
    /// The pod's containers, those that were deleted among them.
    pub(crate) pod: Mutex<Vec<Weak<Container>>>,
    /// The migration under way.
    pub(crate) job: Mutex<Option<Arc<Job>>>,
}

/// Where a handler keeps what.
#[derive(Debug, Clone)]
pub struct Folders {
    /// The OCI runtime's state, below it in `<containerd namespace>/<sandbox id>`, unless
    /// the configuration names another place.
    pub oci_root: PathBuf,
    /// Memory and files of a pod on its way: a real disk, or it costs memory.
    pub checkpoints: PathBuf,
    /// The sockets on which pods wait for their migration source.
    pub sockets: PathBuf,
}

impl Folders {
    /// Those below the two directories of the configuration.
    pub fn below(state_dir: &Path, cache_dir: &Path) -> Self {
        Self {
            oci_root: state_dir.join("oci"),
            checkpoints: cache_dir.join("checkpoints"),
            sockets: migration::sockets_dir(state_dir),
        }
    }
}

impl Containers {
    /// A handler that keeps its files in `folders`, and sends its events to `events`.
    /// Runs nothing yet.
    #[expect(clippy::new_ret_no_self, reason = "callers hold any kind of handler")]
    pub fn new(
        config: ContainerConfig,
        folders: Folders,
        reaper: Arc<Reaper>,
        events: EventSender,
    ) -> Arc<dyn RuntimeHandler> {
        Arc::new(Self {
            config: Arc::new(config),
            folders,
            reaper,
            events,
            binary: OnceCell::new(),
            hierarchies: OnceLock::new(),
            criu: OnceCell::new(),
            identity: OnceLock::new(),
            kubernetes_namespace: OnceLock::new(),
            source: OnceLock::new(),
            source_came: AtomicBool::new(false),
            sandbox: Mutex::new(None),
            pod: Mutex::default(),
            job: Mutex::default(),
        })
    }

    fn hierarchies(&self) -> Result<&Arc<Hierarchies>> {
        if let Some(known) = self.hierarchies.get() {
            return Ok(known);
        }
        let found = Arc::new(Hierarchies::of_host()?);
        Ok(self.hierarchies.get_or_init(|| found))
    }

    /// The OCI runtime's state of a pod.
    fn state_dirs(&self, containerd_namespace: &str, sandbox_id: &str) -> Result<StateDirs> {
        check_name("containerd namespace", containerd_namespace)?;
        check_name("sandbox id", sandbox_id)?;
        let pod = self.folders.oci_root.join(containerd_namespace);
        let pod = pod.join(sandbox_id);
        let root = match &self.config.root {
            // As containerd's own shim does.
            Some(root) => root.join(containerd_namespace),
            None => pod.clone(),
        };
        Ok(StateDirs { root, pod })
    }

    async fn runtime(&self, state: StateDirs, spec_version: &str) -> Result<Runtime> {
        let need = Need::new(spec_version, self.hierarchies()?);
        // Beside the state of the namespaces, whose names are not ours.
        let cache = self.folders.oci_root.with_file_name("oci-runtime.json");
        let choose = || choose(&self.config, &need, &cache, &self.reaper);
        let binary = self.binary.get_or_try_init(choose).await?;
        Ok(Runtime::new(
            binary.clone(),
            state,
            Arc::clone(&self.reaper),
        ))
    }
}

#[async_trait]
impl RuntimeHandler for Containers {
    fn kind(&self) -> Kind {
        Kind::Container
    }

    async fn create(&self, spec: ContainerSpec) -> Result<Arc<dyn Instance>> {
        check_name("container id", &spec.id)?;
        let dirs = self.state_dirs(&spec.containerd_namespace, &spec.pod.sandbox_id)?;
        let is_sandbox = spec.role == Role::Sandbox;
        if is_sandbox {
            self.meet(&spec)?;
        }
        if is_sandbox && spec.oci.process().is_none() {
            let state = dirs.pod.join(&spec.id);
            let hierarchies = self.hierarchies()?;
            let holder = Holder::create(&spec, hierarchies, &self.reaper, &self.events, state);
            let holder: Arc<dyn Instance> = Arc::new(holder.await?);
            self.note_sandbox(&spec.id, &holder);
            return Ok(holder);
        }
        let runtime = self.runtime(dirs, spec.oci.version()).await?;
        let hierarchies = Arc::clone(self.hierarchies()?);
        let incoming = !is_sandbox && self.awaits_source();
        let events = self.events.clone();
        let how = (Arc::clone(&self.config), incoming);
        let container = Container::create(spec, runtime, hierarchies, events, how).await?;
        let container = Arc::new(container);
        if is_sandbox {
            let sandbox: Arc<dyn Instance> = container.clone();
            self.note_sandbox(container.id(), &sandbox);
        } else {
            lock(&self.pod).push(Arc::downgrade(&container));
        }
        Ok(container)
    }

    fn migration(&self) -> Result<&dyn Migration> {
        checkpoints(&self.config)?;
        migration::find_criu(&self.config)?;
        Ok(self)
    }

    async fn cleanup(&self, container: &ContainerRef) -> Result<()> {
        check_name("container id", &container.id)?;
        let dirs = self.state_dirs(&container.containerd_namespace, &container.sandbox_id)?;
        let mut cleaned = Ok(());
        if container.role == Role::Sandbox {
            let identity =
                identity::pod_uuid(&container.containerd_namespace, &container.sandbox_id);
            migration::remove_leftovers(&self.folders, &identity.to_string());
            // With task API v3 nobody asks for the pod's other containers. containerd
            // keeps their bundles beside this one, if it still has them.
            let bundles = container.bundle.parent().unwrap_or(Path::new("/"));
            for id in states_in(&dirs.pod)
                .into_iter()
                .filter(|id| *id != container.id)
            {
                // A pod without a pause container lies elsewhere; the OCI runtime knows.
                let bundle =
                    left::bundle(&dirs.root.join(&id)).unwrap_or_else(|| bundles.join(&id));
                cleaned = cleaned.and(self.clean(&dirs, &id, &bundle).await);
            }
        }
        let own = self.clean(&dirs, &container.id, &container.bundle);
        cleaned.and(own.await)
    }
}

impl Containers {
    /// Notes who the pod is, and whom it waits for.
    fn meet(&self, spec: &ContainerSpec) -> Result<()> {
        let identity = identity::pod_uuid(&spec.containerd_namespace, &spec.pod.sandbox_id);
        let _ = self.identity.set(identity.to_string());
        let _ = self.kubernetes_namespace.set(spec.pod.namespace.clone());
        if let Some(source) = source_of(&spec.pod)? {
            let _ = self.source.set(source.to_string());
        }
        Ok(())
    }

    fn awaits_source(&self) -> bool {
        self.source.get().is_some() && !self.source_came.load(Ordering::Relaxed)
    }

    /// Containers that are created from now on run as any.
    pub(crate) fn arrived(&self) {
        self.source_came.store(true, Ordering::Relaxed);
    }

    fn note_sandbox(&self, id: &str, sandbox: &Arc<dyn Instance>) {
        *lock(&self.sandbox) = Some((id.to_owned(), Arc::downgrade(sandbox)));
    }

    /// What holds the pod's namespaces: its id and pid.
    pub(crate) fn sandbox(&self) -> Option<(String, u32)> {
        let sandbox = lock(&self.sandbox);
        let (id, instance) = sandbox.as_ref()?;
        Some((id.clone(), instance.upgrade()?.pid()?))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ids of the containers that have state in `root`.
fn states_in(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|id| check_name("container id", id).is_ok())
        .collect()
}

impl Containers {
    async fn clean(&self, dirs: &StateDirs, id: &str, bundle: &Path) -> Result<()> {
        let processes = self.clean_processes(dirs, id, bundle).await;
        if processes.is_ok() {
            dirs.forget(id);
        }
        processes.and(rootfs::unmount_all(&bundle.join("rootfs")))
    }

    async fn clean_processes(&self, dirs: &StateDirs, id: &str, bundle: &Path) -> Result<()> {
        let held = dirs.pod.join(id);
        if let Some(cgroup) = hold::cgroup_left(&held) {
            // The holder itself ended with its shim.
            if let Some(cgroup) = cgroup {
                cgroup.remove().await?;
            }
            return fs::remove_dir_all(&held).context(|| format!("remove {}", held.display()));
        }
        let state = dirs.root.join(id);
        let left = Left::read(&state, bundle);
        let cgroup = match left.cgroup_dirs.and_then(Cgroup::of_dirs) {
            Some(cgroup) => Some(cgroup),
            None => match &left.cgroups_path {
                Some(path) => self.hierarchies()?.at(path).ok(),
                None => None,
            },
        };
        // First all at once: the OCI runtime would kill init and look for its end every
        // 100 ms.
        if let Some(cgroup) = cgroup.as_ref().filter(|cgroup| cgroup.exists()) {
            match cgroup.signal_all(libc::SIGKILL).await {
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => log::warn!("{id}: {}", error.chain()),
            }
        }
        let version = left.version.as_deref().unwrap_or(OLDEST_SPEC);
        let systemd =
            self.config.systemd_cgroup || left.cgroups_path.as_deref().is_some_and(is_systemd);
        if state.exists() {
            let runtime = self.runtime(dirs.clone(), version).await?;
            // Not in the bundle: containerd may take that away at any moment.
            runtime.delete(id, systemd, &self.folders.oci_root).await?;
        }
        match cgroup {
            Some(cgroup) => cgroup.remove().await,
            None => Ok(()),
        }
    }
}

/// Names become file names. What an OCI runtime refuses beside that, it refuses itself.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+' | '#');
    if !name.is_empty() && name.chars().all(plain) && !name.chars().all(|c| c == '.') {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{what} {name:?}: must be made of letters, digits, '_', '.', '-', '+' and '#'"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_would_leave_its_directory_is_refused() {
        for name in ["", ".", "..", "a/b", "../x", "a b", "ü", "a\0"] {
            assert!(check_name("container id", name).is_err(), "{name:?}");
        }
        for name in ["a", "a.b", "k8s.io", "a-b_c+1", "a#01", "..."] {
            assert_eq!(check_name("x", name).is_ok(), name != "...", "{name:?}");
        }
    }
}
