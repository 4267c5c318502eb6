//! What pods of this host left that nobody owns any more, and what became of it: what
//! `dyadctl sweep` prints.
//!
//! A shim that dies is cleaned up by containerd's `delete`. What that could not do (libvirt did
//! not answer, the node lost its power) is taken away by a sweep: of each backend, by itself
//! when a pod starts, and when an operator asks.

use serde::{Deserialize, Serialize};

/// Something that nobody owned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swept {
    /// What it is, with its name: `machine dyad-… of pod default/web`.
    pub what: String,
    /// Why it is still there; empty where it is gone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error: String,
}

impl Swept {
    /// What `removed` came to.
    pub fn from_result(what: String, removed: crate::Result<()>) -> Self {
        let error = removed.err().map(|error| error.chain()).unwrap_or_default();
        Self { what, error }
    }
}
