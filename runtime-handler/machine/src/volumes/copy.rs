//! Reads what is to be copied into the guest.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dyad_agent_api::proto::agent::file::Content;
use dyad_agent_api::proto::agent::{File, Filesystem};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::mounts::Mounts;
use super::plan::{Copy, Host, How, Source};

/// ConfigMaps and Secrets hold 1 MiB at most; projected ones may gather a few.
const COPY_MAX_BYTES: u64 = 16 << 20;
/// Files and directories of one volume.
const COPY_MAX_FILES: usize = 4096;

/// The host itself.
pub struct ThisHost;

impl Host for ThisHost {
    fn look(&self, path: &Path) -> Source {
        look(path)
    }

    fn behind(&self, volumes: &Path, volume: &str, source: &Path) -> Option<PathBuf> {
        let mounts = Mounts::read().ok()?;
        // One folder for each kind of volume, and in it one for each volume.
        fs::read_dir(volumes).ok()?.flatten().find_map(|plugin| {
            let volume = plugin.path().join(volume);
            Some(volume.join(mounts.way_below(&volume, source)?))
        })
    }
}

fn look(path: &Path) -> Source {
    match fs::metadata(path) {
        Err(_) => Source::Missing,
        Ok(meta) if meta.is_file() => Source::File,
        Ok(meta) if meta.is_dir() => match statfs(path) {
            Ok(fs) if fs.filesystem_type() == TMPFS_MAGIC => Source::MemoryDirectory,
            _ => Source::Directory,
        },
        Ok(_) => Source::Special,
    }
}

/// The files of one copy, parents first, named as in the guest.
///
/// # Errors
/// It cannot be read, or is larger than a volume of its kind can be.
pub fn read(copy: &Copy) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut bytes = 0;
    // kubelet and containerd replace the file they name, so links are followed here.
    let meta = fs::metadata(&copy.host).context(|| reading(&copy.host))?;
    match copy.how {
        How::Tree | How::Seed => read_tree(&copy.host, &copy.guest, &mut files, &mut bytes)?,
        How::File => files.push(regular(&copy.host, &copy.guest, &meta, &mut bytes)?),
        How::Directory => files.push(entry(&copy.guest, &meta, Content::Directory(true))),
        How::Memory => {
            let memory = memory_like(&copy.host)?;
            files.push(entry(&copy.guest, &meta, Content::Filesystem(memory)));
        }
    }
    Ok(files)
}

/// A tmpfs with the size that kubelet gave the volume.
fn memory_like(host: &Path) -> Result<Filesystem> {
    let fs = statfs(host).context(|| reading(host))?;
    let bytes = fs.blocks().saturating_mul(fs.block_size().unsigned_abs());
    let mut options = vec!["nosuid".to_owned(), "nodev".to_owned()];
    if bytes > 0 {
        options.push(format!("size={bytes}"));
    }
    Ok(Filesystem {
        kind: "tmpfs".into(),
        options,
        ..Filesystem::default()
    })
}

fn reading(path: &Path) -> String {
    format!("read {} for the guest", path.display())
}

fn read_tree(host: &Path, guest: &Path, files: &mut Vec<File>, bytes: &mut u64) -> Result<()> {
    let meta = fs::symlink_metadata(host).context(|| reading(host))?;
    if files.len() >= COPY_MAX_FILES {
        return Err(Error::InvalidArgument(format!(
            "{}: more than {COPY_MAX_FILES} files; a volume that is copied into a machine cannot hold more",
            host.display()
        )));
    }
    let kind = meta.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(host).context(|| reading(host))?;
        files.push(entry(
            guest,
            &meta,
            Content::Symlink(target.to_string_lossy().into_owned()),
        ));
    } else if kind.is_dir() {
        files.push(entry(guest, &meta, Content::Directory(true)));
        let mut names: Vec<_> = fs::read_dir(host)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .context(|| reading(host))?
            .into_iter()
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        for name in names {
            read_tree(&host.join(&name), &guest.join(&name), files, bytes)?;
        }
    } else if kind.is_file() {
        files.push(regular(host, guest, &meta, bytes)?);
    }
    // Sockets and pipes have no content to copy.
    Ok(())
}

fn regular(host: &Path, guest: &Path, meta: &fs::Metadata, bytes: &mut u64) -> Result<File> {
    *bytes += meta.len();
    if *bytes > COPY_MAX_BYTES {
        return Err(Error::InvalidArgument(format!(
            "{}: more than {} MiB; what is copied into a machine cannot be larger",
            host.display(),
            COPY_MAX_BYTES >> 20
        )));
    }
    let data = fs::read(host).context(|| reading(host))?;
    Ok(entry(guest, meta, Content::Data(data)))
}

fn entry(guest: &Path, meta: &fs::Metadata, content: Content) -> File {
    File {
        path: guest.to_string_lossy().into_owned(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        content: Some(content),
        ..File::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_volume_is_read_with_its_links_and_modes() {
        let dir = tempfile::tempdir().expect("dir");
        let version = dir.path().join("..2026_11");
        fs::create_dir(&version).expect("dir");
        fs::write(version.join("key"), "value").expect("file");
        std::os::unix::fs::symlink("..2026_11", dir.path().join("..data")).expect("link");
        std::os::unix::fs::symlink("..data/key", dir.path().join("key")).expect("link");
        let files = read(&Copy {
            host: dir.path().to_owned(),
            guest: "/run/dyad/volumes/c/0".into(),
            how: How::Tree,
        })
        .expect("files");
        let paths: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/run/dyad/volumes/c/0",
                "/run/dyad/volumes/c/0/..2026_11",
                "/run/dyad/volumes/c/0/..2026_11/key",
                "/run/dyad/volumes/c/0/..data",
                "/run/dyad/volumes/c/0/key",
            ]
        );
        assert_eq!(files[2].content, Some(Content::Data(b"value".to_vec())));
        assert_eq!(
            files[4].content,
            Some(Content::Symlink("..data/key".into()))
        );
    }

    #[test]
    fn what_is_too_large_to_copy_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        let big = dir.path().join("big");
        fs::File::create(&big)
            .expect("file")
            .set_len(COPY_MAX_BYTES + 1)
            .expect("size");
        let copy = Copy {
            host: big,
            guest: "/x".into(),
            how: How::File,
        };
        let error = read(&copy).expect_err("refused");
        assert!(error.to_string().contains("big"));
    }
}
