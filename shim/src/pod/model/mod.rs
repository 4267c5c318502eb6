//! What a pod does next, decided by one pure function: [`Model::step`] takes what came in and
//! says what to do. The driver is all that calls it, and does what it says.
//!
//! ```text
//!  requests ------------.                    .---> Begin(Call)   an effect starts
//!  exits, OOM, machine --+--> Model::step --+----> Publish, Tell, Over
//!  Ended(Call) ---------'                    `---> Answer        a caller learns the end
//!       ^                                                |
//!       `------------- effects, beside the loop <--------'
//! ```
//! Nothing here touches the world or looks at a clock: the time comes in with each input.
//! [`state`] says what a state allows, and makes the refusals; the other files make the
//! transitions. Changes of one container are done in the order in which they came ([`lane`]).

pub(crate) mod change;
mod execs;
mod init;
mod lane;
mod machine;
mod migration;
mod operate;
pub mod state;
mod stop;
pub(crate) mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::TaskEvent;
use change::{
    Action, Answer, Call, Change, Ended, ExecChange, InitChange, Input, Job, Plain, Token,
};
use migration::Outgoing;
use operate::Group;
use state::{Refusal, RefusalClass, Request, State, Step};
use task::{Phase, Queued, Task};

/// Exit status of what the machine took with it.
const KILLED: u32 = 137;
/// How often one container's kills for want of memory are told: containerd writes each one
/// to disk, and a guest says how many there are.
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// What a pod is from the start.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) kind: Kind,
    pub(crate) sandbox_id: String,
}

/// A pod's state. See the module.
#[derive(Debug)]
pub(crate) struct Model {
    identity: Identity,
    /// Kubernetes' name of the pod; empty outside CRI.
    pod_name: String,
    tasks: BTreeMap<String, Task>,
    /// Operations on several tasks under way, by number.
    groups: BTreeMap<u64, Group>,
    next_group: u64,
    /// How many transitions there were.
    transitions: u64,
    /// The migration away from here that is under way.
    outgoing: Option<Outgoing>,
    /// How many migrations were asked for.
    migrations: u64,
    /// The backend looks for what forbids a migration, which may have been given up since.
    is_checking: bool,
    /// The pod waits for its source.
    incoming: bool,
    /// Containers of such a pod that have done their work on the source, by name.
    done_on_source: BTreeSet<String>,
    /// Asked to shut down when the pod's own task was gone: nobody asks again.
    no_pod: bool,
    /// The time of this step.
    at: SystemTime,
    /// What this step says to do.
    actions: Vec<Action>,
}

/// How a change goes on after it was allowed.
enum Next {
    Begin(Call),
    Done,
    /// Something else answers it.
    Later,
}

impl Model {
    /// A pod without a task.
    pub(crate) fn new(identity: Identity) -> Self {
        Self {
            identity,
            pod_name: String::new(),
            tasks: BTreeMap::new(),
            groups: BTreeMap::new(),
            next_group: 0,
            transitions: 0,
            outgoing: None,
            migrations: 0,
            is_checking: false,
            incoming: false,
            done_on_source: BTreeSet::new(),
            no_pod: false,
            at: SystemTime::UNIX_EPOCH,
            actions: Vec::new(),
        }
    }

    /// What `input`, which came at `at`, makes of the pod: the model changes, and what is to
    /// be done is returned, in order.
    pub(crate) fn step(&mut self, at: SystemTime, input: Input) -> Vec<Action> {
        self.at = at;
        match input {
            Input::Create(prepared, token) => self.create(prepared, token),
            Input::Change(container, change, token) => self.change(&container, change, token),
            Input::Operate(operation, target, token) => self.operate(operation, &target, token),
            Input::Migrate(parameters, token) => self.migrate_pod(parameters, token),
            Input::CancelMigration(token) => self.cancel_migration(token),
            Input::Shutdown(token) => {
                // containerd 1.x asks after each container's delete, and the last one counts; 2.x
                // only after the pod's, which is not the last where all end at once.
                self.no_pod = self.sandbox().is_none();
                self.end_when_empty();
                self.answer(token, Ok(Answer::Done));
            }
            Input::Ended(ended) => self.ended(ended),
            Input::Exited(process, exit) => match &process.exec {
                None => self.init_exited(&process.container, exit),
                Some(exec) => self.exec_exited(&process.container, exec, exit),
            },
            Input::OutOfMemory(container) => self.out_of_memory(container),
            Input::Machine(event) => self.machine_changed(event),
        }
        std::mem::take(&mut self.actions)
    }

