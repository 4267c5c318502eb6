//! Whatever is asked wrongly is refused by its name, and nothing is left of it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use dyad_e2e::host::Snapshot;
use libtest_mimic::Completion;
use serde_json::{Value, json};

use super::{Case, DYAD, MACHINES, case};
use crate::context::{Context, names, refusal};

pub const CASES: &[Case] = &[
    case!(an_unknown_annotation_is_named)
        .on(DYAD)
        .alone()
        .short(),
    case!(an_unknown_config_key_is_named_with_the_nearest)
        .on(DYAD)
        .alone(),
    case!(a_config_file_that_is_missing_is_named)
        .on(DYAD)
        .alone(),
    case!(an_image_without_entrypoint_is_named),
    case!(a_missing_guest_kernel_is_named).on(MACHINES).alone(),
    case!(a_libvirtd_that_does_not_run_is_named)
        .on(MACHINES)
        .alone(),
    Case::new("an_unusable_kvm_is_named", an_unusable_kvm_is_named)
        .on(MACHINES)
        .alone(),
    case!(host_network_is_refused_for_a_machine)
        .on(MACHINES)
        .alone(),
    case!(host_pid_is_refused_for_a_machine)
        .on(MACHINES)
        .alone(),
];

/// The pod must be refused with all the words named, and leave nothing.
fn refused(context: &Context<'_>, change: impl FnOnce(&mut Value), words: &[&str]) -> Result<()> {
    let before = Snapshot::take(&context.env.dir);
    let mut config = context.pod_config();
    change(&mut config);
    names(
        &refusal(context.run_pod(context.handler, config.clone()))?,
        words,
    )?;
    // kubelet removes what it knows of a pod that failed.
    for pod in context.crictl.pods()? {
        context.crictl.rmp_force(&pod)?;
    }
    context.remove_cgroup_of(&config)?;
    before.nothing_new("a refused pod")
}

/// A changed configuration file, put back when this goes.
struct ChangedConfig {
    file: PathBuf,
    content: String,
}

impl ChangedConfig {
    fn new(context: &Context<'_>, change: impl FnOnce(&str) -> String) -> Result<Self> {
        let file = context.env.config_file(context.handler.name());
        let content =
            fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let changed = change(&content);
        let guard = Self { file, content };
        fs::write(&guard.file, changed)?;
        Ok(guard)
    }

    /// One key of a section has another value (TOML, or nothing to leave it out).
    fn with(context: &Context<'_>, section: &str, key: &str, value: &str) -> Result<Self> {
        Self::new(context, |content| {
            let mut out = String::new();
            for line in content
                .lines()
                .filter(|line| !line.starts_with(&format!("{key} =")))
            {
                out.push_str(line);
                out.push('\n');
                if line == format!("[{section}]") {
                    out.push_str(&format!("{key} = {value}\n"));
                }
            }
            out
        })
    }
}

impl Drop for ChangedConfig {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.file, &self.content) {
            eprintln!("put back {}: {error}", self.file.display());
        }
    }
}

fn an_unknown_annotation_is_named(context: &Context<'_>) -> Result<()> {
    refused(
        context,
        |config| config["annotations"] = json!({"dyad.dev/nonsense": "1"}),
        &["dyad.dev/nonsense"],
    )
}

fn an_unknown_config_key_is_named_with_the_nearest(context: &Context<'_>) -> Result<()> {
    let _config = ChangedConfig::new(context, |content| content.replace("log_level", "log_levle"))?;
    refused(context, |_| (), &["log_levle", "log_level"])
}

fn a_config_file_that_is_missing_is_named(context: &Context<'_>) -> Result<()> {
    let file = context.env.config_file(context.handler.name());
    let aside = file.with_extension("aside");
    fs::rename(&file, &aside)?;
    let result = refused(context, |_| (), &[&file.display().to_string()]);
    fs::rename(&aside, &file)?;
    result
}

fn an_image_without_entrypoint_is_named(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let mut config = pod.container_config("");
    config["image"]["image"] = json!("dyad.test/noentry:1");
    config["command"] = json!([]);
    names(&refusal(pod.create(&config))?, &["no command specified"])
}

fn a_missing_guest_kernel_is_named(context: &Context<'_>) -> Result<()> {
    let _config = ChangedConfig::with(context, "machine", "kernel", "\"/no/such/vmlinux\"")?;
    refused(context, |_| (), &["/no/such/vmlinux"])
}

fn a_libvirtd_that_does_not_run_is_named(context: &Context<'_>) -> Result<()> {
    let uri = "qemu+unix:///system?socket=/no/such/libvirt-sock";
    let _config = ChangedConfig::with(context, "machine", "libvirt_uri", &format!("\"{uri}\""))?;
    refused(context, |_| (), &[uri])
}

fn an_unusable_kvm_is_named(context: &Context<'_>) -> Result<Completion> {
    let _config = ChangedConfig::with(context, "machine", "accelerator", "\"kvm\"")?;
    let before = Snapshot::take(&context.env.dir);
    let config = context.pod_config();
    let pod = context.run_pod(context.handler, config.clone());
    if pod.is_ok() {
        return Ok(Completion::ignored_with("KVM works on this host"));
    }
    names(&refusal(pod)?.to_lowercase(), &["kvm"])?;
    context.remove_cgroup_of(&config)?;
    before.nothing_new("a refused pod")?;
    Ok(Completion::Completed)
}

/// NODE in CRI's NamespaceMode.
const NODE: u8 = 2;

fn host_network_is_refused_for_a_machine(context: &Context<'_>) -> Result<()> {
    refused(
        context,
        |config| {
            config["linux"]["security_context"] = json!({"namespace_options": {"network": NODE}})
        },
        &["hostNetwork"],
    )
}

fn host_pid_is_refused_for_a_machine(context: &Context<'_>) -> Result<()> {
    refused(
        context,
        |config| config["linux"]["security_context"] = json!({"namespace_options": {"pid": NODE}}),
        &["hostPID"],
    )
}
