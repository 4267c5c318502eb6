//! A process's stdio as containerd names it: FIFOs, or a `file://` or `binary://`
//! target for the output. Opens them and hands duplicates to the backend, so that a
//! process which is stopped and started again goes on with the same ones.

mod binary;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::Stdio;
use dyad_runtime_handler::{Error, Result};

/// Where a process's stdio goes, as containerd wrote it; empty: nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StdioUris {
    /// A FIFO.
    pub stdin: String,
    /// A FIFO, `fifo://`, `file://` or `binary://`.
    pub stdout: String,
    /// As `stdout`; a scheme other than a FIFO's takes both.
    pub stderr: String,
    /// The process gets a terminal.
    pub terminal: bool,
}

/// Whose stdio it is, which a logging binary is told.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub container: &'a str,
}

/// The shim's own ends. They stay open until the process has ended for good: a reader
/// sees the end of the output when the backend's duplicates are closed as well.
#[derive(Debug, Default)]
pub struct OpenStdio {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: bool,
}

enum Target<'a> {
    Nowhere,
    Fifo(&'a str),
    File(&'a str),
    Binary(&'a str),
}

impl OpenStdio {
    /// Opens what `uris` name.
    ///
    /// # Errors
    /// `InvalidArgument` for a URI that is none of these; a path that cannot be
    /// opened; a logging binary that does not come up.
    pub async fn open(uris: &StdioUris, owner: Owner<'_>) -> Result<Self> {
        let stdin = match target(&uris.stdin)? {
            Target::Nowhere => None,
            Target::Fifo(path) => Some(open_input(Path::new(path))?),
            Target::File(_) | Target::Binary(_) => {
                return Err(Error::InvalidArgument(format!(
                    "stdin {:?}: only a FIFO can be read",
                    uris.stdin
                )));
            }
        };
        let stderr_wanted = !uris.terminal;
        let (stdout, stderr) = match target(&uris.stdout)? {
            Target::Binary(uri) => {
                let (stdout, stderr) = binary::start(uri, owner).await?;
                (Some(stdout), stderr_wanted.then_some(stderr))
            }
            Target::File(path) => {
                let file = open_file(Path::new(path))?;
                let stderr = stderr_wanted.then(|| duplicate(&file)).transpose()?;
                (Some(file), stderr)
            }
            stdout => (
                open_output(&stdout)?,
                match stderr_wanted {
                    true => open_output(&target(&uris.stderr)?)?,
                    false => None,
                },
            ),
        };
        Ok(Self {
            stdin,
            stdout,
            stderr,
            terminal: uris.terminal,
        })
    }

    /// Duplicates for a backend.
    ///
    /// # Errors
    /// No file descriptor is free.
    pub fn duplicate(&self) -> Result<Stdio> {
        let each = |fd: &Option<OwnedFd>| fd.as_ref().map(duplicate).transpose();
        Ok(Stdio {
            stdin: each(&self.stdin)?,
            stdout: each(&self.stdout)?,
            stderr: each(&self.stderr)?,
            terminal: self.terminal,
        })
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone()
        .context(|| "duplicate a stdio descriptor".into())
}

fn target(uri: &str) -> Result<Target<'_>> {
    if uri.is_empty() {
        return Ok(Target::Nowhere);
    }
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(Target::Fifo(uri));
    };
    match scheme {
        "fifo" => Ok(Target::Fifo(rest)),
        "file" => Ok(Target::File(rest)),
        "binary" => Ok(Target::Binary(uri)),
        "null" => Ok(Target::Nowhere),
        _ => Err(Error::InvalidArgument(format!(
            "stdio {uri:?}: {scheme} is none of fifo, file, binary"
        ))),
    }
}

fn open_output(target: &Target<'_>) -> Result<Option<OwnedFd>> {
    let path = match target {
        Target::Nowhere => return Ok(None),
        Target::Fifo(path) => Path::new(*path),
        Target::File(path) => return open_file(Path::new(*path)).map(Some),
        Target::Binary(uri) => {
            return Err(Error::InvalidArgument(format!(
                "stderr {uri:?}: a logging binary takes both streams; name it as stdout"
            )));
        }
    };
    open_fifo_or(path, |options| options.append(true)).map(Some)
}

fn open_input(path: &Path) -> Result<OwnedFd> {
    open_fifo_or(path, |options| options.read(true))
}

/// A FIFO is opened for reading and writing: that never blocks, and neither end dies
/// when containerd, at the other, restarts.
fn open_fifo_or(
    path: &Path,
    otherwise: impl FnOnce(&mut OpenOptions) -> &mut OpenOptions,
) -> Result<OwnedFd> {
    let open = || -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        if std::fs::metadata(path)?.file_type().is_fifo() {
            options.read(true).write(true);
        } else {
            otherwise(&mut options);
        }
        options
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
    };
    open()
        .map(OwnedFd::from)
        .context(|| format!("open stdio {}", path.display()))
}

