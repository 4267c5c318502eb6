//! A container's mounts, from the host's to the guest's.
//!
//! - [`roots`]: PURE: whose a path of the host is.
//! - [`plan`]: PURE: which mount becomes what.
//! - [`mounts`]: what lies behind a mount of the host.
//! - [`copy`]: reads what is to be copied in.
//! - [`sync`]: keeps copies as their originals change.

pub mod copy;
pub mod mounts;
pub mod plan;
pub mod roots;
pub mod sync;
