//! Any events, in any order.

use proptest::prelude::*;

use super::*;

/// What may happen, chosen by three numbers.
fn happen(world: &mut World, (what, which, how): (u8, u8, u8)) {
    let id = [POD, "c", "d"][usize::from(which) % 3];
    let exec = ["e", "f"][usize::from(how) % 2];
    let force = how % 2 == 0;
    let operation = || match how % 5 {
        0 => Operation::Pause,
        1 => Operation::Resume,
        2 => Operation::Stop { grace: GRACE },
        3 => Operation::Start,
        _ => Operation::Restart {
            force: which % 2 == 0,
            grace: GRACE,
        },
    };
    let signal = match how % 3 {
        0 => libc::SIGKILL,
        1 => libc::SIGTERM,
        _ => libc::SIGUSR1,
    };
    world.at += Duration::from_millis(u64::from(how));
    match what % 24 {
        0 => {
            let role = if id == POD {
                Role::Sandbox
            } else {
                Role::Container
            };
            world.create(id, role, how > 220, None);
        }
        1 | 2 => world.init(id, InitChange::Run),
        3 | 4 => world.init(id, InitChange::Signal { signal, all: force }),
        5 => world.init(id, InitChange::Delete),
        6 => world.operate(operation(), id),
        7 => world.operate(operation(), ""),
        8 => {
            let resources = Resources {
                linux: oci_spec::runtime::LinuxResources::default(),
                annotations: BTreeMap::new(),
            };
            world.init(id, InitChange::Update(Box::new(resources)));
        }
        9 => {
            let request = ExecRequest {
                exec_id: exec.into(),
                process: oci_spec::runtime::Process::default(),
                stdio: StdioUris::default(),
            };
            world.exec(id, exec, ExecChange::Add(Box::new(request)));
        }
        10 => world.exec(id, exec, ExecChange::Run),
        11 => world.exec(id, exec, ExecChange::Signal(signal)),
        12 => world.exec(id, exec, ExecChange::Delete),
        13 => world.exec(id, exec, ExecChange::CloseStdin),
        14 => world.migrate(),
        15 => {
            let token = world.token();
            world.step(Input::CancelMigration(token));
        }
        16 => {
            let event = match how % 4 {
                0 => MachineEvent::Suspended,
                1 => MachineEvent::Resumed,
                2 => MachineEvent::Rebooted,
                _ => MachineEvent::Crashed,
            };
            world.step(Input::Machine(event));
        }
        17 => world.step(Input::OutOfMemory(id.into())),
        18 => {
            let alive: Vec<ProcessId> = world.alive.iter().cloned().collect();
            if let Some(process) = alive.get(usize::from(which) % alive.len().max(1)) {
                world.kill(process);
                world.tell_exits();
            }
        }
        _ if !world.calls.is_empty() => {
            let index = usize::from(which) % world.calls.len();
            let call = world.calls.remove(index);
            world.end(call, how % 4 != 0, force);
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_comes_in_whatever_order_the_pod_comes_to_rest(
        is_machine: bool,
        begins_running: bool,
        events in prop::collection::vec(any::<(u8, u8, u8)>(), 1..80),
    ) {
        let kind = if is_machine { Kind::Machine } else { Kind::Container };
        let mut world = match begins_running {
            true => World::running(kind),
            false => World::new(kind),
        };
        for event in events {
            happen(&mut world, event);
        }
        world.settle();
        world.check_at_rest();
    }

    #[test]
    fn every_pod_can_be_ended_and_deleted(
        is_machine: bool,
        events in prop::collection::vec(any::<(u8, u8, u8)>(), 1..60),
    ) {
        let kind = if is_machine { Kind::Machine } else { Kind::Container };
        let mut world = World::running(kind);
        for event in events {
            happen(&mut world, event);
        }
        world.settle();
        for id in ["c", "d", POD] {
            let signal = libc::SIGKILL;
            world.init(id, InitChange::Signal { signal, all: true });
            world.settle();
            world.init(id, InitChange::Delete);
            world.settle();
        }
        prop_assert!(world.model.tasks.is_empty(), "{:?}", world.refusals);
        prop_assert!(!world.is_shut_down);
        let token = world.token();
        world.step(Input::Shutdown(token));
        prop_assert!(world.is_shut_down);
    }
}
