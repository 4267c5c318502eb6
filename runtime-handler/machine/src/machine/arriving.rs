//! The target of a migration: offers what is ready, and takes the machine in.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::migration::Arrival;
use log::{debug, info, warn};

use super::images::connect;
use super::state::{Arriving, Input, Role};
use super::{Machine, lock};
use crate::container::Container;
use crate::domain::{AgentChannel, DomainPlan, ImageDisk};
use crate::events::{Change, Observed};
use crate::guest::Agent;
use crate::libvirt::{self, Of};
use crate::migrate::offer::{
    self, HANDOVER, Handover, OFFER, Offer, OfferedContainer, Position, RECORD, Record,
};
use crate::network::apply as network;
use crate::storage::apply as storage;
use crate::{cgroup, libvirt::LibvirtError};

/// Between two looks where libvirt tells nothing.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// An event may be lost with a libvirtd that died; the domain's state is not.
const LOOK_WITHOUT_EVENT: Duration = Duration::from_secs(2);
/// Where libvirt probes QEMU first, that takes long.
const QEMU_WITHIN: Duration = Duration::from_secs(120);
/// The source's hand-over comes within milliseconds, or its shim is dead.
const HANDOVER_WITHIN: Duration = Duration::from_secs(10);
/// In post-copy, memory comes without a pause until all is here, or its source or the network is
/// gone; QEMU would wait for ever. The source's libvirt has given up before that.
const MEMORY_WITHIN: Duration = Duration::from_secs(40);
/// How often that is looked at.
const LOOK_FOR_MEMORY_EVERY: Duration = Duration::from_secs(1);
/// The agent answers at once: it has been running all the time.
const AGENT_WITHIN: Duration = Duration::from_secs(20);

impl Machine {
    /// Whether it waits for its source.
    pub fn is_waiting(&self) -> bool {
        self.states.borrow().is_waiting()
    }

    /// Takes libvirt's word where it concerns the arrival; says whether it did.
    pub(super) fn takes_in(&self, change: Change) -> bool {
        if !self.is_waiting() {
            return false;
        }
        if self.change(Input::Arrival(change)) {
            debug!("machine {}: {:?}", self.record.uuid, self.state().role);
        }
        true
    }

    fn first_offer(&self, plan: DomainPlan) -> Offer {
        let (agent_socket, vsock_cid) = match &self.channel {
            AgentChannel::VirtioSerial { socket } => (socket.clone(), 0),
            AgentChannel::Vsock { cid } => (PathBuf::new(), *cid),
        };
        let disk = self.folder.disk();
        Offer {
            version: offer::VERSION,
            release: env!("CARGO_PKG_VERSION").into(),
            title: plan.title,
            kubernetes_namespace: self.kubernetes_namespace.clone(),
            sandbox_id: self.record.sandbox_id.clone(),
            containerd_namespace: self.record.containerd_namespace.clone(),
            accelerator: self.accelerator,
            partition: lock(&self.plan).partition.clone(),
            vcpus: self.info().vcpus,
            memory_mib: self.info().memory_bytes >> 20,
            kernel: plan.kernel,
            initramfs: plan.initramfs,
            modules: plan.modules.map(|disk| (disk.serial, disk.file)),
            disk_bytes: std::fs::metadata(&disk).map_or(0, |disk| disk.len()),
            free_bytes: nix::sys::statvfs::statvfs(&self.folder.dir)
                .map_or(0, |fs| fs.blocks_available() * fs.fragment_size()),
            disk,
            agent_socket,
            vsock_cid,
            console_socket: self.folder.console_socket(),
            console_log: self.folder.console(),
            taps: lock(&self.network)
                .interfaces
                .iter()
                .map(|interface| (interface.tap.clone(), interface.mtu))
                .collect(),
            migrate_socket: self.folder.run_dir.join("migrate.sock"),
            disks_socket: self.folder.run_dir.join("disks.sock"),
            containers: BTreeMap::new(),
        }
    }

    /// Begins to wait for its source.
    ///
    /// # Errors
    /// libvirt refused.
    pub(super) async fn offer_itself(&self) -> Result<()> {
        let plan = lock(&self.plan).clone();
        let offer = self.first_offer(plan);
        *lock(&self.offer) = Some(offer.clone());
        self.publish(&offer).await
    }

