//! Log lines on stderr: the guest's console for PID 1, a file for a helper.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};
use nix::time::{ClockId, clock_gettime};

/// Stands before the text of an error.
pub const ERROR_MARK: &str = ": error: ";

/// Writes each record as one line.
struct Lines<W> {
    prefix: &'static str,
    to: W,
}

impl<W: Send + Sync> Log for Lines<W>
where
    for<'a> &'a W: Write,
{
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Netlink's crates tell of every message at debug.
        metadata.level() <= log::Level::Warn || !metadata.target().starts_with("netlink")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!(
            "[{}] {}{}{}\n",
            uptime(),
            self.prefix,
            match record.level() {
                log::Level::Error => ERROR_MARK,
                log::Level::Warn => ": warning: ",
                _ => ": ",
            },
            record.args()
        );
        // One write, so that lines of several processes do not mix. A console that
        // takes no more has nobody to be told.
        let _ = (&self.to).write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Seconds since the kernel started, as the kernel prints them.
pub fn uptime() -> String {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or_else(
        |_| "?".into(),
        |at| format!("{:5}.{:06}", at.tv_sec(), at.tv_nsec() / 1000),
    )
}

/// The console, fd 2. Not std's stderr: that one locks.
struct Console;

impl Write for &Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::io::stderr().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Logs of PID 1 go to the console.
pub fn to_console(level: LevelFilter) {
    install(
        Lines {
            prefix: "dyad-agent",
            to: Console,
        },
        level,
    );
}

/// Logs of a helper go to a file: its stderr is the container's.
pub fn to_file(file: std::fs::File, level: LevelFilter) {
    install(
        Lines {
            prefix: "helper",
            to: file,
        },
        level,
    );
}

fn install<W: Send + Sync + 'static>(lines: Lines<W>, level: LevelFilter)
where
    for<'a> &'a W: Write,
{
    log::set_max_level(level);
    // Fails only when there is a logger already, which then stays.
    let _ = log::set_boxed_logger(Box::new(lines));
}
