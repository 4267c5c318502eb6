//! The guest takes over the address, MAC, routes and MTU that CNI gave the pod.
//!
//! ```text
//!  pod's network namespace
//!   eth0 (CNI's) --ingress, redirect--> tap --> QEMU --> guest's eth0
//!        <--------redirect, ingress---- tap
//! ```
//! Redirection happens at ingress, before the namespace's own IP stack: the address stays
//! on eth0 for everybody who looks, but the kernel never answers for it. The namespace's
//! localhost is the guest's, see [`localhost`].

pub mod apply;
pub mod localhost;
pub mod plan;
