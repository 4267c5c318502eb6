//! The sole owner of a pod's state: one loop that takes requests, backend events and
//! the ends of effects from its queues, one at a time, and never waits in between.
//!
//! `init` has the steps of a container and its init process, `execs` those of further
//! processes, both as methods of [`Driver`].

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{
    Event, Exit, Instance, MachineEvent, ProcessId, RuntimeHandler,
};
use dyad_runtime_handler::spec::{PodInfo, Role};
use dyad_runtime_handler::{Error, Result};
use log::{debug, error, info, warn};
use tokio::sync::{mpsc, watch};

use super::lane::{Class, Ticket};
use super::migration::Outgoing;
use super::record::{ContainerRecord, Record, VERSION};
use super::state::{self, Refusal, RefusalClass, Request, State, Step};
use super::task::{Job, Phase, Task, answer_waiters};
use super::{Change, Command, ProcessView, Reply, TaskEvent, Transition, record};
use crate::bootstrap::launch::Launch;
use crate::migration::MigrationView;
use crate::pod_files::PodFiles;

/// Exit status of what the machine took with it.
const KILLED: u32 = 137;

/// What the driver knows of its pod from the start.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Who we are; also the configuration.
    pub launch: Launch,
}

/// What an effect does to the driver's state when it has ended.
type Apply = Box<dyn FnOnce(&mut Driver) + Send>;

/// See the module.
pub struct Driver {
    pub(super) pod: Pod,
    /// From the sandbox's spec, once that is created.
    pub(super) info: PodInfo,
    pub(super) handler: Arc<dyn RuntimeHandler>,
    /// Of a pod without a pause container.
    pub(super) files: Option<PodFiles>,
    pub(super) tasks: BTreeMap<String, Task>,
    commands: mpsc::UnboundedReceiver<Command>,
    backend: mpsc::UnboundedReceiver<Event>,
    effects: mpsc::UnboundedSender<Apply>,
    ended: mpsc::UnboundedReceiver<Apply>,
    publisher: mpsc::UnboundedSender<TaskEvent>,
    /// Those who watch transitions.
    pub(super) watchers: Vec<mpsc::Sender<Transition>>,
    /// How many transitions there were.
    pub(super) transitions: u64,
    /// The migration under way.
    pub(super) outgoing: Option<Outgoing>,
    /// The migration under way or the last one, as it is told.
    pub(super) migrations: watch::Sender<MigrationView>,
    /// The pod waits for its source.
    pub(super) incoming: bool,
    /// So, and these containers have done their work on the source, by name.
    pub(super) done_on_source: BTreeSet<String>,
    /// Asked to shut down when the pod's own task was gone: nobody asks again.
    no_pod: bool,
    shutdown: bool,
}

impl Driver {
    /// A driver of an empty pod.
    pub(crate) fn new(
        pod: Pod,
        handler: Arc<dyn RuntimeHandler>,
        commands: mpsc::UnboundedReceiver<Command>,
        backend: mpsc::UnboundedReceiver<Event>,
        publisher: mpsc::UnboundedSender<TaskEvent>,
    ) -> Self {
        let (effects, ended) = mpsc::unbounded_channel();
        Self {
            pod,
            info: PodInfo::default(),
            handler,
            files: None,
            tasks: BTreeMap::new(),
            commands,
            backend,
            effects,
            ended,
            publisher,
            watchers: Vec::new(),
            transitions: 0,
            outgoing: None,
            migrations: watch::Sender::default(),
            incoming: false,
            done_on_source: BTreeSet::new(),
            no_pod: false,
            shutdown: false,
        }
    }

