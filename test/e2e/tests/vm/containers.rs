//! Pods of containers, under both cgroup drivers.

use anyhow::{Result, ensure};

use crate::node::{Node, Pod, SLICE};

const MIB: u64 = 1 << 20;

/// Kubelet's two ways of naming cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    Cgroupfs,
    Systemd,
}

impl Driver {
    pub fn parent(self) -> String {
        match self {
            Self::Cgroupfs => "/kubepods/podtest".into(),
            Self::Systemd => format!("/kubepods.slice/{SLICE}"),
        }
    }
}

/// One pod from its creation to its removal.
pub fn life(node: &Node, handler: &str, driver: Driver) -> Result<()> {
    let before = node.traces()?;
    let pod = Pod::run(node, handler, driver)?;
    let script = "echo hello; trap 'exit 7' TERM; while :; do sleep 0.2; done";
    let main = pod.container("main", script, 128 * MIB)?;

    let dir = cgroup(node, &main)?;
    ensure!(dir.starts_with(&driver.parent()), "{dir}");
    let seen = node.sh(&format!("crictl exec {main} cat /proc/self/cgroup"))?;
    ensure!(seen == "0::/", "{seen}");
    expect_limits(node, &main, "134217728", "50000 100000")?;
    if driver == Driver::Systemd {
        let units = format!(
            "systemctl show -p LoadState,Delegate $(basename {dir}); systemctl daemon-reload"
        );
        let unit = node.sh(&units)?;
        ensure!(unit.contains("LoadState=loaded"), "{unit}");
        ensure!(unit.contains("Delegate=yes"), "{unit}");
        expect_limits(node, &main, "134217728", "50000 100000")?;
    }
    let logs = node.sh(&format!("crictl logs {main}"))?;
    ensure!(logs == "hello", "{logs}");

    let stats = node.json(&format!("crictl stats -o json {main}"))?;
    let stats = &stats["stats"][0];
    ensure!(stats["cpu"]["psi"].is_object(), "no pressure: {stats}");
    let metrics = node.sh(&format!("ctr -n k8s.io task metrics {main}"))?;
    let limit = metrics.lines().find(|line| line.starts_with("pids.limit"));
    ensure!(limit.is_some_and(|line| !line.ends_with(" 0")), "{metrics}");
    ensure!(
        stats["memory"]["workingSetBytes"]["value"] != "0",
        "{stats}"
    );
    let pod_stats = node.json(&format!("crictl statsp -o json {}", pod.id))?;
    ensure!(
        pod_stats["stats"][0]["linux"]["memory"]["workingSetBytes"]["value"] != "0",
        "{pod_stats}"
    );

    node.sh(&format!(
        "crictl update --memory 201326592 --cpu-quota 70000 {main}"
    ))?;
    expect_limits(node, &main, "201326592", "70000 100000")?;

    let name = &pod.name;
    node.sh(&format!("dyadctl pause {name}"))?;
    node.sh(&format!(
        "grep -x 'frozen 1' /sys/fs/cgroup{dir}/cgroup.events"
    ))?;
    let refused = node.run(&format!("crictl exec {main} true"), "")?;
    ensure!(refused.code() != 0, "an exec in a paused container");
    node.sh(&format!(
        "dyadctl resume {name}; grep -x 'frozen 0' /sys/fs/cgroup{dir}/cgroup.events"
    ))?;

    node.sh(&format!(
        "dyadctl stop {name} --grace 5s; dyadctl start {name}; crictl exec {main} echo again"
    ))?;
    expect_limits(node, &main, "201326592", "70000 100000")?;

    let greedy = pod.container("greedy", "exec tail /dev/zero", 64 * MIB)?;
    let ended = pod.ended(&greedy)?;
    ensure!(ended == (137, "OOMKilled".into()), "{ended:?}");

    node.sh(&format!("crictl stop -t 10 {main}"))?;
    let (code, _) = pod.ended(&main)?;
    ensure!(code == 7, "exit code {code}");
    pod.remove()?;
    node.expect_no_more_than(&before)
}

/// Where a container's process is.
fn cgroup(node: &Node, container: &str) -> Result<String> {
    node.sh(&format!(
        "cut -d: -f3- /proc/$(crictl inspect {container} | jq .info.pid)/cgroup"
    ))
}

fn expect_limits(node: &Node, container: &str, memory: &str, cpu: &str) -> Result<()> {
    let dir = cgroup(node, container)?;
    let found = node.sh(&format!("cd /sys/fs/cgroup{dir}; cat memory.max cpu.max"))?;
    ensure!(found == format!("{memory}\n{cpu}"), "{found}");
    Ok(())
}
