//! What is done to one container, here and there.
//!
//! ```text
//!  source:  describe ... pre_dump* ... freeze, settle, dump --> let_go | thaw
//!  target:  describe ... (files come) ... restore --> settle_in | let_go
//! ```
//! A dump leaves the container frozen as it was, so giving up is but a thaw.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_linux::pump::{self, Unread};
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::spec::RootMount;
use oci_spec::runtime::{Mount, Spec};
use uuid::Uuid;

use super::criu::{Criu, words};
use super::plan::{self, Described, Volume};
use super::sockets::{Socket, sockets};
use super::tree;
use crate::command::{self, Command};
use crate::container::{Container, Images, Init};

/// How long its reader may take what a container wrote before it was frozen.
const SETTLE: Duration = Duration::from_secs(10);
/// Open by nearly everything, and the same on every node: null, zero, full, random,
/// urandom; tty and ptmx.
const PLAIN_DEVICES: [(u64, u64); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
/// Kernel objects without a path that CRIU knows.
const ANONYMOUS: [&str; 7] = [
    "[eventpoll]",
    "[eventfd]",
    "[signalfd]",
    "[timerfd]",
    "inotify",
    "[fanotify]",
    "[pidfd]",
];

/// An overlay's parts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layers {
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
}

impl Layers {
    /// Of a container's root.
    pub(crate) fn of(mounts: &[RootMount]) -> Result<Self> {
        let refuse = || {
            Error::FailedPrecondition(
                "its root file system is no overlay of its image: use the overlayfs snapshotter"
                    .into(),
            )
        };
        let [mount] = mounts else {
            return Err(refuse());
        };
        let option = |name: &str| {
            mount
                .options
                .iter()
                .find_map(|option| option.strip_prefix(name))
        };
        match (
            mount.fstype.as_str(),
            option("lowerdir="),
            option("upperdir="),
        ) {
            ("overlay", Some(lower), Some(upper)) if option("uidmap=").is_none() => Ok(Self {
                lower: lower.split(':').map(PathBuf::from).collect(),
                upper: upper.into(),
            }),
            _ => Err(refuse()),
        }
    }
}

/// Tells image content apart: every file's name, kind, owner, size and time.
fn fingerprint(layer: &Path) -> io::Result<String> {
    use std::os::unix::fs::MetadataExt;
    let mut all = Uuid::nil();
    for (path, metadata) in tree::scan(layer)?.iter().skip(1) {
        let time = if metadata.is_dir() {
            0
        } else {
            metadata.mtime()
        };
        let size = if metadata.is_dir() { 0 } else { metadata.len() };
        let line = format!(
            "{} {:o} {} {} {size} {time}",
            path.display(),
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
        );
        all = Uuid::new_v5(&all, line.as_bytes());
    }
    Ok(all.to_string())
}

/// What can be seen of a running container's processes.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// What cannot move, by name.
    pub blockers: Vec<String>,
    /// Addresses that sockets are bound to, others than any and loopback.
    pub addresses: BTreeSet<IpAddr>,
    pub memory_bytes: u64,
}

