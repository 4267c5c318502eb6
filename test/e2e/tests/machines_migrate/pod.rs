//! Pods of one machine, on one node, and what is asked of them.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use dyad_e2e::command::Done;
use dyad_e2e::env::Env;
use dyad_e2e::host::{cgroup_parent, process, remove_cgroup, shim_of};
use dyad_e2e::logs::{self, Logs};
use dyad_e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as Process;
use serde_json::{Value, json};

/// Longer than anything here takes on a busy host under emulation.
pub const SOON: Duration = Duration::from_secs(90);
/// dyadctl's exit codes: the state or the other side does not allow it, and it failed.
const REFUSED: i32 = 4;
const FAILED: i32 = 1;
const MIB: u64 = 1 << 20;
/// Microseconds.
const CPU_PERIOD: u64 = 100_000;

/// Counts on stdout, and to whoever connects.
pub const COUNT: &str = "(while :; do nc -l -p 7000 -e sh -c \
     'i=0; while :; do echo t $i; i=$((i+1)); sleep 0.1; done'; done) & \
     i=0; while :; do echo n $i; i=$((i+1)); sleep 0.1; done";

/// Rewrites its memory and compares it: each of 16 files holds a number of its own over and
/// over, and is compared when it is the oldest. Counts on stdout, and tells what differs.
pub const DIRTY: &str = "i=0; while [ $i -lt 16 ]; do yes $i | head -c 65536 >/dev/shm/f$i; i=$((i+1)); done; n=0; \
     while :; do \
     yes $i | head -c 65536 >/dev/shm/f$((i%16)); i=$((i+1)); j=$((i-16)); \
     yes $j | head -c 65536 | cmp -s - /dev/shm/f$((j%16)) || echo differs $j; \
     echo n $n; n=$((n+1)); done";

/// How a pod is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    source: Option<String>,
    container: String,
    image: String,
    script: String,
    disk: String,
    /// The machine's memory and its container's, in MiB.
    memory: Option<(u64, u64)>,
    cpus: Option<u64>,
    /// A ConfigMap's only key.
    config_map: Option<String>,
    /// Init containers: name, image, script.
    init: Vec<[String; 3]>,
}

impl Plan {
    /// Runs the script.
    pub fn of(script: &str) -> Self {
        Self {
            source: None,
            container: "app".into(),
            image: "dyad.test/busybox:1".into(),
            script: script.into(),
            disk: "1Gi".into(),
            memory: None,
            cpus: None,
            config_map: None,
            init: Vec::new(),
        }
    }

    /// Waits for this machine.
    pub fn from(mut self, machine: &str) -> Self {
        self.source = Some(machine.into());
        self
    }

    pub fn container(mut self, name: &str) -> Self {
        self.container = name.into();
        self
    }

    pub fn image(mut self, name: &str) -> Self {
        self.image = name.into();
        self
    }

    pub fn disk(mut self, size: &str) -> Self {
        self.disk = size.into();
        self
    }

    pub fn memory(mut self, machine: u64, container: u64) -> Self {
        self.memory = Some((machine, container));
        self
    }

    pub fn cpus(mut self, cpus: u64) -> Self {
        self.cpus = Some(cpus);
        self
    }

    /// One more container that ends before the next is made.
    pub fn init(mut self, name: &str, image: &str, script: &str) -> Self {
        self.init.push([name, image, script].map(str::to_owned));
        self
    }

    pub fn config_map(mut self, value: &str) -> Self {
        self.config_map = Some(value.into());
        self
    }
}

/// A pod with one container, on one node; removed when dropped.
pub struct Pod<'a> {
    pub env: &'a Env,
    pub id: String,
    pub container: String,
    pub config: Value,
    log: PathBuf,
}

