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

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use dyad_agent_api::link::host::Client;
use dyad_agent_api::proto::agent::{self as proto, SetupRequest};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::cgroup::Hierarchies;
use dyad_runtime_handler::config::{Channel, MachineConfig};
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::handler::{
    Event, EventSender, Exit, MachineEvent, MachineInfo, ProcessId,
};
use dyad_runtime_handler::spec::ContainerSpec;
use dyad_runtime_handler::stats::Stats;
use log::{debug, info, warn};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::domain::{
    Accelerator, AgentChannel, DomainPlan, ImageDisk, Nic, PodDisk, Size, domain_name,
};
use crate::events::{Change, Ending, Observed};
use crate::guest::{Agent, GuestEvent};
use crate::libvirt::{self, Libvirt};
use crate::network::plan::NetworkPlan;
use crate::network::{apply as network, plan as network_plan};
use crate::record::{Folder, Record};
use crate::spec::SandboxSpec;
use crate::storage::apply::{self as storage, Image, QemuUser};
use crate::{Paths, accelerator, cgroup, host, size, slots};

/// The guest finds the pod's disk by this.
const POD_DISK_SERIAL: &str = "dyad-pod";
/// As much fresh randomness as the kernel's generator takes in.
const ENTROPY_BYTES: usize = 64;
/// `/dev/shm` as Kubernetes gives it.
const SHM_BYTES: u64 = 64 << 20;
/// A guest that was told to power off gets this long beyond the grace of its processes.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(10);
/// libvirt's event follows QEMU's end at once; its destroy polls every 200 ms.
const STOPPED_PATIENCE: Duration = Duration::from_secs(10);
/// QEMU takes milliseconds; on a busy host more. Then libvirt kills it.
const TERM_PATIENCE: Duration = Duration::from_secs(1);
/// What a boot failure quotes of the console.
const CONSOLE_LINES: usize = 15;
/// A unix socket's address holds no more.
const SOCKET_PATH_MAX: usize = 107;

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
    size: Size,
    cpu_shares: Option<u64>,
    accelerator: Accelerator,
    /// The guest's `uname -r`, once it told.
    kernel_release: Mutex<String>,
    network: NetworkPlan,
    sandbox: SandboxSpec,
    power: watch::Sender<Power>,
    /// Started processes that have not ended.
    /// A sender is dropped at its process's end.
    running: Mutex<HashMap<ProcessId, watch::Sender<()>>>,
    /// Images that are plugged in, by key; a unit is not used again.
    images: tokio::sync::Mutex<HashMap<String, u32>>,
    /// The signal that we ended it with.
    ended_by: Mutex<Option<i32>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    deleted: AtomicBool,
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
        let record = Record::new(&spec.containerd_namespace, &spec.pod.sandbox_id);
        let folder = Folder::new(&paths.state_dir, &paths.cache_dir, record.uuid);
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
        let wanted = size::plan(
            &config,
            &sandbox.annotations,
            &spec.pod.annotations,
            host_size()?,
        )?;
        check_readable("kernel", &config.kernel)?;
        check_readable("initramfs", &config.initramfs)?;
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
                network_plan::plan(uuid, &found.links, &found.addresses, &found.routes)
                    .map_err(|error| Error::FailedPrecondition(error.to_string()))?
            }
            None => NetworkPlan::default(),
        };

        record.netns = sandbox.netns.clone();
        record.cgroups_path = sandbox.cgroups_path.clone();
        record.taps = network
            .interfaces
            .iter()
            .map(|interface| (interface.name.clone(), interface.tap.clone()))
            .collect();
        make_folders(&paths, &folder, capabilities.qemu_user)?;
        storage::check_on_disk(&folder.dir)?;
        folder.save(&record)?;
        storage::pod_disk(folder.disk(), wanted.disk_gib, capabilities.qemu_user).await?;

        let channel = choose_channel(config.channel, &folder, uuid)?;
        let plan = DomainPlan {
            uuid,
            title: title(spec),
            sandbox_id: record.sandbox_id.clone(),
            containerd_namespace: record.containerd_namespace.clone(),
            accelerator,
            size: wanted.size,
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
        let machine = Arc::new(Self {
            config,
            paths,
            record,
            folder,
            libvirt,
            agent: Mutex::new(connect(&channel)),
            channel,
            events,
            qemu_user: capabilities.qemu_user,
            size: wanted.size,
            cpu_shares: wanted.cpu_shares,
            accelerator,
            kernel_release: Mutex::default(),
            network,
            sandbox,
            power: watch::Sender::new(Power::Off(None)),
            running: Mutex::default(),
            images: tokio::sync::Mutex::default(),
            ended_by: Mutex::default(),
            watcher: Mutex::default(),
            deleted: AtomicBool::new(false),
        });
        let watcher = tokio::spawn(Self::follow(Arc::downgrade(&machine), changes));
        *lock(&machine.watcher) = Some(watcher);
        if let Err(error) = machine.power_on().await {
            machine.stop_following();
            return Err(error);
        }
        Ok(machine)
    }

    /// Runs the defined domain: paused first, so that QEMU is accounted to the pod and its
    /// taps are wired before the guest executes anything.
    ///
    /// # Errors
    /// libvirt, the cgroup or the network refused; then it is off.
    pub async fn power_on(self: &Arc<Self>) -> Result<()> {
        if matches!(*self.power.borrow(), Power::On { .. }) {
            return Ok(());
        }
        let slots_dir = self.paths.cache_dir.join("boot");
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let slot = slots::take(slots_dir, cpus).await?;
        *lock(&self.ended_by) = None;
        *lock(&self.agent) = connect(&self.channel);
        let started = Instant::now();
        let on = self.power_on_here().await;
        if let Err(error) = on {
            if let Err(error) = self.libvirt.destroy(self.record.uuid).await {
                warn!("{}", Error::from(error).chain());
            }
            return Err(error);
        }
        debug!(
            "machine {} runs after {:?}",
            self.record.uuid,
            started.elapsed()
        );
        let machine = Arc::clone(self);
        tokio::spawn(async move {
            machine.boot().await;
            drop(slot);
        });
        Ok(())
    }

    async fn power_on_here(&self) -> Result<()> {
        let uuid = self.record.uuid;
        self.libvirt.create_paused(uuid).await?;
        let pid = libvirt::find_qemu(uuid).context(|| format!("find QEMU of domain {uuid}"))?;
        if let Some(path) = &self.record.cgroups_path {
            // A machine that was off left it empty, and who tidies up may remove such.
            cgroup::create(path, self.cpu_shares).await?;
            cgroup::place(&Hierarchies::of_host()?.at(path)?, pid)?;
        }
        if let Some(netns) = &self.record.netns {
            for interface in &self.network.interfaces {
                network::wire(netns, &interface.tap, &interface.name, interface.mtu).await?;
            }
        }
        self.libvirt.resume(uuid).await?;
        self.power.send_replace(Power::On {
            pid,
            boot: Boot::Booting,
        });
        Ok(())
    }

    /// Waits for the agent and makes the guest the pod.
    async fn boot(self: &Arc<Self>) {
        let bound = self.config.boot_timeout();
        let agent = self.agent();
        let booted = tokio::time::timeout(bound, async {
            agent.ready(bound).await?;
            agent.setup(self.setup_request()).await
        });
        let mut power = self.power.subscribe();
        let result = tokio::select! {
            booted = booted => match booted {
                Ok(Ok(setup)) => {
                    debug!("guest of {}: kernel {}", self.record.uuid, setup.kernel_release);
                    Ok(())
                }
                Ok(Err(error)) => Err(error.chain()),
                Err(_) => Err(format!("its agent did not answer within {} s", bound.as_secs())),
            },
            _ = power.wait_for(|power| matches!(power, Power::Off(_))) => {
                Err("it powered off while booting".into())
            }
        };
        let boot = match result {
            Ok(()) => Boot::Ready,
            Err(reason) => {
                let console = self.folder.console_tail(CONSOLE_LINES);
                Boot::Failed(format!(
                    "the machine did not boot: {reason}; its console ends with:\n{console}"
                ))
            }
        };
        let ready = boot == Boot::Ready;
        self.power.send_if_modified(|power| match power {
            Power::On { boot: current, .. } => {
                *current = boot.clone();
                true
            }
            // It ended meanwhile; whoever waits is told why it did not come up.
            Power::Off(_) => false,
        });
        if ready {
            let machine = Arc::downgrade(self);
            tokio::spawn(async move {
                let mut after = 0;
                while let Ok((last, events)) = agent.events(after).await {
                    let Some(machine) = machine.upgrade() else {
                        return;
                    };
                    after = last;
                    for GuestEvent::OutOfMemory { container } in events {
                        // The driver ends with the shim.
                        let _ = machine.events.send(Event::OutOfMemory { container });
                    }
                }
            });
        }
    }

    /// Waits until the guest serves.
    ///
    /// # Errors
    /// It did not come up, or is off; the text ends with what its console said last.
    pub async fn ready(&self) -> Result<u32> {
        let mut power = self.power.subscribe();
        let settled = power
            .wait_for(|power| {
                !matches!(
                    power,
                    Power::On {
                        boot: Boot::Booting,
                        ..
                    }
                )
            })
            .await
            .map_err(|_| Error::Unavailable("the machine is being removed".into(), None))?
            .clone();
        match settled {
            Power::On {
                pid,
                boot: Boot::Ready,
            } => Ok(pid),
            Power::On {
                boot: Boot::Failed(reason),
                ..
            } => Err(Error::Unavailable(reason, None)),
            Power::On { .. } | Power::Off(None) => Err(Error::FailedPrecondition(
                "the machine is powered off; start it first".into(),
            )),
            Power::Off(Some(ending)) => Err(Error::FailedPrecondition(format!(
                "the machine is powered off ({ending:?}); its console ends with:\n{}",
                self.folder.console_tail(CONSOLE_LINES)
            ))),
        }
    }

    fn setup_request(&self) -> SetupRequest {
        let mut entropy = vec![0; ENTROPY_BYTES];
        if let Err(error) = fill_random(&mut entropy) {
            warn!("read the host's randomness: {error}");
            entropy.clear();
        }
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        SetupRequest {
            hostname: self.sandbox.hostname.clone(),
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
            entropy,
            pod_disk_serial: POD_DISK_SERIAL.into(),
            interfaces: self
                .network
                .interfaces
                .iter()
                .map(|interface| proto::Interface {
                    name: interface.name.clone(),
                    mac: interface.mac.clone(),
                    mtu: interface.mtu,
                    addresses: interface.addresses.clone(),
                    ..Default::default()
                })
                .collect(),
            routes: self
                .network
                .routes
                .iter()
                .map(|route| proto::Route {
                    destination: route.destination.clone(),
                    gateway: route.gateway.clone(),
                    interface: route.interface.clone(),
                    source: route.source.clone(),
                    metric: route.metric,
                    scope: u32::from(route.scope),
                    family: u32::from(route.family),
                    ..Default::default()
                })
                .collect(),
            sysctls: self.sandbox.sysctls.clone(),
            shm_size: SHM_BYTES,
            ..Default::default()
        }
    }

    /// Follows libvirt's word until the machine is dropped.
    async fn follow(machine: std::sync::Weak<Self>, mut changes: mpsc::UnboundedReceiver<Change>) {
        // Powering on paused and resuming are told too, and are nobody's pause.
        let mut starting = false;
        while let Some(change) = changes.recv().await {
            let Some(machine) = machine.upgrade() else {
                return;
            };
            match change {
                Change::Started => starting = true,
                Change::Resumed if starting => starting = false,
                Change::Suspended if starting => {}
                Change::Suspended => machine.tell(MachineEvent::Suspended),
                Change::Resumed => machine.tell(MachineEvent::Resumed),
                Change::Rebooted => machine.rebooted(),
                Change::Panicked => machine.tell(MachineEvent::Crashed),
                Change::Stopped(ending) => {
                    starting = false;
                    machine.ended(ending);
                }
                Change::Undefined => {}
            }
        }
    }

    fn stop_following(&self) {
        if let Some(watcher) = lock(&self.watcher).take() {
            watcher.abort();
        }
        self.libvirt.unwatch();
    }

    fn tell(&self, event: MachineEvent) {
        // The driver ends with the shim.
        let _ = self.events.send(Event::Machine(event));
    }

    /// The guest's processes are gone; it comes up anew.
    fn rebooted(self: &Arc<Self>) {
        let was_on = self.power.send_if_modified(|power| match power {
            Power::On { boot, .. } => {
                *boot = Boot::Booting;
                true
            }
            Power::Off(_) => false,
        });
        if was_on {
            info!("machine {} rebooted", self.record.uuid);
            self.end_all(128 + libc::SIGKILL as u32, |process| {
                process.container != self.record.sandbox_id
            });
            self.tell(MachineEvent::Rebooted);
            let machine = Arc::clone(self);
            tokio::spawn(async move { machine.boot().await });
        }
    }

    fn ended(&self, ending: Ending) {
        let status = match (*lock(&self.ended_by), ending) {
            (Some(signal), _) => 128 + signal.unsigned_abs(),
            _ => ending.status(),
        };
        info!(
            "machine {} ended: {ending:?}, status {status}",
            self.record.uuid
        );
        // First the state: who is told of an exit may ask for it.
        self.power.send_replace(Power::Off(Some(ending)));
        // Nobody writes its processes' output any more: let go of their FIFOs.
        self.agent().close();
        self.end_all(status, |process| {
            process.container != self.record.sandbox_id
        });
        self.end_all(status, |_| true);
    }

    fn end_all(&self, status: u32, which: impl Fn(&ProcessId) -> bool) {
        let ended: Vec<ProcessId> = lock(&self.running)
            .keys()
            .filter(|process| which(process))
            .cloned()
            .collect();
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        for process in ended {
            self.finished(&process, exit);
        }
    }

    /// A process runs; from now on its end is told exactly once.
    pub fn started(&self, process: ProcessId) {
        lock(&self.running).insert(process, watch::Sender::new(()));
    }

    /// A process that was to run does not; nobody is told.
    pub fn withdrawn(&self, process: &ProcessId) {
        lock(&self.running).remove(process);
    }

    /// Waits for the end of a started process, at most `bound`; says whether it ended.
    pub async fn await_end(&self, process: &ProcessId, bound: Duration) -> bool {
        let Some(mut alive) = lock(&self.running)
            .get(process)
            .map(watch::Sender::subscribe)
        else {
            return true;
        };
        // Nothing is ever sent: the only change is the sender's end.
        tokio::time::timeout(bound, async { while alive.changed().await.is_ok() {} })
            .await
            .is_ok()
    }

    /// A process that [`Self::started`] ended.
    pub fn finished(&self, process: &ProcessId, exit: Exit) {
        if lock(&self.running).remove(process).is_some() {
            // The driver ends with the shim.
            let _ = self.events.send(Event::Exited {
                process: process.clone(),
                exit,
            });
        }
    }

    /// Whether the process runs.
    pub fn is_running(&self, process: &ProcessId) -> bool {
        lock(&self.running).contains_key(process)
    }

    /// Shuts the guest down: its agent ends all processes and powers off; then the power
    /// button, then the plug. Returns when it is off.
    ///
    /// # Errors
    /// libvirt could not even pull the plug.
    pub async fn shut_down(&self, grace: Duration) -> Result<()> {
        if self.is_off() {
            return Ok(());
        }
        let agent = self.agent();
        let asked =
            tokio::time::timeout(grace.min(POWER_OFF_PATIENCE), agent.shutdown(false, grace)).await;
        let asked = match asked {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                debug!("ask the guest to power off: {}", error.chain());
                false
            }
            Err(_) => false,
        };
        if !asked && let Err(error) = self.libvirt.press_power_button(self.record.uuid).await {
            debug!("{}", Error::from(error).chain());
        }
        let extra = if asked {
            POWER_OFF_PATIENCE
        } else {
            Duration::ZERO
        };
        if self.await_off(grace + extra).await {
            return Ok(());
        }
        self.destroy(libc::SIGKILL).await
    }

    /// Pulls the plug; `signal` is what the exit status will say. Returns when it is off.
    ///
    /// # Errors
    /// libvirt could not end QEMU.
    pub async fn destroy(&self, signal: i32) -> Result<()> {
        if self.is_off() {
            return Ok(());
        }
        lock(&self.ended_by).get_or_insert(signal);
        // libvirt's own way looks five times a second whether QEMU is gone; QEMU ends within
        // milliseconds of SIGTERM, and libvirt sees that at once.
        let told = self
            .pid()
            .is_some_and(|pid| libvirt::terminate_qemu(pid, self.record.uuid));
        if told && self.await_off(TERM_PATIENCE).await {
            return Ok(());
        }
        self.libvirt.destroy(self.record.uuid).await?;
        if !self.await_off(STOPPED_PATIENCE).await {
            // The event may be lost with a libvirtd that died; its state is not.
            if let Observed::Off(ending) = self.libvirt.state(self.record.uuid).await? {
                self.ended(ending);
            }
        }
        Ok(())
    }

    /// Whether it is powered off.
    pub fn is_off(&self) -> bool {
        matches!(*self.power.borrow(), Power::Off(_))
    }

    async fn await_off(&self, bound: Duration) -> bool {
        let mut power = self.power.subscribe();
        let off = power.wait_for(|power| matches!(power, Power::Off(_)));
        tokio::time::timeout(bound, off).await.is_ok()
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn suspend(&self) -> Result<()> {
        Ok(self.libvirt.suspend(self.record.uuid).await?)
    }

    /// Runs the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn resume(&self) -> Result<()> {
        Ok(self.libvirt.resume(self.record.uuid).await?)
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

    /// Plugs the image in, unless it is; gives the serial that the guest finds it by. It
    /// stays until the machine ends: a container that is started again finds it warm.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn plug(&self, image: &Image) -> Result<String> {
        let mut images = self.images.lock().await;
        if !images.contains_key(&image.key) {
            let unit = u32::try_from(images.len()).unwrap_or(u32::MAX);
            let disk = ImageDisk {
                file: image.file.clone(),
                serial: image.key.clone(),
                unit,
            };
            self.libvirt.attach(self.record.uuid, disk.to_xml()).await?;
            images.insert(image.key.clone(), unit);
        }
        Ok(image.key.clone())
    }

    /// The guest's agent.
    pub fn agent(&self) -> Agent {
        lock(&self.agent).clone()
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
        MachineInfo {
            uuid: self.record.uuid.to_string(),
            domain: domain_name(self.record.uuid),
            libvirt_uri: self.config.libvirt_uri.clone(),
            accelerator: match self.accelerator {
                Accelerator::Kvm => "kvm".into(),
                Accelerator::Tcg => "tcg".into(),
            },
            vcpus: self.size.vcpus,
            memory_bytes: self.size.memory_mib << 20,
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

    /// Where converted images are kept, and where those of one pod only.
    pub fn image_dirs(&self) -> (PathBuf, PathBuf) {
        (
            self.paths.cache_dir.join("images"),
            self.folder.dir.join("images"),
        )
    }

    /// The user that must be able to read images.
    pub fn qemu_user(&self) -> Option<QemuUser> {
        self.qemu_user
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
        remove(&self.libvirt, &self.folder, &self.record).await?;
        self.deleted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether [`Self::delete`] has done its work.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Relaxed)
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
    note(libvirt.destroy(uuid).await.map_err(Error::from));
    note(libvirt.undefine(uuid).await.map_err(Error::from));
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
    match first {
        Some(error) => Err(error),
        None => folder.remove(),
    }
}

fn connect(channel: &AgentChannel) -> Agent {
    Agent::new(match channel {
        AgentChannel::VirtioSerial { socket } => {
            Client::new(dyad_agent_api::link::host::unix(socket.clone()))
        }
        AgentChannel::Vsock { cid } => Client::new(dyad_agent_api::link::host::vsock(*cid)),
    })
}

fn title(spec: &ContainerSpec) -> String {
    if spec.pod.name.is_empty() {
        return spec.pod.sandbox_id.clone();
    }
    format!("{}/{}", spec.pod.namespace, spec.pod.name)
}

fn host_size() -> Result<size::Host> {
    let info = nix::sys::sysinfo::sysinfo().context(|| "ask for the host's memory".into())?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(size::Host {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_mib: info.ram_total() >> 20,
    })
}

fn check_readable(key: &str, path: &std::path::Path) -> Result<()> {
    std::fs::File::open(path).map(drop).map_err(|error| {
        Error::FailedPrecondition(format!(
            "guest {key} {}: {error}; build it with hack/guest, or set `{key}` in section [machine] of the configuration",
            path.display()
        ))
    })
}

fn check_socket_path(socket: &std::path::Path) -> Result<()> {
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        return Err(Error::FailedPrecondition(format!(
            "{} has {length} characters, a socket's path at most {SOCKET_PATH_MAX}; set a shorter `state_dir`",
            socket.display()
        )));
    }
    Ok(())
}

