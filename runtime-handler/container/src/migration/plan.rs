//! Whether a pod can move, and what goes with it. Pure.
//!
//! Each side describes its pod in a [`Manifest`]; the target compares the two before
//! anything moves. Every refusal names what is in the way and the way out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Mount as OciMount, Spec};
use serde::{Deserialize, Serialize};

use super::criu::words;

/// Filesystems that show the same files on every node.
const SHARED: [&str; 10] = [
    "nfs",
    "nfs4",
    "ceph",
    "cephfs",
    "glusterfs",
    "fuse.glusterfs",
    "lustre",
    "beegfs",
    "gpfs",
    "cifs",
];

/// One side's pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// Version of the program, for people.
    pub dyad: String,
    /// The pod's namespace; empty outside Kubernetes.
    pub kubernetes_namespace: String,
    pub arch: String,
    pub cpu_flags: BTreeSet<String>,
    /// CRIU's version.
    pub criu: (u32, u32),
    /// Addresses that sockets of the pod are bound to (source), that it has (target).
    pub addresses: BTreeSet<IpAddr>,
    /// Bytes that are to be stored (source), that there is room for (target).
    pub bytes: u64,
    /// By Kubernetes' name.
    pub containers: BTreeMap<String, Described>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Described {
    /// A fingerprint of each layer of the image, from the top.
    pub layers: Vec<String>,
    /// Whether it has them: stdin, stdout, stderr.
    pub stdio: [bool; 3],
    /// By destination, in the container.
    pub mounts: BTreeMap<String, Volume>,
}

/// What is mounted into a container from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Volume {
    /// The pod's own; its files go along (emptyDir, /dev/shm).
    Copied,
    /// Made for each pod by its kubelet or containerd (hosts, ConfigMaps, Secrets …).
    Own,
    /// A network filesystem: the same files on both nodes, where these are the same.
    Shared { fstype: String, source: String },
    /// Files of this node.
    Local { source: String },
}

/// Which kind of volume a bind mount is.
pub(crate) fn volume(mount: &OciMount, mountinfo: &str) -> Volume {
    let destination = mount.destination().to_string_lossy();
    let source = mount.source().clone().unwrap_or_default();
    let text = source.to_string_lossy();
    // kubelet: pods/UID/volumes/PLUGIN/NAME
    let plugin = text
        .split_once("/volumes/kubernetes.io~")
        .and_then(|(_, rest)| rest.split('/').next());
    match plugin {
        Some("empty-dir") => return Volume::Copied,
        Some("configmap" | "secret" | "projected" | "downward-api") => return Volume::Own,
        _ => {}
    }
    match destination.as_ref() {
        "/dev/shm" => return Volume::Copied,
        "/etc/hosts" | "/etc/hostname" | "/etc/resolv.conf" | "/dev/termination-log" => {
            return Volume::Own;
        }
        _ => {}
    }
    // kubelet: pods/UID/containers/NAME/HASH, wherever the container wants it.
    if text.contains("/pods/") && text.contains("/containers/") {
        return Volume::Own;
    }
    match mount_of(&source, mountinfo) {
        Some((fstype, device, below)) if SHARED.contains(&fstype) => Volume::Shared {
            fstype: fstype.to_owned(),
            source: format!("{device}{below}"),
        },
        _ => Volume::Local {
            source: text.into_owned(),
        },
    }
}

/// The filesystem that `path` is on: its type, its source, and where `path` is in it.
fn mount_of<'a>(path: &Path, mountinfo: &'a str) -> Option<(&'a str, &'a str, String)> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut before = before.split(' ').skip(3);
            let (root, point) = (before.next()?, Path::new(before.next()?));
            let mut after = after.split(' ');
            let (fstype, source) = (after.next()?, after.next()?);
            let rest = path.strip_prefix(point).ok()?;
            let below = Path::new(root).join(rest);
            Some((point, fstype, source, below.to_string_lossy().into_owned()))
        })
        // The last of those that are as deep lies on top.
        .max_by_key(|(point, ..)| point.components().count())
        .map(|(_, fstype, source, below)| (fstype, source, below))
}

