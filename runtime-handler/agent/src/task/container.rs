//! One container: made, run and removed.
//!
//! ```text
//! Create: image + overlay -> folder (config.json, filter) -> cgroup -> helper -> Created
//! Delete: kill -> drain -> unmount -> layer, cgroup and folders -> image released
//! ```
//! A Create that fails undoes what it made, the way Delete does.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dyad_agent_api::proto::agent::create_options::Pids;
use dyad_agent_api::proto::agent::{BlockDevice, CreateOptions};
use dyad_agent_api::protobuf::Message;
use dyad_agent_api::task_api::api::{CreateTaskRequest, ExecProcessRequest};
use dyad_linux::cgroup::{Cgroup, OomWatch};
use dyad_linux::reaper::{Reaper, Waiter, kill_raw};
use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::errno::Errno;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};

use super::CONTAINERS;
use super::process::{Phase, Process, Wanted};
use crate::cgroup;
use crate::guest::Agent;
use crate::helper::{self, Filter, Job};
use crate::rootfs::Rootfs;
use crate::rpc::blocking;
use crate::spec::{self, Device, Facts, Place};
use crate::{disk, files, modprobe, pause};

/// Name of [`CreateOptions`] in an Any.
const OPTIONS_TYPE: &str = "dyad.agent.v1.CreateOptions";

/// After SIGKILL, how long the kernel may take to end every process.
const KILL_WITHIN: Duration = Duration::from_secs(10);

/// An emptyDir's mode, as kubelet makes it.
const EMPTY_DIR_MODE: u32 = 0o777;

/// A container that was created.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: PathBuf,
    rootfs: Rootfs,
    image: String,
    cgroup: Cgroup,
    facts: Facts,
    filter_flags: Option<u32>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    paused: AtomicBool,
    /// One of start, pause, resume and delete at a time.
    gate: tokio::sync::Mutex<()>,
}

/// A further process and what it is to run.
#[derive(Debug)]
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    oci: OciProcess,
    find_home: bool,
}

/// What Create makes before there is a container, to be undone if it fails.
struct Draft {
    id: String,
    bundle: PathBuf,
    rootfs: Rootfs,
    cgroup: Cgroup,
    oom: Option<OomWatch>,
    image: Option<String>,
    layer_is_new: bool,
    init: Option<Arc<Process>>,
}

/// What becomes of a deleted container's writable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The container is made again on it.
    Keep,
    /// It goes with the container.
    Remove,
}

impl Container {
    /// Makes the container up to where its init waits to be started.
    ///
    /// # Errors
    /// `InvalidArgument` for what the guest cannot honour; what failed, after undoing
    /// what was made.
    pub async fn create(agent: &Arc<Agent>, request: CreateTaskRequest) -> Result<Arc<Self>> {
        spec::check_id(&request.id)?;
        let bundle = Path::new(CONTAINERS).join(&request.id);
        let mut draft = Draft {
            rootfs: Rootfs::of(&request.id, &bundle),
            cgroup: cgroup::of(&request.id),
            oom: None,
            id: request.id.clone(),
            bundle,
            image: None,
            layer_is_new: false,
            init: None,
        };
        match draft.build(agent, &request).await {
            Ok((container, waiter)) => {
                let oom = draft.oom.take();
                tokio::spawn(Arc::clone(&container).watch_init(Arc::clone(agent), waiter, oom));
                Ok(container)
            }
            Err(error) => {
                draft.undo(agent).await;
                Err(error)
            }
        }
    }

    /// Its folder.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its root file system.
    pub fn rootfs(&self) -> &Rootfs {
        &self.rootfs
    }

    /// Whether it is frozen.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Files of the guest that it has mounted as files.
    pub fn mounted_files(&self) -> impl Iterator<Item = &PathBuf> {
        self.facts
            .binds
            .iter()
            .map(|(source, _)| source)
            .filter(|source| source.is_file())
    }

