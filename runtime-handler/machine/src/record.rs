//! What must be known to remove a machine whose shim is gone: `machine.json` in the
//! machine's folder, written before anything else is made, removed after all else.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use dyad_linux::files::{self, PRIVATE, write_atomically};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::identity::pod_uuid;
use log::{debug, warn};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Paths;
use crate::kept::Kept;
use crate::size::{Reached, Size};

/// The format's version.
const VERSION: u32 = 1;

/// A machine's traces on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The machine.
    pub uuid: Uuid,
    /// Its pod.
    pub sandbox_id: String,
    /// Its pod's containerd namespace.
    pub containerd_namespace: String,
    /// The sandbox's bundle; containerd asks for a `delete` while it is there. `None`: an older
    /// release wrote this.
    #[serde(default)]
    pub bundle: Option<PathBuf>,
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// The pod's interfaces and their taps.
    pub taps: Vec<(String, String)>,
    /// As in the sandbox's spec.
    pub cgroups_path: Option<String>,
    /// It is being migrated away: whether it runs here is libvirt's to say.
    #[serde(default)]
    pub leaving: bool,
    /// It runs on another node. What libvirt has under its UUID is not ours any more.
    #[serde(default)]
    pub moved: bool,
    /// Its bounds, once they are decided.
    #[serde(default)]
    pub size: Option<Size>,
    /// How big it is, after what it was resized to last.
    #[serde(default)]
    pub reached: Option<Reached>,
    /// SCSI units of the images that are plugged in, by the images' keys.
    #[serde(default)]
    pub images: BTreeMap<String, u32>,
}

impl Record {
    /// A machine of which nothing is made yet.
    pub fn new(containerd_namespace: &str, sandbox_id: &str) -> Self {
        Self {
            sandbox_id: sandbox_id.to_owned(),
            containerd_namespace: containerd_namespace.to_owned(),
            ..Self::of_uuid(pod_uuid(containerd_namespace, sandbox_id))
        }
    }

    /// A machine of which the UUID alone is known.
    pub fn of_uuid(uuid: Uuid) -> Self {
        Self {
            version: VERSION,
            uuid,
            sandbox_id: String::new(),
            containerd_namespace: String::new(),
            bundle: None,
            netns: None,
            taps: Vec::new(),
            cgroups_path: None,
            leaving: false,
            moved: false,
            size: None,
            reached: None,
            images: BTreeMap::new(),
        }
    }

    /// What of it the sandbox's bundle tells, for one whose own file cannot be read. Its taps
    /// are not in there; they go with the pod's network namespace.
    #[must_use]
    pub fn read_from_bundle(mut self, bundle: &Path) -> Self {
        let spec = Spec::load(bundle.join("config.json")).map_err(|error| error.to_string());
        let sandbox =
            spec.and_then(|spec| crate::spec::sandbox(&spec).map_err(|error| error.chain()));
        match sandbox {
            Ok(sandbox) => {
                self.netns = sandbox.netns;
                self.cgroups_path = sandbox.cgroups_path;
            }
            // A pod without a pause container has none.
            Err(error) => debug!("{}: {error}", bundle.display()),
        }
        self
    }
}

/// Where a machine's files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// Record, disks, console: on disk.
    pub dir: PathBuf,
    /// Sockets.
    pub run_dir: PathBuf,
    /// Where its disk goes when the pod outlives it.
    pub kept: Kept,
    /// Converted images that it shares with other machines.
    pub images: PathBuf,
}

impl Folder {
    /// The folder of a machine.
    pub fn new(state_dir: &Path, cache_dir: &Path, uuid: Uuid) -> Self {
        Self {
            dir: cache_dir.join("machines").join(uuid.to_string()),
            run_dir: state_dir.join("machines").join(uuid.to_string()),
            kept: Kept::new(cache_dir),
            images: cache_dir.join("images"),
        }
    }

    /// Those of all machines of the host.
    pub fn all(paths: &Paths) -> Vec<Self> {
        let names = std::fs::read_dir(paths.cache_dir.join("machines"));
        let names = names.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .map(|uuid| Self::new(&paths.state_dir, &paths.cache_dir, uuid))
            .collect()
    }

