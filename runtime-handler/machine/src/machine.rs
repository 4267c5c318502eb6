//! One pod's machine: made, powered on and off, watched, removed.
//!
//! ```text
//!   libvirt's events --> follow --+
//!   the pod's calls  --> effects --+--> change(Input) --> state (pure) --> who waits
//!                         boot, power, leaving, arriving
//! ```
//! What it is (power, role) is one value of [`state`], which [`Machine::change`] alone replaces.
//! `libvirt` owns the domain and is believed: its power changes only when libvirt's events say so.
//! Whatever ends the machine ends every process in it, with the same status. Changes that take long
//! wait for each other in [`lane`]s; what only looks waits for nothing.
//! Rooms: [`prepare`] (before there is one), [`boot`], [`power`], [`processes`],
//! [`images`] (and the agent), [`resize`], [`leaving`] and [`arriving`] (migration), [`former`] (its
//! source's addresses).

mod arriving;
mod boot;
mod former;
mod images;
mod lane;
mod leaving;
mod power;
mod prepare;
mod processes;
mod resize;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64};
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
use crate::domain::{Accelerator, AgentChannel, DomainPlan, domain_name};
use crate::events::{Ending, Observed};
use crate::guest::Agent;
use crate::kept::Kept;
use crate::libvirt::Libvirt;
use crate::migrate::offer::Offer;
use crate::network::apply as network;
use crate::network::plan::{Held, NetworkPlan};
use crate::record::{Folder, Record};
use crate::size::Ledger;
use crate::spec::SandboxSpec;
use crate::storage::apply::QemuUser;
use crate::storage::cache;
use crate::volumes::plan::{Copy, volumes_on_disk};
use crate::{Paths, cgroup, host};
use images::connect;
use lane::Lane;
use prepare::{Prepared, Site, prepare};
use state::{Input, Role, State};

/// A migration without its shim may take this long: `delete` has four seconds.
const DEAD_SHIM_PATIENCE: std::time::Duration = std::time::Duration::from_millis(2000);
/// What giving it up may take.
const STANDSTILL: std::time::Duration = std::time::Duration::from_millis(700);
/// libvirt tells only when asked.
const DEAD_SHIM_LOOKS: std::time::Duration = std::time::Duration::from_millis(50);
/// The guest finds the pod's disk by this.
const POD_DISK_SERIAL: &str = "dyad-pod";

