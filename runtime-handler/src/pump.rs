//! Carries a process's stdio between its pipes (or its terminal) and containerd's FIFOs.
//!
//! ```text
//!  FIFO stdin  --feed--> pipe / pty master --> process
//!  FIFO stdout <--copy-- pipe / pty master <-- process      ends at EOF (pty: EIO)
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

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown, pipe2, read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::outlet::Outlet;
use crate::spec::Stdio;

/// A quarter of what a pipe holds. It stays resident once there was output.
const BUFFER_BYTES: usize = 16 * 1024;

/// How long a FIFO's reader may take once nothing more comes, and between two looks.
const READ: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(4);

thread_local! {
    /// Shared by all streams of a thread: between its read and its write, no other runs.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A file descriptor to be read or written without blocking the thread: a pipe, FIFO,
/// terminal or socket; or a file, which never blocks and cannot be polled.
#[derive(Debug)]
pub struct Fd(Kind);

#[derive(Debug)]
enum Kind {
    Polled(AsyncFd<OwnedFd>),
    /// epoll refuses it: a regular file or a device like `/dev/null`.
    Plain(OwnedFd),
}

impl Fd {
    /// Takes `fd` and sets it to non-blocking.
    ///
    /// # Errors
    /// `fcntl` or `epoll_ctl` refused.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        // Not every fd can be written or read, but epoll takes interest in both.
        // SAFETY: an OwnedFd is open, and the AsyncFd that now owns it never swaps it
        // for another nor hands it out before its end.
        match unsafe { AsyncFd::register(fd) } {
            Ok(polled) => Ok(Self(Kind::Polled(polled))),
            Err(error) => match error.into_parts() {
                (fd, cause) if cause.raw_os_error() == Some(libc::EPERM) => {
                    Ok(Self(Kind::Plain(fd)))
                }
                (_, cause) => Err(cause),
            },
        }
    }

    /// Reads what there is, waiting for the first byte; 0 is the end (a terminal's
    /// `EIO`, which tells that nobody has it open any more, is that too).
    ///
    /// # Errors
    /// What `read(2)` says.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.when(Interest::READABLE, |fd| read_some(fd, buffer))
            .await
    }

    /// Reads what is there now; `None`: nothing.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match read_some(self.as_fd(), buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            other => other.map(Some),
        }
    }

    /// Writes all of `bytes`, waiting for room.
    ///
    /// # Errors
    /// What `write(2)` says (`EPIPE`: the reader is gone); a part may be written.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .when(Interest::WRITABLE, |fd| write_some(fd, bytes))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Returns when the other end of this pipe is closed; never for other fds.
    async fn reader_is_gone(&self) {
        match &self.0 {
            Kind::Polled(polled) => {
                if polled.ready(Interest::ERROR).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Kind::Plain(_) => std::future::pending().await,
        }
    }

    async fn when<T>(
        &self,
        interest: Interest,
        mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.0 {
            Kind::Polled(polled) => polled.async_io(interest, |fd| act(fd.as_fd())).await,
            Kind::Plain(fd) => {
                // A file never makes us wait, so make room for others here.
                tokio::task::consume_budget().await;
                act(fd.as_fd())
            }
        }
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Polled(polled) => polled.get_ref().as_fd(),
            Kind::Plain(fd) => fd.as_fd(),
        }
    }
}

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
    /// How many outputs have not come to their end.
    outputs: watch::Receiver<usize>,
    copies: Vec<Copying>,
    /// Changes whenever an output got on.
    moved: watch::Receiver<()>,
    feed: Option<Feeding>,
    outlet: Outlet,
    _tasks: JoinSet<()>,
}

/// An output, as [`Pump::settled`] looks at it.
#[derive(Debug)]
struct Copying {
    /// Gone with its stream.
    from: Weak<Fd>,
    /// Bytes were read that are not written yet.
    carrying: Arc<AtomicBool>,
    /// Gone with its stream.
    to: Weak<Fd>,
}

