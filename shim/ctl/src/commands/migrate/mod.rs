//! `dyadctl migrate`: moves a pod, and shows how far it is.

mod target;

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, sleep};

use self::target::{Cri, Target};
use crate::args::{MigrateArguments, Options};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::fleet::{Fleet, connect};
use crate::migration::{MigrationRequest, Progress};
use crate::text::{Format, Printer};

/// How long a target that was made just now may take to wait for its source.
const SETTLE: Duration = Duration::from_secs(5);

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
