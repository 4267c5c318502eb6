//! What a trial works with: objects with names of their own that go when the trial ends,
//! and what explains a failure.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use dyad_e2e::cluster::Cluster;
use dyad_e2e::command::Done;
use dyad_e2e::env::LogMark;
use serde_json::{Value, json};

/// For anything that the cluster is expected to do by itself. Two cores boot machines under
/// emulation meanwhile.
pub const SOON: Duration = Duration::from_secs(240);
/// What kubectl answers once the cluster has what it asks for.
const ASK: Duration = Duration::from_secs(60);

/// How Dyad runs a pod: its RuntimeClass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// As containers.
    Dyad,
    /// In a machine.
    DyadVm,
}

impl Kind {
    /// The RuntimeClass.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dyad => "dyad",
            Self::DyadVm => "dyad-vm",
        }
    }
}

/// One trial's view of the cluster.
pub struct Context<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The kind that the trial is for.
    pub kind: Kind,
    /// Names of the trial's objects start with it, and they carry it as label `trial`.
    name: String,
    /// `kind/name` of what was applied.
    objects: Mutex<Vec<String>>,
    since: LogMark,
}

impl<'a> Context<'a> {
    /// Nothing is applied yet.
    pub fn new(cluster: &'a Cluster, kind: Kind) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-{}", kind.name(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self {
            cluster,
            kind,
            name,
            objects: Mutex::default(),
            since: cluster.env.log_mark(),
        }
    }

    /// Runs the trial, adds to its failure what explains it, and removes what it made.
    pub fn judge(self, trial: fn(&Self) -> Result<()>) -> Result<()> {
        let result = catch_unwind(AssertUnwindSafe(|| trial(&self))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(anyhow!("panic: {}", text.unwrap_or_default()))
        });
        let result = result.map_err(|error| anyhow!("{error:#}\n{}", self.explanation()));
        let cleaned = self.clean();
        match (result, cleaned) {
            (Ok(()), Err(error)) => Err(anyhow!("clean up: {error:#}\n{}", self.explanation())),
            (result, _) => result,
        }
    }

    fn explanation(&self) -> String {
        let ask = |args: &[&str]| match self.cluster.run(args, ASK) {
            Ok(done) => done.text() + &done.stderr,
            Err(error) => format!("{error:#}"),
        };
        let pods = ask(&["describe", "pod", "--selector", &self.selector()]);
        let logs = ask(&[
            "logs",
            "--all-containers",
            "--prefix",
            "--selector",
            &self.selector(),
        ]);
        // What Dyad's shims say goes by ids, which kubectl's description names.
        let words: Vec<String> = pods
            .split("containerd://")
            .skip(1)
            .filter_map(|rest| rest.get(..12).map(str::to_owned))
            .chain([self.name.clone()])
            .collect();
        let daemons = self.cluster.env.log_tail(&self.since, &words);
        format!("--- pods\n{pods}\n--- what they wrote\n{logs}\n{daemons}")
    }

    fn clean(&self) -> Result<()> {
        let objects = self
            .objects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // Those that make others go first.
        for object in objects.iter().rev() {
            let args = ["delete", object, "--ignore-not-found", "--wait=true"];
            self.cluster
                .run(&args, SOON)?
                .success(&format!("kubectl {args:?}"))?;
        }
        let args = [
            "wait",
            "pod",
            "--selector",
            &self.selector(),
            "--for=delete",
            &format!("--timeout={}s", SOON.as_secs()),
        ];
        self.cluster
            .run(&args, SOON + ASK)?
            .success("wait until the trial's pods are gone")?;
        Ok(())
    }

    /// The trial's pods.
    pub fn selector(&self) -> String {
        format!("trial={}", self.name)
    }

    /// A pod of the trial's kind with these containers, not applied yet. `suffix` makes its
    /// name the trial's second.
    pub fn pod(&self, suffix: &str, containers: &[Value]) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": format!("{}{suffix}", self.name), "labels": {"trial": self.name}},
            "spec": {
                "runtimeClassName": self.kind.name(),
                "terminationGracePeriodSeconds": 1,
                "containers": containers,
            },
        })
    }

    /// A Deployment of that many pods of the trial's kind.
    pub fn deployment(&self, replicas: u32, containers: &[Value]) -> Value {
        let mut template = self.pod("", containers);
        if let Some(template) = template.as_object_mut() {
            template.retain(|key, _| key == "metadata" || key == "spec");
        }
        template["metadata"]["name"].take();
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": self.name, "labels": {"trial": self.name}},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"trial": self.name}},
                "template": template,
            },
        })
    }

    /// Applies an object, which goes when the trial ends.
    pub fn apply(&self, object: &Value) -> Result<Object<'_>> {
        let kind = object["kind"]
            .as_str()
            .unwrap_or_default()
            .to_ascii_lowercase();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!("{kind}/{name}");
        locked(&self.objects).push(path.clone());
        self.cluster.apply(object)?;
        Ok(Object {
            cluster: self.cluster,
            path,
        })
    }

    /// Applies a pod and waits until it is ready.
    pub fn ready_pod(&self, pod: &Value) -> Result<Object<'_>> {
        let pod = self.apply(pod)?;
        pod.wait("condition=Ready")?;
        Ok(pod)
    }

    /// The trial's pods that there are.
    pub fn pods(&self) -> Result<Vec<Value>> {
        let list = self.cluster.get(&["pod", "--selector", &self.selector()])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }
}

