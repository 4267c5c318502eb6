//! The target's side: waits, compares, takes in, runs.
//!
//! ```text
//!  Waiting --Check--> answered, Waiting
//!     |  ^-- garbage, another protocol, another source: turned away
//!     | Move, accepted
//!     v
//!  Taking --breaks before Commit--> Aborted --+
//!     | Commit                                |  both are remembered and told to
//!     v                                       |  whoever asks
//!  Restoring --fails--> Aborted --------------+
//!     `--all run--> Running ------------------+
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dyad_linux::pump::Unread;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::migration::Arrival;
use tokio::time::timeout;

use super::criu::Criu;
use super::plan::{self, Manifest, Volume};
use super::transport::Listener;
use super::tree::Receiver;
use super::wire::{Goes, Message, Outcome, PROTOCOL, Place, Purpose, Wire, broken};
use crate::container::Container;
use crate::handler::{Containers, check_name};

/// A peer that was let in says who it is within this.
const GREETING: Duration = Duration::from_secs(60);

/// What a source sends without waiting for an answer comes within this.
const AT_ONCE: Duration = Duration::from_secs(10);

type Members = BTreeMap<String, Arc<Container>>;

/// A source that was let in.
struct Guest {
    wire: Wire,
    attempt: String,
}

/// What is in place when the source gives the pod away.
struct Given {
    pod: Vec<u8>,
    unread: BTreeMap<String, Unread>,
    tcp_established: bool,
}

impl Containers {
    pub(super) async fn receive_pod(&self) -> Result<Arrival> {
        let source = self.source.get().ok_or_else(|| {
            Error::FailedPrecondition("this pod waits for no migration source".into())
        })?;
        let criu = self.criu().await?;
        let mut listener =
            Listener::bind(&self.folders.sockets, source, &self.config, &self.reaper).await?;
        let mut guest = loop {
            let (wire, hello) = listener.accept().await;
            match self.let_in(wire, hello, source, &criu).await {
                Ok(Some(guest)) => break guest,
                Ok(None) => {}
                Err(error) => log::warn!("a migration peer is turned away: {}", error.chain()),
            }
        };
        let members = self.members();
        let scratch = self.scratch_in()?;
        let taken = self
            .take(&mut guest.wire, &members, &criu, &scratch.dir)
            .await;
        let (outcome, arrived) = match taken {
            Ok(arrival) => (Outcome::Running, Ok(arrival)),
            Err(error) => {
                for container in members.values() {
                    if let Err(error) = container.let_go().await {
                        log::error!("{}", error.chain());
                    }
                }
                let reason = error.chain();
                (Outcome::Aborted { reason }, Err(error))
            }
        };
        let told = guest.wire.send(&Message::Outcome(outcome.clone())).await;
        if arrived.is_ok() {
            // Not awaited: the pod runs, whoever knows.
            tokio::spawn(answer(listener, guest, outcome, told.is_ok()));
            self.arrived();
            members.values().for_each(|container| container.settle_in());
        }
        // Else a source that asks finds nobody, and that is an answer, too.
        arrived
    }

    /// Talks to a peer up to where it moves in; `None`: it only asked.
    async fn let_in(
        &self,
        mut wire: Wire,
        hello: Message,
        source: &str,
        criu: &Criu,
    ) -> Result<Option<Guest>> {
        let greeting = async {
            let Message::Hello {
                protocol,
                source: theirs,
                attempt,
                purpose,
            } = hello
            else {
                return Err(hello.unexpected("hello"));
            };
            if purpose == Purpose::Ask {
                // It is asked by its source, of which nothing came here.
                let reason = "the target knows nothing of this attempt".to_owned();
                let aborted = Message::Outcome(Outcome::Aborted { reason });
                wire.send(&aborted).await?;
                return Ok(None);
            }
            let compared = self
                .compare(&mut wire, protocol, &theirs, source, criu)
                .await?;
            match compared {
                Err(reason) => {
                    wire.send(&Message::Refuse { reason }).await?;
                    Ok(None)
                }
                Ok(()) => {
                    wire.send(&Message::Accept).await?;
                    Ok((purpose == Purpose::Move).then_some(attempt))
                }
            }
        };
        let attempt = timeout(GREETING, greeting)
            .await
            .unwrap_or_else(|_| Err(broken("nothing came".into())))?;
        Ok(attempt.map(|attempt| Guest { wire, attempt }))
    }

    async fn compare(
        &self,
        wire: &mut Wire,
        protocol: u32,
        theirs: &str,
        source: &str,
        criu: &Criu,
    ) -> Result<std::result::Result<(), String>> {
        if protocol != PROTOCOL {
            return Ok(Err(format!(
                "it speaks version {PROTOCOL} of the migration protocol, the source {protocol}: use the same release of dyad on both nodes"
            )));
        }
        // It comes with the greeting, so a peer that keeps it back keeps others waiting.
        let manifest = timeout(AT_ONCE, wire.receive())
            .await
            .unwrap_or_else(|_| Err(broken("no manifest came".into())))?;
        let manifest: Manifest = match manifest {
            Message::Manifest(manifest) => *manifest,
            other => return Err(other.unexpected("the manifest")),
        };
        if theirs != source {
            return Ok(Err(format!("it waits for {source}, and this is {theirs}")));
        }
        let own = match self.own_manifest(criu).await {
            Ok(own) => own,
            Err(error) => return Ok(Err(error.chain())),
        };
        Ok(plan::compare(&manifest, &own))
    }

