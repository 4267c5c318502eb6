//! What holds a pod without a pause container: this very program in a tiny mode.
//!
//! ```text
//! shim --order--> maker: joins the cgroup and the network, makes the other namespaces,
//!                   |    the host name, sysctls, an empty root
//!                   `--> holder, PID 1 of the pod: gives up root file system and rights,
//!                        reaps, and ends when the shim does (its stdin) or is told to
//! ```
//! The maker ends once the holder runs, which so becomes the shim's own child. Nothing of
//! the host is in the holder's reach, for a pod with `shareProcessNamespace` may see and
//! trace it: its root holds its own executable, read-only, and it is nobody.

mod order;
mod program;
mod sandbox;

pub use program::{HOLD, MAKE, hold, make};
pub(crate) use sandbox::{Holder, cgroup_left};
