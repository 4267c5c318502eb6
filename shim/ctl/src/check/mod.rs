//! `dyadctl check`: can this host run pods of both kinds, and if not, what mends it.
//!
//! ```text
//! host ─ user, cgroups
//! containerd ─ asked over CRI, else what it would be configured as
//!    └─ each handler of ours ─ its configuration ─ container: the OCI runtime
//!                                                └ machine: the executable that serves
//!                                                  machine pods checks itself
//! ```
//! The machine's part is asked of `containerd-shim-dyad-machine-v2 -check`, because that
//! executable must find libvirt, and dyadctl must start where there is none.

mod containerd;
mod host;
mod machine;

use std::path::{Path, PathBuf};

use dyad_runtime_handler::check::{Check, Status};
use dyad_runtime_handler::config::Kind;
use dyad_shim::config::{Config, Source};
use serde::Serialize;

use crate::args::Options;
use crate::config::{load, source};
use crate::error::{Error, Result};
use crate::text::{Format, Printer, Style, printable};

/// One line, and one element of `check -o json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The runtime handler that it is about, where it is about one.
    handler: Option<String>,
    #[serde(flatten)]
    check: Check,
}

impl Line {
    fn of_host(check: Check) -> Self {
        Self {
            handler: None,
            check,
        }
    }
}

/// Checks this host and prints what was found.
///
/// # Errors
/// [`Error::Failed`] where a check failed.
pub async fn run(options: &Options, endpoint: &str, printer: Printer) -> Result<()> {
    let lines = look(options, endpoint).await;
    match printer.format {
        Format::Json => printer.json(&lines)?,
        Format::Table => printer.text(&print(&lines, printer))?,
    }
    let failed = lines
        .iter()
        .filter(|line| line.check.status == Status::Fail)
        .count();
    match failed {
        0 => Ok(()),
        count => Err(Error::Failed {
            context: format!("{count} of {} checks failed", lines.len()),
            source: None,
        }),
    }
}

async fn look(options: &Options, endpoint: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = host::checks().into_iter().map(Line::of_host).collect();
    let (found, checks) = containerd::look(endpoint).await;
    lines.extend(checks.into_iter().map(Line::of_host));
    let shim = containerd::shim(found.as_ref()).await;
    let shim_dir = shim
        .1
        .as_ref()
        .and_then(|path| path.parent().map(PathBuf::from));
    lines.push(Line::of_host(shim.0));

    for (handler, source) in sources(options, found.as_ref()) {
        let config = match load(&source) {
            Ok(config) => {
                let check = Check::ok("configuration", described(&source, &config));
                lines.push(Line {
                    handler: handler.clone(),
                    check,
                });
                config
            }
            Err(error) => {
                let mend = "correct it; dyadctl config shows what is in effect";
                let check = Check::fail("configuration", error.chain(), mend);
                lines.push(Line {
                    handler: handler.clone(),
                    check,
                });
                continue;
            }
        };
        let checks = match config.kind {
            Kind::Container => container(&config).await,
            Kind::Machine => machine::checks(&config, shim_dir.as_deref()).await,
        };
        lines.extend(checks.into_iter().map(|check| Line {
            handler: handler.clone(),
            check,
        }));
    }
    lines
}

/// Every configuration that a handler on this host has, and the folder of the shim where it was
/// found.
///
/// # Errors
/// One of them cannot be read, or is wrong.
pub async fn configurations(
    options: &Options,
    endpoint: &str,
) -> Result<(Vec<Config>, Option<PathBuf>)> {
    let (found, _) = containerd::look(endpoint).await;
    let (_, shim) = containerd::shim(found.as_ref()).await;
    let mut configs: Vec<Config> = Vec::new();
    for (_, source) in sources(options, found.as_ref()) {
        let config = load(&source)?;
        if !configs.contains(&config) {
            configs.push(config);
        }
    }
    let shim_dir = shim.as_deref().and_then(Path::parent).map(PathBuf::from);
    Ok((configs, shim_dir))
}

/// The configurations to check: each handler's, and the one that dyadctl was given where
/// it is none of those.
fn sources(options: &Options, found: Option<&containerd::Found>) -> Vec<(Option<String>, Source)> {
    let mut sources: Vec<_> = found
        .map_or(&[][..], |found| &found.handlers)
        .iter()
        .map(|handler| (Some(handler.name.clone()), handler.config.clone()))
        .collect();
    let given = source(options);
    let is_new = sources.iter().all(|(_, source)| *source != given);
    if sources.is_empty() || (options.config.is_some() && is_new) {
        sources.push((None, given));
    }
    sources
}

fn described(source: &Source, config: &Config) -> String {
    let place = match source {
        Source::Default => "the default files".to_owned(),
        Source::Path(path) => path.display().to_string(),
        Source::Body(_) => "containerd's runtime options".to_owned(),
    };
    format!("kind {} from {place}", config.kind)
}

/// Runs programs, so not on this thread.
async fn container(config: &Config) -> Vec<Check> {
    let config = config.container.clone();
    match tokio::task::spawn_blocking(move || dyad_container::check(&config)).await {
        Ok(checks) => checks,
        Err(error) => vec![Check::fail("oci runtime", error.to_string(), "")],
    }
}

/// What a program said may be several.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn print(lines: &[Line], printer: Printer) -> String {
    let name = |line: &Line| match &line.handler {
        Some(handler) => format!("{handler}: {}", line.check.name),
        None => line.check.name.clone(),
    };
    let width = lines
        .iter()
        .map(|line| name(line).chars().count())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for line in lines {
        let (word, style) = match line.check.status {
            Status::Ok => ("ok", Style::Good),
            Status::Warn => ("warn", Style::Notice),
            Status::Fail => ("fail", Style::Bad),
        };
        let pad = " ".repeat(4 - word.len());
        text.push_str(&format!(
            "{}{pad}  {:<width$}  {}\n",
            printer.word(word, style),
            printable(&name(line)),
            printable(&one_line(&line.check.found))
        ));
        if !line.check.mend.is_empty() {
            text.push_str(&format!(
                "{:>width$}-> {}\n",
                "",
                printable(&line.check.mend),
                width = width + 8
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_say_how_to_mend() {
        let lines = [
            Line::of_host(Check::ok("user", "root")),
            Line {
                handler: Some("dyad-vm".into()),
                check: Check::fail("kernel", "/k: no such file", "build it with hack/guest"),
            },
        ];
        assert_eq!(
            print(&lines, Printer::new(Format::Table)),
            "ok    user             root\n\
             fail  dyad-vm: kernel  /k: no such file\n\
             \x20                      -> build it with hack/guest\n"
        );
        assert_eq!(
            serde_json::to_value(&lines[1]).unwrap(),
            serde_json::json!({
                "handler": "dyad-vm", "name": "kernel", "status": "fail",
                "found": "/k: no such file", "mend": "build it with hack/guest",
            })
        );
    }
}
