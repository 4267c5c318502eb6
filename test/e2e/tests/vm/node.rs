//! The node, and the pods on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dyad_e2e::command::{Done, run};
use serde_json::{Value, json};

use crate::containers::Driver;

/// A first `up` fetches a Debian and builds Dyad.
const UP: Duration = Duration::from_secs(1800);
/// An emulated machine in an emulated machine takes minutes to boot.
const COMMAND: Duration = Duration::from_secs(700);

/// A Debian of `hack/vm`.
pub struct Node {
    dir: PathBuf,
}

impl Node {
    pub fn new() -> Self {
        let dir = std::env::var_os("DYAD_VM_DIR").unwrap_or_else(|| "/tmp/dyad-vm".into());
        Self { dir: dir.into() }
    }

    fn hack(&self, verb: &str) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../hack/vm");
        let mut command = Command::new(script);
        command.arg(verb).arg("--dir").arg(&self.dir);
        command
    }

    pub fn up(&self) -> Result<()> {
        if std::env::var_os("DYAD_VM_NO_UP").is_some() {
            return Ok(());
        }
        let mut command = self.hack("up");
        if let Some(profile) = std::env::var_os("DYAD_VM_PROFILE") {
            command.arg("--profile").arg(profile);
        }
        run(&mut command, b"", UP)?.success("hack/vm up").map(drop)
    }

    pub fn down(&self) {
        if std::env::var_os("DYAD_VM_KEEP").is_some() {
            return;
        }
        if let Err(error) = run(&mut self.hack("down"), b"", COMMAND) {
            eprintln!("{error:#}");
        }
    }

    /// Runs a script as root, with what it reads.
    pub fn run(&self, script: &str, stdin: &str) -> Result<Done> {
        let mut command = self.hack("run");
        command.args(["bash", "-euo", "pipefail", "-c", script]);
        run(&mut command, stdin.as_bytes(), COMMAND)
    }

    /// What a script that ends with 0 says.
    pub fn sh(&self, script: &str) -> Result<String> {
        let done = self.run(script, "")?.success(script)?;
        Ok(done.text().trim().to_owned())
    }

    pub fn json(&self, script: &str) -> Result<Value> {
        let text = self.sh(script)?;
        serde_json::from_str(&text).with_context(|| format!("{script}: {text}"))
    }

    /// Removes what a failed trial left, for the next one's sake.
    pub fn clean(&self) -> Result<()> {
        self.sh("crictl rmp -fa; systemctl stop kubepods.slice; rmdir /sys/fs/cgroup/kubepods/podtest /sys/fs/cgroup/kubepods || true")
            .map(drop)
    }

    /// All that a pod may leave.
    pub fn traces(&self) -> Result<Vec<String>> {
        let found = self.sh(TRACES)?;
        Ok(found.lines().map(str::to_owned).collect())
    }

    /// Waits until there is no more than there was.
    pub fn expect_no_more_than(&self, before: &[String]) -> Result<()> {
        let mut more = Vec::new();
        for _ in 0..10 {
            more = self.traces()?;
            more.retain(|trace| !before.contains(trace));
            if more.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        anyhow::bail!("left behind: {more:#?}")
    }
}

/// Units that come and go by themselves are none.
const TRACES: &str = r#"
find /sys/fs/cgroup -mindepth 1 -type d | grep -E 'cri-containerd|machine-qemu|kubepods|k8s' | sed 's/^/cgroup /' || true
awk '{print "mount", $5}' /proc/self/mountinfo
ps -eo args | grep -E '^[^ ]*(containerd-shim|qemu-system|sleep 2147)' | cut -c1-100 | sed 's/^/process /' || true
ip -o link | awk '{print "link", $2}' | grep -v cni0 || true
find /run/dyad -mindepth 1 2>/dev/null | sed 's/^/file /' || true
find /var/lib/dyad/machines /etc/libvirt/qemu /run/libvirt/qemu /etc/apparmor.d/libvirt -mindepth 1 2>/dev/null | grep -v /channel | sed 's/^/file /' || true
machinectl --no-legend list | sed 's/^/machine /'
virsh -q list --all | sed 's/^/domain /'
"#;

