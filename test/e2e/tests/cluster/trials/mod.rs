//! The trials, by theme.

use anyhow::Result;

use crate::context::{Context, Kind};

mod in_place;
mod pod;
mod probes;
mod restart;
mod scale;

/// Both kinds.
pub const BOTH: &[Kind] = &[Kind::Dyad, Kind::DyadVm];

/// One trial, before it is known for which kind.
#[derive(Clone, Copy)]
pub struct Case {
    /// A sentence.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Context<'_>) -> Result<()>,
    /// The kinds that it is for.
    pub kinds: &'static [Kind],
}

/// A [`Case`] named after its function, for both kinds or those that are named.
macro_rules! case {
    ($function:ident) => {
        $crate::trials::case!($function, $crate::trials::BOTH)
    };
    ($function:ident, $kinds:expr) => {
        $crate::trials::Case {
            name: stringify!($function),
            run: $function,
            kinds: $kinds,
        }
    };
}
pub(crate) use case;

/// All of them; those that take longest come first.
pub fn all() -> Vec<Case> {
    [
        in_place::CASES,
        scale::CASES,
        restart::CASES,
        probes::CASES,
        pod::CASES,
        restart::LATE_CASES,
    ]
    .concat()
}
