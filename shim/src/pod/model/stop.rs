//! Stop, start and restart in place: the task stays, its process does not.

use std::time::Duration;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::Exit;
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::change::{AfterStop, Answer, Call, Job, Start};
use super::lane::Class;
use super::state::{Request, Step};
use super::task::Phase;
use super::{KILLED, Model, Next};

impl Model {
    // --- Stop --------------------------------------------------------------------

    pub(super) fn stop(&mut self, job: &Job, grace: Duration) -> Result<Next> {
        match self.decide(&job.container, Request::Stop)? {
            Step::AlreadySo => Ok(Next::Done),
            _ => self.begin_stop(job, grace, AfterStop::Stay),
        }
    }

    pub(super) fn restart(&mut self, job: &Job, force: bool, grace: Duration) -> Result<Next> {
        let container = &job.container;
        let grace = if force { Duration::ZERO } else { grace };
        self.decide(container, Request::Restart { force })?;
        let task = self.made(container)?;
        if !task.made.is_some_and(|made| made.reboots) {
            return self.begin_stop(job, grace, AfterStop::Start);
        }
        // What restarts without an end of its own is `Stopping` meanwhile, so that what ends
        // in it is kept and comes back.
        let pid = task.pid();
        self.set_phase(container, stopping(pid), "it reboots");
        Ok(Next::Begin(Call::Reboot {
            job: job.clone(),
            force,
            grace,
        }))
    }

    fn begin_stop(&mut self, job: &Job, grace: Duration, after: AfterStop) -> Result<Next> {
        let pid = self.made(&job.container)?.pid();
        self.set_phase(&job.container, stopping(pid), "asked for");
        Ok(Next::Begin(Call::Stop(job.clone(), grace, after)))
    }

    pub(super) fn rebooted(&mut self, job: Job, result: Result<u32>) {
        let container = job.container.clone();
        let Some(&Phase::Stopping { pid, exit, .. }) = self.phase_of(&container) else {
            return self.done(job, Err(killed(&container)));
        };
        let answer = match (result, exit) {
            (Ok(pid), None) => {
                if let Some(task) = self.tasks.get_mut(&container) {
                    task.starts += 1;
                }
                self.set_phase(&container, Phase::Running { pid }, "restarted in place");
                Ok(Answer::Done)
            }
            // It ended instead, and is kept as if it had been stopped.
            (result, Some(exit)) => {
                let error = result.err().unwrap_or_else(|| {
                    Error::FailedPrecondition(format!("{container} ended instead of rebooting"))
                });
                let reason = format!("could not be restarted: {}", error.chain());
                self.set_phase(&container, Phase::Stopped { exit }, reason);
                self.machine_stopped(exit.at);
                Err(error)
            }
            (Err(error), None) => {
                let reason = format!("could not be restarted: {}", error.chain());
                self.set_phase(&container, Phase::Running { pid }, reason);
                Err(error)
            }
        };
        self.done(job, answer);
    }

    pub(super) fn stop_returned(&mut self, job: Job, after: AfterStop, result: Result<()>) {
        let Some(task) = self.tasks.get_mut(&job.container) else {
            return;
        };
        match (task.phase(), result) {
            // It ended, whatever the backend says.
            (
                &Phase::Stopping {
                    exit: Some(exit), ..
                },
                _,
            ) => self.stopped(job, exit, after),
            // Its exit is on its way.
            (Phase::Stopping { .. }, Ok(())) => task.stopping = Some((after, job)),
            (&Phase::Stopping { pid, .. }, Err(error)) => {
                let reason = format!("could not be stopped: {}", error.chain());
                self.set_phase(&job.container, Phase::Running { pid }, reason);
                self.done(job, Err(error));
            }
            (_, _) => {
                let error = killed(&job.container);
                self.done(job, Err(error));
            }
        }
    }