/// A pod made by crictl, below a parent as kubelet makes it.
pub struct Pod<'a> {
    pub node: &'a Node,
    pub id: String,
    pub name: String,
    driver: Driver,
}

impl<'a> Pod<'a> {
    pub fn run(node: &'a Node, handler: &str, driver: Driver) -> Result<Self> {
        let driver_name = match driver {
            Driver::Cgroupfs => "fs",
            Driver::Systemd => "sd",
        };
        let name = format!("{handler}-{driver_name}");
        match driver {
            Driver::Systemd => node.sh(&format!(
                "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 \
                 org.freedesktop.systemd1.Manager StartTransientUnit 'ssa(sv)a(sa(sv))' {SLICE} replace 5 \
                 MemoryAccounting b true CPUAccounting b true IOAccounting b true TasksAccounting b true \
                 DefaultDependencies b false 0"
            ))?,
            // Controllers down to the pod's cgroup, and not in it.
            Driver::Cgroupfs => node.sh(
                "cd /sys/fs/cgroup; mkdir -p kubepods/podtest; \
                 for level in . kubepods; do echo '+cpu +memory +pids +io +cpuset' >$level/cgroup.subtree_control; done",
            )?,
        };
        let config = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("{name}-uid")},
            "hostname": name,
            "log_directory": format!("/var/log/pods/{name}"),
            "linux": {"cgroup_parent": driver.parent(), "resources": {
                "cpu_period": 100_000, "cpu_quota": 100_000, "cpu_shares": 1024,
                "memory_limit_in_bytes": 268_435_456,
            }},
        });
        let file = format!("/root/{name}.json");
        node.run(
            &format!("rm -rf /var/log/pods/{name}; mkdir -p /var/log/pods/{name}; cat >{file}"),
            &config.to_string(),
        )?
        .success("write the pod's configuration")?;
        let id = node.sh(&format!("crictl runp -T 650s -r {handler} {file}"))?;
        Ok(Self {
            node,
            id,
            name,
            driver,
        })
    }

    /// Makes and starts a container of `sh -c SCRIPT` with half a CPU, and gives its id.
    pub fn container(&self, name: &str, script: &str, memory: u64) -> Result<String> {
        let config = json!({
            "metadata": {"name": name},
            "image": {"image": "dyad.test/busybox:1"},
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {"resources": {
                "memory_limit_in_bytes": memory, "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 512,
            }},
        });
        let (file, pod) = (format!("/root/{name}.json"), &self.name);
        let script = format!(
            "cat >{file}; id=$(crictl create {} {file} /root/{pod}.json); crictl start $id >&2; echo $id",
            self.id
        );
        let done = self.node.run(&script, &config.to_string())?;
        Ok(done.success("create a container")?.text().trim().to_owned())
    }

    /// Waits until the container has ended, and gives exit code and reason.
    pub fn ended(&self, container: &str) -> Result<(i64, String)> {
        let status = self.node.json(&format!(
            "for i in $(seq 120); do crictl inspect {container} >/tmp/status; \
             if grep -q CONTAINER_EXITED /tmp/status; then break; fi; sleep 0.5; done; cat /tmp/status"
        ))?;
        let status = &status["status"];
        ensure!(status["state"] == "CONTAINER_EXITED", "it runs: {status}");
        let reason = status["reason"].as_str().unwrap_or_default();
        Ok((
            status["exitCode"].as_i64().context("exitCode")?,
            reason.to_owned(),
        ))
    }

    pub fn remove(self) -> Result<()> {
        self.node.sh(&format!("crictl rmp -f {}", self.id))?;
        match self.driver {
            Driver::Systemd => self.node.sh("systemctl stop kubepods.slice")?,
            Driver::Cgroupfs => self
                .node
                .sh("cd /sys/fs/cgroup/kubepods; [ ! -e podtest ] || rmdir podtest; cd ..; rmdir kubepods")?,
        };
        Ok(())
    }
}

/// A pod's slice as kubelet names it.
pub const SLICE: &str = "kubepods-podtest_1.slice";
