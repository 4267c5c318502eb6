//! A container and its init process: create, run, signal, pause, delete, and its end.

use std::path::PathBuf;

use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::spec::{Checkpoint, Role, RootMount};
use dyad_runtime_handler::{Error, Result};

use super::change::{
    Action, Answer, Call, Change, InitChange, Job, Plain, Prepared, Signal, Start, Token,
};
use super::lane::Class;
use super::machine::ASKED_FOR;
use super::state::{self, Request, State, Step};
use super::stop::killed;
use super::task::{Description, Made, NEVER_RAN, Phase, Queued, Task};
use super::{Model, Next, not_found};
use crate::pod::{Gone, TaskEvent};

impl Model {
    // --- Checkpoint --------------------------------------------------------------

    pub(super) fn checkpoint(&mut self, job: &Job, to: Box<Checkpoint>) -> Result<Next> {
        let container = &job.container;
        self.made(container)?;
        match self.tasks.get(container).map(Task::state) {
            Some(State::Running | State::Paused) => {
                Ok(Next::Begin(Call::Checkpoint(job.clone(), to)))
            }
            Some(state) => Err(Error::FailedPrecondition(format!(
                "cannot checkpoint {container}: it {state}; only one that runs or is paused has \
                 something to keep"
            ))),
            None => Err(not_found(container)),
        }
    }

    pub(super) fn checkpointed(&mut self, job: Job, images: PathBuf, result: Result<()>) {
        if result.is_ok() {
            let container = job.container.clone();
            self.publish(TaskEvent::Checkpointed { container, images });
        }
        self.done(job, result.map(|()| Answer::Done));
    }

    // --- Create ------------------------------------------------------------------

    pub(super) fn create(&mut self, prepared: Box<Prepared>, token: Token) {
        if let Err(error) = self.may_create(&prepared) {
            return self.answer(token, Err(error));
        }
        let Prepared {
            request, identity, ..
        } = &*prepared;
        if identity.role == Role::Sandbox {
            let pod = &prepared.spec.pod;
            self.pod_name.clone_from(&pod.name);
            self.incoming = prepared.is_target;
            self.done_on_source.clone_from(&prepared.done_on_source);
        }
        let id = request.id.clone();
        let description = Description {
            role: identity.role,
            bundle: request.bundle.clone(),
            name: identity.name.clone(),
            cri: identity.cri,
            is_bare: prepared.bare.is_some(),
            uris: request.stdio.clone(),
        };
        let mut task = Task::new(description, self.at);
        let ticket = task.lane.begin(Class::Whole);
        self.tasks.insert(id.clone(), task);
        let job = Job {
            container: id,
            ticket,
            token,
        };
        self.act(Action::Begin(Call::Create(job, prepared)));
    }

    fn may_create(&self, prepared: &Prepared) -> Result<()> {
        let id = &prepared.request.id;
        if self.tasks.contains_key(id) {
            // Always a refusal.
            self.decide(id, Request::Create)?;
        }
        if let Some(tombstone) = &prepared.fenced {
            return Err(Error::FailedPrecondition(format!(
                "pod {} {} to {}, so it must not run here again: delete this pod",
                tombstone.pod,
                if tombstone.settled {
                    "has migrated"
                } else {
                    "was on its way"
                },
                tombstone.destination
            )));
        }
        if prepared.identity.role == Role::Sandbox {
            return Ok(());
        }
        let pod = &prepared.identity.sandbox_id;
        match self.tasks.get(pod).map(Task::state) {
            Some(State::Running | State::Incoming) => Ok(()),
            None => Err(Error::FailedPrecondition(format!(
                "create {id}: its pod {pod} is not here"
            ))),
            Some(state) => Err(Error::FailedPrecondition(format!(
                "create {id}: its pod {pod} {state}"
            ))),
        }
    }

