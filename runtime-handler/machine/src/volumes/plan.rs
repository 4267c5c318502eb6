//! Which mount of the OCI spec becomes what in the guest. Pure.
//!
//! | mount | in the guest |
//! |---|---|
//! | proc, sysfs, cgroup, mqueue, tmpfs, devpts | as it is |
//! | the pod's /dev/shm | the pod's in the guest: 64 MiB |
//! | emptyDir | a directory of the pod's disk |
//! | emptyDir in memory | a tmpfs of the same size |
//! | subPath | the same below its volume |
//! | ConfigMap, Secret, projected, downwardAPI | copied in, kept in sync |
//! | a single file, read-only or kubelet's own | copied in, kept in sync |
//! | termination log | copied in empty, copied back at the container's end |
//! | VOLUME of the image | a directory of the pod's disk, that begins as containerd seeded it |
//! | image as a volume | its EROFS disk, read-only |
//! | any other host path | refused by name |

use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use oci_spec::runtime::Mount;

use super::roots::{self, Ids, Role, Roots};

/// Where copied files lie in the guest: in memory.
pub const VOLUMES: &str = "/run/dyad/volumes";
/// Where emptyDir volumes lie in the guest: on the pod's disk.
pub const POD_VOLUMES: &str = "/run/dyad/pod/volumes";
/// Where the VOLUMEs of images lie in the guest; no emptyDir can have that name.
pub const IMAGE_SEEDS: &str = "/run/dyad/pod/volumes/.image";
/// The pod's shared memory in the guest, as the agent mounts it.
pub const SHM: &str = "/run/dyad/shm";

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
    /// A directory with all below, once: from then on it is the container's.
    Seed,
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
    /// Images to be mounted before the container is created.
    pub images: Vec<ImageVolume>,
}

/// An image as a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageVolume {
    /// Where containerd mounted it on the host.
    pub host: PathBuf,
    /// Where it is mounted in the guest.
    pub guest: PathBuf,
}

/// Tells of the host what a plan needs to know.
pub trait Host {
    /// What a mount's source is.
    fn look(&self, path: &Path) -> Source;
    /// The path below `volumes`, a pod's, that kubelet mounted on `source` for a subPath of
    /// `volume`.
    fn behind(&self, volumes: &Path, volume: &str, source: &Path) -> Option<PathBuf>;
}

