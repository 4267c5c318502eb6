//! The only module that runs the OCI runtime.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dyad_linux::pump::{Ends, Fd};
use dyad_linux::reaper::{Reaper, Waiter};
use dyad_runtime_handler::error::{Context, Error, Result};

use crate::command::{Command, Global, classify, error_in_log};

/// An OCI runtime, for one pod.
#[derive(Debug)]
pub(crate) struct Runtime {
    binary: PathBuf,
    state: StateDirs,
    reaper: Arc<Reaper>,
    /// Tells the files of concurrent commands apart.
    count: AtomicU64,
}

/// Where an OCI runtime keeps the state of a pod's containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDirs {
    /// Its own `--root`.
    pub root: PathBuf,
    /// The pod's. It is `root` too, unless the configuration names one that pods share: then
    /// it has an empty folder for each container of the pod, which so is known whole when
    /// its shim is dead.
    pub pod: PathBuf,
}

impl StateDirs {
    fn is_shared(&self) -> bool {
        self.root != self.pod
    }

    /// Removes the pod's folders of a container that is gone.
    pub(crate) fn forget(&self, id: &str) {
        if self.is_shared() {
            let _ = fs::remove_dir(self.pod.join(id));
        }
        // The last one closes the door; others of the pod may still be there.
        let _ = fs::remove_dir(&self.pod);
    }
}

/// A process that the runtime made, and which is our child now.
#[derive(Debug)]
pub(crate) struct Made {
    pub pid: u32,
    pub exit: Waiter,
}

/// What the runtime's own process gets as stdio; `create` and `exec` hand it on.
pub(crate) enum Input {
    None,
    /// The process's ends.
    Ends(Ends),
    /// Text on stdin, no longer than a pipe holds (64 KiB).
    Text(Vec<u8>),
}

impl Runtime {
    pub(crate) fn new(binary: PathBuf, state: StateDirs, reaper: Arc<Reaper>) -> Self {
        Self {
            binary,
            state,
            reaper,
            count: AtomicU64::new(0),
        }
    }

    pub(crate) fn reaper(&self) -> &Arc<Reaper> {
        &self.reaper
    }

