//! PID 1: boot, then serve the host until it powers us off.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dyad_agent_api::link::guest::Link;
use dyad_agent_api::link::port::Port;
use dyad_agent_api::link::{PORT_NAME, VSOCK_PORT, vsock};
use dyad_agent_api::proto::agent_ttrpc::create_sandbox;
use dyad_agent_api::task_api::shim_async::create_task;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::unistd::Pid;
use rustix::process::setpriority_process;
use tokio::sync::{mpsc, watch};

use crate::cmdline::{Channel, Cmdline};
use crate::oom::Events;
use crate::pause::PodPids;
use crate::rootfs::Images;
use crate::sandbox::SandboxService;
use crate::task::{Containers, TaskService};
use crate::{boot, button, disk, logger, modprobe, modules, power, uevent};

/// How long the host's channel may take to appear.
const CHANNEL_WITHIN: Duration = Duration::from_secs(30);
/// The nice value that leaves the processor to everybody else.
const LAST: i32 = 19;

/// What every service of the agent shares.
pub struct Agent {
    /// The way to the host.
    link: OnceLock<Link>,
    /// The owner of all exits.
    pub reaper: Arc<Reaper>,
    /// Every container.
    pub containers: Containers,
    /// The PID namespace of a pod that shares one.
    pub pod_pids: PodPids,
    /// Mounted images.
    pub images: Images,
    /// What happened, for `WaitEvents`.
    pub events: Arc<Events>,
    modules: watch::Receiver<Modules>,
}

/// How far the loading of kernel modules is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Modules {
    /// The host can speak to us.
    Channel,
    /// Disks, file systems and network cards work.
    Pod,
    /// None is left to load, and the power button is heard.
    All,
    /// What else the kernel asks for is found.
    OnDemand,
}

impl Agent {
    /// The way to the host.
    ///
    /// # Errors
    /// Before there is one; no call can come then.
    pub fn link(&self) -> Result<&Link> {
        self.link
            .get()
            .ok_or_else(|| Error::Unavailable("the link is not up".into(), None))
    }

    /// Waits until disks, file systems and network cards work.
    pub async fn drivers_loaded(&self) {
        self.loaded(Modules::Pod).await;
    }

    /// Waits until the kernel finds what it asks for.
    pub async fn modules_on_demand(&self) {
        self.loaded(Modules::OnDemand).await;
    }

    /// Waits until every kernel module is in, and the power button is heard.
    pub async fn modules_loaded(&self) {
        self.loaded(Modules::All).await;
    }

    async fn loaded(&self, wanted: Modules) {
        // An error: the loader is gone, so there is nothing left to wait for.
        let _ = self
            .modules
            .clone()
            .wait_for(|reached| *reached >= wanted)
            .await;
    }
}

/// Boots and serves; comes back only to a process that is not PID 1.
pub fn main() -> ExitCode {
    if Pid::this() != Pid::from_raw(1) {
        eprintln!("dyad-agent is the init of a machine: it runs as PID 1 only");
        return ExitCode::from(2);
    }
    let cmdline = boot::run();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Blocking work is short and rare: mounts, removing trees.
        .max_blocking_threads(8)
        .build();
    let end = match runtime {
        Ok(runtime) => runtime.block_on(serve(&cmdline)),
        Err(error) => Err(Error::other("start the event loop", error)),
    };
    if let Err(error) = end {
        log::error!("{}", error.chain());
    }
    power::halt(power::Kind::Off)
}

async fn serve(cmdline: &Cmdline) -> Result<()> {
    let boot_id = boot::boot_id()?;
    let reaper = Reaper::start().context(|| "start the reaper".into())?;
    let events = Arc::new(Events::default());
    let (pressed, presses) = mpsc::channel(1);
    let modules = load_modules(pressed);
    let agent = Arc::new(Agent {
        link: OnceLock::new(),
        reaper,
        containers: Containers::default(),
        pod_pids: PodPids::default(),
        images: Images::default(),
        events,
        modules,
    });
    let mut services = create_task(Arc::new(TaskService::new(Arc::clone(&agent))));
    services.extend(create_sandbox(Arc::new(SandboxService::new(
        Arc::clone(&agent),
        boot_id.clone(),
    ))));
    tokio::spawn(button::obey(Arc::clone(&agent), presses));
    let link = Link::new(services, boot_id);
    let link = agent.link.get_or_init(|| link);
    match cmdline.channel {
        Channel::Port => serve_port(link).await,
        Channel::Vsock => {
            agent.modules_loaded().await;
            serve_vsock(link).await
        }
    }
}

