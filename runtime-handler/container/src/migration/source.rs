//! The source's side: checks, copies while the pod runs, freezes it, hands it over.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dyad_linux::pump::Unread;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::migration::{MigrationParameters, MigrationProgress, Sent, Stage};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::criu::Criu;
use super::destination::{self, Destination};
use super::meter::{self, Meter};
use super::transport::{Failed, connect};
use super::tree::{self, Sent as SentTree};
use super::wire::{Goes, Message, Outcome, PROTOCOL, Place, Purpose, Wire};
use super::{Job, Scratch, given_up};
use crate::container::Container;
use crate::handler::Containers;

/// How long the target may look at its image and volumes.
const ANSWER: Duration = Duration::from_secs(60);
/// How long one question for the outcome waits: a target that restores does not answer yet,
/// and one that died while it was asked never does.
const ASK: Duration = Duration::from_secs(10);
/// Between two questions for the outcome.
const AGAIN: Duration = Duration::from_secs(1);
/// A target whose shim is gone keeps no container for longer: containerd has cleaned up
/// after it.
const GONE: Duration = Duration::from_secs(15);
/// Bytes per second where nothing was measured.
const GUESSED_RATE: u64 = 200 << 20;

type Members = BTreeMap<String, Arc<Container>>;

/// A tree that goes along beside the images.
struct Root {
    place: Place,
    dir: PathBuf,
    sent: SentTree,
}

/// All that one attempt needs.
struct Attempt<'a> {
    parameters: &'a MigrationParameters,
    destination: Destination,
    id: String,
    members: Members,
    criu: Criu,
    roots: Vec<Root>,
    memory_bytes: u64,
    meter: Meter,
    job: &'a Job,
    scratch: Scratch,
}

impl Containers {
    /// Everything that forbids it, on both sides.
    pub(super) async fn check_move(&self, parameters: &MigrationParameters) -> Result<()> {
        destination::check_parameters(parameters)?;
        let destination = Destination::parse(parameters, &self.config)?;
        let attempt = Uuid::new_v4().to_string();
        let members = self.members();
        let criu = self.criu().await?;
        self.greet(
            parameters,
            &destination,
            &attempt,
            Purpose::Check,
            &members,
            &criu,
        )
        .await
        .map(drop)
    }

    pub(super) fn identity(&self) -> Result<String> {
        self.identity
            .get()
            .cloned()
            .ok_or_else(|| Error::FailedPrecondition("there is no pod to move".into()))
    }

    /// Connects and compares; answers with the connection, on which the target has
    /// accepted, and the bytes of the pod's memory.
    async fn greet(
        &self,
        parameters: &MigrationParameters,
        destination: &Destination,
        attempt: &str,
        purpose: Purpose,
        members: &Members,
        criu: &Criu,
    ) -> Result<(Wire, u64)> {
        if members.is_empty() {
            return Err(Error::FailedPrecondition(
                "the pod has no container to move".into(),
            ));
        }
        let mut manifest = self.describe(criu, members).await?;
        let (mut blockers, mut memory_bytes) = (Vec::new(), 0);
        for container in members.values() {
            let seen = container.look(parameters.tcp_established)?;
            blockers.extend(seen.blockers);
            manifest.addresses.extend(seen.addresses);
            memory_bytes += seen.memory_bytes;
            let layer = container.layers()?.upper;
            manifest.bytes += tree::size(&layer).context(|| format!("read {}", layer.display()))?;
        }
        for (_, _, dir) in Self::copied_volumes(members)? {
            manifest.bytes += tree::size(&dir).context(|| format!("read {}", dir.display()))?;
        }
        manifest.bytes += memory_bytes;
        if !blockers.is_empty() {
            blockers.sort();
            blockers.dedup();
            return Err(Error::FailedPrecondition(format!(
                "cannot migrate: {}",
                blockers.join("; ")
            )));
        }
        let space = super::free_bytes(&self.folders.checkpoints)?;
        if space < memory_bytes {
            return Err(Error::FailedPrecondition(format!(
                "cannot migrate: no space for the pod's memory ({} MiB) in {} ({} MiB free)",
                memory_bytes >> 20,
                self.folders.checkpoints.display(),
                space >> 20
            )));
        }
        let mut wire = connect(destination, &self.config, &self.reaper).await?;
        wire.send(&Message::Hello {
            protocol: PROTOCOL,
            source: self.identity()?,
            attempt: attempt.to_owned(),
            purpose,
        })
        .await?;
        wire.send(&Message::Manifest(Box::new(manifest))).await?;
        let answer = timeout(ANSWER, wire.receive()).await.unwrap_or_else(|_| {
            Err(Error::DeadlineExceeded(format!(
                "the target did not answer within {} s",
                ANSWER.as_secs()
            )))
        })?;
        match answer {
            Message::Accept => Ok((wire, memory_bytes)),
            Message::Refuse { reason } => Err(Error::FailedPrecondition(format!(
                "the target cannot take the pod: {reason}"
            ))),
            other => Err(other.unexpected("accept or refuse")),
        }
    }

