//! A bundle's `config.json`, read into what a backend is asked to run.

use std::collections::HashMap;
use std::path::Path;

use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::{PodInfo, PodSize, Role};
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Spec;
use serde::Deserialize;

use crate::config::Config;

/// CRI's annotations on every container (containerd: internal/cri/annotations): what it is.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
/// Its pod's sandbox.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Its pod's name.
pub const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
/// Its pod's namespace.
pub const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// Its pod's uid.
pub const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// With `cpu-period`, `cpu-quota`, `cpu-shares` or `memory`: the pod's size, on its sandbox.
const SIZE_PREFIX: &str = "io.kubernetes.cri.sandbox-";

/// What a container is and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its pod's sandbox id; outside CRI its own.
    pub sandbox_id: String,
    /// What it is in its pod.
    pub role: Role,
    /// Kubernetes' name of the container; empty for the sandbox and outside CRI.
    pub name: String,
    /// Whether CRI made it.
    pub cri: bool,
}

/// The annotations of the bundle's spec, without reading the rest of it; none where
/// there is no spec (a pod without a pause container).
///
/// # Errors
/// `InvalidArgument` where `config.json` is not JSON.
pub fn read_annotations(bundle: &Path) -> Result<HashMap<String, String>> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(Error::other(format!("read {}", path.display()), error)),
    };
    serde_json::from_slice::<Annotated>(&text)
        .map(|spec| spec.annotations.unwrap_or_default())
        .map_err(|error| Error::InvalidArgument(format!("{}: {error}", path.display())))
}

/// The whole spec of a bundle.
///
/// # Errors
/// It cannot be read, or (`InvalidArgument`) is no OCI runtime spec.
pub fn read(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::InvalidArgument(format!("{}: {error}", path.display())))
}

/// Replaces the spec of a bundle.
///
/// # Errors
/// It cannot be written; the old one stays whole.
pub fn write(bundle: &Path, spec: &Spec) -> Result<()> {
    let path = bundle.join("config.json");
    let text = serde_json::to_vec(spec).context(|| format!("encode {}", path.display()))?;
    write_atomically(&path, &text, PRIVATE)
}

impl Identity {
    /// Who `id` is, by its annotations.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown container type, or a container without a pod.
    pub fn of(id: &str, annotations: &HashMap<String, String>) -> Result<Self> {
        let role = match annotations.get(CONTAINER_TYPE).map(String::as_str) {
            None => {
                return Ok(Self {
                    sandbox_id: id.to_owned(),
                    role: Role::Sandbox,
                    name: String::new(),
                    cri: false,
                });
            }
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Container,
            Some(other) => {
                return Err(Error::InvalidArgument(format!(
                    "annotation {CONTAINER_TYPE}: {other:?} is neither sandbox nor container"
                )));
            }
        };
        let sandbox_id = annotations.get(SANDBOX_ID).cloned().unwrap_or_default();
        let usable = !sandbox_id.is_empty()
            && !sandbox_id.contains(['/', '\0'])
            && sandbox_id != "."
            && sandbox_id != "..";
        if !usable {
            return Err(Error::InvalidArgument(format!(
                "annotation {SANDBOX_ID}: {sandbox_id:?} is not a sandbox id"
            )));
        }
        Ok(Self {
            sandbox_id,
            role,
            name: annotations.get(CONTAINER_NAME).cloned().unwrap_or_default(),
            cri: true,
        })
    }
}

impl Identity {
    /// The same as a container of the pod `sandbox_id`, where its client made that pod
    /// through the Sandbox API and says nowhere whose a container is.
    pub fn member_of(self, sandbox_id: &str) -> Self {
        Self {
            sandbox_id: sandbox_id.to_owned(),
            role: Role::Container,
            ..self
        }
    }
}

/// The pod of a container, with those of its annotations that `config` allows.
///
/// # Errors
/// `InvalidArgument` naming an annotation of ours that is unknown or not allowed, or one of
/// CRI's that is no number.
pub fn pod_info(
    identity: &Identity,
    annotations: &HashMap<String, String>,
    config: &Config,
) -> Result<PodInfo> {
    let text = |name| annotations.get(name).cloned().unwrap_or_default();
    Ok(PodInfo {
        sandbox_id: identity.sandbox_id.clone(),
        namespace: text(SANDBOX_NAMESPACE),
        name: text(SANDBOX_NAME),
        uid: text(SANDBOX_UID),
        annotations: config.pod_annotations(annotations)?,
        size: pod_size(annotations)?,
    })
}

/// With a pause container CRI tells the pod's size by annotations of its spec.
fn pod_size(annotations: &HashMap<String, String>) -> Result<PodSize> {
    let number = |part: &str| -> Result<i64> {
        let name = format!("{SIZE_PREFIX}{part}");
        let Some(text) = annotations.get(&name) else {
            return Ok(0);
        };
        text.parse().map_err(|_| {
            Error::InvalidArgument(format!("annotation {name}: {text:?} is not a number"))
        })
    };
    Ok(PodSize {
        cpu_period: number("cpu-period")?,
        cpu_quota: number("cpu-quota")?,
        cpu_shares: number("cpu-shares")?,
        memory_limit: number("memory")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_container_belongs_to_the_sandbox_that_cri_names() {
        let identity = Identity::of(
            "c1",
            &annotations(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "s1")]),
        )
        .unwrap();
        assert_eq!(identity.sandbox_id, "s1");
        assert_eq!(identity.role, Role::Container);
        assert!(identity.cri);
    }

    #[test]
    fn a_task_outside_cri_is_its_own_pod() {
        let identity = Identity::of("t", &HashMap::new()).unwrap();
        assert_eq!((identity.sandbox_id.as_str(), identity.cri), ("t", false));
        assert_eq!(identity.role, Role::Sandbox);
    }

    #[test]
    fn a_sandbox_id_that_walks_out_of_its_directory_is_refused() {
        for id in ["", "..", "a/b"] {
            let annotations = annotations(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, id)]);
            assert!(Identity::of("c", &annotations).is_err(), "{id:?}");
        }
        let annotations = annotations(&[(CONTAINER_TYPE, "podsandbox")]);
        assert!(Identity::of("c", &annotations).is_err());
    }

    #[test]
    fn a_pods_size_is_read_where_a_pause_container_tells_it() {
        let told = annotations(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-memory", "536870912"),
        ]);
        let size = pod_size(&told).unwrap();
        assert_eq!(size.cpu_limit_milli(), Some(1500));
        assert_eq!(size.memory_limit(), Some(512 << 20));
        assert_eq!(size.cpu_request_milli(), None);
        assert_eq!(pod_size(&HashMap::new()).unwrap(), PodSize::default());
        let odd = annotations(&[("io.kubernetes.cri.sandbox-memory", "x")]);
        let error = pod_size(&odd).unwrap_err().to_string();
        assert!(error.contains("sandbox-memory: \"x\""), "{error}");
    }

    #[test]
    fn a_bundle_without_a_spec_has_no_annotations() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_annotations(dir.path()).unwrap().is_empty());
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(read_annotations(dir.path()).is_err());
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"annotations":{"a":"b"}}"#,
        )
        .unwrap();
        assert_eq!(read_annotations(dir.path()).unwrap()["a"], "b");
    }
}
