//! Further processes of a container.
//!
//! ```text
//!  Add          added        Run            runs           ends
//! -----> Adding -----> Added ----> Starting -----> Running -----> Exited
//!          | not                      | could not be run            ^
//!          v                          `-----------------------------'
//!         gone
//! ```

use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::{Error, Result};

use super::change::{Action, Answer, Call, Job, Plain};
use super::state::Request;
use super::task::{Exec, ExecPhase, NEVER_RAN, exec_not_found};
use super::{Model, Next};
use crate::pod::{ExecRequest, Gone, TaskEvent};

impl Model {
    pub(super) fn add_exec(
        &mut self,
        job: &Job,
        exec: String,
        request: Box<ExecRequest>,
    ) -> Result<Next> {
        let container = &job.container;
        self.decide(container, Request::Exec)?;
        if self.task(container)?.execs.contains_key(&exec) {
            let name = ProcessId::exec(container, exec);
            return Err(Error::AlreadyExists(name.to_string()));
        }
        let entry = Exec {
            phase: ExecPhase::Adding,
            uris: request.stdio.clone(),
        };
        self.made(container)?.execs.insert(exec.clone(), entry);
        Ok(Next::Begin(Call::AddExec(job.clone(), exec, request)))
    }

    pub(super) fn exec_added(&mut self, job: Job, exec: String, result: Result<()>) {
        let container = job.container.clone();
        if result.is_ok() {
            self.set_exec_phase(&container, &exec, ExecPhase::Added);
            self.publish(TaskEvent::ExecAdded { container, exec });
        } else if let Some(task) = self.tasks.get_mut(&container) {
            task.execs.remove(&exec);
        }
        self.done(job, result.map(|()| Answer::Done));
    }

    pub(super) fn run_exec(&mut self, job: &Job, exec: String) -> Result<Next> {
        let container = &job.container;
        self.decide(container, Request::Exec)?;
        if self.exec_phase(container, &exec)? != ExecPhase::Added {
            return Err(Error::FailedPrecondition(format!(
                "exec {exec} of container {container} has been started already"
            )));
        }
        self.set_exec_phase(container, &exec, ExecPhase::Starting { early: None });
        Ok(Next::Begin(Call::StartExec(job.clone(), exec)))
    }

    pub(super) fn exec_started(&mut self, job: Job, exec: &str, result: Result<u32>) {
        let container = job.container.clone();
        let early = match self.exec_phase(&container, exec) {
            Ok(ExecPhase::Starting { early }) => early,
            _ => None,
        };
        match result {
            Ok(pid) => {
                self.set_exec_phase(&container, exec, ExecPhase::Running { pid });
                self.publish(TaskEvent::ExecStarted {
                    container: container.clone(),
                    exec: exec.to_owned(),
                    pid,
                });
                self.answer(job.token, Ok(Answer::Pid(pid)));
                // After its start was told, however short it lived.
                if let Some(exit) = early {
                    self.exec_exited(&container, exec, exit);
                }
            }
            Err(error) => {
                // It never ran; what waits for it is told that it is over.
                let exit = Exit {
                    status: NEVER_RAN,
                    at: self.at,
                };
                self.set_exec_phase(&container, exec, ExecPhase::Exited { pid: 0, exit });
                self.act(Action::Over(ProcessId::exec(container, exec), exit));
                self.answer(job.token, Err(error));
            }
        }
        self.finish(&job);
    }

    pub(super) fn exec_exited(&mut self, container: &str, exec: &str, exit: Exit) {
        match self.exec_phase(container, exec) {
            Ok(ExecPhase::Starting { .. }) => {
                let early = Some(exit);
                self.set_exec_phase(container, exec, ExecPhase::Starting { early });
            }
            Ok(ExecPhase::Running { pid }) => {
                self.set_exec_phase(container, exec, ExecPhase::Exited { pid, exit });
                let process = ProcessId::exec(container, exec);
                self.publish(TaskEvent::Exit {
                    process: process.clone(),
                    pid,
                    exit,
                });
                self.act(Action::Over(process, exit));
            }
            // It is gone, has ended, or was never run.
            Ok(ExecPhase::Adding | ExecPhase::Added | ExecPhase::Exited { .. }) | Err(_) => {}
        }
    }

    pub(super) fn signal_exec(&mut self, job: &Job, exec: String, signal: i32) -> Result<Next> {
        let name = ProcessId::exec(&job.container, exec.clone());
        match self.exec_phase(&job.container, &exec)? {
            ExecPhase::Running { .. } => {
                let what = Plain::Signal { signal, all: false };
                self.plain_exec(job, exec, what)
            }
            ExecPhase::Exited { .. } => Err(Error::NotFound(format!("process of {name}"))),
            _ => Err(Error::FailedPrecondition(format!(
                "cannot signal {name}: it has not been started"
            ))),
        }
    }

    pub(super) fn delete_exec(&mut self, job: &Job, exec: String) -> Result<Next> {
        let container = &job.container;
        match self.exec_phase(container, &exec)? {
            ExecPhase::Running { .. } => Err(Error::FailedPrecondition(format!(
                "cannot delete exec {exec} of container {container}: it is running; kill it first"
            ))),
            _ => Ok(Next::Begin(Call::DeleteExec(job.clone(), exec))),
        }
    }

    pub(super) fn exec_deleted(&mut self, job: Job, exec: &str, result: Result<()>) {
        let result = result.and_then(|()| {
            let gone = self
                .tasks
                .get_mut(&job.container)
                .and_then(|task| task.execs.remove(exec))
                .ok_or_else(|| exec_not_found(&job.container, exec))?;
            let exit = gone.phase.exit().unwrap_or(Exit {
                status: 0,
                at: self.at,
            });
            if gone.phase.exit().is_none() {
                let process = ProcessId::exec(job.container.clone(), exec);
                self.act(Action::Over(process, exit));
            }
            // containerd's own shim tells only of the init process's delete.
            let pid = gone.phase.pid();
            Ok(Answer::Gone(Gone { pid, exit }))
        });
        self.done(job, result);
    }

    /// A call for an exec that is there.
    pub(super) fn plain_exec(&mut self, job: &Job, exec: String, what: Plain) -> Result<Next> {
        self.exec_phase(&job.container, &exec)?;
        self.made(&job.container)?;
        let job = job.clone();
        let exec = Some(exec);
        Ok(Next::Begin(Call::Plain { job, exec, what }))
    }

    fn exec_phase(&self, container: &str, exec: &str) -> Result<ExecPhase> {
        Ok(self.task(container)?.exec(container, exec)?.phase)
    }

    /// The one place where an exec's phase is set.
    fn set_exec_phase(&mut self, container: &str, exec: &str, phase: ExecPhase) {
        if let Some(entry) = self
            .tasks
            .get_mut(container)
            .and_then(|task| task.execs.get_mut(exec))
        {
            entry.phase = phase;
        }
    }
}
