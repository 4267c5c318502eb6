//! The real step function over a small model of a backend, in every order of requests, ends
//! of calls, exits and machine events.

mod cases;
mod walks;

use std::collections::BTreeMap;

use dyad_runtime_handler::handler::MachineEvent;
use dyad_runtime_handler::migration::{Arrival, MigrationParameters, Sent};
use dyad_runtime_handler::spec::{ContainerSpec, PodInfo, Resources, Stdio};

use super::change::{Prepared, Start};
use super::task::Made;
use super::*;
use crate::fence::Tombstone;
use crate::migration::PodState;
use crate::pod::lifecycle::Operation;
use crate::pod::{CreateRequest, ExecRequest};
use crate::spec::Identity as SpecIdentity;
use crate::stdio::StdioUris;

const GRACE: Duration = Duration::from_secs(1);
const POD: &str = "pod";

/// A backend that runs nothing, and what the model has said so far.
struct World {
    model: Model,
    at: SystemTime,
    kind: Kind,
    /// Under way.
    calls: Vec<Call>,
    /// Processes that run.
    alive: BTreeSet<ProcessId>,
    /// Ends of processes that have not been told yet.
    untold: Vec<ProcessId>,
    next_token: u64,
    /// Callers that have not been answered.
    waiting: BTreeSet<u64>,
    refusals: Vec<String>,
    /// Processes whose start was published, and those whose end was.
    started: BTreeSet<ProcessId>,
    ended: BTreeSet<ProcessId>,
    over: BTreeSet<ProcessId>,
    states: BTreeMap<String, (State, String)>,
    oom: Vec<String>,
    is_shut_down: bool,
}

/// How much of an instance a call changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole,
    /// What a signal needs of it.
    BesideExecs,
    Exec,
}

impl Extent {
    fn excludes(self, other: Self) -> bool {
        self == Self::Whole || other == Self::Whole || (self == other && self == Self::BesideExecs)
    }
}

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::UNIX_EPOCH,
    }
}

/// A migration's source.
const SOURCE: &str = "11111111-2222-5333-8444-555555555555";

impl World {
    fn new(kind: Kind) -> Self {
        let sandbox_id = POD.to_owned();
        Self {
            model: Model::new(Identity { kind, sandbox_id }),
            at: SystemTime::UNIX_EPOCH,
            kind,
            calls: Vec::new(),
            alive: BTreeSet::new(),
            untold: Vec::new(),
            next_token: 0,
            waiting: BTreeSet::new(),
            refusals: Vec::new(),
            started: BTreeSet::new(),
            ended: BTreeSet::new(),
            over: BTreeSet::new(),
            states: BTreeMap::new(),
            oom: Vec::new(),
            is_shut_down: false,
        }
    }

    /// A pod whose sandbox and container `c` run.
    fn running(kind: Kind) -> Self {
        let mut world = Self::new(kind);
        for (id, role) in [(POD, Role::Sandbox), ("c", Role::Container)] {
            world.create(id, role, false, None);
            world.settle();
            world.init(id, InitChange::Run);
            world.settle();
        }
        world
    }

    // --- In ----------------------------------------------------------------------

    fn token(&mut self) -> Token {
        self.next_token += 1;
        self.waiting.insert(self.next_token);
        Token::Caller(self.next_token)
    }

    fn create(&mut self, id: &str, role: Role, incoming: bool, fenced: Option<Tombstone>) {
        let mut pod = PodInfo::default();
        if incoming {
            let name = dyad_runtime_handler::config::annotation::MIGRATION_SOURCE;
            pod.annotations.insert(name.into(), SOURCE.into());
        }
        let prepared = Prepared {
            request: CreateRequest {
                id: id.into(),
                bundle: "/bundle".into(),
                rootfs: Vec::new(),
                stdio: StdioUris::default(),
                checkpoint: None,
            },
            identity: SpecIdentity {
                sandbox_id: POD.into(),
                role,
                name: String::new(),
                cri: true,
            },
            spec: ContainerSpec {
                id: id.into(),
                containerd_namespace: "k8s.io".into(),
                name: String::new(),
                role,
                pod,
                bundle: "/bundle".into(),
                rootfs: Vec::new(),
                oci: oci_spec::runtime::Spec::default(),
                checkpoint: None,
                stdio: Stdio::default(),
            },
            bare: None,
            fenced,
            is_target: incoming,
            done_on_source: BTreeSet::new(),
        };
        let token = self.token();
        self.step(Input::Create(Box::new(prepared), token));
    }

