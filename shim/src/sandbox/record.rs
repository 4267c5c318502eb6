//! The pod's durable record, `record.json` in its state directory: what is true of
//! the pod, for people, for `dyadctl` and for a process that comes after us.
//!
//! Written whole and atomically (temporary file, fsync, rename). One that cannot be
//! read is kept aside and reported, never deleted.

use std::path::{Path, PathBuf};

use dyad_linux::files::{self, PRIVATE, create_private_dir, write_atomically};
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use serde::{Deserialize, Serialize};

/// The version that this program writes; it reads no newer one.
pub const VERSION: u32 = 1;
const FILE: &str = "record.json";

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// See [`VERSION`].
    pub version: u32,
    /// What runs it.
    pub kind: Kind,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// Its sandbox id.
    pub sandbox_id: String,
    /// Its name in Kubernetes.
    pub pod_name: String,
    /// Its namespace in Kubernetes.
    pub pod_namespace: String,
    /// Its uid in Kubernetes.
    pub pod_uid: String,
    /// Address of the server that serves it.
    pub address: String,
    /// Pid of that server.
    pub shim_pid: u32,
    /// Its containers, the sandbox among them.
    pub containers: Vec<ContainerRecord>,
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: String,
    /// Whether it is the pod itself.
    pub is_sandbox: bool,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The name of its state (`state::outside`).
    pub state: String,
    /// Host pid of its init process while there is one.
    pub pid: Option<u32>,
    /// How it ended.
    pub exit_status: Option<u32>,
}

/// What [`read`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A record.
    Record(Record),
    /// Something that this program cannot read, now kept aside under another name.
    Unreadable {
        /// Where it is now.
        kept_at: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Writes the record of the pod at `pod_dir`, which is made where it is missing.
///
/// # Errors
/// It could not be written; an older record stays whole.
pub fn write(pod_dir: &Path, record: &Record) -> Result<()> {
    create_private_dir(pod_dir)?;
    let text = serde_json::to_vec(record).context(|| "encode the pod's record".into())?;
    write_atomically(&pod_dir.join(FILE), &text, PRIVATE)
}

/// Reads the record of the pod at `pod_dir`.
///
/// # Errors
/// The file exists and cannot be opened, or cannot be moved aside.
pub fn read(pod_dir: &Path) -> Result<Found> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let path = pod_dir.join(FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(Error::other(format!("read {}", path.display()), error)),
    };
    let reason = match serde_json::from_slice::<Versioned>(&text) {
        Err(error) => format!("damaged: {error}"),
        Ok(Versioned { version }) if version > VERSION => {
            format!("version {version}; this program knows {VERSION}")
        }
        Ok(_) => match serde_json::from_slice(&text) {
            Ok(record) => return Ok(Found::Record(record)),
            Err(error) => format!("damaged: {error}"),
        },
    };
    let kept_at = (1..)
        .map(|number| pod_dir.join(format!("{FILE}.unreadable-{number}")))
        .find(|path| !path.exists())
        .unwrap_or_else(|| pod_dir.join("record.json.unreadable"));
    files::rename(&path, &kept_at).context(|| format!("keep {} aside", path.display()))?;
    Ok(Found::Unreadable { kept_at, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Record {
        Record {
            version: VERSION,
            kind: Kind::Machine,
            containerd_namespace: "k8s.io".into(),
            sandbox_id: "s".into(),
            pod_name: "web".into(),
            pod_namespace: "default".into(),
            pod_uid: "u".into(),
            address: "unix:///run/dyad/s/1".into(),
            shim_pid: 7,
            containers: vec![ContainerRecord {
                id: "s".into(),
                is_sandbox: true,
                bundle: "/b".into(),
                state: "running".into(),
                pid: Some(8),
                exit_status: None,
            }],
        }
    }

    #[test]
    fn a_record_is_read_back_and_rewritten() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("k8s.io/s");
        assert_eq!(read(&pod).unwrap(), Found::Nothing);
        write(&pod, &example()).unwrap();
        write(
            &pod,
            &Record {
                shim_pid: 9,
                ..example()
            },
        )
        .unwrap();
        let Found::Record(record) = read(&pod).unwrap() else {
            panic!("not read");
        };
        assert_eq!(record.shim_pid, 9);
        assert_eq!(
            std::fs::read_dir(&pod).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_damaged_or_newer_record_is_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        for (text, part) in [
            ("{\"version\": 1, \"ki", "damaged"),
            ("{\"version\": 2, \"more\": 1}", "version 2"),
            ("{\"version\": 1}", "damaged"),
        ] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let Found::Unreadable { kept_at, reason } = read(dir.path()).unwrap() else {
                panic!("{text} was read");
            };
            assert!(reason.contains(part), "{reason}");
            assert_eq!(std::fs::read_to_string(kept_at).unwrap(), text);
            assert_eq!(read(dir.path()).unwrap(), Found::Nothing);
        }
    }
}
