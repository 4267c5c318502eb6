//! What the machine asks of the agent in its guest, and the stdio of its processes.
//!
//! ```text
//! handler --> Agent --call--> link::Client ~~~channel~~~ agent
//!               |                  ^
//!               +-- stdio: FIFO <--+--> stream, one pair per standard stream
//! ```
//! Only this module knows containerd's Task messages. Those of `agent.proto`, which are
//! our own, it hands on ([`SetupRequest`], [`File`], [`CreateOptions`] …).
//!
//! Calls go on over a broken channel, and are done once, so nothing here is repeated.

mod convert;
mod stdio;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dyad_agent_api::link::host::{Client, ReadyError};
use dyad_agent_api::link::{StdFd, StreamKey};
pub use dyad_agent_api::proto::agent::{
    BlockDevice, CreateOptions, File, Filesystem, Interface, PutFilesRequest, Route, SetupRequest,
    SetupResponse, file::Content,
};
use dyad_agent_api::proto::agent::{
    GetFileRequest, GetFileResponse, PutFilesResponse, ResourcesRequest, ResourcesResponse,
    ShutdownRequest, ShutdownResponse, StreamState, StreamsRequest, StreamsResponse,
    WaitEventsRequest, WaitEventsResponse, guest_event,
};
use dyad_agent_api::protobuf::well_known_types::any::Any;
use dyad_agent_api::protobuf::{Message, MessageField};
use dyad_agent_api::task_api::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest,
    ResumeRequest, StartRequest, StartResponse, StatsRequest, StatsResponse, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::handler::{Exit, ProcessId};
use dyad_runtime_handler::spec::{ExecSpec, Stdio};
use dyad_runtime_handler::stats::Stats;
use log::debug;
use oci_spec::runtime::LinuxResources;

use self::stdio::Pump;
use crate::migrate::offer::Position;

const TASK: &str = "containerd.task.v3.Task";
const SANDBOX: &str = "dyad.agent.v1.Sandbox";

/// How long the agent may take over a call that does not wait for a process. Creating
/// a container under software emulation, on a host busy with others, takes seconds.
const CALL_WITHIN: Duration = Duration::from_secs(60);

/// The longest version, kernel release or boot id of a guest.
const WORD_MAX_BYTES: usize = 256;

/// Streams of a guest's processes, at most: three for each.
const STREAMS_MAX: usize = 16 << 10;

/// `Any.type_url` of [`CreateOptions`].
const CREATE_OPTIONS: &str = "dyad.agent.v1.CreateOptions";
/// The type URLs that containerd gives these JSON values.
const OCI_PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const OCI_RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The agent of one machine. Clones are the same.
#[derive(Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    /// The running stdio of every process that is not deleted.
    pumps: Mutex<HashMap<ProcessId, Arc<Pump>>>,
    /// Those of execs that nobody here started.
    unattended: Mutex<Vec<Pump>>,
}

/// Something that happened in the guest, not asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest's kernel killed a process of this container for memory.
    OutOfMemory {
        /// The container's id.
        container: String,
    },
}

/// What the guest has online.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, as the guest's kernel counts it.
    pub memory_bytes: u64,
}

impl Agent {
    /// The agent behind `client`.
    pub fn new(client: Client) -> Self {
        let pumps = Mutex::default();
        Self {
            inner: Arc::new(Inner {
                client,
                pumps,
                unattended: Mutex::default(),
            }),
        }
    }

    /// Waits until the agent answers; returns the guest's boot id.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `within`; `FailedPrecondition` when it speaks another
    /// version; `Unavailable` when the link was closed.
    pub async fn ready(&self, within: Duration) -> Result<String> {
        match self.inner.client.ready(within).await {
            Ok(hello) => Ok(hello.boot_id),
            Err(error @ ReadyError::Timeout(_)) => Err(Error::DeadlineExceeded(error.to_string())),
            Err(error @ ReadyError::Version { .. }) => Err(Error::FailedPrecondition(format!(
                "{error}; the guest's initramfs and dyad must come from one release"
            ))),
            Err(error @ ReadyError::Closed) => Err(Error::Unavailable(error.to_string(), None)),
        }
    }

