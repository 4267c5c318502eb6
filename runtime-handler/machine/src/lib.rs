//! Runs a pod as one libvirt machine with our agent in it.
//!
//! ```text
//! driver --> Machines (handler) --> Sandbox --> Machine --> libvirt, network, storage, cgroup
//!                               \-> Container -----^  \---> guest (agent client)
//! ```
//! Planning is pure and has golden files or tables: [`domain`], [`size`], [`spec`], [`events`],
//! `network::plan`, `storage::plan`, `volumes::plan`. Only [`libvirt`] knows
//! `virt`, only `network::apply` netlink, only [`guest`] the agent's messages.

pub mod accelerator;
mod cgroup;
pub mod check;
mod container;
pub mod domain;
pub mod events;
pub mod guest;
mod handler;
pub mod host;
mod kept;
pub mod libvirt;
mod locks;
mod machine;
pub mod migrate;
mod modules;
pub mod network;
pub mod record;
mod sandbox;
pub mod seccomp;
pub mod size;
pub mod slots;
pub mod spec;
mod stand_in;
pub mod storage;
mod sweep;
pub mod volumes;

pub use handler::{Machines, Paths, new};
pub use sweep::{is_wanted as is_sweep_wanted, sweep};
