//! `dyad.json` in a container's bundle: what a later process of ours must know about
//! it. `start` writes it for the pod's server, the server for each container, and
//! `delete` reads it. It is there for as long as something of the container may be
//! left: a container that was deleted in order has none.

use std::path::{Path, PathBuf};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::files::write_atomically;
use crate::pod_files;

const FILE: &str = "dyad.json";
const VERSION: u32 = 1;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    version: u32,
    /// What runs the pod.
    pub kind: Kind,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// The container.
    pub id: String,
    /// Its pod.
    pub sandbox_id: String,
    /// Whether it is the pod itself.
    pub is_sandbox: bool,
    /// The pod server's socket.
    pub socket: PathBuf,
    /// containerd's ttrpc address, for events.
    pub ttrpc_address: String,
    /// containerd's gRPC address and binary, for events where ttrpc is not served.
    pub grpc_address: String,
    /// See `grpc_address`.
    pub publish_binary: String,
    /// Log at debug level whatever the configuration says.
    pub debug: bool,
    /// The configuration in force when the pod was made: it stays so.
    pub config: Config,
}

impl Launch {
    /// The launch of a pod's server.
    #[expect(clippy::too_many_arguments, reason = "one place fills the record")]
    pub fn new(
        containerd_namespace: String,
        id: String,
        sandbox_id: String,
        role: Role,
        socket: PathBuf,
        ttrpc_address: String,
        publish: (String, String),
        debug: bool,
        config: Config,
    ) -> Self {
        Self {
            version: VERSION,
            kind: config.kind,
            containerd_namespace,
            id,
            sandbox_id,
            is_sandbox: role == Role::Sandbox,
            socket,
            ttrpc_address,
            grpc_address: publish.0,
            publish_binary: publish.1,
            debug,
            config,
        }
    }

    /// The same server, as another container of its pod sees it.
    pub fn for_container(&self, id: &str, role: Role) -> Self {
        Self {
            id: id.to_owned(),
            is_sandbox: role == Role::Sandbox,
            ..self.clone()
        }
    }

    /// What it is in its pod.
    pub fn role(&self) -> Role {
        if self.is_sandbox {
            Role::Sandbox
        } else {
            Role::Container
        }
    }

    /// How containerd dials the server.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// The pod's own directory.
    pub fn pod_dir(&self) -> PathBuf {
        self.config
            .state_dir
            .join(&self.containerd_namespace)
            .join(&self.sandbox_id)
    }

    /// Removes the pod's own directory, with what is mounted in it.
    pub fn remove_pod_dir(&self) {
        let dir = self.pod_dir();
        if let Err(error) = pod_files::unmount(&dir) {
            log::warn!("{}", error.chain());
        }
        let _ = std::fs::remove_dir_all(dir);
    }

    /// Writes it into `bundle`.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context(|| format!("encode {FILE}"))?;
        write_atomically(&bundle.join(FILE), &text)
    }

    /// Reads it from `bundle`; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read, or a newer version of this program wrote it.
    pub fn read(bundle: &Path) -> Result<Option<Self>> {
        let path = bundle.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::other(format!("read {}", path.display()), error)),
        };
        let launch: Self =
            serde_json::from_slice(&text).context(|| format!("decode {}", path.display()))?;
        if launch.version != VERSION {
            return Err(Error::FailedPrecondition(format!(
                "{} has version {}, this program knows {VERSION}: use the program that wrote it",
                path.display(),
                launch.version
            )));
        }
        Ok(Some(launch))
    }

    /// Removes it: nothing of the container is left.
    ///
    /// # Errors
    /// The file could not be removed.
    pub fn remove(bundle: &Path) -> Result<()> {
        let path = bundle.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::other(format!("remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Launch {
        Launch::new(
            "k8s.io".into(),
            "c".into(),
            "s".into(),
            Role::Container,
            "/run/dyad/s/1".into(),
            "/run/c.ttrpc".into(),
            ("/run/c".into(), "/bin/containerd".into()),
            false,
            Config::default(),
        )
    }

    #[test]
    fn what_is_written_is_read_back_and_removing_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Launch::read(dir.path()).unwrap(), None);
        example().write(dir.path()).unwrap();
        assert_eq!(Launch::read(dir.path()).unwrap(), Some(example()));
        Launch::remove(dir.path()).unwrap();
        Launch::remove(dir.path()).unwrap();
        assert_eq!(Launch::read(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_newer_version_is_not_guessed_at() {
        let dir = tempfile::tempdir().unwrap();
        let newer = Launch {
            version: VERSION + 1,
            ..example()
        };
        newer.write(dir.path()).unwrap();
        assert!(matches!(
            Launch::read(dir.path()),
            Err(Error::FailedPrecondition(_))
        ));
    }
}
