//! What a trial works with: pods and containers that go when the trial ends, and the
//! logs that explain a failure.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
pub use dyad_e2e::check::{names, refusal, same};
use dyad_e2e::command::Done;
use dyad_e2e::crictl::{ContainerStatus, Crictl, PodStatus};
use dyad_e2e::env::{Env, LogMark, Version};
use dyad_e2e::host::cgroup_parent;
use dyad_e2e::logs::Logs;
use dyad_e2e::wait::until;
use libtest_mimic::Completion;
use serde_json::{Value, json};

/// For anything that a process in a pod is expected to do by itself.
pub const SOON: Duration = Duration::from_secs(60);

/// The small usable userland.
pub const BUSYBOX: &str = "dyad.test/busybox:1";

/// A runtime handler of the environment's containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// containerd's own shim.
    Runc,
    /// Dyad, containers.
    Dyad,
    /// Dyad, machines.
    DyadVm,
    /// Dyad, containers, without a pause container.
    DyadSandboxed,
    /// Dyad, machines, without a pause container.
    DyadVmSandboxed,
}

impl Handler {
    /// Those that every containerd has.
    pub const ALL: [Self; 3] = [Self::Runc, Self::Dyad, Self::DyadVm];
    /// Dyad's.
    pub const OURS: [Self; 4] = [
        Self::Dyad,
        Self::DyadVm,
        Self::DyadSandboxed,
        Self::DyadVmSandboxed,
    ];
    /// All that there are.
    pub const EVERY: [Self; 5] = [
        Self::Runc,
        Self::Dyad,
        Self::DyadVm,
        Self::DyadSandboxed,
        Self::DyadVmSandboxed,
    ];

    /// Its name in containerd's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Dyad => "dyad",
            Self::DyadVm => "dyad-vm",
            Self::DyadSandboxed => "dyad-sandboxed",
            Self::DyadVmSandboxed => "dyad-vm-sandboxed",
        }
    }

    /// Its pods are machines.
    pub fn is_machine(self) -> bool {
        matches!(self, Self::DyadVm | Self::DyadVmSandboxed)
    }

    /// Its pods have no pause container.
    pub fn is_sandboxed(self) -> bool {
        matches!(self, Self::DyadSandboxed | Self::DyadVmSandboxed)
    }

    /// Whether this containerd can serve it.
    pub fn works_on(self, version: Version) -> bool {
        !self.is_sandboxed() || version >= Version::V2_3
    }
}

/// One trial's view of its environment.
pub struct Context<'a> {
    /// The environment.
    pub env: &'a Env,
    /// The handler that the trial is for.
    pub handler: Handler,
    /// crictl on it.
    pub crictl: Crictl,
    pods: Mutex<Vec<String>>,
    /// Names and ids by which a log tells of this trial's pods.
    words: Mutex<Vec<String>>,
    folders: Mutex<Vec<PathBuf>>,
    since: LogMark,
}

impl<'a> Context<'a> {
    /// Nothing runs yet.
    pub fn new(env: &'a Env, handler: Handler) -> Self {
        Self {
            env,
            handler,
            crictl: env.crictl(),
            pods: Mutex::default(),
            words: Mutex::default(),
            folders: Mutex::default(),
            since: env.log_mark(),
        }
    }