    /// Those of the host's other machines.
    pub fn others(paths: &Paths, own: &Self) -> Vec<Self> {
        let mut all = Self::all(paths);
        all.retain(|folder| folder.dir != own.dir);
        all
    }

    /// The UUID that it is named after: its pod's, and so its machine's where that was made here.
    ///
    /// # Errors
    /// It has another name.
    pub fn uuid(&self) -> Result<Uuid> {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        name.parse()
            .context(|| format!("read the UUID in the name of {}", self.dir.display()))
    }

    /// What the shim that serves the machine has locked, see [`dyad_linux::owner`].
    pub fn owner_lock(&self) -> PathBuf {
        self.dir.join("owner.lock")
    }

    fn abandoned(&self) -> PathBuf {
        self.dir.join("abandoned")
    }

    /// Notes that all of it is to go, so that whoever comes next goes on where this ends.
    ///
    /// # Errors
    /// The folder is there and cannot be written.
    pub fn abandon(&self) -> Result<()> {
        match File::create(self.abandoned()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).context(|| format!("write {}", self.abandoned().display()))
            }
            // Its sockets alone are left.
            _ => Ok(()),
        }
    }

    /// Whether [`Self::abandon`] was called.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned().exists()
    }

    /// The pod's writable disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// What the guest says on its serial port.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// The serial console.
    pub fn console_socket(&self) -> PathBuf {
        self.run_dir.join("console.sock")
    }

    /// The agent's channel.
    pub fn agent_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    fn record(&self) -> PathBuf {
        self.dir.join("machine.json")
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, record: &Record) -> Result<()> {
        let json = serde_json::to_vec_pretty(record).context(|| "write machine.json".into())?;
        let path = self.record();
        write_atomically(&path, &json, PRIVATE)
    }

    /// Reads the record; `None`: there is none. One that cannot be read is kept aside
    /// under another name, and what its file name alone tells must do.
    ///
    /// # Errors
    /// The file is there but cannot be opened.
    pub fn load(&self) -> Result<Option<Record>> {
        let path = self.record();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::other(format!("read {}", path.display()), error)),
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) if record.version <= VERSION => Ok(Some(record)),
            Ok(record) => {
                warn!(
                    "{}: version {} is newer than {VERSION}",
                    path.display(),
                    record.version
                );
                Ok(Some(record))
            }
            Err(error) => {
                let aside = path.with_extension("json.damaged");
                warn!("{}: {error}; kept as {}", path.display(), aside.display());
                files::rename(&path, &aside)
                    .context(|| format!("keep {} aside", path.display()))?;
                Ok(None)
            }
        }
    }

    /// Whether anything of the machine is on disk.
    pub fn exists(&self) -> bool {
        self.dir.exists() || self.run_dir.exists()
    }

    /// Removes both folders with all in them.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn remove(&self) -> Result<()> {
        for dir in [&self.run_dir, &self.dir] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::other(format!("remove {}", dir.display()), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Keeps what the guest says on its serial port from filling the disk: beyond `limit`
    /// bytes its last half goes to `console.log.1`, and the log begins anew. QEMU goes on
    /// writing to the same file, for it appends.
    ///
    /// # Errors
    /// The log cannot be read or truncated.
    pub fn bound_console(&self, limit: u64) -> Result<()> {
        let path = self.console();
        let what = || format!("bound {}", path.display());
        let mut log = match File::options().read(true).write(true).open(&path) {
            Ok(log) => log,
            // Nothing was said yet, or the machine is being removed.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).context(what),
        };
        let length = log.metadata().context(what)?.len();
        if length <= limit {
            return Ok(());
        }
        let mut tail = Vec::new();
        log.seek(SeekFrom::Start(length - limit / 2))
            .context(what)?;
        (&log).take(limit).read_to_end(&mut tail).context(what)?;
        write_atomically(&path.with_extension("log.1"), &tail, PRIVATE)?;
        log.set_len(0).context(what)
    }

    /// The console's last lines, for an error's text.
    pub fn console_tail(&self, lines: usize) -> String {
        let text = std::fs::read(self.console()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text
            .lines()
            .map(str::trim_end)
            .filter(|l| !l.is_empty())
            .collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &Path) -> Folder {
        Folder::new(&dir.join("run"), &dir.join("lib"), pod_uuid("k8s.io", "s1"))
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("dir");
        let folder = folder(dir.path());
        assert_eq!(folder.load().expect("load"), None);
        std::fs::create_dir_all(&folder.dir).expect("dir");
        let mut record = Record::new("k8s.io", "s1");
        record.taps.push(("eth0".into(), "dy1".into()));
        folder.save(&record).expect("save");
        assert_eq!(folder.load().expect("load"), Some(record.clone()));
        record.images.insert("5a5a".into(), 3);
        folder.save(&record).expect("save");
        assert_eq!(folder.load().expect("load"), Some(record));
        folder.remove().expect("remove");
        assert!(!folder.exists());
        folder.remove().expect("removing nothing is fine");
    }

    #[test]
    fn a_record_from_before_there_were_sizes_is_read() {
        let dir = tempfile::tempdir().expect("dir");
        let folder = folder(dir.path());
        std::fs::create_dir_all(&folder.dir).expect("dir");
        let record = Record::new("k8s.io", "s1");
        let mut json = serde_json::to_value(&record).expect("json");
        for key in ["size", "reached", "images"] {
            json.as_object_mut().expect("object").remove(key);
        }
        std::fs::write(folder.record(), json.to_string()).expect("file");
        assert_eq!(folder.load().expect("load"), Some(record));
    }

    #[test]
    fn a_damaged_record_is_kept_aside() {
        let dir = tempfile::tempdir().expect("dir");
        let folder = folder(dir.path());
        std::fs::create_dir_all(&folder.dir).expect("dir");
        std::fs::write(folder.record(), "{\"version\":").expect("file");
        assert_eq!(folder.load().expect("load"), None);
        assert!(folder.dir.join("machine.json.damaged").exists());
    }

    #[test]
    fn what_a_damaged_record_knew_is_read_from_the_bundle() {
        let bundle = tempfile::tempdir().expect("dir");
        let bare = Record::new("k8s.io", "s1");
        assert_eq!(bare.clone().read_from_bundle(bundle.path()), bare);
        let namespaces =
            r#"[{"type":"network","path":"/var/run/netns/n"},{"type":"pid"},{"type":"ipc"}]"#;
        std::fs::write(
            bundle.path().join("config.json"),
            format!(
                r#"{{"ociVersion":"1.2.0","linux":{{"cgroupsPath":"/pods/s1","namespaces":{namespaces}}}}}"#
            ),
        )
        .expect("file");
        let read = bare.clone().read_from_bundle(bundle.path());
        assert_eq!(read.uuid, bare.uuid);
        assert_eq!(read.cgroups_path.as_deref(), Some("/pods/s1"));
        assert_eq!(read.netns, Some("/var/run/netns/n".into()));
    }

    #[test]
    fn a_console_that_says_too_much_begins_anew_for_who_appends() {
        use std::io::Write;
        let dir = tempfile::tempdir().expect("dir");
        let folder = folder(dir.path());
        folder.bound_console(10).expect("nothing said yet");
        std::fs::create_dir_all(&folder.dir).expect("dir");
        let log = File::options()
            .append(true)
            .create(true)
            .open(folder.console());
        let mut log = log.expect("log");
        log.write_all(b"0123456789").expect("write");
        folder.bound_console(10).expect("bound");
        assert_eq!(std::fs::read(folder.console()).expect("log"), b"0123456789");
        log.write_all(b"abc").expect("write");
        folder.bound_console(10).expect("bound");
        log.write_all(b"def").expect("write");
        assert_eq!(std::fs::read(folder.console()).expect("log"), b"def");
        let kept = std::fs::read(folder.dir.join("console.log.1")).expect("kept");
        assert_eq!(kept, b"89abc");
    }

    #[test]
    fn the_console_s_tail_has_its_last_lines() {
        let dir = tempfile::tempdir().expect("dir");
        let folder = folder(dir.path());
        std::fs::create_dir_all(&folder.dir).expect("dir");
        assert_eq!(folder.console_tail(2), "");
        std::fs::write(folder.console(), "a\r\nb\r\n\r\nc\r\n").expect("file");
        assert_eq!(folder.console_tail(2), "b\nc");
    }
}
