//! The guest's init: one static binary, PID 1 of the machine.
//!
//! ```text
//! kernel -> init: mounts, modules -> link (virtio port or vsock) -> services
//!                                      dyad.agent.v1.Sandbox   sandbox
//!                                      containerd.task.v3.Task task
//! task -> this binary again, as `helper create|exec` -> libcontainer -> the container's init
//! ```
//! PID 1 never calls libcontainer: that forks with a raw clone3 and allocates in the
//! child, which dead-locks beside threads, and it changes what belongs to PID 1
//! (working directory, oom score, dumpable flag). It runs in a helper process that
//! ends as soon as the container's init waits to be started.

mod boot;
mod button;
mod cgroup;
mod cmdline;
mod disk;
mod entropy;
mod files;
mod guest;
mod helper;
mod logger;
mod modprobe;
mod modules;
mod net;
mod oom;
mod pause;
mod power;
mod pump;
mod rootfs;
mod rpc;
mod sandbox;
mod spec;
mod task;
mod uevent;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(verb) if verb == helper::ARGUMENT => helper::main(arguments),
        Some(verb) if verb == pause::ARGUMENT => pause::main(),
        Some(verb) if verb == modprobe::ARGUMENT => modprobe::main(arguments),
        _ => guest::main(),
    }
}
