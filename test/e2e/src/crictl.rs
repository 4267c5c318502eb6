//! crictl, typed: what kubelet does, asked through the CRI's own client.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::command::{self, Done};
use crate::env::Env;
use crate::wait::until;

/// Longer than any answer of a healthy environment takes, machines under emulation
/// on a busy host included.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A container's status, as far as the tests look at it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    /// `CONTAINER_CREATED`, `CONTAINER_RUNNING`, `CONTAINER_EXITED` or `CONTAINER_UNKNOWN`.
    pub state: String,
    /// Exit code, once it has exited.
    #[serde(default)]
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled` …
    #[serde(default)]
    pub reason: String,
    /// What containerd adds to the reason.
    #[serde(default)]
    pub message: String,
}

/// A pod's status with what containerd tells besides.
#[derive(Debug, Clone)]
pub struct PodStatus {
    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    pub state: String,
    /// The address that CNI gave.
    pub ip: String,
    /// The whole answer.
    pub all: Value,
}

/// A crictl that talks to one environment.
#[derive(Debug, Clone)]
pub struct Crictl {
    program: PathBuf,
    config: PathBuf,
    scratch: PathBuf,
}

impl Crictl {
    /// The environment's crictl.
    pub fn new(env: &Env) -> Self {
        Self {
            program: env.program("crictl"),
            config: env.dir.join("etc/crictl.yaml"),
            scratch: env.dir.join("log"),
        }
    }

    /// A crictl command, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config);
        // What `hack/up` exports for another environment comes before our file.
        for variable in ["CONTAINER_RUNTIME_ENDPOINT", "IMAGE_SERVICE_ENDPOINT"] {
            command.env_remove(variable);
        }
        command
    }

    /// Runs crictl, whatever its exit code.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn run(&self, args: &[&str], stdin: &[u8]) -> Result<Done> {
        command::run(self.command().args(args), stdin, TIMEOUT)
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        let done = self
            .run(args, b"")?
            .success(&format!("crictl {}", args.join(" ")))?;
        Ok(done.text().trim().to_owned())
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.ok(args)?;
        serde_json::from_str(&text).with_context(|| format!("answer of crictl {args:?}: {text}"))
    }

    /// crictl takes configurations as files only.
    fn file(&self, config: &Value) -> Result<ConfigFile> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.scratch.join(format!(
            "config-{}.json",
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::write(&path, config.to_string())
            .with_context(|| format!("write {}", path.display()))?;
        Ok(ConfigFile(path))
    }

    /// Runs a pod; returns its id.
    ///
    /// # Errors
    /// What crictl told.
    pub fn runp(&self, handler: &str, pod: &Value) -> Result<String> {
        let file = self.file(pod)?;
        self.ok(&["runp", "--runtime", handler, file.path()?])
    }

    /// Creates a container; returns its id.
    ///
    /// # Errors
    /// What crictl told.
    pub fn create(&self, pod_id: &str, container: &Value, pod: &Value) -> Result<String> {
        let (container, pod) = (self.file(container)?, self.file(pod)?);
        self.ok(&[
            "create",
            "--no-pull",
            pod_id,
            container.path()?,
            pod.path()?,
        ])
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// What crictl told.
    pub fn start(&self, id: &str) -> Result<()> {
        self.ok(&["start", id]).map(drop)
    }

    /// Stops a container: signal, `grace_s`, kill.
    ///
    /// # Errors
    /// What crictl told.
    pub fn stop(&self, id: &str, grace_s: u64) -> Result<()> {
        self.ok(&["stop", "--timeout", &grace_s.to_string(), id])
            .map(drop)
    }

    /// Removes a stopped container.
    ///
    /// # Errors
    /// What crictl told.
    pub fn rm(&self, id: &str) -> Result<()> {
        self.ok(&["rm", id]).map(drop)
    }

    /// Stops a pod.
    ///
    /// # Errors
    /// What crictl told.
    pub fn stopp(&self, id: &str) -> Result<()> {
        self.ok(&["stopp", id]).map(drop)
    }

    /// Removes a stopped pod.
    ///
    /// # Errors
    /// What crictl told.
    pub fn rmp(&self, id: &str) -> Result<()> {
        self.ok(&["rmp", id]).map(drop)
    }

    /// Stops and removes a pod with all its containers.
    ///
    /// # Errors
    /// What crictl told.
    pub fn rmp_force(&self, id: &str) -> Result<()> {
        self.ok(&["rmp", "--force", id]).map(drop)
    }

    /// Ids of all pods.
    ///
    /// # Errors
    /// What crictl told.
    pub fn pods(&self) -> Result<Vec<String>> {
        Ok(self
            .ok(&["pods", "--quiet"])?
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// Ids of all containers, whatever their state.
    ///
    /// # Errors
    /// What crictl told.
    pub fn containers(&self) -> Result<Vec<String>> {
        Ok(self
            .ok(&["ps", "--all", "--quiet"])?
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// A container's status.
    ///
    /// # Errors
    /// What crictl told.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let all = self.inspect(id)?;
        serde_json::from_value(all["status"].clone()).with_context(|| format!("status in {all}"))
    }

    /// A container's status, once it has exited.
    ///
    /// # Errors
    /// It did not exit in time.
    pub fn exited(&self, id: &str, within: Duration) -> Result<ContainerStatus> {
        until(within, &format!("container {id} to exit"), || {
            Ok(Some(self.status(id)?).filter(|status| status.state == "CONTAINER_EXITED"))
        })
    }

    /// All that containerd tells of a container.
    ///
    /// # Errors
    /// What crictl told.
    pub fn inspect(&self, id: &str) -> Result<Value> {
        self.json(&["inspect", "--output", "json", id])
    }

    /// A pod's status.
    ///
    /// # Errors
    /// What crictl told.
    pub fn pod_status(&self, id: &str) -> Result<PodStatus> {
        let all = self.json(&["inspectp", "--output", "json", id])?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(PodStatus {
            state: text(&all["status"]["state"]),
            ip: text(&all["status"]["network"]["ip"]),
            all,
        })
    }

    /// Statistics of a container.
    ///
    /// # Errors
    /// What crictl told.
    pub fn stats(&self, id: &str) -> Result<Value> {
        let all = self.json(&["stats", "--all", "--output", "json", "--id", id])?;
        Ok(all["stats"][0].clone())
    }

    /// Statistics of a pod.
    ///
    /// # Errors
    /// What crictl told.
    pub fn pod_stats(&self, id: &str) -> Result<Value> {
        let all = self.json(&["statsp", "--output", "json", "--id", id])?;
        Ok(all["stats"][0].clone())
    }

    /// Sets new limits; `limits` are crictl's own flags.
    ///
    /// # Errors
    /// What crictl told.
    pub fn update(&self, id: &str, limits: &[&str]) -> Result<()> {
        self.ok(&[&["update"], limits, &[id]].concat()).map(drop)
    }

    /// Runs a command in a container over a stream, as `kubectl exec` does.
    ///
    /// # Errors
    /// crictl did not end in time; the command's own exit code is no error.
    pub fn exec(&self, id: &str, args: &[&str]) -> Result<Done> {
        self.run(&[&["exec", id], args].concat(), b"")
    }

    /// As [`Self::exec`], with input.
    ///
    /// # Errors
    /// crictl did not end in time.
    pub fn exec_with_input(&self, id: &str, args: &[&str], stdin: &[u8]) -> Result<Done> {
        self.run(&[&["exec", "--interactive", id], args].concat(), stdin)
    }

    /// Runs a command by `ExecSync`, as an exec probe does.
    ///
    /// # Errors
    /// crictl did not end in time.
    pub fn exec_sync(&self, id: &str, timeout_s: u64, args: &[&str]) -> Result<Done> {
        self.run(
            &[
                &["exec", "--sync", "--timeout", &timeout_s.to_string(), id],
                args,
            ]
            .concat(),
            b"",
        )
    }

    /// Runs crictl with `args` on a terminal of its own, by util-linux's `script`.
    /// What comes back is what the terminal showed.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn on_a_terminal(&self, args: &[&str], typed: &[u8]) -> Result<Done> {
        let line: Vec<String> = std::iter::once(self.program.display().to_string())
            .chain(["--config".into(), self.config.display().to_string()])
            .chain(args.iter().map(|arg| format!("'{arg}'")))
            .collect();
        let mut script = Command::new("script");
        script.args([
            "--quiet",
            "--return",
            "--command",
            &line.join(" "),
            "/dev/null",
        ]);
        command::run(&mut script, typed, TIMEOUT)
    }
}

/// A file that goes with its owner.
struct ConfigFile(PathBuf);

impl ConfigFile {
    fn path(&self) -> Result<&str> {
        self.0.to_str().context("scratch folder is not UTF-8")
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        // A scratch file in a scratch folder.
        let _ = std::fs::remove_file(&self.0);
    }
}
