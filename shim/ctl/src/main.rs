//! `dyadctl`: finds Dyad's shims on this host and asks them what Kubernetes cannot.
//!
//! ```text
//! args ──> fleet: discover (address files) ──> client (ttrpc), all at once ──> model
//!             └──> resolve (pure): a word becomes one pod or container
//!                     └──> commands ──> text (tables, JSON)
//! ```
#![forbid(unsafe_code)]

mod args;
mod check;
mod client;
mod commands;
mod config;
mod discover;
mod duration;
mod error;
mod fleet;
mod migration;
mod model;
mod program;
mod resolve;
mod terminal;
#[cfg(test)]
mod testing;
mod text;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Cli, Command, Options};
use crate::client::Change;
use crate::error::{Error, Result};
use crate::fleet::Fleet;
use crate::text::{Printer, printable};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => {
            let result = runtime.block_on(run(&cli));
            // Nothing that still waits may keep us.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(Error::failed("start the tokio runtime", error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, Error::Signal(_)) {
                eprintln!("dyadctl: {}", printable(&error.chain()));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(cli: &Cli) -> Result<()> {
    let options = &cli.options;
    let printer = Printer::new(options.output);
    let change = match &cli.command {
        Command::List => {
            let fleet = ask(options).await?;
            return commands::list::run(&fleet, options.namespace.as_deref(), printer);
        }
        Command::State(argument) => {
            let fleet = ask(options).await?;
            let (_, named) = fleet.find(&argument.pod, options.namespace.as_deref())?;
            return commands::state::run(named.pod, printer);
        }
        Command::Watch { pod: Some(word) } => {
            return commands::watch::one(&ask(options).await?, word, options, printer).await;
        }
        Command::Watch { pod: None } => {
            return commands::watch::all(&config::state_dir(options)?, options, printer).await;
        }
        Command::Migrate(arguments) => {
            return commands::migrate::run(&ask(options).await?, arguments, options, printer).await;
        }
        Command::Console(argument) => {
            return commands::console::run(&ask(options).await?, &argument.pod, options).await;
        }
        Command::Check { runtime_endpoint } => {
            return check::run(options, runtime_endpoint, printer).await;
        }
        Command::Sweep { runtime_endpoint } => {
            return commands::sweep::run(options, runtime_endpoint, printer).await;
        }
        Command::Config => return commands::config::run(options, printer),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "dyadctl", &mut script);
            return printer.text(&String::from_utf8_lossy(&script));
        }
        Command::Version => {
            return printer.text(concat!("dyadctl ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        Command::Pause(argument) => (argument, Change::Pause),
        Command::Resume(argument) => (argument, Change::Resume),
        Command::Stop { pod, grace } => (pod, Change::Stop { grace: *grace }),
        Command::Start(argument) => (argument, Change::Start),
        Command::Restart { pod, force, grace } => (
            pod,
            Change::Restart {
                force: *force,
                grace: *grace,
            },
        ),
        Command::Reset(argument) => (
            argument,
            Change::Restart {
                force: true,
                grace: None,
            },
        ),
    };
    let (argument, change) = change;
    let fleet = ask(options).await?;
    commands::change::run(&fleet, &argument.pod, change, options, printer).await
}

async fn ask(options: &Options) -> Result<Fleet> {
    Fleet::ask(&config::state_dir(options)?, options.ask_timeout()).await
}
