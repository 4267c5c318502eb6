//! Bounded waiting for a condition.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a condition is looked at again.
const INTERVAL: Duration = Duration::from_millis(30);

/// Waits until `condition` gives a value and returns it.
///
/// # Errors
/// It gave none before `deadline` passed (the last error of `condition` is the cause).
pub fn until<T>(
    deadline: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        let looked = condition();
        if let Ok(Some(value)) = looked {
            return Ok(value);
        }
        if Instant::now() >= end {
            let why = format!("waited {deadline:?} for {what}");
            return match looked {
                Err(error) => Err(error).context(why),
                Ok(_) => bail!(why),
            };
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Looks at `value` over and over for `duration`, which is how long an absence of
/// change is worth testing for, and fails when it changes.
///
/// # Errors
/// The value changed, or could not be had.
pub fn unchanged<T: PartialEq + std::fmt::Debug>(
    duration: Duration,
    what: &str,
    mut value: impl FnMut() -> Result<T>,
) -> Result<()> {
    let end = Instant::now() + duration;
    let first = value()?;
    while Instant::now() < end {
        std::thread::sleep(INTERVAL);
        let now = value()?;
        if now != first {
            bail!("{what} changed from {first:?} to {now:?}");
        }
    }
    Ok(())
}
