//! A queue for changes that take long: one at a time, in the order in which they came.
//!
//! It guards no data, so that nobody who only looks waits for it: what a change found and made is in
//! the machine's own fields, each behind a lock that is held for a statement.

use tokio::sync::{Mutex, MutexGuard};

/// Changes of one sort.
#[derive(Debug, Default)]
pub struct Lane(Mutex<()>);

/// The right to change; the next in line gets it when this is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    _guard: MutexGuard<'a, ()>,
}

impl Lane {
    /// Waits in line.
    pub async fn turn(&self) -> Turn<'_> {
        Turn {
            // tokio's mutex is fair: first come, first served.
            _guard: self.0.lock().await,
        }
    }
}
