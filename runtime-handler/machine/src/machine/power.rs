//! What libvirt tells of the machine's power, and taking it away.

use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use dyad_runtime_handler::handler::{Event, MachineEvent};
use log::{debug, info, warn};
use tokio::sync::mpsc;

use super::images::connect;
use super::state::{Input, State};
use super::{Machine, lock};
use crate::events::{Change, Ending, Observed};
use crate::libvirt;

/// How often the console's log is looked at.
const CONSOLE_LOOK: Duration = Duration::from_secs(10);
/// It may have this many bytes before it begins anew.
const CONSOLE_BYTES: u64 = 1 << 20;
/// A guest that was told to power off gets this long beyond the grace of its processes.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(10);
/// An agent that serves answers sooner, whatever the grace.
const SHORT_CALL: Duration = Duration::from_secs(2);
/// libvirt's event follows QEMU's end at once; its destroy polls every 200 ms.
const STOPPED_PATIENCE: Duration = Duration::from_secs(10);
/// QEMU takes milliseconds; on a busy host more. Then libvirt kills it.
const TERM_PATIENCE: Duration = Duration::from_secs(1);

impl Machine {
    /// Follows libvirt's word until the machine is dropped.
    pub(super) async fn follow(
        machine: std::sync::Weak<Self>,
        mut changes: mpsc::UnboundedReceiver<Change>,
    ) {
        // Powering on paused and resuming are told too, and are nobody's pause.
        let mut starting = false;
        while let Some(change) = changes.recv().await {
            let Some(machine) = machine.upgrade() else {
                return;
            };
            if machine.takes_in(change) {
                continue;
            }
            match change {
                // Its end here may be a step of the migration, which says what it comes to. A
                // libvirtd that died meanwhile finds QEMU gone, and calls that a crash.
                Change::Stopped(_) if machine.state().leaves() => {}
                Change::Started => starting = true,
                Change::Resumed if starting => starting = false,
                Change::Suspended if starting => {}
                Change::Suspended => {
                    machine.change(Input::Suspended);
                    machine.tell(MachineEvent::Suspended);
                }
                Change::Resumed => {
                    machine.change(Input::Resumed);
                    machine.tell(MachineEvent::Resumed);
                }
                Change::Rebooted => machine.rebooted(),
                Change::Panicked => machine.tell(MachineEvent::Crashed),
                Change::Stopped(ending) => {
                    starting = false;
                    machine.ended(ending);
                }
                Change::Undefined | Change::Arriving => {}
            }
        }
    }

    /// Looks after the console's log until the machine is dropped. libvirt's own way,
    /// virtlogd, is not there on every host.
    pub(super) async fn bound_console(machine: std::sync::Weak<Self>) {
        let mut ticks = tokio::time::interval(CONSOLE_LOOK);
        loop {
            ticks.tick().await;
            let Some(machine) = machine.upgrade() else {
                return;
            };
            if let Err(error) = machine.folder.bound_console(CONSOLE_BYTES) {
                warn!("{}", error.chain());
            }
        }
    }

    pub(super) fn stop_following(&self) {
        if let Some(watcher) = lock(&self.watcher).take() {
            watcher.abort();
        }
        self.libvirt.unwatch();
    }

    fn tell(&self, event: MachineEvent) {
        // The driver ends with the shim.
        let _ = self.events.send(Event::Machine(event));
    }

    /// The guest's processes are gone; it comes up anew.
    fn rebooted(self: &Arc<Self>) {
        if self.change(Input::Rebooted) {
            info!("machine {} rebooted", self.record.uuid);
            // The new guest knows nothing of the old one's calls and streams.
            let old = std::mem::replace(&mut *lock(&self.agent), connect(&self.channel));
            old.close();
            self.end_all(128 + libc::SIGKILL as u32, |process| {
                process.container != self.record.sandbox_id
            });
            self.tell(MachineEvent::Rebooted);
            let machine = Arc::clone(self);
            tokio::spawn(async move { machine.boot().await });
        }
    }

    pub(super) fn ended(&self, ending: Ending) {
        let status = match self.state().ended_by() {
            Some(signal) => 128 + signal.unsigned_abs(),
            None => ending.status(),
        };
        info!(
            "machine {} ended: {ending:?}, status {status}",
            self.record.uuid
        );
        // First the state: who is told of an exit may ask for it.
        self.change(Input::Ended(ending));
        // Nobody writes its processes' output any more: let go of their FIFOs.
        self.agent().close();
        self.end_all(status, |process| {
            process.container != self.record.sandbox_id
        });
        self.end_all(status, |_| true);
    }

