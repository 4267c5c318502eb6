//! What the host and the guest agent say to each other.
//!
//! [`proto`] has the messages; [`link`] carries them over one byte channel
//! that may break at any byte and go on elsewhere.

pub mod link;
pub mod stats;

pub use containerd_shim_protos as task_api;
pub use protobuf;
pub use ttrpc;

/// Messages and service of `proto/agent.proto`, generated.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}
