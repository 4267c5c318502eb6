//! What happens to a pod's machine, and through it to what runs in it.

use std::time::SystemTime;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::handler::{Exit, MachineEvent, ProcessId};
use dyad_runtime_handler::spec::Role;

use super::task::Phase;
use super::{KILLED, Model, processes_of};
use crate::pod::TaskEvent;

/// Why a task is paused or runs that somebody wanted so.
pub(super) const ASKED_FOR: &str = "asked for";

impl Model {
    /// The backend saw the machine change. What a call of our own does to it is told by the
    /// backend too, and may come before that call returns.
    pub(super) fn machine_changed(&mut self, event: MachineEvent) {
        let Some((id, task)) = self.sandbox() else {
            return;
        };
        let id = id.clone();
        let why = |other| match task.is_freezing {
            true => ASKED_FOR,
            false => other,
        };
        match (event, task.phase()) {
            (MachineEvent::Suspended, Phase::Running { .. }) => {
                self.frozen_now(&id, why("its machine was suspended"));
            }
            (MachineEvent::Resumed, Phase::Paused { .. }) => {
                self.thawed(&id, why("its machine was resumed"));
            }
            (
                MachineEvent::Suspended
                | MachineEvent::Resumed
                | MachineEvent::Rebooted
                | MachineEvent::Crashed,
                _,
            ) => {}
        }
    }

    pub(super) fn frozen_now(&mut self, container: &str, reason: &str) {
        if let Some(&Phase::Running { pid }) = self.phase_of(container) {
            self.set_phase(container, Phase::Paused { pid }, reason);
            let container = container.to_owned();
            self.publish(TaskEvent::Paused { container });
        }
    }

    pub(super) fn thawed(&mut self, container: &str, reason: &str) {
        if let Some(&Phase::Paused { pid }) = self.phase_of(container) {
            self.set_phase(container, Phase::Running { pid }, reason);
            let container = container.to_owned();
            self.publish(TaskEvent::Resumed { container });
        }
    }

    /// A machine that ended has taken all in it along; the backend says so where it
    /// can, and this for the rest.
    pub(super) fn machine_ended(&mut self, at: SystemTime) {
        if self.identity.kind != Kind::Machine {
            return;
        }
        let exit = Exit { status: KILLED, at };
        for process in self.processes_in_machine() {
            let container = &process.container;
            let kept = matches!(
                self.phase_of(container),
                Some(Phase::Stopped { .. } | Phase::Incoming { .. })
            );
            match &process.exec {
                Some(exec) => self.exec_exited(container, exec, exit),
                // There is nothing left that it could be started in.
                None if kept => self.end_for_good(container, 0, exit),
                None => self.init_exited(container, exit),
            }
        }
    }

    /// The backend tells the end of what was in the machine where it can; this is for
    /// the rest.
    pub(super) fn machine_stopped(&mut self, at: SystemTime) {
        let exit = Exit { status: KILLED, at };
        for process in self.processes_in_machine() {
            match &process.exec {
                Some(exec) => self.exec_exited(&process.container, exec, exit),
                None if self.is_kept_with_machine(&process.container) => {
                    self.keep_with_machine(&process.container, exit);
                }
                None => {}
            }
        }
    }

    /// Whether a container's end is part of its machine's stop, and it is kept like it.
    pub(super) fn is_kept_with_machine(&self, container: &str) -> bool {
        let counts = self.tasks.get(container).is_some_and(|task| {
            task.role == Role::Container
                && !task.killed_with_pod
                && matches!(task.phase(), Phase::Running { .. } | Phase::Paused { .. })
        });
        let machine_stops = self.sandbox().is_some_and(|(_, task)| {
            matches!(
                task.phase(),
                Phase::Stopping { keep: true, .. } | Phase::Stopped { .. }
            )
        });
        counts && machine_stops && self.identity.kind == Kind::Machine
    }

    pub(super) fn keep_with_machine(&mut self, container: &str, exit: Exit) {
        if let Some(task) = self.tasks.get_mut(container) {
            task.stopped_with_pod = true;
        }
        self.set_phase(
            container,
            Phase::Stopped { exit },
            "its machine was stopped",
        );
    }

    fn processes_in_machine(&self) -> Vec<ProcessId> {
        self.tasks
            .iter()
            .filter(|(_, task)| task.role == Role::Container)
            .flat_map(|(id, task)| processes_of(id, task))
            .collect()
    }
}
