//! A pod of a client other than CRI (containerd's `client.NewSandbox`): the Sandbox API
//! without a pod's configuration.
//!
//! What the pod is to be stands in the OCI spec of its bundle, if there is one, and in the
//! request. Its containers come as ordinary tasks that say nowhere whose they are, and by
//! their namespaces what they share:
//!
//! | namespace in a container's spec | pid, ipc, uts | network |
//! |---|---|---|
//! | with a path | the pod's; the path is the client's guess at it | the pod's |
//! | without a path | its own | the pod's, unless that is the host's |
//! | missing | its own: nothing of the host's comes by leaving a word out | the pod's |

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::PodSize;
use dyad_runtime_handler::{Error, Result};
use nix::sys::statfs::{FsType, fstatfs};
use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType as Type, LinuxResources, Mount, Spec,
};

use crate::pod_spec::{Client, HostNamespaces, PodConfig};
use crate::spec;

/// Where namespaces' files are (linux/magic.h: NSFS_MAGIC).
const NSFS: FsType = FsType(0x6e73_6673);
/// A mount of this type forwards a UNIX socket of the host (containerd/shimtest, nerdbox);
/// for a container that is a bind mount.
const SOCKET_MOUNT: &str = "uds";

/// The pod that is to be made in `bundle`, on the network of `netns`: empty: the host's; a
/// network namespace; or an empty file, for a pod with a new network of its own.
///
/// # Errors
/// `InvalidArgument` for a `netns` that is none of these, or a spec that cannot be read.
pub fn read(bundle: &Path, netns: &str, annotations: HashMap<String, String>) -> Result<PodConfig> {
    let spec = match bundle.join("config.json").exists() {
        true => spec::read(bundle)?,
        false => Spec::default(),
    };
    let network = match netns {
        "" => Network::Host,
        path if is_namespace(path)? => Network::Of(path.into()),
        _ => Network::New,
    };
    Ok(config(&spec, network, annotations))
}

/// A pod's network.
#[derive(Debug, PartialEq, Eq)]
enum Network {
    Host,
    Of(PathBuf),
    New,
}

fn is_namespace(path: &str) -> Result<bool> {
    let file = File::open(path)
        .map_err(|error| Error::InvalidArgument(format!("netns_path {path:?}: {error}")))?;
    let kind = fstatfs(&file).context(|| format!("look at netns_path {path}"))?;
    if kind.filesystem_type() == NSFS {
        return Ok(true);
    }
    let metadata = file
        .metadata()
        .context(|| format!("look at netns_path {path}"))?;
    if metadata.is_file() && metadata.len() == 0 {
        return Ok(false);
    }
    Err(Error::InvalidArgument(format!(
        "netns_path {path:?}: neither a network namespace nor an empty file that stands for a new one; make one by `ip netns add`, or leave it out for the host's network"
    )))
}

fn config(spec: &Spec, network: Network, annotations: HashMap<String, String>) -> PodConfig {
    let linux = spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_ref());
    let namespaces = linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default();
    let mut all: BTreeMap<String, String> = spec
        .annotations()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    all.extend(annotations);
    let size = linux.and_then(|linux| linux.resources().as_ref());
    PodConfig {
        client: Client::Other,
        hostname: spec.hostname().clone().unwrap_or_default(),
        annotations: all,
        cgroup_parent: path
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        shares: HostNamespaces {
            network: network == Network::Host,
            ..HostNamespaces::default()
        },
        user_namespace: find(namespaces, Type::User).is_some(),
        netns: match network {
            Network::Of(path) => Some(path),
            Network::Host | Network::New => None,
        },
        sysctls: linux
            .and_then(|linux| linux.sysctl().clone())
            .unwrap_or_default()
            .into_iter()
            .collect(),
        size: size.map(pod_size).unwrap_or_default(),
        ..PodConfig::default()
    }
}

fn pod_size(resources: &LinuxResources) -> PodSize {
    let cpu = resources.cpu().as_ref();
    let signed = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok());
    PodSize {
        cpu_period: signed(cpu.and_then(|cpu| cpu.period())).unwrap_or_default(),
        cpu_quota: cpu.and_then(|cpu| cpu.quota()).unwrap_or_default(),
        cpu_shares: signed(cpu.and_then(|cpu| cpu.shares())).unwrap_or_default(),
        memory_limit: resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit())
            .unwrap_or_default(),
    }
}

fn find(namespaces: &[LinuxNamespace], kind: Type) -> Option<&LinuxNamespace> {
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}

