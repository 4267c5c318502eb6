use proptest::prelude::*;

use super::*;

const PID: u32 = 7;

/// What it becomes by these inputs; those that change nothing are passed over.
fn after(mut state: State, inputs: impl IntoIterator<Item = Input>) -> State {
    for input in inputs {
        state = state.after(input).unwrap_or(state);
    }
    state
}

fn home() -> State {
    State::new(false)
}

fn ready() -> State {
    let booted = Input::Booted {
        reboots: 0,
        boot: Boot::Ready,
    };
    after(home(), [Input::PoweredOn { pid: PID }, booted])
}

#[test]
fn a_machine_is_powered_on_boots_and_ends() {
    let on = home().after(Input::PoweredOn { pid: PID }).unwrap();
    assert_eq!(on.pid(), Some(PID));
    assert_eq!(on.after(Input::PoweredOn { pid: 8 }), None, "it is on");
    let ready = ready();
    assert!(matches!(
        ready.power,
        Power::On {
            boot: Boot::Ready,
            ..
        }
    ));
    let ended = ready.after(Input::Ended(Ending::CleanShutdown)).unwrap();
    assert_eq!(ended.power, Power::Off(Some(Ending::CleanShutdown)));
    assert_eq!(ended.pid(), None);
}

#[test]
fn the_end_of_an_earlier_boot_is_not_that_of_this_one() {
    let rebooted = ready().after(Input::Rebooted).unwrap();
    assert!(matches!(
        rebooted.power,
        Power::On {
            boot: Boot::Booting,
            ..
        }
    ));
    let failed = |reboots| Input::Booted {
        reboots,
        boot: Boot::Failed("timeout".into()),
    };
    assert_eq!(rebooted.after(failed(0)), None);
    assert!(rebooted.after(failed(1)).is_some());
    let off = after(rebooted, [Input::Ended(Ending::Crashed)]);
    assert_eq!(off.after(failed(1)), None, "it is off");
}

#[test]
fn the_first_signal_that_ends_it_counts_until_it_is_off() {
    let ending = after(ready(), [Input::EndAsked(15), Input::EndAsked(9)]);
    assert_eq!(ending.ended_by(), Some(15));
    let rebooted = after(ending, [Input::Rebooted]);
    assert_eq!(rebooted.ended_by(), Some(15), "a reboot does not undo it");
    let again = after(
        rebooted,
        [Input::Ended(Ending::Destroyed), Input::PoweredOn { pid: 8 }],
    );
    assert_eq!(again.ended_by(), None);
    assert_eq!(
        home().after(Input::EndAsked(9)),
        None,
        "there is nothing to end"
    );
}

#[test]
fn what_is_off_or_boots_anew_is_not_suspended() {
    let suspended = ready().after(Input::Suspended).unwrap();
    assert!(suspended.is_suspended());
    for input in [
        Input::Resumed,
        Input::Rebooted,
        Input::Ended(Ending::Destroyed),
    ] {
        assert!(!after(suspended.clone(), [input]).is_suspended());
    }
    assert_eq!(home().after(Input::Suspended), None);
}

#[test]
fn a_target_waits_prepares_runs_and_is_home() {
    let waiting = State::new(true);
    assert!(waiting.is_waiting());
    assert_eq!(waiting.after(Input::PoweredOn { pid: PID }), None);
    assert_eq!(
        waiting.after(Input::Arrived { pid: PID }),
        None,
        "nothing came"
    );
    let running = after(
        waiting,
        [Change::Arriving, Change::Resumed].map(Input::Arrival),
    );
    assert_eq!(running.role, Role::Arriving(Arriving::Running));
    let arrived = running.after(Input::Arrived { pid: PID }).unwrap();
    assert_eq!(arrived.role, Role::Home);
    assert!(matches!(
        arrived.power,
        Power::On {
            pid: PID,
            boot: Boot::Ready,
            ..
        }
    ));
    assert_eq!(arrived.after(Input::Arrival(Change::Started)), None);
}

#[test]
fn a_target_whose_source_fails_says_why() {
    let failed = |changes: &[Change]| {
        let role = after(
            State::new(true),
            changes.iter().copied().map(Input::Arrival),
        )
        .role;
        match role {
            Role::Arriving(Arriving::Failed(why)) => why,
            role => panic!("{role:?}"),
        }
    };
    let crashed = Change::Stopped(Ending::Crashed);
    assert!(failed(&[Change::Arriving, crashed]).contains("gave up"));
    assert!(failed(&[Change::Undefined]).contains("definition"));
}

