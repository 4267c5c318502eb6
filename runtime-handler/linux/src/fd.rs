//! Descriptors in the tokio reactor, and what can be asked of them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

/// Puts `fd`, which must be non-blocking, into the reactor of the current runtime.
///
/// # Errors
/// The descriptor cannot be polled, as a plain file.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    Ok(try_register(fd, interest)?)
}

/// As [`register`]; the error gives the descriptor back.
pub(crate) fn try_register(
    fd: OwnedFd,
    interest: Interest,
) -> Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: an OwnedFd always gives the same open descriptor until it is dropped, and
    // AsyncFd, which owns it from here on, takes it out of the reactor before that.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
}

/// Bytes that can be read from a pipe, FIFO or terminal; 0 also where the kernel does not
/// say (a terminal that nobody has open).
pub fn unread_bytes(fd: impl AsFd) -> u64 {
    rustix::io::ioctl_fionread(fd).unwrap_or(0)
}
