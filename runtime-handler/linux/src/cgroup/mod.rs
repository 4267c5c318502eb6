//! Control groups, v1, hybrid and v2: where a process's is, what it uses, and who is in it.
//!
//! - [`Hierarchies`]: where the host has them mounted; the way to a [`Cgroup`].
//! - [`Cgroup`]: processes, freezer, signals, removal, [`Cgroup::stats`].
//! - [`OomWatch`]: tells of kills for memory.
//!
//! Kernel documents: `admin-guide/cgroup-v1/*.rst` and `admin-guide/cgroup-v2.rst`.

mod make;
mod oom;
mod paths;
mod stats;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::reaper::kill_raw;
use dyad_runtime_handler::error::{Context, Error, Result};

pub use oom::OomWatch;
pub use paths::{Hierarchies, is_systemd, systemd_slice};

/// How long the last processes of a cgroup may take to go, and the freezer to freeze.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at what the kernel gives no event for (v1's freezer, `rmdir`).
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// One control group: on v1 a directory for each controller, on v2 one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Dirs,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Dirs {
    /// Controller name (`memory`, `name=systemd`) to directory; on a hybrid host the
    /// v2 directory too, under the name `""`, as `/proc/PID/cgroup` has it.
    V1(BTreeMap<String, PathBuf>),
    V2(PathBuf),
}

/// The file that every cgroup has.
const PROCS: &str = "cgroup.procs";
/// v2 gives no controller name.
const UNIFIED: &str = "";

impl Cgroup {
    /// The v2 cgroup in `dir`.
    pub fn v2(dir: impl Into<PathBuf>) -> Self {
        Self {
            dirs: Dirs::V2(dir.into()),
        }
    }

    /// The v1 cgroup in these directories, by controller; a single one without a name is
    /// the v2 cgroup. So runc writes them down (`cgroup_paths` in its state). The root of
    /// a hierarchy, which is nobody's to signal or remove, is left out.
    pub fn of_dirs(mut dirs: BTreeMap<String, PathBuf>) -> Option<Self> {
        let in_cgroup = |dir: &Path| dir.parent().is_some_and(|up| up.join(PROCS).exists());
        dirs.retain(|_, dir| in_cgroup(dir));
        let dirs = match (dirs.len(), dirs.contains_key(UNIFIED)) {
            (0, _) => return None,
            (1, true) => Dirs::V2(dirs.remove(UNIFIED)?),
            _ => Dirs::V1(dirs),
        };
        Some(Self { dirs })
    }

    /// Whether it is (still) there.
    pub fn exists(&self) -> bool {
        self.main_dir().is_some_and(Path::exists)
    }

