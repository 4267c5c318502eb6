//! Both sides over channels that break.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{Notify, mpsc};

use super::guest::Link;
use super::host::{BoxReader, BoxWriter, CallError, Client, ReadyError};
use super::{StdFd, StreamError, StreamKey};
use crate::proto::agent::{
    GetFileRequest, GetFileResponse, PutFilesRequest, PutFilesResponse, ResourcesRequest,
    ResourcesResponse,
};
use crate::proto::agent_ttrpc::{Sandbox, create_sandbox};

const SANDBOX: &str = "dyad.agent.v1.Sandbox";

/// What happens to the bytes of one connection.
#[derive(Debug, Clone, Default)]
struct Fault {
    /// Both directions are cut after this many bytes to the guest, or to the host.
    cut: Option<(usize, usize)>,
    /// These bytes to the guest, and to the host, are changed.
    garble: (Vec<usize>, Vec<usize>),
}

impl Fault {
    fn is_clean(&self) -> bool {
        self.cut.is_none() && self.garble.0.is_empty() && self.garble.1.is_empty()
    }
}

/// Gives the host channels to the guest, each with the next fault; then clean ones.
#[derive(Clone)]
struct Wire {
    faults: Arc<Mutex<std::vec::IntoIter<Fault>>>,
    to_guest: mpsc::UnboundedSender<DuplexStream>,
    opened: Arc<AtomicUsize>,
    cut_now: Arc<Notify>,
}

impl Wire {
    fn new(link: &Link, faults: Vec<Fault>) -> Self {
        let (to_guest, mut channels) = mpsc::unbounded_channel::<DuplexStream>();
        let link = link.clone();
        tokio::spawn(async move {
            while let Some(channel) = channels.recv().await {
                let (reader, writer) = tokio::io::split(channel);
                let link = link.clone();
                // As the agent does on vsock: a newer connection ends the older.
                tokio::spawn(async move { link.serve(reader, writer).await });
            }
        });
        Self {
            faults: Arc::new(Mutex::new(faults.into_iter())),
            to_guest,
            opened: Arc::default(),
            cut_now: Arc::default(),
        }
    }

    fn client(&self) -> Client {
        let wire = self.clone();
        Client::new(move || {
            let channel = wire.open();
            async move {
                let (reader, writer) = tokio::io::split(channel);
                Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
            }
        })
    }

    fn open(&self) -> DuplexStream {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let fault = self.faults.lock().unwrap().next().unwrap_or_default();
        let (host, host_end) = tokio::io::duplex(4096);
        let (guest, guest_end) = tokio::io::duplex(4096);
        self.to_guest.send(guest).unwrap();
        let cut_now = Arc::clone(&self.cut_now);
        tokio::spawn(async move {
            let (host_reader, host_writer) = tokio::io::split(host_end);
            let (guest_reader, guest_writer) = tokio::io::split(guest_end);
            let (to_guest, to_host) = fault.cut.unwrap_or((usize::MAX, usize::MAX));
            let clean = fault.is_clean();
            tokio::select! {
                () = relay(host_reader, guest_writer, to_guest, fault.garble.0) => {}
                () = relay(guest_reader, host_writer, to_host, fault.garble.1) => {}
                () = cut_now.notified() => {}
                // A garbled delimiter of the last frame is only seen when something
                // follows. The clock is paused: this runs out when nothing moves.
                () = tokio::time::sleep(Duration::from_secs(5)), if !clean => {}
            }
        });
        host
    }
}

