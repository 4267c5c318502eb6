//! One container.
//!
//! ```text
//!  create --> Created --start--> Started --exit--> (ended) --start--> made again, Started
//!                |                  |                 |
//!                +------------------+-----------------+--delete--> gone
//!
//!  create of a pod that waits --> Incoming --arrive--> Started
//!  create from a checkpoint   --> (no process) --start--> Started
//! ```
//! The driver orders the calls that change a container; reads and execs run beside
//! them. The locks here are held only to look or to note, never while waiting.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dyad_linux::cgroup::{Cgroup, Hierarchies, OomWatch};
use dyad_linux::pump::{Ends, Pump, Unread};
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::handler::{EventSender, Instance, ProcessId};
use dyad_runtime_handler::spec::{
    Checkpoint, ContainerSpec, ExecSpec, Resources, RootMount, Stdio,
};
use dyad_runtime_handler::stats::Stats;
use oci_spec::runtime::Process as OciProcess;
use serde_json::Value;

use crate::command::{Command, Criu};
use crate::console::ConsoleSocket;
use crate::facts::Facts;
use crate::process::{AtEnd, Gate, Process};
use crate::rootfs;
use crate::runtime::{Input, Made, Runtime, ShortLived};

/// How long its processes may take to stand still.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);
/// How long a killed process may take to end; one that waits for a dead disk takes
/// for ever.
const KILL_BOUND: Duration = Duration::from_secs(20);

pub(crate) struct Container {
    facts: Facts,
    /// What it has for others: Kubernetes' name, its root, its streams.
    pub(crate) about: About,
    runtime: Runtime,
    hierarchies: Arc<Hierarchies>,
    events: EventSender,
    /// `None` before it arrived, and once deleted.
    init: Mutex<Option<Init>>,
    /// Mounted and with its stdio, but without a process until one arrives.
    incoming: Mutex<Option<Stdio>>,
    /// The same, and what it goes on from when it is started.
    restoring: Mutex<Option<(Stdio, PathBuf)>>,
    config: Arc<ContainerConfig>,
    /// It was incoming, and has ended while it was waiting.
    withdrawn: AtomicBool,
    execs: Mutex<HashMap<String, Exec>>,
    /// All that updates changed since it was created, as OCI resources: the bundle has what it
    /// was created with, and it is made again from that.
    updates: Mutex<Value>,
}

/// What a migration wants to know of a container.
#[derive(Debug)]
pub(crate) struct About {
    pub name: String,
    pub mounts: Vec<RootMount>,
    /// Whether it has them: stdin, stdout, stderr.
    pub stdio: [bool; 3],
    pub terminal: bool,
}

#[derive(Clone)]
pub(crate) struct Init {
    pub(crate) process: Arc<Process>,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) started: bool,
}

/// From where an arriving container goes on.
pub(crate) struct Images<'a> {
    pub(crate) dir: &'a Path,
    /// For CRIU's log.
    pub(crate) work: &'a Path,
    pub(crate) unread: &'a Unread,
    pub(crate) tcp_established: bool,
    pub(crate) criu: Criu<'a>,
}

enum Exec {
    Added(Box<Added>),
    Starting,
    Started(Arc<Process>),
    Failed,
}

/// An exec that waits to be started, and what it was told meanwhile.
struct Added {
    process: OciProcess,
    stdio: Stdio,
    size: Option<(u16, u16)>,
    close_stdin: bool,
}

