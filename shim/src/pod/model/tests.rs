//! The real step function over a small model of a backend, in every order of requests, ends
//! of calls, exits and machine events.

use std::collections::BTreeMap;

use dyad_runtime_handler::handler::MachineEvent;
use dyad_runtime_handler::migration::{Arrival, MigrationParameters, Sent, Tombstone};
use dyad_runtime_handler::spec::{ContainerSpec, PodInfo, Resources, Stdio};
use proptest::prelude::*;

use super::change::{Prepared, Start};
use super::state::{TaskStatus, outside};
use super::task::Made;
use super::*;
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
            pod.annotations.insert(name.into(), "u".into());
        }
        let prepared = Prepared {
            request: CreateRequest {
                id: id.into(),
                bundle: "/bundle".into(),
                rootfs: Vec::new(),
                stdio: StdioUris::default(),
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
                stdio: Stdio::default(),
            },
            bare: None,
            fenced,
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

/// What may happen, chosen by three numbers.
fn happen(world: &mut World, (what, which, how): (u8, u8, u8)) {
    let id = [POD, "c", "d"][usize::from(which) % 3];
    let exec = ["e", "f"][usize::from(how) % 2];
    let force = how % 2 == 0;
    let operation = || match how % 5 {
        0 => Operation::Pause,
        1 => Operation::Resume,
        2 => Operation::Stop { grace: GRACE },
        3 => Operation::Start,
        _ => Operation::Restart {
            force: which % 2 == 0,
            grace: GRACE,
        },
    };
    let signal = match how % 3 {
        0 => libc::SIGKILL,
        1 => libc::SIGTERM,
        _ => libc::SIGUSR1,
    };
    world.at += Duration::from_millis(u64::from(how));
    match what % 24 {
        0 => {
            let role = if id == POD {
                Role::Sandbox
            } else {
                Role::Container
            };
            world.create(id, role, how > 220, None);
        }
        1 | 2 => world.init(id, InitChange::Run),
        3 | 4 => world.init(id, InitChange::Signal { signal, all: force }),
        5 => world.init(id, InitChange::Delete),
        6 => world.operate(operation(), id),
        7 => world.operate(operation(), ""),
        8 => {
            let resources = Resources {
                linux: oci_spec::runtime::LinuxResources::default(),
                annotations: BTreeMap::new(),
            };
            world.init(id, InitChange::Update(Box::new(resources)));
        }
        9 => {
            let request = ExecRequest {
                exec_id: exec.into(),
                process: oci_spec::runtime::Process::default(),
                stdio: StdioUris::default(),
            };
            world.exec(id, exec, ExecChange::Add(Box::new(request)));
        }
        10 => world.exec(id, exec, ExecChange::Run),
        11 => world.exec(id, exec, ExecChange::Signal(signal)),
        12 => world.exec(id, exec, ExecChange::Delete),
        13 => world.exec(id, exec, ExecChange::CloseStdin),
        14 => world.migrate(),
        15 => {
            let token = world.token();
            world.step(Input::CancelMigration(token));
        }
        16 => {
            let event = match how % 4 {
                0 => MachineEvent::Suspended,
                1 => MachineEvent::Resumed,
                2 => MachineEvent::Rebooted,
                _ => MachineEvent::Crashed,
            };
            world.step(Input::Machine(event));
        }
        17 => world.step(Input::OutOfMemory(id.into())),
        18 => {
            let alive: Vec<ProcessId> = world.alive.iter().cloned().collect();
            if let Some(process) = alive.get(usize::from(which) % alive.len().max(1)) {
                world.kill(process);
                world.tell_exits();
            }
        }
        _ if !world.calls.is_empty() => {
            let index = usize::from(which) % world.calls.len();
            let call = world.calls.remove(index);
            world.end(call, how % 4 != 0, force);
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_comes_in_whatever_order_the_pod_comes_to_rest(
        is_machine: bool,
        begins_running: bool,
        events in prop::collection::vec(any::<(u8, u8, u8)>(), 1..80),
    ) {
        let kind = if is_machine { Kind::Machine } else { Kind::Container };
        let mut world = match begins_running {
            true => World::running(kind),
            false => World::new(kind),
        };
        for event in events {
            happen(&mut world, event);
        }
        world.settle();
        world.check_at_rest();
    }

    #[test]
    fn every_pod_can_be_ended_and_deleted(
        is_machine: bool,
        events in prop::collection::vec(any::<(u8, u8, u8)>(), 1..60),
    ) {
        let kind = if is_machine { Kind::Machine } else { Kind::Container };
        let mut world = World::running(kind);
        for event in events {
            happen(&mut world, event);
        }
        world.settle();
        for id in ["c", "d", POD] {
            let signal = libc::SIGKILL;
            world.init(id, InitChange::Signal { signal, all: true });
            world.settle();
            world.init(id, InitChange::Delete);
            world.settle();
        }
        prop_assert!(world.model.tasks.is_empty(), "{:?}", world.refusals);
        prop_assert!(!world.is_shut_down);
        let token = world.token();
        world.step(Input::Shutdown(token));
        prop_assert!(world.is_shut_down);
    }
}

const REQUESTS: [fn() -> InitChange; 4] = [
    || InitChange::Stop { grace: GRACE },
    || InitChange::Start,
    || InitChange::Pause,
    || InitChange::Resume,
];

#[test]
fn asked_again_it_is_so_already() {
    for kind in [Kind::Container, Kind::Machine] {
        for before in REQUESTS {
            for change in REQUESTS {
                let mut world = World::running(kind);
                world.init(POD, before());
                world.settle();
                world.refusals.clear();
                world.init(POD, change());
                world.settle();
                if !world.refusals.is_empty() {
                    continue;
                }
                let state = world.state(POD);
                world.init(POD, change());
                assert!(world.calls.is_empty(), "{:?}", world.calls);
                assert_eq!((world.state(POD), world.refusals.len()), (state, 0));
            }
        }
    }
}

#[test]
fn a_pause_that_was_asked_for_is_told_so_whoever_tells_first() {
    for event_first in [true, false] {
        let mut world = World::running(Kind::Machine);
        let asked = (State::Paused, "asked for".to_owned());
        world.init(POD, InitChange::Pause);
        if event_first {
            world.step(Input::Machine(MachineEvent::Suspended));
            assert_eq!(world.states[POD], asked);
        }
        world.settle();
        world.step(Input::Machine(MachineEvent::Suspended));
        assert_eq!(world.states[POD], asked);
        world.init(POD, InitChange::Resume);
        world.step(Input::Machine(MachineEvent::Resumed));
        world.settle();
        assert_eq!(world.states[POD], (State::Running, "asked for".to_owned()));
        // One that nobody asked for.
        world.step(Input::Machine(MachineEvent::Suspended));
        let outside = (State::Paused, "its machine was suspended".to_owned());
        assert_eq!(world.states[POD], outside);
    }
}

#[test]
fn want_of_memory_is_told_of_this_pods_containers_once_a_second() {
    let mut world = World::running(Kind::Machine);
    for _ in 0..100 {
        for id in ["c", "somebody-elses", POD] {
            world.step(Input::OutOfMemory(id.into()));
        }
    }
    assert_eq!(world.oom, ["c", POD]);
    world.at += OOM_INTERVAL;
    world.step(Input::OutOfMemory("c".into()));
    assert_eq!(world.oom, ["c", POD, "c"]);
}

#[test]
fn a_kill_in_a_paused_machine_waits_for_its_lane_and_resumes_it() {
    let mut world = World::running(Kind::Machine);
    world.step(Input::Machine(MachineEvent::Suspended));
    // Somebody resumes the machine in this very moment.
    world.init(POD, InitChange::Resume);
    let kill = || InitChange::Signal {
        signal: libc::SIGKILL,
        all: false,
    };
    world.init("c", kill());
    assert_eq!(world.calls.len(), 1, "{:?}", world.calls);
    world.settle();
    assert_eq!(world.state("c"), Some(State::Exited(137)));
    assert_eq!(world.state(POD), Some(State::Running));
}

#[test]
fn a_migration_cancelled_while_its_fence_is_put_up_lifts_it_again() {
    let mut world = World::running(Kind::Container);
    world.migrate();
    let check = world.calls.remove(0);
    world.end(check, true, false);
    assert!(matches!(world.calls[..], [Call::PutFence(_)]));
    let token = world.token();
    world.step(Input::CancelMigration(token));
    assert!(
        matches!(world.calls[..], [Call::PutFence(_)]),
        "first it must be there"
    );
    let put = world.calls.remove(0);
    world.end(put, true, false);
    assert!(matches!(world.calls[..], [Call::LiftFence(_)]));
    world.settle();
    assert_eq!(world.refusals, ["it was cancelled"]);
    assert_eq!(world.state("c"), Some(State::Running));
    world.check_at_rest();
}

#[test]
fn a_second_migration_waits_for_the_check_of_one_that_was_given_up() {
    let mut world = World::running(Kind::Container);
    world.migrate();
    let token = world.token();
    world.step(Input::CancelMigration(token));
    world.migrate();
    assert!(
        world.refusals[1].contains("is being checked"),
        "{:?}",
        world.refusals
    );
    world.settle();
    world.migrate();
    world.settle();
    assert_eq!(world.state("c"), Some(State::Migrated));
}

#[test]
fn a_pod_behind_the_fence_is_not_made() {
    let mut world = World::new(Kind::Container);
    let tombstone = Tombstone {
        containerd_namespace: "k8s.io".into(),
        sandbox_id: POD.into(),
        pod_uid: "u".into(),
        pod: "default/web".into(),
        destination: "tls://node2".into(),
        settled: true,
        unix_s: 0,
    };
    world.create(POD, Role::Sandbox, false, Some(tombstone));
    assert!(world.refusals[0].contains("must not run here again"));
    assert!(world.model.tasks.is_empty() && world.calls.is_empty());
}

/// A pod in each state that a sandbox can be in.
fn in_every_state() -> Vec<World> {
    let mut worlds = vec![World::new(Kind::Machine)];
    worlds[0].create(POD, Role::Sandbox, false, None);
    worlds[0].settle();
    for change in [
        None,
        Some(InitChange::Pause),
        Some(InitChange::Stop { grace: GRACE }),
    ] {
        let mut world = World::running(Kind::Machine);
        if let Some(change) = change {
            world.init(POD, change);
            world.settle();
        }
        worlds.push(world);
    }
    let mut stopping = World::running(Kind::Machine);
    stopping.init(POD, InitChange::Stop { grace: GRACE });
    worlds.push(stopping);
    let mut exited = World::running(Kind::Machine);
    exited.kill(&ProcessId::init(POD));
    exited.tell_exits();
    worlds.push(exited);
    let mut migrated = World::running(Kind::Machine);
    migrated.migrate();
    migrated.settle();
    worlds.push(migrated);
    let mut migrating = World::running(Kind::Machine);
    migrating.migrate();
    for _ in 0..2 {
        let call = migrating.calls.remove(0);
        migrating.end(call, true, false);
    }
    worlds.push(migrating);
    let mut incoming = World::new(Kind::Machine);
    incoming.create(POD, Role::Sandbox, true, None);
    incoming.settle();
    incoming.init(POD, InitChange::Run);
    let call = incoming.calls.remove(0);
    incoming.end(call, true, false);
    worlds.push(incoming);
    let mut failed = World::new(Kind::Machine);
    failed.create(POD, Role::Sandbox, false, None);
    failed.settle();
    failed.init(POD, InitChange::Run);
    let call = failed.calls.remove(0);
    failed.end(call, false, false);
    worlds.push(failed);
    worlds
}

#[test]
fn every_state_is_reached_and_has_a_way_to_be_gone() {
    let mut names = BTreeSet::new();
    for mut world in in_every_state() {
        let state = world.state(POD).unwrap();
        names.insert(outside(&state).name);
        let shown = state::status(&state, true);
        assert_ne!(shown, TaskStatus::Paused);
        let signal = libc::SIGKILL;
        for id in ["c", POD] {
            world.init(id, InitChange::Signal { signal, all: true });
            if let Some(place) = world
                .calls
                .iter()
                .position(|call| matches!(call, Call::Send(..)))
            {
                // A cancelled migration ends with the pod here.
                let send = world.calls.remove(place);
                world.end(send, false, false);
            }
            world.settle();
            world.init(id, InitChange::Delete);
            world.settle();
        }
        assert!(
            world.model.tasks.is_empty(),
            "{state:?}: {:?}",
            world.refusals
        );
    }
    assert_eq!(names.len(), 10, "{names:?}");
}
