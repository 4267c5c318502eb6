//! The agent in a real machine, over a channel that is torn down while it works.
//!
//! Needs QEMU, mkfs.erofs, mkfs.ext4, a static busybox and the guest image (hack/guest;
//! `DYAD_TEST_GUEST` names its folder). Runs without KVM, libvirt and root:
//! `cargo test -p dyad-machine --test guest -- --ignored`

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use dyad_agent_api::link::host::{BoxReader, BoxWriter, Client};
use dyad_linux::pump::Fd;
use dyad_machine::guest::{Agent, CreateOptions, SetupRequest};
use dyad_runtime_handler::Error;
use dyad_runtime_handler::spec::{ExecSpec, Stdio};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::timeout;

const BOUND: Duration = Duration::from_secs(120);

/// A machine with one image disk and one pod disk.
struct Machine {
    qemu: Child,
    agent: Agent,
    wire: Wire,
    dir: TempDir,
}

/// Connects to QEMU's socket, again and again, and cuts.
#[derive(Clone)]
struct Wire {
    socket: Arc<PathBuf>,
    opened: Arc<AtomicUsize>,
    /// Every connection ends after this many bytes; 0: none does.
    cut_after: Arc<AtomicUsize>,
    cut_now: Arc<Notify>,
}

/// Ends after some bytes, or when told.
struct Cut {
    reader: tokio::net::unix::OwnedReadHalf,
    left: usize,
    now: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl AsyncRead for Cut {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 || self.now.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut part = buf.take(self.left);
        ready!(Pin::new(&mut self.reader).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        buf.advance(count);
        self.left -= count;
        Poll::Ready(Ok(()))
    }
}

impl Wire {
    fn new(socket: PathBuf) -> Self {
        Self {
            socket: Arc::new(socket),
            opened: Arc::default(),
            cut_after: Arc::default(),
            cut_now: Arc::default(),
        }
    }

    fn client(&self) -> Client {
        let wire = self.clone();
        Client::new(move || {
            let wire = wire.clone();
            async move {
                let (reader, writer) = UnixStream::connect(&*wire.socket).await?.into_split();
                wire.opened.fetch_add(1, Ordering::Relaxed);
                let left = match wire.cut_after.load(Ordering::Relaxed) {
                    0 => usize::MAX,
                    bytes => bytes,
                };
                let cut_now = Arc::clone(&wire.cut_now);
                let now = Box::pin(async move { cut_now.notified().await });
                let reader = Cut { reader, left, now };
                Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
            }
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            let console = fs::read_to_string(self.dir.path().join("console")).unwrap_or_default();
            eprintln!("--- console\n{console}");
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

fn guest_image() -> PathBuf {
    let dir = match env::var_os("DYAD_TEST_GUEST") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest-image"),
    };
    assert!(
        dir.join("vmlinux").exists(),
        "{}: run hack/guest first",
        dir.display()
    );
    dir
}

impl Machine {
    async fn boot() -> Self {
        let guest = guest_image();
        let dir = tempfile::Builder::new()
            .prefix("dyad-g")
            .tempdir_in("/tmp")
            .unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let root = dir.path().join("root");
        for folder in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in [
            "sh", "cat", "head", "sleep", "md5sum", "wc", "dd", "true", "stty", "tty",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        run(
            "mkfs.erofs",
            &["-Enoinline_data", &at("root.erofs"), &at("root")],
        );
        let disk = fs::File::create(dir.path().join("pod.img")).unwrap();
        disk.set_len(1 << 30).unwrap();
        run("mkfs.ext4", &["-q", "-F", &at("pod.img")]);
        let began = Instant::now();
        let qemu = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "q35,accel=tcg",
                "-cpu",
                "max",
                "-m",
                "256",
                "-smp",
                "1",
            ])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
                "-no-user-config",
            ])
            .arg("-kernel")
            .arg(guest.join("vmlinux"))
            .arg("-initrd")
            .arg(guest.join("initramfs.zst"))
            .args([
                "-append",
                "console=ttyS0 quiet loglevel=4 cryptomgr.notests panic=-1 dyad.log=debug",
            ])
            .args(["-serial", &format!("file:{}", at("console"))])
            .args(["-device", "virtio-serial-pci"])
            .args([
                "-chardev",
                &format!("socket,id=agent,path={},server=on,wait=off", at("agent")),
            ])
            .args([
                "-device",
                "virtserialport,chardev=agent,name=dev.dyad.agent.0",
            ])
            .args(["-device", "virtio-rng-pci"])
            .args([
                "-drive",
                &format!("if=none,id=pod,format=raw,file={}", at("pod.img")),
            ])
            .args(["-device", "virtio-blk-pci,drive=pod,serial=pod"])
            .args(["-device", "virtio-scsi-pci"])
            .args([
                "-drive",
                &format!(
                    "if=none,id=root,format=raw,readonly=on,file={}",
                    at("root.erofs")
                ),
            ])
            .args(["-device", "scsi-hd,drive=root,serial=root"])
            .stdin(ProcessStdio::null())
            .spawn()
            .expect("qemu-system-x86_64");
        let wire = Wire::new(dir.path().join("agent"));
        let agent = Agent::new(wire.client());
        let machine = Self {
            qemu,
            agent,
            wire,
            dir,
        };
        machine.agent.ready(BOUND).await.unwrap();
        eprintln!("the agent answers after {:?}", began.elapsed());
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let setup = SetupRequest {
            hostname: "pod".into(),
            unix_time_ns: now.as_nanos() as u64,
            entropy: vec![7; 256],
            pod_disk_serial: "pod".into(),
            ..SetupRequest::default()
        };
        let told = machine.agent.setup(setup).await.unwrap();
        eprintln!(
            "agent {} on {} after {:?}",
            told.agent_version,
            told.kernel_release,
            began.elapsed()
        );
        machine
    }