/// A pod's machine.
pub struct Machine {
    config: Arc<MachineConfig>,
    /// The pod's; empty outside Kubernetes.
    kubernetes_namespace: String,
    paths: Paths,
    record: Record,
    folder: Folder,
    libvirt: Libvirt,
    channel: AgentChannel,
    events: EventSender,
    sandbox: SandboxSpec,
    qemu_user: Option<QemuUser>,
    accelerator: Accelerator,
    cpu_shares: Option<u64>,
    /// The pod, for what outlives this machine.
    pod_key: Option<Uuid>,
    /// What it is; only [`Self::change`] changes that.
    states: watch::Sender<State>,
    /// What its next definition is made from: its size and images change.
    plan: Mutex<DomainPlan>,
    /// Its containers' limits.
    ledger: Mutex<Ledger>,
    /// What of the pod's size the machine cannot give, for people.
    shortfalls: Mutex<Vec<String>>,
    network: Mutex<NetworkPlan>,
    /// What its guest has of its source's network, for a while.
    former: Mutex<Held>,
    /// What it has ready as a migration's target.
    offer: Mutex<Option<Offer>>,
    /// The pod's containers by Kubernetes' name: so a migration knows them.
    containers: Mutex<BTreeMap<String, Weak<Container>>>,
    /// Started processes that have not ended; a sender is dropped at its process's end.
    running: Mutex<HashMap<ProcessId, watch::Sender<()>>>,
    /// A link to each power-on's guest; closed when that ends.
    agent: Mutex<Agent>,
    /// The guest's `uname -r`, once it told.
    kernel_release: Mutex<String>,
    /// The guest's last event that was told.
    events_after: AtomicU64,
    /// Its disk still has what the containers of the pod's last sandbox wrote.
    inherited: AtomicBool,
    watcher: Mutex<Option<JoinHandle<()>>>,
    /// Changes of its size, of its images, of its offer, of who has its guest's streams.
    sizing: Lane,
    plugging: Lane,
    offering: Lane,
    handing_over: Lane,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one statement; none is held across an await.
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
        if let Some(source) = migration::source_of(&spec.pod)? {
            // The machine keeps its name wherever it goes; the folder is the pod's.
            record.uuid = source;
            if libvirt.state(record.uuid).await? != Observed::Absent {
                return Err(Error::FailedPrecondition(format!(
                    "annotation {}: machine {} is known to this node's libvirt already; a machine \
                     migrates to another node",
                    annotation::MIGRATION_SOURCE,
                    record.uuid
                )));
            }
        }
        let (undo, folder_to_undo) = (record.clone(), folder.clone());
        let site = Site {
            config,
            paths,
            libvirt: libvirt.clone(),
            sandbox,
            record,
            folder,
        };
        let made = Self::make(site, events, spec).await;
        if let Err(error) = &made {
            debug!("machine {}: undoing: {}", undo.uuid, error.chain());
            // What was written last knows most.
            let record = folder_to_undo.load().ok().flatten().unwrap_or(undo);
            if let Err(error) = remove(&libvirt, &folder_to_undo, &record).await {
                warn!("undo machine {}: {}", record.uuid, error.chain());
            }
        }
        made
    }

    /// Prepares, defines and begins; leaves it to the caller to undo.
    async fn make(site: Site, events: EventSender, spec: &ContainerSpec) -> Result<Arc<Self>> {
        let waits = migration::source_of(&spec.pod)?.is_some();
        let prepared = prepare(&site, spec).await?;
        let uuid = site.record.uuid;
        site.libvirt.define(uuid, prepared.plan.to_xml()).await?;
        let changes = site.libvirt.watch(uuid).await?;
        if let Some(path) = &site.sandbox.cgroups_path
            && prepared.plan.partition.is_none()
        {
            cgroup::create(path, prepared.wanted.cpu_shares).await?;
        }
        info!(
            "machine {uuid} for {}: {} vCPUs, {} MiB, {:?}",
            prepared.plan.title,
            prepared.wanted.size.vcpus,
            prepared.wanted.size.memory_mib,
            prepared.plan.accelerator
        );
        let machine = Arc::new(Self::new(site, prepared, events, waits));
        let watcher = tokio::spawn(Self::follow(Arc::downgrade(&machine), changes));
        *lock(&machine.watcher) = Some(watcher);
        tokio::spawn(Self::bound_console(Arc::downgrade(&machine)));
        let begun = match waits {
            true => machine.offer_itself().await,
            false => machine.power_on().await,
        };
        if let Err(error) = begun {
            machine.stop_following();
            return Err(error);
        }
        Ok(machine)
    }

    /// One that is defined and off.
    fn new(site: Site, prepared: Prepared, events: EventSender, waits: bool) -> Self {
        let agent = connect(&prepared.plan.channel);
        if waits {
            // Nobody speaks to the guest before it runs here.
            agent.close();
        }
        let ledger = Ledger::new(prepared.wanted.basis);
        Self {
            config: site.config,
            paths: site.paths,
            record: prepared.record,
            folder: site.folder,
            libvirt: site.libvirt,
            channel: prepared.plan.channel.clone(),
            events,
            sandbox: site.sandbox,
            qemu_user: prepared.qemu_user,
            accelerator: prepared.plan.accelerator,
            cpu_shares: prepared.wanted.cpu_shares,
            pod_key: prepared.pod_key,
            kubernetes_namespace: prepared.kubernetes_namespace,
            states: watch::Sender::new(State::new(waits)),
            shortfalls: Mutex::new(ledger.shortfalls(&prepared.wanted.size)),
            plan: Mutex::new(prepared.plan),
            ledger: Mutex::new(ledger),
            network: Mutex::new(prepared.network),
            former: Mutex::default(),
            offer: Mutex::default(),
            containers: Mutex::default(),
            running: Mutex::default(),
            agent: Mutex::new(agent),
            kernel_release: Mutex::default(),
            events_after: AtomicU64::new(0),
            inherited: AtomicBool::new(prepared.inherited),
            watcher: Mutex::default(),
            sizing: Lane::default(),
            plugging: Lane::default(),
            offering: Lane::default(),
            handing_over: Lane::default(),
        }
    }

    /// What it is now.
    fn state(&self) -> State {
        self.states.borrow().clone()
    }

    /// The one place where it becomes something else; says whether it did.
    fn change(&self, input: Input) -> bool {
        self.states
            .send_if_modified(|state| match state.after(input) {
                Some(next) => {
                    *state = next;
                    true
                }
                None => false,
            })
    }

    /// What the pod costs the host.
    ///
    /// # Errors
    /// `FailedPrecondition` for a pod without a cgroup of its own.
    pub fn stats(&self) -> Result<Stats> {
        let path = self.record.cgroups_path.as_ref().ok_or_else(|| {
            Error::FailedPrecondition("the pod has no cgroup (linux.cgroupsPath)".into())
        })?;
        cgroup::stats(path, self.pid())
    }

    /// QEMU's pid while it is on.
    pub fn pid(&self) -> Option<u32> {
        self.states.borrow().pid()
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
            notes: lock(&self.shortfalls).clone(),
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
        record.moved = self.state().has_moved();
        self.change(Input::StopsWaiting);
        remove(&self.libvirt, &self.folder, &record).await?;
        self.change(Input::Deleted);
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
        self.states.borrow().role == Role::Deleted
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
    note(host::remove_profile(uuid));
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
