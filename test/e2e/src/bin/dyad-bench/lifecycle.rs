//! What Kubernetes has no word for: pause and resume beside virsh's, stop and start in
//! place beside a new pod, and how quickly many shims tell their state.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_api::lifecycle::StateRequest;
use dyad_api::lifecycle_ttrpc::LifecycleClient;
use dyad_api::ttrpc;
use dyad_e2e::command;
use dyad_e2e::env::Env;

use crate::containers::{container_config, pod_config, said_first};
use crate::cri::Cri;
use crate::table::{Row, milliseconds};

/// How many pods are asked at once.
const PODS: usize = 50;
/// How often each is asked.
const ASKED: usize = 20;
/// A pause takes milliseconds: this many are no matter.
const PAUSES: usize = 10;
/// Longer than anything here takes.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Of the container kind: `runs` pods in place and anew; the state of [`PODS`] pods.
///
/// # Errors
/// A pod could not be run, or a shim gave no answer.
pub async fn containers(env: &Env, cri: &mut Cri, runs: usize) -> Result<Vec<Row>> {
    let in_place = in_place(env, cri, "dyad", runs).await?;
    Ok(vec![in_place, state(env, cri).await?])
}

/// Of the machine kind: `runs` pods in place and anew; pauses of one machine.
///
/// # Errors
/// A pod could not be run.
pub async fn machines(env: &Env, cri: &mut Cri, runs: usize) -> Result<Vec<Row>> {
    let mut rows = pauses(env, cri).await?;
    rows.push(in_place(env, cri, "dyad-vm", runs).await?);
    Ok(rows)
}

/// Both ends at the first output of the process that runs anew.
async fn in_place(env: &Env, cri: &mut Cri, handler: &str, runs: usize) -> Result<Row> {
    let kind = if handler == "dyad" {
        "container"
    } else {
        "machine"
    };
    let name = format!("bench-in-place-{kind}");
    let pod = pod_config(env, &name);
    let (mut anew, mut in_place) = (Vec::new(), Vec::new());
    let mut pod_id = cri.run_pod(handler, &pod).await?;
    let mut id = cri.create(&pod_id, &pod, &container_config()).await?;
    cri.start(&id).await?;
    said_first(env, &name).await?;
    for run in 0..runs {
        let log = env.dir.join("log/pods").join(&name).join("main.log");
        let start = Instant::now();
        dyadctl(env, &["stop", &pod_id])?;
        dyadctl(env, &["start", &pod_id])?;
        said(&log, 2).await?;
        in_place.push(milliseconds(start.elapsed()));

        let start = Instant::now();
        cri.stop(&id).await?;
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        fs::remove_file(&log)?;
        pod_id = cri.run_pod(handler, &pod).await?;
        id = cri.create(&pod_id, &pod, &container_config()).await?;
        cri.start(&id).await?;
        said(&log, 1).await?;
        anew.push(milliseconds(start.elapsed()));
        eprintln!("in place, {kind}: {} of {runs}", run + 1);
    }
    cri.stop_pod(&pod_id).await?;
    cri.remove_pod(&pod_id).await?;
    Ok(Row {
        what: format!("stop and start in place, {kind}"),
        unit: "ms",
        against: "delete and create",
        yardstick: anew,
        dyad: in_place,
    })
}

