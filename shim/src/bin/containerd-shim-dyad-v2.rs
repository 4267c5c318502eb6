//! The shim that containerd runs: decides the kind of a pod, and serves container pods;
//! in two further modes, which only it runs, it holds a pod without a pause container.

use std::io::Write as _;
use std::process::ExitCode;

use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::Result;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_shim::{Backend, BackendContext, HandlerFuture};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(dyad_container::hold::MAKE) => return end(dyad_container::hold::make()),
        Some(dyad_container::hold::HOLD) => return end(dyad_container::hold::hold()),
        _ => {}
    }
    dyad_shim::main(Backend {
        kind: Kind::Container,
        handler,
        features: |config| dyad_container::features(&config.container),
        sweep: |config| Box::pin(async move { dyad_container::sweep(&config.cache_dir) }),
        is_sweep_wanted: |config| dyad_container::is_sweep_wanted(&config.cache_dir),
    })
}

/// Of the modes in which a shim runs itself.
fn end(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn handler(context: BackendContext) -> HandlerFuture {
    Box::pin(async move {
        let reaper = Reaper::start().context(|| "start reaping children".into())?;
        let config = context.config;
        Ok(dyad_container::Containers::new(
            config.container,
            dyad_container::Folders::below(&config.state_dir, &config.cache_dir),
            reaper,
            context.events,
        ))
    })
}
