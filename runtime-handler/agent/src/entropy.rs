//! Randomness from the host: a guest that was restored from a saved one must not
//! draw the same numbers as its siblings.

use std::fs::File;
use std::os::fd::AsRawFd;

use dyad_runtime_handler::{Result, error::Context};
use nix::errno::Errno;

/// The pool's own limit is far below; more only costs time.
const MAX_BYTES: usize = 4096;

// linux/random.h
nix::ioctl_write_ptr_bad!(add_entropy, 0x4008_5203, RandPoolInfo);
nix::ioctl_none!(reseed, b'R', 7);

/// `struct rand_pool_info` with room for [`MAX_BYTES`].
#[repr(C)]
pub struct RandPoolInfo {
    entropy_bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; MAX_BYTES],
}

/// Mixes `bytes` into the kernel's pool, credits them in full, and makes the
/// generator start over from the pool.
///
/// # Errors
/// The kernel refused.
pub fn feed(bytes: &[u8]) -> Result<()> {
    let pool = File::options()
        .write(true)
        .open("/dev/urandom")
        .context(|| "open /dev/urandom".into())?;
    for chunk in bytes.chunks(MAX_BYTES) {
        let mut info = RandPoolInfo {
            entropy_bits: (chunk.len() * 8) as libc::c_int,
            length: chunk.len() as libc::c_int,
            bytes: [0; MAX_BYTES],
        };
        info.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: `info` is laid out as the call wants it, `length` lies within it,
        // and it lives until the call returns.
        unsafe { add_entropy(pool.as_raw_fd(), &info) }
            .context(|| "add the host's entropy".into())?;
    }
    // SAFETY: the call takes no argument.
    match unsafe { reseed(pool.as_raw_fd()) } {
        // Not seeded yet: there is nothing to start over.
        Ok(_) | Err(Errno::ENODATA) => Ok(()),
        Err(error) => Err(error).context(|| "reseed the kernel's generator".into()),
    }
}
