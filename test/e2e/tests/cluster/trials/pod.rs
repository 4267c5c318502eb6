//! One pod from its birth to its end, as kubectl sees it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::check::{names, same};
use dyad_e2e::command;
use serde_json::json;

use super::{Case, case};
use crate::context::{Context, Kind, SOON, container, with};

pub const CASES: &[Case] = &[
    case!(a_pod_is_applied_read_entered_and_ended_with_its_grace),
    case!(a_port_is_forwarded),
    case!(init_containers_and_sidecars_run_in_order),
];

const SERVER: &str = "trap 'echo asked to end; sleep 1; echo ended; exit 0' TERM; \
     httpd -p 8080 -h /var/www; echo started on $(hostname); while :; do sleep 1000 & wait $!; done";

fn server() -> serde_json::Value {
    with(
        container("web", SERVER),
        "readinessProbe",
        json!({"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1, "timeoutSeconds": 10}),
    )
}

fn a_pod_is_applied_read_entered_and_ended_with_its_grace(context: &Context<'_>) -> Result<()> {
    let stubborn = container("stubborn", "trap '' TERM; while :; do sleep 1; done");
    let pod = context.ready_pod(&context.pod("", &[server(), stubborn]))?;
    same(
        "log",
        pod.logs("web")?,
        format!("started on {}\n", pod.name()),
    )?;

    let kernel = pod.output("web", "uname -r")?;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    same(
        "the host's kernel",
        kernel.trim() == host.trim(),
        context.kind == Kind::Dyad,
    )?;
    same("exit code", pod.exec("web", "exit 7")?.code(), 7)?;
    let mut cat = context.cluster.kubectl_command(&[
        "exec",
        "--stdin",
        pod.name(),
        "--container",
        "web",
        "--",
        "cat",
    ]);
    let echo = command::run(&mut cat, b"to and fro", SOON)?.success("kubectl exec -i cat")?;
    same("stdin and stdout", echo.text().as_str(), "to and fro")?;

    // By its address, from the host, which is a neighbour on the pod's network.
    let address = pod.get()?["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    same("page", fetch(&address, 8080)?.as_str(), "dyad\n")?;

    let follow =
        context
            .cluster
            .kubectl_command(&["logs", "--follow", "--container", "web", pod.name()]);
    let follower = std::thread::spawn(move || {
        let mut follow = follow;
        command::run(&mut follow, b"", SOON)
    });
    let began = Instant::now();
    let args = ["delete", "pod", pod.name(), "--grace-period=4"];
    context
        .cluster
        .run(&args, SOON)?
        .success("kubectl delete")?;
    if began.elapsed() < Duration::from_secs(4) {
        bail!("the stubborn container was not given its grace");
    }
    let Ok(followed) = follower.join() else {
        bail!("the follower of the log panicked");
    };
    names(&followed?.text(), &["asked to end\nended\n"])
}

/// The body of `http://address:port/`.
fn fetch(address: &str, port: u16) -> Result<String> {
    let mut stream = TcpStream::connect((address, port))
        .with_context(|| format!("connect to {address}:{port}"))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let Some((_, body)) = answer.split_once("\r\n\r\n") else {
        bail!("no HTTP answer: {answer:?}");
    };
    Ok(body.to_owned())
}

/// `kubectl port-forward`, which ends with the trial.
struct Forward(Child);

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_port_is_forwarded(context: &Context<'_>) -> Result<()> {
    let pod = context.ready_pod(&context.pod("", &[server()]))?;
    let path = format!("pod/{}", pod.name());
    let mut forward = Forward(
        context
            .cluster
            .kubectl_command(&["port-forward", "--address", "127.0.0.1", &path, ":8080"])
            .stdout(Stdio::piped())
            .spawn()
            .context("start kubectl port-forward")?,
    );
    let output = forward.0.stdout.take().context("no pipe")?;
    let mut output = BufReader::new(output);
    let mut line = String::new();
    output.read_line(&mut line)?;
    // "Forwarding from 127.0.0.1:PORT -> 8080"
    let port = line
        .split(" -> ")
        .next()
        .and_then(|from| from.rsplit(':').next())
        .and_then(|port| port.parse().ok())
        .with_context(|| format!("kubectl port-forward said {line:?}"))?;
    for _ in 0..2 {
        same("page", fetch("127.0.0.1", port)?.as_str(), "dyad\n")?;
    }
    // kubectl tells of each connection, and dies where nobody listens.
    drop(output);
    Ok(())
}

fn init_containers_and_sidecars_run_in_order(context: &Context<'_>) -> Result<()> {
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let shared = |name, script| with(container(name, script), "volumeMounts", mount.clone());
    let init = shared("init", "echo init >> /shared/order");
    let sidecar = shared(
        "sidecar",
        "trap 'echo sidecar ended; exit 0' TERM; echo sidecar >> /shared/order; touch /shared/up; \
         while :; do sleep 1000 & wait $!; done",
    );
    let sidecar = with(sidecar, "restartPolicy", json!("Always"));
    let sidecar = with(
        sidecar,
        "startupProbe",
        json!({
            "exec": {"command": ["test", "-e", "/shared/up"]},
            "periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": 60,
        }),
    );
    let main = shared("main", "echo main >> /shared/order; cat /shared/order");
    let mut pod = context.pod("", &[main]);
    pod["spec"]["initContainers"] = json!([init, sidecar]);
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["spec"]["terminationGracePeriodSeconds"] = json!(30);
    pod["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    let pod = context.apply(&pod)?;
    // The sidecar is ended when the main container is done.
    pod.wait("jsonpath={.status.phase}=Succeeded")?;
    same("order", pod.logs("main")?.as_str(), "init\nsidecar\nmain\n")?;
    same("sidecar", pod.logs("sidecar")?.as_str(), "sidecar ended\n")?;
    for name in ["init", "sidecar", "main"] {
        let status = pod.container(name)?;
        same(name, &status["state"]["terminated"]["exitCode"], &json!(0))?;
        same(name, &status["restartCount"], &json!(0))?;
    }
    Ok(())
}
