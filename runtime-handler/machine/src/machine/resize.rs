//! The running machine's size, following its containers' limits.

use std::collections::BTreeMap;
use std::time::Duration;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use log::{info, warn};
use oci_spec::runtime::LinuxResources;

use super::{Machine, lock};
use crate::guest::Agent;
use crate::migrate::offer::Sizing;
use crate::size::{Limits, Reached, Size, plugged_mib};

/// How long a guest may take to give memory back, or to take it.
const MEMORY_WITHIN: Duration = Duration::from_secs(10);
/// QEMU tells of its memory's size when it is asked.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Machine {
    /// A container was created, with the limits of its spec. One that was there before, and
    /// now has others, resizes the machine.
    ///
    /// # Errors
    /// As for [`Self::resize`].
    pub async fn admit(&self, container: &str, resources: Option<&LinuxResources>) -> Result<()> {
        let limits = resources.map(|found| Limits::default().changed_by(found));
        self.follow_limits(container, limits.unwrap_or_default())
            .await
    }

    /// Whether the machine would become larger by the container's new limits.
    ///
    /// # Errors
    /// `InvalidArgument` with the bounds, for what the machine cannot become.
    pub async fn grows_by(&self, container: &str, resources: &LinuxResources) -> Result<bool> {
        let ledger = lock(&self.ledger).clone();
        let limits = ledger.limits(container).changed_by(resources);
        let size = self.size();
        let target = ledger.with(container, limits, &size)?.target(&size);
        let was = self.reached();
        Ok(target.memory_mib() > was.memory_mib() || target.vcpus > was.vcpus)
    }

    /// The container's limits, as far as the machine follows them.
    pub async fn limits(&self, container: &str) -> Limits {
        lock(&self.ledger).limits(container)
    }

    /// The container's limits change: the machine follows.
    ///
    /// # Errors
    /// `InvalidArgument` with the bounds, for what the machine cannot become;
    /// `FailedPrecondition` where it is paused, or its guest does not give the memory back.
    /// Then its size is as before.
    pub async fn resize(&self, container: &str, resources: &LinuxResources) -> Result<()> {
        let limits = lock(&self.ledger).limits(container).changed_by(resources);
        self.follow_limits(container, limits).await
    }

    async fn follow_limits(&self, container: &str, limits: Limits) -> Result<()> {
        let _turn = self.sizing.turn().await;
        let size = self.size();
        let changed = lock(&self.ledger).with(container, limits, &size)?;
        let target = changed.target(&size);
        let was = self.reached();
        if target != was
            && let Err(error) = self.become_size(target).await
        {
            if let Err(error) = self.become_size(was).await {
                warn!("size as before: {}", error.chain());
            }
            return Err(error);
        }
        *lock(&self.shortfalls) = changed.shortfalls(&size);
        *lock(&self.ledger) = changed;
        Ok(())
    }

    /// How big it was made; one that arrived, by its source.
    fn size(&self) -> Size {
        lock(&self.plan).size
    }

    /// What it was made for and what became of that, for a target.
    pub(super) fn sizing(&self) -> Sizing {
        Sizing {
            size: self.size(),
            reached: self.reached(),
            ledger: lock(&self.ledger).clone(),
        }
    }

    /// Goes on from the source's.
    pub(super) fn take_sizing(&self, sizing: &Sizing) {
        {
            let mut plan = lock(&self.plan);
            plan.size = sizing.size;
            plan.reached = sizing.reached;
        }
        *lock(&self.shortfalls) = sizing.ledger.shortfalls(&sizing.size);
        *lock(&self.ledger) = sizing.ledger.clone();
    }

    /// How big it is.
    pub fn reached(&self) -> Reached {
        lock(&self.plan).reached
    }

    /// Memory that grows comes first, memory that shrinks goes last.
    async fn become_size(&self, target: Reached) -> Result<()> {
        let was = self.reached();
        if self.is_suspended() {
            return Err(Error::FailedPrecondition(
                "the machine is paused, and its guest takes part in a resize; resume it first"
                    .into(),
            ));
        }
        if !self.is_off() {
            let agent = self.agent();
            if target.memory_mib() > was.memory_mib() {
                self.set_memory(target).await?;
                self.set_vcpus(&agent, target.vcpus).await?;
            } else {
                self.set_vcpus(&agent, target.vcpus).await?;
                self.set_memory(target).await?;
            }
        }
        info!(
            "machine {}: {} vCPUs, {} MiB",
            self.record.uuid,
            target.vcpus,
            target.memory_mib()
        );
        lock(&self.plan).reached = target;
        self.save()
    }

    async fn set_vcpus(&self, agent: &Agent, vcpus: u32) -> Result<()> {
        let online = agent.resources(Some(vcpus)).await?.vcpus;
        if online != vcpus {
            return Err(Error::FailedPrecondition(format!(
                "the guest runs {online} of its vCPUs, not {vcpus}"
            )));
        }
        Ok(())
    }

    /// A guest that rebooted runs as many vCPUs as when it was powered on.
    ///
    /// # Errors
    /// The guest cannot be asked, or does not.
    pub(super) async fn size_again(&self, agent: &Agent) -> Result<()> {
        self.set_vcpus(agent, self.reached().vcpus).await
    }

    /// By what QEMU tells, not by what was asked for: a change that failed may be half done.
    async fn set_memory(&self, target: Reached) -> Result<()> {
        let before = self.memory_now().await?;
        let wanted = (target.balloon_mib, target.plugged_mib);
        if before == wanted {
            return Ok(());
        }
        if before.1 > wanted.1 {
            self.request_plugged(wanted.1).await?;
        }
        if before.0 != wanted.0 {
            let uuid = self.record.uuid;
            self.libvirt.set_balloon(uuid, wanted.0).await?;
        }
        if before.1 <= wanted.1 {
            // Also where as much is plugged: more may have been asked for.
            self.request_plugged(wanted.1).await?;
        }
        let mut now = before;
        let reached = tokio::time::timeout(MEMORY_WITHIN, async {
            while now != wanted {
                tokio::time::sleep(LOOK_EVERY).await;
                now = self.memory_now().await?;
            }
            Ok::<_, Error>(())
        });
        match reached.await {
            Ok(result) => result,
            Err(_) => Err(Error::FailedPrecondition(format!(
                "the guest went from {} to {} MiB, not to {} MiB, within {} s: its processes hold the memory; let them free some, and ask again",
                before.0 + before.1,
                now.0 + now.1,
                wanted.0 + wanted.1,
                MEMORY_WITHIN.as_secs()
            ))),
        }
    }

    /// What the balloon leaves and what is plugged, in MiB.
    async fn memory_now(&self) -> Result<(u64, u64)> {
        let (balloon_mib, xml) = self.libvirt.memory(self.record.uuid).await?;
        Ok((balloon_mib, plugged_mib(&xml).unwrap_or_default()))
    }

    async fn request_plugged(&self, mib: u64) -> Result<()> {
        let device = lock(&self.plan).plugged_memory();
        let Some(mut device) = device else {
            return Ok(());
        };
        device.requested_mib = mib;
        Ok(self
            .libvirt
            .update(self.record.uuid, device.to_xml())
            .await?)
    }

    /// Writes down how big it is and what is plugged in.
    pub(super) fn save(&self) -> Result<()> {
        let record = {
            let plan = lock(&self.plan);
            let mut record = self.record.clone();
            record.size = Some(plan.size);
            record.reached = Some(plan.reached);
            let units = plan
                .images
                .iter()
                .map(|image| (image.serial.clone(), image.unit));
            record.images = units.collect::<BTreeMap<_, _>>();
            record
        };
        self.folder.save(&record)
    }
}
