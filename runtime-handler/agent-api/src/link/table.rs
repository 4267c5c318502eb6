//! The streams of one side, and the handles by which its tasks use them.
//!
//! The connection asks for what is to be sent ([`Table::fill`]) and tells what came;
//! the handles wait on their stream's own [`Notify`].

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::StreamKey;
use super::connection::BATCH;
use super::frame::{self, Frame, MAX_CHUNK};
use super::stream::{Acked, Arrived, RecvBuffer, SendBuffer};

/// Why a stream gives or takes no more bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It was removed, or the link was closed.
    #[error("the stream is closed")]
    Closed,
    /// The guest booted anew; it knows nothing of the stream.
    #[error("the guest restarted")]
    Restarted,
    /// The other side does not hold the bytes that were asked for.
    #[error("the stream holds bytes {first} to {end} only")]
    Gone {
        /// First byte it holds.
        first: u64,
        /// One past the last.
        end: u64,
    },
}

/// Where a stream stands, for a host that takes over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// The stream.
    pub key: StreamKey,
    /// Output: first byte still held. Input: bytes received.
    pub offset: u64,
    /// Output: bytes produced so far. Input: bytes received.
    pub end: u64,
    /// Nothing comes after `end`.
    pub closed: bool,
}

/// Asks about unknown streams that are remembered, at most.
const MAX_EARLY: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Table {
    inner: Mutex<Inner>,
    /// There may be something to send.
    pub(super) wake: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    senders: HashMap<StreamKey, Sender>,
    receivers: HashMap<StreamKey, Receiver>,
    /// Asked for by the other side before this side made them: offset and window.
    early: HashMap<StreamKey, (u64, u32)>,
    turns: VecDeque<Turn>,
    closed: bool,
}

#[derive(Debug)]
struct Sender {
    buffer: SendBuffer,
    /// A turn of it is in `turns`.
    has_turn: bool,
    /// A [`Turn::Gone`] of it is in `turns`.
    has_gone_turn: bool,
    /// That the other side asks for what is gone was logged.
    gone_is_told: bool,
    failed: Option<StreamError>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Receiver {
    buffer: RecvBuffer,
    /// Below this the other side may forget the bytes.
    done: u64,
    /// What arrives counts as done, because this side is the one that keeps it.
    done_on_arrival: bool,
    /// The other side must send from `done` again.
    resume: bool,
    has_turn: bool,
    failed: Option<StreamError>,
    changed: Arc<Notify>,
}

/// Something to send; streams take turns, a chunk each.
#[derive(Debug)]
enum Turn {
    Data(StreamKey),
    Ack(StreamKey),
    /// The last acknowledgement of a reader that is gone.
    Done {
        key: StreamKey,
        offset: u64,
    },
    Gone {
        key: StreamKey,
        first: u64,
        end: u64,
    },
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock with half a change made.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a stream that this side sends, from offset `from` on. One of the same
    /// name is replaced.
    pub(super) fn sender(self: &Arc<Self>, key: StreamKey, from: u64, capacity: usize) -> Sink {
        let changed = Arc::new(Notify::new());
        let mut inner = self.lock();
        let mut sender = Sender {
            buffer: SendBuffer::new(from, capacity),
            has_turn: false,
            has_gone_turn: false,
            gone_is_told: false,
            failed: inner.closed.then_some(StreamError::Closed),
            changed: Arc::clone(&changed),
        };
        if let Some((offset, window)) = inner.early.remove(&key) {
            inner.acknowledge(&key, &mut sender, offset, window, true);
        }
        if let Some(old) = inner.senders.insert(key.clone(), sender) {
            old.changed.notify_waiters();
        }
        drop(inner);
        self.wake.notify_one();
        Sink {
            table: Arc::clone(self),
            key,
            changed,
        }
    }

    /// Makes a stream that this side receives, from offset `from` on, and asks for it.
    pub(super) fn receiver(
        self: &Arc<Self>,
        key: StreamKey,
        from: u64,
        window: u32,
        done_on_arrival: bool,
    ) -> Source {
        let changed = Arc::new(Notify::new());
        let mut inner = self.lock();
        let receiver = Receiver {
            buffer: RecvBuffer::new(from, window),
            done: from,
            done_on_arrival,
            resume: true,
            has_turn: true,
            failed: inner.closed.then_some(StreamError::Closed),
            changed: Arc::clone(&changed),
        };
        if let Some(old) = inner.receivers.insert(key.clone(), receiver) {
            old.changed.notify_waiters();
        }
        inner.turns.push_back(Turn::Ack(key.clone()));
        drop(inner);
        self.wake.notify_one();
        Source {
            table: Arc::clone(self),
            key,
            changed,
        }
    }

