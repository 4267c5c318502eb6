//! One process: its life, its stdio, its helper.
//!
//! ```text
//!  init:  (helper create) -> Created --Start: notify socket--> Running --exit--> Stopped
//!  exec:  Added --Start: helper exec--> Running --exit--> Stopped
//!         Created may go to Stopped too: it was killed before it was started.
//! ```

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dyad_agent_api::link::guest::{InputSource, Link, OutputSink};
use dyad_agent_api::link::{StdFd, StreamKey};
use dyad_linux::pump::{Fd, resize};
use dyad_linux::reaper::{Reaper, Waiter};
use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{Uid, fchown, pipe2};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::helper::{self, Job};
use crate::pump;

/// Sockets on which helpers send terminals; short, for they are limited to 108 bytes.
const CONSOLES: &str = "/run/dyad/consoles";

/// How long the host may take to fetch output before it is dropped. A host that drains
/// before it deletes, as it should, never meets this.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// How long it may take to acknowledge the end of a stream with nothing left in it.
const END_TAKEN_WITHIN: Duration = Duration::from_millis(500);

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// An exec that was not started.
    Added,
    /// An init that waits to be started.
    Created {
        /// In the guest.
        pid: u32,
    },
    /// It runs.
    Running {
        /// In the guest.
        pid: u32,
    },
    /// It ended.
    Stopped {
        /// In the guest, once.
        pid: u32,
        /// How and when.
        exit: Exit,
    },
}

/// Which streams the host wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The process gets input.
    pub stdin: bool,
    /// Its output is kept.
    pub stdout: bool,
    /// Its error output is kept.
    pub stderr: bool,
    /// All three are one terminal.
    pub terminal: bool,
}

/// A process that the host knows by its id.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    wanted: Wanted,
    phase: watch::Sender<Phase>,
    close_stdin: watch::Sender<bool>,
    io: Mutex<Io>,
}

#[derive(Default)]
struct Io {
    /// Made with the process, taken when it is launched.
    streams: Option<Streams>,
    terminal: Option<Arc<Fd>>,
    /// A size that was set before there was a terminal.
    size: Option<(u16, u16)>,
    outputs: Vec<Arc<OutputSink>>,
    pumps: JoinSet<()>,
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io").finish_non_exhaustive()
    }
}

struct Streams {
    stdin: Option<InputSource>,
    stdout: Option<Arc<OutputSink>>,
    stderr: Option<Arc<OutputSink>>,
}

/// Our ends of a process's stdio.
struct Ours {
    stdin: Option<Arc<Fd>>,
    stdout: Option<Arc<Fd>>,
    stderr: Option<Arc<Fd>>,
    console: Option<Console>,
}

impl Process {
    /// A process that does not run yet; its streams exist from now on.
    pub fn new(id: ProcessId, wanted: Wanted, link: &Link) -> Self {
        let key = |fd| StreamKey::new(id.container.clone(), id.exec.as_deref(), fd);
        let output = |wanted: bool, fd| wanted.then(|| Arc::new(link.output(key(fd))));
        let streams = Streams {
            stdin: wanted.stdin.then(|| link.input(key(StdFd::Stdin))),
            stdout: output(wanted.stdout, StdFd::Stdout),
            stderr: output(wanted.stderr && !wanted.terminal, StdFd::Stderr),
        };
        let io = Io {
            outputs: [&streams.stdout, &streams.stderr]
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            streams: Some(streams),
            ..Default::default()
        };
        Self {
            id,
            wanted,
            phase: watch::Sender::new(Phase::Added),
            close_stdin: watch::Sender::new(false),
            io: Mutex::new(io),
        }
    }

