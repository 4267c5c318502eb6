//! The container's root file system: the snapshotter's mounts, put on the bundle.

mod formatted;
mod loops;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};

use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::spec::RootMount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::idmap::{IdMap, mount_mapped};
use formatted::{Assembly, assembly, folder};
use loops::Loop;

/// mount(2) takes one page of options, with the NUL at its end.
const OPTIONS_MAX: usize = 4096 - 1;

/// One call of mount(2), and what must follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    fstype: String,
    source: String,
    flags: MsFlags,
    /// Set by a second call (`rprivate` …).
    propagation: MsFlags,
    data: String,
    /// Where the relative paths in `data` begin, where it had to be shortened.
    from: Option<PathBuf>,
    /// Owners to be mapped: those below `from` of an overlay, else of the mount itself.
    ids: Option<IdMap>,
    /// The source is a file that becomes a block device.
    loop_device: bool,
}

/// Mounts all of `mounts` on `target`, in order; undoes those that succeeded when one
/// fails.
///
/// # Errors
/// `InvalidArgument` for an option that is not known here; what mount(2) says.
pub(crate) fn mount_all(mounts: &[RootMount], target: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    match fs::create_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::other(format!("make {}", target.display()), error));
        }
        _ => {}
    }
    let parts = target.with_file_name("dyad-parts");
    match assembly(mounts, &parts)? {
        None => mount_stack(mounts, target),
        Some(assembly) => {
            let mounted = assemble(&assembly, &parts, target);
            // The root keeps what it needs of them; nothing has to be remembered.
            for number in 0..assembly.parts.len() {
                let folder = folder(&parts, number);
                let _ = umount2(&folder, MntFlags::MNT_DETACH);
                let _ = fs::remove_dir(&folder);
            }
            let _ = fs::remove_dir(&parts);
            mounted
        }
    }
}

fn assemble(assembly: &Assembly, parts: &Path, target: &Path) -> Result<()> {
    for (number, part) in assembly.parts.iter().enumerate() {
        let folder = folder(parts, number);
        fs::create_dir_all(&folder).context(|| format!("make {}", folder.display()))?;
        mount_one(part, &folder)?;
    }
    for directory in &assembly.directories {
        let path = &directory.path;
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(directory.mode)
            .create(path)
            .and_then(|()| match directory.owner {
                Some((uid, gid)) => chown(path, Some(uid), Some(gid)),
                None => Ok(()),
            });
        made.context(|| format!("make {}", path.display()))?;
    }
    mount_stack(&assembly.root, target)
}

/// Mounts one on the other; undoes those that succeeded when one fails.
fn mount_stack(mounts: &[RootMount], target: &Path) -> Result<()> {
    for (at, root) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(root, target) {
            for _ in 0..at {
                // The first error is the one to tell.
                let _ = umount2(target, MntFlags::MNT_DETACH);
            }
            return Err(error);
        }
    }
    Ok(())
}

fn mount_one(root: &RootMount, target: &Path) -> Result<()> {
    let what = || {
        format!(
            "mount {} {} on {}",
            root.fstype,
            root.source,
            target.display()
        )
    };
    let mut plan = plan(root)?;
    let device = match plan.loop_device {
        true => {
            let read_only = plan.flags.contains(MsFlags::MS_RDONLY);
            Some(Loop::attach(Path::new(&root.source), read_only).context(what)?)
        }
        false => None,
    };
    if let Some(device) = &device {
        plan.source = device.path.display().to_string();
    }
    apply(&plan, target).context(what)
}

/// Unmounts whatever is on `target`, all layers of it. Nothing there: fine.
///
/// # Errors
/// What umount(2) says.
pub(crate) fn unmount_all(target: &Path) -> Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    loop {
        match umount2(target, flags) {
            Ok(()) | Err(Errno::EINTR) => {}
            // Not a mount point; not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            // Something is mounted below, or has a file open: the whole tree goes from
            // here now, and from the kernel with its last user.
            Err(Errno::EBUSY) if !flags.contains(MntFlags::MNT_DETACH) => {
                flags |= MntFlags::MNT_DETACH;
            }
            Err(errno) => {
                return Err(Error::other(format!("unmount {}", target.display()), errno));
            }
        }
    }
}

