//! A pod's worth of scaffolding around a real OCI runtime. Needs root, busybox (static)
//! and runc; says so when one is missing.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::env;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dyad_container::{Containers, Folders};
use dyad_linux::pump::Fd;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::config::{ContainerConfig, annotation};
use dyad_runtime_handler::handler::{
    ContainerRef, Event, Exit, Instance, ProcessId, RuntimeHandler,
};
use dyad_runtime_handler::spec::{ContainerSpec, ExecSpec, PodInfo, Role, RootMount, Stdio};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

/// Nothing here takes longer.
pub const BOUND: Duration = Duration::from_secs(30);
pub const NAMESPACE: &str = "test";

/// Runs a test on the one runtime that reaps this process's children.
pub fn run<F: Future>(test: impl FnOnce(Arc<Reaper>) -> F) -> F::Output {
    static SHARED: OnceLock<(Runtime, Arc<Reaper>)> = OnceLock::new();
    let (runtime, reaper) = SHARED.get_or_init(|| {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests run containers, which needs root"
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let reaper = runtime.block_on(async { Reaper::start().unwrap() });
        (runtime, reaper)
    });
    let bounded = async { timeout(4 * BOUND, test(Arc::clone(reaper))).await };
    runtime.block_on(bounded).expect("the test takes too long")
}

/// `DYAD_TEST_RUNC`, the one that hack/tools built, or that on `PATH`.
pub fn runc() -> PathBuf {
    if let Some(given) = env::var_os("DYAD_TEST_RUNC") {
        return given.into();
    }
    let cache = env::var_os("DYAD_CACHE").map(PathBuf::from).or_else(|| {
        let home = env::var_os("HOME")?;
        Some(Path::new(&home).join(".cache/dyad"))
    });
    let built = cache.and_then(|cache| {
        fs::read_dir(cache)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|dir| {
                dir.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with("runc-"))
            })
            .map(|dir| dir.join("runc"))
            .find(|runc| runc.exists())
    });
    built
        .or_else(|| on_path("runc"))
        .expect("no runc: install it, run hack/up once, or set DYAD_TEST_RUNC")
}

/// `DYAD_TEST_CRIU`, or the one that hack/lib/criu.sh fetched; `None`: that on `PATH`.
fn criu() -> Option<PathBuf> {
    if let Some(given) = env::var_os("DYAD_TEST_CRIU") {
        return Some(given.into());
    }
    let cache = env::var_os("DYAD_CACHE").map(PathBuf::from).or_else(|| {
        let home = env::var_os("HOME")?;
        Some(Path::new(&home).join(".cache/dyad"))
    });
    fs::read_dir(cache?)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|dir| {
            dir.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("criu-"))
        })
        .map(|dir| dir.join("criu"))
        .find(|criu| criu.exists())
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
}

/// One container's bundle, FIFOs and handler.
pub struct Pod {
    pub id: String,
    /// Its own id, unless changed.
    pub sandbox_id: String,
    pub handler: Arc<dyn RuntimeHandler>,
    pub events: UnboundedReceiver<Event>,
    pub spec: Value,
    pub temp: TempDir,
    pub reaper: Arc<Reaper>,
    /// Kubernetes' name; empty outside CRI.
    pub name: String,
    pub is_sandbox: bool,
    /// Whom it waits for, as a migration's target.
    pub source: Option<String>,
    /// What it goes on from.
    pub checkpoint: Option<PathBuf>,
    /// Of the image; the root is an overlay where it is not this container's own.
    image: PathBuf,
}

/// The test's ends of a process's FIFOs.
pub struct Ends {
    pub stdin: Fd,
    pub stdout: Fd,
    pub stderr: Fd,
}

impl Pod {
    /// `script` runs in busybox's sh.
    pub fn new(reaper: Arc<Reaper>, script: &str) -> Self {
        Self::with_config(reaper, script, |_| {})
    }

