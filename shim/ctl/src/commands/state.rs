//! `dyadctl state`.

use crate::duration::human;
use crate::error::Result;
use crate::model::{Pod, Task, short};
use crate::text::{Cell, Format, Printer, Style, printable};

/// Prints all that is known of `pod`.
///
/// # Errors
/// Where the output is gone.
pub fn run(pod: &Pod, printer: Printer) -> Result<()> {
    if printer.format == Format::Json {
        return printer.json(pod);
    }
    printer.text(&facts(pod))?;
    printer.text("\n")?;
    let headers = ["TASK", "STATE", "SINCE", "STARTS", "PID", "ID", "REASON"];
    let rows: Vec<_> = pod.tasks.iter().map(row).collect();
    printer.table(headers, &rows)
}

fn facts(pod: &Pod) -> String {
    let mut facts = vec![
        ("Pod", pod.label()),
        ("UID", pod.pod_uid.clone()),
        (
            "Sandbox",
            format!("{} ({})", pod.sandbox_id, pod.containerd_namespace),
        ),
        ("Kind", pod.kind.clone()),
        ("State", pod.summary()),
    ];
    if pod.kind == "container" {
        facts.push(("Identity", pod.migration_source()));
    }
    if let Some(machine) = &pod.machine {
        facts.extend([
            (
                "Machine",
                format!("{} on {}", machine.domain, machine.libvirt_uri),
            ),
            (
                "Size",
                format!(
                    "{} vCPU, {} MiB, {}",
                    machine.vcpus,
                    machine.memory_bytes >> 20,
                    machine.accelerator
                ),
            ),
            ("Kernel", machine.kernel_release.clone()),
            ("Note", machine.notes.join("; ")),
        ]);
    }
    facts.push((
        "Shim",
        format!("pid {}, version {}", pod.shim.pid, pod.shim.version),
    ));
    facts
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{:<9} {}\n", format!("{name}:"), printable(value)))
        .collect()
}

fn row(task: &Task) -> [Cell; 7] {
    let state = match task.exit_status {
        Some(status) => format!("{} ({status})", task.state.as_str()),
        None => task.state.as_str().to_owned(),
    };
    [
        task.label().into(),
        Cell::styled(state, Style::of(task.state)),
        task.since.elapsed().map(human).unwrap_or_default().into(),
        task.starts.to_string().into(),
        task.pid
            .map(|pid| pid.to_string())
            .unwrap_or_default()
            .into(),
        short(&task.container_id).into(),
        task.reason.as_str().into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TaskState;
    use crate::model::tests::{pod, task};

    #[test]
    fn the_facts_of_a_machine_and_of_containers() {
        let mut pod = pod("1aaa", "web", vec![task("c", "app", TaskState::Paused)]);
        let text = facts(&pod);
        assert!(text.contains("Pod:      default/web\n"), "{text}");
        assert!(
            text.contains("State:    paused\n") && !text.contains("Machine"),
            "{text}"
        );
        let identity = dyad_runtime_handler::identity::pod_uuid("k8s.io", "1aaa");
        assert!(text.contains(&format!("Identity: {identity}\n")), "{text}");
        pod.machine = Some(crate::model::Machine {
            uuid: "u".into(),
            domain: "dyad-u".into(),
            libvirt_uri: "qemu:///system".into(),
            accelerator: "tcg".into(),
            vcpus: 2,
            memory_bytes: 512 << 20,
            kernel_release: String::new(),
            notes: vec!["it has at most 512 MiB".into()],
        });
        let text = facts(&pod);
        assert!(text.contains("Size:     2 vCPU, 512 MiB, tcg\n"), "{text}");
        assert!(
            text.contains("Note:     it has at most 512 MiB\n"),
            "{text}"
        );
        assert!(
            !text.contains("Kernel"),
            "what is not known is left out: {text}"
        );
    }
}
