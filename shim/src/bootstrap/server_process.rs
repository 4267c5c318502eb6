//! The process that serves a pod, seen from another: `delete` ends one that hangs.
//!
//! It is known by its program and its command line, which name the pod, not by a number in
//! a file, which may be somebody else's by now. Between the look and the signal it is held
//! by a pidfd.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::launch::Launch;
use super::program_name;

/// How long a killed server may take to be gone. One that waits for a dead disk takes for
/// ever, and `delete` has five seconds.
const GONE_MAX: Duration = Duration::from_millis(1000);

/// The arguments that `start` gives the server of a pod.
pub fn arguments<'a>(namespace: &'a str, id: &'a str) -> [&'a str; 5] {
    ["-namespace", namespace, "-id", id, "serve"]
}

/// Kills the pod's server, if there is one, and waits until it is gone. Says whether there
/// was one.
///
/// # Errors
/// `/proc` cannot be listed; `DeadlineExceeded` for one that does not go.
pub fn end(launch: &Launch) -> Result<bool> {
    let name = program_name(launch.kind);
    let arguments = arguments(&launch.containerd_namespace, &launch.id);
    let mut found = false;
    for entry in std::fs::read_dir("/proc").context(|| "list the processes".into())? {
        let entry = entry.context(|| "list the processes".into())?;
        let file_name = entry.file_name();
        let Some(pid) = file_name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if !is_server(&entry.path(), name, &arguments) {
            continue;
        }
        let what = || format!("end the hanging server {pid} of pod {}", launch.sandbox_id);
        let Some(process) = open(pid).context(what)? else {
            continue;
        };
        // The pid is held now: is it still the one that was seen?
        if !is_server(&entry.path(), name, &arguments) {
            continue;
        }
        found = true;
        kill(&process).context(what)?;
        if !is_gone(&process).context(what)? {
            return Err(Error::DeadlineExceeded(format!(
                "{}: it was killed, and is there after {} ms",
                what(),
                GONE_MAX.as_millis()
            )));
        }
    }
    Ok(found)
}

/// Whether the process at `proc` runs that program with those arguments.
fn is_server(proc: &Path, program: &str, arguments: &[&str]) -> bool {
    // None for one that is gone, or of the kernel.
    let executable = std::fs::read_link(proc.join("exe")).unwrap_or_default();
    let name = executable
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    // The file may have been replaced since.
    let name = name
        .as_deref()
        .map(|name| name.trim_end_matches(" (deleted)"));
    name == Some(program)
        && std::fs::read(proc.join("cmdline")).is_ok_and(|line| has_arguments(&line, arguments))
}

fn has_arguments(line: &[u8], arguments: &[&str]) -> bool {
    let line = line.strip_suffix(b"\0").unwrap_or(line);
    let words = line.split(|byte| *byte == 0).skip(1);
    words.eq(arguments.iter().map(|word| word.as_bytes()))
}

/// `None`: there is none of that number any more.
fn open(pid: i32) -> rustix::io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => Ok(Some(process)),
        Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

fn kill(process: &OwnedFd) -> rustix::io::Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        // It ended by itself.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_gone(process: &OwnedFd) -> nix::Result<bool> {
    let mut wanted = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(GONE_MAX).unwrap_or(PollTimeout::ZERO);
    Ok(poll(&mut wanted, timeout)? > 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Write as _};
    use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
    use std::process::{Child, Command};

    use dyad_runtime_handler::spec::Role;
    use nix::fcntl::{FcntlArg, OFlag};
    use tempfile::{TempDir, tempdir};

    use super::*;
    use crate::config::Config;

    fn launch(id: &str) -> Launch {
        Launch::new(
            "k8s.io".into(),
            id.into(),
            id.into(),
            Role::Sandbox,
            "/run/dyad/s/1".into(),
            String::new(),
            (String::new(), String::new()),
            false,
            Config::default(),
        )
    }

    /// A process of a program of that name with a server's arguments, which hangs: it
    /// writes them to a pipe that is full.
    fn hanging(dir: &TempDir, name: &str, id: &str) -> (Child, File) {
        let program = dir.path().join(name);
        std::fs::copy("/bin/echo", &program).expect("copy");
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("pipe");
        let mut writer = File::from(writer);
        let size = nix::fcntl::fcntl(&writer, FcntlArg::F_GETPIPE_SZ).expect("size");
        let size = usize::try_from(size).expect("size");
        writer.write_all(&vec![0; size]).expect("fill");
        let mut command = Command::new(program);
        command
            // Where one program is all of the core utilities, this says which.
            .arg0("echo")
            .args(arguments("k8s.io", id))
            .stdout(writer);
        loop {
            match command.spawn() {
                Ok(child) => return (child, File::from(reader)),
                // Another test's child has our copy open for writing until it becomes
                // what it is to be.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {}
                Err(error) => panic!("run: {error}"),
            }
        }
    }

    fn unique(name: &str) -> String {
        format!("{name}-{}", std::process::id())
    }

    #[test]
    fn only_the_very_arguments_are_a_server() {
        let wanted = arguments("k8s.io", "abc");
        let line = |words: &[&str]| words.join("\0") + "\0";
        let serving = ["/x/shim", "-namespace", "k8s.io", "-id", "abc", "serve"];
        assert!(has_arguments(line(&serving).as_bytes(), &wanted));
        for other in [
            &["/x/shim", "-namespace", "k8s.io", "-id", "abcd", "serve"][..],
            &["/x/shim", "-namespace", "k8s.io", "-id", "abc", "delete"],
            &["/x/shim", "-namespace", "default", "-id", "abc", "serve"],
            &[&serving[..], &["x"]].concat(),
            &["/x/shim"],
            &[],
        ] {
            assert!(!has_arguments(line(other).as_bytes(), &wanted), "{other:?}");
        }
    }

    #[test]
    fn a_server_that_hangs_is_ended_and_another_pods_is_not() {
        let (dir, other_dir) = (tempdir().expect("dir"), tempdir().expect("dir"));
        let name = program_name(Config::default().kind);
        let (doomed, other) = (unique("doomed"), unique("other"));
        let (mut hanging_one, _pipe) = hanging(&dir, name, &doomed);
        let (mut left_alone, _other_pipe) = hanging(&other_dir, name, &other);
        assert!(end(&launch(&doomed)).expect("end"));
        let status = hanging_one.wait().expect("wait");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
        assert!(!end(&launch(&doomed)).expect("there is none any more"));
        assert!(left_alone.try_wait().expect("look").is_none());
        left_alone.kill().expect("kill");
        left_alone.wait().expect("wait");
    }

    #[test]
    fn another_program_with_a_servers_arguments_is_left_alone() {
        let dir = tempdir().expect("dir");
        let id = unique("alone");
        let (mut child, _pipe) = hanging(&dir, "another", &id);
        assert!(!end(&launch(&id)).expect("look"));
        assert!(child.try_wait().expect("look").is_none());
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
