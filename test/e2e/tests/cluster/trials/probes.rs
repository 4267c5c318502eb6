//! Probes of every sort decide readiness and restarts.

use anyhow::Result;
use dyad_e2e::check::same;
use serde_json::{Value, json};

use super::{Case, case};
use crate::context::{Context, container, with};

pub const CASES: &[Case] = &[case!(
    http_tcp_and_exec_probes_decide_readiness_and_restarts
)];

/// A container with a readiness and a liveness probe.
fn probed(name: &str, script: &str, ready: &Value, alive: &Value) -> Value {
    let timed = |probe: &Value, failures: u32| {
        let probe = with(probe.clone(), "periodSeconds", json!(1));
        let probe = with(probe, "timeoutSeconds", json!(20));
        with(probe, "failureThreshold", json!(failures))
    };
    let container = with(container(name, script), "readinessProbe", timed(ready, 1));
    with(container, "livenessProbe", timed(alive, 3))
}

/// What is broken to make a container unready or dead is a file of that name.
const FILES: [(&str, &str, &str); 3] = [
    ("http", "/var/www/ready", "/var/www/alive"),
    ("tcp", "/ready", "/alive"),
    ("exec", "/ready", "/alive"),
];

/// Listens on port `$1` for as long as file `$2` is there.
const LISTEN: &str = "listen() { while :; do httpd -f -p $1 & \
       while [ -e $2 ]; do sleep 0.2; done; kill $!; wait $!; \
       while [ ! -e $2 ]; do sleep 0.2; done; done; }; ";

fn http_tcp_and_exec_probes_decide_readiness_and_restarts(context: &Context<'_>) -> Result<()> {
    let http = |path: &str| json!({"httpGet": {"port": 8080, "path": path}});
    let tcp = |port: u16| json!({"tcpSocket": {"port": port}});
    let exec = |file: &str| json!({"exec": {"command": ["test", "-e", file]}});
    let pod = context.ready_pod(&context.pod(
        "",
        &[
            probed(
                "http",
                "touch /var/www/ready /var/www/alive; exec httpd -f -p 8080 -h /var/www",
                &http("/ready"),
                &http("/alive"),
            ),
            probed(
                "tcp",
                &format!("{LISTEN} touch /ready /alive; listen 9001 /ready & listen 9002 /alive"),
                &tcp(9001),
                &tcp(9002),
            ),
            probed(
                "exec",
                "touch /ready /alive; while :; do sleep 1000; done",
                &exec("/ready"),
                &exec("/alive"),
            ),
        ],
    ))?;

    for (name, ready, _) in FILES {
        pod.output(name, &format!("rm {ready}"))?;
    }
    for (name, ..) in FILES {
        pod.wait_for_container(name, "ready", "false")?;
    }
    for (name, ready, _) in FILES {
        pod.output(name, &format!("touch {ready}"))?;
    }
    pod.wait("condition=Ready")?;
    for (name, ..) in FILES {
        same(name, &pod.container(name)?["restartCount"], &json!(0))?;
    }

    for (name, _, alive) in FILES {
        pod.output(name, &format!("rm {alive}"))?;
    }
    for (name, ..) in FILES {
        pod.wait_for_container(name, "restartCount", "1")?;
        pod.wait_for_container(name, "ready", "true")?;
    }
    Ok(())
}
