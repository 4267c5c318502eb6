//! containerd's events, in its order (containerd, docs/runtime-v2.md).

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use dyad_e2e::wait::until;
use serde_json::{Value, json};

use super::{Case, case};
use crate::context::{Context, SOON, same};

pub const CASES: &[Case] = &[
    case!(events_come_in_containerds_order).short(),
    case!(start_comes_before_exit_for_a_process_that_ends_at_once),
    case!(an_out_of_memory_event_is_published),
];

/// A running `ctr events`.
pub(super) struct Events {
    ctr: Child,
    file: PathBuf,
}

impl Events {
    /// Listens; returns when events do arrive.
    pub(super) fn listen(context: &Context<'_>) -> Result<Self> {
        let file = context
            .folder(&format!(
                "events-{}-{}",
                context.handler.name(),
                std::thread::current().name().unwrap_or_default()
            ))?
            .join("log");
        let ctr = context
            .env
            .ctr_command("k8s.io")
            .arg("events")
            .stdin(Stdio::null())
            .stdout(File::create(&file)?)
            .stderr(Stdio::null())
            .spawn()
            .context("start ctr events")?;
        let events = Self { ctr, file };
        until(SOON, "ctr events to listen", || {
            context
                .env
                .ctr(&["images", "label", "dyad.test/pause:1", "dyad.test/e2e=1"])?;
            Ok((fs::metadata(&events.file)?.len() > 0).then_some(()))
        })?;
        Ok(events)
    }

    /// `topic` or `topic exec-id` of the task events of one container.
    fn of(&self, container: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(&self.file)?;
        Ok(text
            .lines()
            .filter_map(|line| {
                let topic = line.split(' ').find(|word| word.starts_with("/tasks/"))?;
                let event: Value = serde_json::from_str(&line[line.find('{')?..]).ok()?;
                if event["container_id"] != container {
                    return None;
                }
                let exec = event["exec_id"].as_str();
                // The exit of the init process carries the container's own id.
                let id = exec
                    .or(event["id"].as_str())
                    .filter(|id| *id != container && !id.is_empty());
                Some(id.map_or_else(|| topic.to_owned(), |_| format!("{topic} of an exec")))
            })
            .collect())
    }

    pub(super) fn expect(&self, container: &str, expected: &[&str]) -> Result<()> {
        let mut seen = Vec::new();
        until(SOON, "the events", || {
            seen = self.of(container)?;
            Ok((seen.len() >= expected.len()).then_some(()))
        })
        .with_context(|| format!("seen {seen:?}"))?;
        same(
            "events",
            seen.iter().map(String::as_str).collect::<Vec<_>>(),
            expected.to_vec(),
        )
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It has no end of its own.
        let _ = self.ctr.kill();
        let _ = self.ctr.wait();
    }
}

fn events_come_in_containerds_order(context: &Context<'_>) -> Result<()> {
    let events = Events::listen(context)?;
    let pod = context.pod()?;
    let container = pod.idle()?;
    container.output("true")?;
    events.expect(
        &container.id,
        &[
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added of an exec",
            "/tasks/exec-started of an exec",
            "/tasks/exit of an exec",
        ],
    )?;
    context.env.ctr(&["tasks", "pause", &container.id])?;
    context.env.ctr(&["tasks", "resume", &container.id])?;
    context.crictl.stop(&container.id, 30)?;
    let told = events.of(&container.id)?;
    events
        .expect(
            &container.id,
            &[
                "/tasks/create",
                "/tasks/start",
                "/tasks/exec-added of an exec",
                "/tasks/exec-started of an exec",
                "/tasks/exit of an exec",
                "/tasks/paused",
                "/tasks/resumed",
                "/tasks/exit",
                "/tasks/delete",
            ],
        )
        .with_context(|| format!("after stop: {told:?}"))?;
    pod.remove()?;
    events.expect(
        &pod.id,
        &[
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ],
    )
}

fn start_comes_before_exit_for_a_process_that_ends_at_once(context: &Context<'_>) -> Result<()> {
    let events = Events::listen(context)?;
    let pod = context.pod()?;
    for _ in 0..5 {
        let container = pod.run_with("", |config| config["command"] = json!(["true"]))?;
        events.expect(
            &container.id,
            &[
                "/tasks/create",
                "/tasks/start",
                "/tasks/exit",
                "/tasks/delete",
            ],
        )?;
    }
    Ok(())
}

fn an_out_of_memory_event_is_published(context: &Context<'_>) -> Result<()> {
    let events = Events::listen(context)?;
    let pod = context.pod()?;
    let container = pod.run_with("exec tail /dev/zero", |config| {
        config["linux"]["resources"] =
            json!({"memory_limit_in_bytes": 24 << 20, "memory_swap_limit_in_bytes": 24 << 20});
    })?;
    container.exited()?;
    until(SOON, "/tasks/oom", || {
        Ok(events
            .of(&container.id)?
            .contains(&"/tasks/oom".to_owned())
            .then_some(()))
    })
}