    fn init(&mut self, id: &str, change: InitChange) {
        let token = self.token();
        self.step(Input::Change(id.into(), Change::Init(change), token));
    }

    fn exec(&mut self, id: &str, exec: &str, change: ExecChange) {
        let token = self.token();
        self.step(Input::Change(
            id.into(),
            Change::Exec(exec.into(), change),
            token,
        ));
    }

    fn operate(&mut self, operation: Operation, target: &str) {
        let token = self.token();
        self.step(Input::Operate(operation, target.into(), token));
    }

    fn migrate(&mut self) {
        let token = self.token();
        let parameters = MigrationParameters {
            destination: "qemu+tls://node2/system".into(),
            timeout: Some(GRACE),
            ..MigrationParameters::default()
        };
        self.step(Input::Migrate(parameters.into(), token));
    }

    fn step(&mut self, input: Input) {
        for action in self.model.step(self.at, input) {
            self.act(action);
        }
    }

    // --- Out ---------------------------------------------------------------------

    fn act(&mut self, action: Action) {
        match action {
            Action::Begin(call) => self.begin(call),
            Action::Answer(caller, result) => {
                assert!(self.waiting.remove(&caller), "answered twice: {result:?}");
                if let Err(error) = result {
                    self.refusals.push(error.to_string());
                }
            }
            Action::Publish(event) => self.published(event),
            Action::Tell(told) => {
                let id = told.task.id.clone();
                let before = self.states.get(&id).map(|(state, _)| state);
                let before = before.cloned().unwrap_or(State::Created);
                assert_eq!(before, told.from, "{id}: a transition was not told");
                let now = (told.task.state.clone(), told.task.reason.clone());
                self.states.insert(id, now);
            }
            Action::Over(process, _) => {
                let first = self.over.insert(process.clone());
                assert!(first, "{process} was over already");
            }
            Action::Forget(id, _) => {
                for set in [&mut self.started, &mut self.ended, &mut self.over] {
                    set.retain(|process| process.container != id);
                }
                self.states.remove(&id);
            }
            Action::Migration(_) => {}
            Action::Shutdown => self.is_shut_down = true,
        }
    }

    fn published(&mut self, event: TaskEvent) {
        match event {
            TaskEvent::Start { container, .. } => {
                self.started.insert(ProcessId::init(container));
            }
            TaskEvent::ExecStarted {
                container, exec, ..
            } => {
                self.started.insert(ProcessId::exec(container, exec));
            }
            TaskEvent::ExecAdded { container, exec } => {
                // One of the same id may have been there before.
                let process = ProcessId::exec(container, exec);
                for set in [&mut self.started, &mut self.ended, &mut self.over] {
                    set.remove(&process);
                }
            }
            TaskEvent::Exit { process, .. } => {
                let is_created = process.exec.is_none() && !self.started.contains(&process);
                let was_created = !self.states.contains_key(&process.container);
                assert!(
                    !is_created || was_created,
                    "{process} ended before it began"
                );
                let first = self.ended.insert(process.clone());
                assert!(first, "the end of {process} was told twice");
            }
            TaskEvent::OutOfMemory { container } => self.oom.push(container),
            _ => {}
        }
    }

    /// Of which instance a call is a change, and how much of it that is.
    fn changes(call: &Call) -> Option<(&str, Extent)> {
        let (job, extent) = match call {
            Call::Create(job, _)
            | Call::Start(job, _)
            | Call::Stop(job, ..)
            | Call::Reboot { job, .. }
            | Call::Pause(job)
            | Call::Checkpoint(job, _)
            | Call::Resume(job)
            | Call::Delete(job)
            | Call::Plain {
                job,
                what: Plain::Update(_),
                ..
            } => (job, Extent::Whole),
            Call::ThawFor { holder, signal } => {
                (holder.as_ref().unwrap_or(&signal.job), Extent::BesideExecs)
            }
            Call::LetGo { job, .. } => (job, Extent::BesideExecs),
            Call::AddExec(job, ..) | Call::StartExec(job, _) | Call::DeleteExec(job, _) => {
                (job, Extent::Exec)
            }
            _ => return None,
        };
        Some((&job.container, extent))
    }

