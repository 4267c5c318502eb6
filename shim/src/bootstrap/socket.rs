//! The pod server's socket: where it is, and who is behind it.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use dyad_linux::files::create_private_dir;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use uuid::Uuid;

/// `sun_path` holds 108 bytes with its terminating zero.
const PATH_MAX_BYTES: usize = 107;

/// The socket of a pod: a short name, derived from what identifies the pod, so that
/// each of its containers finds it again.
///
/// # Errors
/// `InvalidArgument` when the directory is too long for a unix socket.
pub fn path(dir: &Path, containerd: &str, namespace: &str, sandbox_id: &str) -> Result<PathBuf> {
    let name = format!("{containerd}\n{namespace}\n{sandbox_id}");
    let path = dir.join(
        Uuid::new_v5(&Uuid::NAMESPACE_URL, name.as_bytes())
            .simple()
            .to_string(),
    );
    if path.as_os_str().len() > PATH_MAX_BYTES {
        return Err(Error::InvalidArgument(format!(
            "socket {}: longer than {PATH_MAX_BYTES} bytes; choose a shorter state_dir",
            path.display()
        )));
    }
    Ok(path)
}

/// Whether a server answers behind `path`.
pub fn is_served(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// What [`bind`] found.
#[derive(Debug)]
pub enum Bound {
    /// A new socket, listening.
    New(UnixListener),
    /// A server is there already.
    Served,
}

/// Listens at `path`, readable by root only, removing a socket whose server is dead.
///
/// # Errors
/// The directory or the socket could not be made.
pub fn bind(path: &Path) -> Result<Bound> {
    if let Some(dir) = path.parent() {
        create_private_dir(dir)?;
    }
    match listen(path) {
        Ok(listener) => Ok(Bound::New(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path) {
                return Ok(Bound::Served);
            }
            std::fs::remove_file(path)
                .context(|| format!("remove dead socket {}", path.display()))?;
            listen(path)
                .map(Bound::New)
                .context(|| format!("listen on {}", path.display()))
        }
        Err(error) => Err(Error::other(format!("listen on {}", path.display()), error)),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    // Nobody can connect in between: the directory is private.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_has_one_short_path() {
        let dir = Path::new("/run/dyad/s");
        let one = path(dir, "/c", "k8s.io", "a").unwrap();
        assert_eq!(one, path(dir, "/c", "k8s.io", "a").unwrap());
        assert_ne!(one, path(dir, "/c", "k8s.io", "b").unwrap());
        assert_ne!(one, path(dir, "/d", "k8s.io", "a").unwrap());
        assert_eq!(one.file_name().unwrap().len(), 32);
        assert!(path(Path::new(&format!("/{}", "x".repeat(90))), "", "", "").is_err());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d/s");
        let Bound::New(listener) = bind(&path).unwrap() else {
            panic!("nobody serves yet");
        };
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(bind(&path).unwrap(), Bound::Served));
        drop(listener);
        assert!(matches!(bind(&path).unwrap(), Bound::New(_)));
    }
}
