//! restartPolicy after an exit, and after a machine's own shutdown.

use anyhow::Result;
use dyad_e2e::check::same;
use dyad_e2e::wait::until;
use serde_json::{Value, json};

use super::{Case, case};
use crate::context::{Context, Kind, SOON, container, with};

pub const CASES: &[Case] = &[case!(restart_policy_decides_after_an_exit)];

/// Those that come last, so that not all machines are wanted at once.
pub const LATE_CASES: &[Case] = &[case!(
    restart_policy_decides_after_the_guest_shut_itself_down,
    &[Kind::DyadVm]
)];

/// Ends with the code the first time, and runs the second.
fn ends_once(name: &str, code: u32) -> Value {
    let script = format!(
        "if mkdir /shared/{name}; then exit {code}; fi; \
         trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"
    );
    with(
        container(name, &script),
        "volumeMounts",
        json!([{"name": "shared", "mountPath": "/shared"}]),
    )
}

fn with_policy(context: &Context<'_>, policy: &str, containers: &[Value]) -> Value {
    let mut pod = context.pod(&format!("-{}", policy.to_ascii_lowercase()), containers);
    pod["spec"]["restartPolicy"] = json!(policy);
    pod["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    pod
}

fn restart_policy_decides_after_an_exit(context: &Context<'_>) -> Result<()> {
    let both = || [ends_once("good", 0), ends_once("bad", 3)];
    let always = context.apply(&with_policy(context, "Always", &both()))?;
    let on_failure = context.apply(&with_policy(context, "OnFailure", &both()))?;
    let never = context.apply(&with_policy(context, "Never", &both()))?;

    for (name, code) in [("good", 0), ("bad", 3)] {
        // Ready it may have been before its first end, too.
        always.wait_for_container(name, "restartCount", "1")?;
        always.wait_for_container(name, "ready", "true")?;
        let status = always.container(name)?;
        same("Always", &status["restartCount"], &json!(1))?;
        same(
            "Always, exit code",
            &status["lastState"]["terminated"]["exitCode"],
            &json!(code),
        )?;
    }

    on_failure.wait_for_container("bad", "restartCount", "1")?;
    on_failure.wait_for_container("bad", "ready", "true")?;
    on_failure.wait_for_container("good", "state.terminated.exitCode", "0")?;
    let good = on_failure.container("good")?;
    same("OnFailure", &good["restartCount"], &json!(0))?;

    never.wait("jsonpath={.status.phase}=Failed")?;
    for (name, code) in [("good", 0), ("bad", 3)] {
        let status = never.container(name)?;
        same("Never", &status["restartCount"], &json!(0))?;
        same(
            "Never, exit code",
            &status["state"]["terminated"]["exitCode"],
            &json!(code),
        )?;
    }
    Ok(())
}

/// A privileged container may power its machine off: a clean end of all that is in it.
fn restart_policy_decides_after_the_guest_shut_itself_down(context: &Context<'_>) -> Result<()> {
    let idle = || {
        let idle = container(
            "idle",
            "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
        );
        let idle = with(idle, "securityContext", json!({"privileged": true}));
        let shared = json!([{"name": "shared", "mountPath": "/shared"}]);
        [with(idle, "volumeMounts", shared)]
    };
    let policies = ["Always", "OnFailure", "Never"];
    let mut pods = Vec::new();
    for policy in policies {
        pods.push(context.apply(&with_policy(context, policy, &idle()))?);
    }
    for pod in &pods {
        pod.wait("condition=Ready")?;
    }
    for pod in &pods {
        pod.output("idle", "echo kept > /shared/file; touch /own; sync")?;
        // Nobody is left to tell how the exec ended.
        drop(pod.exec("idle", "echo o > /proc/sysrq-trigger; sleep 1000")?);
    }
    let [always, on_failure, never] = pods.as_slice() else {
        anyhow::bail!("three pods");
    };
    for pod in [on_failure, never] {
        pod.wait("jsonpath={.status.phase}=Succeeded")?;
        same(
            "restarts",
            &pod.container("idle")?["restartCount"],
            &json!(0),
        )?;
    }
    always.wait_for_container("idle", "restartCount", "1")?;
    always.wait("condition=Ready")?;
    // The pod is the same, and so are its volumes; its containers are new ones.
    same(
        "emptyDir, and what the container wrote itself",
        always
            .output("idle", "cat /shared/file; ls /own 2>/dev/null; true")?
            .as_str(),
        "kept\n",
    )?;
    let uid = always.get()?["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let path = format!("pod/{}", always.name());
    context
        .cluster
        .run(&["delete", &path, "--wait=true"], SOON)?
        .success("kubectl delete")?;
    let kept = context.cluster.env.dir.join("dyad/lib/kept");
    until(SOON, "the pod's disk to go with it", || {
        let names_it = std::fs::read_dir(&kept)
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| {
                std::fs::read_to_string(entry.path().join("volumes.json"))
                    .is_ok_and(|volumes| volumes.contains(&uid))
            });
        Ok((!names_it).then_some(()))
    })
}
