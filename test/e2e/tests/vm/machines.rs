//! Machine pods, run by the distribution's libvirtd.

use anyhow::{Result, ensure};

use crate::containers::Driver;
use crate::node::{Node, Pod};

/// What executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

/// What a machine pod is made with.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub handler: &'static str,
    pub driver: Driver,
    pub accelerator: Accelerator,
    pub vsock: bool,
}

pub fn check(node: &Node) -> Result<()> {
    let done = node.run("dyadctl check", "")?;
    let text = done.text();
    ensure!(done.code() == 0, "{text}{}", done.stderr);
    for line in ["kvm: a guest was run with it", "virtio-serial"] {
        ensure!(text.contains(line), "no {line:?} in\n{text}");
    }
    Ok(())
}

/// One pod from its creation to its removal.
pub fn life(node: &Node, machine: Machine) -> Result<()> {
    // libvirtd, which ends when it is idle, makes files of its own when it starts.
    node.sh("virsh -q list --all; systemctl start systemd-machined")?;
    let before = node.traces()?;
    let pod = Pod::run(node, machine.handler, machine.driver)?;
    let script = "echo hello; trap 'exit 7' TERM; while :; do sleep 1; done";
    let main = pod.container("main", script, 128 << 20)?;
    expect_definition(node, &pod, machine)?;
    expect_cgroup(node, &pod, machine.driver)?;

    let kernels = node.sh(&format!("uname -n; crictl exec {main} uname -n"))?;
    ensure!(kernels == format!("node\n{}", pod.name), "{kernels}");
    let logs = node.sh(&format!("crictl logs {main}"))?;
    ensure!(logs == "hello", "{logs}");
    let stats = node.json(&format!("crictl stats -o json {main}"))?;
    let used = &stats["stats"][0]["memory"]["workingSetBytes"]["value"];
    ensure!(used.is_string() && used != "0", "{stats}");

    let name = &pod.name;
    node.sh(&format!("dyadctl pause {name}"))?;
    let domain = format!("virsh -q domstate {}", domain(node)?);
    ensure!(node.sh(&domain)? == "paused", "after dyadctl pause");
    node.sh(&format!("dyadctl resume {name}"))?;
    node.sh(&format!("crictl exec {main} echo resumed"))?;

    // Its power-on is a boot; a libvirtd that starts anew finds it again.
    node.sh(&format!(
        "dyadctl --timeout 650s stop {name} --grace 60s; dyadctl --timeout 650s start {name}"
    ))?;
    expect_cgroup(node, &pod, machine.driver)?;
    node.sh("systemctl restart libvirtd")?;
    node.sh(&format!("crictl exec {main} echo again"))?;
    ensure!(node.sh(&domain)? == "running", "after libvirtd's restart");

    pod.remove()?;
    node.expect_no_more_than(&before)
}

fn domain(node: &Node) -> Result<String> {
    node.sh("virsh -q list --name --all | grep -m1 .")
}

fn expect_definition(node: &Node, pod: &Pod<'_>, machine: Machine) -> Result<()> {
    let kind = match machine.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    };
    let state = node.sh(&format!("dyadctl state {}", pod.name))?;
    ensure!(state.contains(kind), "{state}");
    let xml = node.sh(&format!("virsh dumpxml {}", domain(node)?))?;
    ensure!(xml.contains("<vsock") == machine.vsock, "{xml}");
    ensure!(xml.contains("agent.sock") != machine.vsock, "{xml}");
    Ok(())
}

/// QEMU is where the pod is (with systemd under libvirt's device filter), and what it uses is the pod's.
fn expect_cgroup(node: &Node, pod: &Pod<'_>, driver: Driver) -> Result<()> {
    let dir = node.sh("cut -d: -f3- /proc/$(pgrep -f 'qemu-system.*guest=dyad-')/cgroup")?;
    let parent = driver.parent();
    ensure!(dir.starts_with(&parent), "{dir}");
    if driver == Driver::Systemd {
        let filter = node.sh(&format!(
            "bpftool cgroup show /sys/fs/cgroup{dir} effective"
        ))?;
        ensure!(
            filter.contains("device"),
            "no device filter on {dir}: {filter}"
        );
        ensure!(dir.contains("/machine-qemu"), "{dir}");
        let domain = domain(node)?;
        node.sh("machinectl --no-legend list | grep -q qemu")?;
        let time = node.sh(&format!("virsh domstats --cpu-total {domain}"))?;
        ensure!(time.contains("cpu.time="), "{time}");
        let shares = node.sh(&format!("virsh schedinfo {domain}"))?;
        ensure!(shares.contains("cpu_shares"), "{shares}");
    } else {
        let controllers = node.sh(&format!("cat /sys/fs/cgroup{dir}/cgroup.controllers"))?;
        for controller in ["cpu", "memory", "pids", "io"] {
            ensure!(controllers.contains(controller), "{controllers}");
        }
        let weight = node.sh(&format!("cat /sys/fs/cgroup{dir}/cpu.weight"))?;
        ensure!(
            weight == "39",
            "the pod's 1024 shares became weight {weight}"
        );
    }
    let metrics = node.sh(&format!("ctr -n k8s.io task metrics {}", pod.id))?;
    for figure in ["memory.usage", "cpu.usage_usec", "pids.current"] {
        let line = metrics.lines().find(|line| line.starts_with(figure));
        let value = line.and_then(|line| line.split_whitespace().last());
        ensure!(value.is_some_and(|value| value != "0"), "{metrics}");
    }
    let pod_stats = node.json(&format!("crictl statsp -o json {}", pod.id))?;
    let used = &pod_stats["stats"][0]["linux"]["memory"]["usageBytes"]["value"];
    let used: u64 = used.as_str().unwrap_or_default().parse().unwrap_or(0);
    ensure!(used > 64 << 20, "a guest in {used} bytes: {pod_stats}");
    Ok(())
}
