//! The pod itself: its machine, as the driver's sandbox instance.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use dyad_runtime_handler::handler::{Exit, Instance, ProcessId, Reboot};
use dyad_runtime_handler::spec::{ExecSpec, Resources, Stdio};
use dyad_runtime_handler::stats::Stats;
use log::warn;

use crate::machine::Machine;

/// The sandbox of a machine pod.
pub struct Sandbox {
    machine: Arc<Machine>,
}

impl Sandbox {
    /// The sandbox that is this machine.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self { machine }
    }

    fn process(&self) -> ProcessId {
        ProcessId::init(self.machine.sandbox_id())
    }

    fn no_process(&self, exec: Option<&str>) -> Result<()> {
        match exec {
            None => Ok(()),
            Some(exec) => Err(Error::NotFound(format!(
                "exec {exec}: the sandbox of a machine pod has no processes; exec"
            ))),
        }
    }
}

#[async_trait]
impl Instance for Sandbox {
    async fn start(&self, _stdio: Option<Stdio>) -> Result<u32> {
        if self.machine.is_waiting() {
            // There is no QEMU yet; who keeps the pod until then is this process.
            return Ok(std::process::id());
        }
        self.machine.power_on().await?;
        let pid = match self.machine.ready().await {
            Ok(pid) => pid,
            Err(error) => {
                if let Err(error) = self.machine.destroy(libc::SIGKILL).await {
                    warn!("{}", error.chain());
                }
                return Err(error);
            }
        };
        let process = self.process();
        self.machine.started(process.clone());
        if self.machine.is_off() {
            // It ended between the two: tell what nobody was registered for.
            let exit = Exit {
                status: 255,
                at: SystemTime::now(),
            };
            self.machine.finished(&process, exit);
        }
        Ok(pid)
    }

    fn pid(&self) -> Option<u32> {
        self.machine.pid()
    }

    async fn signal(&self, exec: Option<&str>, signal: i32, _all: bool) -> Result<()> {
        self.no_process(exec)?;
        if self.machine.is_off() {
            return Err(Error::NotFound(
                "the machine is powered off; its process".into(),
            ));
        }
        match signal {
            0 => Ok(()),
            libc::SIGTERM | libc::SIGKILL | libc::SIGINT | libc::SIGQUIT => {
                self.machine.destroy(signal).await
            }
            other => Err(Error::InvalidArgument(format!(
                "signal {other}: a machine takes SIGTERM, SIGINT, SIGQUIT and SIGKILL, which power it off"
            ))),
        }
    }

    async fn stop(&self, grace: Duration) -> Result<()> {
        self.machine.shut_down(grace).await
    }

    fn reboot(&self) -> Option<&dyn Reboot> {
        Some(self)
    }

    async fn pause(&self) -> Result<()> {
        self.machine.suspend().await
    }

    async fn resume(&self) -> Result<()> {
        self.machine.resume().await
    }

    async fn exec(&self, _spec: ExecSpec) -> Result<()> {
        Err(Error::Unimplemented(
            "the sandbox of a machine pod has no process to exec beside; exec in one of its containers".into(),
        ))
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        Err(Error::NotFound(format!("exec {exec_id}")))
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        Err(Error::NotFound(format!("exec {exec_id}")))
    }

    async fn resize(&self, exec: Option<&str>, _width: u16, _height: u16) -> Result<()> {
        self.no_process(exec)?;
        Err(Error::FailedPrecondition(
            "the sandbox of a machine pod has no terminal".into(),
        ))
    }

    async fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        self.no_process(exec)
    }

    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        Ok(self
            .machine
            .pid()
            .map(|pid| (pid, None))
            .into_iter()
            .collect())
    }

    async fn stats(&self) -> Result<Stats> {
        self.machine.stats()
    }

    async fn update(&self, _resources: &Resources) -> Result<()> {
        Err(Error::Unimplemented(
            "a machine follows the limits of its containers; update those".into(),
        ))
    }

    async fn delete(&self) -> Result<()> {
        self.machine.withdrawn(&self.process());
        self.machine.delete().await
    }
}

#[async_trait]
impl Reboot for Sandbox {
    async fn reboot(&self, force: bool, grace: Duration) -> Result<u32> {
        self.machine.reboot(force, grace).await
    }
}
