//! The frames of the link and their bytes. Pure.
//!
//! ```text
//! body   = type:u8  fields…  crc32(type fields…):u32        integers little endian
//! wire   = COBS(body) 0x00
//! ```
//! COBS leaves no zero byte in the encoded body, so 0x00 always ends a frame: a
//! receiver that starts in the middle, or behind garbage, is in step again at the next one.
//! Encoder and decoder work on runs of bytes, not on single ones as the `cobs` crate
//! does: in a guest without hardware virtualization that is most of the channel's
//! cost. The tests hold them against that crate.

use std::fmt;

use bytes::Bytes;

use super::{StdFd, StreamKey};

/// The largest body that a guest takes; checked while decoding, before memory is taken
/// for it. It holds the files of a volume.
pub const MAX_REQUEST: usize = 32 << 20;

/// The largest body that a host takes. Less, since guests are not trusted.
pub const MAX_ANSWER: usize = 4 << 20;

/// The most data bytes that one [`Frame::Data`] carries.
pub const MAX_CHUNK: usize = 32 << 10;

/// The longest container or exec id in a stream's name, and the longest boot id, in bytes.
/// containerd's ids have 76 at most.
pub const MAX_ID: usize = 1024;

/// What one side says to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Host to guest: I am here, this is where I stand.
    Hello {
        /// The host's [`super::VERSION`].
        version: u32,
        /// Random, one per host process.
        session: u64,
        /// Counts the HELLOs of the session; the answer repeats it.
        attempt: u64,
        /// The calls that the host still waits for; the guest forgets all others.
        outstanding: Vec<u64>,
    },
    /// Guest to host: answers [`Frame::Hello`].
    HelloAck {
        /// The guest's [`super::VERSION`].
        version: u32,
        /// The host's session.
        session: u64,
        /// The attempt that is answered.
        attempt: u64,
        /// Changes when the guest boots anew and has forgotten everything.
        boot_id: String,
    },
    /// Guest to host: say HELLO again; I am new here, or something was lost.
    Resync,
    /// Host to guest: a call.
    Request {
        /// Unique in the session.
        id: u64,
        /// Full service name.
        service: String,
        /// Method name.
        method: String,
        /// Encoded request message.
        payload: Bytes,
    },
    /// Guest to host: a call's answer.
    Response {
        /// The call.
        id: u64,
        /// ttrpc (gRPC) code; 0 is success.
        code: i32,
        /// Why it failed.
        message: String,
        /// Encoded response message.
        payload: Bytes,
    },
    /// Host to guest: the answer arrived, or is no longer wanted.
    Answered {
        /// The call.
        id: u64,
    },
    /// Bytes of a stream.
    Data {
        /// The stream.
        key: StreamKey,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes.
        data: Bytes,
        /// The stream ends after them.
        eof: bool,
    },
    /// The receiver of a stream is done with all bytes below `offset` (the end of the
    /// stream counts as one byte), and has room for `window` more.
    Ack {
        /// The stream.
        key: StreamKey,
        /// First offset that is not done.
        offset: u64,
        /// Room after it.
        window: u32,
        /// Send again from `offset`.
        resume: bool,
    },
    /// The sender of a stream cannot resume where it was told to.
    Gone {
        /// The stream.
        key: StreamKey,
        /// The first byte it has.
        first: u64,
        /// Where its bytes end.
        end: u64,
    },
}

/// Why bytes between two delimiters are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The delimiter came too early.
    #[error("frame is cut short")]
    Truncated,
    /// The body is larger than the receiver takes.
    #[error("frame is too large")]
    Oversize,
    /// The checksum does not fit.
    #[error("checksum of frame is wrong")]
    Checksum,
    /// A type number that we do not know.
    #[error("frame type {0} is unknown")]
    UnknownType(u8),
    /// The fields do not fill the body exactly, or have values they cannot have.
    #[error("fields of frame are malformed")]
    Malformed,
}

const HELLO: u8 = 1;
const HELLO_ACK: u8 = 2;
const RESYNC: u8 = 3;
const REQUEST: u8 = 4;
const RESPONSE: u8 = 5;
const ANSWERED: u8 = 6;
const DATA: u8 = 7;
const ACK: u8 = 8;
const GONE: u8 = 9;

/// The longest run of non-zero bytes in one COBS block.
const MAX_RUN: usize = 254;

