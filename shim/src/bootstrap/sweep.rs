//! `-sweep`: removes what no live process and no bundle owns any more.
//!
//! ```text
//!   start of a pod, at most once a minute ----> -sweep             a process of its own, at the
//!   delete that did not get through ----------> -sweep-patiently   lowest priority
//!   dyadctl sweep ----------------------------> -sweep             and prints what it found
//! ```
//! One at a time on a host, by a lock in `cache_dir`, whose file also tells when the last began.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use dyad_linux::owner::Owner;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::sweep::Swept;
use dyad_runtime_handler::{Error, Result};

use super::launch::Launch;
use super::program;
use crate::backend::Backend;
use crate::config::Config;

/// Pods that start meanwhile start no other sweep.
const EVERY: Duration = Duration::from_secs(60);
/// How long another sweep may hold this one up.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// How long a patient sweep goes on, and between two tries.
const PATIENCE: Duration = Duration::from_secs(600);
const TRY_AGAIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Sweeps for the configuration on stdin; returns what was found as JSON, a list of [`Swept`].
///
/// # Errors
/// The configuration cannot be read; another sweep takes too long.
pub fn run(backend: Backend, patiently: bool) -> Result<Vec<u8>> {
    let config: Config = serde_json::from_reader(std::io::stdin())
        .context(|| "read the configuration to sweep by from stdin".into())?;
    // Pods come first.
    let _ = rustix::process::nice(19);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the async runtime".into())?;
    let began = Instant::now();
    let found = loop {
        let found = runtime.block_on(sweep_once(backend, &config))?;
        let again = patiently && (backend.is_sweep_wanted)(&config) && began.elapsed() < PATIENCE;
        if !again {
            break found;
        }
        std::thread::sleep(TRY_AGAIN);
    };
    // A libvirt that hangs does not keep us.
    runtime.shutdown_background();
    serde_json::to_vec(&found).context(|| "print what was found".into())
}

async fn sweep_once(backend: Backend, config: &Config) -> Result<Vec<Swept>> {
    let lock = lock_file(config);
    if !config.cache_dir.exists() {
        // No pod was ever made.
        return Ok(Vec::new());
    }
    let what = || format!("lock {}", lock.display());
    let began = Instant::now();
    let _alone = loop {
        if let Some(owner) = Owner::take(&lock).context(what)? {
            break owner;
        }
        if began.elapsed() > WAIT_MAX {
            return Err(Error::DeadlineExceeded(format!(
                "{} is held by another sweep for more than {} s; try again later",
                lock.display(),
                WAIT_MAX.as_secs()
            )));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    std::fs::File::options()
        .write(true)
        .open(&lock)
        .and_then(|file| file.set_modified(SystemTime::now()))
        .context(what)?;
    Ok((backend.sweep)(config.clone()).await)
}

fn lock_file(config: &Config) -> PathBuf {
    config.cache_dir.join(format!("sweep-{}.lock", config.kind))
}

/// Begins a sweep beside a pod that starts, where one is due.
pub fn beside(launch: &Launch, backend: Backend) {
    let config = &launch.config;
    // This program is the container kind's; the other one knows what machines leave.
    let wanted = config.kind != backend.kind || (backend.is_sweep_wanted)(config);
    if !wanted || !is_due(&lock_file(config), SystemTime::now()) {
        return;
    }
    spawn(config, "-sweep");
}

/// Goes on with what a `delete` could not do, in a process that outlives this one.
pub fn after_failed_delete(config: &Config) {
    spawn(config, "-sweep-patiently");
}

fn is_due(lock: &Path, now: SystemTime) -> bool {
    let last = lock.metadata().and_then(|meta| meta.modified());
    // A clock that was set back does not put it off for long.
    last.map_or(true, |last| {
        now.duration_since(last)
            .map_or(true, |passed| passed > EVERY)
    })
}

/// Nobody waits for it, and a sweep that cannot begin holds up no pod.
fn spawn(config: &Config, flag: &str) {
    let begun = || -> Result<()> {
        let json = serde_json::to_vec(config).context(|| "encode the configuration".into())?;
        let program = program(config.kind)?;
        let mut child = Command::new(&program)
            .arg(flag)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(|| format!("run {}", program.display()))?;
        // A pipe holds more than a configuration: this does not wait.
        let mut stdin = child.stdin.take();
        stdin
            .as_mut()
            .map_or(Ok(()), |stdin| stdin.write_all(&json))
            .context(|| format!("hand the configuration to {}", program.display()))
    };
    if let Err(error) = begun() {
        log::debug!("begin a sweep: {}", error.chain());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_is_due_a_minute_after_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("sweep-machine.lock");
        let now = SystemTime::now();
        assert!(is_due(&lock, now), "there was none");
        std::fs::write(&lock, "").unwrap();
        assert!(!is_due(&lock, now));
        assert!(is_due(&lock, now + 2 * EVERY));
        assert!(is_due(&lock, now - 2 * EVERY), "the clock was set back");
    }
}
