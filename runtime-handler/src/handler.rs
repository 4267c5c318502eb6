//! The contract between the shim, which decides, and a backend, which does the work.
//!
//! ```text
//! shim driver --create--> RuntimeHandler --> Instance (one per container; the
//!      ^                                     Sandbox-role instance is the pod:
//!      |                                     the pause container, or the machine)
//!      +------------- Event (exits, OOM, machine changes), in order -------------+
//! ```
//!
//! **Who calls.** Only the sandbox driver. It never has two calls that change the
//! same instance under way at once, but calls on different instances, and reads
//! (`stats`, `pids`), run side by side. It asks only what its state machine allows.
//!
//! **Idempotence.** Every call may be repeated after a crash of the caller; asking
//! for what is already so succeeds.
//!
//! **Undoing.** A call that fails leaves nothing behind that it made.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::config::Kind;
use crate::error::{Error, Result};
use crate::migration::Migration;
use crate::spec::{Checkpoint, ContainerSpec, ExecSpec, Resources, Role};
use crate::stats::Stats;

/// Names a process: a container's init, or an exec in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// The exec; `None`: the container's init process.
    pub exec: Option<String>,
}

impl ProcessId {
    /// The init process of `container`.
    pub fn init(container: impl Into<String>) -> Self {
        Self {
            container: container.into(),
            exec: None,
        }
    }

    /// The exec `exec` of `container`.
    pub fn exec(container: impl Into<String>, exec: impl Into<String>) -> Self {
        Self {
            container: container.into(),
            exec: Some(exec.into()),
        }
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal number.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// A change that the backend saw, asked for or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process ended; sent exactly once per start.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// The kernel killed a process of the container for memory.
    OutOfMemory {
        /// The container's id.
        container: String,
    },
    /// The machine of the pod changed (machine kind).
    Machine(MachineEvent),
}

/// What libvirt or the guest told of the pod's machine. Power-off of any kind, also by
/// [`Instance::stop`], is told as [`Event::Exited`] of the sandbox's init process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineEvent {
    /// The vCPUs were stopped (`virsh suspend`, or our pause).
    Suspended,
    /// The vCPUs run again.
    Resumed,
    /// The guest rebooted, or was reset.
    Rebooted,
    /// The guest's OS crashed.
    Crashed,
}

/// Where a backend sends its [`Event`]s: the driver's queue.
pub type EventSender = mpsc::UnboundedSender<Event>;

/// What identifies a container whose creator is gone, for [`RuntimeHandler::cleanup`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRef {
    /// The container's id.
    pub id: String,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// Its pod's sandbox id.
    pub sandbox_id: String,
    /// What it was in its pod.
    pub role: Role,
    /// The OCI bundle directory.
    pub bundle: PathBuf,
}

/// What people are told of a pod's machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineInfo {
    /// The domain's uuid.
    pub uuid: String,
    /// The domain's name.
    pub domain: String,
    /// The libvirt connection it lives in.
    pub libvirt_uri: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// vCPUs now.
    pub vcpus: u32,
    /// Memory now.
    pub memory_bytes: u64,
    /// `uname -r` in the guest; empty while unknown.
    pub kernel_release: String,
    /// What of the pod's wishes it cannot give, one sentence each.
    pub notes: Vec<String>,
}

/// Runs one pod.
#[async_trait]
pub trait RuntimeHandler: Send + Sync {
    /// What it runs.
    fn kind(&self) -> Kind;

    /// Creates a container, ready to [`Instance::start`]. The pod's
    /// [`Role::Sandbox`] comes first.
    ///
    /// # Errors
    /// `InvalidArgument` for a spec this kind cannot honour, naming the field;
    /// `AlreadyExists`; `FailedPrecondition` where the host lacks something.
    async fn create(&self, spec: ContainerSpec) -> Result<Arc<dyn Instance>>;

    /// Removes all that a container left, known only by name, because the process
    /// that made it is dead. Idempotent, bounded to a few seconds.
    ///
    /// # Errors
    /// What could not be removed.
    async fn cleanup(&self, container: &ContainerRef) -> Result<()>;

    /// The pod's machine, from memory; `None` where there is none.
    fn machine(&self) -> Option<MachineInfo> {
        None
    }

    /// The machine's serial console: one descriptor, read and written, for one client
    /// at a time; closing it detaches.
    ///
    /// # Errors
    /// `FailedPrecondition` where there is no console, or somebody has it.
    async fn console(&self) -> Result<OwnedFd> {
        Err(Error::FailedPrecondition(
            "this pod has no machine, so no serial console: exec into a container instead".into(),
        ))
    }

    /// What is still to be done when the pod is deleted and nobody is served any more: the
    /// process ends when it returns. Bounded to about a minute.
    async fn afterwards(&self) {}

