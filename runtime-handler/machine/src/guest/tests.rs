//! Against an agent in this process, over a channel in memory.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use dyad_agent_api::link::guest::{InputSource, Link, OutputSink};
use dyad_agent_api::link::host::{BoxReader, BoxWriter};
use dyad_agent_api::proto::agent::StreamState;
use dyad_agent_api::proto::agent_ttrpc::{Sandbox, create_sandbox};
use dyad_agent_api::task_api::shim_async::{Task, create_task};
use dyad_agent_api::ttrpc::r#async::TtrpcContext;
use dyad_agent_api::ttrpc::{Code, Error as RpcError, Result as RpcResult, get_status};
use dyad_linux::pump::Fd;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use oci_spec::runtime::Process;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::*;

const BOUND: Duration = Duration::from_secs(10);

/// An agent whose every process is `cat`: it ends with its input, with status 3.
#[derive(Default)]
struct Cat {
    link: std::sync::OnceLock<Link>,
    requests: Mutex<Vec<String>>,
    ended: Notify,
    /// The ends of a process's streams, until it is started.
    waiting: Mutex<HashMap<ProcessId, (InputSource, OutputSink)>>,
}

impl Cat {
    fn add(&self, process: ProcessId, marks: String) {
        let link = self.link.get().unwrap();
        let key = |fd| StreamKey::new(&process.container, process.exec.as_deref(), fd);
        let ends = (
            link.input(key(StdFd::Stdin)),
            link.output(key(StdFd::Stdout)),
        );
        self.requests
            .lock()
            .unwrap()
            .push(format!("{process}: {marks}"));
        self.waiting.lock().unwrap().insert(process, ends);
    }
}

