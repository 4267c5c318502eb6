//! The far ends of a process's outputs: are they open, and when has all that it wrote been read?
//!
//! containerd 1.6 closes its ends of the FIFOs as soon as it hears of an exit, and what it
//! has not read by then is lost. So an exit is told once its output has been taken. A FIFO
//! tells its writer nothing of the reader's progress; this looks, and not for ever: nobody
//! reads while containerd restarts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::stat::{SFlag, fstat};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::fd::unread_bytes;
use crate::pump::Fd;

/// How long a reader may take; containerd's own shim waits as long for its output.
const WITHIN: Duration = Duration::from_secs(2);
/// Between two looks, at first and at most.
const STEP: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));

/// The outputs of one process that go to FIFOs (or a logging binary's pipes).
#[derive(Debug, Default)]
pub struct Outlet {
    outputs: Vec<Output>,
}

#[derive(Debug)]
struct Output {
    /// What the process writes into, while it is carried from there.
    source: Weak<Fd>,
    /// Bytes are between the two.
    carrying: Arc<AtomicBool>,
    /// None for a file, which has no reader.
    fifo: Option<OwnedFd>,
}

impl Outlet {
    /// Adds the output that goes to `fifo`, or to a file.
    ///
    /// # Errors
    /// No file descriptor is free.
    pub fn add(
        &mut self,
        fifo: BorrowedFd<'_>,
        source: Weak<Fd>,
        carrying: Arc<AtomicBool>,
    ) -> io::Result<()> {
        let kind = SFlag::from_bits_truncate(fstat(fifo)?.st_mode) & SFlag::S_IFMT;
        let is_fifo = kind == SFlag::S_IFIFO;
        self.outputs.push(Output {
            source,
            carrying,
            fifo: is_fifo.then(|| fifo.try_clone_to_owned()).transpose()?,
        });
        Ok(())
    }

    /// Whether all that was written is in the FIFOs and files.
    pub(crate) fn is_carried(&self) -> bool {
        self.outputs.iter().all(Output::is_carried)
    }

    /// Whether the readers have all that is in the FIFOs.
    pub(crate) fn is_read(&self) -> bool {
        self.outputs.iter().all(Output::is_read)
    }

    /// The process has ended: waits, for a bounded time, until all that it wrote is read;
    /// whether it is.
    /// The descriptors are closed then: the reader sees the end when nobody else has it.
    pub async fn taken(self) -> bool {
        for output in &self.outputs {
            if let Some(source) = output.source.upgrade() {
                source.process_ended();
            }
        }
        let deadline = Instant::now() + WITHIN;
        let (mut step, longest) = STEP;
        // In the order in which bytes move, so that none is overlooked.
        while !(self.is_carried() && self.is_read()) {
            if Instant::now() > deadline {
                return false;
            }
            sleep(step).await;
            step = (step * 2).min(longest);
        }
        true
    }
}

/// How many outputs of a process have not come to their end.
#[derive(Debug, Clone, Default)]
pub struct OpenOutputs(watch::Sender<usize>);

/// An output that is open until this is dropped, however its task ends.
#[derive(Debug)]
pub struct OpenOutput(OpenOutputs);

impl OpenOutputs {
    /// One more.
    pub fn add(&self) -> OpenOutput {
        self.0.send_modify(|open| *open += 1);
        OpenOutput(self.clone())
    }

    /// Waits until all have, at most `within`; returns whether they have.
    pub async fn ended(&self, within: Duration) -> bool {
        let mut count = self.0.subscribe();
        let ended = count.wait_for(|open| *open == 0);
        tokio::time::timeout(within, ended).await.is_ok()
    }
}

impl Drop for OpenOutput {
    fn drop(&mut self) {
        let OpenOutputs(count) = &self.0;
        count.send_modify(|open| *open -= 1);
    }
}

impl Output {
    fn is_carried(&self) -> bool {
        // The process may end in between, so look at the pipe first.
        let source = self.source.upgrade();
        let is_empty = source.is_none_or(|source| unread_bytes(source.as_fd()) == 0);
        is_empty && !self.carrying.load(Ordering::Relaxed)
    }

    fn is_read(&self) -> bool {
        self.fifo
            .as_ref()
            .is_none_or(|fifo| unread_bytes(fifo) == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    fn outlet(fifo: &OwnedFd) -> Outlet {
        let mut outlet = Outlet::default();
        outlet
            .add(fifo.as_fd(), Weak::new(), Arc::default())
            .unwrap();
        outlet
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_reads_is_waited_for_only_so_long() {
        let (_reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        File::from(writer.try_clone().unwrap())
            .write_all(b"unread")
            .unwrap();
        assert!(!outlet(&writer).taken().await);
    }

    #[tokio::test(start_paused = true)]
    async fn output_is_taken_once_it_is_read() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        File::from(writer.try_clone().unwrap())
            .write_all(b"words")
            .unwrap();
        let taken = tokio::spawn(outlet(&writer).taken());
        tokio::task::yield_now().await;
        assert!(!taken.is_finished());
        File::from(reader).read_exact(&mut [0; 5]).unwrap();
        assert!(taken.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_between_pipe_and_fifo_are_not_taken_yet() {
        let (_reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let carrying = Arc::new(AtomicBool::new(true));
        let mut outlet = Outlet::default();
        outlet
            .add(writer.as_fd(), Weak::new(), Arc::clone(&carrying))
            .unwrap();
        let taken = tokio::spawn(outlet.taken());
        tokio::task::yield_now().await;
        assert!(!taken.is_finished());
        carrying.store(false, Ordering::Relaxed);
        assert!(taken.await.unwrap());
    }

    #[tokio::test]
    async fn a_file_has_no_reader_to_wait_for() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(9).unwrap();
        assert!(outlet(&file.into()).taken().await);
    }
}
