//! Every byte, once, in order.

use std::fs;

use anyhow::{Result, bail};
use dyad_e2e::env::Version;
use serde_json::json;

use super::{Case, case};
use crate::context::{Context, names, same};

pub const CASES: &[Case] = &[
    case!(logs_hold_five_megabytes_and_a_last_line_without_newline).short(),
    case!(logs_keep_stdout_and_stderr_apart),
    case!(what_a_process_wrote_just_before_its_end_is_logged),
    case!(attach_carries_stdin_byte_for_byte).short(),
    case!(attach_shows_output_and_detaches_without_ending_the_process),
    case!(a_container_with_a_terminal_has_one),
];

/// Bytes of every value in no order; the same every time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(|| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

fn logs_hold_five_megabytes_and_a_last_line_without_newline(context: &Context<'_>) -> Result<()> {
    // containerd 1.6 closes its end of the FIFO as soon as the task has exited and drops
    // what it has not read yet, whatever the shim: less than a pipe holds comes through.
    let lines = if context.env.version == Version::V1_6 {
        8_000
    } else {
        720_000
    };
    let pod = context.pod()?;
    let container = pod.run(&format!("seq 1 {lines}; printf 'the end'"))?;
    same("exit code", container.exited()?.exit_code, 0)?;
    let mut expected: String = (1..=lines).map(|number| format!("{number}\n")).collect();
    expected.push_str("the end");
    let out = container.logs()?.out();
    if out.trim_end_matches('\n') != expected {
        let at = out
            .bytes()
            .zip(expected.bytes())
            .take_while(|(is, should)| is == should)
            .count();
        bail!(
            "{} of {} bytes, the first {at} are right",
            out.len(),
            expected.len()
        );
    }
    Ok(())
}

fn logs_keep_stdout_and_stderr_apart(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container =
        pod.run("i=0; while [ $i -lt 3000 ]; do echo out $i; echo err $i >&2; i=$((i + 1)); done")?;
    container.exited()?;
    let logs = container.logs()?;
    let expected = |word: &str| {
        (0..3000)
            .map(|i| format!("{word} {i}\n"))
            .collect::<String>()
    };
    same("stdout is complete", logs.out() == expected("out"), true)?;
    same("stderr is complete", logs.err() == expected("err"), true)
}

fn what_a_process_wrote_just_before_its_end_is_logged(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    for number in 0..10 {
        let out = pod.output_of(&format!("echo {number}"))?;
        same("output", out, format!("{number}\n"))?;
    }
    Ok(())
}

fn attach_carries_stdin_byte_for_byte(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let bytes = noise(1 << 20);
    let volume = context.folder(&format!("{}/in", pod.name()))?;
    fs::write(volume.join("bytes"), &bytes)?;
    let expected = dyad_e2e::command::run(
        std::process::Command::new("sha256sum")
            .current_dir(&volume)
            .arg("bytes"),
        b"",
        std::time::Duration::from_secs(30),
    )?;
    let container = pod.run_with("sha256sum", |config| {
        config["stdin"] = json!(true);
        config["stdin_once"] = json!(true);
    })?;
    context
        .crictl
        .run(&["attach", "--stdin", &container.id], &bytes)?
        .success("crictl attach")?;
    same("exit code", container.exited()?.exit_code, 0)?;
    let sum = expected.text();
    names(
        &container.logs()?.out(),
        &[sum.split(' ').next().unwrap_or_default()],
    )
}

fn attach_shows_output_and_detaches_without_ending_the_process(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    let script =
        "while read line; do echo got $line; [ $line != two ] || exit 4; done; exec sleep 1000";
    let container = pod.run_with(script, |config| config["stdin"] = json!(true))?;
    for (typed, last) in [("one", false), ("two", true)] {
        // stdin_once is not set: the end of one attach is not the end of stdin.
        let attach = context.crictl.run(
            &["attach", "--stdin", &container.id],
            format!("{typed}\n").as_bytes(),
        )?;
        container.says(&format!("got {typed}\n"))?;
        if !last {
            same(
                "state after detach",
                container.status()?.state.as_str(),
                "CONTAINER_RUNNING",
            )?;
        }
        drop(attach);
    }
    same("exit code", container.exited()?.exit_code, 4)
}

fn a_container_with_a_terminal_has_one(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // Systems close what they were started with, and open /dev/console: a second is enough
    // for that to be seen, and 100 kB more than a terminal holds.
    let script = "tty; read line; echo got $line; exec </dev/null >/dev/null 2>&1; sleep 1; \
                  exec </dev/console >/dev/console 2>&1; seq 20000; echo open again; exit 6";
    let container = pod.run_with(script, |config| {
        config["stdin"] = json!(true);
        config["tty"] = json!(true);
    })?;
    container.says("/dev/")?;
    let shown = context
        .crictl
        .on_a_terminal(&["attach", "-it", &container.id], b"typed\n")?;
    same("exit code", container.exited()?.exit_code, 6)?;
    for text in ["got typed", "20000", "open again"] {
        let said = container.says(text);
        said.map_err(|error| error.context(shown.text()))?;
    }
    Ok(())
}
