//! The host's side: calls, and streams by offset, over connections that come and go.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use protobuf::{Enum, Message};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use super::connection::{self, BATCH, Side};
use super::frame::{self, Frame, FrameError, MAX_ANSWER, MAX_REQUEST};
use super::message;
use super::table::{Source, StreamError, Table};
use super::{INPUT_CAPACITY, OUTPUT_WINDOW, StreamKey, VERSION, VSOCK_PORT, vsock};

/// Where the host writes a process's input.
pub use super::table::Sink as InputWriter;

/// The reading half of a channel.
pub type BoxReader = Box<dyn AsyncRead + Send + Unpin>;
/// The writing half of a channel.
pub type BoxWriter = Box<dyn AsyncWrite + Send + Unpin>;

/// A channel that a connector is opening.
pub type Opening = Pin<Box<dyn Future<Output = io::Result<(BoxReader, BoxWriter)>> + Send>>;

/// HELLO is said again after this time, then after twice as long, and so on …
const HELLO_AGAIN: Duration = Duration::from_millis(100);
/// … up to this.
const HELLO_AGAIN_MAX: Duration = Duration::from_secs(1);

/// Bytes of a guest's words on why it refused, at most: they end in logs and in events.
const MAX_MESSAGE: usize = 4096;

/// A guest that restarts again and again is told of once in this time.
const RESTART_TOLD: Duration = Duration::from_secs(60);

/// A connection is tried again after this time, then after twice as long, and so on …
const CONNECT_AGAIN: Duration = Duration::from_millis(20);
/// … up to this.
const CONNECT_AGAIN_MAX: Duration = Duration::from_secs(1);

/// The host's side of the link. Clones are the same link; it is closed when the last
/// one is dropped.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    _closes: Arc<CloseOnDrop>,
}

/// The guest that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Differs for every boot of the guest.
    pub boot_id: String,
}

/// Why no guest was greeted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadyError {
    /// None answered in time.
    #[error("the guest agent did not answer within {0:?}")]
    Timeout(Duration),
    /// It speaks another version of the link.
    #[error("the guest agent speaks version {guest} of the link, this host {VERSION}")]
    Version {
        /// The guest's version.
        guest: u32,
    },
    /// [`Client::close`] was called.
    #[error("the link to the guest is closed")]
    Closed,
}

/// Why a call gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The guest refused, or failed.
    #[error("{message}")]
    Status {
        /// Of which kind.
        code: ttrpc::Code,
        /// Its words.
        message: String,
    },
    /// [`Client::close`] was called, or the guest speaks another version.
    #[error("the link to the guest is closed")]
    Closed,
    /// The guest booted anew; nobody works on the call any more.
    #[error("the guest restarted")]
    Restarted,
    /// It fits in no frame.
    #[error("the request has {0} bytes, {MAX_REQUEST} fit")]
    TooLarge(usize),
    /// The request or its answer is not a message of its type.
    #[error("message cannot be encoded or decoded: {0}")]
    Message(String),
}

struct Shared {
    session: u64,
    table: Arc<Table>,
    state: Mutex<State>,
    status: watch::Sender<Status>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Status {
    /// No guest is greeted now.
    Away,
    Live(Hello),
    WrongVersion {
        guest: u32,
    },
    Closed,
}

struct State {
    phase: Phase,
    /// HELLOs said so far.
    attempt: u64,
    next_id: u64,
    calls: BTreeMap<u64, Call>,
    /// What is to be sent about calls.
    queue: VecDeque<Out>,
    /// The guest that was greeted last.
    boot_id: Option<String>,
    /// It was logged that the guest sent what only a host sends.
    told_of_nonsense: bool,
    /// When it was logged last that the guest restarted.
    restart_told: Option<Instant>,
}

enum Phase {
    Down,
    Greeting {
        /// HELLOs up to this one belong to an earlier greeting.
        after: u64,
        next: Instant,
        gap: Duration,
    },
    Live,
}

struct Call {
    service: String,
    method: String,
    payload: Bytes,
    answer: oneshot::Sender<Result<Bytes, CallError>>,
}

enum Out {
    Request(u64),
    Answered(u64),
}

struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close(Status::Closed);
    }
}