    /// Runs until it is asked to shut down and no container is left, or nobody can
    /// ask any more.
    pub async fn run(mut self) {
        while !self.shutdown {
            tokio::select! {
                // What the backend saw before an effect ended is taken first.
                biased;
                Some(event) = self.backend.recv() => self.backend_event(event),
                Some(apply) = self.ended.recv() => apply(&mut self),
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Create(request, reply) => self.create(request, reply),
            Command::CreateSandbox(request, reply) => self.create_sandbox(*request, reply),
            Command::ViewSandbox(id, reply) => {
                let _ = reply.send(self.view_sandbox(&id));
            }
            Command::Change(process, change) => self.enqueue(process, change),
            Command::State(process, reply) => {
                let _ = reply.send(self.view(&process));
            }
            Command::Wait(process, reply) => self.wait(&process, reply),
            Command::Pids(container, reply) => self.pids(&container, reply),
            Command::Stats(container, reply) => self.stats(&container, reply),
            Command::View(reply) => {
                let _ = reply.send(Ok(self.pod_view()));
            }
            Command::Watch(watcher) => self.watch(watcher),
            Command::Migration(reply) => {
                let _ = reply.send(Ok(self.migrations.subscribe()));
            }
            Command::CancelMigration(reply) => self.cancel_migration(reply),
            Command::Shutdown(reply) => {
                // containerd 1.x asks after each container's delete, and the last one counts; 2.x
                // only after the pod's, which is not the last where all end at once.
                let is_pod = |task: &Task| task.role == Role::Sandbox;
                self.no_pod = !self.tasks.values().any(is_pod);
                self.end_when_empty();
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn end_when_empty(&mut self) {
        if self.no_pod && self.tasks.is_empty() {
            info!("shutting down");
            self.shutdown = true;
        }
    }

    // --- Changes, in order -------------------------------------------------------

    fn enqueue(&mut self, process: ProcessId, change: Change) {
        if !self.tasks.contains_key(&process.container) {
            return change.refuse(not_found(&process.container));
        }
        if let Err(error) = self.barred_by_migration(&process, &change) {
            return change.refuse(error);
        }
        let Some(task) = self.tasks.get_mut(&process.container) else {
            return;
        };
        let container = process.container.clone();
        let class = change.class(&process);
        task.lane.push(class, Job { process, change });
        self.pump(&container);
    }

    /// Begins every change of `container` that may begin now.
    pub(super) fn pump(&mut self, container: &str) {
        while let Some((ticket, job)) = self
            .tasks
            .get_mut(container)
            .and_then(|task| task.lane.next())
        {
            self.begin(ticket, job);
        }
    }

    fn begin(&mut self, ticket: Ticket, job: Job) {
        let Job { process, change } = job;
        let container = process.container;
        match (process.exec, change) {
            (None, Change::Run(reply)) => self.run_init(&container, ticket, reply),
            (None, Change::Signal { signal, all, reply }) => {
                self.signal_init(&container, ticket, signal, all, reply);
            }
            (None, Change::Delete(reply)) => self.delete_init(&container, ticket, reply),
            (None, Change::Pause(reply)) => self.pause(&container, ticket, reply),
            (None, Change::Resume(reply)) => self.resume(&container, ticket, reply),
            (None, Change::Stop { grace, reply }) => {
                self.stop_init(&container, ticket, grace, reply);
            }
            (None, Change::Start(reply)) => self.start_again(&container, ticket, reply),
            (None, Change::Migrate(parameters, reply)) => {
                self.migrate(&container, ticket, *parameters, reply);
            }
            (
                None,
                Change::Restart {
                    force,
                    grace,
                    reply,
                },
            ) => self.restart_init(&container, ticket, (force, grace), reply),
            (None, Change::Update(resources, reply)) => {
                self.update(&container, ticket, resources, reply);
            }
            (None, Change::Checkpoint(to, reply)) => {
                self.checkpoint(&container, ticket, to, reply);
            }
            (Some(exec), Change::AddExec(request, reply)) => {
                self.add_exec(&container, exec, ticket, *request, reply);
            }
            (Some(exec), Change::Run(reply)) => self.run_exec(&container, exec, ticket, reply),
            (Some(exec), Change::Signal { signal, reply, .. }) => {
                self.signal_exec(&container, exec, ticket, signal, reply);
            }
            (Some(exec), Change::Delete(reply)) => {
                self.delete_exec(&container, exec, ticket, reply);
            }
            (
                exec,
                Change::Resize {
                    width,
                    height,
                    reply,
                },
            ) => self.simple(
                &container,
                exec,
                ticket,
                reply,
                move |instance, exec| async move {
                    instance.resize(exec.as_deref(), width, height).await
                },
            ),
            (exec, Change::CloseStdin(reply)) => {
                self.simple(
                    &container,
                    exec,
                    ticket,
                    reply,
                    |instance, exec| async move { instance.close_stdin(exec.as_deref()).await },
                );
            }
            (Some(exec), change) => {
                let text = format!("exec {exec} of container {container}: no such operation");
                change.refuse(Error::InvalidArgument(text));
                self.finish(&container, ticket);
            }
            (None, change) => {
                change.refuse(Error::InvalidArgument("the exec id is empty".into()));
                self.finish(&container, ticket);
            }
        }
    }

    /// Ends a change: those behind it in the lane may begin.
    pub(super) fn finish(&mut self, container: &str, ticket: Ticket) {
        if let Some(task) = self.tasks.get_mut(container) {
            task.lane.done(ticket);
        }
        self.pump(container);
    }

    /// Runs `future` beside the loop and gives its output to `apply` in the loop.
    pub(super) fn effect<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
        apply: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        let effects = self.effects.clone();
        tokio::spawn(async move {
            let output = future.await;
            // A driver that has shut down has no state to change.
            let _ = effects.send(Box::new(move |driver| apply(driver, output)));
        });
    }

    /// A change that needs no decision and leaves the state as it is.
    fn simple<F: Future<Output = Result<()>> + Send + 'static>(
        &mut self,
        container: &str,
        exec: Option<String>,
        ticket: Ticket,
        reply: Reply<()>,
        call: impl FnOnce(Arc<dyn Instance>, Option<String>) -> F,
    ) {
        let found = self.task(container).and_then(|task| {
            if let Some(exec) = &exec {
                task.exec(container, exec)?;
            }
            task.instance(container)
        });
        let instance = match found {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        self.effect(call(instance, exec), move |driver, result| {
            let _ = reply.send(result);
            driver.finish(&container, ticket);
        });
    }

    pub(super) fn refused<T>(
        &mut self,
        container: &str,
        ticket: Ticket,
        reply: Reply<T>,
        error: Error,
    ) {
        let _ = reply.send(Err(error));
        self.finish(container, ticket);
    }

    /// Asks the state machine for `request` on `container`.
    pub(super) fn decide(&self, container: &str, request: Request) -> Result<Step> {
        let task = self
            .tasks
            .get(container)
            .ok_or_else(|| not_found(container))?;
        state::decide(&self.effective(task), request)
            .map_err(|refusal| refusal_error(container, &refusal))
    }

    // --- Reads -------------------------------------------------------------------

    pub(super) fn task(&mut self, container: &str) -> Result<&mut Task> {
        self.tasks
            .get_mut(container)
            .ok_or_else(|| not_found(container))
    }

    /// The state that others meet: in a machine pod the machine's counts too.
    pub(super) fn effective(&self, task: &Task) -> State {
        let own = task.phase.state();
        if self.pod.launch.kind != Kind::Machine || task.role == Role::Sandbox {
            return own;
        }
        let machine = self.tasks.values().find(|task| task.role == Role::Sandbox);
        state::effective(own, machine.map(|task| task.phase.state()).as_ref())
    }

    fn view(&self, process: &ProcessId) -> Result<ProcessView> {
        let container = &process.container;
        let task = self
            .tasks
            .get(container)
            // containerd lists as a task whatever tells a state.
            .filter(|task| !task.is_bare && !matches!(task.phase, Phase::Creating))
            .ok_or_else(|| not_found(container))?;
        match &process.exec {
            Some(exec) => task
                .execs
                .get(exec)
                .map(|exec| task.exec_view(exec))
                .ok_or_else(|| Error::NotFound(process.to_string())),
            None => Ok(ProcessView {
                bundle: task.bundle.clone(),
                pid: task.pid(),
                status: state::status(&self.effective(task), task.cri),
                exit: task.phase.exit(),
                stdio: task.uris.clone(),
            }),
        }
    }

    fn wait(&mut self, process: &ProcessId, reply: Reply<Exit>) {
        let found = self.task(&process.container).and_then(|task| {
            task.instance(&process.container)?;
            Ok(match &process.exec {
                None => (task.phase.exit(), &mut task.waiters),
                Some(exec) => {
                    let exec = task.exec(&process.container, exec)?;
                    (exec.phase.exit(), &mut exec.waiters)
                }
            })
        });
        match found {
            Err(error) => drop(reply.send(Err(error))),
            Ok((Some(exit), _)) => drop(reply.send(Ok(exit))),
            Ok((None, waiters)) => {
                waiters.retain(|waiter| !waiter.is_closed());
                waiters.push(reply);
            }
        }
    }

    fn pids(&mut self, container: &str, reply: Reply<Vec<(u32, Option<String>)>>) {
        // A containerd that restarts takes a task without pids for leaked, and forgets
        // how it ended. So one that has ended keeps its last pid until it is deleted,
        // and one that is kept without a process has the pid of the server that keeps it.
        let listed = self
            .tasks
            .get(container)
            .and_then(|task| match self.effective(task) {
                State::Stopped | State::Incoming => Some(std::process::id()),
                State::Exited(_) => Some(task.pid()).filter(|pid| *pid != 0),
                _ => None,
            });
        if let Some(pid) = listed {
            let _ = reply.send(Ok(vec![(pid, None)]));
            return;
        }
        self.read(
            container,
            reply,
            |instance| async move { instance.pids().await },
        );
    }

    fn read<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
        &mut self,
        container: &str,
        reply: Reply<T>,
        call: impl FnOnce(Arc<dyn Instance>) -> F,
    ) {
        match self
            .task(container)
            .and_then(|task| task.instance(container))
        {
            Err(error) => drop(reply.send(Err(error))),
            Ok(instance) => {
                let answer = call(instance);
                tokio::spawn(async move { reply.send(answer.await) });
            }
        }
    }

    // --- What the backend saw ----------------------------------------------------

    fn backend_event(&mut self, event: Event) {
        match event {
            Event::Exited { process, exit } => match &process.exec {
                None => self.init_exited(&process.container, exit),
                Some(exec) => self.exec_exited(&process.container, exec, exit),
            },
            Event::OutOfMemory { container } => {
                warn!("container {container}: out of memory");
                self.publish(TaskEvent::OutOfMemory { container });
            }
            Event::Machine(change) => self.machine_changed(change),
        }
    }

    fn machine_changed(&mut self, change: MachineEvent) {
        let Some((id, task)) = self
            .tasks
            .iter_mut()
            .find(|(_, task)| task.role == Role::Sandbox)
        else {
            return;
        };
        let id = id.clone();
        match (change, &task.phase) {
            (MachineEvent::Suspended, &Phase::Running { pid }) => {
                self.set_phase(&id, Phase::Paused { pid }, "its machine was suspended");
                self.publish(TaskEvent::Paused { container: id });
            }
            (MachineEvent::Resumed, &Phase::Paused { pid }) => {
                self.set_phase(&id, Phase::Running { pid }, "its machine was resumed");
                self.publish(TaskEvent::Resumed { container: id });
            }
            (MachineEvent::Crashed, _) => error!("the guest of pod {id} crashed"),
            (MachineEvent::Rebooted, _) => info!("the guest of pod {id} rebooted"),
            (change, phase) => debug!("pod {id}: {change:?} while {phase:?}"),
        }
    }

    /// A machine that ended has taken all in it along; the backend says so where it
    /// can, and this for the rest.
    pub(super) fn machine_ended(&mut self, at: SystemTime) {
        if self.pod.launch.kind != Kind::Machine {
            return;
        }
        let exit = Exit { status: KILLED, at };
        for process in self.processes_in_machine() {
            let container = &process.container;
            let kept = self.tasks.get(container).is_some_and(|task| {
                matches!(task.phase, Phase::Stopped { .. } | Phase::Incoming { .. })
            });
            match &process.exec {
                Some(exec) => self.exec_exited(container, exec, exit),
                // There is nothing left that it could be started in.
                None if kept => self.end_for_good(container, 0, exit),
                None => self.init_exited(container, exit),
            }
        }
    }

    // --- Telling others ----------------------------------------------------------

    pub(super) fn publish(&self, event: TaskEvent) {
        let is_bare = event
            .of_task()
            .and_then(|container| self.tasks.get(container))
            .is_some_and(|task| task.is_bare);
        if is_bare {
            return;
        }
        // The publisher lives as long as the server.
        let _ = self.publisher.send(event);
    }

    /// Writes the pod's record. A pod goes on without one; that is said once each time.
    pub(super) fn save(&self) {
        let launch = &self.pod.launch;
        let containers = self.tasks.iter().map(|(id, task)| ContainerRecord {
            id: id.clone(),
            is_sandbox: task.role == Role::Sandbox,
            bundle: task.bundle.clone(),
            state: state::outside(&task.phase.state()).name.to_owned(),
            pid: Some(task.pid()).filter(|pid| *pid != 0),
            exit_status: task.phase.exit().map(|exit| exit.status),
        });
        let record = Record {
            version: VERSION,
            kind: launch.kind,
            containerd_namespace: launch.containerd_namespace.clone(),
            sandbox_id: launch.sandbox_id.clone(),
            pod_name: self.info.name.clone(),
            pod_namespace: self.info.namespace.clone(),
            pod_uid: self.info.uid.clone(),
            address: launch.address(),
            shim_pid: std::process::id(),
            containers: containers.collect(),
        };
        if let Err(error) = record::write(&launch.pod_dir(), &record) {
            warn!("the pod's record was not written: {}", error.chain());
        }
    }

    /// Removes a container that is gone, or never came to be, and fails what waits.
    pub(super) fn forget(&mut self, container: &str, bundle: &Path, exit: Exit) {
        if let Some(mut task) = self.tasks.remove(container) {
            answer_waiters(&mut task.waiters, exit);
            for exec in task.execs.values_mut() {
                answer_waiters(&mut exec.waiters, exit);
            }
            for job in task.lane.drain() {
                job.change.refuse(not_found(container));
            }
        }
        if let Err(error) = Launch::remove(bundle) {
            warn!("{}", error.chain());
        }
        self.save();
        self.end_when_empty();
    }
}

impl Change {
    fn class(&self, process: &ProcessId) -> Class {
        let own = || Class::Process(process.exec.clone());
        match (self, &process.exec) {
            (Self::Signal { .. }, exec) => Class::Signal(exec.clone()),
            (Self::Stop { .. } | Self::Restart { .. } | Self::Migrate(..), None) => {
                Class::Interruptible
            }
            (Self::Resize { .. } | Self::CloseStdin(_), _) => own(),
            (_, Some(_)) => own(),
            (_, None) => Class::Whole,
        }
    }

    fn refuse(self, error: Error) {
        match self {
            Self::Run(reply) => drop(reply.send(Err(error))),
            Self::Migrate(_, reply) => drop(reply.send(Err(error))),
            Self::Delete(reply) => drop(reply.send(Err(error))),
            Self::Signal { reply, .. }
            | Self::Resize { reply, .. }
            | Self::Pause(reply)
            | Self::Resume(reply)
            | Self::Stop { reply, .. }
            | Self::Start(reply)
            | Self::Restart { reply, .. }
            | Self::Update(_, reply)
            | Self::Checkpoint(_, reply)
            | Self::AddExec(_, reply)
            | Self::CloseStdin(reply) => drop(reply.send(Err(error))),
        }
    }
}

pub(super) fn not_found(container: &str) -> Error {
    Error::NotFound(format!("container {container}"))
}

fn refusal_error(container: &str, refusal: &Refusal) -> Error {
    match refusal.class {
        RefusalClass::Precondition => Error::FailedPrecondition(format!("{container}: {refusal}")),
        RefusalClass::NoProcess => Error::NotFound(format!("{container}: {refusal}")),
        RefusalClass::Exists => Error::AlreadyExists(format!("{container}: {refusal}")),
    }
}

/// Where a bundle's record of our own lies; see [`Launch`].
pub(super) fn write_launch(launch: &Launch, id: &str, role: Role, bundle: &Path) -> Result<()> {
    launch.for_container(id, role).write(bundle)
}

#[cfg(test)]
mod tests;
