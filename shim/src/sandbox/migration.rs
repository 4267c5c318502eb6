//! The driver's steps for a migration. Source: what `migration::phases` says is done
//! here. Target: the pod waits as Incoming until its source comes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, Instance, ProcessId};
use dyad_runtime_handler::migration::{
    Arrival, Hurry, MigrationParameters, MigrationProgress, Sent,
};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};
use log::{info, warn};
use tokio::sync::watch;
use tokio::time::Instant;

use super::driver::{Driver, not_found};
use super::lane::Ticket;
use super::state::{Request, State};
use super::task::{Phase as TaskPhase, answer_waiters};
use super::{Change, Command, PodView, Reply, Sandbox, TaskEvent};
use crate::fence::{Tombstone, Tombstones};
use crate::migration::phases::{self, Action, Input, Phase};
use crate::migration::{ContainerState, MigrationView, Outcome, PodState, request};

/// Exit status of an exec whose process went on elsewhere, and of what never arrived.
const CUT_OFF: u32 = 255;

/// A migration away from here.
pub(super) struct Outgoing {
    parameters: Arc<MigrationParameters>,
    phase: Phase,
    /// The pod's sandbox, and what it holds of its lane.
    sandbox: String,
    ticket: Ticket,
    /// Who asked; answered when it is under way, or refused.
    asked: Option<Reply<u64>>,
    cancels: Vec<Reply<()>>,
    /// Signals that came meanwhile, to be delivered when it is over.
    signals: Vec<Signal>,
    /// Those whose state says Migrating.
    moving: Vec<String>,
    started: Instant,
    /// Why it ended as it did.
    reason: String,
}

/// A signal that waits for a migration's end.
pub(super) struct Signal {
    pub(super) container: String,
    pub(super) ticket: Ticket,
    pub(super) signal: i32,
    pub(super) all: bool,
    pub(super) reply: Reply<()>,
}

impl Sandbox {
    /// Moves the pod away. Answers with the migration's number once the refusals are
    /// past.
    ///
    /// # Errors
    /// `InvalidArgument` for parameters that are none; the blocker, by name.
    pub async fn migrate(&self, parameters: MigrationParameters) -> Result<u64> {
        request::check(&parameters)?;
        let view = self.view().await?;
        let sandbox = view
            .tasks
            .iter()
            .find(|task| task.is_sandbox)
            .ok_or_else(|| Error::FailedPrecondition("there is no pod yet".into()))?;
        self.change(ProcessId::init(&sandbox.id), |reply| {
            Change::Migrate(Box::new(parameters), reply)
        })
        .await
    }

    /// The migration under way or the last one, and every change of it.
    ///
    /// # Errors
    /// The server is shutting down.
    pub async fn migration(&self) -> Result<watch::Receiver<MigrationView>> {
        self.ask(Command::Migration).await
    }

    /// Gives the migration up; returns when the pod runs here as before.
    ///
    /// # Errors
    /// `FailedPrecondition`: there is none, or it cannot be given up any more.
    pub async fn cancel_migration(&self) -> Result<PodView> {
        self.ask(Command::CancelMigration).await?;
        self.view().await
    }
}

impl Driver {
    // --- Source ------------------------------------------------------------------

    pub(super) fn migrate(
        &mut self,
        container: &str,
        ticket: Ticket,
        parameters: MigrationParameters,
        reply: Reply<u64>,
    ) {
        if let Err(error) = self.may_migrate(container) {
            return self.refused(container, ticket, reply, error);
        }
        let number = self.migrations.borrow().number + 1;
        self.migrations.send_replace(MigrationView {
            number,
            destination: parameters.destination.clone(),
            ..MigrationView::default()
        });
        let parameters = Arc::new(parameters);
        self.outgoing = Some(Outgoing {
            parameters: Arc::clone(&parameters),
            phase: Phase::Checking,
            sandbox: container.to_owned(),
            ticket,
            asked: Some(reply),
            cancels: Vec::new(),
            signals: Vec::new(),
            moving: Vec::new(),
            started: Instant::now(),
            reason: String::new(),
        });
        let handler = Arc::clone(&self.handler);
        self.effect(
            async move { handler.migration()?.check(&parameters).await },
            move |driver, result| {
                let fine = result.is_ok();
                if let Err(error) = result {
                    driver.refuse_migration(error);
                }
                driver.migration_input(number, Input::Checked(fine));
            },
        );
    }

