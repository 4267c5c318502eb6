//! From our errors to the codes that containerd relies on, in one place.

use dyad_agent_api::ttrpc::{Code, Error as RpcError, Result as RpcResult, get_status};
use dyad_runtime_handler::{Error, Result};

/// The answer to a call.
pub fn answer<T>(method: &str, result: Result<T>) -> RpcResult<T> {
    result.map_err(|error| {
        let text = error.chain();
        log::debug!("{method}: {text}");
        RpcError::RpcStatus(get_status(code(&error), text))
    })
}

fn code(error: &Error) -> Code {
    match error {
        Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        Error::Unimplemented(_) => Code::UNIMPLEMENTED,
        Error::Unavailable(..) => Code::UNAVAILABLE,
        Error::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
        Error::Other { .. } => Code::UNKNOWN,
    }
}

/// Runs `work` to its end even when the caller goes away: a call that was half done
/// when its connection broke must not leave half a container.
///
/// # Errors
/// Those of `work`.
pub async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    flatten(tokio::spawn(work).await)
}

/// Runs `work`, which blocks, beside the event loop.
///
/// # Errors
/// Those of `work`.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    flatten(tokio::task::spawn_blocking(work).await)
}

fn flatten<T>(joined: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    joined.unwrap_or_else(|error| Err(Error::other("run the call", error)))
}
