//! The order in which the changes asked of one container are done.
//!
//! Changes of the whole container (run, pause, delete …) have it for themselves;
//! those of one process (an exec, a terminal's size) run beside those of another.
//! First come, first served, with one exception: a signal may reach a container that
//! is being stopped, because stopping may wait long for its grace.

use std::collections::VecDeque;

/// What a change needs for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// The whole container.
    Whole,
    /// The whole container, but signals may come in between.
    Interruptible,
    /// One process: `None` is the init process.
    Process(Option<String>),
    /// A signal to one process.
    Signal(Option<String>),
}

/// Names a change under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// The changes of one container, under way and waiting.
#[derive(Debug)]
pub struct Lane<J> {
    running: Vec<(Ticket, Class)>,
    waiting: VecDeque<(Class, J)>,
    next_ticket: u64,
}

impl<J> Default for Lane<J> {
    fn default() -> Self {
        Self {
            running: Vec::new(),
            waiting: VecDeque::new(),
            next_ticket: 0,
        }
    }
}

impl<J> Lane<J> {
    /// Puts a change in line.
    pub fn push(&mut self, class: Class, job: J) {
        self.waiting.push_back((class, job));
    }

    /// Takes the next change that may begin now.
    pub fn next(&mut self) -> Option<(Ticket, J)> {
        let index = if self.may_run(&self.waiting.front()?.0) {
            0
        } else if self
            .running
            .iter()
            .any(|(_, class)| *class == Class::Interruptible)
        {
            self.waiting
                .iter()
                .position(|(class, _)| matches!(class, Class::Signal(_)) && self.may_run(class))?
        } else {
            return None;
        };
        let (class, job) = self.waiting.remove(index)?;
        Some((self.begin(class), job))
    }

    /// Marks a change as begun without waiting in line.
    pub fn begin(&mut self, class: Class) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.running.push((ticket, class));
        ticket
    }

    /// Changes what a change under way needs from here on.
    pub fn reclass(&mut self, ticket: Ticket, class: Class) {
        for (running, old) in &mut self.running {
            if *running == ticket {
                *old = class.clone();
            }
        }
    }

    /// Marks a change as done.
    pub fn done(&mut self, ticket: Ticket) {
        self.running.retain(|(running, _)| *running != ticket);
    }

    /// Takes all that waits.
    pub fn drain(&mut self) -> impl Iterator<Item = J> + '_ {
        self.waiting.drain(..).map(|(_, job)| job)
    }

    /// Whether nothing is under way and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    fn may_run(&self, class: &Class) -> bool {
        self.running
            .iter()
            .all(|(_, running)| match (class, running) {
                (Class::Signal(_), Class::Interruptible) => true,
                (
                    Class::Process(one) | Class::Signal(one),
                    Class::Process(other) | Class::Signal(other),
                ) => one != other,
                _ => false,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(name: &str) -> Class {
        Class::Process(Some(name.into()))
    }

    fn begin_all(lane: &mut Lane<&'static str>) -> Vec<(Ticket, &'static str)> {
        std::iter::from_fn(|| lane.next()).collect()
    }

    #[test]
    fn processes_run_side_by_side_and_the_whole_waits_for_them() {
        let mut lane = Lane::default();
        lane.push(process("a"), "run a");
        lane.push(process("b"), "run b");
        lane.push(process("a"), "resize a");
        lane.push(Class::Whole, "pause");
        lane.push(process("c"), "run c");
        let begun = begin_all(&mut lane);
        assert_eq!(
            begun.iter().map(|(_, job)| *job).collect::<Vec<_>>(),
            ["run a", "run b"]
        );
        lane.done(begun[0].0);
        let resize = lane.next().unwrap();
        assert_eq!(resize.1, "resize a");
        lane.done(begun[1].0);
        assert!(lane.next().is_none(), "pause waits, and c behind it");
        lane.done(resize.0);
        let pause = lane.next().unwrap();
        assert_eq!(pause.1, "pause");
        assert!(lane.next().is_none());
        lane.done(pause.0);
        assert_eq!(lane.next().unwrap().1, "run c");
    }

    #[test]
    fn a_signal_overtakes_while_the_container_is_being_stopped() {
        let mut lane = Lane::default();
        lane.push(Class::Interruptible, "stop");
        lane.push(Class::Whole, "start");
        lane.push(Class::Signal(None), "kill");
        let begun = begin_all(&mut lane);
        assert_eq!(
            begun.iter().map(|(_, job)| *job).collect::<Vec<_>>(),
            ["stop", "kill"]
        );
        lane.done(begun[0].0);
        assert!(lane.next().is_none(), "start waits for the signal too");
        lane.done(begun[1].0);
        assert_eq!(lane.next().unwrap().1, "start");
    }

    #[test]
    fn a_stop_that_goes_on_as_a_start_lets_no_signal_in() {
        let mut lane = Lane::default();
        lane.push(Class::Interruptible, "restart");
        let (restart, _) = lane.next().unwrap();
        lane.reclass(restart, Class::Whole);
        lane.push(Class::Signal(None), "kill");
        assert!(lane.next().is_none());
        lane.done(restart);
        assert_eq!(lane.next().unwrap().1, "kill");
    }

    #[test]
    fn a_signal_waits_for_a_whole_change() {
        let mut lane = Lane::default();
        let create = lane.begin(Class::Whole);
        lane.push(Class::Signal(None), "kill");
        assert!(lane.next().is_none());
        lane.done(create);
        assert_eq!(lane.next().unwrap().1, "kill");
        lane.push(Class::Whole, "delete");
        assert_eq!(lane.drain().collect::<Vec<_>>(), ["delete"]);
    }
}
