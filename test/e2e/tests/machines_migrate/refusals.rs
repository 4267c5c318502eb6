//! What forbids a migration is told by name, and nothing has moved.

use anyhow::{Context as _, Result, ensure};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;

use crate::pod::{COUNT, Plan, Pod};

/// Namespace of the target's offer in its domain's metadata.
const OFFER: &str = "https://dyad.dev/migration/offer/1";

/// Of the source, the destination and the parameters.
pub fn what_forbids_it_is_told_before_anything_moves(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    source
        .migrate(n2, &[])?
        .refused(&["no target waits", &machine])?;
    source
        .migrate(n1, &[])?
        .refused(&["this node's own libvirt"])?;
    source
        .migrate_to("qemu+unix:///system?socket=/nowhere", &[])?
        .refused(&["destination"])?;
    let usage = n1.dyadctl(&["migrate", &source.id, "--to", "node2"])?;
    ensure!(usage.stderr.contains("is no URI"), "{}", usage.stderr);
    let target = Pod::waiting(n2, &machine)?;
    source.migrate(n2, &["--tls"])?.refused(&["unix sockets"])?;
    let anywhere = "tcp://127.0.0.1";
    let over_tcp = ["--migrate-uri", anywhere, "--disks-uri", anywhere];
    source.migrate(n2, &over_tcp)?.refused(&["in clear"])?;
    let odd = n2.crictl().runp("dyad-vm", &{
        let mut config = target.config.clone();
        config["metadata"]["uid"] = "uid-odd".into();
        config["metadata"]["name"] = "odd".into();
        config["annotations"]["dyad.dev/migration-source"] = "not-a-uuid".into();
        config
    });
    let error = odd.map_or_else(|error| format!("{error:#}"), |id| format!("ran as {id}"));
    ensure!(error.contains("migration-source"), "{error}");

    // Under way: not twice; cancelled, it runs on.
    let first = source.begin_slowly(n2, &[])?;
    source.migrate(n2, &[])?.refused(&["migrating"])?;
    let exec = n1.crictl().exec(&source.container, &["true"])?;
    ensure!(exec.stderr.contains("is migrating"), "{}", exec.stderr);
    source.cancel()?.success("dyadctl migrate --cancel")?;
    first.end()?.failed(&["cancelled"])?;
    source.stayed(&target)?;
    let late = source.cancel()?;
    ensure!(
        late.code() == 4 && late.stderr.contains("no migration under way"),
        "{}",
        late.stderr
    );
    n1.dyadctl(&["pause", &source.id])?.success("pause")?;
    source.migrate(n2, &[])?.refused(&["paused"])
}

/// Of a target that is not as the source.
pub fn a_target_that_does_not_fit_is_refused(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let plan = || Plan::of(COUNT).from(&machine);
    for (target, words) in [
        (
            plan().container("other"),
            "container app is not in the target pod",
        ),
        (plan().image("dyad.test/multi:1"), "has other content"),
        (plan().disk("2Gi"), "dyad.dev/disk"),
        (plan().memory(128, 64), "give the target the same limits"),
    ] {
        let target = Pod::run(n2, &target)?;
        source.migrate(n2, &[])?.refused(&[words])?;
        drop(target);
    }
    // As another release says it, and a node without space.
    let target = Pod::waiting(n2, &machine)?;
    let offer = n2.virsh(&["metadata", &machine, OFFER, "--config"])?;
    for (key, value, words) in [
        ("release", "\"0.0.1\"".into(), "the target runs dyad 0.0.1"),
        ("free_bytes", "4096".to_owned(), "no space"),
        ("version", "99".into(), "version 99"),
    ] {
        say(n2, &machine, &with(&offer, key, &value)?)?;
        source.migrate(n2, &[])?.refused(&[words])?;
    }
    let (other, told) = match offer.contains("tcg") {
        true => ("\"kvm\"", "by Kvm"),
        false => ("\"tcg\"", "by Tcg"),
    };
    say(n2, &machine, &with(&offer, "accelerator", other)?)?;
    source.migrate(n2, &[])?.refused(&[told])?;
    // Somebody else's definition.
    n2.virsh(&["metadata", &machine, OFFER, "--config", "--remove"])?;
    source.migrate(n2, &[])?.refused(&["waits for nobody"])?;
    say(n2, &machine, &offer)?;
    // One that the source does not have.
    let extra = target.begin_one("extra", "dyad.test/busybox:1", "sleep 1000")?;
    source
        .migrate(n2, &[])?
        .refused(&["container extra of the target pod does not run here"])?;
    // It is killed: nobody waits for it any more.
    n2.crictl().stop(&extra, 0)?;

    // Without KVM, QEMU cannot move memory that was added.
    let grown = Pod::run(n1, &Plan::of(COUNT).memory(256, 128))?;
    grown.resize(Some(192), None)?;
    let machine = grown.machine()?;
    let waiting = Pod::run(n2, &Plan::of(COUNT).from(&machine).memory(320, 192))?;
    let emulated = n1
        .virsh(&["dumpxml", &machine])?
        .contains("<domain type='qemu'");
    let ended = grown.migrate(n2, &[])?;
    if emulated {
        ended.refused(&["the 64 MiB that were added"])?;
        grown.goes_on()?;
    } else {
        ended.moved()?;
        waiting.goes_on()?;
    }
    drop(waiting);

    source.migrate(n2, &[])?.moved()?;
    target.goes_on()
}

fn say(env: &Env, machine: &str, offer: &str) -> Result<()> {
    let set = ["--config", "--key", "dyadoffer", "--set", offer];
    env.virsh(&[&["metadata", machine, OFFER], &set[..]].concat())
        .map(drop)
}

/// The offer's JSON with another value of a key.
fn with(offer: &str, key: &str, value: &str) -> Result<String> {
    let quote = if offer.contains("&quot;") {
        "&quot;"
    } else {
        "\""
    };
    let start = format!("{quote}{key}{quote}:");
    let (before, rest) = offer
        .split_once(&start)
        .with_context(|| format!("no {key} in {offer}"))?;
    let end = rest.find([',', '}']).context("no end")?;
    let value = value.replace('"', quote);
    Ok(format!("{before}{start}{value}{}", &rest[end..]))
}
