//! Bounds how many machines boot at once on this host.
//!
//! Booting is CPU time: twenty at once on two CPUs each wait for all. A slot is a file
//! lock, so that all shims of the host share the bound and a shim that dies lets go.

use std::path::PathBuf;
use std::time::Duration;

use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::{Context, Result};

use crate::locks;

/// Many pods of one node may start at once; kubelet gives up before this.
const PATIENCE: Duration = Duration::from_secs(600);

/// The right to boot; let go when dropped.
#[derive(Debug)]
pub struct Slot {
    _lock: Owner,
}

/// Waits for one of `count` slots in `dir`, ten minutes at most.
///
/// # Errors
/// None got free in time, or the directory cannot be written.
pub async fn take(dir: PathBuf, count: usize) -> Result<Slot> {
    let names: Vec<String> = (0..count.max(1))
        .map(|number| format!("{number}.lock"))
        .collect();
    let lock = locks::take(&dir, &names, PATIENCE).await;
    let lock = lock.context(|| "wait until fewer machines of this host boot".into())?;
    Ok(Slot { _lock: lock })
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
        let early = tokio::time::timeout(Duration::from_millis(50), &mut third).await;
        assert!(early.is_err(), "taken while none was free");
        drop(first);
        drop(second);
        third.await.expect("join").expect("slot");
    }
}
