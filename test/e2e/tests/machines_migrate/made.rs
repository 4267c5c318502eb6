//! A target that `dyadctl migrate --create-target` makes.

use anyhow::{Result, ensure};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;

use crate::pod::{COUNT, Plan, Pod, seamless};

/// As the source was asked for; it is removed again where the machine does not arrive.
pub fn dyadctl_makes_the_target(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let plan = Plan::of(COUNT)
        .memory(192, 128)
        .init("load", "dyad.test/multi:1", "echo loaded");
    let source = Pod::run(n1, &plan)?;
    source.counts_beyond(3)?;
    let machine = source.machine()?;
    let endpoint = |env: &Env| format!("unix://{}/containerd/containerd.sock", env.dir.display());
    let (here, there) = (endpoint(n1), endpoint(n2));
    let make = ["--runtime-endpoint", &here, "--create-target", &there];

    let nowhere = "qemu+unix:///system?socket=/nowhere";
    source
        .migrate_to(nowhere, &make)?
        .refused(&["destination", "made its target"])?;
    let left = n2.crictl().pods()?;
    ensure!(left.is_empty(), "the target is left: {left:?}");
    source.goes_on()?;

    source.migrate(n2, &make)?.with(0, &["made its target"])?;
    let target = source.made_on(n2)?;
    target.goes_on()?;
    // Both nodes' containerds wrote to one log.
    seamless(&[&target])?;
    ensure!(target.machine()? == machine, "the machine has another name");
    ensure!(target.state()?.contains("192"), "{}", target.state()?);
    let code = source.ended()?;
    ensure!(code == 0, "exit code {code}");
    Ok(())
}
