//! The layers of an image as one tree, for the thread that converts it.
//!
//! containerd sets the times of what a layer names. A folder that a layer needs and does not
//! name gets the time of its unpacking, another on each node; so does the root. Such a folder
//! is told by its time, which is not before the layer's own folder was made. It gets the time
//! of the newest of what is in it, so that an image is converted to the same bytes everywhere.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use dyad_runtime_handler::error::{Context, Result};
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

/// Merges the layers, topmost first, below `view`, and gives where. The mount namespace that
/// it makes for it ends with this thread, so that not even a crash leaves a mount behind;
/// changes go to memory and end with it too.
///
/// # Errors
/// The kernel refuses one of the mounts.
pub fn merge(layers: &[PathBuf], view: &Path) -> Result<PathBuf> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
        .context(|| "make a mount namespace".into())?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context(|| "make mounts private".into())?;
    mount(Some("tmpfs"), view, Some("tmpfs"), MsFlags::empty(), none)
        .context(|| format!("mount a tmpfs on {}", view.display()))?;
    let [merged, upper, work] = ["merged", "upper", "work"].map(|name| view.join(name));
    for dir in [&merged, &upper, &work] {
        fs::create_dir(dir).context(|| format!("create {}", dir.display()))?;
    }
    overlay(layers, &merged, &upper, &work)?;
    Ok(merged)
}

/// Mount options are limited to a page, so long lists are named relative to their common parent.
fn overlay(layers: &[PathBuf], merged: &Path, upper: &Path, work: &Path) -> Result<()> {
    let mut names = joined(layers);
    let back = std::env::current_dir().ok();
    if names.len() > 3500 {
        let parent = common_parent(layers);
        std::env::set_current_dir(&parent).context(|| format!("change to {}", parent.display()))?;
        let relative: Vec<PathBuf> = layers
            .iter()
            .map(|layer| layer.strip_prefix(&parent).unwrap_or(layer).to_owned())
            .collect();
        names = joined(&relative);
    }
    let mut options = OsString::from("lowerdir=");
    options.push(names);
    for (key, dir) in [("upperdir", upper), ("workdir", work)] {
        options.push(format!(",{key}="));
        options.push(joined(&[dir.to_owned()]));
    }
    let mounted = mount(
        Some("overlay"),
        merged,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_os_str()),
    )
    .context(|| format!("merge {} layers", layers.len()));
    if let Some(back) = back {
        let _ = std::env::set_current_dir(back);
    }
    mounted
}

fn joined(layers: &[PathBuf]) -> OsString {
    let names: Vec<String> = layers
        .iter()
        .map(|layer| {
            let name = layer.to_string_lossy();
            name.replace('\\', r"\\").replace(':', r"\:")
        })
        .collect();
    names.join(":").into()
}

fn common_parent(layers: &[PathBuf]) -> PathBuf {
    let mut parent = layers[0].parent().unwrap_or(Path::new("/")).to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&parent)) && parent.pop() {}
    parent
}

/// Seconds and nanoseconds since 1970.
type Time = (i64, i64);

fn changed(meta: &Metadata) -> Time {
    (meta.mtime(), meta.mtime_nsec())
}

/// Gives each folder of the merged tree that no layer names the time of what is in it.
///
/// # Errors
/// The tree cannot be walked.
pub fn settle_times(merged: &Path, layers: &[PathBuf]) -> Result<()> {
    let born: Vec<(&PathBuf, Time)> = layers
        .iter()
        .filter_map(|layer| Some((layer, time(fs::metadata(layer).ok()?.created().ok()?))))
        .collect();
    let Some(earliest) = born.iter().map(|(_, born)| *born).min() else {
        // A file system that keeps no such times: they stay as they are.
        return Ok(());
    };
    let is_unpacking_s = |way: &Path, at: Time| {
        at >= earliest
            && born
                .iter()
                .find(|(layer, _)| fs::symlink_metadata(layer.join(way)).is_ok())
                .is_some_and(|(_, born)| at >= *born)
    };
    settle(merged, Path::new(""), &is_unpacking_s)
        .map(drop)
        .context(|| format!("settle the times of {}", merged.display()))
}

/// The folder's time then.
fn settle(
    folder: &Path,
    way: &Path,
    is_unpacking_s: &impl Fn(&Path, Time) -> bool,
) -> std::io::Result<Time> {
    let own = changed(&fs::symlink_metadata(folder)?);
    let undecided = is_unpacking_s(way, own);
    let mut newest = (0, 0);
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let at = if entry.file_type()?.is_dir() {
            settle(&entry.path(), &way.join(entry.file_name()), is_unpacking_s)?
        } else if undecided {
            changed(&fs::symlink_metadata(entry.path())?)
        } else {
            continue;
        };
        newest = newest.max(at);
    }
    if !undecided {
        return Ok(own);
    }
    let at = TimeSpec::new(newest.0, newest.1);
    utimensat(AT_FDCWD, folder, &at, &at, UtimensatFlags::NoFollowSymlink)?;
    Ok(newest)
}

fn time(at: SystemTime) -> Time {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    (seconds, i64::from(since.subsec_nanos()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_parent_is_found() {
        let layers = ["/s/1/fs", "/s/2/fs"].map(PathBuf::from);
        assert_eq!(common_parent(&layers), Path::new("/s"));
        let apart = ["/a/1", "/b/1"].map(PathBuf::from);
        assert_eq!(common_parent(&apart), Path::new("/"));
    }

    fn touch(path: &Path, seconds: i64) {
        let at = TimeSpec::new(seconds, 5);
        utimensat(AT_FDCWD, path, &at, &at, UtimensatFlags::NoFollowSymlink).expect("touch");
    }

    #[test]
    fn only_folders_that_no_layer_names_get_the_time_of_what_is_in_them() {
        let layer = tempfile::tempdir().expect("dir");
        let at = |path: &str| layer.path().join(path);
        for dir in ["usr/lib/deep", "named", "empty"] {
            fs::create_dir_all(at(dir)).expect("dir");
        }
        for (file, seconds) in [
            ("usr/lib/deep/a", 1_000),
            ("usr/b", 2_000),
            ("named/c", 3_000),
        ] {
            fs::write(at(file), "").expect("file");
            touch(&at(file), seconds);
        }
        touch(&at("named"), 500);
        let layers = [layer.path().to_owned()];
        settle_times(layer.path(), &layers).expect("settled");
        let of = |path: &str| changed(&fs::symlink_metadata(at(path)).expect("there"));
        for (path, seconds) in [
            ("usr/lib/deep", 1_000),
            ("usr/lib", 1_000),
            ("usr", 2_000),
            ("named", 500),
            ("named/c", 3_000),
            ("", 2_000),
        ] {
            assert_eq!(of(path), (seconds, 5), "{path}");
        }
        assert_eq!(of("empty"), (0, 0));
    }
}
