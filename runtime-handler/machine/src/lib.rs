//! Runs a pod as one libvirt machine with our agent in it.

mod cgroup;
pub mod domain;
pub mod events;
pub mod libvirt;
pub mod network;
pub mod seccomp;
pub mod size;
pub mod storage;
