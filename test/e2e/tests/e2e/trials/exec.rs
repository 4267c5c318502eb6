//! Further processes in a running container.

use std::time::Duration;

use anyhow::{Result, bail};
use dyad_e2e::wait::until;

use super::{Case, case};
use crate::context::{Context, SOON, names, same};

pub const CASES: &[Case] = &[
    case!(an_exec_returns_its_exit_code).short(),
    case!(an_exec_keeps_stdout_and_stderr_apart),
    case!(an_exec_carries_bytes_both_ways_unchanged),
    case!(an_exec_on_a_terminal_has_one).short(),
    case!(an_exec_of_an_unknown_program_is_named),
    case!(an_exec_that_takes_too_long_is_killed),
    case!(an_exec_survives_the_end_of_another),
    case!(many_execs_run_side_by_side),
];

fn an_exec_returns_its_exit_code(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let done = context
        .crictl
        .exec_sync(&container.id, 30, &["sh", "-c", "exit 7"])?;
    names(&done.stderr, &["exited with 7"])?;
    let done = container.exec("exit 9")?;
    if done.status.success() {
        bail!("exit code 9 came back as success");
    }
    names(&done.stderr, &["exit code 9"])?;
    names(&container.exec("kill -9 $$")?.stderr, &["137"])
}

fn an_exec_keeps_stdout_and_stderr_apart(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let script = "i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i + 1)); done";
    let done = container.exec(script)?.success("exec")?;
    let expected = |word: &str| {
        (0..2000)
            .map(|i| format!("{word} {i}\n"))
            .collect::<String>()
    };
    same("stdout is complete", done.text() == expected("out"), true)?;
    same("stderr is complete", done.stderr == expected("err"), true)
}

fn an_exec_carries_bytes_both_ways_unchanged(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let bytes = super::stdio::noise(2 << 20);
    let done = context
        .crictl
        .exec_with_input(&container.id, &["cat"], &bytes)?
        .success("cat")?;
    same("length", done.stdout.len(), bytes.len())?;
    same("bytes are equal", done.stdout == bytes, true)
}

fn an_exec_on_a_terminal_has_one(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let script = "tty; stty size; read line; echo got $line; exit 5";
    let done = context.crictl.on_a_terminal(
        &["exec", "-it", &container.id, "sh", "-c", script],
        b"typed\n",
    )?;
    names(&done.text(), &["/dev/pts/", "got typed", "exit code 5"])
}

fn an_exec_of_an_unknown_program_is_named(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let done = context
        .crictl
        .exec_sync(&container.id, 30, &["no-such-program"])?;
    if done.status.success() {
        bail!("it was run");
    }
    names(&done.stderr, &["no-such-program"])?;
    same("exec", container.output("echo fine")?.as_str(), "fine\n")
}

fn an_exec_that_takes_too_long_is_killed(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let done = context
        .crictl
        .exec_sync(&container.id, 1, &["sleep", "4321"])?;
    names(&done.stderr, &["DeadlineExceeded"])?;
    until(SOON, "the process to be gone", || {
        Ok((!container.output("ps -o args")?.contains("sleep 4321")).then_some(()))
    })
}

fn an_exec_survives_the_end_of_another(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    std::thread::scope(|scope| {
        let long = scope
            .spawn(|| container.output("while [ ! -e /tmp/go ]; do usleep 50000; done; echo went"));
        same("exec", container.exec("exit 1")?.status.success(), false)?;
        container.output("touch /tmp/go")?;
        let out = long
            .join()
            .unwrap_or_else(|_| bail!("the exec's thread panicked"))?;
        same("output", out.as_str(), "went\n")
    })
}

fn many_execs_run_side_by_side(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = &pod.idle()?;
    std::thread::scope(|scope| {
        let execs: Vec<_> = (0..10)
            .map(|number| {
                scope.spawn(move || {
                    (
                        number,
                        container.output(&format!("sleep 0.2; echo {number}")),
                    )
                })
            })
            .collect();
        for exec in execs {
            let Ok((number, out)) = exec.join() else {
                bail!("an exec's thread panicked");
            };
            same("output", out?, format!("{number}\n"))?;
        }
        Ok(())
    })?;
    // Nothing is kept of them.
    until(Duration::from_secs(30), "the execs to be gone", || {
        Ok((container.output("ps -o args")?.matches("sleep 0.2").count() == 0).then_some(()))
    })
}
