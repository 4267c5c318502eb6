//! A migration. Source: what `migration::phases` says is done here. Target: the pod waits
//! as Incoming until its source comes.

use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::migration::{Arrival, Hurry, MigrationParameters, Sent};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::change::{
    Action as Act, Answer, Call, Change, ExecChange, InitChange, Job, News, Signal, Token,
};
use super::state::{Request, State};
use super::task::{Phase as TaskPhase, Task};
use super::{Model, Next, not_found};
use crate::migration::phases::{self, Action, Input, Phase};
use crate::migration::{ContainerState, Outcome, PodState};
use crate::pod::TaskEvent;

/// Exit status of an exec whose process went on elsewhere, and of what never arrived.
const CUT_OFF: u32 = 255;

/// A migration away from here.
#[derive(Debug)]
pub(super) struct Outgoing {
    parameters: Arc<MigrationParameters>,
    phase: Phase,
    /// What it holds of the sandbox's lane, and who asked.
    job: Job,
    /// Who asked has not been answered: it is not under way.
    is_asked: bool,
    cancels: Vec<Token>,
    /// Signals that came meanwhile, to be delivered when it is over.
    signals: Vec<Signal>,
    /// The tasks whose state is Migrating.
    moving: Vec<String>,
    /// Why it ended as it did.
    reason: String,
}

impl Model {
    // --- Source ------------------------------------------------------------------

    /// Moves the pod away, whatever its sandbox is called.
    pub(super) fn migrate_pod(&mut self, parameters: Arc<MigrationParameters>, token: Token) {
        let sandbox = self
            .sandbox()
            .filter(|(_, task)| task.is_made())
            .map(|(id, _)| id.clone());
        match sandbox {
            Some(id) => self.change(&id, Change::Init(InitChange::Migrate(parameters)), token),
            None => {
                let text = "there is no pod yet".into();
                self.answer(token, Err(Error::FailedPrecondition(text)));
            }
        }
    }

    pub(super) fn migrate(
        &mut self,
        job: &Job,
        parameters: Arc<MigrationParameters>,
    ) -> Result<Next> {
        self.may_move(&job.container)?;
        if self.is_checking || self.outgoing.is_some() {
            return Err(Error::FailedPrecondition(
                "a migration of this pod is being checked: wait for it".into(),
            ));
        }
        self.migrations += 1;
        let number = self.migrations;
        self.act(Act::Migration(News::Began {
            number,
            destination: parameters.destination.clone(),
        }));
        self.outgoing = Some(Outgoing {
            parameters: Arc::clone(&parameters),
            phase: Phase::Checking,
            job: job.clone(),
            is_asked: true,
            cancels: Vec::new(),
            signals: Vec::new(),
            moving: Vec::new(),
            reason: String::new(),
        });
        self.is_checking = true;
        Ok(Next::Begin(Call::CheckMigration(number, parameters)))
    }

    /// Refuses at once what would otherwise wait in line behind a migration.
    ///
    /// # Errors
    /// The state's refusal.
    pub(super) fn barred_by_migration(&self, container: &str, change: &Change) -> Result<()> {
        if self.outgoing.is_none() {
            return Ok(());
        }
        let request = match change {
            Change::Init(InitChange::Migrate(_)) => {
                return Err(Error::FailedPrecondition(
                    "the pod is migrating already: wait for that migration, or cancel it".into(),
                ));
            }
            Change::Init(InitChange::Pause) => Request::Pause,
            Change::Init(InitChange::Resume) => Request::Resume,
            Change::Init(InitChange::Stop { .. }) => Request::Stop,
            Change::Init(InitChange::Start) => Request::Start,
            Change::Init(InitChange::Restart { force, .. }) => Request::Restart { force: *force },
            Change::Init(InitChange::Update(_)) => Request::Update,
            Change::Exec(_, ExecChange::Add(_)) => Request::Exec,
            _ => return Ok(()),
        };
        self.decide(container, request).map(drop)
    }

    /// Whether the pod can move now. Asked again before it is fenced and before it is sent:
    /// only then do its tasks say that they are migrating, and refuse what comes.
    fn may_move(&self, sandbox: &str) -> Result<()> {
        self.decide(sandbox, Request::Migrate)?;
        for (id, task) in &self.tasks {
            let name = if task.name.is_empty() { id } else { &task.name };
            let fit = matches!(
                task.state(),
                State::Running | State::Exited(_) | State::Failed(_)
            );
            if !fit {
                return Err(Error::FailedPrecondition(format!(
                    "cannot migrate: container {name} {}; a pod moves while its containers run",
                    task.state()
                )));
            }
            if id != sandbox && !task.lane.is_idle() {
                return Err(Error::FailedPrecondition(format!(
                    "cannot migrate: container {name} is being changed; ask again in a moment"
                )));
            }
        }
        Ok(())
    }