    /// A file name that no other command uses, of this process or another.
    pub(crate) fn unique(&self, what: &str) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("dyad-{what}-{}-{count}", std::process::id())
    }

    /// Runs `command` to its end. `name` is the container, `dir` takes short-lived files.
    ///
    /// # Errors
    /// The runtime cannot be run, or what it says, by class.
    pub(crate) async fn run(
        &self,
        command: Command<'_>,
        name: &str,
        systemd_cgroup: bool,
        dir: &Path,
        input: Input,
    ) -> Result<()> {
        let log = ShortLived(dir.join(self.unique("log")));
        let mut program = Program::new(&self.binary);
        program
            .args(command.argv(Global {
                root: &self.state.root,
                log: &log.0,
                systemd_cgroup,
            }))
            // It would take the shim's own notifications (sd_notify) for the container's.
            .env_remove("NOTIFY_SOCKET")
            .envs(command.env(std::env::var_os("PATH").as_deref()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut text = None;
        match input {
            Input::None => {}
            Input::Ends(ends) => {
                let stdio = |end: Option<_>| end.map_or_else(Stdio::null, Stdio::from);
                program
                    .stdin(stdio(ends.stdin))
                    .stdout(stdio(ends.stdout))
                    .stderr(stdio(ends.stderr));
            }
            Input::Text(given) => {
                program.stdin(Stdio::piped());
                text = Some(given);
            }
        }
        let mut child = self.reaper.spawn(&mut program).map_err(|error| {
            let context = format!("run the OCI runtime {}", self.binary.display());
            Error::other(context, error)
        })?;
        // It holds the process's ends of the pipes, which would keep them open.
        drop(program);
        if let (Some(text), Some(mut stdin)) = (text, child.stdin.take()) {
            // A runtime that does not read says why when it ends.
            let _ = stdin.write_all(&text);
        }
        let exit = child.exit.wait().await;
        if exit.status == 0 {
            return Ok(());
        }
        let log = fs::read_to_string(&log.0).unwrap_or_default();
        let message = error_in_log(&log)
            .unwrap_or_else(|| format!("{} ended with {}", self.binary.display(), exit.status));
        Err(classify(command.word(), name, &message))
    }

    /// Runs a `command` that makes a process and writes its pid to `pid_file`.
    ///
    /// # Errors
    /// As [`Self::run`]; no pid was written.
    pub(crate) async fn make(
        &self,
        command: Command<'_>,
        name: &str,
        systemd_cgroup: bool,
        dir: &Path,
        ends: Ends,
        pid_file: &Path,
    ) -> Result<Made> {
        // The process may end before the runtime does.
        let expectation = self.reaper.expect();
        self.run(command, name, systemd_cgroup, dir, Input::Ends(ends))
            .await?;
        let text =
            fs::read_to_string(pid_file).context(|| format!("read {}", pid_file.display()))?;
        let pid = text
            .trim()
            .parse()
            .context(|| format!("read {}: {text:?} is no pid", pid_file.display()))?;
        let exit = expectation.claim(pid);
        Ok(Made { pid, exit })
    }

    /// Starts a created container.
    ///
    /// What `runc start` does is to open `exec.fifo` in the container's state directory,
    /// read what init writes there when it goes on, and remove it (libcontainer's
    /// `Container.Exec`); a process for that is a third of a container's start. Where
    /// that FIFO is runc's, and no hooks wait for the start, it is done here.
    ///
    /// # Errors
    /// The process had ended already, or what the runtime says.
    pub(crate) async fn start(
        &self,
        id: &str,
        systemd_cgroup: bool,
        dir: &Path,
        has_start_hooks: bool,
        ended: impl Future<Output = ()>,
    ) -> Result<()> {
        let state = self.state.root.join(id);
        let fifo = state.join("exec.fifo");
        // crun has a FIFO of that name, written the other way round, but no state.json.
        if !has_start_hooks && state.join("state.json").exists() && fifo.exists() {
            return open_exec_fifo(&fifo, ended)
                .await
                .context(|| format!("start container {id}"));
        }
        let command = Command::Start { id };
        self.run(command, id, systemd_cgroup, dir, Input::None)
            .await
    }

    /// Removes what the runtime keeps of a container, and its cgroups; succeeds if there is
    /// no such container.
    ///
    /// `delete --force` sends SIGKILL and looks only 100 ms later whether it worked (runc's
    /// `killContainer`), also at a container that has ended. So the plain one goes first.
    ///
    /// # Errors
    /// What the runtime says, to both.
    pub(crate) async fn delete(&self, id: &str, systemd_cgroup: bool, dir: &Path) -> Result<()> {
        let delete = |force| {
            let command = Command::Delete { id, force };
            self.run(command, id, systemd_cgroup, dir, Input::None)
        };
        match delete(false).await {
            Ok(()) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => {
                log::info!("{}; once more, with force", error.chain());
                delete(true).await
            }
        }
    }

    /// Whether the runtime has state of `id`.
    pub(crate) fn knows(&self, id: &str) -> bool {
        self.state.root.join(id).exists()
    }

    /// Makes the directories for the state of `id`.
    ///
    /// # Errors
    /// What mkdir(2) says.
    pub(crate) fn prepare(&self, id: &str) -> Result<()> {
        let make =
            |dir: &Path| fs::create_dir_all(dir).context(|| format!("make {}", dir.display()));
        make(&self.state.root)?;
        match self.state.is_shared() {
            true => make(&self.state.pod.join(id)),
            false => Ok(()),
        }
    }

    /// Removes what [`Self::prepare`] made, unless others have state there.
    pub(crate) fn finish(&self, id: &str) {
        self.state.forget(id);
    }
}

async fn open_exec_fifo(path: &Path, ended: impl Future<Output = ()>) -> io::Result<()> {
    // For writing too: else, before init has opened it, reading it finds an end.
    let fifo = fs::File::options().read(true).write(true).open(path)?;
    let fifo = Fd::new(fifo.into())?;
    let mut byte = [0; 8];
    let gone = || io::Error::other("container process is already dead");
    let read = tokio::select! {
        biased;
        read = fifo.read(&mut byte) => read?,
        // It may have gone on and ended before we looked.
        () = ended => fifo.try_read(&mut byte)?.ok_or_else(gone)?,
    };
    if read == 0 {
        return Err(gone());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A file that goes when it is no longer needed.
pub(crate) struct ShortLived(pub(crate) PathBuf);

impl Drop for ShortLived {
    fn drop(&mut self) {
        // It need not be there; and the directory goes as a whole in the end.
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs `binary features` in a process that has a reaper.
///
/// # Errors
/// It cannot be run, or fails (an old runtime, that has no such command).
pub(crate) async fn features(reaper: &Arc<Reaper>, binary: &Path) -> io::Result<String> {
    let mut child = reaper.spawn(&mut features_program(binary))?;
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let stdout = Fd::new(stdout.into())?;
        let mut buffer = vec![0; 8192];
        loop {
            match stdout.read(&mut buffer).await? {
                0 => break,
                length => text.extend_from_slice(&buffer[..length]),
            }
        }
    }
    match child.exit.wait().await.status {
        0 => Ok(String::from_utf8_lossy(&text).into_owned()),
        _ => Err(no_features()),
    }
}

/// The same where nobody else waits for children.
///
/// # Errors
/// As [`features`]; also after `bound`.
pub(crate) fn features_here(binary: &Path, bound: Duration) -> io::Result<String> {
    let mut child = features_program(binary).spawn()?;
    let deadline = Instant::now() + bound;
    // Its few kilobytes fit into the pipe, so it ends without being read.
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            None => {
                child.kill()?;
                child.wait()?;
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    };
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        io::Read::read_to_string(&mut stdout, &mut text)?;
    }
    if status.success() {
        Ok(text)
    } else {
        Err(no_features())
    }
}

fn features_program(binary: &Path) -> Program {
    let mut program = Program::new(binary);
    program
        .arg("features")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    program
}

fn no_features() -> io::Error {
    io::Error::other("it has no command `features`: too old")
}
