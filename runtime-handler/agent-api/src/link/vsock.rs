//! The link over AF_VSOCK.
//!
//! Any process of the host may connect to a guest, and any of the guest to itself. The one
//! that may is the shim, and it shows that as root does: its own port is below
//! [`PRIVILEGED`], which the host's kernel gives to nobody without CAP_NET_BIND_SERVICE.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr as Address, bind, connect as connect_to, socket,
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// Ports below this are root's.
const PRIVILEGED: u32 = 1024;

/// A socket in the guest that takes connections from the host.
#[derive(Debug)]
pub struct Listener(VsockListener);

impl Listener {
    /// Listens on `port` of every context id of this machine.
    ///
    /// # Errors
    /// The kernel has no vsock, or the port is taken.
    pub fn bind(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self)
    }

    /// Takes the next connection of the host's root; others are closed. Cancel safe.
    ///
    /// # Errors
    /// `accept` failed.
    pub async fn accept(&self) -> io::Result<VsockStream> {
        loop {
            let (stream, peer) = self.0.accept().await?;
            if is_roots_of_the_host(&peer) {
                return Ok(stream);
            }
            // Not in the log: whoever connects would fill it.
            log::debug!("{peer:?} is not the shim");
        }
    }
}

fn is_roots_of_the_host(peer: &VsockAddr) -> bool {
    peer.cid() == VMADDR_CID_HOST && peer.port() < PRIVILEGED
}

/// Connects to `port` of the machine with context id `cid`, from a privileged port.
///
/// # Errors
/// No such machine, or nobody listens there; this process may not bind such a port, or all
/// of them are taken.
pub async fn connect(cid: u32, port: u32) -> io::Result<VsockStream> {
    // The kernel waits some seconds for a guest that does not answer.
    let connected = tokio::task::spawn_blocking(move || {
        let socket = bound()?;
        connect_to(socket.as_raw_fd(), &Address::new(cid, port))?;
        io::Result::Ok(socket)
    });
    let socket = connected.await.map_err(io::Error::other)??;
    VsockStream::new(socket.into())
}

/// A socket with a privileged port of its own.
fn bound() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    for port in (PRIVILEGED / 2..PRIVILEGED).rev() {
        let address = Address::new(VMADDR_CID_ANY, port);
        match bind(socket.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => {}
            other => return other.map(|()| socket).map_err(io::Error::from),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        "no privileged vsock port is free",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_root_of_the_host_is_let_in() {
        for (cid, port, fine) in [
            (VMADDR_CID_HOST, 1023, true),
            (VMADDR_CID_HOST, 1, true),
            // Any user of the host.
            (VMADDR_CID_HOST, 1024, false),
            (VMADDR_CID_HOST, u32::MAX, false),
            // The guest itself, or another one.
            (1, 1023, false),
            (3, 1023, false),
            (0x1000_0001, 512, false),
        ] {
            assert_eq!(
                is_roots_of_the_host(&VsockAddr::new(cid, port)),
                fine,
                "{cid} {port}"
            );
        }
    }
}