    /// The process of that exec id; empty: the init.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.exec(exec_id).map(|exec| Arc::clone(&exec.process))
    }

    fn exec(&self, exec_id: &str) -> Result<Arc<Exec>> {
        self.lock_execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NotFound(ProcessId::exec(&self.id, exec_id).to_string()))
    }

    /// Runs the init. Asking again tells its pid again.
    ///
    /// # Errors
    /// `FailedPrecondition` when it ended before it was started.
    pub async fn start(&self) -> Result<u32> {
        let _gate = self.gate.lock().await;
        match self.init.phase() {
            Phase::Running { pid } => return Ok(pid),
            Phase::Created { pid } if self.init.set_running() => match self.notify() {
                Ok(()) => return Ok(pid),
                Err(error) => {
                    self.init.set_created_again();
                    log::warn!("{}", error.chain());
                }
            },
            Phase::Added | Phase::Created { .. } | Phase::Stopped { .. } => {}
        }
        Err(Error::FailedPrecondition(format!(
            "container {} has ended; delete it and create it anew",
            self.id
        )))
    }

    /// Lets the waiting init go on to its program.
    fn notify(&self) -> Result<()> {
        let folder = Path::new(helper::LIBCONTAINER).join(&self.id);
        let what = || format!("start container {}", self.id);
        // By descriptor: a socket's path is limited to 108 bytes.
        let folder = File::open(&folder).context(what)?;
        let socket = format!(
            "/proc/self/fd/{}/{}",
            folder.as_raw_fd(),
            helper::NOTIFY_FILE
        );
        let mut stream = UnixStream::connect(socket).context(what)?;
        stream.write_all(b"start container").context(what)
    }

    async fn watch_init(
        self: Arc<Self>,
        agent: Arc<Agent>,
        waiter: Waiter,
        mut oom: Option<OomWatch>,
    ) {
        let mut exit = std::pin::pin!(waiter.wait());
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut exit => break exit,
                () = OomWatch::next_of(&mut oom) => agent.events.out_of_memory(&self.id),
            }
        };
        if !self.facts.own_pid_namespace {
            // With a namespace of its own the kernel has ended all of them.
            if let Err(error) = self.cgroup.kill(KILL_WITHIN).await {
                log::warn!("{}", error.chain());
            }
        }
        // Before the exit, of which it is the reason.
        if oom.as_mut().is_some_and(OomWatch::missed) {
            agent.events.out_of_memory(&self.id);
        }
        log::info!("container {} ended: {}", self.id, exit.status);
        self.init.set_phase(stopped(&self.init, exit));
    }

    /// Adds a process; asking again for one that was not started changes nothing.
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidArgument` naming the field.
    pub fn add_exec(&self, agent: &Agent, request: &ExecProcessRequest) -> Result<()> {
        spec::check_id(&request.exec_id)?;
        let mut oci = spec::parse_process(&request.spec.value)?;
        let find_home = spec::adapt_process(&mut oci, request.terminal)?;
        let wanted = Wanted {
            stdin: !request.stdin.is_empty(),
            stdout: !request.stdout.is_empty(),
            stderr: !request.stderr.is_empty(),
            terminal: request.terminal,
        };
        let id = ProcessId::exec(&self.id, &request.exec_id);
        let mut execs = self.lock_execs();
        match execs.get(&request.exec_id) {
            Some(there) if there.process.phase() == Phase::Added => return Ok(()),
            Some(_) => return Err(Error::AlreadyExists(id.to_string())),
            None => {}
        }
        let process = Arc::new(Process::new(id, wanted, agent.link()?));
        let exec = Exec {
            process,
            oci,
            find_home,
        };
        execs.insert(request.exec_id.clone(), Arc::new(exec));
        Ok(())
    }

    /// Runs an added process. Asking again tells its pid again.
    ///
    /// # Errors
    /// `FailedPrecondition` when the container does not run, is paused, or the process
    /// has ended; `InvalidArgument` when its program cannot run.
    pub async fn start_exec(&self, agent: &Agent, exec_id: &str) -> Result<u32> {
        let exec = self.exec(exec_id)?;
        match exec.process.phase() {
            Phase::Added => {}
            Phase::Running { pid } => return Ok(pid),
            Phase::Created { .. } | Phase::Stopped { .. } => {
                return Err(Error::FailedPrecondition(format!(
                    "{} has ended",
                    exec.process.id()
                )));
            }
        }
        let running = matches!(self.init.phase(), Phase::Running { .. });
        if !running || self.is_paused() {
            let state = if running {
                "is paused: resume it"
            } else {
                "does not run"
            };
            return Err(Error::FailedPrecondition(format!(
                "container {} {state}",
                self.id
            )));
        }
        let mut oci = exec.oci.clone();
        let capabilities = oci.capabilities().clone().unwrap_or_default();
        oci.set_capabilities(None);
        let file = self.bundle.join(format!("{exec_id}.process"));
        write_json(&file, &oci)?;
        let job = Job {
            container: self.id.clone(),
            bundle: self.bundle.clone(),
            process: Some(file.clone()),
            console_socket: None,
            filter: filter(&self.bundle, self.filter_flags),
            capabilities,
            find_home: exec.find_home,
            sub_cgroup: self.cgroup_of_init(),
            log: log::max_level().to_string(),
        };
        let uid = oci.user().uid();
        let launched = exec.process.launch(&agent.reaper, job, uid).await;
        let _ = fs::remove_file(&file);
        let (pid, waiter) = launched?;
        let process = Arc::clone(&exec.process);
        process.set_phase(Phase::Running { pid });
        tokio::spawn(async move {
            let exit = waiter.wait().await;
            log::debug!("{} ended: {}", process.id(), exit.status);
            process.set_phase(stopped(&process, exit));
        });
        Ok(pid)
    }

    /// Where below the container's cgroup its init is, if it has moved there (systemd, dockerd).
    fn cgroup_of_init(&self) -> Option<String> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.init.pid()?)).ok()?;
        cgroup_below(&text, &cgroup::spec_path(&self.id))
    }

    /// Forgets an exec that ended or never ran. `None`: it never ran.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub async fn delete_exec(&self, agent: &Agent, exec_id: &str) -> Result<Option<(u32, Exit)>> {
        let exec = self.exec(exec_id)?;
        let end = match exec.process.phase() {
            Phase::Stopped { pid, exit } => Some((pid, exit)),
            Phase::Added => None,
            Phase::Created { .. } | Phase::Running { .. } => {
                return Err(Error::FailedPrecondition(format!(
                    "{} runs: kill it first",
                    exec.process.id()
                )));
            }
        };
        exec.process.drain_streams(agent.link()?).await;
        self.lock_execs().remove(exec_id);
        Ok(end)
    }

    /// Signals the init.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn signal_init(&self, reaper: &Reaper, signal: i32) -> Result<()> {
        self.signal(reaper, &self.init, signal)
    }

    /// Signals a process of this container.
    ///
    /// # Errors
    /// `NotFound` when it has ended; `FailedPrecondition` when it was not started;
    /// `InvalidArgument` for a number that is no signal.
    pub fn signal(&self, reaper: &Reaper, process: &Process, signal: i32) -> Result<()> {
        let pid = match process.phase() {
            Phase::Created { pid } | Phase::Running { pid } => pid,
            Phase::Added => {
                return Err(Error::FailedPrecondition(format!(
                    "{} was not started",
                    process.id()
                )));
            }
            Phase::Stopped { .. } => return Err(already_finished(process)),
        };
        match reaper.kill(pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(already_finished(process)),
            Err(Errno::EINVAL) => Err(Error::InvalidArgument(format!("{signal} is no signal"))),
            Err(error) => Err(error).context(|| format!("signal {}", process.id())),
        }
    }

    /// Signals every process in the container.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        let processes = self.cgroup.procs()?;
        if processes.is_empty() {
            return Err(already_finished(&self.init));
        }
        for pid in processes {
            match kill_raw(pid as i32, signal) {
                // It ended meanwhile.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    return Err(error).context(|| format!("signal process {pid} of {}", self.id));
                }
            }
        }
        Ok(())
    }

    /// Freezes all its processes. Asking again changes nothing.
    ///
    /// # Errors
    /// `FailedPrecondition` when it does not run.
    pub async fn pause(&self) -> Result<()> {
        let _gate = self.gate.lock().await;
        if !matches!(self.init.phase(), Phase::Running { .. }) {
            return Err(Error::FailedPrecondition(format!(
                "container {} does not run",
                self.id
            )));
        }
        self.cgroup.freeze().await?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Undoes [`Self::pause`].
    ///
    /// # Errors
    /// The freezer.
    pub async fn resume(&self) -> Result<()> {
        let _gate = self.gate.lock().await;
        self.cgroup.thaw()?;
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// A frozen process cannot end by SIGTERM.
    pub fn thaw_for_end(&self) {
        if self.paused.swap(false, Ordering::Relaxed) {
            // Gone with its last process: nothing is frozen.
            let _ = self.cgroup.thaw();
        }
    }

    /// Sets new limits.
    ///
    /// # Errors
    /// `InvalidArgument` naming the control.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| Error::InvalidArgument(format!("resources: {error}")))?;
        cgroup::apply(&self.id, &resources)
    }

    /// Every exec with its process.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.lock_execs()
            .values()
            .map(|exec| Arc::clone(&exec.process))
            .collect()
    }

    /// Removes all that Create made. Ends what still runs beside an ended init.
    ///
    /// # Errors
    /// `FailedPrecondition` while the init runs; what could not be removed.
    pub async fn delete(&self, agent: &Agent, layer: Layer) -> Result<(u32, Exit)> {
        let _gate = self.gate.lock().await;
        if let Phase::Running { .. } = self.init.phase() {
            return Err(Error::FailedPrecondition(format!(
                "container {} runs: kill it first",
                self.id
            )));
        }
        self.cgroup.kill(KILL_WITHIN).await?;
        let end = self.init.ended().await;
        let link = agent.link()?;
        for exec in self.execs() {
            exec.drain_streams(link).await;
        }
        self.lock_execs().clear();
        self.init.drain_streams(link).await;
        self.cgroup.remove().await?;
        let (rootfs, bundle, id) = (self.rootfs.clone(), self.bundle.clone(), self.id.clone());
        blocking(move || {
            rootfs.unmount();
            if layer == Layer::Remove {
                rootfs.remove_layer()?;
            }
            remove_folders(&id, &bundle)
        })
        .await?;
        agent.images.release(&self.image).await?;
        Ok(end)
    }

    fn lock_execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Draft {
    async fn build(
        &mut self,
        agent: &Arc<Agent>,
        request: &CreateTaskRequest,
    ) -> Result<(Arc<Container>, Waiter)> {
        let options = decode_options(request)?;
        spec::check_filter(&options.seccomp_filter, options.seccomp_flags)?;
        let spec = spec::parse(&options.spec_json)?;
        // Also what tells the host of a panic and hears the power button: what runs can be
        // shut down.
        agent.modules_loaded().await;
        let driven = spec::driven_devices(&spec);
        let administers = spec::may_administer_network(&spec);
        if administers || !driven.is_empty() {
            agent.modules_on_demand().await;
            blocking(move || {
                if administers {
                    modprobe::serve_iptables();
                }
                let mut driven = driven.into_iter();
                driven.try_for_each(|(device, minor)| modprobe::drive(&device, minor))
            })
            .await?;
        }
        let devices = find_devices(&options.devices).await?;
        let pids = find_pids(agent, options.pids.as_ref()).await?;
        let place = Place {
            rootfs: &self.rootfs.target,
            cgroup: &cgroup::spec_path(&self.id),
            terminal: request.terminal,
            devices: &devices,
            pids: pids.as_deref(),
        };
        let (mut spec, facts) = spec::adapt(spec, &place)?;
        if options.readonly_root
            && let Some(root) = spec.root_mut()
        {
            root.set_readonly(Some(true));
        }

        let image = agent.images.acquire(&options.root_disk_serial).await?;
        self.image = Some(options.root_disk_serial.clone());
        let filter_flags = (!options.seccomp_filter.is_empty()).then_some(options.seccomp_flags);
        let mut capabilities = None;
        if let Some(process) = spec.process_mut() {
            capabilities = process.capabilities().clone();
            process.set_capabilities(None);
        }
        self.lay_out(&image, &spec, &facts, options.seccomp_filter)
            .await?;
        cgroup::create(&self.id)?;
        self.oom = Some(OomWatch::new(&self.cgroup)?);

        let wanted = Wanted {
            stdin: !request.stdin.is_empty(),
            stdout: !request.stdout.is_empty(),
            stderr: !request.stderr.is_empty(),
            terminal: request.terminal,
        };
        let init = Arc::new(Process::new(
            ProcessId::init(&self.id),
            wanted,
            agent.link()?,
        ));
        self.init = Some(Arc::clone(&init));
        let job = Job {
            container: self.id.clone(),
            bundle: self.bundle.clone(),
            process: None,
            console_socket: None,
            filter: filter(&self.bundle, filter_flags),
            capabilities: capabilities.unwrap_or_default(),
            find_home: facts.find_home,
            sub_cgroup: None,
            log: log::max_level().to_string(),
        };
        let (pid, waiter) = init.launch(&agent.reaper, job, facts.uid).await?;
        init.set_phase(Phase::Created { pid });
        let container = Arc::new(Container {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            image: options.root_disk_serial,
            cgroup: self.cgroup.clone(),
            facts,
            filter_flags,
            init,
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            gate: tokio::sync::Mutex::default(),
        });
        Ok((container, waiter))
    }

    /// Mounts the root and writes the container's folder.
    async fn lay_out(
        &mut self,
        image: &Path,
        spec: &Spec,
        facts: &Facts,
        filter: Vec<u8>,
    ) -> Result<()> {
        let (id, bundle, rootfs) = (self.id.clone(), self.bundle.clone(), self.rootfs.clone());
        let (image, facts) = (image.to_owned(), facts.clone());
        let config = serde_json::to_vec(spec).context(|| "encode the OCI spec".into())?;
        self.layer_is_new = !self.rootfs.has_layer();
        blocking(move || {
            // Left by a failed undo, if at all: libcontainer refuses to meet it.
            remove_folders(&id, &bundle)?;
            fs::create_dir_all(&bundle).context(|| format!("create {}", bundle.display()))?;
            write(&bundle.join("config.json"), &config)?;
            if !filter.is_empty() {
                write(&bundle.join(helper::FILTER), &filter)?;
            }
            rootfs.mount(&image)?;
            make_sources(&facts)?;
            make_cwd(&rootfs, &facts)
        })
        .await
    }

    async fn undo(&mut self, agent: &Agent) {
        let complain = |result: Result<()>| {
            if let Err(error) = result {
                log::error!("undo the creation of {}: {}", self.id, error.chain());
            }
        };
        complain(self.cgroup.kill(KILL_WITHIN).await);
        complain(self.cgroup.remove().await);
        if let (Some(init), Ok(link)) = (&self.init, agent.link()) {
            // Nobody reads what was never created.
            init.forget_streams(link);
        }
        let (id, bundle) = (self.id.clone(), self.bundle.clone());
        let (rootfs, layer_is_new) = (self.rootfs.clone(), self.layer_is_new);
        complain(
            blocking(move || {
                rootfs.unmount();
                if layer_is_new {
                    rootfs.remove_layer()?;
                }
                remove_folders(&id, &bundle)
            })
            .await,
        );
        if let Some(image) = self.image.take() {
            complain(agent.images.release(&image).await);
        }
    }
}

/// Whether the request is to make a container that has ended anew.
///
/// # Errors
/// As for [`Container::create`].
pub fn is_made_again(request: &CreateTaskRequest) -> Result<bool> {
    Ok(decode_options(request)?.again)
}

fn decode_options(request: &CreateTaskRequest) -> Result<CreateOptions> {
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return Err(Error::Unimplemented(
            "containers in a machine cannot be restored from a checkpoint".into(),
        ));
    }
    let options = &request.options;
    if options.type_url.rsplit('/').next() != Some(OPTIONS_TYPE) {
        return Err(Error::InvalidArgument(format!(
            "options of type {:?}: must be {OPTIONS_TYPE}",
            options.type_url
        )));
    }
    CreateOptions::parse_from_bytes(&options.value)
        .map_err(|error| Error::InvalidArgument(format!("options: {error}")))
}

async fn find_devices(wanted: &[BlockDevice]) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for device in wanted {
        let node = disk::by_serial(&device.disk_serial).await?;
        devices.push(Device {
            path: PathBuf::from(&device.path),
            number: disk::device_number(&node)?,
            mode: if device.mode == 0 { 0o660 } else { device.mode },
            uid: device.uid,
            gid: device.gid,
            access: if device.read_only { "rm" } else { "rwm" }.into(),
        });
    }
    Ok(devices)
}

/// The PID namespace that a container is to join.
async fn find_pids(agent: &Agent, wanted: Option<&Pids>) -> Result<Option<PathBuf>> {
    match wanted {
        None | Some(Pids::PodPids(false)) => Ok(None),
        Some(Pids::PodPids(true)) => agent.pod_pids.namespace(&agent.reaper).await.map(Some),
        Some(Pids::TargetPids(id)) => {
            let target = agent.containers.get(id)?;
            let pid = target.init().pid().ok_or_else(|| {
                Error::FailedPrecondition(format!(
                    "container {id}, whose processes are to be seen, has ended"
                ))
            })?;
            Ok(Some(pause::namespace_of(pid)))
        }
        Some(_) => Err(Error::InvalidArgument(
            "pids: this agent does not know that PID namespace".into(),
        )),
    }
}

fn filter(bundle: &Path, flags: Option<u32>) -> Option<Filter> {
    Some(Filter {
        file: bundle.join(helper::FILTER),
        flags: flags?,
    })
}

/// From `/proc/PID/cgroup`, the group's path below `parent`; `None` in `parent` itself and
/// elsewhere.
fn cgroup_below(text: &str, parent: &Path) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(parent).ok()?.to_str()?;
    (!below.is_empty()).then(|| below.to_owned())
}

/// An emptyDir on the pod's disk is made by the first container that mounts it.
fn make_sources(facts: &Facts) -> Result<()> {
    for (source, destination) in &facts.binds {
        if source.exists() {
            continue;
        }
        if !source.starts_with(files::POD_VOLUMES) {
            return Err(Error::InvalidArgument(format!(
                "mounts: source {} of {} is not in the guest",
                source.display(),
                destination.display()
            )));
        }
        files::make_folder(source, EMPTY_DIR_MODE)?;
    }
    Ok(())
}

/// A missing working directory is made, as runc does: in the root, or in the emptyDir
/// that is mounted there. Another volume's content is not ours to change.
fn make_cwd(rootfs: &Rootfs, facts: &Facts) -> Result<()> {
    let over = facts
        .binds
        .iter()
        .filter(|(_, destination)| facts.cwd.starts_with(destination))
        .max_by_key(|(_, destination)| destination.components().count());
    match over {
        None => crate::rootfs::make_folder_in(&rootfs.target, &facts.cwd),
        Some((source, destination)) if source.starts_with(files::POD_VOLUMES) => {
            let relative = facts.cwd.strip_prefix(destination).unwrap_or(Path::new(""));
            crate::rootfs::make_folder_in(source, relative)
        }
        Some(_) => Ok(()),
    }
}

fn remove_folders(id: &str, bundle: &Path) -> Result<()> {
    for folder in [bundle, &Path::new(helper::LIBCONTAINER).join(id)] {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => result.context(|| format!("remove {}", folder.display()))?,
        }
    }
    Ok(())
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).context(|| format!("write {}", file.display()))
}

fn write_json(file: &Path, value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).context(|| format!("encode {}", file.display()))?;
    write(file, &json)
}

fn stopped(process: &Process, exit: Exit) -> Phase {
    Phase::Stopped {
        pid: process.pid().unwrap_or_default(),
        exit,
    }
}

fn already_finished(process: &Process) -> Error {
    Error::NotFound(format!("{}: process already finished", process.id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_goes_where_the_init_has_gone_inside_of_the_containers_group() {
        let below = |text| cgroup_below(text, Path::new("/pod/c"));
        assert_eq!(below("0::/pod/c\n"), None);
        assert_eq!(
            below("0::/pod/c/init.scope\n").as_deref(),
            Some("init.scope")
        );
        assert_eq!(below("0::/pod/c/a/b\n").as_deref(), Some("a/b"));
        assert_eq!(below("0::/pod/cc/a\n"), None);
        assert_eq!(below(""), None);
    }
}
