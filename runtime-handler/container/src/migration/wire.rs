//! What two shims say to each other: frames, and the messages in them.
//!
//! ```text
//!  +--------+------+-------+---------...
//!  | length | kind | crc32 | payload        length, crc32: 4 bytes, little endian
//!  +--------+------+-------+---------...    crc32 of kind and payload
//! ```
//! A control frame holds one [`Message`] as JSON, a data frame bytes that the message
//! before announced. Nothing is believed of a peer: lengths are bounded before anything
//! is reserved for them, and what does not fit ends the connection.

use std::collections::BTreeMap;
use std::time::Duration;

use dyad_runtime_handler::error::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::plan::Manifest;
use super::tree::Entry;

/// Both sides must speak the same; there is no other yet.
pub(crate) const PROTOCOL: u32 = 1;
/// Longest payload.
const PAYLOAD_MAX: usize = 4 << 20;
/// Bytes of a file in one frame.
pub(crate) const CHUNK: usize = 256 << 10;
/// Longest blob: the pod's record, a stdin.
pub(crate) const BLOB_MAX: u64 = 16 << 20;

const CONTROL: u8 = 1;
const DATA: u8 = 2;

/// Why a source connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Purpose {
    /// To ask whether it could move.
    Check,
    /// To move.
    Move,
    /// To ask how the attempt ended whose connection broke.
    Ask,
}

/// Which directory a tree of files is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// The writable layer of a container.
    Layer { container: String },
    /// The volume that a container has at `destination`.
    Volume {
        container: String,
        destination: String,
    },
    /// CRIU's images; `set` is `dump`, or a pre-dump before it.
    Images { container: String, set: String },
}

/// What a container goes on with beside its images and files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Goes {
    /// Length of what it has not read of its stdin; data frames follow the message.
    pub stdin: u64,
    pub stdin_closed: bool,
}

/// How an attempt ended on the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// The pod runs there.
    Running,
    /// It does not and never will.
    Aborted { reason: String },
}

/// A control frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// Source, first of all.
    Hello {
        protocol: u32,
        /// The identity that the target waits for.
        source: String,
        /// Tells this attempt from others.
        attempt: String,
        purpose: Purpose,
    },
    /// Either, after the greeting: its side of the pod.
    Manifest(Box<Manifest>),
    /// Target: it can take it.
    Accept,
    /// Target: it cannot.
    Refuse { reason: String },
    /// Source: entries of a tree follow, to `End`.
    Tree { place: Place },
    /// Source: one file; of a regular one, data frames of its size follow.
    Entry(Entry),
    /// Source: this file is there no more.
    Removed { path: String },
    /// Source: the tree is whole.
    End,
    /// Source: all is there; run it. The pod's record and the stdins follow as data, in
    /// this order, and `End`. From here on only the target knows where the pod runs.
    Commit {
        pod: u64,
        tcp_established: bool,
        containers: BTreeMap<String, Goes>,
    },
    /// Target: the end.
    Outcome(Outcome),
    /// Source: it knows; the target may forget.
    Known,
}

impl Message {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Manifest(_) => "manifest",
            Self::Accept => "accept",
            Self::Refuse { .. } => "refuse",
            Self::Tree { .. } => "tree",
            Self::Entry(_) => "entry",
            Self::Removed { .. } => "removed",
            Self::End => "end",
            Self::Commit { .. } => "commit",
            Self::Outcome(_) => "outcome",
            Self::Known => "known",
        }
    }

    /// The error for a message that does not belong here.
    pub(crate) fn unexpected(&self, wanted: &str) -> Error {
        broken(format!("{} came where {wanted} should", self.name()))
    }
}

/// Anything that carries bytes both ways.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to the other shim.
pub(crate) struct Wire {
    stream: Box<dyn Stream>,
    limit: Option<Limit>,
    /// Bytes of data frames sent or received.
    pub data_bytes: u64,
}

/// Bytes per second.
struct Limit {
    rate: u64,
    /// When what was sent so far may be over.
    paid: Instant,
}

impl Limit {
    /// Waits until `bytes` more fit.
    async fn pay(&mut self, bytes: usize) {
        let now = Instant::now();
        // What was not used is lost, or a pause would allow a burst.
        self.paid = self.paid.max(now) + cost(bytes as u64, self.rate);
        tokio::time::sleep_until(self.paid).await;
    }
}

/// How long `bytes` take at `rate` bytes per second.
fn cost(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX))
}