fn plan(root: &RootMount) -> Result<Plan> {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data = Vec::new();
    let (mut uids, mut gids) = (None, None);
    let mut loop_device = false;
    for option in &root.options {
        if let Some((flag, set)) = flag(option) {
            flags.set(flag, set);
        } else if let Some(kind) = propagation_flag(option) {
            propagation = kind;
        } else if let Some(map) = option.strip_prefix("uidmap=") {
            uids = Some(map);
        } else if let Some(map) = option.strip_prefix("gidmap=") {
            gids = Some(map);
        } else if option == "loop" {
            loop_device = true;
        } else {
            data.push(option.as_str());
        }
    }
    let bind = flags.contains(MsFlags::MS_BIND) || root.fstype == "bind";
    flags.set(MsFlags::MS_BIND, bind);
    let ids = match (uids, gids) {
        (Some(uids), Some(gids)) => Some(IdMap::parse(uids, gids).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "rootfs mount of {}: cannot understand uidmap={uids} gidmap={gids}",
                root.source
            ))
        })?),
        _ => None,
    };
    let joined = data.join(",");
    let map_layers = ids.is_some() && root.fstype == "overlay";
    let (data, from) = if joined.len() <= OPTIONS_MAX && !map_layers {
        (joined, None)
    } else {
        let shortened = shorten(&data)
            .filter(|(shortened, _)| shortened.len() <= OPTIONS_MAX)
            .ok_or_else(|| {
                Error::InvalidArgument(format!(
                    "rootfs mount of {}: {} bytes of options are more than mount(2) takes ({OPTIONS_MAX})",
                    root.source,
                    joined.len()
                ))
            })?;
        (shortened.0, Some(shortened.1))
    };
    Ok(Plan {
        fstype: root.fstype.clone(),
        source: root.source.clone(),
        flags,
        propagation,
        data,
        from,
        ids,
        loop_device,
    })
}

/// Makes an overlay's `lowerdir`s relative to the directory that all of them are in.
fn shorten(options: &[&str]) -> Option<(String, PathBuf)> {
    let lower = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = dirs.first()?.parent()?.to_path_buf();
    while !dirs.iter().all(|dir| {
        dir.strip_prefix(&common)
            .is_ok_and(|rest| rest != Path::new(""))
    }) {
        common = common.parent()?.to_path_buf();
    }
    let relative: Vec<_> = dirs
        .iter()
        .filter_map(|dir| dir.strip_prefix(&common).ok()?.to_str())
        .collect();
    let relative = format!("lowerdir={}", relative.join(":"));
    let all: Vec<&str> = options
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                relative.as_str()
            } else {
                option
            }
        })
        .collect();
    Some((all.join(","), common))
}

fn apply(plan: &Plan, target: &Path) -> io::Result<()> {
    match (&plan.from, &plan.ids) {
        (None, _) => apply_here(plan, target)?,
        (Some(from), None) => apply_from(from, plan, target)?,
        (Some(from), Some(ids)) => {
            // An overlay takes its layers' owners as they are seen through a mount that
            // maps them, and keeps what it needs of that one.
            let layers = target.with_file_name("dyad-layers");
            fs::create_dir_all(&layers)?;
            let mounted = mount_mapped(from, &layers, ids, true).and_then(|()| {
                let mounted = apply_from(&layers, plan, target);
                umount2(&layers, MntFlags::MNT_DETACH)?;
                Ok(mounted?)
            });
            fs::remove_dir(&layers)?;
            mounted?;
        }
    }
    finish(plan, target).inspect_err(|_| {
        let _ = umount2(target, MntFlags::MNT_DETACH);
    })
}

