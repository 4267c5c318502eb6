//! `--create-target`: the target pod, made on the other node over CRI as kubelet would make
//! it. For setups without an API server: kubelet removes pods that it did not make.
//!
//! ```text
//! CRI here: inspectp, inspect ──> moved (pure) ──> CRI there: runp, pull, create, start
//! ```
//! crictl speaks for both, as for `dyadctl check`.

use std::io::Write as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::error::{Error, Result};
use crate::model::{Pod, Task, TaskState, short};
use crate::program;
use crate::text::{Format, Printer, printable};

const ANNOTATION: &str = "dyad.dev/migration-source";
/// Where kubelet's pods carry their uid.
const UID_LABEL: &str = "io.kubernetes.pod.uid";

/// A containerd, asked by crictl.
pub struct Cri {
    crictl: PathBuf,
    endpoint: String,
    limit: Duration,
}

impl Cri {
    /// The one at `endpoint`; each call may take `limit`.
    ///
    /// # Errors
    /// [`Error::Failed`]: crictl is not on PATH.
    pub fn at(endpoint: &str, limit: Duration) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let crictl = program::find("crictl", &path).ok_or_else(|| Error::Failed {
            context: "--create-target needs crictl, which is not on PATH: install it \
                      (https://github.com/kubernetes-sigs/cri-tools), or make the target pod yourself"
                .into(),
            source: None,
        })?;
        let endpoint = match endpoint.contains("://") {
            true => endpoint.to_owned(),
            false => format!("unix://{endpoint}"),
        };
        Ok(Self {
            crictl,
            endpoint,
            limit,
        })
    }

    async fn ask(&self, arguments: &[&str]) -> Result<String> {
        let timeout = format!("{}s", self.limit.as_secs().max(1));
        let global = ["--runtime-endpoint", &self.endpoint, "--image-endpoint"];
        let all = [&global, &[&self.endpoint, "--timeout", &timeout], arguments].concat();
        let answer = program::output(&self.crictl, &all, b"", self.limit).await;
        match answer {
            Ok(answer) => Ok(String::from_utf8_lossy(&answer).trim().to_owned()),
            Err(error) => Err(Error::failed(
                format!("{} at {}", arguments[0], self.endpoint),
                error,
            )),
        }
    }

    async fn json(&self, arguments: &[&str]) -> Result<Value> {
        let answer = self.ask(arguments).await?;
        serde_json::from_str(&answer)
            .map_err(|error| Error::failed(format!("read what {} answers", arguments[0]), error))
    }
}

/// A pod that was made for this migration.
pub struct Target {
    there: Cri,
    sandbox: String,
}

impl Target {
    /// Makes what waits there for `pod`, and says so.
    ///
    /// # Errors
    /// [`Error::Refused`]: the pod has what only kubelet can make there. Else as CRI says;
    /// what was made is removed again.
    pub async fn create(pod: &Pod, here: &Cri, there: Cri, printer: Printer) -> Result<Self> {
        let sandbox = here.json(&["inspectp", &pod.sandbox_id]).await?;
        let mut containers = Vec::new();
        for task in pod.containers().filter(|task| moves(task)) {
            let mut container = here.json(&["inspect", &task.container_id]).await?;
            let config = container["info"]["config"].take();
            refuse_kubelets_folders(&config, task.label(), &pod.pod_uid)?;
            containers.push((task.label(), config));
        }
        let config = moved(
            sandbox["info"]["config"].clone(),
            &pod.migration_source(),
            // Another one than here, where this uid must not run again.
            &dyad_runtime_handler::identity::pod_uuid(&pod.containerd_namespace, &pod.sandbox_id)
                .to_string(),
        );
        let config_file = file(&config)?;
        let handler = sandbox["status"]["runtimeHandler"]
            .as_str()
            .unwrap_or_default();
        let id = there
            .ask(&["runp", "--runtime", handler, &name(&config_file)])
            .await?;
        let target = Self { there, sandbox: id };
        target.say(&pod.label(), printer)?;
        for (name, config) in &containers {
            if let Err(error) = target.add(config, &config_file).await {
                target.remove().await;
                return Err(Error::failed(
                    format!("make container {name} of the target"),
                    error,
                ));
            }
        }
        Ok(target)
    }

    fn say(&self, label: &str, printer: Printer) -> Result<()> {
        let (sandbox, endpoint) = (&self.sandbox, &self.there.endpoint);
        match printer.format {
            Format::Json => printer.json_line(
                &json!({"stage": "created", "target_sandbox": sandbox, "endpoint": endpoint}),
            ),
            Format::Table => printer.text(&format!(
                "{}: made its target, sandbox {} at {}\n",
                printable(label),
                short(sandbox),
                printable(endpoint)
            )),
        }
    }

