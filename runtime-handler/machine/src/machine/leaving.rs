//! The source of a migration: looks, moves, finds out what came of it, hands over.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::migration::{
    Hurry, MigrationParameters, MigrationProgress, Sent, Stage, TimeoutAction,
};
use log::{debug, info, warn};
use tokio::sync::watch;

use super::state::{Input, Link, Role};
use super::{Machine, POD_DISK_SERIAL, lock};
use crate::events::{Ending, Observed};
use crate::libvirt::{self, Job, Libvirt, LibvirtError, Of};
use crate::migrate::offer::{
    self, HANDOVER, Handover, OFFER, Offer, RECORD, Record, Traveller, Wanted,
};
use crate::migrate::whereabouts::{self, Reason, SETTLE_WITHIN, STANDSTILL, Sight, Verdict};
use crate::migrate::xml::{self, Places};
use crate::migrate::{Streams, check_destination, emulation_blocker, older_qemu, streams};
use crate::network::apply as network;
use crate::network::plan::Held;
use crate::storage::apply as storage;

/// libvirt tells figures only when asked.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// libvirt needs half a minute to notice that a network is gone.
const LOOK_AT_NETWORK_EVERY: Duration = Duration::from_secs(1);
/// A job that was asked for begins within this, or never.
const CANCEL_WITHIN: Duration = Duration::from_secs(5);
/// The last output to its FIFOs.
const HANDOVER_WITHIN: Duration = Duration::from_secs(2);

/// Where the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    Here,
    There,
    Nowhere(Reason),
}

/// All that a migration needs to begin.
struct Ready {
    destination: Libvirt,
    offer: Offer,
    xml: String,
    found: xml::Found,
    streams: Streams,
    disk_used_bytes: u64,
}

impl Machine {
    /// Looks for all that forbids the migration.
    ///
    /// # Errors
    /// The blocker, by name.
    pub async fn check_migration(&self, parameters: &MigrationParameters) -> Result<()> {
        self.get_ready(parameters).await.map(drop)
    }

    async fn get_ready(&self, parameters: &MigrationParameters) -> Result<Ready> {
        let uuid = self.record.uuid;
        let refuse = |text: String| Error::FailedPrecondition(format!("cannot migrate: {text}"));
        check_destination(&parameters.destination)?;
        if parameters.destination == self.config.libvirt_uri {
            return Err(refuse(format!(
                "destination {:?} is this node's own libvirt",
                parameters.destination
            )));
        }
        let xml = self.libvirt.migratable_xml(uuid).await?;
        let found = xml::find(&xml)?;
        if let Some(blocker) = found.blockers.first() {
            return Err(refuse(format!("the machine has {blocker}")));
        }
        let containers = self.named_containers();
        let blockers = containers.iter().map(|(_, container)| container);
        if let Some(blocker) = blockers.filter_map(|its| its.migration_blocker()).next() {
            return Err(refuse(blocker));
        }
        let here = self.libvirt.versions().await?;
        let plugged_mib = lock(&self.plan).reached.plugged_mib;
        if let Some(blocker) = emulation_blocker(self.accelerator, &here.qemu, plugged_mib) {
            return Err(refuse(blocker));
        }
        let destination = Libvirt::remote(&parameters.destination);
        let there = destination.state(uuid).await.map_err(|error| {
            let why = Error::from(error).chain();
            refuse(format!("destination {:?}: {why}", parameters.destination))
        })?;
        match there {
            Observed::Absent => {
                return Err(refuse(format!(
                    "no target waits at {:?}: make the pod on that node with the annotation \
                     dyad.dev/migration-source: {uuid}",
                    parameters.destination
                )));
            }
            Observed::Running | Observed::Paused => {
                return Err(refuse(format!(
                    "machine {uuid} is active at {:?} already",
                    parameters.destination
                )));
            }
            Observed::Off(_) => {}
        }
        let element = destination.metadata(uuid, OFFER.1, Of::Definition).await?;
        let element = element.ok_or_else(|| {
            refuse(format!(
                "domain {uuid} at {:?} waits for nobody: it is no migration target of dyad",
                parameters.destination
            ))
        })?;
        let offer: Offer = offer::read("offer", &element).map_err(|error| refuse(error.chain()))?;
        let streams = streams(parameters, &offer)?;
        let wanted = self.wanted().await?;
        offer::fits(&wanted, &offer)?;
        let there = destination.versions().await?;
        if let Some(blocker) = older_qemu(&here.qemu, &there.qemu) {
            return Err(refuse(blocker));
        }
        Ok(Ready {
            destination,
            offer,
            xml,
            found,
            streams,
            disk_used_bytes: wanted.disk_used_bytes,
        })
    }

