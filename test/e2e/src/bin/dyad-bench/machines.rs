//! Dyad's machine kind beside plain libvirt: from RunPodSandbox to the first output of
//! the container's process, and from `virsh create` of the same domain (same kernel,
//! initramfs and devices; names and paths changed) to the first line of its init.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::Env;

use crate::containers::{container_config, pod_config, said_first};
use crate::cri::Cri;
use crate::table::{Row, milliseconds};

/// The guest init's first line on its console.
const INIT_LINE: &str = "dyad-agent: init";
/// A UUID of nobody's pod.
const UUID: &str = "d0d0d0d0-0000-4000-8000-00000000be4c";
/// As large as Dyad makes a pod's disk.
const DISK_BYTES: u64 = 10 << 30;
/// The plain domain's name.
pub const NAME: &str = "dyad-bench";

/// Measures `runs` of each, in turn.
///
/// # Errors
/// A pod or a domain could not be run.
pub async fn measure(env: &Env, cri: &mut Cri, runs: usize) -> Result<Vec<Row>> {
    let (mut floor, mut dyad) = (Vec::new(), Vec::new());
    // One of each goes unmeasured: images are converted, caches fill.
    for run in 0..=runs {
        let (duration, xml) = first_output(env, cri, run).await?;
        let plain = first_line_of_init(env, &xml).await?;
        if run > 0 {
            dyad.push(milliseconds(duration));
            floor.push(milliseconds(plain));
        }
        eprintln!("machines: {run} of {runs}");
    }
    Ok(vec![Row {
        what: "create to first output, machine".into(),
        unit: "ms",
        against: "virsh create, to init",
        yardstick: floor,
        dyad,
    }])
}

/// RunPodSandbox, CreateContainer, StartContainer to the first line in the log, and the
/// XML of the domain that ran it.
async fn first_output(env: &Env, cri: &mut Cri, run: usize) -> Result<(Duration, String)> {
    let name = format!("bench-vm-{run}");
    let pod = pod_config(env, &name);
    let start = Instant::now();
    let pod_id = cri.run_pod("dyad-vm", &pod).await?;
    let id = cri.create(&pod_id, &pod, &container_config()).await?;
    cri.start(&id).await?;
    said_first(env, &name).await?;
    let duration = start.elapsed();
    let domain = env.domain_of(&name)?;
    let xml = env.virsh(&["dumpxml", "--inactive", "--security-info", &domain])?;
    cri.stop(&id).await?;
    cri.stop_pod(&pod_id).await?;
    cri.remove_pod(&pod_id).await?;
    Ok((duration, xml))
}

/// `virsh create` to the first line of init in the console's log.
async fn first_line_of_init(env: &Env, xml: &str) -> Result<Duration> {
    let folder = env.dir.join("bench");
    fs::create_dir_all(&folder)?;
    // QEMU's user writes here.
    fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let console = folder.join("console.log");
    let file = folder.join("domain.xml");
    let plain = Plain {
        folder: &folder,
        initrd: None,
        bridge: None,
    };
    fs::write(&file, plain.domain(xml)?)?;

    let start = Instant::now();
    env.virsh(&["create", &file.display().to_string()])?;
    let end = start + Duration::from_secs(120);
    let duration = loop {
        if fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(INIT_LINE)) {
            break start.elapsed();
        }
        if Instant::now() > end {
            // The failure to tell is the missing line.
            let _ = env.virsh(&["destroy", NAME]);
            bail!("{} never held {INIT_LINE:?}", console.display());
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    };
    env.virsh(&["destroy", NAME])?;
    fs::remove_dir_all(&folder)?;
    Ok(duration)
}

/// What a plain domain has instead of its model's.
pub struct Plain<'a> {
    /// For its disk, sockets and console.
    pub folder: &'a Path,
    /// Instead of the model's.
    pub initrd: Option<&'a Path>,
    /// Where its interface is plugged in; else a tap of its own.
    pub bridge: Option<&'a str>,
}

impl Plain<'_> {
    /// The pod's domain with a name, a UUID, disks, sockets, a console and a tap of its own.
    /// Writable disks become empty sparse ones of the same size; hot-plugged image disks
    /// stay as they are (read-only).
    ///
    /// # Errors
    /// A disk cannot be made.
    pub fn domain(&self, xml: &str) -> Result<String> {
        let mut out = String::new();
        let (mut in_disk, mut in_interface) = (Vec::new(), false);
        for line in xml.lines() {
            let indent = &line[..line.len() - line.trim_start().len()];
            let text = line.trim();
            if text.starts_with("<disk") || !in_disk.is_empty() {
                in_disk.push(line.to_owned());
                if text == "</disk>" {
                    out.push_str(&self.disk(&std::mem::take(&mut in_disk))?);
                }
                continue;
            }
            in_interface =
                (in_interface || text.starts_with("<interface")) && text != "</interface>";
            let changed = self.line(text, in_interface);
            out.push_str(&format!("{indent}{changed}\n"));
        }
        Ok(out)
    }

    fn line(&self, text: &str, in_interface: bool) -> String {
        let file = |name: &str| self.folder.join(name).display().to_string();
        if text.starts_with("<name>") {
            format!("<name>{NAME}</name>")
        } else if text.starts_with("<uuid>") {
            format!("<uuid>{UUID}</uuid>")
        } else if text.starts_with("<log file=") {
            format!("<log file='{}' append='on'/>", file("console.log"))
        } else if text.starts_with("<source mode='bind'") {
            let name = if text.contains("console") {
                "console.sock"
            } else {
                "agent.sock"
            };
            format!("<source mode='bind' path='{}'/>", file(name))
        } else if in_interface && text.starts_with("<interface") {
            match self.bridge {
                Some(bridge) => format!("<interface type='bridge'><source bridge='{bridge}'/>"),
                None => text.to_owned(),
            }
        } else if in_interface && text.starts_with("<target dev=") {
            // libvirt makes this tap itself and takes it away with the domain.
            "<target dev='dyadbench0'/>".to_owned()
        } else if let (true, Some(initrd)) = (text.starts_with("<initrd>"), self.initrd) {
            format!("<initrd>{}</initrd>", initrd.display())
        } else {
            text.to_owned()
        }
    }

    fn disk(&self, lines: &[String]) -> Result<String> {
        let whole = lines.join("\n") + "\n";
        if whole.contains("<readonly/>") {
            return Ok(whole);
        }
        let source = whole
            .split_once("<source file='")
            .and_then(|(_, rest)| rest.split_once('\''))
            .map(|(path, _)| path.to_owned())
            .context("a disk without a file")?;
        let copy = self.folder.join("disk.img");
        let disk = fs::File::create(&copy)?;
        disk.set_len(DISK_BYTES)?;
        Ok(whole.replace(&source, &copy.display().to_string()))
    }
}

/// `kvm` or `tcg (software emulation)`, as the last domain had it.
pub fn accelerator(env: &Env) -> String {
    let used = env.dir.join("libvirt/log/qemu");
    let mut newest = fs::read_dir(used)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    match newest.find_map(|log| fs::read_to_string(log).ok()) {
        Some(text) if text.contains("-accel kvm") => "KVM".into(),
        Some(_) => "TCG (software emulation)".into(),
        None => "none used".into(),
    }
}
