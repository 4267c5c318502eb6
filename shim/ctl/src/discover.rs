//! Where shims are: `<state_dir>/<containerd namespace>/<sandbox id>/address`, one line
//! `unix:///path` that names the socket a shim serves.
//!
//! dyadctl runs as root, and what lies in a folder may be anything: the file is read
//! without following a link, without waiting on a FIFO, and never beyond a few bytes.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Uid;

use crate::error::{Error, Result};

/// The file's name.
pub const ADDRESS_FILE: &str = "address";
/// Far more than `unix://` and a socket path can need.
const MAX_ADDRESS_BYTES: usize = 1024;
/// `sizeof(sun_path) - 1`, unix(7).
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A folder in which a shim left its address.
#[derive(Debug)]
pub struct Place {
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// The pod's sandbox id.
    pub sandbox_id: String,
    /// The folder.
    pub dir: PathBuf,
    /// The shim's socket.
    pub socket: Result<PathBuf, AddressError>,
}

/// Why an address file does not lead to a shim.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("its address file cannot be read")]
    Read(#[source] io::Error),
    #[error("its address is not a regular file")]
    NotAFile,
    #[error("its address file belongs to user {0}")]
    Owner(u32),
    #[error("its address file is empty, too long or not one line of text")]
    NotALine,
    #[error("its address {0:?} is not unix:///path with a path of at most 107 bytes")]
    NotASocket(String),
}

/// Every place below `state_dir` with an address file, sorted; none where there is no
/// such folder. A folder without the file is no shim's (or not yet).
///
/// # Errors
/// [`Error::Failed`] where a folder cannot be listed.
pub fn scan(state_dir: &Path) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for (containerd_namespace, namespace_dir) in folders(state_dir)? {
        for (sandbox_id, dir) in folders(&namespace_dir)? {
            let Some(socket) = read_address(&dir.join(ADDRESS_FILE)).transpose() else {
                continue;
            };
            places.push(Place {
                containerd_namespace: containerd_namespace.clone(),
                sandbox_id,
                dir,
                socket,
            });
        }
    }
    Ok(places)
}

/// The folders in `dir`, links excepted, by name. Names that are not UTF-8 are no ids.
fn folders(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let read = || -> io::Result<Vec<(String, PathBuf)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if let (Ok(name), true) = (entry.file_name().into_string(), entry.file_type()?.is_dir())
            {
                found.push((name, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    };
    match read() {
        // Pods come and go while we look.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(Error::failed(
            format!("list {} (run this as root)", dir.display()),
            error,
        )),
        result => result.map_err(|error| Error::failed(format!("list {}", dir.display()), error)),
    }
}

/// The socket that the file names; nothing where there is no file.
fn read_address(file: &Path) -> Result<Option<PathBuf>, AddressError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    // What open(2) says of a link under O_NOFOLLOW, and of a socket.
    let not_a_file = [Errno::ELOOP, Errno::ENXIO].map(|errno| Some(errno as i32));
    let mut open = match OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(file)
    {
        Ok(open) => open,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if not_a_file.contains(&error.raw_os_error()) => {
            return Err(AddressError::NotAFile);
        }
        Err(error) => return Err(AddressError::Read(error)),
    };
    let metadata = open.metadata().map_err(AddressError::Read)?;
    if !metadata.is_file() {
        return Err(AddressError::NotAFile);
    }
    if metadata.uid() != 0 && metadata.uid() != Uid::effective().as_raw() {
        return Err(AddressError::Owner(metadata.uid()));
    }
    let mut bytes = Vec::new();
    open.by_ref()
        .take(MAX_ADDRESS_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(AddressError::Read)?;
    parse_address(&bytes).map(Some)
}

