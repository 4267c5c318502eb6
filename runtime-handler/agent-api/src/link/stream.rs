//! The two ends of one stream: what is kept, what may be sent, what is due. Pure.
//!
//! ```text
//! sender    base ......... sent ......... end          kept: base..end, at most `capacity`
//!            |  in flight   |  not yet    |
//!            +-- acked      +-- may go up to `limit` = ack offset + window
//!
//! receiver  consumed ..... received                    queued: consumed..received
//!            |  ours, not yet handed on   |
//! ```
//! The end of a stream counts as one byte behind the last one, so that it is sent,
//! lost, sent again and acknowledged by the same rules.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

/// A sender's next piece: where it starts, its bytes in two slices, whether the end follows.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: (&'a [u8], &'a [u8]),
    /// The stream ends after them.
    pub eof: bool,
}

/// What an acknowledgement did to a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acked {
    /// It is ahead or equal; there may be room and something to send.
    Fine,
    /// It names bytes that are gone, or were never there.
    OutOfRange,
}

/// Keeps a stream's bytes until the other side is done with them.
#[derive(Debug)]
pub struct SendBuffer {
    capacity: usize,
    base: u64,
    kept: VecDeque<u8>,
    closed: bool,
    /// The acknowledged offset went beyond the last byte: the end arrived.
    end_acked: bool,
    /// Next offset to send, where the other side has asked for the stream.
    sent: Option<u64>,
    /// One past the last offset that the other side has room for.
    limit: u64,
}

impl SendBuffer {
    /// An empty stream whose next byte has offset `base`.
    pub fn new(base: u64, capacity: usize) -> Self {
        Self {
            capacity,
            base,
            kept: VecDeque::new(),
            closed: false,
            end_acked: false,
            sent: None,
            limit: base,
        }
    }

    /// First byte that is kept.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.kept.len() as u64
    }

    /// Whether nothing can be added any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether everything, the end included, is acknowledged.
    pub fn is_drained(&self) -> bool {
        self.end_acked
    }

    /// How many bytes fit now.
    pub fn room(&self) -> usize {
        if self.closed {
            0
        } else {
            self.capacity.saturating_sub(self.kept.len())
        }
    }

    /// Adds what fits of `bytes`; returns how many.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.kept.extend(&bytes[..taken]);
        taken
    }

    /// Adds the end.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// The channel broke: nothing is sent until the other side asks anew.
    pub fn reset(&mut self) {
        self.sent = None;
    }

    /// The other side is done below `offset` and has room for `window` after it;
    /// `resume`: it wants all from there, also what was sent.
    pub fn acknowledge(&mut self, offset: u64, window: u32, resume: bool) -> Acked {
        let end = self.end();
        let last = end + u64::from(self.closed);
        if offset > last || (resume && offset < self.base) {
            return Acked::OutOfRange;
        }
        // An older acknowledgement than one that we know changes nothing.
        if let Some(done) = offset.min(end).checked_sub(self.base) {
            // At most kept.len(), a usize.
            self.kept.drain(..done as usize);
            self.base += done;
            if self.kept.is_empty() && self.kept.capacity() > SHRINK_ABOVE {
                self.kept = VecDeque::new();
            }
        }
        if offset > end {
            self.end_acked = true;
        }
        let limit = offset + u64::from(window);
        if resume {
            self.sent = Some(offset);
            self.limit = limit;
        } else {
            self.limit = self.limit.max(limit);
            self.sent = self.sent.map(|sent| sent.max(offset));
        }
        Acked::Fine
    }

    /// The next piece of at most `max` bytes, and counts it as sent.
    pub fn next_piece(&mut self, max: usize) -> Option<Piece<'_>> {
        let end = self.end();
        let sent = self.sent?;
        let offset = sent.min(end);
        // The base never passes `sent`, and all that is kept is in memory.
        let start = offset.checked_sub(self.base)? as usize;
        let allowed = self
            .limit
            .saturating_sub(offset)
            .min(max as u64)
            .min(end - offset) as usize;
        let stop = start + allowed;
        let eof = self.closed && sent <= end && stop == self.kept.len();
        if allowed == 0 && !eof {
            return None;
        }
        self.sent = Some(offset + allowed as u64 + u64::from(eof));
        let (front, back) = self.kept.as_slices();
        let middle = front.len();
        let data = (
            &front[start.min(middle)..stop.min(middle)],
            &back[start.saturating_sub(middle)..stop.saturating_sub(middle)],
        );
        Some(Piece { offset, data, eof })
    }
}