    fn ended(&mut self, ended: Ended) {
        match ended {
            Ended::Create(job, rootfs, result) => self.created(job, rootfs, result),
            Ended::Start(job, how, result) => self.started(job, how, result),
            Ended::Stop(job, after, result) => self.stop_returned(job, after, result),
            Ended::Reboot(job, result) => self.rebooted(job, result),
            Ended::Pause(job, result) => self.paused(job, result),
            Ended::Checkpoint(job, images, result) => self.checkpointed(job, images, result),
            Ended::Resume(job, result) => self.resumed(job, result),
            Ended::ThawFor {
                holder,
                signal,
                result,
            } => self.thawed_for(holder, signal, &result),
            Ended::LetGo { job, signal } => self.let_go(job, signal),
            Ended::Plain(job, result) => self.done(job, result.map(|()| Answer::Done)),
            Ended::Delete(job, result) => self.deleted(job, result),
            Ended::AddExec(job, exec, result) => self.exec_added(job, exec, result),
            Ended::StartExec(job, exec, result) => self.exec_started(job, &exec, result),
            Ended::DeleteExec(job, exec, result) => self.exec_deleted(job, &exec, result),
            Ended::CheckMigration(number, result) => self.migration_checked(number, result),
            Ended::PutFence(number, result) => self.fenced(number, result),
            Ended::SettleFence(number) => self.fence_settled(number),
            Ended::LiftFence(number) => self.fence_lifted(number),
            Ended::Send(number, result) => self.sent(number, result),
            Ended::Deadline(number, timeout) => self.timed_out(number, timeout),
            Ended::AskMover(number, hurry, result) => self.mover_asked(number, hurry, result),
            Ended::Receive(result) => self.source_came(result),
        }
    }

    // --- Changes, in order -------------------------------------------------------

    fn change(&mut self, container: &str, change: Change, token: Token) {
        let allowed = match self.tasks.contains_key(container) {
            false => Err(not_found(container)),
            true => self.barred_by_migration(container, &change),
        };
        if let Err(error) = allowed {
            return self.answer(token, Err(error));
        }
        if let Some(task) = self.tasks.get_mut(container) {
            let class = change.class();
            task.lane.push(class, Queued { change, token });
        }
        self.pump(container);
    }

    /// Begins every change of `container` that may begin now.
    fn pump(&mut self, container: &str) {
        while let Some((ticket, Queued { change, token })) = self
            .tasks
            .get_mut(container)
            .and_then(|task| task.lane.next())
        {
            let container = container.to_owned();
            let job = Job {
                container,
                ticket,
                token,
            };
            self.begin(job, change);
        }
    }

    fn begin(&mut self, job: Job, change: Change) {
        let next = match change {
            Change::Init(change) => self.begin_init(&job, change),
            Change::Exec(exec, change) => self.begin_exec(&job, exec, change),
        };
        self.go_on_with(job, next);
    }

    fn go_on_with(&mut self, job: Job, next: Result<Next>) {
        match next {
            Ok(Next::Begin(call)) => self.act(Action::Begin(call)),
            Ok(Next::Done) => self.done(job, Ok(Answer::Done)),
            Ok(Next::Later) => {}
            Err(error) => self.done(job, Err(error)),
        }
    }

    fn begin_init(&mut self, job: &Job, change: InitChange) -> Result<Next> {
        let plain = |what| {
            let job = job.clone();
            let exec = None;
            Next::Begin(Call::Plain { job, exec, what })
        };
        match change {
            InitChange::Run => self.run(job),
            InitChange::Signal { signal, all } => self.signal(job, signal, all),
            InitChange::Delete => self.delete(job),
            InitChange::Pause => self.freezer(job, Request::Pause),
            InitChange::Resume => self.freezer(job, Request::Resume),
            InitChange::Stop { grace } => self.stop(job, grace),
            InitChange::Start => self.start_again(job),
            InitChange::Restart { force, grace } => self.restart(job, force, grace),
            InitChange::Migrate(parameters) => self.migrate(job, parameters),
            InitChange::ThawFor(signal) => Ok(self.thaw_for(job, signal)),
            InitChange::Update(resources) => {
                self.decide(&job.container, Request::Update)?;
                self.made(&job.container)?;
                Ok(plain(Plain::Update(resources)))
            }
            InitChange::Checkpoint(to) => self.checkpoint(job, to),
            InitChange::Resize { width, height } => {
                self.made(&job.container)?;
                Ok(plain(Plain::Resize { width, height }))
            }
            InitChange::CloseStdin => {
                self.made(&job.container)?;
                Ok(plain(Plain::CloseStdin))
            }
        }
    }

    fn begin_exec(&mut self, job: &Job, exec: String, change: ExecChange) -> Result<Next> {
        match change {
            ExecChange::Add(request) => self.add_exec(job, exec, request),
            ExecChange::Run => self.run_exec(job, exec),
            ExecChange::Signal(signal) => self.signal_exec(job, exec, signal),
            ExecChange::Delete => self.delete_exec(job, exec),
            ExecChange::Resize { width, height } => {
                self.plain_exec(job, exec, Plain::Resize { width, height })
            }
            ExecChange::CloseStdin => self.plain_exec(job, exec, Plain::CloseStdin),
        }
    }

    /// Answers a change and ends it: those behind it in the lane may begin.
    fn done(&mut self, job: Job, result: Result<Answer>) {
        self.answer(job.token, result);
        self.finish(&job);
    }

    /// Ends a change that was answered already.
    fn finish(&mut self, job: &Job) {
        if let Some(task) = self.tasks.get_mut(&job.container) {
            task.lane.done(job.ticket);
        }
        self.pump(&job.container);
    }

