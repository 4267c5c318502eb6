//! What Linux gives, said once for the host and the guest: cgroups, child processes, owned
//! descriptors, the copying of stdio, files that outlive a crash and files that a pod can change.
//!
//! Both backends and the guest's init use it. It knows the contract's plain types (errors,
//! statistics, exits) and no trait of it.

pub mod cgroup;
pub mod fd;
pub mod files;
pub mod open_below;
pub mod outlet;
pub mod owner;
pub mod program;
pub mod pump;
pub mod reaper;