impl Container {
    /// Its spec, as the OCI runtime has it.
    pub(crate) fn read_spec(&self) -> Result<Spec> {
        let path = self.bundle().join("config.json");
        let text = fs::read(&path).context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).context(|| format!("understand {}", path.display()))
    }

    fn named(&self, what: impl std::fmt::Display) -> String {
        format!("container {}: {what}", self.about.name)
    }

    pub(crate) fn layers(&self) -> Result<Layers> {
        Layers::of(&self.about.mounts).map_err(|error| Error::FailedPrecondition(self.named(error)))
    }

    /// Bind mounts by destination, with the directory or file on the host.
    pub(crate) fn volumes(&self) -> Result<Vec<(String, PathBuf, Volume)>> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")
            .context(|| "read /proc/self/mountinfo".into())?;
        let spec = self.read_spec()?;
        let is_bind = |mount: &&Mount| mount.typ().as_deref() == Some("bind");
        Ok(spec
            .mounts()
            .iter()
            .flatten()
            .filter(is_bind)
            .map(|mount| {
                (
                    mount.destination().to_string_lossy().into_owned(),
                    mount.source().clone().unwrap_or_default(),
                    plan::volume(mount, &mountinfo),
                )
            })
            .collect())
    }

    /// Its side of a manifest.
    ///
    /// # Errors
    /// What in its spec cannot move.
    pub(crate) async fn describe(&self) -> Result<Described> {
        if self.about.name.is_empty() {
            return Err(Error::FailedPrecondition(format!(
                "container {} has no Kubernetes name: only pods of CRI migrate",
                self.id()
            )));
        }
        if let Some(blocker) = plan::blocker(&self.read_spec()?, self.about.terminal) {
            return Err(Error::FailedPrecondition(self.named(blocker)));
        }
        let lower = self.layers()?.lower;
        let layers = tokio::task::spawn_blocking(move || {
            lower
                .iter()
                .map(|dir| fingerprint(dir))
                .collect::<io::Result<_>>()
        })
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        .context(|| self.named("read its image"))?;
        let volumes = self.volumes()?;
        Ok(Described {
            layers,
            stdio: self.about.stdio,
            mounts: volumes
                .into_iter()
                .map(|(destination, _, volume)| (destination, volume))
                .collect(),
        })
    }

    fn running(&self) -> Result<Init> {
        let init = self.init()?;
        if !init.started || init.process.exit().is_some() {
            return Err(Error::FailedPrecondition(self.named(
                "it does not run: a pod moves while all of its containers run",
            )));
        }
        Ok(init)
    }

    /// Looks at its processes.
    pub(crate) fn look(&self, tcp_established: bool) -> Result<Seen> {
        let init = self.running()?;
        let mut seen = Seen::default();
        let mut blocked = |what: String| seen.blockers.push(self.named(what));
        for exec in self.running_execs() {
            blocked(format!(
                "exec {exec} runs in it, and does not migrate: end it first"
            ));
        }
        let layer = self.layers()?.upper;
        for device in tree::devices(&layer).context(|| format!("read {}", layer.display()))? {
            blocked(format!("/{} is a device file: remove it", device.display()));
        }
        let pids = match &init.cgroup {
            Some(cgroup) => cgroup.procs()?,
            None => vec![init.process.pid],
        };
        for pid in pids {
            for what in open_files(pid) {
                blocked(format!("process {pid} has {what} open"));
            }
        }
        for object in ipc_objects(init.process.pid) {
            blocked(format!(
                "there is {object} in the pod's IPC namespace, which does not migrate: use POSIX shared memory (/dev/shm)"
            ));
        }
        for socket in open_sockets(init.process.pid) {
            let outside = !socket.local.is_unspecified() && !socket.local.is_loopback();
            if socket.connected && !tcp_established {
                blocked(format!(
                    "a TCP connection is open ({}:{} to {}:{}): close it, or ask to take connections along (where the pod's address moves too)",
                    socket.local, socket.local_port, socket.remote, socket.remote_port
                ));
            } else if outside {
                seen.addresses.insert(socket.local);
            }
        }
        if let Some(cgroup) = &init.cgroup {
            seen.memory_bytes = cgroup.stats()?.memory.usage;
        }
        Ok(seen)
    }

    /// Memory that is mapped from a file may be changed without a trace.
    pub(crate) fn maps_files_to_write(&self) -> bool {
        let Ok(init) = self.init() else { return false };
        let pids = init.cgroup.and_then(|cgroup| cgroup.procs().ok());
        pids.unwrap_or_default().iter().any(|pid| {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            maps.lines().any(|line| {
                let mut words = line.split_whitespace();
                let shared = words
                    .nth(1)
                    .is_some_and(|perms| perms.ends_with('s') && perms.contains('w'));
                shared && words.nth(3).is_some_and(|file| file.starts_with('/'))
            })
        })
    }

    /// Freezes it.
    pub(crate) async fn freeze(&self) -> Result<()> {
        match self.running()?.cgroup {
            Some(cgroup) => cgroup.freeze().await,
            None => Err(Error::FailedPrecondition(
                self.named("it has no cgroup to be frozen by"),
            )),
        }
    }

    /// Lets it run on, with its stdin.
    pub(crate) fn thaw(&self) -> Result<()> {
        let init = self.init()?;
        init.process.pump.release_stdin();
        match &init.cgroup {
            Some(cgroup) if cgroup.is_frozen() => cgroup.thaw(),
            _ => Ok(()),
        }
    }

    /// Waits until all that the frozen one wrote is told; returns what it has not read.
    pub(crate) async fn settle(&self) -> Result<Unread> {
        let init = self.running()?;
        let pump = &init.process.pump;
        let mut unread = pump
            .hold_stdin()
            .context(|| self.named("look into its stdin"))?;
        if unread.closed {
            // Bytes that it was given and did not read yet are known to it alone.
            let stdin = PathBuf::from(format!("/proc/{}/fd/0", init.process.pid));
            let is_pipe =
                fs::read_link(&stdin).is_ok_and(|link| link.to_string_lossy().starts_with("pipe:"));
            if is_pipe {
                unread.bytes = pump::peek(&stdin).context(|| self.named("look into its stdin"))?;
            }
        }
        if !pump.settled(SETTLE).await {
            return Err(Error::FailedPrecondition(self.named(format!(
                "nobody reads its output, so what it wrote would be lost ({} s waited)",
                SETTLE.as_secs()
            ))));
        }
        Ok(unread)
    }

    /// Writes its images to `dir/set`, with those of `parent` (a set) as a base.
    /// `pre`: of memory alone, while it runs.
    pub(crate) async fn dump(
        &self,
        criu: &Criu,
        dir: &Path,
        set: &str,
        parent: Option<&str>,
        pre: bool,
        tcp_established: bool,
    ) -> Result<PathBuf> {
        let (images, work) = (dir.join(set), dir.join(format!("{set}-work")));
        for dir in [&images, &work] {
            fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
        }
        let config = work.join("criu.conf");
        fs::write(&config, words::config(tcp_established, &[], false))
            .context(|| format!("write {}", config.display()))?;
        let parent = parent.map(|parent| Path::new("..").join(parent));
        let command = Command::Checkpoint {
            id: self.id(),
            images: &images,
            work: &work,
            parent: parent.as_deref(),
            pre_dump: pre,
            tcp_established,
            criu: command::Criu {
                dir: criu.dir(),
                config: &config,
            },
        };
        let dumped = self.ask_runtime(command).await;
        dumped.map_err(|error| self.explained(error, &work.join("dump.log")))?;
        Ok(images)
    }

    /// CRIU's own words, which the OCI runtime does not hand on.
    pub(crate) fn explained(&self, error: Error, log: &Path) -> Error {
        let text = fs::read(log).unwrap_or_default();
        match words::errors(&String::from_utf8_lossy(&text)) {
            Some(words) => Error::other(self.named(error.chain()), words),
            None => Error::other(self.named("CRIU refused"), error),
        }
    }

    /// Goes on from the images in `dir/dump`; `hold`: once it is [`Self::release`]d.
    pub(crate) async fn restore(
        &self,
        criu: &Criu,
        dir: &Path,
        unread: &Unread,
        tcp_established: bool,
        hold: bool,
    ) -> Result<u32> {
        let work = dir.join("restore-work");
        fs::create_dir_all(&work).context(|| format!("make {}", work.display()))?;
        let join = words::joined_namespaces(&self.read_spec()?);
        let config = work.join("criu.conf");
        fs::write(&config, words::config(tcp_established, &join, hold))
            .context(|| format!("write {}", config.display()))?;
        let images = Images {
            dir: &dir.join("dump"),
            work: &work,
            unread,
            tcp_established,
            criu: command::Criu {
                dir: criu.dir(),
                config: &config,
            },
        };
        let arrived = self.arrive(&images).await;
        arrived.map_err(|error| self.explained(error, &work.join("restore.log")))
    }
}

