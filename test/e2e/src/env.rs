//! The private environment of one containerd version, made by `hack/up`.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{self, Done};
use crate::crictl::Crictl;
use crate::host;
use crate::wait::until;

/// Go and Rust builds from cold caches come before the first environment is up.
pub(crate) const UP_TIMEOUT: Duration = Duration::from_secs(40 * 60);
const DOWN_TIMEOUT: Duration = Duration::from_secs(180);
pub(crate) const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// A containerd minor version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// containerd 1.6, as Debian 12 has it.
    V1_6,
    /// containerd 1.7.
    V1_7,
    /// containerd 2.1.
    V2_1,
    /// containerd 2.3, the newest.
    V2_3,
}

impl Version {
    /// All of them, the newest first.
    pub const ALL: [Self; 4] = [Self::V2_3, Self::V2_1, Self::V1_7, Self::V1_6];

    /// As `hack/up --containerd` takes it.
    pub fn number(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
            Self::V2_3 => "2.3",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.number())
    }
}

/// How `hack/up` is to build what it installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// The shim and the guest are built first (nothing to do where they are fresh).
    Fresh,
    /// They are installed as they were built last.
    AsIs,
}

impl Build {
    /// As `DYAD_E2E_NO_BUILD` asks.
    pub fn asked() -> Self {
        if std::env::var_os("DYAD_E2E_NO_BUILD").is_none() {
            Self::Fresh
        } else {
            Self::AsIs
        }
    }

    /// The arguments of `hack/up` and `hack/cluster up` for it.
    pub fn tell(self, up: &mut Command) {
        if self == Self::AsIs {
            up.arg("--no-build");
        }
        if let Some(profile) = std::env::var_os("DYAD_E2E_PROFILE") {
            up.arg("--profile").arg(profile);
        }
    }
}

/// A running environment.
#[derive(Debug)]
pub struct Env {
    /// Its scratch folder.
    pub dir: PathBuf,
    /// Its containerd's version.
    pub version: Version,
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Env {
    /// Brings an environment up in `dir`; what an earlier run left there goes first.
    ///
    /// # Errors
    /// `hack/up` failed; the text holds its output.
    pub fn up(version: Version, dir: &Path, build: Build) -> Result<Self> {
        let env = Self {
            dir: dir.to_path_buf(),
            version,
        };
        env.down()?;
        env.refresh(build)?;
        Ok(env)
    }

    /// Runs `hack/up` on the folder: starts what is not running.
    ///
    /// # Errors
    /// `hack/up` failed; the text holds its output.
    pub fn refresh(&self, build: Build) -> Result<()> {
        let mut up = self.hack("up");
        up.args(["--containerd", self.version.number()]);
        build.tell(&mut up);
        command::run(&mut up, b"", UP_TIMEOUT)?.success("hack/up")?;
        Ok(())
    }

    /// Runs `hack/down` on the folder; nothing happens where nothing is up.
    ///
    /// # Errors
    /// `hack/down` failed; the text holds its output.
    pub fn down(&self) -> Result<()> {
        command::run(&mut self.hack("down"), b"", DOWN_TIMEOUT)?.success("hack/down")?;
        crate::host::remove_cgroup_parent(&self.dir);
        Ok(())
    }

    fn hack(&self, name: &str) -> Command {
        let mut command = Command::new(repository().join("hack").join(name));
        command.arg("--dir").arg(&self.dir);
        command
    }

    /// One of the environment's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }

    /// The `PATH` that `hack/up` exports: the environment's programs first.
    pub fn path(&self) -> String {
        let ours = std::env::var("PATH").unwrap_or_default();
        format!("{}:{ours}", self.dir.join("bin").display())
    }

    /// crictl on this environment's containerd.
    pub fn crictl(&self) -> Crictl {
        Crictl::new(self)
    }

    /// `ctr` in containerd's namespace `namespace`.
    pub fn ctr_command(&self, namespace: &str) -> Command {
        ctr_command(&self.dir, namespace)
    }

    /// Runs `ctr` on CRI's containers.
    ///
    /// # Errors
    /// It did not end with 0.
    pub fn ctr(&self, args: &[&str]) -> Result<Done> {
        command::run(self.ctr_command("k8s.io").args(args), b"", ASK_TIMEOUT)?
            .success(&format!("ctr {args:?}"))
    }

    /// Runs `dyadctl` on this environment's shims, whatever comes of it.
    ///
    /// # Errors
    /// It could not be run, or did not end in time.
    pub fn dyadctl(&self, args: &[&str]) -> Result<Done> {
        let mut command = Command::new(self.program("dyadctl"));
        command
            .arg("--state-dir")
            .arg(self.dir.join("dyad/run"))
            .env_remove("DYAD_CONFIG")
            .env("PATH", self.path())
            .args(args);
        command::run(&mut command, b"", ASK_TIMEOUT)
    }

    /// The private libvirtd's URI.
    pub fn libvirt_uri(&self) -> String {
        format!(
            "qemu+unix:///system?socket={}/libvirt/run/libvirt-sock",
            self.dir.display()
        )
    }

    /// Runs `virsh` on the private libvirtd.
    ///
    /// # Errors
    /// It did not end with 0.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let mut virsh = Command::new("virsh");
        virsh
            .args(["--quiet", "--connect"])
            .arg(self.libvirt_uri())
            .args(args);
        Ok(command::run(&mut virsh, b"", ASK_TIMEOUT)?
            .success(&format!("virsh {args:?}"))?
            .text())
    }

