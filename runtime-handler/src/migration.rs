//! Moving a running pod to another node: the contract between the shim, which decides,
//! and a backend, which moves.
//!
//! ```text
//!   source                                        target (a pod with the annotation
//!   shim driver                                   `dyad.dev/migration-source`, Incoming)
//!      | check(parameters)      nothing moves        | receive()  waits
//!      | send(parameters, pod) =====================>|
//!      |    progress, progress …                     |
//!      |    cancel() | hurry()                       |
//!      v                                             v
//!   Ok(Moved): fenced, must never run here again   Arrival { pod, processes }
//!   Ok(Lost):  it runs nowhere, and that is told   Err: nothing came; it cleans up
//!   Err:       it runs here as before
//! ```
//! **Exactly one.** From `send`'s first step until its answer the backend alone knows
//! where the pod runs. `Err` promises that it runs here, `Moved` that it runs there.
//!
//! **Names.** A container is the same on both sides by its Kubernetes name
//! ([`crate::spec::ContainerSpec::name`]); ids differ. Who started it where, and how
//! often, travels as `pod`, which a backend carries without reading it.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;

use crate::config::annotation;
use crate::error::{Error, Result};
use crate::handler::ProcessId;
use crate::spec::PodInfo;

/// What to do when a migration has taken as long as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeoutAction {
    /// Give up; the pod goes on here.
    #[default]
    Abort,
    /// Run the pod on the target now, and fetch the rest of its memory from there.
    PostCopy,
    /// Stop the pod here, so that what is left can be copied.
    Pause,
}

/// How to end a migration that does not end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurry {
    /// As [`TimeoutAction::PostCopy`].
    PostCopy,
    /// As [`TimeoutAction::Pause`].
    Pause,
}

/// How a pod is to move. Checked for shape by the shim; what a kind cannot honour its
/// [`Migration::check`] refuses by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MigrationParameters {
    /// Where to. Machine: a libvirt URI (`qemu+tls://node2/system`). Container: the target
    /// shim's socket or address (`unix:///…/migration.sock`, `tls://host:port`).
    pub destination: String,
    /// Machine: where QEMU's memory stream goes (`tcp://192.0.2.7`, `unix:///…`); empty:
    /// libvirt chooses.
    pub migrate_uri: Option<String>,
    /// Machine: where the disks' contents go; empty: as the memory.
    pub disks_uri: Option<String>,
    /// Upper bound in MiB per second; 0: none.
    pub bandwidth_mib_s: u64,
    /// How long the pod may stand still at the switch.
    pub max_downtime: Option<Duration>,
    /// How long it may take until `timeout_action`.
    pub timeout: Option<Duration>,
    /// What then.
    pub timeout_action: TimeoutAction,
    /// Slow the pod down, more and more, when it changes memory faster than it is copied.
    pub auto_converge: bool,
    /// Connections for the memory; 0 and 1: one.
    pub parallel: u32,
    /// Refuse to send anything over a connection that is not encrypted.
    pub tls_required: bool,
    /// Allow a connection over a network that is not encrypted.
    pub allow_clear: bool,
    /// Container: take open TCP connections along, where the address moves too.
    pub tcp_established: bool,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stage {
    /// Looking for what forbids it; nothing has moved.
    #[default]
    Checking,
    /// Making ready on both sides.
    Preparing,
    /// The pod runs here; disks and memory are being copied.
    Copying,
    /// The pod stands still; the rest is being copied.
    Switching,
    /// The pod runs there; the rest of its memory is being fetched.
    PostCopy,
    /// Telling everybody, cleaning up.
    Finishing,
}

/// Figures of a migration under way; 0 where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MigrationProgress {
    /// How far it is.
    pub stage: Stage,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes to copy in all, as known now.
    pub bytes_total: u64,
    /// Bytes still to copy.
    pub bytes_remaining: u64,
    /// Bytes per second, now.
    pub rate: u64,
    /// Bytes per second that the pod changes.
    pub dirty_rate: u64,
    /// How long it would stand still if the rest was copied now.
    pub expected_downtime: Option<Duration>,
    /// How long it stood still.
    pub downtime: Option<Duration>,
}

/// How a `send` that took effect ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    /// It runs on the target.
    Moved,
    /// It runs on neither side, for this reason (post-copy, and a side or the network
    /// died): its memory is in two halves.
    Lost(String),
}

/// What came to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// As the source's shim gave it to [`Migration::send`].
    pub pod: Vec<u8>,
    /// The target's containers that run now, with their host pids, the sandbox among
    /// them. Of a container that had ended on the source an [`Exited`] event follows.
    ///
    /// [`Exited`]: crate::handler::Event::Exited
    pub processes: Vec<(ProcessId, u32)>,
}

/// A backend that can move its pod. The driver never has two of `check`, `send` under
/// way; `cancel` and `hurry` come while `send` is.
#[async_trait]
pub trait Migration: Send + Sync {
    /// Looks for everything that forbids it, before anything moves.
    ///
    /// # Errors
    /// The blocker by name, with the way out.
    async fn check(&self, parameters: &MigrationParameters) -> Result<()>;

