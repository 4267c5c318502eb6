//! A migration that takes too long.

use anyhow::Result;
use dyad_e2e::nodes::Nodes;
use dyad_e2e::wait::until;

use crate::pod::{Plan, Pod, SOON, seamless};

/// Counts, and copies 16 MiB of its memory over and over, as fast as it can.
const REWRITE: &str = "cd /dev/shm; yes | head -c 1048576 >m; \
     i=0; while [ $i -lt 16 ]; do cat m >>from; i=$((i+1)); done; cat from >to; \
     (while :; do cat from 1<>to; done) & \
     n=0; while :; do echo n $n; n=$((n+1)); sleep 0.1; done";

/// It gives up, or stands still, or runs there before its memory is there.
pub fn a_time_limit_gives_up_or_brings_it_to_an_end(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    {
        let target = Pod::waiting(n2, &machine)?;
        source
            .migrate(n2, &["--bandwidth", "4", "--max-time", "5s"])?
            .failed(&["it took longer than 5000 ms"])?;
        source.stayed(&target)?;
    }
    let slow = ["--bandwidth", "8", "--max-time", "5s", "--then"];
    let target = Pod::waiting(n2, &machine)?;
    source
        .migrate(n2, &[&slow[..], &["post-copy"]].concat())?
        .moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])?;

    let back = Pod::waiting(n1, &machine)?;
    target
        .migrate(n1, &[&slow[..], &["pause"]].concat())?
        .moved()?;
    back.goes_on()?;
    seamless(&[&source, &target, &back])
}

/// A machine that changes its memory faster than it is copied, until it is slowed down.
pub fn auto_converge_brings_it_to_an_end(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::run(n1, &Plan::of(REWRITE))?;
    source.counts_beyond(3)?;
    let machine = source.machine()?;
    let waiting = || Pod::run(n2, &Plan::of(REWRITE).from(&machine));
    let slow = ["--bandwidth", "16"];
    {
        let target = waiting()?;
        source
            .migrate(n2, &[&slow[..], &["--max-time", "15s"]].concat())?
            .failed(&["it took longer than 15000 ms"])?;
        source.stayed(&target)?;
    }
    let target = waiting()?;
    let migration = source.begin(n2, &[&slow[..], &["--auto-converge"]].concat())?;
    until(SOON, "the machine to be slowed down", || {
        let job = n1.virsh(&["domjobinfo", &machine])?;
        Ok(job.contains("Auto converge throttle").then_some(()))
    })?;
    migration.end()?.moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])
}
