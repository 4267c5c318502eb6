//! A pod of containers moves between two handlers, with a real OCI runtime and CRIU.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{BOUND, Ends, Pod, read_now, read_until, run};
use dyad_container::socket_path;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::handler::{Instance, ProcessId};
use dyad_runtime_handler::identity::pod_uuid;
use dyad_runtime_handler::migration::{
    Arrival, Hurry, Migration, MigrationParameters, MigrationProgress, Sent, Stage,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// A pause container and one that runs `script`, on one of two nodes.
struct Node {
    pause: Pod,
    app: Pod,
    volume: PathBuf,
}

impl Node {
    /// The target of `source`, where one is given.
    fn new(reaper: &Arc<Reaper>, script: &str, source: Option<&Node>) -> Self {
        let mut pause = Pod::new(Arc::clone(reaper), "sleep 100000");
        pause.is_sandbox = true;
        pause.own_network();
        pause.source = source.map(|node| node.identity());
        let mut app = Pod::new(Arc::clone(reaper), script);
        app.handler = Arc::clone(&pause.handler);
        app.sandbox_id.clone_from(&pause.id);
        app.name = "app".into();
        if let Some(source) = source {
            app.share_image(&source.app);
        }
        let volume = pause.temp.path().join("volumes/kubernetes.io~empty-dir/v");
        fs::create_dir_all(&volume).unwrap();
        let shm = pause.temp.path().join("shm");
        fs::create_dir_all(&shm).unwrap();
        let mounts = app.spec["mounts"].as_array_mut().unwrap();
        for (at, from) in [("/cache", &volume), ("/dev/shm", &shm)] {
            mounts.push(json!({"destination": at, "type": "bind", "source": from, "options": ["rbind", "rw"]}));
        }
        Self { pause, app, volume }
    }

    fn identity(&self) -> String {
        pod_uuid(common::NAMESPACE, &self.pause.id).to_string()
    }

    fn migration(&self) -> &dyn Migration {
        self.pause.handler.migration().unwrap()
    }

    async fn create(&mut self) -> (Arc<dyn Instance>, Arc<dyn Instance>, Ends) {
        let (stdio, _) = self.pause.stdio("init", false);
        let pause = self.pause.create(stdio).await.unwrap();
        pause.start(None).await.unwrap();
        self.app.join(pause.pid().unwrap());
        let (stdio, ends) = self.app.stdio("init", false);
        let app = self.app.create(stdio).await.unwrap();
        app.start(None).await.unwrap();
        (pause, app, ends)
    }

    /// A further container of the pod.
    async fn another(&self, name: &str, limit: Option<u64>) -> (Pod, Arc<dyn Instance>, Ends) {
        let mut pod = Pod::new(Arc::clone(&self.app.reaper), "");
        pod.handler = Arc::clone(&self.pause.handler);
        pod.sandbox_id.clone_from(&self.pause.id);
        pod.share_image(&self.app);
        name.clone_into(&mut pod.name);
        let cgroup = pod.spec["linux"]["cgroupsPath"].clone();
        pod.spec = self.app.spec.clone();
        pod.spec["linux"]["cgroupsPath"] = cgroup;
        // Shared by both, it would be written twice.
        pod.spec["process"]["args"][2] = COUNT
            .replace("/dev/shm/s", "/tmp/s")
            .replace("/cache/v", "/tmp/v")
            .into();
        if let Some(limit) = limit {
            pod.spec["linux"]["resources"]["memory"] = json!({"limit": limit, "swap": limit});
        }
        let (stdio, ends) = pod.stdio("init", false);
        let container = pod.create(stdio).await.unwrap();
        container.start(None).await.unwrap();
        (pod, container, ends)
    }

    fn upper(&self) -> PathBuf {
        self.app.temp.path().join("upper")
    }

    fn socket(&self, source: &Node) -> PathBuf {
        socket_path(self.pause.temp.path(), &source.identity())
    }

    fn assert_nothing_left(&self) {
        let checkpoints = self.pause.temp.path().join("cache/checkpoints");
        let left: Vec<_> = fs::read_dir(checkpoints)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "of a checkpoint");
    }
}

fn to(socket: &Path) -> MigrationParameters {
    MigrationParameters {
        destination: format!("unix://{}", socket.display()),
        ..MigrationParameters::default()
    }
}

async fn appears(path: &Path) {
    let there = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(BOUND, there).await.expect("nobody waits");
}

