//! What a walk found once, and what it cannot say.

use super::*;
use crate::pod::state::{TaskStatus, outside};

const REQUESTS: [fn() -> InitChange; 4] = [
    || InitChange::Stop { grace: GRACE },
    || InitChange::Start,
    || InitChange::Pause,
    || InitChange::Resume,
];

#[test]
fn asked_again_it_is_so_already() {
    for kind in [Kind::Container, Kind::Machine] {
        for before in REQUESTS {
            for change in REQUESTS {
                let mut world = World::running(kind);
                world.init(POD, before());
                world.settle();
                world.refusals.clear();
                world.init(POD, change());
                world.settle();
                if !world.refusals.is_empty() {
                    continue;
                }
                let state = world.state(POD);
                world.init(POD, change());
                assert!(world.calls.is_empty(), "{:?}", world.calls);
                assert_eq!((world.state(POD), world.refusals.len()), (state, 0));
            }
        }
    }
}

#[test]
fn a_pause_that_was_asked_for_is_told_so_whoever_tells_first() {
    for event_first in [true, false] {
        let mut world = World::running(Kind::Machine);
        let asked = (State::Paused, "asked for".to_owned());
        world.init(POD, InitChange::Pause);
        if event_first {
            world.step(Input::Machine(MachineEvent::Suspended));
            assert_eq!(world.states[POD], asked);
        }
        world.settle();
        world.step(Input::Machine(MachineEvent::Suspended));
        assert_eq!(world.states[POD], asked);
        world.init(POD, InitChange::Resume);
        world.step(Input::Machine(MachineEvent::Resumed));
        world.settle();
        assert_eq!(world.states[POD], (State::Running, "asked for".to_owned()));
        // One that nobody asked for.
        world.step(Input::Machine(MachineEvent::Suspended));
        let outside = (State::Paused, "its machine was suspended".to_owned());
        assert_eq!(world.states[POD], outside);
    }
}

#[test]
fn want_of_memory_is_told_of_this_pods_containers_once_a_second() {
    let mut world = World::running(Kind::Machine);
    for _ in 0..100 {
        for id in ["c", "somebody-elses", POD] {
            world.step(Input::OutOfMemory(id.into()));
        }
    }
    assert_eq!(world.oom, ["c", POD]);
    world.at += OOM_INTERVAL;
    world.step(Input::OutOfMemory("c".into()));
    assert_eq!(world.oom, ["c", POD, "c"]);
}

#[test]
fn a_kill_in_a_paused_machine_waits_for_its_lane_and_resumes_it() {
    let mut world = World::running(Kind::Machine);
    world.step(Input::Machine(MachineEvent::Suspended));
    // Somebody resumes the machine in this very moment.
    world.init(POD, InitChange::Resume);
    let kill = || InitChange::Signal {
        signal: libc::SIGKILL,
        all: false,
    };
    world.init("c", kill());
    assert_eq!(world.calls.len(), 1, "{:?}", world.calls);
    world.settle();
    assert_eq!(world.state("c"), Some(State::Exited(137)));
    assert_eq!(world.state(POD), Some(State::Running));
}

#[test]
fn a_migration_cancelled_while_its_fence_is_put_up_lifts_it_again() {
    let mut world = World::running(Kind::Container);
    world.migrate();
    let check = world.calls.remove(0);
    world.end(check, true, false);
    assert!(matches!(world.calls[..], [Call::PutFence(_)]));
    let token = world.token();
    world.step(Input::CancelMigration(token));
    assert!(
        matches!(world.calls[..], [Call::PutFence(_)]),
        "first it must be there"
    );
    let put = world.calls.remove(0);
    world.end(put, true, false);
    assert!(matches!(world.calls[..], [Call::LiftFence(_)]));
    world.settle();
    assert_eq!(world.refusals, ["it was cancelled"]);
    assert_eq!(world.state("c"), Some(State::Running));
    world.check_at_rest();
}

