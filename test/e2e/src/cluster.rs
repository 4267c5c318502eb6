//! The Kubernetes of one node that `hack/cluster` makes, asked through kubectl.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::command::{self, Done};
use crate::env::{Build, Env, UP_TIMEOUT, Version, repository};

/// What kubectl answers without having to wait.
const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The environment that it runs in.
    pub env: Env,
}

impl Cluster {
    /// Brings a cluster up in `dir`; what an earlier run left there goes first.
    ///
    /// # Errors
    /// `hack/cluster up` failed; the text holds its output.
    pub fn up(dir: &Path, build: Build) -> Result<Self> {
        let cluster = Self {
            env: Env {
                dir: dir.to_path_buf(),
                version: Version::V2_3,
            },
        };
        cluster.env.down()?;
        let mut up = Command::new(repository().join("hack/cluster"));
        up.arg("up").arg("--dir").arg(dir);
        build.tell(&mut up);
        command::run(&mut up, b"", UP_TIMEOUT)?.success("hack/cluster up")?;
        Ok(cluster)
    }

    /// Runs `hack/cluster down` on the folder; nothing happens where nothing is up.
    ///
    /// # Errors
    /// It failed; the text holds its output.
    pub fn down(&self) -> Result<()> {
        let mut down = Command::new(repository().join("hack/cluster"));
        down.arg("down").arg("--dir").arg(&self.env.dir);
        command::run(&mut down, b"", UP_TIMEOUT)?.success("hack/cluster down")?;
        Ok(())
    }

    fn kubeconfig(&self) -> PathBuf {
        self.env.dir.join("kubernetes/admin.conf")
    }

    /// kubectl on this cluster, as its administrator.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut kubectl = Command::new(self.env.program("kubectl"));
        kubectl
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .arg("--cache-dir")
            .arg(self.env.dir.join("kubernetes/cache"))
            .args(args);
        kubectl
    }

    /// Runs kubectl, whatever comes of it.
    ///
    /// # Errors
    /// It could not be run, or did not end in time.
    pub fn run(&self, args: &[&str], timeout: Duration) -> Result<Done> {
        command::run(&mut self.kubectl_command(args), b"", timeout)
    }

    /// Runs kubectl and gives what it printed.
    ///
    /// # Errors
    /// It did not end with 0.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let done = self.run(args, ASK_TIMEOUT)?;
        Ok(done.success(&format!("kubectl {args:?}"))?.text())
    }

    /// Applies an object.
    ///
    /// # Errors
    /// The API server refused it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let mut apply = self.kubectl_command(&["apply", "--filename", "-"]);
        command::run(&mut apply, object.to_string().as_bytes(), ASK_TIMEOUT)?
            .success(&format!("kubectl apply of {object}"))?;
        Ok(())
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "--output", "json"], args].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {args:?}: {text}"))
    }

    /// Waits (by a watch) until the object is as `condition` says: what `kubectl wait --for`
    /// takes.
    ///
    /// # Errors
    /// It was not within `timeout`.
    pub fn wait(&self, object: &str, condition: &str, timeout: Duration) -> Result<()> {
        let args = [
            "wait",
            object,
            &format!("--for={condition}"),
            &format!("--timeout={}s", timeout.as_secs()),
        ];
        self.run(&args, timeout + ASK_TIMEOUT)?
            .success(&format!("kubectl {args:?}"))?;
        Ok(())
    }
}
