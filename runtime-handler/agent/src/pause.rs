//! The PID namespace of a pod whose containers see each other (`shareProcessNamespace`), and
//! the process that holds it: this binary again, as `dyad-agent pause`.
//!
//! It is the pod's PID 1, as the pause container is elsewhere: orphans of all containers
//! become its children, and it has nothing of the guest for them to find: an empty root, no
//! rights, another user than root.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use dyad_linux::reaper::{Reaper, Spawned};
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Uid, chdir, pause, pivot_root, setgroups, setresgid, setresuid};

/// The argument that makes this binary the pause process.
pub const ARGUMENT: &str = "pause";

/// The user of Kubernetes' own pause image.
const USER: u32 = 65535;

/// As kubelet gives the pause container: it ends last when memory is short.
const OOM_SCORE: &str = "-998";

/// The pod's PID namespace, made when the first container joins it.
#[derive(Debug, Default)]
pub struct PodPids {
    holder: tokio::sync::Mutex<Option<Spawned>>,
}

impl PodPids {
    /// Its path for setns. It is made anew where its process has died, with which the kernel
    /// ended all processes in it.
    ///
    /// # Errors
    /// The kernel refused a namespace or a process.
    pub async fn namespace(&self, reaper: &Arc<Reaper>) -> Result<PathBuf> {
        let mut holder = self.holder.lock().await;
        // What has ended leaves its place.
        if let Some(mut process) = holder.take()
            && process.exit.try_wait().is_none()
        {
            *holder = Some(process);
        }
        let pid = match holder.as_ref() {
            Some(process) => process.pid,
            None => holder.insert(start(Arc::clone(reaper)).await?).pid,
        };
        Ok(namespace_of(pid))
    }
}

/// The PID namespace that this process of the guest is in.
pub fn namespace_of(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/pid"))
}

/// Starts the process. Which namespace children begin in is a thread's own, so a thread of
/// its own does it.
async fn start(reaper: Arc<Reaper>) -> Result<Spawned> {
    let what = || "start the pod's pause process".to_owned();
    let (answer, answered) = tokio::sync::oneshot::channel();
    let thread = move || {
        let started = unshare(CloneFlags::CLONE_NEWPID)
            .map_err(std::io::Error::from)
            .and_then(|()| reaper.spawn(&mut command()));
        // An error: who asked has gone, and the process with its waiter's owner stays unused.
        let _ = answer.send(started);
    };
    std::thread::Builder::new()
        .name("pause".into())
        .spawn(thread)
        .context(what)?;
    answered
        .await
        .map_err(|_| Error::Unavailable(format!("{}: its thread died", what()), None))?
        .context(what)
}

fn command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("/pause")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// The pause process's `main`; it comes back only when it could not confine itself.
pub fn main() -> ExitCode {
    if confine().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        pause();
    }
}

fn confine() -> nix::Result<()> {
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    prctl::set_name(c"pause")?;
    // Ignored means reaped by the kernel, orphans that become ours included (wait(2)).
    // SAFETY: no handler is installed, so none can run.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("pause"), "/tmp", Some("tmpfs"), flags, Some("size=4k"))?;
    chdir("/tmp")?;
    // The old root goes over the new one, and away.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    setgroups(&[])?;
    let (group, user) = (Gid::from_raw(USER), Uid::from_raw(USER));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    prctl::set_no_new_privs()
}