/// What in a container's spec cannot move, with the way out.
pub(crate) fn blocker(spec: &Spec, terminal: bool) -> Option<String> {
    if terminal {
        return Some("it has a terminal (tty: true): run it without".into());
    }
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let path_of = |kind| {
        namespaces
            .and_then(|all| all.iter().find(|ns| ns.typ() == kind))
            .map(|ns| ns.path().clone())
    };
    if path_of(LinuxNamespaceType::User).is_some() {
        return Some("it has a user namespace: set hostUsers: true".into());
    }
    match path_of(LinuxNamespaceType::Pid) {
        None => return Some("it sees the host's processes: hostPID must be false".into()),
        Some(Some(_)) => {
            return Some(
                "it shares its processes with others of the pod: shareProcessNamespace must be false"
                    .into(),
            );
        }
        Some(None) => {}
    }
    if path_of(LinuxNamespaceType::Network).is_none() {
        return Some("it has the host's network: hostNetwork must be false".into());
    }
    if path_of(LinuxNamespaceType::Ipc).is_none() {
        return Some("it has the host's IPC: hostIPC must be false".into());
    }
    let devices = linux.and_then(|linux| linux.devices().as_ref());
    if let Some(device) = devices.and_then(|devices| devices.first()) {
        return Some(format!(
            "it has the device {}: devices do not migrate",
            device.path().display()
        ));
    }
    None
}

/// Whether the pod that `source` describes can go on as the one of `target`.
///
/// # Errors
/// All that is in the way, as one text.
pub(crate) fn compare(source: &Manifest, target: &Manifest) -> std::result::Result<(), String> {
    let mut found = Vec::new();
    // Whoever may make pods of this namespace may have this one's memory; nobody else. Names
    // cannot be compared: two pods of a cluster have two.
    if source.kubernetes_namespace != target.kubernetes_namespace {
        found.push(format!(
            "the target pod is of the namespace {:?}, the source of {:?}: make the target in the same namespace",
            target.kubernetes_namespace, source.kubernetes_namespace
        ));
    }
    if source.arch != target.arch {
        found.push(format!(
            "the target's processors are {}, the source's {}",
            target.arch, source.arch
        ));
    }
    let missing: Vec<_> = source.cpu_flags.difference(&target.cpu_flags).collect();
    if !missing.is_empty() && source.arch == target.arch {
        let names: Vec<_> = missing.iter().take(8).map(|flag| flag.as_str()).collect();
        found.push(format!(
            "the target's processors lack {} features that the source's have ({}): choose a node with as new ones",
            missing.len(),
            names.join(", ")
        ));
    }
    if target.criu < source.criu {
        found.push(format!(
            "the target's CRIU {} is older than the source's {}: update it there",
            words::numbers(target.criu),
            words::numbers(source.criu)
        ));
    }
    let addresses: Vec<_> = source.addresses.difference(&target.addresses).collect();
    if !addresses.is_empty() {
        let names: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        found.push(format!(
            "sockets are bound to {}, which the target pod has not: only a network that keeps a pod's address can take them",
            names.join(", ")
        ));
    }
    if source.bytes > target.bytes {
        found.push(format!(
            "no space: {} MiB are wanted, the target has {} MiB free",
            source.bytes >> 20,
            target.bytes >> 20
        ));
    }
    for name in target.containers.keys() {
        if !source.containers.contains_key(name) {
            found.push(format!("container {name}: only the target has it"));
        }
    }
    for (name, here) in &source.containers {
        match target.containers.get(name) {
            None => found.push(format!(
                "container {name}: the target has none of that name (yet): create it there first"
            )),
            Some(there) => found.extend(
                compare_containers(here, there)
                    .into_iter()
                    .map(|text| format!("container {name}: {text}")),
            ),
        }
    }
    match found.as_slice() {
        [] => Ok(()),
        found => Err(found.join("; ")),
    }
}

