//! Whose a path of the host is: kubelet's or containerd's for this pod, or anybody's. Pure.
//!
//! ```text
//! <kubelet>/pods/<uid>/volumes/<plugin>/<name>[/<sub path>]
//!                     /volume-subpaths/<volume>/<container>/<index>   (see `mounts`)
//!                     /containers/<name>/<id>      termination message
//!                     /etc-hosts
//! <containerd>/io.containerd.grpc.v1.cri/sandboxes/<sandbox>/{hosts,hostname,resolv.conf,shm}
//!                                       /containers/<container>/volumes/<id>   VOLUME of the image
//!                                       /image-volumes/<sandbox>/<digest>[/<sub path>]
//! <state_dir>/<namespace>/<sandbox>/pod-files/{hosts,hostname,resolv.conf,shm}
//! ```
//! A word in a path proves nothing: a path is theirs by the root that the configuration
//! names and by this pod's own ids below it. Where no root is configured the ids do, which
//! nobody can choose: pod's uid, sandbox's and container's id.

use std::path::{Component, Path, PathBuf};

use dyad_runtime_handler::config::MachineConfig;

/// The folder of containerd's CRI plugin, below its root and below its state.
const CRI: &str = "io.containerd.grpc.v1.cri";

/// Where others keep what they mount into pods; `None`: anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roots {
    /// kubelet's `--root-dir`.
    pub kubelet: Option<PathBuf>,
    /// containerd's `root` and `state`.
    pub containerd: Option<[PathBuf; 2]>,
    /// The shim's own `state_dir`.
    pub own_state: PathBuf,
}

impl Roots {
    /// As they are configured.
    pub fn new(config: &MachineConfig, own_state: &Path) -> Self {
        let containerd = match (&config.containerd_root, &config.containerd_state) {
            (None, None) => None,
            (root, state) => Some([
                root.clone().unwrap_or_else(|| "/var/lib/containerd".into()),
                state.clone().unwrap_or_else(|| "/run/containerd".into()),
            ]),
        };
        Self {
            kubelet: config.kubelet_root.clone(),
            containerd,
            own_state: own_state.to_owned(),
        }
    }
}

/// Whose mounts they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ids {
    /// The pod's uid; empty where containerd does not tell it (1.6).
    pub pod_uid: String,
    /// The sandbox's id.
    pub sandbox: String,
    /// The container's id.
    pub container: String,
}

/// What a path of the host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The pod's `/dev/shm`, as containerd made it.
    SharedMemory,
    /// An emptyDir: its name, and the way below it.
    EmptyDir(String, PathBuf),
    /// What kubelet keeps current: ConfigMap and its like.
    Published,
    /// The termination message.
    Termination,
    /// hosts, hostname, resolv.conf.
    Identity,
    /// A VOLUME of the image: containerd's folder for it, seeded from the image.
    ImageSeed,
    /// An image as a volume: where containerd mounted it, and the way below it.
    Image(PathBuf, PathBuf),
    /// A subPath, as kubelet mounts it: the pod's folder of volumes, and the volume's name.
    SubPath(PathBuf, String),
    /// The host's.
    Other,
}

/// Tells the role of `source`.
pub fn role(roots: &Roots, ids: &Ids, source: &Path) -> Role {
    of_kubelet(roots, ids, source)
        .or_else(|| of_containerd(roots, ids, source))
        .or_else(|| of_ours(roots, ids, source))
        .unwrap_or(Role::Other)
}

fn of_kubelet(roots: &Roots, ids: &Ids, source: &Path) -> Option<Role> {
    let pod = match ids.pod_uid.as_str() {
        "" => None,
        uid => Some(uid),
    };
    let (dir, rest) = below(roots.kubelet.as_deref(), source, &[Some("pods"), pod])?;
    match rest[..] {
        ["volumes", "kubernetes.io~empty-dir", name, ..] => {
            // A subPath stays inside its volume.
            Some(Role::EmptyDir(name.into(), rest[3..].iter().collect()))
        }
        [
            "volumes",
            "kubernetes.io~configmap"
            | "kubernetes.io~secret"
            | "kubernetes.io~projected"
            | "kubernetes.io~downward-api",
            _,
            ..,
        ] => Some(Role::Published),
        ["volume-subpaths", volume, _, _] => {
            Some(Role::SubPath(dir.join("volumes"), volume.into()))
        }
        ["containers", _, _] => Some(Role::Termination),
        ["etc-hosts"] => Some(Role::Identity),
        _ => None,
    }
}

fn of_containerd(roots: &Roots, ids: &Ids, source: &Path) -> Option<Role> {
    let places: Vec<Option<&Path>> = match &roots.containerd {
        Some(both) => both.iter().map(|root| Some(root.as_path())).collect(),
        None => vec![None],
    };
    let (dir, rest) = places
        .into_iter()
        .find_map(|root| below(root, source, &[Some(CRI)]))?;
    match rest[..] {
        ["sandboxes", sandbox, "shm"] if sandbox == ids.sandbox => Some(Role::SharedMemory),
        ["sandboxes", sandbox, "hosts" | "hostname" | "resolv.conf"] if sandbox == ids.sandbox => {
            Some(Role::Identity)
        }
        ["containers", container, "volumes", _] if container == ids.container => {
            Some(Role::ImageSeed)
        }
        ["image-volumes", sandbox, digest, ..] if sandbox == ids.sandbox => Some(Role::Image(
            dir.join("image-volumes").join(sandbox).join(digest),
            rest[3..].iter().collect(),
        )),
        _ => None,
    }
}

