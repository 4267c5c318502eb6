//! A pod without a pause container, as the driver's sandbox instance.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio as Std};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dyad_linux::cgroup::{Cgroup, Hierarchies};
use dyad_linux::pump::Pump;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::handler::{EventSender, Instance, ProcessId};
use dyad_runtime_handler::spec::{ContainerSpec, ExecSpec, Resources, Stdio};
use dyad_runtime_handler::stats::Stats;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::order::Order;
use super::program::{MAKE, READY};
use crate::process::{AtEnd, Gate, Process};
use crate::runtime::Made;

/// A killed holder has nothing to wait for.
const KILL_BOUND: Duration = Duration::from_secs(10);
/// What a holder says before it is ready.
const COMPLAINT_BYTES: u64 = 8192;

/// A pod's holder.
pub(crate) struct Holder {
    id: String,
    process: Process,
    /// Its own, and that of the whole pod.
    cgroup: Option<Cgroup>,
    pod_cgroup: Option<Cgroup>,
    state: State,
    /// It ends when this does.
    lifeline: Mutex<Option<ChildStdin>>,
}

/// What must be known of it when its shim is dead: `holder.json` where the OCI runtime
/// has its state of a container.
#[derive(Debug, Clone)]
struct State(PathBuf);

#[derive(Debug, Default, Serialize, Deserialize)]
struct Written {
    cgroup_dirs: BTreeMap<String, PathBuf>,
}

/// The cgroup of the holder whose state is in `dir`; `None`: there is no holder's state.
pub(crate) fn cgroup_left(dir: &Path) -> Option<Option<Cgroup>> {
    let text = fs::read(dir.join("holder.json")).ok()?;
    // One that was cut short names no cgroup; the holder itself ended with its shim.
    let written: Written = serde_json::from_slice(&text).unwrap_or_default();
    Some(Cgroup::of_dirs(written.cgroup_dirs))
}

impl State {
    fn write(&self, cgroup: Option<&Cgroup>) -> Result<()> {
        let dirs = cgroup.map(Cgroup::controllers).unwrap_or_default();
        let written = Written {
            cgroup_dirs: dirs
                .into_iter()
                .map(|(name, dir)| (name.to_owned(), dir.to_owned()))
                .collect(),
        };
        let write = || {
            fs::create_dir_all(&self.0)?;
            fs::write(self.0.join("holder.json"), serde_json::to_vec(&written)?)
        };
        write().context(|| format!("write the pod's state in {}", self.0.display()))
    }

    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.0);
        // The last one closes the door.
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

impl Holder {
    /// Makes the pod's namespaces, held by a process of ours. `state_dir` is its own.
    ///
    /// # Errors
    /// `InvalidArgument` naming what this cannot give; what the kernel refused. Nothing is
    /// left then.
    pub(crate) async fn create(
        spec: &ContainerSpec,
        hierarchies: &Hierarchies,
        reaper: &Arc<Reaper>,
        events: &EventSender,
        state_dir: PathBuf,
    ) -> Result<Self> {
        let mut order = Order::new(&spec.id, &spec.oci)?;
        let state = State(state_dir);
        let linux = spec.oci.linux().as_ref();
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().clone());
        let cgroup = match &cgroups_path {
            Some(path) => Some(hierarchies.make(&path.to_string_lossy(), |_| true).await?),
            None => None,
        };
        order.procs_files = cgroup.as_ref().map(Cgroup::procs_files).unwrap_or_default();
        let started = match state.write(cgroup.as_ref()) {
            Ok(()) => start(&order, reaper).await,
            Err(error) => Err(error),
        };
        let (made, lifeline) = match started {
            Ok(started) => started,
            Err(error) => {
                if let Some(cgroup) = &cgroup
                    && let Err(error) = cgroup.remove().await
                {
                    log::warn!("{}: {}", spec.id, error.chain());
                }
                state.remove();
                return Err(error);
            }
        };
        let (pump, _ends) = Pump::pipes(Stdio::default()).context(|| "make no stdio".into())?;
        let process = Process::new(
            ProcessId::init(&spec.id),
            made,
            pump,
            Gate::Open,
            AtEnd::default(),
            reaper,
            events,
        );
        Ok(Self {
            id: spec.id.clone(),
            process,
            pod_cgroup: cgroup.as_ref().and_then(Cgroup::parent),
            cgroup,
            state,
            lifeline: Mutex::new(Some(lifeline)),
        })
    }

    fn refusal(&self, what: &str) -> Error {
        Error::FailedPrecondition(format!(
            "cannot {what} {}: it only holds the pod's namespaces; {what} the pod's containers",
            self.id
        ))
    }

    fn no_exec(&self, exec: Option<&str>) -> Result<()> {
        match exec {
            None => Ok(()),
            Some(exec) => Err(Error::NotFound(format!("exec {exec} of pod {}", self.id))),
        }
    }
}