    /// Its id.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Which streams it has.
    pub fn wanted(&self) -> Wanted {
        self.wanted
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Its pid, while it has one.
    pub fn pid(&self) -> Option<u32> {
        match self.phase() {
            Phase::Created { pid } | Phase::Running { pid } => Some(pid),
            Phase::Added | Phase::Stopped { .. } => None,
        }
    }

    /// Waits for its end.
    pub async fn ended(&self) -> (u32, Exit) {
        let mut phase = self.phase.subscribe();
        let stopped = phase.wait_for(|phase| matches!(phase, Phase::Stopped { .. }));
        match stopped.await.map(|phase| *phase) {
            Ok(Phase::Stopped { pid, exit }) => (pid, exit),
            // The sender is ours, so it cannot have gone.
            _ => std::future::pending().await,
        }
    }

    /// Goes from `Created` to `Running`; false where it is not `Created`.
    pub fn set_running(&self) -> bool {
        self.change(|phase| match phase {
            Phase::Created { pid } => Some(Phase::Running { pid }),
            _ => None,
        })
    }

    /// Takes `set_running` back: nobody heard it.
    pub fn set_created_again(&self) {
        self.change(|phase| match phase {
            Phase::Running { pid } => Some(Phase::Created { pid }),
            _ => None,
        });
    }

    /// It has a pid now, or has ended.
    pub fn set_phase(&self, phase: Phase) {
        if let (Phase::Stopped { .. }, Some(terminal)) = (phase, &self.lock().terminal) {
            terminal.process_ended();
        }
        self.phase.send_replace(phase);
    }

    fn change(&self, next: impl FnOnce(Phase) -> Option<Phase>) -> bool {
        self.phase.send_if_modified(|phase| match next(*phase) {
            Some(changed) => {
                *phase = changed;
                true
            }
            None => false,
        })
    }

    /// Runs the helper for `job` and starts to move the process's bytes. Returns its
    /// pid and its end. After a failure the streams are at their end.
    ///
    /// # Errors
    /// What the helper says; `FailedPrecondition` when it was launched before.
    pub async fn launch(
        &self,
        reaper: &Arc<Reaper>,
        mut job: Job,
        uid: u32,
    ) -> Result<(u32, Waiter)> {
        let streams =
            self.lock().streams.take().ok_or_else(|| {
                Error::FailedPrecondition(format!("{} was started before", self.id))
            })?;
        let launched = self.run_helper(reaper, &mut job, uid).await;
        match launched {
            Ok((pid, waiter, ours)) => {
                self.start_pumps(streams, ours)?;
                Ok((pid, waiter))
            }
            Err(error) => {
                for output in &self.lock().outputs {
                    output.close();
                }
                Err(error)
            }
        }
    }

    async fn run_helper(
        &self,
        reaper: &Arc<Reaper>,
        job: &mut Job,
        uid: u32,
    ) -> Result<(u32, Waiter, Ours)> {
        // /proc/self/exe is this binary wherever the initramfs has it.
        let mut command = Command::new("/proc/self/exe");
        let ours = self.stdio(&mut command, uid)?;
        job.console_socket = ours.console.as_ref().map(|console| console.path.clone());
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let file = job.bundle.join(format!("{number}.job"));
        job.write(&file)?;
        command.arg(helper::ARGUMENT).arg(&file).env_clear();

        // The process may end before the helper has told its pid.
        let expectation = reaper.expect();
        let helper = reaper
            .spawn(&mut command)
            .context(|| format!("run the helper for {}", self.id))?;
        // Our copies of the process's ends would keep its pipes open.
        drop(command);
        let ended = helper.exit.wait().await;
        let pid = helper::take_outcome(&file, ended.status);
        let _ = std::fs::remove_file(&file);
        let pid = pid?;
        let waiter = expectation.claim(pid);
        Ok((pid, waiter, ours))
    }

    /// Gives the helper its stdio, which is the process's.
    fn stdio(&self, command: &mut Command, uid: u32) -> Result<Ours> {
        let what = || format!("make the stdio of {}", self.id);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut ours = Ours {
            stdin: None,
            stdout: None,
            stderr: None,
            console: None,
        };
        if self.wanted.terminal {
            ours.console = Some(Console::listen()?);
            return Ok(ours);
        }
        if self.wanted.stdin {
            let (theirs, own) = owned_pipe(uid).context(what)?;
            command.stdin(theirs);
            ours.stdin = Some(Arc::new(Fd::new(own).context(what)?));
        }
        if self.wanted.stdout {
            let (own, theirs) = owned_pipe(uid).context(what)?;
            command.stdout(theirs);
            ours.stdout = Some(Arc::new(Fd::new(own).context(what)?));
        }
        if self.wanted.stderr {
            let (own, theirs) = owned_pipe(uid).context(what)?;
            command.stderr(theirs);
            ours.stderr = Some(Arc::new(Fd::new(own).context(what)?));
        }
        Ok(ours)
    }

    fn start_pumps(&self, streams: Streams, ours: Ours) -> Result<()> {
        let close = self.close_stdin.subscribe();
        let mut io = self.lock();
        if let Some(console) = ours.console {
            let terminal = console.take()?;
            if let Some((width, height)) = io.size {
                resize(&*terminal, width, height)
                    .context(|| format!("resize the terminal of {}", self.id))?;
            }
            if let Some(sink) = streams.stdout {
                io.pumps.spawn(pump::output(Arc::clone(&terminal), sink));
            }
            if let Some(source) = streams.stdin {
                io.pumps
                    .spawn(pump::input(source, Arc::clone(&terminal), close));
            }
            io.terminal = Some(terminal);
            return Ok(());
        }
        if let (Some(source), Some(to)) = (streams.stdin, ours.stdin) {
            io.pumps.spawn(pump::input(source, to, close));
        }
        for (sink, from) in [(streams.stdout, ours.stdout), (streams.stderr, ours.stderr)] {
            if let (Some(sink), Some(from)) = (sink, from) {
                io.pumps.spawn(pump::output(from, sink));
            }
        }
        Ok(())
    }

    /// Sets the terminal's size, now or when there is one.
    ///
    /// # Errors
    /// `FailedPrecondition` where the process has none.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        if !self.wanted.terminal {
            return Err(Error::FailedPrecondition(format!(
                "{} has no terminal",
                self.id
            )));
        }
        let mut io = self.lock();
        io.size = Some((width, height));
        match &io.terminal {
            Some(terminal) => resize(&**terminal, width, height)
                .context(|| format!("resize the terminal of {}", self.id)),
            None => Ok(()),
        }
    }

    /// Closes its stdin behind what has arrived.
    pub fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }

    /// Waits, bounded, until the host has taken all output, and forgets the streams.
    pub async fn drain_streams(&self, link: &Link) {
        let outputs = {
            let io = self.lock();
            // Never launched: there is no output to come.
            if io.streams.is_some() {
                Vec::new()
            } else {
                io.outputs.clone()
            }
        };
        let drained = async {
            for output in &outputs {
                // An error: its stream is gone already.
                let _ = output.drained().await;
            }
        };
        let limit = if self.holds_bytes(link) {
            DRAIN_WITHIN
        } else {
            END_TAKEN_WITHIN
        };
        if tokio::time::timeout(limit, drained).await.is_err() && self.holds_bytes(link) {
            log::warn!("{}: output that nobody took is dropped", self.id);
        }
        self.forget_streams(link);
    }

    /// Whether output waits for the host.
    fn holds_bytes(&self, link: &Link) -> bool {
        link.streams().iter().any(|stream| {
            stream.key.container_id == self.id.container
                && stream.key.exec_id == self.id.exec
                && stream.key.fd != StdFd::Stdin
                && stream.end > stream.offset
        })
    }

    /// Forgets the streams and what they hold.
    pub fn forget_streams(&self, link: &Link) {
        let mut io = self.lock();
        io.pumps.abort_all();
        io.streams = None;
        io.outputs.clear();
        io.terminal = None;
        for fd in [StdFd::Stdin, StdFd::Stdout, StdFd::Stderr] {
            let exec = self.id.exec.as_deref();
            link.remove(&StreamKey::new(self.id.container.clone(), exec, fd));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Io> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pipe that the process's user may open again through /proc/self/fd, as programs
/// do with /dev/stdout.
fn owned_pipe(uid: u32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    if uid != 0 {
        fchown(&write, Some(Uid::from_raw(uid)), None)?;
    }
    Ok((read, write))
}

/// Where a helper sends the master of the terminal that it made in the container.
struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn listen() -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        std::fs::create_dir_all(CONSOLES).context(|| format!("create {CONSOLES}"))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(CONSOLES).join(number.to_string());
        let listener =
            UnixListener::bind(&path).context(|| format!("listen on {}", path.display()))?;
        Ok(Self { path, listener })
    }

    /// Takes the master. The helper has ended well, so it is there: this does not wait.
    fn take(&self) -> Result<Arc<Fd>> {
        let what = || "take the terminal from the helper".to_owned();
        self.listener.set_nonblocking(true).context(what)?;
        let (stream, _) = self.listener.accept().context(what)?;
        let mut name = [0; 256];
        let mut parts = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).context(what)?;
        let mut received = Vec::new();
        for control in message.cmsgs().context(what)? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just made these descriptors for us alone.
                received.extend(
                    fds.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let master = received
            .pop()
            .ok_or_else(|| Error::other(what(), "there is none in its message"))?;
        Ok(Arc::new(Fd::terminal(master).context(what)?))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