#[test]
fn a_second_migration_waits_for_the_check_of_one_that_was_given_up() {
    let mut world = World::running(Kind::Container);
    world.migrate();
    let token = world.token();
    world.step(Input::CancelMigration(token));
    world.migrate();
    assert!(
        world.refusals[1].contains("is being checked"),
        "{:?}",
        world.refusals
    );
    world.settle();
    world.migrate();
    world.settle();
    assert_eq!(world.state("c"), Some(State::Migrated));
}

#[test]
fn a_pod_behind_the_fence_is_not_made() {
    let mut world = World::new(Kind::Container);
    let tombstone = Tombstone {
        containerd_namespace: "k8s.io".into(),
        sandbox_id: POD.into(),
        pod_uid: "u".into(),
        pod: "default/web".into(),
        destination: "tls://node2".into(),
        settled: true,
        unix_s: 0,
    };
    world.create(POD, Role::Sandbox, false, Some(tombstone));
    assert!(world.refusals[0].contains("must not run here again"));
    assert!(world.model.tasks.is_empty() && world.calls.is_empty());
}

/// A pod in each state that a sandbox can be in.
fn in_every_state() -> Vec<World> {
    let mut worlds = vec![World::new(Kind::Machine)];
    worlds[0].create(POD, Role::Sandbox, false, None);
    worlds[0].settle();
    for change in [
        None,
        Some(InitChange::Pause),
        Some(InitChange::Stop { grace: GRACE }),
    ] {
        let mut world = World::running(Kind::Machine);
        if let Some(change) = change {
            world.init(POD, change);
            world.settle();
        }
        worlds.push(world);
    }
    let mut stopping = World::running(Kind::Machine);
    stopping.init(POD, InitChange::Stop { grace: GRACE });
    worlds.push(stopping);
    let mut exited = World::running(Kind::Machine);
    exited.kill(&ProcessId::init(POD));
    exited.tell_exits();
    worlds.push(exited);
    let mut migrated = World::running(Kind::Machine);
    migrated.migrate();
    migrated.settle();
    worlds.push(migrated);
    let mut migrating = World::running(Kind::Machine);
    migrating.migrate();
    for _ in 0..2 {
        let call = migrating.calls.remove(0);
        migrating.end(call, true, false);
    }
    worlds.push(migrating);
    let mut incoming = World::new(Kind::Machine);
    incoming.create(POD, Role::Sandbox, true, None);
    incoming.settle();
    incoming.init(POD, InitChange::Run);
    let call = incoming.calls.remove(0);
    incoming.end(call, true, false);
    worlds.push(incoming);
    let mut failed = World::new(Kind::Machine);
    failed.create(POD, Role::Sandbox, false, None);
    failed.settle();
    failed.init(POD, InitChange::Run);
    let call = failed.calls.remove(0);
    failed.end(call, false, false);
    worlds.push(failed);
    worlds
}

#[test]
fn every_state_is_reached_and_has_a_way_to_be_gone() {
    let mut names = BTreeSet::new();
    for mut world in in_every_state() {
        let state = world.state(POD).unwrap();
        names.insert(outside(&state).name);
        let shown = state::status(&state, true);
        assert_ne!(shown, TaskStatus::Paused);
        let signal = libc::SIGKILL;
        for id in ["c", POD] {
            world.init(id, InitChange::Signal { signal, all: true });
            if let Some(place) = world
                .calls
                .iter()
                .position(|call| matches!(call, Call::Send(..)))
            {
                // A cancelled migration ends with the pod here.
                let send = world.calls.remove(place);
                world.end(send, false, false);
            }
            world.settle();
            world.init(id, InitChange::Delete);
            world.settle();
        }
        assert!(
            world.model.tasks.is_empty(),
            "{state:?}: {:?}",
            world.refusals
        );
    }
    assert_eq!(names.len(), 10, "{names:?}");
}
