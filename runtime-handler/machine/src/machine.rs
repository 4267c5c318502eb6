//! One pod's machine: made, powered on and off, watched, removed.
//!
//! ```text
//!            power_on                      agent greets, set-up done
//!   Off -----------------> On(booting) ---------------------------> On(ready)
//!    ^   define'd, paused,                                              |
//!    |   cgroup, taps, resume                                           |
//!    +--------- libvirt tells Stopped(ending): guest, us, or outside ---+
//! ```
//! `libvirt` owns the domain and is believed: power changes here only when its events say
//! so. Whatever ends the machine ends every process in it, with the same status.
//! Rooms: [`prepare`] (before there is one), [`boot`], [`power`], [`processes`],
//! [`images`] (and the agent), [`resize`], [`leaving`] and [`arriving`] (migration), [`former`] (its
//! source's addresses).

mod arriving;
mod boot;
mod former;
mod images;
mod leaving;
mod power;
mod prepare;
mod processes;
mod resize;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use dyad_linux::cgroup::Hierarchies;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::{MachineConfig, annotation};
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::handler::{EventSender, MachineInfo, ProcessId};
use dyad_runtime_handler::migration;
use dyad_runtime_handler::spec::ContainerSpec;
use dyad_runtime_handler::stats::Stats;
use log::{debug, info, warn};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::container::Container;
use crate::domain::{Accelerator, AgentChannel, DomainPlan, Nic, PodDisk, domain_name};
use crate::events::{Ending, Observed};
use crate::guest::Agent;
use crate::kept::{self, Kept};
use crate::libvirt::Libvirt;
use crate::migrate::offer::Offer;
use crate::network::plan::{Held, NetworkPlan};
use crate::network::{apply as network, plan as network_plan};
use crate::record::{Folder, Record, machine_uuid};
use crate::resize::{Ledger, Reached};
use crate::spec::SandboxSpec;
use crate::storage::apply::{self as storage, QemuUser};
use crate::storage::cache;
use crate::volumes::plan::{Copy, volumes_on_disk};
use crate::{Paths, accelerator, cgroup, host, modules, size};
use arriving::Arriving;
use images::connect;
use prepare::{
    check_readable, check_socket_path, choose_channel, host_size, inherit_disk, make_folders, title,
};

/// A migration without its shim may take this long: `delete` has four seconds.
const DEAD_SHIM_PATIENCE: std::time::Duration = std::time::Duration::from_millis(2000);
/// What giving it up may take.
const STANDSTILL: std::time::Duration = std::time::Duration::from_millis(700);
/// libvirt tells only when asked.
const DEAD_SHIM_LOOKS: std::time::Duration = std::time::Duration::from_millis(50);
/// The guest finds the pod's disk by this.
const POD_DISK_SERIAL: &str = "dyad-pod";

/// Whether the machine is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Power {
    /// Never was, or ended so.
    Off(Option<Ending>),
    /// vCPUs run, or are paused.
    On {
        /// QEMU.
        pid: u32,
        /// How far its guest is.
        boot: Boot,
    },
}

/// How far a guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// Not set up yet.
    Booting,
    /// The agent serves.
    Ready,
    /// It never came up.
    Failed(String),
}