    /// Moves the pod. `pod` is handed to the target's [`Arrival`].
    ///
    /// # Errors
    /// It runs here as before; the error says why it did not move.
    async fn send(
        &self,
        parameters: &MigrationParameters,
        pod: Vec<u8>,
        progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent>;

    /// Makes `send` give up; its own answer tells how that ended. Nothing under way:
    /// nothing happens.
    ///
    /// # Errors
    /// It cannot be given up any more.
    async fn cancel(&self) -> Result<()>;

    /// Brings `send` to an end.
    ///
    /// # Errors
    /// `FailedPrecondition` where this kind or this stage does not have it.
    async fn hurry(&self, how: Hurry) -> Result<()>;

    /// Target: waits, without a bound, for the source. Dropped when the pod is deleted.
    ///
    /// # Errors
    /// The source failed; the target has cleaned up, and never becomes a pod.
    async fn receive(&self) -> Result<Arrival>;
}

/// The pod that `pod` is to take over, where it is a target.
///
/// Backends make file and domain names of it, so it is nothing but a UUID.
///
/// # Errors
/// `InvalidArgument`: the annotation is no UUID.
pub fn source_of(pod: &PodInfo) -> Result<Option<Uuid>> {
    let name = annotation::MIGRATION_SOURCE;
    let Some(source) = pod.annotations.get(name) else {
        return Ok(None);
    };
    match Uuid::try_parse(source) {
        Ok(uuid) => Ok(Some(uuid)),
        Err(error) => Err(Error::InvalidArgument(format!(
            "annotation {name} {source:?}: {error}; name the source pod's uuid, as dyadctl state \
             tells it"
        ))),
    }
}

/// The containers of a target that have done their work on the source: its init containers,
/// by Kubernetes' name.
///
/// # Errors
/// `InvalidArgument`: the annotation is no list of names, or the pod waits for nobody.
pub fn done_on_source(pod: &PodInfo) -> Result<BTreeSet<String>> {
    let name = annotation::MIGRATION_INIT_CONTAINERS;
    let Some(list) = pod.annotations.get(name) else {
        return Ok(BTreeSet::new());
    };
    if source_of(pod)?.is_none() {
        return Err(Error::InvalidArgument(format!(
            "annotation {name} is for migration targets: set {} too, or remove it",
            annotation::MIGRATION_SOURCE
        )));
    }
    let done: BTreeSet<String> = list.split(',').map(|name| name.trim().to_owned()).collect();
    match done.iter().find(|name| !is_container_name(name)) {
        None => Ok(done),
        Some(bad) => Err(Error::InvalidArgument(format!(
            "annotation {name} {list:?}: {bad:?} is no container's name; names are separated by commas"
        ))),
    }
}

/// Kubernetes' rule for container names (a DNS label).
fn is_container_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotations: &[(&str, &str)]) -> PodInfo {
        PodInfo {
            annotations: annotations
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..PodInfo::default()
        }
    }

    const SOURCE: &str = "11111111-2222-5333-8444-555555555555";

    #[test]
    fn a_target_names_its_source_by_a_uuid_and_nothing_else() {
        assert_eq!(source_of(&pod(&[])).unwrap(), None);
        let named = |source| source_of(&pod(&[(annotation::MIGRATION_SOURCE, source)]));
        let bare = SOURCE.replace('-', "");
        for spelled in [SOURCE, &bare] {
            let uuid = named(spelled).unwrap().unwrap();
            assert_eq!(uuid.to_string(), SOURCE);
        }
        let up = "../../../var/lib/kubelet/plugins_registry/x";
        let (longer, cut) = (format!("{SOURCE}/x"), format!("{SOURCE}\0"));
        for bad in ["", ".", "..", "u", up, &longer, &cut] {
            let error = named(bad).unwrap_err().to_string();
            assert!(error.contains(annotation::MIGRATION_SOURCE), "{error}");
        }
    }

    #[test]
    fn a_target_names_its_init_containers() {
        let source = (annotation::MIGRATION_SOURCE, SOURCE);
        let named = |list| pod(&[source, (annotation::MIGRATION_INIT_CONTAINERS, list)]);
        assert!(done_on_source(&pod(&[source])).unwrap().is_empty());
        let done = done_on_source(&named("load, init-2")).unwrap();
        assert_eq!(done, ["load".to_owned(), "init-2".to_owned()].into());
        for bad in [
            "",
            ",",
            "a,,b",
            "A",
            "a b",
            "-a",
            "a-",
            "a/b",
            "é",
            "a\0",
            &"a".repeat(64),
        ] {
            let error = done_on_source(&named(bad)).unwrap_err().to_string();
            assert!(error.contains("no container's name"), "{error}");
        }
        let alone = pod(&[(annotation::MIGRATION_INIT_CONTAINERS, "a")]);
        let error = done_on_source(&alone).unwrap_err().to_string();
        assert!(error.contains(annotation::MIGRATION_SOURCE), "{error}");
    }
}
