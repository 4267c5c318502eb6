//! `pause`, `resume`, `stop`, `start`, `restart`: ask, and say what was reached.

use crate::args::Options;
use crate::client::Change;
use crate::error::Result;
use crate::fleet::{Fleet, connect};
use crate::model::TaskState;
use crate::resolve::Word;
use crate::text::{Format, Printer, Style};

/// Does `change` to what `word` names.
///
/// # Errors
/// As the shim answers.
pub async fn run(
    fleet: &Fleet,
    word: &Word,
    change: Change,
    options: &Options,
    printer: Printer,
) -> Result<()> {
    let (place, named) = fleet.find(word, options.namespace.as_deref())?;
    let client = connect(place, options.ask_timeout()).await?;
    let limit = options.change_timeout(change);
    let pod = client.change(change, named.container_id(), limit).await?;
    if printer.format == Format::Json {
        return printer.json(&pod);
    }
    let task = pod
        .tasks
        .iter()
        .find(|task| task.container_id == named.container_id());
    let (reached, style) = match task {
        Some(task) => (task.state.as_str().to_owned(), Style::of(task.state)),
        None if pod.summary() == TaskState::Running.as_str() => (pod.summary(), Style::Good),
        None => (pod.summary(), Style::Notice),
    };
    let label = named.label();
    printer.text(&format!(
        "{}: {}\n",
        printer.word(&label, Style::Plain),
        printer.word(&reached, style)
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;
    use crate::testing::{FakeShim, State, state_of};

    async fn ask(state: &State, word: &str, change: Change) -> Result<()> {
        let options = Cli::try_parse_from(["dyadctl", "list"]).unwrap().options;
        let fleet = Fleet::ask(state.path(), Duration::from_secs(10)).await?;
        let word = word.parse().unwrap();
        run(&fleet, &word, change, &options, Printer::new(Format::Table)).await
    }

    #[tokio::test]
    async fn changes_reach_the_pod_or_the_container_that_was_named() {
        let state = State::new();
        let shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let second = Some(Duration::from_secs(1));
        for (word, change) in [
            ("web", Change::Pause),
            ("web", Change::Resume),
            ("web/app", Change::Stop { grace: second }),
            ("c-1aaa", Change::Start),
            ("web", Change::Stop { grace: None }),
            (
                "web",
                Change::Restart {
                    force: true,
                    grace: None,
                },
            ),
            (
                "web",
                Change::Restart {
                    force: false,
                    grace: second,
                },
            ),
        ] {
            ask(&state, word, change).await.unwrap();
        }
        assert_eq!(
            *shim.calls.lock().unwrap(),
            [
                "pause",
                "resume",
                "stop Some(1000) c-1aaa",
                "start c-1aaa",
                "stop None",
                "restart true None",
                "restart false Some(1000)",
            ]
        );
    }

    #[tokio::test]
    async fn a_refusal_is_the_shims_own_words() {
        let state = State::new();
        let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        ask(&state, "web", Change::Pause).await.unwrap();
        let error = ask(&state, "web", Change::Stop { grace: None })
            .await
            .unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert_eq!(error.chain(), "the pod is paused; resume it first");
    }

    #[tokio::test]
    async fn a_shim_that_died_meanwhile_is_unreachable() {
        let state = State::new();
        let shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let fleet = Fleet::ask(state.path(), Duration::from_secs(10))
            .await
            .unwrap();
        shim.end().await;
        let options = Cli::try_parse_from(["dyadctl", "list"]).unwrap().options;
        let printer = Printer::new(Format::Table);
        let word = "web".parse().unwrap();
        let error = run(&fleet, &word, Change::Pause, &options, printer)
            .await
            .unwrap_err();
        assert_eq!(error.exit_code(), 5, "{error:?}");
    }
}
