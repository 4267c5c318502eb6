//! Waiting for devices: the kernel's uevents, never a timer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use dyad_linux::fd::register;
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The kernel's own multicast group (udev's is 2).
const KERNEL_GROUP: u32 = 1;

/// Asks `look` now and after every uevent, until it finds something.
///
/// # Errors
/// `DeadlineExceeded` naming `what` after `limit`; what `look` fails with.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    if let Some(found) = look()? {
        return Ok(found);
    }
    let events = listen().context(|| "listen for uevents".into())?;
    let wait = async {
        loop {
            // After listening began, so that nothing falls between look and wait.
            if let Some(found) = look()? {
                return Ok(found);
            }
            next(&events).await.context(|| format!("wait for {what}"))?;
        }
    };
    tokio::time::timeout(limit, wait).await.unwrap_or_else(|_| {
        Err(Error::DeadlineExceeded(format!(
            "{what} did not appear within {} s",
            limit.as_secs()
        )))
    })
}

fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    register(socket, Interest::READABLE)
}

/// Waits for at least one event and drops all that are there: they only say "look again".
async fn next(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = [0; 8192];
    let mut seen = false;
    while !seen {
        let mut ready = events.readable().await?;
        loop {
            match recv(events.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // ENOBUFS: events were lost, so something happened.
                Ok(_) | Err(Errno::ENOBUFS) => seen = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
