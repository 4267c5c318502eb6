//! Which mount of the OCI spec becomes what in the guest. Pure.
//!
//! | mount | in the guest |
//! |---|---|
//! | proc, sysfs, cgroup, mqueue, tmpfs, devpts | as it is |
//! | the pod's /dev/shm | the guest's own /dev/shm |
//! | emptyDir | a directory of the pod's disk |
//! | emptyDir in memory | a directory in the guest's memory |
//! | ConfigMap, Secret, projected, downwardAPI | copied in, kept in sync |
//! | a single file, read-only or kubelet's own | copied in, kept in sync |
//! | termination log | copied in empty, copied back at the container's end |
//! | any other host path | refused by name |

use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use oci_spec::runtime::Mount;

/// Where copied files lie in the guest: in memory.
pub const VOLUMES: &str = "/run/dyad/volumes";
/// Where emptyDir volumes lie in the guest: on the pod's disk.
pub const POD_VOLUMES: &str = "/run/dyad/pod/volumes";
/// The pod's shared memory in the guest.
pub const SHM: &str = "/dev/shm";

/// Filesystems that the guest mounts itself.
const GUEST_TYPES: [&str; 7] = [
    "proc", "sysfs", "cgroup", "cgroup2", "mqueue", "tmpfs", "devpts",
];

/// What a bind mount's source is on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A regular file.
    File,
    /// A directory on disk.
    Directory,
    /// A directory on tmpfs.
    MemoryDirectory,
    /// A socket, device or pipe.
    Special,
    /// Not there.
    Missing,
}

/// How something of the host is made in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// One file, kept in sync.
    File,
    /// A directory with all below, kept in sync.
    Tree,
    /// An empty directory with the same owner and mode (emptyDir; fsGroup is in them).
    Directory,
    /// The same on a tmpfs of the same size.
    Memory,
}

/// What is made in the guest before the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// File or directory on the host.
    pub host: PathBuf,
    /// Where it goes in the guest.
    pub guest: PathBuf,
    /// How.
    pub how: How,
}

/// The file whose content kubelet reads after the container's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Termination {
    /// kubelet's file.
    pub host: PathBuf,
    /// The container's, in the guest.
    pub guest: PathBuf,
}

/// A container's mounts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VolumePlan {
    /// For the spec that goes into the guest.
    pub mounts: Vec<Mount>,
    /// To be copied in before the container is created.
    pub copies: Vec<Copy>,
    /// To be copied back.
    pub termination: Option<Termination>,
}

