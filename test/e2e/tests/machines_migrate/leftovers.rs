//! What pods that moved, or did not, leave behind: fences, converted images, nothing else.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::host::Snapshot;
use dyad_e2e::nodes::Nodes;
use dyad_e2e::wait::until;

use crate::matrix::must_not_run_again;
use crate::pod::Pod;

/// libvirt and containerd remove a few things a moment after they answered.
const SETTLE: Duration = Duration::from_secs(30);

/// Both nodes, as they were.
pub struct Leftovers([Snapshot; 2]);

impl Leftovers {
    pub fn before(nodes: &Nodes) -> Self {
        Self(nodes.nodes.each_ref().map(|node| Snapshot::take(&node.dir)))
    }

    /// # Errors
    /// Something stayed; it is named.
    pub fn none_after(&self, nodes: &Nodes) -> Result<()> {
        let mut left = Vec::new();
        let gone = until(SETTLE, "both nodes to be clean", || {
            left.clear();
            for (snapshot, node) in self.0.iter().zip(&nodes.nodes) {
                let new = snapshot.new_since();
                left.extend(new.into_iter().filter(|line| !is_meant_to_stay(line)));
                let domains = node.virsh(&["list", "--all", "--name"])?;
                let domains = domains.lines().filter(|name| !name.is_empty());
                left.extend(domains.map(|name| format!("domain {name} of {}", node.dir.display())));
            }
            Ok(left.is_empty().then_some(()))
        });
        if gone.is_err() {
            bail!("left behind:\n  {}", left.join("\n  "));
        }
        Ok(())
    }
}

/// Neither the pod that left nor another of its UID runs where it was, after all of the node's
/// memory is gone.
pub fn the_fence_outlives_a_restart_of_the_node(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let target = Pod::waiting(n2, &machine)?;
    source.migrate(n2, &[])?.moved()?;
    n1.restart_node()?;
    if n1.crictl().start(&source.container).is_ok() {
        bail!("the source's container was started again");
    }
    must_not_run_again(&source)?;
    target.goes_on()?;
    // Where containerd asked no shim to delete the pod, the machine's record and console log are
    // swept; containerd's own folder stays.
    let endpoint = format!("unix://{}/containerd/containerd.sock", n1.dir.display());
    n1.dyadctl(&["sweep", "--runtime-endpoint", &endpoint])?
        .success("dyadctl sweep")?;
    let swept = n1.dir.join("dyad/lib/machines").join(&machine);
    if swept.exists() {
        bail!("{} was not swept", swept.display());
    }
    let of_containerd = n1
        .dir
        .join("containerd/root/io.containerd.runtime.v2.task/k8s.io")
        .join(&source.id);
    if of_containerd.exists() {
        fs::remove_dir_all(&of_containerd).with_context(|| of_containerd.display().to_string())?;
    }
    Ok(())
}

fn is_meant_to_stay(line: &str) -> bool {
    // A daemon that was killed has come back as another process.
    let daemon = line.starts_with("process ")
        && [
            "/bin/containerd --config",
            "libvirtd --config",
            "libvirtd-in-namespace",
        ]
        .iter()
        .any(|daemon| line.contains(daemon));
    let file = [
        "/dyad/lib/migrated",
        "/dyad/lib/boot",
        "/dyad/lib/images",
        "/dyad/lib/erofs",
        "/libvirt/etc/pki",
        "/libvirt/dev",
    ]
    .iter()
    .any(|path| line.contains(path));
    // libvirt's own cgroup of a machine, which is empty: one that was killed forgets it.
    let forgotten = line.starts_with("cgroup ") && line.contains("/machine/qemu-");
    daemon || file || forgotten
}