impl Container {
    /// Mounts and creates; undoes both where it fails.
    /// One that is `incoming` gets no process yet.
    pub(crate) async fn create(
        spec: ContainerSpec,
        runtime: Runtime,
        hierarchies: Arc<Hierarchies>,
        events: EventSender,
        (config, incoming): (Arc<ContainerConfig>, bool),
    ) -> Result<Self> {
        let facts = Facts::new(&spec, &config);
        let ContainerSpec {
            bundle,
            name,
            rootfs: mounts,
            stdio,
            checkpoint,
            ..
        } = spec;
        runtime.prepare(&facts.id)?;
        let container = Self {
            facts,
            about: About {
                name,
                mounts: mounts.clone(),
                stdio: [
                    stdio.stdin.is_some(),
                    stdio.stdout.is_some(),
                    stdio.stderr.is_some(),
                ],
                terminal: stdio.terminal,
            },
            runtime,
            hierarchies,
            events,
            init: Mutex::new(None),
            incoming: Mutex::new(None),
            restoring: Mutex::new(None),
            config,
            withdrawn: AtomicBool::new(false),
            execs: Mutex::default(),
            updates: Mutex::default(),
        };
        let target = bundle.join("rootfs");
        rootfs::mount_all(&mounts, &target)?;
        if incoming {
            *lock(&container.incoming) = Some(stdio);
            return Ok(container);
        }
        if let Some(images) = checkpoint {
            *lock(&container.restoring) = Some((stdio, images));
            return Ok(container);
        }
        match container.make_init(stdio).await {
            Ok(init) => *lock(&container.init) = Some(init),
            Err(error) => {
                container.undo_create(&error, &mounts).await;
                return Err(error);
            }
        }
        Ok(container)
    }

    async fn undo_create(&self, error: &Error, mounts: &[RootMount]) {
        // What is there under this id is somebody else's.
        if !matches!(error, Error::AlreadyExists(_))
            && let Err(error) = self.delete_state().await
        {
            log::warn!("{}: {}", self.facts.id, error.chain());
        }
        self.runtime.finish(&self.facts.id);
        if !mounts.is_empty()
            && let Err(error) = rootfs::unmount_all(&self.facts.bundle.join("rootfs"))
        {
            log::warn!("{}: {}", self.facts.id, error.chain());
        }
    }

    /// Runs the OCI runtime's `create`.
    async fn make_init(&self, stdio: Stdio) -> Result<Init> {
        let facts = &self.facts;
        let (made, pump) = self.make(stdio, facts.owner, None).await?;
        Ok(self.init_of(made, pump, Gate::Open, false))
    }

    /// Watches over an init that was made.
    fn init_of(&self, made: Made, pump: Pump, gate: Gate, started: bool) -> Init {
        let facts = &self.facts;
        let cgroup = self.cgroup_of(made.pid);
        let oom = cgroup.as_ref().and_then(|cgroup| {
            OomWatch::new(cgroup)
                .inspect_err(|error| log::debug!("{}: no OOM events: {error}", facts.id))
                .ok()
        });
        let kill = if facts.own_pid_namespace {
            None
        } else {
            cgroup.clone()
        };
        let process = Process::new(
            ProcessId::init(&facts.id),
            made,
            pump,
            // One that is killed before its start has an end to tell, too.
            gate,
            AtEnd { oom, kill },
            self.runtime.reaper(),
            &self.events,
        );
        Init {
            process: Arc::new(process),
            cgroup,
            started,
        }
    }

