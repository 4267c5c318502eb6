//! Migration of a machine pod beside `virsh migrate` of a plain domain of the same size,
//! devices and kernel, in turn: how long it takes, and for how long the machine does not
//! answer echo requests from outside.

mod echo;
mod plain;

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;

use self::echo::Echo;
use crate::containers::{pod_config, running, said_first};
use crate::cri::Cri;
use crate::table::{Row, milliseconds};

/// How long a machine may take to answer, once it was asked for.
const ANSWER: Duration = Duration::from_secs(60);

/// What the machine does meanwhile.
struct Work {
    name: &'static str,
    script: &'static str,
}

const WORK: [Work; 2] = [
    Work {
        name: "idle",
        script: "echo first; while :; do sleep 1000; done",
    },
    Work {
        name: "dirtying",
        script: "echo first; while :; do \
                 dd if=/dev/zero of=/dev/shm/held bs=1M count=32 2>/dev/null; sleep 0.2; done",
    },
];

/// Moves each machine `runs` times by each of both.
///
/// # Errors
/// One could not be run, or did not arrive.
pub async fn measure(nodes: &Nodes, runs: usize) -> Result<Vec<Row>> {
    let mut cri = Vec::new();
    for node in &nodes.nodes {
        cri.push(Cri::connect(&node.dir.join("containerd/containerd.sock")).await?);
    }
    let address = free_address(&nodes.nodes[0])?;
    let mut rows = Vec::new();
    for work in &WORK {
        let row = |what: &str| Row {
            what: format!("migrate, {} machine: {what}", work.name),
            unit: "ms",
            against: "virsh migrate",
            yardstick: Vec::new(),
            dyad: Vec::new(),
        };
        let (mut total, mut silent) = (row("in all"), row("no answer for"));
        // One of each goes unmeasured: images are converted, caches fill.
        for run in 0..=runs {
            let name = format!("bench-{}-{run}", work.name);
            let (dyad, xml) = move_pod(nodes, &mut cri, &name, work).await?;
            let plain = plain::measure(nodes, &xml, work, address)?;
            if run > 0 {
                total.dyad.push(milliseconds(dyad.0));
                silent.dyad.push(milliseconds(dyad.1));
                total.yardstick.push(milliseconds(plain.0));
                silent.yardstick.push(milliseconds(plain.1));
            }
            eprintln!("migrate, {}: {run} of {runs}", work.name);
        }
        rows.extend([total, silent]);
    }
    Ok(rows)
}

/// A pod from the first node to the second; gives also its domain as it was before.
async fn move_pod(
    nodes: &Nodes,
    cri: &mut [Cri],
    name: &str,
    work: &Work,
) -> Result<((Duration, Duration), String)> {
    let [from, to] = &nodes.nodes;
    let [cri_here, cri_there] = cri else {
        anyhow::bail!("two nodes have two containerds");
    };
    let pod = pod_config(from, name);
    let source = cri_here.run_pod("dyad-vm", &pod).await?;
    let container = cri_here
        .create(&source, &pod, &running(work.script))
        .await?;
    cri_here.start(&container).await?;
    said_first(from, name).await?;
    let domain = from.domain_of(name)?;
    let xml = from.virsh(&["dumpxml", "--migratable", "--security-info", &domain])?;
    let ip: Ipv4Addr = from.crictl().pod_status(&source)?.ip.parse()?;

    let mut pod = pod_config(to, name);
    let machine = domain.trim_start_matches("dyad-").to_owned();
    pod.annotations = HashMap::from([("dyad.dev/migration-source".to_owned(), machine)]);
    let target = cri_there.run_pod("dyad-vm", &pod).await?;
    let container = cri_there
        .create(&target, &pod, &running(work.script))
        .await?;
    cri_there.start(&container).await?;

    let echo = Echo::begin(ip, ANSWER)?;
    settle();
    let begin = Instant::now();
    from.dyadctl(&["migrate", &source, "--to", &to.libvirt_uri()])?
        .success("dyadctl migrate")?;
    let total = begin.elapsed();
    settle();
    let silent = echo.end()?;
    for (cri, pod) in [(cri_there, &target), (cri_here, &source)] {
        cri.stop_pod(pod).await?;
        cri.remove_pod(pod).await?;
    }
    Ok(((total, silent), xml))
}

/// Both sides have the same time to become quiet, and to show that they answer.
fn settle() {
    std::thread::sleep(Duration::from_secs(1));
}

/// One that CNI gives to no pod (hack/lib/node.sh).
fn free_address(node: &Env) -> Result<Ipv4Addr> {
    let file = node.dir.join("../subnet");
    let subnet = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    Ok(format!("{}.251", subnet.trim()).parse()?)
}
