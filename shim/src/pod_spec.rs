//! A pod without a pause container: what its client says of it (CRI, or see
//! [`crate::plain_pod`]), and the OCI spec that says the same to a backend. Pure.
//!
//! With a pause container containerd writes that spec itself; with `sandboxer = "shim"` it
//! hands over the pod's own configuration. The spec made here has no process: what holds
//! the pod is the backend's to choose.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::PodSize;
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Spec;
use serde_json::{Map, Value, json};

use crate::spec::{CONTAINER_TYPE, SANDBOX_ID, SANDBOX_NAME, SANDBOX_NAMESPACE, SANDBOX_UID};

/// Of the pod's annotations only ours matter to a backend.
const OWN_PREFIX: &str = "dyad.dev/";

/// A pod as its client configures it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodConfig {
    /// Whose it is.
    pub client: Client,
    /// Its name, namespace and uid in Kubernetes.
    pub name: String,
    /// See `name`.
    pub namespace: String,
    /// See `name`.
    pub uid: String,
    /// Empty: the host's.
    pub hostname: String,
    /// `None`: the host's resolv.conf.
    pub dns: Option<Dns>,
    /// All of them.
    pub annotations: BTreeMap<String, String>,
    /// Where its containers are accounted; empty: nowhere in particular.
    pub cgroup_parent: String,
    /// What it shares with the host.
    pub shares: HostNamespaces,
    /// It asks for a user namespace of its own.
    pub user_namespace: bool,
    /// The pod's network namespace; `None` with the host's. A pod of another client than CRI
    /// that has neither gets a new and empty one.
    pub netns: Option<PathBuf>,
    /// Kernel parameters of its namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// The sum of its containers' requests and limits, where the kubelet tells.
    pub size: PodSize,
}

/// Who makes a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Client {
    /// Kubernetes; it says of each container whose it is.
    #[default]
    Cri,
    /// Another one, which does not.
    Other,
}

/// Namespaces of the host that a pod is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostNamespaces {
    /// hostNetwork, and in Kubernetes with it the host's name.
    pub network: bool,
    /// hostPID.
    pub pid: bool,
    /// hostIPC.
    pub ipc: bool,
}

/// What a resolver is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dns {
    /// Addresses.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options of resolv.conf.
    pub options: Vec<String>,
}

/// The spec of the sandbox `id`, with the annotations that CRI would put on a pause
/// container of its own.
///
/// # Errors
/// `InvalidArgument` for a pod on a network of its own that has none, and for a value that
/// no OCI spec can hold.
pub fn spec(id: &str, pod: &PodConfig) -> Result<Spec> {
    let mut namespaces = vec![json!({"type": "mount"})];
    match (&pod.netns, pod.shares.network) {
        (Some(path), false) => {
            namespaces.push(json!({"type": "network", "path": path}));
        }
        (None, true) => {}
        (Some(path), true) => {
            return Err(Error::InvalidArgument(format!(
                "netns_path: {} for a pod on the host's network (namespace_options.network: NODE): leave one of them out",
                path.display()
            )));
        }
        (None, false) if pod.client == Client::Other => {
            namespaces.push(json!({"type": "network"}));
        }
        (None, false) => {
            return Err(Error::InvalidArgument(
                "netns_path: empty for a pod with a network of its own (namespace_options.network: POD): containerd makes that namespace".into(),
            ));
        }
    }
    let own_name = !pod.shares.network || pod.client == Client::Other;
    if own_name {
        namespaces.push(json!({"type": "uts"}));
    }
    if !pod.shares.pid {
        namespaces.push(json!({"type": "pid"}));
    }
    if !pod.shares.ipc {
        namespaces.push(json!({"type": "ipc"}));
    }
    if pod.user_namespace {
        namespaces.push(json!({"type": "user"}));
    }
    let mut linux = Map::new();
    linux.insert("namespaces".into(), Value::Array(namespaces));
    linux.insert("sysctl".into(), json!(pod.sysctls));
    if !pod.cgroup_parent.is_empty() {
        let path = cgroups_path(&pod.cgroup_parent, id);
        linux.insert("cgroupsPath".into(), json!(path));
    }
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "annotations": annotations(id, pod),
        "linux": linux,
    });
    if !pod.hostname.is_empty() && own_name {
        spec["hostname"] = json!(pod.hostname);
    }
    // By its text, which the shim can read anyway: reading a Value is 0.2 MB of code.
    serde_json::from_slice(spec.to_string().as_bytes())
        .context(|| format!("write the spec of pod {id}"))
}

fn annotations(id: &str, pod: &PodConfig) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = pod
        .annotations
        .iter()
        .filter(|(name, _)| name.starts_with(OWN_PREFIX))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let mut set = |name: &str, value: &str| all.insert(name.to_owned(), value.to_owned());
    if pod.client == Client::Cri {
        set(CONTAINER_TYPE, "sandbox");
        set(SANDBOX_ID, id);
        set(SANDBOX_NAME, &pod.name);
        set(SANDBOX_NAMESPACE, &pod.namespace);
        set(SANDBOX_UID, &pod.uid);
    }
    all
}

