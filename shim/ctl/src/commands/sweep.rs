//! `dyadctl sweep`: removes what pods left on this host that nobody owns any more.

use std::path::Path;
use std::time::Duration;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::sweep::Swept;
use dyad_shim::config::Config;

use crate::args::Options;
use crate::check;
use crate::error::{Error, Result};
use crate::program;
use crate::text::{Format, Printer, printable};

/// One of another process is waited for, and libvirt may be slow.
const LIMIT: Duration = Duration::from_secs(120);

/// Sweeps by the configuration of each handler, and says what went and what did not.
///
/// # Errors
/// [`Error::Failed`]: a configuration is wrong, a program is missing or failed, or something could
/// not be removed.
pub async fn run(options: &Options, endpoint: &str, printer: Printer) -> Result<()> {
    let (configs, shim_dir) = check::configurations(options, endpoint).await?;
    let mut found: Vec<Swept> = Vec::new();
    for config in &configs {
        found.extend(sweep(config, shim_dir.as_deref()).await?);
    }
    match printer.format {
        Format::Json => printer.json(&found)?,
        Format::Table if found.is_empty() => printer.text("nothing was left\n")?,
        Format::Table => printer.text(&found.iter().map(line).collect::<String>())?,
    }
    match found.iter().filter(|swept| !swept.error.is_empty()).count() {
        0 => Ok(()),
        count => Err(Error::Failed {
            context: format!("{count} of {} could not be removed", found.len()),
            source: None,
        }),
    }
}

fn line(swept: &Swept) -> String {
    let what = printable(&swept.what);
    match swept.error.as_str() {
        "" => format!("removed {what}\n"),
        error => format!("kept {what}: {}\n", printable(error)),
    }
}

async fn sweep(config: &Config, shim_dir: Option<&Path>) -> Result<Vec<Swept>> {
    let name = match config.kind {
        Kind::Container => "containerd-shim-dyad-v2",
        Kind::Machine => "containerd-shim-dyad-machine-v2",
    };
    let failed = |error: String| Error::Failed {
        context: format!("sweep by {name}: {error}"),
        source: None,
    };
    let program = program::find_ours(name, shim_dir)
        .ok_or_else(|| failed("it is neither beside containerd's shim nor on PATH".into()))?;
    let json = serde_json::to_vec(config).map_err(|error| failed(error.to_string()))?;
    let answer = program::output(&program, &["-sweep"], &json, LIMIT)
        .await
        .map_err(failed)?;
    serde_json::from_slice(&answer).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_became_of_it() {
        let mut swept = Swept {
            what: "machine 7".into(),
            error: String::new(),
        };
        assert_eq!(line(&swept), "removed machine 7\n");
        swept.error = "libvirt is gone\x1b[2J".into();
        assert_eq!(line(&swept), "kept machine 7: libvirt is gone\\u{1b}[2J\n");
    }
}