/// A pod's machine.
pub struct Machine {
    config: Arc<MachineConfig>,
    paths: Paths,
    record: Record,
    folder: Folder,
    libvirt: Libvirt,
    channel: AgentChannel,
    /// A link to each power-on's guest; closed when that ends.
    agent: Mutex<Agent>,
    events: EventSender,
    qemu_user: Option<QemuUser>,
    /// What its next definition is made from: its size and images change.
    plan: Mutex<DomainPlan>,
    /// Its containers' limits, and one change of its size at a time.
    sizing: tokio::sync::Mutex<Ledger>,
    cpu_shares: Option<u64>,
    accelerator: Accelerator,
    /// The guest's `uname -r`, once it told.
    kernel_release: Mutex<String>,
    network: Mutex<NetworkPlan>,
    /// What its guest has of its source's network, for a while.
    former: Mutex<Held>,
    sandbox: SandboxSpec,
    power: watch::Sender<Power>,
    /// How often its guest rebooted.
    reboots: watch::Sender<u64>,
    /// Started processes that have not ended.
    /// A sender is dropped at its process's end.
    running: Mutex<HashMap<ProcessId, watch::Sender<()>>>,
    /// One image is plugged in at a time.
    plugging: tokio::sync::Mutex<()>,
    /// Its vCPUs are stopped.
    suspended: AtomicBool,
    /// The signal that we ended it with.
    ended_by: Mutex<Option<i32>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    /// The pod's containers by Kubernetes' name: so a migration knows them.
    containers: Mutex<BTreeMap<String, Weak<Container>>>,
    /// How far it is as a migration's target.
    arriving: watch::Sender<Arriving>,
    /// What it has ready as such.
    offer: tokio::sync::Mutex<Option<Offer>>,
    /// It is being migrated away.
    leaving: AtomicBool,
    /// So, and somebody wants that given up.
    give_up: AtomicBool,
    /// So, and it has been told to run over there.
    post_copy: AtomicBool,
    /// The link to the guest is given up, for the other side.
    let_go: AtomicBool,
    /// The other side has been told how far each stream is.
    handed_over: tokio::sync::Mutex<bool>,
    /// It runs elsewhere.
    moved: AtomicBool,
    /// The guest's last event that was told.
    events_after: AtomicU64,
    deleted: AtomicBool,
    /// The pod, for what outlives this machine.
    pod_key: Option<Uuid>,
    /// Its disk still has what the containers of the pod's last sandbox wrote.
    inherited: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Makes the pod's machine and powers it on; its guest boots while the caller goes on.
    /// What was made is removed again when a step fails.
    ///
    /// # Errors
    /// The spec asks for what a machine cannot give, or the host lacks something: each
    /// names it and the way out.
    pub async fn create(
        config: Arc<MachineConfig>,
        paths: Paths,
        events: EventSender,
        libvirt: Libvirt,
        spec: &ContainerSpec,
    ) -> Result<Arc<Self>> {
        let sandbox = crate::spec::sandbox(&spec.oci)?;
        let mut record = Record::new(&spec.containerd_namespace, &spec.pod.sandbox_id);
        let folder = Folder::new(&paths.state_dir, &paths.cache_dir, record.uuid);
        if let Some(source) = migration::source_of(&spec.pod) {
            // The machine keeps its name wherever it goes; the folder is the pod's.
            record.uuid = source.parse().map_err(|error| {
                Error::InvalidArgument(format!(
                    "annotation {} {source:?}: {error}; it names the source's machine, as dyadctl \
                     state tells its uuid",
                    annotation::MIGRATION_SOURCE
                ))
            })?;
            if libvirt.state(record.uuid).await? != Observed::Absent {
                return Err(Error::FailedPrecondition(format!(
                    "annotation {}: machine {} is known to this node's libvirt already; a machine \
                     migrates to another node",
                    annotation::MIGRATION_SOURCE,
                    record.uuid
                )));
            }
        }
        let made = Self::build(
            config,
            paths.clone(),
            events,
            libvirt.clone(),
            spec,
            sandbox,
            record.clone(),
            folder.clone(),
        )
        .await;
        if let Err(error) = &made {
            debug!("machine {}: undoing: {}", record.uuid, error.chain());
            // What was written last knows most.
            let record = folder.load().ok().flatten().unwrap_or(record);
            if let Err(error) = remove(&libvirt, &folder, &record).await {
                warn!("undo machine {}: {}", record.uuid, error.chain());
            }
        }
        made
    }

