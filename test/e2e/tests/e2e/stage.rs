//! One environment at a time, brought up by its first trial and taken down by its last.
//!
//! ```text
//! version 2.3: up -> trials (shared: side by side; alone: by themselves) -> end: down, compare the host
//!                                                                            |
//! version 2.1:                                     waits for that, then up -> ...
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use dyad_e2e::env::{Build, Env, Version};
use dyad_e2e::host::Snapshot;
use libtest_mimic::Completion;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::context::{Context, Handler};
use crate::trials::Case;

/// No trial takes longer than this (critest is built by the one that runs it); one that
/// does is given up.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the last trial of a version waits for the ones before it.
const END_TIMEOUT: Duration = Duration::from_secs(45 * 60);

/// What is to be run on one version.
pub struct Plan {
    /// The version.
    pub version: Version,
    /// How many trials run on it, without its last.
    pub trials: usize,
}

enum Phase {
    Waiting,
    Up { env: Arc<Env>, before: Snapshot },
    Failed(String),
    Ended,
}

struct Stage {
    version: Version,
    left: usize,
    phase: Phase,
}

/// All versions' environments.
pub struct Stages {
    stages: Mutex<Vec<Stage>>,
    changed: Condvar,
    /// Held for writing by a trial that needs the environment for itself.
    alone: RwLock<()>,
    prefix: PathBuf,
    keep: bool,
}

impl Stages {
    /// Nothing is up yet.
    pub fn new(plans: Vec<Plan>) -> Self {
        Self {
            stages: Mutex::new(
                plans
                    .into_iter()
                    .map(|plan| Stage {
                        version: plan.version,
                        left: plan.trials,
                        phase: Phase::Waiting,
                    })
                    .collect(),
            ),
            changed: Condvar::new(),
            alone: RwLock::new(()),
            prefix: std::env::var_os("DYAD_E2E_DIR")
                .map_or_else(|| "/tmp/dyad-e2e".into(), PathBuf::from),
            keep: std::env::var_os("DYAD_E2E_KEEP").is_some(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stage>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one trial in its version's environment.
    pub fn run(&self, version: Version, handler: Handler, case: Case) -> Result<Completion> {
        let result = self.environment(version).and_then(|env| {
            if case.alone {
                let _alone = self.alone.write().unwrap_or_else(PoisonError::into_inner);
                bounded(env, handler, case)
            } else {
                let _shared = self.alone.read().unwrap_or_else(PoisonError::into_inner);
                bounded(env, handler, case)
            }
        });
        if let Some(stage) = self
            .lock()
            .iter_mut()
            .find(|stage| stage.version == version)
        {
            stage.left -= 1;
        }
        self.changed.notify_all();
        result
    }

    /// The version's environment; the first to ask brings it up.
    fn environment(&self, version: Version) -> Result<Arc<Env>> {
        let mut stages = self.lock();
        loop {
            let at = stages
                .iter()
                .position(|stage| stage.version == version)
                .context("a version that is not planned")?;
            match &stages[at].phase {
                Phase::Up { env, .. } => return Ok(Arc::clone(env)),
                Phase::Failed(why) => bail!("no environment: {why}"),
                Phase::Ended => bail!("the environment is down already"),
                Phase::Waiting
                    if stages[..at]
                        .iter()
                        .all(|stage| matches!(stage.phase, Phase::Ended)) =>
                {
                    // The lock is kept: the others have nothing to do before it is up.
                    let dir = PathBuf::from(format!("{}-{version}", self.prefix.display()));
                    stages[at].phase = match bring_up(version, &dir, at == 0) {
                        Ok((env, before)) => Phase::Up {
                            env: Arc::new(env),
                            before,
                        },
                        Err(error) => Phase::Failed(format!("{error:#}")),
                    };
                    self.changed.notify_all();
                }
                Phase::Waiting => {
                    stages = self
                        .changed
                        .wait(stages)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The last trial of a version: waits for the others, takes the environment down,
    /// and compares the host with what it was before.
    pub fn end(&self, version: Version) -> Result<()> {
        let phase = {
            let stages = self.lock();
            let (mut stages, timeout) = self
                .changed
                .wait_timeout_while(stages, END_TIMEOUT, |stages| {
                    stages
                        .iter()
                        .any(|stage| stage.version == version && stage.left > 0)
                })
                .unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                bail!("trials of containerd {version} did not end");
            }
            let stage = stages
                .iter_mut()
                .find(|stage| stage.version == version)
                .context("a version that is not planned")?;
            // The next version waits for `Ended`, which comes after the comparison.
            std::mem::replace(
                &mut stage.phase,
                Phase::Failed("it is being taken down".into()),
            )
        };
        let result = match phase {
            Phase::Up { env, mut before } if !self.keep => {
                before.remember();
                env.down().and_then(|()| before.nothing_new("hack/down"))
            }
            Phase::Failed(why) => {
                let _ = self.env(version).down();
                Err(anyhow!("it never came up: {why}"))
            }
            Phase::Up { .. } | Phase::Waiting | Phase::Ended => Ok(()),
        };
        if let Some(stage) = self
            .lock()
            .iter_mut()
            .find(|stage| stage.version == version)
        {
            stage.phase = Phase::Ended;
        }
        self.changed.notify_all();
        result
    }

    fn env(&self, version: Version) -> Env {
        Env {
            dir: PathBuf::from(format!("{}-{version}", self.prefix.display())),
            version,
        }
    }

    /// Takes down what is still up.
    pub fn tear_down(&self) {
        if self.keep {
            return;
        }
        let versions: Vec<Version> = match self.stages.try_lock() {
            Ok(stages) => stages
                .iter()
                .filter(|stage| matches!(stage.phase, Phase::Up { .. }))
                .map(|stage| stage.version)
                .collect(),
            // An environment is just coming up; taking down what is not there is harmless.
            Err(_) => Version::ALL.to_vec(),
        };
        for version in versions {
            if let Err(error) = self.env(version).down() {
                eprintln!("take down containerd {version}: {error:#}");
            }
        }
    }

    /// SIGINT, SIGTERM and SIGHUP end the run, but not before the environments are down.
    pub fn tear_down_on_signals(self: &Arc<Self>) {
        let mut signals = match Signals::new([SIGINT, SIGTERM, SIGHUP]) {
            Ok(signals) => signals,
            Err(error) => return eprintln!("signals will not tear down: {error}"),
        };
        let stages = Arc::clone(self);
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("signal {signal}: taking the environments down");
                stages.tear_down();
                std::process::exit(128 + signal);
            }
        });
    }
}

fn bring_up(version: Version, dir: &std::path::Path, first: bool) -> Result<(Env, Snapshot)> {
    let build = if first { Build::asked() } else { Build::AsIs };
    let env = Env {
        dir: dir.to_path_buf(),
        version,
    };
    env.down()?;
    let before = Snapshot::take(dir);
    let env = Env::up(version, dir, build)?;
    Ok((env, before))
}

/// Runs the trial on a thread of its own, so that one that hangs fails by itself.
fn bounded(env: Arc<Env>, handler: Handler, case: Case) -> Result<Completion> {
    let (done, end) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name(case.name.into())
        .spawn(move || {
            let result = {
                let context = Context::new(&env, handler);
                context.judge(|context| (case.run)(context))
            };
            drop(env);
            // Nobody listens when the time was up.
            let _ = done.send(result);
        })
        .context("start the trial's thread")?;
    end.recv_timeout(TRIAL_TIMEOUT)
        .unwrap_or_else(|_| bail!("did not end in {TRIAL_TIMEOUT:?}"))
}