/// Mounts in a thread whose working directory is `from`: the process's own must stay.
fn apply_from(from: &Path, plan: &Plan, target: &Path) -> nix::Result<()> {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(from)?;
            apply_here(plan, target)
        });
        there.join().unwrap_or(Err(Errno::EIO))
    })
}

/// What needs calls of its own once it is mounted.
fn finish(plan: &Plan, target: &Path) -> io::Result<()> {
    if let (None, Some(ids)) = (&plan.from, &plan.ids) {
        mount_mapped(target, target, ids, false)?;
    }
    // A bind mount takes its flags only when mounted again.
    let later = plan.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if plan.flags.contains(MsFlags::MS_BIND) && !later.is_empty() {
        let again = plan.flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, again, None::<&str>)?;
    }
    if !plan.propagation.is_empty() {
        mount(
            None::<&str>,
            target,
            None::<&str>,
            plan.propagation,
            None::<&str>,
        )?;
    }
    Ok(())
}

fn apply_here(plan: &Plan, target: &Path) -> nix::Result<()> {
    let data = (!plan.data.is_empty()).then_some(plan.data.as_str());
    mount(
        Some(plan.source.as_str()),
        target,
        Some(plan.fstype.as_str()),
        plan.flags,
        data,
    )
}

/// The flag that an option stands for (mount(8)), and whether it sets it.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "atime" => (MsFlags::MS_NOATIME, false),
        "bind" => (MsFlags::MS_BIND, true),
        "defaults" => (MsFlags::empty(), true),
        "dev" => (MsFlags::MS_NODEV, false),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "nodev" => (MsFlags::MS_NODEV, true),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        _ => return None,
    })
}