/// Decides what the mounts of `container` become; `look` tells what a source is.
///
/// # Errors
/// `InvalidArgument` naming the mount that a machine cannot have, and the way out.
pub fn plan(
    container: &str,
    mounts: &[Mount],
    look: impl Fn(&Path) -> Source,
) -> Result<VolumePlan> {
    let mut plan = VolumePlan::default();
    for (index, mount) in mounts.iter().enumerate() {
        let kind = mount.typ().as_deref().unwrap_or("bind");
        if GUEST_TYPES.contains(&kind) {
            plan.mounts.push(mount.clone());
            continue;
        }
        let destination = mount.destination().display();
        if !is_bind(mount, kind) {
            return Err(Error::InvalidArgument(format!(
                "mount of type {kind:?} on {destination}: a machine's guest cannot mount it"
            )));
        }
        let Some(source) = mount.source() else {
            return Err(Error::InvalidArgument(format!(
                "bind mount on {destination} has no source"
            )));
        };
        let own = || PathBuf::from(format!("{VOLUMES}/{container}/{index}"));
        let guest = match (look(source), role(source, mount)) {
            (_, Role::SharedMemory) => PathBuf::from(SHM),
            (Source::MemoryDirectory, Role::EmptyDir(name)) => {
                // Shared by name between the pod's containers.
                let base = Path::new(VOLUMES).join("empty-dir");
                empty_dir(&mut plan.copies, source, &base, &name, How::Memory)
            }
            (Source::Directory, Role::EmptyDir(name)) => {
                let base = Path::new(POD_VOLUMES);
                empty_dir(&mut plan.copies, source, base, &name, How::Directory)
            }
            (Source::File, role) => {
                if role == Role::Other && !is_read_only(mount) {
                    return Err(Error::InvalidArgument(format!(
                        "host file {} mounted read-write on {destination}: writes in a machine's guest would not reach it; mount it read-only, or run the pod as containers (runtimeClassName: dyad)",
                        source.display()
                    )));
                }
                let guest = own();
                if role == Role::Termination {
                    plan.termination = Some(Termination {
                        host: source.clone(),
                        guest: guest.clone(),
                    });
                }
                plan.copies.push(Copy {
                    host: source.clone(),
                    guest: guest.clone(),
                    how: How::File,
                });
                guest
            }
            (Source::Directory | Source::MemoryDirectory, Role::Published) => {
                let guest = own();
                plan.copies.push(Copy {
                    host: source.clone(),
                    guest: guest.clone(),
                    how: How::Tree,
                });
                guest
            }
            (Source::Missing, _) => {
                return Err(Error::InvalidArgument(format!(
                    "mount on {destination}: its source {} does not exist",
                    source.display()
                )));
            }
            (Source::Special, _) => {
                return Err(Error::InvalidArgument(format!(
                    "host device or socket {} mounted on {destination}: it does not exist in a machine's guest; run the pod as containers (runtimeClassName: dyad)",
                    source.display()
                )));
            }
            (Source::Directory | Source::MemoryDirectory, _) => {
                return Err(Error::InvalidArgument(format!(
                    "host directory {} mounted on {destination}: a machine pod cannot share directories with its host; use emptyDir, ConfigMap, Secret or projected volumes, or run the pod as containers (runtimeClassName: dyad)",
                    source.display()
                )));
            }
        };
        let mut mounted = mount.clone();
        mounted
            .set_typ(Some("bind".into()))
            .set_source(Some(guest))
            .set_options(Some(guest_options(mount)));
        plan.mounts.push(mounted);
    }
    Ok(plan)
}

/// The volume itself and, for a subPath, the directory in it.
fn empty_dir(copies: &mut Vec<Copy>, source: &Path, base: &Path, name: &str, how: How) -> PathBuf {
    let depth = name.matches('/').count();
    if let Some(volume) = source.ancestors().nth(depth) {
        copies.push(Copy {
            host: volume.to_owned(),
            guest: base.join(name.split('/').next().unwrap_or(name)),
            how,
        });
    }
    let guest = base.join(name);
    if depth > 0 {
        copies.push(Copy {
            host: source.to_owned(),
            guest: guest.clone(),
            how: How::Directory,
        });
    }
    guest
}

/// The host's folders of the emptyDirs that are on the pod's disk.
pub fn volumes_on_disk(copies: &[Copy]) -> impl Iterator<Item = PathBuf> {
    copies
        .iter()
        .filter(|copy| {
            copy.how == How::Directory && copy.guest.parent() == Some(Path::new(POD_VOLUMES))
        })
        .map(|copy| copy.host.clone())
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Role {
    SharedMemory,
    /// An emptyDir's name.
    EmptyDir(String),
    /// What kubelet keeps current: ConfigMap and its like.
    Published,
    Termination,
    /// hosts, hostname, resolv.conf.
    Identity,
    Other,
}

/// kubelet's and containerd's directories have fixed names; their roots are configurable.
fn role(source: &Path, mount: &Mount) -> Role {
    let parts: Vec<&str> = source
        .components()
        .filter_map(|part| part.as_os_str().to_str())
        .collect();
    let destination = mount.destination();
    if destination == Path::new(SHM) && parts.last() == Some(&"shm") {
        return Role::SharedMemory;
    }
    if let Some(at) = parts.iter().position(|part| *part == "volumes") {
        match (parts.get(at + 1).copied(), parts.get(at + 2)) {
            (Some("kubernetes.io~empty-dir"), Some(name)) => {
                // A subPath stays inside its volume.
                return Role::EmptyDir(
                    std::iter::once(name)
                        .chain(&parts[at + 3..])
                        .copied()
                        .collect::<Vec<_>>()
                        .join("/"),
                );
            }
            (
                Some(
                    "kubernetes.io~configmap"
                    | "kubernetes.io~secret"
                    | "kubernetes.io~projected"
                    | "kubernetes.io~downward-api",
                ),
                Some(_),
            ) => return Role::Published,
            _ => {}
        }
    }
    // <root>/pods/<uid>/containers/<name>/<id> and <root>/pods/<uid>/etc-hosts
    if let Some(at) = parts.iter().position(|part| *part == "pods") {
        match parts[at + 1..] {
            [_, "containers", _, _] => return Role::Termination,
            [_, "etc-hosts"] => return Role::Identity,
            _ => {}
        }
    }
    // <root>/io.containerd.grpc.v1.cri/sandboxes/<id>/hosts, …
    // and <pod>/pod-files/hosts, … where there is no pause container
    if let [.., "sandboxes", _, "hosts" | "hostname" | "resolv.conf"]
    | [.., "pod-files", "hosts" | "hostname" | "resolv.conf"] = parts[..]
    {
        return Role::Identity;
    }
    Role::Other
}

fn is_bind(mount: &Mount, kind: &str) -> bool {
    kind == "bind"
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "bind" || option == "rbind")
}