    fn begin(&mut self, call: Call) {
        if let Some((container, extent)) = Self::changes(&call) {
            let clash = self.calls.iter().find(|other| {
                Self::changes(other)
                    .is_some_and(|(id, other)| id == container && extent.excludes(other))
            });
            assert!(
                clash.is_none(),
                "two changes of {container}: {clash:?} and {call:?}"
            );
        }
        let is_mover = |call: &Call| matches!(call, Call::CheckMigration(..) | Call::Send(..));
        if is_mover(&call) {
            assert!(!self.calls.iter().any(is_mover), "two migrations");
        }
        self.calls.push(call);
    }

    // --- The backend -------------------------------------------------------------

    /// A process ends, which the backend tells at once.
    fn dies(&mut self, process: &ProcessId) {
        if self.alive.remove(process) {
            self.untold.push(process.clone());
        }
        self.tell_exits();
    }

    /// A process ends, and with the machine's all in it; told later.
    fn kill(&mut self, process: &ProcessId) {
        if !self.alive.remove(process) {
            return;
        }
        let takes = |other: &ProcessId| match (&process.exec, self.kind) {
            (Some(_), _) => false,
            (None, Kind::Machine) if process.container == POD => true,
            (None, _) => other.container == process.container,
        };
        let (taken, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.alive).into_iter().partition(takes);
        self.alive.extend(left);
        self.untold.push(process.clone());
        self.untold.extend(taken);
    }

    fn tell_exits(&mut self) {
        for process in std::mem::take(&mut self.untold) {
            self.step(Input::Exited(process, exit(137)));
        }
    }

    /// Ends a call. `early`: what it did to processes is told before it returns.
    fn end(&mut self, call: Call, fine: bool, early: bool) {
        let failed = || Error::Unavailable("scripted".into(), None);
        let done = |fine: bool| if fine { Ok(()) } else { Err(failed()) };
        let ended = match call {
            Call::Create(job, _) => {
                let reboots = self.kind == Kind::Machine && job.container == POD;
                let made = Made { pid: 7, reboots };
                let result = if fine { Ok(made) } else { Err(failed()) };
                Ended::Create(job, Vec::new(), result)
            }
            Call::Start(job, how) => {
                let process = ProcessId::init(job.container.clone());
                let has_machine = self.kind != Kind::Machine
                    || job.container == POD
                    || self.alive.contains(&ProcessId::init(POD));
                let fine = fine && has_machine;
                // One that waits for its source has no process.
                if fine && how != Start::DoneOnSource && !self.model.incoming {
                    self.alive.insert(process.clone());
                    if early {
                        self.dies(&process);
                    }
                }
                let result = if fine { Ok(8) } else { Err(failed()) };
                Ended::Start(job, how, result)
            }
            Call::Stop(job, _, after) => {
                if fine {
                    self.kill(&ProcessId::init(job.container.clone()));
                }
                Ended::Stop(job, after, done(fine))
            }
            Call::Reboot { job, .. } => {
                let machine = ProcessId::init(job.container.clone());
                let runs = self.alive.contains(&machine);
                if runs {
                    self.kill(&machine);
                    self.untold.retain(|process| *process != machine);
                    self.alive.insert(machine.clone());
                    self.tell_exits();
                    if !fine && early {
                        self.kill(&machine);
                        self.tell_exits();
                    }
                }
                let result = if fine && runs { Ok(9) } else { Err(failed()) };
                Ended::Reboot(job, result)
            }
            Call::Pause(job) => Ended::Pause(job, done(fine)),
            Call::Checkpoint(job, to) => Ended::Checkpoint(job, to.images, done(fine)),
            Call::Resume(job) => Ended::Resume(job, done(fine)),
            Call::ThawFor { holder, signal } => Ended::ThawFor {
                holder,
                signal,
                result: done(fine),
            },
            Call::LetGo { job, signal } => Ended::LetGo { job, signal },
            Call::Plain { job, exec, what } => {
                let container = job.container.clone();
                if let Plain::Signal {
                    signal: libc::SIGKILL,
                    ..
                } = what
                {
                    self.kill(&ProcessId { container, exec });
                }
                Ended::Plain(job, done(fine))
            }
            Call::Delete(job) => {
                if fine {
                    let of = |process: &ProcessId| process.container == job.container;
                    self.alive.retain(|process| !of(process));
                }
                Ended::Delete(job, done(fine))
            }
            Call::AddExec(job, exec, _) => Ended::AddExec(job, exec, done(fine)),
            Call::StartExec(job, exec) => {
                let fine = fine && self.alive.contains(&ProcessId::init(job.container.clone()));
                if fine {
                    let process = ProcessId::exec(job.container.clone(), exec.clone());
                    self.alive.insert(process.clone());
                    if early {
                        self.dies(&process);
                    }
                }
                Ended::StartExec(job, exec, if fine { Ok(10) } else { Err(failed()) })
            }
            Call::DeleteExec(job, exec) => Ended::DeleteExec(job, exec, done(fine)),
            Call::CheckMigration(number, _) => Ended::CheckMigration(number, done(fine)),
            Call::PutFence(number) => Ended::PutFence(number, done(fine)),
            Call::SettleFence(number) => Ended::SettleFence(number),
            Call::LiftFence(number) => Ended::LiftFence(number),
            Call::Send(number, ..) => {
                let sent = match (fine, early) {
                    (true, false) => Ok(Sent::Moved),
                    (true, true) => Ok(Sent::Lost("in halves".into())),
                    (false, _) => Err(failed()),
                };
                if sent.is_ok() {
                    // What ran here runs there, or nowhere: nothing of it is told as ended.
                    self.alive.clear();
                    self.untold.clear();
                }
                Ended::Send(number, sent)
            }
            Call::Deadline(number, timeout) => Ended::Deadline(number, timeout),
            Call::AskMover(number, hurry) => Ended::AskMover(number, hurry, done(fine)),
            Call::Receive => {
                let waits: Vec<ProcessId> = self
                    .model
                    .tasks
                    .iter()
                    .filter(|(_, task)| matches!(task.phase(), Phase::Incoming { .. }))
                    .map(|(id, _)| ProcessId::init(id))
                    .collect();
                let result = if fine {
                    self.alive.extend(waits.iter().cloned());
                    let processes = waits.into_iter().map(|process| (process, 11)).collect();
                    let pod = Vec::new();
                    Ok((Arrival { pod, processes }, PodState::new(Vec::new())))
                } else {
                    Err(failed())
                };
                Ended::Receive(result)
            }
        };
        if early {
            self.tell_exits();
        }
        self.step(Input::Ended(ended));
        // At the latest here: a stop that has returned waits for it.
    }

