//! docs/lifecycle.md prints the table of states that the code uses.

use dyad_shim::pod::state::{State, outside};

#[test]
fn the_page_has_a_row_for_every_state() {
    let page = include_str!("../../docs/lifecycle.md");
    let states = [
        State::Created,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Stopped,
        State::Migrating,
        State::Incoming,
        State::Exited(0),
        State::Exited(1),
        State::Migrated,
        State::Failed(String::new()),
    ];
    for state in states {
        let seen = outside(&state);
        let row = format!(
            "| {} | {:?} | {:?} | {} | {} | {} |",
            seen.name, seen.cri_status, seen.status, seen.cri, seen.pod_phase, seen.libvirt
        );
        assert!(
            page.contains(&row),
            "docs/lifecycle.md lacks this row:\n{row}"
        );
    }
}
