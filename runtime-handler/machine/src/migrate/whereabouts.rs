//! Where a machine runs once its migration is over, or broke off: never on two sides, and on none
//! only where it cannot be helped. Pure; `machine/leaving.rs` looks, asks and acts.
//!
//! ```text
//!            +------ look again -------+
//!            v                         |
//!   sight --decide--> Wait, WaitAnew --+--> too long: Nowhere(Unknown)
//!                 |-> Here              it runs here
//!                 |-> There             it runs there
//!                 |-> EndHere           it runs there, what stands still here ends: There
//!                 |-> Resume            it cannot run there, so it goes on here: Here
//!                 |-> EndThere          it waits there for memory that is lost: Nowhere(Halves)
//!                 `-> Nowhere(reason)
//! ```
//! A machine that stands still here is the only one that could be resumed into a second one. So it
//! is resumed only when the other libvirt says that nothing of it is there, and never after
//! post-copy has begun, when the other side has changes that are not here.

use std::fmt;
use std::time::Duration;

use crate::events::{Ending, Observed};

/// How long it may take until both libvirts have told enough.
pub const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// A machine that stands still on both sides for so long does not go on by itself.
pub const STANDSTILL: Duration = Duration::from_secs(5);

/// What is seen of a machine that was being migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// What this node's libvirt says; `None`: it does not answer.
    pub here: Option<Observed>,
    /// What the other libvirt says; `None`: it does not answer.
    pub there: Option<Observed>,
    /// libvirt says that the migration succeeded.
    pub is_done: bool,
    /// It has been told to run there before all of its memory was.
    pub post_copy: bool,
    /// Whether it waits there for the rest of its memory; `None`: the other side did not say.
    pub in_halves: Option<bool>,
    /// Since the first look, or since the last [`Verdict::WaitAnew`].
    pub waited: Duration,
}

/// What follows from a [`Sight`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It runs here.
    Here,
    /// It runs there.
    There,
    /// It runs there; end what stands still here.
    EndHere,
    /// It cannot run there; run it here, or look again where that fails.
    Resume,
    /// End what waits there: it runs nowhere.
    EndThere,
    /// It runs nowhere.
    Nowhere(Reason),
    /// Look again.
    Wait,
    /// Look again, and wait as long as from the first look: it is on its way.
    WaitAnew,
}

/// Why it runs nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Post-copy broke off.
    Halves,
    /// Both libvirts say that it is off.
    OffOnBothSides,
    /// It stands still here, and the other side is not known.
    Unknown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Halves => {
                "it broke off after the switch, with the machine's memory in two halves"
            }
            Self::OffOnBothSides => "it is off on both sides",
            Self::Unknown => {
                "it stands still here, and whether it runs there cannot be found out; it is not \
                 resumed, since it could run twice"
            }
        })
    }
}

/// What this node's libvirt alone decides, so that the other one need not be asked.
pub fn from_here(here: Option<Observed>, is_done: bool) -> Option<Verdict> {
    match here {
        Some(Observed::Running) if !is_done => Some(Verdict::Here),
        Some(Observed::Off(Ending::Migrated) | Observed::Absent) if is_done => Some(Verdict::There),
        _ => None,
    }
}

/// Decides; see the module.
pub fn decide(sight: Sight) -> Verdict {
    if let Some(verdict) = from_here(sight.here, sight.is_done) {
        return verdict;
    }
    match from_both(sight) {
        Verdict::Wait if sight.waited > SETTLE_WITHIN => Verdict::Nowhere(Reason::Unknown),
        verdict => verdict,
    }
}

fn from_both(sight: Sight) -> Verdict {
    use Observed::{Absent, Off, Paused, Running};
    let Some(here) = sight.here else {
        return Verdict::Wait;
    };
    let in_halves = sight.post_copy && sight.in_halves == Some(true);
    let may_be_in_halves = sight.post_copy && sight.in_halves.is_none();
    match (here, sight.there) {
        // The rest of its memory goes there, or the other side ends it.
        (Paused, Some(Running)) if in_halves => Verdict::WaitAnew,
        (Off(ending), Some(_)) if in_halves && ending != Ending::Migrated => Verdict::EndThere,
        // What is here may be the half that is missing there, and what is there may be a half.
        (Paused | Off(_) | Absent, Some(Running)) if may_be_in_halves => Verdict::Wait,
        // Its last word was lost on the way.
        (Paused, Some(Running)) => Verdict::EndHere,
        (Off(_) | Absent, Some(Running)) => Verdict::There,
        (Running, _) => Verdict::Here,
        _ if sight.waited < STANDSTILL => Verdict::Wait,
        (Paused, Some(_)) if sight.post_copy => Verdict::Nowhere(Reason::Halves),
        (Paused, Some(Off(_) | Absent)) => Verdict::Resume,
        (Off(_) | Absent, Some(Off(_) | Absent)) => Verdict::Nowhere(Reason::OffOnBothSides),
        _ => Verdict::Wait,
    }
}

#[cfg(test)]
mod tests;