impl Container {
    /// Lets one go on that was restored to hold.
    pub(crate) async fn release(&self) -> Result<()> {
        match self.init()?.cgroup {
            Some(cgroup) => cgroup.signal_all(libc::SIGCONT).await,
            None => Err(Error::FailedPrecondition(
                self.named("it came up without a cgroup"),
            )),
        }
    }
}

/// Open files of a process that cannot move, by name.
fn open_files(pid: u32) -> Vec<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let dir = PathBuf::from(format!("/proc/{pid}/fd"));
    // One that ended meanwhile has none.
    let files = fs::read_dir(&dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            let link = fs::read_link(file.path()).ok()?;
            let name = link.to_string_lossy();
            if let Some(object) = name.strip_prefix("anon_inode:") {
                return (!ANONYMOUS.contains(&object)).then(|| object.to_owned());
            }
            let metadata = fs::metadata(file.path()).ok()?;
            let device = metadata.rdev();
            let number = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
            let kind = metadata.file_type();
            let foreign = kind.is_block_device()
                || (kind.is_char_device()
                    && !PLAIN_DEVICES.contains(&number)
                    // A terminal of its own.
                    && !(136..144).contains(&number.0));
            foreign.then(|| format!("the device {name}"))
        })
        .collect()
}

/// System V objects of a process's IPC namespace.
fn ipc_objects(pid: u32) -> Vec<String> {
    // These files show the reader's namespace, which is not that of the process: a
    // thread of ours goes there to look.
    let namespace = fs::File::open(format!("/proc/{pid}/ns/ipc"));
    let Ok(namespace) = namespace else {
        return Vec::new();
    };
    let look = || -> io::Result<Vec<String>> {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWIPC)?;
        let mut found = Vec::new();
        for (file, name) in [
            ("shm", "a System V shared memory segment"),
            ("sem", "a System V semaphore"),
            ("msg", "a System V message queue"),
        ] {
            let text = fs::read_to_string(format!("/proc/sysvipc/{file}"))?;
            if text.lines().count() > 1 {
                found.push(name.to_owned());
            }
        }
        Ok(found)
    };
    std::thread::scope(|scope| scope.spawn(look).join())
        .unwrap_or_else(|_| Ok(Vec::new()))
        .unwrap_or_else(|error| {
            log::debug!("look into the IPC namespace of {pid}: {error}");
            Vec::new()
        })
}

