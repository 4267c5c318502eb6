//! Powering on, and the way from there to a guest that serves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use dyad_agent_api::proto::agent::{self as proto, SetupRequest};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::handler::Event;
use log::{debug, warn};

use super::images::connect;
use super::state::{Boot, Input, Power, State};
use super::{Machine, POD_DISK_SERIAL, lock};
use crate::guest::GuestEvent;
use crate::kept::Kept;
use crate::network::apply as network;
use crate::network::plan::GuestRoute;
use crate::{cgroup, libvirt, locks, slots};

/// As much fresh randomness as the kernel's generator takes in.
const ENTROPY_BYTES: usize = 64;
/// `/dev/shm` as Kubernetes gives it.
const SHM_BYTES: u64 = 64 << 20;
/// What a boot failure quotes of the console.
const CONSOLE_LINES: usize = 15;

impl Machine {
    /// Runs the defined domain: paused first, so that QEMU is accounted to the pod and its
    /// taps are wired before the guest executes anything.
    ///
    /// # Errors
    /// libvirt, the cgroup or the network refused; then it is off.
    pub async fn power_on(self: &Arc<Self>) -> Result<()> {
        if !self.is_off() {
            return Ok(());
        }
        let slots_dir = self.paths.cache_dir.join(locks::DIR);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let slot = slots::take(slots_dir, cpus).await?;
        *lock(&self.agent) = connect(&self.channel);
        let started = Instant::now();
        let on = self.power_on_here().await;
        if let Err(error) = on {
            if let Err(error) = self.libvirt.destroy(self.record.uuid).await {
                warn!("{}", Error::from(error).chain());
            }
            return Err(error);
        }
        debug!(
            "machine {} runs after {:?}",
            self.record.uuid,
            started.elapsed()
        );
        let machine = Arc::clone(self);
        tokio::spawn(async move {
            machine.boot().await;
            drop(slot);
        });
        Ok(())
    }

    async fn power_on_here(&self) -> Result<()> {
        let uuid = self.record.uuid;
        // It may have another size than it was defined with.
        let xml = lock(&self.plan).to_xml();
        self.libvirt.define(uuid, xml).await?;
        self.libvirt.create_paused(uuid).await?;
        let pid = libvirt::find_qemu(uuid, &self.folder.disk())
            .context(|| format!("find QEMU of domain {uuid}"))?;
        if let Some(path) = &self.record.cgroups_path {
            cgroup::account(path, self.cpu_shares, pid).await?;
        }
        if let Some(netns) = &self.record.netns {
            let plan = lock(&self.network).clone();
            for interface in &plan.interfaces {
                let localhost = plan.localhost.as_ref();
                let localhost = localhost.filter(|way| way.interface == interface.name);
                network::wire(netns, interface, localhost).await?;
            }
        }
        self.libvirt.resume(uuid).await?;
        self.change(Input::PoweredOn { pid });
        Ok(())
    }

    /// Waits for the agent and makes the guest the pod.
    pub(super) async fn boot(self: &Arc<Self>) {
        let bound = self.config.boot_timeout();
        let (reboots, agent) = (self.boot_number(), self.agent());
        let booted = tokio::time::timeout(bound, async {
            agent.ready(bound).await?;
            let setup = agent.setup(self.setup_request()).await;
            let setup = setup.inspect_err(|error| self.doubt_disk(error))?;
            self.size_again(&agent).await?;
            Ok::<_, Error>(setup)
        });
        let mut states = self.states.subscribe();
        let result = tokio::select! {
            booted = booted => match booted {
                Ok(Ok(setup)) => {
                    debug!("guest of {}: kernel {}", self.record.uuid, setup.kernel_release);
                    *lock(&self.kernel_release) = setup.kernel_release;
                    Ok(())
                }
                Ok(Err(error)) => Err(error.chain()),
                Err(_) => Err(format!("its agent did not answer within {} s", bound.as_secs())),
            },
            _ = states.wait_for(State::is_off) => {
                Err("it powered off while booting".into())
            }
        };
        let boot = match result {
            Ok(()) => Boot::Ready,
            Err(reason) => {
                let console = self.folder.console_tail(CONSOLE_LINES);
                Boot::Failed(format!(
                    "the machine did not boot: {reason}; its console ends with:\n{console}"
                ))
            }
        };
        // One that rebooted meanwhile (a guest's reboot may reset it more than once) has another
        // boot, which has its own end.
        let ready = boot == Boot::Ready;
        let is_this_boot = self.change(Input::Booted { reboots, boot });
        if ready && is_this_boot {
            self.inherited.store(false, Ordering::Relaxed);
            self.events_after.store(0, Ordering::Relaxed);
            self.watch_guest();
        }
    }

