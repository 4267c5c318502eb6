//! Who is connected to the pod's server, so that it is not the one that hangs up first.
//!
//! containerd's ttrpc client, told an answer and the end of the connection at once, takes
//! either. An answer to `ShutdownSandbox` that it does not take is a pod that it cannot
//! remove. So the server stays until its clients have gone, which containerd does as soon
//! as it has the answer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::r#async::transport::Listener;

/// Counts the open connections of one listener.
#[derive(Debug, Clone)]
pub struct Peers(Arc<watch::Sender<()>>);

/// A connection; counted until it is dropped.
struct Peer {
    stream: UnixStream,
    _counted: watch::Receiver<()>,
}

impl Peers {
    /// Nobody is connected.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }

    /// What accepts on `listener`, counting.
    pub fn listener(&self, listener: UnixListener) -> Listener {
        let peers = Arc::clone(&self.0);
        Listener::new(stream::unfold(
            (listener, peers),
            |(listener, peers)| async move {
                let peer = listener.accept().await.map(|(stream, _)| Peer {
                    stream,
                    _counted: peers.subscribe(),
                });
                Some((peer, (listener, peers)))
            },
        ))
    }

    /// Returns when nobody is connected, or after `patience`.
    pub async fn gone(&self, patience: Duration) {
        // One that stays (a watcher) learns it from the connection's end.
        let _ = tokio::time::timeout(patience, self.0.closed()).await;
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn the_last_one_to_go_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let peers = Peers::new();
        let mut listener = peers.listener(UnixListener::bind(&path).unwrap());
        let bound = Duration::from_secs(60);
        peers.gone(bound).await;
        let _client = UnixStream::connect(&path).await.unwrap();
        let served = listener.next().await.unwrap().unwrap();
        let gone = tokio::time::timeout(Duration::from_millis(20), peers.gone(bound));
        assert!(gone.await.is_err(), "one is connected");
        drop(served);
        peers.gone(bound).await;
    }
}
