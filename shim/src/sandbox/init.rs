//! The driver's steps for a container and its init process.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, Instance};
use dyad_runtime_handler::migration;
use dyad_runtime_handler::spec::{Checkpoint, ContainerSpec, Resources, Role};
use dyad_runtime_handler::{Error, Result};
use log::{debug, info, warn};

use super::driver::{Driver, not_found, write_launch};
use super::lane::{Class, Ticket};
use super::state::{self, Request, State, Step};
use super::task::{Phase, Task, answer_waiters};
use super::{CreateRequest, Gone, Reply, TaskEvent};
use crate::spec::{self, Identity};
use crate::stdio::{OpenStdio, Owner};

/// By which of containerd's APIs something is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Task,
    SandboxApi,
}

impl Driver {
    pub(super) fn create(&mut self, request: CreateRequest, reply: Reply<u32>) {
        match self.prepare_create(&request) {
            Err(error) => drop(reply.send(Err(error))),
            Ok(spec) => self.start_create(request, spec, Origin::Task, reply),
        }
    }

    /// All that can be refused without touching the world.
    fn prepare_create(&self, request: &CreateRequest) -> Result<(Identity, ContainerSpec)> {
        let id = &request.id;
        if self.tasks.contains_key(id) {
            // Always a refusal.
            self.decide(id, Request::Create)?;
        }
        if request.checkpoint.is_some() && self.pod.launch.kind == Kind::Machine {
            return Err(Error::Unimplemented(format!(
                "create {id} from a checkpoint: not in a machine pod, where no process of the host is restored; create it without one, or run the pod as containers (runtimeClassName: dyad)"
            )));
        }
        let mut oci = spec::read(&request.bundle)?;
        let no_annotations = std::collections::HashMap::new();
        let annotations = oci.annotations().as_ref().unwrap_or(&no_annotations);
        let identity = self.identity(id, annotations)?;
        let launch = &self.pod.launch;
        let pod = spec::pod_info(&identity, annotations, &launch.config)?;
        if identity.role == Role::Container {
            let sandbox = self.tasks.get(&identity.sandbox_id);
            match sandbox.map(|task| task.phase.state()) {
                Some(State::Running | State::Incoming) => {}
                None => {
                    return Err(Error::FailedPrecondition(format!(
                        "create {id}: its pod {} is not here",
                        identity.sandbox_id
                    )));
                }
                Some(state) => {
                    return Err(Error::FailedPrecondition(format!(
                        "create {id}: its pod {} {state}",
                        identity.sandbox_id
                    )));
                }
            }
        }
        if identity.role == Role::Sandbox {
            self.check_fence(id, &pod.uid)?;
        }
        if identity.role == Role::Container
            && let Some(files) = &self.files
            && files.share_with(&mut oci, self.pod_pid())
        {
            // The OCI runtime reads it there, now and at each start in place.
            spec::write(&request.bundle, &oci)?;
        }
        let spec = ContainerSpec {
            id: id.clone(),
            containerd_namespace: launch.containerd_namespace.clone(),
            name: identity.name.clone(),
            role: identity.role,
            pod,
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            oci,
            stdio: dyad_runtime_handler::spec::Stdio::default(),
            checkpoint: request.checkpoint.clone(),
        };
        Ok((identity, spec))
    }

    pub(super) fn start_create(
        &mut self,
        request: CreateRequest,
        (identity, mut spec): (Identity, ContainerSpec),
        origin: Origin,
        reply: Reply<u32>,
    ) {
        let CreateRequest {
            id,
            bundle,
            rootfs,
            stdio: uris,
            checkpoint: _,
        } = request;
        if identity.role == Role::Sandbox {
            let source = migration::source_of(&spec.pod);
            let done = migration::done_on_source(&spec.pod);
            match (source, done) {
                (Ok(source), Ok(done)) => {
                    self.incoming = source.is_some();
                    self.done_on_source = done;
                }
                (Err(error), _) | (_, Err(error)) => return drop(reply.send(Err(error))),
            }
            self.info = spec.pod.clone();
        }
        // From here on something may be left, should we die.
        if let Err(error) = write_launch(&self.pod.launch, &id, identity.role, &bundle) {
            let _ = reply.send(Err(error));
            return;
        }
        let mut task = Task::new(
            identity.role,
            bundle.clone(),
            identity.name,
            identity.cri,
            uris.clone(),
        );
        task.is_bare = origin == Origin::SandboxApi;
        let ticket = task.lane.begin(Class::Whole);
        self.tasks.insert(id.clone(), task);

        let handler = self.handler.clone();
        let namespace = self.pod.launch.containerd_namespace.clone();
        let container = id.clone();
        let opened = uris.clone();
        let effect = async move {
            let owner = Owner {
                namespace: &namespace,
                container: &container,
            };
            let stdio = OpenStdio::open(&opened, owner).await?;
            spec.stdio = stdio.duplicate()?;
            let instance = handler.create(spec).await?;
            Ok::<_, Error>((stdio, instance))
        };
        self.effect(effect, move |driver, result| match result {
            Ok((stdio, instance)) => {
                let pid = driver.created(&id, stdio, &instance);
                info!("{id} is created, pid {pid}");
                driver.publish(TaskEvent::Create {
                    container: id.clone(),
                    bundle,
                    rootfs,
                    stdio: uris,
                    pid,
                });
                driver.save();
                let _ = reply.send(Ok(pid));
                driver.finish(&id, ticket);
            }
            Err(error) => {
                let exit = Exit {
                    status: 255,
                    at: SystemTime::now(),
                };
                driver.forget(&id, &bundle, exit);
                let _ = reply.send(Err(error));
            }
        });
    }