    /// Forgets a stream; its handles fail.
    pub(super) fn remove(&self, key: &StreamKey) {
        let mut inner = self.lock();
        let sender = inner.senders.remove(key).map(|sender| sender.changed);
        let receiver = inner.receivers.remove(key).map(|receiver| receiver.changed);
        inner.early.remove(key);
        drop(inner);
        for changed in sender.into_iter().chain(receiver) {
            changed.notify_waiters();
        }
    }

    /// Fails every stream; `closed`: those made later too.
    pub(super) fn fail(&self, error: &StreamError, closed: bool) {
        let mut inner = self.lock();
        inner.closed |= closed;
        for sender in inner.senders.values_mut() {
            sender.failed.get_or_insert_with(|| error.clone());
            sender.changed.notify_waiters();
        }
        for receiver in inner.receivers.values_mut() {
            receiver.failed.get_or_insert_with(|| error.clone());
            receiver.changed.notify_waiters();
        }
    }

    pub(super) fn states(&self) -> Vec<StreamState> {
        let inner = self.lock();
        let sent = inner.senders.iter().map(|(key, sender)| StreamState {
            key: key.clone(),
            offset: sender.buffer.base(),
            end: sender.buffer.end(),
            closed: sender.buffer.is_closed(),
        });
        let received = inner.receivers.iter().map(|(key, receiver)| StreamState {
            key: key.clone(),
            offset: receiver.buffer.bytes_received(),
            end: receiver.buffer.bytes_received(),
            closed: receiver.buffer.is_closed(),
        });
        let mut states: Vec<_> = sent.chain(received).collect();
        states.sort_by(|a, b| a.key.cmp(&b.key));
        states
    }

    /// The channel broke, or is greeted anew: nothing is sent before it is asked for.
    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        inner.turns.clear();
        inner.early.clear();
        for sender in inner.senders.values_mut() {
            sender.buffer.reset();
            sender.has_turn = false;
            sender.has_gone_turn = false;
        }
        for receiver in inner.receivers.values_mut() {
            receiver.has_turn = false;
        }
    }

