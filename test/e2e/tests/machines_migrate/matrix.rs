//! Who dies, and when: the machine runs on exactly one side, or its loss is told.

use anyhow::{Context as _, Result, ensure};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};

use crate::pod::{Held, Migration, Pod, SOON, seamless};

/// Whom the failure hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    SourceQemu,
    TargetQemu,
    SourceShim,
    TargetShim,
    SourceLibvirtd,
    TargetLibvirtd,
    /// The one who asked wants it no more.
    Nobody,
}

/// What is to come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The source runs on, the target never ran.
    SourceRuns,
    /// It runs there, without a seam.
    TargetRuns,
    /// It runs nowhere, and both pods say so.
    BothEnd,
    /// The source's pod has ended as without a migration; the target never ran.
    SourceEnds,
}

impl Victim {
    fn hit(self, source: &Pod<'_>, target: &Pod<'_>) -> Result<()> {
        let machine = source.machine()?;
        let process = match self {
            Self::SourceQemu => source.qemu(&machine)?,
            Self::TargetQemu => target.qemu(&machine)?,
            Self::SourceShim => source.shim()?,
            Self::TargetShim => target.shim()?,
            Self::SourceLibvirtd => return source.env.kill_and_restart("libvirtd"),
            Self::TargetLibvirtd => return target.env.kill_and_restart("libvirtd"),
            Self::Nobody => {
                // It may be too late for that: what then happens is what is looked at.
                return source.cancel().map(drop);
            }
        };
        kill(process, Signal::SIGKILL).with_context(|| format!("kill {self:?}"))
    }
}

/// The two that are met most often, as a part of every run.
pub fn exactly_one_whoever_dies(nodes: &Nodes) -> Result<()> {
    each(
        nodes,
        copying,
        &[
            (Victim::TargetQemu, Then::SourceRuns),
            (Victim::TargetShim, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_before_anything_moves(nodes: &Nodes) -> Result<()> {
    each(
        nodes,
        preparing,
        &[
            (Victim::SourceQemu, Then::SourceEnds),
            (Victim::SourceShim, Then::SourceEnds),
            (Victim::TargetShim, Then::SourceRuns),
            // The shim connects again, and looks again.
            (Victim::SourceLibvirtd, Then::TargetRuns),
            (Victim::Nobody, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_while_memory_is_copied(nodes: &Nodes) -> Result<()> {
    each(
        nodes,
        copying,
        &[
            (Victim::SourceQemu, Then::SourceEnds),
            (Victim::SourceShim, Then::SourceEnds),
            (Victim::SourceLibvirtd, Then::SourceRuns),
            (Victim::TargetLibvirtd, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_while_memory_is_fetched(nodes: &Nodes) -> Result<()> {
    each(
        nodes,
        fetching,
        &[
            (Victim::SourceQemu, Then::BothEnd),
            (Victim::TargetQemu, Then::BothEnd),
            (Victim::TargetShim, Then::BothEnd),
            (Victim::Nobody, Then::TargetRuns),
        ],
    )
}

type Begin = fn(&Pod<'_>, &Pod<'_>) -> Result<(Migration, Option<Held>)>;

fn each(nodes: &Nodes, begin: Begin, cases: &[(Victim, Then)]) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    for (victim, then) in cases {
        let began = std::time::Instant::now();
        case([n1, n2], begin, *victim, *then).with_context(|| format!("{victim:?}"))?;
        eprintln!("  {victim:?}: {then:?} ({} s)", began.elapsed().as_secs());
    }
    Ok(())
}

fn case([n1, n2]: [&Env; 2], begin: Begin, victim: Victim, then: Then) -> Result<()> {
    let source = Pod::counting(n1)?;
    let target = Pod::waiting(n2, &source.machine()?)?;
    let (migration, held) = begin(&source, &target)?;
    victim.hit(&source, &target)?;
    drop(held);
    let ended = migration.end()?;
    match then {
        Then::SourceRuns => {
            ensure!(ended.moved().is_err(), "dyadctl told of a success");
            source.stayed(&target)
        }
        Then::TargetRuns => {
            target.goes_on()?;
            seamless(&[&source, &target])?;
            ensure!(source.ended()? == 0, "the source ended otherwise");
            Ok(())
        }
        Then::SourceEnds | Then::BothEnd => {
            ensure!(ended.moved().is_err(), "dyadctl told of a success");
            let code = source.ended()?;
            ensure!(code != 0, "the source's container ended with 0");
            ends_or_waits(&target, then == Then::BothEnd)
        }
    }
}

/// It does not run; it told so, where it had been begun.
fn ends_or_waits(target: &Pod<'_>, told: bool) -> Result<()> {
    if told {
        let code = target.ended()?;
        ensure!(code != 0, "the target's container ended with 0");
    } else {
        ensure!(target.numbers()?.is_empty(), "the target has run");
    }
    until(SOON, "no machine to be active", || {
        let active = target.env.virsh(&["list", "--name"])?;
        Ok(active.trim().is_empty().then_some(()))
    })
}

/// Asked for, and the target's libvirtd has not answered.
fn preparing(source: &Pod<'_>, target: &Pod<'_>) -> Result<(Migration, Option<Held>)> {
    let held = Held::hold(target.env.daemon("libvirtd")?)?;
    let first = source.begin(target.env, &[])?;
    let migration = first.the_one_under_way(source.begin(target.env, &[])?)?;
    Ok((migration, Some(held)))
}

fn copying(source: &Pod<'_>, target: &Pod<'_>) -> Result<(Migration, Option<Held>)> {
    Ok((source.begin_slowly(target.env, &[])?, None))
}

/// It runs there, and most of its memory is still here.
fn fetching(source: &Pod<'_>, target: &Pod<'_>) -> Result<(Migration, Option<Held>)> {
    let machine = source.machine()?;
    let migration =
        source.begin_slowly(target.env, &["--max-time", "20s", "--then", "post-copy"])?;
    // The bound before the switch does not hold after it.
    source
        .env
        .virsh(&["migrate-setspeed", &machine, "2", "--postcopy"])?;
    until(SOON, "the machine to run there", || {
        let there = target.env.virsh(&["domstate", &machine, "--reason"])?;
        Ok(there.contains("post-copy").then_some(()))
    })?;
    Ok((migration, None))
}