    async fn own_manifest(&self, criu: &Criu) -> Result<Manifest> {
        let members = self.members();
        let mut own = self.describe(criu, &members).await?;
        own.bytes = super::free_bytes(&self.folders.checkpoints)?;
        for container in members.values() {
            own.bytes = own
                .bytes
                .min(super::free_bytes(&container.layers()?.upper)?);
        }
        if let Some((_, pid)) = self.sandbox() {
            own.addresses = super::addresses_of(pid)?;
        }
        Ok(own)
    }

    /// Takes all in, up to where every container runs.
    async fn take(
        &self,
        wire: &mut Wire,
        members: &Members,
        criu: &Criu,
        scratch: &Path,
    ) -> Result<Arrival> {
        for container in members.values() {
            container.unmount_for_arrival()?;
        }
        let given = self.take_in(wire, members, scratch).await;
        for container in members.values() {
            container.remount()?;
        }
        let given = given?;
        // Of several, none runs before all are there: one that cannot be restored must not
        // have been preceded by others that did something.
        let hold = members.len() > 1;
        let mut processes = Vec::new();
        for (name, container) in members {
            let nothing = Unread::default();
            let unread = given.unread.get(name).unwrap_or(&nothing);
            let dir = scratch.join(name);
            let pid = container
                .restore(criu, &dir, unread, given.tcp_established, hold)
                .await?;
            processes.push((ProcessId::init(container.id()), pid));
        }
        if hold {
            for container in members.values() {
                container.release().await?;
            }
        }
        if let Some((id, pid)) = self.sandbox() {
            processes.push((ProcessId::init(id), pid));
        }
        Ok(Arrival {
            pod: given.pod,
            processes,
        })
    }

    async fn take_in(&self, wire: &mut Wire, members: &Members, scratch: &Path) -> Result<Given> {
        loop {
            match wire.receive().await? {
                Message::Tree { place } => {
                    let receiver = receiver(&place, members, scratch)?;
                    receiver.receive(wire, |_| {}).await?;
                }
                Message::Commit {
                    pod,
                    tcp_established,
                    containers,
                } => return given(wire, pod, tcp_established, containers, members).await,
                other => return Err(other.unexpected("a tree or the commit")),
            }
        }
    }
}

async fn given(
    wire: &mut Wire,
    pod: u64,
    tcp_established: bool,
    containers: BTreeMap<String, Goes>,
    members: &Members,
) -> Result<Given> {
    if !containers.keys().eq(members.keys()) {
        return Err(broken("the commit is of other containers".into()));
    }
    let pod = wire.receive_blob(pod).await?;
    let mut unread = BTreeMap::new();
    for (name, goes) in containers {
        unread.insert(
            name,
            Unread {
                bytes: wire.receive_blob(goes.stdin).await?,
                closed: goes.stdin_closed,
            },
        );
    }
    match wire.receive().await? {
        Message::End => Ok(Given {
            pod,
            unread,
            tcp_established,
        }),
        other => Err(other.unexpected("the end of the commit")),
    }
}

/// Where a tree is to be put: nowhere but where the pod's own files are.
fn receiver(place: &Place, members: &Members, scratch: &Path) -> Result<Receiver> {
    let member = |name: &String| {
        members
            .get(name)
            .ok_or_else(|| broken(format!("files of {name:?}, which is no container here")))
    };
    match place {
        Place::Layer { container } => Receiver::new(&member(container)?.layers()?.upper),
        Place::Volume {
            container,
            destination,
        } => {
            let volumes = member(container)?.volumes()?;
            let volume = volumes
                .into_iter()
                .find(|(at, _, volume)| at == destination && *volume == Volume::Copied);
            match volume {
                Some((_, dir, _)) => Receiver::new(&dir),
                None => Err(broken(format!(
                    "files of {destination:?}, which is no volume of the pod's own"
                ))),
            }
        }
        Place::Images { container, set } => {
            member(container)?;
            check_name("set of images", set)?;
            let dir = scratch.join(container).join(set);
            std::fs::create_dir_all(&dir).context(|| format!("make {}", dir.display()))?;
            Receiver::new(&dir).map(Receiver::images)
        }
    }
}

/// Tells the outcome to a source that has not heard it, until it knows: as long as this
/// process lives, since a source that finds nobody runs the pod again.
async fn answer(mut listener: Listener, mut guest: Guest, outcome: Outcome, told: bool) {
    if told && matches!(guest.wire.receive().await, Ok(Message::Known)) {
        return;
    }
    let Guest { wire, attempt } = guest;
    drop(wire);
    log::warn!("the migration source may not know that the pod runs here; waiting for it to ask");
    loop {
        let (mut wire, hello) = listener.accept().await;
        match answer_one(&mut wire, hello, &attempt, &outcome).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => log::debug!("tell the outcome: {}", error.chain()),
        }
    }
}

/// Whether the source of this attempt knows now.
async fn answer_one(
    wire: &mut Wire,
    hello: Message,
    attempt: &str,
    outcome: &Outcome,
) -> Result<bool> {
    let talk = async {
        match &hello {
            Message::Hello {
                attempt: theirs,
                purpose: Purpose::Ask,
                ..
            } if theirs == attempt => {
                wire.send(&Message::Outcome(outcome.clone())).await?;
                Ok(wire.receive().await? == Message::Known)
            }
            Message::Hello { .. } => {
                let reason = "it has taken a pod in already".to_owned();
                wire.send(&Message::Refuse { reason }).await?;
                Ok(false)
            }
            _ => Err(hello.unexpected("hello")),
        }
    };
    timeout(GREETING, talk)
        .await
        .unwrap_or_else(|_| Err(broken("nothing came".into())))
}
