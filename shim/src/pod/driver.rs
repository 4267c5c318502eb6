//! The sole owner of a pod's state: one loop that takes what comes in, asks the [`Model`] what
//! to do, and does it. It never waits for an effect; [`effects`](super::effects) has those.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use dyad_runtime_handler::handler::{
    Event, Exit, Instance, MachineEvent, ProcessId, RuntimeHandler,
};
use dyad_runtime_handler::spec::{PodInfo, Role};
use dyad_runtime_handler::stats::Stats;
use dyad_runtime_handler::{Error, Result};
use log::{debug, error, info, warn};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::model::change::{Action, Answer, Input, News, Token};
use super::model::state::{self, State, TaskStatus};
use super::model::task::{Phase, Task};
use super::model::{Identity, Model, not_found};
use super::{Command, Pending, PodView, ProcessView, Reply, SandboxView, TaskEvent, Transition};
use crate::bootstrap::launch::Launch;
use crate::migration::{MigrationView, Outcome};
use crate::pod_files::PodFiles;
use crate::stdio::OpenStdio;

/// What the driver knows of its pod from the start.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Who we are; also the configuration.
    pub launch: Launch,
}

/// What the end of an effect does to the driver.
type Apply = Box<dyn FnOnce(&mut Driver) + Send>;

/// What a container holds of the world.
pub(super) struct Held {
    pub(super) instance: Arc<dyn Instance>,
    /// Open until the process has ended for good.
    pub(super) stdio: Option<OpenStdio>,
    /// The same, of its execs.
    pub(super) execs: BTreeMap<String, OpenStdio>,
    /// Its usage as it was read last.
    pub(super) usage: Option<Stats>,
}

/// See the module.
pub struct Driver {
    pub(super) pod: Pod,
    /// From the sandbox's spec, once that is created.
    pub(super) info: PodInfo,
    pub(super) handler: Arc<dyn RuntimeHandler>,
    /// Of a pod without a pause container.
    pub(super) files: Option<PodFiles>,
    pub(super) model: Model,
    pub(super) held: BTreeMap<String, Held>,
    commands: mpsc::UnboundedReceiver<Command>,
    backend: mpsc::UnboundedReceiver<Event>,
    effects: mpsc::UnboundedSender<Apply>,
    ended: mpsc::UnboundedReceiver<Apply>,
    publisher: mpsc::UnboundedSender<TaskEvent>,
    /// Those who are to be answered, by the number of their [`Token`].
    callers: HashMap<u64, Pending>,
    next_caller: u64,
    /// Those who wait for a process's end.
    waiters: HashMap<ProcessId, Vec<Reply<Exit>>>,
    /// Those who watch transitions.
    watchers: Vec<mpsc::Sender<Transition>>,
    /// The migration under way or the last one, as it is told.
    pub(super) migrations: watch::Sender<MigrationView>,
    /// When that began.
    pub(super) migration_began: Instant,
    shutdown: bool,
}

