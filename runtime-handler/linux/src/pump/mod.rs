//! Carries a process's stdio between its pipes (or its terminal) and containerd's FIFOs.
//!
//! ```text
//!  FIFO stdin  --feed--> pipe / pty master --> process
//!  FIFO stdout <--copy-- pipe / pty master <-- process      ends at EOF (pty: process ended, and EIO)
//!  FIFO stderr <--copy-- pipe              <-- process      ends at EOF
//! ```
//!
//! An output ends when the last writer is gone, so all that a process wrote before it
//! ended arrives. A grandchild may hold the pipe for ever: [`Pump::drained`] is bounded.
//! An idle stream costs a task and no buffer.
//!
//! A process that moves to another node takes no output with it: once it is frozen,
//! [`Pump::settled`] waits until all that it wrote is in containerd's FIFO. What it has
//! not read of its stdin goes along: [`Pump::hold_stdin`] there, [`Pump::resumed`] here.

mod carry;
mod fd;
mod terminal;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

pub use fd::{Fd, peek};

use crate::outlet::{OpenOutputs, Outlet};
use carry::{copy, feed};
use dyad_runtime_handler::spec::Stdio;
use fd::write_some;

/// How long a FIFO's reader may take once nothing more comes, and between two looks.
const READ: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(4);

/// What the process gets; `None` is `/dev/null`. Drop these once it runs, or its
/// output never ends.
#[derive(Debug, Default)]
pub struct Ends {
    /// To be read by the process.
    pub stdin: Option<OwnedFd>,
    /// To be written by the process.
    pub stdout: Option<OwnedFd>,
    /// To be written by the process.
    pub stderr: Option<OwnedFd>,
}

impl Ends {
    /// Gives the pipes to the user the process runs as, which may open them again
    /// through `/dev/stdout`.
    ///
    /// # Errors
    /// What `fchown(2)` says.
    pub fn chown(&self, uid: u32, gid: u32) -> io::Result<()> {
        for end in [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
        {
            fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        Ok(())
    }
}

/// The running streams of one process. Dropping it ends them at once.
#[derive(Debug)]
pub struct Pump {
    /// The terminal, where the process has one.
    master: Option<Arc<Fd>>,
    close_stdin: Arc<Notify>,
    outputs: OpenOutputs,
    /// Changes whenever an output got on.
    moved: watch::Receiver<()>,
    feed: Option<Feeding>,
    outlet: Outlet,
    _tasks: JoinSet<()>,
}

/// The stdin of a process.
#[derive(Debug, Clone)]
struct Feeding {
    /// Gone when it is closed.
    to: Weak<Fd>,
    hold: Arc<watch::Sender<bool>>,
    /// Taken from the FIFO, for which the pipe has no room yet.
    rest: Arc<Mutex<Vec<u8>>>,
}

impl Feeding {
    fn rest(&self) -> MutexGuard<'_, Vec<u8>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a process has not read of its stdin.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unread {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Nothing comes after them. Those that were in the pipe when it was closed are not
    /// in `bytes`: only the process has them, see [`peek`].
    pub closed: bool,
}

impl Pump {
    /// Makes pipes for a process without a terminal and starts to carry.
    ///
    /// # Errors
    /// No pipe could be made, or a FIFO cannot be polled.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn pipes(stdio: Stdio) -> io::Result<(Self, Ends)> {
        Self::resumed(stdio, &Unread::default())
    }

    /// The same for a process that goes on: it reads `unread` before what comes.
    ///
    /// # Errors
    /// As [`Self::pipes`]; more bytes than a pipe holds.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn resumed(stdio: Stdio, unread: &Unread) -> io::Result<(Self, Ends)> {
        let mut ends = Ends::default();
        let mut streams = Streams::default();
        if let Some(fifo) = stdio.stdin {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            let writer = Fd::new(writer)?;
            let room = fcntl(&writer, FcntlArg::F_GETPIPE_SZ)?;
            if unread.bytes.len() > usize::try_from(room).unwrap_or(0) {
                fcntl(
                    &writer,
                    FcntlArg::F_SETPIPE_SZ(unread.bytes.len().try_into().unwrap_or(i32::MAX)),
                )?;
            }
            let written = match unread.bytes.as_slice() {
                [] => 0,
                bytes => write_some(writer.as_fd(), bytes)?,
            };
            if written < unread.bytes.len() {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            if !unread.closed {
                streams.feed(fifo, Arc::new(writer))?;
            }
            ends.stdin = Some(reader);
        }
        for (fifo, end) in [
            (stdio.stdout, &mut ends.stdout),
            (stdio.stderr, &mut ends.stderr),
        ] {
            let Some(fifo) = fifo else { continue };
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            streams.copy(Arc::new(Fd::new(reader)?), fifo)?;
            *end = Some(writer);
        }
        Ok((streams.into_pump(None), ends))
    }

    /// Carries between a terminal's master side and the FIFOs.
    ///
    /// # Errors
    /// The terminal or a FIFO cannot be polled.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn terminal(stdio: Stdio, master: OwnedFd) -> io::Result<Self> {
        let master = Arc::new(Fd::terminal(master)?);
        let mut streams = Streams::default();
        if let Some(fifo) = stdio.stdin {
            streams.feed(fifo, Arc::clone(&master))?;
        }
        if let Some(fifo) = stdio.stdout {
            streams.copy(Arc::clone(&master), fifo)?;
        }
        Ok(streams.into_pump(Some(master)))
    }