fn compare_containers(source: &Described, target: &Described) -> Vec<String> {
    let mut found = Vec::new();
    if source.layers != target.layers {
        found.push("the target's image has other content: use the same image by digest".to_owned());
    }
    for (name, (here, there)) in ["stdin", "stdout", "stderr"]
        .iter()
        .zip(source.stdio.iter().zip(&target.stdio))
    {
        if here != there {
            found.push(format!(
                "{name} is open on one side only: use the same spec"
            ));
        }
    }
    for (destination, here) in &source.mounts {
        let problem = match (here, target.mounts.get(destination)) {
            (_, None) => Some("the target has no such volume: use the same spec".to_owned()),
            (Volume::Local { source }, _) => Some(format!(
                "it is this node's {source} (hostPath or a local volume): only emptyDir and network filesystems migrate"
            )),
            (here, Some(there)) if here != there => Some(match there {
                Volume::Local { source } => format!("it is the target node's own {source}"),
                _ => "it is another volume on the target".to_owned(),
            }),
            _ => None,
        };
        found.extend(problem.map(|problem| format!("volume {destination}: {problem}")));
    }
    for destination in target.mounts.keys() {
        if !source.mounts.contains_key(destination) {
            found.push(format!("volume {destination}: only the target has it"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:50 / /mnt/nas rw,relatime shared:5 - nfs4 nas:/export rw
31 22 0:51 /sub /mnt/nas/local rw - tmpfs tmpfs rw";

    fn manifest() -> Manifest {
        let described = Described {
            layers: vec!["l1".into()],
            stdio: [false, true, true],
            mounts: BTreeMap::from([
                ("/cache".into(), Volume::Copied),
                ("/etc/hosts".into(), Volume::Own),
                (
                    "/data".into(),
                    Volume::Shared {
                        fstype: "nfs4".into(),
                        source: "nas:/a".into(),
                    },
                ),
            ]),
        };
        Manifest {
            dyad: "0.1.0".into(),
            kubernetes_namespace: "default".into(),
            arch: "x86_64".into(),
            cpu_flags: ["avx".to_owned(), "avx2".to_owned()].into(),
            criu: (4, 2),
            addresses: BTreeSet::new(),
            bytes: 100 << 20,
            containers: BTreeMap::from([("app".into(), described)]),
        }
    }

    #[test]
    fn every_difference_that_matters_is_named() {
        type Change = fn(&mut Manifest, &mut Manifest);
        assert_eq!(compare(&manifest(), &manifest()), Ok(()));
        let changes: [(Change, &str); 16] = [
            (
                |_, t| t.kubernetes_namespace = "tenant-b".into(),
                "namespace \"tenant-b\"",
            ),
            (|_, t| t.arch = "aarch64".into(), "processors are aarch64"),
            (
                |_, t| {
                    t.cpu_flags.remove("avx2");
                },
                "lack 1 features that the source's have (avx2)",
            ),
            (
                |_, t| t.criu = (4, 1),
                "CRIU 4.1 is older than the source's 4.2",
            ),
            (
                |s, _| {
                    s.addresses.insert([10, 0, 0, 7].into());
                },
                "bound to 10.0.0.7",
            ),
            (
                |s, _| s.bytes = 200 << 20,
                "no space: 200 MiB are wanted, the target has 100",
            ),
            (
                |s, _| {
                    s.containers.clear();
                },
                "container app: only the target has it",
            ),
            (
                |_, t| {
                    t.containers.clear();
                },
                "create it there first",
            ),
            (
                |_, t| {
                    t.containers
                        .get_mut("app")
                        .unwrap()
                        .layers
                        .push("l0".into())
                },
                "image has other content",
            ),
            (
                |_, t| t.containers.get_mut("app").unwrap().stdio[0] = true,
                "stdin is open on one side only",
            ),
            (
                |_, t| {
                    t.containers.get_mut("app").unwrap().mounts.remove("/cache");
                },
                "volume /cache: the target has no such",
            ),
            (
                |s, _| {
                    s.containers.get_mut("app").unwrap().mounts.remove("/cache");
                },
                "volume /cache: only the target",
            ),
            (
                |s, t| {
                    for m in [s, t] {
                        m.containers.get_mut("app").unwrap().mounts.insert(
                            "/h".into(),
                            Volume::Local {
                                source: "/srv".into(),
                            },
                        );
                    }
                },
                "this node's /srv (hostPath",
            ),
            (
                |_, t| {
                    t.containers.get_mut("app").unwrap().mounts.insert(
                        "/cache".into(),
                        Volume::Local {
                            source: "/srv".into(),
                        },
                    );
                },
                "the target node's own /srv",
            ),
            (
                |_, t| {
                    t.containers.get_mut("app").unwrap().mounts.insert(
                        "/data".into(),
                        Volume::Shared {
                            fstype: "nfs4".into(),
                            source: "nas:/b".into(),
                        },
                    );
                },
                "another volume",
            ),
            (
                |s, t| {
                    s.bytes = 0;
                    t.containers.clear();
                    t.arch = "x".into();
                },
                "; container app",
            ),
        ];
        for (change, says) in changes {
            let (mut source, mut target) = (manifest(), manifest());
            change(&mut source, &mut target);
            let refused = compare(&source, &target).unwrap_err();
            assert!(refused.contains(says), "{refused:?} lacks {says:?}");
        }
        let mut newer = manifest();
        newer.criu = (4, 3);
        newer.cpu_flags.insert("avx512".into());
        newer.addresses.insert([10, 0, 0, 9].into());
        assert_eq!(compare(&manifest(), &newer), Ok(()));
    }

    #[test]
    fn a_foreign_manifest_is_read_or_refused() {
        let text = serde_json::to_string(&manifest()).unwrap();
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest());
        let mut more: Value = serde_json::from_str(&text).unwrap();
        more["extra"] = 1.into();
        assert!(serde_json::from_value::<Manifest>(more).is_err());
        assert!(serde_json::from_str::<Manifest>("{}").is_err());
    }

    #[test]
    fn volumes_are_told_apart_by_where_they_come_from() {
        let pod = "/var/lib/kubelet/pods/u1";
        for (destination, source, expected) in [
            (
                "/c",
                &*format!("{pod}/volumes/kubernetes.io~empty-dir/c"),
                Volume::Copied,
            ),
            ("/dev/shm", "/run/containerd/x/shm", Volume::Copied),
            (
                "/cm",
                &format!("{pod}/volumes/kubernetes.io~configmap/cm"),
                Volume::Own,
            ),
            (
                "/var/run/secrets/kubernetes.io/serviceaccount",
                &format!("{pod}/volumes/kubernetes.io~projected/t"),
                Volume::Own,
            ),
            ("/etc/hosts", &format!("{pod}/etc-hosts"), Volume::Own),
            ("/tl", &format!("{pod}/containers/app/12ab"), Volume::Own),
            (
                "/d",
                "/mnt/nas/vol/a",
                Volume::Shared {
                    fstype: "nfs4".into(),
                    source: "nas:/export/vol/a".into(),
                },
            ),
            (
                "/d",
                "/mnt/nas/local/a",
                Volume::Local {
                    source: "/mnt/nas/local/a".into(),
                },
            ),
            (
                "/h",
                "/srv/www",
                Volume::Local {
                    source: "/srv/www".into(),
                },
            ),
            (
                "/h",
                &format!("{pod}/volume-subpaths/v/app/0"),
                Volume::Local {
                    source: format!("{pod}/volume-subpaths/v/app/0"),
                },
            ),
        ] {
            let mount: OciMount =
                serde_json::from_value(json!({"destination": destination, "source": source}))
                    .unwrap();
            assert_eq!(volume(&mount, MOUNTINFO), expected, "{source}");
        }
    }

    #[test]
    fn what_a_spec_has_that_cannot_move_is_named() {
        let good = json!({"ociVersion": "1.2.0", "linux": {"namespaces": [
            {"type": "pid"}, {"type": "network", "path": "/n"}, {"type": "ipc", "path": "/i"}]}});
        let named = |change: fn(&mut Value)| {
            let mut spec = good.clone();
            change(&mut spec);
            blocker(&serde_json::from_value(spec).unwrap(), false)
        };
        assert_eq!(named(|_| {}), None);
        for (change, says) in [
            (
                (|s| s["linux"]["namespaces"][0] = json!({"type": "mount"})) as fn(&mut Value),
                "hostPID",
            ),
            (
                |s| s["linux"]["namespaces"][0]["path"] = "/p".into(),
                "shareProcessNamespace",
            ),
            (
                |s| s["linux"]["namespaces"][1] = json!({"type": "mount"}),
                "hostNetwork",
            ),
            (
                |s| s["linux"]["namespaces"][2] = json!({"type": "mount"}),
                "hostIPC",
            ),
            (
                |s| {
                    s["linux"]["namespaces"]
                        .as_array_mut()
                        .unwrap()
                        .push(json!({"type": "user"}))
                },
                "hostUsers",
            ),
            (
                |s| {
                    s["linux"]["devices"] =
                        json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}])
                },
                "/dev/kvm",
            ),
        ] {
            let blocker = named(change).unwrap_or_default();
            assert!(blocker.contains(says), "{blocker:?}");
        }
        let spec = serde_json::from_value(good.clone()).unwrap();
        assert!(blocker(&spec, true).unwrap().contains("terminal"));
    }
}
