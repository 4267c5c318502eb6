//! What goes on without a seam.

use std::io::{BufRead as _, BufReader, Lines};
use std::net::TcpStream;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use dyad_e2e::nodes::Nodes;
use dyad_e2e::wait::until;

use crate::pod::{COUNT, DIRTY, Plan, Pod, SOON, connected, seamless};

/// Reads the counter's lines up to `end`, which must come in order.
fn read(lines: &mut Lines<BufReader<TcpStream>>, next: &mut u64, end: u64) -> Result<()> {
    while *next < end {
        let line = lines.next().context("the connection ended")??;
        ensure!(line == format!("t {next}"), "{line} and not t {next}");
        *next += 1;
    }
    Ok(())
}

/// Log, connection, exec, address and identity; and there and back again.
pub fn an_idle_machine_moves_without_a_seam(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let stream = connected(&source.ip()?)?;
    stream.set_read_timeout(Some(SOON))?;
    let (mut lines, mut next) = (BufReader::new(stream).lines(), 0);
    read(&mut lines, &mut next, 5)?;
    let target = Pod::waiting(n2, &machine)?;
    ensure!(target.state()?.contains("incoming"), "{}", target.state()?);
    let exec = n2.crictl().exec(&target.container, &["true"])?;
    ensure!(
        exec.stderr.contains("waits for its migration source"),
        "{}",
        exec.stderr
    );

    source.migrate(n2, &[])?.moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])?;
    // One word each 100 ms, and the switch.
    eprintln!("  silent for {:?}", source.silence_before(&target)?);
    // The connection from before, to the address from before. Both counters began at about
    // the same time, so that what comes from here on was sent from there.
    let count = target.numbers()?.last().copied().unwrap_or_default();
    read(&mut lines, &mut next, count + 20)?;
    // One connection at a time is served; the next is to the target pod's own address.
    drop(lines);
    connected(&target.ip()?)?;
    let exec = n2
        .crictl()
        .exec(&target.container, &["sh", "-c", "ip -4 addr; exit 7"])?;
    ensure!(exec.stderr.contains("exit code 7"), "{}", exec.stderr);
    ensure!(exec.text().contains(&target.ip()?), "{}", exec.text());
    ensure!(target.machine()? == machine, "the machine has another name");
    let code = source.ended()?;
    ensure!(code == 0, "exit code {code}");

    // kubelet would make another sandbox for the same pod: the fence holds, also after a
    // restart of containerd.
    n1.crictl().rmp_force(&source.id)?;
    for restart in [false, true] {
        if restart {
            n1.kill_and_restart("containerd")?;
        }
        let again = n1.crictl().runp("dyad-vm", &source.config);
        let error = again.map_or_else(|error| format!("{error:#}"), |id| format!("ran as {id}"));
        ensure!(error.contains("must not run here again"), "{error}");
    }

    let back = Pod::waiting(n1, &machine)?;
    target.migrate(n1, &[])?.moved()?;
    back.goes_on()?;
    seamless(&[&source, &target, &back]).context("on the way back")?;
    n1.crictl().stop(&back.container, 2)?;
    let exit = n1.crictl().status(&back.container)?.exit_code;
    // SIGTERM, or SIGKILL after it.
    ensure!([143, 137].contains(&exit), "exit code {exit}");
    Ok(())
}