    /// Makes the process of an incoming container from its images; it runs when this
    /// returns, with its pid. Its end is told once [`Self::settle_in`] was called.
    pub(crate) async fn arrive(&self, images: &Images<'_>) -> Result<u32> {
        let stdio = lock(&self.incoming).take().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {} waits for nothing", self.facts.id))
        })?;
        let restored = self.restored(stdio, images).await;
        let init = match restored {
            Ok(init) => init,
            Err(error) => {
                // Nothing came, and it is to be deleted as one to which nothing came.
                *lock(&self.incoming) = Some(Stdio::default());
                return Err(error);
            }
        };
        let pid = init.process.pid;
        *lock(&self.init) = Some(init);
        Ok(pid)
    }

    /// Has the OCI runtime make the process from images. Its end is held back.
    ///
    /// # Errors
    /// What the runtime says; nothing is left of it then.
    pub(crate) async fn restored(&self, stdio: Stdio, images: &Images<'_>) -> Result<Init> {
        let facts = &self.facts;
        let pid_file = ShortLived(facts.bundle.join(self.runtime.unique("pid")));
        let (pump, ends) =
            Pump::resumed(stdio, images.unread).context(|| "make stdio pipes".into())?;
        let (uid, gid) = facts.owner;
        if facts.owner != (0, 0) {
            ends.chown(uid, gid)
                .context(|| format!("give stdio to user {uid}"))?;
        }
        let command = Command::Restore {
            id: &facts.id,
            bundle: &facts.bundle,
            pid_file: &pid_file.0,
            images: images.dir,
            work: images.work,
            tcp_established: images.tcp_established,
            criu: images.criu,
        };
        let made = self
            .runtime
            .make(
                command,
                &facts.id,
                facts.systemd_cgroup,
                &facts.bundle,
                ends,
                &pid_file.0,
            )
            .await;
        match made {
            Ok(made) => Ok(self.init_of(made, pump, Gate::Held, true)),
            Err(error) => {
                if let Err(error) = self.delete_state().await {
                    log::warn!("{}: {}", facts.id, error.chain());
                }
                Err(error)
            }
        }
    }

    /// The arrived process belongs to the pod now, and its end is told.
    pub(crate) fn settle_in(&self) {
        if let Some(init) = lock(&self.init).as_ref() {
            init.process.set_gate(Gate::Open);
        }
    }

    /// Ends the process without a word: it runs elsewhere, or must not have arrived.
    pub(crate) async fn let_go(&self) -> Result<()> {
        if self.waits_no_more() {
            return Ok(());
        }
        let Some(init) = lock(&self.init).clone() else {
            return Ok(());
        };
        init.process.set_gate(Gate::Dropped);
        self.kill(&init).await
    }

    /// Gives the streams of an incoming one back, so that they end; false: it is none.
    fn waits_no_more(&self) -> bool {
        let mut incoming = lock(&self.incoming);
        incoming.as_mut().map(std::mem::take).is_some()
    }

    /// Mounts the root file system anew, for what came into its layer.
    pub(crate) fn remount(&self) -> Result<()> {
        let target = self.facts.bundle.join("rootfs");
        rootfs::unmount_all(&target)?;
        rootfs::mount_all(&self.about.mounts, &target)
    }

    /// Takes the root file system away while something comes into its layer.
    pub(crate) fn unmount_for_arrival(&self) -> Result<()> {
        rootfs::unmount_all(&self.facts.bundle.join("rootfs"))
    }

    pub(crate) fn id(&self) -> &str {
        &self.facts.id
    }

    pub(crate) fn config(&self) -> &ContainerConfig {
        &self.config
    }

    pub(crate) fn reaper(&self) -> &Arc<Reaper> {
        self.runtime.reaper()
    }

    pub(crate) fn bundle(&self) -> &Path {
        &self.facts.bundle
    }

    pub(crate) fn is_incoming(&self) -> bool {
        lock(&self.incoming).is_some()
    }

    /// Whether something may still come to it.
    pub(crate) fn waits(&self) -> bool {
        self.is_incoming() && !self.withdrawn.load(Ordering::Relaxed)
    }

    /// Execs that run.
    pub(crate) fn running_execs(&self) -> Vec<String> {
        let execs = lock(&self.execs);
        let running = execs.iter().filter(|(_, exec)| match exec {
            Exec::Starting => true,
            Exec::Started(process) => process.exit().is_none(),
            Exec::Added(_) | Exec::Failed => false,
        });
        running.map(|(id, _)| id.clone()).collect()
    }

    /// Has the OCI runtime do something to it.
    pub(crate) async fn ask_runtime(&self, command: Command<'_>) -> Result<()> {
        self.run(command, Input::None).await
    }

    /// Has the OCI runtime make a process, with its pipes or its terminal: that of
    /// `exec`, or init.
    async fn make(
        &self,
        stdio: Stdio,
        owner: (u32, u32),
        exec: Option<&OciProcess>,
    ) -> Result<(Made, Pump)> {
        let facts = &self.facts;
        let bundle = &facts.bundle;
        let pid_file = ShortLived(match exec {
            // Where containerd's own shim has it: wrappers of the OCI runtime look there.
            None => bundle.join("init.pid"),
            Some(_) => bundle.join(self.runtime.unique("pid")),
        });
        let process_file = ShortLived(bundle.join(self.runtime.unique("process")));
        if let Some(process) = exec {
            let text = serde_json::to_vec(process).context(|| "write the OCI process".into())?;
            fs::write(&process_file.0, text)
                .context(|| format!("write {}", process_file.0.display()))?;
        }
        let socket = if stdio.terminal {
            let name = self.runtime.unique("console");
            let socket = ConsoleSocket::listen(bundle, &name);
            Some(socket.context(|| format!("listen for the terminal in {}", bundle.display()))?)
        } else {
            None
        };
        let console_socket = socket.as_ref().map(ConsoleSocket::path);
        let command = match exec {
            None => Command::Create {
                id: &facts.id,
                bundle,
                pid_file: &pid_file.0,
                console_socket,
                no_pivot: facts.no_pivot,
                no_new_keyring: facts.no_new_keyring,
            },
            Some(_) => Command::Exec {
                id: &facts.id,
                process: &process_file.0,
                pid_file: &pid_file.0,
                console_socket,
            },
        };
        let make = |ends| {
            self.runtime.make(
                command,
                &facts.id,
                facts.systemd_cgroup,
                bundle,
                ends,
                &pid_file.0,
            )
        };
        match &socket {
            None => {
                let (pump, ends) = Pump::pipes(stdio).context(|| "make stdio pipes".into())?;
                if owner != (0, 0) {
                    ends.chown(owner.0, owner.1)
                        .context(|| format!("give stdio to user {}", owner.0))?;
                }
                Ok((make(ends).await?, pump))
            }
            Some(socket) => {
                let made = make(Ends::default()).await?;
                let pump = socket
                    .receive()
                    .and_then(|master| Pump::terminal(stdio, master));
                match pump {
                    Ok(pump) => Ok((made, pump)),
                    Err(error) => {
                        // Nobody else knows of it yet; an exec would run on for ever.
                        let _ = self.runtime.reaper().kill(made.pid, libc::SIGKILL);
                        Err(Error::other("receive the terminal", error))
                    }
                }
            }
        }
    }

    /// Init's cgroup: where it is, or where it was to be if it is dead already.
    fn cgroup_of(&self, pid: u32) -> Option<Cgroup> {
        let found = self.hierarchies.of_pid(pid);
        let cgroup = match (&found, &self.facts.cgroups_path) {
            (Err(Error::NotFound(_)), Some(path)) => self.hierarchies.at(path),
            _ => found,
        };
        cgroup
            .inspect_err(|error| log::debug!("{}: no cgroup: {}", self.facts.id, error.chain()))
            .ok()
    }

    async fn run(&self, command: Command<'_>, input: Input) -> Result<()> {
        let facts = &self.facts;
        self.runtime
            .run(
                command,
                &facts.id,
                facts.systemd_cgroup,
                &facts.bundle,
                input,
            )
            .await
    }

    /// Removes the OCI runtime's state and the cgroup, of a container without processes.
    async fn delete_state(&self) -> Result<()> {
        let facts = &self.facts;
        self.runtime
            .delete(&facts.id, facts.systemd_cgroup, &facts.bundle)
            .await
    }

    /// Unmounts the root file system. The kernel writes back all that is dirty on the
    /// disk below an overlay first, so this keeps off the thread that serves the pod.
    async fn unmount(&self) -> Result<()> {
        let target = self.facts.bundle.join("rootfs");
        tokio::task::spawn_blocking(move || rootfs::unmount_all(&target))
            .await
            .unwrap_or_else(|panic| Err(Error::other("unmount the root file system", panic)))
    }

    /// Removes what was kept beside the OCI runtime's state.
    fn forget(&self) {
        self.runtime.finish(&self.facts.id);
        self.remove_own_work_folder();
    }

    fn not_found(&self) -> Error {
        Error::NotFound(format!("container {}", self.facts.id))
    }

    pub(crate) fn init(&self) -> Result<Init> {
        lock(&self.init).clone().ok_or_else(|| self.not_found())
    }

    fn cgroup(&self) -> Result<Cgroup> {
        self.init()?.cgroup.ok_or_else(|| {
            Error::FailedPrecondition(format!("container {} has no cgroup", self.facts.id))
        })
    }

    /// The process: init, or an exec that was started.
    fn process(&self, exec: Option<&str>) -> Result<Arc<Process>> {
        let Some(exec) = exec else {
            return Ok(self.init()?.process);
        };
        match lock(&self.execs).get(exec) {
            Some(Exec::Started(process)) => Ok(Arc::clone(process)),
            _ => Err(self.exec_not_found(exec)),
        }
    }

    fn exec_not_found(&self, exec: &str) -> Error {
        Error::NotFound(ProcessId::exec(&self.facts.id, exec).to_string())
    }

    /// Does `note` to an exec that is not started yet; false: there is none such.
    fn note(&self, exec: Option<&str>, note: impl FnOnce(&mut Added)) -> bool {
        let mut execs = lock(&self.execs);
        match exec.and_then(|exec| execs.get_mut(exec)) {
            Some(Exec::Added(added)) => {
                note(added);
                true
            }
            _ => false,
        }
    }

    /// Kills init, and what shares its cgroup where it would be left, and waits.
    async fn kill(&self, init: &Init) -> Result<()> {
        if init.process.exit().is_some() {
            return Ok(());
        }
        match init.process.signal(libc::SIGKILL) {
            Ok(()) => self.thaw_to_die(init),
            // Reaped, and about to be told.
            Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        if init.process.ended_within(KILL_BOUND).await {
            return Ok(());
        }
        Err(Error::DeadlineExceeded(format!(
            "container {}: process {} did not end {} s after SIGKILL",
            self.facts.id,
            init.process.pid,
            KILL_BOUND.as_secs()
        )))
    }

    /// v1 kills no frozen process.
    fn thaw_to_die(&self, init: &Init) {
        if let Some(cgroup) = init.cgroup.as_ref().filter(|cgroup| cgroup.is_frozen())
            && let Err(error) = cgroup.thaw()
        {
            log::warn!("{}: {}", self.facts.id, error.chain());
        }
    }

    /// Starts the created init; kills it where that fails.
    async fn tell_update(&self, resources: &Value) -> Result<()> {
        let text = resources.to_string().into_bytes();
        self.run(Command::Update { id: &self.facts.id }, Input::Text(text))
            .await
    }

    /// The limits that it had when it ended, for its next process.
    async fn update_again(&self) -> Result<()> {
        let updates = lock(&self.updates).clone();
        if updates.is_null() {
            return Ok(());
        }
        self.tell_update(&updates).await
    }

    async fn start_init(&self, init: &Init) -> Result<()> {
        let process = &init.process;
        process.set_gate(Gate::Held);
        let started = self
            .runtime
            .start(
                &self.facts.id,
                self.facts.systemd_cgroup,
                &self.facts.bundle,
                self.facts.has_start_hooks,
                process.ended(),
            )
            .await;
        if let Err(error) = started {
            process.set_gate(Gate::Dropped);
            if let Err(error) = self.kill(init).await {
                log::warn!("{}", error.chain());
            }
            return Err(error);
        }
        process.set_gate(Gate::Open);
        Ok(())
    }
}

