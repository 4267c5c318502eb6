//! The link over AF_VSOCK.

use std::io;

use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

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

    /// Takes the next connection. Cancel safe.
    ///
    /// # Errors
    /// `accept` failed.
    pub async fn accept(&self) -> io::Result<VsockStream> {
        self.0.accept().await.map(|(stream, _)| stream)
    }
}

/// Connects to `port` of the machine with context id `cid`.
///
/// # Errors
/// No such machine, or nobody listens there.
pub async fn connect(cid: u32, port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(cid, port)).await
}