    /// Makes the guest the pod.
    ///
    /// # Errors
    /// The agent's, as for every call: by what it answered, `DeadlineExceeded` when it
    /// did not, `Unavailable` when the guest or the link is gone.
    pub async fn setup(&self, request: SetupRequest) -> Result<SetupResponse> {
        let answer: SetupResponse = self
            .sandbox("Setup", request, || "set up the guest".into())
            .await?;
        let words = [
            &answer.agent_version,
            &answer.kernel_release,
            &answer.boot_id,
        ];
        // They are kept, and told to whoever asks.
        if words.iter().any(|word| word.len() > WORD_MAX_BYTES) {
            return Err(impossible("names itself by more than its name takes"));
        }
        Ok(answer)
    }

    /// Puts files into the guest.
    ///
    /// # Errors
    /// As for every call; `InvalidArgument` when they are too many bytes.
    pub async fn put_files(&self, request: PutFilesRequest) -> Result<()> {
        let answer: PutFilesResponse = self
            .sandbox("PutFiles", request, || "put files into the guest".into())
            .await?;
        drop(answer);
        Ok(())
    }

    /// Reads the last `max` bytes of a file.
    ///
    /// # Errors
    /// As for every call; `NotFound`.
    pub async fn get_file(&self, path: &str, max: u32) -> Result<Vec<u8>> {
        let request = GetFileRequest {
            path: path.into(),
            max_bytes: max,
            ..Default::default()
        };
        let answer: GetFileResponse = self
            .sandbox("GetFile", request, || format!("read {path} in the guest"))
            .await?;
        Ok(answer.data)
    }

    /// Brings vCPUs online, up to `vcpus`; `None` only asks.
    ///
    /// # Errors
    /// As for every call.
    pub async fn resources(&self, vcpus: Option<u32>) -> Result<GuestSize> {
        let request = ResourcesRequest {
            online_vcpus: vcpus.unwrap_or_default(),
            ..Default::default()
        };
        let answer: ResourcesResponse = self
            .sandbox("Resources", request, || "resize the guest".into())
            .await?;
        Ok(GuestSize {
            vcpus: answer.online_vcpus,
            memory_bytes: answer.memory_bytes,
        })
    }

    /// Waits for events after number `after`; returns them and the last one's number.
    /// Numbers start at 1 with each boot.
    ///
    /// # Errors
    /// As for every call, but without a deadline.
    pub async fn events(&self, after: u64) -> Result<(u64, Vec<GuestEvent>)> {
        let request = WaitEventsRequest {
            after,
            ..Default::default()
        };
        let doing = || "wait for events of the guest".to_owned();
        let answer: WaitEventsResponse = self.call(SANDBOX, "WaitEvents", &request, doing).await?;
        let last = answer.events.iter().map(|event| event.sequence).max();
        let events = answer.events.into_iter().filter_map(|event| event.event);
        let events = events.filter_map(|event| match event {
            guest_event::Event::Oom(container) => Some(GuestEvent::OutOfMemory { container }),
            // Of a newer agent.
            _ => None,
        });
        Ok((last.unwrap_or(after), events.collect()))
    }

