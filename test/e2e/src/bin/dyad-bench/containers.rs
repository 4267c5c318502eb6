//! Dyad's container kind beside containerd's own runc shim: the same pods, in turn.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::Env;
use dyad_e2e::host::{cgroup_parent, shim_of};

use crate::cri::{
    ContainerConfig, ContainerMetadata, Cri, ImageSpec, LinuxPodSandboxConfig, PodSandboxConfig,
    PodSandboxMetadata,
};
use crate::table::{Row, milliseconds};

/// The handlers measured; the first is the yardstick.
const HANDLERS: [&str; 2] = ["runc", "dyad"];

/// What is measured of each pod, with its unit.
const MEASURES: [(&str, &str); 6] = [
    ("CreatePod", "ms"),
    ("CreateContainer", "ms"),
    ("StartContainer", "ms"),
    ("StopContainer", "ms"),
    ("StopPod", "ms"),
    ("shim PSS, a lone pod", "MB"),
];
/// As many pods share a shim's executable, where memory per pod is told.
const PODS: usize = 10;

/// Measures `runs` pods of each.
///
/// # Errors
/// A pod could not be run.
pub async fn measure(env: &Env, cri: &mut Cri, runs: usize) -> Result<Vec<Row>> {
    let mut samples: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    // One of each goes unmeasured: caches fill.
    for run in 0..=runs {
        let mut order = HANDLERS;
        // Neither is always the first.
        if run % 2 == 1 {
            order.reverse();
        }
        for handler in order {
            let life = one_pod(env, cri, handler, run).await?;
            if run > 0 {
                for ((what, _), value) in MEASURES.iter().zip(life) {
                    samples.entry((handler, what)).or_default().push(value);
                }
            }
        }
        eprintln!("containers: {run} of {runs}");
    }
    let mut of = |handler, what| samples.remove(&(handler, what)).unwrap_or_default();
    Ok(MEASURES
        .iter()
        .map(|&(what, unit)| Row {
            what: format!("{what}, container"),
            unit,
            against: "containerd-shim-runc-v2",
            yardstick: of(HANDLERS[0], what),
            dyad: of(HANDLERS[1], what),
        })
        .collect())
}

/// What each of [`PODS`] pods with a running container costs in shims: they share the
/// executable's pages, as on a node.
///
/// # Errors
/// A pod could not be run.
pub async fn memory(env: &Env, cri: &mut Cri) -> Result<Row> {
    let mut row = Row {
        what: format!("shim PSS per pod of {PODS}, container"),
        unit: "MB",
        against: "containerd-shim-runc-v2",
        yardstick: Vec::new(),
        dyad: Vec::new(),
    };
    for handler in HANDLERS {
        let mut pods = Vec::new();
        for number in 0..PODS {
            let name = format!("bench-memory-{handler}-{number}");
            let pod = pod_config(env, &name);
            let id = cri.run_pod(handler, &pod).await?;
            let container = cri.create(&id, &pod, &container_config()).await?;
            cri.start(&container).await?;
            said_first(env, &name).await?;
            pods.push(id);
        }
        for id in &pods {
            let samples = match handler {
                "dyad" => &mut row.dyad,
                _ => &mut row.yardstick,
            };
            samples.push(shim_pss_mb(id)?);
        }
        for id in &pods {
            cri.stop_pod(id).await?;
            cri.remove_pod(id).await?;
        }
        eprintln!("memory: {PODS} pods of {handler}");
    }
    Ok(row)
}

/// A pod of this name, with a cgroup as kubelet would name one.
pub fn pod_config(env: &Env, name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".into(),
        }),
        hostname: name.to_owned(),
        log_directory: env.dir.join("log/pods").join(name).display().to_string(),
        annotations: HashMap::new(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/{}/{name}", cgroup_parent(&env.dir)),
        }),
    }
}

/// A container that says `first` and waits for SIGTERM.
pub fn container_config() -> ContainerConfig {
    running("echo first; trap 'exit 0' TERM; sleep 100000 & wait")
}

/// A container that runs `script`.
pub fn running(script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: "main".into(),
        }),
        image: Some(ImageSpec {
            image: "dyad.test/busybox:1".into(),
        }),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        log_path: "main.log".into(),
    }
}

async fn one_pod(env: &Env, cri: &mut Cri, handler: &str, run: usize) -> Result<[f64; 6]> {
    let name = format!("bench-{handler}-{run}");
    let pod = pod_config(env, &name);
    let start = Instant::now();
    let pod_id = cri.run_pod(handler, &pod).await?;
    let create_pod = start.elapsed();
    let start = Instant::now();
    let id = cri.create(&pod_id, &pod, &container_config()).await?;
    let create = start.elapsed();
    let start = Instant::now();
    cri.start(&id).await?;
    let start_container = start.elapsed();
    said_first(env, &name).await?;
    let pss = shim_pss_mb(&pod_id)?;
    let start = Instant::now();
    cri.stop(&id).await?;
    let stop = start.elapsed();
    let start = Instant::now();
    cri.stop_pod(&pod_id).await?;
    let stop_pod = start.elapsed();
    cri.remove_pod(&pod_id).await?;
    let ms = milliseconds;
    Ok([
        ms(create_pod),
        ms(create),
        ms(start_container),
        ms(stop),
        ms(stop_pod),
        pss,
    ])
}

/// Waits for the container's first line in its log; looks every half millisecond.
///
/// # Errors
/// It did not come within two minutes.
pub async fn said_first(env: &Env, pod: &str) -> Result<()> {
    let log = env.dir.join("log/pods").join(pod).join("main.log");
    let end = Instant::now() + Duration::from_secs(120);
    while Instant::now() < end {
        if fs::read_to_string(&log).is_ok_and(|text| text.contains("first")) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    bail!("{} holds no first line", log.display())
}

/// Proportional set size of the pod's shim.
fn shim_pss_mb(pod_id: &str) -> Result<f64> {
    let file = format!("/proc/{}/smaps_rollup", shim_of(pod_id)?);
    let rollup = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    let kilobytes: f64 = number
        .and_then(|text| text.parse().ok())
        .with_context(|| format!("{file} tells no Pss"))?;
    Ok(kilobytes / 1000.0)
}
