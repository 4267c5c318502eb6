//! A [`RuntimeHandler`] that runs nothing and does what a test tells it, for tests of
//! the shim's driver without a container or a machine.
//!
//! Every call is written down ([`Fake::calls`]) and succeeds, unless the test has put
//! a [`Reply`] for that method in line ([`Fake::next`]). Processes end only when the
//! test says so ([`Fake::exit`]), or by `stop`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::handler::{
    ContainerRef, Event, EventSender, Exit, Instance, ProcessId, Reboot, RuntimeHandler,
};
use dyad_runtime_handler::migration::{
    Arrival, Hurry, Migration, MigrationParameters, MigrationProgress, Sent,
};
use dyad_runtime_handler::spec::{ContainerSpec, ExecSpec, Resources, Role, Stdio};
use dyad_runtime_handler::stats::{CpuStats, Hierarchy, MemoryStats, PidsStats, Stats};

/// What one call shall do.
#[derive(Debug)]
pub enum Reply {
    /// Succeed.
    Succeed,
    /// Fail so, with no other effect.
    Fail(Error),
    /// Stay under way until the test sends how it ends (a dropped sender: success).
    Wait(oneshot::Receiver<Result<()>>),
}

/// The scripted handler.
#[derive(Debug)]
pub struct Fake {
    kind: Kind,
    events: EventSender,
    script: Mutex<Script>,
    calls: watch::Sender<Vec<String>>,
    next_pid: AtomicU32,
}

#[derive(Debug, Default)]
struct Script {
    replies: HashMap<&'static str, VecDeque<Reply>>,
    instances: BTreeMap<String, Arc<FakeInstance>>,
    brings: Vec<u8>,
}

/// One scripted container.
#[derive(Debug)]
pub struct FakeInstance {
    id: String,
    role: Role,
    fake: Arc<Fake>,
    /// Live processes, `None`: init.
    running: Mutex<BTreeMap<Option<String>, u32>>,
    execs: Mutex<BTreeMap<String, ExecSpec>>,
    pid: u32,
}

impl Fake {
    /// A handler of `kind` that sends its events to `events`.
    pub fn new(kind: Kind, events: EventSender) -> Arc<Self> {
        Arc::new(Self {
            kind,
            events,
            script: Mutex::default(),
            calls: watch::Sender::new(Vec::new()),
            next_pid: AtomicU32::new(1000),
        })
    }

    /// The trait object that a driver takes.
    pub fn handler(self: &Arc<Self>) -> Arc<dyn RuntimeHandler> {
        Arc::new(Handler(Arc::clone(self)))
    }

    /// Puts a reply in line for the next call of `method`, named as in the trait
    /// (`"start_exec"`).
    pub fn next(&self, method: &'static str, reply: Reply) {
        let mut script = lock(&self.script);
        script.replies.entry(method).or_default().push_back(reply);
    }

    /// Makes the next call of `method` wait until the returned sender tells its end.
    pub fn hold(&self, method: &'static str) -> oneshot::Sender<Result<()>> {
        let (sender, receiver) = oneshot::channel();
        self.next(method, Reply::Wait(receiver));
        sender
    }

    /// All calls so far, in order: method, container id, arguments
    /// (`"signal web 15 all"`, `"exec web/sh"`).
    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    /// Returns when `call` has been made, written as in [`Self::calls`].
    pub async fn called(&self, call: &str) {
        let mut calls = self.calls.subscribe();
        let made = calls.wait_for(|calls| calls.iter().any(|made| made == call));
        // `self` holds the sender, so there is no error to have.
        let _ = made.await;
    }

    /// Ends a process with `status`, as if by itself. Returns whether it ran.
    pub fn exit(&self, process: &ProcessId, status: u32) -> bool {
        let instance = lock(&self.script)
            .instances
            .get(&process.container)
            .cloned();
        instance.is_some_and(|instance| instance.end(process.exec.as_deref(), status))
    }

    /// What the next `receive` brings as the pod's state.
    pub fn brings(&self, pod: Vec<u8>) {
        lock(&self.script).brings = pod;
    }

    /// Sends any event.
    pub fn event(&self, event: Event) {
        // A driver that is gone wants no events.
        let _ = self.events.send(event);
    }

    /// Ids of the containers that are there.
    pub fn containers(&self) -> Vec<String> {
        lock(&self.script).instances.keys().cloned().collect()
    }

    async fn call(&self, method: &'static str, arguments: impl Display) -> Result<()> {
        let reply = lock(&self.script)
            .replies
            .get_mut(method)
            .and_then(VecDeque::pop_front);
        self.calls
            .send_modify(|calls| calls.push(format!("{method} {arguments}")));
        match reply {
            None | Some(Reply::Succeed) => Ok(()),
            Some(Reply::Fail(error)) => Err(error),
            Some(Reply::Wait(end)) => end.await.unwrap_or(Ok(())),
        }
    }

