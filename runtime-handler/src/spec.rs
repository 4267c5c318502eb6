//! What a backend is asked to run: checked, kind-neutral specs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxResources, Process, Spec};

/// A filesystem to mount, as the snapshotter describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootMount {
    /// Filesystem type (`overlay`, `bind`, `erofs` …).
    pub fstype: String,
    /// Device or directory.
    pub source: String,
    /// Mount options (`lowerdir=…`, `ro` …).
    pub options: Vec<String>,
}

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The pod itself: the pause container, or the machine.
    Sandbox,
    /// A container in the pod.
    Container,
}

/// The pod that a container belongs to, from CRI's annotations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodInfo {
    /// Sandbox id; for a task outside CRI, the task's own id.
    pub sandbox_id: String,
    /// Kubernetes namespace, or empty outside CRI.
    pub namespace: String,
    /// Pod name, or empty outside CRI.
    pub name: String,
    /// Pod UID, or empty outside CRI.
    pub uid: String,
    /// `dyad.dev/*` annotations that the configuration allows.
    pub annotations: BTreeMap<String, String>,
    /// Of the sandbox: what its containers ask for in all.
    pub size: PodSize,
}

/// What a pod's containers ask for in all, as CRI tells it with the sandbox
/// (`LinuxContainerResources`): kubelet's sums over the containers, in the kernel's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodSize {
    /// CFS period, microseconds.
    pub cpu_period: i64,
    /// CFS quota, microseconds; not positive: no container has a limit.
    pub cpu_quota: i64,
    /// cgroup v1 shares, 1024 for a CPU that is requested; 2: nothing is.
    pub cpu_shares: i64,
    /// Bytes; not positive: no container has a limit.
    pub memory_limit: i64,
}

impl PodSize {
    /// The limits of those that have one, in thousandths of a CPU.
    pub fn cpu_limit_milli(&self) -> Option<u64> {
        match (self.cpu_quota, self.cpu_period) {
            (1.., 1..) => {
                let quota = self.cpu_quota.unsigned_abs();
                Some(quota.saturating_mul(1000) / self.cpu_period.unsigned_abs())
            }
            _ => None,
        }
    }

    /// The requests, in thousandths of a CPU.
    pub fn cpu_request_milli(&self) -> Option<u64> {
        // 2 is what CRI writes for "no request".
        (self.cpu_shares > 2).then(|| {
            self.cpu_shares
                .unsigned_abs()
                .saturating_mul(1000)
                .div_ceil(1024)
        })
    }

    /// For the pod's cgroup.
    pub fn cpu_shares(&self) -> Option<u64> {
        (self.cpu_shares > 0).then_some(self.cpu_shares.unsigned_abs())
    }

    /// The limits of those that have one, in bytes.
    pub fn memory_limit(&self) -> Option<u64> {
        (self.memory_limit > 0).then_some(self.memory_limit.unsigned_abs())
    }
}

/// The open ends of a process's stdio on the host side. The shim owns the FIFOs
/// and hands out duplicates, so that a process can be started again on the same ones.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Read by the backend, bytes for the process's stdin.
    pub stdin: Option<OwnedFd>,
    /// Written by the backend.
    pub stdout: Option<OwnedFd>,
    /// Written by the backend; unused with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The process gets a pseudo-terminal; its output goes to `stdout`.
    pub terminal: bool,
}

/// A container to create.
#[derive(Debug)]
pub struct ContainerSpec {
    /// The container's id.
    pub id: String,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// Kubernetes' name of the container; empty for the sandbox and outside CRI.
    pub name: String,
    /// What it is in its pod.
    pub role: Role,
    /// Its pod.
    pub pod: PodInfo,
    /// The OCI bundle directory.
    pub bundle: PathBuf,
    /// To be mounted on `rootfs` in the bundle, in this order; empty: already there.
    pub rootfs: Vec<RootMount>,
    /// The OCI runtime spec, read from the bundle's `config.json`.
    pub oci: Spec,
    /// The init process's stdio.
    pub stdio: Stdio,
    /// It goes on from what [`Checkpoint::images`] was of another, when it is started.
    pub checkpoint: Option<PathBuf>,
}

/// How a container is written down.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// The folder for it, which belongs to the caller.
    pub images: PathBuf,
    /// The folder for logs; `None`: the backend's choice.
    pub work: Option<PathBuf>,
    /// The container ends; else it runs on.
    pub exit: bool,
    /// With its open TCP connections.
    pub tcp_established: bool,
    /// With UNIX sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// With a terminal.
    pub terminal: bool,
    /// With its file locks.
    pub file_locks: bool,
    /// Namespaces that are to be empty in what is restored (`network`).
    pub empty_namespaces: Vec<String>,
    /// CRIU's `--manage-cgroups`; empty: cgroups are left to whoever restores.
    pub cgroups_mode: String,
}

/// A further process in a container.
#[derive(Debug)]
pub struct ExecSpec {
    /// Its id, unique in the container.
    pub exec_id: String,
    /// The OCI process.
    pub process: Process,
    /// Its stdio.
    pub stdio: Stdio,
}

/// New limits for a container or a pod.
#[derive(Debug, Clone)]
pub struct Resources {
    /// OCI resources; what is unset stays as it is.
    pub linux: LinuxResources,
    /// Annotations that came with the update.
    pub annotations: BTreeMap<String, String>,
}
