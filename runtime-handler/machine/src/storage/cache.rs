//! Converted images on this host: each stays for as long as the layers that it was made of.
//!
//! containerd removes an image's layers when kubelet's garbage collection, or anybody else,
//! removes the image. Beside each image lies the list of its layers; one that is gone says
//! that nobody can ask for the image again. While a container uses it, containerd keeps them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::sweep::Swept;
use log::{info, warn};

/// The file name extension of an image: virt-aa-helper, which looks into disks for a domain's AppArmor
/// profile, may read those of a few names only.
pub const IMAGE: &str = "img";
/// Of one that is being converted.
pub const PARTIAL: &str = "partial";
/// Of the lock that its process holds.
pub const LOCK: &str = "lock";
const LAYERS: &str = "layers";

/// Notes of what the image is made; before it is there.
///
/// # Errors
/// The folder cannot be written.
pub fn note(image: &Path, layers: &[PathBuf]) -> Result<()> {
    let file = image.with_extension(LAYERS);
    let layers: BTreeSet<&PathBuf> = layers.iter().collect();
    let context = || format!("write {}", file.display());
    let text = serde_json::to_vec(&layers).context(context)?;
    write_atomically(&file, &text, PRIVATE)
}

/// Removes the images of `dir` that nobody can ask for again.
pub fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let list = entry.path();
        if list.extension().is_none_or(|extension| extension != LAYERS) {
            continue;
        }
        let image = list.with_extension(IMAGE);
        // The list comes first: an image may be on its way.
        if !image.exists() || !lacks_a_layer(&list) {
            continue;
        }
        info!("{}: its image is gone", image.display());
        for file in [&image, &list] {
            if let Err(error) = std::fs::remove_file(file) {
                warn!("remove {}: {error}", file.display());
            }
        }
    }
}

/// Removes what conversions of `dir` left whose process died: nobody has their locks. A lock's
/// file stays, for somebody may wait at it; the image's next conversion removes it.
pub fn sweep_unfinished(dir: &Path) -> Vec<Swept> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let partials = entries.map(|entry| entry.path()).filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == PARTIAL)
    });
    partials
        .filter_map(|partial| {
            // Whoever converts has it until the image is there.
            let Ok(Some(_owner)) = Owner::take(&partial.with_extension(LOCK)) else {
                return None;
            };
            let removed = match std::fs::remove_file(&partial) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
                removed => removed.context(|| "remove it".into()),
            };
            let what = format!("unfinished image {}", partial.display());
            Some(Swept::from_result(what, removed))
        })
        .collect()
}

/// A list that cannot be read says nothing.
fn lacks_a_layer(list: &Path) -> bool {
    let layers = std::fs::read(list)
        .ok()
        .and_then(|text| serde_json::from_slice::<BTreeSet<PathBuf>>(&text).ok())
        .unwrap_or_default();
    layers
        .iter()
        .any(|layer| matches!(layer.try_exists(), Ok(false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> BTreeSet<String> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn an_image_goes_with_the_first_of_its_layers() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, snapshots) = (temporary.path().join("images"), temporary.path().join("s"));
        let layer = |number: u32| snapshots.join(format!("{number}/fs"));
        for number in [1, 2, 3] {
            std::fs::create_dir_all(layer(number)).unwrap();
        }
        std::fs::create_dir(&dir).unwrap();
        for (key, layers) in [("a", vec![layer(1), layer(2)]), ("b", vec![layer(3)])] {
            let image = dir.join(format!("{key}.img"));
            note(&image, &layers).unwrap();
            std::fs::write(image, "").unwrap();
        }
        let all = names(&dir);
        sweep(&dir);
        assert_eq!(names(&dir), all);
        std::fs::remove_dir_all(snapshots.join("2")).unwrap();
        sweep(&dir);
        assert_eq!(names(&dir), ["b.img", "b.layers"].map(String::from).into());
    }

    #[test]
    fn an_unfinished_image_goes_unless_somebody_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["dead", "alive"] {
            std::fs::write(dir.path().join(name).with_extension(PARTIAL), "x").unwrap();
        }
        let _owner = Owner::take(&dir.path().join("alive.lock"))
            .unwrap()
            .unwrap();
        let swept = sweep_unfinished(dir.path());
        assert_eq!(swept.len(), 1, "{swept:?}");
        assert!(swept[0].what.ends_with("dead.partial"), "{swept:?}");
        assert!(!dir.path().join("dead.partial").exists());
        assert!(dir.path().join("alive.partial").exists());
    }

    #[test]
    fn what_is_not_understood_or_on_its_way_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, text) in [
            ("old.img", ""),
            ("damaged.img", ""),
            ("damaged.layers", "[\"/no/such"),
            ("odd.img", ""),
            ("odd.layers", "{\"layers\": 1}"),
            ("coming.layers", "[\"/no/such/layer\"]"),
            ("coming.partial", ""),
        ] {
            std::fs::write(at(name), text).unwrap();
        }
        let all = names(dir.path());
        sweep(dir.path());
        assert_eq!(names(dir.path()), all);
        sweep(&at("no-such-folder"));
    }
}
