//! Keeps what was copied into the guest as its original changes.
//!
//! One inotify for the container. kubelet turns a volume to its next version by renaming
//! `..data`, and writes hosts and resolv.conf in place; whatever the way, a change to a
//! watched directory leads to a new copy of all below it, a moment after the last change.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use dyad_linux::fd::register;
use dyad_runtime_handler::error::{Context, Result};
use log::{debug, warn};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::plan::{Copy, How};

/// Changes come in bursts; one copy is made of each.
const SETTLE: Duration = Duration::from_millis(100);

/// The instance, and a duplicate of its fd that tokio polls.
struct Watched {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
}

/// Calls `changed` with each copy whose original changed, until dropped.
///
/// # Errors
/// The kernel gives no inotify instance (fs.inotify.max_user_instances).
pub fn watch<F, Fut>(copies: Vec<Copy>, changed: F) -> Result<impl Future<Output = ()> + Send>
where
    F: Fn(Copy) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .context(|| "watch volumes for changes (see fs.inotify.max_user_instances)".into())?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ATTRIB;
    let mut table = Vec::new();
    for copy in copies {
        let (dir, name) = match copy.how {
            How::Tree => (copy.host.clone(), None),
            // Its directory is watched: a file that is replaced is another file.
            How::File => match (copy.host.parent(), copy.host.file_name()) {
                (Some(dir), Some(name)) => (dir.to_owned(), Some(name.to_owned())),
                _ => continue,
            },
            How::Directory | How::Memory | How::Seed => continue,
        };
        let watch = inotify
            .add_watch(&dir, flags)
            .context(|| format!("watch {}", dir.display()))?;
        table.push((watch, name, copy));
    }
    let ready = inotify
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| register(fd, Interest::READABLE))
        .context(|| "watch volumes".into())?;
    let watched = Watched { inotify, ready };
    Ok(async move {
        if table.is_empty() {
            return;
        }
        loop {
            let mut due: Vec<usize> = Vec::new();
            if let Err(error) = collect(&watched, &table, &mut due).await {
                warn!("volumes are no longer kept in sync: {error}");
                return;
            }
            while let Ok(more) =
                tokio::time::timeout(SETTLE, collect(&watched, &table, &mut due)).await
            {
                if more.is_err() {
                    break;
                }
            }
            for index in due {
                let (_, _, copy) = &table[index];
                debug!("{} changed", copy.host.display());
                changed(copy.clone()).await;
            }
        }
    })
}

type Entry = (
    nix::sys::inotify::WatchDescriptor,
    Option<std::ffi::OsString>,
    Copy,
);

/// Adds the copies that the next events concern.
async fn collect(watched: &Watched, table: &[Entry], due: &mut Vec<usize>) -> io::Result<()> {
    let events = watched
        .ready
        .async_io(Interest::READABLE, |_| {
            watched.inotify.read_events().map_err(io::Error::from)
        })
        .await?;
    for event in events {
        for (index, (watch, name, _)) in table.iter().enumerate() {
            let concerns =
                *watch == event.wd && (name.is_none() || name.as_ref() == event.name.as_ref());
            if concerns && !due.contains(&index) {
                due.push(index);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use tokio::sync::mpsc;

    fn copy(host: PathBuf, how: How) -> Copy {
        Copy {
            host,
            guest: "/run/dyad/volumes/c/0".into(),
            how,
        }
    }

    async fn told(receiver: &mut mpsc::UnboundedReceiver<Copy>) -> Copy {
        tokio::time::timeout(Duration::from_secs(10), receiver.recv())
            .await
            .expect("a change is told in time")
            .expect("open")
    }

    #[tokio::test]
    async fn a_turned_data_link_and_a_rewritten_file_are_told() {
        let dir = tempfile::tempdir().expect("dir");
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).expect("dir");
        let hosts = dir.path().join("hosts");
        std::fs::write(&hosts, "old").expect("file");
        let copies = vec![
            copy(volume.clone(), How::Tree),
            copy(hosts.clone(), How::File),
        ];
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let task = watch(copies, move |copy| {
            let sender = sender.clone();
            async move {
                let _ = sender.send(copy);
            }
        })
        .expect("watch");
        let task = tokio::spawn(task);

        std::os::unix::fs::symlink("..v1", volume.join("..data_tmp")).expect("link");
        std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("rename");
        assert_eq!(told(&mut receiver).await.host, volume);
        std::fs::write(&hosts, "new").expect("file");
        assert_eq!(told(&mut receiver).await.host, hosts);
        // A neighbour's change is not the file's.
        std::fs::write(dir.path().join("other"), "x").expect("file");
        std::fs::write(&hosts, "newer").expect("file");
        assert_eq!(told(&mut receiver).await.host, hosts);
        task.abort();
    }
}
