//! Runs a program, bounded in time and in what it may say.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use crate::duration::human;

/// What `program arguments...` prints, given `input`.
///
/// # Errors
/// One line for people: it cannot be run, takes longer than `limit`, or fails (with the
/// last line of what it says on stderr).
pub async fn output(
    program: impl AsRef<OsStr>,
    arguments: &[&str],
    input: &[u8],
    limit: Duration,
) -> Result<Vec<u8>, String> {
    let program = program.as_ref();
    let name = Path::new(program)
        .file_name()
        .unwrap_or(program)
        .to_string_lossy()
        .into_owned();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("run {name}: {error}"))?;
    let stdin = child.stdin.take();
    let work = async {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A program that does not read is no failure.
                let _ = stdin.write_all(input).await;
            }
        };
        let ((), output) = futures::join!(feed, child.wait_with_output());
        output
    };
    let output = timeout(limit, work)
        .await
        .map_err(|_| format!("{name} did not end within {}", human(limit)))?
        .map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("");
    Err(format!("{name}: {}: {}", output.status, last.trim()))
}

/// The first executable file called `name` in the folders of `path`.
pub fn find(name: &str, path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// A program of Dyad's: beside containerd's shim, beside this one, or on `PATH`.
pub fn find_ours(name: &str, shim_dir: Option<&Path>) -> Option<PathBuf> {
    let own = std::env::current_exe().ok();
    let mut folders: Vec<PathBuf> = shim_dir.map(PathBuf::from).into_iter().collect();
    folders.extend(own.as_deref().and_then(Path::parent).map(PathBuf::from));
    folders.extend(
        std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths),
    );
    let path = std::env::join_paths(folders).ok()?;
    find(name, &path)
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(file)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn input_goes_in_and_output_comes_out() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(
            output("cat", &[], &input, LIMIT).await.unwrap().len(),
            1 << 20
        );
        // One that does not read its input.
        assert_eq!(
            output("echo", &["hi"], &input, LIMIT).await.unwrap(),
            b"hi\n"
        );
    }

    #[tokio::test]
    async fn failures_are_one_line() {
        let error = output(
            "sh",
            &["-c", "echo first >&2; echo last >&2; exit 3"],
            b"",
            LIMIT,
        )
        .await;
        assert_eq!(error.unwrap_err(), "sh: exit status: 3: last");
        let error = output("/nonexistent/x", &[], b"", LIMIT).await.unwrap_err();
        assert!(error.starts_with("run x: "), "{error}");
        let error = output("sleep", &["60"], b"", Duration::from_millis(50))
            .await
            .unwrap_err();
        assert_eq!(error, "sleep did not end within 50ms");
    }

    #[test]
    fn programs_are_found_on_a_path() {
        assert!(find("sh", OsStr::new("/nonexistent:/bin:/usr/bin")).is_some());
        assert_eq!(find("sh", OsStr::new("/nonexistent:relative")), None);
    }
}
