//! What a check of the host found, one line each: what `dyadctl check` prints.
//!
//! Backends say how it stands with what they need (`check(&config)`); they do not
//! repair, and they never fail as a whole.

use serde::{Deserialize, Serialize};

/// How it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Pods run, but not as well as they could.
    Warn,
    /// Pods will not run until this is mended.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at, in a word or two: `accelerator`, `libvirt`.
    pub name: String,
    /// How it stands.
    pub status: Status,
    /// What was found, with versions and paths.
    pub found: String,
    /// How to mend it; empty where nothing is to mend.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

impl Check {
    /// It is as it should be.
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status: Status::Ok,
            found: found.into(),
            mend: String::new(),
        }
    }

    /// It serves, but `mend` would make it better.
    pub fn warn(
        name: impl Into<String>,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            status: Status::Warn,
            found: found.into(),
            mend: mend.into(),
        }
    }

    /// It does not serve until `mend` is done.
    pub fn fail(
        name: impl Into<String>,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, found, mend)
        }
    }
}
