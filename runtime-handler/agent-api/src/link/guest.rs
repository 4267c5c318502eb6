//! The guest's side: runs calls, each once, and keeps streams until they are taken.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use ttrpc::r#async::{Service, TtrpcContext};

use super::connection::{self, BATCH, Side};
use super::frame::{self, Frame, FrameError, MAX_ANSWER, MAX_REQUEST};
use super::table::{Source, Table};
use super::{INPUT_WINDOW, OUTPUT_CAPACITY, StreamKey, StreamState, VERSION};

/// Where the agent writes a process's output.
pub use super::table::Sink as OutputSink;

/// The guest's side of the link. Clones are the same link.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    services: HashMap<String, Service>,
    boot_id: String,
    table: Arc<Table>,
    state: Mutex<State>,
    /// Counts the connections; the newest one is served.
    connection: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    session: Option<u64>,
    /// A HELLO came on this connection, so answers and streams may be sent.
    greeted: bool,
    /// The HELLO to answer next.
    hello: Option<(u64, u64)>,
    /// Ask for a HELLO.
    resync: bool,
    /// Was asked for on this connection, and did not come yet.
    resync_sent: bool,
    calls: HashMap<u64, Call>,
    /// Calls whose answers are to be sent.
    answers: VecDeque<u64>,
}

/// A call of the current session that the host waits for.
enum Call {
    Running,
    Done {
        code: i32,
        message: String,
        payload: Bytes,
    },
}

impl Link {
    /// A link that serves `services` (by full name, as the generated `create_*`
    /// functions give them). `boot_id` differs for every boot of the guest.
    pub fn new(services: HashMap<String, Service>, boot_id: impl Into<String>) -> Self {
        let shared = Shared {
            services,
            boot_id: boot_id.into(),
            table: Arc::new(Table::default()),
            state: Mutex::default(),
            connection: watch::Sender::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Serves one connection until it ends, or until `serve` is called again with a
    /// newer one. `Ok` when the host closed it.
    ///
    /// # Errors
    /// The channel could not be read or written.
    pub async fn serve(
        &self,
        reader: impl AsyncRead + Unpin,
        writer: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let mut number = 0;
        self.shared.connection.send_modify(|count| {
            *count += 1;
            number = *count;
        });
        let mut newest = self.shared.connection.subscribe();
        let connection = Connection { link: self, number };
        connection.begin();
        tokio::select! {
            ended = connection::run(&connection, MAX_REQUEST, reader, writer) => {
                connection.end();
                ended
            }
            _ = newest.wait_for(|newest| *newest != number) => Ok(()),
        }
    }

    /// Makes the output stream `key`; the host gets it from its first byte on.
    pub fn output(&self, key: StreamKey) -> OutputSink {
        self.shared.table.sender(key, 0, OUTPUT_CAPACITY)
    }

    /// Makes the input stream `key`.
    pub fn input(&self, key: StreamKey) -> InputSource {
        InputSource {
            source: self.shared.table.receiver(key, 0, INPUT_WINDOW, true),
        }
    }

    /// Forgets a stream with all it holds; whoever writes or reads it gets an error.
    pub fn remove(&self, key: &StreamKey) {
        self.shared.table.remove(key);
    }

    /// Every stream, sorted by key.
    pub fn streams(&self) -> Vec<StreamState> {
        self.shared.table.states()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock with half a change made.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn dispatch(
        self,
        session: u64,
        id: u64,
        service: String,
        method: String,
        payload: Bytes,
    ) {
        let answer = self.call(service, method, payload).await;
        let mut state = self.lock();
        if state.session != Some(session) {
            return;
        }
        // Gone from the map: the host no longer wants it.
        let Some(call) = state.calls.get_mut(&id) else {
            return;
        };
        *call = answer;
        if state.greeted {
            state.answers.push_back(id);
        }
        drop(state);
        self.shared.table.wake.notify_one();
    }

    async fn call(&self, service: String, method: String, payload: Bytes) -> Call {
        let found = self
            .shared
            .services
            .get(&service)
            .and_then(|s| s.methods.get(&method));
        let Some(handler) = found else {
            return Call::failed(
                ttrpc::Code::UNIMPLEMENTED,
                format!("{service}/{method} is not served"),
            );
        };
        let mut request = ttrpc::Request::new();
        request.service = service;
        request.method = method;
        request.payload = payload.into();
        match handler.handler(TtrpcContext::default(), request).await {
            Ok(response) => {
                let (code, message) = match response.status.into_option() {
                    Some(status) => (status.code.value(), status.message),
                    None => (0, String::new()),
                };
                let payload = Bytes::from(response.payload);
                let size = frame::response_size(&message, &payload);
                if size > MAX_ANSWER {
                    let text = format!("the answer has {size} bytes, {MAX_ANSWER} fit");
                    return Call::failed(ttrpc::Code::RESOURCE_EXHAUSTED, text);
                }
                Call::Done {
                    code,
                    message,
                    payload,
                }
            }
            Err(ttrpc::Error::RpcStatus(status)) => Call::failed(status.code(), status.message),
            Err(error) => Call::failed(ttrpc::Code::INVALID_ARGUMENT, error.to_string()),
        }
    }
}

impl Call {
    fn failed(code: ttrpc::Code, message: String) -> Self {
        Call::Done {
            code: protobuf::Enum::value(&code),
            message,
            payload: Bytes::new(),
        }
    }
}

/// Where the agent reads a process's input.
#[derive(Debug)]
pub struct InputSource {
    source: Source,
}

impl InputSource {
    /// The stream.
    pub fn key(&self) -> &StreamKey {
        self.source.key()
    }

    /// The next bytes; `None` at the end, or when the stream was removed. Asking
    /// makes room for the host to send more. Cancel safe.
    pub async fn read(&mut self) -> Option<Bytes> {
        match self.source.next().await {
            Ok(piece) => piece.map(|(_, data)| data),
            Err(_) => None,
        }
    }
}

/// One run of [`Link::serve`].
struct Connection<'a> {
    link: &'a Link,
    number: u64,
}

impl Connection<'_> {
    /// The state, if this connection is still the newest.
    fn state(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.link.lock();
        (*self.link.shared.connection.borrow() == self.number).then_some(state)
    }

    fn begin(&self) {
        if let Some(mut state) = self.state() {
            state.greeted = false;
            state.hello = None;
            state.answers.clear();
            // The host may hold the channel from before this guest booted.
            state.resync = true;
            state.resync_sent = true;
            self.link.shared.table.reset();
        }
    }

    fn end(&self) {
        if let Some(mut state) = self.state() {
            state.greeted = false;
            self.link.shared.table.reset();
        }
    }

    fn hello(
        &self,
        state: &mut State,
        version: u32,
        session: u64,
        attempt: u64,
        outstanding: Vec<u64>,
    ) {
        if state.session != Some(session) {
            log::info!("host session {session:016x} begins");
            state.session = Some(session);
            state.calls.clear();
        }
        let outstanding: BTreeSet<u64> = outstanding.into_iter().collect();
        state.calls.retain(|id, _| outstanding.contains(id));
        state.answers.clear();
        state.hello = Some((session, attempt));
        state.greeted = version == VERSION;
        state.resync = false;
        state.resync_sent = false;
        self.link.shared.table.reset();
        if state.greeted {
            self.link.shared.table.ask_again();
        } else {
            log::error!("the host speaks version {version}, this agent {VERSION}");
        }
    }

    fn request(&self, state: &mut State, id: u64, service: String, method: String, payload: Bytes) {
        let Some(session) = state.session else { return };
        match state.calls.get(&id) {
            Some(Call::Running) => {}
            Some(Call::Done { .. }) => state.answers.push_back(id),
            None => {
                state.calls.insert(id, Call::Running);
                tokio::spawn(
                    self.link
                        .clone()
                        .dispatch(session, id, service, method, payload),
                );
            }
        }
    }

    fn ask_resync(state: &mut State) {
        if !state.resync_sent {
            state.resync_sent = true;
            state.resync = true;
        }
    }
}

impl Side for Connection<'_> {
    fn fill(&self, out: &mut Vec<u8>) -> Option<Duration> {
        let mut guard = self.state()?;
        let state = &mut *guard;
        if let Some((session, attempt)) = state.hello.take() {
            let boot_id = self.link.shared.boot_id.clone();
            frame::encode(
                &Frame::HelloAck {
                    version: VERSION,
                    session,
                    attempt,
                    boot_id,
                },
                out,
            );
        }
        if std::mem::take(&mut state.resync) {
            frame::encode(&Frame::Resync, out);
        }
        if !state.greeted {
            return None;
        }
        while out.len() < BATCH {
            let Some(id) = state.answers.pop_front() else {
                break;
            };
            if let Some(Call::Done {
                code,
                message,
                payload,
            }) = state.calls.get(&id)
            {
                let (code, message, payload) = (*code, message.clone(), payload.clone());
                frame::encode(
                    &Frame::Response {
                        id,
                        code,
                        message,
                        payload,
                    },
                    out,
                );
            }
        }
        drop(guard);
        self.link.shared.table.fill(out);
        None
    }

