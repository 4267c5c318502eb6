//! The CRIU of this host: where it is, what it can.
//!
//! The OCI runtime runs it for the work; here it is only asked.

pub(crate) mod words;

use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;

use dyad_linux::pump::Fd;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::check::Check;
use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Error, Result};

const MEND: &str = "install CRIU 4 (Debian 13, or its package criu of a newer suite) or name its binary by container.criu";

/// A CRIU that serves.
#[derive(Debug, Clone)]
pub(crate) struct Criu {
    binary: PathBuf,
    pub version: (u32, u32),
    /// The kernel tells which pages a process changed, so memory can be copied before
    /// the process is frozen.
    pub tracks_memory: bool,
}

/// Where it is.
///
/// # Errors
/// `FailedPrecondition`, with the way to get it.
pub(crate) fn find(config: &ContainerConfig) -> Result<PathBuf> {
    match &config.criu {
        Some(path) if path.file_name() != Some("criu".as_ref()) => {
            Err(Error::InvalidArgument(format!(
                "container.criu {}: the OCI runtime starts it by the name criu, so the file must be called so",
                path.display()
            )))
        }
        Some(path) if !path.is_file() => Err(Error::FailedPrecondition(format!(
            "cannot migrate: container.criu {} is not there: {MEND}",
            path.display()
        ))),
        Some(path) => Ok(path.clone()),
        None => std::env::var_os("PATH")
            .and_then(|path| {
                std::env::split_paths(&path)
                    .map(|dir| dir.join("criu"))
                    .find(|file| file.is_file())
            })
            .ok_or_else(|| {
                Error::FailedPrecondition(format!(
                    "cannot migrate: there is no criu on PATH: {MEND}"
                ))
            }),
    }
}

/// CRIU for [`Check`]'s report: without it pods run, but cannot migrate. Must not be
/// called in a process that has a [`Reaper`].
pub(crate) fn check(config: &ContainerConfig) -> Check {
    let found = find(config).and_then(|binary| {
        let failed =
            |why: String| Error::FailedPrecondition(format!("{}: {why}", binary.display()));
        let run = |arguments: &[&str]| {
            let output = Program::new(&binary)
                .args(arguments)
                .stdin(Stdio::null())
                .output()
                .map_err(|error| failed(error.to_string()))?;
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            Ok::<_, Error>((output.status.success(), text))
        };
        let (major, minor) = words::version(&run(&["--version"])?.1).map_err(failed)?;
        let (fine, text) = run(&["check"])?;
        if !fine {
            let why = words::errors(&text).unwrap_or(text);
            return Err(failed(format!("`criu check` says: {}", why.trim())));
        }
        let (tracks, _) = run(&["check", "--feature", "mem_dirty_track"])?;
        Ok(format!(
            "{} {major}.{minor}{}",
            binary.display(),
            if tracks {
                ""
            } else {
                "; this kernel does not track memory, so it is copied while a pod stands still"
            }
        ))
    });
    match found {
        Ok(found) => Check::ok("criu", found),
        Err(error) => Check::warn("criu", error.chain(), MEND),
    }
}

impl Criu {
    /// Asks the one at `binary`.
    ///
    /// # Errors
    /// `FailedPrecondition`: it cannot be run, is too old, or this kernel is not for it.
    pub(crate) async fn ask(binary: PathBuf, reaper: &Arc<Reaper>) -> Result<Self> {
        let refuse = |why: String| {
            Error::FailedPrecondition(format!(
                "cannot migrate: {}: {why}: {MEND}",
                binary.display()
            ))
        };
        let run = async |arguments: &[&str]| {
            run(&binary, arguments, reaper)
                .await
                .map_err(|error| refuse(error.to_string()))
        };
        let (_, text) = run(&["--version"]).await?;
        let version = words::version(&text).map_err(refuse)?;
        let (status, text) = run(&["check"]).await?;
        if status != 0 {
            let why = words::errors(&text).unwrap_or_else(|| text.trim().to_owned());
            return Err(refuse(format!("`criu check` says: {why}")));
        }
        let (status, _) = run(&["check", "--feature", "mem_dirty_track"]).await?;
        Ok(Self {
            version,
            tracks_memory: status == 0,
            binary,
        })
    }

    /// The folder that it is in.
    pub(crate) fn dir(&self) -> &Path {
        self.binary.parent().unwrap_or(Path::new("/"))
    }
}

async fn run(
    binary: &Path,
    arguments: &[&str],
    reaper: &Arc<Reaper>,
) -> std::io::Result<(u32, String)> {
    let (reader, writer) = std::io::pipe()?;
    let mut program = Program::new(binary);
    program
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(writer.try_clone()?)
        .stdout(writer);
    let child = reaper.spawn(&mut program)?;
    drop(program);
    let output = Fd::new(reader.into())?;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match output.read(&mut buffer).await? {
            0 => break,
            length => text.extend_from_slice(&buffer[..length]),
        }
    }
    let exit = child.exit.wait().await;
    Ok((exit.status, String::from_utf8_lossy(&text).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_criu_that_is_not_there_is_refused_with_the_way_to_get_it() {
        let config = |path: &str| ContainerConfig {
            criu: Some(path.into()),
            ..ContainerConfig::default()
        };
        let error = find(&config("/nowhere/criu")).unwrap_err().to_string();
        assert!(
            error.contains("install CRIU") && error.contains("/nowhere/criu"),
            "{error}"
        );
        let error = find(&config("/usr/sbin/criu-4")).unwrap_err().to_string();
        assert!(error.contains("called so"), "{error}");
    }
}