    /// Ends all that is under way, well, until nothing is.
    fn settle(&mut self) {
        for _ in 0..1000 {
            self.tell_exits();
            if self.calls.is_empty() {
                return;
            }
            let call = self.calls.remove(0);
            self.end(call, true, false);
        }
        panic!("it does not come to rest: {:?}", self.calls);
    }

    fn state(&self, id: &str) -> Option<State> {
        self.model.tasks.get(id).map(Task::state)
    }

    /// What must hold when nothing is under way.
    fn check_at_rest(&self) {
        assert!(self.waiting.is_empty(), "not answered: {:?}", self.waiting);
        assert!(self.model.groups.is_empty(), "{:?}", self.model.groups);
        assert!(self.model.outgoing.is_none(), "{:?}", self.model.outgoing);
        let sandbox = self.model.sandbox().map(|(_, task)| task);
        let machine_is_over =
            self.kind == Kind::Machine && sandbox.is_some_and(|task| task.phase().exit().is_some());
        for (id, task) in &self.model.tasks {
            assert!(task.lane.is_idle(), "{id} is still being changed");
            let runs = self.alive.contains(&ProcessId::init(id));
            match task.phase() {
                Phase::Created | Phase::Incoming { .. } => {}
                Phase::Running { .. } | Phase::Paused { .. } => {
                    assert!(runs, "{id}: {:?}, and its end was never told", task.phase());
                }
                Phase::Stopped { .. }
                | Phase::Exited { .. }
                | Phase::Migrated { .. }
                | Phase::Failed { .. } => assert!(!runs, "{id} runs: {:?}", task.phase()),
                between => panic!("{id} rests in {between:?}"),
            }
            if machine_is_over {
                let over = task.phase().exit().is_some();
                assert!(
                    over || *task.phase() == Phase::Created,
                    "{id} outlives its machine: {:?}",
                    task.phase()
                );
            }
        }
        for process in &self.ended {
            assert!(
                !self.alive.contains(process),
                "{process} runs, told as ended"
            );
            assert!(
                self.over.contains(process),
                "who waits for {process} does so still"
            );
        }
    }
}
