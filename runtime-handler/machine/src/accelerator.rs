//! KVM where it really runs a guest, else TCG.
//!
//! `/dev/kvm` may exist and a guest kernel still hang in it (nested hosts). So a guest is
//! run: our kernel without a root, until its first words on the console or the bound. The
//! answer holds for this boot of the host, this QEMU and this kernel, and is kept; that a guest
//! was not heard of in time, for ten minutes.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::AcceleratorChoice;
use dyad_runtime_handler::error::{Context, Result};
use log::{info, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::domain::Accelerator;
use crate::host::Capabilities;
use crate::locks;

/// A KVM guest says its first words within a fraction of this, also on a host that is itself
/// emulated.
const PROBE_BOUND: Duration = Duration::from_secs(15);
/// How long a guest that said nothing in time stands for a KVM that runs none: the host may
/// have been busy.
const DOUBT: Duration = Duration::from_secs(600);
/// More than one probe takes.
const LOCK_BOUND: Duration = Duration::from_secs(20);
/// What a guest kernel says first.
const FIRST_WORDS: &[u8] = b"Linux version";
const DEVICE: &str = "/dev/kvm";

/// The kept answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    /// Boot id, QEMU and kernel that it holds for.
    key: String,
    /// KVM ran a guest.
    kvm: bool,
    /// Why not.
    reason: String,
    /// Unix time in seconds at which it is asked again; `None`: it holds.
    #[serde(default)]
    until: Option<u64>,
}

/// Why no guest was run.
enum Failed {
    /// KVM is not there, or refuses.
    Sure(String),
    /// It was not heard of in time.
    Late,
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self::Sure(reason)
    }
}

/// What to run the pod's machine with.
///
/// # Errors
/// `FailedPrecondition` where the configuration demands KVM and it runs no guest.
pub async fn choose(
    choice: AcceleratorChoice,
    capabilities: &Capabilities,
    kernel: &Path,
    cache_dir: &Path,
) -> Result<Accelerator> {
    if choice == AcceleratorChoice::Tcg {
        return Ok(Accelerator::Tcg);
    }
    let (kvm, reason) = if capabilities.kvm {
        probe(&capabilities.emulator, kernel, cache_dir).await?
    } else {
        (false, "libvirt finds no KVM on this host".to_owned())
    };
    match (kvm, choice) {
        (true, _) => Ok(Accelerator::Kvm),
        (false, AcceleratorChoice::Kvm) => Err(Error::FailedPrecondition(format!(
            "accelerator = \"kvm\", but KVM does not run a guest on this host: {reason}; set it to \"auto\" or \"tcg\" in section [machine] of the configuration"
        ))),
        (false, _) => Ok(Accelerator::Tcg),
    }
}

/// Whether KVM runs a guest, and why not. Asked at once by several, one runs it.
///
/// # Errors
/// The cache directory cannot be written, or who runs it does not end.
pub async fn probe(emulator: &Path, kernel: &Path, cache_dir: &Path) -> Result<(bool, String)> {
    let key = key(emulator, kernel)?;
    let kept = cache_dir.join("accelerator.json");
    if let Some(verdict) = read(&kept, &key) {
        return Ok((verdict.kvm, verdict.reason));
    }
    let names = ["accelerator.lock".to_owned()];
    let lock = locks::take(&cache_dir.join(locks::DIR), &names, LOCK_BOUND).await;
    let _lock = lock.context(|| "wait for another shim's probe of KVM".into())?;
    if let Some(verdict) = read(&kept, &key) {
        return Ok((verdict.kvm, verdict.reason));
    }
    let started = Instant::now();
    let (emulator, kernel) = (emulator.to_owned(), kernel.to_owned());
    let outcome = tokio::task::spawn_blocking(move || run(&emulator, &kernel))
        .await
        .map_err(|error| Error::Unavailable(format!("probe KVM: {error}"), None))?;
    let (kvm, reason, until) = match outcome {
        Ok(()) => (true, String::new(), None),
        Err(Failed::Sure(reason)) => (false, reason, None),
        Err(Failed::Late) => {
            let reason = format!(
                "a guest kernel said nothing within {} s",
                PROBE_BOUND.as_secs()
            );
            (false, reason, Some(now_s() + DOUBT.as_secs()))
        }
    };
    if kvm {
        info!("KVM runs a guest (probed in {:?})", started.elapsed());
    } else {
        warn!("KVM does not run a guest, machines are emulated: {reason}");
    }
    let verdict = Verdict {
        key,
        kvm,
        reason,
        until,
    };
    let json = serde_json::to_vec(&verdict).context(|| "write the KVM probe's result".into())?;
    write_atomically(&kept, &json, PRIVATE)?;
    Ok((verdict.kvm, verdict.reason))
}

fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn key(emulator: &Path, kernel: &Path) -> Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context(|| "read the host's boot id".into())?;
    let mut key = boot.trim().to_owned();
    for file in [emulator, kernel] {
        let meta = fs::metadata(file).context(|| format!("look at {}", file.display()))?;
        key.push_str(&format!(
            " {} {} {}.{}",
            file.display(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec()
        ));
    }
    Ok(key)
}

