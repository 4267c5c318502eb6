//! The shim without the CRI plugin: `ctr run`, as any client of containerd would.

use std::time::Duration;

use anyhow::{Context as _, Result};
use dyad_e2e::command::{self, Done};
use dyad_e2e::wait::until;

use super::{CONTAINERS, Case, case};
use crate::context::{Context, Handler, SOON, names, same};

pub const CASES: &[Case] = &[
    case!(ctr_run_gives_output_and_exit_code)
        .on(CONTAINERS)
        .short(),
    case!(ctr_sees_a_paused_task_as_paused).on(CONTAINERS),
    case!(rlimits_reach_the_process).on(CONTAINERS),
];

/// `ctr` in a containerd namespace of the handler's own, that CRI does not look into:
/// trials of several handlers run at once, under the same ids.
fn ctr(context: &Context<'_>, args: &[&str]) -> Result<Done> {
    let namespace = format!("e2e-{}", context.handler.name());
    let mut ctr = context.env.ctr_command(&namespace);
    command::run(ctr.args(args), b"", Duration::from_secs(60))
}

/// The test image in this namespace too: from the file that `hack/up` has it from, since
/// `ctr images export` may end before all of its stream is written (seen with 2.3.4).
fn import(context: &Context<'_>) -> Result<()> {
    let tar = context.env.dir.join("images/busybox.tar");
    ctr(context, &["images", "import", &tar.display().to_string()])?
        .success("ctr images import")?;
    Ok(())
}

/// `ctr run` with the handler's runtime.
fn run(context: &Context<'_>, flags: &[&str], id: &str, program: &[&str]) -> Result<Done> {
    import(context)?;
    let config = context.env.config_file("dyad").display().to_string();
    let runtime = match context.handler {
        Handler::Runc => vec!["--runtime", "io.containerd.runc.v2"],
        _ => {
            vec![
                "--runtime",
                "io.containerd.dyad.v2",
                "--runtime-config-path",
                &config,
            ]
        }
    };
    let args = [
        &["run"],
        runtime.as_slice(),
        flags,
        &[crate::context::BUSYBOX, id],
        program,
    ]
    .concat();
    ctr(context, &args)
}

fn ctr_run_gives_output_and_exit_code(context: &Context<'_>) -> Result<()> {
    let done = run(
        context,
        &["--rm"],
        "exits",
        &["sh", "-c", "echo out; echo err >&2; exit 12"],
    )?;
    same("exit code", done.code(), 12)?;
    same("stdout", done.text().as_str(), "out\n")?;
    names(&done.stderr, &["err\n"])
}

fn ctr_sees_a_paused_task_as_paused(context: &Context<'_>) -> Result<()> {
    run(context, &["--detach"], "paused", &["sleep", "1000"])?.success("ctr run")?;
    let task = |args: &[&str]| ctr(context, &[&["tasks"], args].concat())?.success("ctr tasks");
    let status = || -> Result<String> {
        let table = task(&["ls"])?.text();
        let line = table
            .lines()
            .find(|line| line.starts_with("paused "))
            .context("no such task")?;
        Ok(line
            .split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned())
    };
    let result = (|| {
        same("status", status()?.as_str(), "RUNNING")?;
        task(&["pause", "paused"])?;
        same("status", status()?.as_str(), "PAUSED")?;
        task(&["resume", "paused"])?;
        same("status", status()?.as_str(), "RUNNING")?;
        task(&["kill", "--signal", "SIGKILL", "paused"])?;
        until(SOON, "the task to stop", || {
            Ok((status()? == "STOPPED").then_some(()))
        })
    })();
    let _ = ctr(context, &["tasks", "delete", "--force", "paused"]);
    let _ = ctr(context, &["containers", "delete", "paused"]);
    result
}

fn rlimits_reach_the_process(context: &Context<'_>) -> Result<()> {
    let done = run(
        context,
        &["--rm", "--rlimit-nofile", "1234"],
        "limited",
        &["sh", "-c", "ulimit -n"],
    )?;
    same(
        "open files",
        done.success("ctr run")?.text().as_str(),
        "1234\n",
    )
}
