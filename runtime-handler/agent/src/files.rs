//! Files that the host puts into the guest and keeps in sync.
//!
//! Only below [`VOLUMES`] and [`POD_VOLUMES`], and never through a symbolic link or
//! `..`: a container that has such a folder mounted may have put anything there.
//!
//! **Old or new, never half.** A file is written beside its place and renamed over it.
//! The exception is a file that is itself the source of a container's mount (hosts,
//! resolv.conf, a `subPath`): the mount holds on to the inode, so a rename would never
//! be seen. Such a file is written in place, as kubelet does on a host. In one request
//! directories and files come first, symbolic links after them and removals last, so
//! that kubelet's `..data` link turns from one whole set of files to the next.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use dyad_agent_api::proto::agent::file::Content;
use dyad_agent_api::proto::agent::{File as WantedFile, Filesystem, PutFilesRequest};
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat, renameat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};

use crate::{disk, rootfs};

/// What the host copies in, in memory.
pub const VOLUMES: &str = "/run/dyad/volumes";
/// What lives on the pod's disk (emptyDir).
pub const POD_VOLUMES: &str = "/run/dyad/pod/volumes";

/// File systems that the host may have us mount on a folder.
const FILESYSTEMS: &[&str] = &["tmpfs", "virtiofs", "erofs", "ext4", "xfs", "btrfs"];

/// Mode of the folders on the way to a file.
const FOLDER_MODE: Mode = Mode::from_bits_truncate(0o755);

/// A path that the host may name: the folder it is in for sure, and the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place<'a> {
    base: &'static str,
    relative: &'a Path,
}

impl<'a> Place<'a> {
    fn of(path: &'a str) -> Result<Self> {
        let refused = || {
            Error::InvalidArgument(format!(
                "path {path:?}: must be below {VOLUMES} or {POD_VOLUMES}, without . or .."
            ))
        };
        let base = [POD_VOLUMES, VOLUMES]
            .into_iter()
            .find(|base| Path::new(path).starts_with(base))
            .ok_or_else(refused)?;
        let relative = Path::new(path).strip_prefix(base).map_err(|_| refused())?;
        let plain = path.len() < libc::PATH_MAX as usize
            && !path.contains('\0')
            // Path's components hide `.` and doubled slashes.
            && path[1..].split('/').all(|part| !part.is_empty() && part != ".")
            && relative.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || relative.as_os_str().is_empty() {
            return Err(refused());
        }
        Ok(Self { base, relative })
    }

    fn name(&self) -> &OsStr {
        self.relative.file_name().unwrap_or_default()
    }

    /// Opens the folder it is in, making what is missing.
    fn parent(&self) -> Result<OwnedFd> {
        match self.relative.parent() {
            Some(parent) => open_folder(self.base, parent, true),
            None => open_folder(self.base, Path::new(""), true),
        }
    }
}

/// Makes a folder below [`VOLUMES`] or [`POD_VOLUMES`] with that mode; one that is
/// there stays as it is. Blocks.
///
/// # Errors
/// `InvalidArgument` for a path that may not be.
pub fn make_folder(path: &Path, mode: u32) -> Result<()> {
    let what = || format!("create {}", path.display());
    let place = Place::of(path.to_str().unwrap_or_default())?;
    let parent = place.parent()?;
    match mkdirat(&parent, place.name(), FOLDER_MODE) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok(()),
        Err(error) => return Err(error).context(what),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let folder = open_beneath(&parent, place.name(), flags).context(what)?;
    // mkdir's mode is cut by the umask.
    fchmod(&folder, Mode::from_bits_truncate(mode)).context(what)
}

/// Opens `relative` below `base` without following a link.
fn open_folder(base: &'static str, relative: &Path, create: bool) -> Result<OwnedFd> {
    let shown = || format!("open {base}/{}", relative.display());
    if base == POD_VOLUMES && !rootfs::is_mount_point(Path::new(rootfs::POD_DISK)) {
        return Err(Error::FailedPrecondition(
            "the pod's disk is not mounted: Setup must come first".into(),
        ));
    }
    if create {
        fs::create_dir_all(base).context(shown)?;
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut folder = nix::fcntl::open(base, flags, Mode::empty()).context(shown)?;
    for part in relative.components() {
        if create {
            match mkdirat(&folder, part.as_os_str(), FOLDER_MODE) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error).context(shown),
            }
        }
        folder = open_beneath(&folder, part.as_os_str(), flags).context(shown)?;
    }
    Ok(folder)
}