fn is_read_only(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|o| o == "ro")
}

/// Propagation to or from the host means nothing in the guest.
fn guest_options(mount: &Mount) -> Vec<String> {
    mount
        .options()
        .iter()
        .flatten()
        .filter(|option| {
            !matches!(
                option.as_str(),
                "shared" | "rshared" | "slave" | "rslave" | "unbindable" | "runbindable"
            )
        })
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/0000-uid";
    const SANDBOX: &str = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s1";

    fn bind(source: &str, destination: &str, options: &[&str]) -> Mount {
        let mut mount = Mount::default();
        mount
            .set_typ(Some("bind".into()))
            .set_source(Some(source.into()))
            .set_destination(destination.into())
            .set_options(Some(options.iter().map(|o| (*o).into()).collect()));
        mount
    }

    fn other(kind: &str, destination: &str) -> Mount {
        let mut mount = Mount::default();
        mount
            .set_typ(Some(kind.into()))
            .set_source(Some(kind.into()))
            .set_destination(destination.into());
        mount
    }

    fn one(mount: Mount, source: Source) -> Result<VolumePlan> {
        plan("c1", &[mount], |_| source)
    }

    fn guest_source(plan: &VolumePlan) -> &str {
        plan.mounts[0]
            .source()
            .as_ref()
            .and_then(|s| s.to_str())
            .expect("source")
    }

    #[test]
    fn what_the_guest_mounts_itself_passes_through() {
        for kind in GUEST_TYPES {
            let mount = other(kind, "/x");
            let plan = one(mount.clone(), Source::Missing).expect(kind);
            assert_eq!(plan.mounts, [mount]);
        }
    }

    #[test]
    fn an_empty_dir_becomes_a_directory_of_the_pod_s_disk() {
        let source = format!("{POD}/volumes/kubernetes.io~empty-dir/cache");
        let plan = one(
            bind(&source, "/cache", &["rbind", "rslave", "rw"]),
            Source::Directory,
        )
        .expect("plan");
        assert_eq!(guest_source(&plan), "/run/dyad/pod/volumes/cache");
        assert_eq!(
            plan.mounts[0].options().as_deref().expect("options"),
            ["rbind", "rw"]
        );
        assert_eq!(plan.copies[0].how, How::Directory);
        let memory = one(
            bind(&source, "/cache", &["rbind", "rw"]),
            Source::MemoryDirectory,
        )
        .expect("plan");
        assert_eq!(guest_source(&memory), "/run/dyad/volumes/empty-dir/cache");
        assert_eq!(memory.copies[0].how, How::Memory);
        let sub = bind(&format!("{source}/a/b"), "/cache", &["rbind", "rw"]);
        let sub = one(sub, Source::Directory).expect("plan");
        assert_eq!(guest_source(&sub), "/run/dyad/pod/volumes/cache/a/b");
        assert_eq!(sub.copies[0].host, Path::new(&source));
        // A folder in it is no volume of its own.
        let on_disk: Vec<PathBuf> = volumes_on_disk(&sub.copies).collect();
        assert_eq!(on_disk, [PathBuf::from(&source)]);
        assert_eq!(volumes_on_disk(&memory.copies).count(), 0);
        assert_eq!(
            sub.copies[1].guest,
            Path::new("/run/dyad/pod/volumes/cache/a/b")
        );
    }

    #[test]
    fn published_volumes_are_copied_in() {
        for kind in ["configmap", "secret", "projected", "downward-api"] {
            let source = format!("{POD}/volumes/kubernetes.io~{kind}/v");
            let plan = one(
                bind(&source, "/v", &["rbind", "ro"]),
                Source::MemoryDirectory,
            )
            .expect(kind);
            assert_eq!(guest_source(&plan), "/run/dyad/volumes/c1/0");
            assert_eq!(plan.copies[0].host, Path::new(&source));
            assert_eq!(plan.copies[0].how, How::Tree);
        }
    }

    #[test]
    fn hosts_hostname_and_resolv_conf_are_copied_in_though_writable() {
        for file in ["hosts", "hostname", "resolv.conf"] {
            let mount = bind(
                &format!("{SANDBOX}/{file}"),
                &format!("/etc/{file}"),
                &["rbind", "rw"],
            );
            let plan = one(mount, Source::File).expect(file);
            assert_eq!(plan.copies[0].how, How::File);
            assert!(plan.termination.is_none());
        }
        let kubelets = bind(&format!("{POD}/etc-hosts"), "/etc/hosts", &["rbind", "rw"]);
        assert!(one(kubelets, Source::File).is_ok());
        // Where there is no pause container they are the shim's.
        let own = "/run/dyad/k8s.io/s1/pod-files/hosts";
        assert!(one(bind(own, "/etc/hosts", &["rbind", "rw"]), Source::File).is_ok());
    }

    #[test]
    fn the_termination_log_is_copied_back() {
        let source = format!("{POD}/containers/web/1a2b3c4d");
        let plan = one(
            bind(&source, "/dev/termination-log", &["rbind", "rw"]),
            Source::File,
        )
        .expect("plan");
        let termination = plan.termination.expect("termination");
        assert_eq!(termination.host, Path::new(&source));
        assert_eq!(termination.guest, Path::new("/run/dyad/volumes/c1/0"));
    }

    #[test]
    fn the_pod_s_shared_memory_is_the_guest_s() {
        let plan = one(
            bind(&format!("{SANDBOX}/shm"), "/dev/shm", &["rbind"]),
            Source::MemoryDirectory,
        )
        .expect("plan");
        assert_eq!(guest_source(&plan), "/dev/shm");
    }

    #[test]
    fn host_paths_are_refused_by_name_with_the_way_out() {
        let refused = [
            (
                bind("/srv/data", "/data", &["rbind", "ro"]),
                Source::Directory,
            ),
            (
                bind("/run/docker.sock", "/docker.sock", &["rbind"]),
                Source::Special,
            ),
            (
                bind("/etc/motd", "/etc/motd", &["rbind", "rw"]),
                Source::File,
            ),
            (bind("/no/such", "/x", &["rbind"]), Source::Missing),
            (
                bind(
                    &format!("{POD}/volumes/kubernetes.io~csi/pv/mount"),
                    "/pv",
                    &["rbind"],
                ),
                Source::Directory,
            ),
        ];
        for (mount, source) in refused {
            let name = mount.source().clone().expect("source");
            let error = one(mount, source).expect_err("refused").to_string();
            assert!(error.contains(&name.display().to_string()), "{error}");
        }
        assert!(one(bind("/etc/motd", "/etc/motd", &["ro"]), Source::File).is_ok());
        assert!(one(other("nfs", "/n"), Source::Missing).is_err());
    }
}