fn open_file(path: &Path) -> Result<OwnedFd> {
    let open = || -> std::io::Result<File> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o644)
            .open(path)
    };
    open()
        .map(OwnedFd::from)
        .context(|| format!("open log file {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const OWNER: Owner<'_> = Owner {
        namespace: "ns",
        container: "c",
    };

    #[tokio::test]
    async fn a_file_takes_both_streams_and_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/c.log");
        let uris = StdioUris {
            stdout: format!("file://{}", path.display()),
            stderr: format!("file://{}", path.display()),
            ..StdioUris::default()
        };
        let open = OpenStdio::open(&uris, OWNER).await.unwrap();
        let stdio = open.duplicate().unwrap();
        File::from(stdio.stdout.unwrap())
            .write_all(b"out ")
            .unwrap();
        File::from(stdio.stderr.unwrap()).write_all(b"err").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "out err");
    }

    #[tokio::test]
    async fn fifos_open_without_a_peer_and_a_terminal_has_no_stderr() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = |name: &str| {
            let path = dir.path().join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path.display().to_string()
        };
        let uris = StdioUris {
            stdin: fifo("in"),
            stdout: format!("fifo://{}", fifo("out")),
            stderr: fifo("err"),
            terminal: true,
        };
        let stdio = OpenStdio::open(&uris, OWNER)
            .await
            .unwrap()
            .duplicate()
            .unwrap();
        assert!(stdio.stdin.is_some() && stdio.stdout.is_some());
        assert!(stdio.stderr.is_none() && stdio.terminal);
    }

    #[tokio::test]
    async fn a_logging_binary_gets_the_streams_and_says_when_it_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("logger");
        let log = dir.path().join("log");
        std::fs::write(
            &script,
            format!(
                "#!/bin/sh\nexec 5>&-\n{{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; cat <&3; }} > {}.part\nmv {0}.part {0}\n",
                log.display()
            ),
        )
        .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let uris = StdioUris {
            stdout: format!("binary://{}?tag=a%20b", script.display()),
            ..StdioUris::default()
        };
        let open = OpenStdio::open(&uris, OWNER).await.unwrap();
        File::from(open.duplicate().unwrap().stdout.unwrap())
            .write_all(b"hello\n")
            .unwrap();
        drop(open);
        let text = tokio::time::timeout(std::time::Duration::from_secs(10), async {
            loop {
                if let Ok(text) = std::fs::read_to_string(&log) {
                    break text;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert_eq!(text, "ns/c tag a b\nhello\n");
    }

    #[tokio::test]
    async fn what_cannot_be_is_named() {
        for (uris, part) in [
            (
                StdioUris {
                    stdout: "ftp://x".into(),
                    ..StdioUris::default()
                },
                "ftp",
            ),
            (
                StdioUris {
                    stdin: "file:///x".into(),
                    ..StdioUris::default()
                },
                "only a FIFO",
            ),
            (
                StdioUris {
                    stdout: "/no/such".into(),
                    ..StdioUris::default()
                },
                "/no/such",
            ),
            (
                StdioUris {
                    stdout: "binary:///no/such".into(),
                    ..StdioUris::default()
                },
                "/no/such",
            ),
        ] {
            let error = OpenStdio::open(&uris, OWNER).await.unwrap_err().chain();
            assert!(error.contains(part), "{error}");
        }
    }
}
