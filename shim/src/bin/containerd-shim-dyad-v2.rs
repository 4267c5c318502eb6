//! The shim that containerd runs: decides the kind of a pod, and serves container pods.

use std::process::ExitCode;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::reaper::Reaper;
use dyad_shim::{Backend, BackendContext, HandlerFuture};

fn main() -> ExitCode {
    dyad_shim::main(Backend {
        kind: Kind::Container,
        handler,
        features: |config| dyad_container::features(&config.container),
    })
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