/// Appends `frame` to `out`, ready for the wire.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    let body = match frame {
        Frame::Data {
            key,
            offset,
            data,
            eof,
        } => {
            encode_data(key, *offset, (data, &[]), *eof, out);
            return;
        }
        Frame::Hello {
            version,
            session,
            attempt,
            outstanding,
        } => {
            let mut body = Body::new(HELLO, out);
            body.u32(*version);
            body.u64(*session);
            body.u64(*attempt);
            for id in outstanding {
                body.u64(*id);
            }
            body
        }
        Frame::HelloAck {
            version,
            session,
            attempt,
            boot_id,
        } => {
            let mut body = Body::new(HELLO_ACK, out);
            body.u32(*version);
            body.u64(*session);
            body.u64(*attempt);
            body.text(boot_id);
            body
        }
        Frame::Resync => Body::new(RESYNC, out),
        Frame::Request {
            id,
            service,
            method,
            payload,
        } => {
            let mut body = Body::new(REQUEST, out);
            body.u64(*id);
            body.text(service);
            body.text(method);
            body.put(payload);
            body
        }
        Frame::Response {
            id,
            code,
            message,
            payload,
        } => {
            let mut body = Body::new(RESPONSE, out);
            body.u64(*id);
            body.put(&code.to_le_bytes());
            body.text(message);
            body.put(payload);
            body
        }
        Frame::Answered { id } => {
            let mut body = Body::new(ANSWERED, out);
            body.u64(*id);
            body
        }
        Frame::Ack {
            key,
            offset,
            window,
            resume,
        } => {
            let mut body = Body::new(ACK, out);
            body.key(key);
            body.u64(*offset);
            body.u32(*window);
            body.put(&[u8::from(*resume)]);
            body
        }
        Frame::Gone { key, first, end } => {
            let mut body = Body::new(GONE, out);
            body.key(key);
            body.u64(*first);
            body.u64(*end);
            body
        }
    };
    body.finish();
}

/// Appends a [`Frame::Data`] whose bytes lie in two pieces, without joining them first.
pub fn encode_data(
    key: &StreamKey,
    offset: u64,
    data: (&[u8], &[u8]),
    eof: bool,
    out: &mut Vec<u8>,
) {
    let mut body = Body::new(DATA, out);
    body.key(key);
    body.u64(offset);
    body.put(&[u8::from(eof)]);
    body.put(data.0);
    body.put(data.1);
    body.finish();
}

/// The size of a [`Frame::Request`]'s body, for checking before it is sent.
pub fn request_size(service: &str, method: &str, payload: &[u8]) -> usize {
    1 + 8 + 2 + service.len() + 2 + method.len() + payload.len() + 4
}

/// The size of a [`Frame::Response`]'s body, for checking before it is sent.
pub fn response_size(message: &str, payload: &[u8]) -> usize {
    1 + 8 + 4 + 2 + message.len() + payload.len() + 4
}

/// A body on its way into COBS: what is put is encoded and summed at once.
struct Body<'a> {
    out: &'a mut Vec<u8>,
    /// Where the block's code byte stands.
    code_at: usize,
    crc: crc32fast::Hasher,
}

impl<'a> Body<'a> {
    fn new(kind: u8, out: &'a mut Vec<u8>) -> Self {
        let code_at = out.len();
        out.push(0);
        let mut body = Self {
            out,
            code_at,
            crc: crc32fast::Hasher::new(),
        };
        body.put(&[kind]);
        body
    }

    fn put(&mut self, bytes: &[u8]) {
        self.crc.update(bytes);
        self.stuff(bytes);
    }

    fn stuff(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let run = self.out.len() - self.code_at - 1;
            if run == MAX_RUN {
                self.end_block(0xff);
                continue;
            }
            let room = &bytes[..bytes.len().min(MAX_RUN - run)];
            match memchr::memchr(0, room) {
                Some(at) => {
                    self.out.extend_from_slice(&room[..at]);
                    // run + at < MAX_RUN, so the code fits.
                    self.end_block((run + at) as u8 + 1);
                    bytes = &bytes[at + 1..];
                    // Zeros after a zero are blocks without bytes. In one go: padding, as tar
                    // has it, would cost a step for each.
                    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                    self.end_empty_blocks(zeros);
                    bytes = &bytes[zeros..];
                }
                None => {
                    self.out.extend_from_slice(room);
                    bytes = &bytes[room.len()..];
                }
            }
        }
    }

    fn end_block(&mut self, code: u8) {
        self.out[self.code_at] = code;
        self.code_at = self.out.len();
        self.out.push(0);
    }

    /// Ends the block that has just begun, and as many more without bytes.
    fn end_empty_blocks(&mut self, count: usize) {
        self.out[self.code_at] = 1;
        self.out.resize(self.code_at + count, 1);
        self.code_at = self.out.len();
        self.out.push(0);
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    /// Text with its length before it; cut at 64 KiB, which only an error text reaches.
    fn text(&mut self, text: &str) {
        let mut end = text.len().min(usize::from(u16::MAX));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.put(&(end as u16).to_le_bytes());
        self.put(&text.as_bytes()[..end]);
    }

    fn key(&mut self, key: &StreamKey) {
        self.text(&key.container_id);
        self.put(&[u8::from(key.exec_id.is_some())]);
        self.text(key.exec_id.as_deref().unwrap_or_default());
        self.put(&[key.fd.number()]);
    }

    fn finish(mut self) {
        let crc = std::mem::take(&mut self.crc).finalize();
        self.stuff(&crc.to_le_bytes());
        let run = self.out.len() - self.code_at - 1;
        // run <= MAX_RUN = 254.
        self.out[self.code_at] = run as u8 + 1;
        self.out.push(0);
    }
}