    /// Lets the process have what the stdin FIFO still holds, then closes its end (a
    /// terminal has none: it just gets no more). Returns at once: a process that does
    /// not read keeps nobody waiting.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Keeps what comes on the stdin FIFO there, until [`Self::release_stdin`], and tells
    /// what the process has not read. It must be frozen, or it reads on.
    ///
    /// # Errors
    /// The pipe cannot be looked into.
    pub fn hold_stdin(&self) -> io::Result<Unread> {
        let Some(feed) = &self.feed else {
            return Ok(Unread::default());
        };
        feed.hold.send_replace(true);
        let Some(pipe) = feed.to.upgrade() else {
            return Ok(Unread {
                bytes: Vec::new(),
                closed: true,
            });
        };
        let path = format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd());
        let mut bytes = peek(Path::new(&path))?;
        bytes.extend_from_slice(&feed.rest());
        Ok(Unread {
            bytes,
            closed: false,
        })
    }

    /// Undoes [`Self::hold_stdin`].
    pub fn release_stdin(&self) {
        if let Some(feed) = &self.feed {
            feed.hold.send_replace(false);
        }
    }

    /// Waits until all that the process wrote is in the FIFOs, at most `bound` (nobody
    /// reads a FIFO), and a moment for it to be read from there: containerd 1.6 loses the
    /// rest when it hears of the end. Returns whether it is in the FIFOs. The process must
    /// be frozen, or it writes on.
    pub async fn settled(&self, bound: Duration) -> bool {
        let mut moved = self.moved.clone();
        let settled = async {
            loop {
                moved.borrow_and_update();
                if self.outlet.is_carried() {
                    return;
                }
                if moved.changed().await.is_err() {
                    // The last stream is gone, with all that it had.
                    return;
                }
            }
        };
        if tokio::time::timeout(bound, settled).await.is_err() {
            return false;
        }
        let read = async {
            // A FIFO tells nothing of its reader, so this looks.
            while !self.outlet.is_read() {
                tokio::time::sleep(LOOK).await;
            }
        };
        // One that does not read has its time when the process has ended.
        let _ = tokio::time::timeout(READ, read).await;
        true
    }

    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// `ENOTTY` without a terminal, else what the ioctl says.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let master = self.master.as_ref().ok_or(Errno::ENOTTY)?;
        resize(&**master, width, height)
    }

    /// Where the outputs go, to see at the end that they were read. Once: later there is
    /// nothing in it, neither for [`Self::settled`].
    pub fn take_outlet(&mut self) -> Outlet {
        std::mem::take(&mut self.outlet)
    }

    /// The process has ended: waits until every output came to its end, at most `bound` (something still
    /// holds the pipe, or nobody reads the FIFO). Returns whether they did.
    pub async fn drained(&self, bound: Duration) -> bool {
        if let Some(master) = &self.master {
            master.process_ended();
        }
        self.outputs.ended(bound).await
    }
}

/// Sets a terminal's size in characters, from either end.
///
/// # Errors
/// What the ioctl says; `ENOTTY`: it is no terminal.
pub fn resize(terminal: impl AsFd, width: u16, height: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// The tasks of a pump that is being put together.
#[derive(Default)]
struct Streams {
    close_stdin: Arc<Notify>,
    outputs: OpenOutputs,
    moved: watch::Sender<()>,
    feed: Option<Feeding>,
    outlet: Outlet,
    tasks: JoinSet<()>,
}

impl Streams {
    fn feed(&mut self, fifo: OwnedFd, process: Arc<Fd>) -> io::Result<()> {
        let fifo = Fd::new(fifo)?;
        let close = Arc::clone(&self.close_stdin);
        let feeding = Feeding {
            to: Arc::downgrade(&process),
            hold: Arc::new(watch::Sender::new(false)),
            rest: Arc::default(),
        };
        self.feed = Some(feeding.clone());
        self.tasks.spawn(async move {
            match feed(&fifo, &process, &close, &feeding).await {
                // It does not read (any more), which is its own business.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EIO)) => {}
                Err(error) => log::warn!("stdin ends early: {error}"),
                Ok(()) => {}
            }
        });
        Ok(())
    }

    fn copy(&mut self, process: Arc<Fd>, fifo: OwnedFd) -> io::Result<()> {
        let carrying = Arc::new(AtomicBool::new(false));
        self.outlet.add(
            fifo.as_fd(),
            Arc::downgrade(&process),
            Arc::clone(&carrying),
        )?;
        let fifo = Fd::new(fifo)?;
        let open = self.outputs.add();
        let moved = self.moved.clone();
        self.tasks.spawn(async move {
            let _open = open;
            let progress = |is_carrying| {
                carrying.store(is_carrying, Ordering::Relaxed);
                moved.send_replace(());
            };
            if let Err(error) = copy(&process, &fifo, progress).await {
                log::warn!("output ends early: {error}");
            }
        });
        Ok(())
    }

    fn into_pump(self, master: Option<Arc<Fd>>) -> Pump {
        Pump {
            master,
            close_stdin: self.close_stdin,
            outputs: self.outputs,
            moved: self.moved.subscribe(),
            feed: self.feed,
            outlet: self.outlet,
            _tasks: self.tasks,
        }
    }
}
