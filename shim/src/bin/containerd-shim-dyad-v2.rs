//! The shim that containerd runs: decides the kind of a pod, and serves container pods.

use std::process::ExitCode;
use std::sync::Arc;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::RuntimeHandler;
use dyad_shim::{Backend, BackendContext, HandlerFuture};

fn main() -> ExitCode {
    dyad_shim::main(Backend {
        kind: Kind::Container,
        handler,
        features: |config| dyad_container::features(&config.container).map(Some),
    })
}

fn handler(context: BackendContext) -> HandlerFuture {
    Box::pin(async move {
        let handler = dyad_container::Containers::new(context)?;
        Ok(Arc::new(handler) as Arc<dyn RuntimeHandler>)
    })
}
