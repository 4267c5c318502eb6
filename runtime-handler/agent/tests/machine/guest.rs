//! A machine with the agent in it, for tests.

use std::collections::HashMap;
use std::future::Future;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use dyad_agent_api::link::host::{self, CallError, Client, InputWriter, OutputReader};
use dyad_agent_api::link::{PORT_NAME, StdFd, StreamKey};
use dyad_agent_api::proto::agent::{
    CreateOptions, Interface, Route, SetupRequest, SetupResponse, ShutdownRequest,
    ShutdownResponse, StreamState, StreamsRequest, StreamsResponse,
};
use dyad_agent_api::protobuf::well_known_types::any::Any;
use dyad_agent_api::protobuf::{Message, MessageField};
use dyad_agent_api::task_api::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    Status, WaitRequest, WaitResponse,
};
use dyad_agent_api::ttrpc::Code;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// Service names.
pub const SANDBOX: &str = "dyad.agent.v1.Sandbox";
pub const TASK: &str = "containerd.task.v3.Task";

const MAC: &str = "52:54:00:12:34:56";
const POD_SERIAL: &str = "pod-disk-of-the-tests-that-is-long";
const IMAGE_SERIAL: &str = "image-busybox";

/// No single step takes this long, even on a busy host without KVM.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs `test` with a deadline.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = runtime();
    runtime.block_on(async {
        timeout(4 * PATIENCE, test)
            .await
            .expect("test takes too long")
    })
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Runs `test` on the machine that the tests share.
pub fn on_machine<F: Future<Output = ()>>(test: impl FnOnce(Arc<Machine>) -> F) {
    static SHARED: OnceLock<(Runtime, Arc<Machine>)> = OnceLock::new();
    let (runtime, machine) = SHARED.get_or_init(|| {
        let runtime = runtime();
        // On the runtime's own thread: QEMU goes with the thread that started it, and a
        // test's thread ends with its test.
        let booted = runtime.spawn(async {
            let pod = Box::leak(Box::new(Pod::new()));
            remove_at_end(pod.folder.path());
            Arc::new(Machine::boot(pod).await)
        });
        let machine = runtime.block_on(booted).expect("the shared machine");
        (runtime, machine)
    });
    runtime.block_on(async {
        timeout(4 * PATIENCE, test(Arc::clone(machine)))
            .await
            .expect("test takes too long");
    });
}

/// Removes the folder when this process ends, which drops nothing that is shared: a shell sees
/// the end of its stdin then.
fn remove_at_end(folder: &Path) {
    let shell = Command::new("sh")
        .args(["-c", "read -r _; rm -rf \"$0\""])
        .arg(folder)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    Box::leak(Box::new(shell));
}

/// The disks of a pod, which outlive its machine.
pub struct Pod {
    folder: TempDir,
}

impl Pod {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("dyad-agent")
            .tempdir()
            .unwrap();
        let pod = Self { folder };
        make_image(&pod.path("image"), &pod.path("image.erofs"));
        let disk = std::fs::File::create(pod.path("pod.ext4")).unwrap();
        disk.set_len(1 << 30).unwrap();
        command("mkfs.ext4", &["-q", "-F"], &[&pod.path("pod.ext4")]);
        pod
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn command(program: &str, arguments: &[&str], paths: &[&Path]) {
    let done = Command::new(program)
        .args(arguments)
        .args(paths)
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.success(), "{program}: {done}");
}

fn make_image(tree: &Path, image: &Path) {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("a static busybox");
    for folder in ["bin", "etc", "tmp", "proc", "sys", "dev", "home/user"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    std::fs::copy(busybox, tree.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox).arg("--list").output().unwrap().stdout;
    for applet in String::from_utf8(applets).unwrap().lines() {
        let _ = std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet));
    }
    std::fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(tree.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
    std::fs::write(tree.join("etc/hosts"), "").unwrap();
    command("mkfs.erofs", &["--quiet", "-T0"], &[image, tree]);
}

/// A booted machine whose guest is set up as a pod.
pub struct Machine {
    client: Client,
    socket: PathBuf,
    monitor: PathBuf,
    image: PathBuf,
    qemu: std::sync::Mutex<Child>,
}

