//! Dyad under a real kubelet: one cluster (`hack/cluster`), pods of both kinds, kubectl alone.
//!
//! ```text
//! cargo test -p dyad-e2e --test cluster -- FILTER
//! ```
//! The first trial brings the cluster up; the last, `nothing_is_left_on_the_host`, waits for
//! the others and takes it down. Trials are named `cluster::dyad_vm::<sentence>`.
//!
//! Environment: as for the other end-to-end tests, `DYAD_E2E_DIR` (the folder is that with
//! `-cluster`, default /tmp/dyad-e2e-cluster), `DYAD_E2E_NO_BUILD=1`, `DYAD_E2E_PROFILE`,
//! `DYAD_E2E_KEEP=1` (leave the cluster up; the next run with it uses the one that is there).

mod context;
mod stage;
mod trials;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use context::Kind;
use stage::Stage;
use trials::Case;

/// Two trials wait for minutes. A machine asks for a quarter of a processor: of two, no more than
/// eight are scheduled at once.
const THREADS: usize = 5;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    let selected: Vec<(String, Kind, Case)> = cases()
        .into_iter()
        .filter(|(name, ..)| !args.is_filtered_out(&Trial::test(name.clone(), || Ok(()))))
        .collect();
    // They are filtered already; the last trial must not be.
    args.filter = None;
    args.skip.clear();
    args.exact = false;
    args.test_threads.get_or_insert(THREADS);

    let stage = Arc::new(Stage::new(selected.len()));
    let mut trials = Vec::new();
    for (name, kind, case) in selected {
        let stage = Arc::clone(&stage);
        trials.push(Trial::test(name, move || outcome(stage.run(kind, case))));
    }
    if !trials.is_empty() {
        if !args.list {
            stage::tear_down_on_signals(&stage);
        }
        let stage = Arc::clone(&stage);
        trials.push(Trial::test(
            "cluster::nothing_is_left_on_the_host",
            move || outcome(stage.end()),
        ));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    // A panic of the harness itself would leave it up.
    stage.tear_down();
    conclusion.exit_code()
}

fn outcome(result: Result<()>) -> Result<(), Failed> {
    result.map_err(|error| Failed::from(format!("{error:#}")))
}

fn cases() -> Vec<(String, Kind, Case)> {
    let mut all = Vec::new();
    for case in trials::all() {
        for &kind in case.kinds {
            let module = kind.name().replace('-', "_");
            all.push((format!("cluster::{module}::{}", case.name), kind, case));
        }
    }
    all
}