    /// A guest that says why it cannot be the pod, on a disk that comes from an earlier
    /// machine: the next one is not to fail by that disk too.
    fn doubt_disk(&self, error: &Error) {
        let told = !matches!(error, Error::Unavailable(..) | Error::DeadlineExceeded(_));
        if told && self.inherited.load(Ordering::Relaxed) {
            warn!("the disk of the pod's last sandbox is given up: its emptyDirs will be empty");
            Kept::forget(&self.folder.dir);
        }
    }

    /// Tells what happens in the guest, until the link to it is closed.
    pub(super) fn watch_guest(self: &Arc<Self>) {
        {
            let agent = self.agent();
            let mut after = self.events_after.load(Ordering::Relaxed);
            let machine = Arc::downgrade(self);
            tokio::spawn(async move {
                while let Ok((last, events)) = agent.events(after).await {
                    let Some(machine) = machine.upgrade() else {
                        return;
                    };
                    after = last;
                    machine.events_after.store(last, Ordering::Relaxed);
                    for GuestEvent::OutOfMemory { container } in events {
                        // The driver ends with the shim.
                        let _ = machine.events.send(Event::OutOfMemory { container });
                    }
                }
            });
        }
    }

    /// Waits until the guest serves.
    ///
    /// # Errors
    /// It did not come up, or is off; the text ends with what its console said last.
    pub async fn ready(&self) -> Result<u32> {
        let mut states = self.states.subscribe();
        let is_settled = |state: &State| {
            !matches!(
                state.power,
                Power::On {
                    boot: Boot::Booting,
                    ..
                }
            )
        };
        let settled = states
            .wait_for(is_settled)
            .await
            .map_err(|_| Error::Unavailable("the machine is being removed".into(), None))?
            .power
            .clone();
        match settled {
            Power::On {
                pid,
                boot: Boot::Ready,
                ..
            } => Ok(pid),
            Power::On {
                boot: Boot::Failed(reason),
                ..
            } => Err(Error::Unavailable(reason, None)),
            Power::On { .. } | Power::Off(None) => Err(Error::FailedPrecondition(
                "the machine is powered off; start it first".into(),
            )),
            Power::Off(Some(ending)) => Err(Error::FailedPrecondition(format!(
                "the machine is powered off ({ending:?}); its console ends with:\n{}",
                self.folder.console_tail(CONSOLE_LINES)
            ))),
        }
    }

    /// What a guest that came by migration is asked: its network. The rest is as the source's
    /// pod made it.
    pub(super) fn network_request(&self) -> SetupRequest {
        SetupRequest {
            hostname: String::new(),
            ..self.setup_request()
        }
    }

    pub(super) fn setup_request(&self) -> SetupRequest {
        let mut entropy = vec![0; ENTROPY_BYTES];
        if let Err(error) = fill_random(&mut entropy) {
            warn!("read the host's randomness: {error}");
            entropy.clear();
        }
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let network = lock(&self.network).clone();
        SetupRequest {
            hostname: self.sandbox.hostname.clone(),
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
            entropy,
            pod_disk_serial: POD_DISK_SERIAL.into(),
            interfaces: network
                .interfaces
                .iter()
                .map(|interface| proto::Interface {
                    name: interface.name.clone(),
                    mac: interface.mac.clone(),
                    mtu: interface.mtu,
                    addresses: interface.addresses.clone(),
                    ..Default::default()
                })
                .collect(),
            routes: network.routes.into_iter().map(route).collect(),
            localhost: network
                .localhost
                .as_ref()
                .map(|way| proto::Localhost {
                    interface: way.interface.clone(),
                    host: way.host.to_string(),
                    host_mac: way.host_mac.clone(),
                    ..Default::default()
                })
                .into(),
            sysctls: self.sandbox.sysctls.clone(),
            shm_size: SHM_BYTES,
            pod_disk_inherited: self.inherited.load(Ordering::Relaxed),
            ..Default::default()
        }
    }
}

pub(super) fn route(route: GuestRoute) -> proto::Route {
    proto::Route {
        destination: route.destination,
        gateway: route.gateway,
        interface: route.interface,
        source: route.source,
        metric: route.metric,
        scope: u32::from(route.scope),
        family: u32::from(route.family),
        ..Default::default()
    }
}

fn fill_random(buffer: &mut [u8]) -> std::io::Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(buffer)
}
