//! Lifecycle operations on one task or the whole pod, in terms of changes of tasks.
//!
//! A machine pod's machine is its sandbox task: what is done to it holds for all in
//! it. In a container pod the operation is done to each container; the pause container
//! stays as it is, and with it the pod's address.

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::Model;
use super::change::{Answer, Change, InitChange, Token};
use super::state::State;
use super::task::Task;
use crate::pod::lifecycle::Operation;

/// An operation on several tasks, side by side, that is answered when all have ended.
#[derive(Debug)]
pub(super) struct Group {
    token: Token,
    /// Of each change, in the order of the tasks.
    results: Vec<Option<Result<()>>>,
    /// A machine that came up again has none of its containers' processes: they are started
    /// next.
    brings_back: bool,
}

impl Model {
    pub(super) fn operate(&mut self, operation: Operation, target: &str, token: Token) {
        let targets = match target {
            "" => self.targets(operation),
            id => Ok(vec![id.to_owned()]),
        };
        match targets {
            Err(error) => self.answer(token, Err(error)),
            Ok(targets) => {
                let brings_back = matches!(operation, Operation::Start | Operation::Restart { .. })
                    && targets.iter().any(|id| self.is_machine(id));
                self.operate_all(operation, &targets, token, brings_back);
            }
        }
    }

    /// The tasks that an operation on the whole pod is done to.
    fn targets(&self, operation: Operation) -> Result<Vec<String>> {
        let made = |role| {
            self.tasks
                .iter()
                .filter(move |(_, task)| task.is_made() && task.role == role)
        };
        let has_containers = made(Role::Container).next().is_some();
        // Outside CRI the one task is its own pod.
        let is_the_pod =
            self.identity.kind == Kind::Machine || (!has_containers && self.pod_name.is_empty());
        if let Some((sandbox, _)) = made(Role::Sandbox).next().filter(|_| is_the_pod) {
            return Ok(vec![sandbox.clone()]);
        }
        let concerned: Vec<String> = made(Role::Container)
            .filter(|(_, task)| concerns(task))
            .map(|(id, _)| id.clone())
            .collect();
        match concerned.is_empty() {
            false => Ok(concerned),
            true => Err(Error::FailedPrecondition(format!(
                "cannot {} pod {}: no container of it is running",
                operation.name(),
                self.identity.sandbox_id
            ))),
        }
    }

    fn operate_all(
        &mut self,
        operation: Operation,
        targets: &[String],
        token: Token,
        brings_back: bool,
    ) {
        let group = self.next_group;
        self.next_group += 1;
        let entry = Group {
            token,
            results: targets.iter().map(|_| None).collect(),
            brings_back,
        };
        self.groups.insert(group, entry);
        for (index, target) in targets.iter().enumerate() {
            let token = Token::Member { group, index };
            self.change(target, Change::Init(change(operation)), token);
        }
    }

    /// One of the group's changes has ended.
    pub(super) fn member_done(&mut self, group: u64, index: usize, result: Result<Answer>) {
        let Some(entry) = self.groups.get_mut(&group) else {
            return;
        };
        if let Some(place) = entry.results.get_mut(index) {
            *place = Some(result.map(drop));
        }
        if entry.results.iter().any(Option::is_none) {
            return;
        }
        let Some(ended) = self.groups.remove(&group) else {
            return;
        };
        // The first error, in the order of the tasks.
        let result: Result<()> = ended.results.into_iter().flatten().collect();
        let taken: Vec<String> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.is_made() && task.stopped_with_pod)
            .map(|(id, _)| id.clone())
            .collect();
        if result.is_ok() && ended.brings_back && !taken.is_empty() {
            return self.operate_all(Operation::Start, &taken, ended.token, false);
        }
        self.answer(ended.token, result.map(|()| Answer::Done));
    }
}

/// Whether an operation on the whole pod concerns this container: one that has ended, or
/// was never started, is not part of it.
fn concerns(task: &Task) -> bool {
    matches!(
        task.state(),
        State::Running | State::Paused | State::Stopping | State::Stopped | State::Migrating
    )
}

fn change(operation: Operation) -> InitChange {
    match operation {
        Operation::Pause => InitChange::Pause,
        Operation::Resume => InitChange::Resume,
        Operation::Stop { grace } => InitChange::Stop { grace },
        Operation::Start => InitChange::Start,
        Operation::Restart { force, grace } => InitChange::Restart { force, grace },
    }
}
