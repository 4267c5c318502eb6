//! How long a machine does not answer: ICMP echo requests every 5 ms, from outside.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

const EVERY: Duration = Duration::from_millis(5);
/// Larger than any answer to us.
const ANSWER: usize = 128;

/// A raw socket of the one process that asks.
struct Socket {
    fd: OwnedFd,
    to: SockaddrIn,
    id: u16,
}

impl Socket {
    fn new(to: Ipv4Addr) -> Result<Self> {
        let fd = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Icmp,
        )
        .context("open a raw socket")?;
        let wait = TimeVal::new(0, i64::try_from(EVERY.as_micros())?);
        setsockopt(&fd, ReceiveTimeout, &wait).context("bound recv")?;
        let [a, b, c, d] = to.octets();
        Ok(Self {
            fd,
            to: SockaddrIn::new(a, b, c, d, 0),
            id: u16::try_from(std::process::id() & 0xffff)?,
        })
    }

    fn ask(&self, sequence: u16) -> Result<()> {
        let packet = request(self.id, sequence);
        match sendto(self.fd.as_raw_fd(), &packet, &self.to, MsgFlags::empty()) {
            // Nobody has the address just now.
            Ok(_) | Err(Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EHOSTDOWN) => Ok(()),
            Err(error) => Err(error).context("send an echo request"),
        }
    }

    /// Whether an answer has come within a bounded time.
    fn answered(&self) -> Result<bool> {
        let mut answer = [0; ANSWER];
        match recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty()) {
            Ok(length) => Ok(is_answer(answer.get(..length).unwrap_or_default(), self.id)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(error) => Err(error).context("receive an echo reply"),
        }
    }
}

/// RFC 792, type 8, without data.
fn request(id: u16, sequence: u16) -> [u8; 8] {
    let ([a, b], [c, d]) = (id.to_be_bytes(), sequence.to_be_bytes());
    // The words' ones' complement sum; the checksum's own word counts 0.
    let sum = 0x0800 + u32::from(id) + u32::from(sequence);
    let folded = (sum & 0xffff) + (sum >> 16);
    let [e, f] = (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes();
    [8, 0, e, f, a, b, c, d]
}

/// An echo reply (type 0) to `id`, behind its IP header.
fn is_answer(packet: &[u8], id: u16) -> bool {
    let header = packet
        .first()
        .map_or(0, |first| usize::from(first & 15) * 4);
    packet
        .get(header..)
        .is_some_and(|icmp| icmp.len() >= 8 && icmp[0] == 0 && icmp[4..6] == id.to_be_bytes())
}

/// Asks all the time, until told to end.
pub struct Echo {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<Duration>>,
}

impl Echo {
    /// Begins once the machine at `address` has answered.
    ///
    /// # Errors
    /// It does not within `limit`, or no raw socket can be had.
    pub fn begin(address: Ipv4Addr, limit: Duration) -> Result<Self> {
        let socket = Socket::new(address)?;
        let deadline = Instant::now() + limit;
        socket.ask(0)?;
        while !socket.answered()? {
            if Instant::now() > deadline {
                bail!("{address} does not answer an echo request");
            }
            socket.ask(0)?;
        }
        let end = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&end);
        let thread = std::thread::spawn(move || listen(&socket, &told));
        Ok(Self { end, thread })
    }

    /// The longest time between two answers.
    ///
    /// # Errors
    /// It does not answer any more.
    pub fn end(self) -> Result<Duration> {
        self.end.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the thread that asks panicked"))?
    }
}

fn listen(socket: &Socket, end: &AtomicBool) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    let (mut asked, mut heard) = (Instant::now(), Instant::now());
    let mut sequence = 0_u16;
    loop {
        if asked.elapsed() >= EVERY {
            asked = Instant::now();
            sequence = sequence.wrapping_add(1);
            socket.ask(sequence)?;
        }
        if socket.answered()? {
            longest = longest.max(heard.elapsed());
            heard = Instant::now();
            if end.load(Ordering::Relaxed) {
                return Ok(longest);
            }
        } else if heard.elapsed() > Duration::from_secs(60) {
            bail!("no answer for a minute");
        }
    }
}