impl Wire {
    pub(crate) fn new(stream: impl Stream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            limit: None,
            data_bytes: 0,
        }
    }

    /// Bounds what is sent, in bytes per second; 0: not.
    pub(crate) fn limit(&mut self, rate: u64) {
        self.limit = (rate > 0).then(|| Limit {
            rate,
            paid: Instant::now(),
        });
    }

    /// # Errors
    /// The connection broke.
    pub(crate) async fn send(&mut self, message: &Message) -> Result<()> {
        let payload = serde_json::to_vec(message)
            .context(|| format!("write the message {}", message.name()))?;
        self.frame(CONTROL, &payload).await?;
        self.stream.flush().await.context(context)
    }

    /// Sends bytes that a message has announced, no more than [`CHUNK`].
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) async fn data(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(limit) = &mut self.limit {
            limit.pay(bytes.len()).await;
        }
        self.data_bytes += bytes.len() as u64;
        self.frame(DATA, bytes).await
    }

    /// Sends a whole blob as data.
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) async fn blob(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.data(chunk).await?;
        }
        Ok(())
    }

    async fn frame(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        if payload.len() > PAYLOAD_MAX {
            return Err(broken(format!("a message of {} bytes", payload.len())));
        }
        let length = payload.len() as u32;
        let mut head = [0; 9];
        head[..4].copy_from_slice(&length.to_le_bytes());
        head[4] = kind;
        head[5..].copy_from_slice(&checksum(kind, payload).to_le_bytes());
        self.stream.write_all(&head).await.context(context)?;
        self.stream.write_all(payload).await.context(context)
    }

    /// The next message.
    ///
    /// # Errors
    /// The connection broke, or what came is none.
    pub(crate) async fn receive(&mut self) -> Result<Message> {
        match self.read_frame().await? {
            (CONTROL, payload) => {
                serde_json::from_slice(&payload).context(|| "understand the other node".into())
            }
            (kind, _) => Err(broken(format!(
                "frame of kind {kind} where a message should be"
            ))),
        }
    }

    /// The next part of announced bytes, at most `most`.
    ///
    /// # Errors
    /// The connection broke, or what came is none of it.
    pub(crate) async fn receive_data(&mut self, most: u64) -> Result<Vec<u8>> {
        match self.read_frame().await? {
            (DATA, payload) if payload.is_empty() || payload.len() as u64 > most => {
                Err(broken(format!(
                    "{} bytes of data where 1 to {most} were announced",
                    payload.len()
                )))
            }
            (DATA, payload) => {
                self.data_bytes += payload.len() as u64;
                Ok(payload)
            }
            (kind, _) => Err(broken(format!("frame of kind {kind} where data should be"))),
        }
    }

    /// A whole blob of announced length.
    ///
    /// # Errors
    /// As [`Self::receive_data`]; it is longer than any is.
    pub(crate) async fn receive_blob(&mut self, length: u64) -> Result<Vec<u8>> {
        if length > BLOB_MAX {
            return Err(broken(format!("a blob of {length} bytes")));
        }
        let mut blob = Vec::new();
        while (blob.len() as u64) < length {
            let part = self.receive_data(length - blob.len() as u64).await?;
            blob.extend_from_slice(&part);
        }
        Ok(blob)
    }

    async fn read_frame(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.context(context)?;
        let [l0, l1, l2, l3, kind, c0, c1, c2, c3] = head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > PAYLOAD_MAX {
            return Err(broken(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        self.stream
            .read_exact(&mut payload)
            .await
            .context(context)?;
        if checksum(kind, &payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(broken("a frame whose checksum is wrong".into()));
        }
        Ok((kind, payload))
    }
}

fn checksum(kind: u8, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(payload);
    hasher.finalize()
}

fn context() -> String {
    "talk to the other node".into()
}

/// What came is nothing that this side understands.
pub(crate) fn broken(what: String) -> Error {
    Error::other(context(), what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Wire, Wire) {
        let (a, b) = tokio::io::duplex(64 << 10);
        (Wire::new(a), Wire::new(b))
    }

    /// What the other side makes of these bytes.
    async fn received(bytes: &[u8]) -> Result<Message> {
        let (mut a, b) = tokio::io::duplex(64 << 10);
        a.write_all(bytes).await.unwrap();
        drop(a);
        Wire::new(b).receive().await
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
        bytes.push(kind);
        bytes.extend_from_slice(&checksum(kind, payload).to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    #[tokio::test]
    async fn messages_and_data_arrive_in_order() {
        let (mut a, mut b) = pair();
        let hello = Message::Hello {
            protocol: PROTOCOL,
            source: "s".into(),
            attempt: "a".into(),
            purpose: Purpose::Move,
        };
        let blob: Vec<u8> = (0..u8::MAX).cycle().take(CHUNK + 10).collect();
        let sender = async {
            a.send(&hello).await.unwrap();
            a.blob(&blob).await.unwrap();
            a.send(&Message::End).await.unwrap();
        };
        let receiver = async {
            assert_eq!(b.receive().await.unwrap(), hello);
            assert!(b.receive_blob(blob.len() as u64).await.unwrap() == blob);
            assert_eq!(b.receive().await.unwrap(), Message::End);
        };
        tokio::join!(sender, receiver);
        assert_eq!(
            (a.data_bytes, b.data_bytes),
            (CHUNK as u64 + 10, CHUNK as u64 + 10)
        );
    }

    #[tokio::test]
    async fn foreign_bytes_are_refused() {
        let mut flipped = frame(CONTROL, b"\"end\"");
        *flipped.last_mut().unwrap() ^= 1;
        let mut other_kind = frame(CONTROL, b"\"end\"");
        other_kind[4] = DATA;
        let mut huge = frame(CONTROL, b"\"end\"");
        huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        for (bytes, says) in [
            (Vec::new(), "eof"),
            (frame(CONTROL, b"\"end\"")[..7].to_vec(), "eof"),
            (frame(CONTROL, b"\"end\"")[..11].to_vec(), "eof"),
            (flipped, "checksum"),
            (other_kind, "checksum"),
            (huge, "frame of 4294967295 bytes"),
            (frame(9, b"\"end\""), "kind 9"),
            (frame(DATA, b"\"end\""), "kind 2"),
            (frame(CONTROL, b"\"nothing\""), "unknown variant"),
            (frame(CONTROL, b"{\"hello\":{}}"), "missing field"),
            (frame(CONTROL, &[0xff; 9]), "understand"),
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "frame of"),
        ] {
            let error = received(&bytes).await.unwrap_err().chain();
            assert!(error.contains(says), "{error} for {bytes:?}");
        }
        assert_eq!(
            received(&frame(CONTROL, b"\"end\"")).await.unwrap(),
            Message::End
        );
    }

    #[tokio::test]
    async fn more_data_than_announced_is_refused() {
        let (mut a, mut b) = pair();
        a.data(b"12345").await.unwrap();
        assert!(b.receive_data(4).await.is_err());
        a.data(b"").await.unwrap();
        assert!(b.receive_data(4).await.is_err(), "would never end");
        a.send(&Message::End).await.unwrap();
        assert!(b.receive_data(4).await.is_err());
        let error = b.receive_blob(BLOB_MAX + 1).await.unwrap_err().chain();
        assert!(error.contains("blob of"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_kept_and_pauses_are_not_saved_up() {
        let (mut a, mut b) = pair();
        a.limit(1000);
        tokio::time::sleep(Duration::from_secs(100)).await;
        let start = Instant::now();
        for _ in 0..10 {
            a.data(&[0; 500]).await.unwrap();
            b.receive_data(500).await.unwrap();
        }
        let took = start.elapsed();
        assert!(
            (Duration::from_secs(5)..Duration::from_millis(5100)).contains(&took),
            "{took:?}"
        );
        assert_eq!(cost(1, 0), Duration::from_secs(1));
    }

    proptest::proptest! {
        /// Bytes of a peer are messages or an error, at once and without much memory.
        #[test]
        fn fuzz_wire(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            kind in 0_u8..4,
            honest in proptest::prelude::any::<bool>(),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut sent = Vec::new();
                if honest {
                    // A whole frame, so that what is in it is parsed.
                    let mut sum = crc32fast::Hasher::new();
                    sum.update(&[kind]);
                    sum.update(&bytes);
                    sent.extend((bytes.len() as u32).to_le_bytes());
                    sent.push(kind);
                    sent.extend(sum.finalize().to_le_bytes());
                }
                sent.extend(&bytes);
                for data in [false, true] {
                    let (mut peer, own) = tokio::io::duplex(1 << 12);
                    peer.write_all(&sent).await.unwrap();
                    drop(peer);
                    let mut wire = Wire::new(own);
                    if data {
                        let _ = wire.receive_data(100).await;
                    } else {
                        let _ = wire.receive().await;
                    }
                }
            });
        }
    }
}