    /// After [`Table::reset`], when the greeting is done: asks for every stream again.
    pub(super) fn ask_again(&self) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        for (key, receiver) in &mut inner.receivers {
            receiver.resume = true;
            if !receiver.has_turn {
                receiver.has_turn = true;
                inner.turns.push_back(Turn::Ack(key.clone()));
            }
        }
        drop(guard);
        self.wake.notify_one();
    }

    /// Takes [`Frame::Data`]. `false`: bytes are missing before these.
    #[must_use]
    pub(super) fn arrive(&self, key: &StreamKey, offset: u64, data: Bytes, eof: bool) -> bool {
        let mut inner = self.lock();
        let Some(receiver) = inner.receivers.get_mut(key) else {
            // A reader that gave up, or a stream removed: nobody waits for them.
            return true;
        };
        match receiver.buffer.arrive(offset, data, eof) {
            Arrived::Known => true,
            Arrived::Gap | Arrived::Unasked => false,
            Arrived::New => {
                receiver.changed.notify_waiters();
                if receiver.done_on_arrival {
                    receiver.done = receiver.buffer.received();
                    inner.give_ack_turn(key);
                    drop(inner);
                    self.wake.notify_one();
                }
                true
            }
        }
    }

    /// Takes [`Frame::Ack`].
    pub(super) fn acknowledged(&self, key: StreamKey, offset: u64, window: u32, resume: bool) {
        let mut inner = self.lock();
        if let Some(mut sender) = inner.senders.remove(&key) {
            inner.acknowledge(&key, &mut sender, offset, window, resume);
            inner.senders.insert(key, sender);
        } else if inner.early.contains_key(&key) || resume && inner.early.len() < MAX_EARLY {
            inner.early.insert(key, (offset, window));
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Takes [`Frame::Gone`].
    pub(super) fn gone(&self, key: &StreamKey, first: u64, end: u64) {
        if let Some(receiver) = self.lock().receivers.get_mut(key) {
            receiver
                .failed
                .get_or_insert(StreamError::Gone { first, end });
            receiver.changed.notify_waiters();
        }
    }

    /// Appends frames to `out`, a batch at most.
    pub(super) fn fill(&self, out: &mut Vec<u8>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        while out.len() < BATCH {
            let Some(turn) = inner.turns.pop_front() else {
                return;
            };
            match turn {
                Turn::Data(key) => {
                    let Some(sender) = inner.senders.get_mut(&key) else {
                        continue;
                    };
                    match sender.buffer.next_piece(MAX_CHUNK) {
                        None => sender.has_turn = false,
                        Some(piece) => {
                            frame::encode_data(&key, piece.offset, piece.data, piece.eof, out);
                            inner.turns.push_back(Turn::Data(key));
                        }
                    }
                }
                Turn::Ack(key) => {
                    let Some(receiver) = inner.receivers.get_mut(&key) else {
                        continue;
                    };
                    receiver.has_turn = false;
                    let resume = std::mem::take(&mut receiver.resume);
                    let offset = receiver.done;
                    let limit = receiver.buffer.received() + u64::from(receiver.buffer.room());
                    let window = u32::try_from(limit.saturating_sub(offset)).unwrap_or(u32::MAX);
                    frame::encode(
                        &Frame::Ack {
                            key,
                            offset,
                            window,
                            resume,
                        },
                        out,
                    );
                }
                Turn::Done { key, offset } => {
                    let (window, resume) = (0, false);
                    frame::encode(
                        &Frame::Ack {
                            key,
                            offset,
                            window,
                            resume,
                        },
                        out,
                    );
                }
                Turn::Gone { key, first, end } => {
                    if let Some(sender) = inner.senders.get_mut(&key) {
                        sender.has_gone_turn = false;
                    }
                    frame::encode(&Frame::Gone { key, first, end }, out);
                }
            }
        }
        // The batch is full; the connection asks again after it is written.
    }
}

impl Inner {
    fn give_ack_turn(&mut self, key: &StreamKey) {
        if let Some(receiver) = self.receivers.get_mut(key)
            && !receiver.has_turn
        {
            receiver.has_turn = true;
            self.turns.push_back(Turn::Ack(key.clone()));
        }
    }

    fn give_data_turn(&mut self, key: &StreamKey, sender: &mut Sender) {
        if !sender.has_turn {
            sender.has_turn = true;
            self.turns.push_back(Turn::Data(key.clone()));
        }
    }

    fn acknowledge(
        &mut self,
        key: &StreamKey,
        sender: &mut Sender,
        offset: u64,
        window: u32,
        resume: bool,
    ) {
        match sender.buffer.acknowledge(offset, window, resume) {
            Acked::Fine => {
                sender.changed.notify_waiters();
                self.give_data_turn(key, sender);
            }
            Acked::OutOfRange => {
                let (first, end) = (sender.buffer.base(), sender.buffer.end());
                // Once: a hostile guest asks for ever.
                if !std::mem::replace(&mut sender.gone_is_told, true) {
                    log::warn!("{key}: asked for byte {offset}, which is not in {first}..{end}");
                }
                if !std::mem::replace(&mut sender.has_gone_turn, true) {
                    self.turns.push_back(Turn::Gone {
                        key: key.clone(),
                        first,
                        end,
                    });
                }
            }
        }
    }

    fn sender(
        &mut self,
        key: &StreamKey,
        changed: &Arc<Notify>,
    ) -> Result<&mut Sender, StreamError> {
        match self.senders.get_mut(key) {
            Some(sender) if Arc::ptr_eq(&sender.changed, changed) => match &sender.failed {
                None => Ok(sender),
                Some(error) => Err(error.clone()),
            },
            _ => Err(StreamError::Closed),
        }
    }
}

/// The sending end of a stream.
#[derive(Debug)]
pub struct Sink {
    table: Arc<Table>,
    key: StreamKey,
    changed: Arc<Notify>,
}

impl Sink {
    /// The stream.
    pub fn key(&self) -> &StreamKey {
        &self.key
    }

    /// Adds all of `bytes`; waits while the stream is full.
    ///
    /// # Errors
    /// The stream was closed or removed, or the guest restarted.
    pub async fn write(&self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let taken = self.push(bytes)?;
            if taken == 0 {
                changed.await;
            } else {
                self.table.wake.notify_one();
            }
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn push(&self, bytes: &[u8]) -> Result<usize, StreamError> {
        let mut guard = self.table.lock();
        let inner = &mut *guard;
        let sender = inner.sender(&self.key, &self.changed)?;
        if sender.buffer.is_closed() {
            return Err(StreamError::Closed);
        }
        let taken = sender.buffer.push(bytes);
        if taken > 0 && !sender.has_turn {
            sender.has_turn = true;
            inner.turns.push_back(Turn::Data(self.key.clone()));
        }
        Ok(taken)
    }

    /// Ends the stream after what was written.
    pub fn close(&self) {
        let mut guard = self.table.lock();
        let inner = &mut *guard;
        if let Ok(sender) = inner.sender(&self.key, &self.changed) {
            sender.buffer.close();
            sender.changed.notify_waiters();
            if !sender.has_turn {
                sender.has_turn = true;
                inner.turns.push_back(Turn::Data(self.key.clone()));
            }
        }
        drop(guard);
        self.table.wake.notify_one();
    }

    /// Waits until the other side is done with everything, the end included.
    ///
    /// # Errors
    /// The stream was removed, or the guest restarted.
    pub async fn drained(&self) -> Result<(), StreamError> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self
                .table
                .lock()
                .sender(&self.key, &self.changed)?
                .buffer
                .is_drained()
            {
                return Ok(());
            }
            changed.await;
        }
    }
}

