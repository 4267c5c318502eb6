//! The benchmark: Dyad beside what it is measured against, in one run, interleaved.
//! `test/bench` runs it; its table is the one in the README.
#![forbid(unsafe_code)]

mod containers;
mod cri;
mod lifecycle;
mod machines;
mod migrate;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use dyad_e2e::env::{Build, Env, Version};
use dyad_e2e::nodes::Nodes;

/// More of these would only take time.
const IN_PLACE_RUNS: usize = 5;

/// Measures Dyad against containerd's own runc shim and against plain libvirt, and
/// prints a Markdown table. Needs root. Takes about 7 minutes with the default counts.
#[derive(Parser)]
#[command(name = "test/bench")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    /// How often the pods of the container kind are measured, per shim.
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// How often the machine kind is measured, and the plain domain.
    #[arg(long, default_value_t = 10)]
    machine_runs: usize,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Place {
    /// Scratch folder of the environment; it is taken down at the end.
    #[arg(long, default_value = "/tmp/dyad-bench")]
    dir: PathBuf,
    /// Use the shim and the guest as they were built last.
    #[arg(long)]
    no_build: bool,
}

impl Place {
    fn build(&self) -> Build {
        if self.no_build {
            Build::AsIs
        } else {
            Build::Fresh
        }
    }
}

#[derive(Subcommand)]
enum What {
    /// Measures migration between two nodes beside plain `virsh migrate`: how long it takes,
    /// and for how long the machine does not answer. Takes about 5 minutes with the
    /// default count.
    Migrate {
        /// How often each of the two machines (idle, dirtying) is moved, by each of both.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        #[command(flatten)]
        place: Place,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    if let Some(What::Migrate { runs, place }) = &arguments.what {
        let nodes = Nodes::up_in(&place.dir, place.build())?;
        let rows = runtime.block_on(migrate::measure(&nodes, *runs))?;
        println!("{}\n{}", table::render(&rows), host_facts(&nodes.nodes[0])?);
        return Ok(());
    }
    let env = Env::up(Version::V2_3, &arguments.place.dir, arguments.place.build())?;
    let result = runtime.block_on(measure(&env, &arguments));
    let down = env.down();
    println!("{}", result?);
    down
}

async fn measure(env: &Env, arguments: &Arguments) -> Result<String> {
    let mut cri = cri::Cri::connect(&env.dir.join("containerd/containerd.sock")).await?;
    let mut rows = Vec::new();
    if arguments.runs > 0 {
        rows.extend(containers::measure(env, &mut cri, arguments.runs).await?);
        rows.push(containers::memory(env, &mut cri).await?);
        rows.extend(lifecycle::containers(env, &mut cri, arguments.runs.min(IN_PLACE_RUNS)).await?);
    }
    if arguments.machine_runs > 0 {
        rows.extend(machines::measure(env, &mut cri, arguments.machine_runs).await?);
        let runs = arguments.machine_runs.min(IN_PLACE_RUNS);
        rows.extend(lifecycle::machines(env, &mut cri, runs).await?);
    }
    Ok(format!("{}\n{}", table::render(&rows), host_facts(env)?))
}

/// What the numbers depend on.
fn host_facts(env: &Env) -> Result<String> {
    let first_line = |program: PathBuf, args: &[&str]| -> String {
        let mut command = std::process::Command::new(program);
        dyad_e2e::command::run(command.args(args), b"", Duration::from_secs(20))
            .map(|done| {
                done.text()
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            })
            .unwrap_or_else(|error| format!("unknown ({error:#})"))
    };
    let cores = std::thread::available_parallelism().context("count the cores")?;
    let containerd = first_line(env.program("containerd"), &["--version"]);
    // "containerd github.com/containerd/containerd/v2 2.3.4 ..."
    let containerd = containerd
        .split(' ')
        .nth(2)
        .unwrap_or(&containerd)
        .to_owned();
    Ok(format!(
        "Host: {cores} cores, kernel {}; containerd {containerd}, {}, {}, libvirt {}; accelerator {}.",
        first_line("uname".into(), &["-r"]),
        first_line(env.program("runc"), &["--version"]),
        hypervisor(env),
        first_line("virsh".into(), &["--version"]),
        machines::accelerator(env),
    ))
}

/// The QEMU that libvirt runs, which is not the host's on nodes that migrate.
fn hypervisor(env: &Env) -> String {
    let told = env.virsh(&["version"]).unwrap_or_default();
    told.lines()
        .find_map(|line| line.strip_prefix("Running hypervisor: "))
        .unwrap_or("QEMU unknown")
        .to_owned()
}
