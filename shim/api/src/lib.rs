//! `dyad.lifecycle.v1.Lifecycle`: what a shim can be asked beside containerd's Task API,
//! generated from `proto/lifecycle.proto`, which documents it; and what the shim reads of
//! CRI (`proto/cri.proto`).

#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks
)]

pub use protobuf;
pub use ttrpc;

include!(concat!(env!("OUT_DIR"), "/mod.rs"));
