//! Dyad on a node as users have it: Debian with systemd, cgroup v2 only, AppArmor, its own
//! libvirtd and QEMU, in an emulated machine that `hack/vm` makes. `hack/test --vm` runs them.
//!
//! Environment: `DYAD_VM_DIR` (the node's folder, default /tmp/dyad-vm), `DYAD_VM_NO_UP=1` (the
//! node runs already, as it is), `DYAD_VM_KEEP=1` (leave it up), `DYAD_VM_PROFILE` (release or dev).

mod containers;
mod machines;
mod node;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use containers::Driver;
use machines::{Accelerator, Machine};
use node::Node;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // Two emulated CPUs bear one pod at a time.
    args.test_threads = Some(1);
    let node = Arc::new(Node::new());
    if !args.list
        && let Err(error) = node.up()
    {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let conclusion = libtest_mimic::run(&args, trials(&node));
    if !args.list {
        node.down();
    }
    conclusion.exit_code()
}

fn trials(node: &Arc<Node>) -> Vec<Trial> {
    let mut trials = vec![trial(
        node,
        "dyadctl_check_finds_nothing_that_fails",
        machines::check,
    )];
    for (name, handler, driver) in [
        ("dyad::lives_by_cgroupfs", "dyad", Driver::Cgroupfs),
        ("dyad::lives_by_systemd", "dyad", Driver::Systemd),
        (
            "dyad_sandboxed::lives_by_cgroupfs",
            "dyad-sandboxed",
            Driver::Cgroupfs,
        ),
        (
            "dyad_sandboxed::lives_by_systemd",
            "dyad-sandboxed",
            Driver::Systemd,
        ),
    ] {
        trials.push(trial(node, name, move |node| {
            containers::life(node, handler, driver)
        }));
    }
    for (name, machine) in [
        (
            "dyad_vm::with_the_default_configuration_by_systemd",
            Machine {
                handler: "dyad-vm",
                driver: Driver::Systemd,
                accelerator: Accelerator::Kvm,
                vsock: false,
            },
        ),
        (
            "dyad_vm::by_vsock_and_cgroupfs",
            Machine {
                handler: "dyad-vm-vsock",
                driver: Driver::Cgroupfs,
                accelerator: Accelerator::Kvm,
                vsock: true,
            },
        ),
        (
            "dyad_vm::emulated",
            Machine {
                handler: "dyad-vm-tcg",
                driver: Driver::Systemd,
                accelerator: Accelerator::Tcg,
                vsock: false,
            },
        ),
    ] {
        trials.push(trial(node, name, move |node| machines::life(node, machine)));
    }
    trials
}

fn trial(
    node: &Arc<Node>,
    name: &str,
    run: impl FnOnce(&Node) -> Result<()> + Send + 'static,
) -> Trial {
    let node = Arc::clone(node);
    let told = name.to_owned();
    Trial::test(name, move || {
        run(&node).map_err(|error| {
            // At once, too: a long run that is ended early told of it.
            eprintln!("{told}: {error:#}");
            if let Err(error) = node.clean() {
                eprintln!("{told}: clean up: {error:#}");
            }
            Failed::from(format!("{error:#}"))
        })
    })
}
