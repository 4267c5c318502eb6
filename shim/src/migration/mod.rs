//! Moving a pod to another node: what the shim itself decides. The backend moves
//! (`dyad_runtime_handler::migration`), the driver does the steps (`pod::model::migration`).

pub mod phases;
pub mod request;

use std::time::Duration;

use dyad_runtime_handler::migration::MigrationProgress;
use dyad_runtime_handler::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The pod runs on the target.
    Completed,
    /// It runs here as before, for this reason.
    Abandoned(String),
    /// It runs nowhere, for this reason.
    Lost(String),
}

/// A migration, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MigrationView {
    /// Counts this shim's migrations; 0: none was asked for.
    pub number: u64,
    /// Where to.
    pub destination: String,
    /// Its figures.
    pub progress: MigrationProgress,
    /// Its end.
    pub outcome: Option<Outcome>,
    /// Since it was asked for.
    pub elapsed: Duration,
}

/// The version of [`PodState`].
const VERSION: u32 = 1;

/// What the target's shim is told of the pod: travels through the backend unread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// See [`VERSION`].
    pub version: u32,
    /// Its containers, the sandbox with an empty name.
    pub containers: Vec<ContainerState>,
}

/// A container of a [`PodState`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Kubernetes' name.
    pub name: String,
    /// How often it was started in place.
    pub starts: u32,
}

impl PodState {
    /// Of these containers.
    pub fn new(containers: Vec<ContainerState>) -> Self {
        Self {
            version: VERSION,
            containers,
        }
    }

    /// As it travels.
    pub fn encode(&self) -> Vec<u8> {
        // Plain data, so there is no error to have.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what came.
    ///
    /// # Errors
    /// `InvalidArgument`: damaged, or of a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let state: Self = serde_json::from_slice(bytes).map_err(|error| {
            Error::InvalidArgument(format!("the state of the pod that arrived: {error}"))
        })?;
        if state.version > VERSION {
            return Err(Error::InvalidArgument(format!(
                "the state of the pod that arrived has version {}; this program knows {VERSION}: \
                 use the same release of dyad on both nodes",
                state.version
            )));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_s_state_is_read_as_it_was_written_and_a_newer_one_is_refused() {
        let state = PodState::new(vec![ContainerState {
            name: "web".into(),
            starts: 2,
        }]);
        assert_eq!(PodState::decode(&state.encode()).unwrap(), state);
        for (text, part) in [
            (r#"{"version":2,"containers":[]}"#, "version 2"),
            (r#"{"version":1"#, "state of the pod"),
            ("", "state of the pod"),
        ] {
            let error = PodState::decode(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