fn ready() {
    eprintln!("[{}] dyad-agent: ready", logger::uptime());
}

async fn serve_port(link: &Link) -> Result<()> {
    let class = Path::new("/sys/class/virtio-ports");
    uevent::wait_for(&format!("port {PORT_NAME}"), CHANNEL_WITHIN, || {
        Ok(port_exists(class).then_some(()))
    })
    .await?;
    let port = Port::open(PORT_NAME).context(|| format!("open port {PORT_NAME}"))?;
    ready();
    loop {
        port.host_connected()
            .await
            .context(|| "wait for the host".into())?;
        log::debug!("the host is here");
        let (reader, writer) = port.split();
        match link.serve(reader, writer).await {
            Ok(()) => log::debug!("the host went away"),
            Err(error) => log::warn!("the channel broke: {error}"),
        }
    }
}

fn port_exists(class: &Path) -> bool {
    let Ok(ports) = fs::read_dir(class) else {
        return false;
    };
    ports.filter_map(std::result::Result::ok).any(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME)
            && Path::new("/dev").join(port.file_name()).exists()
    })
}

async fn serve_vsock(link: &Link) -> Result<()> {
    let listener =
        vsock::Listener::bind(VSOCK_PORT).context(|| format!("listen on vsock {VSOCK_PORT}"))?;
    ready();
    loop {
        let stream = listener
            .accept()
            .await
            .context(|| "accept on vsock".into())?;
        log::debug!("the host is here");
        let (reader, writer) = stream.into_split();
        let link = link.clone();
        // A newer connection ends the older one inside the link.
        tokio::spawn(async move {
            if let Err(error) = link.serve(reader, writer).await {
                log::warn!("the channel broke: {error}");
            }
        });
    }
}

/// Loads the channel's modules at once, so that the host gets its answer, and the rest on
/// a thread of their own: what a pod waits for, then, behind all other work, what only its
/// first container does.
fn load_modules(button: mpsc::Sender<()>) -> watch::Receiver<Modules> {
    let list = fs::read_to_string(modules::LIST).unwrap_or_default();
    let mut channel = modules::parse(&list);
    let mut pod = split_after(&mut channel, "virtio_console");
    let rest = split_after(&mut pod, "virtio_net");
    for module in channel {
        modules::load(&module);
    }
    let (reached, modules) = watch::channel(Modules::Channel);
    let runtime = tokio::runtime::Handle::current();
    let load = move || {
        let present = virtio_devices(Path::new("/sys/bus/virtio/devices"));
        load_present(&pod, &present);
        disk::scan_controllers();
        reached.send_replace(Modules::Pod);
        // The calling thread only: it gets the processor when nobody else wants it.
        if let Err(error) = setpriority_process(None, LAST) {
            log::warn!("load modules beside other work: {error}");
        }
        load_present(&rest, &present);
        if let Err(error) = button::listen(button) {
            log::warn!("{}", error.chain());
        }
        log::debug!("modules are loaded");
        reached.send_replace(Modules::All);
        if let Err(error) = modprobe::serve(&runtime) {
            log::warn!("{}", error.chain());
        }
        reached.send_replace(Modules::OnDemand);
    };
    let started = std::thread::Builder::new()
        .name("modules".into())
        .spawn(load);
    if let Err(error) = started {
        log::error!("load kernel modules: {error}");
    }
    modules
}

/// Leaves in `list` what it has up to this module, and returns what is behind.
fn split_after(list: &mut Vec<PathBuf>, name: &str) -> Vec<PathBuf> {
    let at = list
        .iter()
        .position(|module| modules::is_named(module, name));
    list.split_off(at.map_or(0, |at| at + 1))
}

fn load_present(list: &[PathBuf], present: &HashSet<u32>) {
    for module in list {
        if modules::is_of_use(module, present) {
            modules::load(module);
        }
    }
}

/// The device ids on the virtio bus.
fn virtio_devices(bus: &Path) -> HashSet<u32> {
    let Ok(devices) = fs::read_dir(bus) else {
        return HashSet::new();
    };
    devices
        .filter_map(std::result::Result::ok)
        .filter_map(|device| fs::read_to_string(device.path().join("device")).ok())
        .filter_map(|id| u32::from_str_radix(id.trim().trim_start_matches("0x"), 16).ok())
        .collect()
}