impl Machine {
    pub async fn boot(pod: &Pod) -> Self {
        Self::boot_on(pod, false).await
    }

    /// On a disk that, if `inherited`, another sandbox of the pod had.
    pub async fn boot_on(pod: &Pod, inherited: bool) -> Self {
        let guest = PathBuf::from(std::env::var_os("DYAD_GUEST").expect("DYAD_GUEST"));
        let socket = pod.path("channel");
        let console = pod.path("console");
        let monitor = pod.path("monitor");
        let _ = std::fs::remove_file(&socket);
        let _ = std::fs::remove_file(&monitor);
        let drive = |name: &str, file: &str, more: &str| {
            format!(
                "file={},if=none,id={name},format=raw{more}",
                pod.path(file).display()
            )
        };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-machine",
            "q35,accel=tcg",
            "-m",
            "256",
            "-nodefaults",
            "-no-reboot",
        ])
        .args(["-display", "none"])
        .arg("-kernel")
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(guest.join("initramfs.zst"))
        .args([
            "-append",
            "console=ttyS0 quiet cryptomgr.notests panic=-1 dyad.log=debug",
        ])
        .args(["-serial", &format!("file:{}", console.display())])
        .args(["-device", "virtio-serial-pci"])
        .args([
            "-chardev",
            &format!(
                "socket,id=channel,path={},server=on,wait=off",
                socket.display()
            ),
        ])
        .args([
            "-device",
            &format!("virtserialport,chardev=channel,name={PORT_NAME}"),
        ])
        .args(["-device", "virtio-scsi-pci,id=scsi"])
        .args(["-drive", &drive("image", "image.erofs", ",readonly=on")])
        .args([
            "-device",
            &format!("scsi-hd,drive=image,serial={IMAGE_SERIAL}"),
        ])
        .args([
            "-drive",
            &format!(
                "file={},if=none,id=modules,format=raw,readonly=on",
                guest.join("modules.erofs").display()
            ),
            "-device",
            "scsi-hd,drive=modules,serial=modules-of-tests,scsi-id=1,lun=0",
        ])
        .args(["-drive", &drive("pod", "pod.ext4", ",cache=unsafe")])
        .args([
            "-device",
            &format!("virtio-blk-pci,drive=pod,serial={}", &POD_SERIAL[..20]),
        ])
        .args([
            "-netdev",
            "user,id=net",
            "-device",
            &format!("virtio-net-pci,netdev=net,mac={MAC}"),
        ])
        .args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ])
        .stdin(Stdio::null());
        // SAFETY: the closure makes one system call and touches no memory. The machine
        // must not outlive tests that end without dropping it.
        unsafe {
            qemu.pre_exec(|| {
                Ok(nix::sys::prctl::set_pdeathsig(
                    nix::sys::signal::Signal::SIGKILL,
                )?)
            });
        }
        let qemu = qemu.spawn().expect("qemu-system-x86_64");
        let client = Client::new(host::unix(socket.clone()));
        if let Err(error) = client.ready(PATIENCE).await {
            panic!(
                "{error}: {}",
                std::fs::read_to_string(&console).unwrap_or_default()
            );
        }
        let machine = Self {
            client,
            socket,
            monitor,
            image: pod.path("image.erofs"),
            qemu: std::sync::Mutex::new(qemu),
        };
        machine.set_up(inherited).await;
        // Asking again changes nothing.
        machine.set_up(inherited).await;
        machine
    }

    async fn set_up(&self, inherited: bool) {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let request = SetupRequest {
            hostname: "pod-of-tests".into(),
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap(),
            entropy: vec![7; 64],
            pod_disk_serial: POD_SERIAL.into(),
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: MAC.into(),
                mtu: 1400,
                addresses: vec!["10.0.2.15/24".into(), "fd00::5/64".into()],
                ..Default::default()
            }],
            routes: vec![
                Route {
                    gateway: "10.0.2.2".into(),
                    interface: "eth0".into(),
                    family: 4,
                    ..Default::default()
                },
                Route {
                    destination: "169.254.1.1/32".into(),
                    interface: "eth0".into(),
                    family: 4,
                    scope: 253,
                    ..Default::default()
                },
                Route {
                    gateway: "fd00::1".into(),
                    interface: "eth0".into(),
                    family: 6,
                    ..Default::default()
                },
            ],
            sysctls: [("net.ipv4.ip_local_port_range".into(), "20000 30000".into())].into(),
            shm_size: 16 << 20,
            pod_disk_inherited: inherited,
            ..Default::default()
        };
        let answer: SetupResponse = self.call(SANDBOX, "Setup", &request).await.unwrap();
        assert!(!answer.boot_id.is_empty() && !answer.kernel_release.is_empty());
    }

    /// Calls, with a deadline.
    pub async fn call<Req: Message, Resp: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
    ) -> Result<Resp, CallError> {
        timeout(PATIENCE, self.client.call(service, method, request))
            .await
            .unwrap_or_else(|_| panic!("{method} takes too long"))
    }

    /// The same machine with another host process.
    pub async fn with_new_host(mut self) -> Self {
        self.client.close();
        self.client = Client::new(host::unix(self.socket.clone()));
        self.client.ready(PATIENCE).await.unwrap();
        self
    }

    /// Hot-plugs a SCSI disk with the image of the tests.
    pub async fn plug_in(&self, serial: &str) {
        let image = self.image.display().to_string();
        self.monitor(&[
            json!({"execute": "blockdev-add", "arguments": {
                "driver": "raw", "node-name": serial, "read-only": true,
                "file": {"driver": "file", "filename": image, "locking": "off"}}}),
            json!({"execute": "device_add", "arguments": {
                "driver": "scsi-hd", "id": serial, "drive": serial, "serial": serial, "bus": "scsi.0"}}),
        ])
        .await;
    }

    /// Takes it away again.
    pub async fn unplug(&self, serial: &str) {
        self.monitor(&[
            json!({"execute": "device_del", "arguments": {"id": serial}}),
            json!({"execute": "blockdev-del", "arguments": {"node-name": serial}}),
        ])
        .await;
    }

    /// Says `commands` to QEMU; each must succeed. After a removal it waits for the
    /// event that tells of its end.
    async fn monitor(&self, commands: &[Value]) {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
        let stream = tokio::net::UnixStream::connect(&self.monitor)
            .await
            .unwrap();
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        let greet = [json!({"execute": "qmp_capabilities"})];
        for command in greet.iter().chain(commands) {
            let line = format!("{command}\r\n");
            writer.write_all(line.as_bytes()).await.unwrap();
            let is_removal = command["execute"] == "device_del";
            let (mut answered, mut removed) = (false, !is_removal);
            while !answered || !removed {
                let line = timeout(PATIENCE, lines.next_line())
                    .await
                    .expect("QEMU's answer");
                let answer: Value = serde_json::from_str(&line.unwrap().unwrap()).unwrap();
                assert!(answer["error"].is_null(), "{command}: {answer}");
                answered |= !answer["return"].is_null();
                removed |= answer["event"] == "DEVICE_DELETED";
            }
        }
    }

    pub async fn streams(&self) -> Vec<StreamState> {
        let request = StreamsRequest::default();
        let answer: StreamsResponse = self.call(SANDBOX, "Streams", &request).await.unwrap();
        answer.streams
    }

    pub async fn state(&self, id: &str) -> Result<StateResponse, CallError> {
        let request = StateRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call(TASK, "State", &request).await
    }

    pub async fn create<'a>(&'a self, id: &str, args: &[&str]) -> Container<'a> {
        self.create_with(id, args, |_, _| {}).await.unwrap()
    }

    pub async fn create_with<'a>(
        &'a self,
        id: &str,
        args: &[&str],
        change: impl FnOnce(&mut Value, &mut CreateOptions),
    ) -> Result<Container<'a>, CallError> {
        let mut spec = spec(args);
        let mut options = CreateOptions {
            root_disk_serial: IMAGE_SERIAL.into(),
            ..Default::default()
        };
        change(&mut spec, &mut options);
        options.spec_json = spec.to_string().into_bytes();
        let terminal = spec["process"]["terminal"] == json!(true);
        let request = CreateTaskRequest {
            id: id.into(),
            terminal,
            stdin: "1".into(),
            stdout: "1".into(),
            stderr: if terminal { "" } else { "1" }.into(),
            options: MessageField::some(Any {
                type_url: "dyad.agent.v1.CreateOptions".into(),
                value: options.write_to_bytes().unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let created: CreateTaskResponse = self.call(TASK, "Create", &request).await?;
        assert!(created.pid > 1);
        let mut container = self.container(id);
        container.pid = created.pid;
        Ok(container)
    }

    /// A container that is there.
    pub fn container(&self, id: &str) -> Container<'_> {
        Container {
            machine: self,
            id: id.into(),
            pid: 0,
            readers: tokio::sync::Mutex::default(),
        }
    }

    /// Powers off; QEMU ends by itself.
    pub async fn shut_down(self, grace: Duration) {
        let request = ShutdownRequest {
            grace_ms: u32::try_from(grace.as_millis()).unwrap(),
            ..Default::default()
        };
        let _: ShutdownResponse = self.call(SANDBOX, "Shutdown", &request).await.unwrap();
        let ended = tokio::task::spawn_blocking(move || {
            let status = self.qemu.lock().unwrap().wait().unwrap();
            (self, status)
        });
        let (_, status) = timeout(PATIENCE, ended).await.expect("power off").unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let mut qemu = self.qemu.lock().unwrap();
        let _ = qemu.kill();
        let _ = qemu.wait();
    }
}