/// A connector for [`Client::new`]: the unix socket of a virtio-serial channel.
pub fn unix(path: impl Into<PathBuf>) -> impl Fn() -> Opening + Send + Sync {
    let path = path.into();
    move || {
        let path = path.clone();
        Box::pin(async move {
            let (reader, writer) = tokio::net::UnixStream::connect(&path).await?.into_split();
            Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
        })
    }
}

/// A connector for [`Client::new`]: the guest with the vsock context id `cid`.
pub fn vsock(cid: u32) -> impl Fn() -> Opening + Send + Sync {
    move || {
        Box::pin(async move {
            let (reader, writer) = vsock::connect(cid, VSOCK_PORT).await?.into_split();
            Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
        })
    }
}

impl Client {
    /// A link over the channels that `connector` opens; it is asked again whenever
    /// one ends. Must be called in a tokio runtime.
    pub fn new<F, Fut>(connector: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = io::Result<(BoxReader, BoxWriter)>> + Send,
    {
        let shared = Shared::new();
        let driven = Arc::clone(&shared);
        tokio::spawn(async move {
            let mut status = driven.status.subscribe();
            tokio::select! {
                () = driven.drive(connector) => {}
                _ = status.wait_for(Status::is_final) => {}
            }
        });
        let closes = Arc::new(CloseOnDrop(Arc::clone(&shared)));
        Self {
            shared,
            _closes: closes,
        }
    }

    /// Waits until a guest is greeted.
    ///
    /// # Errors
    /// None is within `timeout`, it speaks another version, or the link is closed.
    pub async fn ready(&self, timeout: Duration) -> Result<Hello, ReadyError> {
        let mut status = self.shared.status.subscribe();
        let known = tokio::time::timeout(timeout, status.wait_for(|s| *s != Status::Away)).await;
        match known.map_err(|_| ReadyError::Timeout(timeout))?.as_deref() {
            Ok(Status::Live(hello)) => Ok(hello.clone()),
            Ok(Status::WrongVersion { guest }) => Err(ReadyError::Version { guest: *guest }),
            Ok(Status::Away | Status::Closed) | Err(_) => Err(ReadyError::Closed),
        }
    }

    /// Calls `method` of `service` in the guest; waits for the answer as long as it
    /// takes, over broken connections too. The guest does it once. Dropping the
    /// future gives up the answer, not the work.
    ///
    /// # Errors
    /// The guest refused, restarted meanwhile, or the link was closed.
    pub async fn call<Req: Message, Resp: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
    ) -> Result<Resp, CallError> {
        let payload = request
            .write_to_bytes()
            .map_err(|e| CallError::Message(e.to_string()))?;
        let size = frame::request_size(service, method, &payload);
        if size > MAX_REQUEST {
            return Err(CallError::TooLarge(size));
        }
        let (answer, answered) = oneshot::channel();
        let call = Call {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: payload.into(),
            answer,
        };
        let waiting = self.shared.begin(call)?;
        let payload = answered.await.map_err(|_| CallError::Closed)??;
        drop(waiting);
        message::check::<Resp>(&payload).map_err(CallError::Message)?;
        Resp::parse_from_bytes(&payload).map_err(|e| CallError::Message(e.to_string()))
    }

    /// Reads the output stream `key` from byte `from` on. A second reader of the same
    /// stream takes it from the first.
    pub fn output(&self, key: StreamKey, from: u64) -> OutputReader {
        OutputReader {
            source: self.shared.table.receiver(key, from, OUTPUT_WINDOW, false),
        }
    }

    /// Writes the input stream `key`, of which the guest has received `from` bytes.
    pub fn input(&self, key: StreamKey, from: u64) -> InputWriter {
        self.shared.table.sender(key, from, INPUT_CAPACITY)
    }

    /// Forgets an input stream, also what was not sent yet.
    pub fn remove_input(&self, key: &StreamKey) {
        self.shared.table.remove(key);
    }

    /// Ends the connection for good; every call and stream fails from now on.
    pub fn close(&self) {
        self.shared.close(Status::Closed);
    }
}

/// Bytes of an output stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes; never empty.
    pub data: Bytes,
}

impl Chunk {
    /// Offset behind the last byte: what to acknowledge.
    pub fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

/// Reads a process's output.
#[derive(Debug)]
pub struct OutputReader {
    source: Source,
}

impl OutputReader {
    /// The stream.
    pub fn key(&self) -> &StreamKey {
        self.source.key()
    }

