//! A migration that takes too long.

use anyhow::Result;
use dyad_e2e::nodes::Nodes;

use crate::pod::{Pod, seamless};

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
