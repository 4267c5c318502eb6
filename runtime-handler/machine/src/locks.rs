//! Locks that all shims of the host share: files that only root opens, so that nobody else can
//! hold up a machine, and waits that end.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::{Context, Error, Result};
use tokio::time::{Instant, sleep};

/// Their folder in the cache directory.
pub const DIR: &str = "boot";
/// Between two looks: flock(2) has no wait that ends.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Takes the first free one of the locks named `names` in `dir`, which is made where it is
/// missing, for root alone.
///
/// # Errors
/// `DeadlineExceeded` after `bound`; or a file cannot be made.
pub async fn take(dir: &Path, names: &[String], bound: Duration) -> Result<Owner> {
    private_dir(dir).context(|| format!("make {}", dir.display()))?;
    let deadline = Instant::now() + bound;
    loop {
        for name in names {
            let path = dir.join(name);
            if let Some(lock) = Owner::take(&path).context(|| format!("lock {}", path.display()))? {
                return Ok(lock);
            }
        }
        if Instant::now() >= deadline {
            return Err(Error::DeadlineExceeded(format!(
                "all locks in {} were held for {} s: see with `fuser` who holds them",
                dir.display(),
                bound.as_secs()
            )));
        }
        sleep(LOOK_AGAIN).await;
    }
}

fn private_dir(dir: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // It may be from a release that left it open to all.
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        let meta = std::fs::metadata(path).expect("metadata");
        meta.permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn a_lock_is_roots_alone_also_where_its_folder_was_open() {
        let dir = tempfile::tempdir().expect("dir");
        let locks = dir.path().join("boot");
        std::fs::create_dir(&locks).expect("dir");
        std::fs::set_permissions(&locks, Permissions::from_mode(0o755)).expect("mode");
        let names = ["0.lock".to_owned()];
        let _held = take(&locks, &names, Duration::ZERO).await.expect("lock");
        assert_eq!(mode(&locks), 0o700);
        assert_eq!(mode(&locks.join("0.lock")), 0o600);
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_ends_and_says_where() {
        let dir = tempfile::tempdir().expect("dir");
        let names = ["0.lock".to_owned()];
        let bound = Duration::from_secs(60);
        let _held = take(dir.path(), &names, bound).await.expect("lock");
        let error = take(dir.path(), &names, bound).await.expect_err("held");
        assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");
        assert!(error.to_string().contains("60 s"), "{error}");
    }

    #[tokio::test]
    async fn a_link_in_a_locks_place_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("0.lock")).expect("link");
        let names = ["0.lock".to_owned()];
        take(dir.path(), &names, Duration::ZERO)
            .await
            .expect_err("a link");
    }
}