    /// Pids of all processes in it and below, ascending; none when it is gone.
    ///
    /// # Errors
    /// A directory that is there could not be read.
    pub fn procs(&self) -> Result<Vec<u32>> {
        let mut pids = BTreeSet::new();
        if let Some(dir) = self.main_dir() {
            collect_procs(dir, &mut pids)
                .context(|| format!("read processes of cgroup {}", dir.display()))?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Sends `signal` to every process in it, leaving out none that forks meanwhile:
    /// the group is frozen for it (unless it was), and left frozen only if it was.
    /// `SIGKILL` thaws it, for v1 kills no frozen process.
    ///
    /// # Errors
    /// `NotFound` where there is no process; else the cgroup could not be read, or
    /// `kill(2)` refused.
    pub async fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL && self.kill_v2()? {
            return Ok(());
        }
        // At the end of most processes nothing is left, and freezing takes its time.
        if self.procs()?.is_empty() {
            return Err(Error::NotFound("a process in the cgroup".into()));
        }
        let was_frozen = self.is_frozen();
        // Without a freezer there is still the list.
        let froze = !was_frozen && self.freeze().await.is_ok();
        let sent = self.signal_each(signal);
        if froze || (was_frozen && signal == libc::SIGKILL) {
            self.thaw()?;
        }
        sent
    }

    /// Kills every process in it, and waits until they are gone. Gone already: fine.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `within`; `kill(2)` refused.
    pub async fn kill(&self, within: Duration) -> Result<()> {
        match self.signal_all(libc::SIGKILL).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + within;
        loop {
            let left = self.procs()?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::DeadlineExceeded(format!(
                    "kill cgroup {}: processes {left:?} are left after {} s",
                    self.main_dir().unwrap_or(Path::new("?")).display(),
                    within.as_secs()
                )));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn signal_each(&self, signal: i32) -> Result<()> {
        for pid in self.procs()? {
            match kill_raw(pid as i32, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    return Err(Error::other(
                        format!("send signal {signal} to {pid}"),
                        errno,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Kills by `cgroup.kill` (v2, Linux 5.14); false where there is none.
    fn kill_v2(&self) -> Result<bool> {
        let Dirs::V2(dir) = &self.dirs else {
            return Ok(false);
        };
        match fs::write(dir.join("cgroup.kill"), "1") {
            Ok(()) => Ok(true),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(Error::other(
                format!("kill cgroup {}", dir.display()),
                error,
            )),
        }
    }

    /// Stops all its processes, and waits until they are.
    ///
    /// # Errors
    /// No freezer, or it did not get them all in time (then all run again).
    pub async fn freeze(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        match &self.dirs {
            Dirs::V2(dir) => {
                let file = dir.join("cgroup.freeze");
                fs::write(&file, "1").context(|| format!("write {}", file.display()))?;
                while !self.is_frozen() {
                    self.look_again(deadline, "freeze").await?;
                }
            }
            Dirs::V1(_) => {
                let file = self.v1_file("freezer", "freezer.state")?;
                loop {
                    // A task that forks just now can leave the group half-frozen for
                    // ever; saying it again gets it (as runc does).
                    fs::write(&file, "FROZEN").context(|| format!("write {}", file.display()))?;
                    if self.is_frozen() {
                        break;
                    }
                    self.look_again(deadline, "freeze").await?;
                }
            }
        }
        Ok(())
    }

    /// Undoes [`Self::freeze`].
    ///
    /// # Errors
    /// No freezer.
    pub fn thaw(&self) -> Result<()> {
        let (file, word) = match &self.dirs {
            Dirs::V2(dir) => (dir.join("cgroup.freeze"), "0"),
            Dirs::V1(_) => (self.v1_file("freezer", "freezer.state")?, "THAWED"),
        };
        fs::write(&file, word).context(|| format!("write {}", file.display()))
    }

    /// Whether all its processes are stopped.
    pub fn is_frozen(&self) -> bool {
        match &self.dirs {
            Dirs::V2(dir) => fs::read_to_string(dir.join("cgroup.events"))
                .is_ok_and(|events| events.lines().any(|line| line == "frozen 1")),
            Dirs::V1(_) => self
                .v1_file("freezer", "freezer.state")
                .and_then(|file| fs::read_to_string(&file).context(|| "read".into()))
                .is_ok_and(|state| state.trim_end() == "FROZEN"),
        }
    }

    async fn look_again(&self, deadline: Instant, what: &str) -> Result<()> {
        if Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
            return Ok(());
        }
        // Half-frozen is the worst of both.
        let _ = self.thaw();
        Err(Error::DeadlineExceeded(format!(
            "{what} cgroup {}: not done after {} s",
            self.main_dir().unwrap_or(Path::new("?")).display(),
            PATIENCE.as_secs()
        )))
    }

    /// Kills what is left in it and removes it with all below. Gone already: fine.
    ///
    /// # Errors
    /// A directory that stays, and why.
    pub async fn remove(&self) -> Result<()> {
        if !self.procs()?.is_empty() {
            match self.signal_all(libc::SIGKILL).await {
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for dir in self.dirs() {
            // The last process leaves its cgroup a moment after its end.
            loop {
                match remove_tree(dir) {
                    Ok(()) => break,
                    Err(error) if is_gone(&error) => break,
                    Err(_) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
                    Err(error) => {
                        return Err(Error::other(
                            format!("remove cgroup {}", dir.display()),
                            error,
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The directory that lists the processes: on v1 the first that is there of those
    /// which every OCI runtime makes.
    fn main_dir(&self) -> Option<&Path> {
        match &self.dirs {
            Dirs::V2(dir) => Some(dir),
            Dirs::V1(dirs) => ["freezer", "pids", "memory", "devices", "cpu"]
                .iter()
                .find_map(|controller| dirs.get(*controller))
                .or_else(|| dirs.values().next())
                .map(PathBuf::as_path),
        }
    }

    /// Each controller with its directory: on v1 by name (on a hybrid host the v2 one under
    /// `""`), on v2 one without a name.
    pub fn controllers(&self) -> Vec<(&str, &Path)> {
        match &self.dirs {
            Dirs::V2(dir) => vec![(UNIFIED, dir.as_path())],
            Dirs::V1(dirs) => dirs
                .iter()
                .map(|(controller, dir)| (controller.as_str(), dir.as_path()))
                .collect(),
        }
    }

    fn dirs(&self) -> BTreeSet<&Path> {
        match &self.dirs {
            Dirs::V2(dir) => BTreeSet::from([dir.as_path()]),
            Dirs::V1(dirs) => dirs.values().map(PathBuf::as_path).collect(),
        }
    }

    /// A file of a v1 controller.
    fn v1_file(&self, controller: &str, name: &str) -> Result<PathBuf> {
        let dir = match &self.dirs {
            Dirs::V1(dirs) => dirs.get(controller),
            Dirs::V2(dir) => Some(dir),
        };
        dir.map(|dir| dir.join(name)).ok_or_else(|| {
            Error::FailedPrecondition(format!("the host has no cgroup controller {controller}"))
        })
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        // ENODEV: an open directory whose cgroup was removed.
        Some(libc::ENOENT | libc::ENODEV)
    )
}

fn collect_procs(dir: &Path, pids: &mut BTreeSet<u32>) -> io::Result<()> {
    let list = match fs::read_to_string(dir.join(PROCS)) {
        Ok(list) => list,
        Err(error) if is_gone(&error) => return Ok(()),
        // A threaded v2 group: its processes are listed in the group above.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        Err(error) => return Err(error),
    };
    for line in list.lines() {
        // 0: a process of another pid namespace, which we could not name anyway.
        match line.parse() {
            Ok(0) => {}
            Ok(pid) => {
                pids.insert(pid);
            }
            Err(_) => {
                let text = format!("cgroup.procs: not a pid: {line:?}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
    for below in subdirs(dir)? {
        collect_procs(&below, pids)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for below in subdirs(dir)? {
        remove_tree(&below)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

fn subdirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory tree like a v2 cgroup with a group below.
    fn fixture() -> (tempfile::TempDir, Cgroup) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "12\n7\n").unwrap();
        fs::write(dir.path().join("below/cgroup.procs"), "0\n3\n").unwrap();
        let cgroup = Cgroup::v2(dir.path());
        (dir, cgroup)
    }

    #[test]
    fn procs_are_those_of_the_whole_tree() {
        let (_dir, cgroup) = fixture();
        assert_eq!(cgroup.procs().unwrap(), [3, 7, 12]);
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_processes() {
        let cgroup = Cgroup::v2("/no/such/cgroup");
        assert_eq!(cgroup.procs().unwrap(), [0_u32; 0]);
        assert!(!cgroup.exists());
    }

    #[test]
    fn garbage_in_procs_is_an_error_that_shows_it() {
        let (dir, cgroup) = fixture();
        fs::write(dir.path().join("cgroup.procs"), "12\nx\n").unwrap();
        let error = cgroup.procs().unwrap_err().chain();
        assert!(error.contains("not a pid: \"x\""), "{error}");
    }

    #[test]
    fn the_version_is_told_by_the_controllers() {
        let (dir, _) = fixture();
        let below = dir.path().join("below");
        let dirs = |names: &[&str], dir: &Path| {
            let entry = |name: &&str| ((*name).to_owned(), dir.to_owned());
            Cgroup::of_dirs(names.iter().map(entry).collect())
        };
        assert_eq!(dirs(&[], &below), None);
        assert_eq!(dirs(&[""], &below), Some(Cgroup::v2(&below)));
        for names in [&["memory"][..], &["", "memory"]] {
            let cgroup = dirs(names, &below).unwrap();
            assert!(matches!(cgroup.dirs, Dirs::V1(_)), "{names:?}");
            assert_eq!(dirs(names, dir.path()), None, "the root is nobody's");
        }
    }

    #[tokio::test]
    async fn removing_what_is_gone_succeeds() {
        Cgroup::v2("/no/such/cgroup").remove().await.unwrap();
    }

    #[tokio::test]
    async fn freezing_without_a_freezer_is_an_error() {
        let cgroup = Cgroup {
            dirs: Dirs::V1(BTreeMap::new()),
        };
        let error = cgroup.freeze().await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    }
}