fn locked<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A container that runs `sh -c script`.
pub fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": "dyad.test/busybox:1",
        "command": ["sh", "-c", script],
    })
}

/// `value` with `field` set.
pub fn with(mut value: Value, field: &str, content: Value) -> Value {
    value[field] = content;
    value
}

/// Something that was applied.
pub struct Object<'a> {
    cluster: &'a Cluster,
    path: String,
}

impl Object<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        self.path.split_once('/').map_or("", |(_, name)| name)
    }

    /// As the API server has it.
    pub fn get(&self) -> Result<Value> {
        self.cluster.get(&[&self.path])
    }

    /// Waits until it is as `kubectl wait --for=CONDITION` says.
    pub fn wait(&self, condition: &str) -> Result<()> {
        self.cluster.wait(&self.path, condition, SOON)
    }

    /// Waits until the field of the container's status has that value.
    pub fn wait_for_container(&self, container: &str, field: &str, value: &str) -> Result<()> {
        self.wait(&format!(
            "jsonpath={{.status.containerStatuses[?(@.name==\"{container}\")].{field}}}={value}"
        ))
    }

    /// The status of one of its containers, init containers included.
    pub fn container(&self, name: &str) -> Result<Value> {
        let pod = self.get()?;
        ["containerStatuses", "initContainerStatuses"]
            .iter()
            .filter_map(|list| pod["status"][list].as_array())
            .flatten()
            .find(|status| status["name"] == name)
            .cloned()
            .with_context(|| format!("{} has no status of container {name}", self.path))
    }

    /// What a container wrote.
    pub fn logs(&self, container: &str) -> Result<String> {
        self.cluster
            .kubectl(&["logs", &self.path, "--container", container])
    }

    /// Runs `sh -c script` in a container, whatever comes of it.
    pub fn exec(&self, container: &str, script: &str) -> Result<Done> {
        let args = [
            "exec",
            &self.path,
            "--container",
            container,
            "--",
            "sh",
            "-c",
            script,
        ];
        self.cluster.run(&args, ASK)
    }

    /// Runs `sh -c script` in a container; it must exit with 0. Gives its output.
    pub fn output(&self, container: &str, script: &str) -> Result<String> {
        let done = self.exec(container, script)?;
        Ok(done
            .success(&format!("exec of {script} in {}", self.path))?
            .text())
    }

    /// What kubelet must not see changed when it is to have noticed nothing: uid, address,
    /// and each container's id and restart count.
    pub fn identity(&self) -> Result<Vec<String>> {
        let pod = self.get()?;
        let mut identity = vec![
            format!("uid {}", pod["metadata"]["uid"]),
            format!("address {}", pod["status"]["podIP"]),
        ];
        let Some(statuses) = pod["status"]["containerStatuses"].as_array() else {
            bail!("{} has no status: {pod}", self.path);
        };
        for status in statuses {
            identity.push(format!(
                "container {} {} restarts {}",
                status["name"], status["containerID"], status["restartCount"]
            ));
        }
        Ok(identity)
    }
}
