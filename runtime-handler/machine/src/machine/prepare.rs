//! What must hold, and must be there, before a machine can be defined.

use std::sync::Arc;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::{Channel, MachineConfig};
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::identity::pod_uuid;
use dyad_runtime_handler::migration;
use dyad_runtime_handler::spec::ContainerSpec;
use log::info;
use uuid::Uuid;

use super::POD_DISK_SERIAL;
use crate::domain::{AgentChannel, DomainPlan, Nic, PodDisk};
use crate::events::Observed;
use crate::kept::{self, Kept};
use crate::libvirt::Libvirt;
use crate::network::plan::NetworkPlan;
use crate::network::{apply as network, plan as network_plan};
use crate::record::{Folder, Record};
use crate::size::{self, Reached};
use crate::spec::SandboxSpec;
use crate::storage::apply::{self as storage, QemuUser};
use crate::storage::cache;
use crate::{Paths, accelerator, cgroup, host, modules};

/// A unix socket's address holds no more.
const SOCKET_PATH_MAX: usize = 107;

/// A pod on this host, and where the traces of its machine go.
pub(super) struct Site {
    pub config: Arc<MachineConfig>,
    pub paths: Paths,
    pub libvirt: Libvirt,
    pub sandbox: SandboxSpec,
    pub record: Record,
    pub folder: Folder,
}

/// What a machine is made from: its plan, with its files in place.
pub(super) struct Prepared {
    /// As it was saved.
    pub record: Record,
    pub plan: DomainPlan,
    pub wanted: size::Plan,
    pub network: NetworkPlan,
    pub qemu_user: Option<QemuUser>,
    pub pod_key: Option<Uuid>,
    pub kubernetes_namespace: String,
    /// The disk is that of the pod's last sandbox.
    pub inherited: bool,
}

/// Looks at the pod and the host, makes the machine's folders and its disk, and plans its domain.
///
/// # Errors
/// The spec asks for what a machine cannot give, or the host lacks something.
pub(super) async fn prepare(site: &Site, spec: &ContainerSpec) -> Result<Prepared> {
    let Site {
        config,
        paths,
        libvirt,
        sandbox,
        folder,
        ..
    } = site;
    let mut record = site.record.clone();
    let uuid = record.uuid;
    let pod = pod_uuid(&record.containerd_namespace, &record.sandbox_id);
    let waits = migration::source_of(&spec.pod)?.is_some();
    let wanted = size::plan(config, &spec.pod.size, &spec.pod.annotations, host_size()?)?;
    check_readable("kernel", &config.kernel)?;
    check_readable("initramfs", &config.initramfs)?;
    check_socket_path(&folder.console_socket())?;

    let capabilities = host::capabilities(libvirt).await?;
    let accelerator = accelerator::choose(
        config.accelerator,
        &capabilities,
        &config.kernel,
        &paths.cache_dir,
    )
    .await?;
    let network = match &sandbox.netns {
        Some(netns) => {
            let found = network::read(netns).await?;
            network_plan::plan(pod, &found.links, &found.addresses, &found.routes)
                .map_err(|error| Error::FailedPrecondition(error.to_string()))?
        }
        None => NetworkPlan::default(),
    };

    record.bundle = Some(spec.bundle.clone());
    record.netns = sandbox.netns.clone();
    record.cgroups_path = sandbox.cgroups_path.clone();
    record.size = Some(wanted.size);
    record.reached = Some(Reached::at_boot(&wanted.size));
    record.taps = network
        .interfaces
        .iter()
        .map(|interface| (interface.name.clone(), interface.tap.clone()))
        .collect();
    make_folders(paths, folder, capabilities.qemu_user)?;
    storage::check_on_disk(&folder.dir)?;
    folder.save(&record)?;
    folder.kept.sweep();
    cache::sweep(&folder.images);
    let pod_key = kept::key(&record.containerd_namespace, &spec.pod.uid);
    // A target's is filled by its source.
    let inherited = match pod_key {
        Some(key) if !waits => inherit_disk(libvirt, paths, folder, key).await?,
        _ => false,
    };
    if inherited {
        info!("machine {uuid}: the pod's disk is that of its last sandbox");
    } else {
        storage::pod_disk(
            folder.disk(),
            wanted.disk_gib,
            capabilities.qemu_user,
            !waits,
        )
        .await?;
    }

    let channel = choose_channel(config.channel, folder, pod)?;
    let modules = modules::disk(config)?;
    let partition = sandbox.cgroups_path.as_deref();
    let partition = partition.and_then(|path| cgroup::partition(path, wanted.cpu_shares));
    let plan = DomainPlan {
        uuid,
        title: title(spec),
        sandbox_id: record.sandbox_id.clone(),
        containerd_namespace: record.containerd_namespace.clone(),
        accelerator,
        partition,
        modules,
        size: wanted.size,
        reached: Reached::at_boot(&wanted.size),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        kernel_params: config.kernel_params.clone(),
        channel,
        pod_disk: PodDisk {
            file: folder.disk(),
            serial: POD_DISK_SERIAL.into(),
        },
        nics: network
            .interfaces
            .iter()
            .map(|interface| Nic {
                tap: interface.tap.clone(),
                mac: interface.mac.clone(),
                mtu: interface.mtu,
            })
            .collect(),
        console_socket: folder.console_socket(),
        console_log: folder.console(),
        images: Vec::new(),
    };
    Ok(Prepared {
        record,
        plan,
        wanted,
        network,
        qemu_user: capabilities.qemu_user,
        pod_key,
        kubernetes_namespace: spec.pod.namespace.clone(),
        inherited,
    })
}

