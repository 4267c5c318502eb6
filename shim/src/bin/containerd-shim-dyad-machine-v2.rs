//! Serves machine pods; `containerd-shim-dyad-v2` runs it.

use std::process::ExitCode;
use std::sync::Arc;

use dyad_runtime_handler::config::Kind;
use dyad_shim::{Backend, BackendContext, HandlerFuture};

fn main() -> ExitCode {
    dyad_shim::main(Backend {
        kind: Kind::Machine,
        handler,
        features: |_| Ok(None),
    })
}

fn handler(context: BackendContext) -> HandlerFuture {
    Box::pin(async move {
        let paths = dyad_machine::Paths {
            state_dir: context.config.state_dir,
            cache_dir: context.config.cache_dir,
        };
        dyad_machine::new(Arc::new(context.config.machine), paths, context.events)
    })
}