    /// What moves the pod to another node, or takes one in: a capability, so a value and
    /// never a stub.
    ///
    /// # Errors
    /// `Unimplemented`, `FailedPrecondition`: this kind, or this host, has none; says why.
    fn migration(&self) -> Result<&dyn Migration> {
        Err(Error::Unimplemented(format!(
            "migration of a pod of kind {} is not there",
            self.kind()
        )))
    }
}

/// One container of a pod, or the pod itself.
///
/// Methods that take `exec: Option<&str>` mean the init process with `None`.
#[async_trait]
pub trait Instance: Send + Sync {
    /// Runs the init process (machine: power on and wait for its agent). After it
    /// ended by [`Instance::stop`], runs it again: same bundle, same disks, new `stdio`
    /// duplicates where given. Returns the host pid (machine: QEMU's).
    ///
    /// # Errors
    /// The process could not be run; then no [`Event::Exited`] follows.
    async fn start(&self, stdio: Option<crate::spec::Stdio>) -> Result<u32>;

    /// Host pid of the init process, once created.
    fn pid(&self) -> Option<u32>;

    /// Sends `signal`; `all`: to every process of the container.
    ///
    /// # Errors
    /// `NotFound` when the process has ended.
    async fn signal(&self, exec: Option<&str>, signal: i32, all: bool) -> Result<()>;

    /// Ends the init process but keeps all else, so that [`Instance::start`] works
    /// again: container: SIGTERM (or the image's stop signal), `grace`, SIGKILL;
    /// machine: agent, then ACPI, `grace`, power off. Returns when it has ended;
    /// [`Event::Exited`] is sent as for any end. One that waits for its migration source has no
    /// process: from here on nothing comes to it, and no event is sent.
    ///
    /// # Errors
    /// It could not be ended.
    async fn stop(&self, grace: Duration) -> Result<()>;

    /// How it restarts without an end of its own; `None`: by [`Instance::stop`] and
    /// [`Instance::start`].
    fn reboot(&self) -> Option<&dyn Reboot> {
        None
    }

    /// Freezes it (cgroup freezer; machine: vCPUs).
    ///
    /// # Errors
    /// The freezer or libvirt refused.
    async fn pause(&self) -> Result<()>;

    /// Undoes [`Instance::pause`].
    ///
    /// # Errors
    /// The freezer or libvirt refused.
    async fn resume(&self) -> Result<()>;

    /// Adds a process, ready to [`Instance::start_exec`].
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidArgument` for a process it cannot honour.
    async fn exec(&self, spec: ExecSpec) -> Result<()>;

    /// Runs the added process; returns its host pid.
    ///
    /// # Errors
    /// The process could not be run; then no [`Event::Exited`] follows.
    async fn start_exec(&self, exec_id: &str) -> Result<u32>;

    /// Forgets an exec that ended or never started, after its output is drained.
    ///
    /// # Errors
    /// `NotFound`.
    async fn delete_exec(&self, exec_id: &str) -> Result<()>;

    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// `FailedPrecondition` where the process has no terminal.
    async fn resize(&self, exec: Option<&str>, width: u16, height: u16) -> Result<()>;

    /// Hands over what stdin still holds, then closes the process's end.
    ///
    /// # Errors
    /// `NotFound`.
    async fn close_stdin(&self, exec: Option<&str>) -> Result<()>;

    /// Processes in it, with the exec that each belongs to where known. Container:
    /// host pids. Machine: QEMU's pid.
    ///
    /// # Errors
    /// The cgroup or the guest could not be asked.
    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>>;

    /// Resource usage now.
    ///
    /// # Errors
    /// The cgroup or the guest could not be read.
    async fn stats(&self) -> Result<Stats>;

    /// Applies new limits.
    ///
    /// # Errors
    /// `InvalidArgument` for a size that cannot be reached, naming the bounds.
    async fn update(&self, resources: &Resources) -> Result<()>;

    /// Writes it down, for [`ContainerSpec::checkpoint`] of another.
    ///
    /// # Errors
    /// `Unimplemented`: this kind cannot; what cannot be written down, by name.
    async fn checkpoint(&self, _to: &Checkpoint) -> Result<()> {
        Err(Error::Unimplemented(
            "checkpoint: only containers of kind container can be checkpointed, by CRIU; processes in a machine are its guest's, and move with it (dyadctl migrate)".into(),
        ))
    }

    /// Drains output (bounded), then removes everything that `create` made.
    /// Idempotent.
    ///
    /// # Errors
    /// What could not be removed.
    async fn delete(&self) -> Result<()>;
}

/// A machine that boots anew inside the same virtual hardware.
#[async_trait]
pub trait Reboot: Send + Sync {
    /// Ends all that runs in it (SIGTERM, `grace`, SIGKILL; with `force`: resets it at
    /// once) and boots it again; returns its host pid when its guest serves. What ran in it
    /// is told as [`Event::Exited`]; its own init process is not, unless it does not come
    /// up again: then it is powered off.
    ///
    /// # Errors
    /// It could not be told to reboot, and runs on; or it did not come up, and is off.
    async fn reboot(&self, force: bool, grace: Duration) -> Result<u32>;
}