/// Decides what the mounts of a container become that the guest knows as `guest_id`.
///
/// # Errors
/// `InvalidArgument` naming the mount that a machine cannot have, and the way out.
pub fn plan(
    guest_id: &str,
    mounts: &[Mount],
    roots: &Roots,
    ids: &Ids,
    host: &dyn Host,
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
        let Some(asked) = mount.source() else {
            return Err(Error::InvalidArgument(format!(
                "bind mount on {destination} has no source"
            )));
        };
        let mut source = asked.clone();
        let mut role = roots::role(roots, ids, asked);
        if let Role::SubPath(volumes, volume) = &role
            && let Some(behind) = host.behind(volumes, volume, asked)
        {
            role = roots::role(roots, ids, &behind);
            source = behind;
        }
        let source = &source;
        let own = || PathBuf::from(format!("{VOLUMES}/{guest_id}/{index}"));
        let guest = match (host.look(source), role) {
            (_, Role::SharedMemory) => PathBuf::from(SHM),
            (Source::MemoryDirectory, Role::EmptyDir(name, way)) => {
                // Shared by name between the pod's containers.
                let base = Path::new(VOLUMES).join("empty-dir");
                empty_dir(
                    &mut plan.copies,
                    source,
                    &base.join(name),
                    &way,
                    How::Memory,
                )
            }
            (Source::Directory, Role::EmptyDir(name, way)) => {
                let volume = Path::new(POD_VOLUMES).join(name);
                empty_dir(&mut plan.copies, source, &volume, &way, How::Directory)
            }
            (Source::Directory | Source::MemoryDirectory, Role::ImageSeed) => {
                // By its place in the container: containerd draws the order anew each time.
                let name = mount.destination().to_string_lossy();
                let name = name.replace('%', "%25").replace('/', "%2F");
                let guest = Path::new(IMAGE_SEEDS).join(guest_id).join(name);
                plan.copies.push(Copy {
                    host: source.clone(),
                    guest: guest.clone(),
                    how: How::Seed,
                });
                guest
            }
            (Source::Directory | Source::MemoryDirectory, Role::Image(image, way)) => {
                let guest = own();
                plan.images.push(ImageVolume {
                    host: image,
                    guest: guest.clone(),
                });
                guest.join(way)
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
fn empty_dir(
    copies: &mut Vec<Copy>,
    source: &Path,
    volume: &Path,
    way: &Path,
    how: How,
) -> PathBuf {
    if let Some(host) = source.ancestors().nth(way.components().count()) {
        copies.push(Copy {
            host: host.to_owned(),
            guest: volume.to_owned(),
            how,
        });
    }
    if way.as_os_str().is_empty() {
        return volume.to_owned();
    }
    let guest = volume.join(way);
    copies.push(Copy {
        host: source.to_owned(),
        guest: guest.clone(),
        how: How::Directory,
    });
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

    /// All sources are `0`; a subPath's is `1`.
    struct All(Source, Option<PathBuf>);

    impl Host for All {
        fn look(&self, _: &Path) -> Source {
            self.0
        }

        fn behind(&self, _: &Path, _: &str, _: &Path) -> Option<PathBuf> {
            self.1.clone()
        }
    }

    fn planned(mount: Mount, host: &All) -> Result<VolumePlan> {
        let roots = Roots {
            own_state: "/run/dyad".into(),
            ..Roots::default()
        };
        let ids = Ids {
            pod_uid: "0000-uid".into(),
            sandbox: "s1".into(),
            container: "k1".into(),
        };
        plan("c1", &[mount], &roots, &ids, host)
    }

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
        planned(mount, &All(source, None))
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
        assert_eq!(guest_source(&plan), "/run/dyad/shm");
        // An emptyDir that is called so, or mounted there, is an emptyDir.
        let volume = format!("{POD}/volumes/kubernetes.io~empty-dir/shm");
        let asked = one(
            bind(&volume, "/dev/shm", &["rbind"]),
            Source::MemoryDirectory,
        )
        .expect("plan");
        assert_eq!(guest_source(&asked), "/run/dyad/volumes/empty-dir/shm");
        assert_eq!(asked.copies[0].how, How::Memory);
    }

    #[test]
    fn a_sub_path_is_where_its_volume_is() {
        let mount = || {
            bind(
                &format!("{POD}/volume-subpaths/v/app/0"),
                "/v",
                &["rbind", "ro"],
            )
        };
        let behind = |path: &str| Some(PathBuf::from(format!("{POD}/volumes/{path}")));
        let cache = behind("kubernetes.io~empty-dir/v/a/b");
        let plan = planned(mount(), &All(Source::Directory, cache)).expect("plan");
        assert_eq!(guest_source(&plan), "/run/dyad/pod/volumes/v/a/b");
        let key = behind("kubernetes.io~configmap/v/..2026/key");
        let plan = planned(mount(), &All(Source::File, key.clone())).expect("plan");
        assert_eq!(plan.copies[0].how, How::File);
        assert_eq!(Some(&plan.copies[0].host), key.as_ref());
        let claim = behind("kubernetes.io~csi/v/mount/a");
        assert!(planned(mount(), &All(Source::Directory, claim)).is_err());
        assert!(planned(mount(), &All(Source::Directory, None)).is_err());
    }

    #[test]
    fn a_volume_of_the_image_is_seeded_on_the_pods_disk() {
        let cri = "/var/lib/containerd/io.containerd.grpc.v1.cri";
        let mount = bind(
            &format!("{cri}/containers/k1/volumes/7"),
            "/var/data",
            &["rbind", "rw"],
        );
        let plan = one(mount, Source::Directory).expect("plan");
        assert_eq!(
            guest_source(&plan),
            "/run/dyad/pod/volumes/.image/c1/%2Fvar%2Fdata"
        );
        assert_eq!(plan.copies[0].how, How::Seed);
        assert_eq!(volumes_on_disk(&plan.copies).count(), 0);
    }

    #[test]
    fn an_image_as_a_volume_is_mounted_and_bound_from_there() {
        let image = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/s1/abc";
        let mount = bind(&format!("{image}/usr/share"), "/tools", &["rbind", "ro"]);
        let plan = one(mount, Source::Directory).expect("plan");
        assert_eq!(guest_source(&plan), "/run/dyad/volumes/c1/0/usr/share");
        assert_eq!(
            plan.images,
            [ImageVolume {
                host: image.into(),
                guest: "/run/dyad/volumes/c1/0".into(),
            }]
        );
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