    /// Puts the offer where the source finds it.
    ///
    /// # Errors
    /// libvirt refused.
    async fn publish(&self, offer: &Offer) -> Result<()> {
        let element = offer::element("offer", offer)?;
        let uuid = self.record.uuid;
        Ok(self
            .libvirt
            .set_metadata(uuid, OFFER, Some(element), Of::Definition)
            .await?)
    }

    /// Adds a container that waits with the machine.
    ///
    /// # Errors
    /// Its image cannot be read; libvirt refused.
    pub async fn offer_container(&self, name: &str, image: PathBuf, started: bool) -> Result<()> {
        let digest = storage::digest(image.clone()).await?;
        let offered = OfferedContainer {
            image,
            digest,
            started,
        };
        let _turn = self.offering.turn().await;
        let changed = lock(&self.offer).clone().map(|mut offer| {
            offer.containers.insert(name.to_owned(), offered);
            offer
        });
        if let Some(offer) = changed {
            *lock(&self.offer) = Some(offer.clone());
            self.publish(&offer).await?;
        }
        Ok(())
    }

    /// Takes a container out of the offer.
    pub async fn withdraw_container(&self, name: &str) {
        let _turn = self.offering.turn().await;
        let Some(mut offer) = lock(&self.offer).clone() else {
            return;
        };
        if offer.containers.remove(name).is_none() {
            return;
        }
        *lock(&self.offer) = Some(offer.clone());
        if let Err(error) = self.publish(&offer).await {
            debug!("{}", error.chain());
        }
    }

    /// A container by its Kubernetes name, for who moves or arrives.
    pub fn name_container(&self, name: &str, container: &Arc<Container>) {
        lock(&self.containers).insert(name.to_owned(), Arc::downgrade(container));
    }

    /// The container that containerd knows by this process id.
    pub fn container_told_as(&self, pid: u32) -> Option<String> {
        self.named_containers()
            .into_iter()
            .find(|(_, container)| container.told_pid() == pid)
            .map(|(_, container)| container.id().to_owned())
    }

    /// The guest's id for one of the pod's containers.
    pub fn guest_id_of(&self, id: &str) -> Option<String> {
        self.named_containers()
            .into_iter()
            .find(|(_, container)| container.id() == id)
            .map(|(_, container)| container.guest_id())
    }

    /// The pod's containers that are there and have not ended.
    pub(super) fn living_containers(&self) -> Vec<(String, Arc<Container>)> {
        lock(&self.containers)
            .iter()
            .filter_map(|(name, container)| Some((name.clone(), Weak::upgrade(container)?)))
            .filter(|(_, container)| {
                self.is_waiting() || self.is_running(&ProcessId::init(container.id()))
            })
            .collect()
    }

    /// Waits for the source, and makes what came the pod.
    ///
    /// # Errors
    /// The source failed, or the machine could not be taken in: it does not run here.
    pub async fn receive(self: &Arc<Self>) -> Result<Arrival> {
        // Its end was told while nobody knew yet that it runs: it must not be told as running.
        let taken = match self.take_in().await {
            Ok(_) if self.is_off() => Err(Error::Unavailable(
                "the machine died as it arrived".into(),
                None,
            )),
            taken => taken,
        };
        if taken.is_err() {
            let uuid = self.record.uuid;
            self.change(Input::StopsWaiting);
            for (_, container) in self.named_containers() {
                container.stop_waiting();
            }
            for result in [
                self.libvirt.destroy(uuid).await,
                self.libvirt.undefine(uuid).await,
            ] {
                if let Err(error) = result {
                    warn!("{}", Error::from(error).chain());
                }
            }
        }
        taken
    }

    async fn take_in(self: &Arc<Self>) -> Result<Arrival> {
        let uuid = self.record.uuid;
        self.reaches(|arriving| *arriving != Arriving::Waiting)
            .await?;
        info!("machine {uuid} is on its way here");
        // The guest does not run before all its memory is here; this is long before.
        let began = Instant::now();
        let pid = self.place_and_wire().await?;
        debug!("machine {uuid}: wired after {:?}", began.elapsed());
        self.reaches(|arriving| *arriving == Arriving::Running)
            .await?;
        info!("machine {uuid} runs here");
        tokio::spawn(Self::bound_post_copy(Arc::downgrade(self), pid));
        *lock(&self.agent) = connect(&self.channel);
        // From here on it runs, and here only: nothing below may say otherwise.
        self.change(Input::Arrived { pid });
        self.started(ProcessId::init(self.sandbox_id()));
        let record = match self.record_of_source().await {
            Ok(record) => record,
            Err(error) => {
                warn!("machine {uuid}: {}", error.chain());
                return Ok(Arrival {
                    pod: Vec::new(),
                    processes: vec![(ProcessId::init(self.sandbox_id()), pid)],
                });
            }
        };
        let processes = self.go_on(pid, &record).await;
        Ok(Arrival {
            pod: record.pod,
            processes,
        })
    }