/// Sends and receives at once; the figures at the end.
async fn move_pod(
    source: &Node,
    target: &Node,
    parameters: &MigrationParameters,
) -> (
    dyad_runtime_handler::Result<Sent>,
    dyad_runtime_handler::Result<Arrival>,
    MigrationProgress,
) {
    let (sender, progress) = watch::channel(MigrationProgress::default());
    let socket = target.socket(source);
    let send = async {
        appears(&socket).await;
        source
            .migration()
            .send(parameters, b"the record".to_vec(), sender)
            .await
    };
    let (sent, received) = tokio::join!(send, target.migration().receive());
    let progress = *progress.borrow();
    (sent, received, progress)
}

/// Counts in a file, in shared memory, through a pipe, and on stdout; a child goes along.
const COUNT: &str = "
mkfifo /tmp/fifo; exec 4<>/tmp/fifo
exec 3>>/tmp/count; echo early > /dev/shm/s; echo v > /cache/v; rm /etc/passwd
sleep 100000 &
i=0
while true; do
  echo $i >&4; read j <&4
  echo \"n $j\"; echo \"e $j\" >&2; echo \"f $j\" >&3
  i=$((i+1)); sleep 0.02
done";

/// The numbers of lines that begin with `mark`.
fn numbers(text: &str, mark: &str) -> Vec<u64> {
    text.lines()
        .filter_map(|line| line.strip_prefix(mark)?.trim().parse().ok())
        .collect()
}