    async fn add(&self, config: &Value, pod: &NamedTempFile) -> Result<()> {
        let named = |key: &str| {
            config["image"][key]
                .as_str()
                .filter(|name| !name.is_empty())
        };
        let image = named("image").unwrap_or_default();
        if self.there.json(&["inspecti", image]).await.is_err() {
            let reference = named("user_specified_image").unwrap_or(image);
            self.there.ask(&["pull", reference]).await?;
        }
        let container = file(config)?;
        let arguments = ["create", &self.sandbox, &name(&container), &name(pod)];
        let id = self.there.ask(&arguments).await?;
        self.there.ask(&["start", &id]).await.map(drop)
    }

    /// It did not arrive.
    pub async fn remove(&self) {
        if let Err(error) = self.there.ask(&["rmp", "--force", &self.sandbox]).await {
            eprintln!("dyadctl: the target is left: {}", printable(&error.chain()));
            self.keep();
        }
    }

    /// Nobody knows whether it arrived.
    pub fn keep(&self) {
        eprintln!(
            "dyadctl: the target, sandbox {} at {}, is kept: see there whether the pod runs, else remove it (crictl rmp --force)",
            self.sandbox, self.there.endpoint
        );
    }
}

/// One that has ended stays where it is.
fn moves(task: &Task) -> bool {
    task.state != TaskState::Exited
}

/// The pod's configuration as its target has it.
fn moved(mut config: Value, source: &str, uid: &str) -> Value {
    config["annotations"][ANNOTATION] = source.into();
    config["metadata"]["uid"] = uid.into();
    let label = config
        .get_mut("labels")
        .and_then(|labels| labels.get_mut(UID_LABEL));
    if let Some(label) = label {
        *label = uid.into();
    }
    config
}

/// What kubelet made for the pod with this uid is not there on the other node, and
/// containerd would make empty folders instead.
fn refuse_kubelets_folders(container: &Value, name: &str, uid: &str) -> Result<()> {
    let mounts = container["mounts"].as_array().into_iter().flatten();
    for mount in mounts {
        let host = mount["host_path"].as_str().unwrap_or_default();
        let of_the_pod = Component::Normal(uid.as_ref());
        if !uid.is_empty() && Path::new(host).components().any(|part| part == of_the_pod) {
            return Err(Error::Refused(format!(
                "container {name} mounts {host}, which kubelet made for this pod on this node: \
                 --create-target cannot make it there; let kubelet there make the target pod, with the \
                 annotation {ANNOTATION}"
            )));
        }
    }
    Ok(())
}

/// Only ours to read: environments hold secrets.
fn file(config: &Value) -> Result<NamedTempFile> {
    let write = || {
        let mut file = NamedTempFile::with_prefix("dyadctl-")?;
        file.write_all(config.to_string().as_bytes())?;
        Ok(file)
    };
    write().map_err(|error: std::io::Error| {
        Error::failed("write the target's configuration for crictl", error)
    })
}

fn name(file: &NamedTempFile) -> String {
    file.path().display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_names_its_source_and_is_another_pod() {
        let config = json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "old"},
            "labels": {"app": "web", "io.kubernetes.pod.uid": "old"},
            "log_directory": "/var/log/pods/default_web_old",
            "annotations": {"dyad.dev/vcpus": "2"},
        });
        assert_eq!(
            moved(config, "the-source", "new"),
            json!({
                "metadata": {"name": "web", "namespace": "default", "uid": "new"},
                "labels": {"app": "web", "io.kubernetes.pod.uid": "new"},
                "log_directory": "/var/log/pods/default_web_old",
                "annotations": {"dyad.dev/vcpus": "2", "dyad.dev/migration-source": "the-source"},
            })
        );
        // Without labels and annotations none is invented but ours.
        assert_eq!(
            moved(json!({"metadata": {"name": "web"}}), "s", "u"),
            json!({"metadata": {"name": "web", "uid": "u"}, "annotations": {"dyad.dev/migration-source": "s"}})
        );
    }

    #[test]
    fn what_kubelet_made_here_is_refused_by_its_path() {
        let mounts = |path: &str| json!({"mounts": [{"host_path": "/data"}, {"host_path": path}]});
        let refused = refuse_kubelets_folders(
            &mounts("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir/v"),
            "app",
            "1-2",
        );
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("container app mounts /var/lib/kubelet/pods/1-2/"),
            "{text}"
        );
        for (path, uid) in [("/srv/1-23/v", "1-2"), ("/srv/v", "1-2"), ("/srv/v", "")] {
            assert!(
                refuse_kubelets_folders(&mounts(path), "app", uid).is_ok(),
                "{path}"
            );
        }
        assert!(refuse_kubelets_folders(&json!({}), "app", "1-2").is_ok());
    }
}
