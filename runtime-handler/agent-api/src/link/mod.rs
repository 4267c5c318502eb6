//! Calls and byte streams over one channel that may break at any byte.
//!
//! ```text
//!        host process                                        guest agent
//!  Client::call ---- REQUEST(id) -----------------------------> dispatch, once per id
//!        ^ <-------- RESPONSE(id) -- kept until ANSWERED(id) -- answer
//!  OutputReader <--- DATA(key, offset) ------------------------ OutputSink  (ring)
//!        | ack ----- ACK(key, offset, window) ----------------> frees the ring
//!  InputWriter ----- DATA(key, offset) -----------------------> InputSource
//!               <--- ACK(key, offset, window) ----------------- room again
//!
//!                    a connection, seen from the host
//!   Down --connected--> Greeting --HELLO_ACK of this greeting--> Live
//!     ^                   | ^ HELLO again while unanswered          |
//!     |                   | +-- RESYNC, bad frame, missing bytes ---+
//!     +---- channel ended +-----------------------------------------+
//! ```
//!
//! **HELLO is the only way back in step.** It tells the guest who asks (`session`) and
//! which calls are still open. With its answer both sides forget what they had sent on
//! the channel before: the host repeats its open calls, and each receiver of a stream
//! tells from which offset it wants it. So whatever the channel lost, cut or garbled,
//! is sent again, and what arrives twice is known by its id or offset.
//!
//! **Same session** (the channel broke, the host process lives): calls go on; a call
//! that the guest has done, or still does, is not done again. **New session** (another
//! host process: migration, a shim that came back): answers for the old one are
//! dropped; streams stay as they are, with all bytes that were not acknowledged.
//! **New boot id**: the guest forgot everything; open calls and streams fail.
//!
//! **Backpressure.** A stream keeps at most [`OUTPUT_CAPACITY`] unacknowledged bytes;
//! then its writer waits, so the agent stops reading the process's pipe.
//!
//! # The calls
//! `dyad.agent.v1.Sandbox` (`proto/agent.proto`) and `containerd.task.v3.Task`, of
//! which these fields carry what containerd does not:
//! - `CreateTaskRequest`: `options` is an `Any` with `dyad.agent.v1.CreateOptions`;
//!   `bundle` and `rootfs` are empty. `stdin`, `stdout`, `stderr` are not paths but
//!   marks: not empty means that the stream is wanted. With `terminal` all output is
//!   on [`StdFd::Stdout`].
//! - `ExecProcessRequest`: the same marks; `spec.value` is the OCI process as JSON.
//! - The agent makes the streams before it answers `Create` or `Exec`, and removes
//!   them at `Delete`, so a host drains a process before it deletes it.
//! - `pid`s are the guest's.

mod connection;
mod frame;
pub mod guest;
pub mod host;
mod message;
pub mod port;
mod stream;
mod table;
pub mod vsock;

#[cfg(test)]
mod tests;

pub use frame::{Decoder, Frame, FrameError, MAX_ANSWER, MAX_CHUNK, MAX_ID, MAX_REQUEST, encode};
pub use table::{StreamError, StreamState};

/// What HELLO names; both sides must have the same.
pub const VERSION: u32 = 1;

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "dev.dyad.agent.0";

/// The vsock port on which the guest listens.
pub const VSOCK_PORT: u32 = 1024;

/// Unacknowledged bytes that one output stream keeps in the guest.
pub const OUTPUT_CAPACITY: usize = 256 << 10;

/// Bytes of one output stream under way to the host, at most.
pub const OUTPUT_WINDOW: u32 = 128 << 10;

/// Unacknowledged bytes that one input stream keeps on the host.
pub const INPUT_CAPACITY: usize = 128 << 10;

/// Bytes of one input stream that the guest takes before the process reads them.
pub const INPUT_WINDOW: u32 = 128 << 10;

/// Which of a process's standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StdFd {
    /// Host to guest.
    Stdin,
    /// Guest to host; with a terminal: all its output.
    Stdout,
    /// Guest to host.
    Stderr,
}

impl StdFd {
    /// The descriptor's number: 0, 1 or 2.
    pub fn number(self) -> u8 {
        match self {
            StdFd::Stdin => 0,
            StdFd::Stdout => 1,
            StdFd::Stderr => 2,
        }
    }

    /// The stream of descriptor 0, 1 or 2.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(StdFd::Stdin),
            1 => Some(StdFd::Stdout),
            2 => Some(StdFd::Stderr),
            _ => None,
        }
    }
}

/// Names a stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamKey {
    /// The container.
    pub container_id: String,
    /// The exec in it; `None`: its init process.
    pub exec_id: Option<String>,
    /// Which of the process's streams.
    pub fd: StdFd,
}

impl StreamKey {
    /// The stream `fd` of the container's init process, or of the exec in it.
    pub fn new(container_id: impl Into<String>, exec_id: Option<&str>, fd: StdFd) -> Self {
        Self {
            container_id: container_id.into(),
            exec_id: exec_id.map(str::to_owned),
            fd,
        }
    }
}

impl std::fmt::Display for StreamKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "fd {} of ", self.fd.number())?;
        if let Some(exec) = &self.exec_id {
            write!(f, "exec {exec} of ")?;
        }
        write!(f, "container {}", self.container_id)
    }
}
