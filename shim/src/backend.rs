//! What a program hands to the library: how to make its runtime handler.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use dyad_runtime_handler::Result;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{EventSender, RuntimeHandler};
use dyad_runtime_handler::sweep::Swept;

use crate::config::Config;

/// What a handler is made from.
#[derive(Debug)]
pub struct BackendContext {
    /// The effective configuration.
    pub config: Config,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// The pod's sandbox id.
    pub sandbox_id: String,
    /// Where the handler reports what it saw.
    pub events: EventSender,
}

/// A handler in the making.
pub type HandlerFuture = Pin<Box<dyn Future<Output = Result<Arc<dyn RuntimeHandler>>> + Send>>;

/// A sweep under way.
pub type SweepFuture = Pin<Box<dyn Future<Output = Vec<Swept>> + Send>>;

/// The one backend that a program links.
#[derive(Debug, Clone, Copy)]
pub struct Backend {
    /// What it runs.
    pub kind: Kind,
    /// Makes the handler, inside a tokio runtime of one thread; for `delete` as well
    /// as for serving.
    pub handler: fn(BackendContext) -> HandlerFuture,
    /// The OCI runtime's features document (JSON) for `-info`, where there is one.
    pub features: fn(&Config) -> Result<Option<String>>,
    /// Removes what pods of this kind left that nobody owns any more.
    pub sweep: fn(Config) -> SweepFuture,
    /// Whether something is known to be left, so that a sweep is to be tried again. Quick: it is
    /// asked when a pod starts.
    pub is_sweep_wanted: fn(&Config) -> bool,
}
