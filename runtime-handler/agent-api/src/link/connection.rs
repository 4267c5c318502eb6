//! Moves bytes between one channel and one side of the link.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::frame::{Decoder, Frame, FrameError};

/// About as many bytes are given to one write.
pub(super) const BATCH: usize = 64 << 10;

/// Bytes asked of one read. A virtio-serial port gives no more than a page per buffer.
const READ: usize = 16 << 10;

/// One side of the link, as a connection sees it.
pub(super) trait Side {
    /// Appends what is to be sent, about [`BATCH`] bytes at most. `Some`: ask again
    /// after this time at the latest, if nothing woke it before.
    fn fill(&self, out: &mut Vec<u8>) -> Option<Duration>;

    /// Takes what came.
    fn take(&self, frame: Result<Frame, FrameError>);

    /// Is notified when [`Side::fill`] may have something.
    fn wake(&self) -> &Notify;
}

/// Serves `side` over the channel until that ends; `Ok` when the other end closed it.
pub(super) async fn run<S: Side>(
    side: &S,
    max_body: usize,
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    tokio::select! {
        ended = receive(side, max_body, reader) => ended,
        failed = send(side, writer) => failed,
    }
}

async fn receive<S: Side>(
    side: &S,
    max_body: usize,
    mut reader: impl AsyncRead + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    let mut decoder = Decoder::new(max_body);
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let mut bytes = &buffer[..count];
        while let Some(frame) = decoder.next(&mut bytes) {
            side.take(frame);
        }
    }
}

async fn send<S: Side>(side: &S, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
    // Ends what an earlier host may have begun on the same channel.
    let mut out = vec![0];
    loop {
        let again = side.fill(&mut out);
        if !out.is_empty() {
            writer.write_all(&out).await?;
            writer.flush().await?;
            out.clear();
            continue;
        }
        out = Vec::new();
        match again {
            None => side.wake().notified().await,
            // Elapsed or woken, it is asked again.
            Some(after) => drop(tokio::time::timeout(after, side.wake().notified()).await),
        }
    }
}