impl<'a> Pod<'a> {
    pub fn run(env: &'a Env, plan: &Plan) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // An environment that was kept has the logs and the fences of earlier runs.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("m{}-{number}", std::process::id());
        let dir = env.dir.join("log/pods").join(&name);
        let mut annotations = json!({"dyad.dev/disk": plan.disk});
        if let Some(source) = &plan.source {
            annotations["dyad.dev/migration-source"] = source.as_str().into();
            if !plan.init.is_empty() {
                let names: Vec<&str> = plan.init.iter().map(|[name, ..]| name.as_str()).collect();
                annotations["dyad.dev/migration-init-containers"] = names.join(",").into();
            }
        }
        let mut config = json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
            "hostname": "counter",
            "log_directory": dir,
            "annotations": annotations,
            "linux": {"cgroup_parent": format!("/{}/{name}", cgroup_parent(&env.dir))},
        });
        let mut container = json!({
            "metadata": {"name": plan.container},
            "image": {"image": plan.image},
            "command": ["/bin/sh", "-c", plan.script],
            "log_path": "app.log",
            "linux": {},
        });
        let (of_machine, of_container) = plan.memory.unzip();
        for (config, memory) in [(&mut config, of_machine), (&mut container, of_container)] {
            let mut limits = json!({});
            if let Some(mib) = memory {
                limits["memory_limit_in_bytes"] = (mib * MIB).into();
            }
            if let Some(cpus) = plan.cpus {
                limits["cpu_period"] = CPU_PERIOD.into();
                limits["cpu_quota"] = (cpus * CPU_PERIOD).into();
            }
            config["linux"]["resources"] = limits;
        }
        if let Some(value) = &plan.config_map {
            // As kubelet's atomic writer lays it out.
            let map = dir.join("volumes/kubernetes.io~configmap/settings");
            fs::create_dir_all(map.join("..1"))?;
            fs::write(map.join("..1/key"), value)?;
            std::os::unix::fs::symlink("..1", map.join("..data"))?;
            std::os::unix::fs::symlink("..data/key", map.join("key"))?;
            container["mounts"] =
                json!([{"host_path": map, "container_path": "/settings", "readonly": true}]);
        }
        let crictl = env.crictl();
        let mut pod = Self {
            env,
            id: crictl.runp("dyad-vm", &config)?,
            container: String::new(),
            log: dir.join("app.log"),
            config,
        };
        for [name, image, script] in &plan.init {
            pod.run_to_end(name, image, script)?;
        }
        pod.container = crictl.create(&pod.id, &container, &pod.config)?;
        crictl.start(&pod.container)?;
        Ok(pod)
    }

    /// The pod that `dyadctl` made for it on that node, where no other is. It has the same log.
    pub fn made_on<'b>(&self, env: &'b Env) -> Result<Pod<'b>> {
        let only = |found: Vec<String>| match <[String; 1]>::try_from(found) {
            Ok([id]) => Ok(id),
            Err(found) => bail!("not one, but {found:?}"),
        };
        let crictl = env.crictl();
        Ok(Pod {
            env,
            id: only(crictl.pods()?)?,
            container: only(crictl.containers()?)?,
            config: self.config.clone(),
            log: self.log.clone(),
        })
    }

    /// Runs one more container until it ends with 0.
    pub fn run_to_end(&self, name: &str, image: &str, script: &str) -> Result<()> {
        let id = self.begin_one(name, image, script)?;
        let code = self.env.crictl().exited(&id, SOON)?.exit_code;
        ensure!(code == 0, "container {name} ended with {code}");
        Ok(())
    }

    /// Runs one more container.
    pub fn begin_one(&self, name: &str, image: &str, script: &str) -> Result<String> {
        let container = json!({
            "metadata": {"name": name},
            "image": {"image": image},
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        let crictl = self.env.crictl();
        let id = crictl.create(&self.id, &container, &self.config)?;
        crictl.start(&id)?;
        Ok(id)
    }

    /// What that container wrote to stdout.
    pub fn out_of(&self, name: &str) -> String {
        let log = self.log.with_file_name(format!("{name}.log"));
        Logs::parse(&fs::read(log).unwrap_or_default()).out()
    }

    /// One that counts.
    pub fn counting(env: &'a Env) -> Result<Self> {
        let pod = Self::run(env, &Plan::of(COUNT))?;
        pod.counts_beyond(3)?;
        Ok(pod)
    }

    /// One that waits for that machine.
    pub fn waiting(env: &'a Env, machine: &str) -> Result<Self> {
        Self::run(env, &Plan::of(COUNT).from(machine))
    }

    pub fn ip(&self) -> Result<String> {
        Ok(self.env.crictl().pod_status(&self.id)?.ip)
    }

    pub fn state(&self) -> Result<String> {
        let state = self.env.dyadctl(&["state", &self.id])?;
        Ok(state.success("dyadctl state")?.text())
    }

    pub fn is_running(&self) -> bool {
        let state = self.state();
        state.is_ok_and(|state| state.contains("State:    running"))
    }

    /// The UUID of its machine.
    pub fn machine(&self) -> Result<String> {
        let state = self.state()?;
        let (_, rest) = state.split_once("dyad-").context("no machine")?;
        Ok(rest.chars().take(36).collect())
    }

    /// What its container wrote to stdout.
    pub fn out(&self) -> String {
        Logs::parse(&fs::read(&self.log).unwrap_or_default()).out()
    }

    pub fn numbers(&self) -> Result<Vec<u64>> {
        let out = self.out();
        let numbers = out.lines().filter_map(|line| line.strip_prefix("n "));
        numbers
            .map(|number| number.parse().context("a number"))
            .collect()
    }

    /// For how long nothing was heard of it, from its last word here to its first over there.
    pub fn silence_before(&self, target: &Self) -> Result<Duration> {
        let times = |pod: &Self| logs::times(&fs::read(&pod.log).unwrap_or_default());
        let (last, first) = (times(self).pop(), times(target).into_iter().next());
        let seconds = first.context("no first word")? - last.context("no last word")?;
        Ok(Duration::from_secs_f64(seconds.max(0.0)))
    }

    pub fn counts_beyond(&self, least: u64) -> Result<u64> {
        until(
            SOON,
            &format!("{} to count beyond {least}", self.id),
            || Ok(self.numbers()?.last().copied().filter(|last| *last > least)),
        )
    }

    /// It still counts, and is told as running.
    pub fn goes_on(&self) -> Result<()> {
        until(SOON, &format!("{} to run", self.id), || {
            Ok(self.is_running().then_some(()))
        })?;
        let now = self.numbers()?.last().copied().unwrap_or_default();
        self.counts_beyond(now + 3).map(drop)
    }

    /// Gives its container other limits, while it runs.
    pub fn resize(&self, memory_mib: Option<u64>, cpus: Option<u64>) -> Result<()> {
        let mut limits = Vec::new();
        if let Some(mib) = memory_mib {
            limits.extend(["--memory".to_owned(), (mib * MIB).to_string()]);
        }
        if let Some(cpus) = cpus {
            let quota = (cpus * CPU_PERIOD).to_string();
            limits.extend(["--cpu-quota".into(), quota]);
            limits.extend(["--cpu-period".into(), CPU_PERIOD.to_string()]);
        }
        let limits: Vec<&str> = limits.iter().map(String::as_str).collect();
        self.env.crictl().update(&self.container, &limits)
    }

    /// What the script says in the container.
    pub fn output(&self, script: &str) -> Result<String> {
        let exec = self
            .env
            .crictl()
            .exec(&self.container, &["sh", "-c", script])?;
        Ok(exec.success(script)?.text())
    }

    /// Begins a migration; it goes on beside.
    pub fn begin(&self, to: &Env, options: &[&str]) -> Result<Migration> {
        self.begin_to(&to.libvirt_uri(), options)
    }

    pub fn begin_to(&self, uri: &str, options: &[&str]) -> Result<Migration> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let told = self.log.with_file_name(format!("migrate-{number}.log"));
        let file = fs::File::create(&told)?;
        let child = Command::new(self.env.program("dyadctl"))
            // Where it looks for crictl.
            .env("PATH", self.env.path())
            .arg("--state-dir")
            .arg(self.env.dir.join("dyad/run"))
            .args(["migrate", &self.id, "--to", uri])
            .args(options)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        Ok(Migration { child, told })
    }

    pub fn migrate(&self, to: &Env, options: &[&str]) -> Result<Ended> {
        self.begin(to, options)?.end()
    }

    pub fn migrate_to(&self, uri: &str, options: &[&str]) -> Result<Ended> {
        self.begin_to(uri, options)?.end()
    }

    /// Begins one that takes long, and waits until it copies memory that slowly.
    pub fn begin_slowly(&self, to: &Env, options: &[&str]) -> Result<Migration> {
        self.begin_slowly_to(&to.libvirt_uri(), options)
    }

    pub fn begin_slowly_to(&self, uri: &str, options: &[&str]) -> Result<Migration> {
        let migration = self.begin_to(uri, &[&["--bandwidth", "2"], options].concat())?;
        let machine = self.machine()?;
        until(SOON, "the migration to copy memory slowly", || {
            // While disks are copied it is another, for their holes.
            let bound = self.env.virsh(&["migrate-getspeed", &machine])?;
            Ok((bound.trim() == "2").then_some(()))
        })
        .with_context(|| format!("dyadctl said {:?}", migration.told()))?;
        Ok(migration)
    }

    pub fn cancel(&self) -> Result<Done> {
        self.env.dyadctl(&["migrate", &self.id, "--cancel"])
    }

    /// It runs here as before, and over there nothing ran or runs.
    pub fn stayed(&self, target: &Pod<'_>) -> Result<()> {
        until(SOON, "the source to run as before", || {
            Ok(self.is_running().then_some(()))
        })?;
        self.goes_on()?;
        let machine = self.machine()?;
        until(SOON, "the target's machine to be gone", || {
            let active = target.env.virsh(&["list", "--name"])?;
            Ok((!active.contains(&machine)).then_some(()))
        })?;
        ensure!(target.numbers()?.is_empty(), "the target has run");
        Ok(())
    }

    /// The exit code, once it has ended.
    pub fn ended(&self) -> Result<i32> {
        let status = self.env.crictl().exited(&self.container, SOON)?;
        Ok(status.exit_code)
    }

    pub fn shim(&self) -> Result<Process> {
        shim_of(&self.id)
    }

    /// Its QEMU, while it has one.
    pub fn qemu(&self, machine: &str) -> Result<Process> {
        let dir = format!("{}/", self.env.dir.display());
        process(|line| {
            line.contains("qemu-system") && line.contains(machine) && line.contains(&dir)
        })
        .with_context(|| format!("QEMU of {machine} in {dir}"))
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let crictl = self.env.crictl();
        // As kubelet does: where a shim was killed, containerd may still be about its task.
        // What is left is told by who looks for it.
        let _ = until(SOON, "the pod to be removed", || {
            let removed = crictl.rmp_force(&self.id).is_ok();
            let is_gone = removed || !crictl.pods()?.contains(&self.id);
            Ok(is_gone.then_some(()))
        });
        let parent = self.config["linux"]["cgroup_parent"].as_str();
        remove_cgroup(parent.unwrap_or_default().trim_start_matches('/'));
    }
}