/// All that had come in when a turn of the loop began.
#[derive(Default)]
struct Turn {
    events: Vec<Event>,
    ends: Vec<Apply>,
    commands: Vec<Command>,
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
        let identity = Identity {
            kind: pod.launch.kind,
            sandbox_id: pod.launch.sandbox_id.clone(),
        };
        Self {
            pod,
            info: PodInfo::default(),
            handler,
            files: None,
            model: Model::new(identity),
            held: BTreeMap::new(),
            commands,
            backend,
            effects,
            ended,
            publisher,
            callers: HashMap::new(),
            next_caller: 0,
            waiters: HashMap::new(),
            watchers: Vec::new(),
            migrations: watch::Sender::default(),
            migration_began: Instant::now(),
            shutdown: false,
        }
    }

    /// Runs until it is asked to shut down and no container is left, or nobody can
    /// ask any more.
    pub async fn run(mut self) {
        while !self.shutdown {
            let Some(turn) = self.turn().await else {
                return;
            };
            self.events(turn.events);
            for apply in turn.ends {
                apply(&mut self);
            }
            for command in turn.commands {
                // Those behind a shutdown are told so by the end of their reply's sender.
                if !self.shutdown {
                    self.command(command);
                }
            }
        }
    }

    /// Waits until something comes in, and takes all that is there then: so a flood of one
    /// sort holds up no other for longer than what is there takes. `None`: nobody can ask any
    /// more.
    ///
    /// What the backend saw before an effect ended is in the same turn or an earlier one, as
    /// events are taken after ends.
    async fn turn(&mut self) -> Option<Turn> {
        let mut turn = Turn::default();
        tokio::select! {
            Some(event) = self.backend.recv() => turn.events.push(event),
            Some(end) = self.ended.recv() => turn.ends.push(end),
            command = self.commands.recv() => turn.commands.push(command?),
        }
        take_present(&mut self.ended, &mut turn.ends);
        take_present(&mut self.backend, &mut turn.events);
        take_present(&mut self.commands, &mut turn.commands);
        Some(turn)
    }

    fn events(&mut self, events: Vec<Event>) {
        let mut last = None;
        for event in events {
            // One that repeats the last one says nothing new.
            if last.as_ref() == Some(&event) {
                continue;
            }
            last = Some(event.clone());
            self.event(event);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Exited { process, exit } => {
                debug!("{process} ended with status {}", exit.status);
                self.step(Input::Exited(process, exit));
            }
            Event::OutOfMemory { container } => self.step(Input::OutOfMemory(container)),
            Event::Machine(event) => {
                let pod = &self.pod.launch.sandbox_id;
                match event {
                    MachineEvent::Crashed => error!("the guest of pod {pod} crashed"),
                    MachineEvent::Rebooted => info!("the guest of pod {pod} rebooted"),
                    MachineEvent::Suspended | MachineEvent::Resumed => {
                        debug!("pod {pod}: {event:?}");
                    }
                }
                self.step(Input::Machine(event));
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Create(request, reply) => self.prepare(request, reply),
            Command::CreateSandbox(request, reply) => self.prepare_sandbox(*request, reply),
            Command::ViewSandbox(id, reply) => {
                let _ = reply.send(self.view_sandbox(&id));
            }
            Command::Change(container, change, pending) => {
                let token = self.caller(pending);
                self.step(Input::Change(container, change, token));
            }
            Command::Operate(operation, target, reply) => {
                let token = self.caller(Pending::View(reply));
                self.step(Input::Operate(operation, target, token));
            }
            Command::Migrate(parameters, reply) => {
                let token = self.caller(Pending::Number(reply));
                self.step(Input::Migrate(Arc::new(*parameters), token));
            }
            Command::State(process, reply) => {
                let _ = reply.send(self.view(&process));
            }
            Command::Wait(process, reply) => self.wait(process, reply),
            Command::Pids(container, reply) => self.pids(&container, reply),
            Command::Stats(container, reply) => self.stats(&container, reply),
            Command::View(reply) => {
                let _ = reply.send(Ok(self.pod_view()));
            }
            Command::Watch(watcher) => self.watch(watcher),
            Command::Migration(reply) => {
                let _ = reply.send(Ok(self.migrations.subscribe()));
            }
            Command::CancelMigration(reply) => {
                let token = self.caller(Pending::View(reply));
                self.step(Input::CancelMigration(token));
            }
            Command::Shutdown(reply) => {
                let token = self.caller(Pending::Done(reply));
                self.step(Input::Shutdown(token));
            }
        }
    }

    // --- Doing what the model says -----------------------------------------------

    /// Remembers who is to be answered.
    pub(super) fn caller(&mut self, pending: Pending) -> Token {
        let caller = self.next_caller;
        self.next_caller += 1;
        self.callers.insert(caller, pending);
        Token::Caller(caller)
    }

    /// The only way in which the pod's state changes.
    pub(super) fn step(&mut self, input: Input) {
        for action in self.model.step(SystemTime::now(), input) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Begin(call) => self.begin(call),
            Action::Answer(caller, result) => self.answer(caller, result),
            Action::Publish(event) => self.publish(event),
            Action::Tell(transition) => self.tell(transition),
            Action::Over(process, exit) => self.over(&process, exit),
            Action::Forget(container, exit) => self.forget(&container, exit),
            Action::Migration(news) => self.migration_news(news),
            Action::Shutdown => {
                info!("shutting down");
                self.shutdown = true;
            }
        }
    }

    /// Answers a caller of whom the model was not told.
    pub(super) fn refuse(&mut self, token: Token, error: Error) {
        if let Token::Caller(caller) = token {
            self.answer(caller, Err(error));
        }
    }

    fn answer(&mut self, caller: u64, result: Result<Answer>) {
        let Some(pending) = self.callers.remove(&caller) else {
            return error!("an answer to nobody: {result:?}");
        };
        if let Some(other) = pending.send(result, || self.pod_view()) {
            error!("an answer of another sort: {other:?}");
        }
    }

    fn publish(&self, event: TaskEvent) {
        match &event {
            TaskEvent::OutOfMemory { container } => warn!("container {container}: out of memory"),
            TaskEvent::Create { container, pid, .. } => info!("{container} is created, pid {pid}"),
            _ => {}
        }
        // The publisher lives as long as the server.
        let _ = self.publisher.send(event);
    }

    fn tell(&mut self, transition: Transition) {
        let task = &transition.task;
        let name = state::outside(&task.state).name;
        match task.reason.as_str() {
            "" => info!("{} is {name}", task.id),
            reason => info!("{} is {name}: {reason}", task.id),
        }
        self.watchers
            .retain(|watcher| watcher.try_send(transition.clone()).is_ok());
        self.publish(TaskEvent::Transition(Box::new(transition)));
    }

    /// A process ended for good. With the backend's own ends, which close when the output is
    /// drained, its stdio's are the last: readers see the end.
    fn over(&mut self, process: &ProcessId, exit: Exit) {
        if let Some(held) = self.held.get_mut(&process.container) {
            match &process.exec {
                None => held.stdio = None,
                Some(exec) => drop(held.execs.remove(exec)),
            }
        }
        for waiter in self.waiters.remove(process).into_iter().flatten() {
            let _ = waiter.send(Ok(exit));
        }
    }

    fn forget(&mut self, container: &str, exit: Exit) {
        self.held.remove(container);
        let left: Vec<ProcessId> = self
            .waiters
            .keys()
            .filter(|process| process.container == container)
            .cloned()
            .collect();
        for process in left {
            self.over(&process, exit);
        }
        info!("{container} is gone");
    }

    fn migration_news(&mut self, news: News) {
        match news {
            News::Began {
                number,
                destination,
            } => {
                self.migration_began = Instant::now();
                self.migrations.send_replace(MigrationView {
                    number,
                    destination,
                    ..MigrationView::default()
                });
            }
            News::Ended(outcome) => {
                match &outcome {
                    Outcome::Completed => info!("the migration is done"),
                    Outcome::Abandoned(reason) => info!("the migration was given up: {reason}"),
                    Outcome::Lost(reason) => warn!("the migration lost the pod: {reason}"),
                }
                self.migrations.send_modify(|view| {
                    view.outcome = Some(outcome);
                    view.elapsed = self.migration_began.elapsed();
                });
            }
        }
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

    // --- Reads -------------------------------------------------------------------

    /// The backend's side of a container.
    ///
    /// # Errors
    /// `NotFound`, also while it is being created.
    pub(super) fn instance(&self, container: &str) -> Result<Arc<dyn Instance>> {
        self.held
            .get(container)
            .map(|held| Arc::clone(&held.instance))
            .ok_or_else(|| not_found(container))
    }

    /// The task's pid, also while the backend makes its process.
    fn pid(&self, container: &str, task: &Task) -> u32 {
        match task.phase() {
            Phase::Created | Phase::Starting { .. } => self
                .held
                .get(container)
                .and_then(|held| held.instance.pid())
                .unwrap_or(0),
            _ => task.pid(),
        }
    }

    fn view(&self, process: &ProcessId) -> Result<ProcessView> {
        let container = &process.container;
        let task = self
            .model
            .task(container)
            .ok()
            // containerd lists as a task whatever tells a state.
            .filter(|task| !task.is_bare && task.is_made())
            .ok_or_else(|| not_found(container))?;
        match &process.exec {
            Some(exec) => task
                .exec(container, exec)
                .map(|exec| task.exec_view(exec))
                .map_err(|_| Error::NotFound(process.to_string())),
            None => {
                let status = state::status(&self.model.effective(task), task.cri);
                Ok(ProcessView {
                    pid: self.pid(container, task),
                    ..task.init_view(status)
                })
            }
        }
    }

    fn view_sandbox(&self, id: &str) -> Result<SandboxView> {
        let task = self
            .model
            .task(id)
            .ok()
            .filter(|task| task.role == Role::Sandbox && task.is_made())
            .ok_or_else(|| not_found(id))?;
        Ok(SandboxView {
            pid: self.pid(id, task),
            ready: state::status(&task.state(), true) == TaskStatus::Running,
            created_at: task.created_at,
            exit: task.phase().exit(),
        })
    }

    fn pod_view(&self) -> PodView {
        let launch = &self.pod.launch;
        let tasks = self.model.tasks().iter();
        PodView {
            kind: launch.kind,
            containerd_namespace: launch.containerd_namespace.clone(),
            sandbox_id: launch.sandbox_id.clone(),
            info: self.info.clone(),
            tasks: tasks
                .filter(|(_, task)| task.is_made())
                .map(|(id, task)| super::TaskView {
                    pid: self.pid(id, task),
                    ..task.view(id)
                })
                .collect(),
            machine: self.handler.machine(),
        }
    }

    fn watch(&mut self, watcher: mpsc::Sender<Transition>) {
        let sequence = self.model.transitions();
        let made = self.model.tasks().iter().filter(|(_, task)| task.is_made());
        for (id, task) in made {
            let now = task.transition(id, task.state(), sequence);
            // The queue is new, and longer than pods are large; if not, it ends.
            if watcher.try_send(now).is_err() {
                return;
            }
        }
        self.watchers.push(watcher);
    }

    fn wait(&mut self, process: ProcessId, reply: Reply<Exit>) {
        let found = self
            .instance(&process.container)
            .and_then(|_| self.model.task(&process.container)?.exit_of(&process));
        match found {
            Err(error) => drop(reply.send(Err(error))),
            Ok(Some(exit)) => drop(reply.send(Ok(exit))),
            Ok(None) => {
                let waiters = self.waiters.entry(process).or_default();
                waiters.retain(|waiter| !waiter.is_closed());
                waiters.push(reply);
            }
        }
    }

    fn pids(&mut self, container: &str, reply: Reply<Vec<(u32, Option<String>)>>) {
        // A containerd that restarts takes a task without pids for leaked, and forgets
        // how it ended. So one that has ended keeps its last pid until it is deleted,
        // and one that is kept without a process has the pid of the server that keeps it.
        let listed =
            self.model
                .task(container)
                .ok()
                .and_then(|task| match self.model.effective(task) {
                    State::Stopped | State::Incoming => Some(std::process::id()),
                    State::Exited(_) => Some(task.pid()).filter(|pid| *pid != 0),
                    _ => None,
                });
        if let Some(pid) = listed {
            return drop(reply.send(Ok(vec![(pid, None)])));
        }
        match self.instance(container) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(instance) => {
                tokio::spawn(async move { reply.send(instance.pids().await) });
            }
        }
    }
}

/// Moves what is in `queue` now.
fn take_present<T>(queue: &mut mpsc::UnboundedReceiver<T>, to: &mut Vec<T>) {
    for _ in 0..queue.len() {
        let Ok(next) = queue.try_recv() else { return };
        to.push(next);
    }
}

#[cfg(test)]
mod tests;
