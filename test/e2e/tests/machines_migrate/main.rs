//! Machines move between two nodes, each with its own containerd and libvirtd. Brings both
//! up by `hack/up --nodes 2` in `$DYAD_E2E_DIR-mm`, and takes them down. One environment,
//! one test: its steps run one after the other, each with pods of its own.
//!
//! `DYAD_E2E_MIGRATIONS=long` adds the failure matrix.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use dyad_e2e::command::{self, Done};
use dyad_e2e::env::{Env, Version, repository};
use dyad_e2e::host::{cgroup_parent, remove_cgroup_parent};
use dyad_e2e::logs::Logs;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(90);
const UP: Duration = Duration::from_secs(40 * 60);
/// dyadctl's exit code for what the state, or the other side, does not allow.
const REFUSED: i32 = 4;

/// Counts on stdout, and to whoever connects.
const COUNT: &str = "(while :; do nc -l -p 7000 -e sh -c \
     'i=0; while :; do echo t $i || exit; i=$((i+1)); sleep 0.1; done'; done) & \
     i=0; while :; do echo n $i; i=$((i+1)); sleep 0.1; done";

/// Both nodes; down when dropped.
struct Nodes {
    dir: PathBuf,
    nodes: [Env; 2],
}

impl Nodes {
    fn up() -> Result<Self> {
        let dir = std::env::var("DYAD_E2E_DIR").unwrap_or_else(|_| "/tmp/dyad-e2e".into());
        let dir = PathBuf::from(format!("{dir}-mm"));
        let node = |name: &str| Env {
            dir: dir.join(name),
            version: Version::V2_3,
        };
        let nodes = Self {
            nodes: [node("n1"), node("n2")],
            dir,
        };
        let mut options = vec!["--nodes", "2", "--containerd", "2.3"];
        let profile = std::env::var("DYAD_E2E_PROFILE").unwrap_or_else(|_| "release".into());
        options.extend(["--profile", &profile]);
        if std::env::var_os("DYAD_E2E_NO_BUILD").is_some() {
            options.push("--no-build");
        }
        nodes.hack("up", &options)?;
        Ok(nodes)
    }

    fn hack(&self, name: &str, options: &[&str]) -> Result<()> {
        let mut program = Command::new(repository().join("hack").join(name));
        program.arg("--dir").arg(&self.dir).args(options);
        command::run(&mut program, b"", UP)?.success(&format!("hack/{name}"))?;
        Ok(())
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = node.crictl().run(&["rmp", "--force", "--all"], b"");
        }
        if std::env::var_os("DYAD_E2E_KEEP").is_none() {
            let _ = self.hack("down", &[]);
            for node in &self.nodes {
                remove_cgroup_parent(&node.dir);
            }
        }
    }
}

/// A pod with one container, on one node; removed when dropped.
struct Pod<'a> {
    env: &'a Env,
    id: String,
    container: String,
    config: Value,
    log: PathBuf,
}

impl<'a> Pod<'a> {
    fn run(env: &'a Env, source: Option<&str>) -> Result<Self> {
        Self::run_with(env, source, "app")
    }

