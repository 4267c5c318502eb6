//! The configuration of both backends, as plain data.
//!
//! The shim's `config` module reads, merges and checks the files; these are the
//! sections it hands to a backend. Unknown keys are errors.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What runs a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Ordinary containers, run by an OCI runtime.
    #[default]
    Container,
    /// One libvirt machine for the pod.
    Machine,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Container => "container",
            Self::Machine => "machine",
        })
    }
}

/// The annotations that a pod may carry where the configuration allows them, by exact
/// name. Both kinds accept all of them, so that the same Pod runs as either; those of
/// migration mean the same for both, and the others have no effect on containers.
pub mod annotation {
    /// What the machine boots: `image`, the pod's images under our kernel and agent.
    pub const BOOT: &str = "dyad.dev/boot";
    /// Virtual size of the pod's writable disk, a Kubernetes quantity (`20Gi`).
    pub const DISK: &str = "dyad.dev/disk";
    /// Memory of the machine, a Kubernetes quantity (`512Mi`).
    pub const MEMORY: &str = "dyad.dev/memory";
    /// Of a migration target: its init containers, by name, comma-separated. Their work is in
    /// what comes from the source: they end with 0 without running.
    pub const MIGRATION_INIT_CONTAINERS: &str = "dyad.dev/migration-init-containers";
    /// A migration target: the pod waits for the machine of this uuid instead of booting
    /// its own (container kind: for the pod of this identity, derived in the same way).
    pub const MIGRATION_SOURCE: &str = "dyad.dev/migration-source";
    /// vCPUs of the machine, a whole number.
    pub const VCPUS: &str = "dyad.dev/vcpus";
    /// All of them.
    pub const ALL: [&str; 6] = [
        BOOT,
        DISK,
        MEMORY,
        MIGRATION_INIT_CONTAINERS,
        MIGRATION_SOURCE,
        VCPUS,
    ];
}

/// Section `[container]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerConfig {
    /// The OCI runtime's binary; unset: the first of crun, runc on `PATH` whose
    /// `features` say that it can run this host's specs.
    pub runtime: Option<PathBuf>,
    /// Where the OCI runtime keeps its state, below it in a folder per containerd namespace
    /// (`runc --root`); unset: below the state directory, in a folder per pod.
    pub root: Option<PathBuf>,
    /// Have systemd make all cgroups; unset: those whose path is one of systemd's.
    pub systemd_cgroup: bool,
    /// Do without pivot_root(2), for a root file system in memory (`runc --no-pivot`).
    pub no_pivot_root: bool,
    /// Stay in the session keyring of the shim (`runc --no-new-keyring`).
    pub no_new_keyring: bool,
    /// Owner of the pipes that are stdio; 0 with [`Self::io_gid`] 0: the process's own user.
    pub io_uid: u32,
    /// See [`Self::io_uid`].
    pub io_gid: u32,
    /// CRIU's binary, named `criu`, which checkpoints and restores a pod that migrates;
    /// unset: `criu` on `PATH`.
    pub criu: Option<PathBuf>,
    /// Where CRIU keeps its log of a checkpoint or a restore; unset: in the bundle.
    pub criu_work: Option<PathBuf>,
    /// Where a pod that waits for its migration source listens on the network:
    /// `tls://ADDRESS:PORT`, or `tcp://ADDRESS:PORT` with [`Self::migration_clear`]; port
    /// 0: a free one. Unset: only on its unix socket.
    pub migration_listen: Option<String>,
    /// The folder with `ca.pem`, `cert.pem` and `key.pem`: what a peer's certificate must
    /// be signed by, and what this node shows.
    pub migration_tls: Option<PathBuf>,
    /// Allow migration over a network without encryption, where it is asked for.
    pub migration_clear: bool,
}

/// How the host talks to the guest agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// virtio-serial: every host has it, and nobody else on the host reaches it.
    #[default]
    Auto,
    /// A virtio-serial port on a unix socket.
    VirtioSerial,
    /// vhost-vsock.
    Vsock,
}

/// What executes guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where it really runs a guest (probed once), else TCG.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// Section `[machine]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineConfig {
    /// libvirt connection URI.
    pub libvirt_uri: String,
    /// Guest kernel: an ELF with a PVH entry (`vmlinux`), as `hack/guest` builds it.
    pub kernel: PathBuf,
    /// Guest initramfs with the agent as `/init`.
    pub initramfs: PathBuf,
    /// All modules of the guest's kernel, an EROFS image, as `hack/guest` builds it; unset:
    /// `modules.erofs` beside the initramfs, if it is there.
    pub modules: Option<PathBuf>,
    /// Appended to the guest kernel's command line.
    pub kernel_params: String,
    /// What executes guest code.
    pub accelerator: AcceleratorChoice,
    /// How the host talks to the guest agent.
    pub channel: Channel,
    /// vCPUs of a pod that sets no CPU limit.
    pub vcpus: u32,
    /// What the containers without a memory limit can use together.
    pub memory_mib: u64,
    /// What guest kernel and agent take beside the containers, without the 1/64 of the
    /// containers' memory that describes its pages.
    pub guest_overhead_mib: u64,
    /// vCPUs that a running machine can grow to; 0: the host's CPUs, at most 16.
    pub max_vcpus: u32,
    /// Memory that a running machine can grow to; 0: the host's.
    pub max_memory_mib: u64,
    /// kubelet's `--root-dir`; unset: its folders are told by the pod's uid alone.
    pub kubelet_root: Option<PathBuf>,
    /// containerd's `root`; unset, as [`Self::containerd_state`]: its folders are told by the
    /// ids of sandbox and container alone.
    pub containerd_root: Option<PathBuf>,
    /// containerd's `state`.
    pub containerd_state: Option<PathBuf>,
    /// Virtual size of the pod's sparse writable disk.
    pub disk_gib: u64,
    /// How long a machine may take from power-on to its agent's first answer.
    pub boot_timeout_s: u64,
    /// How long a machine that migrated keeps its source pod's addresses beside its own; 0:
    /// as long as it runs.
    pub source_address_s: u64,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            libvirt_uri: "qemu:///system".into(),
            kernel: "/var/lib/dyad/guest/vmlinux".into(),
            initramfs: "/var/lib/dyad/guest/initramfs.zst".into(),
            modules: None,
            kernel_params: String::new(),
            accelerator: AcceleratorChoice::default(),
            channel: Channel::default(),
            vcpus: 1,
            memory_mib: 256,
            guest_overhead_mib: 96,
            max_vcpus: 0,
            max_memory_mib: 0,
            kubelet_root: None,
            containerd_root: None,
            containerd_state: None,
            disk_gib: 10,
            boot_timeout_s: 60,
            source_address_s: 300,
        }
    }
}

impl MachineConfig {
    /// [`Self::boot_timeout_s`] as a duration.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_s)
    }
}
