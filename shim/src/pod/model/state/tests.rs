use super::*;

const KILL: Request = Request::Kill { ends: true };
const POKE: Request = Request::Kill { ends: false };

fn all_states() -> Vec<State> {
    vec![
        State::Created,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Stopped,
        State::Migrating,
        State::Incoming,
        State::Exited(3),
        State::Migrated,
        State::Failed("no kernel".into()),
    ]
}

const ALL_REQUESTS: [Request; 15] = [
    Request::Create,
    Request::Run,
    Request::Stop,
    Request::Start,
    Request::Pause,
    Request::Resume,
    Request::Restart { force: false },
    Request::Restart { force: true },
    KILL,
    POKE,
    Request::Delete,
    Request::Exec,
    Request::Update,
    Request::Migrate,
    Request::CancelMigration,
];

/// One letter for each answer, in the order of [`ALL_REQUESTS`]: the product's table.
fn letter(answer: &Result<Step, Refusal>) -> char {
    match answer {
        Ok(Step::AlreadySo) => '=',
        Ok(Step::Run | Step::RunAgain) => 'r',
        Ok(Step::Stop) => 's',
        Ok(Step::Freeze) => 'f',
        Ok(Step::Thaw) => 't',
        Ok(Step::Restart { force: false }) => 'b',
        Ok(Step::Restart { force: true }) => 'B',
        Ok(Step::Signal) => 'k',
        Ok(Step::ThawAndSignal) => 'T',
        Ok(Step::EndStopping | Step::EndKept) => 'e',
        Ok(Step::CancelAndSignal) => 'C',
        Ok(Step::Remove) => 'd',
        Ok(Step::Exec) => 'x',
        Ok(Step::Update) => 'u',
        Ok(Step::Migrate) => 'm',
        Ok(Step::CancelMigration) => 'c',
        Err(refusal) => match refusal.class {
            RefusalClass::Precondition => '-',
            RefusalClass::NoProcess => '0',
            RefusalClass::Exists => '!',
        },
    }
}

#[test]
fn every_pair_of_state_and_request_is_answered_as_the_table_says() {
    //  Create Run Stop Start Pause Resume restart Restart KILL POKE Delete Exec Update Migrate Cancel
    let table = [
        ("created", "!r------kkdxu--"),
        ("running", "!-s=f=bBkk-xum-"),
        ("paused", "!---=t--Tk--u--"),
        ("stopping", "!-=-----ek-----"),
        ("stopped", "!-=r----e0d----"),
        ("migrating", "!-------Ck----c"),
        ("incoming", "!-------e0-----"),
        ("exited", "!-------00d----"),
        ("migrated", "!-------00d----"),
        ("failed", "!-------00d----"),
    ];
    for (state, (name, row)) in all_states().iter().zip(table) {
        assert_eq!(outside(state).name, name);
        let answers: String = ALL_REQUESTS
            .iter()
            .map(|request| letter(&decide(state, *request)))
            .collect();
        assert_eq!(answers, row, "state {name}");
    }
}

#[test]
fn a_refusal_names_the_state_and_the_way_out() {
    let text = |state: State, request| decide(&state, request).unwrap_err().to_string();
    assert_eq!(
        text(State::Stopped, Request::Exec),
        "cannot exec in a task that is stopped and kept: start it first"
    );
    assert_eq!(
        text(State::Paused, Request::Stop),
        "cannot stop a task that is paused: resume it first"
    );
    assert_eq!(
        text(State::Failed("no kernel".into()), Request::Start),
        "cannot start a task that has failed (no kernel): it can only be deleted"
    );
    for state in all_states() {
        for request in ALL_REQUESTS {
            if let Err(refusal) = decide(&state, request)
                && refusal.class == RefusalClass::Precondition
                && !(state == State::Running && request == Request::Run)
            {
                assert!(!refusal.way_out.is_empty(), "{state:?} {request:?}");
            }
        }
    }
}

#[test]
fn cri_sees_only_states_that_survive_a_restart_of_containerd() {
    for state in all_states() {
        let status = status(&state, true);
        assert_ne!(status, TaskStatus::Paused, "{state:?}");
        // What CRI is told matches what it shows.
        let shown = match status {
            TaskStatus::Created => "CREATED",
            TaskStatus::Running | TaskStatus::Paused => "RUNNING",
            TaskStatus::Stopped => "EXITED",
        };
        assert_eq!(outside(&state).cri, shown, "{state:?}");
    }
    assert_eq!(status(&State::Paused, false), TaskStatus::Paused);
    assert_eq!(status(&State::Stopped, false), TaskStatus::Stopped);
}

#[test]
fn every_running_phase_belongs_to_a_running_cri_state_and_back() {
    for state in all_states() {
        let row = outside(&state);
        assert_eq!(
            row.pod_phase == "Running",
            row.cri == "RUNNING",
            "{state:?}"
        );
        assert_eq!(
            row.pod_phase == "Pending",
            row.cri == "CREATED",
            "{state:?}"
        );
    }
    assert_eq!(outside(&State::Exited(0)).pod_phase, "Succeeded");
    assert_eq!(outside(&State::Exited(1)).pod_phase, "Failed");
}

#[test]
fn a_paused_machine_makes_its_containers_paused_but_not_the_ended_ones() {
    assert_eq!(
        effective(State::Running, Some(&State::Paused)),
        State::Paused
    );
    assert_eq!(
        effective(State::Running, Some(&State::Running)),
        State::Running
    );
    assert_eq!(
        effective(State::Exited(1), Some(&State::Paused)),
        State::Exited(1)
    );
    assert_eq!(effective(State::Paused, None), State::Paused);
    assert_eq!(
        effective(State::Running, Some(&State::Exited(0))),
        State::Running,
        "its own exit is on its way"
    );
}

#[test]
fn signals_that_ask_for_the_end_are_known() {
    for signal in [9, 15, 2, 3, 1, 37] {
        assert!(signal_ends(signal), "{signal}");
    }
    for signal in [10, 12, 17, 18, 19, 28] {
        assert!(!signal_ends(signal), "{signal}");
    }
}