    /// The same with another configuration.
    pub fn with_config(
        reaper: Arc<Reaper>,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("dyad-test-{}-{count}", std::process::id());
        let temp = tempfile::Builder::new().prefix("dyad-c").tempdir().unwrap();
        make_root(&temp.path().join("image"));
        fs::create_dir_all(temp.path().join("bundle/rootfs")).unwrap();
        let (sender, events) = unbounded_channel();
        let mut config = ContainerConfig {
            runtime: Some(runc()),
            criu: criu(),
            ..ContainerConfig::default()
        };
        change(&mut config);
        let handler = Containers::new(
            config,
            Folders::below(temp.path(), &temp.path().join("cache")),
            Arc::clone(&reaper),
            sender,
        );
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{id}"),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
                "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            },
        });
        Self {
            sandbox_id: id.clone(),
            id,
            handler,
            events,
            spec,
            image: temp.path().join("image"),
            temp,
            reaper,
            name: String::new(),
            is_sandbox: false,
            source: None,
            checkpoint: None,
        }
    }

    /// Has the image of `other`.
    pub fn share_image(&mut self, other: &Self) {
        self.image.clone_from(&other.image);
    }

    /// A network namespace of its own, as a pod's pause container gets one.
    pub fn own_network(&mut self) {
        let namespaces = self.spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "network"}));
    }

    /// Shares the namespaces of the pause container, as CRI says it.
    pub fn join(&mut self, pause: u32) {
        let namespaces = self.spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|ns| ns["type"] == "pid" || ns["type"] == "mount");
        for (kind, file) in [("ipc", "ipc"), ("uts", "uts"), ("network", "net")] {
            namespaces.push(json!({"type": kind, "path": format!("/proc/{pause}/ns/{file}")}));
        }
    }

    /// A named container's root is an overlay, as a snapshotter's.
    fn root_mount(&self) -> RootMount {
        if self.name.is_empty() {
            return RootMount {
                fstype: "bind".into(),
                source: self.image.display().to_string(),
                options: vec!["rbind".into(), "rw".into()],
            };
        }
        let dir = |name: &str| {
            let dir = self.temp.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            dir
        };
        RootMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={}", self.image.display()),
                format!("upperdir={}", dir("upper").display()),
                format!("workdir={}", dir("work").display()),
            ],
        }
    }

    /// The exit of this container's process, told to the handler of `pod`.
    pub async fn wait_exit(&self, exec: Option<&str>, pod: &mut Self) -> u32 {
        let expected = ProcessId {
            container: self.id.clone(),
            exec: exec.map(str::to_owned),
        };
        match pod.next_event().await {
            Event::Exited { process, exit } if process == expected => exit.status,
            other => panic!("{other:?} instead of the exit of {expected}"),
        }
    }

    /// As [`Self::assert_nothing_left`], of one container of a pod.
    pub fn assert_gone(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        // Its image may serve another.
        assert!(
            !mounts.contains(self.bundle().to_str().unwrap()),
            "a mount is left"
        );
        assert_eq!(cgroups_named(&self.id), Vec::<PathBuf>::new());
    }

    pub fn bundle(&self) -> PathBuf {
        self.temp.path().join("bundle")
    }

    /// Without a pid namespace of its own, as in a pod with `hostPID`.
    pub fn share_pid_namespace(&mut self) {
        let namespaces = self.spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|ns| ns["type"] != "pid");
    }

    /// Both ends of a process's stdio.
    pub fn stdio(&self, name: &str, terminal: bool) -> (Stdio, Ends) {
        let paths = ["in", "out", "err"].map(|end| self.temp.path().join(format!("{name}.{end}")));
        for path in &paths {
            if !path.exists() {
                nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap();
            }
        }
        let stdio = Stdio {
            stdin: Some(open(&paths[0])),
            stdout: Some(open(&paths[1])),
            stderr: (!terminal).then(|| open(&paths[2])),
            terminal,
        };
        let ends = Ends {
            stdin: Fd::new(open(&paths[0])).unwrap(),
            stdout: Fd::new(open(&paths[1])).unwrap(),
            stderr: Fd::new(open(&paths[2])).unwrap(),
        };
        (stdio, ends)
    }

    pub async fn create(&self, stdio: Stdio) -> dyad_runtime_handler::Result<Arc<dyn Instance>> {
        let mut config = self.spec.clone();
        config["process"]["terminal"] = stdio.terminal.into();
        let bundle = self.bundle();
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        let oci: Spec = serde_json::from_value(config).unwrap();
        self.handler
            .create(ContainerSpec {
                checkpoint: self.checkpoint.clone(),
                id: self.id.clone(),
                containerd_namespace: NAMESPACE.into(),
                name: self.name.clone(),
                role: if self.is_sandbox {
                    Role::Sandbox
                } else {
                    Role::Container
                },
                pod: PodInfo {
                    sandbox_id: self.sandbox_id.clone(),
                    annotations: self
                        .source
                        .iter()
                        .map(|source| (annotation::MIGRATION_SOURCE.to_owned(), source.clone()))
                        .collect(),
                    ..PodInfo::default()
                },
                bundle,
                rootfs: vec![self.root_mount()],
                oci,
                stdio,
            })
            .await
    }

    /// Creates and starts it.
    pub async fn start(&self) -> (Arc<dyn Instance>, Ends) {
        let (stdio, ends) = self.stdio("init", false);
        let container = self.create(stdio).await.unwrap();
        container.start(None).await.unwrap();
        (container, ends)
    }

    pub fn exec_spec(&self, exec_id: &str, script: &str, stdio: Stdio) -> ExecSpec {
        let process = json!({
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "terminal": stdio.terminal,
        });
        ExecSpec {
            exec_id: exec_id.into(),
            process: serde_json::from_value(process).unwrap(),
            stdio,
        }
    }

    pub async fn next_event(&mut self) -> Event {
        let event = timeout(BOUND, self.events.recv()).await;
        event.expect("no event").expect("no more events")
    }

    /// The next event, which must be the end of `exec`, or of init.
    pub async fn next_exit(&mut self, exec: Option<&str>) -> Exit {
        let expected = ProcessId {
            container: self.id.clone(),
            exec: exec.map(str::to_owned),
        };
        match self.next_event().await {
            Event::Exited { process, exit } if process == expected => exit,
            other => panic!("{other:?} instead of the exit of {expected}"),
        }
    }

    pub fn reference(&self) -> ContainerRef {
        ContainerRef {
            id: self.id.clone(),
            containerd_namespace: NAMESPACE.into(),
            sandbox_id: self.sandbox_id.clone(),
            role: Role::Container,
            bundle: self.bundle(),
        }
    }

    /// Nothing of the container is left but what containerd put there.
    pub fn assert_nothing_left(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.temp.path().to_str().unwrap();
        assert!(!mounts.contains(here), "a mount is left");
        assert_eq!(cgroups_named(&self.id), Vec::<PathBuf>::new());
        let state = self.temp.path().join("oci").join(NAMESPACE);
        let states = fs::read_dir(state).map_or(0, Iterator::count);
        assert_eq!(states, 0, "OCI runtime state is left");
        let mut files: Vec<_> = fs::read_dir(self.bundle())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        files.sort();
        assert_eq!(files, ["config.json", "rootfs"], "files are left");
    }
}