pub(super) fn title(spec: &ContainerSpec) -> String {
    if spec.pod.name.is_empty() {
        return spec.pod.sandbox_id.clone();
    }
    format!("{}/{}", spec.pod.namespace, spec.pod.name)
}

pub(super) fn host_size() -> Result<size::create::Host> {
    let info = nix::sys::sysinfo::sysinfo().context(|| "ask for the host's memory".into())?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(size::create::Host {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_mib: info.ram_total() >> 20,
    })
}

pub(super) fn check_readable(key: &str, path: &std::path::Path) -> Result<()> {
    std::fs::File::open(path).map(drop).map_err(|error| {
        Error::FailedPrecondition(format!(
            "guest {key} {}: {error}; build it with hack/guest, or set `{key}` in section [machine] of the configuration",
            path.display()
        ))
    })
}

pub(super) fn check_socket_path(socket: &std::path::Path) -> Result<()> {
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        return Err(Error::FailedPrecondition(format!(
            "{} has {length} characters, a socket's path at most {SOCKET_PATH_MAX}; set a shorter `state_dir`",
            socket.display()
        )));
    }
    Ok(())
}

/// QEMU's user walks through all of them and writes sockets into the last.
pub(super) fn make_folders(paths: &Paths, folder: &Folder, user: Option<QemuUser>) -> Result<()> {
    for root in [&paths.state_dir, &paths.cache_dir] {
        if !root.exists() {
            storage::walkable_dir(root)?;
        }
        storage::walkable_dir(&root.join("machines"))?;
    }
    folder.kept.make()?;
    storage::walkable_dir(&folder.dir)?;
    storage::walkable_dir(&folder.run_dir)?;
    if let Some(user) = user {
        std::os::unix::fs::chown(&folder.run_dir, Some(user.uid), Some(user.gid))
            .context(|| format!("set the owner of {}", folder.run_dir.display()))?;
    }
    Ok(())
}

/// The pod's disk, if an earlier sandbox of the pod left one, is this machine's: says so. That
/// sandbox's machine may not be deleted yet; it is off.
///
/// # Errors
/// The disk cannot be moved, or libvirt does not answer.
pub(super) async fn inherit_disk(
    libvirt: &Libvirt,
    paths: &Paths,
    folder: &Folder,
    pod: Uuid,
) -> Result<bool> {
    for earlier in Folder::others(paths, folder) {
        if !Kept::is_of(&earlier.dir, pod) {
            continue;
        }
        let Some(record) = earlier.load()? else {
            continue;
        };
        match libvirt.state(record.uuid).await? {
            Observed::Absent | Observed::Off(_) => folder.kept.keep(&earlier.dir)?,
            _ => {}
        }
    }
    folder.kept.take(pod, &folder.dir)
}

/// vsock where it is asked for. Not by itself: a vsock port of the guest is open to every
/// process of the host, a virtio-serial port's socket only to us.
pub(super) fn choose_channel(
    choice: Channel,
    folder: &Folder,
    uuid: uuid::Uuid,
) -> Result<AgentChannel> {
    let vhost = std::path::Path::new("/dev/vhost-vsock");
    let vsock = match choice {
        Channel::Auto | Channel::VirtioSerial => false,
        Channel::Vsock if !vhost.exists() => {
            return Err(Error::FailedPrecondition(
                "channel = \"vsock\", but this host has no /dev/vhost-vsock; load the module vhost_vsock, or set `channel` to \"virtio-serial\" in section [machine] of the configuration".into(),
            ));
        }
        Channel::Vsock => true,
    };
    if !vsock {
        return Ok(AgentChannel::VirtioSerial {
            socket: folder.agent_socket(),
        });
    }
    // From the UUID, away from the low ids that people give by hand.
    let (high, _) = uuid.as_u64_pair();
    Ok(AgentChannel::Vsock {
        cid: 0x1000_0000 | (high as u32 & 0x3fff_ffff),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_vsock_only_where_it_is_asked_for() {
        let dir = std::path::Path::new("/nonexistent");
        let folder = Folder::new(dir, dir, Uuid::from_u128(1));
        for choice in [Channel::Auto, Channel::VirtioSerial] {
            let channel = choose_channel(choice, &folder, Uuid::from_u128(1)).expect("channel");
            let socket = folder.agent_socket();
            assert_eq!(channel, AgentChannel::VirtioSerial { socket });
        }
    }
}