/// QEMU's user walks through all of them and writes sockets into the last.
fn make_folders(paths: &Paths, folder: &Folder, user: Option<QemuUser>) -> Result<()> {
    for root in [&paths.state_dir, &paths.cache_dir] {
        if !root.exists() {
            storage::walkable_dir(root)?;
        }
        storage::walkable_dir(&root.join("machines"))?;
    }
    storage::walkable_dir(&folder.dir)?;
    storage::walkable_dir(&folder.run_dir)?;
    if let Some(user) = user {
        std::os::unix::fs::chown(&folder.run_dir, Some(user.uid), Some(user.gid))
            .context(|| format!("set the owner of {}", folder.run_dir.display()))?;
    }
    Ok(())
}

/// vsock where it is asked for, or the host's kernel has it for guests.
fn choose_channel(choice: Channel, folder: &Folder, uuid: uuid::Uuid) -> Result<AgentChannel> {
    let vhost = std::path::Path::new("/dev/vhost-vsock");
    let vsock = match choice {
        Channel::VirtioSerial => false,
        Channel::Vsock if !vhost.exists() => {
            return Err(Error::FailedPrecondition(
                "channel = \"vsock\", but this host has no /dev/vhost-vsock; load the module vhost_vsock, or set it to \"auto\"".into(),
            ));
        }
        Channel::Vsock => true,
        Channel::Auto => vhost.exists(),
    };
    if !vsock {
        return Ok(AgentChannel::VirtioSerial {
            socket: folder.agent_socket(),
        });
    }
    // From the UUID, away from the low ids that people give by hand.
    let (high, _) = uuid.as_u64_pair();
    Ok(AgentChannel::Vsock {
        cid: 0x1000_0000 | (high as u32 & 0x3fff_ffff),
    })
}

fn fill_random(buffer: &mut [u8]) -> std::io::Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(buffer)
}