fn of_ours(roots: &Roots, ids: &Ids, source: &Path) -> Option<Role> {
    let (_, rest) = below(Some(&roots.own_state), source, &[])?;
    match rest[..] {
        [_, sandbox, "pod-files", name] if sandbox == ids.sandbox => match name {
            "hosts" | "hostname" | "resolv.conf" => Some(Role::Identity),
            "shm" => Some(Role::SharedMemory),
            _ => None,
        },
        _ => None,
    }
}

/// The folder `root`/`middle` that the path is in, and the rest of the way. No root: the
/// first that fits; a `None` in the middle is any name.
fn below<'a>(
    root: Option<&Path>,
    path: &'a Path,
    middle: &[Option<&str>],
) -> Option<(PathBuf, Vec<&'a str>)> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => parts.push(name.to_str()?),
            _ => return None,
        }
    }
    let fits = |at: usize| {
        parts.len() >= at + middle.len()
            && middle
                .iter()
                .zip(&parts[at..])
                .all(|(wanted, part)| wanted.is_none_or(|wanted| wanted == *part))
    };
    let at = match root {
        Some(root) => {
            path.strip_prefix(root).ok()?;
            Some(root.components().count() - 1).filter(|at| fits(*at))?
        }
        None => (0..parts.len()).find(|at| fits(*at))?,
    };
    let (dir, rest) = parts.split_at(at + middle.len());
    let dir = Path::new("/").join(dir.iter().collect::<PathBuf>());
    Some((dir, rest.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> Ids {
        Ids {
            pod_uid: "u1".into(),
            sandbox: "s1".into(),
            container: "c1".into(),
        }
    }

    fn roots(kubelet: Option<&str>, containerd: Option<[&str; 2]>) -> Roots {
        Roots {
            kubelet: kubelet.map(Into::into),
            containerd: containerd.map(|both| both.map(Into::into)),
            own_state: "/run/dyad".into(),
        }
    }

    #[test]
    fn what_is_below_the_roots_and_this_pods_ids_is_theirs() {
        let cri = "/run/k3s/containerd/io.containerd.grpc.v1.cri";
        let kubelet = "/mnt/volumes/kubelet/pods/u1";
        let empty = |sub: &str| Role::EmptyDir("shm".into(), sub.into());
        let table = [
            (
                format!("{kubelet}/volumes/kubernetes.io~empty-dir/shm"),
                empty(""),
            ),
            (
                format!("{kubelet}/volumes/kubernetes.io~empty-dir/shm/a/b"),
                empty("a/b"),
            ),
            (
                format!("{kubelet}/volumes/kubernetes.io~secret/s"),
                Role::Published,
            ),
            (
                format!("{kubelet}/volumes/kubernetes.io~csi/pv/mount"),
                Role::Other,
            ),
            (
                format!("{kubelet}/volume-subpaths/cache/app/0"),
                Role::SubPath(format!("{kubelet}/volumes").into(), "cache".into()),
            ),
            (format!("{kubelet}/containers/web/1a2b"), Role::Termination),
            (format!("{kubelet}/etc-hosts"), Role::Identity),
            (format!("{cri}/sandboxes/s1/hosts"), Role::Identity),
            (format!("{cri}/sandboxes/s1/shm"), Role::SharedMemory),
            (format!("{cri}/containers/c1/volumes/77"), Role::ImageSeed),
            (
                format!("{cri}/image-volumes/s1/abc/usr/bin"),
                Role::Image(
                    format!("{cri}/image-volumes/s1/abc").into(),
                    "usr/bin".into(),
                ),
            ),
            ("/run/dyad/k8s.io/s1/pod-files/hosts".into(), Role::Identity),
            (
                "/run/dyad/k8s.io/s1/pod-files/shm".into(),
                Role::SharedMemory,
            ),
        ];
        let both = ["/var/lib/k3s", "/run/k3s/containerd"];
        for roots in [
            roots(None, None),
            roots(Some("/mnt/volumes/kubelet"), Some(both)),
        ] {
            for (path, expected) in &table {
                assert_eq!(role(&roots, &ids(), Path::new(path)), *expected, "{path}");
            }
        }
    }

    #[test]
    fn words_in_a_path_make_no_folder_theirs() {
        let strict = roots(Some("/var/lib/kubelet"), Some(["/var/lib/c", "/run/c"]));
        let any = roots(None, None);
        for path in [
            // Of another pod, sandbox, container.
            "/var/lib/kubelet/pods/u2/volumes/kubernetes.io~empty-dir/cache",
            "/run/c/io.containerd.grpc.v1.cri/sandboxes/s2/hosts",
            "/run/c/io.containerd.grpc.v1.cri/containers/c2/volumes/1",
            // The host's own.
            "/srv/pods/containers/a/b",
            "/data/volumes/kubernetes.io~empty-dir/cache",
            "/dev/shm",
            "/srv/dev/shm",
            "/srv/sandboxes/s1/hosts",
            "/run/dyad/k8s.io/s2/pod-files/hosts",
            "/var/lib/kubelet/pods/u1/../u1/etc-hosts",
            "relative/pods/u2",
        ] {
            for roots in [&strict, &any] {
                assert_eq!(role(roots, &ids(), Path::new(path)), Role::Other, "{path}");
            }
        }
        // With a root that is configured not even the ids.
        let planted = "/srv/pods/u1/volumes/kubernetes.io~empty-dir/cache";
        assert_eq!(role(&strict, &ids(), Path::new(planted)), Role::Other);
    }

    #[test]
    fn without_a_uid_the_place_below_kubelets_root_counts() {
        let unknown = Ids {
            pod_uid: String::new(),
            ..ids()
        };
        let hosts = Path::new("/var/lib/kubelet/pods/u9/etc-hosts");
        assert_eq!(role(&roots(None, None), &unknown, hosts), Role::Identity);
    }
}