impl Drop for Pod {
    /// A test that failed leaves no container either.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let state = self
            .temp
            .path()
            .join("oci")
            .join(NAMESPACE)
            .join(&self.sandbox_id);
        let mut runc = std::process::Command::new(runc());
        runc.arg("--root")
            .arg(state)
            .args(["delete", "--force", &self.id]);
        // Waiting is the reaper's, which may take the status away.
        let _ = self.reaper.spawn(&mut runc);
        for dir in cgroups_named(&self.id) {
            let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = dyad_linux::reaper::kill_raw(pid, libc::SIGKILL);
            }
        }
        let rootfs = self.bundle().join("rootfs");
        let _ = nix::mount::umount2(&rootfs, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Cgroups of that name in the top of any hierarchy.
pub fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = vec![root.join(name)];
    if let Ok(hierarchies) = fs::read_dir(root) {
        found.extend(hierarchies.filter_map(|dir| Some(dir.ok()?.path().join(name))));
    }
    found.retain(|dir| dir.exists());
    found
}

pub fn open(path: &Path) -> OwnedFd {
    nix::fcntl::open(path, OFlag::O_RDWR | OFlag::O_NONBLOCK, Mode::empty()).unwrap()
}

/// Reads until `end` has come.
pub async fn read_until(fd: &Fd, end: &str) -> String {
    let mut text = String::new();
    while !text.contains(end) {
        let mut buffer = [0; 4096];
        let read = timeout(BOUND, fd.read(&mut buffer)).await;
        let length = read
            .unwrap_or_else(|_| panic!("{end:?} does not come after {text:?}"))
            .unwrap();
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    text
}

/// What is there now.
pub fn read_now(fd: &Fd) -> String {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while let Some(length) = fd.try_read(&mut buffer).unwrap() {
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    text
}

fn make_root(root: &Path) {
    for dir in ["bin", "proc", "dev", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let busybox = on_path("busybox").expect("no busybox: install busybox-static");
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "sleep", "stty", "tail", "id", "true", "touch", "ls", "dd", "rm",
        "wc", "mkfifo",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    File::create(root.join("etc/passwd")).unwrap();
}