fn open_sockets(pid: u32) -> Vec<Socket> {
    ["tcp", "tcp6", "udp", "udp6"]
        .iter()
        .flat_map(|file| {
            let text = fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
            sockets(&text, file.starts_with("tcp"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> RootMount {
        RootMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn only_an_overlay_of_an_image_can_move() {
        let good = overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/b:/a"]);
        let layers = Layers::of(std::slice::from_ref(&good)).unwrap();
        assert_eq!(layers.upper, Path::new("/u"));
        assert_eq!(layers.lower, [Path::new("/b"), Path::new("/a")]);
        let mut bind = good.clone();
        bind.fstype = "bind".into();
        for mounts in [
            vec![],
            vec![bind],
            vec![good.clone(), good],
            vec![overlay(&["lowerdir=/b:/a"])],
            vec![overlay(&["upperdir=/u", "lowerdir=/b", "uidmap=0:1:1"])],
        ] {
            let error = Layers::of(&mounts).unwrap_err().to_string();
            assert!(error.contains("overlayfs snapshotter"), "{error}");
        }
    }

    #[test]
    fn an_image_is_known_by_its_files_wherever_it_lies() {
        let temp = tempfile::tempdir().unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let layer = |name: &str, content: &str| {
            let dir = temp.path().join(name);
            fs::create_dir_all(dir.join("bin")).unwrap();
            fs::write(dir.join("bin/x"), content).unwrap();
            let file = fs::File::options()
                .write(true)
                .open(dir.join("bin/x"))
                .unwrap();
            file.set_modified(time).unwrap();
            fingerprint(&dir).unwrap()
        };
        assert_eq!(layer("a", "123"), layer("b", "123"));
        assert_ne!(layer("a", "123"), layer("c", "1234"));
    }
}
