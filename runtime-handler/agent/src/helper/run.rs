//! Calls libcontainer. The only module that does.

use std::fs::{self, File};
use std::path::Path;

use dyad_runtime_handler::{Result, error::Context};
use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
pub use libcontainer::notify_socket::NOTIFY_FILE;
use libcontainer::syscall::syscall::SyscallType;

use super::executor::GuestExecutor;
use super::{Job, LIBCONTAINER, Outcome, log_file, outcome_file};
use crate::logger;

/// Does the job in `file` and writes the answer beside it.
///
/// # Errors
/// The answer could not be written.
pub fn run(file: &Path) -> Result<()> {
    let outcome = read(file).and_then(|job| {
        log_into(&job, &log_file(file))?;
        perform(&job)
    });
    let outcome = outcome.unwrap_or_else(|error| Outcome::Failed(error.chain()));
    let json = serde_json::to_vec(&outcome).context(|| "encode the answer".into())?;
    let target = outcome_file(file);
    fs::write(&target, json).context(|| format!("write {}", target.display()))
}

fn read(file: &Path) -> Result<Job> {
    let json = fs::read(file).context(|| format!("read {}", file.display()))?;
    serde_json::from_slice(&json).context(|| format!("decode {}", file.display()))
}

fn log_into(job: &Job, path: &Path) -> Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .context(|| format!("open {}", path.display()))?;
    logger::to_file(file, job.log.parse().unwrap_or(log::LevelFilter::Warn));
    Ok(())
}

fn perform(job: &Job) -> Result<Outcome> {
    let executor = GuestExecutor::new(job)?;
    let builder = ContainerBuilder::new(job.container.clone(), SyscallType::default())
        .with_executor(executor)
        .with_console_socket(job.console_socket.as_ref())
        .with_root_path(LIBCONTAINER)
        .context(|| "configure libcontainer".into())?;
    let done = match &job.process {
        None => builder
            .as_init(&job.bundle)
            .with_systemd(false)
            .with_detach(true)
            .build()
            .and_then(|mut container| {
                let pid = container.pid();
                // Started is who connects to the notify socket, which PID 1 does by
                // itself; an exec asks only for this word.
                container.set_status(ContainerStatus::Running).save()?;
                Ok(pid)
            }),
        Some(process) => builder
            .as_tenant()
            .with_detach(true)
            .with_process(Some(process))
            .with_sub_cgroup(job.sub_cgroup.clone())
            .build()
            .map(Some),
    };
    Ok(match done {
        Ok(Some(pid)) => Outcome::Pid(pid.as_raw().unsigned_abs()),
        Ok(None) => Outcome::Failed("libcontainer made a container without a process".into()),
        Err(error) => refuse(&error),
    })
}

fn refuse(error: &LibcontainerError) -> Outcome {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    // The pipe that carries an exec's error is read in threes and padded with zeros.
    let text = text.replace('\0', "");
    match text.split_once(super::executor::CANNOT_RUN) {
        Some((_, reason)) => Outcome::Invalid(reason.trim().to_owned()),
        None => Outcome::Failed(text),
    }
}
