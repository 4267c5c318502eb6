//! A container of a machine pod: its root on the host's side, its processes in the guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dyad_agent_api::proto::agent::create_options::Pids as GuestPids;
use dyad_agent_api::proto::agent::file::Content;
use dyad_agent_api::proto::agent::{CreateOptions, File, Filesystem, PutFilesRequest};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::handler::{Instance, ProcessId};
use dyad_runtime_handler::spec::{ContainerSpec, ExecSpec, Resources, Stdio};
use dyad_runtime_handler::stats::Stats;
use log::{debug, warn};
use oci_spec::runtime::{LinuxResources, Mount, Spec};
use tokio::task::JoinHandle;

use crate::guest::Agent;
use crate::machine::Machine;
use crate::migrate::offer::{Position, Traveller};
use crate::seccomp::{self, Filter};
use crate::stand_in::StandIn;
use crate::storage::apply::{self as storage, Image};
use crate::storage::plan as storage_plan;
use crate::volumes::mounts::Mounts;
use crate::volumes::plan::{Copy, How, IMAGE_SEEDS, ImageVolume, Termination, VOLUMES, VolumePlan};
use crate::volumes::roots::{Ids, Roots};
use crate::volumes::{copy, plan as volume_plan, sync};

/// How long the last output may take to its FIFOs once a process is deleted.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the output of a process that ended may come out of the guest before its end
/// is told; another process may hold it open for ever.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// kubelet reads no more of a termination message.
const TERMINATION_MAX_BYTES: u32 = 4096;
/// After SIGKILL.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A container in the guest.
pub struct Container {
    machine: Arc<Machine>,
    id: String,
    /// Kubernetes' name, by which it is the same on both sides of a migration.
    name: String,
    image: PathBuf,
    parts: Parts,
    stand_in: StandIn,
    state: Mutex<State>,
}

/// The PID namespace that it is in.
enum Pids {
    /// Its own.
    Own,
    /// The pod's.
    Pod,
    /// That of the container with this id.
    Target(String),
}

/// What it is made from, whatever the guest calls it.
struct Parts {
    /// Adapted to the guest but for its mounts.
    oci: Spec,
    mounts: Vec<Mount>,
    roots: Roots,
    ids: Ids,
    pids: Pids,
    filter: Filter,
    readonly_root: bool,
    /// The serials of the images that are its volumes, in the order of its mounts.
    image_volumes: Vec<String>,
}

/// What it is in the guest.
struct Made {
    /// The guest's id for it: its own, or where it arrived by migration, the source's.
    guest_id: String,
    options: CreateOptions,
    copies: Vec<Copy>,
    termination: Option<Termination>,
    /// Its mounts of images.
    images: Vec<File>,
}

struct State {
    phase: Phase,
    /// Updates of its limits, which its spec does not have.
    updates: Vec<LinuxResources>,
    sync: Option<JoinHandle<()>>,
    made: Arc<Made>,
    /// The machine's boot that it is in.
    boot: u64,
    /// Its stdio until it arrives.
    waiting: Option<Stdio>,
}

impl Parts {
    fn resources(&self) -> Option<&LinuxResources> {
        self.oci.linux().as_ref()?.resources().as_ref()
    }

    fn make(&self, guest_id: &str, serial: &str) -> Result<Made> {
        let mut plan = self.volumes(guest_id)?;
        copy::resolve(&mut plan)?;
        let VolumePlan {
            mounts,
            copies,
            termination,
            images,
        } = plan;
        let images = images.iter().zip(&self.image_volumes);
        let images = images.map(|(volume, serial)| image_mount(volume, serial));
        let mut oci = self.oci.clone();
        oci.set_mounts(Some(mounts));
        let options = CreateOptions {
            spec_json: serde_json::to_vec(&oci)
                .context(|| "write the container's spec for the guest".into())?,
            seccomp_filter: self.filter.program.clone(),
            seccomp_flags: self.filter.flags,
            root_disk_serial: serial.to_owned(),
            readonly_root: self.readonly_root,
            ..Default::default()
        };
        Ok(Made {
            guest_id: guest_id.to_owned(),
            options,
            copies,
            termination,
            images: images.collect(),
        })
    }

