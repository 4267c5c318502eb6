//! What kubelet must not notice, and what it asks of a running pod itself.

use std::time::Duration;

use anyhow::{Result, bail};
use dyad_e2e::check::{names, same};
use serde_json::{Value, json};

use super::{Case, case};
use crate::context::{Context, Object, SOON, container, with};

pub const CASES: &[Case] = &[
    case!(kubelet_notices_neither_a_stop_and_start_in_place_nor_a_pause_of_three_minutes),
    case!(a_resize_reaches_the_container_without_a_restart),
];

const PAUSE: Duration = Duration::from_secs(180);

/// Tells in which life it is, and keeps count in its writable layer.
const LIVES: &str = "trap 'echo stopped; exit 7' TERM; echo x >> /lives; \
     echo life $(wc -l < /lives); while :; do sleep 1000 & wait $!; done";

fn dyadctl(context: &Context<'_>, args: &[&str]) -> Result<()> {
    let done = context.cluster.env.dyadctl(args)?;
    done.success(&format!("dyadctl {args:?}"))?;
    Ok(())
}

fn kubelet_notices_neither_a_stop_and_start_in_place_nor_a_pause_of_three_minutes(
    context: &Context<'_>,
) -> Result<()> {
    // Kubernetes' own threshold. A probe that is under way when its pod is stopped or paused can
    // be seen to fail or time out, once; all that come later are errors, which do not count.
    let probe = json!({
        "exec": {"command": ["true"]}, "periodSeconds": 5, "timeoutSeconds": 20, "failureThreshold": 3,
    });
    let lives = with(container("lives", LIVES), "livenessProbe", probe.clone());
    let lives = with(lives, "readinessProbe", probe);
    let pod = context.ready_pod(&context.pod("", &[lives]))?;
    let before = pod.identity()?;

    dyadctl(context, &["stop", pod.name(), "--grace", "20s"])?;
    // Two probes and more.
    no_restart_within(context, &pod, Duration::from_secs(15))?;
    same("the stopped pod", pod.identity()?, before.clone())?;
    dyadctl(context, &["start", pod.name()])?;
    lives_again(&pod, 2)?;
    same("the started pod", pod.identity()?, before.clone())?;

    dyadctl(context, &["pause", pod.name()])?;
    no_restart_within(context, &pod, PAUSE)?;
    same("the paused pod", pod.identity()?, before.clone())?;
    names(
        &pod.exec("lives", "true")?.stderr,
        &["paused", "resume it first"],
    )?;
    dyadctl(context, &["resume", pod.name()])?;
    lives_again(&pod, 2)?;
    pod.wait("condition=Ready")?;
    no_restart_within(context, &pod, Duration::from_secs(15))?;
    same("the resumed pod", pod.identity()?, before)
}

/// It answers, in that life.
fn lives_again(pod: &Object<'_>, life: u32) -> Result<()> {
    let told = format!("life {life}\n");
    dyad_e2e::wait::until(SOON, &told, || {
        Ok(pod.logs("lives")?.ends_with(&told).then_some(()))
    })?;
    pod.output("lives", "true")?;
    Ok(())
}

/// Watches for as long as that, and fails as soon as a container was restarted.
fn no_restart_within(context: &Context<'_>, pod: &Object<'_>, duration: Duration) -> Result<()> {
    let path = format!("pod/{}", pod.name());
    let condition = "jsonpath={.status.containerStatuses[0].restartCount}=1";
    match context.cluster.wait(&path, condition, duration) {
        Ok(()) => bail!("the container was restarted"),
        Err(error) => names(&format!("{error:#}"), &["timed out"]),
    }
}

/// What the container's own cgroup allows it: thousandths of a processor, and MiB.
const LIMITS: &str = "if [ -e /sys/fs/cgroup/cpu.max ]; then \
       set -- $(cat /sys/fs/cgroup/cpu.max) $(cat /sys/fs/cgroup/memory.max); \
     else \
       set -- $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us) $(cat /sys/fs/cgroup/cpu/cpu.cfs_period_us) \
         $(cat /sys/fs/cgroup/memory/memory.limit_in_bytes); \
     fi; echo $(($1 * 1000 / $2))m $(($3 >> 20))Mi";

fn a_resize_reaches_the_container_without_a_restart(context: &Context<'_>) -> Result<()> {
    let resources = |cpu: &str, memory: &str| -> Value {
        json!({"limits": {"cpu": cpu, "memory": memory}, "requests": {"cpu": "50m", "memory": "32Mi"}})
    };
    let sized = container(
        "sized",
        "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
    );
    let sized = with(sized, "resources", resources("200m", "128Mi"));
    let pod = context.ready_pod(&context.pod("", &[sized]))?;
    let before = pod.identity()?;
    same("limits", pod.output("sized", LIMITS)?.trim(), "200m 128Mi")?;

    for (cpu, memory) in [("400m", "256Mi"), ("300m", "192Mi")] {
        let patch = json!({"spec": {"containers": [{"name": "sized", "resources": resources(cpu, memory)}]}});
        context.cluster.kubectl(&[
            "patch",
            "pod",
            pod.name(),
            "--subresource",
            "resize",
            "--patch",
            &patch.to_string(),
        ])?;
        pod.wait_for_container("sized", "resources.limits.cpu", cpu)?;
        pod.wait_for_container("sized", "resources.limits.memory", memory)?;
        same(
            "limits",
            pod.output("sized", LIMITS)?.trim(),
            &format!("{cpu} {memory}"),
        )?;
    }
    same("the resized pod", pod.identity()?, before)
}