    fn refuse_migration(&mut self, error: Error) {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.reason = error.chain();
            if std::mem::take(&mut outgoing.is_asked) {
                let token = outgoing.job.token;
                self.answer(token, Err(error));
            }
        }
    }

    /// Feeds the pure machine of a migration, and does what it says. `number`: of the
    /// migration that the input belongs to; that of another one is late.
    fn migration_input(&mut self, number: u64, input: Input) {
        if self.migrations != number {
            return;
        }
        let Some(outgoing) = &mut self.outgoing else {
            return;
        };
        let (phase, actions) = phases::step(outgoing.phase, input);
        outgoing.phase = phase;
        for action in actions {
            self.migration_action(number, *action);
        }
    }

    fn migration_action(&mut self, number: u64, action: Action) {
        match action {
            Action::PutFence => self.act(Act::Begin(Call::PutFence(number))),
            Action::Send => self.send(number),
            Action::Cancel => self.act(Act::Begin(Call::AskMover(number, None))),
            Action::PostCopy => self.hurry(number, Hurry::PostCopy),
            Action::Pause => self.hurry(number, Hurry::Pause),
            Action::RefuseCancel => self.refuse_cancel(),
            Action::Refuse => {
                let reason = self
                    .outgoing
                    .as_ref()
                    .map(|outgoing| outgoing.reason.clone())
                    .filter(|reason| !reason.is_empty())
                    .unwrap_or_else(|| "it was cancelled".into());
                self.refuse_migration(Error::FailedPrecondition(reason.clone()));
                self.end_migration(Outcome::Abandoned(reason));
            }
            // It runs here as before, once the fence does not say otherwise.
            Action::GoOn => self.act(Act::Begin(Call::LiftFence(number))),
            Action::EndMoved => self.moved(number),
            Action::EndLost => self.lost(),
        }
    }

    fn hurry(&mut self, number: u64, how: Hurry) {
        self.act(Act::Begin(Call::AskMover(number, Some(how))));
    }

    pub(super) fn migration_checked(&mut self, number: u64, result: Result<()>) {
        self.is_checking = false;
        let result = result.and_then(|()| self.may_still_move());
        let fine = result.is_ok();
        if let (Err(error), true) = (result, self.migrations == number) {
            self.refuse_migration(error);
        }
        self.migration_input(number, Input::Checked(fine));
    }

    fn may_still_move(&self) -> Result<()> {
        match &self.outgoing {
            Some(outgoing) => self.may_move(&outgoing.job.container),
            None => Ok(()),
        }
    }

    /// The fence is on disk, or could not be put up. Who gave the migration up meanwhile had
    /// to wait for that.
    pub(super) fn fenced(&mut self, number: u64, result: Result<()>) {
        let Some(outgoing) = &self.outgoing else {
            return;
        };
        let was_put = result.is_ok();
        let result = match outgoing.cancels.is_empty() {
            _ if !was_put => result,
            true => self.may_still_move(),
            false => Err(Error::FailedPrecondition(outgoing.reason.clone())),
        };
        let input = match result {
            Ok(()) => {
                self.under_way(number);
                Input::Fenced(true)
            }
            Err(error) => {
                self.refuse_migration(error);
                if was_put {
                    Input::Cancel
                } else {
                    Input::Fenced(false)
                }
            }
        };
        self.migration_input(number, input);
    }

    /// The refusals are past: the pod is Migrating, and who asked is told.
    fn under_way(&mut self, number: u64) {
        let only_sandbox = self.identity.kind == Kind::Machine;
        let moving: Vec<(String, u32)> = self
            .tasks
            .iter()
            .filter(|(_, task)| !only_sandbox || task.role == Role::Sandbox)
            .filter_map(|(id, task)| match *task.phase() {
                TaskPhase::Running { pid } => Some((id.clone(), pid)),
                _ => None,
            })
            .collect();
        let to = self.destination();
        for (id, pid) in &moving {
            let migrating = TaskPhase::Migrating { pid: *pid };
            self.set_phase(id, migrating, format!("to {to}"));
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.moving = moving.into_iter().map(|(id, _)| id).collect();
            if std::mem::take(&mut outgoing.is_asked) {
                let token = outgoing.job.token;
                self.answer(token, Ok(Answer::Number(number)));
            }
        }
    }

    fn destination(&self) -> String {
        let outgoing = self.outgoing.as_ref();
        outgoing.map_or_else(String::new, |outgoing| {
            outgoing.parameters.destination.clone()
        })
    }

    fn send(&mut self, number: u64) {
        let Some(outgoing) = &self.outgoing else {
            return;
        };
        let parameters = Arc::clone(&outgoing.parameters);
        let containers = self.tasks.values().map(|task| ContainerState {
            name: task.name.clone(),
            starts: task.starts,
        });
        let pod = PodState::new(containers.collect());
        if let Some(timeout) = parameters.timeout {
            self.act(Act::Begin(Call::Deadline(number, timeout)));
        }
        self.act(Act::Begin(Call::Send(number, parameters, pod)));
    }

    pub(super) fn timed_out(&mut self, number: u64, timeout: Duration) {
        if self.migrations != number {
            return;
        }
        let Some(outgoing) = &mut self.outgoing else {
            return;
        };
        outgoing.reason = format!("it took longer than {} ms", timeout.as_millis());
        let action = outgoing.parameters.timeout_action;
        self.migration_input(number, Input::TimedOut(action));
    }

    pub(super) fn sent(&mut self, number: u64, result: Result<Sent>) {
        let input = match result {
            Ok(Sent::Moved) => Input::SentMoved,
            Ok(Sent::Lost(reason)) => {
                self.because(reason);
                Input::SentLost
            }
            Err(error) => {
                self.because(error.chain());
                Input::SendFailed
            }
        };
        self.migration_input(number, input);
    }

    /// Adds to the reason, which may be there already: a time-out, a cancellation.
    fn because(&mut self, reason: String) {
        if let Some(outgoing) = &mut self.outgoing {
            match outgoing.reason.as_str() {
                "" => outgoing.reason = reason,
                first => outgoing.reason = format!("{first}: {reason}"),
            }
        }
    }

    /// The backend was asked to cancel, or (`hurry`) to bring the migration to an end.
    pub(super) fn mover_asked(&mut self, number: u64, hurry: Option<Hurry>, result: Result<()>) {
        match (result, hurry) {
            (Ok(()), _) => {}
            (Err(_), None) => self.migration_input(number, Input::CannotCancel),
            // What was to bring it to an end does not: the bound holds all the same.
            (Err(error), Some(_)) => {
                if self.migrations == number {
                    self.because(error.chain());
                }
                self.migration_input(number, Input::Cancel);
            }
        }
    }

    pub(super) fn cancel_migration(&mut self, token: Token) {
        let number = self.migrations;
        let Some(outgoing) = &mut self.outgoing else {
            let text = "there is no migration under way".into();
            return self.answer(token, Err(Error::FailedPrecondition(text)));
        };
        outgoing.cancels.push(token);
        if outgoing.reason.is_empty() {
            outgoing.reason = "it was cancelled".into();
        }
        // A fence that is being put up can only be lifted when it is there.
        if outgoing.phase != Phase::Fencing {
            self.migration_input(number, Input::Cancel);
        }
    }

    /// A signal that is to end what is on its way: first the migration must be over.
    pub(super) fn signal_after_migration(&mut self, signal: Signal) -> Next {
        let number = self.migrations;
        match &mut self.outgoing {
            Some(outgoing) => {
                outgoing.signals.push(signal);
                if outgoing.reason.is_empty() {
                    outgoing.reason = "the pod was told to end".into();
                }
                self.migration_input(number, Input::Cancel);
            }
            None => {
                let error = not_found(&signal.job.container);
                self.done(signal.job, Err(error));
            }
        }
        Next::Later
    }

    fn refuse_cancel(&mut self) {
        let Some(outgoing) = &mut self.outgoing else {
            return;
        };
        for cancel in std::mem::take(&mut outgoing.cancels) {
            let text = "the migration cannot be cancelled any more: wait for its end".into();
            self.answer(cancel, Err(Error::FailedPrecondition(text)));
        }
    }

    /// It runs here as before.
    pub(super) fn fence_lifted(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.as_ref().filter(|_| self.migrations == number) else {
            return;
        };
        let (moving, reason) = (outgoing.moving.clone(), outgoing.reason.clone());
        for id in moving {
            if let Some(&TaskPhase::Migrating { pid }) = self.phase_of(&id) {
                let why = format!("the migration was given up: {reason}");
                self.set_phase(&id, TaskPhase::Running { pid }, why);
            }
        }
        self.end_migration(Outcome::Abandoned(reason));
    }

    /// It runs there: nothing of it may run here again.
    fn moved(&mut self, number: u64) {
        let exit = Exit {
            status: 0,
            at: self.at,
        };
        let to = self.destination();
        // The sandbox last: who is told of its end may look for the rest.
        let mut ids: Vec<(bool, String)> = self
            .tasks
            .iter()
            .map(|(id, task)| (task.role == Role::Sandbox, id.clone()))
            .collect();
        ids.sort();
        for (_, id) in ids {
            self.cut_execs(&id);
            let Some(&(TaskPhase::Running { pid } | TaskPhase::Migrating { pid })) =
                self.phase_of(&id)
            else {
                continue;
            };
            let process = ProcessId::init(&id);
            self.publish(TaskEvent::Exit {
                process: process.clone(),
                pid,
                exit,
            });
            self.set_phase(&id, TaskPhase::Migrated { pid, exit }, format!("to {to}"));
            self.act(Act::Over(process, exit));
        }
        // It is up since before the pod was given away.
        self.act(Act::Begin(Call::SettleFence(number)));
    }

    pub(super) fn fence_settled(&mut self, number: u64) {
        if self.migrations == number {
            self.end_migration(Outcome::Completed);
        }
    }

    /// Its processes go on there; those who wait here cannot learn how they end.
    fn cut_execs(&mut self, container: &str) {
        let exit = Exit {
            status: CUT_OFF,
            at: self.at,
        };
        let execs: Vec<String> = self
            .tasks
            .get(container)
            .map(|task| task.execs.keys().cloned().collect())
            .unwrap_or_default();
        for exec in execs {
            self.exec_exited(container, &exec, exit);
        }
    }

    fn lost(&mut self) {
        let Some(outgoing) = &self.outgoing else {
            return;
        };
        let reason = outgoing.reason.clone();
        self.fail_all(&format!("lost while it moved: {reason}"));
        self.end_migration(Outcome::Lost(reason));
    }

    fn end_migration(&mut self, outcome: Outcome) {
        let Some(outgoing) = self.outgoing.take() else {
            return;
        };
        let here = matches!(outcome, Outcome::Abandoned(_));
        self.act(Act::Migration(News::Ended(outcome)));
        for cancel in outgoing.cancels {
            let result = match here {
                true => Ok(Answer::Done),
                false => Err(Error::FailedPrecondition(
                    "the migration was over before it could be cancelled".into(),
                )),
            };
            self.answer(cancel, result);
        }
        self.finish(&outgoing.job);
        for signal in outgoing.signals {
            let next = self.signal(&signal.job, signal.signal, signal.all);
            self.go_on_with(signal.job, next);
        }
    }

    // --- Target ------------------------------------------------------------------

    pub(super) fn source_came(&mut self, result: Result<(Arrival, PodState)>) {
        self.incoming = false;
        match result {
            Ok((arrival, state)) => self.arrived(arrival, &state),
            Err(error) => self.fail_all(&format!("nothing arrived: {}", error.chain())),
        }
    }

    fn arrived(&mut self, arrival: Arrival, state: &PodState) {
        for (process, pid) in arrival.processes {
            let id = process.container;
            let Some(task) = self.tasks.get_mut(&id) else {
                continue;
            };
            let mut known = state.containers.iter();
            if let Some(known) = known.find(|known| known.name == task.name) {
                task.starts = known.starts;
            }
            if matches!(task.phase(), TaskPhase::Incoming { .. }) {
                self.set_phase(&id, TaskPhase::Running { pid }, "its machine arrived");
            }
        }
        let waits = |task: &Task| matches!(task.phase(), TaskPhase::Incoming { .. });
        let rest: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, task)| waits(task))
            .map(|(id, _)| id.clone())
            .collect();
        for id in rest {
            let exit = Exit {
                status: CUT_OFF,
                at: self.at,
            };
            let reason = format!("exit status {CUT_OFF}: its source had no such container");
            self.end_because(&id, 0, exit, reason);
        }
    }

    // --- Both --------------------------------------------------------------------

    /// Everything that has not ended has failed.
    fn fail_all(&mut self, reason: &str) {
        let ids: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, task)| {
                matches!(
                    task.phase(),
                    TaskPhase::Incoming { .. }
                        | TaskPhase::Migrating { .. }
                        | TaskPhase::Running { .. }
                )
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in ids {
            self.cut_execs(&id);
            let failed = TaskPhase::Failed {
                reason: reason.to_owned(),
                at: self.at,
            };
            let pid = self.tasks.get(&id).map_or(0, Task::pid);
            let Some(exit) = failed.exit() else { continue };
            let process = ProcessId::init(&id);
            self.publish(TaskEvent::Exit {
                process: process.clone(),
                pid,
                exit,
            });
            self.set_phase(&id, failed, reason);
            self.act(Act::Over(process, exit));
        }
    }
}