    async fn wanted(&self) -> Result<Wanted> {
        let mut containers = BTreeMap::new();
        for (name, container) in self.living_containers() {
            let digest = storage::digest(container.image_file()).await?;
            containers.insert(name, digest);
        }
        let disk = self.folder.disk();
        let look = || format!("look at {}", disk.display());
        let disk_bytes = std::fs::metadata(&disk).context(look)?.len();
        let disk_used_bytes = storage::data_bytes(&disk).context(look)?;
        Ok(Wanted {
            kubernetes_namespace: self.kubernetes_namespace.clone(),
            release: env!("CARGO_PKG_VERSION").into(),
            accelerator: self.accelerator,
            vcpus: self.info().vcpus,
            memory_mib: self.info().memory_bytes >> 20,
            disk_bytes,
            disk_used_bytes,
            mtus: lock(&self.network)
                .interfaces
                .iter()
                .map(|interface| interface.mtu)
                .collect(),
            modules: lock(&self.plan)
                .modules
                .as_ref()
                .map(|disk| disk.serial.clone()),
            containers,
        })
    }

    /// Moves the machine.
    ///
    /// # Errors
    /// It runs here as before, for this reason.
    pub async fn send(
        self: &Arc<Self>,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent> {
        if !self.change(Input::Leaves) {
            return Err(Error::FailedPrecondition(format!(
                "cannot migrate: {}",
                match self.state().role {
                    Role::Leaving(_) => "another migration of the machine is under way",
                    Role::Arriving(_) => "the machine waits for its source",
                    _ => "the machine is not here any more",
                }
            )));
        }
        let sent = self.send_away(parameters, pod, progress).await;
        if sent.is_err() {
            self.change(Input::StaysHere);
        }
        sent
    }

    async fn send_away(
        self: &Arc<Self>,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent> {
        let uuid = self.record.uuid;
        progress.send_modify(|progress| progress.stage = Stage::Preparing);
        self.unplug_idle().await?;
        let ready = self.get_ready(parameters).await?;
        let job = self.job(parameters, &ready, pod).await?;
        let mut record = self.record.clone();
        record.leaving = true;
        self.folder.save(&record)?;
        let moved = if !self.change(Input::Moves) {
            Err(Error::FailedPrecondition("cancelled".into()))
        } else {
            let migrated = self.libvirt.migrate(uuid, job);
            tokio::select! {
                migrated = migrated => migrated.map_err(Error::from),
                // libvirt may wait over there for memory that is nowhere any more.
                () = self.is_dead_here() => Err(Error::Unavailable("its QEMU has died".into(), None)),
                (never, ()) = async {
                    tokio::join!(
                        self.observe_job(parameters, &ready.destination, &progress),
                        self.hand_over_at_once(&ready.destination),
                    )
                } => match never {},
                never = self.break_off(&ready.destination) => match never {},
            }
        };
        progress.send_modify(|progress| progress.stage = Stage::Finishing);
        if let Err(error) = &moved {
            info!("migration of machine {uuid}: {}", error.chain());
        }
        let found = self.settle(&ready.destination, moved.is_ok()).await;
        debug!("machine {uuid} is {found:?}");
        match found {
            Whereabouts::Here => {
                self.folder.save(&self.record)?;
                Err(moved.err().unwrap_or_else(|| {
                    Error::Unavailable("libvirt says that it did not move".into(), None)
                }))
            }
            Whereabouts::There => {
                self.let_go(&ready.destination).await;
                if let Ok(figures) = ready.destination.finished_job(uuid).await {
                    progress.send_modify(|progress| {
                        progress.downtime = figures.downtime;
                        progress.bytes_done = figures.done.max(progress.bytes_done);
                        progress.bytes_remaining = 0;
                    });
                }
                Ok(Sent::Moved)
            }
            Whereabouts::Nowhere(why) => {
                if let Ok(Observed::Off(ending)) = self.libvirt.state(uuid).await {
                    self.ended(ending);
                }
                let reason = moved.err().map_or_else(String::new, |error| error.chain());
                Ok(Sent::Lost(format!("{why}; libvirt: {reason}")))
            }
        }
    }

    async fn job(
        &self,
        parameters: &MigrationParameters,
        ready: &Ready,
        pod: Vec<u8>,
    ) -> Result<Job> {
        let mut images: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (name, container) in self.living_containers() {
            if let Some(offered) = ready.offer.containers.get(&name) {
                images.insert(container.image_serial(), offered.image.clone());
            }
        }
        let plan = lock(&self.plan).clone();
        images.extend(ready.offer.modules.clone());
        let record = Record {
            version: offer::VERSION,
            containers: self
                .living_containers()
                .into_iter()
                .map(|(name, container)| {
                    let traveller = Traveller {
                        guest_id: container.guest_id(),
                        serial: container.image_serial(),
                    };
                    (name, traveller)
                })
                .collect(),
            images: plan
                .images
                .iter()
                .map(|disk| (disk.serial.clone(), disk.unit))
                .collect(),
            sizing: self.sizing(),
            macs: ready.found.macs.clone(),
            network: Held::of(&lock(&self.network), &lock(&self.former)),
            kernel_release: lock(&self.kernel_release).clone(),
            events_after: self.events_after.load(Ordering::Relaxed),
            pod,
        };
        // Of a container that has ended, and is not deleted yet.
        for serial in record.images.keys() {
            if !images.contains_key(serial) {
                return Err(Error::FailedPrecondition(format!(
                    "cannot migrate: the image of a container that has ended (serial {serial}) is still \
                     plugged in, and the target has no file for it; delete that container first"
                )));
            }
        }
        let name = RECORD.0;
        let element = offer::element(&format!("{name}:record"), &record)?;
        let element = element.replacen(
            &format!("<{name}:record>"),
            &format!("<{name}:record xmlns:{name}=\"{}\">", RECORD.1),
            1,
        );
        let places = Places {
            offer: &ready.offer,
            images: &images,
            pod_disk_serial: POD_DISK_SERIAL,
            record: &element,
        };
        let disks = ready
            .found
            .disks
            .iter()
            .filter(|(serial, _)| serial == POD_DISK_SERIAL);
        Ok(Job {
            destination: parameters.destination.clone(),
            xml: xml::rewrite(&ready.xml, places)?,
            migrate_uri: ready.streams.migrate_uri.clone(),
            disks_uri: ready.streams.disks_uri.clone(),
            disks: disks.map(|(_, device)| device.clone()).collect(),
            bandwidth_mib_s: disks_bandwidth(
                parameters.bandwidth_mib_s,
                ready.offer.disk_bytes,
                ready.disk_used_bytes,
            ),
            auto_converge: parameters.auto_converge,
            post_copy: parameters.timeout_action == TimeoutAction::PostCopy,
            parallel: parameters.parallel,
            tls: ready.streams.tls,
        })
    }

    /// Returns when the machine has been dead here for a while, which is long after libvirt
    /// has answered, where it does.
    async fn is_dead_here(&self) {
        let mut since = Instant::now();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match self.libvirt.state(self.record.uuid).await {
                Ok(Observed::Off(ending)) if ending != Ending::Migrated => {
                    if since.elapsed() > STANDSTILL {
                        return;
                    }
                }
                _ => since = Instant::now(),
            }
        }
    }

    /// Tells figures until dropped, and sets what can be set only once the job is there.
    async fn observe_job(
        &self,
        parameters: &MigrationParameters,
        destination: &Libvirt,
        progress: &watch::Sender<MigrationProgress>,
    ) -> std::convert::Infallible {
        let uuid = self.record.uuid;
        let mut downtime = parameters.max_downtime;
        let mut bandwidth = Some(parameters.bandwidth_mib_s).filter(|bound| *bound != 0);
        loop {
            if let Ok(figures) = self.libvirt.job(uuid).await
                && figures.active
            {
                if let Some(wanted) = downtime.take()
                    && let Err(error) = self.libvirt.set_max_downtime(uuid, wanted).await
                {
                    debug!("{}", Error::from(error).chain());
                    downtime = Some(wanted);
                }
                if figures.memory_done != 0
                    && let Some(bound) = bandwidth.take()
                    && let Err(error) = self.libvirt.set_bandwidth(uuid, bound).await
                {
                    debug!("{}", Error::from(error).chain());
                    bandwidth = Some(bound);
                }
                let stands = matches!(self.libvirt.state(uuid).await, Ok(Observed::Paused));
                let post_copy = self.state().is_in_post_copy();
                if post_copy
                    && stands
                    && matches!(destination.state(uuid).await, Ok(Observed::Running))
                {
                    // There is no way back from there, and its memory may take its time.
                    self.hand_over(destination).await;
                }
                progress.send_modify(|progress| {
                    *progress = MigrationProgress {
                        stage: match (post_copy, stands) {
                            (true, _) => Stage::PostCopy,
                            (false, true) => Stage::Switching,
                            (false, false) => Stage::Copying,
                        },
                        bytes_done: figures.done,
                        bytes_total: figures.total,
                        bytes_remaining: figures.remaining,
                        rate: figures.rate,
                        dirty_rate: figures.dirty_rate,
                        expected_downtime: figures.downtime,
                        downtime: None,
                    };
                });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Hands over as soon as the switch is sure: its QEMU has ended here, and it runs there.
    /// This node's libvirt tells neither while it waits for QEMU to be reaped.
    async fn hand_over_at_once(&self, destination: &Libvirt) {
        let uuid = self.record.uuid;
        let Some(pid) = self.pid() else { return };
        if let Err(error) = libvirt::qemu_ended(pid, uuid).await {
            // Later then, when the job is over.
            debug!("watch QEMU of machine {uuid}: {error}");
            return;
        }
        debug!("machine {uuid}: QEMU has ended here");
        loop {
            match destination.state(uuid).await {
                Ok(Observed::Running) => return self.hand_over(destination).await,
                // It died on its way.
                Ok(Observed::Off(_) | Observed::Absent) => return,
                Ok(Observed::Paused) | Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Ends QEMU's waiting for a network that is gone, which else lasts until TCP gives up (a
    /// quarter of an hour): libvirt, which notices, waits for QEMU.
    async fn break_off(&self, destination: &Libvirt) -> std::convert::Infallible {
        let uuid = self.record.uuid;
        let mut given_up: Option<Instant> = None;
        loop {
            tokio::time::sleep(LOOK_AT_NETWORK_EVERY).await;
            let is_over = self.libvirt.job(uuid).await.is_ok_and(|job| job.given_up);
            given_up = is_over.then(|| given_up.unwrap_or_else(Instant::now));
            let hangs = given_up.is_some_and(|since| since.elapsed() > STANDSTILL);
            // After the switch, what is here is still wanted there.
            if (hangs || destination.state(uuid).await.is_err()) && !self.state().is_in_post_copy()
            {
                match self.libvirt.break_streams(uuid).await {
                    Ok(true) => info!("machine {uuid}: its migration's streams are broken off"),
                    Ok(false) => {}
                    Err(error) => warn!("{}", Error::from(error).chain()),
                }
            }
        }
    }

    /// Finds out where the machine runs, from both libvirts; [`whereabouts`] decides.
    async fn settle(&self, destination: &Libvirt, is_done: bool) -> Whereabouts {
        let uuid = self.record.uuid;
        let mut began = Instant::now();
        loop {
            let sight = self.look(destination, is_done, began).await;
            match whereabouts::decide(sight) {
                Verdict::Here => return Whereabouts::Here,
                Verdict::There => return Whereabouts::There,
                Verdict::EndHere => {
                    if let Err(error) = self.libvirt.destroy(uuid).await {
                        warn!("{}", Error::from(error).chain());
                    }
                    return Whereabouts::There;
                }
                Verdict::Resume => match self.libvirt.resume(uuid).await {
                    Ok(()) => return Whereabouts::Here,
                    Err(error) => {
                        warn!("{}", Error::from(error).chain());
                        if began.elapsed() > SETTLE_WITHIN {
                            return Whereabouts::Nowhere(Reason::Unknown);
                        }
                    }
                },
                Verdict::EndThere => {
                    if let Err(error) = destination.destroy(uuid).await {
                        warn!("{}", Error::from(error).chain());
                    }
                    return Whereabouts::Nowhere(Reason::Halves);
                }
                Verdict::Nowhere(reason) => return Whereabouts::Nowhere(reason),
                Verdict::Wait => {}
                Verdict::WaitAnew => began = Instant::now(),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Asks both libvirts; the other one only where this one does not decide alone.
    async fn look(&self, destination: &Libvirt, is_done: bool, began: Instant) -> Sight {
        let uuid = self.record.uuid;
        let answer = |what: Result<Observed, LibvirtError>| {
            what.map_err(|error| debug!("{}", Error::from(error).chain()))
                .ok()
        };
        let here = answer(self.libvirt.state(uuid).await);
        let post_copy = self.state().is_in_post_copy();
        let (mut there, mut in_halves) = (None, None);
        if here.is_some() && whereabouts::from_here(here, is_done).is_none() {
            there = answer(destination.state(uuid).await);
            if post_copy {
                in_halves = destination.is_in_post_copy(uuid).await.ok();
            }
            debug!("machine {uuid}: here {here:?}, there {there:?}");
        }
        Sight {
            here,
            there,
            is_done,
            post_copy,
            in_halves,
            waited: began.elapsed(),
        }
    }

    /// It runs there: lets go of all that could disturb it, and tells where to go on.
    async fn let_go(&self, destination: &Libvirt) {
        self.change(Input::HasMoved);
        self.hand_over(destination).await;
        // Where its last word was lost, libvirt here keeps the definition.
        if let Err(error) = self.libvirt.undefine(self.record.uuid).await {
            warn!("{}", Error::from(error).chain());
        }
        for (_, container) in self.living_containers() {
            container.stop_syncing();
        }
        // Nobody is told of ends here any more: the driver ends them all.
        lock(&self.running).clear();
        self.stop_following();
        if let Some(netns) = &self.record.netns {
            let interfaces = self.record.taps.iter().map(|(name, _)| name.clone());
            if let Err(error) = network::quiet(netns, interfaces.collect()).await {
                warn!("{}", error.chain());
            }
        }
        let mut record = self.record.clone();
        record.moved = true;
        if let Err(error) = self.folder.save(&record) {
            warn!("{}", error.chain());
        }
    }

    /// Whether the link to the guest was given up, for a target: nobody here asks it again.
    pub fn has_let_go(&self) -> bool {
        self.states.borrow().has_let_go()
    }

    /// Lets go of the link to the guest, once, and tells the target how far each stream is.
    /// Asked again, it goes on where the first one was broken off.
    async fn hand_over(&self, destination: &Libvirt) {
        let uuid = self.record.uuid;
        let _turn = self.handing_over.turn().await;
        if self.state().is_handed_over() {
            return;
        }
        self.change(Input::LinkIs(Link::LetGo));
        let agent = self.agent();
        let streams = agent.hand_over(HANDOVER_WITHIN).await;
        let handover = Handover {
            version: offer::VERSION,
            streams,
        };
        let told = match offer::element("handover", &handover) {
            Ok(element) => destination
                .set_metadata(uuid, HANDOVER, Some(element), Of::Live)
                .await
                .map_err(Error::from),
            Err(error) => Err(error),
        };
        if let Err(error) = told {
            // The target goes on from what the guest kept: output may be there twice.
            warn!("hand over the streams of {uuid}: {}", error.chain());
        }
        agent.close();
        self.change(Input::LinkIs(Link::HandedOver));
        debug!("machine {uuid}: its streams are handed over");
    }

    /// Gives the migration up, where it can be.
    ///
    /// # Errors
    /// It is past the point.
    pub async fn cancel_migration(&self) -> Result<()> {
        let uuid = self.record.uuid;
        let began = Instant::now();
        self.change(Input::Cancelled);
        loop {
            if self.state().is_in_post_copy() {
                return Err(Error::FailedPrecondition(
                    "the machine runs on the target already and fetches its memory".into(),
                ));
            }
            match self.libvirt.abort_job(uuid).await {
                Ok(()) => return Ok(()),
                Err(error) if began.elapsed() > CANCEL_WITHIN => return Err(error.into()),
                Err(_) if self.state().has_moved() => {
                    return Err(Error::FailedPrecondition("the machine has moved".into()));
                }
                // It may only be about to begin.
                Err(error) => debug!("{}", Error::from(error).chain()),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Brings the migration to an end.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn hurry_migration(&self, how: Hurry) -> Result<()> {
        let uuid = self.record.uuid;
        // Before the disks are copied there is no post-copy, and it would stand still for long.
        while !self
            .libvirt
            .job(uuid)
            .await
            .is_ok_and(|job| job.memory_done != 0)
        {
            if !self.state().is_moving() {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        match how {
            Hurry::Pause => Ok(self.libvirt.suspend_for_migration(uuid).await?),
            Hurry::PostCopy => {
                // Before: a switch whose answer is lost is a switch.
                self.change(Input::PostCopy(true));
                let started = self.libvirt.start_post_copy(uuid).await;
                if started.is_err() {
                    self.change(Input::PostCopy(false));
                }
                Ok(started?)
            }
        }
    }
}

/// The bound while disks are copied. QEMU counts the holes of a sparse disk as if it sent
/// them, which it does not: with the bound as it is, an empty disk of 10 GiB would take as
/// long as a full one. Raised by the share of holes, what is sent is the bound on average.
fn disks_bandwidth(bound_mib_s: u64, size: u64, used: u64) -> u64 {
    let scaled = u128::from(bound_mib_s) * u128::from(size) / u128::from(used.max(1 << 20));
    u64::try_from(scaled)
        .unwrap_or(u64::MAX)
        .clamp(bound_mib_s, bound_mib_s.max(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_do_not_count_in_the_bound() {
        assert_eq!(disks_bandwidth(0, 10 << 30, 1 << 30), 0, "no bound");
        assert_eq!(disks_bandwidth(8, 10 << 30, 10 << 30), 8, "a full disk");
        assert_eq!(disks_bandwidth(8, 10 << 30, 1 << 30), 80);
        assert_eq!(disks_bandwidth(8, 10 << 30, 0), 8 * 10 * 1024);
    }
}