    /// A FIFO as the shim has it, and the other end as containerd has it.
    fn fifo(&self, name: &str) -> (OwnedFd, Fd) {
        let path = self.dir.path().join(name);
        let _ = fs::remove_file(&path);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let ours = open(&path, flags, Mode::empty()).unwrap();
        let theirs = open(&path, flags, Mode::empty()).unwrap();
        (ours, Fd::new(theirs).unwrap())
    }

    /// Stdio with all streams, and containerd's ends.
    fn stdio(&self, name: &str, terminal: bool) -> (Stdio, Ends) {
        let (stdin, type_here) = self.fifo(&format!("{name}-0"));
        let (stdout, out) = self.fifo(&format!("{name}-1"));
        let (stderr, err) = self.fifo(&format!("{name}-2"));
        let stdio = Stdio {
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: (!terminal).then_some(stderr),
            terminal,
        };
        (
            stdio,
            Ends {
                stdin: type_here,
                stdout: out,
                stderr: err,
            },
        )
    }

    /// Creates and starts a container that runs `script`.
    async fn start(&self, id: &str, script: &str) -> Ends {
        let (stdio, ends) = self.stdio(id, false);
        self.agent
            .create(id, stdio, options(script, false))
            .await
            .unwrap();
        self.agent.start(id, None).await.unwrap();
        ends
    }

    /// Waits for the end of a process, takes its output's rest and deletes it.
    async fn finish(&self, id: &str, exec: Option<&str>) -> u32 {
        let exit = timeout(BOUND, self.agent.wait(id, exec))
            .await
            .unwrap()
            .unwrap();
        assert!(self.agent.drained(id, exec, BOUND).await);
        self.agent.delete(id, exec).await.unwrap();
        exit.status
    }
}

struct Ends {
    stdin: Fd,
    stdout: Fd,
    stderr: Fd,
}

fn process(script: &str, terminal: bool) -> Value {
    json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "noNewPrivileges": true,
    })
}

fn options(script: &str, terminal: bool) -> CreateOptions {
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": process(script, terminal),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "resources": {},
        },
    });
    CreateOptions {
        spec_json: serde_json::to_vec(&spec).unwrap(),
        root_disk_serial: "root".into(),
        ..CreateOptions::default()
    }
}

/// Reads until `len` bytes are there.
async fn read_exactly(from: &Fd, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut have = 0;
    while have < len {
        have += timeout(BOUND, from.read(&mut bytes[have..]))
            .await
            .expect("no more output")
            .unwrap();
    }
    bytes
}

fn rest(from: &Fd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let count = from.try_read(&mut bytes).unwrap().unwrap_or(0);
    bytes.truncate(count);
    bytes
}

/// What `OUTPUT` writes: numbers, one a line, so that every place has its own bytes.
fn numbers(to: u32) -> Vec<u8> {
    use std::fmt::Write;
    let mut text = String::new();
    for number in 0..to {
        writeln!(text, "{number:09}").unwrap();
    }
    text.into_bytes()
}

/// Writes 10 MB of numbers, quickly: the file is made on the pod's disk first.
const MAKE_NUMBERS: &str =
    r#"busybox awk 'BEGIN { for (i = 0; i < 1000000; i++) printf "%09d\n", i }' > /tmp/n"#;

