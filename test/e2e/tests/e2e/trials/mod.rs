//! The trials, by theme.

use anyhow::Result;
use libtest_mimic::Completion;

use crate::context::{Context, Handler};

mod bad_input;
mod critest;
mod daemons;
mod delete;
mod dyadctl;
mod events;
mod exec;
mod files;
mod guest_files;
mod guest_processes;
mod in_place;
mod kinds;
mod lifecycle;
mod network;
mod outside;
mod outside_cri;
mod process;
mod resources;
mod sandboxed;
mod stdio;
mod sweep;

/// Handlers whose pods are containers.
pub const CONTAINERS: &[Handler] = &[Handler::Runc, Handler::Dyad];
/// Dyad's handlers.
pub const DYAD: &[Handler] = &[Handler::Dyad, Handler::DyadVm];
/// Dyad's, with and without a pause container.
pub const OURS: &[Handler] = &Handler::OURS;
/// Dyad's without a pause container.
pub const SANDBOXED: &[Handler] = &[Handler::DyadSandboxed, Handler::DyadVmSandboxed];
/// All, with and without a pause container.
pub const EVERY: &[Handler] = &Handler::EVERY;
/// Dyad's machines.
pub const MACHINES: &[Handler] = &[Handler::DyadVm];

/// One trial, before it is known for which version and handler.
#[derive(Clone, Copy)]
pub struct Case {
    /// A sentence.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Context<'_>) -> Result<Completion>,
    /// The handlers that it is for.
    pub handlers: &'static [Handler],
    /// It runs on the older containerd versions too.
    pub short: bool,
    /// It needs the environment for itself.
    pub alone: bool,
}

impl Case {
    /// A trial for every handler, on the newest version.
    pub const fn new(name: &'static str, run: fn(&Context<'_>) -> Result<Completion>) -> Self {
        Self {
            name,
            run,
            handlers: &Handler::ALL,
            short: false,
            alone: false,
        }
    }

    /// For these handlers only.
    pub const fn on(self, handlers: &'static [Handler]) -> Self {
        Self { handlers, ..self }
    }

    /// On the older versions too.
    pub const fn short(self) -> Self {
        Self {
            short: true,
            ..self
        }
    }

    /// By itself.
    pub const fn alone(self) -> Self {
        Self {
            alone: true,
            ..self
        }
    }
}

/// A [`Case`] named after its function, which returns `Result<()>`.
macro_rules! case {
    ($function:ident) => {
        $crate::trials::Case::new(stringify!($function), |context| {
            $function(context).map(|()| libtest_mimic::Completion::Completed)
        })
    };
}
pub(crate) use case;

/// All of them.
pub fn all() -> Vec<Case> {
    [
        lifecycle::CASES,
        in_place::CASES,
        dyadctl::CASES,
        exec::CASES,
        stdio::CASES,
        process::CASES,
        files::CASES,
        guest_files::CASES,
        guest_processes::CASES,
        network::CASES,
        resources::CASES,
        kinds::CASES,
        sandboxed::CASES,
        events::CASES,
        outside::CASES,
        outside_cri::CASES,
        critest::CASES,
        delete::CASES,
        bad_input::CASES,
        daemons::CASES,
        sweep::CASES,
    ]
    .concat()
}