    fn run_with(env: &'a Env, source: Option<&str>, container: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // An environment that was kept has the logs and the fences of earlier runs.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("m{}-{number}", std::process::id());
        let dir = env.dir.join("log/pods").join(&name);
        let mut annotations = json!({"dyad.dev/disk": "1Gi"});
        if let Some(source) = source {
            annotations["dyad.dev/migration-source"] = source.into();
        }
        let config = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
            "hostname": "counter",
            "log_directory": dir,
            "annotations": annotations,
            "linux": {"cgroup_parent": format!("/{}/{name}", cgroup_parent(&env.dir))},
        });
        let crictl = env.crictl();
        let mut pod = Self {
            env,
            id: crictl.runp("dyad-vm", &config)?,
            container: String::new(),
            log: dir.join("app.log"),
            config,
        };
        let container = json!({
            "metadata": {"name": container},
            "image": {"image": "dyad.test/busybox:1"},
            "command": ["/bin/sh", "-c", COUNT],
            "log_path": "app.log",
            "linux": {},
        });
        pod.container = crictl.create(&pod.id, &container, &pod.config)?;
        crictl.start(&pod.container)?;
        Ok(pod)
    }

    /// One that counts.
    fn counting(env: &'a Env) -> Result<Self> {
        let pod = Self::run(env, None)?;
        pod.counts_beyond(3)?;
        Ok(pod)
    }

    fn ip(&self) -> Result<String> {
        Ok(self.env.crictl().pod_status(&self.id)?.ip)
    }

    fn state(&self) -> Result<String> {
        let state = self.env.dyadctl(&["state", &self.id])?;
        Ok(state.success("dyadctl state")?.text())
    }

    fn machine(&self) -> Result<String> {
        let state = self.state()?;
        let (_, rest) = state.split_once("dyad-").context("no machine")?;
        Ok(rest.chars().take(36).collect())
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        let log = fs::read(&self.log).unwrap_or_default();
        Logs::parse(&log)
            .out()
            .lines()
            .filter_map(|line| line.strip_prefix("n "))
            .map(|number| number.parse().context("a number"))
            .collect()
    }

    fn counts_beyond(&self, least: u64) -> Result<u64> {
        until(
            SOON,
            &format!("{} to count beyond {least}", self.id),
            || Ok(self.numbers()?.last().copied().filter(|last| *last > least)),
        )
    }

    /// It still counts.
    fn goes_on(&self) -> Result<()> {
        let now = self.numbers()?.last().copied().unwrap_or_default();
        self.counts_beyond(now + 3).map(drop)
    }

    fn migrate(&self, to: &Env, options: &[&str]) -> Result<Done> {
        let uri = to.libvirt_uri();
        self.migrate_to(&uri, options)
    }

    fn migrate_to(&self, uri: &str, options: &[&str]) -> Result<Done> {
        let args = [&["migrate", &self.id, "--to", uri], options].concat();
        self.env.dyadctl(&args)
    }

    /// Begins a migration that takes long; returns when it copies.
    fn begin_slowly(&self, to: &Env) -> Result<Child> {
        let child = Command::new(self.env.program("dyadctl"))
            .arg("--state-dir")
            .arg(self.env.dir.join("dyad/run"))
            .args(["migrate", &self.id, "--to", &to.libvirt_uri()])
            .args(["--bandwidth", "2"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let machine = self.machine()?;
        until(SOON, "the migration to copy memory", || {
            let job = self
                .env
                .virsh(&["domjobinfo", &machine])
                .unwrap_or_default();
            Ok(job.contains("Memory processed").then_some(()))
        })?;
        Ok(child)
    }

    /// It runs here as before, and over there nothing runs.
    fn stayed(&self, target: &Pod<'_>) -> Result<()> {
        until(SOON, "the source to run as before", || {
            Ok(self.state()?.contains("State:    running").then_some(()))
        })?;
        self.goes_on()?;
        until(SOON, "the target to fail", || {
            let running = target.env.virsh(&["list", "--name"])?;
            let machine = self.machine()?;
            Ok((!running.contains(&machine)).then_some(()))
        })?;
        ensure!(target.numbers()?.is_empty(), "the target has run");
        Ok(())
    }

    fn shim(&self) -> Result<Pid> {
        for entry in fs::read_dir("/proc")?.flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if line.contains("containerd-shim-") && line.contains(&self.id) {
                return Ok(Pid::from_raw(entry.file_name().to_string_lossy().parse()?));
            }
        }
        bail!("no shim of {}", self.id)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let _ = self.env.crictl().rmp_force(&self.id);
    }
}

/// A connection to a pod's counter, which may still be beginning to listen.
fn connected(ip: &str) -> Result<TcpStream> {
    until(SOON, &format!("port 7000 of {ip}"), || {
        Ok(TcpStream::connect((ip, 7000)).ok())
    })
}

/// Every number once and in order, over both logs.
fn seamless(first: &Pod<'_>, second: &Pod<'_>) -> Result<()> {
    let numbers = [first.numbers()?, second.numbers()?].concat();
    let wrong = numbers.iter().enumerate().find(|(at, n)| *at as u64 != **n);
    match wrong {
        None => Ok(()),
        Some((at, number)) => bail!(
            "number {number} at place {at}; the logs end and begin with {:?} and {:?}",
            first.numbers()?.last(),
            second.numbers()?.first()
        ),
    }
}

fn refused(done: &Done, words: &[&str]) -> Result<()> {
    ensure!(
        done.code() == REFUSED,
        "exit code {}: {}",
        done.code(),
        done.stderr
    );
    for word in words {
        ensure!(
            done.stderr.contains(word),
            "{word:?} is not in {}",
            done.stderr
        );
    }
    Ok(())
}

fn failed(done: &Done, words: &[&str]) -> Result<()> {
    ensure!(
        done.code() == 1,
        "exit code {}: {}",
        done.code(),
        done.stderr
    );
    for word in words {
        ensure!(
            done.stderr.contains(word),
            "{word:?} is not in {}",
            done.stderr
        );
    }
    Ok(())
}