    /// The next bytes, each once and in order; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// The guest restarted or no longer holds the bytes, or the link was closed.
    pub async fn next(&mut self) -> Result<Option<Chunk>, StreamError> {
        let piece = self.source.next().await?;
        Ok(piece.map(|(offset, data)| Chunk { offset, data }))
    }

    /// All bytes below `consumed` are where they belong; the guest may forget them.
    /// After [`OutputReader::next`] gave `None`, acknowledging the last byte
    /// acknowledges the end.
    pub fn ack(&self, consumed: u64) {
        self.source.done(consumed);
    }
}

/// Text that is no longer than `max` bytes.
fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let mut end = max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        // What it was cut from is megabytes.
        text.shrink_to_fit();
    }
    text
}

/// A random number without a dependency: the standard library's hash keys are random.
fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

impl Status {
    fn is_final(&self) -> bool {
        matches!(self, Status::WrongVersion { .. } | Status::Closed)
    }
}

impl Shared {
    fn new() -> Arc<Self> {
        let state = State {
            phase: Phase::Down,
            attempt: 0,
            next_id: 1,
            calls: BTreeMap::new(),
            queue: VecDeque::new(),
            boot_id: None,
            told_of_nonsense: false,
            restart_told: None,
        };
        Arc::new(Self {
            session: random(),
            table: Arc::new(Table::default()),
            state: Mutex::new(state),
            status: watch::Sender::new(Status::Away),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock with half a change made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn drive<F, Fut>(&self, connector: F)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = io::Result<(BoxReader, BoxWriter)>>,
    {
        let mut gap = CONNECT_AGAIN;
        loop {
            let ended = match connector().await {
                Ok((reader, writer)) => {
                    self.greet(&mut self.lock());
                    let ended = connection::run(&self, MAX_ANSWER, reader, writer).await;
                    let was_live = self.down();
                    if was_live {
                        gap = CONNECT_AGAIN;
                    }
                    ended
                }
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                log::debug!("channel to the guest: {error}");
            }
            tokio::time::sleep(gap).await;
            gap = (gap * 2).min(CONNECT_AGAIN_MAX);
        }
    }

    fn greet(&self, state: &mut State) {
        state.phase = Phase::Greeting {
            after: state.attempt,
            next: Instant::now(),
            gap: HELLO_AGAIN,
        };
        state.queue.clear();
        self.table.reset();
        self.set_status(Status::Away);
        self.table.wake.notify_one();
    }

    fn down(&self) -> bool {
        let mut state = self.lock();
        let was_live = matches!(state.phase, Phase::Live);
        state.phase = Phase::Down;
        state.queue.clear();
        self.table.reset();
        self.set_status(Status::Away);
        was_live
    }

    fn set_status(&self, status: Status) {
        self.status.send_if_modified(|now| {
            let change = !now.is_final() && *now != status;
            if change {
                *now = status;
            }
            change
        });
    }

    fn close(&self, status: Status) {
        self.set_status(status);
        let calls = std::mem::take(&mut self.lock().calls);
        for call in calls.into_values() {
            // Whoever gave up waiting needs no answer.
            let _ = call.answer.send(Err(CallError::Closed));
        }
        self.table.fail(&StreamError::Closed, true);
    }

    fn begin(&self, call: Call) -> Result<Waiting<'_>, CallError> {
        let mut state = self.lock();
        if self.status.borrow().is_final() {
            return Err(CallError::Closed);
        }
        let id = state.next_id;
        state.next_id += 1;
        state.calls.insert(id, call);
        if matches!(state.phase, Phase::Live) {
            state.queue.push_back(Out::Request(id));
        }
        drop(state);
        self.table.wake.notify_one();
        Ok(Waiting { shared: self, id })
    }

    fn greeted(&self, state: &mut State, boot_id: String) {
        if state
            .boot_id
            .as_ref()
            .is_some_and(|known| *known != boot_id)
        {
            let now = Instant::now();
            if state
                .restart_told
                .is_none_or(|told| now - told > RESTART_TOLD)
            {
                state.restart_told = Some(now);
                log::warn!("the guest restarted");
            }
            for call in std::mem::take(&mut state.calls).into_values() {
                // Whoever gave up waiting needs no answer.
                let _ = call.answer.send(Err(CallError::Restarted));
            }
            self.table.fail(&StreamError::Restarted, false);
        }
        state.boot_id = Some(boot_id.clone());
        state.phase = Phase::Live;
        state.queue = state.calls.keys().map(|id| Out::Request(*id)).collect();
        self.table.reset();
        self.table.ask_again();
        self.set_status(Status::Live(Hello { boot_id }));
    }
}

/// A call under way; when it is dropped, the guest may forget the call.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.calls.remove(&self.id).is_some() && matches!(state.phase, Phase::Live) {
            state.queue.push_back(Out::Answered(self.id));
            self.shared.table.wake.notify_one();
        }
    }
}