/// The receiving end of a stream.
#[derive(Debug)]
pub(super) struct Source {
    table: Arc<Table>,
    key: StreamKey,
    changed: Arc<Notify>,
}

impl Source {
    pub(super) fn key(&self) -> &StreamKey {
        &self.key
    }

    /// The next bytes and their offset; `None` at the end. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, StreamError> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let mut guard = self.table.lock();
                let inner = &mut *guard;
                let receiver = match inner.receivers.get_mut(&self.key) {
                    Some(receiver) if Arc::ptr_eq(&receiver.changed, &self.changed) => receiver,
                    _ => return Err(StreamError::Closed),
                };
                if let Some(piece) = receiver.buffer.pop() {
                    if receiver.done_on_arrival {
                        // There is room again.
                        inner.give_ack_turn(&self.key);
                        self.table.wake.notify_one();
                    }
                    return Ok(Some(piece));
                }
                if receiver.buffer.is_finished() {
                    return Ok(None);
                }
                if let Some(error) = &receiver.failed {
                    return Err(error.clone());
                }
            }
            changed.await;
        }
    }

    /// The other side may forget all below `offset`. With the last byte the end is
    /// acknowledged too, once it arrived.
    pub(super) fn done(&self, offset: u64) {
        let mut guard = self.table.lock();
        let inner = &mut *guard;
        let Some(receiver) = inner.receivers.get_mut(&self.key) else {
            return;
        };
        if !Arc::ptr_eq(&receiver.changed, &self.changed) {
            return;
        }
        let bytes = receiver.buffer.bytes_received();
        let mut done = offset.min(bytes);
        if done == bytes && receiver.buffer.is_finished() {
            done = receiver.buffer.received();
        }
        if done > receiver.done {
            receiver.done = done;
            inner.give_ack_turn(&self.key);
            drop(guard);
            self.table.wake.notify_one();
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let mut guard = self.table.lock();
        let inner = &mut *guard;
        let ours = |receiver: &Receiver| Arc::ptr_eq(&receiver.changed, &self.changed);
        if !inner.receivers.get(&self.key).is_some_and(ours) {
            return;
        }
        let Some(receiver) = inner.receivers.remove(&self.key) else {
            return;
        };
        let is_its = |turn: &&mut Turn| matches!(turn, Turn::Ack(key) if *key == self.key);
        if let Some(turn) = inner.turns.iter_mut().find(is_its) {
            // What was acknowledged last is still told, before a next reader asks.
            let (key, offset) = (self.key.clone(), receiver.done);
            *turn = Turn::Done { key, offset };
        }
    }
}
