//! `dyadctl`, command by command, and what it says of wrong ones.

use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::command::{self, Done};
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Case, DYAD, MACHINES, case};
use crate::context::{Context, SOON, names, same};

const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;

pub const CASES: &[Case] = &[
    case!(every_command_of_dyadctl_does_what_it_says).on(DYAD),
    case!(what_dyadctl_cannot_do_is_told_by_its_exit_code).on(DYAD),
    case!(a_console_has_one_client_at_a_time).on(MACHINES),
];

fn done(context: &Context<'_>, args: &[&str]) -> Result<String> {
    let done = context.env.dyadctl(args)?;
    Ok(done.success(&format!("dyadctl {args:?}"))?.text())
}

fn document(context: &Context<'_>, args: &[&str]) -> Result<Value> {
    let text = done(context, &[args, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("dyadctl {args:?}: {text}"))
}

fn every_command_of_dyadctl_does_what_it_says(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container =
        pod.run("trap 'exit 0' TERM; echo life; while :; do sleep 1000 & wait $!; done")?;
    container.says("life\n")?;
    names(&done(context, &["list"])?, &[pod.name(), "running"])?;
    let list = document(context, &["list"])?;
    let listed = list["pods"].as_array().context("no pods")?;
    let own = listed
        .iter()
        .find(|entry| entry["sandbox_id"] == json!(pod.id));
    let own = own.with_context(|| format!("{} is not in {list}", pod.id))?;
    same("name", &own["pod_name"], &json!(pod.name()))?;

    // A pod is found by each of its names, and by the beginning of its ids.
    for word in [pod.name(), pod.uid(), &pod.id, &pod.id[..16], &container.id] {
        let state = document(context, &["state", word])?;
        same(word, &state["sandbox_id"], &json!(pod.id))?;
        same("state", &state["state"], &json!("running"))?;
        same(
            "machine",
            state["machine"].is_object(),
            context.handler.is_machine(),
        )?;
    }

    let mut watch = dyadctl(context, &["watch", &pod.id, "-o", "json"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lives = 1;
    for (verb, state) in [
        ("pause", "paused"),
        ("unpause", "running"),
        ("stop", "stopped"),
        ("start", "running"),
        ("soft-reboot", "running"),
        ("reset", "running"),
    ] {
        let after = document(context, &[verb, &pod.id])?;
        same(verb, &after["state"], &json!(state))?;
        if matches!(verb, "start" | "soft-reboot" | "reset") {
            lives += 1;
            until(SOON, &format!("life {lives}"), || {
                let told = container.logs()?.out().matches("life").count();
                Ok((told >= lives).then_some(()))
            })?;
        }
    }
    kill(pid(&watch)?, Signal::SIGINT)?;
    let mut told = String::new();
    if let Some(stdout) = &mut watch.stdout {
        std::io::Read::read_to_string(stdout, &mut told)?;
    }
    watch.wait()?;
    for line in told.lines() {
        serde_json::from_str::<Value>(line).with_context(|| format!("watch: {line}"))?;
    }
    names(
        &told,
        &["\"paused\"", "\"stopping\"", "\"stopped\"", &pod.id],
    )?;
    let file = context.env.config_file(context.handler.name());
    let file = file.to_str().context("the environment's folder")?;
    let config = document(context, &["config", "--config", file])?;
    let value = |key: &str| {
        let entries = config.as_array().into_iter().flatten();
        let mut of_key = entries.filter(|entry| entry["key"] == json!(key));
        of_key.next().map(|entry| entry["from"].clone())
    };
    same("kind's origin", value("kind"), Some(json!(file)))?;
    same(
        "machine.vcpus' origin",
        value("machine.vcpus"),
        Some(json!("default")),
    )?;

    names(&done(context, &["completion", "bash"])?, &["soft-reboot"])?;
    names(&done(context, &["version"])?, &["dyadctl"])?;
    let endpoint = format!(
        "unix://{}/containerd/containerd.sock",
        context.env.dir.display()
    );
    let mut check = dyadctl(
        context,
        &[
            "check",
            "--config",
            file,
            "--runtime-endpoint",
            &endpoint,
            "-o",
            "json",
        ],
    );
    // crictl is looked for there.
    let check = command::run(check.env("PATH", context.env.path()), b"", SOON)?;
    let lines: Value = serde_json::from_str(&check.text())
        .with_context(|| format!("dyadctl check: {}{}", check.text(), check.stderr))?;
    for line in lines.as_array().context("no lines")? {
        if line["status"] != json!("ok") && line["mend"].as_str().is_none_or(str::is_empty) {
            bail!("dyadctl check does not say how to mend {line}");
        }
    }
    let handlers: Vec<_> = lines
        .as_array()
        .into_iter()
        .flatten()
        .map(|line| &line["handler"])
        .collect();
    same(
        "its handler is checked",
        handlers.contains(&&json!(context.handler.name())),
        true,
    )
}

fn what_dyadctl_cannot_do_is_told_by_its_exit_code(context: &Context<'_>) -> Result<()> {
    let twins: Vec<_> = ["x", "y"]
        .into_iter()
        .map(|end| {
            context.pod_with(|config| {
                let name = config["metadata"]["name"].as_str().unwrap_or_default();
                config["metadata"]["name"] = json!(format!("twin-{name}-{end}"));
            })
        })
        .collect::<Result<_>>()?;
    let prefix = twins[0]
        .name()
        .rsplit_once('-')
        .map_or("", |(prefix, _)| prefix);
    // pod_config counts up between the two: what they share is shorter.
    let shared: String = prefix
        .chars()
        .zip(twins[1].name().chars())
        .take_while(|(one, other)| one == other)
        .map(|(one, _)| one)
        .collect();
    let fails = |args: &[&str], code: i32, words: &[&str]| -> Result<()> {
        let got: Done = context.env.dyadctl(args)?;
        same(
            &format!("dyadctl {args:?}: {}", got.stderr),
            got.code(),
            code,
        )?;
        names(&got.stderr, words)
    };
    fails(&["pause", "no-such-pod"], NOT_FOUND, &["no-such-pod"])?;
    fails(
        &["pause", &shared],
        NOT_FOUND,
        &[twins[0].name(), twins[1].name()],
    )?;
    let id = twins[0].id.as_str();
    fails(&["stop", id, "--grace", "25h"], USAGE, &["24h"])?;
    fails(&["stop", id, "--grace", "soon"], USAGE, &["soon"])?;
    if !context.handler.is_machine() {
        fails(&["pause", id], REFUSED, &["no container of it is running"])?;
        fails(&["console", id], REFUSED, &["no machine"])?;
    }
    // No grace at all: it is not even asked.
    let stubborn =
        twins[0].run("trap 'echo asked' TERM; echo up; while :; do sleep 1000 & wait $!; done")?;
    stubborn.says("up\n")?;
    done(context, &["stop", &stubborn.id, "--grace", "0"])?;
    fails(&["pause", &format!("{id}/none")], NOT_FOUND, &["none"])?;
    let state = done(context, &["state", id])?;
    names(&state, &["stopped"])?;
    fails(&["pause", &stubborn.id], REFUSED, &["start it first"])?;
    fails(&["restart", &stubborn.id], REFUSED, &["start it first"])
}

fn dyadctl(context: &Context<'_>, args: &[&str]) -> Command {
    let mut command = Command::new(context.env.program("dyadctl"));
    command
        .arg("--state-dir")
        .arg(context.env.dir.join("dyad/run"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn pid(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

fn a_console_has_one_client_at_a_time(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let attach = || Ok::<_, anyhow::Error>(dyadctl(context, &["console", &pod.id]).spawn()?);
    // Whichever comes second is refused, by name.
    let mut both = [attach()?, attach()?];
    let refused = until(SOON, "one of two consoles to be refused", || {
        for (index, child) in both.iter_mut().enumerate() {
            if child.try_wait()?.is_some() {
                return Ok(Some(index));
            }
        }
        Ok(None)
    })?;
    let [one, other] = both;
    let (refused, mut attached) = if refused == 0 {
        (one, other)
    } else {
        (other, one)
    };
    let refused = refused.wait_with_output()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    same(&text, refused.status.code(), Some(REFUSED))?;
    names(&text, &["attached"])?;
    same(
        "the first is attached",
        attached.try_wait()?.is_none(),
        true,
    )?;

    kill(pid(&attached)?, Signal::SIGTERM)?;
    attached.wait()?;
    // It is free again, as soon as the shim has noticed.
    until(SOON, "the console to be free", || {
        let mut next = attach()?;
        let free = until(std::time::Duration::from_secs(2), "its end", || {
            next.try_wait().map_err(Into::into)
        });
        if free.is_err() {
            kill(pid(&next)?, Signal::SIGTERM)?;
        }
        next.wait()?;
        Ok(free.is_err().then_some(()))
    })
}
