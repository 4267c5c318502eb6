//! Replicas: scaled by hand and by the autoscaler, and rolled out.

use anyhow::{Context as _, Result, bail};
use dyad_e2e::check::{names, same};
use serde_json::{Value, json};

use super::{Case, case};
use crate::context::{Context, Kind, Object, SOON, container, with};

pub const CASES: &[Case] = &[
    case!(the_metrics_are_honest_and_an_autoscaler_follows_them),
    case!(a_deployment_scales_up_and_down_and_rolls_out),
];

const IDLE: &str =
    "trap 'exit 0' TERM; echo version $VERSION; while :; do sleep 1000 & wait $!; done";

/// Waits until the Deployment is rolled out.
fn rolled_out(context: &Context<'_>, deployment: &Object<'_>) -> Result<()> {
    let path = format!("deployment/{}", deployment.name());
    let timeout = format!("--timeout={}s", SOON.as_secs());
    let args = ["rollout", "status", &path, &timeout];
    context
        .cluster
        .run(&args, 2 * SOON)?
        .success(&format!("kubectl {args:?}"))?;
    Ok(())
}

fn scale(context: &Context<'_>, deployment: &Object<'_>, replicas: usize) -> Result<()> {
    let path = format!("deployment/{}", deployment.name());
    context
        .cluster
        .kubectl(&["scale", &path, &format!("--replicas={replicas}")])?;
    rolled_out(context, deployment)?;
    deployment.wait(&format!("jsonpath={{.status.readyReplicas}}={replicas}"))?;
    // Those that are too many are ended after the Deployment has stopped to count them.
    for pod in context.pods()? {
        if !pod["metadata"]["deletionTimestamp"].is_null() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            context
                .cluster
                .wait(&format!("pod/{name}"), "delete", SOON)?;
        }
    }
    same("pods", context.pods()?.len(), replicas)
}

fn a_deployment_scales_up_and_down_and_rolls_out(context: &Context<'_>) -> Result<()> {
    let idle = with(
        container("idle", IDLE),
        "env",
        json!([{"name": "VERSION", "value": "one"}]),
    );
    let deployment = context.apply(&context.deployment(1, &[idle]))?;
    rolled_out(context, &deployment)?;
    scale(context, &deployment, 2)?;
    let addresses: std::collections::BTreeSet<String> = context
        .pods()?
        .iter()
        .map(|pod| pod["status"]["podIP"].to_string())
        .collect();
    same("addresses", addresses.len(), 2)?;
    scale(context, &deployment, 1)?;

    let old = pod_name(&context.pods()?)?;
    let path = format!("deployment/{}", deployment.name());
    context
        .cluster
        .kubectl(&["set", "env", &path, "VERSION=two"])?;
    rolled_out(context, &deployment)?;
    context
        .cluster
        .wait(&format!("pod/{old}"), "delete", SOON)?;
    let log = context.cluster.kubectl(&["logs", &path])?;
    same("log", log.as_str(), "version two\n")
}

fn pod_name(pods: &[Value]) -> Result<String> {
    match pods {
        [pod] => Ok(pod["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned()),
        pods => bail!("{} pods instead of one", pods.len()),
    }
}

/// Uses as much of a processor as it is allowed, and holds 32 MiB.
const BUSY: &str =
    "dd if=/dev/zero of=/dev/shm/held bs=1M count=32 2>/dev/null; while :; do :; done";

fn the_metrics_are_honest_and_an_autoscaler_follows_them(context: &Context<'_>) -> Result<()> {
    let resources = |cpu: &str| json!({"requests": {"cpu": "50m", "memory": "16Mi"}, "limits": {"cpu": cpu, "memory": "96Mi"}});
    let busy = with(container("busy", BUSY), "resources", resources("200m"));
    let idle = with(container("idle", IDLE), "resources", resources("200m"));
    let deployment = context.apply(&context.deployment(1, &[busy, idle]))?;
    rolled_out(context, &deployment)?;
    let pod = pod_name(&context.pods()?)?;

    // 200m may be used of 100m asked for. On a host with other load it is less, but never as little as the target.
    context.apply(&json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": deployment.name()},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment.name()},
            "minReplicas": 1,
            "maxReplicas": 2,
            "metrics": [{"type": "Resource", "resource": {
                "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 20},
            }}],
        },
    }))?;
    deployment
        .wait("jsonpath={.spec.replicas}=2")
        .with_context(|| autoscaler(context, &deployment))?;

    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/default/pods/{pod}");
    let metrics: Value = serde_json::from_str(&context.cluster.kubectl(&["get", "--raw", &path])?)?;
    let of = |name: &str| -> Result<(f64, f64)> {
        let usage = metrics["containers"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|container| container["name"] == name)
            .with_context(|| format!("no metrics of {name}: {metrics}"))?;
        Ok((
            quantity(&usage["usage"]["cpu"])?,
            quantity(&usage["usage"]["memory"])?,
        ))
    };
    let (busy_cpu, busy_memory) = of("busy")?;
    let (idle_cpu, idle_memory) = of("idle")?;
    let mib = f64::from(1 << 20);
    // An emulated guest counts the time that a busy host takes away from it, up to its one processor.
    let most = match context.kind {
        Kind::Dyad => 0.30,
        Kind::DyadVm => 1.05,
    };
    within("the busy container's processor time", busy_cpu, 0.02, most)?;
    within("the idle container's processor time", idle_cpu, 0.0, 0.05)?;
    within("the busy container's MiB", busy_memory / mib, 32.0, 64.0)?;
    within("the idle container's MiB", idle_memory / mib, 0.01, 24.0)?;

    rolled_out(context, &deployment)?;
    let top = context
        .cluster
        .kubectl(&["top", "pod", &pod, "--containers"])?;
    names(&top, &["busy", "idle"])
}

/// What the autoscaler says of itself.
fn autoscaler(context: &Context<'_>, deployment: &Object<'_>) -> String {
    let path = format!("hpa/{}", deployment.name());
    context
        .cluster
        .kubectl(&["describe", &path])
        .unwrap_or_else(|error| format!("{error:#}"))
}

fn within(what: &str, value: f64, from: f64, to: f64) -> Result<()> {
    if value < from || value > to {
        bail!("{what} is {value}, and should be in {from} to {to}");
    }
    Ok(())
}

/// Kubernetes's number: `12`, `3456789n`, `200m`, `1200Ki`.
fn quantity(value: &Value) -> Result<f64> {
    let text = value.as_str().unwrap_or_default();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        unit => bail!("unknown unit {unit:?} in {text:?}"),
    };
    let number: f64 = digits
        .parse()
        .with_context(|| format!("quantity {text:?}"))?;
    Ok(number * unit)
}