impl Copying {
    fn is_settled(&self) -> bool {
        // The process may end in between, so look at the pipe first.
        let empty = self
            .from
            .upgrade()
            .is_none_or(|fd| unread_bytes(fd.as_fd()) == 0);
        empty && !self.carrying.load(Ordering::Relaxed)
    }

    /// Whether the FIFO's reader has all of it.
    fn is_read(&self) -> bool {
        self.to
            .upgrade()
            .is_none_or(|fifo| unread_bytes(fifo.as_fd()) == 0)
    }
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
        let master = Arc::new(Fd::new(master)?);
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
                if self.copies.iter().all(Copying::is_settled) {
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
            while !self.copies.iter().all(Copying::is_read) {
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
        let size = libc::winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one `winsize`, which `size` is, and keeps nothing.
        let result = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) };
        Ok(Errno::result(result).map(drop)?)
    }

    /// Where the outputs go, to see at the end that they were read. Once: later there is
    /// nothing in it.
    pub fn take_outlet(&mut self) -> Outlet {
        std::mem::take(&mut self.outlet)
    }

    /// Waits until every output came to its end, at most `bound` (something still
    /// holds the pipe, or nobody reads the FIFO). Returns whether they did.
    pub async fn drained(&self, bound: Duration) -> bool {
        let mut outputs = self.outputs.clone();
        let ended = outputs.wait_for(|open| *open == 0);
        // An error tells that the last task, and so the last output, is gone.
        tokio::time::timeout(bound, ended).await.is_ok()
    }
}

/// The tasks of a pump that is being put together.
struct Streams {
    close_stdin: Arc<Notify>,
    outputs: Arc<watch::Sender<usize>>,
    copies: Vec<Copying>,
    moved: Arc<watch::Sender<()>>,
    feed: Option<Feeding>,
    outlet: Outlet,
    tasks: JoinSet<()>,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            close_stdin: Arc::default(),
            outputs: Arc::new(watch::Sender::new(0)),
            copies: Vec::new(),
            moved: Arc::new(watch::Sender::new(())),
            feed: None,
            outlet: Outlet::default(),
            tasks: JoinSet::new(),
        }
    }
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
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
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
        let fifo = Arc::new(Fd::new(fifo)?);
        let open = OpenOutput::new(Arc::clone(&self.outputs));
        self.copies.push(Copying {
            from: Arc::downgrade(&process),
            carrying: Arc::clone(&carrying),
            to: Arc::downgrade(&fifo),
        });
        let moved = Arc::clone(&self.moved);
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
            outputs: self.outputs.subscribe(),
            copies: self.copies,
            moved: self.moved.subscribe(),
            feed: self.feed,
            outlet: self.outlet,
            _tasks: self.tasks,
        }
    }
}

/// Counts an output as open until dropped, however its task ends.
struct OpenOutput(Arc<watch::Sender<usize>>);

impl OpenOutput {
    fn new(outputs: Arc<watch::Sender<usize>>) -> Self {
        outputs.send_modify(|open| *open += 1);
        Self(outputs)
    }
}

impl Drop for OpenOutput {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
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
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(Turn::Moved(bytes.to_vec()))
            }
            Err(error) => Err(error),
        })
    })
}

