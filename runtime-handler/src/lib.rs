//! What a pod's runtime must do, whatever runs it.
//!
//! The shim speaks containerd and decides; a [`handler::RuntimeHandler`] does the
//! work. Two backends implement it, each a crate of its own below this folder,
//! neither knowing the other: `container/` (an OCI runtime) and `machine/` (a
//! libvirt domain with our agent in it). Nothing here knows a containerd type.

pub mod check;
pub mod config;
pub mod error;
pub mod handler;
pub mod identity;
pub mod migration;
pub mod spec;
pub mod stats;
pub mod sweep;

pub use error::{Error, Result};
