//! A guest whose agent was replaced, against the real host's half of the link: whatever it
//! sends, the shim's memory and log stay bounded, and nothing panics.
//!
//! One test, for it counts what this process allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dyad_agent_api::link::host::{BoxReader, BoxWriter, Client};
use dyad_agent_api::link::{Decoder, Frame, MAX_REQUEST, StdFd, StreamKey, VERSION, encode};
use dyad_agent_api::proto::agent::{StreamsRequest, StreamsResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// What the host's half may take beside what it had. A frame has 4 MiB, and is held twice
/// while it grows.
const MEMORY_MAX: usize = 20 << 20;
/// What it may log of one guest.
const LOG_MAX: usize = 16 << 10;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: the system's allocator does the work; this only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as our caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as our caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts what is logged.
struct Log(Mutex<usize>);

static LOG: Log = Log(Mutex::new(0));

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        *self.0.lock().unwrap() += record.args().to_string().len();
    }

    fn flush(&self) {}
}

/// The guest's end, after the greeting.
struct Guest {
    channel: DuplexStream,
    session: u64,
}

impl Guest {
    /// Reads until the host sends a frame that `wanted` takes.
    async fn wait_for<T>(channel: &mut DuplexStream, wanted: impl Fn(Frame) -> Option<T>) -> T {
        let mut decoder = Decoder::new(MAX_REQUEST);
        let mut buffer = vec![0; 4096];
        loop {
            let length = channel.read(&mut buffer).await.unwrap();
            assert!(length > 0, "the host went away");
            let mut bytes = &buffer[..length];
            while let Some(frame) = decoder.next(&mut bytes) {
                if let Some(found) = frame.ok().and_then(&wanted) {
                    return found;
                }
            }
        }
    }

    async fn greet(mut channel: DuplexStream) -> Self {
        let (session, attempt) = Self::wait_for(&mut channel, |frame| match frame {
            Frame::Hello {
                session, attempt, ..
            } => Some((session, attempt)),
            _ => None,
        })
        .await;
        let mut guest = Self { channel, session };
        guest
            .send(&[Frame::HelloAck {
                version: VERSION,
                session,
                attempt,
                boot_id: "b".into(),
            }])
            .await;
        guest
    }

    async fn send(&mut self, frames: &[Frame]) {
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| encode(frame, &mut bytes));
        self.channel.write_all(&bytes).await.unwrap();
    }

    /// Sends `frame` `times` times, and reads nothing.
    async fn flood(&mut self, times: usize, mut frame: impl FnMut(u64) -> Frame) {
        let mut bytes = Vec::new();
        for number in 0..times as u64 {
            encode(&frame(number), &mut bytes);
            if bytes.len() >= 32 << 10 || number + 1 == times as u64 {
                self.channel.write_all(&bytes).await.unwrap();
                bytes.clear();
            }
        }
    }
}

/// A link, its guest's end, and what both held when they had met.
async fn met() -> (Client, Guest, usize) {
    let (to_guest, mut channels) = tokio::sync::mpsc::unbounded_channel();
    let client = Client::new(move || {
        let (host, guest) = tokio::io::duplex(64 << 10);
        let _ = to_guest.send(guest);
        async move {
            let (reader, writer) = tokio::io::split(host);
            Ok((Box::new(reader) as BoxReader, Box::new(writer) as BoxWriter))
        }
    });
    let guest = Guest::greet(channels.recv().await.unwrap()).await;
    client.ready(Duration::from_secs(10)).await.unwrap();
    *LOG.0.lock().unwrap() = 0;
    let held = HELD.load(Ordering::Relaxed);
    PEAK.store(held, Ordering::Relaxed);
    (client, guest, held)
}

fn check(what: &str, held: usize) {
    let taken = PEAK.load(Ordering::Relaxed).saturating_sub(held);
    let logged = *LOG.0.lock().unwrap();
    println!("{what}: {} KiB, {logged} bytes of log", taken >> 10);
    assert!(taken < MEMORY_MAX, "{what}: {} MiB", taken >> 20);
    assert!(logged < LOG_MAX, "{what}: {logged} bytes of log");
}

fn key(container: &str, fd: StdFd) -> StreamKey {
    StreamKey::new(container, None, fd)
}

