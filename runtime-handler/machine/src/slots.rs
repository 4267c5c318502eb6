//! Bounds how many machines boot at once on this host.
//!
//! Booting is CPU time: twenty at once on two CPUs each wait for all. A slot is a file
//! lock, so that all shims of the host share the bound and a shim that dies lets go.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The right to boot; let go when dropped.
#[derive(Debug)]
pub struct Slot {
    _lock: Flock<std::fs::File>,
}

/// Waits for one of `count` slots in `dir`.
///
/// # Errors
/// The directory cannot be written.
pub async fn take(dir: PathBuf, count: usize) -> Result<Slot> {
    tokio::task::spawn_blocking(move || take_blocking(&dir, count))
        .await
        .map_err(|error| Error::Unavailable(format!("wait for a boot slot: {error}"), None))?
}

fn take_blocking(dir: &Path, count: usize) -> Result<Slot> {
    std::fs::create_dir_all(dir).context(|| format!("create {}", dir.display()))?;
    let count = count.max(1);
    let first = std::process::id() as usize % count;
    for offset in 0..count {
        if let Some(slot) = try_lock(
            dir,
            (first + offset) % count,
            FlockArg::LockExclusiveNonblock,
        )? {
            return Ok(slot);
        }
    }
    // All taken: queue at one, spread by pid.
    loop {
        if let Some(slot) = try_lock(dir, first, FlockArg::LockExclusive)? {
            return Ok(slot);
        }
    }
}

fn try_lock(dir: &Path, number: usize, how: FlockArg) -> Result<Option<Slot>> {
    let path = dir.join(format!("{number}.lock"));
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(Slot { _lock: lock })),
        Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
        Err((_, errno)) => Err(Error::other(format!("lock {}", path.display()), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_third_waits_until_one_of_two_lets_go() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().to_owned();
        let first = take(path.clone(), 2).await.expect("slot");
        let second = take(path.clone(), 2).await.expect("slot");
        let mut third = tokio::spawn(take(path, 2));
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut third).await;
        assert!(early.is_err(), "taken while none was free");
        drop(first);
        drop(second);
        third.await.expect("join").expect("slot");
    }
}