fn parse_address(bytes: &[u8]) -> Result<PathBuf, AddressError> {
    let line = match std::str::from_utf8(bytes) {
        Ok(text) if bytes.len() <= MAX_ADDRESS_BYTES => text.strip_suffix('\n').unwrap_or(text),
        _ => return Err(AddressError::NotALine),
    };
    if line.is_empty() || line.chars().any(char::is_control) {
        return Err(AddressError::NotALine);
    }
    match line.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') && path.len() <= MAX_SOCKET_PATH_BYTES => {
            Ok(path.into())
        }
        _ => Err(AddressError::NotASocket(line.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn place(root: &Path, id: &str) -> PathBuf {
        let dir = root.join("k8s.io").join(id);
        fs::create_dir_all(&dir).unwrap();
        dir.join(ADDRESS_FILE)
    }

    #[test]
    fn shims_of_every_namespace_are_found_in_order() {
        let root = tempfile::tempdir().unwrap();
        for (namespace, id) in [("moby", "b"), ("k8s.io", "c"), ("k8s.io", "a")] {
            let dir = root.path().join(namespace).join(id);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(ADDRESS_FILE), "unix:///run/s\n").unwrap();
        }
        let found: Vec<_> = scan(root.path())
            .unwrap()
            .into_iter()
            .map(|place| {
                (
                    place.containerd_namespace,
                    place.sandbox_id,
                    place.socket.unwrap(),
                )
            })
            .collect();
        let socket = PathBuf::from("/run/s");
        assert_eq!(
            found,
            [("k8s.io", "a"), ("k8s.io", "c"), ("moby", "b")].map(|(namespace, id)| (
                namespace.to_owned(),
                id.to_owned(),
                socket.clone()
            ))
        );
    }

    #[test]
    fn no_state_dir_is_no_shims() {
        assert!(scan(Path::new("/nonexistent/dyad")).unwrap().is_empty());
    }

    #[test]
    fn a_state_dir_that_is_none_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(scan(file.path()), Err(Error::Failed { .. })));
    }

    #[test]
    fn folders_without_an_address_and_links_are_passed_over() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("oci/k8s.io/container")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        fs::write(place(root.path(), "real"), "unix:///run/s").unwrap();
        symlink(root.path().join("k8s.io"), root.path().join("linked")).unwrap();
        let found = scan(root.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].sandbox_id, "real");
    }

    #[test]
    fn hostile_address_files_are_reported_and_never_followed_or_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("target");
        fs::write(&target, "unix:///run/s").unwrap();
        symlink(&target, place(root.path(), "link")).unwrap();
        nix::unistd::mkfifo(&place(root.path(), "fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(place(root.path(), "dir")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(place(root.path(), "socket")).unwrap();
        fs::write(place(root.path(), "huge"), "unix:///".repeat(1 << 20)).unwrap();
        let found = scan(root.path()).unwrap();
        assert_eq!(found.len(), 5);
        for place in found {
            let error = place.socket.unwrap_err();
            match place.sandbox_id.as_str() {
                "huge" => assert!(matches!(error, AddressError::NotALine), "{error}"),
                id => assert!(matches!(error, AddressError::NotAFile), "{id}: {error:?}"),
            }
        }
    }

    #[test]
    fn only_a_unix_address_with_an_absolute_path_is_one() {
        assert_eq!(parse_address(b"unix:///a").unwrap(), Path::new("/a"));
        assert_eq!(parse_address(b"unix:///a\n").unwrap(), Path::new("/a"));
        let long = format!("unix:///{}", "a".repeat(107));
        for text in [
            "",
            "\n",
            "unix:///a\n\n",
            "unix:///a\nunix:///b",
            "unix://a",
            "unix://@abstract",
            "unix://",
            "/a",
            "tcp://127.0.0.1:1",
            "vsock://2:1",
            "unix:///a\0b",
            "unix:///\u{1b}[2J",
            " unix:///a",
            &long,
        ] {
            assert!(parse_address(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(parse_address(b"unix:///\xff").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_absolute_path_or_an_error(bytes: Vec<u8>) {
            if let Ok(path) = parse_address(&bytes) {
                prop_assert!(path.is_absolute());
            }
        }
    }
}