/// A `dyadctl migrate` under way; killed when dropped.
pub struct Migration {
    child: Child,
    told: PathBuf,
}

/// One that has ended.
pub struct Ended {
    code: i32,
    told: String,
}

impl Migration {
    fn told(&self) -> String {
        fs::read_to_string(&self.told).unwrap_or_default()
    }

    /// Of two that were asked for at once, the one that is not refused.
    pub fn the_one_under_way(mut self, mut other: Self) -> Result<Self> {
        let refused = until(SOON, "one of two migrations to be refused", || {
            Ok(match (self.child.try_wait()?, other.child.try_wait()?) {
                (None, None) => None,
                (Some(_), None) => Some(self.told()),
                (None, Some(_)) => Some(other.told()),
                (Some(_), Some(_)) => bail!("both: {:?}, {:?}", self.told(), other.told()),
            })
        })?;
        ensure!(refused.contains("migrating already"), "{refused:?}");
        let is_over = self.child.try_wait()?.is_some();
        Ok(if is_over { other } else { self })
    }

    /// Waits for its end.
    pub fn end(mut self) -> Result<Ended> {
        let status = until(SOON, "dyadctl migrate to end", || {
            Ok(self.child.try_wait()?)
        })
        .with_context(|| format!("it said {:?}", self.told()))?;
        Ok(Ended {
            code: status.code().unwrap_or(-1),
            told: self.told(),
        })
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        // It has ended, where all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    pub fn moved(&self) -> Result<()> {
        self.with(0, &[])
    }