/// Takes bytes as they come off the wire and gives frames.
pub struct Decoder {
    max_body: usize,
    body: Vec<u8>,
    place: Place,
}

/// Where in the COBS encoding the next byte stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before a frame.
    Between,
    /// In a block with so many bytes to come; whether a zero follows it.
    Block { left: u8, zero: bool },
    /// In what cannot be a frame, until the delimiter.
    Skipping,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("body_len", &self.body.len())
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder between two frames, which takes bodies up to `max_body`.
    pub fn new(max_body: usize) -> Self {
        Self {
            max_body,
            body: Vec::new(),
            place: Place::Between,
        }
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.body.capacity()
    }

    /// Takes bytes from the front of `input` until a frame ends or all are taken.
    /// `None`: more bytes are needed. After an error it is in step again.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Frame, FrameError>> {
        while let Some((&first, rest)) = input.split_first() {
            match self.place {
                // Blocks without bytes, one zero each: all that are here in one go.
                Place::Block {
                    left: 0,
                    zero: true,
                } if first == 1 && self.body.len() < self.max_body => {
                    let fits = &input[..input.len().min(self.max_body - self.body.len())];
                    let count = fits.iter().take_while(|byte| **byte == 1).count();
                    self.body.resize(self.body.len() + count, 0);
                    *input = &input[count..];
                }
                Place::Between | Place::Block { left: 0, .. } if first != 0 => {
                    *input = rest;
                    if matches!(self.place, Place::Block { zero: true, .. }) {
                        if self.body.len() == self.max_body {
                            self.place = Place::Skipping;
                            continue;
                        }
                        self.body.push(0);
                    }
                    self.place = Place::Block {
                        left: first - 1,
                        zero: first != 0xff,
                    };
                }
                Place::Between => *input = rest,
                Place::Block { left: 0, .. } => {
                    *input = rest;
                    self.place = Place::Between;
                    return Some(self.take());
                }
                Place::Block { left, zero } => {
                    let run = &input[..input.len().min(usize::from(left))];
                    if let Some(at) = memchr::memchr(0, run) {
                        *input = &input[at + 1..];
                        self.place = Place::Between;
                        self.body.clear();
                        return Some(Err(FrameError::Truncated));
                    }
                    if self.body.len() + run.len() > self.max_body {
                        self.place = Place::Skipping;
                        continue;
                    }
                    self.body.extend_from_slice(run);
                    // run.len() <= left, a u8.
                    self.place = Place::Block {
                        left: left - run.len() as u8,
                        zero,
                    };
                    *input = &input[run.len()..];
                }
                Place::Skipping => match memchr::memchr(0, input) {
                    Some(at) => {
                        *input = &input[at + 1..];
                        self.place = Place::Between;
                        self.body = Vec::new();
                        return Some(Err(FrameError::Oversize));
                    }
                    None => *input = &[],
                },
            }
        }
        None
    }

    /// Parses the complete body. A body that is mostly data becomes the data's
    /// buffer; else the buffer is kept for the next frame.
    fn take(&mut self) -> Result<Frame, FrameError> {
        let whole = self.body.len();
        let parsed = check(&self.body).and_then(parse);
        let (frame, tail) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => {
                self.body.clear();
                return Err(error);
            }
        };
        let start = whole - 4 - tail;
        let bytes = if tail == 0 {
            self.body.clear();
            Bytes::new()
        } else if tail >= self.body.capacity() / 2 {
            Bytes::from(std::mem::take(&mut self.body)).slice(start..whole - 4)
        } else {
            let bytes = Bytes::copy_from_slice(&self.body[start..whole - 4]);
            self.body.clear();
            bytes
        };
        if self.body.capacity() > 2 * MAX_CHUNK {
            self.body = Vec::new();
        }
        Ok(frame.with_tail(bytes))
    }
}