    /// It ended as it was asked to, and is kept.
    pub(super) fn stopped(&mut self, job: Job, exit: Exit, after: AfterStop) {
        let reason = format!("exit status {}", exit.status);
        self.set_phase(&job.container, Phase::Stopped { exit }, reason);
        if self.is_machine(&job.container) {
            self.machine_stopped(exit.at);
        }
        if self.ends_with_machine(&job.container, exit) {
            let error = killed(&job.container);
            return self.done(job, Err(error));
        }
        match after {
            AfterStop::Stay => self.done(job, Ok(Answer::Done)),
            AfterStop::Start => {
                // From here on it may be signalled only when it runs again.
                if let Some(task) = self.tasks.get_mut(&job.container) {
                    task.lane.reclass(job.ticket, Class::Whole);
                }
                let next = self.begin_start_again(&job);
                self.go_on_with(job, next);
            }
        }
    }

    /// Ends what was kept in a machine that has ended meanwhile: there is nothing left that it
    /// could be started in.
    fn ends_with_machine(&mut self, container: &str, exit: Exit) -> bool {
        let is_over = self.identity.kind == Kind::Machine
            && !self.is_machine(container)
            && self
                .sandbox()
                .is_some_and(|(_, machine)| machine.phase().exit().is_some());
        if is_over {
            self.end_for_good(container, 0, exit);
        }
        is_over
    }

    // --- Start again -------------------------------------------------------------

    pub(super) fn start_again(&mut self, job: &Job) -> Result<Next> {
        let container = &job.container;
        let machine_runs = self
            .sandbox()
            .is_some_and(|(_, task)| matches!(task.phase(), Phase::Running { .. }));
        let in_machine =
            self.identity.kind == Kind::Machine && self.task(container)?.role == Role::Container;
        if in_machine && !machine_runs {
            return Err(Error::FailedPrecondition(format!(
                "cannot start container {container}: its pod's machine is not running; start the pod"
            )));
        }
        match self.decide(container, Request::Start)? {
            Step::AlreadySo => Ok(Next::Done),
            _ => self.begin_start_again(job),
        }
    }

    fn begin_start_again(&mut self, job: &Job) -> Result<Next> {
        let stopped = match self.made(&job.container)?.phase() {
            Phase::Stopped { exit } => Some(*exit),
            _ => None,
        };
        let early = None;
        self.set_phase(&job.container, Phase::Starting { early, stopped }, "");
        Ok(Next::Begin(Call::Start(job.clone(), Start::Again)))
    }

    pub(super) fn started_again(&mut self, job: &Job, result: Result<u32>) {
        let container = &job.container;
        let Some(&Phase::Starting { early, stopped }) = self.phase_of(container) else {
            return;
        };
        match result {
            Ok(pid) => {
                if let Some(task) = self.tasks.get_mut(container) {
                    task.starts += 1;
                    task.stopped_with_pod = false;
                    task.killed_with_pod = false;
                }
                self.set_phase(container, Phase::Running { pid }, "started in place");
                self.answer(job.token, Ok(Answer::Done));
                if let Some(exit) = early {
                    self.init_exited(container, exit);
                }
            }
            Err(error) => {
                let exit = stopped.unwrap_or(Exit {
                    status: KILLED,
                    at: self.at,
                });
                // Nothing changed, seen from outside.
                self.set_phase(container, Phase::Stopped { exit }, "");
                if let Some(task) = self.tasks.get_mut(container) {
                    task.explain(format!("could not be started again: {}", error.chain()));
                }
                self.ends_with_machine(container, exit);
                self.answer(job.token, Err(error));
            }
        }
    }
}

fn stopping(pid: u32) -> Phase {
    Phase::Stopping {
        pid,
        exit: None,
        keep: true,
    }
}

pub(super) fn killed(container: &str) -> Error {
    Error::FailedPrecondition(format!(
        "{container} was killed while it was being stopped: it can only be deleted"
    ))
}