fn open_beneath(folder: impl AsFd, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(folder, name, how)
}

/// Does what the request says. `mounted` are files that containers have mounted.
/// Blocks. Disks are looked up before, by serial: `(path, node)`.
///
/// # Errors
/// `InvalidArgument` for a path or content that may not be; the first that failed.
pub fn put(
    request: &PutFilesRequest,
    mounted: &HashSet<PathBuf>,
    disks: &[(String, PathBuf)],
) -> Result<()> {
    // All are checked before any is touched.
    for file in &request.files {
        Place::of(&file.path)?;
        if file.content.is_none() {
            return Err(Error::InvalidArgument(format!(
                "file {:?}: has no content",
                file.path
            )));
        }
    }
    for folder in &request.prune {
        Place::of(folder)?;
    }
    let is_link = |file: &&WantedFile| matches!(file.content, Some(Content::Symlink(_)));
    for file in request.files.iter().filter(|file| !is_link(file)) {
        put_one(file, mounted, disks)?;
    }
    for file in request.files.iter().filter(is_link) {
        put_one(file, mounted, disks)?;
    }
    let keep: HashSet<&Path> = request
        .files
        .iter()
        .flat_map(|file| Path::new(&file.path).ancestors())
        .collect();
    for folder in &request.prune {
        prune(folder, &keep)?;
    }
    Ok(())
}

fn put_one(
    file: &WantedFile,
    mounted: &HashSet<PathBuf>,
    disks: &[(String, PathBuf)],
) -> Result<()> {
    let place = Place::of(&file.path)?;
    let parent = place.parent()?;
    let what = || format!("put {}", file.path);
    match &file.content {
        Some(Content::Data(data)) => {
            let in_place = mounted.contains(Path::new(&file.path));
            put_data(&parent, place.name(), file, data, in_place).context(what)
        }
        Some(Content::Symlink(target)) => {
            put_link(&parent, place.name(), file, target).context(what)
        }
        Some(Content::Directory(_)) => put_folder(&parent, place.name(), file)
            .context(what)
            .map(drop),
        Some(Content::Filesystem(filesystem)) => {
            let folder = put_folder(&parent, place.name(), file).context(what)?;
            put_filesystem(&folder, file, filesystem, disks)
        }
        // Was checked; a new kind of content is refused by name.
        _ => Err(Error::InvalidArgument(format!(
            "file {:?}: unknown content",
            file.path
        ))),
    }
}

fn put_data(
    parent: &OwnedFd,
    name: &OsStr,
    file: &WantedFile,
    data: &[u8],
    in_place: bool,
) -> nix::Result<()> {
    // Neither a FIFO nor a device that a container put here may hold us up.
    let there = open_beneath(parent, name, OFlag::O_RDWR | OFlag::O_NONBLOCK)
        .map(File::from)
        .ok()
        .filter(|there| there.metadata().is_ok_and(|meta| meta.is_file()));
    if let Some(there) = there {
        let same = holds(&there, data)?;
        if same || in_place {
            if !same {
                there.write_all_at(data, 0).map_err(errno)?;
                there.set_len(data.len() as u64).map_err(errno)?;
            }
            return own(&there, file);
        }
    }
    let temporary = temporary_name(name);
    unlink_if_there(parent, &temporary)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
    let fresh = nix::fcntl::openat(
        parent,
        temporary.as_os_str(),
        flags | OFlag::O_CLOEXEC,
        Mode::from_bits_truncate(0o600),
    )?;
    let mut fresh = File::from(fresh);
    fresh.write_all(data).map_err(errno)?;
    own(&fresh, file)?;
    renameat(parent, temporary.as_os_str(), parent, name)
}

