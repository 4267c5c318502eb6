use proptest::prelude::*;

use super::*;
use Observed::{Absent, Off, Paused, Running};

const OFF: Observed = Off(Ending::Destroyed);
const CRASHED: Observed = Off(Ending::Crashed);
const MIGRATED: Observed = Off(Ending::Migrated);

fn sight(here: Option<Observed>, there: Option<Observed>, waited_s: u64) -> Sight {
    Sight {
        here,
        there,
        is_done: false,
        post_copy: false,
        in_halves: Some(false),
        waited: Duration::from_secs(waited_s),
    }
}

#[test]
fn each_pair_of_answers_has_its_verdict() {
    use Verdict::*;
    let unknown = Nowhere(Reason::Unknown);
    let off = Nowhere(Reason::OffOnBothSides);
    for (here, there, at_once, after_standstill, too_late) in [
        (Some(Running), Some(Paused), Here, Here, Here),
        (Some(Running), None, Here, Here, Here),
        (Some(Paused), Some(Running), EndHere, EndHere, EndHere),
        (Some(Paused), Some(Paused), Wait, Wait, unknown),
        (Some(Paused), Some(OFF), Wait, Resume, Resume),
        (Some(Paused), Some(Absent), Wait, Resume, Resume),
        (Some(Paused), None, Wait, Wait, unknown),
        (Some(MIGRATED), Some(Running), There, There, There),
        (Some(CRASHED), Some(Running), There, There, There),
        (Some(Absent), Some(Running), There, There, There),
        (Some(CRASHED), Some(OFF), Wait, off, off),
        (Some(Absent), Some(Absent), Wait, off, off),
        (Some(CRASHED), Some(Paused), Wait, Wait, unknown),
        (Some(CRASHED), None, Wait, Wait, unknown),
        (None, Some(Running), Wait, Wait, unknown),
        (None, None, Wait, Wait, unknown),
    ] {
        for (waited, wanted) in [(0, at_once), (6, after_standstill), (31, too_late)] {
            let seen = sight(here, there, waited);
            assert_eq!(decide(seen), wanted, "{seen:?}");
        }
    }
}

#[test]
fn a_migration_that_succeeded_needs_no_other_answer() {
    for (here, is_done, wanted) in [
        (Some(MIGRATED), true, Some(Verdict::There)),
        (Some(Absent), true, Some(Verdict::There)),
        (Some(Running), false, Some(Verdict::Here)),
        // libvirt says both: look there.
        (Some(Running), true, None),
        (Some(MIGRATED), false, None),
        (Some(Paused), true, None),
        (None, true, None),
    ] {
        assert_eq!(from_here(here, is_done), wanted, "{here:?} {is_done}");
    }
}

#[test]
fn after_post_copy_nothing_goes_on_here() {
    use Verdict::*;
    let halves = Nowhere(Reason::Halves);
    for (here, there, in_halves, at_once, after_standstill) in [
        // Its memory is on its way, for as long as it takes.
        (Paused, Running, Some(true), WaitAnew, WaitAnew),
        (CRASHED, Running, Some(true), EndThere, EndThere),
        (CRASHED, Paused, Some(true), EndThere, EndThere),
        (MIGRATED, Running, Some(true), There, There),
        (Paused, Running, Some(false), EndHere, EndHere),
        (Paused, OFF, Some(false), Wait, halves),
        (Paused, Paused, Some(true), Wait, halves),
        // The other side did not say: what is here may be the missing half.
        (Paused, Running, None, Wait, Wait),
        (CRASHED, Running, None, Wait, Wait),
    ] {
        for (waited, wanted) in [(0, at_once), (6, after_standstill)] {
            let seen = Sight {
                post_copy: true,
                in_halves,
                ..sight(Some(here), Some(there), waited)
            };
            assert_eq!(decide(seen), wanted, "{seen:?}");
        }
    }
}

/// What is true of the machine on the two sides, whoever can see it.
#[derive(Debug, Clone, Copy)]
struct World {
    here: Observed,
    there: Observed,
    /// Post-copy has begun and the rest of the memory is here.
    in_halves: bool,
    post_copy: bool,
}

impl World {
    fn runs(side: Observed) -> bool {
        side == Running
    }

    /// What QEMU, a network or a power cut may do at any time. The other side runs the machine only
    /// while it stands still or has ended here, and never once it is off there.
    fn changes(mut self, what: u8) -> Self {
        match what {
            // The switch: everything has arrived.
            0 if self.here == Paused && self.there == Paused => {
                self.there = Running;
                self.in_halves = self.post_copy;
            }
            // The last of the memory has arrived, and QEMU ends here.
            1 if self.there == Running && self.here == Paused => {
                self.here = MIGRATED;
                self.in_halves = false;
            }
            2 if self.here == Running && self.there == Paused => self.here = Paused,
            3 if self.there == Paused => self.there = OFF,
            4 if self.there == OFF => self.there = Absent,
            5 if self.here == Paused => self.here = CRASHED,
            _ => {}
        }
        self
    }
}

proptest! {
    /// Whatever is seen or not, and whatever happens in between: it never runs on both sides, and
    /// the verdict is true.
    #[test]
    fn it_never_runs_twice_and_the_verdict_holds(
        begins_paused in any::<bool>(),
        post_copy in any::<bool>(),
        // Mostly nothing changes: both sides may stand still for long.
        steps in proptest::collection::vec((0u8..64, any::<[bool; 3]>()), 1..120),
    ) {
        let mut world = World {
            here: if begins_paused || post_copy { Paused } else { Running },
            there: Paused,
            in_halves: false,
            post_copy,
        };
        let mut waited_ms = 0;
        for (what, [sees_here, sees_there, sees_halves]) in steps {
            world = world.changes(what);
            prop_assert!(!(World::runs(world.here) && World::runs(world.there)), "{world:?}");
            let seen = Sight {
                here: sees_here.then_some(world.here),
                there: sees_there.then_some(world.there),
                is_done: false,
                post_copy,
                in_halves: sees_halves.then_some(world.in_halves),
                waited: Duration::from_millis(waited_ms),
            };
            waited_ms += 500;
            match decide(seen) {
                Verdict::Wait => {}
                Verdict::WaitAnew => waited_ms = 0,
                Verdict::Here => {
                    prop_assert_eq!(world.here, Running);
                    return Ok(());
                }
                Verdict::There => {
                    prop_assert_eq!(world.there, Running);
                    prop_assert!(!world.in_halves || world.here != Paused, "{world:?}");
                    return Ok(());
                }
                Verdict::EndHere => {
                    prop_assert_eq!(world.there, Running);
                    prop_assert!(!world.in_halves, "half of its memory was here: {world:?}");
                    return Ok(());
                }
                Verdict::Resume => {
                    prop_assert!(!post_copy);
                    prop_assert!(matches!(world.there, Off(_) | Absent), "{world:?}");
                    prop_assert_eq!(world.here, Paused);
                    return Ok(());
                }
                Verdict::EndThere => {
                    prop_assert!(world.in_halves && matches!(world.here, Off(_)), "{world:?}");
                    return Ok(());
                }
                // Never both: it is not given up where one side is seen to run.
                Verdict::Nowhere(reason) => {
                    prop_assert!(
                        reason == Reason::Unknown || !World::runs(world.there),
                        "{reason:?} while {world:?}"
                    );
                    return Ok(());
                }
            }
        }
    }
}