impl Frame {
    /// Its type, for a log: what is in it may be megabytes of a hostile guest's.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Frame::Hello { .. } => "HELLO",
            Frame::HelloAck { .. } => "HELLO_ACK",
            Frame::Resync => "RESYNC",
            Frame::Request { .. } => "REQUEST",
            Frame::Response { .. } => "RESPONSE",
            Frame::Answered { .. } => "ANSWERED",
            Frame::Data { .. } => "DATA",
            Frame::Ack { .. } => "ACK",
            Frame::Gone { .. } => "GONE",
        }
    }

    fn with_tail(mut self, tail: Bytes) -> Self {
        if let Frame::Request { payload: place, .. }
        | Frame::Response { payload: place, .. }
        | Frame::Data { data: place, .. } = &mut self
        {
            *place = tail;
        }
        self
    }
}

fn check(body: &[u8]) -> Result<&[u8], FrameError> {
    let (fields, sum) = body.split_last_chunk::<4>().ok_or(FrameError::Malformed)?;
    if crc32fast::hash(fields) == u32::from_le_bytes(*sum) {
        Ok(fields)
    } else {
        Err(FrameError::Checksum)
    }
}

/// The frame without its payload or data, and the length of that: all that remains.
fn parse(body: &[u8]) -> Result<(Frame, usize), FrameError> {
    let mut fields = Fields(body);
    let kind = fields.u8()?;
    let frame = match kind {
        HELLO => {
            let (version, session, attempt) = (fields.u32()?, fields.u64()?, fields.u64()?);
            let mut outstanding = Vec::with_capacity(fields.0.len() / 8);
            while !fields.0.is_empty() {
                outstanding.push(fields.u64()?);
            }
            Frame::Hello {
                version,
                session,
                attempt,
                outstanding,
            }
        }
        HELLO_ACK => Frame::HelloAck {
            version: fields.u32()?,
            session: fields.u64()?,
            attempt: fields.u64()?,
            boot_id: fields.id()?,
        },
        RESYNC => Frame::Resync,
        REQUEST => Frame::Request {
            id: fields.u64()?,
            service: fields.text()?,
            method: fields.text()?,
            payload: Bytes::new(),
        },
        RESPONSE => Frame::Response {
            id: fields.u64()?,
            code: i32::from_le_bytes(fields.array()?),
            message: fields.text()?,
            payload: Bytes::new(),
        },
        ANSWERED => Frame::Answered { id: fields.u64()? },
        DATA => Frame::Data {
            key: fields.key()?,
            offset: fields.u64()?,
            eof: fields.flag()?,
            data: Bytes::new(),
        },
        ACK => Frame::Ack {
            key: fields.key()?,
            offset: fields.u64()?,
            window: fields.u32()?,
            resume: fields.flag()?,
        },
        GONE => Frame::Gone {
            key: fields.key()?,
            first: fields.u64()?,
            end: fields.u64()?,
        },
        other => return Err(FrameError::UnknownType(other)),
    };
    let tail = fields.0.len();
    let carries_tail = matches!(kind, REQUEST | RESPONSE | DATA);
    if tail > 0 && !carries_tail || kind == DATA && tail > MAX_CHUNK {
        return Err(FrameError::Malformed);
    }
    Ok((frame, tail))
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], FrameError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(FrameError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(FrameError::Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(self.array::<1>()?[0])
    }

    fn flag(&mut self) -> Result<bool, FrameError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FrameError::Malformed),
        }
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, FrameError> {
        let len = u16::from_le_bytes(self.array()?);
        let text = std::str::from_utf8(self.take(usize::from(len))?);
        Ok(text.map_err(|_| FrameError::Malformed)?.to_owned())
    }

    /// Text that the receiver keeps, so it is bounded.
    fn id(&mut self) -> Result<String, FrameError> {
        let id = self.text()?;
        if id.len() > MAX_ID {
            return Err(FrameError::Malformed);
        }
        Ok(id)
    }

    fn key(&mut self) -> Result<StreamKey, FrameError> {
        let container_id = self.id()?;
        let has_exec = self.flag()?;
        let exec_id = self.id()?;
        let fd = StdFd::from_number(self.u8()?).ok_or(FrameError::Malformed)?;
        Ok(StreamKey {
            container_id,
            exec_id: has_exec.then_some(exec_id),
            fd,
        })
    }
}