    #[allow(clippy::too_many_arguments)]
    async fn build(
        config: Arc<MachineConfig>,
        paths: Paths,
        events: EventSender,
        libvirt: Libvirt,
        spec: &ContainerSpec,
        sandbox: SandboxSpec,
        mut record: Record,
        folder: Folder,
    ) -> Result<Arc<Self>> {
        let uuid = record.uuid;
        let pod = machine_uuid(&record.containerd_namespace, &record.sandbox_id);
        let waits = migration::source_of(&spec.pod).is_some();
        let wanted = size::plan(
            &config,
            &sandbox.annotations,
            &spec.pod.annotations,
            host_size()?,
        )?;
        check_readable("kernel", &config.kernel)?;
        check_readable("initramfs", &config.initramfs)?;
        let modules = modules::disk(&config)?;
        check_socket_path(&folder.console_socket())?;

        let capabilities = host::capabilities(&libvirt).await?;
        let accelerator = accelerator::choose(
            config.accelerator,
            &capabilities,
            &config.kernel,
            &paths.cache_dir,
        )
        .await?;
        let network = match &sandbox.netns {
            Some(netns) => {
                let found = network::read(netns).await?;
                network_plan::plan(pod, &found.links, &found.addresses, &found.routes)
                    .map_err(|error| Error::FailedPrecondition(error.to_string()))?
            }
            None => NetworkPlan::default(),
        };

        record.netns = sandbox.netns.clone();
        record.cgroups_path = sandbox.cgroups_path.clone();
        record.size = Some(wanted.size);
        record.reached = Some(Reached::at_boot(&wanted.size));
        record.taps = network
            .interfaces
            .iter()
            .map(|interface| (interface.name.clone(), interface.tap.clone()))
            .collect();
        make_folders(&paths, &folder, capabilities.qemu_user)?;
        storage::check_on_disk(&folder.dir)?;
        folder.save(&record)?;
        folder.kept.sweep();
        cache::sweep(&folder.images);
        let pod_key = kept::key(&record.containerd_namespace, &spec.pod.uid);
        // A target's is filled by its source.
        let inherited = match pod_key {
            Some(key) if !waits => inherit_disk(&libvirt, &paths, &folder, key).await?,
            _ => false,
        };
        if inherited {
            info!("machine {uuid}: the pod's disk is that of its last sandbox");
        } else {
            storage::pod_disk(
                folder.disk(),
                wanted.disk_gib,
                capabilities.qemu_user,
                !waits,
            )
            .await?;
        }

        let channel = choose_channel(config.channel, &folder, pod)?;
        let plan = DomainPlan {
            uuid,
            title: title(spec),
            sandbox_id: record.sandbox_id.clone(),
            containerd_namespace: record.containerd_namespace.clone(),
            accelerator,
            size: wanted.size,
            reached: Reached::at_boot(&wanted.size),
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            kernel_params: config.kernel_params.clone(),
            channel: channel.clone(),
            pod_disk: PodDisk {
                file: folder.disk(),
                serial: POD_DISK_SERIAL.into(),
            },
            nics: network
                .interfaces
                .iter()
                .map(|interface| Nic {
                    tap: interface.tap.clone(),
                    mac: interface.mac.clone(),
                    mtu: interface.mtu,
                })
                .collect(),
            console_socket: folder.console_socket(),
            console_log: folder.console(),
            images: Vec::new(),
            modules,
        };
        libvirt.define(uuid, plan.to_xml()).await?;
        let changes = libvirt.watch(uuid).await?;
        if let Some(path) = &sandbox.cgroups_path {
            cgroup::create(path, wanted.cpu_shares).await?;
        }
        info!(
            "machine {uuid} for {}: {} vCPUs, {} MiB, {accelerator:?}",
            plan.title, wanted.size.vcpus, wanted.size.memory_mib
        );
        let agent = connect(&channel);
        if waits {
            // Nobody speaks to the guest before it runs here.
            agent.close();
        }
        let machine = Arc::new(Self {
            config,
            paths,
            record,
            folder,
            libvirt,
            agent: Mutex::new(agent),
            channel,
            events,
            qemu_user: capabilities.qemu_user,
            plan: Mutex::new(plan),
            sizing: tokio::sync::Mutex::new(Ledger::new(wanted.basis)),
            cpu_shares: wanted.cpu_shares,
            accelerator,
            kernel_release: Mutex::default(),
            network: Mutex::new(network),
            former: Mutex::default(),
            sandbox,
            power: watch::Sender::new(Power::Off(None)),
            reboots: watch::Sender::new(0),
            running: Mutex::default(),
            plugging: tokio::sync::Mutex::default(),
            suspended: AtomicBool::new(false),
            ended_by: Mutex::default(),
            watcher: Mutex::default(),
            containers: Mutex::default(),
            arriving: watch::Sender::new(if waits {
                Arriving::Waiting
            } else {
                Arriving::No
            }),
            offer: tokio::sync::Mutex::default(),
            leaving: AtomicBool::new(false),
            give_up: AtomicBool::new(false),
            post_copy: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            handed_over: tokio::sync::Mutex::default(),
            moved: AtomicBool::new(false),
            events_after: AtomicU64::new(0),
            deleted: AtomicBool::new(false),
            pod_key,
            inherited: AtomicBool::new(inherited),
        });
        let watcher = tokio::spawn(Self::follow(Arc::downgrade(&machine), changes));
        *lock(&machine.watcher) = Some(watcher);
        tokio::spawn(Self::bound_console(Arc::downgrade(&machine)));
        let begun = if waits {
            let plan = lock(&machine.plan).clone();
            let offer = machine.first_offer(plan);
            let published = machine.publish(&offer).await;
            *machine.offer.lock().await = Some(offer);
            published
        } else {
            machine.power_on().await
        };
        if let Err(error) = begun {
            machine.stop_following();
            return Err(error);
        }
        Ok(machine)
    }