    pub(super) async fn send_pod(
        &self,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
        job: &Job,
    ) -> Result<Sent> {
        let meter = Meter::new(progress);
        meter.stage(Stage::Preparing);
        let destination = Destination::parse(parameters, &self.config)?;
        let id = Uuid::new_v4().to_string();
        let members = self.members();
        let criu = self.criu().await?;
        let (mut wire, memory_bytes) = tokio::select! {
            greeted = self.greet(parameters, &destination, &id, Purpose::Move, &members, &criu) => greeted?,
            () = job.cancelled() => return Err(given_up()),
        };
        wire.limit(parameters.bandwidth_mib_s << 20);
        let mut attempt = Attempt {
            parameters,
            destination,
            id,
            roots: roots(&members)?,
            members,
            criu,
            memory_bytes,
            meter,
            job,
            scratch: self.scratch_out()?,
        };
        let copied = tokio::select! {
            biased;
            () = job.cancelled() => Err(given_up()),
            copied = attempt.copy(&mut wire) => copied,
        };
        let unread = match copied.and_then(|unread| job.commit().map(|()| unread)) {
            Ok(unread) => unread,
            Err(error) => {
                // The target sees the connection end, and has not been told to run it.
                attempt.thaw();
                return Err(error);
            }
        };
        let outcome = match attempt.commit(&mut wire, &pod, &unread).await {
            Ok(outcome) => outcome,
            Err(error) => {
                log::warn!(
                    "the connection broke at the switch ({}); asking the target how it went",
                    error.chain()
                );
                drop(wire);
                self.resolve(&attempt).await
            }
        };
        match outcome {
            Outcome::Running => {
                attempt.meter.runs();
                attempt.meter.stage(Stage::Finishing);
                for container in attempt.members.values() {
                    if let Err(error) = container.let_go().await {
                        // Frozen, and fenced: it does no harm, and its delete tries again.
                        log::error!("{}", error.chain());
                    }
                }
                Ok(Sent::Moved)
            }
            Outcome::Aborted { reason } => {
                attempt.thaw();
                Err(Error::FailedPrecondition(format!(
                    "the target could not run the pod: {reason}"
                )))
            }
        }
    }

    /// The target was told to run the pod, and its answer is not known. The pod stays
    /// frozen here until it is: that it runs twice is worse than that it waits.
    async fn resolve(&self, attempt: &Attempt<'_>) -> Outcome {
        let mut nobody_since = None;
        loop {
            match self.ask_outcome(attempt).await {
                Ok(outcome) => return outcome,
                Err(Failed::Nobody(_)) => {
                    let since = *nobody_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= GONE {
                        return Outcome::Aborted {
                            reason: "its shim is gone, and with it what it ran".into(),
                        };
                    }
                }
                Err(Failed::Other(error)) => {
                    nobody_since = None;
                    log::warn!("ask the target for the outcome: {}", error.chain());
                }
            }
            sleep(AGAIN).await;
        }
    }

    async fn ask_outcome(&self, attempt: &Attempt<'_>) -> std::result::Result<Outcome, Failed> {
        let mut wire = connect(&attempt.destination, &self.config, &self.reaper).await?;
        let ask = async {
            wire.send(&Message::Hello {
                protocol: PROTOCOL,
                source: self.identity()?,
                attempt: attempt.id.clone(),
                purpose: Purpose::Ask,
            })
            .await?;
            let outcome = outcome_of(wire.receive().await?)?;
            // It asks no more; that the target need not remember is a courtesy.
            let _ = wire.send(&Message::Known).await;
            Ok(outcome)
        };
        timeout(ASK, ask)
            .await
            .unwrap_or_else(|_| Err(Error::DeadlineExceeded("the target does not answer".into())))
            .map_err(Failed::Other)
    }
}

fn outcome_of(message: Message) -> Result<Outcome> {
    match message {
        Message::Outcome(outcome) => Ok(outcome),
        other => Err(other.unexpected("the outcome")),
    }
}

fn roots(members: &Members) -> Result<Vec<Root>> {
    let mut roots = Vec::new();
    for (name, container) in members {
        roots.push(Root {
            place: Place::Layer {
                container: name.clone(),
            },
            dir: container.layers()?.upper,
            sent: SentTree::default(),
        });
    }
    for (container, destination, dir) in Containers::copied_volumes(members)? {
        roots.push(Root {
            place: Place::Volume {
                container,
                destination,
            },
            dir,
            sent: SentTree::default(),
        });
    }
    Ok(roots)
}