#[tokio::test]
async fn a_hostile_guest_grows_neither_the_shim_nor_its_log() {
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let request = StreamsRequest::new();

    let (_client, mut guest, held) = met().await;
    guest
        .flood(1 << 20, |id| Frame::Response {
            id,
            code: 0,
            message: String::new(),
            payload: Default::default(),
        })
        .await;
    check("answers to what nobody asked", held);

    let (client, mut guest, held) = met().await;
    let _input = client.input(key("c", StdFd::Stdin), 100);
    guest
        .flood(1 << 18, |_| Frame::Ack {
            key: key("c", StdFd::Stdin),
            offset: 7,
            window: 1,
            resume: true,
        })
        .await;
    check("input asked for that is gone", held);

    // An id that fits, and one that must not be kept.
    for length in [1000, 60_000] {
        let (_client, mut guest, held) = met().await;
        let long = "x".repeat(length);
        guest
            .flood(2048, |number| Frame::Ack {
                key: key(&format!("{number}{long}"), StdFd::Stdin),
                offset: 0,
                window: 1,
                resume: true,
            })
            .await;
        check("streams that nobody has", held);
    }

    let (client, mut guest, held) = met().await;
    let names: Vec<String> = (0..6).map(|number| format!("c{number}")).collect();
    let readers: Vec<_> = names
        .iter()
        .map(|name| client.output(key(name, StdFd::Stdout), 0))
        .collect();
    // Until it is asked for, nothing may come.
    Guest::wait_for(&mut guest.channel, |frame| match frame {
        Frame::Ack { key, .. } if key.container_id == "c5" => Some(()),
        _ => None,
    })
    .await;
    for name in &names {
        guest
            .flood(128 << 10, |offset| Frame::Data {
                key: key(name, StdFd::Stdout),
                offset,
                data: b"x".as_slice().into(),
                eof: false,
            })
            .await;
    }
    check("output byte by byte, which nobody reads", held);
    drop(readers);

    let (_client, mut guest, held) = met().await;
    let payload = vec![7; 3 << 20];
    for id in 0..16 {
        guest
            .send(&[Frame::Request {
                id,
                service: "s".repeat(60_000),
                method: "m".into(),
                payload: payload.clone().into(),
            }])
            .await;
    }
    drop(payload);
    check("calls, which are the host's", held);

    for fields in [[0x0a, 0x00].as_slice(), &[0xf8, 0x07, 0x01]] {
        let (client, mut guest, _) = met().await;
        let payload = fields.repeat((3 << 20) / fields.len());
        let held = HELD.load(Ordering::Relaxed);
        PEAK.store(held, Ordering::Relaxed);
        let call = client.call::<_, StreamsResponse>("s", "Streams", &request);
        let answer = async {
            let id = Guest::wait_for(&mut guest.channel, |frame| match frame {
                Frame::Request { id, .. } => Some(id),
                _ => None,
            })
            .await;
            guest
                .send(&[Frame::Response {
                    id,
                    code: 0,
                    message: String::new(),
                    payload: payload.into(),
                }])
                .await;
        };
        let (answer, ()) = tokio::join!(call, answer);
        let error = answer.unwrap_err().to_string();
        assert!(error.contains("fields"), "{error}");
        check("millions of fields", held);
    }

    let (client, mut guest, held) = met().await;
    let call = client.call::<_, StreamsResponse>("s", "Streams", &request);
    let refusal = [Frame::Response {
        id: 1,
        code: 2,
        message: "é".repeat(30_000),
        payload: Default::default(),
    }];
    let (answer, ()) = tokio::join!(call, guest.send(&refusal));
    assert!(answer.unwrap_err().to_string().len() <= 4096);
    check("a refusal of many words", held);

    // Boots that follow each other, which end all calls: it greets for ever.
    let (_client, mut guest, held) = met().await;
    let mut seed = 1_u64;
    for boot in 0..300_u64 {
        guest.send(&[Frame::Resync]).await;
        let session = guest.session;
        let attempt = Guest::wait_for(&mut guest.channel, |frame| match frame {
            Frame::Hello { attempt, .. } => Some(attempt),
            _ => None,
        })
        .await;
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        guest
            .send(&[Frame::HelloAck {
                version: VERSION,
                session,
                attempt,
                boot_id: format!("{boot}{}", "b".repeat(seed as usize % 900)),
            }])
            .await;
    }
    check("boots without end", held);
}
