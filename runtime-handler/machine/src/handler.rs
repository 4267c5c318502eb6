//! The machine kind's [`RuntimeHandler`].

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use dyad_linux::owner::Owner;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::{Kind, MachineConfig};
use dyad_runtime_handler::error::{Context as _, Result};
use dyad_runtime_handler::handler::{
    ContainerRef, EventSender, Instance, MachineInfo, RuntimeHandler,
};
use dyad_runtime_handler::identity::pod_uuid;
use dyad_runtime_handler::migration::{
    Arrival, Hurry, Migration, MigrationParameters, MigrationProgress, Sent,
};
use dyad_runtime_handler::spec::{ContainerSpec, Role};
use tokio::sync::watch;

use crate::container::{Container, ContainerInstance};
use crate::libvirt::Libvirt;
use crate::machine::Machine;
use crate::record::{Folder, Record};
use crate::sandbox::Sandbox;
use crate::storage::apply::walkable_dir;
use crate::sweep;

/// Where the backend keeps its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Sockets; may be in memory.
    pub state_dir: PathBuf,
    /// Disks, images, records; on disk.
    pub cache_dir: PathBuf,
}

/// Runs one pod as a machine.
pub struct Machines {
    config: Arc<MachineConfig>,
    paths: Paths,
    events: EventSender,
    libvirt: Libvirt,
    machine: Mutex<Option<Arc<Machine>>>,
    /// Says to whoever sweeps that the machine is ours.
    owner: Mutex<Option<Owner>>,
}

/// The machine kind. Opens nothing: libvirt is connected at the first use. To be called,
/// and used, inside a tokio runtime.
///
/// # Errors
/// None today; the signature leaves room for a configuration that cannot serve.
pub fn new(
    config: Arc<MachineConfig>,
    paths: Paths,
    events: EventSender,
) -> Result<Arc<dyn RuntimeHandler>> {
    let libvirt = Libvirt::new(&config.libvirt_uri);
    Ok(Arc::new(Machines {
        config,
        paths,
        events,
        libvirt,
        machine: Mutex::default(),
        owner: Mutex::default(),
    }))
}

impl Machines {
    async fn create_sandbox(&self, spec: ContainerSpec) -> Result<Arc<dyn Instance>> {
        if spec.pod.name.is_empty() {
            return Err(Error::Unimplemented(format!(
                "{}: a machine runs pods that CRI makes (kubelet, crictl); run a task of its own, as `ctr run` does, with kind = \"container\"",
                spec.id
            )));
        }
        let name = format!("machine of pod {}", spec.pod.sandbox_id);
        if self.current().is_some_and(|machine| !machine.is_deleted()) {
            return Err(Error::AlreadyExists(name));
        }
        let (owner, folder) = self.own(&spec)?;
        let created = Machine::create(
            Arc::clone(&self.config),
            self.paths.clone(),
            self.events.clone(),
            self.libvirt.clone(),
            &spec,
        )
        .await;
        let machine = match created {
            Ok(machine) => machine,
            Err(error) => {
                // Nothing is made before the record, so that without one the folder is empty.
                if folder.load()?.is_none() {
                    folder.remove()?;
                }
                return Err(error);
            }
        };
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = Some(owner);
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&machine));
        Ok(Arc::new(Sandbox::new(machine)))
    }

    /// Before anything else is made of the machine.
    fn own(&self, spec: &ContainerSpec) -> Result<(Owner, Folder)> {
        let uuid = pod_uuid(&spec.containerd_namespace, &spec.pod.sandbox_id);
        let folder = Folder::new(&self.paths.state_dir, &self.paths.cache_dir, uuid);
        for dir in [
            &self.paths.cache_dir,
            &self.paths.cache_dir.join("machines"),
        ] {
            if !dir.exists() {
                walkable_dir(dir)?;
            }
        }
        walkable_dir(&folder.dir)?;
        let path = folder.owner_lock();
        let owner = Owner::take(&path).context(|| format!("lock {}", path.display()))?;
        match owner {
            Some(owner) => Ok((owner, folder)),
            None => Err(Error::FailedPrecondition(format!(
                "machine of pod {}: another process has {}; wait until it has ended",
                spec.pod.sandbox_id,
                path.display()
            ))),
        }
    }

    fn current(&self) -> Option<Arc<Machine>> {
        self.machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[async_trait]
impl RuntimeHandler for Machines {
    fn kind(&self) -> Kind {
        Kind::Machine
    }

    async fn create(&self, spec: ContainerSpec) -> Result<Arc<dyn Instance>> {
        match spec.role {
            Role::Sandbox => self.create_sandbox(spec).await,
            Role::Container => {
                let machine = self.current().ok_or_else(|| {
                    Error::NotFound(format!("machine of pod {}", spec.pod.sandbox_id))
                })?;
                let container = Container::create(machine, spec).await?;
                Ok(Arc::new(ContainerInstance(container)))
            }
        }
    }

    async fn cleanup(&self, container: &ContainerRef) -> Result<()> {
        // A container's traces are in its pod's guest and go with the machine.
        if container.role == Role::Container {
            return Ok(());
        }
        let bare = Record::new(&container.containerd_namespace, &container.sandbox_id);
        let folder = Folder::new(&self.paths.state_dir, &self.paths.cache_dir, bare.uuid);
        if !folder.exists() {
            return Ok(());
        }
        let record = match folder.load()? {
            Some(record) => record,
            None => bare.read_from_bundle(&container.bundle),
        };
        sweep::reclaim(&self.libvirt, &folder, record).await
    }

    async fn afterwards(&self) {
        if let Some(machine) = self.current() {
            machine.settled().await;
        }
    }

    fn migration(&self) -> Result<&dyn Migration> {
        Ok(self)
    }

    fn machine(&self) -> Option<MachineInfo> {
        self.current().map(|machine| machine.info())
    }

    async fn console(&self) -> Result<OwnedFd> {
        let machine = self
            .current()
            .ok_or_else(|| Error::FailedPrecondition("the pod's machine is not made yet".into()))?;
        machine.console()
    }
}

impl Machines {
    fn to_move(&self) -> Result<Arc<Machine>> {
        self.current()
            .ok_or_else(|| Error::FailedPrecondition("the pod's machine is not made yet".into()))
    }
}

#[async_trait]
impl Migration for Machines {
    async fn check(&self, parameters: &MigrationParameters) -> Result<()> {
        self.to_move()?.check_migration(parameters).await
    }

    async fn send(
        &self,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent> {
        self.to_move()?.send(parameters, pod, progress).await
    }

    async fn cancel(&self) -> Result<()> {
        self.to_move()?.cancel_migration().await
    }

    async fn hurry(&self, how: Hurry) -> Result<()> {
        self.to_move()?.hurry_migration(how).await
    }

    async fn receive(&self) -> Result<Arrival> {
        self.to_move()?.receive().await
    }
}
