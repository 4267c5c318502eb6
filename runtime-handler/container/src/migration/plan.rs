//! Whether a pod can move, and what goes with it. Pure.
//!
//! Each side describes its pod in a [`Manifest`]; the target compares the two before
//! anything moves. Every refusal names what is in the way and the way out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::migration::{MigrationParameters, TimeoutAction};
use oci_spec::runtime::{LinuxNamespaceType, Mount as OciMount, Spec};
use serde::{Deserialize, Serialize};

/// CRIU older than this cannot dump what is frozen already and leave it so.
const CRIU_OLDEST: (u32, u32) = (4, 0);
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

/// Where a pod is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// A socket on this host.
    Unix(PathBuf),
    /// Encrypted, both sides proven by certificates.
    Tls { host: String, port: u16 },
    /// In clear.
    Tcp { host: String, port: u16 },
}

impl Destination {
    /// Understands a URI, and refuses what is not allowed here.
    ///
    /// # Errors
    /// `InvalidArgument`, `FailedPrecondition`.
    pub(crate) fn parse(
        parameters: &MigrationParameters,
        config: &ContainerConfig,
    ) -> Result<Self> {
        let uri = &parameters.destination;
        let invalid = |what: &str| {
            Error::InvalidArgument(format!(
                "destination {uri:?}: {what}; a container pod goes to unix:///PATH, tls://HOST:PORT or tcp://HOST:PORT"
            ))
        };
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Err(invalid("it has no scheme"));
        };
        let address = || -> Result<(String, u16)> {
            let (host, port) = rest
                .rsplit_once(':')
                .ok_or_else(|| invalid("it has no port"))?;
            let port = port.parse().ok().filter(|port| *port != 0);
            let port = port.ok_or_else(|| invalid("its port is no number from 1 to 65535"))?;
            let host = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'))
                .unwrap_or(host);
            if host.is_empty() || host.contains(['/', '@', '?', '[', ']']) {
                return Err(invalid("its host is no name or address"));
            }
            Ok((host.to_owned(), port))
        };
        match scheme {
            "unix" => {
                if !rest.starts_with('/') || rest.len() > 107 || rest.contains('\0') {
                    return Err(invalid("it wants an absolute path of at most 107 bytes"));
                }
                Ok(Self::Unix(rest.into()))
            }
            "tls" => {
                let (host, port) = address()?;
                if config.migration_tls.is_none() {
                    return Err(Error::FailedPrecondition(format!(
                        "destination {uri}: this node has no certificates; set container.migration_tls to a folder with ca.pem, cert.pem and key.pem"
                    )));
                }
                Ok(Self::Tls { host, port })
            }
            "tcp" => {
                let (host, port) = address()?;
                let refuse = |why: &str| {
                    Err(Error::FailedPrecondition(format!(
                        "destination {uri}: the pod's memory would go over the network in clear; {why}"
                    )))
                };
                if parameters.tls_required {
                    return refuse("TLS is required: use tls://");
                }
                if !parameters.allow_clear {
                    return refuse("use tls://, or allow it in the request");
                }
                if !config.migration_clear {
                    return refuse("use tls://, or set container.migration_clear");
                }
                Ok(Self::Tcp { host, port })
            }
            _ => Err(invalid(&format!(
                "scheme {scheme:?} is unknown for containers"
            ))),
        }
    }
}

/// Refuses what containers have no use for.
///
/// # Errors
/// `InvalidArgument`, which names the parameter.
pub(crate) fn check_parameters(parameters: &MigrationParameters) -> Result<()> {
    let machine_only = |name: &str| {
        Err(Error::InvalidArgument(format!(
            "{name}: a container pod has none; leave it out"
        )))
    };
    match parameters {
        MigrationParameters {
            migrate_uri: Some(_),
            ..
        } => machine_only("migrate_uri"),
        MigrationParameters {
            disks_uri: Some(_), ..
        } => machine_only("disks_uri"),
        MigrationParameters {
            auto_converge: true,
            ..
        } => machine_only("auto_converge"),
        MigrationParameters { parallel, .. } if *parallel > 1 => machine_only("parallel"),
        MigrationParameters {
            timeout_action: TimeoutAction::PostCopy,
            ..
        } => machine_only("timeout_action post-copy"),
        _ => Ok(()),
    }
}