    /// Ends a machine the rest of whose memory does not come any more.
    async fn bound_post_copy(machine: Weak<Self>, pid: u32) {
        let (mut resident, mut since) = (None, Instant::now());
        while let Some(machine) = machine.upgrade() {
            let uuid = machine.record.uuid;
            if matches!(machine.libvirt.is_in_post_copy(uuid).await, Ok(false)) || machine.is_off()
            {
                return;
            }
            let now = resident_pages(pid);
            if now != resident {
                (resident, since) = (now, Instant::now());
            }
            if since.elapsed() > MEMORY_WITHIN {
                warn!("machine {uuid}: the rest of its memory does not come: it is lost");
                if let Err(error) = machine.libvirt.destroy(uuid).await {
                    warn!("{}", Error::from(error).chain());
                }
                return;
            }
            drop(machine);
            tokio::time::sleep(LOOK_FOR_MEMORY_EVERY).await;
        }
    }

    /// Waits for the state, or for the end of all hope.
    async fn reaches(&self, wanted: impl Fn(&Arriving) -> bool) -> Result<()> {
        let mut states = self.states.subscribe();
        loop {
            let look = states.wait_for(|state| match &state.role {
                Role::Arriving(arriving) => {
                    wanted(arriving) || matches!(arriving, Arriving::Failed(_))
                }
                _ => true,
            });
            let seen = tokio::time::timeout(LOOK_WITHOUT_EVENT, look).await;
            let seen = seen.map(|state| state.map(|state| state.role.clone()));
            match seen {
                Ok(Ok(Role::Arriving(Arriving::Failed(why)))) => return Err(failed(&why)),
                Ok(Ok(Role::Arriving(_))) => return Ok(()),
                Ok(Ok(_)) => {
                    return Err(Error::FailedPrecondition("the target was removed".into()));
                }
                Ok(Err(_)) => {
                    return Err(Error::Unavailable("the target is gone".into(), None));
                }
                Err(_) => self.look_up().await,
            }
        }
    }

    fn still_coming(&self) -> Result<()> {
        match &self.states.borrow().role {
            Role::Arriving(Arriving::Failed(why)) => Err(failed(why)),
            _ => Ok(()),
        }
    }

    /// What libvirt would have told, had it not been restarted.
    async fn look_up(&self) {
        let state = self.libvirt.state(self.record.uuid).await;
        let Role::Arriving(now) = self.state().role else {
            return;
        };
        let change = match (&now, state) {
            (Arriving::Waiting, Ok(Observed::Running | Observed::Paused)) => Change::Started,
            (Arriving::Prepared, Ok(Observed::Running)) => Change::Resumed,
            (Arriving::Prepared, Ok(Observed::Off(ending))) => Change::Stopped(ending),
            (Arriving::Waiting | Arriving::Prepared, Ok(Observed::Absent)) => Change::Undefined,
            _ => return,
        };
        self.takes_in(change);
    }