#[async_trait]
impl Instance for Container {
    async fn start(&self, stdio: Option<Stdio>) -> Result<u32> {
        if self.is_incoming() {
            return Ok(std::process::id());
        }
        let restoring = lock(&self.restoring).take();
        if let Some((stdio, images)) = restoring {
            let init = match self.restore_from(stdio, &images).await {
                Ok(init) => init,
                Err(error) => {
                    // It is to be deleted as one that was never started.
                    *lock(&self.restoring) = Some((Stdio::default(), images));
                    return Err(error);
                }
            };
            *lock(&self.init) = Some(init.clone());
            init.process.set_gate(Gate::Open);
            return Ok(init.process.pid);
        }
        let mut init = self.init()?;
        if init.started {
            if init.process.exit().is_none() {
                return Ok(init.process.pid);
            }
            init.process.drain().await;
            self.delete_state().await?;
            init = self.make_init(stdio.unwrap_or_default()).await?;
            if let Err(error) = self.update_again().await {
                if let Err(error) = self.kill(&init).await {
                    log::warn!("{}", error.chain());
                }
                return Err(error);
            }
        } else if init.process.exit().is_some() {
            return Err(Error::FailedPrecondition(format!(
                "container {} ended before it was started",
                self.facts.id
            )));
        }
        init.started = true;
        *lock(&self.init) = Some(init.clone());
        self.start_init(&init).await?;
        Ok(init.process.pid)
    }