/// Whether the file's bytes are these.
fn holds(file: &File, data: &[u8]) -> nix::Result<bool> {
    if file.metadata().map_err(errno)?.len() != data.len() as u64 {
        return Ok(false);
    }
    let mut found = vec![0; data.len()];
    match file.read_exact_at(&mut found, 0) {
        Ok(()) => Ok(found == data),
        // It shrank meanwhile.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(errno(error)),
    }
}

fn own(file: &File, wanted: &WantedFile) -> nix::Result<()> {
    let meta = file.metadata().map_err(errno)?;
    if (meta.uid(), meta.gid()) != (wanted.uid, wanted.gid) {
        fchown(
            file,
            Some(Uid::from_raw(wanted.uid)),
            Some(Gid::from_raw(wanted.gid)),
        )?;
    }
    // After the owner: chown clears set-id bits.
    fchmod(file, mode(wanted))
}

fn put_link(parent: &OwnedFd, name: &OsStr, file: &WantedFile, target: &str) -> nix::Result<()> {
    if readlinkat(parent, name).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let temporary = temporary_name(name);
    unlink_if_there(parent, &temporary)?;
    symlinkat(target, parent, temporary.as_os_str())?;
    fchownat(
        parent,
        temporary.as_os_str(),
        Some(Uid::from_raw(file.uid)),
        Some(Gid::from_raw(file.gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    renameat(parent, temporary.as_os_str(), parent, name)
}

fn put_folder(parent: &OwnedFd, name: &OsStr, file: &WantedFile) -> nix::Result<OwnedFd> {
    match mkdirat(parent, name, mode(file)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error),
    }
    let folder = open_beneath(parent, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    own(&File::from(folder.try_clone().map_err(errno)?), file)?;
    Ok(folder)
}

fn put_filesystem(
    folder: &OwnedFd,
    file: &WantedFile,
    wanted: &Filesystem,
    disks: &[(String, PathBuf)],
) -> Result<()> {
    let kind = wanted.kind.as_str();
    if !FILESYSTEMS.contains(&kind) {
        return Err(Error::InvalidArgument(format!(
            "file {:?}: file system {kind:?} is none of {}",
            file.path,
            FILESYSTEMS.join(", ")
        )));
    }
    if rootfs::is_mount_point(Path::new(&file.path)) {
        return Ok(());
    }
    let source = match disks.iter().find(|(path, _)| *path == file.path) {
        Some((_, node)) => node.clone(),
        None if wanted.source.is_empty() => kind.into(),
        None => PathBuf::from(&wanted.source),
    };
    let (flags, data) = mount_options(&wanted.options);
    let what = || format!("mount {kind} {} on {}", source.display(), file.path);
    // By descriptor: the path could lead elsewhere by now.
    let target = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    mount(
        Some(&source),
        &target,
        Some(kind),
        flags,
        Some(data.as_str()).filter(|data| !data.is_empty()),
    )
    .context(what)?;
    if kind == "tmpfs" {
        // Its root is new and has tmpfs's own mode.
        chmod(&file.path, mode(file)).context(what)?;
    }
    Ok(())
}

fn chmod(path: &str, mode: Mode) -> nix::Result<()> {
    let here = nix::fcntl::AT_FDCWD;
    fchmodat(here, path, mode, FchmodatFlags::FollowSymlink)
}

/// Flags and file-system data of mount options.
fn mount_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => {}
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Removes what is below `folder` and not in `keep`.
fn prune(folder: &str, keep: &HashSet<&Path>) -> Result<()> {
    let place = Place::of(folder)?;
    let opened = match open_folder(place.base, place.relative, false) {
        Ok(opened) => opened,
        Err(Error::Other { source, .. })
            if source.downcast_ref::<Errno>() == Some(&Errno::ENOENT) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    prune_below(opened, Path::new(folder), keep).context(|| format!("prune {folder}"))
}

fn prune_below(folder: OwnedFd, path: &Path, keep: &HashSet<&Path>) -> std::io::Result<()> {
    let listing = format!("/proc/self/fd/{}", folder.as_raw_fd());
    for entry in fs::read_dir(listing)? {
        let entry = entry?;
        let name = entry.file_name();
        let path = path.join(&name);
        let is_folder = entry.file_type()?.is_dir();
        if is_folder && !keep.contains(path.as_path()) && rootfs::is_mount_point(&path) {
            // An image; its disk is the host's to take away.
            rootfs::unmount(&path).map_err(std::io::Error::other)?;
        } else if is_folder {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
            let below = match open_beneath(&folder, &name, flags) {
                Ok(below) => below,
                // Went away, or turned into something else, while we looked.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
                Err(error) => return Err(error.into()),
            };
            prune_below(below, &path, keep)?;
        }
        if !keep.contains(path.as_path()) {
            let flag = if is_folder {
                UnlinkatFlags::RemoveDir
            } else {
                UnlinkatFlags::NoRemoveDir
            };
            match unlinkat(&folder, name.as_os_str(), flag) {
                // A container may be writing there; what it made belongs to it.
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::EBUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// The last `max_bytes` of a file, as kubelet takes the end of a termination message.
/// Blocks.
///
/// # Errors
/// `NotFound`; `InvalidArgument` for a path that may not be, or is no regular file.
pub fn get(path: &str, max_bytes: u32) -> Result<Vec<u8>> {
    let place = Place::of(path)?;
    let what = || format!("read {path}");
    let folder = place.relative.parent().unwrap_or(Path::new(""));
    let opened = open_folder(place.base, folder, false).and_then(|folder| {
        open_beneath(&folder, place.name(), OFlag::O_RDONLY | OFlag::O_NONBLOCK).context(what)
    });
    let mut file = match opened {
        Ok(opened) => File::from(opened),
        Err(Error::Other { source, .. })
            if source.downcast_ref::<Errno>() == Some(&Errno::ENOENT) =>
        {
            return Err(Error::NotFound(format!("file {path}")));
        }
        Err(error) => return Err(error),
    };
    let meta = file.metadata().context(what)?;
    if !meta.is_file() {
        return Err(Error::InvalidArgument(format!(
            "{path}: is no regular file"
        )));
    }
    let max = u64::from(max_bytes);
    file.seek(SeekFrom::Start(meta.len().saturating_sub(max)))
        .context(what)?;
    let mut data = Vec::new();
    file.take(max).read_to_end(&mut data).context(what)?;
    Ok(data)
}

/// The disks that the request's file systems are on: path and serial.
///
/// # Errors
/// `InvalidArgument` for a serial that can be none.
pub fn wanted_disks(request: &PutFilesRequest) -> Result<Vec<(String, String)>> {
    request
        .files
        .iter()
        .filter_map(|file| match &file.content {
            Some(Content::Filesystem(wanted)) if !wanted.disk_serial.is_empty() => {
                Some((file.path.clone(), wanted.disk_serial.clone()))
            }
            _ => None,
        })
        .map(|(path, serial)| disk::check_serial(&serial).map(|()| (path, serial)))
        .collect()
}

fn mode(file: &WantedFile) -> Mode {
    Mode::from_bits_truncate(file.mode & 0o7777)
}

fn temporary_name(name: &OsStr) -> PathBuf {
    let mut temporary = OsStr::from_bytes(b".dyad-new-").to_owned();
    // A name may be 255 bytes long; one request writes one file at a time.
    temporary.push(OsStr::from_bytes(&name.as_bytes()[..name.len().min(200)]));
    temporary.into()
}

fn unlink_if_there(parent: &OwnedFd, name: &Path) -> nix::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_volumes_can_be_named() {
        for good in [
            "/run/dyad/volumes/a",
            "/run/dyad/volumes/pod/..data",
            "/run/dyad/volumes/pod/..2026_11/key",
            "/run/dyad/pod/volumes/cache/x",
        ] {
            Place::of(good).unwrap();
        }
        for bad in [
            "",
            "/",
            "a",
            "/run/dyad/volumes",
            "/run/dyad/volumes/",
            "/run/dyad/volumes/../pod/containers",
            "/run/dyad/volumes/a/../../b",
            "/run/dyad/volumes/./a",
            "/run/dyad/volumes//a",
            "/run/dyad/volumes/a/",
            "/run/dyad/volumes/a\0b",
            "/run/dyad/volumesx/a",
            "/run/dyad/pod/containers/c",
            "/etc/passwd",
        ] {
            assert!(Place::of(bad).is_err(), "{bad:?}");
        }
        assert!(Place::of(&format!("/run/dyad/volumes/{}", "x/".repeat(3000))).is_err());
    }

    #[test]
    fn mount_options_are_told_apart() {
        let options = ["ro", "nosuid", "size=1m", "rw", "mode=0700"].map(String::from);
        let (flags, data) = mount_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, "size=1m,mode=0700");
    }

    fn folder(path: &Path) -> OwnedFd {
        nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).unwrap()
    }

    fn wanted(mode: u32) -> WantedFile {
        WantedFile {
            mode,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            ..Default::default()
        }
    }

    #[test]
    fn a_reader_keeps_the_old_file_and_a_mounted_file_keeps_its_inode() {
        let temporary = tempfile::tempdir().unwrap();
        let (parent, path) = (folder(temporary.path()), temporary.path().join("f"));
        let put = |data: &[u8], in_place| {
            put_data(&parent, OsStr::new("f"), &wanted(0o640), data, in_place).unwrap();
            fs::metadata(&path).unwrap()
        };
        let first = put(b"one", false);
        assert_eq!(first.mode() & 0o7777, 0o640);
        let old = File::open(&path).unwrap();
        let second = put(b"two, longer", false);
        assert_ne!(first.ino(), second.ino());
        assert!(holds(&old, b"one").unwrap());

        assert_eq!(put(b"3", true).ino(), second.ino());
        assert_eq!(fs::read(&path).unwrap(), b"3");
        let untouched = put(b"3", false);
        assert_eq!(
            untouched.ino(),
            second.ino(),
            "the same bytes are not written again"
        );
    }

    #[test]
    fn links_turn_at_once_and_are_not_followed() {
        let temporary = tempfile::tempdir().unwrap();
        let outside = temporary.path().join("outside");
        fs::write(&outside, "secret").unwrap();
        let inside = temporary.path().join("inside");
        fs::create_dir(&inside).unwrap();
        let parent = folder(&inside);
        let link = OsStr::new("..data");
        put_link(&parent, link, &wanted(0), "..1").unwrap();
        put_link(&parent, link, &wanted(0), "..2").unwrap();
        assert_eq!(
            fs::read_link(inside.join("..data")).unwrap(),
            Path::new("..2")
        );

        std::os::unix::fs::symlink(&outside, inside.join("f")).unwrap();
        put_data(&parent, OsStr::new("f"), &wanted(0o600), b"new", true).unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"secret");
        assert_eq!(fs::read(inside.join("f")).unwrap(), b"new");

        std::os::unix::fs::symlink(temporary.path(), inside.join("d")).unwrap();
        let followed = open_beneath(&parent, OsStr::new("d"), OFlag::O_PATH | OFlag::O_DIRECTORY);
        assert!(followed.is_err());
    }

    #[test]
    fn pruning_removes_what_is_not_named_and_stays_inside() {
        let temporary = tempfile::tempdir().unwrap();
        let inside = temporary.path().join("inside");
        fs::create_dir_all(inside.join("..1/deep")).unwrap();
        fs::create_dir_all(inside.join("..2")).unwrap();
        fs::write(inside.join("..1/deep/a"), "").unwrap();
        fs::write(inside.join("..2/a"), "").unwrap();
        fs::write(temporary.path().join("outside"), "").unwrap();
        std::os::unix::fs::symlink("..", inside.join("up")).unwrap();
        let kept = inside.join("..2/a");
        prune_below(folder(&inside), &inside, &kept.ancestors().collect()).unwrap();
        assert!(kept.exists() && !inside.join("..1").exists());
        assert!(fs::symlink_metadata(inside.join("up")).is_err());
        assert!(temporary.path().join("outside").exists());
    }
}