/// One side's pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// Version of the program, for people.
    pub dyad: String,
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
            version(target.criu),
            version(source.criu)
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

/// What `criu --version` says.
///
/// # Errors
/// It cannot be understood, or is too old.
pub(crate) fn criu_version(text: &str) -> std::result::Result<(u32, u32), String> {
    let version_text = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Version:"))
        .ok_or_else(|| format!("its version cannot be read from {text:?}"))?
        .trim();
    let mut parts = version_text.split('.').map(|part| part.parse::<u32>());
    let found = match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        (Some(Ok(major)), None) => (major, 0),
        _ => return Err(format!("its version {version_text:?} cannot be understood")),
    };
    if found < CRIU_OLDEST {
        return Err(format!(
            "its version {version_text} is too old: {} or newer is wanted",
            version(CRIU_OLDEST)
        ));
    }
    Ok(found)
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// What CRIU is told beside the OCI runtime's words: a line an option.
///
/// Without open connections nothing has to be kept from the network while it works. A
/// restored process joins the namespaces of its pod; the network is the OCI runtime's
/// business. `hold`: what is restored waits for SIGCONT.
pub(crate) fn criu_config(tcp_established: bool, join: &[(&str, PathBuf)], hold: bool) -> String {
    let lock = if tcp_established { "nftables" } else { "skip" };
    let mut text = format!("network-lock {lock}\nghost-limit 268435456\nlink-remap\n");
    if hold {
        text.push_str("leave-stopped\n");
    }
    for (namespace, path) in join {
        text.push_str(&format!("join-ns {namespace}:{}\n", path.display()));
    }
    text
}

/// The namespaces that a container has from its pod and CRIU has to be told of.
pub(crate) fn joined_namespaces(spec: &Spec) -> Vec<(&'static str, PathBuf)> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let known = [
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
    ];
    namespaces
        .into_iter()
        .flatten()
        .filter_map(|ns| {
            let (_, name) = known.iter().find(|(kind, _)| *kind == ns.typ())?;
            Some((*name, ns.path().clone()?))
        })
        .collect()
}

/// The errors in CRIU's log, which name what it could not take.
pub(crate) fn criu_errors(log: &str) -> Option<String> {
    let errors: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("Error (").map(|(_, rest)| rest))
        .filter_map(|rest| rest.split_once("): ").map(|(_, text)| text.trim()))
        // It says so always, and goes on.
        .filter(|text| !text.starts_with("rlimit:"))
        // The last ones only say that it failed.
        .filter(|text| !text.ends_with("FAILED."))
        .collect();
    (!errors.is_empty()).then(|| errors[..errors.len().min(4)].join("; "))
}

/// A connection or bound socket of `/proc/PID/net/{tcp,tcp6,udp,udp6}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Socket {
    pub local: IpAddr,
    pub local_port: u16,
    pub remote: IpAddr,
    pub remote_port: u16,
    /// Data may be under way.
    pub connected: bool,
}

/// Reads one of those files.
pub(crate) fn sockets(text: &str, tcp: bool) -> Vec<Socket> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, local_port) = address(words.next()?)?;
            let (remote, remote_port) = address(words.next()?)?;
            let state = u8::from_str_radix(words.next()?, 16).ok()?;
            // TCP_TIME_WAIT (6) belongs to no process; TCP_CLOSE is 7, TCP_LISTEN 10.
            (!tcp || state != 6).then_some(Socket {
                local,
                local_port,
                remote,
                remote_port,
                connected: tcp && !matches!(state, 7 | 10),
            })
        })
        .collect()
}

