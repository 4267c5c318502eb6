//! The source's side of a migration, as a pure state machine: what came in, what to do.
//!
//! ```text
//!   Asked      checked        fence is up         sent: moved
//!  ------> Checking ---> Fencing ------> Sending ------------> Moved    (fence settled)
//!             |             |            |  ^ |  `-----------> Lost     (fence stays)
//!             | refused     | not        |  | | failed
//!             v             v            |  | `--------------> Here     (fence lifted)
//!            Here          Here          |  `- cannot cancel any more
//!                                        v
//!                                    Cancelling ---> Here | Moved | Lost
//! ```
//! **Exactly one.** The fence is up before the backend may give the pod away, and is
//! lifted only on the backend's word that the pod runs here. Whatever dies in between
//! leaves the fence up. A cancellation asks the backend; only `send`'s own answer decides.

use dyad_runtime_handler::migration::TimeoutAction;

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The backend looks for what forbids it.
    Checking,
    /// The tombstone is being written.
    Fencing,
    /// The backend moves the pod.
    Sending,
    /// So, and it was told to give up.
    Cancelling,
    /// Over: the pod runs here.
    Here,
    /// Over: it runs there.
    Moved,
    /// Over: it runs nowhere.
    Lost,
}

impl Phase {
    /// Whether it has ended.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Here | Self::Moved | Self::Lost)
    }
}

/// What came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The backend's check: nothing forbids it, or something does.
    Checked(bool),
    /// The tombstone is on disk, or is not.
    Fenced(bool),
    /// `send` answered: it runs there.
    SentMoved,
    /// `send` answered: it runs nowhere.
    SentLost,
    /// `send` answered: it runs here.
    SendFailed,
    /// Somebody wants it given up (also by killing the pod).
    Cancel,
    /// The backend said that it cannot be given up any more.
    CannotCancel,
    /// It has taken as long as it may.
    TimedOut(TimeoutAction),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Tell the asker that it is under way, the pod is Migrating; write the tombstone.
    PutFence,
    /// Ask the backend to move the pod.
    Send,
    /// Ask the backend to give up.
    Cancel,
    /// Ask the backend to bring it to an end: run it there, fetch the rest.
    PostCopy,
    /// Ask the backend to bring it to an end: stop it here.
    Pause,
    /// Tell the asker why not; nothing has changed.
    Refuse,
    /// Take the tombstone away; the pod is Running.
    GoOn,
    /// Mark the tombstone as settled; the pod is Migrated, its tasks exit with 0.
    EndMoved,
    /// The pod has failed.
    EndLost,
    /// Tell who wants to cancel that it cannot be.
    RefuseCancel,
}

/// The next phase and what to do, in order.
pub fn step(phase: Phase, input: Input) -> (Phase, &'static [Action]) {
    use Action as A;
    use Input as I;
    use Phase as P;
    match (phase, input) {
        (P::Checking, I::Checked(true)) => (P::Fencing, &[A::PutFence]),
        (P::Checking, I::Checked(false) | I::Cancel | I::TimedOut(_)) => (P::Here, &[A::Refuse]),
        (P::Fencing, I::Fenced(true)) => (P::Sending, &[A::Send]),
        // One that could not be written may still be there in part.
        (P::Fencing, I::Fenced(false) | I::Cancel) => (P::Here, &[A::GoOn]),
        (P::Sending | P::Cancelling, I::SentMoved) => (P::Moved, &[A::EndMoved]),
        (P::Sending | P::Cancelling, I::SentLost) => (P::Lost, &[A::EndLost]),
        (P::Sending | P::Cancelling, I::SendFailed) => (P::Here, &[A::GoOn]),
        (P::Sending, I::Cancel | I::TimedOut(TimeoutAction::Abort)) => {
            (P::Cancelling, &[A::Cancel])
        }
        (P::Sending, I::TimedOut(TimeoutAction::PostCopy)) => (P::Sending, &[A::PostCopy]),
        (P::Sending, I::TimedOut(TimeoutAction::Pause)) => (P::Sending, &[A::Pause]),
        (P::Cancelling, I::CannotCancel) => (P::Sending, &[A::RefuseCancel]),
        // Asked twice, late, or of what is not under way.
        (phase, _) => (phase, &[]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ways_of_a_migration() {
        use Input as I;
        use Phase as P;
        let ways: [(&[I], P); 8] = [
            (&[I::Checked(false)], P::Here),
            (&[I::Checked(true), I::Fenced(false)], P::Here),
            (&[I::Checked(true), I::Fenced(true), I::SentMoved], P::Moved),
            (&[I::Checked(true), I::Fenced(true), I::SendFailed], P::Here),
            (&[I::Checked(true), I::Fenced(true), I::SentLost], P::Lost),
            (
                &[I::Checked(true), I::Fenced(true), I::Cancel, I::SendFailed],
                P::Here,
            ),
            (
                // Too late: what the backend answers counts.
                &[I::Checked(true), I::Fenced(true), I::Cancel, I::SentMoved],
                P::Moved,
            ),
            (
                &[
                    I::Checked(true),
                    I::Fenced(true),
                    I::Cancel,
                    I::CannotCancel,
                    I::SentMoved,
                ],
                P::Moved,
            ),
        ];
        for (inputs, end) in ways {
            let phase = inputs
                .iter()
                .fold(P::Checking, |phase, input| step(phase, *input).0);
            assert_eq!(phase, end, "{inputs:?}");
        }
    }

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let one = prop_oneof![
            any::<bool>().prop_map(Input::Checked),
            any::<bool>().prop_map(Input::Fenced),
            Just(Input::SentMoved),
            Just(Input::SentLost),
            Just(Input::SendFailed),
            Just(Input::Cancel),
            Just(Input::CannotCancel),
            prop_oneof![
                Just(TimeoutAction::Abort),
                Just(TimeoutAction::PostCopy),
                Just(TimeoutAction::Pause)
            ]
            .prop_map(Input::TimedOut),
        ];
        prop::collection::vec(one, 0..12)
    }

    proptest! {
        /// The model: a fence, and a pod that the backend may have given away.
        #[test]
        fn it_never_runs_twice_and_never_without_a_fence(inputs in inputs()) {
            let mut phase = Phase::Checking;
            let (mut fence, mut given, mut ends) = (false, false, 0);
            for input in inputs {
                let (next, actions) = step(phase, input);
                prop_assert!(!phase.is_over() || (next == phase && actions.is_empty()));
                for action in actions {
                    match action {
                        Action::PutFence => fence = true,
                        Action::Send => {
                            prop_assert!(fence, "given away without a fence");
                            prop_assert!(!given, "sent twice");
                            given = true;
                        }
                        Action::GoOn => {
                            // Here again only on the backend's word, or before it was asked.
                            prop_assert!(!given || input == Input::SendFailed);
                            fence = false;
                            ends += 1;
                        }
                        Action::EndMoved | Action::EndLost => {
                            prop_assert!(given && fence);
                            ends += 1;
                        }
                        Action::Refuse => {
                            prop_assert!(!given && !fence);
                            ends += 1;
                        }
                        Action::Cancel | Action::PostCopy | Action::Pause | Action::RefuseCancel => {
                            prop_assert!(given);
                        }
                    }
                }
                phase = next;
            }
            prop_assert_eq!(ends, usize::from(phase.is_over()));
        }
    }
}
