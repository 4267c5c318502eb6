//! A pod of containers moves between two nodes, each with its own containerd. Brings both
//! up by `hack/up --nodes 2` in `$DYAD_E2E_DIR-mc`, and takes them down.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use dyad_e2e::env::Env;
use dyad_e2e::host::{cgroup_parent, shim_of};
use dyad_e2e::logs::Logs;
use dyad_e2e::nodes::Nodes;
use dyad_e2e::pki;
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
/// dyadctl's exit code for what the state, or the host, does not allow.
const REFUSED: i32 = 4;

/// Counts through a pipe: on stdout, in a file of its own, in a volume.
const COUNT: &str = "mkfifo /tmp/p; exec 4<>/tmp/p; exec 3>>/count; i=0; while :; do \
     echo $i >&4; read j <&4; echo n $j; echo $j >&3; echo $j > /v/now; i=$((i+1)); sleep 0.05; done";

/// A pod with one container, on one node.
struct Pod<'a> {
    env: &'a Env,
    id: String,
    container: String,
    dir: PathBuf,
}

impl<'a> Pod<'a> {
    fn run(env: &'a Env, name: &str, source: Option<&str>) -> Result<Self> {
        let dir = env.dir.join("log/pods").join(name);
        let volume = dir.join("volumes/kubernetes.io~empty-dir/v");
        fs::create_dir_all(&volume)?;
        // As kubelet says it: processes of a container see their own alone.
        let security = json!({"namespace_options": {"pid": 1}});
        let annotations = match source {
            Some(source) => json!({
                "dyad.dev/migration-source": source,
                "dyad.dev/migration-init-containers": "load",
            }),
            None => json!({}),
        };
        let pod = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}-{}", env.dir.display())},
            "hostname": name,
            "log_directory": dir,
            "annotations": annotations,
            "linux": {
                "cgroup_parent": format!("/{}/{name}", cgroup_parent(&env.dir)),
                "security_context": security,
            },
        });
        let container = json!({
            "metadata": {"name": "app"},
            "image": {"image": "dyad.test/busybox:1"},
            "command": ["/bin/sh", "-c", COUNT],
            "mounts": [{"host_path": volume, "container_path": "/v"}],
            "log_path": "app.log",
            "linux": {
                "security_context": security,
                "resources": {"memory_limit_in_bytes": 128 << 20},
            },
        });
        let init = json!({
            "metadata": {"name": "load"},
            "image": {"image": "dyad.test/busybox:1"},
            "command": ["/bin/sh", "-c", "echo loaded"],
            "log_path": "load.log",
            "linux": {"security_context": security},
        });
        let crictl = env.crictl();
        let id = crictl.runp("dyad", &pod)?;
        let init = crictl.create(&id, &init, &pod)?;
        crictl.start(&init)?;
        let code = crictl.exited(&init, SOON)?.exit_code;
        same("exit code of the init container", code, 0)?;
        let loaded = fs::read(dir.join("load.log")).unwrap_or_default();
        let wanted = if source.is_none() { "loaded\n" } else { "" };
        same(
            "what the init container said",
            Logs::parse(&loaded).out().as_str(),
            wanted,
        )?;
        let container = crictl.create(&id, &container, &pod)?;
        crictl.start(&container)?;
        Ok(Self {
            env,
            id,
            container,
            dir,
        })
    }

    fn state(&self) -> Result<String> {
        let state = self.env.dyadctl(&["state", &self.id])?;
        Ok(state.success("dyadctl state")?.text())
    }

    fn identity(&self) -> Result<String> {
        let state = self.state()?;
        let line = state
            .lines()
            .find_map(|line| line.strip_prefix("Identity:"));
        Ok(line
            .context("no identity in dyadctl state")?
            .trim()
            .to_owned())
    }

    /// Where it waits for its source, once it does.
    fn socket(&self, source: &str) -> Result<String> {
        let path = self
            .env
            .dir
            .join(format!("dyad/run/migration/{source}.sock"));
        until(SOON, "the target to wait", || {
            // A file that an earlier one left is no listener.
            Ok(UnixStream::connect(&path).ok().map(drop))
        })?;
        Ok(format!("unix://{}", path.display()))
    }

    fn log(&self) -> Result<String> {
        let file = fs::read(self.dir.join("app.log")).unwrap_or_default();
        Ok(Logs::parse(&file).out())
    }

    fn counts(&self) -> Result<Vec<u64>> {
        let log = self.log()?;
        let numbers = log.lines().filter_map(|line| line.strip_prefix("n "));
        numbers.map(|number| Ok(number.parse()?)).collect()
    }

    /// Waits until it has counted on.
    fn goes_on(&self) -> Result<()> {
        let had = self.counts()?.len();
        until(SOON, "it to count", || {
            Ok((self.counts()?.len() > had + 5).then_some(()))
        })
    }

    /// Waits until its container has ended, not with 0.
    fn fails(&self) -> Result<()> {
        if self.env.crictl().exited(&self.container, SOON)?.exit_code == 0 {
            bail!("it ended with 0");
        }
        Ok(())
    }

    fn kill_shim(&self) -> Result<()> {
        Ok(kill(shim_of(&self.id)?, Signal::SIGKILL)?)
    }

    /// As kubelet does it: containerd may still be about the task of a shim that died.
    fn remove(&self) -> Result<()> {
        until(SOON, "the pod to be removed", || {
            self.env.crictl().rmp_force(&self.id).map(Some)
        })
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<()> {
    if found != wanted {
        bail!("{what}: {found:?} instead of {wanted:?}");
    }
    Ok(())
}

fn contains(text: &str, word: &str) -> Result<()> {
    if !text.contains(word) {
        bail!("{word:?} is not in {text:?}");
    }
    Ok(())
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

#[test]
fn a_pod_of_containers_moves_and_only_one_runs() {
    let nodes = Nodes::up("mc").unwrap();
    let logs: Vec<_> = nodes.nodes.iter().map(Env::log_mark).collect();
    let result = trial(&nodes)
        .and_then(|()| a_made_target(&nodes))
        .and_then(|()| over_tls(&nodes));
    let result = result.map_err(|error| {
        let tails: Vec<_> = nodes
            .nodes
            .iter()
            .zip(&logs)
            .map(|(node, mark)| node.log_tail(mark, &["migrat".into()]))
            .collect();
        anyhow!("{error:#}\n{}", tails.join("\n"))
    });
    drop(nodes);
    result.unwrap();
}

fn trial(nodes: &Nodes) -> Result<()> {
    let [one, two] = &nodes.nodes;
    let source = Pod::run(one, "web", None)?;
    source.goes_on()?;
    let identity = source.identity()?;
    let migrate = |arguments: &[&str]| {
        let mut all = vec!["migrate", &source.id];
        all.extend(arguments);
        one.dyadctl(&all)
    };

    // Nobody waits: refused, and it runs on.
    let nowhere = format!("unix://{}/nowhere.sock", two.dir.display());
    let refused = migrate(&["--to", &nowhere])?;
    same("exit code", refused.code(), REFUSED)?;
    contains(&refused.stderr, "create the target pod first")?;
    source.goes_on()?;

    // A target that is deleted while it waits goes without a trace.
    let target = Pod::run(two, "early", Some(&identity))?;
    contains(&target.state()?, "incoming")?;
    target.socket(&identity)?;
    target.remove()?;
    source.goes_on()?;

    for break_ in [Break::Cancel, Break::TimeOut, Break::TargetShim] {
        broken(&source, two, break_).with_context(|| format!("{break_:?}"))?;
        source.goes_on()?;
    }
    let doomed = Pod::run(one, "doomed", None)?;
    doomed.goes_on()?;
    broken(&doomed, two, Break::SourceShim).context("SourceShim")?;
    doomed.fails()?;
    doomed.remove()?;
    // Nobody knows any more whether it was given away.
    let fences = || entries(&one.dir.join("dyad/lib/migrated"));
    same("tombstones", fences(), 1)?;

    // It moves.
    let target = Pod::run(two, "web", Some(&identity))?;
    let to = target.socket(&identity)?;
    migrate(&["--to", &to])?.success("dyadctl migrate")?;
    target.goes_on()?;
    let all = [source.counts()?, target.counts()?].concat();
    let wanted: Vec<u64> = (0..all.len() as u64).collect();
    same("lines over both logs", all, wanted)?;
    contains(&target.state()?, "running")?;
    let crictl = two.crictl();
    let seen = crictl.exec(
        &target.container,
        &[
            "sh",
            "-c",
            "head -n1 /count; wc -l < /count; cat /v/now; hostname",
        ],
    )?;
    let seen = seen.success("exec in what arrived")?.text();
    contains(&seen, "0\n")?;
    contains(&seen, "web")?;
    same(
        "target",
        crictl.status(&target.container)?.state.as_str(),
        "CONTAINER_RUNNING",
    )?;

    // The source has left, with 0, and never runs again.
    let left = one.crictl().exited(&source.container, SOON)?;
    same("exit code", left.exit_code, 0)?;
    same("tombstones", fences(), 2)?;
    let again = one.crictl().run(&["start", &source.container], b"")?;
    if again.code() == 0 {
        bail!("the source was started again");
    }
    source.remove()?;
    target.goes_on()?;
    for node in [one, two] {
        same(
            "checkpoints",
            entries(&node.dir.join("dyad/lib/checkpoints")),
            0,
        )?;
    }
    crictl.stop(&target.container, 1)?;
    target.remove()
}

/// What breaks a migration in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Break {
    Cancel,
    TimeOut,
    TargetShim,
    SourceShim,
}

/// Breaks one off while files are copied: its target fails, and has never run.
fn broken(source: &Pod<'_>, two: &Env, break_: Break) -> Result<()> {
    let identity = source.identity()?;
    let target = Pod::run(two, &format!("{break_:?}").to_lowercase(), Some(&identity))?;
    let to = target.socket(&identity)?;
    // At 1 MiB/s.
    let big = "volumes/kubernetes.io~empty-dir/v/big";
    fs::write(source.dir.join(big), vec![1; 16 << 20])?;
    let mut slowly = vec!["migrate", &source.id, "--to", &to, "--bandwidth", "1"];
    if break_ == Break::TimeOut {
        slowly.extend(["--max-time", "3s"]);
    }
    let migrated = std::thread::scope(|scope| -> Result<_> {
        let migrating = scope.spawn(|| source.env.dyadctl(&slowly));
        let arrives = target.dir.join(big);
        let broke = until(SOON, "files to arrive", || {
            Ok(arrives.exists().then_some(()))
        })
        .and_then(|()| match break_ {
            Break::Cancel => {
                let cancelled = source.env.dyadctl(&["migrate", &source.id, "--cancel"])?;
                cancelled.success("dyadctl migrate --cancel").map(drop)
            }
            Break::TimeOut => Ok(()),
            Break::TargetShim => target.kill_shim(),
            Break::SourceShim => source.kill_shim(),
        });
        let migrated = migrating.join().map_err(|_| anyhow!("a thread panicked"))?;
        broke.and(migrated)
    })?;
    if migrated.code() == 0 {
        bail!("it succeeded: {}", migrated.text());
    }
    if break_ == Break::TimeOut {
        contains(&migrated.stderr, "it took longer than 3000 ms")?;
    }
    target.fails()?;
    same("lines of a target that failed", target.log()?.as_str(), "")?;
    target.remove()?;
    fs::remove_file(source.dir.join(big))?;
    Ok(())
}

/// `dyadctl migrate --create-target` makes the target as the source was asked for, and
/// removes it again where the pod does not arrive.
fn a_made_target(nodes: &Nodes) -> Result<()> {
    let [one, two] = &nodes.nodes;
    let crictl = one.crictl();
    let dir = one.dir.join("log/pods/made");
    let pod = json!({
        "metadata": {"name": "made", "namespace": "default", "uid": "uid-made"},
        "hostname": "made",
        "log_directory": dir,
        "labels": {"app": "made"},
        "linux": {
            "cgroup_parent": format!("/{}/made", cgroup_parent(&one.dir)),
            "security_context": {"namespace_options": {"pid": 1}},
        },
    });
    let container = json!({
        "metadata": {"name": "app"},
        "image": {"image": "dyad.test/busybox:1"},
        "command": ["/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.1; done"],
        "envs": [{"key": "GREETING", "value": "hello"}],
        "log_path": "app.log",
        "linux": {"security_context": {"namespace_options": {"pid": 1}}},
    });
    let source = crictl.runp("dyad", &pod)?;
    let id = crictl.create(&source, &container, &pod)?;
    crictl.start(&id)?;
    let count = |env: &Env, id: &str| -> Result<u64> {
        let read = env.crictl().exec(id, &["cat", "/count"])?;
        Ok(read.success("exec cat")?.text().trim().parse()?)
    };
    let before = until(SOON, "it to count", || {
        Ok(count(one, &id).ok().filter(|n| *n > 5))
    })?;

    let endpoint = |env: &Env| format!("unix://{}/containerd/containerd.sock", env.dir.display());
    let (here, there) = (endpoint(one), endpoint(two));
    let migrate = |to: &str| {
        let target = ["--create-target", &there, "--runtime-endpoint", &here];
        one.dyadctl(&[&["migrate", &source, "--to", to], &target[..]].concat())
    };
    let pods = || -> Result<String> {
        Ok(two
            .crictl()
            .run(&["pods", "--quiet", "--label", "app=made"], b"")?
            .text())
    };
    let nowhere = migrate(&format!("unix://{}/nowhere.sock", two.dir.display()))?;
    same("exit code", nowhere.code(), REFUSED)?;
    same("what is left of the target", pods()?.as_str(), "")?;

    let state = one.dyadctl(&["state", &source])?.text();
    let identity = state
        .lines()
        .find_map(|line| line.strip_prefix("Identity:"));
    let identity = identity.context("no identity in dyadctl state")?.trim();
    let socket = two.dir.join(format!("dyad/run/migration/{identity}.sock"));
    let moved = migrate(&format!("unix://{}", socket.display()))?.success("dyadctl migrate")?;
    contains(&moved.text(), "made its target")?;
    let target = pods()?.trim().to_owned();
    let list = ["ps", "--quiet", "--state", "Running", "--pod", &target];
    let arrived = two.crictl().run(&list, b"")?.success("crictl ps")?.text();
    let arrived = arrived.trim();
    if count(two, arrived)? < before {
        bail!("it began anew");
    }
    let said = two
        .crictl()
        .exec(arrived, &["sh", "-c", "echo $GREETING"])?;
    contains(&said.success("exec in what arrived")?.text(), "hello")?;
    crictl.rmp_force(&source)?;
    two.crictl().rmp_force(&target)
}

/// Over the network, where only an authority's word counts.
fn over_tls(nodes: &Nodes) -> Result<()> {
    let [one, two] = &nodes.nodes;
    let authorities = nodes.dir.join("pki");
    for name in ["ours", "strangers"] {
        pki::authority(&authorities, name)?;
    }
    let trusted_by = |number: u8, signer: &str| -> Result<()> {
        let folder = nodes.nodes[usize::from(number) - 1]
            .dir
            .join("etc/migration");
        fs::create_dir_all(&folder)?;
        pki::certify(&authorities, signer, &nodes.address(number)?)?;
        for (made, name) in [
            (format!("{signer}.crt"), "ca.pem"),
            ("node.crt".into(), "cert.pem"),
            ("node.key".into(), "key.pem"),
        ] {
            fs::copy(authorities.join(made), folder.join(name))?;
        }
        Ok(())
    };
    for (node, more) in [
        (one, String::new()),
        (
            two,
            format!("migration_listen = \"tls://{}:0\"\n", nodes.address(2)?),
        ),
    ] {
        let file = node.config_file("dyad");
        let folder = node.dir.join("etc/migration");
        let config = fs::read_to_string(&file)?.replace(
            "[container]\n",
            &format!("[container]\nmigration_tls = {folder:?}\n{more}"),
        );
        fs::write(&file, config)?;
    }
    trusted_by(1, "strangers")?;
    trusted_by(2, "ours")?;

    let source = Pod::run(one, "tls", None)?;
    source.goes_on()?;
    let identity = source.identity()?;
    let target = Pod::run(two, "tls", Some(&identity))?;
    target.socket(&identity)?;
    let address = two
        .dir
        .join(format!("dyad/run/migration/{identity}.address"));
    let to = fs::read_to_string(address)?.trim().to_owned();
    let migrate = || one.dyadctl(&["migrate", &source.id, "--to", &to]);
    let refused = migrate()?;
    same("exit code", refused.code(), REFUSED)?;
    contains(&refused.stderr, "certificate")?;
    source.goes_on()?;
    same("lines of a target that waits", target.log()?.as_str(), "")?;

    trusted_by(1, "ours")?;
    migrate()?.success("dyadctl migrate")?;
    target.goes_on()?;
    let all = [source.counts()?, target.counts()?].concat();
    let wanted: Vec<u64> = (0..all.len() as u64).collect();
    same("lines over both logs", all, wanted)?;
    source.remove()?;
    target.remove()
}
