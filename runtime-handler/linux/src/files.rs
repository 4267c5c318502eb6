//! Files that outlive a crash, and folders that only root may enter.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use dyad_runtime_handler::error::{Context as _, Result};

/// Only the owner reads and writes.
pub const PRIVATE: u32 = 0o600;

/// Replaces the file at `path` by `content`: a reader, also one after a crash, sees the old
/// file or the new one and never a part. Several writers may do it at once; the last wins.
/// `mode` is cut by the umask.
///
/// # Errors
/// The folder cannot be written; an older file stays whole.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    replace(path, content, mode).context(|| format!("write {}", path.display()))
}

fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    // Another process or thread may be writing the same file.
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{}-{number}.new", std::process::id()));
    let temporary = path.with_file_name(temporary_name);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    sync_parent(path)
}

/// Renames a file, or a folder, so that it has its new name also after a loss of power.
///
/// # Errors
/// What `rename(2)` says, or the new folder cannot be written.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_parent(to)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

/// Makes a folder, and those above it, that only its owner may enter. One that exists keeps
/// its mode.
///
/// # Errors
/// It could not be made.
pub fn create_private_dir(folder: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .context(|| format!("create {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        write_atomically(&path, b"a longer text", 0o644).unwrap();
        write_atomically(&path, b"text", PRIVATE).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"text");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, PRIVATE, "the new file's mode counts");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn writers_at_once_do_not_mix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shared");
        let texts = [[b'a'; 9000], [b'b'; 9000]];
        std::thread::scope(|scope| {
            for text in &texts {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write_atomically(path, text, PRIVATE).unwrap();
                    }
                });
            }
        });
        let read = fs::read(&path).unwrap();
        assert!(texts.iter().any(|text| text[..] == read[..]));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_replaced_stays_and_no_temporary_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        write_atomically(&path, b"text", PRIVATE).unwrap_err();
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        write_atomically(Path::new("/"), b"text", PRIVATE).unwrap_err();
    }

    #[test]
    fn a_private_folder_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        create_private_dir(&path).unwrap();
        create_private_dir(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
