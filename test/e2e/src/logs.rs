//! The CRI log format: `<RFC 3339 time> <stdout|stderr> <F|P> <bytes>`, a line each;
//! `P` means that the process's line goes on in the next one. A last line without a
//! newline is written as `F` all the same (containerd, pkg/cri/io/logger.go) in some
//! versions, as `P` in others, so whether there was one is not told by the log.

/// What a container wrote, put together again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Logs {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Logs {
    /// Reads a log file's content. Lines that are not in the format are kept in
    /// `stderr`, so that a comparison fails and shows them.
    pub fn parse(file: &[u8]) -> Self {
        let mut logs = Self::default();
        for line in file.split_inclusive(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let mut fields = line.splitn(4, |byte| *byte == b' ');
            let (_time, stream, tag, bytes) =
                (fields.next(), fields.next(), fields.next(), fields.next());
            let (stream, bytes) = match (stream, bytes) {
                (Some(b"stdout"), Some(bytes)) => (&mut logs.stdout, bytes),
                (Some(b"stderr"), Some(bytes)) => (&mut logs.stderr, bytes),
                _ => (&mut logs.stderr, line),
            };
            stream.extend_from_slice(bytes);
            if tag == Some(b"F") {
                stream.push(b'\n');
            }
        }
        logs
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// When each line was written, in seconds of its day.
pub fn times(file: &[u8]) -> Vec<f64> {
    let lines = String::from_utf8_lossy(file);
    lines.lines().filter_map(time_of).collect()
}

fn time_of(line: &str) -> Option<f64> {
    let (_date, time) = line.split(' ').next()?.split_once('T')?;
    let end = time.find(['Z', '+', '-'])?;
    let mut seconds = 0.0;
    for part in time[..end].split(':') {
        seconds = seconds * 60.0 + part.parse::<f64>().ok()?;
    }
    Some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_their_times() {
        let log =
            b"2026-01-02T01:00:02.5Z stdout F a\ngarbage\n2026-01-02T01:01:00+02:00 stdout F b\n";
        assert_eq!(times(log), [3602.5, 3660.0]);
    }

    #[test]
    fn partial_lines_are_joined_and_streams_kept_apart() {
        let logs = Logs::parse(b"t stdout P ab\nt stderr F no\nt stdout F c d\nt stdout F \n");
        assert_eq!(logs.out(), "abc d\n\n");
        assert_eq!(logs.err(), "no\n");
    }

    #[test]
    fn a_damaged_line_is_shown() {
        assert_eq!(Logs::parse(b"garbage\n").err(), "garbage");
    }
}
