//! `dyadctl migrate`: moves a pod, and shows how far it is.

mod target;

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use self::target::{Cri, Target};
use crate::args::{Options, PodArgument};
use crate::client::{Client, MigrationRequest};
use crate::duration::parse_timeout;
use crate::error::{Error, Result};
use crate::fleet::{Fleet, connect};
use crate::text::{Format, Printer, printable};

/// How long a target that was made just now may take to wait for its source.
const SETTLE: Duration = Duration::from_secs(5);

/// What to do when `--max-time` is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum After {
    /// Give up; the pod goes on here
    #[default]
    Abort,
    /// Run the pod there now, and fetch the rest of its memory
    PostCopy,
    /// Stop the pod here, so that what is left can be copied
    Pause,
}

/// How to move.
#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// What moves.
    #[command(flatten)]
    pub pod: PodArgument,
    /// Where to: a machine to the other node's libvirt (qemu+tls://node2/system), containers to
    /// the target pod's migration socket or address
    #[arg(long, value_name = "URI", required_unless_present = "cancel")]
    pub to: Option<String>,
    /// First make the target pod, over this CRI endpoint of the other node's containerd (for
    /// setups without an API server); it is removed again if the pod does not arrive
    #[arg(long, value_name = "ENDPOINT", requires = "to")]
    pub create_target: Option<String>,
    /// The CRI endpoint of this node's containerd, which knows how the pod was asked for
    #[arg(
        long,
        value_name = "ENDPOINT",
        env = "CONTAINER_RUNTIME_ENDPOINT",
        default_value = "unix:///run/containerd/containerd.sock"
    )]
    pub runtime_endpoint: String,
    /// Give up the migration that is under way
    #[arg(long, conflicts_with = "to")]
    pub cancel: bool,
    /// Machine: where the memory goes: tcp://HOST[:PORT] or unix:///PATH [default: libvirt's choice]
    #[arg(long, value_name = "URI")]
    pub migrate_uri: Option<String>,
    /// Machine: where the disks go [default: as the memory]
    #[arg(long, value_name = "URI")]
    pub disks_uri: Option<String>,
    /// At most so many MiB per second
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub bandwidth: u64,
    /// How long the pod may stand still at the switch [default: QEMU's 300ms]
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    pub max_downtime: Option<Duration>,
    /// How long it may take in all
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    pub max_time: Option<Duration>,
    /// What to do then
    #[arg(long, value_enum, default_value_t, requires = "max_time")]
    pub then: After,
    /// Slow the pod down when it changes memory faster than it is copied
    #[arg(long)]
    pub auto_converge: bool,
    /// Connections for the memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub parallel: u32,
    /// Refuse to send anything that is not encrypted
    #[arg(long, conflicts_with = "allow_clear")]
    pub tls: bool,
    /// Allow a network connection that is not encrypted
    #[arg(long)]
    pub allow_clear: bool,
    /// Containers: take open TCP connections along, where the address moves too
    #[arg(long)]
    pub tcp_established: bool,
}

/// How far a migration is: keys of `-o json`, one object a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Counts this shim's migrations.
    pub migration: u64,
    /// checking, preparing, copying, switching, fetching, finishing; completed, abandoned,
    /// lost; none.
    pub stage: &'static str,
    /// Why it was abandoned or lost.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where to.
    pub destination: String,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes to copy.
    pub bytes_total: u64,
    /// Bytes still to copy.
    pub bytes_remaining: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Bytes per second that the pod changes.
    pub dirty_rate: u64,
    /// While unknown: absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime_us: Option<u64>,
    /// Once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// Since it was asked for.
    pub elapsed_ms: u64,
}

impl Progress {
    fn is_over(&self) -> bool {
        matches!(self.stage, "completed" | "abandoned" | "lost" | "none")
    }

    /// The figures that matter in this stage.
    pub fn line(&self) -> String {
        let mut line = self.stage.to_owned();
        if self.bytes_total != 0 && !self.is_over() {
            line.push_str(&format!(
                " {} of {}, {}/s, changing {}/s",
                HumanBytes(self.bytes_done),
                HumanBytes(self.bytes_total),
                HumanBytes(self.rate),
                HumanBytes(self.dirty_rate)
            ));
        }
        if let Some(us) = self.expected_downtime_us.filter(|_| !self.is_over()) {
            line.push_str(&format!(", would stand still {} ms", us.div_ceil(1000)));
        }
        if self.stage == "completed" {
            line.push_str(&format!(" in {:.1} s", self.elapsed_ms as f64 / 1000.0));
            if let Some(us) = self.downtime_us {
                line.push_str(&format!(", stood still {} ms", us.div_ceil(1000)));
            }
        }
        if !self.reason.is_empty() {
            line.push_str(": ");
            line.push_str(&printable(&self.reason));
        }
        line
    }

    /// What the end of a migration means for whoever asked for it.
    fn outcome(self) -> Result<()> {
        match self.stage {
            "completed" => Ok(()),
            stage => Err(Error::Failed {
                context: format!("the migration is {stage}: {}", self.reason),
                source: None,
            }),
        }
    }
}