    fn pid(&self) -> Option<u32> {
        if self.is_incoming() {
            return Some(std::process::id());
        }
        lock(&self.init).as_ref().map(|init| init.process.pid)
    }

    async fn signal(&self, exec: Option<&str>, signal: i32, all: bool) -> Result<()> {
        let process = self.process(exec)?;
        if exec.is_some() {
            return process.signal(signal);
        }
        let init = self.init()?;
        // Somebody may have deleted it past us, and its process with it.
        if process.exit().is_some() || !self.runtime.knows(&self.facts.id) {
            return Err(process.not_found());
        }
        match &init.cgroup {
            Some(cgroup) if all => cgroup.signal_all(signal).await,
            _ => {
                process.signal(signal)?;
                if signal == libc::SIGKILL {
                    self.thaw_to_die(&init);
                }
                Ok(())
            }
        }
    }

    async fn stop(&self, grace: Duration) -> Result<()> {
        if self.waits_no_more() {
            self.withdrawn.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let init = self.init()?;
        if init.process.exit().is_some() {
            return Ok(());
        }
        match init.process.signal(self.facts.stop_signal) {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        if init.process.ended_within(grace).await {
            return Ok(());
        }
        self.kill(&init).await
    }

    async fn pause(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let paused = self.run(Command::Pause { id: &self.facts.id }, Input::None);
            match paused.await {
                // On a busy host a process may need longer to stand still than runc waits.
                Err(Error::DeadlineExceeded(why)) if began.elapsed() < FREEZE_WITHIN => {
                    log::debug!("container {}: {why}; asked again", self.facts.id);
                }
                done => return done,
            }
        }
    }

    async fn resume(&self) -> Result<()> {
        self.run(Command::Resume { id: &self.facts.id }, Input::None)
            .await
    }

    async fn exec(&self, spec: ExecSpec) -> Result<()> {
        self.init()?;
        let mut execs = lock(&self.execs);
        if execs.contains_key(&spec.exec_id) {
            let id = ProcessId::exec(&self.facts.id, &spec.exec_id);
            return Err(Error::AlreadyExists(id.to_string()));
        }
        let added = Added {
            process: spec.process,
            stdio: spec.stdio,
            size: None,
            close_stdin: false,
        };
        execs.insert(spec.exec_id, Exec::Added(Box::new(added)));
        Ok(())
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        let id = ProcessId::exec(&self.facts.id, exec_id);
        if self.init()?.process.exit().is_some() {
            return Err(Error::FailedPrecondition(format!(
                "{id}: the container has ended"
            )));
        }
        let added = {
            let mut execs = lock(&self.execs);
            let exec = execs
                .get_mut(exec_id)
                .ok_or_else(|| self.exec_not_found(exec_id))?;
            match std::mem::replace(exec, Exec::Starting) {
                Exec::Added(added) => added,
                Exec::Started(process) => {
                    let pid = process.pid;
                    *exec = Exec::Started(process);
                    return Ok(pid);
                }
                other => {
                    *exec = other;
                    return Err(Error::FailedPrecondition(format!(
                        "{id}: its start is under way or has failed"
                    )));
                }
            }
        };
        let user = added.process.user();
        let owner = self.facts.owner_of(user.uid(), user.gid());
        let made = self.make(added.stdio, owner, Some(&added.process)).await;
        let (made, pump) = match made {
            Ok(made) => made,
            Err(error) => {
                lock(&self.execs).insert(exec_id.to_owned(), Exec::Failed);
                return Err(error);
            }
        };
        let pid = made.pid;
        if let Some((width, height)) = added.size
            && let Err(error) = pump.resize(width, height)
        {
            log::debug!("{id}: resize: {error}");
        }
        if added.close_stdin {
            pump.close_stdin();
        }
        let process = Process::new(
            id,
            made,
            pump,
            Gate::Open,
            AtEnd::default(),
            self.runtime.reaper(),
            &self.events,
        );
        lock(&self.execs).insert(exec_id.to_owned(), Exec::Started(Arc::new(process)));
        Ok(pid)
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        let started = match lock(&self.execs).get(exec_id) {
            None => return Err(self.exec_not_found(exec_id)),
            Some(Exec::Starting) => None,
            Some(Exec::Added(_) | Exec::Failed) => {
                // Nothing runs, nothing drains.
                Some(None)
            }
            Some(Exec::Started(process)) if process.exit().is_none() => None,
            Some(Exec::Started(process)) => Some(Some(Arc::clone(process))),
        };
        let Some(ended) = started else {
            return Err(Error::FailedPrecondition(format!(
                "{}: it runs; kill it first",
                ProcessId::exec(&self.facts.id, exec_id)
            )));
        };
        if let Some(process) = ended {
            process.drain().await;
        }
        lock(&self.execs).remove(exec_id);
        Ok(())
    }

    async fn resize(&self, exec: Option<&str>, width: u16, height: u16) -> Result<()> {
        if self.note(exec, |added| added.size = Some((width, height))) {
            return Ok(());
        }
        let process = self.process(exec)?;
        match process.pump.resize(width, height) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Err(
                Error::FailedPrecondition(format!("resize {}: it has no terminal", process.id())),
            ),
            other => other.context(|| format!("resize the terminal of {}", process.id())),
        }
    }

