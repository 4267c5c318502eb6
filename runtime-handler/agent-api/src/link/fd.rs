//! Descriptors in the tokio reactor.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Puts `fd`, which must be non-blocking, into the reactor of the current runtime.
///
/// # Errors
/// The descriptor cannot be polled, as a plain file.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always gives the same open descriptor until it is dropped,
    // and AsyncFd, which owns it from here on, takes it out of the reactor before that.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
