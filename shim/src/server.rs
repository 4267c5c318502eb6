//! The pod's server: the process that `start` leaves behind.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dyad_linux::files::{PRIVATE, create_private_dir, write_atomically};
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use log::{info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use ttrpc::r#async::Server;

use crate::backend::{Backend, BackendContext};
use crate::bootstrap::launch::Launch;
use crate::events::{Destination, Publisher};
use crate::peers::Peers;
use crate::pod::{Driver, Pod, Sandbox};
use crate::{logger, rpc};

/// Events that are not out by then are lost with us.
const FLUSH_MAX: Duration = Duration::from_millis(500);
/// Blocking calls that nobody waits for any more get so long.
const CALLS_END_WITHIN: Duration = Duration::from_secs(5);
/// The server's socket for people and `dyadctl`, in the pod's state directory.
const ADDRESS_FILE: &str = "address";

/// Serves the pod whose launch record is in `bundle`, on the socket that is our stdin,
/// until it is shut down.
///
/// # Errors
/// It did not come up; `start` reads why from our stderr.
pub fn serve(bundle: &Path, backend: Backend) -> Result<()> {
    let launch = Launch::read(bundle)?.ok_or_else(|| {
        Error::FailedPrecondition("serve is run by start only: there is no launch record".into())
    })?;
    if launch.kind != backend.kind {
        return Err(Error::FailedPrecondition(format!(
            "this program serves {} pods, not {}",
            backend.kind, launch.kind
        )));
    }
    // Fails only where we lead a session already.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_child_subreaper(true).context(|| "become a subreaper".into())?;
    let level = match launch.debug {
        true => log::LevelFilter::Debug,
        false => launch.config.log_level.into(),
    };
    logger::init(
        bundle,
        level,
        &launch.containerd_namespace,
        &launch.sandbox_id,
    );

    let listener = listener_from_stdin()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the async runtime".into())?;
    let served = runtime.block_on(run(launch, listener, backend));
    // A call to another host's libvirt waits for as long as TCP does.
    runtime.shutdown_timeout(CALLS_END_WITHIN);
    served
}

async fn run(launch: Launch, listener: UnixListener, backend: Backend) -> Result<()> {
    let (events, published) = mpsc::unbounded_channel();
    let publisher = Publisher::start(
        Destination {
            namespace: launch.containerd_namespace.clone(),
            ttrpc_address: launch.ttrpc_address.clone(),
            grpc_address: launch.grpc_address.clone(),
            publish_binary: launch.publish_binary.clone(),
        },
        published,
    );
    let (backend_events, seen) = mpsc::unbounded_channel();
    let handler = (backend.handler)(BackendContext {
        config: launch.config.clone(),
        containerd_namespace: launch.containerd_namespace.clone(),
        sandbox_id: launch.sandbox_id.clone(),
        events: backend_events,
    })
    .await?;
    prepare_pod_dir(&launch)?;

    let (sandbox, commands) = Sandbox::new();
    let driver = Driver::new(
        Pod {
            launch: launch.clone(),
        },
        Arc::clone(&handler),
        commands,
        seen,
        events,
    );
    let mut driver = tokio::spawn(driver.run());

    let listener = tokio::net::UnixListener::from_std(listener)
        .context(|| "watch the server's socket".into())?;
    let peers = Peers::new();
    let listener = peers.listener(listener);
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(rpc::services(&sandbox, &handler));
    server.start().await.context(|| "start serving".into())?;

    let mut terminate = signal(SignalKind::terminate()).context(|| "watch for SIGTERM".into())?;
    let mut interrupt = signal(SignalKind::interrupt()).context(|| "watch for SIGINT".into())?;
    info!("serving {} pod {}", launch.kind, launch.sandbox_id);
    detach()?;

    tokio::select! {
        _ = &mut driver => {}
        _ = terminate.recv() => warn!("ended by SIGTERM"),
        _ = interrupt.recv() => warn!("ended by SIGINT"),
    }
    let _ = std::fs::remove_file(&launch.socket);
    launch.remove_pod_dir();
    publisher.flush(FLUSH_MAX).await;
    // The answer to Shutdown is on its way.
    peers.gone(FLUSH_MAX).await;
    let _ = tokio::time::timeout(FLUSH_MAX, server.shutdown()).await;
    // The bundle is not ours any more.
    let _ = std::env::set_current_dir("/");
    handler.afterwards().await;
    Ok(())
}

/// The directory in which others find us.
fn prepare_pod_dir(launch: &Launch) -> Result<()> {
    let dir = launch.pod_dir();
    create_private_dir(&dir)?;
    let address = launch.address();
    write_atomically(&dir.join(ADDRESS_FILE), address.as_bytes(), PRIVATE)
}

fn listener_from_stdin() -> Result<UnixListener> {
    let stdin = std::io::stdin();
    let fd: OwnedFd = stdin
        .as_fd()
        .try_clone_to_owned()
        .context(|| "take over the server's socket".into())?;
    let null = null_device()?;
    nix::unistd::dup2_stdin(&null).context(|| "close stdin".into())?;
    let listener = UnixListener::from(fd);
    listener
        .set_nonblocking(true)
        .context(|| "set up the server's socket".into())?;
    Ok(listener)
}

/// Tells `start` that we serve, by closing its pipe; nothing is written to stdout and
/// stderr from here on.
fn detach() -> Result<()> {
    let _ = std::io::stdout().flush();
    let null = null_device()?;
    nix::unistd::dup2_stdout(&null).context(|| "close stdout".into())?;
    nix::unistd::dup2_stderr(&null).context(|| "close stderr".into())
}

fn null_device() -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context(|| "open /dev/null".into())
}
