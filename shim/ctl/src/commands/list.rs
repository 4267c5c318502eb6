//! `dyadctl list`.

use serde::Serialize;

use crate::duration::human;
use crate::error::Result;
use crate::fleet::Fleet;
use crate::model::{Pod, TaskState, short};
use crate::text::{Cell, Format, Printer, Style};

/// Keys of `list -o json`.
#[derive(Serialize)]
struct Listing<'a> {
    pods: Vec<&'a Pod>,
    unreachable: Vec<Unreachable<'a>>,
}

#[derive(Serialize)]
struct Unreachable<'a> {
    containerd_namespace: &'a str,
    sandbox_id: &'a str,
    reason: String,
}

/// Prints all pods of `pod_namespace`, or of all, and the shims that are silent.
///
/// # Errors
/// Where the output is gone.
pub fn run(fleet: &Fleet, pod_namespace: Option<&str>, printer: Printer) -> Result<()> {
    let wanted = |pod: &&Pod| pod_namespace.is_none_or(|name| pod.pod_namespace == name);
    let pods: Vec<&Pod> = fleet
        .pods
        .iter()
        .map(|(_, pod)| pod)
        .filter(wanted)
        .collect();
    if printer.format == Format::Json {
        let unreachable = fleet
            .silent
            .iter()
            .map(|(place, error)| Unreachable {
                containerd_namespace: &place.containerd_namespace,
                sandbox_id: &place.sandbox_id,
                reason: error.chain(),
            })
            .collect();
        return printer.json(&Listing { pods, unreachable });
    }
    let headers = [
        "POD",
        "KIND",
        "STATE",
        "CONTAINERS",
        "SINCE",
        "SANDBOX",
        "SHIM",
    ];
    let rows: Vec<_> = pods.iter().map(|pod| row(pod)).collect();
    printer.table(headers, &rows)?;
    if fleet.silent.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = fleet
        .silent
        .iter()
        .map(|(place, error)| {
            [
                Cell::from(short(&place.sandbox_id)),
                Cell::styled(&place.containerd_namespace, Style::Plain),
                Cell::styled(error.chain(), Style::Bad),
            ]
        })
        .collect();
    printer.text("\n")?;
    printer.table(["UNREACHABLE SHIM OF", "NAMESPACE", "WHY"], &rows)
}

fn row(pod: &Pod) -> [Cell; 7] {
    let summary = pod.summary();
    let style = pod
        .tasks
        .iter()
        .find(|task| task.state.as_str() == summary)
        .map_or(Style::Notice, |task| Style::of(task.state));
    let running = pod
        .containers()
        .filter(|task| task.state == TaskState::Running)
        .count();
    let since = pod.sandbox().and_then(|task| task.since.elapsed());
    [
        pod.label().into(),
        pod.kind.as_str().into(),
        Cell::styled(summary, style),
        format!("{running}/{}", pod.containers().count()).into(),
        since.map(human).unwrap_or_default().into(),
        short(&pod.sandbox_id).into(),
        pod.shim.pid.to_string().into(),
    ]
}