/// Where CRI puts a sandbox below its parent: a slice is systemd's.
fn cgroups_path(parent: &str, id: &str) -> String {
    let base = parent.rsplit('/').next().unwrap_or(parent);
    match base.ends_with(".slice") {
        true => format!("{base}:cri-containerd:{id}"),
        false => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxNamespaceType as Type;

    use super::*;

    fn pod() -> PodConfig {
        PodConfig {
            name: "web".into(),
            namespace: "default".into(),
            uid: "u1".into(),
            hostname: "web-0".into(),
            netns: Some("/run/netns/a".into()),
            cgroup_parent: "/kubepods/podu1".into(),
            ..PodConfig::default()
        }
    }

    fn namespaces(spec: &Spec) -> Vec<(Type, Option<PathBuf>)> {
        let linux = spec.linux().as_ref().unwrap();
        linux
            .namespaces()
            .iter()
            .flatten()
            .map(|namespace| (namespace.typ(), namespace.path().clone()))
            .collect()
    }

    #[test]
    fn an_ordinary_pod_has_namespaces_of_its_own() {
        let spec = spec("s1", &pod()).unwrap();
        assert_eq!(
            namespaces(&spec),
            [
                (Type::Mount, None),
                (Type::Network, Some("/run/netns/a".into())),
                (Type::Uts, None),
                (Type::Pid, None),
                (Type::Ipc, None),
            ]
        );
        assert_eq!(spec.hostname().as_deref(), Some("web-0"));
        assert!(spec.process().is_none(), "nobody's process holds it");
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations[CONTAINER_TYPE], "sandbox");
        assert_eq!(annotations[SANDBOX_NAME], "web");
    }

    #[test]
    fn what_is_shared_with_the_host_has_no_namespace() {
        let shared = PodConfig {
            shares: HostNamespaces {
                network: true,
                pid: true,
                ipc: true,
            },
            netns: None,
            ..pod()
        };
        let spec = spec("s1", &shared).unwrap();
        assert_eq!(namespaces(&spec), [(Type::Mount, None)]);
        assert_eq!(spec.hostname(), &None, "the host keeps its name");
    }

    #[test]
    fn a_network_that_is_not_there_or_too_much_is_refused_by_name() {
        let missing = PodConfig {
            netns: None,
            ..pod()
        };
        let mut both = pod();
        both.shares.network = true;
        for pod in [missing, both] {
            let error = spec("s1", &pod).unwrap_err().to_string();
            assert!(error.starts_with("netns_path: "), "{error}");
        }
    }

    #[test]
    fn a_pod_of_another_client_is_not_taken_for_kubernetes_own() {
        let plain = PodConfig {
            client: Client::Other,
            netns: None,
            ..PodConfig::default()
        };
        let made = spec("s1", &plain).unwrap();
        assert!(namespaces(&made).contains(&(Type::Network, None)));
        assert!(made.annotations().as_ref().unwrap().is_empty());
        let mut on_host = plain.clone();
        on_host.shares.network = true;
        let namespaces = namespaces(&spec("s1", &on_host).unwrap());
        assert!(!namespaces.iter().any(|(kind, _)| *kind == Type::Network));
        assert!(
            namespaces.contains(&(Type::Uts, None)),
            "a name of its own, so that nobody renames the host"
        );
    }

    #[test]
    fn the_cgroup_is_where_a_pause_container_would_be() {
        for (parent, path) in [
            ("/kubepods/podu1", "/kubepods/podu1/s1"),
            ("/kubepods/podu1/", "/kubepods/podu1/s1"),
            (
                "/kubepods.slice/kubepods-podu1.slice",
                "kubepods-podu1.slice:cri-containerd:s1",
            ),
        ] {
            assert_eq!(cgroups_path(parent, "s1"), path, "{parent}");
        }
    }

    #[test]
    fn of_the_annotations_only_ours_and_who_it_is_are_kept() {
        let mut annotated = pod();
        annotated.annotations = BTreeMap::from([
            ("dyad.dev/vcpus".into(), "2".into()),
            ("other.io/a".into(), "b".into()),
            // Nobody passes himself off as another pod.
            ("io.kubernetes.cri.sandbox-id".into(), "s2".into()),
        ]);
        let spec = spec("s1", &annotated).unwrap();
        let annotations = spec.annotations().as_ref().unwrap();
        assert_eq!(annotations["dyad.dev/vcpus"], "2");
        assert_eq!(annotations[SANDBOX_ID], "s1");
        assert!(!annotations.contains_key("other.io/a"));
    }
}