/// Log, connection, exec, address and identity; and there and back again.
fn an_idle_machine_moves_without_a_seam([n1, n2]: [&Env; 2]) -> Result<()> {
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let stream = connected(&source.ip()?)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut lines = BufReader::new(stream).lines();
    for expected in 0..5 {
        let line = lines.next().context("the connection ended")??;
        ensure!(line == format!("t {expected}"), "{line}");
    }
    let target = Pod::run(n2, Some(&machine))?;
    ensure!(target.state()?.contains("incoming"), "{}", target.state()?);
    let exec = target.env.crictl().exec(&target.container, &["true"])?;
    ensure!(
        exec.stderr.contains("waits for its migration source"),
        "{}",
        exec.stderr
    );

    source.migrate(n2, &[])?.success("dyadctl migrate")?;
    target.goes_on()?;
    seamless(&source, &target)?;
    // The connection from before, to the address from before.
    for expected in 5..60 {
        let line = lines.next().context("the connection ended")??;
        ensure!(line == format!("t {expected}"), "{line}");
    }
    // And the target pod's own address.
    let exec = target
        .env
        .crictl()
        .exec(&target.container, &["sh", "-c", "ip -4 addr; exit 7"])?;
    ensure!(exec.stderr.contains("exit code 7"), "{}", exec.stderr);
    ensure!(exec.text().contains(&target.ip()?), "{}", exec.text());
    // One connection at a time is served.
    drop(lines);
    connected(&target.ip()?)?;
    ensure!(target.machine()? == machine, "the machine has another name");

    let status = until(SOON, "the source to end", || {
        let status = source.env.crictl().status(&source.container)?;
        Ok(Some(status).filter(|status| status.state == "CONTAINER_EXITED"))
    })?;
    ensure!(status.exit_code == 0, "exit code {}", status.exit_code);

    // kubelet would make another sandbox for the same pod: the fence holds, also after a
    // restart of containerd.
    n1.crictl().rmp_force(&source.id)?;
    for restart in [false, true] {
        if restart {
            n1.kill_and_restart("containerd")?;
        }
        let again = n1.crictl().runp("dyad-vm", &source.config);
        let error = again.map_or_else(|error| format!("{error:#}"), |id| format!("ran as {id}"));
        ensure!(error.contains("must not run here again"), "{error}");
    }

    let back = Pod::run(n1, Some(&machine))?;
    target.migrate(n1, &[])?.success("dyadctl migrate back")?;
    back.goes_on()?;
    let numbers = [source.numbers()?, target.numbers()?, back.numbers()?].concat();
    ensure!(
        numbers
            .iter()
            .enumerate()
            .all(|(at, number)| at as u64 == *number),
        "a seam on the way back: {numbers:?}"
    );
    back.env.crictl().stop(&back.container, 2)?;
    let exit = back.env.crictl().status(&back.container)?.exit_code;
    // SIGTERM, or SIGKILL after it.
    ensure!([143, 137].contains(&exit), "exit code {exit}");
    Ok(())
}

fn what_forbids_it_is_told_before_anything_moves([n1, n2]: [&Env; 2]) -> Result<()> {
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    refused(&source.migrate(n2, &[])?, &["no target waits", &machine])?;
    refused(&source.migrate(n1, &[])?, &["this node's own libvirt"])?;
    refused(
        &source.migrate_to("qemu+unix:///system?socket=/nowhere", &[])?,
        &["destination"],
    )?;
    let usage = source.migrate_to("node2", &[])?;
    ensure!(usage.stderr.contains("is no URI"), "{}", usage.stderr);
    {
        let other = Pod::run_with(n2, Some(&machine), "other")?;
        refused(
            &source.migrate(n2, &[])?,
            &["container app is not in the target pod"],
        )?;
        drop(other);
    }
    let target = Pod::run(n2, Some(&machine))?;
    refused(&source.migrate(n2, &["--tls"])?, &["unix sockets"])?;
    let over_tcp = [
        "--migrate-uri",
        "tcp://127.0.0.1",
        "--disks-uri",
        "tcp://127.0.0.1",
    ];
    refused(&source.migrate(n2, &over_tcp)?, &["in clear", "--tls"]).or_else(|_| {
        refused(
            &source.migrate(n2, &over_tcp)?,
            &["in clear", "tls_required"],
        )
    })?;
    let odd = n2.crictl().runp("dyad-vm", &{
        let mut config = target.config.clone();
        config["metadata"]["uid"] = "uid-odd".into();
        config["metadata"]["name"] = "odd".into();
        config["annotations"]["dyad.dev/migration-source"] = "not-a-uuid".into();
        config
    });
    let error = odd.map_or_else(|error| format!("{error:#}"), |id| format!("ran as {id}"));
    ensure!(error.contains("migration-source"), "{error}");

    // Under way: not twice; cancelled, it runs on.
    let mut first = source.begin_slowly(n2)?;
    refused(&source.migrate(n2, &[])?, &["migrating"])?;
    let exec = n1.crictl().exec(&source.container, &["true"])?;
    ensure!(exec.stderr.contains("is migrating"), "{}", exec.stderr);
    n1.dyadctl(&["migrate", &source.id, "--cancel"])?
        .success("dyadctl migrate --cancel")?;
    first.wait()?;
    source.stayed(&target)?;
    refused(
        &n1.dyadctl(&["migrate", &source.id, "--cancel"])?,
        &["no migration under way"],
    )
}