struct Service(Arc<Cat>);

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> RpcResult<CreateTaskResponse> {
        if request.id == "taken" {
            let status = get_status(Code::ALREADY_EXISTS, "container taken already exists");
            return Err(RpcError::RpcStatus(status));
        }
        let options = CreateOptions::parse_from_bytes(&request.options.value).unwrap();
        let CreateTaskRequest {
            stdin,
            stdout,
            stderr,
            terminal,
            ..
        } = &request;
        let url = &request.options.type_url;
        let disk = &options.root_disk_serial;
        let marks = format!("<{stdin}{stdout}{stderr}> {terminal} {url} {disk}");
        self.0.add(ProcessId::init(&request.id), marks);
        Ok(CreateTaskResponse {
            pid: 17,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> RpcResult<Empty> {
        let spec: Process = serde_json::from_slice(&request.spec.value).unwrap();
        let ExecProcessRequest {
            stdin,
            stdout,
            stderr,
            terminal,
            ..
        } = &request;
        let url = &request.spec.type_url;
        let cwd = spec.cwd().display();
        let marks = format!("<{stdin}{stdout}{stderr}> {terminal} {url} {cwd}");
        self.0
            .add(ProcessId::exec(&request.id, &request.exec_id), marks);
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> RpcResult<StartResponse> {
        let exec = Some(request.exec_id.as_str()).filter(|exec| !exec.is_empty());
        let ends = self
            .0
            .waiting
            .lock()
            .unwrap()
            .remove(&process_id(&request.id, exec));
        let (mut from, to) = ends.unwrap();
        let cat = Arc::clone(&self.0);
        tokio::spawn(async move {
            while let Some(bytes) = from.read().await {
                to.write(&bytes).await.unwrap();
            }
            to.close();
            cat.ended.notify_one();
        });
        Ok(StartResponse {
            pid: 18,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> RpcResult<WaitResponse> {
        self.0.ended.notified().await;
        Ok(WaitResponse {
            exit_status: 3,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, _: DeleteRequest) -> RpcResult<DeleteResponse> {
        let status = get_status(Code::NOT_FOUND, "container cat not found");
        Err(RpcError::RpcStatus(status))
    }
}

#[async_trait]
impl Sandbox for Service {
    async fn streams(&self, _: &TtrpcContext, _: StreamsRequest) -> RpcResult<StreamsResponse> {
        let streams = self.0.link.get().unwrap().streams();
        let streams = streams.into_iter().map(|stream| StreamState {
            container_id: stream.key.container_id,
            exec_id: stream.key.exec_id.unwrap_or_default(),
            fd: stream.key.fd.number().into(),
            offset: stream.offset,
            end: stream.end,
            closed: stream.closed,
            ..Default::default()
        });
        Ok(StreamsResponse {
            streams: streams.collect(),
            ..Default::default()
        })
    }
}

/// Agents that one guest serves, each for its own host process.
fn agents() -> (Arc<Cat>, impl Fn() -> Agent) {
    let cat = Arc::new(Cat::default());
    let mut services = create_task(Arc::new(Service(Arc::clone(&cat))));
    services.extend(create_sandbox(Arc::new(Service(Arc::clone(&cat)))));
    let link = Link::new(services, "boot");
    cat.link.set(link.clone()).ok().unwrap();
    let (channels, mut served) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(channel) = served.recv().await {
            let (reader, writer) = tokio::io::split(channel);
            let link = link.clone();
            tokio::spawn(async move { link.serve(reader, writer).await });
        }
    });
    let new_agent = move || {
        let channels = channels.clone();
        Agent::new(Client::new(move || {
            let (host, guest) = tokio::io::duplex(1000);
            let sent = channels.send(guest);
            async move {
                sent.map_err(std::io::Error::other)?;
                let (reader, writer) = tokio::io::split(host);
                Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
            }
        }))
    };
    (cat, new_agent)
}

/// Stdin and stdout of a process, and containerd's ends.
struct Ends {
    type_here: Fd,
    shown: Fd,
    stdin: OwnedFd,
    stdout: OwnedFd,
}

impl Ends {
    fn new() -> Self {
        let (stdin, type_here) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let (shown, stdout) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        Self {
            type_here: Fd::new(type_here).unwrap(),
            shown: Fd::new(shown).unwrap(),
            stdin,
            stdout,
        }
    }

    /// As the shim hands them out: duplicates.
    fn stdio(&self) -> Stdio {
        Stdio {
            stdin: Some(self.stdin.try_clone().unwrap()),
            stdout: Some(self.stdout.try_clone().unwrap()),
            stderr: None,
            terminal: false,
        }
    }

    async fn shows(&self, text: &[u8]) {
        let mut bytes = vec![0; text.len()];
        let mut have = 0;
        while have < bytes.len() {
            have += timeout(BOUND, self.shown.read(&mut bytes[have..]))
                .await
                .unwrap()
                .unwrap();
        }
        assert_eq!(bytes, text);
    }
}

fn options() -> CreateOptions {
    CreateOptions {
        root_disk_serial: "image".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_container_lives_and_its_stdio_is_carried() {
    let (cat, new_agent) = agents();
    let agent = new_agent();
    assert_eq!(agent.ready(BOUND).await.unwrap(), "boot");
    let ends = Ends::new();
    assert_eq!(
        agent.create("cat", ends.stdio(), options()).await.unwrap(),
        17
    );
    assert_eq!(agent.start("cat", None).await.unwrap(), 18);
    ends.type_here.write_all(b"some words").await.unwrap();
    ends.shows(b"some words").await;
    assert!(!agent.drained("cat", None, Duration::ZERO).await);

    // What the FIFO holds when stdin is closed still arrives.
    ends.type_here.write_all(&[b'x'; 20_000]).await.unwrap();
    agent.close_stdin("cat", None).unwrap();
    assert_eq!(
        timeout(BOUND, agent.wait("cat", None))
            .await
            .unwrap()
            .unwrap()
            .status,
        3
    );
    assert!(agent.drained("cat", None, BOUND).await);
    ends.shows(&[b'x'; 20_000]).await;

    // That it is gone already is as good.
    agent.delete("cat", None).await.unwrap();
    assert!(matches!(
        agent.close_stdin("cat", None),
        Err(Error::NotFound(_))
    ));
    let requests = cat.requests.lock().unwrap();
    assert_eq!(
        *requests,
        ["container cat: <11> false dyad.agent.v1.CreateOptions image"]
    );
}

#[tokio::test]
async fn an_exec_is_told_in_the_agents_words() {
    let (cat, new_agent) = agents();
    let agent = new_agent();
    let mut process = Process::default();
    process.set_cwd("/srv".into());
    let ends = Ends::new();
    let stdio = Stdio {
        terminal: true,
        ..ends.stdio()
    };
    let spec = ExecSpec {
        exec_id: "e".into(),
        process,
        stdio,
    };
    agent.exec("cat", spec).await.unwrap();
    agent.start("cat", Some("e")).await.unwrap();
    ends.type_here.write_all(b"typed").await.unwrap();
    ends.shows(b"typed").await;
    let requests = cat.requests.lock().unwrap();
    let told = "exec e of container cat: <11> true types.containerd.io/opencontainers/runtime-spec/1/Process /srv";
    assert_eq!(*requests, [told]);
}

#[tokio::test]
async fn a_refused_create_releases_the_stdio() {
    let (_, new_agent) = agents();
    let agent = new_agent();
    let Ends {
        stdin,
        stdout,
        shown,
        ..
    } = Ends::new();
    let stdio = Stdio {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
        terminal: false,
    };
    let refused = agent.create("taken", stdio, options()).await;
    assert!(matches!(refused, Err(Error::AlreadyExists(what)) if what == "container taken"));
    let end = timeout(BOUND, shown.read(&mut [0; 1]))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(end, 0, "nobody holds the pipe any more");
}

#[tokio::test]
async fn a_second_create_leaves_the_first_alone() {
    let (_, new_agent) = agents();
    let agent = new_agent();
    let ends = Ends::new();
    agent.create("cat", ends.stdio(), options()).await.unwrap();
    let again = agent.create("cat", Ends::new().stdio(), options()).await;
    assert!(matches!(again, Err(Error::AlreadyExists(_))));
    agent.start("cat", None).await.unwrap();
    ends.type_here.write_all(b"still here").await.unwrap();
    ends.shows(b"still here").await;
}

#[tokio::test]
async fn a_next_shim_takes_the_streams_over() {
    let (_, new_agent) = agents();
    let first = new_agent();
    let ends = Ends::new();
    first.create("cat", ends.stdio(), options()).await.unwrap();
    first.start("cat", None).await.unwrap();
    ends.type_here.write_all(b"first ").await.unwrap();
    ends.shows(b"first ").await;
    first.close();
    assert!(matches!(
        first.start("cat", None).await,
        Err(Error::Unavailable(..))
    ));

    let second = new_agent();
    second.adopt("cat", None, ends.stdio(), &[]).await.unwrap();
    ends.type_here.write_all(b"second").await.unwrap();
    second.close_stdin("cat", None).unwrap();
    assert!(second.drained("cat", None, BOUND).await);
    ends.shows(b"second").await;
}

#[tokio::test]
async fn a_reader_that_left_does_not_stop_the_process() {
    let (_, new_agent) = agents();
    let agent = new_agent();
    let Ends {
        stdin,
        stdout,
        shown,
        type_here,
    } = Ends::new();
    drop(shown);
    let stdio = Stdio {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
        terminal: false,
    };
    agent.create("cat", stdio, options()).await.unwrap();
    agent.start("cat", None).await.unwrap();
    type_here.write_all(&[b'x'; 30_000]).await.unwrap();
    drop(type_here);
    assert!(agent.drained("cat", None, BOUND).await);
}

#[test]
fn a_stream_goes_on_within_what_the_guest_holds_or_is_refused() {
    let stream = |offset, end| StreamState {
        container_id: "c".into(),
        offset,
        end,
        ..Default::default()
    };
    let known = |offset| Position {
        container: "c".into(),
        exec: String::new(),
        fd: 1,
        offset,
    };
    for (offset, end, had, goes_on) in [
        (5, 9, None, 5),
        (5, 9, Some(3), 5),
        (5, 9, Some(7), 7),
        (5, 9, Some(u64::MAX), 9),
        (9, 9, Some(0), 9),
    ] {
        let had = had.map(known);
        let streams = checked(vec![stream(offset, end)]).expect("possible");
        assert_eq!(goes_on_at(&streams[0], had.as_ref()), goes_on);
    }
    // Such a guest made the target's shim panic.
    for (offset, end) in [(10, 5), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        let error = checked(vec![stream(offset, end)]).expect_err("refused");
        assert!(error.to_string().contains("begins at byte"), "{error}");
    }
    checked(vec![stream(0, 0); STREAMS_MAX + 1]).expect_err("too many");
}