/// A stream that is quiet gives back memory above this.
const SHRINK_ABOVE: usize = 16 << 10;

/// Received pieces that wait as they came; behind them …
const PIECES: usize = 64;
/// … those that together are no longer than this become one.
const JOIN_BELOW: usize = 2 << 10;

/// What became of arrived bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// New bytes, or the end, are queued.
    New,
    /// All of it was known.
    Known,
    /// Bytes between ours and these are missing.
    Gap,
    /// More than we gave room for, or after the end.
    Unasked,
}

/// Takes a stream's bytes in order, each once.
#[derive(Debug)]
pub struct RecvBuffer {
    window: u32,
    received: u64,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// The end arrived.
    eof: bool,
}

impl RecvBuffer {
    /// Expects offset `from` next, and has room for `window` bytes.
    pub fn new(from: u64, window: u32) -> Self {
        Self {
            window,
            received: from,
            queue: VecDeque::new(),
            queued: 0,
            eof: false,
        }
    }

    /// Takes bytes that arrived at `offset`.
    pub fn arrive(&mut self, offset: u64, mut data: Bytes, eof: bool) -> Arrived {
        if offset > self.received {
            return Arrived::Gap;
        }
        // At most data.len() is skipped, a usize.
        let known = (self.received - offset).min(data.len() as u64) as usize;
        data.advance(known);
        if data.is_empty() && (!eof || self.eof) {
            return Arrived::Known;
        }
        if offset + ((known + data.len()) as u64) < self.received {
            return Arrived::Known;
        }
        if self.eof || self.queued + data.len() > self.window as usize {
            return Arrived::Unasked;
        }
        self.received += data.len() as u64;
        self.queued += data.len();
        if !data.is_empty() {
            self.keep(data);
        }
        self.eof = eof;
        Arrived::New
    }

    /// Small pieces that nobody takes yet are joined: each takes far more memory than its
    /// bytes, and a hostile guest sends one byte at a time.
    fn keep(&mut self, data: Bytes) {
        let pieces = self.queue.len();
        match self.queue.back_mut() {
            Some(last) if pieces > PIECES && last.len() + data.len() <= JOIN_BELOW => {
                *last = [last.as_ref(), data.as_ref()].concat().into();
            }
            _ => self.queue.push_back(data),
        }
    }

    /// The oldest queued piece with its offset.
    pub fn pop(&mut self) -> Option<(u64, Bytes)> {
        let offset = self.received - self.queued as u64;
        let data = self.queue.pop_front()?;
        self.queued -= data.len();
        Some((offset, data))
    }

    /// All was taken and nothing more comes.
    pub fn is_finished(&self) -> bool {
        self.eof && self.queue.is_empty()
    }

    /// First offset that has not arrived; behind the end once that arrived.
    pub fn received(&self) -> u64 {
        self.received + u64::from(self.eof)
    }

    /// Bytes received.
    pub fn bytes_received(&self) -> u64 {
        self.received
    }

    /// Whether the end arrived.
    pub fn is_closed(&self) -> bool {
        self.eof
    }