/// Waits until the log holds the container's first line as often as it has started.
async fn said(log: &Path, times: usize) -> Result<()> {
    let end = Instant::now() + TIMEOUT;
    while Instant::now() < end {
        if fs::read_to_string(log).is_ok_and(|text| text.matches(" first").count() >= times) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    bail!("{} does not hold {times} first lines", log.display())
}

/// One machine, paused and resumed in turn by dyadctl and by virsh: a process each.
async fn pauses(env: &Env, cri: &mut Cri) -> Result<Vec<Row>> {
    let name = "bench-pause";
    let pod = pod_config(env, name);
    let pod_id = cri.run_pod("dyad-vm", &pod).await?;
    let domain = env.domain_of(name)?;
    let mut samples: [Vec<f64>; 4] = Default::default();
    // One of each goes unmeasured.
    for run in 0..=PAUSES {
        let start = Instant::now();
        dyadctl(env, &["pause", &pod_id])?;
        let pause = start.elapsed();
        let start = Instant::now();
        dyadctl(env, &["resume", &pod_id])?;
        let resume = start.elapsed();
        let start = Instant::now();
        env.virsh(&["suspend", &domain])?;
        let suspended = start.elapsed();
        settled(env, &pod_id, "paused").await?;
        let start = Instant::now();
        env.virsh(&["resume", &domain])?;
        let resumed = start.elapsed();
        settled(env, &pod_id, "running").await?;
        if run > 0 {
            let durations = [pause, resume, suspended, resumed];
            for (of, duration) in samples.iter_mut().zip(durations) {
                of.push(milliseconds(duration));
            }
        }
    }
    cri.stop_pod(&pod_id).await?;
    cri.remove_pod(&pod_id).await?;
    let [pause, resume, suspended, resumed] = samples;
    let row = |what: &str, against, yardstick, dyad| Row {
        what: what.to_owned(),
        unit: "ms",
        against,
        yardstick,
        dyad,
    };
    Ok(vec![
        row("dyadctl pause, machine", "virsh suspend", suspended, pause),
        row("dyadctl resume, machine", "virsh resume", resumed, resume),
    ])
}

/// The shim learns of virsh's doing by an event.
async fn settled(env: &Env, pod_id: &str, state: &str) -> Result<()> {
    let end = Instant::now() + TIMEOUT;
    while Instant::now() < end {
        if dyadctl(env, &["state", pod_id])?.contains(state) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bail!("pod {pod_id} is not {state}")
}

fn dyadctl(env: &Env, args: &[&str]) -> Result<String> {
    let mut command = Command::new(env.program("dyadctl"));
    command
        .arg("--state-dir")
        .arg(env.dir.join("dyad/run"))
        .args(args);
    let done = command::run(&mut command, b"", TIMEOUT)?;
    Ok(done.success(&format!("dyadctl {args:?}"))?.text())
}

/// `Lifecycle.State` of every one of many pods, on a connection that is there.
async fn state(env: &Env, cri: &mut Cri) -> Result<Row> {
    let mut pods = Vec::new();
    for number in 0..PODS {
        let pod = pod_config(env, &format!("bench-state-{number}"));
        pods.push(cri.run_pod("dyad", &pod).await?);
    }
    eprintln!("{PODS} pods run");
    let mut clients = Vec::new();
    for pod in &pods {
        clients.push(LifecycleClient::new(connect(env, pod).await?));
    }
    let mut samples = Vec::new();
    for round in 0..=ASKED {
        for client in &clients {
            let start = Instant::now();
            let limit = ttrpc::context::with_duration(TIMEOUT);
            let answer = client.state(limit, &StateRequest::new()).await?;
            let duration = start.elapsed();
            if answer.tasks.is_empty() {
                bail!("a shim tells of no task");
            }
            if round > 0 {
                samples.push(milliseconds(duration));
            }
        }
    }
    drop(clients);
    for pod in &pods {
        cri.stop_pod(pod).await?;
        cri.remove_pod(pod).await?;
    }
    Ok(Row {
        what: format!("Lifecycle.State at {PODS} pods, container"),
        unit: "ms",
        against: "(aim)",
        yardstick: vec![1.0],
        dyad: samples,
    })
}

async fn connect(env: &Env, pod: &str) -> Result<ttrpc::r#async::Client> {
    let file = env.dir.join("dyad/run/k8s.io").join(pod).join("address");
    let address = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let socket = PathBuf::from(address.trim().trim_start_matches("unix://"));
    let stream = tokio::net::UnixStream::connect(&socket)
        .await
        .with_context(|| format!("connect to {}", socket.display()))?;
    let transport = ttrpc::asynchronous::transport::Socket::new(stream);
    Ok(ttrpc::r#async::Client::new(transport))
}
