//! Logging binaries (containerd: docs/content/logging.md): run with stdout and
//! stderr of the container as fds 3 and 4, and fd 5 to be closed when ready. They end
//! when both streams do.

use std::os::fd::OwnedFd;
use std::time::Duration;

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::Command;

use super::Owner;

/// containerd's own limit.
const READY_MAX: Duration = Duration::from_secs(10);

/// Runs the binary that `uri` names; returns the ends for stdout and stderr.
///
/// # Errors
/// `InvalidArgument` for a URI without a path; the binary cannot be run, or is not
/// ready in time.
pub async fn start(uri: &str, owner: Owner<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let (path, arguments) = parse(uri)?;
    let pipe = || pipe2(OFlag::O_CLOEXEC).context(|| "make a pipe".into());
    let (stdout_read, stdout_write) = pipe()?;
    let (stderr_read, stderr_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    // std passes on only fds 0 to 2, so a shell moves them to where the protocol wants
    // them.
    let mut command = Command::new("/bin/sh");
    command
        .args([
            "-c",
            r#"exec 3<&0 4<&2 5>&1 0</dev/null 1>/dev/null 2>/dev/null; exec "$@""#,
            "sh",
        ])
        .arg(&path)
        .args(&arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("CONTAINER_ID", owner.container)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(stdout_read)
        .stderr(stderr_read)
        .stdout(ready_write);
    let mut child = command
        .spawn()
        .context(|| format!("run logging binary {path}"))?;
    // Nobody asks how it ended, but it must not stay a zombie.
    tokio::spawn(async move { child.wait().await });
    // With it go our copies of the logger's ends.
    drop(command);

    nix::fcntl::fcntl(
        &ready_read,
        nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK),
    )
    .context(|| "set up a pipe".into())?;
    let mut ready =
        pipe::Receiver::from_owned_fd(ready_read).context(|| "watch the logging binary".into())?;
    let mut byte = [0];
    match tokio::time::timeout(READY_MAX, ready.read(&mut byte)).await {
        Ok(Ok(_)) => Ok((stdout_write, stderr_write)),
        Ok(Err(error)) => Err(Error::other(
            format!("wait for logging binary {path}"),
            error,
        )),
        Err(_) => Err(Error::DeadlineExceeded(format!(
            "logging binary {path} did not close fd 5 in {} s",
            READY_MAX.as_secs()
        ))),
    }
}

/// `binary:///path?key=value&…`: the keys and values are the arguments.
fn parse(uri: &str) -> Result<(String, Vec<String>)> {
    let rest = uri.strip_prefix("binary://").unwrap_or(uri);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = unescape(path);
    if !path.starts_with('/') {
        return Err(Error::InvalidArgument(format!(
            "stdio {uri:?}: the binary's path must be absolute"
        )));
    }
    if !std::path::Path::new(&path).is_file() {
        return Err(Error::InvalidArgument(format!(
            "stdio {uri:?}: no file {path}"
        )));
    }
    let arguments = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [key, value].map(|part| unescape(&part.replace('+', " ")))
        })
        .filter(|argument| !argument.is_empty())
        .collect();
    Ok((path, arguments))
}

/// Undoes percent encoding; what is no such encoding stays.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let code = (bytes[index] == b'%')
            .then(|| bytes.get(index + 1..index + 3))
            .flatten()
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                index += 3;
            }
            None => {
                out.push(bytes[index]);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_become_arguments() {
        assert_eq!(
            parse("binary:///bin/sh?id=a%2Fb&flag&x=1+2").unwrap(),
            (
                "/bin/sh".to_owned(),
                ["id", "a/b", "flag", "x", "1 2"].map(String::from).to_vec()
            )
        );
        assert!(parse("binary://relative").is_err());
        assert_eq!(unescape("100%"), "100%");
    }
}