#[test]
fn a_source_leaves_once_and_comes_back_or_has_moved() {
    let leaving = ready().after(Input::Leaves).unwrap();
    assert_eq!(leaving.after(Input::Leaves), None, "one at a time");
    assert!(!leaving.leaves(), "its end here is still an end");
    let moving = leaving.after(Input::Moves).unwrap();
    assert!(moving.leaves());
    assert_eq!(after(moving.clone(), [Input::StaysHere]), ready());
    let moved = after(
        moving,
        [
            Input::PostCopy(true),
            Input::LinkIs(Link::LetGo),
            Input::HasMoved,
        ],
    );
    assert_eq!(moved.power, Power::Off(Some(Ending::Migrated)));
    assert!(moved.has_moved() && moved.has_let_go() && !moved.is_handed_over());
    let told = moved.after(Input::LinkIs(Link::HandedOver)).unwrap();
    assert!(told.is_handed_over());
    for input in [
        Input::Leaves,
        Input::StaysHere,
        Input::PoweredOn { pid: 8 },
        Input::Arrival(Change::Started),
    ] {
        assert_eq!(told.after(input.clone()), None, "{input:?}");
    }
}

#[test]
fn a_migration_cancelled_before_it_begins_does_not_begin() {
    let cancelled = after(ready(), [Input::Leaves, Input::Cancelled]);
    assert_eq!(cancelled.after(Input::Moves), None);
    let next = after(cancelled, [Input::StaysHere, Input::Leaves]);
    assert!(
        next.after(Input::Moves).is_some(),
        "the next one is not cancelled"
    );
    assert_eq!(
        ready().after(Input::Cancelled),
        None,
        "there is nothing to cancel"
    );
}

fn inputs() -> impl Strategy<Value = Input> {
    let boots = prop_oneof![
        Just(Boot::Ready),
        Just(Boot::Booting),
        Just(Boot::Failed("no".into()))
    ];
    let endings = prop_oneof![
        Just(Ending::CleanShutdown),
        Just(Ending::Crashed),
        Just(Ending::Migrated)
    ];
    let changes = prop_oneof![
        Just(Change::Arriving),
        Just(Change::Started),
        Just(Change::Resumed),
        Just(Change::Stopped(Ending::Crashed)),
        Just(Change::Undefined),
    ];
    let links = prop_oneof![Just(Link::LetGo), Just(Link::HandedOver)];
    prop_oneof![
        (1u32..9).prop_map(|pid| Input::PoweredOn { pid }),
        (0u64..3, boots).prop_map(|(reboots, boot)| Input::Booted { reboots, boot }),
        Just(Input::Rebooted),
        Just(Input::Suspended),
        Just(Input::Resumed),
        (1i32..32).prop_map(Input::EndAsked),
        endings.prop_map(Input::Ended),
        changes.prop_map(Input::Arrival),
        (1u32..9).prop_map(|pid| Input::Arrived { pid }),
        Just(Input::StopsWaiting),
        Just(Input::Leaves),
        Just(Input::Moves),
        Just(Input::Cancelled),
        any::<bool>().prop_map(Input::PostCopy),
        links.prop_map(Input::LinkIs),
        Just(Input::StaysHere),
        Just(Input::HasMoved),
        Just(Input::Deleted),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_state_makes_sense(
        waits in any::<bool>(),
        inputs in proptest::collection::vec(inputs(), 0..60),
    ) {
        let mut state = State::new(waits);
        for input in inputs {
            let Some(next) = state.after(input.clone()) else { continue };
            prop_assert_ne!(&next, &state, "a change that changes nothing: {:?}", input);
            prop_assert!(next.reboots >= state.reboots);
            // What has moved, or is deleted, neither comes back nor runs here.
            if state.has_moved() {
                prop_assert!(next.has_moved() || next.role == Role::Deleted, "{:?}", input);
                prop_assert!(next.is_off());
            }
            if state.role == Role::Deleted {
                prop_assert_eq!(&next.role, &Role::Deleted);
            }
            // A target is on only once it is the pod's.
            if next.is_waiting() {
                prop_assert!(next.is_off(), "{next:?}");
            }
            // A boot begins only by a power-on, a reboot, or an arrival.
            if state.is_off() && !next.is_off() {
                prop_assert!(
                    matches!(input, Input::PoweredOn { .. } | Input::Arrived { .. }),
                    "{input:?}"
                );
            }
            // The streams are handed over only after the link was let go, or with it.
            if next.is_handed_over() {
                prop_assert!(next.has_let_go());
            }
            state = next;
        }
    }
}
