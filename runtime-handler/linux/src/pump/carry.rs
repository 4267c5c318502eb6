//! One stream's way: read, written as far as there is room, and the rest waited for.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use tokio::io::Interest;
use tokio::sync::Notify;

use super::Feeding;
use super::fd::{Fd, read_some, write_some};
use super::terminal::is_hang_up;

/// A quarter of what a pipe holds. It stays resident once there was output.
const BUFFER_BYTES: usize = 16 * 1024;

thread_local! {
    /// Shared by all streams of a thread: between its read and its write, no other runs.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One turn of a stream.
enum Turn {
    End,
    /// Read and written as far as there was room; what is left of it.
    Moved(Vec<u8>),
}

/// What came from `from`, moved to `to` without waiting.
fn turn(from: BorrowedFd<'_>, to: &Fd) -> io::Result<io::Result<Turn>> {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER_BYTES, 0);
        let length = read_some(from, buffer)?;
        if length == 0 {
            return Ok(Ok(Turn::End));
        }
        let bytes = &buffer[..length];
        // Only the read's own "would block" may reach the caller as an error.
        Ok(match write_some(to.as_fd(), bytes) {
            Ok(written) => Ok(Turn::Moved(bytes[written..].to_vec())),
            // A terminal that nobody has open may be opened again; whoever writes the rest
            // waits for that.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_hang_up(&error) => {
                Ok(Turn::Moved(bytes.to_vec()))
            }
            Err(error) => Err(error),
        })
    })
}

/// Copies until the end of `from`. When nobody can take the bytes any more it goes on
/// reading, so that the process neither blocks nor dies of what is not its fault.
/// `progress` is told of every turn, and whether bytes are under way.
pub(super) async fn copy(from: &Fd, to: &Fd, progress: impl Fn(bool)) -> io::Result<()> {
    loop {
        let turn = match from.when(Interest::READABLE, |fd| turn(fd, to)).await {
            Err(error) if is_hang_up(&error) => return Ok(()),
            other => other?,
        };
        let moved = match turn {
            Ok(Turn::End) => return Ok(()),
            Ok(Turn::Moved(rest)) => {
                progress(!rest.is_empty());
                to.write_all(&rest).await
            }
            Err(error) => Err(error),
        };
        progress(false);
        if let Err(error) = moved {
            log::warn!("output is dropped from here: {error}");
            return discard(from).await;
        }
    }
}

async fn discard(from: &Fd) -> io::Result<()> {
    let mut buffer = [0; 4096];
    while from.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Feeds a process until the end of the FIFO, until told to close, or until the
/// process stops reading.
pub(super) async fn feed(
    fifo: &Fd,
    process: &Fd,
    close: &Notify,
    feeding: &Feeding,
) -> io::Result<()> {
    let mut hold = feeding.hold.subscribe();
    loop {
        let held = *hold.borrow_and_update();
        let turn = tokio::select! {
            biased;
            // First: what it will not read stays in the FIFO for its successor.
            () = process.reader_is_gone() => return Ok(()),
            // Its sender is in `feeding`.
            _ = hold.changed() => continue,
            turn = fifo.when(Interest::READABLE, |fd| turn(fd, process)), if !held => turn??,
            () = close.notified(), if !held => return hand_over(fifo, process, feeding).await,
        };
        match turn {
            Turn::End => return Ok(()),
            Turn::Moved(rest) => {
                *feeding.rest() = rest;
                write_rest(process, feeding).await?;
            }
        }
    }
}

/// As [`Fd::write_all`], of what [`super::Pump::hold_stdin`] sees.
async fn write_rest(process: &Fd, feeding: &Feeding) -> io::Result<()> {
    let mut hold = feeding.hold.subscribe();
    while !feeding.rest().is_empty() {
        if *hold.borrow_and_update() {
            let _ = hold.changed().await;
            continue;
        }
        let write = process.when(Interest::WRITABLE, |fd| {
            let mut rest = feeding.rest();
            let written = write_some(fd, &rest)?;
            rest.drain(..written);
            Ok(())
        });
        tokio::select! {
            biased;
            _ = hold.changed() => {}
            written = write => written?,
        }
    }
    Ok(())
}

/// Moves what the FIFO holds now.
async fn hand_over(fifo: &Fd, process: &Fd, feeding: &Feeding) -> io::Result<()> {
    loop {
        match turn(fifo.as_fd(), process) {
            Ok(Ok(Turn::Moved(rest))) => {
                *feeding.rest() = rest;
                write_rest(process, feeding).await?;
            }
            Ok(Ok(Turn::End)) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Ok(Err(error)) | Err(error) => return Err(error),
        }
    }
}
