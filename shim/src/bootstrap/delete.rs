//! `delete`: containerd lost the pod's server, or it shut down in order. Removes what
//! may be left of one container, within containerd's five seconds, however often.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::handler::ContainerRef;
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};
use nix::mount::{MntFlags, umount2};
use protobuf::Message;

use super::args::Args;
use super::launch::Launch;
use super::{args_bundle, program, server_process, socket, sweep};
use crate::backend::{Backend, BackendContext};
use crate::rpc::convert::timestamp;

/// Of containerd's five seconds; the rest is for starting us and for unmounting.
const CLEANUP_MAX: Duration = Duration::from_millis(4000);

/// 128 + SIGKILL, as containerd's own shim answers.
const KILLED: u32 = 137;

/// What `delete` comes to.
#[derive(Debug)]
pub enum Outcome {
    /// Done; the reply for containerd.
    Reply(Vec<u8>),
    /// The other program has the backend for this container.
    OtherProgram(Kind),
}

/// Removes what is left of the container.
///
/// # Errors
/// What could not be removed; asking again goes on from there.
pub fn delete(args: &Args, backend: Backend) -> Result<Outcome> {
    let bundle = args_bundle(args)?;
    // No launch record: it was deleted in order, or never came to be.
    if let Some(launch) = Launch::read(&bundle)? {
        if launch.kind != backend.kind {
            return Ok(Outcome::OtherProgram(launch.kind));
        }
        clean(&launch, &bundle, backend)?;
    }
    unmount_rootfs(&bundle)?;
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    response
        .write_to_bytes()
        .map(Outcome::Reply)
        .context(|| "encode the reply to delete".into())
}

/// Hands over to the program that has the backend, with our stdout and stderr.
///
/// # Errors
/// It is missing or failed; it said why.
pub fn run_program(args: &Args, kind: Kind) -> Result<()> {
    let program = program(kind)?;
    let output = Command::new(&program)
        .args(["-namespace", &args.namespace, "-id", &args.id])
        .arg("-bundle")
        .arg(args_bundle(args)?)
        .arg("delete")
        .output()
        .context(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Unavailable(text.trim().to_owned(), None));
    }
    std::io::stdout()
        .write_all(&output.stdout)
        .context(|| "write the reply".into())
}

fn clean(launch: &Launch, bundle: &Path, backend: Backend) -> Result<()> {
    // containerd has given the pod's server up. One that hangs is no longer to touch what is
    // removed here; that it does not go is no reason to leave the rest.
    let ended = match launch.role() {
        Role::Sandbox => server_process::end(launch).map(drop),
        Role::Container => Ok(()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the async runtime".into())?;
    let container = ContainerRef {
        id: launch.id.clone(),
        containerd_namespace: launch.containerd_namespace.clone(),
        sandbox_id: launch.sandbox_id.clone(),
        role: launch.role(),
        bundle: bundle.to_owned(),
    };
    let (events, _unheard) = tokio::sync::mpsc::unbounded_channel();
    let context = BackendContext {
        config: launch.config.clone(),
        containerd_namespace: launch.containerd_namespace.clone(),
        sandbox_id: launch.sandbox_id.clone(),
        events,
    };
    let cleaned = runtime.block_on(async {
        let cleanup = async {
            let handler = (backend.handler)(context).await?;
            handler.cleanup(&container).await
        };
        match tokio::time::timeout(CLEANUP_MAX, cleanup).await {
            Ok(result) => result,
            Err(_) => Err(Error::DeadlineExceeded(format!(
                "clean up {}: not done in {} ms",
                launch.id,
                CLEANUP_MAX.as_millis()
            ))),
        }
    });
    // A libvirt that hangs does not keep us beyond containerd's five seconds.
    runtime.shutdown_background();
    // containerd asks once, and again only when it is started anew.
    cleaned.inspect_err(|_| sweep::after_failed_delete(&launch.config))?;
    if launch.role() == Role::Sandbox {
        // A server that lives still owns both.
        if !socket::is_served(&launch.socket) {
            let _ = std::fs::remove_file(&launch.socket);
            launch.remove_pod_dir();
        }
    }
    ended?;
    Launch::remove(bundle)
}

/// Everything stacked on `rootfs`; nothing there is fine.
fn unmount_rootfs(bundle: &Path) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    // Bounded, because each turn takes one mount away.
    for _ in 0..64 {
        match umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(Error::other(format!("unmount {}", rootfs.display()), error));
            }
        }
    }
    Err(Error::FailedPrecondition(format!(
        "{} stays mounted",
        rootfs.display()
    )))
}
