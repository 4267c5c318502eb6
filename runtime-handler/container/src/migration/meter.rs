//! How far a migration is, how fast, and what follows from that.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dyad_runtime_handler::migration::{MigrationProgress, Stage};
use tokio::sync::watch;
use tokio::time::Instant;

/// The rate is that of at least this long.
const WINDOW: Duration = Duration::from_millis(500);

/// Counts what goes, and tells.
pub(crate) struct Meter {
    sender: watch::Sender<MigrationProgress>,
    state: Mutex<State>,
}

struct State {
    now: MigrationProgress,
    /// When the window began, and what had gone by then.
    window: (Instant, u64),
    started: Instant,
    frozen: Option<Instant>,
}

impl Meter {
    pub(crate) fn new(sender: watch::Sender<MigrationProgress>) -> Self {
        let now = Instant::now();
        Self {
            sender,
            state: Mutex::new(State {
                now: MigrationProgress::default(),
                window: (now, 0),
                started: now,
                frozen: None,
            }),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        self.sender.send_replace(state.now);
    }

    pub(crate) fn stage(&self, stage: Stage) {
        self.change(|state| {
            state.now.stage = stage;
            if stage == Stage::Switching {
                state.frozen = Some(Instant::now());
            }
        });
    }

    /// What there is to copy, as known now: beside what went already.
    pub(crate) fn remaining(&self, bytes: u64) {
        self.change(|state| {
            state.now.bytes_remaining = bytes;
            state.now.bytes_total = state.now.bytes_done + bytes;
        });
    }

    pub(crate) fn copied(&self, bytes: u64) {
        self.change(|state| {
            let now = &mut state.now;
            now.bytes_done += bytes;
            now.bytes_total = now.bytes_total.max(now.bytes_done);
            now.bytes_remaining = now.bytes_total - now.bytes_done;
            let (began, had) = state.window;
            let passed = began.elapsed();
            if passed >= WINDOW {
                now.rate = per_second(now.bytes_done - had, passed);
                state.window = (Instant::now(), now.bytes_done);
            }
        });
    }

    /// Bytes that the pod changed in `passed`.
    pub(crate) fn dirtied(&self, bytes: u64, passed: Duration) {
        self.change(|state| state.now.dirty_rate = per_second(bytes, passed));
    }

    pub(crate) fn expected_downtime(&self, downtime: Duration) {
        self.change(|state| state.now.expected_downtime = Some(downtime));
    }

    /// It runs again, here or there.
    pub(crate) fn runs(&self) {
        self.change(|state| {
            state.now.downtime = state.frozen.map(|frozen| frozen.elapsed());
        });
    }

    /// Bytes per second since the start; `None` where too little went to tell.
    pub(crate) fn mean_rate(&self) -> Option<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let done = state.now.bytes_done;
        (done > 1 << 20).then(|| per_second(done, state.started.elapsed()))
    }
}

fn per_second(bytes: u64, passed: Duration) -> u64 {
    (bytes as f64 / passed.as_secs_f64().max(1e-6)) as u64
}

/// How long the pod would stand still for `bytes` at `rate` bytes per second, and the
/// work that no rate makes shorter.
pub(crate) fn expected_downtime(bytes: u64, rate: u64) -> Duration {
    let copy = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
    // Frozen, dumped, restored: measured for a small container.
    copy + Duration::from_millis(700)
}

/// Whether another pre-dump is worth it: the last one wrote much, and less than the one
/// before.
pub(crate) fn dump_again(written: &[u64]) -> bool {
    const ENOUGH: u64 = 8 << 20;
    const MOST: usize = 4;
    match written {
        [] => true,
        [.., last] if *last <= ENOUGH => false,
        [.., before, last] if *last > before / 10 * 8 => false,
        all => all.len() < MOST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn figures_follow_what_goes() {
        let (sender, told) = watch::channel(MigrationProgress::default());
        let meter = Meter::new(sender);
        assert_eq!(meter.mean_rate(), None);
        meter.stage(Stage::Copying);
        meter.remaining(3 << 20);
        tokio::time::sleep(Duration::from_secs(1)).await;
        meter.copied(2 << 20);
        let now = *told.borrow();
        assert_eq!((now.bytes_done, now.bytes_remaining), (2 << 20, 1 << 20));
        assert_eq!((now.rate, meter.mean_rate()), (2 << 20, Some(2 << 20)));
        meter.stage(Stage::Switching);
        tokio::time::sleep(Duration::from_millis(300)).await;
        meter.copied(2 << 20);
        meter.runs();
        let now = *told.borrow();
        assert_eq!((now.bytes_total, now.bytes_remaining), (4 << 20, 0));
        assert_eq!(now.downtime, Some(Duration::from_millis(300)));
    }

    #[test]
    fn memory_is_dumped_again_while_that_makes_the_rest_smaller() {
        const MIB: u64 = 1 << 20;
        for (written, again) in [
            (&[][..], true),
            (&[4 * MIB][..], false),
            (&[400 * MIB], true),
            (&[400 * MIB, 100 * MIB], true),
            (&[400 * MIB, 390 * MIB], false),
            (&[400 * MIB, 100 * MIB, 50 * MIB, 30 * MIB], false),
        ] {
            assert_eq!(dump_again(written), again, "{written:?}");
        }
        assert_eq!(expected_downtime(100, 100), Duration::from_millis(1700));
    }
}
