//! The process id that containerd is told for a container in a machine.
//!
//! Its processes are in the guest and have no id on the host. What is told is a thread of this
//! process in the pod's network namespace: `nsenter -t ID -n` and node agents, which go by
//! `/proc/ID/ns/net`, come to where the pod's addresses are. Each container has its own, so
//! that the one whose processes another is to see (`kubectl debug --target`) is known by it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// It only waits.
const STACK_BYTES: usize = 16 << 10;

/// A thread that stands for a container; it ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    id: u32,
    _end: mpsc::Sender<()>,
}

impl StandIn {
    /// Starts one in the network namespace; without one, in this process's own.
    ///
    /// # Errors
    /// The namespace cannot be joined; the kernel has no thread left.
    pub async fn start(netns: Option<&Path>) -> Result<Self> {
        let what = || "start the thread that stands for a container".to_owned();
        let netns = netns
            .map(|path| File::open(path).context(|| format!("open {}", path.display())))
            .transpose()?;
        let (end, ends) = mpsc::channel();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let thread = move || {
            let joined = netns.map_or(Ok(()), |netns| {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
            });
            let goes_on = joined.is_ok();
            let _ = answer.send(joined.map(|()| nix::unistd::gettid().as_raw()));
            if goes_on {
                // An error: the sender is gone, which is the end.
                let _ = ends.recv();
            }
        };
        std::thread::Builder::new()
            .name("container".into())
            .stack_size(STACK_BYTES)
            .spawn(thread)
            .context(what)?;
        let id = answered
            .await
            .map_err(|_| Error::Unavailable(format!("{}: it died", what()), None))?
            .context(what)?;
        Ok(Self {
            id: id.unsigned_abs(),
            _end: end,
        })
    }

    /// Its id, as a process id.
    pub fn id(&self) -> u32 {
        self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_has_an_id_of_its_own_that_leads_to_its_namespace() {
        let own = Path::new("/proc/self/ns/net");
        let first = StandIn::start(None).await.expect("thread");
        let second = StandIn::start(None).await.expect("thread");
        assert_ne!(first.id(), second.id());
        let link = format!("/proc/{}/ns/net", first.id());
        assert_eq!(
            std::fs::read_link(&link).expect("its namespace"),
            std::fs::read_link(own).expect("ours")
        );
        drop(first);
        while Path::new(&link).exists() {
            tokio::task::yield_now().await;
        }
        assert!(Path::new(&format!("/proc/{}", second.id())).exists());
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_named() {
        let error = StandIn::start(Some(Path::new("/no/netns"))).await;
        assert!(error.expect_err("refused").chain().contains("/no/netns"));
    }
}