/// Copies until the end of `from`. When nobody can take the bytes any more it goes on
/// reading, so that the process neither blocks nor dies of what is not its fault.
/// `progress` is told of every turn, and whether bytes are under way.
async fn copy(from: &Fd, to: &Fd, progress: impl Fn(bool)) -> io::Result<()> {
    loop {
        let moved = match from.when(Interest::READABLE, |fd| turn(fd, to)).await? {
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
async fn feed(fifo: &Fd, process: &Fd, close: &Notify, feeding: &Feeding) -> io::Result<()> {
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

/// As [`Fd::write_all`], of what [`Pump::hold_stdin`] sees.
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

/// Bytes that can be read from a pipe or a terminal.
fn unread_bytes(fd: BorrowedFd<'_>) -> i32 {
    let mut count = 0;
    // SAFETY: FIONREAD writes one int, which `count` is, and keeps nothing.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut count) } {
        0 => count,
        _ => 0,
    }
}

/// What the pipe at `path` (in `/proc/PID/fd`) holds, which stays in it.
///
/// # Errors
/// It is no pipe, or what tee(2) says.
pub fn peek(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let pipe = open(path, flags, Mode::empty())?;
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let room = fcntl(&pipe, FcntlArg::F_GETPIPE_SZ)?;
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(room))?;
    let room = usize::try_from(room).unwrap_or(0);
    match tee(&pipe, &writer, room, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(errno) => return Err(errno.into()),
    }
    drop(writer);
    let mut bytes = Vec::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match read_some(reader.as_fd(), &mut buffer)? {
            0 => return Ok(bytes),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
    }
}

fn read_some(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        return match read(fd, buffer) {
            Err(Errno::EINTR) => continue,
            Err(Errno::EIO) => Ok(0),
            other => Ok(other?),
        };
    }
}

/// Writes as much of `bytes` as fits now; an error only where not one byte did.
fn write_some(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        return match write(fd, bytes) {
            Err(Errno::EINTR) => continue,
            other => Ok(other?),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::process::Command;

    use nix::pty::openpty;
    use nix::sys::stat::Mode;
    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    const BOUND: Duration = Duration::from_secs(10);

    /// A FIFO as the shim opens it, and a second handle as containerd has.
    fn fifo() -> (TempDir, OwnedFd, Fd) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let open =
            || nix::fcntl::open(&path, OFlag::O_RDWR | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
        let (ours, theirs) = (open(), Fd::new(open()).unwrap());
        (dir, ours, theirs)
    }

    async fn read_exactly(fd: &Fd, length: usize) -> Vec<u8> {
        let mut all = vec![0; length];
        let mut at = 0;
        while at < length {
            let got = timeout(BOUND, fd.read(&mut all[at..]))
                .await
                .unwrap()
                .unwrap();
            assert!(got > 0);
            at += got;
        }
        all
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect()
    }

    #[tokio::test]
    async fn no_byte_is_lost_when_the_process_ends_and_the_reader_is_slow() {
        let (_dir, ours, theirs) = fifo();
        let (pump, ends) = Pump::pipes(Stdio {
            stdout: Some(ours),
            ..Stdio::default()
        })
        .unwrap();
        let sent = pattern(1_000_000);
        let writer = std::thread::spawn({
            let sent = sent.clone();
            move || File::from(ends.stdout.unwrap()).write_all(&sent).unwrap()
        });
        assert_eq!(read_exactly(&theirs, sent.len()).await, sent);
        writer.join().unwrap();
        assert!(pump.drained(BOUND).await);
    }

    #[tokio::test]
    async fn draining_is_bounded_when_something_holds_the_pipe() {
        let (_dir, ours, theirs) = fifo();
        let (pump, ends) = Pump::pipes(Stdio {
            stderr: Some(ours),
            ..Stdio::default()
        })
        .unwrap();
        let mut held = File::from(ends.stderr.unwrap());
        held.write_all(b"last words").unwrap();
        assert!(!pump.drained(Duration::from_millis(50)).await);
        assert_eq!(read_exactly(&theirs, 10).await, b"last words");
        drop(held);
        assert!(pump.drained(BOUND).await);
    }

    #[tokio::test]
    async fn closing_stdin_hands_over_what_the_fifo_holds() {
        let (_dir, ours, theirs) = fifo();
        let (pump, ends) = Pump::pipes(Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        })
        .unwrap();
        // All of it is in the FIFO before the pump has run once.
        let sent = pattern(50_000);
        theirs.write_all(&sent).await.unwrap();
        pump.close_stdin();
        let reader = tokio::task::spawn_blocking(move || {
            let mut got = Vec::new();
            File::from(ends.stdin.unwrap())
                .read_to_end(&mut got)
                .unwrap();
            got
        });
        let got = timeout(BOUND, reader).await.unwrap().unwrap();
        assert_eq!(got, sent);
    }

    #[tokio::test]
    async fn stdin_waits_for_a_process_that_reads_slowly_and_then_closes() {
        let (_dir, ours, theirs) = fifo();
        let (pump, ends) = Pump::pipes(Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        })
        .unwrap();
        // More than FIFO and pipe together hold.
        let sent = pattern(500_000);
        let expected = sent.clone();
        let end = Fd::new(ends.stdin.unwrap()).unwrap();
        let (written, got) = tokio::join!(
            async {
                theirs.write_all(&sent).await.unwrap();
                pump.close_stdin();
            },
            async {
                let got = read_exactly(&end, expected.len()).await;
                let mut rest = [0; 1];
                let end_of_file = end.read(&mut rest);
                assert_eq!(timeout(BOUND, end_of_file).await.unwrap().unwrap(), 0);
                got
            }
        );
        let () = written;
        assert_eq!(got, expected);
    }

    #[tokio::test]
    async fn stdin_that_the_process_closed_stays_in_the_fifo() {
        let (_dir, ours, theirs) = fifo();
        let (mut pump, ends) = Pump::pipes(Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        })
        .unwrap();
        drop(ends);
        timeout(BOUND, pump._tasks.join_next()).await.unwrap();
        theirs.write_all(b"for the next").await.unwrap();
        assert_eq!(read_exactly(&theirs, 12).await, b"for the next");
    }

    #[tokio::test]
    async fn output_is_settled_when_all_of_it_is_in_the_fifo() {
        let (_dir, ours, theirs) = fifo();
        let stdio = Stdio {
            stdout: Some(ours),
            ..Stdio::default()
        };
        let (pump, ends) = Pump::pipes(stdio).unwrap();
        assert!(pump.settled(BOUND).await, "nothing was written");
        // More than the FIFO takes, less than it and the pipe do.
        let process = Fd::new(ends.stdout.unwrap()).unwrap();
        let bytes = pattern(100_000);
        process.write_all(&bytes[..60_000]).await.unwrap();
        assert!(pump.settled(BOUND).await);
        assert_eq!(unread_bytes(theirs.as_fd()), 60_000);
        process.write_all(&bytes[60_000..]).await.unwrap();
        assert!(
            !pump.settled(Duration::from_millis(50)).await,
            "nobody reads"
        );
        assert!(read_exactly(&theirs, 90_000).await == bytes[..90_000]);
        assert!(pump.settled(BOUND).await);
        assert!(read_exactly(&theirs, 10_000).await == bytes[90_000..]);
    }

    #[tokio::test]
    async fn stdin_that_was_not_read_goes_on_in_another_process() {
        let (_dir, ours, theirs) = fifo();
        let stdio = Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        };
        let (pump, ends) = Pump::pipes(stdio).unwrap();
        let bytes = pattern(135_000);
        // The pipe is full, there is a rest, and the FIFO holds more.
        theirs.write_all(&bytes).await.unwrap();
        let process = Fd::new(ends.stdin.unwrap()).unwrap();
        let mut read = vec![0; 1000];
        process.read(&mut read).await.unwrap();
        let unread = pump.hold_stdin().unwrap();
        assert!(!unread.closed);
        assert_eq!(pump.hold_stdin().unwrap(), unread, "looking takes nothing");
        let taken = 1000 + unread.bytes.len();
        assert!(unread.bytes == bytes[1000..taken]);
        let left = usize::try_from(unread_bytes(theirs.as_fd())).unwrap();
        assert_eq!(taken + left, bytes.len(), "held back");

        // It did not leave after all.
        pump.release_stdin();
        assert!(read_exactly(&process, 134_000).await == bytes[1000..]);

        let (_dir, ours, theirs) = fifo();
        let stdio = Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        };
        let (pump, ends) = Pump::resumed(stdio, &unread).unwrap();
        let process = Fd::new(ends.stdin.unwrap()).unwrap();
        theirs.write_all(b"more").await.unwrap();
        let got = read_exactly(&process, unread.bytes.len() + 4).await;
        assert!(got[..unread.bytes.len()] == unread.bytes && got.ends_with(b"more"));
        pump.close_stdin();
        assert_eq!(process.read(&mut read).await.unwrap(), 0);
        assert!(pump.hold_stdin().unwrap().closed);
    }

    #[tokio::test]
    async fn stdin_that_was_closed_stays_so_in_another_process() {
        let (_dir, ours, _theirs) = fifo();
        let stdio = Stdio {
            stdin: Some(ours),
            ..Stdio::default()
        };
        let unread = Unread {
            bytes: b"last".to_vec(),
            closed: true,
        };
        let (_pump, ends) = Pump::resumed(stdio, &unread).unwrap();
        let process = Fd::new(ends.stdin.unwrap()).unwrap();
        assert_eq!(read_exactly(&process, 4).await, b"last");
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_terminal_ends_with_its_last_user() {
        let (_in, stdin, type_here) = fifo();
        let (_out, stdout, shown) = fifo();
        let pty = openpty(None, None).unwrap();
        let pump = Pump::terminal(
            Stdio {
                stdin: Some(stdin),
                stdout: Some(stdout),
                terminal: true,
                ..Stdio::default()
            },
            pty.master,
        )
        .unwrap();
        pump.resize(123, 45).unwrap();
        let (input, output) = (pty.slave.try_clone().unwrap(), pty.slave);
        let child = Command::new("sh")
            .args(["-c", "stty -echo; read line; stty size; echo \"<$line>\""])
            .stdin(input)
            .stdout(output)
            .spawn();
        type_here.write_all(b"hello\n").await.unwrap();
        assert!(pump.drained(BOUND).await);
        let mut text = vec![0; 1000];
        let length = shown.try_read(&mut text).unwrap().unwrap();
        let text = String::from_utf8_lossy(&text[..length]);
        assert!(text.ends_with("45 123\r\n<hello>\r\n"), "{text:?}");
        // Waited for here or by the reaper's tests, whoever comes first.
        let _ = child.unwrap().wait();
    }

    #[tokio::test]
    async fn only_a_terminal_can_be_resized() {
        let (pump, _ends) = Pump::pipes(Stdio::default()).unwrap();
        let error = pump.resize(80, 25).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[tokio::test]
    async fn output_goes_to_files_and_dev_null_as_well() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (pump, ends) = Pump::pipes(Stdio {
            stdout: Some(file.reopen().unwrap().into()),
            stderr: Some(
                File::options()
                    .write(true)
                    .open("/dev/null")
                    .unwrap()
                    .into(),
            ),
            ..Stdio::default()
        })
        .unwrap();
        for end in [ends.stdout, ends.stderr] {
            File::from(end.unwrap()).write_all(b"text").unwrap();
        }
        assert!(pump.drained(BOUND).await);
        assert_eq!(std::fs::read(file.path()).unwrap(), b"text");
    }

    #[tokio::test]
    async fn a_process_goes_on_when_nobody_can_take_its_output() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        drop(reader);
        let (pump, ends) = Pump::pipes(Stdio {
            stdout: Some(writer),
            ..Stdio::default()
        })
        .unwrap();
        let process = std::thread::spawn(move || {
            File::from(ends.stdout.unwrap()).write_all(&pattern(300_000))
        });
        assert!(pump.drained(BOUND).await);
        process.join().unwrap().unwrap();
    }
}