#[tokio::test]
#[ignore = "boots a machine; needs hack/guest"]
async fn containers_run_with_stdio_signals_and_execs() {
    let machine = Machine::boot().await;
    let agent = &machine.agent;

    let ends = machine
        .start("hello", "echo out; echo err >&2; exit 7")
        .await;
    assert_eq!(machine.finish("hello", None).await, 7);
    assert_eq!(
        (rest(&ends.stdout), rest(&ends.stderr)),
        (b"out\n".to_vec(), b"err\n".to_vec())
    );

    let ends = machine.start("cat", "cat; echo end").await;
    let input = numbers(20_000);
    let writing = async { ends.stdin.write_all(&input).await.unwrap() };
    let (got, ()) = tokio::join!(read_exactly(&ends.stdout, input.len()), writing);
    assert!(got == input);
    ends.stdin.write_all(b"the last words").await.unwrap();
    agent.close_stdin("cat", None).unwrap();
    assert_eq!(machine.finish("cat", None).await, 0);
    assert_eq!(rest(&ends.stdout), b"the last wordsend\n");

    let main = machine
        .start(
            "main",
            "trap 'echo got it; exit 3' TERM; echo up; while :; do sleep 0.1; done",
        )
        .await;
    assert_eq!(read_exactly(&main.stdout, 3).await, b"up\n");
    let (stdio, ends) = machine.stdio("e1", false);
    let spec = ExecSpec {
        exec_id: "e1".into(),
        process: serde_json::from_value(process("cat; echo exec; exit 5", false)).unwrap(),
        stdio,
    };
    agent.exec("main", spec).await.unwrap();
    agent.start("main", Some("e1")).await.unwrap();
    let pids = agent.pids("main").await.unwrap();
    assert!(
        pids.iter().any(|(_, exec)| exec.as_deref() == Some("e1")),
        "{pids:?}"
    );
    ends.stdin.write_all(b"typed ").await.unwrap();
    agent.close_stdin("main", Some("e1")).unwrap();
    assert_eq!(machine.finish("main", Some("e1")).await, 5);
    assert_eq!(rest(&ends.stdout), b"typed exec\n");

    let (stdio, ends) = machine.stdio("e2", true);
    let spec = ExecSpec {
        exec_id: "e2".into(),
        process: serde_json::from_value(process("stty size; read line; echo \"<$line>\"", true))
            .unwrap(),
        stdio,
    };
    agent.exec("main", spec).await.unwrap();
    agent.resize("main", Some("e2"), 123, 45).await.unwrap();
    agent.start("main", Some("e2")).await.unwrap();
    assert_eq!(read_exactly(&ends.stdout, 8).await, b"45 123\r\n");
    ends.stdin.write_all(b"hi\n").await.unwrap();
    assert_eq!(machine.finish("main", Some("e2")).await, 0);
    assert_eq!(rest(&ends.stdout), b"hi\r\n<hi>\r\n");

    let stats = agent.stats("main").await.unwrap();
    assert!(
        stats.pids.current >= 1 && stats.memory.usage > 0 && stats.cpu.usage_ns > 0,
        "{stats:?}"
    );
    agent.kill("main", None, 15, false).await.unwrap();
    assert_eq!(machine.finish("main", None).await, 3);
    assert_eq!(rest(&main.stdout), b"got it\n");
    assert!(matches!(
        agent.kill("main", None, 15, false).await,
        Err(Error::NotFound(_))
    ));
    agent.delete("main", None).await.unwrap();

    let again = machine.start("main", "sleep 1000").await;
    agent.kill("main", None, 9, true).await.unwrap();
    assert_eq!(machine.finish("main", None).await, 137);
    drop(again);
}

#[tokio::test]
#[ignore = "boots a machine; needs hack/guest"]
async fn ten_megabytes_arrive_exactly_while_the_channel_is_torn_down() {
    let machine = Machine::boot().await;
    let expected = numbers(1_000_000);

    let script = format!("{MAKE_NUMBERS}; read line; cat /tmp/n; read line; cat /tmp/n");
    let ends = machine.start("out", &script).await;
    ends.stdin.write_all(b"go\n").await.unwrap();
    // The first chunk is waited for outside of the measured time.
    let mut got = read_exactly(&ends.stdout, 1).await;
    let began = Instant::now();
    got.extend(read_exactly(&ends.stdout, expected.len() - 1).await);
    let whole = began.elapsed();
    assert!(got == expected);
    eprintln!("10 MB in {whole:?}: {:.1} MB/s", 10.0 / whole.as_secs_f64());

    // Now every connection ends after 300 kB and an odd rest.
    machine.wire.cut_after.store(300_007, Ordering::Relaxed);
    machine.wire.cut_now.notify_waiters();
    ends.stdin.write_all(b"again\n").await.unwrap();
    let began = Instant::now();
    let got = read_exactly(&ends.stdout, expected.len()).await;
    assert!(got == expected, "bytes were lost or doubled");
    let opened = machine.wire.opened.load(Ordering::Relaxed);
    eprintln!("10 MB over {opened} connections in {:?}", began.elapsed());
    assert!(opened > 20);
    machine.wire.cut_after.store(0, Ordering::Relaxed);
    assert_eq!(machine.finish("out", None).await, 0);
    assert_eq!(rest(&ends.stdout), b"");
}

