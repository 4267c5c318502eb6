//! What must hold, and must be there, before a machine can be defined.

use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::Channel;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::spec::ContainerSpec;
use uuid::Uuid;

use crate::domain::AgentChannel;
use crate::events::Observed;
use crate::kept::Kept;
use crate::libvirt::Libvirt;
use crate::record::Folder;
use crate::storage::apply::{self as storage, QemuUser};
use crate::{Paths, size};

/// A unix socket's address holds no more.
const SOCKET_PATH_MAX: usize = 107;

pub(super) fn title(spec: &ContainerSpec) -> String {
    if spec.pod.name.is_empty() {
        return spec.pod.sandbox_id.clone();
    }
    format!("{}/{}", spec.pod.namespace, spec.pod.name)
}

pub(super) fn host_size() -> Result<size::Host> {
    let info = nix::sys::sysinfo::sysinfo().context(|| "ask for the host's memory".into())?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(size::Host {
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