/// A container that was created.
pub struct Container<'a> {
    machine: &'a Machine,
    id: String,
    pid: u32,
    /// One of each stream, so that it goes on where it was.
    readers: tokio::sync::Mutex<HashMap<(String, StdFd), OutputReader>>,
}

impl Container<'_> {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub async fn start(&self) -> u32 {
        self.start_process("").await.unwrap()
    }

    pub async fn start_exec(&self, exec_id: &str) -> Result<u32, CallError> {
        self.start_process(exec_id).await
    }

    async fn start_process(&self, exec_id: &str) -> Result<u32, CallError> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer: StartResponse = self.machine.call(TASK, "Start", &request).await?;
        Ok(answer.pid)
    }

    async fn is_terminal(&self) -> bool {
        self.machine.state(&self.id).await.unwrap().terminal
    }

    pub async fn status(&self) -> Status {
        let state = self.machine.state(&self.id).await.unwrap();
        state.status.enum_value().unwrap()
    }

    pub async fn wait(&self) -> u32 {
        self.wait_exec("").await
    }

    pub async fn wait_exec(&self, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer: WaitResponse = self.machine.call(TASK, "Wait", &request).await.unwrap();
        assert!(answer.exited_at.seconds > 1_600_000_000, "the clock is set");
        answer.exit_status
    }

    pub async fn kill(&self, signal: u32) -> Result<(), CallError> {
        self.kill_exec("", signal).await
    }

    pub async fn kill_exec(&self, exec_id: &str, signal: u32) -> Result<(), CallError> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.machine
            .call::<_, Empty>(TASK, "Kill", &request)
            .await
            .map(drop)
    }

    pub async fn add_exec(&self, exec_id: &str, args: &[&str], change: impl FnOnce(&mut Value)) {
        let mut process = spec(args)["process"].take();
        change(&mut process);
        let terminal = process["terminal"] == json!(true);
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            terminal,
            stdout: "1".into(),
            spec: MessageField::some(Any {
                value: process.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let _: Empty = self.machine.call(TASK, "Exec", &request).await.unwrap();
    }

    pub async fn delete_exec(&self, exec_id: &str) {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let _: DeleteResponse = self.machine.call(TASK, "Delete", &request).await.unwrap();
    }

    pub async fn delete(&self) {
        // Whoever deletes has drained.
        self.read().await;
        if !self.is_terminal().await {
            self.read_stderr().await;
        }
        self.try_delete().await.unwrap();
    }

    pub async fn try_delete(&self) -> Result<DeleteResponse, CallError> {
        let request = DeleteRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.machine.call(TASK, "Delete", &request).await
    }

    /// Kills, waits and deletes.
    pub async fn end(&self) {
        self.kill(9).await.unwrap();
        assert_eq!(self.wait().await, 137);
        self.delete().await;
    }

    pub fn output_from(&self, offset: u64) -> OutputReader {
        let key = StreamKey::new(self.id.clone(), None, StdFd::Stdout);
        self.machine.client.output(key, offset)
    }

    pub fn input(&self) -> InputWriter {
        self.input_from(0)
    }

    pub fn input_from(&self, offset: u64) -> InputWriter {
        let key = StreamKey::new(self.id.clone(), None, StdFd::Stdin);
        self.machine.client.input(key, offset)
    }

    /// The rest of stdout.
    pub async fn read(&self) -> String {
        self.read_all("", StdFd::Stdout).await
    }

    pub async fn read_stderr(&self) -> String {
        self.read_all("", StdFd::Stderr).await
    }

    pub async fn read_exec(&self, exec_id: &str) -> String {
        self.read_all(exec_id, StdFd::Stdout).await
    }

    /// Stdout from where it was read to, up to where `word` has come.
    pub async fn read_until(&self, word: &str) -> String {
        let mut seen = String::new();
        let mut readers = self.readers.lock().await;
        read_more(
            self.reader(&mut readers, "", StdFd::Stdout),
            &mut seen,
            word,
        )
        .await;
        seen
    }

    async fn read_all(&self, exec_id: &str, fd: StdFd) -> String {
        let mut all = Vec::new();
        let mut readers = self.readers.lock().await;
        let reader = self.reader(&mut readers, exec_id, fd);
        let read = async {
            let mut end = 0;
            // An error: there is no such stream.
            while let Ok(next) = reader.next().await {
                let Some(chunk) = next else {
                    // The last byte again acknowledges the end too.
                    return reader.ack(end);
                };
                all.extend_from_slice(&chunk.data);
                end = chunk.end();
                reader.ack(end);
            }
        };
        timeout(PATIENCE, read).await.expect("output does not end");
        String::from_utf8_lossy(&all).into_owned()
    }

    fn reader<'r>(
        &self,
        readers: &'r mut HashMap<(String, StdFd), OutputReader>,
        exec_id: &str,
        fd: StdFd,
    ) -> &'r mut OutputReader {
        readers.entry((exec_id.into(), fd)).or_insert_with(|| {
            let exec_id = Some(exec_id).filter(|exec_id| !exec_id.is_empty());
            let key = StreamKey::new(self.id.clone(), exec_id, fd);
            self.machine.client.output(key, 0)
        })
    }
}

