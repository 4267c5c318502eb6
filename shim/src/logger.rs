//! Logs to the FIFO `log` in the bundle, which containerd reads into its own log.
//!
//! The pod must not depend on its reader: the FIFO is opened for reading too, so
//! that writing never fails for want of one, and never blocks: a line that does not
//! fit is dropped, and the number of lines dropped is said when there is room again.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Leaves room for quoting below `PIPE_BUF`.
const TEXT_MAX_BYTES: usize = 3500;

struct FifoLogger {
    fifo: Option<File>,
    /// Appended to every line.
    fields: String,
    dropped: AtomicU64,
}

/// Sends all logs of this process to `bundle/log`. Without that FIFO (`delete`, a
/// server started by hand) they go nowhere, because stdout and stderr are the reply.
pub fn init(bundle: &Path, level: LevelFilter, namespace: &str, id: &str) {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(bundle.join("log"))
        .ok();
    let logger = FifoLogger {
        fifo,
        fields: format!(" namespace={namespace} sandbox={id}"),
        dropped: AtomicU64::new(0),
    };
    // A second call in one process changes nothing.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
    std::panic::set_hook(Box::new(|panic| log::error!("panic: {panic}")));
}

impl Log for FifoLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // ttrpc logs every refused request as an error of its own; we log ours once.
        let foreign = !metadata.target().starts_with("dyad")
            && !metadata.target().starts_with("containerd_shim_dyad");
        !(foreign && metadata.target().starts_with("ttrpc") && metadata.level() > Level::Error)
    }

    fn log(&self, record: &Record<'_>) {
        let Some(mut fifo) = self
            .fifo
            .as_ref()
            .filter(|_| self.enabled(record.metadata()))
        else {
            return;
        };
        let line = line(record.level(), &record.args().to_string(), &self.fields);
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let text = format!("{dropped} log lines dropped: nobody read the log");
            let _ = fifo.write(self::line(Level::Warn, &text, &self.fields).as_bytes());
        }
        // One write of at most PIPE_BUF bytes is whole or not at all.
        if fifo.write(line.as_bytes()).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// One line as containerd writes its own.
fn line(level: Level, text: &str, fields: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let end = (0..=text.len().min(TEXT_MAX_BYTES))
        .rev()
        .find(|end| text.is_char_boundary(*end))
        .unwrap_or(0);
    let text = &text[..end];
    format!(
        "time={:?} level={level} msg={text:?}{fields}\n",
        rfc3339(SystemTime::now())
    )
}

/// UTC with nanoseconds; days to date by Howard Hinnant's civil_from_days.
pub fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 {
        month_shifted + 3
    } else {
        month_shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3600,
        seconds % 3600 / 60,
        seconds % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_utc_dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_line_is_one_line_whatever_is_logged() {
        let text = line(Level::Warn, "a \"b\"\nc", " sandbox=x");
        assert_eq!(text.matches('\n').count(), 1);
        assert!(
            text.contains(r#"level=warning msg="a \"b\"\nc" sandbox=x"#),
            "{text}"
        );
    }

    #[test]
    fn a_full_fifo_drops_lines_and_never_blocks() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        init(dir.path(), LevelFilter::Info, "ns", "id");
        for _ in 0..5000 {
            log::info!(target: "dyad_shim", "{}", "x".repeat(100));
        }
    }
}