/// A size that was changed, an exec, a volume that was copied in, and statistics.
pub fn what_a_pod_has_goes_along(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let plan = Plan::of(COUNT).config_map("of the source");
    let source = Pod::run(n1, &plan.clone().cpus(1))?;
    source.counts_beyond(3)?;
    let machine = source.machine()?;
    let cpus = |pod: &Pod<'_>| -> Result<u64> { Ok(pod.output("nproc")?.trim().parse()?) };
    source.resize(None, Some(2))?;
    ensure!(cpus(&source)? == 2, "not 2 CPUs after an update");
    ensure!(source.output("cat /settings/key")? == "of the source");
    let script = "i=0; while :; do echo $i >/exec; i=$((i+1)); sleep 0.1; done";
    let mut attached = n1
        .crictl()
        .command()
        .args(["exec", &source.container, "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    until(SOON, "the exec to count", || {
        source.output("cat /exec").map(Some)
    })?;
    let used = cpu_ns(&source)?;
    ensure!(used > 0, "no CPU was used");

    let plan = plan.from(&machine).config_map("of the target").cpus(2);
    let target = Pod::run(n2, &plan)?;
    source.migrate(n2, &[])?.moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])?;
    ensure!(cpus(&target)? == 2, "the size that was changed is lost");
    ensure!(target.state()?.contains("2 vCPU"), "{}", target.state()?);
    // Who attached to it is cut off; the process is not.
    let cut = until(SOON, "the attached crictl to end", || {
        Ok(attached.try_wait()?)
    })?;
    ensure!(!cut.success(), "an exec that was cut off succeeded");
    let count = || -> Result<u64> { Ok(target.output("cat /exec")?.trim().parse()?) };
    let first = count()?;
    until(SOON, "the exec to go on", || {
        Ok((count()? > first + 3).then_some(()))
    })?;
    until(SOON, "the volume to follow the target's", || {
        Ok((target.output("cat /settings/key")? == "of the target").then_some(()))
    })?;
    let later = cpu_ns(&target)?;
    ensure!(later > used, "{later} ns of CPU there, {used} here");
    // It can still be resized.
    target.resize(None, Some(1))?;
    ensure!(cpus(&target)? == 1, "not 1 CPU after an update");
    Ok(())
}

/// As kubelet makes it: each after the one before has ended.
pub fn init_containers_have_done_their_work(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let (own, other) = ("dyad.test/busybox:1", "dyad.test/multi:1");
    let plan = Plan::of(COUNT)
        .init("load", other, "echo loaded")
        .init("look", own, "echo looked");
    let source = Pod::run(n1, &plan)?;
    source.counts_beyond(3)?;
    ensure!(
        source.out_of("load") == "loaded\n",
        "{}",
        source.out_of("load")
    );
    let target = Pod::run(n2, &plan.from(&source.machine()?))?;
    ensure!(target.state()?.contains("incoming"), "{}", target.state()?);
    source.migrate(n2, &[])?.moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])?;
    for name in ["load", "look"] {
        let out = target.out_of(name);
        ensure!(out.is_empty(), "{name} has run on the target, too: {out}");
    }
    // What was unplugged there can be plugged in here.
    target.run_to_end("late", other, "echo late")?;
    ensure!(
        target.out_of("late") == "late\n",
        "{}",
        target.out_of("late")
    );
    Ok(())
}

fn cpu_ns(pod: &Pod<'_>) -> Result<u64> {
    let stats = pod.env.crictl().stats(&pod.container)?;
    let used = stats["cpu"]["usageCoreNanoSeconds"]["value"].as_str();
    used.with_context(|| format!("no CPU usage in {stats}"))?
        .parse()
        .context("CPU usage")
}

/// Memory that changes while it is copied arrives as it was last.
pub fn memory_that_changes_arrives_whole(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    moves_whole([n1, n2], &[])?;
    moves_whole([n2, n1], &["--auto-converge"])
}

fn moves_whole([from, to]: [&dyad_e2e::env::Env; 2], options: &[&str]) -> Result<()> {
    let source = Pod::run(from, &Plan::of(DIRTY))?;
    source.counts_beyond(3)?;
    let target = Pod::run(to, &Plan::of(DIRTY).from(&source.machine()?))?;
    source.migrate(to, options)?.moved()?;
    // Each of the 16 files was compared at least once.
    target.goes_on()?;
    let first = target.numbers()?[0];
    target.counts_beyond(first + 16)?;
    seamless(&[&source, &target])?;
    let out = target.out();
    ensure!(!out.contains("differs"), "{out}");
    Ok(())
}