    /// Ends all processes and powers the guest off, or reboots it: SIGTERM, `grace`,
    /// SIGKILL. Returns when that has begun.
    ///
    /// # Errors
    /// As for every call.
    pub async fn shutdown(&self, reboot: bool, grace: Duration) -> Result<()> {
        let request = ShutdownRequest {
            reboot,
            grace_ms: u32::try_from(grace.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer: ShutdownResponse = self
            .sandbox("Shutdown", request, || "shut the guest down".into())
            .await?;
        drop(answer);
        Ok(())
    }

    /// Creates a container; `stdio` is connected from its first byte. Returns the
    /// guest's pid of its init.
    ///
    /// # Errors
    /// As for every call; then the stdio is released.
    pub async fn create(&self, id: &str, stdio: Stdio, options: CreateOptions) -> Result<u32> {
        let process = ProcessId::init(id);
        let doing = || format!("create container {id} in the guest");
        let mut request = CreateTaskRequest {
            id: id.into(),
            terminal: stdio.terminal,
            stdin: marker(stdio.stdin.as_ref()),
            stdout: marker(stdio.stdout.as_ref()),
            options: MessageField::some(Any {
                type_url: CREATE_OPTIONS.into(),
                value: options.write_to_bytes().context(doing)?,
                ..Default::default()
            }),
            ..Default::default()
        };
        if !stdio.terminal {
            request.stderr = marker(stdio.stderr.as_ref());
        }
        if options.again {
            self.disconnect(id, None);
        } else if self.pump(id, None).is_some() {
            return Err(Error::AlreadyExists(process.to_string()));
        }
        let answer: CreateTaskResponse = self.task("Create", request, doing).await?;
        // Only now: before, the streams may be those of the container that had this id.
        // The guest keeps what is written until it is asked for.
        if let Err(error) = self.connect(&process, stdio, Offsets::default()) {
            self.delete(id, None).await?;
            return Err(error);
        }
        Ok(answer.pid)
    }

    /// Runs the container's init, or an added exec; returns the guest's pid.
    ///
    /// # Errors
    /// As for every call; `FailedPrecondition` when it ran already.
    pub async fn start(&self, id: &str, exec: Option<&str>) -> Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id(exec),
            ..Default::default()
        };
        let answer: StartResponse = self
            .task("Start", request, || on("start", id, exec))
            .await?;
        Ok(answer.pid)
    }

