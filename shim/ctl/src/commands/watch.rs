//! `dyadctl watch`: transitions of one pod, or of all, those that come later included.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;

use crate::args::Options;
use crate::discover::{Place, scan};
use crate::error::{Error, Result};
use crate::fleet::{Fleet, ask_one, connect};
use crate::model::{Pod, Task, TaskState, Time, Transition};
use crate::resolve::Word;
use crate::text::{Format, Printer, Style, printable};

/// How often new shims are looked for.
const RESCAN: Duration = Duration::from_secs(1);

/// Keys of one line of `watch -o json`.
#[derive(Serialize)]
struct Line<'a> {
    pod_namespace: &'a str,
    pod_name: &'a str,
    pod_uid: &'a str,
    sandbox_id: &'a str,
    sequence: u64,
    time: Time,
    from: TaskState,
    #[serde(flatten)]
    task: &'a Task,
}

/// Watches what `word` names until its shim ends.
///
/// # Errors
/// As the shim answers.
pub async fn one(fleet: &Fleet, word: &Word, options: &Options, printer: Printer) -> Result<()> {
    let (place, named) = fleet.find(word, options.namespace.as_deref())?;
    let mut transitions = connect(place, options.ask_timeout()).await?.watch().await?;
    while let Some(transition) = transitions.next().await? {
        let id = named.container_id();
        if id.is_empty() || id == transition.task.container_id {
            print(named.pod, &transition, printer)?;
        }
    }
    Ok(())
}

/// Watches every pod of the wanted namespace, until it is interrupted.
///
/// # Errors
/// Where the folder of the shims cannot be listed, or the output is gone.
pub async fn all(state_dir: &Path, options: &Options, printer: Printer) -> Result<()> {
    let (sender, mut receiver) = mpsc::channel::<Seen>(64);
    let mut watched: HashSet<PathBuf> = HashSet::new();
    let mut rescan = tokio::time::interval(RESCAN);
    let limit = options.ask_timeout();
    loop {
        tokio::select! {
            _ = rescan.tick() => {
                let places = scan(state_dir)?;
                // A place may be used again by a pod with the same id.
                watched.retain(|dir| places.iter().any(|place| place.dir == *dir));
                for place in places {
                    if watched.insert(place.dir.clone()) {
                        tokio::spawn(follow(place, limit, sender.clone()));
                    }
                }
            }
            Some(seen) = receiver.recv() => match seen {
                Seen::Transition(pod, transition) => {
                    let wanted = options.namespace.as_deref();
                    if wanted.is_none_or(|namespace| pod.pod_namespace == namespace) {
                        print(&pod, &transition, printer)?;
                    }
                }
                Seen::Lost(place, error) => {
                    eprintln!("dyadctl: {}: {}", printable(&place.sandbox_id), printable(&error.chain()));
                }
            }
        }
    }
}

enum Seen {
    Transition(Box<Pod>, Transition),
    Lost(Place, Error),
}

/// Sends the transitions of the shim at `place` until it ends.
async fn follow(place: Place, limit: Duration, to: mpsc::Sender<Seen>) {
    let watch = async {
        let pod = ask_one(&place, limit).await?;
        let mut transitions = connect(&place, limit).await?.watch().await?;
        while let Some(transition) = transitions.next().await? {
            // A closed channel is the end of the command.
            if to
                .send(Seen::Transition(Box::new(pod.clone()), transition))
                .await
                .is_err()
            {
                break;
            }
        }
        Ok::<(), Error>(())
    };
    match watch.await {
        Err(error) if place.dir.exists() => {
            let _ = to.send(Seen::Lost(place, error)).await;
        }
        _ => {}
    }
}

fn print(pod: &Pod, transition: &Transition, printer: Printer) -> Result<()> {
    if printer.format == Format::Json {
        return printer.json_line(&Line {
            pod_namespace: &pod.pod_namespace,
            pod_name: &pod.pod_name,
            pod_uid: &pod.pod_uid,
            sandbox_id: &pod.sandbox_id,
            sequence: transition.sequence,
            time: transition.time,
            from: transition.from,
            task: &transition.task,
        });
    }
    printer.text(&line(pod, transition, printer))
}

fn line(pod: &Pod, transition: &Transition, printer: Printer) -> String {
    let task = &transition.task;
    let to = printer.word(task.state.as_str(), Style::of(task.state));
    let arrow = match transition.from {
        // As it is; or it was not there before.
        from if from == task.state => to,
        TaskState::Unknown => to,
        from => format!("{} -> {to}", from.as_str()),
    };
    let exit = task
        .exit_status
        .map_or(String::new(), |status| format!(" ({status})"));
    let reason = match task.reason.as_str() {
        "" => String::new(),
        reason => format!("  {}", printable(reason)),
    };
    let who = format!("{}/{}", pod.label(), task.label());
    format!(
        "{}  {}  {arrow}{exit}{reason}\n",
        transition.time,
        printable(&who)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{pod, task};
    use crate::testing::{FakeShim, State, state_of};

    #[test]
    fn a_line_says_who_what_and_why() {
        let mut stopped = task("c", "app", TaskState::Exited);
        stopped.reason = "killed from outside".into();
        let transition = Transition {
            sequence: 3,
            time: Time(1_767_225_599_000_000_000),
            from: TaskState::Running,
            task: stopped,
        };
        let printer = Printer::new(Format::Table);
        assert_eq!(
            line(&pod("p", "web", vec![]), &transition, printer),
            "2025-12-31T23:59:59.000Z  default/web/app  running -> exited (0)  killed from outside\n"
        );
    }

    #[tokio::test]
    async fn following_a_shim_begins_with_every_task_and_ends_with_it() {
        let state = State::new();
        let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let place = scan(state.path()).unwrap().remove(0);
        let (sender, mut receiver) = mpsc::channel(8);
        follow(place, Duration::from_secs(10), sender).await;
        let mut seen = Vec::new();
        while let Some(event) = receiver.recv().await {
            match event {
                Seen::Transition(pod, transition) => {
                    seen.push(format!("{} {}", pod.label(), transition.task.label()));
                }
                Seen::Lost(place, error) => panic!("{}: {error:?}", place.sandbox_id),
            }
        }
        assert_eq!(seen, ["default/web (pod)", "default/web app"]);
    }
}