    /// Refuses at once what would otherwise wait in line behind a migration.
    ///
    /// # Errors
    /// The state's refusal.
    pub(super) fn barred_by_migration(&self, process: &ProcessId, change: &Change) -> Result<()> {
        if self.outgoing.is_none() {
            return Ok(());
        }
        let request = match (&process.exec, change) {
            (None, Change::Migrate(..)) => {
                return Err(Error::FailedPrecondition(
                    "the pod is migrating already: wait for that migration, or cancel it".into(),
                ));
            }
            (None, Change::Pause(_)) => Request::Pause,
            (None, Change::Resume(_)) => Request::Resume,
            (None, Change::Stop { .. }) => Request::Stop,
            (None, Change::Start(_)) => Request::Start,
            (None, Change::Restart { force, .. }) => Request::Restart { force: *force },
            (None, Change::Update(..)) => Request::Update,
            (Some(_), Change::AddExec(..)) => Request::Exec,
            _ => return Ok(()),
        };
        self.decide(&process.container, request).map(drop)
    }

    fn may_migrate(&self, sandbox: &str) -> Result<()> {
        self.decide(sandbox, Request::Migrate)?;
        self.handler.migration()?;
        if self.outgoing.is_some() {
            return Err(Error::FailedPrecondition(
                "a migration of this pod is being checked: wait for it".into(),
            ));
        }
        for (id, task) in &self.tasks {
            let name = if task.name.is_empty() { id } else { &task.name };
            let fit = matches!(
                task.phase.state(),
                State::Running | State::Exited(_) | State::Failed(_)
            );
            if !fit {
                return Err(Error::FailedPrecondition(format!(
                    "cannot migrate: container {name} {}; a pod moves while its containers run",
                    task.phase.state()
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
        let text = error.chain();
        info!("migration refused: {text}");
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.reason = text;
            if let Some(asked) = outgoing.asked.take() {
                let _ = asked.send(Err(error));
            }
        }
    }

    /// Feeds the pure machine, and does what it says. `number`: of the migration that
    /// the input belongs to; that of another one is late.
    fn migration_input(&mut self, number: u64, input: Input) {
        if self.migrations.borrow().number != number {
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
            Action::PutFence => {
                let put = self.fence().put(&self.tombstone(false));
                let fenced = put.is_ok();
                match put {
                    Ok(()) => self.under_way(number),
                    Err(error) => self.refuse_migration(error),
                }
                self.migration_input(number, Input::Fenced(fenced));
            }
            Action::Send => self.send(number),
            Action::Cancel => self.ask_backend(number, None),
            Action::PostCopy => self.ask_backend(number, Some(Hurry::PostCopy)),
            Action::Pause => self.ask_backend(number, Some(Hurry::Pause)),
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
            Action::GoOn => self.go_on(),
            Action::EndMoved => self.moved(),
            Action::EndLost => self.lost(),
        }
    }

    fn fence(&self) -> Tombstones {
        Tombstones::new(&self.pod.launch.config.cache_dir)
    }

    fn tombstone(&self, settled: bool) -> Tombstone {
        let launch = &self.pod.launch;
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Tombstone {
            containerd_namespace: launch.containerd_namespace.clone(),
            sandbox_id: launch.sandbox_id.clone(),
            pod_uid: self.info.uid.clone(),
            pod: format!("{}/{}", self.info.namespace, self.info.name),
            destination: self.migrations.borrow().destination.clone(),
            settled,
            unix_s: since.as_secs(),
        }
    }

    /// The refusals are past: the pod is Migrating, and who asked is told.
    fn under_way(&mut self, number: u64) {
        let only_sandbox = self.pod.launch.kind == Kind::Machine;
        let moving: Vec<(String, u32)> = self
            .tasks
            .iter()
            .filter(|(_, task)| !only_sandbox || task.role == Role::Sandbox)
            .filter_map(|(id, task)| match task.phase {
                TaskPhase::Running { pid } => Some((id.clone(), pid)),
                _ => None,
            })
            .collect();
        for (id, pid) in &moving {
            let to = self.migrations.borrow().destination.clone();
            self.set_phase(id, TaskPhase::Migrating { pid: *pid }, format!("to {to}"));
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.moving = moving.into_iter().map(|(id, _)| id).collect();
            if let Some(asked) = outgoing.asked.take() {
                let _ = asked.send(Ok(number));
            }
        }
    }

    fn send(&mut self, number: u64) {
        let Some(outgoing) = &self.outgoing else {
            return;
        };
        let parameters = Arc::clone(&outgoing.parameters);
        let started = outgoing.started;
        let containers = self.tasks.values().map(|task| ContainerState {
            name: task.name.clone(),
            starts: task.starts,
        });
        let pod = PodState::new(containers.collect()).encode();
        let (progress, mut told) = watch::channel(MigrationProgress::default());
        let migrations = self.migrations.clone();
        tokio::spawn(async move {
            while told.changed().await.is_ok() {
                let progress = *told.borrow_and_update();
                migrations.send_if_modified(|view| {
                    let same = view.number == number && view.outcome.is_none();
                    if same {
                        view.progress = progress;
                        view.elapsed = started.elapsed();
                    }
                    same
                });
            }
        });
        if let Some(timeout) = parameters.timeout {
            let action = parameters.timeout_action;
            self.effect(
                async move { tokio::time::sleep(timeout).await },
                move |driver, ()| {
                    if let Some(outgoing) = &mut driver.outgoing {
                        outgoing.reason = format!("it took longer than {} ms", timeout.as_millis());
                    }
                    driver.migration_input(number, Input::TimedOut(action));
                },
            );
        }
        let handler = Arc::clone(&self.handler);
        self.effect(
            async move { handler.migration()?.send(&parameters, pod, progress).await },
            move |driver, result| {
                let input = match result {
                    Ok(Sent::Moved) => Input::SentMoved,
                    Ok(Sent::Lost(reason)) => {
                        driver.because(reason);
                        Input::SentLost
                    }
                    Err(error) => {
                        driver.because(error.chain());
                        Input::SendFailed
                    }
                };
                driver.migration_input(number, input);
            },
        );
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

    /// Cancels, or (`hurry`) brings to an end.
    fn ask_backend(&mut self, number: u64, hurry: Option<Hurry>) {
        let handler = Arc::clone(&self.handler);
        let effect = async move {
            let migration = handler.migration()?;
            match hurry {
                None => migration.cancel().await,
                Some(how) => migration.hurry(how).await,
            }
        };
        self.effect(effect, move |driver, result| match (result, hurry) {
            (Ok(()), _) => {}
            (Err(error), None) => {
                info!("the migration cannot be cancelled: {}", error.chain());
                driver.migration_input(number, Input::CannotCancel);
            }
            // What was to bring it to an end does not: the bound holds all the same.
            (Err(error), Some(how)) => {
                warn!("{how:?}: {}; giving the migration up", error.chain());
                driver.because(error.chain());
                driver.migration_input(number, Input::Cancel);
            }
        });
    }

    pub(super) fn cancel_migration(&mut self, reply: Reply<()>) {
        let number = self.migrations.borrow().number;
        match &mut self.outgoing {
            None => {
                let _ = reply.send(Err(Error::FailedPrecondition(
                    "there is no migration under way".into(),
                )));
            }
            Some(outgoing) => {
                outgoing.cancels.push(reply);
                if outgoing.reason.is_empty() {
                    outgoing.reason = "it was cancelled".into();
                }
                self.migration_input(number, Input::Cancel);
            }
        }
    }

    /// A signal that is to end what is on its way: first the migration must be over.
    pub(super) fn cancel_and_signal(&mut self, signal: Signal) {
        let number = self.migrations.borrow().number;
        match &mut self.outgoing {
            Some(outgoing) => {
                outgoing.signals.push(signal);
                if outgoing.reason.is_empty() {
                    outgoing.reason = "the pod was told to end".into();
                }
                self.migration_input(number, Input::Cancel);
            }
            None => {
                let error = not_found(&signal.container);
                self.refused(&signal.container, signal.ticket, signal.reply, error);
            }
        }
    }

    fn refuse_cancel(&mut self) {
        if let Some(outgoing) = &mut self.outgoing {
            for cancel in outgoing.cancels.drain(..) {
                let _ = cancel.send(Err(Error::FailedPrecondition(
                    "the migration cannot be cancelled any more: wait for its end".into(),
                )));
            }
        }
    }

    /// It runs here as before.
    fn go_on(&mut self) {
        let launch = &self.pod.launch;
        let lifted = self
            .fence()
            .remove(&launch.containerd_namespace, &launch.sandbox_id);
        if let Err(error) = lifted {
            warn!("{}", error.chain());
        }
        let (moving, reason) = match &self.outgoing {
            Some(outgoing) => (outgoing.moving.clone(), outgoing.reason.clone()),
            None => return,
        };
        for id in moving {
            if let Some(TaskPhase::Migrating { pid }) = self.phase_of(&id) {
                let why = format!("the migration was given up: {reason}");
                self.set_phase(&id, TaskPhase::Running { pid }, why);
            }
        }
        self.end_migration(Outcome::Abandoned(reason));
    }

    /// It runs there: nothing of it may run here again.
    fn moved(&mut self) {
        if let Err(error) = self.fence().put(&self.tombstone(true)) {
            // It is up since before the pod was given away.
            warn!("{}", error.chain());
        }
        let exit = Exit {
            status: 0,
            at: SystemTime::now(),
        };
        let to = self.migrations.borrow().destination.clone();
        // The sandbox last: who is told of its end may look for the rest.
        let mut ids: Vec<(bool, String)> = self
            .tasks
            .iter()
            .map(|(id, task)| (task.role == Role::Sandbox, id.clone()))
            .collect();
        ids.sort();
        for (_, id) in ids {
            self.cut_execs(&id);
            let Some(TaskPhase::Running { pid } | TaskPhase::Migrating { pid }) =
                self.phase_of(&id)
            else {
                continue;
            };
            self.publish(TaskEvent::Exit {
                process: ProcessId::init(&id),
                pid,
                exit,
            });
            self.set_phase(&id, TaskPhase::Migrated { pid, exit }, format!("to {to}"));
            if let Some(task) = self.tasks.get_mut(&id) {
                task.stdio = None;
                answer_waiters(&mut task.waiters, exit);
            }
        }
        self.end_migration(Outcome::Completed);
    }

    /// Its processes go on there; those who wait here cannot learn how they end.
    fn cut_execs(&mut self, container: &str) {
        let exit = Exit {
            status: CUT_OFF,
            at: SystemTime::now(),
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
        let reason = match &self.outgoing {
            Some(outgoing) => outgoing.reason.clone(),
            None => return,
        };
        warn!("the pod is lost: {reason}");
        self.fail_all(&format!("lost while it moved: {reason}"));
        self.end_migration(Outcome::Lost(reason));
    }

    fn end_migration(&mut self, outcome: Outcome) {
        let Some(outgoing) = self.outgoing.take() else {
            return;
        };
        match &outcome {
            Outcome::Completed => info!("the migration is done"),
            Outcome::Abandoned(reason) => info!("the migration was given up: {reason}"),
            Outcome::Lost(reason) => warn!("the migration lost the pod: {reason}"),
        }
        let here = matches!(outcome, Outcome::Abandoned(_));
        self.migrations.send_modify(|view| {
            view.outcome = Some(outcome);
            view.elapsed = outgoing.started.elapsed();
        });
        for cancel in outgoing.cancels {
            let _ = cancel.send(if here {
                Ok(())
            } else {
                Err(Error::FailedPrecondition(
                    "the migration was over before it could be cancelled".into(),
                ))
            });
        }
        self.finish(&outgoing.sandbox, outgoing.ticket);
        for signal in outgoing.signals {
            let Signal {
                container,
                ticket,
                signal,
                all,
                reply,
            } = signal;
            self.signal_init(&container, ticket, signal, all, reply);
        }
    }

    // --- Target ------------------------------------------------------------------

    /// Refuses a sandbox that left, or another one of its pod.
    ///
    /// # Errors
    /// `FailedPrecondition`, with where it runs.
    pub(super) fn check_fence(&self, sandbox_id: &str, pod_uid: &str) -> Result<()> {
        let fence = self.fence();
        fence.prune(SystemTime::now());
        let namespace = &self.pod.launch.containerd_namespace;
        match fence.find(namespace, sandbox_id, pod_uid) {
            None => Ok(()),
            Some(tombstone) => Err(Error::FailedPrecondition(format!(
                "pod {} {} to {}, so it must not run here again: delete this pod",
                tombstone.pod,
                if tombstone.settled {
                    "has migrated"
                } else {
                    "was on its way"
                },
                tombstone.destination
            ))),
        }
    }

    /// The sandbox is Incoming: waits for its source, beside everything else.
    pub(super) fn await_source(&mut self) {
        let handler = Arc::clone(&self.handler);
        self.effect(
            async move { handler.migration()?.receive().await },
            |driver, result| driver.source_came(result),
        );
    }

    /// Nobody waits for its source any more; the backend lets go of its stdio.
    pub(super) fn end_incoming(
        &mut self,
        container: &str,
        ticket: Ticket,
        instance: Arc<dyn Instance>,
        signal: i32,
        reply: Reply<()>,
    ) {
        let container = container.to_owned();
        self.effect(
            async move { instance.stop(Duration::ZERO).await },
            move |driver, stopped| {
                if let Err(error) = stopped {
                    warn!("{container}: {}", error.chain());
                }
                if matches!(
                    driver.phase_of(&container),
                    Some(TaskPhase::Incoming { .. })
                ) {
                    let exit = Exit {
                        status: 128 + signal.unsigned_abs(),
                        at: SystemTime::now(),
                    };
                    driver.end_for_good(&container, 0, exit);
                }
                let _ = reply.send(Ok(()));
                driver.finish(&container, ticket);
            },
        );
    }

    fn source_came(&mut self, result: Result<Arrival>) {
        let arrived = result.and_then(|arrival| {
            let state = PodState::decode(&arrival.pod)?;
            Ok((arrival, state))
        });
        match arrived {
            Ok((arrival, state)) => self.arrived(arrival, &state),
            Err(error) => {
                let text = error.chain();
                if self.incoming {
                    warn!("the migration to this pod failed: {text}");
                }
                self.incoming = false;
                self.fail_all(&format!("nothing arrived: {text}"));
            }
        }
    }

    fn arrived(&mut self, arrival: Arrival, state: &PodState) {
        self.incoming = false;
        for (process, pid) in arrival.processes {
            let id = process.container;
            let Some(task) = self.tasks.get_mut(&id) else {
                continue;
            };
            if let Some(known) = state
                .containers
                .iter()
                .find(|known| known.name == task.name)
            {
                task.starts = known.starts;
            }
            if matches!(task.phase, TaskPhase::Incoming { .. }) {
                self.set_phase(&id, TaskPhase::Running { pid }, "its machine arrived");
            }
        }
        let rest: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, task)| matches!(task.phase, TaskPhase::Incoming { .. }))
            .map(|(id, _)| id.clone())
            .collect();
        for id in rest {
            warn!("{id}: its source had no such container");
            let exit = Exit {
                status: CUT_OFF,
                at: SystemTime::now(),
            };
            self.end_for_good(&id, 0, exit);
        }
    }

    // --- Both --------------------------------------------------------------------

    pub(super) fn phase_of(&self, container: &str) -> Option<TaskPhase> {
        self.tasks.get(container).map(|task| task.phase.clone())
    }

    /// Everything that has not ended has failed.
    fn fail_all(&mut self, reason: &str) {
        let at = SystemTime::now();
        let ids: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, task)| {
                matches!(
                    task.phase,
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
                at,
            };
            let Some(task) = self.tasks.get_mut(&id) else {
                continue;
            };
            let pid = task.pid();
            task.stdio = None;
            let Some(exit) = failed.exit() else { continue };
            answer_waiters(&mut task.waiters, exit);
            self.publish(TaskEvent::Exit {
                process: ProcessId::init(&id),
                pid,
                exit,
            });
            self.set_phase(&id, failed, reason);
        }
    }
}