    /// Adds a process to a container; its stdio is connected from its first byte.
    ///
    /// # Errors
    /// As for every call; then the stdio is released.
    pub async fn exec(&self, id: &str, spec: ExecSpec) -> Result<()> {
        let exec = spec.exec_id.as_str();
        let process = ProcessId::exec(id, exec);
        let doing = || on("add", id, Some(exec));
        let mut request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            terminal: spec.stdio.terminal,
            stdin: marker(spec.stdio.stdin.as_ref()),
            stdout: marker(spec.stdio.stdout.as_ref()),
            spec: MessageField::some(json(OCI_PROCESS, &spec.process).context(doing)?),
            ..Default::default()
        };
        if !spec.stdio.terminal {
            request.stderr = marker(spec.stdio.stderr.as_ref());
        }
        if self.pump(id, Some(&spec.exec_id)).is_some() {
            return Err(Error::AlreadyExists(process.to_string()));
        }
        self.connect(&process, spec.stdio, Offsets::default())?;
        let answer: Result<Empty> = self.task("Exec", request, doing).await;
        self.disconnect_failed(&process, &answer);
        answer.map(drop)
    }

    /// Sends a signal; `all`: to every process of the container.
    ///
    /// # Errors
    /// As for every call; `NotFound` when the process has ended.
    pub async fn kill(&self, id: &str, exec: Option<&str>, signal: i32, all: bool) -> Result<()> {
        let signal = u32::try_from(signal)
            .map_err(|_| Error::InvalidArgument(format!("{signal} is no signal")))?;
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id(exec),
            signal,
            all,
            ..Default::default()
        };
        let answer: Empty = self
            .task("Kill", request, || on("signal", id, exec))
            .await?;
        drop(answer);
        Ok(())
    }

    /// Waits for a process's end, however long that takes.
    ///
    /// # Errors
    /// As for every call, but without a deadline.
    pub async fn wait(&self, id: &str, exec: Option<&str>) -> Result<Exit> {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id(exec),
            ..Default::default()
        };
        let doing = || on("wait for", id, exec);
        let answer: WaitResponse = self.call(TASK, "Wait", &request, doing).await?;
        Ok(Exit {
            status: answer.exit_status,
            at: convert::time(answer.exited_at.as_ref()),
        })
    }

    /// Waits until all output of a process is in its FIFOs, at most `within`. Returns
    /// whether it is.
    pub async fn drained(&self, id: &str, exec: Option<&str>, within: Duration) -> bool {
        match self.pump(id, exec) {
            Some(pump) => pump.drained(within).await,
            None => true,
        }
    }

    /// Waits until a process that ended has no output on its way any more: `within`, from
    /// the guest; then, for a bounded time, until it was read.
    pub async fn taken(&self, process: &ProcessId, within: Duration) {
        let pump = self.pumps().get(process).cloned();
        if let Some(pump) = pump
            && !pump.taken(within).await
        {
            debug!("{process}: told of its end before its output was read");
        }
    }

    /// Removes a process that ended or never started, and releases its stdio; what is
    /// not drained is lost. Without `exec`: the container. Idempotent.
    ///
    /// # Errors
    /// As for every call.
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> Result<()> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id(exec),
            ..Default::default()
        };
        let answer: Result<DeleteResponse> = self
            .task("Delete", request, || on("delete", id, exec))
            .await;
        match answer {
            Ok(_) | Err(Error::NotFound(_)) => {
                self.disconnect(id, exec);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Sets a terminal's size in characters.
    ///
    /// # Errors
    /// As for every call; `FailedPrecondition` without a terminal.
    pub async fn resize(
        &self,
        id: &str,
        exec: Option<&str>,
        width: u16,
        height: u16,
    ) -> Result<()> {
        let request = ResizePtyRequest {
            id: id.into(),
            exec_id: exec_id(exec),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let answer: Empty = self
            .task("ResizePty", request, || {
                on("resize the terminal of", id, exec)
            })
            .await?;
        drop(answer);
        Ok(())
    }

    /// Lets the process have what its stdin FIFO still holds, then closes its end.
    /// Returns at once: a process that does not read keeps nobody waiting.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn close_stdin(&self, id: &str, exec: Option<&str>) -> Result<()> {
        let pump = self.pump(id, exec);
        let pump = pump.ok_or_else(|| Error::NotFound(process_id(id, exec).to_string()))?;
        pump.close_stdin();
        Ok(())
    }

    /// Freezes a container's processes.
    ///
    /// # Errors
    /// As for every call.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let request = PauseRequest {
            id: id.into(),
            ..Default::default()
        };
        let answer: Empty = self
            .task("Pause", request, || on("pause", id, None))
            .await?;
        drop(answer);
        Ok(())
    }

    /// Undoes [`Agent::pause`].
    ///
    /// # Errors
    /// As for every call.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let request = ResumeRequest {
            id: id.into(),
            ..Default::default()
        };
        let answer: Empty = self
            .task("Resume", request, || on("resume", id, None))
            .await?;
        drop(answer);
        Ok(())
    }

    /// A container's processes by the guest's pids, with the exec each is.
    ///
    /// # Errors
    /// As for every call.
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>> {
        let request = PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        let doing = || on("list the processes of", id, None);
        let answer: PidsResponse = self.task("Pids", request, doing).await?;
        convert::pids(answer).context(doing)
    }

    /// What a container uses, as the guest counts it; for the empty id all containers
    /// together.
    ///
    /// # Errors
    /// As for every call.
    pub async fn stats(&self, id: &str) -> Result<Stats> {
        let request = StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        let doing = || on("read the usage of", id, None);
        let answer: StatsResponse = self.task("Stats", request, doing).await?;
        dyad_agent_api::stats::decode(&answer.stats.value).context(doing)
    }

    /// Applies new limits to a container.
    ///
    /// # Errors
    /// As for every call.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<()> {
        let doing = || on("update", id, None);
        let request = UpdateTaskRequest {
            id: id.into(),
            resources: MessageField::some(json(OCI_RESOURCES, resources).context(doing)?),
            ..Default::default()
        };
        let answer: Empty = self.task("Update", request, doing).await?;
        drop(answer);
        Ok(())
    }

    /// Connects the stdio of a process that another host process created: from where that
    /// one ended (`known`), or else from the first byte on that the guest still holds.
    ///
    /// # Errors
    /// As for every call.
    pub async fn adopt(
        &self,
        id: &str,
        exec: Option<&str>,
        stdio: Stdio,
        known: &[Position],
    ) -> Result<()> {
        let mut offsets = Offsets::default();
        for stream in self.streams().await? {
            if stream.container_id == id && stream.exec_id == exec.unwrap_or_default() {
                let known = known.iter().find(|position| {
                    position.container == id
                        && position.exec == stream.exec_id
                        && position.fd == stream.fd
                });
                let offset = goes_on_at(&stream, known);
                match stream.fd {
                    0 => offsets.stdin = stream.offset,
                    1 => offsets.stdout = offset,
                    2 => offsets.stderr = offset,
                    _ => {}
                }
            }
        }
        self.connect(&process_id(id, exec), stdio, offsets)
    }

    /// Reads and drops the output of every exec in these containers: those who started
    /// them are on another node.
    ///
    /// # Errors
    /// As for every call.
    pub async fn adopt_unattended(&self, containers: &[String]) -> Result<()> {
        for stream in self.streams().await? {
            let counts = containers.contains(&stream.container_id)
                && !stream.exec_id.is_empty()
                && stream.fd != 0;
            if !counts {
                continue;
            }
            let fd = if stream.fd == 1 {
                StdFd::Stdout
            } else {
                StdFd::Stderr
            };
            let process = ProcessId::exec(&stream.container_id, &stream.exec_id);
            let key = StreamKey::new(&stream.container_id, Some(&stream.exec_id), fd);
            let reader = self.inner.client.output(key, stream.offset);
            let mut pump = Pump::default();
            pump.discard(reader);
            self.unattended().push(pump);
            debug!("{process} goes on unattended");
        }
        Ok(())
    }

    /// Ends the link for good, and tells how far each output came: all below that is in
    /// its FIFO, at most `within` after this. Tells it again until [`Self::close`].
    pub async fn hand_over(&self, within: Duration) -> Vec<Position> {
        self.inner.client.close();
        let pumps: Vec<Arc<Pump>> = self.pumps().values().cloned().collect();
        let drained = pumps.iter().map(|pump| pump.drained(within));
        futures::future::join_all(drained).await;
        pumps
            .iter()
            .flat_map(|pump| pump.positions().collect::<Vec<_>>())
            .map(|(key, offset)| Position {
                container: key.container_id.clone(),
                exec: key.exec_id.clone().unwrap_or_default(),
                fd: u32::from(key.fd.number()),
                offset,
            })
            .collect()
    }

    async fn streams(&self) -> Result<Vec<StreamState>> {
        let answer: StreamsResponse = self
            .sandbox("Streams", StreamsRequest::new(), || {
                "list the guest's streams".into()
            })
            .await?;
        checked(answer.streams)
    }

    fn unattended(&self) -> MutexGuard<'_, Vec<Pump>> {
        // Nothing panics while it holds the lock.
        self.inner
            .unattended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the link: every call under way and every stream fails.
    pub fn close(&self) {
        self.inner.client.close();
        self.pumps().clear();
        self.unattended().clear();
    }

    fn connect(&self, process: &ProcessId, stdio: Stdio, from: Offsets) -> Result<()> {
        let client = &self.inner.client;
        let key = |fd| StreamKey::new(&process.container, process.exec.as_deref(), fd);
        let mut pump = Pump::default();
        let connected = || format!("connect the stdio of {process}");
        if let Some(fifo) = stdio.stdin {
            let writer = client.input(key(StdFd::Stdin), from.stdin);
            pump.feed(fifo, writer).context(connected)?;
        }
        if let Some(fifo) = stdio.stdout {
            let reader = client.output(key(StdFd::Stdout), from.stdout);
            pump.copy(reader, from.stdout, fifo).context(connected)?;
        }
        if let Some(fifo) = stdio.stderr.filter(|_| !stdio.terminal) {
            let reader = client.output(key(StdFd::Stderr), from.stderr);
            pump.copy(reader, from.stderr, fifo).context(connected)?;
        }
        self.pumps().insert(process.clone(), Arc::new(pump));
        Ok(())
    }

    /// Releases the stdio of a process that was not made.
    fn disconnect_failed<T>(&self, process: &ProcessId, answer: &Result<T>) {
        if answer.is_err() {
            self.disconnect(&process.container, process.exec.as_deref());
        }
    }

    fn disconnect(&self, id: &str, exec: Option<&str>) {
        let gone = |process: &ProcessId| {
            process.container == id && (exec.is_none() || process.exec.as_deref() == exec)
        };
        let mut pumps = self.pumps();
        pumps.retain(|process, _| {
            let gone = gone(process);
            if gone {
                let key = StreamKey::new(id, process.exec.as_deref(), StdFd::Stdin);
                self.inner.client.remove_input(&key);
            }
            !gone
        });
    }

    fn pump(&self, id: &str, exec: Option<&str>) -> Option<Arc<Pump>> {
        self.pumps().get(&process_id(id, exec)).cloned()
    }

    fn pumps(&self) -> MutexGuard<'_, HashMap<ProcessId, Arc<Pump>>> {
        // Nothing panics while it holds the lock.
        self.inner
            .pumps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn sandbox<Req: Message, Resp: Message>(
        &self,
        method: &str,
        request: Req,
        doing: impl Fn() -> String,
    ) -> Result<Resp> {
        self.call_within(SANDBOX, method, &request, doing).await
    }

    async fn task<Req: Message, Resp: Message>(
        &self,
        method: &str,
        request: Req,
        doing: impl Fn() -> String,
    ) -> Result<Resp> {
        self.call_within(TASK, method, &request, doing).await
    }

    async fn call_within<Req: Message, Resp: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
        doing: impl Fn() -> String,
    ) -> Result<Resp> {
        let call = self.call(service, method, request, &doing);
        tokio::time::timeout(CALL_WITHIN, call)
            .await
            .unwrap_or_else(|_| {
                Err(Error::DeadlineExceeded(format!(
                    "{}: the guest agent did not answer within {CALL_WITHIN:?}",
                    doing()
                )))
            })
    }

    async fn call<Req: Message, Resp: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
        doing: impl Fn() -> String,
    ) -> Result<Resp> {
        let answer = self.inner.client.call(service, method, request).await;
        answer.map_err(|error| convert::error(error, doing))
    }
}

