//! The end of the machine.

use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::sync;

use crate::guest::Agent;
use crate::rootfs;

/// How the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Power off.
    Off,
    /// Boot again.
    Reboot,
}

/// After SIGKILL, how long the kernel may take to end every process.
const KILL_WITHIN: Duration = Duration::from_secs(5);

/// After the answer to Shutdown, so that it can still leave: the link tells nobody
/// when a frame is out.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// [`shut_down`], after the caller's answer.
pub fn shut_down_soon(agent: Arc<Agent>, kind: Kind, grace: Duration) {
    log::info!("shutting down: {kind:?}");
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WORDS).await;
        shut_down(agent, kind, grace).await;
    });
}

/// Ends every container (SIGTERM, `grace`, SIGKILL), unmounts and ends the machine.
pub async fn shut_down(agent: Arc<Agent>, kind: Kind, grace: Duration) {
    let containers = agent.containers.all();
    for container in &containers {
        container.thaw_for_end();
        // One that has ended already is what we want.
        let _ = container.signal_init(&agent.reaper, libc::SIGTERM);
    }
    let ended = async {
        for container in &containers {
            container.init().ended().await;
        }
    };
    if tokio::time::timeout(grace, ended).await.is_err() {
        log::warn!("containers did not end within {} ms", grace.as_millis());
    }
    for container in &containers {
        if let Err(error) = container.cgroup().kill(KILL_WITHIN).await {
            log::warn!("{}", error.chain());
        }
    }
    for container in &containers {
        container.rootfs().unmount();
    }
    unmount(rootfs::POD_DISK);
    // In PID 1 this is the end; the console has had all lines.
    halt(kind)
}

fn unmount(target: &str) {
    if umount2(target, MntFlags::empty()).is_err() {
        // Something still holds it, or it was never mounted. Read-only is as good: the
        // journal is closed and nothing more is written.
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let _ = mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
    }
}

/// Ends the machine now.
pub fn halt(kind: Kind) -> ! {
    sync();
    let mode = match kind {
        Kind::Off => RebootMode::RB_POWER_OFF,
        Kind::Reboot => RebootMode::RB_AUTOBOOT,
    };
    // It returns only on failure, which PID 1 with all capabilities does not see; if it
    // did, our exit makes the kernel panic, and the host sees a crash.
    let Err(error) = reboot(mode);
    log::error!("end the machine: {error}");
    std::process::exit(1)
}