    pub(super) fn created(&mut self, job: Job, rootfs: Vec<RootMount>, result: Result<Made>) {
        let container = job.container.clone();
        let made = match result {
            Ok(made) => made,
            Err(error) => {
                let exit = Exit {
                    status: NEVER_RAN,
                    at: self.at,
                };
                self.forget(&container, exit);
                return self.answer(job.token, Err(error));
            }
        };
        if let Some(task) = self.tasks.get_mut(&container) {
            task.made = Some(made);
            let shown = task.init_view(state::TaskStatus::Created);
            self.set_phase(&container, Phase::Created, "");
            self.publish(TaskEvent::Create {
                container,
                bundle: shown.bundle,
                rootfs,
                stdio: shown.stdio,
                pid: made.pid,
            });
        }
        self.done(job, Ok(Answer::Pid(made.pid)));
    }

    // --- Run ---------------------------------------------------------------------

    pub(super) fn run(&mut self, job: &Job) -> Result<Next> {
        let container = &job.container;
        self.decide(container, Request::Run)?;
        self.made(container)?;
        let how = match self.is_done_on_source(container) {
            true => Start::DoneOnSource,
            false => Start::First,
        };
        let starting = Phase::Starting {
            early: None,
            stopped: None,
        };
        self.set_phase(container, starting, "");
        Ok(Next::Begin(Call::Start(job.clone(), how)))
    }

    /// An init container of a target has nothing left to do: kubelet waits for its end before
    /// it makes the next.
    fn is_done_on_source(&self, container: &str) -> bool {
        let task = self.tasks.get(container);
        self.incoming && task.is_some_and(|task| self.done_on_source.contains(&task.name))
    }

    pub(super) fn started(&mut self, job: Job, how: Start, result: Result<u32>) {
        if how == Start::Again {
            self.started_again(&job, result);
            return self.finish(&job);
        }
        let container = job.container.clone();
        let early = match self.phase_of(&container) {
            Some(Phase::Starting { early, .. }) => *early,
            _ => None,
        };
        match result {
            Ok(pid) => {
                self.publish(TaskEvent::Start {
                    container: container.clone(),
                    pid,
                });
                self.runs(&container, pid);
                self.answer(job.token, Ok(Answer::Pid(pid)));
                // After its start was told, however short it lived.
                if let Some(exit) = early {
                    self.init_exited(&container, exit);
                }
                if how == Start::DoneOnSource {
                    let (status, at) = (0, self.at);
                    self.end_for_good(&container, pid, Exit { status, at });
                }
            }
            Err(error) => {
                let failed = Phase::Failed {
                    reason: error.chain(),
                    at: self.at,
                };
                let exit = failed.exit();
                self.set_phase(&container, failed, error.chain());
                if let Some(exit) = exit {
                    self.act(Action::Over(ProcessId::init(container), exit));
                }
                self.answer(job.token, Err(error));
            }
        }
        self.finish(&job);
    }

    /// A first start has succeeded.
    fn runs(&mut self, container: &str, pid: u32) {
        if !self.incoming {
            return self.set_phase(container, Phase::Running { pid }, "");
        }
        self.set_phase(container, Phase::Incoming { pid }, "");
        let is_sandbox = |task: &Task| task.role == Role::Sandbox;
        if self.tasks.get(container).is_some_and(is_sandbox) {
            self.act(Action::Begin(Call::Receive));
        }
    }

    // --- Its end -----------------------------------------------------------------

    pub(super) fn init_exited(&mut self, container: &str, exit: Exit) {
        let kept_with_machine = self.is_kept_with_machine(container);
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let pid = task.pid();
        match *task.phase() {
            Phase::Starting { stopped, .. } => {
                let early = Some(exit);
                self.set_phase(container, Phase::Starting { early, stopped }, "");
            }
            Phase::Stopping {
                pid, keep: true, ..
            } => {
                let returned = task.stopping.take();
                let exited = Phase::Stopping {
                    pid,
                    exit: Some(exit),
                    keep: true,
                };
                self.set_phase(container, exited, "");
                if let Some((after, job)) = returned {
                    self.stopped(job, exit, after);
                }
            }
            Phase::Running { .. } | Phase::Paused { .. } if kept_with_machine => {
                self.keep_with_machine(container, exit);
            }
            Phase::Created
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Migrating { .. }
            | Phase::Stopping { .. } => self.end_for_good(container, pid, exit),
            // It was not running, as far as anybody was told.
            Phase::Creating
            | Phase::Stopped { .. }
            | Phase::Incoming { .. }
            | Phase::Migrated { .. }
            | Phase::Exited { .. }
            | Phase::Failed { .. } => {}
        }
    }