    fn created(&mut self, id: &str, stdio: OpenStdio, instance: &Arc<dyn Instance>) -> u32 {
        if let Some(task) = self.tasks.get_mut(id) {
            task.instance = Some(instance.clone());
            task.stdio = Some(stdio);
            task.phase = Phase::Created;
            task.since = SystemTime::now();
        }
        instance.pid().unwrap_or(0)
    }

    pub(super) fn run_init(&mut self, container: &str, ticket: Ticket, reply: Reply<u32>) {
        let ready = self.decide(container, Request::Run).and_then(|_| {
            let task = self.task(container)?;
            let instance = task.instance(container)?;
            task.phase = Phase::Starting {
                early: None,
                stopped: None,
            };
            Ok(instance)
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let done = self.is_done_on_source(container);
        let container = container.to_owned();
        let effect = async move {
            if !done {
                return instance.start(None).await;
            }
            instance.stop(Duration::ZERO).await?;
            Ok(std::process::id())
        };
        self.effect(effect, move |driver, result| {
            let ends = done && result.is_ok();
            driver.init_started(&container, result, reply);
            if ends {
                let (status, at) = (0, SystemTime::now());
                driver.end_for_good(&container, std::process::id(), Exit { status, at });
            }
            driver.finish(&container, ticket);
        });
    }

    /// An init container of a target has nothing left to do: kubelet waits for its end before
    /// it makes the next.
    fn is_done_on_source(&self, container: &str) -> bool {
        let task = self.tasks.get(container);
        let name = task.map(|task| &task.name);
        self.incoming && name.is_some_and(|name| self.done_on_source.contains(name))
    }

    fn init_started(&mut self, container: &str, result: Result<u32>, reply: Reply<u32>) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let early = match &task.phase {
            Phase::Starting { early, .. } => *early,
            _ => None,
        };
        let is_sandbox = task.role == Role::Sandbox;
        match result {
            Ok(pid) => {
                self.publish(TaskEvent::Start {
                    container: container.to_owned(),
                    pid,
                });
                if self.incoming {
                    self.set_phase(container, Phase::Incoming { pid }, "");
                    if is_sandbox {
                        self.await_source();
                    }
                } else {
                    self.set_phase(container, Phase::Running { pid }, "");
                }
                let _ = reply.send(Ok(pid));
                // After its start was told, however short it lived.
                if let Some(exit) = early {
                    self.init_exited(container, exit);
                }
            }
            Err(error) => {
                let failed = Phase::Failed {
                    reason: error.chain(),
                    at: SystemTime::now(),
                };
                let exit = failed.exit();
                // The reader of its output must not wait for more.
                task.stdio = None;
                if let Some(exit) = exit {
                    answer_waiters(&mut task.waiters, exit);
                }
                self.set_phase(container, failed, error.chain());
                let _ = reply.send(Err(error));
            }
        }
    }

    pub(super) fn init_exited(&mut self, container: &str, exit: Exit) {
        let kept_with_machine = self.is_kept_with_machine(container);
        let Some(task) = self.tasks.get_mut(container) else {
            debug!("exit of {container}, which is gone");
            return;
        };
        let pid = task.pid();
        match &mut task.phase {
            Phase::Starting { early, .. } => *early = Some(exit),
            Phase::Stopping {
                exit: told,
                keep: true,
                ..
            } => {
                *told = Some(exit);
                if let Some((after, ticket)) = task.stopping.take() {
                    self.stopped(container, ticket, exit, after);
                }
            }
            Phase::Running { .. } | Phase::Paused { .. } if kept_with_machine => {
                self.kept_with_machine(container, exit);
            }
            Phase::Created
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Migrating { .. }
            | Phase::Stopping { .. } => self.end_for_good(container, pid, exit),
            Phase::Creating
            | Phase::Stopped { .. }
            | Phase::Incoming { .. }
            | Phase::Migrated { .. }
            | Phase::Exited { .. }
            | Phase::Failed { .. } => {
                debug!("exit of {container} while {:?}", task.phase);
            }
        }
    }

    pub(super) fn signal_init(
        &mut self,
        container: &str,
        ticket: Ticket,
        signal: i32,
        all: bool,
        reply: Reply<()>,
    ) {
        let ends = state::signal_ends(signal);
        let ready = self
            .decide(container, Request::Kill { ends })
            .and_then(|step| Ok((step, self.task(container)?.instance(container)?)));
        let (step, instance) = match ready {
            Ok(ready) => ready,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        match step {
            Step::EndKept if matches!(self.phase_of(container), Some(Phase::Incoming { .. })) => {
                return self.end_incoming(container, ticket, instance, signal, reply);
            }
            Step::EndKept => {
                let status = 128 + signal.unsigned_abs();
                let at = SystemTime::now();
                self.end_for_good(container, 0, Exit { status, at });
                let _ = reply.send(Ok(()));
                return self.finish(container, ticket);
            }
            Step::EndStopping => self.no_longer_kept(container),
            Step::CancelAndSignal => {
                return self.cancel_and_signal(super::migration::Signal {
                    container: container.to_owned(),
                    ticket,
                    signal,
                    all,
                    reply,
                });
            }
            _ => {}
        }
        // What was asked to end already ends now.
        let signal = match step {
            Step::EndStopping => libc::SIGKILL,
            _ => signal,
        };
        let container = container.to_owned();
        // In a machine that is paused as a whole it is the machine that must thaw.
        let frozen = match step {
            Step::ThawAndSignal => self.frozen(&container),
            _ => None,
        };
        let signal = move |driver: &mut Self, container: String| {
            driver.effect(
                async move { instance.signal(None, signal, all).await },
                move |driver, result| {
                    let _ = reply.send(result);
                    driver.finish(&container, ticket);
                },
            );
        };
        let Some((id, instance)) = frozen else {
            return signal(self, container);
        };
        self.effect(
            async move { instance.resume().await },
            move |driver, result| {
                match result {
                    Ok(()) => driver.thawed(&id),
                    // A freezer that fails does not hold up SIGKILL.
                    Err(error) => warn!("resume {id} to signal {container}: {}", error.chain()),
                }
                signal(driver, container);
            },
        );
    }

    /// What is being stopped, itself or with its machine, ends for good.
    fn no_longer_kept(&mut self, container: &str) {
        if let Some(task) = self.tasks.get_mut(container) {
            match &mut task.phase {
                Phase::Stopping { keep, .. } => *keep = false,
                _ => task.killed_with_pod = true,
            }
        }
        // Its process may be gone, and the stop not yet returned.
        let ended = self
            .tasks
            .get(container)
            .and_then(|task| match &task.phase {
                Phase::Stopping {
                    pid,
                    exit: Some(exit),
                    ..
                } => Some((*pid, *exit)),
                _ => None,
            });
        if let Some((pid, exit)) = ended {
            self.end_for_good(container, pid, exit);
        }
    }

    /// What has to be thawed for `container` to run: itself, or its pod's machine.
    fn frozen(&self, container: &str) -> Option<(String, Arc<dyn Instance>)> {
        let paused = |task: &&Task| matches!(task.phase, Phase::Paused { .. });
        let own = self.tasks.get(container).filter(paused);
        if let Some(task) = own {
            return Some((container.to_owned(), task.instance.clone()?));
        }
        self.tasks
            .iter()
            .find(|(_, task)| task.role == Role::Sandbox && paused(task))
            .and_then(|(id, task)| Some((id.clone(), task.instance.clone()?)))
    }

    pub(super) fn pause(&mut self, container: &str, ticket: Ticket, reply: Reply<()>) {
        self.freezer(container, ticket, reply, Request::Pause);
    }

    pub(super) fn resume(&mut self, container: &str, ticket: Ticket, reply: Reply<()>) {
        self.freezer(container, ticket, reply, Request::Resume);
    }

    fn freezer(&mut self, container: &str, ticket: Ticket, reply: Reply<()>, request: Request) {
        let ready = self
            .decide(container, request)
            .and_then(|step| Ok((step, self.task(container)?.instance(container)?)));
        let (step, instance) = match ready {
            Ok((Step::AlreadySo, _)) => {
                let _ = reply.send(Ok(()));
                return self.finish(container, ticket);
            }
            Ok(ready) => ready,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        let freeze = step == Step::Freeze;
        let effect = async move {
            match freeze {
                true => instance.pause().await,
                false => instance.resume().await,
            }
        };
        self.effect(effect, move |driver, result| {
            match (&result, freeze) {
                (Ok(()), true) => driver.frozen_now(&container),
                (Ok(()), false) => driver.thawed(&container),
                (Err(_), _) => {}
            }
            let _ = reply.send(result);
            driver.finish(&container, ticket);
        });
    }

    fn frozen_now(&mut self, container: &str) {
        if let Some(task) = self.tasks.get(container)
            && let Phase::Running { pid } = task.phase
        {
            self.set_phase(container, Phase::Paused { pid }, "asked for");
            self.publish(TaskEvent::Paused {
                container: container.to_owned(),
            });
        }
    }

    fn thawed(&mut self, container: &str) {
        if let Some(task) = self.tasks.get(container)
            && let Phase::Paused { pid } = task.phase
        {
            self.set_phase(container, Phase::Running { pid }, "asked for");
            self.publish(TaskEvent::Resumed {
                container: container.to_owned(),
            });
        }
    }

    pub(super) fn update(
        &mut self,
        container: &str,
        ticket: Ticket,
        resources: Box<Resources>,
        reply: Reply<()>,
    ) {
        let ready = self
            .decide(container, Request::Update)
            .and_then(|_| self.task(container)?.instance(container));
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        self.effect(
            async move { instance.update(&resources).await },
            move |driver, result| {
                let _ = reply.send(result);
                driver.finish(&container, ticket);
            },
        );
    }

    pub(super) fn checkpoint(
        &mut self,
        container: &str,
        ticket: Ticket,
        to: Box<Checkpoint>,
        reply: Reply<()>,
    ) {
        let ready = self.task(container).and_then(|task| {
            let instance = task.instance(container)?;
            match task.phase.state() {
                State::Running | State::Paused => Ok(instance),
                state => Err(Error::FailedPrecondition(format!(
                    "cannot checkpoint {container}: it {state}; only one that runs or is paused has something to keep"
                ))),
            }
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        let images = to.images.clone();
        self.effect(
            async move { instance.checkpoint(&to).await },
            move |driver, result| {
                if result.is_ok() {
                    let container = container.clone();
                    driver.publish(TaskEvent::Checkpointed { container, images });
                }
                let _ = reply.send(result);
                driver.finish(&container, ticket);
            },
        );
    }

    pub(super) fn delete_init(&mut self, container: &str, ticket: Ticket, reply: Reply<Gone>) {
        let ready = self.decide(container, Request::Delete).and_then(|_| {
            self.not_the_pod_of_others(container)?;
            self.task(container)?.instance(container)
        });
        let instance = match ready {
            Ok(instance) => instance,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        self.effect(
            async move { instance.delete().await },
            move |driver, result| match result {
                Ok(()) => {
                    let _ = reply.send(driver.deleted(&container));
                }
                Err(error) => driver.refused(&container, ticket, reply, error),
            },
        );
    }

    /// The machine goes last: its containers cannot be deleted without it.
    fn not_the_pod_of_others(&self, container: &str) -> Result<()> {
        let is_sandbox = self
            .tasks
            .get(container)
            .is_some_and(|task| task.role == Role::Sandbox);
        match self.tasks.iter().find(|(id, task)| {
            is_sandbox && id.as_str() != container && task.phase.exit().is_none()
        }) {
            Some((other, _)) => Err(Error::FailedPrecondition(format!(
                "delete {container}: container {other} of this pod is still there; delete it first"
            ))),
            None => Ok(()),
        }
    }

    fn deleted(&mut self, container: &str) -> Result<Gone> {
        let task = self
            .tasks
            .get(container)
            .ok_or_else(|| not_found(container))?;
        let exit = match (&task.phase, task.phase.exit()) {
            (_, Some(exit)) | (&Phase::Stopped { exit }, None) => exit,
            // It never ran.
            _ => Exit {
                status: 0,
                at: SystemTime::now(),
            },
        };
        let gone = Gone {
            pid: task.pid(),
            exit,
        };
        let bundle = task.bundle.clone();
        self.publish(TaskEvent::Delete {
            container: container.to_owned(),
            pid: gone.pid,
            exit,
        });
        self.forget(container, &bundle, exit);
        info!("{container} is deleted");
        Ok(gone)
    }
}