/// Where each stream of a process goes on.
#[derive(Default)]
struct Offsets {
    stdin: u64,
    stdout: u64,
    stderr: u64,
}

fn process_id(id: &str, exec: Option<&str>) -> ProcessId {
    match exec {
        None => ProcessId::init(id),
        Some(exec) => ProcessId::exec(id, exec),
    }
}

fn on(verb: &str, id: &str, exec: Option<&str>) -> String {
    format!("{verb} {} in the guest", process_id(id, exec))
}

fn exec_id(exec: Option<&str>) -> String {
    exec.unwrap_or_default().to_owned()
}

/// Not empty: the stream is wanted.
fn marker(fd: Option<&OwnedFd>) -> String {
    if fd.is_some() { "1" } else { "" }.to_owned()
}

fn json(type_url: &str, value: &impl serde::Serialize) -> Result<Any, serde_json::Error> {
    Ok(Any {
        type_url: type_url.into(),
        value: serde_json::to_vec(value)?,
        ..Default::default()
    })
}

/// The guest's streams, as far as they can be.
///
/// # Errors
/// `Unavailable`: they cannot; nobody counts with such numbers.
fn checked(streams: Vec<StreamState>) -> Result<Vec<StreamState>> {
    // No process has written so much; sums of it do not overflow.
    const END_MAX: u64 = u64::MAX / 2;
    if streams.len() > STREAMS_MAX {
        return Err(impossible("tells of more streams than processes can have"));
    }
    for stream in &streams {
        if stream.offset > stream.end || stream.end > END_MAX {
            return Err(impossible(&format!(
                "tells of a stream that begins at byte {} and ends at {}",
                stream.offset, stream.end
            )));
        }
    }
    Ok(streams)
}

fn impossible(what: &str) -> Error {
    Error::Unavailable(format!("the guest {what}"), None)
}

/// The first byte that is still wanted of a [`checked`] stream, of which the host process
/// before us had taken all below `known`.
fn goes_on_at(stream: &StreamState, known: Option<&Position>) -> u64 {
    known.map_or(stream.offset, |position| {
        position.offset.clamp(stream.offset, stream.end)
    })
}