    /// Runs the trial, adds the logs to its failure, and removes what it made.
    pub fn judge(self, trial: impl FnOnce(&Self) -> Result<Completion>) -> Result<Completion> {
        let result = catch_unwind(AssertUnwindSafe(|| trial(&self))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(anyhow!("panic: {}", text.unwrap_or_default()))
        });
        let result = result.map_err(|error| anyhow!("{error:#}\n{}", self.logs()));
        let cleaned = self.clean();
        match (result, cleaned) {
            (Ok(_), Err(error)) => Err(anyhow!("clean up: {error:#}\n{}", self.logs())),
            (result, _) => result,
        }
    }

    fn logs(&self) -> String {
        self.env.log_tail(&self.since, &locked(&self.words))
    }

    fn clean(&self) -> Result<()> {
        let mut result = Ok(());
        let there = self.crictl.pods().unwrap_or_default();
        for pod in locked(&self.pods).iter() {
            if there.contains(pod) {
                let removed = self.crictl.rmp_force(pod);
                result = result.and(removed);
            }
        }
        for folder in locked(&self.folders).iter() {
            // Scratch in the environment's folder; cgroups by rmdir only.
            if folder.starts_with("/sys/fs/cgroup") {
                let _ = fs::remove_dir(folder);
            } else {
                let _ = fs::remove_dir_all(folder);
            }
        }
        result
    }

    /// A pod's configuration with a name of its own.
    pub fn pod_config(&self) -> Value {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "{}-{}",
            self.handler.name(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let logs = self.env.dir.join("log/pods").join(&name);
        json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
            "hostname": name,
            "log_directory": logs,
            "linux": {"cgroup_parent": format!("/{}/{name}", cgroup_parent(&self.env.dir))},
        })
    }

    /// Runs a pod.
    pub fn pod(&self) -> Result<Pod<'_>> {
        self.pod_with(|_| ())
    }

    /// Runs a pod whose configuration `change` has changed.
    pub fn pod_with(&self, change: impl FnOnce(&mut Value)) -> Result<Pod<'_>> {
        let mut config = self.pod_config();
        change(&mut config);
        self.run_pod(self.handler, config)
    }

    /// Runs a pod under a handler that need not be the trial's own.
    pub fn run_pod(&self, handler: Handler, config: Value) -> Result<Pod<'_>> {
        self.expect_cgroups_of(&config);
        let name = config["metadata"]["name"].as_str().unwrap_or_default();
        locked(&self.words).push(format!("{name},"));
        let id = self.crictl.runp(handler.name(), &config)?;
        locked(&self.pods).push(id.clone());
        Ok(Pod {
            context: self,
            id,
            config,
        })
    }

    /// A pod's cgroup is made by the one who names it (kubelet), or by the runtime, and
    /// nobody but its namer removes it.
    fn expect_cgroups_of(&self, config: &Value) {
        let Some(parent) = config["linux"]["cgroup_parent"].as_str() else {
            return;
        };
        let parent = parent.trim_start_matches('/');
        let mut folders = locked(&self.folders);
        folders.push(PathBuf::from("/sys/fs/cgroup").join(parent));
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            if hierarchy.path().join("cgroup.procs").exists() {
                folders.push(hierarchy.path().join(parent));
            }
        }
    }

    /// Takes the pod's own cgroup away, as kubelet does after a pod is gone.
    pub fn remove_cgroup_of(&self, config: &Value) -> Result<()> {
        let Some(parent) = config["linux"]["cgroup_parent"].as_str() else {
            return Ok(());
        };
        let parent = parent.trim_start_matches('/');
        let folders = locked(&self.folders);
        for folder in folders.iter().filter(|folder| folder.ends_with(parent)) {
            // containerd 1.6 runs a container's `delete` beside rmp's end.
            until(SOON, "the pod's cgroup to be empty", || {
                if folder.exists() {
                    fs::remove_dir(folder)
                        .with_context(|| format!("remove {}", folder.display()))?;
                }
                Ok(Some(()))
            })?;
        }
        Ok(())
    }

    /// A folder on the host, for volumes.
    pub fn folder(&self, path: &str) -> Result<PathBuf> {
        let folder = self.env.dir.join("e2e").join(path);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        locked(&self.folders).push(folder.clone());
        Ok(folder)
    }
}

fn locked<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running pod.
pub struct Pod<'a> {
    context: &'a Context<'a>,
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: Value,
}