impl Side for &Shared {
    fn fill(&self, out: &mut Vec<u8>) -> Option<Duration> {
        let mut guard = self.lock();
        let state = &mut *guard;
        match &mut state.phase {
            Phase::Down => return None,
            Phase::Greeting { next, gap, .. } => {
                let now = Instant::now();
                if *next <= now {
                    *next = now + *gap;
                    *gap = (*gap * 2).min(HELLO_AGAIN_MAX);
                    state.attempt += 1;
                    let hello = Frame::Hello {
                        version: VERSION,
                        session: self.session,
                        attempt: state.attempt,
                        outstanding: state.calls.keys().copied().collect(),
                    };
                    // Ends what may stand half written before it.
                    out.push(0);
                    frame::encode(&hello, out);
                }
                return Some(*next - now);
            }
            Phase::Live => {}
        }
        while out.len() < BATCH {
            match state.queue.pop_front() {
                None => break,
                Some(Out::Answered(id)) => frame::encode(&Frame::Answered { id }, out),
                Some(Out::Request(id)) => {
                    if let Some(Call {
                        service,
                        method,
                        payload,
                        ..
                    }) = state.calls.get(&id)
                    {
                        let (service, method) = (service.clone(), method.clone());
                        let payload = payload.clone();
                        frame::encode(
                            &Frame::Request {
                                id,
                                service,
                                method,
                                payload,
                            },
                            out,
                        );
                    }
                }
            }
        }
        drop(guard);
        self.table.fill(out);
        None
    }

    fn take(&self, frame: Result<Frame, FrameError>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        match (&state.phase, frame) {
            (
                Phase::Greeting { after, .. },
                Ok(Frame::HelloAck {
                    version,
                    session,
                    attempt,
                    boot_id,
                }),
            ) if session == self.session && attempt > *after && attempt <= state.attempt => {
                if version == VERSION {
                    self.greeted(state, boot_id);
                } else {
                    drop(guard);
                    self.close(Status::WrongVersion { guest: version });
                    return;
                }
                self.table.wake.notify_one();
            }
            // What was under way before the greeting means nothing now.
            (Phase::Down | Phase::Greeting { .. }, _) => {}
            (Phase::Live, Ok(frame)) => self.take_live(state, frame),
            (Phase::Live, Err(error)) => {
                log::debug!("dropped a frame of the guest: {error}");
                self.greet(state);
            }
        }
    }

    fn wake(&self) -> &Notify {
        &self.table.wake
    }
}

