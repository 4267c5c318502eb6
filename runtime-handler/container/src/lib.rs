//! Runs a pod as ordinary containers, by an OCI runtime (runc, crun).
//!
//! ```text
//! Containers (RuntimeHandler) --create--> Container (Instance): init, execs, pumps
//!      |                                     |
//!    choose: which OCI runtime            runtime: the only module that runs it
//!                                            |
//!                                         command: its argv and its errors (pure)
//!    migration: checkpoint, copy and restore on another node
//! ```
//!
//! A pod without a pause container is held by a process of our own ([`hold`]).
//!
//! Whatever the kernel does as well without the OCI runtime's process being started
//! for it (signals, pids, stats, OOM events), is done directly.

mod checkpoint;
mod choose;
mod command;
mod console;
mod container;
mod facts;
mod handler;
pub mod hold;
mod idmap;
mod left;
mod migration;
mod process;
mod rootfs;
mod runtime;
mod sweep;
pub mod tls;

pub use choose::{check, features};
pub use handler::{Containers, Folders};
pub use migration::socket_path;
pub use sweep::{is_wanted as is_sweep_wanted, sweep};
