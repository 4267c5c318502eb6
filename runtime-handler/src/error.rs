//! The errors of a runtime handler, by what the caller can do about them.

use std::error::Error as StdError;

/// The result of a runtime handler's work.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The cause that an [`Error`] keeps in its chain.
pub type Cause = Box<dyn StdError + Send + Sync>;

/// Why a runtime handler did not do what it was asked.
///
/// The variants are the classes that containerd tells apart; the shim maps each
/// to exactly one ttrpc code. The text says what failed and on what; the cause
/// stays in `source` and the chain is printed once, at the edge.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong; it names the field, its value and the way out.
    #[error("{0}")]
    InvalidArgument(String),
    /// No such container, exec or machine.
    #[error("{0} not found")]
    NotFound(String),
    /// The id is taken by something else.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The state, the host or the configuration forbids it now; says which and the way out.
    #[error("{0}")]
    FailedPrecondition(String),
    /// This kind cannot do it at all.
    #[error("{0}")]
    Unimplemented(String),
    /// The other side (libvirt, guest agent, OCI runtime) is gone or does not answer.
    #[error("{0}")]
    Unavailable(String, #[source] Option<Cause>),
    /// It took longer than it may.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Anything else; `context` says what was being done and to what.
    #[error("{context}")]
    Other {
        /// What failed, and on what: "attach tap to domain dyad-…".
        context: String,
        /// Why.
        #[source]
        source: Cause,
    },
}

impl Error {
    /// An [`Error::Other`] from what was being done and its cause.
    pub fn other(context: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Other {
            context: context.into(),
            source: source.into(),
        }
    }

    /// The whole chain on one line, causes joined by `: `.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            let cause_text = cause.to_string();
            if !text.ends_with(&cause_text) {
                text.push_str(": ");
                text.push_str(&cause_text);
            }
            next = cause.source();
        }
        text
    }
}

/// Adds what was being done to a foreign error.
pub trait Context<T> {
    /// Wraps the error into [`Error::Other`] with `context`.
    ///
    /// # Errors
    /// The wrapped error, where there was one.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Cause>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::other(context(), source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_prints_every_cause_once() {
        let io = std::io::Error::other("no such device");
        let outer = Error::other("attach tap to domain dyad-1", Error::other("open tun", io));
        assert_eq!(
            outer.chain(),
            "attach tap to domain dyad-1: open tun: no such device"
        );
    }
}