fn propagation_flag(option: &str) -> Option<MsFlags> {
    let recursive = |kind| MsFlags::MS_REC.union(kind);
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => recursive(MsFlags::MS_PRIVATE),
        "shared" => MsFlags::MS_SHARED,
        "rshared" => recursive(MsFlags::MS_SHARED),
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => recursive(MsFlags::MS_SLAVE),
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => recursive(MsFlags::MS_UNBINDABLE),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(fstype: &str, options: &[&str]) -> RootMount {
        RootMount {
            fstype: fstype.into(),
            source: "src".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let plan = plan(&root(
            "overlay",
            &[
                "ro",
                "nosuid",
                "rslave",
                "index=off",
                "lowerdir=/a:/b",
                "dev",
            ],
        ))
        .unwrap();
        assert_eq!(plan.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(plan.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(plan.data, "index=off,lowerdir=/a:/b");
        assert_eq!(plan.from, None);
    }

    #[test]
    fn a_bind_is_one_by_type_or_by_option() {
        for (fstype, options, flags) in [
            (
                "bind",
                &["rbind", "rw"][..],
                MsFlags::MS_BIND | MsFlags::MS_REC,
            ),
            ("bind", &[], MsFlags::MS_BIND),
            (
                "none",
                &["bind", "ro"],
                MsFlags::MS_BIND | MsFlags::MS_RDONLY,
            ),
        ] {
            assert_eq!(plan(&root(fstype, options)).unwrap().flags, flags);
        }
    }

    #[test]
    fn options_longer_than_a_page_become_relative() {
        let dir = |n: usize| format!("/var/lib/containerd/snapshots/{n}/fs");
        let lower: Vec<_> = (0..125).map(dir).collect();
        let lower = format!("lowerdir={}", lower.join(":"));
        let plan = plan(&root("overlay", &["upperdir=/u", &lower, "workdir=/w"])).unwrap();
        assert_eq!(
            plan.from,
            Some(PathBuf::from("/var/lib/containerd/snapshots"))
        );
        assert!(plan.data.starts_with("upperdir=/u,lowerdir=0/fs:1/fs:"));
        assert!(plan.data.ends_with(":124/fs,workdir=/w"));
    }

    #[test]
    fn options_that_no_trick_shortens_are_refused_with_their_length() {
        let long = "x".repeat(5000);
        let error = plan(&root("overlay", &[&format!("lowerdir=/{long}:/b")])).unwrap_err();
        assert!(error.to_string().contains("bytes of options"), "{error}");
        assert!(plan(&root("ext4", &[&long])).is_err());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        assert!(plan(&root("erofs", &["loop"])).unwrap().loop_device);
        let error = plan(&root("overlay", &["uidmap=0:x", "gidmap=0:1:2"])).unwrap_err();
        assert!(error.to_string().contains("uidmap=0:x"), "{error}");
    }

    #[test]
    fn an_overlay_with_mapped_owners_takes_its_layers_from_one_directory() {
        let lower = "lowerdir=/s/2/fs:/s/1/fs";
        let plan = plan(&root("overlay", &[lower, "uidmap=0:9:5", "gidmap=0:9:5"])).unwrap();
        assert_eq!(plan.ids, IdMap::parse("0:9:5", "0:9:5"));
        assert_eq!(plan.data, "lowerdir=2/fs:1/fs");
        assert_eq!(plan.from, Some(PathBuf::from("/s")));
    }

    /// Needs root: mounts for real.
    #[test]
    fn the_owners_of_an_overlays_files_are_mapped() {
        use std::os::unix::fs::MetadataExt;
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("base");
        let memory = RootMount {
            fstype: "tmpfs".into(),
            source: "tmpfs".into(),
            options: Vec::new(),
        };
        mount_all(&[memory], &base).expect("mount a tmpfs: this test needs root");
        for layer in ["1", "2", "upper", "work"] {
            fs::create_dir(base.join(layer)).unwrap();
        }
        fs::write(base.join("1/file"), "").unwrap();
        std::os::unix::fs::chown(base.join("1/file"), Some(7), Some(8)).unwrap();
        let base_dir = base.display();
        let overlay = RootMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={base_dir}/2:{base_dir}/1"),
                format!("upperdir={base_dir}/upper"),
                format!("workdir={base_dir}/work"),
                "uidmap=0:100000:65536".into(),
                "gidmap=0:200000:65536".into(),
            ],
        };
        let target = temp.path().join("rootfs");
        let mounted = mount_all(&[overlay], &target);
        let file = fs::metadata(target.join("file")).map(|file| (file.uid(), file.gid()));
        let unmounted = unmount_all(&target).and_then(|()| unmount_all(&base));
        mounted.unwrap();
        assert_eq!(file.unwrap(), (100_007, 200_008));
        unmounted.unwrap();
        assert!(!temp.path().join("dyad-layers").exists());
    }

    /// Needs root: mounts for real.
    #[test]
    fn an_overlay_of_very_many_layers_is_mounted_and_unmounted() {
        let temp = tempfile::tempdir().unwrap();
        // A tmpfs, because an overlay cannot lie upon another one's upper directory.
        let base = temp.path().join("base");
        let memory = RootMount {
            fstype: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec!["nodev".into()],
        };
        mount_all(&[memory], &base).expect("mount a tmpfs: this test needs root");
        let layers: Vec<_> = (0..110)
            .map(|n| base.join(format!("a-rather-long-name-of-a-layer-{n}")))
            .collect();
        for (n, layer) in layers.iter().enumerate() {
            fs::create_dir(layer).unwrap();
            fs::write(layer.join(format!("file-{n}")), "").unwrap();
        }
        let target = temp.path().join("rootfs");
        let lower: Vec<_> = layers.iter().map(|l| l.to_str().unwrap()).collect();
        let overlay = RootMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            options: vec![format!("lowerdir={}", lower.join(":"))],
        };
        let mounted = mount_all(&[overlay], &target);
        let seen = fs::read_dir(&target).map(Iterator::count);
        let unmounted = unmount_all(&target).and_then(|()| unmount_all(&base));
        mounted.unwrap();
        assert_eq!(seen.unwrap(), 110);
        unmounted.unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
        unmount_all(&target).expect("again");
        unmount_all(&temp.path().join("nothing")).expect("nothing there");
    }
}