    pub fn refused(&self, words: &[&str]) -> Result<()> {
        self.with(REFUSED, words)
    }

    pub fn failed(&self, words: &[&str]) -> Result<()> {
        self.with(FAILED, words)
    }

    pub fn with(&self, code: i32, words: &[&str]) -> Result<()> {
        ensure!(
            self.code == code,
            "exit code {} and not {code}: {}",
            self.code,
            self.told
        );
        for word in words {
            ensure!(
                self.told.contains(word),
                "{word:?} is not in {:?}",
                self.told
            );
        }
        Ok(())
    }
}

/// A process that stands still; goes on when dropped.
pub struct Held(Process);

impl Held {
    pub fn hold(process: Process) -> Result<Self> {
        kill(process, Signal::SIGSTOP)?;
        Ok(Self(process))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// A connection to a pod's counter, which may still be beginning to listen.
pub fn connected(ip: &str) -> Result<TcpStream> {
    let address = format!("{ip}:7000").parse()?;
    until(SOON, &format!("port 7000 of {ip}"), || {
        // A packet to nobody must not take all the time there is.
        Ok(Some(TcpStream::connect_timeout(
            &address,
            Duration::from_secs(5),
        )?))
    })
}

/// Every number once and in order, over all logs.
pub fn seamless(pods: &[&Pod<'_>]) -> Result<()> {
    let mut ends = Vec::new();
    let mut all = Vec::new();
    for pod in pods {
        let numbers = pod.numbers()?;
        ends.push((numbers.first().copied(), numbers.last().copied()));
        all.extend(numbers);
    }
    match all.iter().enumerate().find(|(at, n)| *at as u64 != **n) {
        None => Ok(()),
        Some((at, number)) => {
            bail!("number {number} at place {at}; the logs begin and end with {ends:?}")
        }
    }
}