    /// What the pod costs the host.
    ///
    /// # Errors
    /// `FailedPrecondition` for a pod without a cgroup of its own.
    pub fn stats(&self) -> Result<Stats> {
        let path = self.record.cgroups_path.as_ref().ok_or_else(|| {
            Error::FailedPrecondition("the pod has no cgroup (linux.cgroupsPath)".into())
        })?;
        Hierarchies::of_host()?.at(path)?.stats()
    }

    /// QEMU's pid while it is on.
    pub fn pid(&self) -> Option<u32> {
        match *self.power.borrow() {
            Power::On { pid, .. } => Some(pid),
            Power::Off(_) => None,
        }
    }

    /// What people are told of it.
    pub fn info(&self) -> MachineInfo {
        let reached = self.reached();
        MachineInfo {
            uuid: self.record.uuid.to_string(),
            domain: domain_name(self.record.uuid),
            libvirt_uri: self.config.libvirt_uri.clone(),
            accelerator: match self.accelerator {
                Accelerator::Kvm => "kvm".into(),
                Accelerator::Tcg => "tcg".into(),
            },
            vcpus: reached.vcpus,
            memory_bytes: reached.memory_mib() << 20,
            kernel_release: lock(&self.kernel_release).clone(),
        }
    }

    /// Opens its serial console.
    ///
    /// # Errors
    /// `FailedPrecondition` where it is powered off.
    pub fn console(&self) -> Result<OwnedFd> {
        if self.is_off() {
            return Err(Error::FailedPrecondition(
                "the machine is powered off, so its console is closed; start it first".into(),
            ));
        }
        let path = self.folder.console_socket();
        // QEMU serves one client and lets few wait: a connect that blocks would block the shim.
        let open = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            socket::connect(fd.as_raw_fd(), &UnixAddr::new(&path)?)?;
            Ok(fd)
        };
        match open() {
            Ok(fd) => Ok(fd),
            Err(Errno::EAGAIN) => Err(Error::FailedPrecondition(
                "other clients are attached to the machine's console: leave those first".into(),
            )),
            Err(errno) => Err(errno).context(|| format!("open the console {}", path.display())),
        }
    }

    /// The sandbox's id.
    pub fn sandbox_id(&self) -> &str {
        &self.record.sandbox_id
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> Option<&std::path::Path> {
        self.record.netns.as_deref()
    }

    /// Removes the machine with all that belongs to it.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn delete(&self) -> Result<()> {
        if let Err(error) = self.destroy(libc::SIGKILL).await {
            warn!("{}", error.chain());
        }
        self.stop_following();
        self.agent().close();
        let mut record = self.record.clone();
        record.moved = self.moved.load(Ordering::Relaxed);
        self.arriving.send_replace(Arriving::No);
        remove(&self.libvirt, &self.folder, &record).await?;
        self.deleted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Notes which of the host's emptyDirs are on its disk.
    ///
    /// # Errors
    /// The machine's folder cannot be written.
    pub fn note_volumes(&self, copies: &[Copy]) -> Result<()> {
        match self.pod_key {
            Some(key) => Kept::note(&self.folder.dir, key, volumes_on_disk(copies)),
            None => Ok(()),
        }
    }

    /// After its end: returns when its disk has gone with the pod or on to the pod's next
    /// machine, or a minute later.
    pub async fn settled(&self) {
        if let Some(key) = self.pod_key {
            self.folder.kept.settled(key).await;
        }
    }

    /// Whether [`Self::delete`] has done its work.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Relaxed)
    }
}