    async fn place_and_wire(&self) -> Result<u32> {
        let uuid = self.record.uuid;
        let began = Instant::now();
        let pid = loop {
            match libvirt::find_qemu(uuid, &self.folder.disk()) {
                Ok(pid) => break pid,
                // libvirt may call a domain active before QEMU is there.
                Err(error) if began.elapsed() > QEMU_WITHIN => {
                    return Err(error).context(|| format!("find QEMU of domain {uuid}"));
                }
                Err(_) => self.still_coming()?,
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let plan = lock(&self.network).clone();
        if let Some(netns) = &self.record.netns {
            for interface in &plan.interfaces {
                let localhost = plan.localhost.as_ref();
                let localhost = localhost.filter(|way| way.interface == interface.name);
                network::wire(netns, interface, localhost).await?;
            }
        }
        if let Some(path) = &self.record.cgroups_path {
            cgroup::account(path, self.cpu_shares, pid).await?;
        }
        Ok(pid)
    }

    async fn record_of_source(&self) -> Result<Record> {
        let uuid = self.record.uuid;
        let element = self.libvirt.metadata(uuid, RECORD.1, Of::Live).await?;
        let element = element.ok_or_else(|| {
            Error::FailedPrecondition("the machine came without its source's record".into())
        })?;
        offer::read("record", &element)
    }

    /// Makes the machine that runs the pod's: network, streams, processes.
    async fn go_on(self: &Arc<Self>, pid: u32, record: &Record) -> Vec<(ProcessId, u32)> {
        let agent = self.agent();
        *lock(&self.kernel_release) = record.kernel_release.clone();
        self.take_sizing(&record.sizing);
        self.plan_what_came(record);
        for (interface, mac) in lock(&self.network).interfaces.iter_mut().zip(&record.macs) {
            interface.mac.clone_from(mac);
        }
        *lock(&self.former) = record.network.clone().beyond(&lock(&self.network));
        let mut processes = vec![(ProcessId::init(self.sandbox_id()), pid)];
        let (handover, ready) = tokio::join!(self.handover(), agent.ready(AGENT_WITHIN));
        match ready {
            Ok(_) => debug!("machine {}: hand-over and guest are here", self.record.uuid),
            Err(error) => warn!("machine {}: {}", self.record.uuid, error.chain()),
        }
        let mut known = Vec::new();
        for (name, container) in self.named_containers() {
            let Some(came) = record.containers.get(&name) else {
                continue;
            };
            known.push(came.guest_id.clone());
            match container.arrive(came, &handover).await {
                Ok(()) => processes.push((ProcessId::init(container.id()), pid)),
                Err(error) => warn!("container {name}: {}", error.chain()),
            }
        }
        if let Err(error) = agent.adopt_unattended(&known).await {
            warn!("execs of {}: {}", self.record.uuid, error.chain());
        }
        self.events_after
            .store(record.events_after, Ordering::Relaxed);
        self.watch_guest();
        // Output and execs need not wait for it.
        tokio::spawn(Arc::clone(self).answer_here(agent));
        processes
    }

    /// Gives the guest this pod's own address, and later takes its source's.
    async fn answer_here(self: Arc<Self>, agent: Agent) {
        match agent.setup(self.network_request()).await {
            Ok(_) => debug!("machine {}: answers on its new address", self.record.uuid),
            Err(error) => warn!(
                "machine {}: its new address: {}",
                self.record.uuid,
                error.chain()
            ),
        }
        self.leave_former_later();
    }

    /// A later power-on here is with what came.
    fn plan_what_came(&self, record: &Record) {
        let files: BTreeMap<String, PathBuf> = self
            .named_containers()
            .into_iter()
            .filter_map(|(name, container)| {
                let came = record.containers.get(&name)?;
                Some((came.serial.clone(), container.image_file()))
            })
            .collect();
        {
            let mut plan = lock(&self.plan);
            plan.images = record
                .images
                .iter()
                .filter_map(|(serial, unit)| {
                    Some(ImageDisk {
                        file: files.get(serial)?.clone(),
                        serial: serial.clone(),
                        unit: *unit,
                    })
                })
                .collect();
            for (nic, mac) in plan.nics.iter_mut().zip(&record.macs) {
                nic.mac.clone_from(mac);
            }
        }
        if let Err(error) = self.save() {
            warn!("{}", error.chain());
        }
    }

    pub(super) fn named_containers(&self) -> Vec<(String, Arc<Container>)> {
        lock(&self.containers)
            .iter()
            .filter_map(|(name, container)| Some((name.clone(), Weak::upgrade(container)?)))
            .collect()
    }

    /// Where the source's streams ended. Without it, from what the guest still holds.
    async fn handover(&self) -> Vec<Position> {
        let uuid = self.record.uuid;
        let began = Instant::now();
        while began.elapsed() < HANDOVER_WITHIN {
            match self.libvirt.metadata(uuid, HANDOVER.1, Of::Live).await {
                Ok(Some(element)) => match offer::read::<Handover>("handover", &element) {
                    Ok(handover) => return handover.streams,
                    Err(error) => {
                        warn!("{}", error.chain());
                        return Vec::new();
                    }
                },
                Ok(None) => {}
                Err(LibvirtError::NoDomain(_)) => return Vec::new(),
                Err(error) => debug!("{}", Error::from(error).chain()),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        warn!("machine {uuid}: its source handed nothing over; output may be there twice");
        Vec::new()
    }
}

fn failed(why: &str) -> Error {
    Error::Unavailable(format!("the migration failed: {why}"), None)
}

/// Of a process; they grow with every page that comes.
fn resident_pages(pid: u32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    statm.split(' ').nth(1)?.parse().ok()
}
