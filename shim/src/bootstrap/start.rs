//! `start`: the pod's server, new or already there, and its address.
//!
//! containerds that speak Task v2 run this for every container of a pod; v3 only for
//! the first. No tokio here: this runs on the way of every pod.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::spec::Role;
use dyad_runtime_handler::{Error, Result};

use super::args::Args;
use super::input::{StartInput, read_stdin, start_input};
use super::launch::Launch;
use super::socket::{self, Bound};
use super::{args_bundle, program, server_process};
use crate::config::Config;
use crate::files::write_atomically;
use crate::spec::{Identity, read_annotations};

/// Ends with a server listening, and returns the reply for containerd.
///
/// # Errors
/// What is wrong with the input, the configuration or the pod's annotations, or why
/// the server did not come up; nothing is left behind then.
pub fn start(args: &Args) -> Result<Vec<u8>> {
    let bundle = args_bundle(args)?;
    let ttrpc_env = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let input = start_input(&read_stdin()?, args, &ttrpc_env)?;
    let annotations = read_annotations(&bundle)?;
    let identity = Identity::of(&args.id, &annotations)?;

    let config = load_config(&input)?;
    config.pod_annotations(&annotations)?;
    let dir = input
        .socket_dir
        .as_ref()
        .map_or_else(|| config.state_dir.join("s"), Into::into);
    let socket = socket::path(&dir, &args.address, &args.namespace, &identity.sandbox_id)?;
    let launch = Launch::new(
        args.namespace.clone(),
        args.id.clone(),
        identity.sandbox_id.clone(),
        identity.role,
        socket,
        input.ttrpc_address.clone(),
        (args.address.clone(), args.publish_binary.clone()),
        input.debug,
        config,
    );
    let address = launch.address();

    if identity.role == Role::Container {
        if !socket::is_served(&launch.socket) {
            return Err(Error::FailedPrecondition(format!(
                "pod {} of container {} has no server at {address}: its sandbox must run first",
                launch.sandbox_id, launch.id
            )));
        }
    } else if let Bound::New(listener) = socket::bind(&launch.socket)? {
        launch
            .write(&bundle)
            .and_then(|()| spawn_server(args, &launch, &bundle, listener.into()))
            .inspect_err(|_| {
                let _ = std::fs::remove_file(&launch.socket);
                let _ = Launch::remove(&bundle);
            })?;
    }
    // containerd before 2.0 finds the server again by this file after a restart.
    write_atomically(&bundle.join("address"), address.as_bytes())?;
    input.protocol.reply(&address)
}

fn load_config(input: &StartInput) -> Result<Config> {
    let mut config = Config::load(&input.options.source)?;
    if let Some(name) = &input.options.binary_name {
        config.container.runtime = Some(name.into());
    }
    Ok(config)
}

/// Runs the server with the listening socket as its stdin, and waits until it serves:
/// until then its stdout and stderr are a pipe, on which it says why it cannot.
fn spawn_server(args: &Args, launch: &Launch, bundle: &Path, listener: OwnedFd) -> Result<()> {
    let program = program(launch.kind)?;
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .context(|| "make the server's pipe".into())?;
    let mut command = Command::new(&program);
    command
        .args(server_process::arguments(&args.namespace, &args.id))
        .current_dir(bundle)
        .stdin(listener)
        .stdout(
            writer
                .try_clone()
                .context(|| "copy the server's pipe".into())?,
        )
        .stderr(Stdio::from(writer));
    let mut child = command
        .spawn()
        .context(|| format!("run {}", program.display()))?;
    // Closes our copies of the writing end and of the socket.
    drop(command);
    adjust_oom_score(child.id());

    let mut complaint = String::new();
    let _ = File::from(reader).take(8192).read_to_string(&mut complaint);
    let complaint = complaint.trim();
    let ended = child.try_wait().context(|| "wait for the server".into())?;
    match (complaint, ended) {
        ("", None) => Ok(()),
        ("", Some(status)) => Err(Error::Unavailable(
            format!(
                "the pod's server {} ended at once: {status}",
                program.display()
            ),
            None,
        )),
        // It says so and ends; do not leave it if it should not.
        (complaint, _) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(Error::Unavailable(
                format!("the pod's server did not start: {complaint}"),
                None,
            ))
        }
    }
}

/// As containerd's own shim: one worse than containerd, so that the kernel takes the
/// shim first. Not being allowed to is no reason to fail.
fn adjust_oom_score(pid: u32) {
    let parent = nix::unistd::getppid();
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        let _ = std::fs::write(
            format!("/proc/{pid}/oom_score_adj"),
            (score + 1).min(1000).to_string(),
        );
    }
}