/// Of a machine whose shim died while it was being migrated away: waits a little for the
/// migration's end, then gives it up. Says whether the machine has left.
pub async fn left(libvirt: &Libvirt, record: &Record) -> bool {
    let uuid = record.uuid;
    let began = std::time::Instant::now();
    let mut asked = false;
    loop {
        match libvirt.state(uuid).await {
            Ok(Observed::Off(Ending::Migrated) | Observed::Absent) => return true,
            Ok(_) => {}
            Err(error) => {
                debug!("{}", Error::from(error).chain());
                return false;
            }
        }
        let under_way = libvirt.job(uuid).await.is_ok_and(|figures| figures.active);
        if !under_way || began.elapsed() > DEAD_SHIM_PATIENCE + STANDSTILL {
            return false;
        }
        if began.elapsed() > DEAD_SHIM_PATIENCE && !asked {
            asked = true;
            info!("machine {uuid}: its shim is dead; giving its migration up");
            if let Err(error) = libvirt.abort_job(uuid).await {
                debug!("{}", Error::from(error).chain());
            }
        }
        tokio::time::sleep(DEAD_SHIM_LOOKS).await;
    }
}

/// Removes what a machine left, known by its record or, without one, by its UUID alone.
/// Goes on over what fails; the folder goes last, and stays when something else does.
///
/// # Errors
/// The first that could not be removed.
pub async fn remove(libvirt: &Libvirt, folder: &Folder, record: &Record) -> Result<()> {
    let uuid = record.uuid;
    let mut first = None;
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            warn!("remove machine {uuid}: {}", error.chain());
            first.get_or_insert(error);
        }
    };
    if !record.moved {
        note(libvirt.destroy(uuid).await.map_err(Error::from));
        note(libvirt.undefine(uuid).await.map_err(Error::from));
    }
    for (_, tap) in &record.taps {
        note(network::remove_tap(tap).await);
    }
    if let Some(netns) = &record.netns {
        let interfaces = record.taps.iter().map(|(name, _)| name.clone()).collect();
        note(network::unwire(netns, interfaces).await);
    }
    if let Some(path) = &record.cgroups_path {
        match Hierarchies::of_host().and_then(|hierarchies| hierarchies.at(path)) {
            Ok(group) => note(group.remove().await),
            Err(error) => note(Err(error)),
        }
    }
    if let Some(error) = first {
        return Err(error);
    }
    if !record.moved
        && let Err(error) = folder.kept.keep(&folder.dir)
    {
        // The pod's next machine starts with empty volumes then; this one must go.
        warn!("{}", error.chain());
    }
    folder.kept.sweep();
    cache::sweep(&folder.images);
    folder.remove()
}
