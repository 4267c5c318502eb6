//! Moves bytes between a process's stdio and the link.

use std::sync::Arc;

use dyad_agent_api::link::guest::{InputSource, OutputSink};
use dyad_linux::pump::Fd;
use tokio::sync::watch;

/// What one read takes at most; the link's frames carry as much.
const CHUNK: usize = 32 << 10;

/// Copies everything that the process writes to the host; waits while the host does
/// not take it, so that a full pipe slows the process down. Ends with the last writer.
pub async fn output(from: Arc<Fd>, sink: Arc<OutputSink>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                if sink.write(&buffer[..length]).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                log::warn!("read a process's output: {error}");
                break;
            }
        }
    }
    sink.close();
}

/// Copies the host's bytes to the process, until the host closes the stream or
/// `close` says so; what has arrived by then still goes through. Bytes for a process
/// that reads no more are dropped, so that the host need not care.
pub async fn input(mut source: InputSource, to: Arc<Fd>, mut close: watch::Receiver<bool>) {
    let mut reads = true;
    loop {
        let bytes = tokio::select! {
            biased;
            bytes = source.read() => bytes,
            _ = close.wait_for(|close| *close) => None,
        };
        let Some(bytes) = bytes else { return };
        if reads && let Err(error) = to.write_all(&bytes).await {
            log::debug!("a process reads no more: {error}");
            reads = false;
        }
    }
}