async fn relay(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    cut: usize,
    garble: Vec<usize>,
) {
    let mut seen = 0;
    let mut buffer = [0; 1000];
    while seen < cut {
        let room = buffer.len().min(cut - seen);
        let Ok(count @ 1..) = from.read(&mut buffer[..room]).await else {
            return;
        };
        for at in &garble {
            if let Some(byte) = at
                .checked_sub(seen)
                .and_then(|at| buffer[..count].get_mut(at))
            {
                *byte = byte.wrapping_add(1 + *at as u8 % 254);
            }
        }
        seen += count;
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// Counts what was really done.
#[derive(Default)]
struct Service {
    done: Mutex<HashMap<String, usize>>,
    started: Notify,
    go_on: Notify,
}

#[async_trait]
impl Sandbox for Service {
    async fn get_file(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: GetFileRequest,
    ) -> ttrpc::Result<GetFileResponse> {
        *self
            .done
            .lock()
            .unwrap()
            .entry(request.path.clone())
            .or_default() += 1;
        if request.path == "missing" {
            let status = ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such file");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let mut response = GetFileResponse::new();
        response.data = request.path.into_bytes().repeat(request.max_bytes as usize);
        Ok(response)
    }

    async fn put_files(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        _: PutFilesRequest,
    ) -> ttrpc::Result<PutFilesResponse> {
        *self
            .done
            .lock()
            .unwrap()
            .entry("put".to_owned())
            .or_default() += 1;
        Ok(PutFilesResponse::new())
    }

    /// Like Wait: answers when it is told to.
    async fn resources(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: ResourcesRequest,
    ) -> ttrpc::Result<ResourcesResponse> {
        *self
            .done
            .lock()
            .unwrap()
            .entry("wait".to_owned())
            .or_default() += 1;
        self.started.notify_one();
        self.go_on.notified().await;
        let mut response = ResourcesResponse::new();
        response.online_vcpus = request.online_vcpus;
        Ok(response)
    }
}

fn guest() -> (Link, Arc<Service>) {
    guest_called("boot-1")
}

fn guest_called(boot_id: &str) -> (Link, Arc<Service>) {
    let service = Arc::new(Service::default());
    (Link::new(create_sandbox(service.clone()), boot_id), service)
}

async fn get_file(client: &Client, path: &str, times: u32) -> Result<Vec<u8>, CallError> {
    let mut request = GetFileRequest::new();
    request.path = path.to_owned();
    request.max_bytes = times;
    let response: GetFileResponse = client.call(SANDBOX, "GetFile", &request).await?;
    Ok(response.data)
}

fn stdout(container: &str) -> StreamKey {
    StreamKey::new(container, None, StdFd::Stdout)
}

fn stdin(container: &str) -> StreamKey {
    StreamKey::new(container, None, StdFd::Stdin)
}

/// Bytes with zeros, runs and everything else, that tell their offset.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| match at / 700 % 3 {
            0 => (at % 251) as u8,
            1 => 0,
            _ => ((at / 256) ^ at) as u8 | 1,
        })
        .collect()
}

fn write_all(link: &Link, key: StreamKey, bytes: Vec<u8>) {
    let sink = link.output(key);
    tokio::spawn(async move {
        sink.write(&bytes).await.unwrap();
        sink.close();
    });
}

