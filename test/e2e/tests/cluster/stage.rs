//! The one cluster, brought up by the first trial and taken down by the last.

use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::cluster::Cluster;
use dyad_e2e::env::{Build, Env, Version};
use dyad_e2e::host::Snapshot;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::context::{Context, Kind};
use crate::trials::Case;

/// No trial takes longer than this.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(900);
/// How long the last trial waits for the ones before it, builds from cold caches included.
const END_TIMEOUT: Duration = Duration::from_secs(45 * 60);

enum Phase {
    Waiting,
    Up {
        cluster: Arc<Cluster>,
        before: Snapshot,
    },
    Failed(String),
    Ended,
}

/// The cluster's state, and how many trials are still to come.
pub struct Stage {
    state: Mutex<(Phase, usize)>,
    changed: Condvar,
    dir: PathBuf,
    keep: bool,
}

impl Stage {
    /// Nothing is up yet; `trials` are to come, without the last.
    pub fn new(trials: usize) -> Self {
        let prefix = std::env::var("DYAD_E2E_DIR").unwrap_or_else(|_| "/tmp/dyad-e2e".into());
        Self {
            state: Mutex::new((Phase::Waiting, trials)),
            changed: Condvar::new(),
            dir: PathBuf::from(format!("{prefix}-cluster")),
            keep: std::env::var_os("DYAD_E2E_KEEP").is_some(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Phase, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cluster_of_the_folder(&self) -> Cluster {
        Cluster {
            env: Env {
                dir: self.dir.clone(),
                version: Version::V2_3,
            },
        }
    }

    /// Runs one trial.
    pub fn run(&self, kind: Kind, case: Case) -> Result<()> {
        let result = self
            .cluster()
            .and_then(|cluster| bounded(cluster, kind, case));
        self.lock().1 -= 1;
        self.changed.notify_all();
        result
    }

    /// The cluster; the first to ask brings it up while the others wait for the lock.
    fn cluster(&self) -> Result<Arc<Cluster>> {
        let mut state = self.lock();
        if matches!(state.0, Phase::Waiting) {
            state.0 = match self.bring_up() {
                Ok((cluster, before)) => Phase::Up {
                    cluster: Arc::new(cluster),
                    before,
                },
                Err(error) => Phase::Failed(format!("{error:#}")),
            };
        }
        match &state.0 {
            Phase::Up { cluster, .. } => Ok(Arc::clone(cluster)),
            Phase::Failed(why) => bail!("no cluster: {why}"),
            Phase::Waiting | Phase::Ended => bail!("the cluster is down already"),
        }
    }

    fn bring_up(&self) -> Result<(Cluster, Snapshot)> {
        let cluster = self.cluster_of_the_folder();
        if self.keep && cluster.kubectl(&["get", "--raw", "/readyz"]).is_ok() {
            return Ok((cluster, Snapshot::take(&self.dir)));
        }
        cluster.down()?;
        let before = Snapshot::take(&self.dir);
        Ok((Cluster::up(&self.dir, Build::asked())?, before))
    }

    /// The last trial: waits for the others, takes the cluster down, and compares the host
    /// with what it was before.
    pub fn end(&self) -> Result<()> {
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(self.lock(), END_TIMEOUT, |(_, left)| *left > 0)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("trials did not end");
        }
        match std::mem::replace(&mut state.0, Phase::Ended) {
            Phase::Up {
                cluster,
                mut before,
            } if !self.keep => {
                before.remember();
                cluster.down()?;
                before.nothing_new("hack/cluster down")
            }
            Phase::Failed(why) => {
                let _ = self.cluster_of_the_folder().down();
                bail!("it never came up: {why}")
            }
            Phase::Up { .. } | Phase::Waiting | Phase::Ended => Ok(()),
        }
    }

    /// Takes down what is still up.
    pub fn tear_down(&self) {
        let up = match self.state.try_lock() {
            Ok(state) => matches!(state.0, Phase::Up { .. }),
            // It is just coming up; taking down what is not there is harmless.
            Err(_) => true,
        };
        if up
            && !self.keep
            && let Err(error) = self.cluster_of_the_folder().down()
        {
            eprintln!("take the cluster down: {error:#}");
        }
    }
}

/// SIGINT, SIGTERM and SIGHUP end the run, but not before the cluster is down.
pub fn tear_down_on_signals(stage: &Arc<Stage>) {
    let mut signals = match Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        Ok(signals) => signals,
        Err(error) => return eprintln!("signals will not tear down: {error}"),
    };
    let stage = Arc::clone(stage);
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!("signal {signal}: taking the cluster down");
            stage.tear_down();
            std::process::exit(128 + signal);
        }
    });
}

/// Runs the trial on a thread of its own, so that one that hangs fails by itself.
fn bounded(cluster: Arc<Cluster>, kind: Kind, case: Case) -> Result<()> {
    let (done, end) = mpsc::channel();
    std::thread::Builder::new()
        .name(case.name.into())
        .spawn(move || {
            let result = Context::new(&cluster, kind).judge(case.run);
            drop(cluster);
            // Nobody listens when the time was up.
            let _ = done.send(result);
        })
        .context("start the trial's thread")?;
    end.recv_timeout(TRIAL_TIMEOUT)
        .unwrap_or_else(|_| bail!("did not end in {TRIAL_TIMEOUT:?}"))
}