    async fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        if !self.note(exec, |added| added.close_stdin = true) {
            self.process(exec)?.pump.close_stdin();
        }
        Ok(())
    }

    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        let init = self.init()?;
        let pids = match &init.cgroup {
            Some(cgroup) => cgroup.procs()?,
            None if init.process.exit().is_none() => vec![init.process.pid],
            None => Vec::new(),
        };
        let execs = lock(&self.execs);
        let exec_of = |pid| {
            execs.iter().find_map(|(id, exec)| match exec {
                Exec::Started(process) if process.pid == pid => Some(id.clone()),
                _ => None,
            })
        };
        Ok(pids.into_iter().map(|pid| (pid, exec_of(pid))).collect())
    }

    async fn stats(&self) -> Result<Stats> {
        self.cgroup()?.stats()
    }

    async fn update(&self, resources: &Resources) -> Result<()> {
        let update =
            serde_json::to_value(&resources.linux).context(|| "write the OCI resources".into())?;
        self.tell_update(&update).await?;
        merge(&mut lock(&self.updates), update);
        Ok(())
    }

    async fn checkpoint(&self, to: &Checkpoint) -> Result<()> {
        self.save(to).await
    }

    async fn delete(&self) -> Result<()> {
        let never_ran =
            lock(&self.incoming).take().is_some() || lock(&self.restoring).take().is_some();
        if never_ran {
            self.unmount().await?;
            self.forget();
            return Ok(());
        }
        let Some(init) = lock(&self.init).clone() else {
            return Ok(());
        };
        self.kill(&init).await?;
        init.process.drain().await;
        if self.facts.has_stop_hooks {
            // They may look at the root file system.
            self.delete_state().await?;
            self.unmount().await?;
        } else {
            // Neither needs the other, and both take their time.
            let (deleted, unmounted) = tokio::join!(self.delete_state(), self.unmount());
            deleted.and(unmounted)?;
        }
        self.forget();
        *lock(&self.init) = None;
        lock(&self.execs).clear();
        Ok(())
    }
}

/// Puts `new` over `old`, field by field; what is not in `new` stays.
fn merge(old: &mut Value, new: Value) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (name, value) in new {
                merge(old.entry(name).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (old, new) => *old = new,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_all_updates_the_last_word_on_each_limit_counts() {
        let mut all = Value::default();
        for update in [
            json!({"memory": {"limit": 1, "swap": 2}, "cpu": {"shares": 3}}),
            json!({"memory": {"limit": 4}, "cpu": null, "pids": {"limit": 5}}),
        ] {
            merge(&mut all, update);
        }
        assert_eq!(
            all,
            json!({"memory": {"limit": 4, "swap": 2}, "cpu": {"shares": 3}, "pids": {"limit": 5}})
        );
    }
}