/// Runs the two stages and waits until the second is ready.
async fn start(order: &Order, reaper: &Arc<Reaper>) -> Result<(Made, ChildStdin)> {
    let mut line = serde_json::to_vec(order).context(|| "write the holder's order".into())?;
    line.push(b'\n');
    // Also where the file has been replaced by a newer one.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(MAKE)
        .env_clear()
        .stdin(Std::piped())
        .stdout(Std::piped())
        .stderr(Std::piped());
    let expectation = reaper.expect();
    let mut maker = reaper
        .spawn(&mut command)
        .context(|| "run the pod's maker".into())?;
    let mut lifeline = maker
        .stdin
        .take()
        .ok_or_else(|| Error::InvalidArgument("the maker has no stdin".into()))?;
    // An order fits into the pipe; a maker that does not read it says why.
    let _ = lifeline.write_all(&line);
    let told = read_all(maker.stdout.take().map(OwnedFd::from)).await?;
    let complaint = read_all(maker.stderr.take().map(OwnedFd::from)).await?;
    let exit = maker.exit.wait().await;
    let mut words = told.lines().map(str::trim);
    let (mut pid, mut ready) = (None, false);
    // Either may be the first to say its word.
    for word in &mut words {
        ready |= word == READY;
        pid = word.parse().ok().or(pid);
    }
    match pid {
        Some(pid) if ready => {
            let exit = expectation.claim(pid);
            Ok((Made { pid, exit }, lifeline))
        }
        _ => Err(Error::Unavailable(
            format!(
                "the pod's namespaces could not be made: {} (status {})",
                match complaint.trim() {
                    "" => "no reason was given",
                    complaint => complaint,
                },
                exit.status
            ),
            None,
        )),
    }
}

async fn read_all(fd: Option<OwnedFd>) -> Result<String> {
    let mut bytes = Vec::new();
    if let Some(fd) = fd {
        let pipe = pipe::Receiver::from_owned_fd(fd).context(|| "watch the maker".into())?;
        pipe.take(COMPLAINT_BYTES)
            .read_to_end(&mut bytes)
            .await
            .context(|| "read what the maker says".into())?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[async_trait]
impl Instance for Holder {
    async fn start(&self, _stdio: Option<Stdio>) -> Result<u32> {
        match self.process.exit() {
            None => Ok(self.process.pid),
            Some(exit) => Err(Error::FailedPrecondition(format!(
                "pod {} ended (status {}) and its namespaces with it; make a new one",
                self.id, exit.status
            ))),
        }
    }

    fn pid(&self) -> Option<u32> {
        Some(self.process.pid)
    }

    async fn signal(&self, exec: Option<&str>, signal: i32, _all: bool) -> Result<()> {
        self.no_exec(exec)?;
        self.process.signal(signal)
    }

    async fn stop(&self, _grace: Duration) -> Result<()> {
        Err(self.refusal("stop"))
    }

    async fn pause(&self) -> Result<()> {
        Err(self.refusal("pause"))
    }

    async fn resume(&self) -> Result<()> {
        Err(self.refusal("resume"))
    }

    async fn exec(&self, _spec: ExecSpec) -> Result<()> {
        Err(Error::Unimplemented(format!(
            "pod {} has no pause container to exec in; exec in one of its containers",
            self.id
        )))
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        self.no_exec(Some(exec_id)).map(|()| 0)
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        self.no_exec(Some(exec_id))
    }

    async fn resize(&self, exec: Option<&str>, _width: u16, _height: u16) -> Result<()> {
        self.no_exec(exec)?;
        Err(Error::FailedPrecondition(format!(
            "pod {} has no terminal",
            self.id
        )))
    }

    async fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        self.no_exec(exec)
    }

    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        let alive = self.process.exit().is_none();
        Ok(alive
            .then_some((self.process.pid, None))
            .into_iter()
            .collect())
    }

    /// Of the whole pod.
    async fn stats(&self) -> Result<Stats> {
        match &self.pod_cgroup {
            Some(cgroup) => cgroup.stats(),
            None => Err(Error::FailedPrecondition(format!(
                "pod {} has no cgroup of its own: its configuration names no linux.cgroup_parent",
                self.id
            ))),
        }
    }

    async fn update(&self, _resources: &Resources) -> Result<()> {
        Err(Error::FailedPrecondition(format!(
            "pod {} has no limits of its own: set those of its containers, or of its cgroup parent",
            self.id
        )))
    }

    async fn delete(&self) -> Result<()> {
        match self.process.signal(libc::SIGKILL) {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        if !self.process.ended_within(KILL_BOUND).await {
            return Err(Error::DeadlineExceeded(format!(
                "pod {}: process {} did not end {} s after SIGKILL",
                self.id,
                self.process.pid,
                KILL_BOUND.as_secs()
            )));
        }
        drop(
            self.lifeline
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove().await?;
        }
        self.state.remove();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_tells_the_cgroup_and_one_cut_short_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("cg");
        fs::create_dir_all(root.join("pod")).unwrap();
        fs::write(root.join("cgroup.procs"), "").unwrap();
        assert_eq!(cgroup_left(&dir.path().join("s1")), None);
        let state = State(dir.path().join("s1"));
        let cgroup = Cgroup::v2(root.join("pod"));
        state.write(Some(&cgroup)).unwrap();
        assert_eq!(cgroup_left(&state.0), Some(Some(cgroup)));
        fs::write(state.0.join("holder.json"), "{\"cgroup_d").unwrap();
        assert_eq!(cgroup_left(&state.0), Some(None));
        state.remove();
        assert!(!state.0.exists());
    }
}
