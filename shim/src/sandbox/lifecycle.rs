//! The driver's steps for what only the Lifecycle service asks: stop, start and
//! restart in place, and for telling about transitions.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, Instance, ProcessId};
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};
use log::{info, warn};
use tokio::sync::mpsc;

use super::driver::{Driver, not_found};
use super::lane::{Class, Ticket};
use super::state::{self, Request, Step};
use super::task::{AfterStop, Phase, Task, answer_waiters};
use super::{PodView, Reply, TaskEvent, TaskView, Transition};

/// Exit status of what the machine took with it.
const KILLED: u32 = 137;

impl Driver {
    // --- Telling -----------------------------------------------------------------

    /// The one place where a task's phase changes: tells watchers and subscribers, and
    /// writes the record.
    pub(super) fn set_phase(&mut self, container: &str, phase: Phase, reason: impl Into<String>) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let from = task.phase.state();
        task.phase = phase;
        if from == task.phase.state() {
            return;
        }
        task.since = SystemTime::now();
        task.reason = reason.into();
        self.transitions += 1;
        let transition = Transition {
            sequence: self.transitions,
            at: task.since,
            from,
            task: task_view(container, task),
        };
        let name = state::outside(&transition.task.state).name;
        match transition.task.reason.as_str() {
            "" => info!("{container} is {name}"),
            reason => info!("{container} is {name}: {reason}"),
        }
        self.watchers
            .retain(|watcher| watcher.try_send(transition.clone()).is_ok());
        self.publish(TaskEvent::Transition(Box::new(transition)));
        self.save();
    }

    pub(super) fn pod_view(&self) -> PodView {
        let launch = &self.pod.launch;
        PodView {
            kind: launch.kind,
            containerd_namespace: launch.containerd_namespace.clone(),
            sandbox_id: launch.sandbox_id.clone(),
            info: self.info.clone(),
            tasks: self
                .tasks
                .iter()
                .filter(|(_, task)| task.instance.is_some())
                .map(|(id, task)| task_view(id, task))
                .collect(),
            machine: self.handler.machine(),
        }
    }

    pub(super) fn watch(&mut self, watcher: mpsc::Sender<Transition>) {
        for (id, task) in &self.tasks {
            let now = Transition {
                sequence: self.transitions,
                at: task.since,
                from: task.phase.state(),
                task: task_view(id, task),
            };
            // The queue is new, and longer than pods are large; if not, it ends.
            if task.instance.is_some() && watcher.try_send(now).is_err() {
                return;
            }
        }
        self.watchers.push(watcher);
    }

    // --- Stop --------------------------------------------------------------------

    pub(super) fn stop_init(
        &mut self,
        container: &str,
        ticket: Ticket,
        grace: Duration,
        reply: Reply<()>,
    ) {
        match self.decide(container, Request::Stop) {
            Ok(Step::AlreadySo) => {
                let _ = reply.send(Ok(()));
                self.finish(container, ticket);
            }
            Ok(_) => self.begin_stop(container, ticket, grace, AfterStop::Stay(reply)),
            Err(error) => self.refused(container, ticket, reply, error),
        }
    }

    pub(super) fn restart_init(
        &mut self,
        container: &str,
        ticket: Ticket,
        (force, grace): (bool, Duration),
        reply: Reply<()>,
    ) {
        let grace = if force { Duration::ZERO } else { grace };
        let ready = self
            .decide(container, Request::Restart { force })
            .and_then(|_| {
                let task = self.task(container)?;
                Ok((task.pid(), task.instance(container)?))
            });
        match ready {
            Ok((pid, instance)) if instance.reboot().is_some() => {
                self.begin_reboot(container, ticket, (pid, instance), (force, grace), reply);
            }
            Ok(_) => self.begin_stop(container, ticket, grace, AfterStop::Start(reply)),
            Err(error) => self.refused(container, ticket, reply, error),
        }
    }

    /// What restarts without an end of its own is `Stopping` meanwhile, so that what ends
    /// in it is kept and comes back.
    fn begin_reboot(
        &mut self,
        container: &str,
        ticket: Ticket,
        (pid, instance): (u32, Arc<dyn Instance>),
        (force, grace): (bool, Duration),
        reply: Reply<()>,
    ) {
        let stopping = Phase::Stopping {
            pid,
            exit: None,
            keep: true,
        };
        self.set_phase(container, stopping, "it reboots");
        let container = container.to_owned();
        let effect = async move {
            match instance.reboot() {
                Some(reboot) => reboot.reboot(force, grace).await,
                None => Err(Error::Unimplemented("a reboot".into())),
            }
        };
        self.effect(effect, move |driver, result| {
            driver.rebooted(&container, ticket, result, reply);
        });
    }

    fn rebooted(&mut self, container: &str, ticket: Ticket, result: Result<u32>, reply: Reply<()>) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let (pid, exit) = match &task.phase {
            Phase::Stopping { pid, exit, .. } => (*pid, *exit),
            _ => return self.refused(container, ticket, reply, killed(container)),
        };
        let answer = match (result, exit) {
            (Ok(pid), None) => {
                task.starts += 1;
                self.set_phase(container, Phase::Running { pid }, "restarted in place");
                Ok(())
            }
            // It ended instead, and is kept as if it had been stopped.
            (result, Some(exit)) => {
                let error = result.err().unwrap_or_else(|| {
                    Error::FailedPrecondition(format!("{container} ended instead of rebooting"))
                });
                let reason = format!("could not be restarted: {}", error.chain());
                self.set_phase(container, Phase::Stopped { exit }, reason);
                self.machine_stopped(exit.at);
                Err(error)
            }
            (Err(error), None) => {
                let reason = format!("could not be restarted: {}", error.chain());
                self.set_phase(container, Phase::Running { pid }, reason);
                Err(error)
            }
        };
        let _ = reply.send(answer);
        self.finish(container, ticket);
    }

    fn begin_stop(&mut self, container: &str, ticket: Ticket, grace: Duration, after: AfterStop) {
        let ready = self
            .task(container)
            .and_then(|task| Ok((task.pid(), task.instance(container)?)));
        let (pid, instance) = match ready {
            Ok(ready) => ready,
            Err(error) => return self.refused(container, ticket, after.into_reply(), error),
        };
        let stopping = Phase::Stopping {
            pid,
            exit: None,
            keep: true,
        };
        self.set_phase(container, stopping, "asked for");
        let container = container.to_owned();
        self.effect(
            async move { instance.stop(grace).await },
            move |driver, result| driver.stop_returned(&container, ticket, result, after),
        );
    }

    fn stop_returned(
        &mut self,
        container: &str,
        ticket: Ticket,
        result: Result<()>,
        after: AfterStop,
    ) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        match (&task.phase, result) {
            // It ended, whatever the backend says.
            (
                &Phase::Stopping {
                    exit: Some(exit), ..
                },
                _,
            ) => {
                self.stopped(container, ticket, exit, after);
            }
            // Its exit is on its way.
            (Phase::Stopping { .. }, Ok(())) => task.stopping = Some((after, ticket)),
            (&Phase::Stopping { pid, .. }, Err(error)) => {
                let reason = format!("could not be stopped: {}", error.chain());
                self.set_phase(container, Phase::Running { pid }, reason);
                self.refused(container, ticket, after.into_reply(), error);
            }
            (_, _) => self.refused(container, ticket, after.into_reply(), killed(container)),
        }
    }

    /// It ended as it was asked to, and is kept.
    pub(super) fn stopped(
        &mut self,
        container: &str,
        ticket: Ticket,
        exit: Exit,
        after: AfterStop,
    ) {
        let reason = format!("exit status {}", exit.status);
        self.set_phase(container, Phase::Stopped { exit }, reason);
        if self.is_machine(container) {
            self.machine_stopped(exit.at);
        }
        match after {
            AfterStop::Stay(reply) => {
                let _ = reply.send(Ok(()));
                self.finish(container, ticket);
            }
            AfterStop::Start(reply) => {
                // From here on it may be signalled only when it runs again.
                if let Some(task) = self.tasks.get_mut(container) {
                    task.lane.reclass(ticket, Class::Whole);
                }
                self.begin_start_again(container, ticket, reply);
            }
        }
    }

    fn is_machine(&self, container: &str) -> bool {
        self.pod.launch.kind == Kind::Machine
            && self
                .tasks
                .get(container)
                .is_some_and(|task| task.role == Role::Sandbox)
    }

    /// Whether a container's end is part of its machine's stop, and it is kept like it.
    pub(super) fn is_kept_with_machine(&self, container: &str) -> bool {
        let counts = self.tasks.get(container).is_some_and(|task| {
            task.role == Role::Container
                && !task.killed_with_pod
                && matches!(task.phase, Phase::Running { .. } | Phase::Paused { .. })
        });
        counts
            && self.pod.launch.kind == Kind::Machine
            && self.tasks.values().any(|task| {
                task.role == Role::Sandbox
                    && matches!(
                        task.phase,
                        Phase::Stopping { keep: true, .. } | Phase::Stopped { .. }
                    )
            })
    }

    pub(super) fn kept_with_machine(&mut self, container: &str, exit: Exit) {
        if let Some(task) = self.tasks.get_mut(container) {
            task.stopped_with_pod = true;
        }
        self.set_phase(
            container,
            Phase::Stopped { exit },
            "its machine was stopped",
        );
    }

    /// The backend tells the end of what was in the machine where it can; this is for
    /// the rest.
    fn machine_stopped(&mut self, at: SystemTime) {
        let exit = Exit { status: KILLED, at };
        for process in self.processes_in_machine() {
            match &process.exec {
                Some(exec) => self.exec_exited(&process.container, exec, exit),
                None if self.is_kept_with_machine(&process.container) => {
                    self.kept_with_machine(&process.container, exit);
                }
                None => {}
            }
        }
    }

    pub(super) fn processes_in_machine(&self) -> Vec<ProcessId> {
        self.tasks
            .iter()
            .filter(|(_, task)| task.role == Role::Container)
            .flat_map(|(id, task)| {
                task.execs
                    .keys()
                    .map(|exec| ProcessId::exec(id.clone(), exec.clone()))
                    .chain([ProcessId::init(id.clone())])
            })
            .collect()
    }

    // --- Start again -------------------------------------------------------------

    pub(super) fn start_again(&mut self, container: &str, ticket: Ticket, reply: Reply<()>) {
        match self.decide_start_again(container) {
            Ok(Step::AlreadySo) => {
                let _ = reply.send(Ok(()));
                self.finish(container, ticket);
            }
            Ok(_) => self.begin_start_again(container, ticket, reply),
            Err(error) => self.refused(container, ticket, reply, error),
        }
    }

    fn decide_start_again(&self, container: &str) -> Result<Step> {
        let task = self
            .tasks
            .get(container)
            .ok_or_else(|| not_found(container))?;
        let machine_is_off = self.pod.launch.kind == Kind::Machine
            && task.role == Role::Container
            && !self.tasks.values().any(|task| {
                task.role == Role::Sandbox && matches!(task.phase, Phase::Running { .. })
            });
        if machine_is_off {
            return Err(Error::FailedPrecondition(format!(
                "cannot start container {container}: its pod's machine is not running; start the pod"
            )));
        }
        self.decide(container, Request::Start)
    }

    fn begin_start_again(&mut self, container: &str, ticket: Ticket, reply: Reply<()>) {
        let ready = self.task(container).and_then(|task| {
            let instance = task.instance(container)?;
            let stdio = task
                .stdio
                .as_ref()
                .map(|stdio| stdio.duplicate())
                .transpose()?;
            let stopped = match task.phase {
                Phase::Stopped { exit } => Some(exit),
                _ => None,
            };
            task.phase = Phase::Starting {
                early: None,
                stopped,
            };
            Ok((instance, stdio))
        });
        let (instance, stdio) = match ready {
            Ok(ready) => ready,
            Err(error) => return self.refused(container, ticket, reply, error),
        };
        let container = container.to_owned();
        self.effect(
            async move { instance.start(stdio).await },
            move |driver, result| {
                driver.started_again(&container, result, reply);
                driver.finish(&container, ticket);
            },
        );
    }

    fn started_again(&mut self, container: &str, result: Result<u32>, reply: Reply<()>) {
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        let Phase::Starting { early, stopped } = task.phase else {
            return;
        };
        match result {
            Ok(pid) => {
                task.starts += 1;
                task.stopped_with_pod = false;
                task.killed_with_pod = false;
                self.set_phase(container, Phase::Running { pid }, "started in place");
                let _ = reply.send(Ok(()));
                if let Some(exit) = early {
                    self.init_exited(container, exit);
                }
            }
            Err(error) => {
                warn!("start {container} again: {}", error.chain());
                let exit = stopped.unwrap_or(Exit {
                    status: KILLED,
                    at: SystemTime::now(),
                });
                // Nothing changed, seen from outside.
                task.phase = Phase::Stopped { exit };
                task.reason = format!("could not be started again: {}", error.chain());
                let _ = reply.send(Err(error));
            }
        }
    }

    // --- The end, for good -------------------------------------------------------

    /// What was kept, or ran, is over: exit event, waiters, no more stdio.
    pub(super) fn end_for_good(&mut self, container: &str, pid: u32, exit: Exit) {
        let reason = format!("exit status {}", exit.status);
        let Some(task) = self.tasks.get_mut(container) else {
            return;
        };
        // With the backend's own ends, which close when the output is drained, this is
        // the last: readers see the end.
        task.stdio = None;
        let pending = task.stopping.take();
        self.publish(TaskEvent::Exit {
            process: ProcessId::init(container),
            pid,
            exit,
        });
        self.set_phase(container, Phase::Exited { pid, exit }, reason);
        if let Some(task) = self.tasks.get_mut(container) {
            answer_waiters(&mut task.waiters, exit);
        }
        if self.is_machine(container) {
            self.machine_ended(exit.at);
        }
        if let Some((after, ticket)) = pending {
            self.refused(container, ticket, after.into_reply(), killed(container));
        }
    }
}

fn killed(container: &str) -> Error {
    Error::FailedPrecondition(format!(
        "{container} was killed while it was being stopped: it can only be deleted"
    ))
}

fn task_view(id: &str, task: &Task) -> TaskView {
    TaskView {
        id: id.to_owned(),
        name: task.name.clone(),
        is_sandbox: task.role == Role::Sandbox,
        state: task.phase.state(),
        reason: task.reason.clone(),
        since: task.since,
        pid: task.pid(),
        starts: task.starts,
        stopped_with_pod: task.stopped_with_pod,
    }
}