    /// Shuts the guest down: its agent ends all processes and powers off; then the power
    /// button, then the plug. Returns when it is off.
    ///
    /// # Errors
    /// libvirt could not even pull the plug.
    pub async fn shut_down(&self, grace: Duration) -> Result<()> {
        if self.is_off() {
            return Ok(());
        }
        let agent = self.agent();
        let asked =
            tokio::time::timeout(grace.min(POWER_OFF_PATIENCE), agent.shutdown(false, grace)).await;
        let asked = match asked {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                debug!("ask the guest to power off: {}", error.chain());
                false
            }
            Err(_) => false,
        };
        if !asked && let Err(error) = self.libvirt.press_power_button(self.record.uuid).await {
            debug!("{}", Error::from(error).chain());
        }
        let extra = if asked {
            POWER_OFF_PATIENCE
        } else {
            Duration::ZERO
        };
        if self.await_off(grace + extra).await {
            return Ok(());
        }
        self.destroy(libc::SIGKILL).await
    }

    /// Boots the guest anew in the same QEMU: its agent ends all processes and reboots, or
    /// (`force`, or where that comes to nothing) it is reset. Returns QEMU's pid when the
    /// guest serves.
    ///
    /// # Errors
    /// libvirt could not reset it, and it runs on; or its guest did not come up, and it is
    /// off.
    pub async fn reboot(&self, force: bool, grace: Duration) -> Result<u32> {
        // Seen by its number: another reboot must not be taken for this one.
        let before = self.boot_number();
        let mut states = self.states.subscribe();
        let mut rebooted = async |bound: Duration| {
            let seen = states.wait_for(|state| state.reboots != before);
            tokio::time::timeout(bound, seen).await.is_ok()
        };
        let mut done = false;
        if !force {
            let bound = grace.min(POWER_OFF_PATIENCE).max(SHORT_CALL);
            let asked = tokio::time::timeout(bound, self.agent().shutdown(true, grace)).await;
            match asked {
                Ok(Ok(())) => done = rebooted(grace + POWER_OFF_PATIENCE).await,
                Ok(Err(error)) => debug!("ask the guest to reboot: {}", error.chain()),
                Err(_) => debug!("ask the guest to reboot: no answer within {bound:?}"),
            }
        }
        if !done && !self.is_off() {
            self.libvirt.reset(self.record.uuid).await?;
            done = rebooted(STOPPED_PATIENCE).await;
        }
        let ready = match done {
            true => self.ready().await,
            false => Err(Error::Unavailable(
                "libvirt tells of no reboot".into(),
                None,
            )),
        };
        if ready.is_err() {
            self.destroy(libc::SIGKILL).await?;
        }
        ready
    }

    /// Pulls the plug; `signal` is what the exit status will say. Returns when it is off.
    ///
    /// # Errors
    /// libvirt could not end QEMU.
    pub async fn destroy(&self, signal: i32) -> Result<()> {
        if self.is_off() {
            return Ok(());
        }
        self.change(Input::EndAsked(signal));
        // libvirt's own way looks five times a second whether QEMU is gone; QEMU ends within
        // milliseconds of SIGTERM, and libvirt sees that at once.
        let told = self
            .pid()
            .is_some_and(|pid| libvirt::terminate_qemu(pid, self.record.uuid));
        if told && self.await_off(TERM_PATIENCE).await {
            return Ok(());
        }
        self.libvirt.destroy(self.record.uuid).await?;
        if !self.await_off(STOPPED_PATIENCE).await {
            // The event may be lost with a libvirtd that died; its state is not.
            if let Observed::Off(ending) = self.libvirt.state(self.record.uuid).await? {
                self.ended(ending);
            }
        }
        Ok(())
    }

    /// Tells one boot of its guest from the next in the same QEMU.
    pub fn boot_number(&self) -> u64 {
        self.states.borrow().reboots
    }

    /// Whether its vCPUs are stopped.
    pub fn is_suspended(&self) -> bool {
        self.states.borrow().is_suspended()
    }

    /// Whether it is powered off.
    pub fn is_off(&self) -> bool {
        self.states.borrow().is_off()
    }

    async fn await_off(&self, bound: Duration) -> bool {
        let mut states = self.states.subscribe();
        let off = states.wait_for(State::is_off);
        tokio::time::timeout(bound, off).await.is_ok()
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn suspend(&self) -> Result<()> {
        Ok(self.libvirt.suspend(self.record.uuid).await?)
    }

    /// Runs the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn resume(&self) -> Result<()> {
        Ok(self.libvirt.resume(self.record.uuid).await?)
    }
}