/// Reads to the end, or until `limit` bytes are there.
async fn read_some(client: &Client, key: StreamKey, into: &mut Vec<u8>, limit: usize) {
    let mut reader = client.output(key, into.len() as u64);
    while into.len() < limit {
        let Some(chunk) = reader.next().await.unwrap() else {
            reader.ack(into.len() as u64);
            return;
        };
        assert_eq!(
            chunk.offset,
            into.len() as u64,
            "in order and without a hole"
        );
        into.extend_from_slice(&chunk.data);
        reader.ack(chunk.end());
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_is_answered() {
    let (link, _) = guest();
    let client = Wire::new(&link, vec![]).client();
    assert_eq!(
        client.ready(Duration::from_secs(1)).await.unwrap().boot_id,
        "boot-1"
    );
    assert_eq!(get_file(&client, "x", 3).await.unwrap(), b"xxx");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_keeps_its_code_and_words() {
    let (link, _) = guest();
    let client = Wire::new(&link, vec![]).client();
    let refused = |code, message: &str| {
        Err(CallError::Status {
            code,
            message: message.to_owned(),
        })
    };
    assert_eq!(
        get_file(&client, "missing", 1).await,
        refused(ttrpc::Code::NOT_FOUND, "no such file")
    );
    let unknown = client
        .call::<_, GetFileResponse>(SANDBOX, "Nothing", &GetFileRequest::new())
        .await;
    let text = "dyad.agent.v1.Sandbox/Nothing is not served";
    assert_eq!(
        unknown.map(|r| r.data),
        refused(ttrpc::Code::UNIMPLEMENTED, text)
    );
}

#[tokio::test(start_paused = true)]
async fn what_fits_in_no_frame_is_refused_on_either_side() {
    let (link, _) = guest();
    let client = Wire::new(&link, vec![]).client();
    let mut request = GetFileRequest::new();
    request.path = "x".repeat(super::MAX_REQUEST);
    let sent = client
        .call::<_, GetFileResponse>(SANDBOX, "GetFile", &request)
        .await;
    assert!(matches!(sent, Err(CallError::TooLarge(_))));
    let answered = get_file(&client, "x", super::MAX_ANSWER as u32).await;
    assert!(matches!(
        answered,
        Err(CallError::Status {
            code: ttrpc::Code::RESOURCE_EXHAUSTED,
            ..
        })
    ));
    assert_eq!(
        get_file(&client, "x", 4_000_000).await.unwrap().len(),
        4_000_000
    );
}

#[tokio::test(start_paused = true)]
async fn a_long_call_outlives_its_connection_and_is_done_once() {
    let (link, service) = guest();
    let wire = Wire::new(&link, vec![]);
    let client = wire.client();
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move {
            let mut request = ResourcesRequest::new();
            request.online_vcpus = 7;
            client
                .call::<_, ResourcesResponse>(SANDBOX, "Resources", &request)
                .await
        })
    };
    service.started.notified().await;
    for cuts in 1..4 {
        wire.cut_now.notify_one();
        assert_eq!(get_file(&client, "x", 1).await.unwrap(), b"x");
        assert_eq!(wire.opened.load(Ordering::Relaxed), 1 + cuts);
    }
    wire.cut_now.notify_one();
    service.go_on.notify_one();
    assert_eq!(waiting.await.unwrap().unwrap().online_vcpus, 7);
    assert_eq!(service.done.lock().unwrap()["wait"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_booted_anew_fails_what_the_old_one_owed() {
    let (old, service) = guest();
    let wire = Wire::new(&old, vec![]);
    let (new, _) = guest_called("boot-2");
    let rebooted = Wire::new(&new, vec![]);
    let first = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let (before, after) = (wire.clone(), rebooted.clone());
    let client = Client::new(move || {
        let was_first = first.swap(false, Ordering::Relaxed);
        let channel = if was_first {
            before.open()
        } else {
            after.open()
        };
        async move {
            let (reader, writer) = tokio::io::split(channel);
            Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
        }
    });
    let mut reader = client.output(stdout("a"), 0);
    let calling = client.clone();
    let waiting = tokio::spawn(async move {
        calling
            .call::<_, ResourcesResponse>(SANDBOX, "Resources", &ResourcesRequest::new())
            .await
    });
    service.started.notified().await;
    wire.cut_now.notify_one();
    assert_eq!(
        waiting.await.unwrap().map(|_| ()),
        Err(CallError::Restarted)
    );
    assert_eq!(reader.next().await, Err(StreamError::Restarted));
    assert_eq!(get_file(&client, "x", 1).await.unwrap(), b"x");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_rebooted_behind_a_living_channel_is_greeted_again() {
    // virtio-serial: QEMU keeps the host's socket over a reset of the guest.
    let (host, guest_end) = tokio::io::duplex(4096);
    let host = Arc::new(Mutex::new(Some(host)));
    let client = Client::new(move || {
        let channel = host.lock().unwrap().take();
        async move {
            let (reader, writer) = tokio::io::split(channel.ok_or(std::io::ErrorKind::NotFound)?);
            Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
        }
    });
    let (mut reader, mut writer) = tokio::io::split(guest_end);
    {
        let (link, _) = guest();
        let serving = link.serve(&mut reader, &mut writer);
        tokio::select! {
            _ = serving => panic!("the channel ended"),
            hello = client.ready(Duration::from_secs(1)) => assert_eq!(hello.unwrap().boot_id, "boot-1"),
        }
    }
    let (link, _) = guest_called("boot-2");
    tokio::spawn(async move { link.serve(reader, writer).await });
    let call = async {
        loop {
            // The first may be lost with the old guest.
            match get_file(&client, "x", 1).await {
                Err(CallError::Restarted) => {}
                answer => return answer,
            }
        }
    };
    assert_eq!(call.await.unwrap(), b"x");
    assert_eq!(
        client.ready(Duration::from_secs(1)).await.unwrap().boot_id,
        "boot-2"
    );
}

#[tokio::test(start_paused = true)]
async fn nobody_answers_within_the_timeout() {
    let client = Client::new(|| async { Err(std::io::ErrorKind::NotFound.into()) });
    let timeout = Duration::from_secs(60);
    assert_eq!(
        client.ready(timeout).await,
        Err(ReadyError::Timeout(timeout))
    );
    client.close();
    assert_eq!(client.ready(timeout).await, Err(ReadyError::Closed));
    assert_eq!(get_file(&client, "x", 1).await, Err(CallError::Closed));
}

#[tokio::test(start_paused = true)]
async fn closing_fails_everything_under_way() {
    let (link, service) = guest();
    let client = Wire::new(&link, vec![]).client();
    let mut reader = client.output(stdout("a"), 0);
    let calling = client.clone();
    let waiting = tokio::spawn(async move {
        calling
            .call::<_, ResourcesResponse>(SANDBOX, "Resources", &ResourcesRequest::new())
            .await
    });
    service.started.notified().await;
    client.close();
    assert_eq!(waiting.await.unwrap().map(|_| ()), Err(CallError::Closed));
    assert_eq!(reader.next().await, Err(StreamError::Closed));
    assert_eq!(
        client.input(stdin("a"), 0).write(b"x").await,
        Err(StreamError::Closed)
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_stream_stops_its_writer_until_the_host_took_something() {
    let (link, _) = guest();
    let sink = Arc::new(link.output(stdout("a")));
    sink.write(&vec![1; super::OUTPUT_CAPACITY]).await.unwrap();
    let writing = {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move { sink.write(b"more").await })
    };
    let client = Wire::new(&link, vec![]).client();
    let mut reader = client.output(stdout("a"), 0);
    let chunk = reader.next().await.unwrap().unwrap();
    // Taken but not acknowledged makes no room.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!writing.is_finished());
    assert_eq!(link.streams()[0].end, super::OUTPUT_CAPACITY as u64);
    reader.ack(chunk.end());
    writing.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_guest_knows_when_the_host_has_everything() {
    let (link, _) = guest();
    let sink = Arc::new(link.output(stdout("a")));
    sink.write(b"hello").await.unwrap();
    sink.close();
    assert_eq!(sink.write(b"more").await, Err(StreamError::Closed));
    let client = Wire::new(&link, vec![]).client();
    let drained = {
        let sink = Arc::clone(&sink);
        tokio::spawn(async move { sink.drained().await })
    };
    let mut reader = client.output(stdout("a"), 0);
    assert_eq!(reader.next().await.unwrap().unwrap().data, "hello");
    assert_eq!(reader.next().await.unwrap(), None);
    assert!(!drained.is_finished());
    reader.ack(5);
    drained.await.unwrap().unwrap();
    link.remove(&stdout("a"));
    assert_eq!(link.streams(), []);
    assert_eq!(sink.drained().await, Err(StreamError::Closed));
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_gone_are_an_error_and_not_a_hole() {
    let (link, _) = guest();
    write_all(&link, stdout("a"), pattern(1000));
    let client = Wire::new(&link, vec![]).client();
    let mut got = Vec::new();
    read_some(&client, stdout("a"), &mut got, usize::MAX).await;
    let mut reader = client.output(stdout("a"), 0);
    assert_eq!(
        reader.next().await,
        Err(StreamError::Gone {
            first: 1000,
            end: 1000
        })
    );
}

#[tokio::test(start_paused = true)]
async fn a_reader_may_come_before_its_stream() {
    let (link, _) = guest();
    let client = Wire::new(&link, vec![]).client();
    let mut reader = client.output(stdout("a"), 0);
    assert_eq!(get_file(&client, "x", 1).await.unwrap(), b"x");
    write_all(&link, stdout("a"), b"late".to_vec());
    assert_eq!(reader.next().await.unwrap().unwrap().data, "late");
}

#[tokio::test(start_paused = true)]
async fn input_waits_for_a_process_that_does_not_read() {
    let (link, _) = guest();
    let client = Wire::new(&link, vec![]).client();
    let mut source = link.input(stdin("a"));
    let bytes = pattern(super::INPUT_CAPACITY + super::INPUT_WINDOW as usize + 10);
    let writer = client.input(stdin("a"), 0);
    let written = bytes.clone();
    let writing = tokio::spawn(async move {
        writer.write(&written).await.unwrap();
        writer.close();
        writer.drained().await.unwrap();
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!writing.is_finished());
    let mut got = Vec::new();
    while let Some(data) = source.read().await {
        got.extend_from_slice(&data);
    }
    assert!(got == bytes);
    writing.await.unwrap();
}

/// Any faults, of which most hit somewhere in what the test moves.
fn faults(moved: usize) -> impl Strategy<Value = Vec<Fault>> {
    let offset = 0..moved;
    let fault = (
        proptest::option::weighted(0.8, (offset.clone(), offset.clone())),
        proptest::collection::vec(offset.clone(), 0..3),
        proptest::collection::vec(offset, 0..3),
    );
    let fault = fault.prop_map(|(cut, to_guest, to_host)| Fault {
        cut,
        garble: (to_guest, to_host),
    });
    proptest::collection::vec(fault, 0..8)
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        // Paused: runs out at once when nothing moves any more.
        tokio::time::timeout(Duration::from_secs(600), test)
            .await
            .expect("nothing moves any more")
    })
}

proptest! {
    /// One host process over channels that break: every byte once and in order in
    /// both directions, every call done once and answered.
    #[test]
    fn nothing_is_lost_or_doubled_over_broken_channels(
        faults in faults(60_000),
        out_len in 0..150_000usize,
        in_len in 0..50_000usize,
        calls in 1..20u32,
    ) {
        run(async move {
            let (link, service) = guest();
            let client = Wire::new(&link, faults).client();
            write_all(&link, stdout("a"), pattern(out_len));
            let mut source = link.input(stdin("a"));
            let output = {
                let client = client.clone();
                tokio::spawn(async move {
                    let mut got = Vec::new();
                    read_some(&client, stdout("a"), &mut got, usize::MAX).await;
                    got
                })
            };
            let writer = client.input(stdin("a"), 0);
            let input = tokio::spawn(async move {
                writer.write(&pattern(in_len)).await.unwrap();
                writer.close();
                writer.drained().await.unwrap();
            });
            let calling = {
                let client = client.clone();
                tokio::spawn(async move {
                    for call in 0..calls {
                        let path = format!("file-{call}");
                        assert_eq!(get_file(&client, &path, 100).await.unwrap(), path.repeat(100).as_bytes());
                    }
                })
            };
            let mut read = Vec::new();
            while let Some(data) = source.read().await {
                read.extend_from_slice(&data);
            }
            assert!(read == pattern(in_len));
            input.await.unwrap();
            assert!(output.await.unwrap() == pattern(out_len));
            calling.await.unwrap();
            let done = service.done.lock().unwrap();
            assert_eq!(done.len(), calls as usize);
            assert!(done.values().all(|times| *times == 1));
        });
    }

    /// Host processes that follow each other, each going on at the offset where the
    /// last one stood, over channels that break.
    #[test]
    fn the_next_host_goes_on_where_the_last_one_stood(
        faults in faults(60_000),
        len in 0..200_000usize,
        stops in proptest::collection::vec(0..200_000usize, 0..5),
    ) {
        run(async move {
            let (link, _) = guest();
            let wire = Wire::new(&link, faults);
            write_all(&link, stdout("a"), pattern(len));
            let mut got = Vec::new();
            for stop in stops.into_iter().chain([usize::MAX]) {
                let client = wire.client();
                read_some(&client, stdout("a"), &mut got, stop).await;
            }
            assert!(got == pattern(len));
        });
    }
}

mod codec {
    use bytes::Bytes;
    use proptest::prelude::*;

    use crate::link::frame::{Decoder, Frame, FrameError, MAX_ANSWER, MAX_CHUNK, encode};
    use crate::link::{StdFd, StreamKey};

    fn decode(mut wire: &[u8]) -> Vec<Result<Frame, FrameError>> {
        let mut decoder = Decoder::new(MAX_ANSWER);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next(&mut wire) {
            frames.push(frame);
        }
        frames
    }

    fn wire(frame: &Frame) -> Vec<u8> {
        let mut out = Vec::new();
        encode(frame, &mut out);
        out
    }

    /// A body with a right checksum, whatever it says.
    fn wire_of_body(fields: &[u8]) -> Vec<u8> {
        let sum = crc32fast::hash(fields).to_le_bytes();
        let mut out = cobs::encode_vec(&[fields, &sum].concat());
        out.push(0);
        out
    }

    fn bytes() -> impl Strategy<Value = Bytes> {
        let byte = prop_oneof![Just(0u8), Just(1), any::<u8>()];
        let run = (byte, 1..600usize).prop_map(|(byte, times)| vec![byte; times]);
        let any = proptest::collection::vec(any::<u8>(), 0..600);
        let piece = prop_oneof![run, any];
        proptest::collection::vec(piece, 0..4).prop_map(|pieces| Bytes::from(pieces.concat()))
    }

    fn key() -> impl Strategy<Value = StreamKey> {
        let fd = prop_oneof![Just(StdFd::Stdin), Just(StdFd::Stdout), Just(StdFd::Stderr)];
        (".{0,20}", proptest::option::of(".{0,20}"), fd).prop_map(|(container_id, exec_id, fd)| {
            StreamKey {
                container_id,
                exec_id,
                fd,
            }
        })
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let outstanding = proptest::collection::vec(any::<u64>(), 0..5);
        prop_oneof![
            (any::<u32>(), any::<u64>(), any::<u64>(), outstanding).prop_map(
                |(version, session, attempt, outstanding)| Frame::Hello {
                    version,
                    session,
                    attempt,
                    outstanding
                }
            ),
            (any::<u32>(), any::<u64>(), any::<u64>(), ".{0,40}").prop_map(
                |(version, session, attempt, boot_id)| Frame::HelloAck {
                    version,
                    session,
                    attempt,
                    boot_id
                }
            ),
            Just(Frame::Resync),
            (any::<u64>(), ".{0,40}", ".{0,40}", bytes()).prop_map(
                |(id, service, method, payload)| Frame::Request {
                    id,
                    service,
                    method,
                    payload
                }
            ),
            (any::<u64>(), any::<i32>(), ".{0,40}", bytes()).prop_map(
                |(id, code, message, payload)| Frame::Response {
                    id,
                    code,
                    message,
                    payload
                }
            ),
            any::<u64>().prop_map(|id| Frame::Answered { id }),
            (key(), any::<u64>(), bytes(), any::<bool>()).prop_map(|(key, offset, data, eof)| {
                Frame::Data {
                    key,
                    offset,
                    data,
                    eof,
                }
            }),
            (key(), any::<u64>(), any::<u32>(), any::<bool>()).prop_map(
                |(key, offset, window, resume)| Frame::Ack {
                    key,
                    offset,
                    window,
                    resume
                }
            ),
            (key(), any::<u64>(), any::<u64>()).prop_map(|(key, first, end)| Frame::Gone {
                key,
                first,
                end
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_frame_survives_the_wire_in_any_pieces(
            frames in proptest::collection::vec(frame(), 1..6),
            piece in 1..300usize,
        ) {
            let mut out = Vec::new();
            frames.iter().for_each(|frame| encode(frame, &mut out));
            let mut decoder = Decoder::new(MAX_ANSWER);
            let mut got = Vec::new();
            for mut piece in out.chunks(piece) {
                while let Some(frame) = decoder.next(&mut piece) {
                    got.push(frame.unwrap());
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn our_cobs_is_that_of_the_cobs_crate(frame in frame()) {
            let out = wire(&frame);
            let (delimiter, encoded) = out.split_last().unwrap();
            prop_assert_eq!(*delimiter, 0);
            let body = cobs::decode_vec(encoded).unwrap();
            prop_assert_eq!(cobs::encode_vec(&body), encoded);
        }

        #[test]
        fn garbage_is_never_a_frame_and_never_ends_the_decoder(
            garbage in proptest::collection::vec(any::<u8>(), 0..2000),
            frame in frame(),
        ) {
            let stream = [garbage, vec![0], wire(&frame)].concat();
            let mut frames = decode(&stream);
            prop_assert_eq!(frames.pop(), Some(Ok(frame)));
            prop_assert!(frames.iter().all(Result::is_err));
        }

        #[test]
        fn a_changed_byte_spoils_its_frame_only(first in frame(), second in frame(), at: usize, add in 1..=255u8) {
            let mut out = wire(&first);
            let at = at % (out.len() - 1);
            out[at] = out[at].wrapping_add(add);
            out.extend(wire(&second));
            let mut frames = decode(&out);
            prop_assert_eq!(frames.pop(), Some(Ok(second)));
            prop_assert!(frames.iter().all(Result::is_err));
        }

        #[test]
        fn a_frame_cut_anywhere_is_an_error(frame in frame(), at: usize) {
            let mut out = wire(&frame);
            out.truncate(at % (out.len() - 1));
            prop_assert_eq!(decode(&out), []);
            out.push(0);
            prop_assert!(decode(&out).iter().all(Result::is_err));
        }
    }

    #[test]
    fn blocks_of_254_bytes_are_encoded_as_the_crate_does() {
        for len in [252, 253, 254, 255, 507, 508, 509, 510] {
            for tail in [&[][..], &[0], &[0, 1], &[1, 0]] {
                let data = Bytes::from([&vec![7; len][..], tail].concat());
                let payload = data.clone();
                let frame = Frame::Request {
                    id: u64::MAX,
                    service: String::new(),
                    method: String::new(),
                    payload,
                };
                let out = wire(&frame);
                let body = cobs::decode_vec(&out[..out.len() - 1]).unwrap();
                assert_eq!(
                    cobs::encode_vec(&body),
                    out[..out.len() - 1],
                    "{len} {tail:?}"
                );
                assert_eq!(decode(&out), [Ok(frame)]);
            }
        }
    }

    #[test]
    fn runs_of_zeros_are_encoded_as_the_crate_does_and_come_in_any_pieces() {
        for zeros in [1, 2, 253, 254, 255, 5000] {
            for (before, after) in [(0, 0), (1, 0), (254, 1), (3, 300)] {
                let data = [vec![9; before], vec![0; zeros], vec![1; after]].concat();
                let frame = Frame::Data {
                    key: StreamKey::new("c", None, StdFd::Stdout),
                    offset: 0,
                    data: Bytes::from(data),
                    eof: false,
                };
                let out = wire(&frame);
                let body = cobs::decode_vec(&out[..out.len() - 1]).unwrap();
                assert_eq!(cobs::encode_vec(&body), out[..out.len() - 1]);
                for size in [1, 7, 64, out.len()] {
                    let mut decoder = Decoder::new(MAX_ANSWER);
                    let mut found = Vec::new();
                    for mut piece in out.chunks(size) {
                        found.extend(std::iter::from_fn(|| decoder.next(&mut piece)));
                    }
                    assert_eq!(found, [Ok(frame.clone())], "{zeros} {before} {after}");
                }
            }
        }
        // More than a receiver takes is refused as before.
        let mut decoder = Decoder::new(100);
        let out = [&[2, 7][..], &[1; 500], &[0]].concat();
        assert_eq!(decoder.next(&mut &out[..]), Some(Err(FrameError::Oversize)));
    }

    #[test]
    fn each_defect_has_its_error() {
        let resync = wire(&Frame::Resync);
        assert_eq!(decode(&resync), [Ok(Frame::Resync)]);
        assert_eq!(decode(&[5, 1, 0]), [Err(FrameError::Truncated)]);
        assert_eq!(
            decode(&[3, 1, 2, 0]),
            [Err(FrameError::Malformed)],
            "too short for a checksum"
        );
        let mut wrong = resync.clone();
        wrong[1] ^= 0x40;
        assert_eq!(decode(&wrong), [Err(FrameError::Checksum)]);
        assert_eq!(
            decode(&wire_of_body(&[200])),
            [Err(FrameError::UnknownType(200))]
        );
        assert_eq!(decode(&wire_of_body(&[])), [Err(FrameError::Malformed)]);
        assert_eq!(
            decode(&wire_of_body(&[3, 9])),
            [Err(FrameError::Malformed)],
            "RESYNC has no fields"
        );
        assert_eq!(
            decode(&wire_of_body(&[6, 1, 2])),
            [Err(FrameError::Malformed)],
            "id is cut"
        );
        let text_too_long = [&[5][..], &[1; 8], &[0; 4], &[255, 255], b"abc"].concat();
        assert_eq!(
            decode(&wire_of_body(&text_too_long)),
            [Err(FrameError::Malformed)]
        );
        let not_utf8 = [&[5][..], &[1; 8], &[0; 4], &[1, 0], &[0xff]].concat();
        assert_eq!(
            decode(&wire_of_body(&not_utf8)),
            [Err(FrameError::Malformed)]
        );
        let fd_3 = [&[9][..], &[1, 0], b"c", &[0], &[0, 0], &[3], &[0; 16]].concat();
        assert_eq!(decode(&wire_of_body(&fd_3)), [Err(FrameError::Malformed)]);
        let flag_2 = [&[9][..], &[1, 0], b"c", &[2], &[0, 0], &[1], &[0; 16]].concat();
        assert_eq!(decode(&wire_of_body(&flag_2)), [Err(FrameError::Malformed)]);
        let key = StreamKey::new("c", None, StdFd::Stdout);
        let data = Bytes::from(vec![1; MAX_CHUNK + 1]);
        let too_much = Frame::Data {
            key,
            offset: 0,
            data,
            eof: false,
        };
        assert_eq!(decode(&wire(&too_much)), [Err(FrameError::Malformed)]);
    }

    #[test]
    fn an_oversize_frame_is_skipped_without_being_kept() {
        for filler in [0xffu8, 1] {
            let mut decoder = Decoder::new(MAX_ANSWER);
            let endless = vec![filler; MAX_ANSWER];
            for _ in 0..3 {
                assert!(decoder.next(&mut &endless[..]).is_none());
            }
            assert!(decoder.capacity() <= 2 * MAX_ANSWER);
            assert_eq!(decoder.next(&mut &[0][..]), Some(Err(FrameError::Oversize)));
            assert_eq!(
                decoder.next(&mut &wire(&Frame::Resync)[..]),
                Some(Ok(Frame::Resync))
            );
        }
    }
}