/// `0100007F:1F90`: words of four bytes, as this machine has them in memory.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..ip.len()).step_by(8) {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some((ip, port))
}

/// How long the pod would stand still for `bytes` at `rate` bytes per second, and the
/// work that no rate makes shorter.
pub(crate) fn expected_downtime(bytes: u64, rate: u64) -> Duration {
    let copy = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
    // Frozen, dumped, restored: measured for a small container.
    copy + Duration::from_millis(700)
}

/// Whether another pre-dump is worth it: the last one wrote much, and less than the one
/// before.
pub(crate) fn dump_again(written: &[u64]) -> bool {
    const ENOUGH: u64 = 8 << 20;
    const MOST: usize = 4;
    match written {
        [] => true,
        [.., last] if *last <= ENOUGH => false,
        [.., before, last] if *last > before / 10 * 8 => false,
        all => all.len() < MOST,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn destination(
        uri: &str,
        change: impl Fn(&mut MigrationParameters, &mut ContainerConfig),
    ) -> Result<Destination> {
        let mut parameters = MigrationParameters {
            destination: uri.into(),
            ..MigrationParameters::default()
        };
        let mut config = ContainerConfig::default();
        change(&mut parameters, &mut config);
        Destination::parse(&parameters, &config)
    }

    #[test]
    fn destinations_are_understood_or_refused_by_name() {
        let tls = |_: &mut MigrationParameters, config: &mut ContainerConfig| {
            config.migration_tls = Some("/etc/dyad/tls".into());
        };
        let host = |host: &str| Destination::Tls {
            host: host.into(),
            port: 7,
        };
        assert_eq!(
            destination("unix:///run/m.sock", tls).unwrap(),
            Destination::Unix("/run/m.sock".into())
        );
        assert_eq!(destination("tls://node2:7", tls).unwrap(), host("node2"));
        assert_eq!(
            destination("tls://[fd00::2]:7", tls).unwrap(),
            host("fd00::2")
        );
        for (uri, says) in [
            ("", "no scheme"),
            ("node2", "no scheme"),
            ("unix://run/m.sock", "absolute path"),
            ("tls://node2", "no port"),
            ("tls://node2:0", "port"),
            ("tls://node2:99999", "port"),
            ("tls://:7", "host"),
            ("tls://a/b:7", "host"),
            ("qemu+tls://node2/system", "scheme \"qemu+tls\""),
            ("http://node2:80", "scheme \"http\""),
        ] {
            let error = destination(uri, tls).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{uri}");
            assert!(error.to_string().contains(says), "{error}");
            assert!(error.to_string().contains("tls://HOST:PORT"), "{error}");
        }
        let long = format!("unix:///{}", "x".repeat(107));
        assert!(destination(&long, tls).is_err());
    }

    #[test]
    fn nothing_goes_in_clear_unless_asked_and_configured() {
        let uri = "tcp://192.0.2.7:7";
        for (asked, configured, required, says) in [
            (false, false, false, "allow it in the request"),
            (false, true, false, "allow it in the request"),
            (true, false, false, "container.migration_clear"),
            (true, true, true, "TLS is required"),
        ] {
            let error = destination(uri, |parameters, config| {
                parameters.allow_clear = asked;
                parameters.tls_required = required;
                config.migration_clear = configured;
            })
            .unwrap_err();
            assert!(matches!(error, Error::FailedPrecondition(_)));
            assert!(error.to_string().contains(says), "{error}");
        }
        let clear = destination(uri, |parameters, config| {
            parameters.allow_clear = true;
            config.migration_clear = true;
        });
        assert!(matches!(clear.unwrap(), Destination::Tcp { port: 7, .. }));
        let error = destination("tls://n:7", |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("container.migration_tls"), "{error}");
    }

    #[test]
    fn what_only_machines_have_is_refused_by_name() {
        let refused = |change: fn(&mut MigrationParameters)| {
            let mut parameters = MigrationParameters::default();
            change(&mut parameters);
            check_parameters(&parameters).unwrap_err().to_string()
        };
        check_parameters(&MigrationParameters::default()).unwrap();
        assert!(refused(|p| p.migrate_uri = Some(String::new())).contains("migrate_uri"));
        assert!(refused(|p| p.disks_uri = Some(String::new())).contains("disks_uri"));
        assert!(refused(|p| p.auto_converge = true).contains("auto_converge"));
        assert!(refused(|p| p.parallel = 2).contains("parallel"));
        assert!(refused(|p| p.timeout_action = TimeoutAction::PostCopy).contains("post-copy"));
    }

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
        let changes: [(Change, &str); 15] = [
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

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:50 / /mnt/nas rw,relatime shared:5 - nfs4 nas:/export rw
31 22 0:51 /sub /mnt/nas/local rw - tmpfs tmpfs rw";

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

    #[test]
    fn crius_version_and_errors_are_found_in_its_words() {
        assert_eq!(criu_version("Version: 4.2.1\nGitID: x"), Ok((4, 2)));
        assert_eq!(criu_version("Version: 5"), Ok((5, 0)));
        for (text, says) in [
            ("Version: 3.17.1", "too old: 4.0"),
            ("", "cannot be read"),
            ("Version: x.y", "understood"),
        ] {
            assert!(criu_version(text).unwrap_err().contains(says), "{text}");
        }
        let log = "(00.1) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self
(00.2) Warn  (criu/x.c:1): careful
(00.3) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.
(00.4) Error (criu/cr-dump.c:1975): Dumping FAILED.";
        assert_eq!(
            criu_errors(log).unwrap(),
            "inet: Connected TCP socket, consider using --tcp-established option."
        );
        assert_eq!(criu_errors("all is well"), None);
    }

    #[test]
    fn criu_joins_the_namespaces_of_the_target_pod() {
        assert_eq!(
            criu_config(false, &[], false),
            "network-lock skip\nghost-limit 268435456\nlink-remap\n"
        );
        let spec = json!({"ociVersion": "1.2.0", "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
            {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/n"}]}});
        let join = joined_namespaces(&serde_json::from_value(spec).unwrap());
        assert_eq!(
            criu_config(true, &join, true),
            "network-lock nftables\nghost-limit 268435456\nlink-remap\nleave-stopped\njoin-ns ipc:/proc/7/ns/ipc\njoin-ns uts:/proc/7/ns/uts\n"
        );
    }

    #[test]
    fn sockets_are_read_from_proc() {
        let text = "  sl  local_address rem_address   st tx_queue
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000
   1: 0700000A:1F90 0900000A:D431 01 00000000:00000000
   2: 0700000A:1F91 0900000A:D431 06 00000000:00000000
   x: nonsense
   3: 0700000A";
        let found = sockets(text, true);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(
            (found[0].local, found[0].connected),
            ([127, 0, 0, 1].into(), false)
        );
        assert_eq!(
            (found[1].local, found[1].remote_port),
            ([10, 0, 0, 7].into(), 0xd431)
        );
        assert!(found[1].connected);
        let v6 = "h\n 0: 0000000000000000FFFF00000700000A:0050 00000000000000000000000000000000:0000 07 0";
        assert_eq!(sockets(v6, false)[0].local, IpAddr::from([10, 0, 0, 7]));
    }

    #[test]
    fn memory_is_dumped_again_while_that_makes_the_rest_smaller() {
        const MIB: u64 = 1 << 20;
        for (written, again) in [
            (&[][..], true),
            (&[4 * MIB][..], false),
            (&[400 * MIB], true),
            (&[400 * MIB, 100 * MIB], true),
            (&[400 * MIB, 390 * MIB], false),
            (&[400 * MIB, 100 * MIB, 50 * MIB, 30 * MIB], false),
        ] {
            assert_eq!(dump_again(written), again, "{written:?}");
        }
        assert_eq!(expected_downtime(100, 100), Duration::from_millis(1700));
    }
}