    /// The machine of a pod, by its libvirt title `namespace/pod`.
    ///
    /// # Errors
    /// There is none.
    pub fn domain_of(&self, pod_name: &str) -> Result<String> {
        let title = format!("default/{pod_name}");
        let table = self.virsh(&["list", "--all", "--title"])?;
        for line in table.lines() {
            let mut fields = line.split_whitespace();
            if let (Some(_id), Some(name)) = (fields.next(), fields.next())
                && line.trim_end().ends_with(&title)
            {
                return Ok(name.to_owned());
            }
        }
        bail!("no domain has the title {title}:\n{table}")
    }

    /// The environment's configuration file of a handler.
    pub fn config_file(&self, handler: &str) -> PathBuf {
        self.dir.join(format!("etc/{handler}.toml"))
    }

    /// Pid of `containerd` or `libvirtd`.
    ///
    /// # Errors
    /// `hack/up` has not started it.
    pub fn daemon(&self, name: &str) -> Result<Pid> {
        let file = self.dir.join("pid").join(name);
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let pid = text.split_whitespace().next().unwrap_or_default();
        Ok(Pid::from_raw(
            pid.parse()
                .with_context(|| format!("pid {pid:?} of {name}"))?,
        ))
    }

    /// A power cut and the next start: all that runs here is killed at once, what is in memory
    /// on a host goes, and the daemons start anew. Namespaces and cgroups stay.
    ///
    /// # Errors
    /// Something does not die, or a daemon did not come up.
    pub fn restart_node(&self) -> Result<()> {
        let node = self.daemon("node")?;
        until(ASK_TIMEOUT, "every process to be gone", || {
            // The first to be killed may have started others.
            let left = host::processes(&self.dir).into_iter().map(|(pid, _)| pid);
            let left: Vec<Pid> = left.filter(|pid| runs(*pid)).collect();
            let left = left.into_iter().filter(|pid| !keeps(*pid, node));
            let mut none = true;
            for pid in left {
                none = false;
                // It may have ended with another.
                let _ = kill(pid, Signal::SIGKILL);
            }
            Ok(none.then_some(()))
        })?;
        let forget = "for dir; do \
             awk -v dir=\"$dir/\" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r | xargs -r umount -l; \
             find \"$dir\" -mindepth 1 -delete; done";
        let in_memory = ["dyad/run", "containerd/state", "libvirt/run"];
        let mut shell = Command::new("nsenter");
        shell
            .args(["--target", &node.to_string(), "--mount", "--"])
            .args(["sh", "-ec", forget, "sh"])
            .args(in_memory.map(|folder| self.dir.join(folder)));
        command::run(&mut shell, b"", ASK_TIMEOUT)?.success("empty what is in memory")?;
        self.refresh(Build::AsIs)
    }