impl Pod<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        self.config["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Its uid.
    pub fn uid(&self) -> &str {
        self.config["metadata"]["uid"].as_str().unwrap_or_default()
    }

    /// A container's configuration with a name of its own; `sh -c script`.
    pub fn container_config(&self, script: &str) -> Value {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("c{}", NEXT.fetch_add(1, Ordering::Relaxed));
        json!({
            "metadata": {"name": name},
            "image": {"image": BUSYBOX},
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {},
        })
    }

    /// Creates a container.
    pub fn create(&self, config: &Value) -> Result<Container<'_>> {
        let id = self.context.crictl.create(&self.id, config, &self.config)?;
        let folder = self.config["log_directory"].as_str().unwrap_or_default();
        Ok(Container {
            context: self.context,
            id,
            log: PathBuf::from(folder).join(config["log_path"].as_str().unwrap_or_default()),
        })
    }

    /// Creates and starts a container that runs `script`.
    pub fn run(&self, script: &str) -> Result<Container<'_>> {
        self.run_with(script, |_| ())
    }

    /// Creates and starts a container whose configuration `change` has changed.
    pub fn run_with(&self, script: &str, change: impl FnOnce(&mut Value)) -> Result<Container<'_>> {
        let mut config = self.container_config(script);
        change(&mut config);
        let container = self.create(&config)?;
        self.context.crictl.start(&container.id)?;
        Ok(container)
    }

    /// A container that waits to be asked.
    pub fn idle(&self) -> Result<Container<'_>> {
        self.run("trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
    }

    /// Runs `script` to its end and gives what it wrote; it must exit with 0.
    pub fn output_of(&self, script: &str) -> Result<String> {
        self.output_with(script, |_| ())
    }

    /// As [`Self::output_of`], with a changed configuration.
    pub fn output_with(&self, script: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
        let container = self.run_with(script, change)?;
        let status = container.exited()?;
        let logs = container.logs()?;
        if status.exit_code != 0 {
            bail!(
                "{script}: exit code {}, stdout {:?}, stderr {:?}",
                status.exit_code,
                logs.out(),
                logs.err()
            );
        }
        Ok(logs.out())
    }

    /// Its status.
    pub fn status(&self) -> Result<PodStatus> {
        self.context.crictl.pod_status(&self.id)
    }

    /// Stops it and removes it, in order.
    pub fn remove(&self) -> Result<()> {
        self.context.crictl.stopp(&self.id)?;
        self.context.crictl.rmp(&self.id)?;
        self.context.remove_cgroup_of(&self.config)
    }
}

/// A container in a pod.
pub struct Container<'a> {
    context: &'a Context<'a>,
    /// Its id.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

impl Container<'_> {
    /// Its status.
    pub fn status(&self) -> Result<ContainerStatus> {
        self.context.crictl.status(&self.id)
    }

    /// Waits for its end.
    pub fn exited(&self) -> Result<ContainerStatus> {
        self.context.crictl.exited(&self.id, SOON)
    }

    /// What it wrote so far.
    pub fn logs(&self) -> Result<Logs> {
        let file = fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        Ok(Logs::parse(&file))
    }

    /// Waits until its output holds `text`; returns the output.
    pub fn says(&self, text: &str) -> Result<String> {
        until(
            SOON,
            &format!("container {} to say {text:?}", self.id),
            || Ok(Some(self.logs()?.out()).filter(|out| out.contains(text))),
        )
        .with_context(|| format!("it said {:?}", self.logs().map(|logs| logs.out())))
    }

    /// Runs `sh -c script` in it, whatever comes of it.
    pub fn exec(&self, script: &str) -> Result<Done> {
        self.context.crictl.exec(&self.id, &["sh", "-c", script])
    }

    /// Runs `sh -c script` in it; it must exit with 0. Gives its output.
    pub fn output(&self, script: &str) -> Result<String> {
        Ok(self
            .exec(script)?
            .success(&format!("exec of {script}"))?
            .text())
    }
}
