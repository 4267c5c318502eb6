//! The user's terminal, made raw for a console and always given back: when the console
//! ends, on a signal, and on a panic (which aborts, so nothing is dropped).

use std::io;
use std::sync::Mutex;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The settings to give back while a terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input, raw until this is dropped.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Makes the terminal on standard input raw.
    ///
    /// # Errors
    /// Where the terminal refuses.
    pub fn begin() -> io::Result<Self> {
        let saved = tcgetattr(io::stdin())?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        // From here on the terminal is given back, whatever happens.
        *SAVED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(saved);
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
        let this = Self(());
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(this)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // try_lock: a panic may come while it is held.
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(saved) = saved.take()
    {
        // The terminal may be gone; nothing is left to do then.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &saved);
    }
}
