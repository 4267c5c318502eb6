//! Foreign programs, each bounded by a timeout.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Done {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output, as bytes.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

impl Done {
    /// The exit code; 128 + signal number for a program that a signal ended.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Itself, if the program ended with 0.
    ///
    /// # Errors
    /// It did not; the text holds what it wrote to standard error.
    pub fn success(self, what: &str) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!(
            "{what}: exit code {}: {}{}",
            self.code(),
            self.stderr,
            self.text()
        )
    }
}

/// Runs a program to its end and collects its output. After `timeout` it is killed
/// together with what it started.
///
/// # Errors
/// It could not be started, or did not end in time.
pub fn run(command: &mut Command, stdin: &[u8], timeout: Duration) -> Result<Done> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let group = Pid::from_raw(child.id().cast_signed());
    let (mut input, mut output, mut errors) =
        match (child.stdin.take(), child.stdout.take(), child.stderr.take()) {
            (Some(input), Some(output), Some(errors)) => (input, output, errors),
            _ => bail!("{name} has no pipes"),
        };
    std::thread::scope(|scope| {
        // A program that does not read its input is no failure of ours.
        scope.spawn(move || drop(input.write_all(stdin)));
        let (ended, end) = mpsc::channel();
        let stdout = scope.spawn(move || read_all(&mut output));
        let stderr = scope.spawn(move || read_all(&mut errors));
        let waiter = scope.spawn(move || {
            let status = child.wait();
            // The receiver is gone when the time was up.
            let _ = ended.send(());
            status
        });
        let in_time = end.recv_timeout(timeout).is_ok();
        if !in_time {
            // It may have ended in this very moment.
            let _ = killpg(group, Signal::SIGKILL);
        }
        let joined = (waiter.join(), stdout.join(), stderr.join());
        let (Ok(status), Ok(stdout), Ok(stderr)) = joined else {
            bail!("{name}: a reading thread panicked");
        };
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        if !in_time {
            bail!(
                "{name} did not end in {timeout:?}; stdout: {}; stderr: {stderr}",
                String::from_utf8_lossy(&stdout)
            );
        }
        Ok(Done {
            status: status.with_context(|| format!("wait for {name}"))?,
            stdout,
            stderr,
        })
    })
}

fn read_all(from: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What came before an error is what there is.
    let _ = from.read_to_end(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn output_and_exit_code_are_collected() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo no >&2; exit 3"]);
        let done = run(&mut command, b"yes", 10 * SECOND).unwrap();
        assert_eq!(
            (done.code(), done.text().as_str(), done.stderr.as_str()),
            (3, "yes", "no\n")
        );
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 100 & sleep 100"]);
        let error = run(&mut command, b"", SECOND / 10).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
