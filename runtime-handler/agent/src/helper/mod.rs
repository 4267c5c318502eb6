//! The short-lived process that runs libcontainer: this binary again, as
//! `dyad-agent helper <job file>`.
//!
//! ```text
//! PID 1 --spawn--> helper --clone3--> intermediate --clone3--> container's init (waits on notify.sock)
//!   ^                | writes the result file, exits                 |
//!   +--- exit -------+---- its orphan, the init, becomes ours -------+
//! ```
//! The helper's stdin, stdout and stderr are the container's, so it says nothing on
//! them; its answer is a file beside the job, its log another.

mod executor;
mod run;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dyad_runtime_handler::{Error, Result, error::Context};
use oci_spec::runtime::LinuxCapabilities;
use serde::{Deserialize, Serialize};

use crate::logger::ERROR_MARK;

/// In a container's folder below [`LIBCONTAINER`]: its init runs when somebody
/// connects to this socket.
pub use run::NOTIFY_FILE;

/// The argument that makes this binary a helper.
pub const ARGUMENT: &str = "helper";

/// libcontainer's own state.
pub const LIBCONTAINER: &str = "/run/dyad/libcontainer";

/// The filter's file in a container's folder.
pub const FILTER: &str = "seccomp.bpf";

/// What a helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// The container's id.
    pub container: String,
    /// Its folder, with `config.json`.
    pub bundle: PathBuf,
    /// The OCI process of an exec, as a file; none: create the container.
    pub process: Option<PathBuf>,
    /// Where to send the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// The filter to load just before the process runs.
    pub filter: Option<Filter>,
    /// Given up to just before the process runs: by us, so that its terminal can be made its
    /// user's, and a filter loaded, before.
    pub capabilities: LinuxCapabilities,
    /// Its HOME is the user's, from the container's `/etc/passwd`.
    pub find_home: bool,
    /// Below the container's cgroup, where its init is: a group with groups below it takes no
    /// processes.
    pub sub_cgroup: Option<String>,
    /// Log level.
    pub log: String,
}

/// A filter that the host compiled.
#[derive(Debug, Serialize, Deserialize)]
pub struct Filter {
    /// `struct sock_filter[]`.
    pub file: PathBuf,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// What a helper answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The process's pid in the guest.
    Pid(u32),
    /// The request names something that cannot run.
    Invalid(String),
    /// Anything else.
    Failed(String),
}

impl Job {
    /// Writes the job to `file`.
    ///
    /// # Errors
    /// The file system is full.
    pub fn write(&self, file: &Path) -> Result<()> {
        let json = serde_json::to_vec(self).context(|| "encode the helper's job".into())?;
        std::fs::write(file, json).context(|| format!("write {}", file.display()))
    }
}

/// Where the helper of `job` writes its answer.
pub fn outcome_file(job: &Path) -> PathBuf {
    job.with_extension("outcome")
}

/// Where the helper of `job` logs.
pub fn log_file(job: &Path) -> PathBuf {
    job.with_extension("log")
}

/// Reads and removes the answer, and the log.
///
/// # Errors
/// What the helper failed with, in its own words; that there is no answer, with the end of its
/// log.
pub fn take_outcome(job: &Path, status: u32) -> Result<u32> {
    let file = outcome_file(job);
    let log = std::fs::read_to_string(log_file(job)).unwrap_or_default();
    let _ = std::fs::remove_file(log_file(job));
    let outcome = std::fs::read(&file)
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok());
    let _ = std::fs::remove_file(&file);
    match outcome {
        Some(Outcome::Pid(pid)) => Ok(pid),
        Some(Outcome::Invalid(text)) => Err(Error::InvalidArgument(text)),
        Some(Outcome::Failed(text)) => Err(Error::other(text, reasons(&log))),
        None => Err(Error::other(
            format!("the helper ended with status {status} and no answer"),
            last_lines(&log),
        )),
    }
}

/// What a log calls errors, the first of which is the cause: libcontainer's own texts lose it.
fn reasons(log: &str) -> String {
    let errors: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once(ERROR_MARK).map(|(_, text)| text))
        .collect();
    if errors.is_empty() {
        "no reason is known".into()
    } else {
        errors[..errors.len().min(2)].join("; ")
    }
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(6)..].join(" | ")
}

/// The helper's `main`.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(job) = arguments.next().map(PathBuf::from) else {
        return ExitCode::from(2);
    };
    match run::run(&job) {
        Ok(()) => ExitCode::SUCCESS,
        // Only when not even the answer could be written; stderr is the container's.
        Err(_) => ExitCode::from(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_without_an_answer_is_an_error_with_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("a.job");
        std::fs::write(log_file(&job), "one\ntwo\n").unwrap();
        let error = take_outcome(&job, 134).unwrap_err();
        assert!(error.chain().contains("134"), "{}", error.chain());
        assert!(error.chain().ends_with("one | two"), "{}", error.chain());

        std::fs::write(outcome_file(&job), b"\xff{").unwrap();
        assert!(take_outcome(&job, 0).is_err());
    }

    #[test]
    fn what_failed_is_told_without_the_helpers_debug_lines() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("a.job");
        let log =
            "[1.0] helper: creating\n[1.1] helper: error: no such device\n[1.2] helper: done\n";
        std::fs::write(log_file(&job), log).unwrap();
        let json = serde_json::to_vec(&Outcome::Failed("exec".into())).unwrap();
        std::fs::write(outcome_file(&job), json).unwrap();
        let error = take_outcome(&job, 0).unwrap_err();
        assert_eq!(error.chain(), "exec: no such device");
        assert!(!log_file(&job).exists());
    }

    #[test]
    fn an_answer_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("a.job");
        let json = serde_json::to_vec(&Outcome::Pid(7)).unwrap();
        std::fs::write(outcome_file(&job), json).unwrap();
        assert_eq!(take_outcome(&job, 0).unwrap(), 7);
        assert!(take_outcome(&job, 0).is_err());
    }
}