/// Has a container join the pod whose host pid is `pid`, by the table above, and turns
/// forwarded sockets into bind mounts. Returns whether it shares the pod's IPC namespace,
/// and so its shared memory.
pub fn join(spec: &mut Spec, pid: u32, own_network: bool) -> bool {
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut shares_ipc = false;
    for (kind, file) in [(Type::Pid, "pid"), (Type::Ipc, "ipc"), (Type::Uts, "uts")] {
        let asked = find(&namespaces, kind);
        let shared = asked.is_some_and(|asked| asked.path().is_some());
        let path = shared.then(|| of_process(pid, file));
        shares_ipc |= shared && kind == Type::Ipc;
        put(&mut namespaces, kind, path);
    }
    if own_network {
        put(&mut namespaces, Type::Network, Some(of_process(pid, "net")));
    } else {
        // The pod's is the host's; a network of its own stays its own.
        namespaces
            .retain(|namespace| namespace.typ() != Type::Network || namespace.path().is_none());
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    let mut mounts = spec.mounts().clone();
    mounts.iter_mut().flatten().for_each(bind_socket);
    spec.set_mounts(mounts);
    shares_ipc
}

fn of_process(pid: u32, file: &str) -> PathBuf {
    format!("/proc/{pid}/ns/{file}").into()
}

fn put(namespaces: &mut Vec<LinuxNamespace>, kind: Type, path: Option<PathBuf>) {
    namespaces.retain(|namespace| namespace.typ() != kind);
    let namespace = LinuxNamespaceBuilder::default().typ(kind);
    let namespace = match path {
        Some(path) => namespace.path(path),
        None => namespace,
    };
    // It has a default for whatever it was not told.
    namespaces.extend(namespace.build());
}

fn bind_socket(mount: &mut Mount) {
    if mount.typ().as_deref() != Some(SOCKET_MOUNT) {
        return;
    }
    mount.set_typ(Some("bind".into()));
    let mut options = mount.options().clone().unwrap_or_default();
    options.push("bind".into());
    mount.set_options(Some(options));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    fn joined(namespaces: &str, own_network: bool) -> Vec<(Type, String)> {
        let mut spec = spec(&format!(
            r#"{{"ociVersion":"1.1.0","linux":{{"namespaces":{namespaces}}}}}"#
        ));
        join(&mut spec, 7, own_network);
        let linux = spec.linux().as_ref().unwrap();
        let mut all: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|namespace| {
                let path = namespace.path().clone().unwrap_or_default();
                (namespace.typ(), path.display().to_string())
            })
            .collect();
        all.sort_by_key(|(kind, _)| kind.to_string());
        all
    }

    #[test]
    fn a_container_shares_what_it_names_a_path_for_and_always_the_network() {
        let own = |kind| (kind, String::new());
        let pods = |kind, file| (kind, format!("/proc/7/ns/{file}"));
        for (asked, own_network, got) in [
            (
                "[]",
                true,
                vec![
                    own(Type::Ipc),
                    pods(Type::Network, "net"),
                    own(Type::Pid),
                    own(Type::Uts),
                ],
            ),
            (
                r#"[{"type":"pid","path":"/proc/1/ns/pid"},{"type":"ipc","path":"/x"},
                    {"type":"uts","path":"/y"},{"type":"network"}]"#,
                true,
                vec![
                    pods(Type::Ipc, "ipc"),
                    pods(Type::Network, "net"),
                    pods(Type::Pid, "pid"),
                    pods(Type::Uts, "uts"),
                ],
            ),
            (
                r#"[{"type":"network","path":"/proc/1/ns/net"}]"#,
                false,
                vec![own(Type::Ipc), own(Type::Pid), own(Type::Uts)],
            ),
            (
                r#"[{"type":"network"}]"#,
                false,
                vec![
                    own(Type::Ipc),
                    own(Type::Network),
                    own(Type::Pid),
                    own(Type::Uts),
                ],
            ),
        ] {
            assert_eq!(joined(asked, own_network), got, "{asked}");
        }
    }

    #[test]
    fn a_forwarded_socket_is_a_bind_mount() {
        let mut spec = spec(
            r#"{"ociVersion":"1.1.0","mounts":[
                {"destination":"/run/a.sock","type":"uds","source":"/tmp/a.sock"}]}"#,
        );
        join(&mut spec, 7, true);
        let mount = &spec.mounts().as_ref().unwrap()[0];
        assert_eq!(mount.typ().as_deref(), Some("bind"));
        assert_eq!(mount.options().as_deref(), Some(&["bind".to_owned()][..]));
    }

    #[test]
    fn a_pod_is_what_its_spec_and_the_request_say() {
        let spec = spec(
            r#"{"ociVersion":"1.1.0","hostname":"web","annotations":{"dyad.dev/vcpus":"2"},
               "linux":{"cgroupsPath":"/a/b","sysctl":{"kernel.shmmax":"1"},
                        "resources":{"memory":{"limit":7},"cpu":{"period":100000}}}}"#,
        );
        let asked = HashMap::from([("dyad.dev/disk".to_owned(), "1Gi".to_owned())]);
        let pod = config(&spec, Network::Of("/n".into()), asked);
        assert_eq!(pod.client, Client::Other);
        assert_eq!(
            (pod.hostname.as_str(), pod.cgroup_parent.as_str()),
            ("web", "/a/b")
        );
        assert_eq!(pod.annotations.len(), 2);
        assert_eq!(pod.netns, Some("/n".into()));
        assert!(!pod.shares.network);
        let size = pod.size;
        assert_eq!((size.memory_limit, size.cpu_period), (7, 100_000));
        let bare = config(&Spec::default(), Network::Host, HashMap::new());
        assert!(bare.shares.network && bare.netns.is_none());
    }

    #[test]
    fn a_network_is_the_hosts_a_namespace_or_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let network = |netns: &str| {
            read(dir.path(), netns, HashMap::new()).map(|pod| (pod.netns, pod.shares.network))
        };
        assert_eq!(network("").unwrap(), (None, true));
        let own = "/proc/self/ns/net";
        assert_eq!(network(own).unwrap(), (Some(own.into()), false));
        let file = dir.path().join("n");
        File::create(&file).unwrap();
        assert_eq!(network(file.to_str().unwrap()).unwrap(), (None, false));
        std::fs::write(&file, "x").unwrap();
        for bad in [file.to_str().unwrap(), "/nonexistent/n", "/tmp"] {
            let error = network(bad).unwrap_err().to_string();
            assert!(
                error.contains("netns_path") && error.contains(bad),
                "{error}"
            );
        }
    }
}
