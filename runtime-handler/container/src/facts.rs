//! What a container keeps of its spec. Pure.

use std::path::PathBuf;

use dyad_linux::cgroup::is_systemd;
use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::spec::ContainerSpec;
use oci_spec::runtime::{Hook, LinuxIdMapping, LinuxNamespaceType, Process as OciProcess, Spec};

/// Where an image's stop signal is told, when its puller tells (OCI image-spec,
/// conversion.md).
const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

/// What is kept of the spec.
#[derive(Debug)]
pub(crate) struct Facts {
    pub id: String,
    pub bundle: PathBuf,
    pub systemd_cgroup: bool,
    pub cgroups_path: Option<String>,
    pub own_pid_namespace: bool,
    pub has_start_hooks: bool,
    pub has_stop_hooks: bool,
    pub stop_signal: i32,
    /// Owner of init's stdio on the host.
    pub owner: (u32, u32),
    /// The same of any process's, where the configuration names one.
    pub io_owner: Option<(u32, u32)>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    ids: IdMaps,
}

#[derive(Debug, Default)]
struct IdMaps {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Facts {
    pub(crate) fn new(spec: &ContainerSpec, config: &ContainerConfig) -> Self {
        let oci = &spec.oci;
        let linux = oci.linux().as_ref();
        let ids = IdMaps::new(oci);
        let user = oci.process().as_ref().map(OciProcess::user);
        let io_owner = Some((config.io_uid, config.io_gid)).filter(|owner| *owner != (0, 0));
        let own = user.map_or((0, 0), |user| ids.on_host(user.uid(), user.gid()));
        let owner = io_owner.unwrap_or(own);
        let cgroups_path = linux
            .and_then(|linux| linux.cgroups_path().as_ref())
            .map(|path| path.to_string_lossy().into_owned());
        let own_pid_namespace = linux
            .and_then(|linux| linux.namespaces().as_ref())
            .is_some_and(|all| {
                all.iter()
                    .any(|ns| ns.typ() == LinuxNamespaceType::Pid && ns.path().is_none())
            });
        let hooks = oci.hooks().as_ref();
        let any = |hooks: Option<&Vec<Hook>>| hooks.is_some_and(|hooks| !hooks.is_empty());
        let has_start_hooks = any(hooks.and_then(|hooks| hooks.poststart().as_ref()));
        let has_stop_hooks = any(hooks.and_then(|hooks| hooks.poststop().as_ref()));
        let stop_signal = oci
            .annotations()
            .as_ref()
            .and_then(|annotations| annotations.get(STOP_SIGNAL))
            .and_then(|name| signal_number(name))
            .unwrap_or(libc::SIGTERM);
        Self {
            id: spec.id.clone(),
            bundle: spec.bundle.clone(),
            systemd_cgroup: config.systemd_cgroup
                || cgroups_path.as_deref().is_some_and(is_systemd),
            cgroups_path,
            own_pid_namespace,
            has_start_hooks,
            has_stop_hooks,
            stop_signal,
            owner,
            io_owner,
            no_pivot: config.no_pivot_root,
            no_new_keyring: config.no_new_keyring,
            ids,
        }
    }
}

impl Facts {
    /// Owner on the host of the stdio of a process of that user.
    pub(crate) fn owner_of(&self, uid: u32, gid: u32) -> (u32, u32) {
        self.io_owner.unwrap_or_else(|| self.ids.on_host(uid, gid))
    }
}

impl IdMaps {
    fn new(oci: &Spec) -> Self {
        let linux = oci.linux().as_ref();
        Self {
            uids: linux
                .and_then(|linux| linux.uid_mappings().clone())
                .unwrap_or_default(),
            gids: linux
                .and_then(|linux| linux.gid_mappings().clone())
                .unwrap_or_default(),
        }
    }

    /// The ids on the host of a user in the container.
    fn on_host(&self, uid: u32, gid: u32) -> (u32, u32) {
        (map_id(&self.uids, uid), map_id(&self.gids, gid))
    }
}

fn map_id(maps: &[LinuxIdMapping], id: u32) -> u32 {
    maps.iter()
        .find_map(|map| {
            let offset = id.checked_sub(map.container_id())?;
            (offset < map.size()).then(|| map.host_id().saturating_add(offset))
        })
        .unwrap_or(id)
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = name.strip_prefix("SIG").unwrap_or(name);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: i32 = match offset {
            "" => 0,
            plus => plus.strip_prefix('+')?.parse().ok()?,
        };
        // libc keeps the first two for itself, images mean what libc calls RTMIN.
        let number = libc::SIGRTMIN() + offset;
        return (number <= 64).then_some(number);
    }
    let signal: nix::sys::signal::Signal = format!("SIG{name}").parse().ok()?;
    Some(signal as i32)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxIdMappingBuilder;

    use super::*;

    #[test]
    fn ids_are_mapped_to_the_hosts() {
        let map = |container: u32, host: u32, size: u32| {
            LinuxIdMappingBuilder::default()
                .container_id(container)
                .host_id(host)
                .size(size)
                .build()
                .unwrap()
        };
        let maps = [map(0, 100_000, 1000), map(1000, 500, 1)];
        for (id, host) in [(0, 100_000), (999, 100_999), (1000, 500), (1001, 1001)] {
            assert_eq!(map_id(&maps, id), host);
        }
        assert_eq!(map_id(&[], 7), 7);
    }

    #[test]
    fn stop_signals_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("QUIT", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMIN", Some(34)),
            ("0", None),
            ("65", None),
            ("SIGRTMIN+99", None),
            ("SIGRTMIN-1", None),
            ("nonsense", None),
            ("", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }
}
