//! Sees to it that the pod pays for its machine.
//!
//! ```text
//! cgroup v2, systemd driver   libvirt puts the domain's scope into the pod's slice itself
//!                             (<resource><partition>): its device filter, its figures,
//!                             machined's entry all stay right; nothing is moved
//! cgroup v2, cgroupfs driver  libvirt cannot be told such a cgroup: QEMU is moved into the
//!                             pod's own while the domain is still paused
//! v1 and hybrid               so too, but the v1 controllers only: libvirt's counters stay
//!                             right then. `devices` stays with libvirt, which keeps QEMU's
//!                             allowed devices there and changes them at a hot-plug
//! ```

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dyad_linux::cgroup::{Cgroup, Hierarchies, systemd_slice};
use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::stats::Stats;

use crate::domain::Partition;

/// Made by systemd where it is the host's init (sd_booted(3)).
const BOOTED_BY_SYSTEMD: &str = "/run/systemd/system";
/// D-Bus starts machined by it when libvirt asks for a scope.
const MACHINED: &str = "/usr/share/dbus-1/system-services/org.freedesktop.machine1.service";

/// cgroup v1's `cpu.shares` may not be less.
const SHARES_MIN: u64 = 2;

/// libvirt's words for the pod's slice, where libvirt makes slices and the pod has one.
///
/// Without machined libvirt would make plain folders of other names, and fail.
pub fn partition(cgroups_path: &str, cpu_shares: Option<u64>) -> Option<Partition> {
    let makes_slices = Hierarchies::of_host().is_ok_and(|hierarchies| !hierarchies.is_v1())
        && [BOOTED_BY_SYSTEMD, MACHINED]
            .iter()
            .all(|path| Path::new(path).exists());
    if !makes_slices {
        return None;
    }
    Some(Partition {
        path: partition_of(systemd_slice(cgroups_path)?)?,
        cpu_weight: cpu_shares.map(weight_of),
    })
}

/// The partition that libvirt makes this very slice of; `None`: there is none.
fn partition_of(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = String::new();
    for part in name.split('-') {
        path.push('/');
        path.push_str(&unescape(part)?);
    }
    // libvirt escapes in its own way (virSystemdMakeSliceName).
    (slice_of(&path) == slice).then_some(path)
}

/// systemd writes a character that a unit's name does not take as `\xNN`.
fn unescape(part: &str) -> Option<String> {
    let (first, rest) = part.split_once("\\x").unwrap_or((part, ""));
    let mut text = first.to_owned();
    if !rest.is_empty() {
        for escaped in rest.split("\\x") {
            let code = u8::from_str_radix(escaped.get(..2)?, 16).ok()?;
            text.push(char::from(code));
            text.push_str(&escaped[2..]);
        }
    }
    (!text.is_empty() && !text.contains('/')).then_some(text)
}

fn slice_of(partition: &str) -> String {
    let mut name = String::new();
    for part in partition.trim_start_matches('/').split('/') {
        if !name.is_empty() {
            name.push('-');
        }
        for (at, character) in part.char_indices() {
            let dot_first = character == '.' && at == 0;
            if !dot_first && (character.is_ascii_alphanumeric() || ":_.".contains(character)) {
                name.push(character);
            } else {
                let _ = write!(name, "\\x{:02x}", u32::from(character));
            }
        }
    }
    name + ".slice"
}

/// Sees to it that QEMU, just started, is in the pod's cgroup.
///
/// # Errors
/// As of [`create`]; or the process is gone, or a controller does not take it.
pub async fn account(cgroups_path: &str, cpu_shares: Option<u64>, pid: u32) -> Result<()> {
    if scope(cgroups_path, pid)?.is_some() {
        return Ok(());
    }
    // A machine that was off left it empty, and who tidies up may remove such.
    let group = create(cgroups_path, cpu_shares).await?;
    place(&group, pid)
}

/// What the machine uses; `pid` is QEMU's.
///
/// # Errors
/// `NotFound`: it is off, and has no cgroup; else as of [`Cgroup::stats`].
pub fn stats(cgroups_path: &str, pid: Option<u32>) -> Result<Stats> {
    if let Some(pid) = pid
        && let Some(scope) = scope(cgroups_path, pid)?
    {
        return scope.stats();
    }
    Hierarchies::of_host()?.at(cgroups_path)?.stats()
}

/// The scope that libvirt made for the machine in the pod's slice.
fn scope(cgroups_path: &str, pid: u32) -> Result<Option<Cgroup>> {
    let hierarchies = Hierarchies::of_host()?;
    if hierarchies.is_v1() || systemd_slice(cgroups_path).is_none() {
        return Ok(None);
    }
    let dir = |group: Cgroup| group.places().pop().map(|(_, dir)| dir);
    let (own, qemu) = (hierarchies.at(cgroups_path)?, hierarchies.of_pid(pid)?);
    let found = dir(own).zip(dir(qemu));
    Ok(found
        .and_then(|(own, qemu)| beside(&own, &qemu))
        .map(Cgroup::v2))
}