    /// Bytes that there is room for behind the received ones.
    pub fn room(&self) -> u32 {
        // queued <= window, a u32.
        self.window - self.queued as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(buffer: &mut SendBuffer, max: usize) -> Option<(u64, Vec<u8>, bool)> {
        buffer.next_piece(max).map(|piece| {
            (
                piece.offset,
                [piece.data.0, piece.data.1].concat(),
                piece.eof,
            )
        })
    }

    #[test]
    fn nothing_is_sent_before_it_is_asked_for() {
        let mut buffer = SendBuffer::new(0, 10);
        assert_eq!(buffer.push(b"hello"), 5);
        assert_eq!(piece(&mut buffer, 10), None);
        assert_eq!(buffer.acknowledge(0, 3, true), Acked::Fine);
        assert_eq!(piece(&mut buffer, 10), Some((0, b"hel".to_vec(), false)));
        assert_eq!(piece(&mut buffer, 10), None, "no more room");
        buffer.reset();
        assert_eq!(buffer.acknowledge(2, 10, false), Acked::Fine);
        assert_eq!(piece(&mut buffer, 10), None);
    }

    #[test]
    fn the_end_is_sent_again_to_who_asks_again() {
        let mut buffer = SendBuffer::new(0, 10);
        buffer.push(b"hi");
        buffer.close();
        assert_eq!(buffer.push(b"more"), 0);
        buffer.acknowledge(0, 10, true);
        assert_eq!(piece(&mut buffer, 10), Some((0, b"hi".to_vec(), true)));
        assert_eq!(piece(&mut buffer, 10), None);
        assert_eq!(buffer.acknowledge(3, 0, false), Acked::Fine);
        assert!(buffer.is_drained());
        // A next host that knows the bytes, but not that they were all.
        assert_eq!(buffer.acknowledge(2, 10, true), Acked::Fine);
        assert_eq!(piece(&mut buffer, 10), Some((2, vec![], true)));
        assert_eq!(buffer.acknowledge(3, 10, true), Acked::Fine);
        assert_eq!(piece(&mut buffer, 10), None);
    }

    #[test]
    fn what_was_acknowledged_or_never_written_cannot_be_asked_for() {
        let mut buffer = SendBuffer::new(100, 10);
        buffer.push(b"hello");
        buffer.acknowledge(100, 10, true);
        buffer.acknowledge(102, 10, false);
        assert_eq!(buffer.acknowledge(101, 10, true), Acked::OutOfRange);
        assert_eq!(buffer.acknowledge(106, 10, true), Acked::OutOfRange);
        assert_eq!(
            buffer.acknowledge(101, 10, false),
            Acked::Fine,
            "an old one that came late"
        );
        assert_eq!((buffer.base(), buffer.end(), buffer.room()), (102, 105, 7));
    }

    #[test]
    fn bytes_arrive_once_whatever_comes_again() {
        let mut buffer = RecvBuffer::new(10, 8);
        assert_eq!(
            buffer.arrive(10, Bytes::from_static(b"abc"), false),
            Arrived::New
        );
        assert_eq!(
            buffer.arrive(10, Bytes::from_static(b"abc"), false),
            Arrived::Known
        );
        assert_eq!(
            buffer.arrive(11, Bytes::from_static(b"bcde"), false),
            Arrived::New
        );
        assert_eq!(
            buffer.arrive(16, Bytes::from_static(b"g"), false),
            Arrived::Gap
        );
        assert_eq!(
            buffer.arrive(15, Bytes::from_static(b"0123"), false),
            Arrived::Unasked
        );
        assert_eq!(buffer.room(), 3);
        assert_eq!(buffer.pop(), Some((10, Bytes::from_static(b"abc"))));
        assert_eq!(buffer.room(), 6);
        assert_eq!(
            buffer.arrive(13, Bytes::from_static(b"de"), true),
            Arrived::New
        );
        assert_eq!(
            buffer.arrive(13, Bytes::from_static(b"de"), true),
            Arrived::Known
        );
        assert_eq!(
            buffer.arrive(15, Bytes::from_static(b"f"), false),
            Arrived::Unasked
        );
        assert_eq!((buffer.received(), buffer.is_finished()), (16, false));
        assert_eq!(buffer.pop(), Some((13, Bytes::from_static(b"de"))));
        assert!(buffer.is_finished());
    }
}