#[tokio::test]
#[ignore = "boots a machine; needs hack/guest"]
async fn calls_and_input_survive_a_channel_that_is_torn_down() {
    let machine = Machine::boot().await;
    let agent = &machine.agent;
    let ends = machine.start("in", "md5sum; exit 4").await;
    let waiting = {
        let agent = agent.clone();
        tokio::spawn(async move { agent.wait("in", None).await })
    };
    let input = numbers(200_000);
    for part in input.chunks(input.len() / 10) {
        ends.stdin.write_all(part).await.unwrap();
        machine.wire.cut_now.notify_waiters();
        // Asked over the next connection.
        assert!(!agent.pids("in").await.unwrap().is_empty());
    }
    agent.close_stdin("in", None).unwrap();
    let exit = timeout(BOUND, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(exit.status, 4);
    assert!(agent.drained("in", None, BOUND).await);
    let sum = Command::new("md5sum")
        .stdin(ProcessStdio::piped())
        .stdout(ProcessStdio::piped())
        .spawn();
    let mut sum = sum.unwrap();
    io::Write::write_all(&mut sum.stdin.take().unwrap(), &input).unwrap();
    assert_eq!(rest(&ends.stdout), sum.wait_with_output().unwrap().stdout);
    assert!(machine.wire.opened.load(Ordering::Relaxed) > 10);
    agent.delete("in", None).await.unwrap();
}

#[tokio::test]
#[ignore = "boots a machine; needs hack/guest"]
async fn a_second_host_process_takes_over_the_streams() {
    let machine = Machine::boot().await;
    let script = format!("{MAKE_NUMBERS}; echo ready >&2; cat /tmp/n; cat; exit 9");
    let ends = machine.start("out", &script).await;
    assert_eq!(read_exactly(&ends.stderr, 6).await, b"ready\n");
    let expected = numbers(1_000_000);
    let mut got = read_exactly(&ends.stdout, 1_000_000).await;
    // As after a shim's end in an orderly way: the FIFO keeps what was written to it.
    machine.agent.close();
    let second = Agent::new(machine.wire.client());
    second.ready(BOUND).await.unwrap();
    let reopen = |name: &str| {
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Some(open(&machine.dir.path().join(name), flags, Mode::empty()).unwrap())
    };
    let stdio = Stdio {
        stdin: reopen("out-0"),
        stdout: reopen("out-1"),
        stderr: reopen("out-2"),
        terminal: false,
    };
    second.adopt("out", None, stdio, &[]).await.unwrap();
    got.extend(read_exactly(&ends.stdout, expected.len() - got.len()).await);
    assert!(got == expected, "bytes were lost or doubled");
    ends.stdin.write_all(b"for the second").await.unwrap();
    second.close_stdin("out", None).unwrap();
    let exit = timeout(BOUND, second.wait("out", None))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(exit.status, 9);
    assert!(second.drained("out", None, BOUND).await);
    assert_eq!(rest(&ends.stdout), b"for the second");
    second.delete("out", None).await.unwrap();
}

#[tokio::test]
#[ignore = "boots a machine; needs hack/guest"]
async fn an_agent_without_a_host_does_not_spin() {
    let machine = Machine::boot().await;
    let boot = machine.agent.ready(BOUND).await.unwrap();
    machine.agent.close();
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", machine.qemu.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    // The clock is the only event here: nothing is to happen.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let used = ticks() - before;
    eprintln!("QEMU used {used} ticks of 400 without a host");
    assert!(
        used < 100,
        "an agent that spins takes a whole CPU: {used} of 400 ticks"
    );
    let second = Agent::new(machine.wire.client());
    assert_eq!(second.ready(BOUND).await.unwrap(), boot);
    second
        .shutdown(false, Duration::from_secs(1))
        .await
        .unwrap();
}
