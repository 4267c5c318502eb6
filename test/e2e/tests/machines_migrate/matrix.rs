//! Who dies, and when: the machine runs on exactly one side, or its loss is told.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::{Cut, Nodes};
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
    /// The nodes are cut off from each other, until all has been looked at.
    Network,
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
    /// It runs there, and nobody told it which output was in the source's log already.
    TargetRepeats,
    /// It had moved; then the target's pod has ended as any pod does.
    TargetEnds,
    /// It runs nowhere, and both pods say so.
    BothEnd,
    /// The source's pod has ended as without a migration; the target never ran.
    SourceEnds,
}

/// How the nodes' libvirts and QEMUs reach each other.
struct Way<'a> {
    nodes: &'a Nodes,
    uri: String,
    options: Vec<String>,
}

type Begun = (Migration, Option<Held>);
type Begin = fn(&Pod<'_>, &Pod<'_>, &str, &Way<'_>) -> Result<Begun>;

/// The two that are met most often, as a part of every run.
pub fn exactly_one_whoever_dies(nodes: &Nodes) -> Result<()> {
    Way::of_one_host(nodes).each(
        copying,
        &[
            (Victim::TargetQemu, Then::SourceRuns),
            (Victim::TargetShim, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_before_anything_moves(nodes: &Nodes) -> Result<()> {
    Way::of_one_host(nodes).each(
        preparing,
        &[
            (Victim::SourceQemu, Then::SourceEnds),
            (Victim::SourceShim, Then::SourceEnds),
            (Victim::TargetShim, Then::SourceRuns),
            // The shim connects again, and looks again.
            (Victim::SourceLibvirtd, Then::TargetRuns),
            (Victim::TargetLibvirtd, Then::SourceRuns),
            (Victim::Nobody, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_while_memory_is_copied(nodes: &Nodes) -> Result<()> {
    Way::of_one_host(nodes).each(
        copying,
        &[
            (Victim::SourceQemu, Then::SourceEnds),
            (Victim::SourceShim, Then::SourceEnds),
            (Victim::SourceLibvirtd, Then::SourceRuns),
            (Victim::TargetLibvirtd, Then::SourceRuns),
            (Victim::Nobody, Then::SourceRuns),
        ],
    )
}

pub fn who_dies_while_memory_is_fetched(nodes: &Nodes) -> Result<()> {
    Way::of_one_host(nodes).each(
        fetching,
        &[
            (Victim::SourceQemu, Then::BothEnd),
            (Victim::TargetQemu, Then::BothEnd),
            (Victim::SourceShim, Then::BothEnd),
            (Victim::TargetShim, Then::BothEnd),
            (Victim::SourceLibvirtd, Then::TargetRuns),
            (Victim::TargetLibvirtd, Then::TargetRuns),
            (Victim::Nobody, Then::TargetRuns),
        ],
    )
}

pub fn who_dies_after_the_switch(nodes: &Nodes) -> Result<()> {
    let way = Way::of_one_host(nodes);
    // (libvirt ends the source's QEMU at once.)
    way.each(switched, &[(Victim::SourceLibvirtd, Then::TargetRuns)])?;
    way.each(
        moved,
        &[
            (Victim::TargetQemu, Then::TargetEnds),
            (Victim::SourceShim, Then::TargetRepeats),
            (Victim::TargetShim, Then::TargetEnds),
            (Victim::TargetLibvirtd, Then::TargetRepeats),
        ],
    )?;
    way.each(untold, &[(Victim::Nobody, Then::TargetRuns)])
}

pub fn the_network_breaks_off_in_each_phase(nodes: &Nodes) -> Result<()> {
    let listens = Listens::on(&nodes.nodes[1])?;
    let way = Way::of_network(nodes)?;
    way.each(preparing, &[(Victim::Network, Then::SourceRuns)])?;
    way.each(copying, &[(Victim::Network, Then::SourceRuns)])?;
    way.each(fetching, &[(Victim::Network, Then::BothEnd)])?;
    way.each(moved, &[(Victim::Network, Then::TargetRepeats)])?;
    listens.no_more()
}

impl<'a> Way<'a> {
    fn of_one_host(nodes: &'a Nodes) -> Self {
        Self {
            nodes,
            uri: nodes.nodes[1].libvirt_uri(),
            options: Vec::new(),
        }
    }

    fn of_network(nodes: &'a Nodes) -> Result<Self> {
        let address = nodes.address(2)?;
        let streams = format!("tcp://{address}");
        let options = [
            "--migrate-uri",
            &streams,
            "--disks-uri",
            &streams,
            "--allow-clear",
        ];
        Ok(Self {
            nodes,
            uri: format!("qemu+tcp://{address}/system"),
            options: options.map(str::to_owned).to_vec(),
        })
    }

    fn options<'b>(&'b self, more: &[&'b str]) -> Vec<&'b str> {
        let own = self.options.iter().map(String::as_str);
        own.chain(more.iter().copied()).collect()
    }

    fn each(&self, begin: Begin, cases: &[(Victim, Then)]) -> Result<()> {
        let mut wrong = Vec::new();
        for (victim, then) in cases {
            let began = Instant::now();
            let told = self.case(begin, *victim, *then);
            let all = began.elapsed().as_secs();
            match told {
                Ok(told) => {
                    eprintln!("  {victim:?}: {then:?} (told after {told:.1} s, {all} s in all)");
                }
                Err(error) => wrong.push(format!("{victim:?}: {error:#}")),
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }

    /// Seconds from the failure until dyadctl told what came of it.
    fn case(&self, begin: Begin, victim: Victim, then: Then) -> Result<f64> {
        let [n1, n2] = &self.nodes.nodes;
        let source = Pod::counting(n1)?;
        let machine = source.machine()?;
        let target = Pod::waiting(n2, &machine)?;
        let (migration, held) = begin(&source, &target, &machine, self)?;
        let since = Instant::now();
        let cut = victim.hit(self.nodes, &source, &target, &machine)?;
        drop(held);
        let ended = migration.end()?;
        let told = since.elapsed().as_secs_f64();
        match then {
            Then::SourceRuns => {
                ensure!(ended.moved().is_err(), "dyadctl told of a success");
                source.stayed(&target)?;
                ensure!(!tombstone(&source).exists(), "the fence stands");
            }
            Then::TargetRuns => {
                ended.moved()?;
                target.goes_on()?;
                seamless(&[&source, &target])?;
                ensure!(source.ended()? == 0, "the source ended otherwise");
            }
            Then::TargetRepeats => {
                target.goes_on()?;
                nothing_lost(&source, &target)?;
                source.ended()?;
            }
            Then::TargetEnds => {
                ended.moved()?;
                ensure!(source.ended()? == 0, "the source ended otherwise");
                ends(&target)?;
            }
            Then::SourceEnds => {
                ensure!(ended.moved().is_err(), "dyadctl told of a success");
                ends(&source)?;
                ensure!(target.numbers()?.is_empty(), "the target has run");
            }
            Then::BothEnd => {
                ensure!(ended.moved().is_err(), "dyadctl told of a success");
                ends(&source)?;
                ends(&target)?;
            }
        }
        let runs_there = matches!(then, Then::TargetRuns | Then::TargetRepeats);
        if !runs_there {
            is_off(n2)?;
        }
        if then != Then::SourceRuns {
            is_off(n1)?;
        }
        drop(cut);
        if runs_there {
            target.goes_on()?;
        }
        if !matches!(then, Then::SourceRuns | Then::SourceEnds) {
            must_not_run_again(&source)?;
        }
        Ok(told)
    }
}

impl Victim {
    fn hit<'a>(
        self,
        nodes: &'a Nodes,
        source: &Pod<'_>,
        target: &Pod<'_>,
        machine: &str,
    ) -> Result<Option<Cut<'a>>> {
        let process = match self {
            Self::SourceQemu => source.qemu(machine)?,
            Self::TargetQemu => target.qemu(machine)?,
            Self::SourceShim => source.shim()?,
            Self::TargetShim => target.shim()?,
            Self::SourceLibvirtd => {
                return source.env.kill_and_restart("libvirtd").map(|()| None);
            }
            Self::TargetLibvirtd => {
                return target.env.kill_and_restart("libvirtd").map(|()| None);
            }
            Self::Network => return nodes.cut().map(Some),
            // It may be too late for that: what then happens is what is looked at.
            Self::Nobody => return source.cancel().map(|_| None),
        };
        kill(process, Signal::SIGKILL).with_context(|| format!("kill {self:?}"))?;
        Ok(None)
    }
}

// --- Phases ----------------------------------------------------------------------

/// Asked for, and the target's libvirtd has not answered.
fn preparing(source: &Pod<'_>, target: &Pod<'_>, _: &str, way: &Way<'_>) -> Result<Begun> {
    let held = Held::hold(target.env.daemon("libvirtd")?)?;
    let begin = || source.begin_to(&way.uri, &way.options(&[]));
    let migration = begin()?.the_one_under_way(begin()?)?;
    Ok((migration, Some(held)))
}

fn copying(source: &Pod<'_>, _: &Pod<'_>, _: &str, way: &Way<'_>) -> Result<Begun> {
    let migration = source.begin_slowly_to(&way.uri, &way.options(&[]))?;
    Ok((migration, None))
}

/// It runs there, and most of its memory is still here.
fn fetching(source: &Pod<'_>, target: &Pod<'_>, machine: &str, way: &Way<'_>) -> Result<Begun> {
    // Soon: an idle machine has moved at 2 MiB/s, too.
    let post_copy = ["--max-time", "10s", "--then", "post-copy"];
    let migration = source.begin_slowly_to(&way.uri, &way.options(&post_copy))?;
    // The bound before the switch does not hold after it.
    source
        .env
        .virsh(&["migrate-setspeed", machine, "2", "--postcopy"])?;
    runs_there(target, machine, "post-copy")?;
    Ok((migration, None))
}

/// It runs there, and the libvirt here has not said so.
fn switched(source: &Pod<'_>, target: &Pod<'_>, machine: &str, way: &Way<'_>) -> Result<Begun> {
    let migration = source.begin_slowly_to(&way.uri, &way.options(&[]))?;
    source.env.virsh(&["migrate-setspeed", machine, "0"])?;
    runs_there(target, machine, "running")?;
    let held = Held::hold(source.env.daemon("libvirtd")?)?;
    Ok((migration, Some(held)))
}

/// It runs there, libvirt is done, and the shim here does not know.
fn moved(source: &Pod<'_>, _: &Pod<'_>, machine: &str, way: &Way<'_>) -> Result<Begun> {
    let migration = source.begin_slowly_to(&way.uri, &way.options(&[]))?;
    let held = Held::hold(source.shim()?)?;
    source.env.virsh(&["migrate-setspeed", machine, "0"])?;
    until(SOON, "libvirt to be done", || {
        let defined = source.env.virsh(&["list", "--all", "--name"])?;
        Ok((!defined.contains(machine)).then_some(()))
    })?;
    Ok((migration, Some(held)))
}

/// So, and the shim here is about to hear of it.
fn untold(source: &Pod<'_>, target: &Pod<'_>, machine: &str, way: &Way<'_>) -> Result<Begun> {
    let (migration, _) = moved(source, target, machine, way)?;
    Ok((migration, None))
}

fn runs_there(target: &Pod<'_>, machine: &str, how: &str) -> Result<()> {
    until(SOON, "the machine to run there", || {
        let there = target.env.virsh(&["domstate", machine, "--reason"])?;
        Ok(there.contains(how).then_some(()))
    })
}

// --- What came of it -------------------------------------------------------------

fn ends(pod: &Pod<'_>) -> Result<()> {
    let code = pod.ended()?;
    ensure!(code != 0, "the container of {} ended with 0", pod.id);
    Ok(())
}

fn is_off(node: &Env) -> Result<()> {
    until(SOON, "no machine to be active", || {
        let active = node.virsh(&["list", "--name"])?;
        Ok(active.trim().is_empty().then_some(()))
    })
}

/// Every number over both logs, in order within each.
fn nothing_lost(source: &Pod<'_>, target: &Pod<'_>) -> Result<()> {
    let (here, there) = (source.numbers()?, target.numbers()?);
    for log in [&here, &there] {
        let jump = log.windows(2).find(|pair| pair[1] != pair[0] + 1);
        ensure!(jump.is_none(), "{jump:?} in {log:?}");
    }
    let (last, first) = (here.last().copied(), there.first().copied());
    ensure!(
        first
            .zip(last)
            .is_some_and(|(first, last)| first <= last + 1),
        "the source's log ends with {last:?}, the target's begins with {first:?}"
    );
    Ok(())
}

fn tombstone(pod: &Pod<'_>) -> PathBuf {
    let file = format!("dyad/lib/migrated/k8s.io.{}.json", pod.id);
    pod.env.dir.join(file)
}

/// kubelet would make another sandbox for the same pod: it is refused, by name.
pub fn must_not_run_again(source: &Pod<'_>) -> Result<()> {
    let crictl = source.env.crictl();
    if crictl.pods()?.contains(&source.id) {
        crictl.rmp_force(&source.id)?;
    }
    match crictl.runp("dyad-vm", &source.config) {
        Ok(id) => bail!("it runs again, as {id}"),
        Err(error) => {
            let error = format!("{error:#}");
            ensure!(error.contains("must not run here again"), "{error}");
            Ok(())
        }
    }
}

// --- The network -----------------------------------------------------------------

/// A node whose libvirtd listens on its network, to whoever asks, while this is there.
struct Listens<'a> {
    node: &'a Env,
    before: String,
}

impl<'a> Listens<'a> {
    fn on(node: &'a Env) -> Result<Self> {
        let before = fs::read_to_string(Self::conf(node))?;
        let asked = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
        fs::write(Self::conf(node), format!("{before}{asked}"))?;
        let listens = Self { node, before };
        node.kill_and_restart("libvirtd")?;
        Ok(listens)
    }

    fn conf(node: &Env) -> PathBuf {
        node.dir.join("libvirt/etc/libvirtd.conf")
    }

    fn no_more(self) -> Result<()> {
        let node = self.node;
        drop(self);
        node.kill_and_restart("libvirtd")
    }
}

impl Drop for Listens<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::write(Self::conf(self.node), &self.before) {
            eprintln!("{error:#}");
        }
    }
}