/// The cgroup next to `own` that `qemu` is in or below.
fn beside(own: &Path, qemu: &Path) -> Option<PathBuf> {
    let slice = own.parent()?;
    let found = slice.join(qemu.strip_prefix(slice).ok()?.iter().next()?);
    (found != own).then_some(found)
}

/// The pod's own cgroup, made where it is missing.
///
/// `cpu_shares` are the pod's: the spec of a pause container asks for the least there is,
/// but this group holds all that the pod runs.
///
/// # Errors
/// The path is not usable, or a directory cannot be made; then none stays that was made.
pub async fn create(cgroups_path: &str, cpu_shares: Option<u64>) -> Result<Cgroup> {
    let hierarchies = Hierarchies::of_host()?;
    let ours = |controller: &str| is_ours(&hierarchies, controller);
    let group = hierarchies.make(cgroups_path, ours).await?;
    if let Err(error) = share(&hierarchies, &group, cpu_shares) {
        if let Err(error) = group.remove().await {
            log::warn!("{}", error.chain());
        }
        return Err(error).context(|| format!("set the CPU shares of {cgroups_path}"));
    }
    Ok(group)
}

fn share(hierarchies: &Hierarchies, group: &Cgroup, cpu_shares: Option<u64>) -> io::Result<()> {
    let Some(shares) = cpu_shares else {
        return Ok(());
    };
    let shares = shares.max(SHARES_MIN);
    for (controller, dir) in group.places() {
        if !is_ours(hierarchies, &controller) {
            continue;
        }
        if controller == "cpu" {
            fs::write(dir.join("cpu.shares"), shares.to_string())?;
        } else if controller.is_empty() {
            let file = dir.join("cpu.weight");
            let weight = weight_of(shares);
            // A level above has processes of its own, and so no controllers to give.
            if let Err(error) = fs::write(&file, weight.to_string()) {
                log::warn!(
                    "the machine's CPU weight {weight} has no effect: {}: {error}",
                    file.display()
                );
            }
        }
    }
    Ok(())
}

/// Moves the process with all its threads.
///
/// # Errors
/// The process is gone, or a controller does not take it.
fn place(group: &Cgroup, pid: u32) -> Result<()> {
    let hierarchies = Hierarchies::of_host()?;
    for (controller, dir) in group.places() {
        if is_ours(&hierarchies, &controller) {
            let procs = dir.join("cgroup.procs");
            fs::write(&procs, pid.to_string())
                .context(|| format!("move QEMU (pid {pid}) to {}", dir.display()))?;
        }
    }
    Ok(())
}

fn is_ours(hierarchies: &Hierarchies, controller: &str) -> bool {
    if hierarchies.is_v1() {
        !controller.is_empty() && controller != "devices"
    } else {
        controller.is_empty()
    }
}

/// The kernel's and the OCI runtimes' mapping of v1 shares (2..262144) to v2 weight (1..10000).
fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_map_to_weights_at_both_ends() {
        assert_eq!(weight_of(2), 1);
        assert_eq!(weight_of(1024), 39);
        assert_eq!(weight_of(262_144), 10_000);
        assert_eq!(weight_of(0), 1);
    }

    #[test]
    fn a_slice_is_named_as_libvirt_makes_it() {
        for (slice, partition) in [
            (
                "kubepods-besteffort-pod1_2.slice",
                Some("/kubepods/besteffort/pod1_2"),
            ),
            ("system.slice", Some("/system")),
            ("a-b\\x2dc.slice", Some("/a/b-c")),
            ("a\\x2fb.slice", None),
            ("-.slice", None),
            ("a--b.slice", None),
            ("a+b.slice", None),
            ("a\\xzz.slice", None),
            ("a\\x.slice", None),
            ("a.scope", None),
        ] {
            assert_eq!(partition_of(slice).as_deref(), partition, "{slice}");
        }
    }

    #[test]
    fn libvirts_scope_is_what_is_next_to_the_pods_own_cgroup() {
        let own = Path::new("/c/pod.slice/cri-1.scope");
        for (qemu, found) in [
            (
                "/c/pod.slice/machine-q.scope/libvirt/emulator",
                Some("/c/pod.slice/machine-q.scope"),
            ),
            ("/c/pod.slice/cri-1.scope", None),
            ("/c/pod.slice", None),
            ("/c/machine.slice/machine-q.scope", None),
        ] {
            assert_eq!(
                beside(own, Path::new(qemu)).as_deref(),
                found.map(Path::new),
                "{qemu}"
            );
        }
    }

    #[test]
    fn on_v1_every_controller_but_libvirts_own_is_moved() {
        let mountinfo = "30 20 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            31 20 0:2 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
            32 20 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            33 20 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let hybrid = Hierarchies::parse(mountinfo).expect("hierarchies");
        let group = hybrid.at("/k8s.io/pod").expect("cgroup");
        let moved: Vec<String> = group
            .places()
            .into_iter()
            .map(|(controller, _)| controller)
            .filter(|controller| is_ours(&hybrid, controller))
            .collect();
        assert_eq!(moved, ["cpu"]);
    }
}