    fn volumes(&self, guest_id: &str) -> Result<VolumePlan> {
        let (mounts, roots, ids) = (&self.mounts, &self.roots, &self.ids);
        volume_plan::plan(guest_id, mounts, roots, ids, &copy::ThisHost)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// In the guest, not run yet.
    #[default]
    Created,
    /// Was run; may have ended.
    Started,
}

impl Container {
    /// Creates the container in the machine's guest.
    ///
    /// # Errors
    /// `InvalidArgument` naming what a machine cannot honour; what the host's tools,
    /// libvirt or the agent refused. Nothing stays but what is kept for the image.
    pub async fn create(machine: Arc<Machine>, spec: ContainerSpec) -> Result<Arc<Self>> {
        let name = name_of(&spec);
        let mut guest = crate::spec::container(spec.oci)?;
        let mounts = guest.oci.mounts().clone().unwrap_or_default();
        let mut parts = Parts {
            mounts,
            roots: machine.roots(),
            ids: Ids {
                pod_uid: spec.pod.uid.clone(),
                sandbox: spec.pod.sandbox_id.clone(),
                container: spec.id.clone(),
            },
            filter: Filter {
                program: Vec::new(),
                flags: 0,
            },
            pids: Pids::Own,
            readonly_root: guest.readonly_root,
            image_volumes: Vec::new(),
            oci: guest.oci,
        };
        // What a machine cannot honour is refused before anything is made.
        let volumes = parts.volumes(&spec.id)?;
        let root = storage_plan::plan(&spec.rootfs, &spec.bundle.join("rootfs"))
            .map_err(|error| Error::InvalidArgument(error.to_string()))?;

        let (shared, private) = machine.image_dirs();
        let convert = storage::image(root, shared, private, machine.qemu_user());
        let convert_volumes = image_volumes(&machine, &volumes.images);
        let profile = guest.seccomp.take();
        let compile = blocking("compile the seccomp profile", move || {
            profile.as_ref().map(seccomp::compile).transpose()
        });
        let (image, image_volumes, filter) = tokio::try_join!(convert, convert_volumes, compile)?;
        if let Some(filter) = filter {
            parts.filter = filter;
        }
        parts.image_volumes = image_volumes
            .iter()
            .map(|image| image.key.clone())
            .collect();
        parts.pids = match guest.joins_pids_of {
            None => Pids::Own,
            // Any other id is the sandbox's, whose process may have been another when that was told.
            Some(pid) => machine
                .container_told_as(pid)
                .map_or(Pids::Pod, Pids::Target),
        };
        let stand_in = StandIn::start(machine.netns()).await?;
        let waits = machine.is_waiting();
        let serial = if waits {
            image.key.clone()
        } else {
            machine.ready().await?;
            machine.admit(&name, parts.resources()).await?;
            for image in &image_volumes {
                machine.plug(image).await?;
            }
            machine.plug(&image).await?
        };
        let made = Arc::new(parts.make(&spec.id, &serial)?);
        if !waits {
            machine.note_volumes(&made.copies)?;
        }
        let mut stdio = Some(spec.stdio);
        let container = Arc::new(Self {
            machine,
            id: spec.id,
            name,
            image: image.file,
            parts,
            stand_in,
            state: Mutex::new(State {
                phase: Phase::Created,
                sync: None,
                updates: Vec::new(),
                made: Arc::clone(&made),
                boot: 0,
                waiting: if waits { stdio.take() } else { None },
            }),
        });
        let machine = &container.machine;
        machine.name_container(&container.name, &container);
        match stdio {
            Some(stdio) => container.make(stdio, made.options.clone()).await?,
            None => {
                machine
                    .offer_container(&container.name, container.image.clone(), false)
                    .await?;
            }
        }
        Ok(container)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The process id that containerd is told.
    pub fn told_pid(&self) -> u32 {
        self.stand_in.id()
    }

    /// Its image's file.
    pub fn image_file(&self) -> PathBuf {
        self.image.clone()
    }

    /// The serial by which the guest knows its image.
    pub fn image_serial(&self) -> String {
        self.made().options.root_disk_serial.clone()
    }

    /// The serials of all disks that it uses.
    pub fn image_serials(&self) -> Vec<String> {
        let mut serials = self.parts.image_volumes.clone();
        serials.push(self.image_serial());
        serials
    }

    /// What of it no migration takes along, for people.
    pub fn migration_blocker(&self) -> Option<String> {
        let has_image_volumes = !self.parts.image_volumes.is_empty();
        has_image_volumes.then(|| {
            format!(
                "container {} has an image as a volume, which does not move yet; take it out, or recreate the pod on the other node",
                self.name
            )
        })
    }

    /// The guest's id for it.
    pub fn guest_id(&self) -> String {
        self.made().guest_id.clone()
    }

    fn made(&self) -> Arc<Made> {
        Arc::clone(&self.lock().made)
    }

    /// Nothing of it is in the guest: that boot is over. Or it is no longer ours to ask: the
    /// link to the guest was handed over to the migration's target.
    fn is_gone(&self) -> bool {
        self.machine.is_off()
            || self.machine.has_let_go()
            || self.machine.boot_number() != self.lock().boot
    }

    /// It has come with its machine: goes on from where its source's host stopped.
    ///
    /// # Errors
    /// The guest does not know it, or its agent does not answer.
    pub async fn arrive(self: &Arc<Self>, came: &Traveller, known: &[Position]) -> Result<()> {
        let made = Arc::new(self.parts.make(&came.guest_id, &came.serial)?);
        let stdio = {
            let mut state = self.lock();
            state.made = Arc::clone(&made);
            state.boot = self.machine.boot_number();
            state.phase = Phase::Started;
            state.waiting.take().unwrap_or_default()
        };
        self.machine.note_volumes(&made.copies)?;
        let agent = self.machine.agent();
        let process = ProcessId::init(&self.id);
        self.machine.started(process.clone());
        agent.adopt(&made.guest_id, None, stdio, known).await?;
        self.watch_end(agent.clone(), process);
        if let Err(error) = self.machine.admit(&self.name, self.parts.resources()).await {
            // As its source was.
            warn!("limits of {}: {}", self.name, error.chain());
        }
        self.keep_in_sync(agent.clone());
        let container = Arc::clone(self);
        tokio::spawn(async move { container.catch_up(&agent).await });
        Ok(())
    }

    /// The guest has the source pod's copies, and this one's may have other content.
    async fn catch_up(&self, agent: &Agent) {
        let made = self.made();
        // That one is the guest's to write.
        let of_guest = made
            .termination
            .as_ref()
            .map(|termination| &termination.host);
        for copy in &made.copies {
            let is_kept = matches!(copy.how, How::File | How::Tree);
            if is_kept && Some(&copy.host) != of_guest {
                self.refresh(agent, copy.clone()).await;
            }
        }
    }

    /// Puts the volumes and the container into the guest, and waits for its end.
    async fn make(self: &Arc<Self>, stdio: Stdio, mut options: CreateOptions) -> Result<()> {
        options.pids = self.pids_in_guest()?;
        let boot = self.machine.boot_number();
        let agent = self.machine.agent();
        let made = self.made();
        self.lock().boot = boot;
        let mut copies = made.copies.clone();
        // What the container made of it is its own.
        copies.retain(|copy| !(options.again && copy.how == How::Seed));
        self.put(&agent, copies, Vec::new()).await?;
        if !made.images.is_empty() {
            let request = PutFilesRequest {
                files: made.images.clone(),
                ..Default::default()
            };
            agent.put_files(request).await?;
        }
        let process = ProcessId::init(&self.id);
        agent.create(&made.guest_id, stdio, options).await?;
        self.machine.started(process.clone());
        self.watch_end(agent.clone(), process);
        let updates = self.lock().updates.clone();
        for update in updates {
            agent.update(&made.guest_id, &update).await?;
        }
        self.keep_in_sync(agent);
        Ok(())
    }

    fn pids_in_guest(&self) -> Result<Option<GuestPids>> {
        Ok(match &self.parts.pids {
            Pids::Own => None,
            Pids::Pod => Some(GuestPids::PodPids(true)),
            Pids::Target(id) => {
                let target = self.machine.guest_id_of(id).ok_or_else(|| {
                    Error::FailedPrecondition(format!(
                        "container {id}, whose processes container {} is to see, is gone",
                        self.id
                    ))
                })?;
                Some(GuestPids::TargetPids(target))
            }
        })
    }

    /// What changes in its volumes on the host changes in the guest.
    fn keep_in_sync(self: &Arc<Self>, agent: Agent) {
        let container = Arc::downgrade(self);
        let syncing = sync::watch(self.made().copies.clone(), move |changed| {
            let container = container.clone();
            let agent = agent.clone();
            async move {
                if let Some(container) = container.upgrade() {
                    container.refresh(&agent, changed).await;
                }
            }
        });
        match syncing {
            Ok(task) => self.lock().sync = Some(tokio::spawn(task)),
            Err(error) => warn!("container {}: {}", self.id, error.chain()),
        }
    }

    async fn put(&self, agent: &Agent, copies: Vec<Copy>, prune: Vec<String>) -> Result<()> {
        if copies.is_empty() && prune.is_empty() {
            return Ok(());
        }
        let files = blocking("read volumes", move || {
            let read: Result<Vec<Vec<File>>> = copies.iter().map(copy::read).collect();
            Ok(read?.concat())
        })
        .await?;
        let request = PutFilesRequest {
            files,
            prune,
            ..Default::default()
        };
        agent.put_files(request).await
    }

    async fn refresh(&self, agent: &Agent, changed: Copy) {
        let prune = match changed.how {
            How::Tree => vec![changed.guest.to_string_lossy().into_owned()],
            _ => Vec::new(),
        };
        // An original that is being replaced, or gone with its pod.
        if let Err(error) = self.put(agent, vec![changed], prune).await {
            debug!("keep a volume of {} in sync: {}", self.id, error.chain());
        }
    }

    /// Tells the end of a process, once; a machine that ends first has told it already.
    fn watch_end(self: &Arc<Self>, agent: Agent, process: ProcessId) {
        let container = Arc::clone(self);
        let guest_id = self.guest_id();
        tokio::spawn(async move {
            match agent.wait(&guest_id, process.exec.as_deref()).await {
                Ok(exit) => {
                    if process.exec.is_none() {
                        container.save_termination(&agent).await;
                    }
                    // The guest's streams go by its own id.
                    let in_guest = ProcessId {
                        container: guest_id,
                        exec: process.exec.clone(),
                    };
                    agent.taken(&in_guest, LAST_WORDS).await;
                    container.machine.finished(&process, exit);
                }
                Err(error) => debug!("wait for {process}: {}", error.chain()),
            }
        });
    }

    async fn save_termination(&self, agent: &Agent) {
        let made = self.made();
        let Some(termination) = &made.termination else {
            return;
        };
        let saved = async {
            let guest = termination.guest.to_string_lossy();
            let mut message = agent.get_file(&guest, TERMINATION_MAX_BYTES).await?;
            // The guest may not keep to what was asked.
            message.truncate(TERMINATION_MAX_BYTES as usize);
            copy::overwrite(&termination.host, &message)
        };
        if let Err(error) = saved.await {
            warn!("termination message of {}: {}", self.id, error.chain());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its source does not come: lets go of its stdio, since whoever reads that waits for the
    /// end. Says whether it was waiting.
    pub fn stop_waiting(&self) -> bool {
        self.lock().waiting.take().is_some()
    }

    /// Leaves its volumes in the guest as they are.
    pub fn stop_syncing(&self) {
        if let Some(task) = self.lock().sync.take() {
            task.abort();
        }
    }

    async fn run(&self, exec: Option<&str>) -> Result<u32> {
        self.machine.agent().start(&self.guest_id(), exec).await?;
        self.machine
            .pid()
            .map(|_| self.told_pid())
            .ok_or_else(|| Error::FailedPrecondition("the machine is powered off".into()))
    }
}

/// An owned handle to a container, for what outlives a call.
pub struct ContainerInstance(pub Arc<Container>);

#[async_trait]
impl Instance for ContainerInstance {
    async fn start(&self, stdio: Option<Stdio>) -> Result<u32> {
        let container = &self.0;
        if container.machine.is_waiting() {
            container.lock().phase = Phase::Started;
            container
                .machine
                .offer_container(&container.name, container.image.clone(), true)
                .await?;
            return Ok(container.told_pid());
        }
        if container.lock().phase == Phase::Started {
            // Again, in the same bundle: a new process from the same parts.
            container.stop_syncing();
            container.machine.ready().await?;
            let agent = container.machine.agent();
            if !agent.drained(&container.guest_id(), None, DRAIN).await {
                warn!("container {}: output is lost", container.id);
            }
            let again = CreateOptions {
                again: true,
                ..container.made().options.clone()
            };
            container.make(stdio.unwrap_or_default(), again).await?;
        }
        container.lock().phase = Phase::Started;
        let started = container.run(None).await;
        if started.is_err() {
            container.machine.withdrawn(&ProcessId::init(&container.id));
        }
        started
    }

    fn pid(&self) -> Option<u32> {
        self.0.machine.pid().map(|_| self.0.told_pid())
    }

    async fn signal(&self, exec: Option<&str>, signal: i32, all: bool) -> Result<()> {
        let container = &self.0;
        if container.machine.is_off() {
            return Err(Error::NotFound(format!(
                "process of container {}",
                container.id
            )));
        }
        container
            .machine
            .agent()
            .kill(&container.guest_id(), exec, signal, all)
            .await
    }

    async fn stop(&self, grace: Duration) -> Result<()> {
        if self.0.stop_waiting() {
            self.0.machine.withdraw_container(&self.0.name).await;
            return Ok(());
        }
        let process = ProcessId::init(&self.0.id);
        for (signal, bound) in [(libc::SIGTERM, grace), (libc::SIGKILL, KILL_PATIENCE)] {
            if !self.0.machine.is_running(&process) {
                return Ok(());
            }
            match self.signal(None, signal, signal == libc::SIGKILL).await {
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
            if self.0.machine.await_end(&process, bound).await {
                return Ok(());
            }
        }
        Err(Error::DeadlineExceeded(format!(
            "container {} did not end within {} s of SIGKILL",
            self.0.id,
            KILL_PATIENCE.as_secs()
        )))
    }

    async fn pause(&self) -> Result<()> {
        self.0.machine.agent().pause(&self.0.guest_id()).await
    }

    async fn resume(&self) -> Result<()> {
        self.0.machine.agent().resume(&self.0.guest_id()).await
    }

    async fn exec(&self, mut spec: ExecSpec) -> Result<()> {
        crate::spec::process(&mut spec.process)?;
        self.0.machine.agent().exec(&self.0.guest_id(), spec).await
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        let container = &self.0;
        let process = ProcessId::exec(&container.id, exec_id);
        let agent = container.machine.agent();
        container.machine.started(process.clone());
        let started = container.run(Some(exec_id)).await;
        match &started {
            Ok(_) => container.watch_end(agent, process),
            Err(_) => container.machine.withdrawn(&process),
        }
        started
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        let agent = self.0.machine.agent();
        let guest_id = self.0.guest_id();
        if !agent.drained(&guest_id, Some(exec_id), DRAIN).await {
            warn!("exec {exec_id} of container {}: output is lost", self.0.id);
        }
        match agent.delete(&guest_id, Some(exec_id)).await {
            Err(_) if self.0.is_gone() => Ok(()),
            result => result,
        }
    }

    async fn resize(&self, exec: Option<&str>, width: u16, height: u16) -> Result<()> {
        let agent = self.0.machine.agent();
        agent.resize(&self.0.guest_id(), exec, width, height).await
    }

    async fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        self.0.machine.agent().close_stdin(&self.0.guest_id(), exec)
    }

    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        Ok(self.pid().map(|pid| (pid, None)).into_iter().collect())
    }

    async fn stats(&self) -> Result<Stats> {
        self.0.machine.agent().stats(&self.0.guest_id()).await
    }

    /// A container that grows needs the machine to have grown, and one that shrinks lets it
    /// shrink.
    async fn update(&self, resources: &Resources) -> Result<()> {
        let Container {
            machine, id, name, ..
        } = &*self.0;
        if machine.is_suspended() {
            return Err(Error::FailedPrecondition(format!(
                "cannot update container {id}: its machine is paused; resume it first"
            )));
        }
        let agent = machine.agent();
        let guest_id = self.0.guest_id();
        let grows = machine.grows_by(name, &resources.linux).await?;
        if grows {
            machine.resize(name, &resources.linux).await?;
            agent.update(&guest_id, &resources.linux).await?;
        } else {
            agent.update(&guest_id, &resources.linux).await?;
            if let Err(error) = machine.resize(name, &resources.linux).await {
                let before = machine.limits(name).await.to_resources();
                if let Err(error) = agent.update(&guest_id, &before).await {
                    warn!("limits of {id} as before: {}", error.chain());
                }
                return Err(error);
            }
        }
        let updates = &mut self.0.lock().updates;
        // An update that was made again counts where it was made last.
        updates.retain(|earlier| *earlier != resources.linux);
        updates.push(resources.linux.clone());
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        let container = &self.0;
        container.stop_syncing();
        if container.machine.is_waiting() {
            container.machine.withdraw_container(&container.name).await;
            return Ok(());
        }
        let made = container.made();
        let agent = container.machine.agent();
        if !agent.drained(&made.guest_id, None, DRAIN).await {
            warn!("container {}: output is lost", container.id);
        }
        let process = ProcessId::init(&container.id);
        let deleted = match container.is_gone() {
            true => Ok(()),
            false => agent.delete(&made.guest_id, None).await,
        };
        // Its guest may have rebooted, even twice, or have ended meanwhile.
        if let Err(error) = deleted
            && !container.is_gone()
        {
            return Err(error);
        }
        container.machine.withdrawn(&process);
        if container.is_gone() {
            return Ok(());
        }
        if !made.copies.is_empty() || !made.images.is_empty() {
            let own = [VOLUMES, IMAGE_SEEDS].map(|base| Path::new(base).join(&made.guest_id));
            let prune = own.map(|dir| dir.to_string_lossy().into_owned()).to_vec();
            if let Err(error) = container.put(&agent, Vec::new(), prune).await {
                debug!("remove the volumes of {}: {}", container.id, error.chain());
            }
        }
        Ok(())
    }
}

/// The images that are volumes, converted like any.
async fn image_volumes(machine: &Machine, volumes: &[ImageVolume]) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for volume in volumes {
        let mounted = Mounts::read()?.mounted(&volume.host);
        let root = storage_plan::mounted(mounted, &volume.host);
        let (shared, private) = machine.image_dirs();
        images.push(storage::image(root, shared, private, machine.qemu_user()).await?);
    }
    Ok(images)
}

fn image_mount(volume: &ImageVolume, serial: &str) -> File {
    let filesystem = Filesystem {
        kind: "erofs".into(),
        disk_serial: serial.to_owned(),
        options: ["ro", "nosuid", "nodev"].map(String::from).to_vec(),
        ..Default::default()
    };
    File {
        path: volume.guest.to_string_lossy().into_owned(),
        mode: 0o755,
        content: Some(Content::Filesystem(filesystem)),
        ..Default::default()
    }
}

/// CRI's name of the container, which outlives its id.
fn name_of(spec: &ContainerSpec) -> String {
    let annotations = spec.oci.annotations().as_ref();
    let name = annotations.and_then(|all| all.get("io.kubernetes.cri.container-name"));
    name.unwrap_or(&spec.id).clone()
}

async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Unavailable(format!("{what}: {error}"), None))?
}
