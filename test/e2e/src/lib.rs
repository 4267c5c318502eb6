//! What the end-to-end tests and the benchmark share: a private environment
//! (`hack/up`), a typed crictl, bounded waiting, and snapshots of the host.
#![forbid(unsafe_code)]

pub mod check;
pub mod cluster;
pub mod command;
pub mod crictl;
pub mod env;
pub mod forward;
pub mod host;
pub mod logs;
pub mod nodes;
pub mod pki;
pub mod wait;
