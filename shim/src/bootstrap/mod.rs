//! The program as containerd runs it: `start`, `delete`, `-info`, `-v`, and `serve`,
//! which `start` runs.
//!
//! ```text
//! containerd -- start --> decide the kind --> listen --> run the server --> reply
//!                (a later container of the pod: reply with the address that is there)
//! containerd -- delete -> remove what a dead server left of one container
//! dyadctl, or we  -sweep -> remove what no live process and no bundle owns
//! ```
//!
//! stdout and stderr carry the reply and nothing else (containerd reads both); an
//! error is one line on stderr and exit status 1.

mod args;
mod delete;
mod info;
mod input;
pub mod launch;
mod server_process;
pub mod socket;
mod start;
mod sweep;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use args::{Action, Args};
use dyad_runtime_handler::Result;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;

use crate::backend::Backend;

/// The program that decides, and serves container pods.
const CONTAINER_PROGRAM: &str = "containerd-shim-dyad-v2";
/// The program that serves machine pods.
const MACHINE_PROGRAM: &str = "containerd-shim-dyad-machine-v2";

/// Runs the program with the backend it links.
pub fn main(backend: Backend) -> ExitCode {
    let result = args::parse(std::env::args().skip(1)).and_then(|args| run(&args, backend));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, backend: Backend) -> Result<()> {
    match args.action {
        Action::Version => {
            println!("{CONTAINER_PROGRAM} {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Info => reply(&info::info(backend)?),
        Action::Start => reply(&start::start(args, backend)?),
        Action::Delete => match delete::delete(args, backend)? {
            delete::Outcome::Reply(bytes) => reply(&bytes),
            delete::Outcome::OtherProgram(kind) => delete::run_program(args, kind),
        },
        Action::Sweep { patiently } => reply(&sweep::run(backend, patiently)?),
        Action::Serve => crate::server::serve(&args_bundle(args)?, backend),
    }
}

fn reply(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .context(|| "write the reply".into())
}

/// containerd runs us in the bundle; `delete` names it too.
fn args_bundle(args: &Args) -> Result<PathBuf> {
    match &args.bundle {
        Some(bundle) => Ok(bundle.clone()),
        None => std::env::current_dir().context(|| "find the working directory".into()),
    }
}

fn program_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Container => CONTAINER_PROGRAM,
        Kind::Machine => MACHINE_PROGRAM,
    }
}

/// The program that serves `kind`: it lies beside this one.
fn program(kind: Kind) -> Result<PathBuf> {
    dyad_linux::program::beside(program_name(kind))
}
