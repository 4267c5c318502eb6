//! A container's mounts, from the host's to the guest's.
//!
//! - [`plan`]: PURE: which mount becomes what.
//! - [`copy`]: reads what is to be copied in.
//! - [`sync`]: keeps copies as their originals change.

pub mod copy;
pub mod plan;
pub mod sync;
