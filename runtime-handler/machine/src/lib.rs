//! Runs a pod as one libvirt machine with our agent in it.

pub mod accelerator;
mod cgroup;
pub mod domain;
pub mod events;
pub mod guest;
pub mod host;
pub mod libvirt;
pub mod network;
pub mod record;
pub mod seccomp;
pub mod size;
pub mod slots;
pub mod spec;
pub mod storage;
pub mod volumes;
