//! The containerd shim: speaks containerd, decides, and hands the work to a
//! [`dyad_runtime_handler::handler::RuntimeHandler`].
//!
//! ```text
//! containerd --exec--> bootstrap (start | delete | -info | -v)
//!                          | spawns, with the listening socket as its stdin
//!                          v
//! containerd --ttrpc--> rpc --> sandbox (handle -> driver, which asks state) --> dyn RuntimeHandler
//!     ^                            |
//!     +--------- events <----------+
//! ```
//!
//! The library knows neither backend: each of the two programs hands its own to
//! [`main`], so the process that serves a container pod never loads libvirt.
#![forbid(unsafe_code)]

mod backend;
mod bootstrap;
pub mod config;
mod events;
mod fence;
mod logger;
pub mod migration;
mod peers;
mod plain_pod;
pub mod pod;
mod pod_files;
mod pod_spec;
mod rpc;
mod server;
mod spec;
mod stdio;

pub use backend::{Backend, BackendContext, HandlerFuture, SweepFuture};
pub use bootstrap::main;