/// Reads until `seen` holds `word`.
pub async fn read_more(reader: &mut OutputReader, seen: &mut String, word: &str) {
    while !seen.contains(word) {
        let chunk = timeout(PATIENCE, reader.next())
            .await
            .unwrap_or_else(|_| panic!("{word:?} does not come: {seen}"));
        let chunk = chunk
            .unwrap()
            .unwrap_or_else(|| panic!("ended without {word:?}: {seen}"));
        seen.push_str(&String::from_utf8_lossy(&chunk.data));
        reader.ack(chunk.end());
    }
}

/// The code of a refusal.
pub fn code(error: &CallError) -> Code {
    match error {
        CallError::Status { code, .. } => *code,
        other => panic!("{other}"),
    }
}

/// The text of a refusal.
pub fn text(error: &CallError) -> String {
    error.to_string()
}

/// Allows everything but mkdir, which fails with EPERM.
pub fn filter_without_mkdir() -> Vec<u8> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let instructions = [
        (LOAD, 0, 0, 0),
        (JUMP_EQUAL, 1, 0, libc::SYS_mkdir as u32),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | libc::EPERM as u32),
    ];
    let mut bytes = Vec::new();
    for (code, jt, jf, k) in instructions {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([jt, jf]);
        bytes.extend(k.to_ne_bytes());
    }
    bytes
}

/// As `md5sum` prints it, by that program.
pub fn md5(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let out = child.wait_with_output().unwrap().stdout;
    String::from_utf8(out)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .into()
}

/// What containerd's CRI plugin would ask for, adapted to the guest.
fn spec(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": args, "cwd": "/", "env": ["TERM=xterm"],
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "noNewPrivileges": false
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "cgroupsPath": "/kubepods/burstable/pod1/c",
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 8, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 5, "minor": 0, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 5, "minor": 1, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 5, "minor": 2, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 136, "access": "rwm"}
                ],
                "memory": {}, "cpu": {"shares": 100, "period": 100000}
            }
        }
    })
}