#[test]
fn a_counting_process_goes_on_elsewhere_without_a_seam() {
    run(|reaper| async move {
        let mut a = Node::new(&reaper, COUNT, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        let before = read_until(&a_ends.stdout, "n 10\n").await;
        let mut b = Node::new(&reaper, COUNT, Some(&a));
        let (b_pause, b_app, b_ends) = b.create().await;
        assert_eq!(fs::read_dir(b.upper()).unwrap().count(), 0, "it waits");

        let check = to(&b.socket(&a));
        let nobody = a.migration().check(&check).await.unwrap_err();
        assert!(
            nobody.to_string().contains("create the target pod first"),
            "{nobody}"
        );
        let mut parameters = check.clone();
        parameters.bandwidth_mib_s = 500;
        let receive = b.migration().receive();
        let send = async {
            appears(&b.socket(&a)).await;
            a.migration().check(&check).await.unwrap();
            let (sender, progress) = watch::channel(MigrationProgress::default());
            let sent = a
                .migration()
                .send(&parameters, b"the record".to_vec(), sender)
                .await;
            let progress = *progress.borrow();
            (sent, progress)
        };
        let ((sent, progress), arrival) = tokio::join!(send, receive);
        assert_eq!(sent.unwrap(), Sent::Moved);
        let arrival = arrival.unwrap();
        assert_eq!(arrival.pod, b"the record");
        let app = ProcessId::init(b.app.id.clone());
        let pid = b_app.pid().unwrap();
        assert!(arrival.processes.contains(&(app, pid)), "{arrival:?}");
        let pause = ProcessId::init(b.pause.id.clone());
        assert!(arrival.processes.contains(&(pause, b_pause.pid().unwrap())));
        assert_eq!(progress.stage, Stage::Finishing);
        assert!(
            progress.bytes_done > 0 && progress.bytes_remaining == 0,
            "{progress:?}"
        );
        assert!(progress.downtime.unwrap() > Duration::ZERO);

        // Not one line lost, not one twice, over both logs.
        let before = before + &read_now(&a_ends.stdout);
        let mut all = numbers(&before, "n ");
        let split = *all.last().unwrap() + 1;
        let later = read_until(&b_ends.stdout, &format!("n {}\n", split + 40)).await;
        assert_eq!(numbers(&later, "n ")[0], split);
        all.extend(numbers(&later, "n "));
        let expected: Vec<u64> = (0..all.len() as u64).collect();
        assert_eq!(all, expected, "{before} | {later}");
        let errors = read_now(&a_ends.stderr) + &read_now(&b_ends.stderr);
        let errors = numbers(&errors, "e ");
        assert_eq!(errors, (0..errors.len() as u64).collect::<Vec<_>>());
        let file = fs::read_to_string(b.upper().join("tmp/count")).unwrap();
        let file = numbers(&file, "f ");
        assert_eq!(file, (0..file.len() as u64).collect::<Vec<_>>());
        assert!(file.len() as u64 > split);

        // Files and volumes came along, the removal of a file of the image among them.
        assert_eq!(fs::read_to_string(b.volume.join("v")).unwrap(), "v\n");
        let (stdio, exec_ends) = b.app.stdio("e", false);
        let look = "ls /etc; cat /dev/shm/s; ls /proc/1/fd | wc -l";
        b_app.exec(b.app.exec_spec("e", look, stdio)).await.unwrap();
        b_app.start_exec("e").await.unwrap();
        let seen = read_until(&exec_ends.stdout, "early\n").await;
        assert!(!seen.contains("passwd"), "{seen}");
        assert_eq!(b.app.wait_exit(Some("e"), &mut b.pause).await, 0);
        b_app.delete_exec("e").await.unwrap();
        let namespace =
            |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        for kind in ["ipc", "uts", "net"] {
            assert_eq!(
                namespace(pid, kind),
                namespace(b_pause.pid().unwrap(), kind)
            );
        }

        // The source is gone without a word, and can be deleted.
        assert!(a.pause.events.try_recv().is_err(), "no exit is told");
        let gone = a_app.signal(None, 0, false).await.unwrap_err();
        assert!(matches!(gone, Error::NotFound(_)), "{gone}");
        a_app.delete().await.unwrap();
        a_pause.delete().await.unwrap();
        a.app.assert_gone();
        a.assert_nothing_left();
        b.assert_nothing_left();

        // What arrived is a container like any: frozen, thawed, counted, ended.
        assert!(b_app.stats().await.unwrap().memory.usage > 0);
        b_app.pause().await.unwrap();
        b_app.resume().await.unwrap();
        b_app.stop(Duration::from_millis(10)).await.unwrap();
        assert_eq!(b.app.wait_exit(None, &mut b.pause).await, 137);
        b_app.delete().await.unwrap();
        b_pause.delete().await.unwrap();
        b.app.assert_gone();
    });
}

#[test]
fn stdin_goes_along_with_what_was_not_read() {
    run(|reaper| async move {
        let script = "echo ready; read a; echo \"a <$a>\"; while [ ! -e /cache/go ]; do sleep 0.02; done; cat; echo end";
        let mut a = Node::new(&reaper, script, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        a_ends.stdin.write_all(b"first\nsecond\n").await.unwrap();
        read_until(&a_ends.stdout, "a <first>\n").await;
        let mut b = Node::new(&reaper, script, Some(&a));
        let (b_pause, b_app, b_ends) = b.create().await;
        let (sent, received, _) = move_pod(&a, &b, &to(&b.socket(&a))).await;
        assert_eq!(sent.unwrap(), Sent::Moved);
        received.unwrap();
        b_ends.stdin.write_all(b"third\n").await.unwrap();
        b_app.close_stdin(None).await.unwrap();
        fs::write(b.volume.join("go"), "").unwrap();
        let text = read_until(&b_ends.stdout, "end\n").await;
        assert_eq!(text, "second\nthird\nend\n");
        for instance in [a_app, a_pause, b_app, b_pause] {
            instance.delete().await.unwrap();
        }
    });
}

#[test]
fn a_migration_that_fails_or_is_given_up_leaves_the_pod_as_it_was() {
    run(|reaper| async move {
        let mut a = Node::new(&reaper, COUNT, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        read_until(&a_ends.stdout, "n 5\n").await;
        let pid = a_app.pid();

        // Given up in the middle of the copy: 1 MiB/s, and more than that to copy.
        fs::write(a.volume.join("big"), vec![1; 8 << 20]).unwrap();
        let mut b = Node::new(&reaper, COUNT, Some(&a));
        let (b_pause, b_app, _) = b.create().await;
        let mut slow = to(&b.socket(&a));
        slow.bandwidth_mib_s = 1;
        let cancel = async {
            appears(&b.volume.join("big")).await;
            let error = a.migration().hurry(Hurry::PostCopy).await.unwrap_err();
            assert!(error.to_string().contains("no post-copy"), "{error}");
            a.migration().cancel().await.unwrap();
        };
        let ((sent, received, _), ()) = tokio::join!(move_pod(&a, &b, &slow), cancel);
        assert!(sent.unwrap_err().to_string().contains("given up"));
        received.unwrap_err();
        b_app.delete().await.unwrap();
        b_pause.delete().await.unwrap();
        b.assert_nothing_left();
        b.app.assert_gone();

        // The target cannot restore: what its process has open is another file there.
        let mut c = Node::new(&reaper, COUNT, Some(&a));
        c.app.spec["linux"]["resources"]["memory"] = json!({"limit": 400 << 10, "swap": 400 << 10});
        let (c_pause, c_app, _) = c.create().await;
        let (sent, received, _) = move_pod(&a, &c, &to(&c.socket(&a))).await;
        let error = sent.unwrap_err().chain();
        assert!(
            error.contains("the target could not run the pod"),
            "{error}"
        );
        received.unwrap_err();
        c_app.delete().await.unwrap();
        c_pause.delete().await.unwrap();
        c.app.assert_gone();

        // All the time it has been the same process, and it goes on.
        assert_eq!(a_app.pid(), pid);
        let text = read_now(&a_ends.stdout);
        let last = numbers(&text, "n ").last().copied().unwrap_or(5);
        let more = read_until(&a_ends.stdout, &format!("n {}\n", last + 20)).await;
        let all = [numbers(&text, "n "), numbers(&more, "n ")].concat();
        assert_eq!(all, (6..6 + all.len() as u64).collect::<Vec<_>>());
        assert!(a.pause.events.try_recv().is_err());
        a_app.delete().await.unwrap();
        a_pause.delete().await.unwrap();
        a.assert_nothing_left();
    });
}

/// A proxy before `socket`. On the first connection to it that moves a pod, `cut` sees
/// what the source says, and what the target says, and ends it by answering true; what
/// was seen then is not handed on.
async fn proxy(listen: &Path, socket: &Path, cut: fn(&[u8], bool) -> bool) {
    let listener = UnixListener::bind(listen).unwrap();
    let mut whole = false;
    loop {
        let (source, _) = listener.accept().await.unwrap();
        let target = UnixStream::connect(socket).await;
        let Ok(target) = target else {
            // As if it was not there either.
            drop((listener, source));
            fs::remove_file(listen).unwrap();
            return std::future::pending().await;
        };
        let (mut source_reads, mut source_writes) = source.into_split();
        let (mut target_reads, mut target_writes) = target.into_split();
        let forward = async |from: &mut OwnedReadHalf,
                             to: &mut OwnedWriteHalf,
                             by_source: bool,
                             whole: bool| {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let length = from.read(&mut buffer).await.unwrap_or(0);
                if length == 0 || (!whole && cut(&buffer[..length], by_source)) {
                    return;
                }
                if to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = forward(&mut source_reads, &mut target_writes, true, whole) => {}
            () = forward(&mut target_reads, &mut source_writes, false, whole) => {}
        }
        whole = true;
    }
}

fn says(bytes: &[u8], word: &str) -> bool {
    bytes
        .windows(word.len())
        .any(|window| window == word.as_bytes())
}

#[test]
fn a_connection_that_breaks_leaves_the_pod_running_once() {
    type Cut = fn(&[u8], bool) -> bool;
    let cuts: [(&str, Cut, bool); 4] = [
        (
            "before the files",
            |bytes, _| says(bytes, "\"tree\""),
            false,
        ),
        (
            "among the images",
            |bytes, _| says(bytes, "pages-1.img"),
            false,
        ),
        (
            "at the commit",
            |bytes, by_source| by_source && says(bytes, "\"commit\""),
            false,
        ),
        (
            "at the answer",
            |bytes, by_source| !by_source && says(bytes, "outcome"),
            true,
        ),
    ];
    run(|reaper| async move {
        let mut a = Node::new(&reaper, COUNT, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        read_until(&a_ends.stdout, "n 1\n").await;
        for (when, cut, moves) in cuts {
            let mut b = Node::new(&reaper, COUNT, Some(&a));
            let (b_pause, b_app, b_ends) = b.create().await;
            let between = b.pause.temp.path().join("proxy.sock");
            let socket = b.socket(&a);
            let (sender, _progress) = watch::channel(MigrationProgress::default());
            let send = async {
                appears(&socket).await;
                let parameters = to(&between);
                let migration = a.migration();
                tokio::select! {
                    biased;
                    // First: it listens before the source comes.
                    () = proxy(&between, &socket, cut) => unreachable!(),
                    sent = migration.send(&parameters, Vec::new(), sender) => sent,
                }
            };
            let (sent, received) = tokio::join!(send, b.migration().receive());
            assert_eq!(received.is_ok(), moves, "{when}: {received:?}");
            match sent {
                Ok(sent) => assert!(moves && sent == Sent::Moved, "{when}"),
                Err(error) => assert!(!moves, "{when}: {}", error.chain()),
            }
            read_now(&a_ends.stdout);
            if moves {
                read_until(&b_ends.stdout, "n ").await;
                assert_eq!(read_now(&a_ends.stdout), "", "{when}: it runs twice");
                let gone = a_app.signal(None, 0, false).await;
                assert!(matches!(gone, Err(Error::NotFound(_))), "{when}: {gone:?}");
            } else {
                read_until(&a_ends.stdout, "n ").await;
                assert_eq!(read_now(&b_ends.stdout), "", "{when}: it runs twice");
            }
            b_app.delete().await.unwrap();
            b_pause.delete().await.unwrap();
            b.app.assert_gone();
            b.assert_nothing_left();
            let ends = async {
                while socket.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(BOUND, ends).await.expect("somebody listens still");
        }
        a_app.delete().await.unwrap();
        a_pause.delete().await.unwrap();
        a.assert_nothing_left();
    });
}

#[test]
fn of_several_containers_none_runs_before_all_are_there() {
    run(|reaper| async move {
        let mut a = Node::new(&reaper, COUNT, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        let a_more = a.another("more", None).await;
        read_until(&a_more.2.stdout, "n 5\n").await;
        for works in [false, true] {
            let mut b = Node::new(&reaper, COUNT, Some(&a));
            let (b_pause, b_app, b_ends) = b.create().await;
            let limit = (!works).then_some(400 << 10);
            let b_more = b.another("more", limit).await;
            let (sent, received, _) = move_pod(&a, &b, &to(&b.socket(&a))).await;
            if works {
                assert_eq!(sent.unwrap(), Sent::Moved);
                assert_eq!(received.unwrap().processes.len(), 3);
                read_until(&b_ends.stdout, "n ").await;
                read_until(&b_more.2.stdout, "n ").await;
            } else {
                sent.unwrap_err();
                received.unwrap_err();
                // `app` was restored before `more` could not be.
                assert_eq!(read_now(&b_ends.stdout), "");
                read_now(&a_ends.stdout);
                read_until(&a_ends.stdout, "n ").await;
            }
            for instance in [b_more.1, b_app, b_pause] {
                instance.delete().await.unwrap();
            }
            b.app.assert_gone();
            b_more.0.assert_gone();
        }
        for instance in [a_more.1, a_app, a_pause] {
            instance.delete().await.unwrap();
        }
    });
}

#[test]
fn what_cannot_move_is_refused_by_name_before_anything_moves() {
    run(|reaper| async move {
        let script = "exec 5</dev/zero; echo ready; sleep 100000";
        let mut a = Node::new(&reaper, script, None);
        let (a_pause, a_app, a_ends) = a.create().await;
        read_until(&a_ends.stdout, "ready\n").await;
        let mut b = Node::new(&reaper, script, Some(&a));
        b.app.spec["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/h", "type": "bind", "source": "/etc", "options": ["rbind", "ro"]}));
        let (b_pause, b_app, _) = b.create().await;
        let socket = b.socket(&a);
        let target = b.migration();
        let ask = async {
            appears(&socket).await;
            let check = async |parameters: &MigrationParameters| {
                a.migration().check(parameters).await.unwrap_err().chain()
            };
            let error = check(&to(&socket)).await;
            assert!(
                error.contains("volume /h: only the target has it"),
                "{error}"
            );
            let (stdio, _ends) = a.app.stdio("e", false);
            a_app
                .exec(a.app.exec_spec("e", "sleep 1000", stdio))
                .await
                .unwrap();
            a_app.start_exec("e").await.unwrap();
            let error = check(&to(&socket)).await;
            assert!(
                error.contains("container app: exec e runs in it"),
                "{error}"
            );
            a_app.signal(Some("e"), libc::SIGKILL, false).await.unwrap();
            let mut elsewhere = to(&socket);
            elsewhere.destination = "qemu+tls://node2/system".into();
            let error = check(&elsewhere).await;
            assert!(error.contains("scheme \"qemu+tls\""), "{error}");
            let mut machine = to(&socket);
            machine.auto_converge = true;
            assert!(check(&machine).await.contains("auto_converge"));
        };
        tokio::select! {
            () = ask => {}
            arrived = target.receive() => panic!("{arrived:?}"),
        }
        assert_eq!(fs::read_dir(b.upper()).unwrap().count(), 0);
        assert!(!socket.exists(), "it waits no more");
        for instance in [a_app, a_pause, b_app, b_pause] {
            instance.delete().await.unwrap();
        }
        a.app.assert_gone();
        b.app.assert_gone();
    });
}
