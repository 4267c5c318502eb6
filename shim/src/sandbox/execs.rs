//! The driver's steps for further processes of a container.

use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::spec::ExecSpec;
use dyad_runtime_handler::{Error, Result};
use log::debug;

use super::driver::Driver;
use super::lane::Ticket;
use super::state::Request;
use super::task::{Exec, ExecPhase, answer_waiters};
use super::{ExecRequest, Gone, Reply, TaskEvent};
use crate::stdio::{OpenStdio, Owner};

impl Driver {
    pub(super) fn add_exec(
        &mut self,
        container: &str,
        exec: String,
        ticket: Ticket,
        request: ExecRequest,
        reply: Reply<()>,
    ) {
        let ready = self.decide(container, Request::Exec).and_then(|_| {
            let task = self.task(container)?;
            if task.execs.contains_key(&exec) {
                return Err(Error::AlreadyExists(
                    ProcessId::exec(container, exec.clone()).to_string(),
                ));
            }
            let instance = task.instance(container)?;
            task.execs.insert(
                exec.clone(),
                Exec {
                    phase: ExecPhase::Adding,
                    uris: request.stdio.clone(),
                    stdio: None,
                    waiters: Vec::new(),
                },
            );
            Ok(instance)
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        let namespace = self.pod.launch.containerd_namespace.clone();
        let owner_id = container.clone();
        let exec_id = exec.clone();
        let effect = async move {
            let owner = Owner {
                namespace: &namespace,
                container: &owner_id,
            };
            let stdio = OpenStdio::open(&request.stdio, owner).await?;
            let spec = ExecSpec {
                exec_id,
                process: request.process,
                stdio: stdio.duplicate()?,
            };
            instance.exec(spec).await?;
            Ok::<_, Error>(stdio)
        };
        self.effect(effect, move |driver, result| {
            let Ok(task) = driver.task(&container) else {
                return;
            };
            let result = match result {
                Ok(stdio) => {
                    if let Ok(exec) = task.exec(&container, &exec) {
                        exec.phase = ExecPhase::Added;
                        exec.stdio = Some(stdio);
                    }
                    driver.publish(TaskEvent::ExecAdded {
                        container: container.clone(),
                        exec,
                    });
                    Ok(())
                }
                Err(error) => {
                    task.execs.remove(&exec);
                    Err(error)
                }
            };
            let _ = reply.send(result);
            driver.finish(&container, ticket);
        });
    }

    pub(super) fn run_exec(
        &mut self,
        container: &str,
        exec: String,
        ticket: Ticket,
        reply: Reply<u32>,
    ) {
        let ready = self.decide(container, Request::Exec).and_then(|_| {
            let task = self.task(container)?;
            let instance = task.instance(container)?;
            let entry = task.exec(container, &exec)?;
            match entry.phase {
                ExecPhase::Added => {
                    entry.phase = ExecPhase::Starting { early: None };
                    Ok(instance)
                }
                _ => Err(Error::FailedPrecondition(format!(
                    "exec {exec} of container {container} has been started already"
                ))),
            }
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        let exec_id = exec.clone();
        self.effect(
            async move { instance.start_exec(&exec_id).await },
            move |driver, result| {
                driver.exec_started(&container, &exec, result, reply);
                driver.finish(&container, ticket);
            },
        );
    }

    fn exec_started(
        &mut self,
        container: &str,
        exec: &str,
        result: Result<u32>,
        reply: Reply<u32>,
    ) {
        let Ok(entry) = self
            .task(container)
            .and_then(|task| task.exec(container, exec))
        else {
            return;
        };
        let early = match entry.phase {
            ExecPhase::Starting { early } => early,
            _ => None,
        };
        match result {
            Ok(pid) => {
                entry.phase = ExecPhase::Running { pid };
                self.publish(TaskEvent::ExecStarted {
                    container: container.to_owned(),
                    exec: exec.to_owned(),
                    pid,
                });
                let _ = reply.send(Ok(pid));
                if let Some(exit) = early {
                    self.exec_exited(container, exec, exit);
                }
            }
            Err(error) => {
                // It never ran; what waits for it is told that it is over.
                let exit = Exit {
                    status: 255,
                    at: std::time::SystemTime::now(),
                };
                entry.phase = ExecPhase::Exited { pid: 0, exit };
                entry.stdio = None;
                answer_waiters(&mut entry.waiters, exit);
                let _ = reply.send(Err(error));
            }
        }
    }

    pub(super) fn exec_exited(&mut self, container: &str, exec: &str, exit: Exit) {
        let Ok(entry) = self
            .task(container)
            .and_then(|task| task.exec(container, exec))
        else {
            debug!("exit of exec {exec} of {container}, which is gone");
            return;
        };
        let pid = match &mut entry.phase {
            ExecPhase::Starting { early } => {
                *early = Some(exit);
                return;
            }
            ExecPhase::Running { pid } => *pid,
            phase => {
                debug!("exit of exec {exec} of {container} while {phase:?}");
                return;
            }
        };
        entry.phase = ExecPhase::Exited { pid, exit };
        entry.stdio = None;
        let mut waiters = std::mem::take(&mut entry.waiters);
        self.publish(TaskEvent::Exit {
            process: ProcessId::exec(container, exec),
            pid,
            exit,
        });
        answer_waiters(&mut waiters, exit);
    }

    pub(super) fn signal_exec(
        &mut self,
        container: &str,
        exec: String,
        ticket: Ticket,
        signal: i32,
        reply: Reply<()>,
    ) {
        let ready = self.task(container).and_then(|task| {
            let instance = task.instance(container)?;
            let name = ProcessId::exec(container, exec.clone());
            match task.exec(container, &exec)?.phase {
                ExecPhase::Running { .. } => Ok(instance),
                ExecPhase::Exited { .. } => Err(Error::NotFound(format!("process of {name}"))),
                _ => Err(Error::FailedPrecondition(format!(
                    "cannot signal {name}: it has not been started"
                ))),
            }
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        self.effect(
            async move { instance.signal(Some(&exec), signal, false).await },
            move |driver, result| {
                let _ = reply.send(result);
                driver.finish(&container, ticket);
            },
        );
    }

    pub(super) fn delete_exec(
        &mut self,
        container: &str,
        exec: String,
        ticket: Ticket,
        reply: Reply<Gone>,
    ) {
        let ready = self.task(container).and_then(|task| {
            let instance = task.instance(container)?;
            match task.exec(container, &exec)?.phase {
                ExecPhase::Running { .. } => Err(Error::FailedPrecondition(format!(
                    "cannot delete exec {exec} of container {container}: it is running; kill it first"
                ))),
                _ => Ok(instance),
            }
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        let exec_id = exec.clone();
        let effect = async move {
            match instance.delete_exec(&exec_id).await {
                // One that could not be run may be gone on the backend's side.
                Err(Error::NotFound(_)) => Ok(()),
                result => result,
            }
        };
        self.effect(effect, move |driver, result| {
            let result = result.and_then(|()| driver.exec_deleted(&container, &exec));
            let _ = reply.send(result);
            driver.finish(&container, ticket);
        });
    }

    fn exec_deleted(&mut self, container: &str, exec: &str) -> Result<Gone> {
        let task = self.task(container)?;
        task.exec(container, exec)?;
        let mut entry = match task.execs.remove(exec) {
            Some(entry) => entry,
            None => return Err(Error::NotFound(format!("exec {exec}"))),
        };
        let exit = entry.phase.exit().unwrap_or_else(|| Exit {
            status: 0,
            at: std::time::SystemTime::now(),
        });
        answer_waiters(&mut entry.waiters, exit);
        let gone = Gone {
            pid: entry.phase.pid(),
            exit,
        };
        // containerd's own shim tells only of the init process's delete.
        Ok(gone)
    }
}
