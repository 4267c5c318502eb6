//! Takes away what migrations left whose shims died: the memory of pods, on disk.

use std::path::Path;

use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::sweep::Swept;

use crate::migration::{owner_lock, remove_all};

/// Removes every checkpoint below `cache_dir` that no live process works on.
pub fn sweep(cache_dir: &Path) -> Vec<Swept> {
    let entries = std::fs::read_dir(cache_dir.join("checkpoints"));
    let dirs = entries.into_iter().flatten().flatten();
    dirs.map(|entry| entry.path())
        .filter(|dir| dir.is_dir())
        .filter_map(|dir| {
            let lock = owner_lock(&dir);
            let Ok(Some(_owner)) = Owner::take(&lock) else {
                return None;
            };
            let removed = remove_all(&dir).and_then(|()| std::fs::remove_file(&lock));
            let removed = removed.context(|| "remove it".into());
            let what = format!("checkpoint {}", dir.display());
            Some(Swept::from_result(what, removed))
        })
        .collect()
}

/// Whether there is anything to look at: one look into a folder that mostly is not there.
pub fn is_wanted(cache_dir: &Path) -> bool {
    let entries = std::fs::read_dir(cache_dir.join("checkpoints"));
    entries.is_ok_and(|mut entries| entries.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_goes_unless_a_live_process_works_on_it() {
        let cache = tempfile::tempdir().unwrap();
        assert!(!is_wanted(cache.path()));
        let checkpoints = cache.path().join("checkpoints");
        for name in ["in-dead", "out-dead", "out-alive"] {
            std::fs::create_dir_all(checkpoints.join(name)).unwrap();
            std::fs::write(checkpoints.join(name).join("pages-1.img"), "secret").unwrap();
        }
        let alive = checkpoints.join("out-alive");
        let _owner = Owner::take(&owner_lock(&alive)).unwrap().unwrap();
        assert!(is_wanted(cache.path()));
        assert_eq!(sweep(cache.path()).len(), 2);
        let left: Vec<_> = std::fs::read_dir(&checkpoints)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        assert_eq!(left, [alive]);
        assert!(sweep(cache.path()).is_empty());
    }
}
