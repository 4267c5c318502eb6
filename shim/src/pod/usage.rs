//! What Task `Stats` tells of a task whose usage cannot be read now.
//!
//! containerd asks each second and logs each error, and who asks knows no "not now": so a
//! task that is kept, not running, has an answer, and it is true.
//!
//! | the task's pod or container | counters | what is in use |
//! |---|---|---|
//! | its machine is paused | as they were last read: they stand | as last read: it stands too |
//! | stopped and kept | as they were last read: nothing counts on | nothing |
//! | stopped while it was being read | as they were last read | nothing |
//! | in a machine that never ran here | 0 | nothing |

use dyad_runtime_handler::Result;
use dyad_runtime_handler::stats::{CpuStats, Hierarchy, MemoryStats, PidsStats, Stats};

use log::debug;

use super::Reply;
use super::driver::Driver;
use super::model::state::State;

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// The backend reads it.
    Backend,
    /// It stands still.
    Standing,
    /// Nothing of it runs.
    Resting,
}

/// `machine` is the pod's machine, for a container in one.
fn from(task: &State, machine: Option<&State>) -> From {
    match (task, machine) {
        (State::Stopped | State::Incoming, _) => From::Resting,
        // Its vCPUs are stopped, and with them the agent that would answer.
        (_, Some(State::Paused)) => From::Standing,
        _ => From::Backend,
    }
}

/// After all its processes have ended.
fn resting(last: Option<Stats>) -> Stats {
    let last = last.unwrap_or(Stats {
        hierarchy: Hierarchy::V2,
        cpu: CpuStats::default(),
        memory: MemoryStats {
            limit: u64::MAX,
            swap_limit: u64::MAX,
            ..MemoryStats::default()
        },
        pids: PidsStats {
            current: 0,
            limit: u64::MAX,
        },
        io: Vec::new(),
        io_pressure: None,
    });
    let memory = last.memory;
    Stats {
        memory: MemoryStats {
            limit: memory.limit,
            swap_limit: memory.swap_limit,
            peak: memory.peak,
            pgfault: memory.pgfault,
            pgmajfault: memory.pgmajfault,
            max_events: memory.max_events,
            oom_kills: memory.oom_kills,
            ..MemoryStats::default()
        },
        pids: PidsStats {
            current: 0,
            ..last.pids
        },
        ..last
    }
}

impl Driver {
    pub(super) fn stats(&mut self, container: &str, reply: Reply<Stats>) {
        let from = match self.model.task(container) {
            Err(_) => From::Backend,
            Ok(task) => from(
                &self.model.effective(task),
                self.model.machine_of(task).as_ref(),
            ),
        };
        let instance = match self.instance(container) {
            Ok(instance) => instance,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let last = self.held.get(container).and_then(|held| held.usage.clone());
        match (from, last) {
            (From::Resting, last) => drop(reply.send(Ok(resting(last)))),
            (From::Standing, Some(last)) => drop(reply.send(Ok(last))),
            (From::Backend | From::Standing, _) => {
                let container = container.to_owned();
                self.effect(
                    async move { instance.stats().await },
                    move |driver, result| driver.usage_read(&container, result, reply),
                );
            }
        }
    }

    fn usage_read(&mut self, container: &str, result: Result<Stats>, reply: Reply<Stats>) {
        let stops = self.model.task(container).is_ok_and(|task| {
            let state = self.model.effective(task);
            matches!(state, State::Stopping | State::Stopped)
        });
        let Some(held) = self.held.get_mut(container) else {
            return drop(reply.send(result));
        };
        let answer = match result {
            Ok(stats) => {
                held.usage = Some(stats.clone());
                Ok(stats)
            }
            // What was asked has stopped meanwhile, or its guest has.
            Err(error) if stops => {
                debug!("usage of {container}: {}", error.chain());
                Ok(resting(held.usage.clone()))
            }
            Err(error) => Err(error),
        };
        let _ = reply.send(answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_or_rests_is_not_asked_of_the_backend() {
        for (task, machine, expected) in [
            (State::Running, None, From::Backend),
            (State::Running, Some(State::Running), From::Backend),
            // One container's freezer: its guest answers.
            (State::Paused, Some(State::Running), From::Backend),
            (State::Paused, None, From::Backend),
            (State::Paused, Some(State::Paused), From::Standing),
            (State::Stopped, None, From::Resting),
            (State::Stopped, Some(State::Stopped), From::Resting),
            (State::Stopped, Some(State::Paused), From::Resting),
            (State::Incoming, Some(State::Incoming), From::Resting),
            (State::Exited(0), Some(State::Running), From::Backend),
        ] {
            assert_eq!(
                from(&task, machine.as_ref()),
                expected,
                "{task:?} {machine:?}"
            );
        }
    }

    #[test]
    fn what_rests_keeps_its_counters_and_uses_nothing() {
        let last = Stats {
            hierarchy: Hierarchy::V1,
            cpu: CpuStats {
                usage_ns: 5,
                ..CpuStats::default()
            },
            memory: MemoryStats {
                usage: 1 << 20,
                limit: 1 << 30,
                anon: 4096,
                oom_kills: 1,
                ..MemoryStats::default()
            },
            pids: PidsStats {
                current: 3,
                limit: 10,
            },
            io: Vec::new(),
            io_pressure: None,
        };
        let told = resting(Some(last.clone()));
        assert_eq!((told.hierarchy, told.cpu), (last.hierarchy, last.cpu));
        assert_eq!((told.memory.usage, told.memory.anon), (0, 0));
        assert_eq!((told.memory.limit, told.memory.oom_kills), (1 << 30, 1));
        assert_eq!((told.pids.current, told.pids.limit), (0, 10));
        assert_eq!(resting(None).cpu, CpuStats::default());
    }
}