impl Shared {
    fn take_live(&self, state: &mut State, frame: Frame) {
        match frame {
            Frame::Response {
                id,
                code,
                message,
                payload,
            } => {
                // Only what was asked is acknowledged: a guest that answers what nobody asked,
                // and never reads, would fill the queue.
                if let Some(call) = state.calls.remove(&id) {
                    let answer = match ttrpc::Code::from_i32(code) {
                        Some(ttrpc::Code::OK) => Ok(payload),
                        code => {
                            let code = code.unwrap_or(ttrpc::Code::UNKNOWN);
                            let message = cut(message, MAX_MESSAGE);
                            Err(CallError::Status { code, message })
                        }
                    };
                    // Whoever gave up waiting needs no answer.
                    let _ = call.answer.send(answer);
                    state.queue.push_back(Out::Answered(id));
                    self.table.wake.notify_one();
                }
            }
            Frame::Data {
                key,
                offset,
                data,
                eof,
            } => {
                if !self.table.arrive(&key, offset, data, eof) {
                    log::debug!("{key}: bytes before {offset} are missing");
                    self.greet(state);
                }
            }
            Frame::Ack {
                key,
                offset,
                window,
                resume,
            } => {
                self.table.acknowledged(key, offset, window, resume);
            }
            Frame::Gone { key, first, end } => self.table.gone(&key, first, end),
            Frame::Resync => self.greet(state),
            // A late answer to a HELLO that was said twice.
            Frame::HelloAck { .. } => {}
            frame @ (Frame::Hello { .. } | Frame::Request { .. } | Frame::Answered { .. }) => {
                let kind = frame.kind();
                if !std::mem::replace(&mut state.told_of_nonsense, true) {
                    log::warn!("the guest sent a {kind} frame, which only a host sends");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::StdFd;
    use super::*;

    fn key() -> impl Strategy<Value = StreamKey> {
        // Some of them are streams that the host has.
        let container = prop_oneof![Just("c".to_owned()), ".{0,8}"];
        let exec = prop_oneof![Just(None), "[a-z]{0,3}".prop_map(Some)];
        (container, exec, 0_u8..3).prop_map(|(container_id, exec_id, fd)| StreamKey {
            container_id,
            exec_id,
            fd: StdFd::from_number(fd).unwrap_or(StdFd::Stdin),
        })
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0_u64..300, any::<u64>(), u64::MAX - 300..=u64::MAX]
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = || vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        prop_oneof![
            Just(Frame::Resync),
            number().prop_map(|id| Frame::Answered { id }),
            (number(), any::<i32>(), ".{0,20}", bytes()).prop_map(
                |(id, code, message, payload)| Frame::Response {
                    id,
                    code,
                    message,
                    payload
                }
            ),
            (key(), number(), bytes(), any::<bool>()).prop_map(|(key, offset, data, eof)| {
                Frame::Data {
                    key,
                    offset,
                    data,
                    eof,
                }
            }),
            (key(), number(), any::<u32>(), any::<bool>()).prop_map(
                |(key, offset, window, resume)| Frame::Ack {
                    key,
                    offset,
                    window,
                    resume
                }
            ),
            (key(), number(), number()).prop_map(|(key, first, end)| Frame::Gone {
                key,
                first,
                end
            }),
            (any::<u32>(), number(), number()).prop_map(|(version, session, attempt)| {
                Frame::HelloAck {
                    version,
                    session,
                    attempt,
                    boot_id: "b".into(),
                }
            }),
        ]
    }

    proptest! {
        /// Whatever a greeted guest says, and in whatever order, the host's half goes on.
        #[test]
        fn fuzz_host_half(frames in vec(frame(), 0..200), from in 0..=u64::MAX / 2) {
            let shared = Shared::new();
            let output = StreamKey::new("c", None, StdFd::Stdout);
            let input = StreamKey::new("c", None, StdFd::Stdin);
            let _output = shared.table.receiver(output, from, OUTPUT_WINDOW, false);
            let input = shared.table.sender(input, from, INPUT_CAPACITY);
            input.close();
            let side = &*shared;
            let side = &side;
            side.greet(&mut side.lock());
            let mut out = Vec::new();
            for frame in frames {
                let greeting = matches!(side.lock().phase, Phase::Greeting { .. });
                side.fill(&mut out);
                out.clear();
                if greeting {
                    let (session, attempt) = (side.session, side.lock().attempt);
                    let boot_id = "b".to_owned();
                    let version = VERSION;
                    side.take(Ok(Frame::HelloAck { version, session, attempt, boot_id }));
                }
                side.take(Ok(frame));
            }
            side.fill(&mut out);
            prop_assert!(side.lock().queue.is_empty());
        }

        /// Bytes are frames or errors, and what is encoded comes out again behind them.
        #[test]
        fn fuzz_link_frames(
            garbage in vec(prop_oneof![Just(0_u8), any::<u8>()], 0..400),
            frame in frame(),
        ) {
            let mut wire = garbage;
            wire.push(0);
            frame::encode(&frame, &mut wire);
            let mut decoder = frame::Decoder::new(MAX_ANSWER);
            let (mut bytes, mut last) = (wire.as_slice(), None);
            while let Some(found) = decoder.next(&mut bytes) {
                last = Some(found);
            }
            prop_assert_eq!(last, Some(Ok(frame)));
        }
    }
}
