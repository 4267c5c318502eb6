//! Carries a guest process's stdio between the link's streams and containerd's FIFOs.
//!
//! Output is acknowledged once it is in the FIFO, so what a shim that dies had not yet
//! written is sent to the next one.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use dyad_agent_api::link::host::{InputWriter, OutputReader};
use dyad_agent_api::link::{StreamError, StreamKey};
use dyad_linux::outlet::{OpenOutputs, Outlet};
use dyad_linux::pump::Fd;
use log::warn;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// What one read of stdin takes at most.
const READ_BYTES: usize = 32 << 10;

/// The running streams of one process. Dropping it ends them at once.
#[derive(Debug, Default)]
pub struct Pump {
    close_stdin: Arc<Notify>,
    outputs: OpenOutputs,
    /// Below these offsets all of an output is in its FIFO.
    positions: Vec<(StreamKey, Arc<AtomicU64>)>,
    outlet: Mutex<Outlet>,
    tasks: JoinSet<()>,
}

impl Pump {
    /// Carries `fifo` to the process's stdin.
    ///
    /// # Errors
    /// The FIFO cannot be polled.
    pub fn feed(&mut self, fifo: OwnedFd, to: InputWriter) -> io::Result<()> {
        let fifo = Fd::new(fifo)?;
        let close = Arc::clone(&self.close_stdin);
        self.tasks.spawn(async move {
            if let Err(error) = feed(&fifo, &to, &close).await {
                warn!("{} ends early: {error}", to.key());
            }
        });
        Ok(())
    }

    /// Carries an output, which `from` reads from byte `offset` on, to `fifo`.
    ///
    /// # Errors
    /// The FIFO cannot be polled.
    pub fn copy(&mut self, from: OutputReader, offset: u64, fifo: OwnedFd) -> io::Result<()> {
        self.outlet
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .add(fifo.as_fd(), Weak::new(), Arc::default())?;
        let fifo = Fd::new(fifo)?;
        let open = self.outputs.add();
        let position = Arc::new(AtomicU64::new(offset));
        self.positions
            .push((from.key().clone(), Arc::clone(&position)));
        self.tasks.spawn(async move {
            let _open = open;
            copy(from, &fifo, &position).await;
        });
        Ok(())
    }

    /// Reads an output and drops it, so that a process whose reader is gone goes on.
    pub fn discard(&mut self, mut from: OutputReader) {
        self.tasks.spawn(async move {
            while let Ok(Some(chunk)) = from.next().await {
                from.ack(chunk.end());
            }
        });
    }

    /// How far each output is.
    pub fn positions(&self) -> impl Iterator<Item = (&StreamKey, u64)> {
        self.positions
            .iter()
            .map(|(key, position)| (key, position.load(Ordering::Relaxed)))
    }

    /// Hands over what the FIFO still holds, then closes the process's stdin.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Waits until every output came to its end, at most `within`, and was read. Once.
    pub async fn taken(&self, within: Duration) -> bool {
        let outlet =
            std::mem::take(&mut *self.outlet.lock().unwrap_or_else(PoisonError::into_inner));
        self.drained(within).await;
        outlet.taken().await
    }

    /// Waits until every output came to its end, at most `within`; returns whether.
    pub async fn drained(&self, within: Duration) -> bool {
        self.outputs.ended(within).await
    }
}

/// Copies until the end of the stream. When nobody can take the bytes any more it goes
/// on reading, so that the process neither blocks nor dies of what is not its fault.
async fn copy(mut from: OutputReader, fifo: &Fd, position: &AtomicU64) {
    let mut taken = true;
    let mut end = position.load(Ordering::Relaxed);
    loop {
        match from.next().await {
            Ok(Some(chunk)) => {
                if taken && let Err(error) = fifo.write_all(&chunk.data).await {
                    warn!("{} is dropped from here: {error}", from.key());
                    taken = false;
                }
                end = chunk.end();
                position.store(end, Ordering::Relaxed);
                from.ack(end);
            }
            Ok(None) => return from.ack(end),
            Err(error) => return warn!("{} ends early: {error}", from.key()),
        }
    }
}

/// Feeds the stream until the end of the FIFO, or until told to close.
async fn feed(fifo: &Fd, to: &InputWriter, close: &Notify) -> Result<(), FeedError> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let count = tokio::select! {
            biased;
            count = fifo.read(&mut buffer) => count?,
            () = close.notified() => break,
        };
        if count == 0 {
            break;
        }
        to.write(&buffer[..count]).await?;
    }
    while let Some(count @ 1..) = fifo.try_read(&mut buffer)? {
        to.write(&buffer[..count]).await?;
    }
    to.close();
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("read the FIFO: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Stream(#[from] StreamError),
}
