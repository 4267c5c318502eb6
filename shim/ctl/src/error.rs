//! Why a command failed, sorted by what the caller can do about it: one exit code each.

use std::error::Error as StdError;
use std::io;

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn StdError + Send + Sync>;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments make no sense, here or to the shim.
    #[error("{0}")]
    Usage(String),
    /// Nothing is called so, or more than one thing is.
    #[error("{0}")]
    NotFound(String),
    /// The shim refuses it in the present state, or for this kind of pod.
    #[error("{0}")]
    Refused(String),
    /// The shim is dead or does not answer.
    #[error("{context}")]
    Unreachable {
        /// What was asked, and of which shim.
        context: String,
        /// Why there was no answer.
        #[source]
        source: Option<Cause>,
    },
    /// Anything else.
    #[error("{context}")]
    Failed {
        /// What failed, and on what.
        context: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// Standard output is gone.
    #[error("write to standard output")]
    Output(#[from] io::Error),
    /// A signal ended it; nothing is left to say.
    #[error("ended by signal {0}")]
    Signal(i32),
}

/// The exit codes, as `--help` and docs/dyadctl.md list them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  usage: the arguments make no sense
  3  not found, or the name is ambiguous
  4  refused: the pod's state or kind does not allow it
  5  the shim is dead or does not answer";

impl Error {
    /// A [`Error::Failed`] with its cause.
    pub fn failed(context: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Failed {
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// A [`Error::Unreachable`] with its cause.
    pub fn unreachable(context: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Unreachable {
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// The process's exit code, see [`EXIT_CODES`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { .. } | Self::Output(_) => 1,
            Self::Usage(_) => 2,
            Self::NotFound(_) => 3,
            Self::Refused(_) => 4,
            Self::Unreachable { .. } => 5,
            Self::Signal(number) => 128u8.saturating_add(u8::try_from(*number).unwrap_or(0)),
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
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_every_cause() {
        let error = Error::failed("read /run/dyad", io::Error::other("no\n  such thing"));
        assert_eq!(error.chain(), "read /run/dyad: no such thing");
    }

    #[test]
    fn every_documented_exit_code_is_one_of_ours() {
        for (error, code) in [
            (Error::failed("x", "y"), 1),
            (Error::Usage(String::new()), 2),
            (Error::NotFound(String::new()), 3),
            (Error::Refused(String::new()), 4),
            (Error::unreachable("x", "y"), 5),
        ] {
            assert_eq!(error.exit_code(), code);
            assert!(EXIT_CODES.contains(&format!("\n  {code}  ")));
        }
        assert_eq!(Error::Signal(15).exit_code(), 143);
    }
}