    fn answer(&mut self, token: Token, result: Result<Answer>) {
        match token {
            Token::Caller(caller) => self.act(Action::Answer(caller, result)),
            Token::Member { group, index } => self.member_done(group, index, result),
            Token::Nobody => {}
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// To containerd's subscribers; to them a pod of the Sandbox API is no task.
    fn publish(&mut self, event: TaskEvent) {
        let is_bare = event
            .of_task()
            .and_then(|container| self.tasks.get(container))
            .is_some_and(|task| task.is_bare);
        if !is_bare {
            self.act(Action::Publish(event));
        }
    }

    // --- The state ---------------------------------------------------------------

    /// Asks the state machine for `request` on `container`.
    fn decide(&self, container: &str, request: Request) -> Result<Step> {
        let task = self.task(container)?;
        state::decide(&self.effective(task), request)
            .map_err(|refusal| refusal_error(container, &refusal))
    }

    /// Sets a task's phase; where its state changes, that is told.
    fn set_phase(&mut self, container: &str, phase: Phase, reason: impl Into<String>) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let Some(from) = task.enter(phase, reason.into(), self.at) else {
            return;
        };
        self.transitions += 1;
        let transition = task.transition(container, from, self.transitions);
        self.act(Action::Tell(transition));
    }

    pub(crate) fn task(&self, container: &str) -> Result<&Task> {
        self.tasks
            .get(container)
            .ok_or_else(|| not_found(container))
    }

    /// A task that the backend has made.
    ///
    /// # Errors
    /// `NotFound` while it is being created: nobody was told of it yet.
    fn made(&mut self, container: &str) -> Result<&mut Task> {
        self.tasks
            .get_mut(container)
            .filter(|task| task.is_made())
            .ok_or_else(|| not_found(container))
    }

    pub(crate) fn tasks(&self) -> &BTreeMap<String, Task> {
        &self.tasks
    }

    pub(crate) fn transitions(&self) -> u64 {
        self.transitions
    }

    fn phase_of(&self, container: &str) -> Option<&Phase> {
        self.tasks.get(container).map(Task::phase)
    }

    /// The pod itself.
    pub(crate) fn sandbox(&self) -> Option<(&String, &Task)> {
        self.tasks
            .iter()
            .find(|(_, task)| task.role == Role::Sandbox)
    }

    /// The state of the machine that a container is in.
    pub(crate) fn machine_of(&self, task: &Task) -> Option<State> {
        (self.identity.kind == Kind::Machine && task.role == Role::Container)
            .then(|| self.sandbox().map(|(_, machine)| machine.state()))
            .flatten()
    }

    /// The state that others meet: in a machine pod the machine's counts too.
    pub(crate) fn effective(&self, task: &Task) -> State {
        state::effective(task.state(), self.machine_of(task).as_ref())
    }

    fn is_machine(&self, container: &str) -> bool {
        self.identity.kind == Kind::Machine
            && self
                .tasks
                .get(container)
                .is_some_and(|task| task.role == Role::Sandbox)
    }

    fn end_when_empty(&mut self) {
        if self.no_pod && self.tasks.is_empty() {
            self.act(Action::Shutdown);
        }
    }

    /// Removes a container that is gone, or never came to be, and fails what waits.
    fn forget(&mut self, container: &str, exit: Exit) {
        if let Some(mut task) = self.tasks.remove(container) {
            let waiting: Vec<Queued> = task.lane.drain().collect();
            for Queued { change, token } in waiting {
                if let Change::Init(InitChange::ThawFor(signal)) = change {
                    self.done(signal.job, Err(not_found(container)));
                }
                self.answer(token, Err(not_found(container)));
            }
        }
        self.act(Action::Forget(container.to_owned(), exit));
        self.end_when_empty();
    }

    fn out_of_memory(&mut self, container: String) {
        let at = self.at;
        let Ok(task) = self.made(&container) else {
            return;
        };
        let is_soon = task.oom_at.is_some_and(|before| {
            at.duration_since(before)
                .is_ok_and(|since| since < OOM_INTERVAL)
        });
        if is_soon {
            return;
        }
        task.oom_at = Some(at);
        self.publish(TaskEvent::OutOfMemory { container });
    }
}

fn processes_of(id: &str, task: &Task) -> Vec<ProcessId> {
    task.execs
        .keys()
        .map(|exec| ProcessId::exec(id, exec.clone()))
        .chain([ProcessId::init(id)])
        .collect()
}

pub(crate) fn not_found(container: &str) -> Error {
    Error::NotFound(format!("container {container}"))
}

fn refusal_error(container: &str, refusal: &Refusal) -> Error {
    match refusal.class {
        RefusalClass::Precondition => Error::FailedPrecondition(format!("{container}: {refusal}")),
        RefusalClass::NoProcess => Error::NotFound(format!("{container}: {refusal}")),
        RefusalClass::Exists => Error::AlreadyExists(format!("{container}: {refusal}")),
    }
}

#[cfg(test)]
mod tests;