    fn pid(&self) -> u32 {
        self.next_pid.fetch_add(1, Ordering::Relaxed)
    }
}

impl FakeInstance {
    fn end(&self, exec: Option<&str>, status: u32) -> bool {
        let ran = lock(&self.running)
            .remove(&exec.map(str::to_owned))
            .is_some();
        if ran {
            self.fake.event(Event::Exited {
                process: self.process(exec),
                exit: Exit {
                    status,
                    at: SystemTime::now(),
                },
            });
        }
        ran
    }

    fn process(&self, exec: Option<&str>) -> ProcessId {
        ProcessId {
            container: self.id.clone(),
            exec: exec.map(str::to_owned),
        }
    }

    /// `web` or `web/exec-1`.
    fn name(&self, exec: Option<&str>) -> String {
        match exec {
            None => self.id.clone(),
            Some(exec) => format!("{}/{exec}", self.id),
        }
    }
}

/// [`Fake`] as the driver takes it. A type of its own, for its instances share the [`Fake`].
struct Handler(Arc<Fake>);

#[async_trait]
impl RuntimeHandler for Handler {
    fn kind(&self) -> Kind {
        self.0.kind
    }

    async fn create(&self, spec: ContainerSpec) -> Result<Arc<dyn Instance>> {
        self.0.call("create", &spec.id).await?;
        let instance = Arc::new(FakeInstance {
            id: spec.id.clone(),
            role: spec.role,
            fake: Arc::clone(&self.0),
            running: Mutex::default(),
            execs: Mutex::default(),
            pid: self.0.pid(),
        });
        let mut script = lock(&self.0.script);
        if script.instances.contains_key(&spec.id) {
            return Err(Error::AlreadyExists(format!("container {}", spec.id)));
        }
        script.instances.insert(spec.id, Arc::clone(&instance));
        Ok(instance)
    }

    async fn cleanup(&self, container: &ContainerRef) -> Result<()> {
        self.0.call("cleanup", &container.id).await?;
        lock(&self.0.script).instances.remove(&container.id);
        Ok(())
    }

    fn migration(&self) -> Result<&dyn Migration> {
        Ok(&*self.0)
    }
}

/// `send` comes to [`Sent::Moved`] where it succeeds; `receive` brings every container
/// that is there, with the pod's state that [`Fake::brings`] named.
#[async_trait]
impl Migration for Fake {
    async fn check(&self, parameters: &MigrationParameters) -> Result<()> {
        self.call("check", &parameters.destination).await
    }

    async fn send(
        &self,
        parameters: &MigrationParameters,
        _pod: Vec<u8>,
        _progress: watch::Sender<MigrationProgress>,
    ) -> Result<Sent> {
        self.call("send", &parameters.destination).await?;
        Ok(Sent::Moved)
    }

    async fn cancel(&self) -> Result<()> {
        self.call("cancel", "").await
    }

    async fn hurry(&self, how: Hurry) -> Result<()> {
        self.call("hurry", format!("{how:?}")).await
    }

    async fn receive(&self) -> Result<Arrival> {
        self.call("receive", "").await?;
        let script = lock(&self.script);
        Ok(Arrival {
            pod: script.brings.clone(),
            processes: script
                .instances
                .values()
                .map(|instance| (instance.process(None), instance.pid))
                .collect(),
        })
    }
}