    fn take(&self, frame: Result<Frame, FrameError>) {
        let Some(mut guard) = self.state() else {
            return;
        };
        let state = &mut *guard;
        match frame {
            Ok(Frame::Hello {
                version,
                session,
                attempt,
                outstanding,
            }) => {
                self.hello(state, version, session, attempt, outstanding);
            }
            Ok(_) if !state.greeted => Self::ask_resync(state),
            Ok(Frame::Request {
                id,
                service,
                method,
                payload,
            }) => {
                self.request(state, id, service, method, payload);
            }
            Ok(Frame::Answered { id }) => {
                state.calls.remove(&id);
            }
            Ok(Frame::Data {
                key,
                offset,
                data,
                eof,
            }) => {
                if !self.link.shared.table.arrive(&key, offset, data, eof) {
                    Self::ask_resync(state);
                }
            }
            Ok(Frame::Ack {
                key,
                offset,
                window,
                resume,
            }) => {
                self.link
                    .shared
                    .table
                    .acknowledged(key, offset, window, resume);
            }
            Ok(Frame::Gone { key, first, end }) => self.link.shared.table.gone(&key, first, end),
            Ok(frame @ (Frame::HelloAck { .. } | Frame::Resync | Frame::Response { .. })) => {
                log::warn!("the host sent {frame:?}, which only a guest sends");
            }
            Err(error) => {
                log::debug!("dropped a frame: {error}");
                Self::ask_resync(state);
            }
        }
        if state.hello.is_some() || state.resync || !state.answers.is_empty() {
            self.wake().notify_one();
        }
    }

    fn wake(&self) -> &Notify {
        &self.link.shared.table.wake
    }
}
