//! Reads what is to be copied into the guest.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dyad_agent_api::proto::agent::file::Content;
use dyad_agent_api::proto::agent::{File, Filesystem};
use dyad_linux::open_below::{Node, Root};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs, statfs};

use super::mounts::Mounts;
use super::plan::{Copy, Host, How, Source, VolumePlan};

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

/// Resolves the links in what is to be copied, once, as a mount would: afterwards no link is
/// followed any more, for a pod that shares the directory may put one there.
///
/// # Errors
/// Something is not there.
pub fn resolve(plan: &mut VolumePlan) -> Result<()> {
    let copies = plan.copies.iter_mut().map(|copy| &mut copy.host);
    let termination = plan.termination.iter_mut().map(|file| &mut file.host);
    for host in copies.chain(termination) {
        *host = fs::canonicalize(&*host).context(|| reading(host))?;
    }
    Ok(())
}

/// The files of one copy, parents first, named as in the guest.
///
/// # Errors
/// It cannot be read, or is larger than a volume of its kind can be.
pub fn read(copy: &Copy) -> Result<Vec<File>> {
    let what = || reading(&copy.host);
    match copy.how {
        How::Tree | How::Seed => read_tree(copy),
        How::File => {
            let node = Node::open(&copy.host).context(what)?;
            Ok(vec![regular(&copy.host, &copy.guest, &node, &mut 0)?])
        }
        How::Directory | How::Memory => {
            let root = Root::open(&copy.host).context(what)?;
            let node = root.node(Path::new(".")).context(what)?;
            let content = match copy.how {
                How::Memory => Content::Filesystem(memory_like(&copy.host, &node)?),
                _ => Content::Directory(true),
            };
            Ok(vec![entry(&copy.guest, node.metadata(), content)])
        }
    }
}

/// Replaces what is in a file that [`resolve`] found, in place: kubelet holds it open, or
/// finds it by its name. It is not made where it is gone.
///
/// # Errors
/// It is gone, or is something else by now.
pub fn overwrite(host: &Path, content: &[u8]) -> Result<()> {
    let write = || Node::open(host)?.overwrite()?.write_all(content);
    write().context(|| format!("write {}", host.display()))
}

/// A tmpfs with the size that kubelet gave the volume.
fn memory_like(host: &Path, node: &Node) -> Result<Filesystem> {
    let fs = fstatfs(node).context(|| reading(host))?;
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

fn read_tree(copy: &Copy) -> Result<Vec<File>> {
    let root = Root::open(&copy.host).context(|| reading(&copy.host))?;
    let found = root.scan_at_most(COPY_MAX_FILES).map_err(|error| {
        if error.kind() == io::ErrorKind::InvalidData {
            return Error::InvalidArgument(format!(
                "{}: more than {COPY_MAX_FILES} files; a volume that is copied into a machine cannot hold more",
                copy.host.display()
            ));
        }
        Error::other(reading(&copy.host), error)
    })?;
    let (mut files, mut bytes) = (Vec::new(), 0);
    for (path, _) in found {
        let (host, guest) = match path == Path::new(".") {
            true => (copy.host.clone(), copy.guest.clone()),
            false => (copy.host.join(&path), copy.guest.join(&path)),
        };
        let node = root.node(&path).context(|| reading(&host))?;
        let kind = node.metadata().file_type();
        if kind.is_symlink() {
            let target = node.link().context(|| reading(&host))?;
            let content = Content::Symlink(target.to_string_lossy().into_owned());
            files.push(entry(&guest, node.metadata(), content));
        } else if kind.is_dir() {
            files.push(entry(&guest, node.metadata(), Content::Directory(true)));
        } else if kind.is_file() {
            files.push(regular(&host, &guest, &node, &mut bytes)?);
        }
        // Sockets and pipes have no content to copy.
    }
    Ok(files)
}

/// A regular file, as long as all of them have at most [`COPY_MAX_BYTES`].
fn regular(host: &Path, guest: &Path, node: &Node, bytes: &mut u64) -> Result<File> {
    let left = COPY_MAX_BYTES.saturating_sub(*bytes);
    let data = node.read_at_most(left).map_err(|error| {
        if error.kind() == io::ErrorKind::InvalidData {
            return Error::InvalidArgument(format!(
                "{}: more than {} MiB; what is copied into a machine cannot be larger",
                host.display(),
                COPY_MAX_BYTES >> 20
            ));
        }
        Error::other(reading(host), error)
    })?;
    *bytes += data.len() as u64;
    Ok(entry(guest, node.metadata(), Content::Data(data)))
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
    use std::path::PathBuf;

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

    fn file(host: PathBuf) -> Copy {
        Copy {
            host,
            guest: "/x".into(),
            how: How::File,
        }
    }

    #[test]
    fn a_link_is_followed_when_the_volume_is_planned_and_never_again() {
        let dir = tempfile::tempdir().expect("dir");
        let (real, link) = (dir.path().join("zone"), dir.path().join("localtime"));
        fs::write(&real, "UTC").expect("file");
        std::os::unix::fs::symlink("zone", &link).expect("link");
        let mut plan = VolumePlan {
            copies: vec![file(link)],
            ..VolumePlan::default()
        };
        resolve(&mut plan).expect("resolved");
        let data = |copy: &Copy| read(copy).map(|files| files[0].content.clone());
        let content = data(&plan.copies[0]).expect("read");
        assert_eq!(content, Some(Content::Data(b"UTC".to_vec())));
        // A pod that shares the directory on the host puts something else there.
        fs::remove_file(&real).expect("removed");
        std::os::unix::fs::symlink("/etc/hostname", &real).expect("link");
        data(&plan.copies[0]).expect_err("a link");
        fs::remove_file(&real).expect("removed");
        nix::unistd::mkfifo(&real, nix::sys::stat::Mode::S_IRWXU).expect("pipe");
        data(&plan.copies[0]).expect_err("a pipe, on which a plain open would wait");
    }

    #[test]
    fn a_termination_message_is_written_to_the_file_that_was_planned_or_nowhere() {
        let dir = tempfile::tempdir().expect("dir");
        let (log, other) = (dir.path().join("log"), dir.path().join("other"));
        fs::write(&log, "before, and longer").expect("file");
        fs::write(&other, "the host's").expect("file");
        overwrite(&log, b"bye").expect("written");
        assert_eq!(fs::read(&log).expect("read"), b"bye");
        fs::remove_file(&log).expect("removed");
        overwrite(&log, b"bye").expect_err("kubelet removed it");
        assert!(!log.exists());
        std::os::unix::fs::symlink(&other, &log).expect("link");
        overwrite(&log, b"bye").expect_err("a link");
        assert_eq!(fs::read(&other).expect("read"), b"the host's");
    }
}