#[async_trait]
impl Instance for FakeInstance {
    async fn start(&self, _stdio: Option<Stdio>) -> Result<u32> {
        self.fake.call("start", &self.id).await?;
        lock(&self.running).insert(None, self.pid);
        Ok(self.pid)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    async fn signal(&self, exec: Option<&str>, signal: i32, all: bool) -> Result<()> {
        let all = if all { " all" } else { "" };
        self.fake
            .call("signal", format!("{} {signal}{all}", self.name(exec)))
            .await?;
        let runs = lock(&self.running).contains_key(&exec.map(str::to_owned));
        if !runs {
            return Err(Error::NotFound(self.process(exec).to_string()));
        }
        if signal == libc::SIGKILL {
            self.end(exec, 128 + libc::SIGKILL as u32);
        }
        Ok(())
    }

    async fn stop(&self, _grace: Duration) -> Result<()> {
        self.fake.call("stop", &self.id).await?;
        self.end(None, 128 + libc::SIGTERM as u32);
        Ok(())
    }

    fn reboot(&self) -> Option<&dyn Reboot> {
        (self.fake.kind == Kind::Machine && self.role == Role::Sandbox).then_some(self)
    }

    async fn pause(&self) -> Result<()> {
        self.fake.call("pause", &self.id).await
    }

    async fn resume(&self) -> Result<()> {
        self.fake.call("resume", &self.id).await
    }

    async fn exec(&self, spec: ExecSpec) -> Result<()> {
        self.fake
            .call("exec", self.name(Some(&spec.exec_id)))
            .await?;
        let mut execs = lock(&self.execs);
        if execs.contains_key(&spec.exec_id) {
            let process = self.process(Some(&spec.exec_id));
            return Err(Error::AlreadyExists(process.to_string()));
        }
        execs.insert(spec.exec_id.clone(), spec);
        Ok(())
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        self.fake
            .call("start_exec", self.name(Some(exec_id)))
            .await?;
        if !lock(&self.execs).contains_key(exec_id) {
            return Err(Error::NotFound(self.process(Some(exec_id)).to_string()));
        }
        let pid = self.fake.pid();
        lock(&self.running).insert(Some(exec_id.to_owned()), pid);
        Ok(pid)
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<()> {
        self.fake
            .call("delete_exec", self.name(Some(exec_id)))
            .await?;
        match lock(&self.execs).remove(exec_id) {
            Some(_) => Ok(()),
            None => Err(Error::NotFound(self.process(Some(exec_id)).to_string())),
        }
    }

    async fn resize(&self, exec: Option<&str>, width: u16, height: u16) -> Result<()> {
        self.fake
            .call("resize", format!("{} {width} {height}", self.name(exec)))
            .await
    }

    async fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        self.fake.call("close_stdin", self.name(exec)).await
    }

    async fn pids(&self) -> Result<Vec<(u32, Option<String>)>> {
        self.fake.call("pids", &self.id).await?;
        let running = lock(&self.running);
        Ok(running
            .iter()
            .map(|(exec, pid)| (*pid, exec.clone()))
            .collect())
    }

    async fn stats(&self) -> Result<Stats> {
        self.fake.call("stats", &self.id).await?;
        Ok(Stats {
            hierarchy: Hierarchy::V2,
            cpu: CpuStats {
                usage_ns: 1_000_000,
                ..CpuStats::default()
            },
            memory: MemoryStats {
                usage: 4096,
                ..MemoryStats::default()
            },
            pids: PidsStats::default(),
            io: Vec::new(),
            io_pressure: None,
        })
    }

    async fn update(&self, _resources: &Resources) -> Result<()> {
        self.fake.call("update", &self.id).await
    }

    async fn delete(&self) -> Result<()> {
        self.fake.call("delete", &self.id).await?;
        lock(&self.fake.script).instances.remove(&self.id);
        Ok(())
    }
}

#[async_trait]
impl Reboot for FakeInstance {
    async fn reboot(&self, force: bool, _grace: Duration) -> Result<u32> {
        let force = if force { " force" } else { "" };
        self.fake
            .call("reboot", format!("{}{force}", self.id))
            .await?;
        let all: Vec<Arc<Self>> = lock(&self.fake.script)
            .instances
            .values()
            .cloned()
            .collect();
        for other in all.iter().filter(|other| other.id != self.id) {
            other.end(None, 128 + libc::SIGKILL as u32);
        }
        Ok(self.pid)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio::sync::mpsc;

    use super::*;
    use dyad_runtime_handler::spec::PodInfo;

    fn spec(id: &str) -> ContainerSpec {
        ContainerSpec {
            checkpoint: None,
            id: id.into(),
            containerd_namespace: "k8s.io".into(),
            name: String::new(),
            role: Role::Sandbox,
            pod: PodInfo::default(),
            bundle: PathBuf::from("/bundle"),
            rootfs: Vec::new(),
            oci: oci_spec::runtime::Spec::default(),
            stdio: Stdio::default(),
        }
    }

    #[tokio::test]
    async fn calls_are_written_down_and_exits_injected() {
        let (events, mut seen) = mpsc::unbounded_channel();
        let fake = Fake::new(Kind::Container, events);
        let web = fake.handler().create(spec("web")).await.unwrap();
        let pid = web.start(None).await.unwrap();
        assert_eq!(web.pids().await.unwrap(), [(pid, None)]);
        assert!(fake.exit(&ProcessId::init("web"), 3));
        assert!(!fake.exit(&ProcessId::init("web"), 3), "ended already");
        let Some(Event::Exited { process, exit }) = seen.recv().await else {
            panic!("no exit");
        };
        assert_eq!((process, exit.status), (ProcessId::init("web"), 3));
        assert_eq!(fake.calls(), ["create web", "start web", "pids web"]);
    }

    #[tokio::test]
    async fn a_call_can_be_held_and_made_to_fail() {
        let (events, _seen) = mpsc::unbounded_channel();
        let fake = Fake::new(Kind::Container, events);
        let end = fake.hold("create");
        fake.next("create", Reply::Fail(Error::NotFound("image".into())));
        let handler = fake.handler();
        let (first, second) = tokio::join!(handler.create(spec("a")), async {
            fake.called("create a").await;
            let second = handler.create(spec("b")).await;
            assert!(fake.containers().is_empty(), "the first is still under way");
            end.send(Ok(())).unwrap();
            second
        });
        assert!(first.is_ok());
        assert!(matches!(second, Err(Error::NotFound(_))));
        assert_eq!(fake.containers(), ["a"]);
    }
}
