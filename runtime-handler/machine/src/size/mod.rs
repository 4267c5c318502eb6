//! How big a pod's machine is: at create, as limits change, and when it arrives by
//! migration. Pure; docs/machine-size.md has the rules as a table.
//!
//! ```text
//! pod's size, annotations, configuration --create::plan--> Plan { Size, Basis }
//!                                                                  |
//! containers' limits --Ledger::with--> Ledger (travels with it) <--'
//!                                         '--target--> Reached
//! ```
//! - [`create`]: what the machine is made as.
//! - [`ledger`]: what it becomes as the limits of its containers change.
//! - [`plugged`]: what QEMU has plugged, read from libvirt.

pub mod create;
pub mod ledger;
pub mod plugged;

use serde::{Deserialize, Serialize};

pub use create::{Plan, plan};
pub use ledger::{Ledger, Limits};
pub use plugged::plugged_mib;

/// Below this, guest kernel and agent do not come up.
pub const MEMORY_MIN_MIB: u64 = 96;
/// virtio-mem gives and takes blocks of this size.
pub const BLOCK_MIB: u64 = 2;
/// The guest's kernel describes each page of 4 KiB by 64 bytes (`struct page`).
const PAGES_PER_DESCRIPTION: u64 = 4096 / 64;

/// How big the machine is, and may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs at power-on.
    pub vcpus: u32,
    /// vCPUs it can grow to.
    pub max_vcpus: u32,
    /// Memory at power-on.
    pub memory_mib: u64,
    /// Memory it can grow to.
    pub max_memory_mib: u64,
}

impl Size {
    /// How much virtio-mem can add, in MiB.
    pub fn pluggable_mib(&self) -> u64 {
        let room = self.max_memory_mib.saturating_sub(self.memory_mib);
        room - room % BLOCK_MIB
    }
}

/// How big a machine is, or is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// vCPUs that the guest runs.
    pub vcpus: u32,
    /// Of the memory that it booted with, what the balloon leaves.
    pub balloon_mib: u64,
    /// Plugged by virtio-mem.
    pub plugged_mib: u64,
}

impl Reached {
    /// As the machine boots.
    pub fn at_boot(size: &Size) -> Self {
        Self {
            vcpus: size.vcpus,
            balloon_mib: size.memory_mib,
            plugged_mib: 0,
        }
    }

    /// In all.
    pub fn memory_mib(&self) -> u64 {
        self.balloon_mib + self.plugged_mib
    }
}

/// What a machine was made for; `None`: that part does not follow its containers' limits,
/// because an annotation of the pod names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Basis {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<Asked>,
    /// Bytes.
    pub memory: Option<Asked>,
    /// What guest kernel and agent take beside the containers.
    pub overhead_mib: u64,
}

impl Basis {
    /// The machine in which containers can use so many bytes.
    pub fn machine_mib(&self, containers: u64) -> u64 {
        let mib = containers.div_ceil(1 << 20);
        let machine = mib + mib.div_ceil(PAGES_PER_DESCRIPTION) + self.overhead_mib;
        machine.max(MEMORY_MIN_MIB)
    }
}

/// One part of what a pod asks for, in that part's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The sum of the limits of its containers that have one; `None`: the pod does not say.
    pub limits: Option<u64>,
    /// What its containers without a limit have together.
    pub unlimited: u64,
}

impl Asked {
    /// Before any container is known.
    pub fn at_boot(&self) -> u64 {
        self.limits.unwrap_or(self.unlimited)
    }
}