fn read(kept: &Path, key: &str) -> Option<Verdict> {
    let verdict: Verdict = serde_json::from_slice(&fs::read(kept).ok()?).ok()?;
    let holds = verdict.until.is_none_or(|until| now_s() < until);
    (verdict.key == key && holds).then_some(verdict)
}

/// Runs the guest; `Err` says why it did not.
fn run(emulator: &Path, kernel: &Path) -> Result<(), Failed> {
    File::open(DEVICE).map_err(|error| format!("open {DEVICE}: {error}"))?;
    let child = Command::new(emulator)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "128",
        ])
        .args([
            "-serial",
            "stdio",
            "-append",
            // Long before there is a console.
            "earlyprintk=ttyS0 console=ttyS0 panic=-1",
            "-kernel",
        ])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("run {}: {error}", emulator.display()))?;
    let mut guest = Guest(child);
    let Some(mut console) = guest.0.stdout.take() else {
        return Err(Failed::Sure("no console".into()));
    };
    let deadline = Instant::now() + PROBE_BOUND;
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failed::Late);
        }
        let mut fds = [PollFd::new(console.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(format!("wait for the guest's console: {errno}").into()),
        }
        match console.read(&mut buffer) {
            Ok(0) => {
                let mut words = String::new();
                if let Some(mut stderr) = guest.0.stderr.take() {
                    // It ended, so this does not block.
                    let _ = stderr.read_to_string(&mut words);
                }
                return Err(format!("QEMU ended: {}", words.trim()).into());
            }
            Ok(count) => said.extend_from_slice(&buffer[..count]),
            Err(error) => return Err(format!("read the guest's console: {error}").into()),
        }
        if said
            .windows(FIRST_WORDS.len())
            .any(|window| window == FIRST_WORDS)
        {
            return Ok(());
        }
    }
}

/// Killed and reaped whatever happens.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("qemu");
        fs::write(
            &path,
            format!("#!/bin/sh\necho run >> {}/runs\n{body}\n", dir.display()),
        )
        .expect("script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
        path
    }

    #[tokio::test]
    async fn a_guest_that_speaks_is_believed_and_asked_once() {
        if !Path::new(DEVICE).exists() {
            return;
        }
        let dir = tempfile::tempdir().expect("dir");
        let qemu = script(
            dir.path(),
            "echo '[    0.0] Linux version 6.1'; exec sleep 60",
        );
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, "k").expect("kernel");
        for _ in 0..2 {
            let (kvm, reason) = probe(&qemu, &kernel, dir.path()).await.expect("probe");
            assert!(kvm, "{reason}");
        }
        let runs = fs::read_to_string(dir.path().join("runs")).expect("runs");
        assert_eq!(runs.lines().count(), 1);
        // Another kernel, another answer.
        fs::write(&kernel, "another").expect("kernel");
        probe(&qemu, &kernel, dir.path()).await.expect("probe");
        let runs = fs::read_to_string(dir.path().join("runs")).expect("runs");
        assert_eq!(runs.lines().count(), 2);
    }

    #[tokio::test]
    async fn a_doubt_is_remembered_for_a_while_and_a_refusal_for_this_boot() {
        let dir = tempfile::tempdir().expect("dir");
        let qemu = script(dir.path(), "echo 'no way' >&2; exit 1");
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, "k").expect("kernel");
        let key = key(&qemu, &kernel).expect("key");
        let kept = dir.path().join("accelerator.json");
        for (until, read_back) in [
            (None, true),
            (Some(now_s() + 100), true),
            (Some(now_s() - 1), false),
        ] {
            let verdict = Verdict {
                key: key.clone(),
                kvm: false,
                reason: "late".into(),
                until,
            };
            fs::write(&kept, serde_json::to_vec(&verdict).expect("json")).expect("write");
            assert_eq!(read(&kept, &key).is_some(), read_back, "{until:?}");
        }
        // The doubt is over, so it is asked again, and QEMU refuses for good.
        probe(&qemu, &kernel, dir.path()).await.expect("probe");
        assert_eq!(read(&kept, &key).expect("verdict").until, None);
    }

    #[tokio::test]
    async fn demanded_kvm_that_runs_no_guest_is_an_error_with_the_way_out() {
        let dir = tempfile::tempdir().expect("dir");
        let qemu = script(dir.path(), "echo 'no way' >&2; exit 1");
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, "k").expect("kernel");
        let capabilities = Capabilities {
            qemu_user: None,
            emulator: qemu,
            kvm: true,
        };
        let error = choose(AcceleratorChoice::Kvm, &capabilities, &kernel, dir.path())
            .await
            .expect_err("refused");
        assert!(error.to_string().contains("\"tcg\""), "{error}");
        let auto = choose(AcceleratorChoice::Auto, &capabilities, &kernel, dir.path())
            .await
            .expect("auto");
        assert_eq!(auto, Accelerator::Tcg);
        let tcg = choose(
            AcceleratorChoice::Tcg,
            &capabilities,
            Path::new("/no"),
            Path::new("/no"),
        )
        .await
        .expect("tcg");
        assert_eq!(tcg, Accelerator::Tcg);
    }
}