impl Attempt<'_> {
    fn thaw(&self) {
        for container in self.members.values() {
            if let Err(error) = container.thaw() {
                log::error!("{}: {}", container.id(), error.chain());
            }
        }
        self.meter.runs();
    }

    fn dir(&self, container: &str) -> PathBuf {
        self.scratch.dir.join(container)
    }

    /// Everything up to the word that the target may run it. Frozen when it succeeds, and
    /// perhaps when it fails.
    async fn copy(&mut self, wire: &mut Wire) -> Result<BTreeMap<String, Unread>> {
        self.meter.stage(Stage::Copying);
        let mut files = 0;
        for root in &self.roots {
            files += tree::size(&root.dir).context(|| format!("read {}", root.dir.display()))?;
        }
        self.meter.remaining(files + self.memory_bytes);
        self.copy_roots(wire).await?;
        let pre_dumped = self.copy_memory(wire).await?;
        self.check_downtime(pre_dumped.as_ref().map(|(_, bytes)| *bytes))?;

        self.meter.stage(Stage::Switching);
        for container in self.members.values() {
            container.freeze().await?;
        }
        let mut unread = BTreeMap::new();
        for (name, container) in &self.members {
            unread.insert(name.clone(), container.settle().await?);
        }
        let parent = pre_dumped.map(|(set, _)| set);
        for (name, container) in &self.members {
            let tcp = self.parameters.tcp_established;
            let dir = self.dir(name);
            container
                .dump(&self.criu, &dir, "dump", parent.as_deref(), false, tcp)
                .await?;
        }
        if self
            .members
            .values()
            .any(|container| container.maps_files_to_write())
        {
            self.roots.iter_mut().for_each(|root| root.sent.distrust());
        }
        let mut images = 0;
        for name in self.members.keys() {
            let dir = self.dir(name).join("dump");
            images += tree::size(&dir).context(|| format!("read {}", dir.display()))?;
        }
        self.meter.remaining(images);
        self.copy_roots(wire).await?;
        for name in self.members.keys() {
            self.send_images(wire, name, "dump").await?;
        }
        self.meter.remaining(0);
        Ok(unread)
    }

    async fn copy_roots(&mut self, wire: &mut Wire) -> Result<()> {
        let meter = &self.meter;
        for root in &mut self.roots {
            let place = root.place.clone();
            tree::send(wire, place, &root.dir, &mut root.sent, |bytes| {
                meter.copied(bytes);
            })
            .await?;
        }
        Ok(())
    }

    /// Copies memory while the pod runs, again and again while that helps. Returns the
    /// last set of images and how much it was.
    async fn copy_memory(&self, wire: &mut Wire) -> Result<Option<(String, u64)>> {
        if !self.criu.tracks_memory {
            log::info!(
                "this kernel does not track memory for CRIU: it is copied while the pod is frozen"
            );
            return Ok(None);
        }
        let mut written = Vec::new();
        let mut parent: Option<String> = None;
        while meter::dump_again(&written) && !self.job.is_hurried() {
            let set = format!("pre-{}", written.len() + 1);
            let since = Instant::now();
            let mut bytes = 0;
            for (name, container) in &self.members {
                let tcp = self.parameters.tcp_established;
                let dir = self.dir(name);
                let images = container
                    .dump(&self.criu, &dir, &set, parent.as_deref(), true, tcp)
                    .await?;
                bytes += tree::size(&images).context(|| format!("read {}", images.display()))?;
                self.send_images(wire, name, &set).await?;
            }
            if parent.is_some() {
                self.meter.dirtied(bytes, since.elapsed());
            }
            written.push(bytes);
            parent = Some(set);
        }
        Ok(parent.zip(written.last().copied()))
    }

    async fn send_images(&self, wire: &mut Wire, name: &str, set: &str) -> Result<()> {
        let place = Place::Images {
            container: name.to_owned(),
            set: set.to_owned(),
        };
        let dir = self.dir(name).join(set);
        tree::send(wire, place, &dir, &mut SentTree::default(), |bytes| {
            self.meter.copied(bytes);
        })
        .await
    }

    fn check_downtime(&self, pre_dumped: Option<u64>) -> Result<()> {
        let limit = self.parameters.bandwidth_mib_s << 20;
        let rate = match (self.meter.mean_rate(), limit) {
            (Some(measured), _) => measured,
            (None, 0) => GUESSED_RATE,
            (None, limit) => limit,
        };
        let expected = meter::expected_downtime(pre_dumped.unwrap_or(self.memory_bytes), rate);
        self.meter.expected_downtime(expected);
        match self.parameters.max_downtime {
            Some(most) if expected > most && !self.job.is_hurried() => {
                Err(Error::FailedPrecondition(format!(
                    "the pod would stand still for about {} ms, more than the {} ms that max_downtime allows: raise it",
                    expected.as_millis(),
                    most.as_millis()
                )))
            }
            _ => Ok(()),
        }
    }

    /// Gives the pod away, and waits for the answer.
    async fn commit(
        &self,
        wire: &mut Wire,
        pod: &[u8],
        unread: &BTreeMap<String, Unread>,
    ) -> Result<Outcome> {
        let goes = |unread: &Unread| Goes {
            stdin: unread.bytes.len() as u64,
            stdin_closed: unread.closed,
        };
        wire.send(&Message::Commit {
            pod: pod.len() as u64,
            tcp_established: self.parameters.tcp_established,
            containers: unread
                .iter()
                .map(|(name, unread)| (name.clone(), goes(unread)))
                .collect(),
        })
        .await?;
        wire.blob(pod).await?;
        for unread in unread.values() {
            wire.blob(&unread.bytes).await?;
        }
        wire.send(&Message::End).await?;
        let outcome = outcome_of(wire.receive().await?)?;
        let _ = wire.send(&Message::Known).await;
        Ok(outcome)
    }
}