/// Moves what was named, or gives that up.
///
/// # Errors
/// As the shim answers; [`Error::Failed`] when it was abandoned or lost.
pub async fn run(
    fleet: &Fleet,
    arguments: &MigrateArguments,
    options: &Options,
    printer: Printer,
) -> Result<()> {
    let (place, named) = fleet.find(&arguments.pod.pod, options.namespace.as_deref())?;
    if !named.container_id().is_empty() {
        return Err(Error::Usage(format!(
            "{} is a container, and a pod moves as a whole: name the pod",
            named.label()
        )));
    }
    let client = connect(place, options.ask_timeout()).await?;
    let limit = options.timeout.unwrap_or(Duration::from_secs(120));
    if arguments.cancel {
        let pod = client.cancel_migration(limit).await?;
        return if printer.format == Format::Json {
            printer.json(&pod)
        } else {
            printer.text(&format!("{}: {}\n", named.label(), pod.summary()))
        };
    }
    let request = MigrationRequest {
        destination: arguments.to.clone().unwrap_or_default(),
        migrate_uri: arguments.migrate_uri.clone(),
        disks_uri: arguments.disks_uri.clone(),
        bandwidth_mib_s: arguments.bandwidth,
        max_downtime: arguments.max_downtime,
        max_time: arguments.max_time,
        then: arguments.then,
        auto_converge: arguments.auto_converge,
        parallel: arguments.parallel,
        tls_required: arguments.tls,
        allow_clear: arguments.allow_clear,
        tcp_established: arguments.tcp_established,
    };
    let label = named.label();
    let Some(endpoint) = &arguments.create_target else {
        client.migrate(&request, limit).await?;
        return follow(&client, &label, printer).await?.outcome();
    };
    let here = Cri::at(&arguments.runtime_endpoint, limit)?;
    let there = Cri::at(endpoint, limit)?;
    let target = Target::create(named.pod, &here, there, printer).await?;
    let end = match begin(&client, &request, limit).await {
        Ok(()) => follow(&client, &label, printer).await,
        Err(error) => Err(error),
    };
    match &end {
        Ok(end) if end.stage == "completed" => {}
        Ok(end) if end.stage == "abandoned" => target.remove().await,
        Err(Error::Refused(_) | Error::Usage(_)) => target.remove().await,
        // It may run there.
        Ok(_) | Err(_) => target.keep(),
    }
    end?.outcome()
}

/// Asks until the target, which was made just now, waits for its source.
async fn begin(client: &Client, request: &MigrationRequest, limit: Duration) -> Result<()> {
    let end = Instant::now() + SETTLE;
    loop {
        match client.migrate(request, limit).await {
            Err(Error::Refused(_)) if Instant::now() < end => {
                sleep(Duration::from_millis(200)).await;
            }
            other => return other.map(drop),
        }
    }
}

/// Shows how far the migration is, to its end.
async fn follow(client: &Client, label: &str, printer: Printer) -> Result<Progress> {
    let mut told = client.migration_status().await?;
    let bar = bar(printer);
    let mut last: Option<Progress> = None;
    while let Some(progress) = told.next().await? {
        let new_stage = last
            .as_ref()
            .is_none_or(|last| last.stage != progress.stage);
        match (&bar, printer.format) {
            (_, Format::Json) => printer.json_line(&progress)?,
            (Some(bar), _) => {
                bar.set_length(progress.bytes_total.max(1));
                bar.set_position(progress.bytes_done.min(progress.bytes_total));
                bar.set_message(progress.line());
            }
            // A line for each stage is enough for a log.
            (None, _) if new_stage => {
                printer.text(&format!("{label}: {}\n", progress.line()))?;
            }
            (None, _) => {}
        }
        let over = progress.is_over();
        last = Some(progress);
        if over {
            break;
        }
    }
    let end = last.ok_or_else(|| {
        Error::unreachable("the migration's progress", "the shim ended without a word")
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
        printer.text(&format!("{label}: {}\n", end.line()))?;
    }
    Ok(end)
}

fn bar(printer: Printer) -> Option<ProgressBar> {
    if printer.format == Format::Json || !std::io::stderr().is_terminal() {
        return None;
    }
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    Some(ProgressBar::new(1).with_style(style))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(stage: &'static str) -> Progress {
        Progress {
            migration: 1,
            stage,
            reason: String::new(),
            destination: "qemu+tls://n/system".into(),
            bytes_done: 1 << 20,
            bytes_total: 4 << 20,
            bytes_remaining: 3 << 20,
            rate: 1 << 20,
            dirty_rate: 0,
            expected_downtime_us: Some(45_100),
            downtime_us: None,
            elapsed_ms: 1500,
        }
    }

    #[test]
    fn a_line_tells_what_matters_in_its_stage() {
        assert_eq!(
            progress("copying").line(),
            "copying 1.00 MiB of 4.00 MiB, 1.00 MiB/s, changing 0 B/s, would stand still 46 ms"
        );
        let completed = Progress {
            downtime_us: Some(70_000),
            ..progress("completed")
        };
        assert_eq!(completed.line(), "completed in 1.5 s, stood still 70 ms");
        let abandoned = Progress {
            reason: "no space\x1b[2J".into(),
            ..progress("abandoned")
        };
        assert_eq!(abandoned.line(), "abandoned: no space\\u{1b}[2J");
    }
}
