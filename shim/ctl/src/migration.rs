//! A migration, as it is asked for and as it is reported.

use std::time::Duration;

use clap::ValueEnum;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::text::printable;

/// What to do when `--max-time` is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum After {
    /// Give up; the pod goes on here
    #[default]
    Abort,
    /// Run the pod there now, and fetch the rest of its memory
    PostCopy,
    /// Stop the pod here, so that what is left can be copied
    Pause,
}

/// How a pod is to move.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MigrationRequest {
    pub destination: String,
    pub migrate_uri: Option<String>,
    pub disks_uri: Option<String>,
    pub bandwidth_mib_s: u64,
    pub max_downtime: Option<Duration>,
    pub max_time: Option<Duration>,
    pub then: After,
    pub auto_converge: bool,
    pub parallel: u32,
    pub tls_required: bool,
    pub allow_clear: bool,
    pub tcp_established: bool,
}

/// How far a migration is: keys of `-o json`, one object a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Counts this shim's migrations.
    pub migration: u64,
    /// checking, preparing, copying, switching, fetching, finishing; completed, abandoned,
    /// lost; none.
    pub stage: &'static str,
    /// Why it was abandoned or lost.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where to.
    pub destination: String,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes to copy.
    pub bytes_total: u64,
    /// Bytes still to copy.
    pub bytes_remaining: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Bytes per second that the pod changes.
    pub dirty_rate: u64,
    /// While unknown: absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime_us: Option<u64>,
    /// Once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// Since it was asked for.
    pub elapsed_ms: u64,
}

impl Progress {
    /// Whether nothing follows.
    pub fn is_over(&self) -> bool {
        matches!(self.stage, "completed" | "abandoned" | "lost" | "none")
    }

    /// The figures that matter in this stage.
    pub fn line(&self) -> String {
        let mut line = self.stage.to_owned();
        if self.bytes_total != 0 && !self.is_over() {
            line.push_str(&format!(
                " {} of {}, {}/s, changing {}/s",
                HumanBytes(self.bytes_done),
                HumanBytes(self.bytes_total),
                HumanBytes(self.rate),
                HumanBytes(self.dirty_rate)
            ));
        }
        if let Some(us) = self.expected_downtime_us.filter(|_| !self.is_over()) {
            line.push_str(&format!(", would stand still {} ms", us.div_ceil(1000)));
        }
        if self.stage == "completed" {
            line.push_str(&format!(" in {:.1} s", self.elapsed_ms as f64 / 1000.0));
            if let Some(us) = self.downtime_us {
                line.push_str(&format!(", stood still {} ms", us.div_ceil(1000)));
            }
        }
        if !self.reason.is_empty() {
            line.push_str(": ");
            line.push_str(&printable(&self.reason));
        }
        line
    }

    /// What the end of a migration means for whoever asked for it.
    ///
    /// # Errors
    /// It did not move, for this reason.
    pub fn outcome(self) -> Result<()> {
        match self.stage {
            "completed" => Ok(()),
            stage => Err(Error::Failed {
                context: format!("the migration is {stage}: {}", self.reason),
                source: None,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(stage: &'static str) -> Progress {
        Progress {
            migration: 1,
            stage,
            reason: String::new(),
            destination: "qemu+tls://n/system".into(),
            bytes_done: 1 << 20,
            bytes_total: 4 << 20,
            bytes_remaining: 3 << 20,
            rate: 1 << 20,
            dirty_rate: 0,
            expected_downtime_us: Some(45_100),
            downtime_us: None,
            elapsed_ms: 1500,
        }
    }

    #[test]
    fn a_line_tells_what_matters_in_its_stage() {
        assert_eq!(
            progress("copying").line(),
            "copying 1.00 MiB of 4.00 MiB, 1.00 MiB/s, changing 0 B/s, would stand still 46 ms"
        );
        let completed = Progress {
            downtime_us: Some(70_000),
            ..progress("completed")
        };
        assert_eq!(completed.line(), "completed in 1.5 s, stood still 70 ms");
        let abandoned = Progress {
            reason: "no space\x1b[2J".into(),
            ..progress("abandoned")
        };
        assert_eq!(abandoned.line(), "abandoned: no space\\u{1b}[2J");
    }
}
