//! End-to-end tests: real containerd, libvirtd, QEMU and crictl.
//!
//! ```text
//! cargo test -p dyad-e2e -- FILTER
//! ```
//! For each containerd version one private environment (`hack/up`) is brought up by the
//! first trial that needs it and taken down by that version's last trial,
//! `nothing_is_left_on_the_host`. Trials are named `containerd_2_3::dyad_vm::<sentence>`.
//! The newest version runs all of them, the older ones those marked `short`.
//!
//! Environment: `DYAD_E2E_VERSIONS` (`2.3,1.7`), `DYAD_E2E_HANDLERS` (`dyad,dyad-vm,dyad-sandboxed`; `runc`
//! proves the suite itself against containerd's own shim), `DYAD_E2E_DIR` (folder
//! prefix, default /tmp/dyad-e2e), `DYAD_E2E_NO_BUILD=1` (install what was built last),
//! `DYAD_E2E_KEEP=1` (leave the environments up).

mod context;
mod stage;
mod trials;

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::Version;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use context::Handler;
use stage::{Plan, Stages};
use trials::Case;

/// Two machines at once is what two cores bear under emulation.
const THREADS: usize = 2;

fn main() -> std::process::ExitCode {
    let mut args = Arguments::from_args();
    match prepare(&mut args) {
        Ok((stages, trials)) => {
            if !args.list {
                stages.tear_down_on_signals();
            }
            let conclusion = libtest_mimic::run(&args, trials);
            // Trials that ended in a panic of the harness itself would leave one up.
            stages.tear_down();
            conclusion.exit_code()
        }
        Err(error) => {
            eprintln!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn prepare(args: &mut Arguments) -> Result<(Arc<Stages>, Vec<Trial>)> {
    let versions = from_environment("DYAD_E2E_VERSIONS", &Version::ALL, |version| {
        version.number()
    })?;
    let handlers = match std::env::var_os("DYAD_E2E_HANDLERS") {
        Some(_) => from_environment("DYAD_E2E_HANDLERS", &Handler::EVERY, |handler| {
            handler.name()
        })?,
        None => Handler::OURS.to_vec(),
    };
    let selected: Vec<(String, Version, Handler, Case)> = cases(&versions, &handlers)
        .into_iter()
        .filter(|(name, ..)| !args.is_filtered_out(&Trial::test(name.clone(), || Ok(()))))
        .collect();
    // They are filtered already; the last trial of a version must not be.
    args.filter = None;
    args.skip.clear();
    args.exact = false;
    args.test_threads.get_or_insert(THREADS);

    let stages = Arc::new(Stages::new(
        versions
            .iter()
            .map(|&version| Plan {
                version,
                trials: selected.iter().filter(|(_, of, ..)| *of == version).count(),
            })
            .filter(|plan| plan.trials > 0)
            .collect(),
    ));
    let mut trials = Vec::new();
    for &version in &versions {
        let of_version: Vec<_> = selected
            .iter()
            .filter(|(_, of, ..)| *of == version)
            .cloned()
            .collect();
        if of_version.is_empty() {
            continue;
        }
        for (name, version, handler, case) in of_version {
            let stages = Arc::clone(&stages);
            trials.push(Trial::ignorable_test(name.clone(), move || {
                outcome(&name, stages.run(version, handler, case))
            }));
        }
        let stages = Arc::clone(&stages);
        let name = format!("{}::nothing_is_left_on_the_host", module(version));
        trials.push(Trial::ignorable_test(name.clone(), move || {
            outcome(&name, stages.end(version).map(|()| Completion::Completed))
        }));
    }
    Ok((stages, trials))
}

/// A failure is told at once, too: a long run that is ended early told of it.
fn outcome(name: &str, result: Result<Completion>) -> Result<Completion, Failed> {
    result.map_err(|error| {
        let error = format!("{error:#}");
        eprintln!("{name}: {}", error.lines().next().unwrap_or_default());
        Failed::from(error)
    })
}

fn module(version: Version) -> String {
    format!("containerd_{}", version.number().replace('.', "_"))
}

/// Every case for every version and handler that it is for. Those that need the
/// environment for themselves come last.
fn cases(versions: &[Version], handlers: &[Handler]) -> Vec<(String, Version, Handler, Case)> {
    let mut all = Vec::new();
    for &version in versions {
        let newest = version == Version::ALL[0];
        let mut of_version = Vec::new();
        for case in trials::all() {
            for &handler in handlers {
                if case.handlers.contains(&handler)
                    && handler.works_on(version)
                    && (newest || case.short)
                {
                    let name = format!(
                        "{}::{}::{}",
                        module(version),
                        handler.name().replace('-', "_"),
                        case.name
                    );
                    of_version.push((name, version, handler, case));
                }
            }
        }
        of_version.sort_by_key(|(.., case)| case.alone);
        all.extend(of_version);
    }
    all
}

/// The comma-separated list in the variable, or `all`.
fn from_environment<T: Copy>(
    variable: &str,
    all: &[T],
    name: impl Fn(T) -> &'static str,
) -> Result<Vec<T>> {
    let Ok(list) = std::env::var(variable) else {
        return Ok(all.to_vec());
    };
    list.split(',')
        .map(|word| {
            let found = all.iter().copied().find(|&item| name(item) == word);
            found.with_context(|| format!("{variable}: unknown {word:?}"))
        })
        .collect::<Result<Vec<T>>>()
        .and_then(|chosen| {
            if chosen.is_empty() {
                bail!("{variable} is empty")
            } else {
                Ok(chosen)
            }
        })
}
