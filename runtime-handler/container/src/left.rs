//! What is known of a container whose shim is dead: from the OCI runtime's state, and
//! from the bundle, each as far as it is still there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// What cleaning up wants to know.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// `ociVersion` of its spec.
    pub version: Option<String>,
    /// `linux.cgroupsPath` of its spec, or where crun put it.
    pub cgroups_path: Option<String>,
    /// Its directories by controller, as runc wrote them down.
    pub cgroup_dirs: Option<BTreeMap<String, PathBuf>>,
}

#[derive(Default, Deserialize)]
struct Config {
    #[serde(rename = "ociVersion")]
    version: Option<String>,
    #[serde(default)]
    linux: Linux,
}

#[derive(Default, Deserialize)]
struct Linux {
    #[serde(rename = "cgroupsPath")]
    cgroups_path: Option<String>,
}

/// runc's `state.json`.
#[derive(Default, Deserialize)]
struct RuncState {
    cgroup_paths: Option<BTreeMap<String, PathBuf>>,
    #[serde(default)]
    config: RuncConfig,
}

#[derive(Default, Deserialize)]
struct RuncConfig {
    /// `name=value`.
    labels: Option<Vec<String>>,
}

/// crun's `status`.
#[derive(Default, Deserialize)]
struct CrunStatus {
    #[serde(rename = "cgroup-path")]
    cgroup_path: Option<String>,
    bundle: Option<PathBuf>,
}

/// The bundle of the container whose state the OCI runtime keeps in `state`.
pub(crate) fn bundle(state: &Path) -> Option<PathBuf> {
    let runc: RuncState = read(&state.join("state.json"));
    let crun: CrunStatus = read(&state.join("status"));
    let labels = runc.config.labels.unwrap_or_default();
    labels
        .iter()
        .find_map(|label| label.strip_prefix("bundle=").map(PathBuf::from))
        .or(crun.bundle)
}

impl Left {
    /// Reads the OCI runtime's `state` directory and the `bundle`.
    pub(crate) fn read(state: &Path, bundle: &Path) -> Self {
        let config: Config = read(&bundle.join("config.json"));
        let runc: RuncState = read(&state.join("state.json"));
        let crun: CrunStatus = read(&state.join("status"));
        Self {
            version: config.version,
            cgroups_path: config.linux.cgroups_path.or(crun.cgroup_path),
            cgroup_dirs: runc.cgroup_paths,
        }
    }
}

/// What cannot be read (any more) is not known.
fn read<T: Default + DeserializeOwned>(file: &Path) -> T {
    fs::read(file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (state, bundle) = (dir.path().join("state"), dir.path().join("bundle"));
        assert_eq!(Left::read(&state, &bundle), Left::default());
        fs::create_dir(&state).unwrap();
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("config.json"), "{\"ociVersion\":").unwrap();
        fs::write(state.join("state.json"), "[]").unwrap();
        assert_eq!(Left::read(&state, &bundle), Left::default());
    }

    #[test]
    fn the_runtimes_know_the_bundle() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(bundle(dir.path()), None);
        std::fs::write(dir.path().join("status"), r#"{"bundle":"/by/crun"}"#).unwrap();
        assert_eq!(bundle(dir.path()), Some("/by/crun".into()));
        let text = r#"{"config":{"labels":["a=b","bundle=/by/runc"]}}"#;
        std::fs::write(dir.path().join("state.json"), text).unwrap();
        assert_eq!(bundle(dir.path()), Some("/by/runc".into()));
    }

    #[test]
    fn the_state_and_the_bundle_complete_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("status", r#"{"cgroup-path": "/by/crun"}"#);
        write("state.json", r#"{"cgroup_paths": {"memory": "/sys/m/a"}}"#);
        let left = Left::read(dir.path(), Path::new("/gone"));
        assert_eq!(left.version, None);
        assert_eq!(left.cgroups_path.as_deref(), Some("/by/crun"));
        let dirs = left.cgroup_dirs.unwrap();
        assert_eq!(dirs["memory"], Path::new("/sys/m/a"));

        write(
            "config.json",
            r#"{"ociVersion": "1.1.0", "linux": {"cgroupsPath": "/by/spec"}}"#,
        );
        let left = Left::read(dir.path(), dir.path());
        assert_eq!(left.version.as_deref(), Some("1.1.0"));
        assert_eq!(left.cgroups_path.as_deref(), Some("/by/spec"));
    }
}