    /// What was kept, or ran, is over: exit event, waiters, no more stdio.
    pub(super) fn end_for_good(&mut self, container: &str, pid: u32, exit: Exit) {
        let reason = format!("exit status {}", exit.status);
        self.end_because(container, pid, exit, reason);
    }

    pub(super) fn end_because(&mut self, container: &str, pid: u32, exit: Exit, reason: String) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let pending = task.stopping.take();
        let process = ProcessId::init(container);
        self.publish(TaskEvent::Exit {
            process: process.clone(),
            pid,
            exit,
        });
        self.set_phase(container, Phase::Exited { pid, exit }, reason);
        self.act(Action::Over(process, exit));
        if self.is_machine(container) {
            self.machine_ended(exit.at);
        }
        if let Some((_, job)) = pending {
            self.done(job, Err(killed(container)));
        }
    }

    // --- Signal ------------------------------------------------------------------

    pub(super) fn signal(&mut self, job: &Job, signal: i32, all: bool) -> Result<Next> {
        let container = &job.container;
        let ends = state::signal_ends(signal);
        let step = self.decide(container, Request::Kill { ends })?;
        self.made(container)?;
        let waiting = |job: &Job| Signal {
            job: job.clone(),
            signal,
            all,
        };
        Ok(match step {
            Step::EndKept if matches!(self.phase_of(container), Some(Phase::Incoming { .. })) => {
                let job = job.clone();
                Next::Begin(Call::LetGo { job, signal })
            }
            Step::EndKept => {
                self.end_for_good(container, 0, self.ended_by(signal));
                Next::Done
            }
            Step::EndStopping => {
                self.no_longer_kept(container);
                // What was asked to end already ends now.
                deliver(job, libc::SIGKILL, all)
            }
            Step::CancelAndSignal => self.signal_after_migration(waiting(job)),
            Step::ThawAndSignal => self.thaw_and_signal(waiting(job)),
            _ => deliver(job, signal, all),
        })
    }

    fn ended_by(&self, signal: i32) -> Exit {
        Exit {
            status: 128 + signal.unsigned_abs(),
            at: self.at,
        }
    }

    /// What is being stopped, itself or with its machine, ends for good.
    fn no_longer_kept(&mut self, container: &str) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let Phase::Stopping { pid, exit, .. } = *task.phase() else {
            task.killed_with_pod = true;
            return;
        };
        let given_up = Phase::Stopping {
            pid,
            exit,
            keep: false,
        };
        self.set_phase(container, given_up, "");
        // Its process may be gone, and the stop not yet returned.
        if let Some(exit) = exit {
            self.end_for_good(container, pid, exit);
        }
    }

    /// A signal that can only take effect in what runs. In a machine that is paused as a whole
    /// it is the machine that must be resumed, in its own lane.
    fn thaw_and_signal(&mut self, signal: Signal) -> Next {
        let is_paused = |phase: Option<&Phase>| matches!(phase, Some(Phase::Paused { .. }));
        if is_paused(self.phase_of(&signal.job.container)) {
            self.set_freezing(&signal.job.container, true);
            let holder = None;
            return Next::Begin(Call::ThawFor { holder, signal });
        }
        let machine = self
            .sandbox()
            .filter(|(_, task)| is_paused(Some(task.phase())))
            .map(|(id, _)| id.clone());
        match machine {
            None => deliver(&signal.job, signal.signal, signal.all),
            Some(machine) => {
                let change = Change::Init(InitChange::ThawFor(signal));
                if let Some(task) = self.tasks.get_mut(&machine) {
                    let token = Token::Nobody;
                    task.lane.push(change.class(), Queued { change, token });
                }
                self.pump(&machine);
                Next::Later
            }
        }
    }

    /// In the machine's lane: resumes it for a signal to one of its containers.
    pub(super) fn thaw_for(&mut self, holder: &Job, signal: Signal) -> Next {
        if let Some(Phase::Paused { .. }) = self.phase_of(&holder.container) {
            self.set_freezing(&holder.container, true);
            let holder = Some(holder.clone());
            return Next::Begin(Call::ThawFor { holder, signal });
        }
        // Somebody resumed it meanwhile, or it has ended: the signal's own state counts.
        let next = self.signal(&signal.job, signal.signal, signal.all);
        self.go_on_with(signal.job, next);
        Next::Done
    }

    pub(super) fn thawed_for(&mut self, holder: Option<Job>, signal: Signal, result: &Result<()>) {
        let frozen = holder.as_ref().unwrap_or(&signal.job).container.clone();
        self.set_freezing(&frozen, false);
        if result.is_ok() {
            self.thawed(&frozen, ASKED_FOR);
        }
        // A freezer that fails does not hold up SIGKILL.
        let next = deliver(&signal.job, signal.signal, signal.all);
        self.go_on_with(signal.job, Ok(next));
        if let Some(holder) = holder {
            self.finish(&holder);
        }
    }

    /// Nobody waits for its source any more.
    pub(super) fn let_go(&mut self, job: Job, signal: i32) {
        if let Some(Phase::Incoming { .. }) = self.phase_of(&job.container) {
            self.end_for_good(&job.container, 0, self.ended_by(signal));
        }
        self.done(job, Ok(Answer::Done));
    }

    // --- Pause and resume --------------------------------------------------------

    pub(super) fn freezer(&mut self, job: &Job, request: Request) -> Result<Next> {
        let step = self.decide(&job.container, request)?;
        self.made(&job.container)?;
        let call = match step {
            Step::Freeze => Call::Pause(job.clone()),
            Step::Thaw => Call::Resume(job.clone()),
            _ => return Ok(Next::Done),
        };
        self.set_freezing(&job.container, true);
        Ok(Next::Begin(call))
    }

    fn set_freezing(&mut self, container: &str, is_freezing: bool) {
        if let Some(task) = self.tasks.get_mut(container) {
            task.is_freezing = is_freezing;
        }
    }

    pub(super) fn paused(&mut self, job: Job, result: Result<()>) {
        self.set_freezing(&job.container, false);
        if result.is_ok() {
            self.frozen_now(&job.container, ASKED_FOR);
        }
        self.done(job, result.map(|()| Answer::Done));
    }

    pub(super) fn resumed(&mut self, job: Job, result: Result<()>) {
        self.set_freezing(&job.container, false);
        if result.is_ok() {
            self.thawed(&job.container, ASKED_FOR);
        }
        self.done(job, result.map(|()| Answer::Done));
    }

    // --- Delete ------------------------------------------------------------------

    pub(super) fn delete(&mut self, job: &Job) -> Result<Next> {
        self.decide(&job.container, Request::Delete)?;
        self.not_the_pod_of_others(&job.container)?;
        self.made(&job.container)?;
        Ok(Next::Begin(Call::Delete(job.clone())))
    }

    /// The machine goes last: its containers cannot be deleted without it.
    fn not_the_pod_of_others(&self, container: &str) -> Result<()> {
        let is_sandbox = self.task(container)?.role == Role::Sandbox;
        match self.tasks.iter().find(|(id, task)| {
            is_sandbox && id.as_str() != container && task.phase().exit().is_none()
        }) {
            Some((other, _)) => Err(Error::FailedPrecondition(format!(
                "delete {container}: container {other} of this pod is still there; delete it first"
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn deleted(&mut self, job: Job, result: Result<()>) {
        if let Err(error) = result {
            return self.done(job, Err(error));
        }
        let container = job.container;
        let Some(task) = self.tasks.get(&container) else {
            return self.answer(job.token, Err(not_found(&container)));
        };
        let exit = match (task.phase(), task.phase().exit()) {
            (_, Some(exit)) | (&Phase::Stopped { exit }, None) => exit,
            // It never ran.
            _ => Exit {
                status: 0,
                at: self.at,
            },
        };
        let pid = task.pid();
        self.publish(TaskEvent::Delete {
            container: container.clone(),
            pid,
            exit,
        });
        self.forget(&container, exit);
        self.answer(job.token, Ok(Answer::Gone(Gone { pid, exit })));
    }
}

fn deliver(job: &Job, signal: i32, all: bool) -> Next {
    let job = job.clone();
    let exec = None;
    let what = Plain::Signal { signal, all };
    Next::Begin(Call::Plain { job, exec, what })
}