fn a_time_limit_gives_up_or_brings_it_to_an_end([n1, n2]: [&Env; 2]) -> Result<()> {
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let slow = ["--bandwidth", "4", "--max-time", "8s"];
    {
        let target = Pod::run(n2, Some(&machine))?;
        failed(
            &source.migrate(n2, &slow)?,
            &["it took longer than 8000 ms"],
        )?;
        source.stayed(&target)?;
    }
    let target = Pod::run(n2, Some(&machine))?;
    let post_copy = [&slow[..], &["--then", "post-copy"]].concat();
    source.migrate(n2, &post_copy)?.success("post-copy")?;
    target.goes_on()?;
    seamless(&source, &target)
}

/// One dies while memory is copied: the machine runs on exactly one side.
fn exactly_one_whoever_dies([n1, n2]: [&Env; 2]) -> Result<()> {
    type Victim = fn(&Pod<'_>, &Pod<'_>) -> Result<()>;
    let victims: [(&str, Victim); 2] = [
        ("the target's QEMU", |source, target| {
            let machine = source.machine()?;
            kill(qemu(&machine, target.env)?, Signal::SIGKILL)?;
            Ok(())
        }),
        ("the target's shim", |_, target| {
            kill(target.shim()?, Signal::SIGKILL)?;
            Ok(())
        }),
    ];
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    for (name, victim) in victims {
        let target = Pod::run(n2, Some(&machine))?;
        let mut migration = source.begin_slowly(n2)?;
        victim(&source, &target).with_context(|| format!("kill {name}"))?;
        migration.wait()?;
        source
            .stayed(&target)
            .with_context(|| format!("after the death of {name}"))?;
    }
    if std::env::var("DYAD_E2E_MIGRATIONS").as_deref() == Ok("long") {
        let target = Pod::run(n2, Some(&machine))?;
        let mut migration = source.begin_slowly(n2)?;
        n2.kill_and_restart("libvirtd")?;
        migration.wait()?;
        source
            .stayed(&target)
            .context("after the death of the target's libvirtd")?;
        drop(target);
        let target = Pod::run(n2, Some(&machine))?;
        let mut migration = source.begin_slowly(n2)?;
        n1.kill_and_restart("libvirtd")?;
        migration.wait()?;
        source
            .stayed(&target)
            .context("after the death of the source's libvirtd")?;
    }
    Ok(())
}

fn qemu(machine: &str, node: &Env) -> Result<Pid> {
    let dir = node.dir.display().to_string();
    for entry in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.contains("qemu-system") && line.contains(machine) && line.contains(&dir) {
            return Ok(Pid::from_raw(entry.file_name().to_string_lossy().parse()?));
        }
    }
    bail!("no QEMU of {machine} on {dir}")
}

#[test]
fn machines_move_between_two_nodes() {
    type Step = fn([&Env; 2]) -> Result<()>;
    let steps: [(&str, Step); 4] = [
        (
            "an_idle_machine_moves_without_a_seam",
            an_idle_machine_moves_without_a_seam,
        ),
        (
            "what_forbids_it_is_told_before_anything_moves",
            what_forbids_it_is_told_before_anything_moves,
        ),
        (
            "a_time_limit_gives_up_or_brings_it_to_an_end",
            a_time_limit_gives_up_or_brings_it_to_an_end,
        ),
        ("exactly_one_whoever_dies", exactly_one_whoever_dies),
    ];
    let only = std::env::var("DYAD_E2E_STEP").unwrap_or_default();
    let nodes = Nodes::up().expect("two nodes");
    let mut wrong = Vec::new();
    for (name, step) in steps {
        if !name.contains(&only) {
            continue;
        }
        let [n1, n2] = &nodes.nodes;
        match step([n1, n2]) {
            Ok(()) => eprintln!("ok: {name}"),
            Err(error) => {
                eprintln!("FAILED: {name}: {error:#}\n{}", tails(&nodes.dir));
                wrong.push(name);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

fn tails(dir: &Path) -> String {
    let tail = |node: &str| -> Result<String> {
        let log = fs::read_to_string(dir.join(node).join("log/containerd.log"))?;
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("sandbox="))
            .collect();
        Ok(lines[lines.len().saturating_sub(30)..].join("\n"))
    };
    ["n1", "n2"]
        .map(|node| tail(node).unwrap_or_else(|error| anyhow!(error).to_string()))
        .join("\n---\n")
}