    /// `kill -9` of `containerd` or `libvirtd`, and a new one in its place.
    ///
    /// # Errors
    /// It did not die, or no new one came up.
    pub fn kill_and_restart(&self, name: &str) -> Result<()> {
        let old = self.daemon(name)?;
        kill(old, Signal::SIGKILL).with_context(|| format!("kill {name}"))?;
        until(ASK_TIMEOUT, &format!("{name} to be gone"), || {
            Ok((!runs(old)).then_some(()))
        })?;
        self.refresh(Build::AsIs)?;
        if self.daemon(name)? == old {
            bail!("{name} was not started again");
        }
        Ok(())
    }

    fn log(&self, daemon: &str) -> PathBuf {
        self.dir.join(format!("log/{daemon}.log"))
    }

    /// Where the daemons' logs end now.
    pub fn log_mark(&self) -> LogMark {
        LogMark(DAEMONS.map(|name| {
            fs::metadata(self.log(name)).map_or(0, |log| usize::try_from(log.len()).unwrap_or(0))
        }))
    }

    /// The last lines since `since` of the environment's logs that hold one of `words` (a pod's id,
    /// its name) or are errors, and the machines' consoles.
    pub fn log_tail(&self, since: &LogMark, words: &[String]) -> String {
        const LINES: usize = 40;
        let mut tail = String::new();
        for (name, length) in DAEMONS.iter().zip(since.0) {
            let text = fs::read(self.log(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(text.get(length..).unwrap_or_default());
            let told: Vec<&str> = text
                .lines()
                .filter(|line| {
                    words.iter().any(|word| line.contains(word.as_str()))
                        || line.contains("level=error")
                        || line.contains("level=fatal")
                })
                .collect();
            let from = told.len().saturating_sub(LINES);
            tail.push_str(&format!("--- {name}.log\n{}\n", told[from..].join("\n")));
        }
        for console in consoles(&self.dir.join("dyad")) {
            let text = fs::read(&console).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let from = lines.len().saturating_sub(LINES);
            tail.push_str(&format!(
                "--- {}\n{}\n",
                console.display(),
                lines[from..].join("\n")
            ));
        }
        tail
    }
}

/// What `hack/up` starts.
const DAEMONS: [&str; 2] = ["containerd", "libvirtd"];

/// A place in the daemons' logs.
#[derive(Debug)]
pub struct LogMark([usize; 2]);

/// The machines' console logs below Dyad's state folder.
/// `ctr` of the environment in `dir`, in containerd's namespace `namespace`.
pub(crate) fn ctr_command(dir: &Path, namespace: &str) -> Command {
    let mut command = Command::new(dir.join("bin/ctr"));
    command
        .arg("--address")
        .arg(dir.join("containerd/containerd.sock"))
        .args(["--namespace", namespace]);
    command
}

fn consoles(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(consoles(&path));
        } else if path.is_file() && entry.file_name().to_string_lossy().contains("console") {
            found.push(path);
        }
    }
    found
}

/// Whether the process is the one that keeps a node's namespaces, or its parent.
fn keeps(pid: Pid, node: Pid) -> bool {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let node = node.to_string();
    pid.to_string() == node || children.is_ok_and(|all| all.split(' ').any(|pid| pid == node))
}

/// Whether the process runs (a zombie does not).
pub fn runs(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(") ")
                .map(|(_, rest)| !rest.starts_with(['Z', 'X']))
        })
        .unwrap_or(false)
}
