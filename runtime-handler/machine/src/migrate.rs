//! A machine that moves to another node: live, by the two libvirts alone.
//!
//! ```text
//!  target's shim             target's libvirt          source's libvirt      source's shim
//!   define, inactive ------> domain M + offer                                     |
//!   offer each container --> metadata             <------- read the offer -- check|
//!        |                                                                        |
//!        |                        |<== peer to peer: disks, memory ===| <--- migrate
//!   wire tap, cgroup <- STARTED --|                                   |           |
//!   read the record <-- RESUMED --|                          QEMU has ended -> let go of the
//!        |                        |<--------- hand-over: where each stream stands -- link
//!   connect to the agent, go on from there                                        v
//!                                                                              Moved
//! ```
//! What the two shims tell each other is metadata of the domain: the *offer* (target to
//! source, in the waiting definition), the *record* (source to target, in the definition
//! that libvirt starts over there) and the *hand-over* (source to target, afterwards: only
//! then is it known which bytes of output are on disk here).
//!
//! Here is what is decided; `machine::leaving` and `machine::arriving` do it.

mod emulation;
pub mod offer;
mod transport;
pub mod whereabouts;
pub mod xml;

pub use emulation::{blocker as emulation_blocker, older_qemu};
pub use transport::{Streams, check_destination, streams};
