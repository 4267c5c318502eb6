//! From the OCI spec that the host sends to the one that libcontainer gets. Pure.
//!
//! What differs, and why:
//! - `linux.seccomp` goes: libcontainer 0.7 leaves an exec without it and cannot load
//!   any with `noNewPrivileges: false`; the helper loads the host's filter itself.
//! - AppArmor and SELinux are the host's.
//! - capabilities: what is unset means "none" (libcontainer takes it for "all").
//! - a cgroup namespace where there is none: CRI asks for none on a host with cgroup
//!   v1, where a container sees its own limits without one; in the guest's v2 it would
//!   see the guest's.
//! - the PID namespace that it joins (the pod's, another container's) by its path here.
//! - a hostname needs a UTS namespace of the container's own.
//! - no PATH: the usual one, as runc's callers rely on.
//! - no HOME: the user's, to be looked up in the container's root.

use std::path::{Path, PathBuf};

use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::{
    Capability, Hooks, Linux, LinuxCapabilities, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder,
    LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process, Spec,
};

/// What an image without PATH gets, as Docker and runc give it.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Documentation/admin-guide/devices.txt: non-serial mice, misc features.
const MISC_MAJOR: i64 = 10;

const HOME: &str = "HOME=";
/// The HOME of a user who is in no `/etc/passwd`, as Docker and runc give it.
const NO_HOME: &str = "HOME=/";

/// One `struct sock_filter`.
const INSTRUCTION_BYTES: usize = 8;
/// `BPF_MAXINSNS` of linux/bpf_common.h.
const INSTRUCTIONS_MAX: usize = 4096;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`: it would give us a descriptor that nobody serves.
const FLAG_NEW_LISTENER: u32 = 1 << 3;

/// A block device of the guest that the container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Where in the container.
    pub path: PathBuf,
    /// Major and minor number.
    pub number: (i64, i64),
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// cgroup access: some of `rwm`.
    pub access: String,
}

/// What the guest adds to a spec.
#[derive(Debug)]
pub struct Place<'a> {
    /// The root file system.
    pub rootfs: &'a Path,
    /// The cgroup, from the hierarchy's root.
    pub cgroup: &'a Path,
    /// Whether the container's init gets a terminal.
    pub terminal: bool,
    /// Block devices.
    pub devices: &'a [Device],
    /// The PID namespace that it joins; none: as the spec says, one of its own.
    pub pids: Option<&'a Path>,
}

/// What the rest of the agent wants to know of a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// It has a PID namespace of its own, whose end is the end of all processes in it.
    pub own_pid_namespace: bool,
    /// The init process's user, who must be able to open its stdio.
    pub uid: u32,
    /// Its HOME is to be looked up.
    pub find_home: bool,
    /// Working directory.
    pub cwd: PathBuf,
    /// Bind mounts: source in the guest, destination in the container.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

/// Reads the host's spec.
///
/// # Errors
/// `InvalidArgument`: it is no OCI spec.
pub fn parse(json: &[u8]) -> Result<Spec> {
    serde_json::from_slice(json)
        .map_err(|error| Error::InvalidArgument(format!("the container's OCI spec: {error}")))
}

/// Reads the process of an exec.
///
/// # Errors
/// `InvalidArgument`: it is none.
pub fn parse_process(json: &[u8]) -> Result<Process> {
    serde_json::from_slice(json)
        .map_err(|error| Error::InvalidArgument(format!("the OCI process: {error}")))
}

/// Adapts a spec to the guest.
///
/// # Errors
/// `InvalidArgument` naming the field that the guest cannot honour.
pub fn adapt(mut spec: Spec, place: &Place<'_>) -> Result<(Spec, Facts)> {
    if spec.hooks().as_ref().is_some_and(has_hooks) {
        return Err(Error::InvalidArgument(
            "hooks: programs of the host cannot run in the machine".into(),
        ));
    }
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(place.rootfs.into());
    spec.set_root(Some(root));

    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| Error::InvalidArgument("process: must be set".into()))?;
    let find_home = adapt_process(&mut process, place.terminal)?;

    let mut linux = spec
        .linux()
        .clone()
        .ok_or_else(|| Error::InvalidArgument("linux: must be set".into()))?;
    linux
        .set_seccomp(None)
        .set_mount_label(None)
        .set_cgroups_path(Some(place.cgroup.into()));
    if namespace(&linux, LinuxNamespaceType::User).is_some() {
        // libcontainer 0.7 joins every namespace but this one when it execs: the
        // process would have the guest's root.
        return Err(Error::InvalidArgument(
            "linux.namespaces: user namespaces are not supported in a machine, whose guest is a boundary of its own; set hostUsers: true".into(),
        ));
    }
    if namespace(&linux, LinuxNamespaceType::Cgroup).is_none() {
        set_namespace(&mut linux, LinuxNamespaceType::Cgroup, None);
    }
    if place.pids.is_some() {
        set_namespace(&mut linux, LinuxNamespaceType::Pid, place.pids);
    }
    add_devices(&mut linux, place.devices)?;
    if namespace(&linux, LinuxNamespaceType::Uts).is_none() {
        spec.set_hostname(None).set_domainname(None);
    }
    let facts = Facts {
        own_pid_namespace: namespace(&linux, LinuxNamespaceType::Pid)
            .is_some_and(|path| path.is_none()),
        uid: process.user().uid(),
        find_home,
        cwd: process.cwd().clone(),
        binds: binds(spec.mounts().as_deref().unwrap_or_default())?,
    };
    spec.set_process(Some(process)).set_linux(Some(linux));
    Ok((spec, facts))
}

/// Adapts a process to the guest. Says whether its HOME is to be looked up.
///
/// # Errors
/// `InvalidArgument` naming the field that the guest cannot honour.
pub fn adapt_process(process: &mut Process, terminal: bool) -> Result<bool> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::InvalidArgument(
            "process.args: must not be empty".into(),
        ));
    }
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd("/".into());
    }
    if !process.cwd().is_absolute() {
        return Err(Error::InvalidArgument(format!(
            "process.cwd {:?}: must be absolute",
            process.cwd()
        )));
    }
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.into());
    }
    let find_home = !env.iter().any(|entry| is_home(entry) && entry != HOME);
    if find_home {
        // One that is not empty keeps libcontainer from asking the C library, which would load
        // what the image's nsswitch.conf names into this static program.
        env.retain(|entry| !is_home(entry));
        env.push(NO_HOME.into());
    }
    let capabilities = complete(process.capabilities().as_ref());
    process
        .set_env(Some(env))
        .set_terminal(Some(terminal))
        .set_apparmor_profile(None)
        .set_selinux_label(None)
        .set_capabilities(Some(capabilities));
    Ok(find_home)
}

/// Whether an entry of the environment is HOME.
pub fn is_home(entry: &str) -> bool {
    entry.starts_with(HOME)
}

/// The home folder of a user in passwd(5) text: runc's rule, `/` for one who is not in it.
pub fn home(passwd: &[u8], uid: u32) -> String {
    let uid = uid.to_string();
    passwd
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.as_str()))
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .filter(|home| !home.is_empty())
        .unwrap_or_else(|| "/".into())
}

/// Width and height of the process's terminal, where it names them.
pub fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    let side = |length: u64| u16::try_from(length).ok().filter(|length| *length > 0);
    Some((side(size.width())?, side(size.height())?))
}

/// The devices of a spec that a driver of the guest must be there for: path and minor number
/// of each miscellaneous one (major 10). A privileged container is given all of the host's,
/// whether it wants them or not.
pub fn driven_devices(spec: &Spec) -> Vec<(PathBuf, i64)> {
    let linux = spec.linux().as_ref();
    let rules = linux.and_then(|linux| linux.resources().as_ref()?.devices().as_ref());
    let is_privileged = rules.into_iter().flatten().any(|rule| {
        rule.allow()
            && rule.major().is_none()
            && rule.minor().is_none()
            && rule.typ().is_none_or(|typ| typ == LinuxDeviceType::A)
    });
    if is_privileged {
        return Vec::new();
    }
    linux
        .and_then(|linux| linux.devices().as_ref())
        .into_iter()
        .flatten()
        .filter(|device| device.typ() == LinuxDeviceType::C && device.major() == MISC_MAJOR)
        .map(|device| (device.path().clone(), device.minor()))
        .collect()
}

/// Whether a process may become the administrator of the pod's network.
pub fn may_administer_network(spec: &Spec) -> bool {
    spec.process()
        .as_ref()
        .and_then(|process| process.capabilities().as_ref()?.bounding().as_ref())
        .is_some_and(|set| set.contains(&Capability::NetAdmin))
}

/// Checks a filter that the host compiled.
///
/// # Errors
/// `InvalidArgument`: it cannot be one.
pub fn check_filter(filter: &[u8], flags: u32) -> Result<()> {
    let fits = filter.len().is_multiple_of(INSTRUCTION_BYTES)
        && filter.len() <= INSTRUCTIONS_MAX * INSTRUCTION_BYTES;
    if !fits {
        return Err(Error::InvalidArgument(format!(
            "seccomp_filter of {} bytes: must be at most {INSTRUCTIONS_MAX} instructions of {INSTRUCTION_BYTES} bytes",
            filter.len()
        )));
    }
    if flags & FLAG_NEW_LISTENER != 0 {
        return Err(Error::InvalidArgument(
            "seccomp_flags: user notification cannot leave the machine".into(),
        ));
    }
    Ok(())
}

/// Checks a container or exec id, which becomes a file name.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_id(id: &str) -> Result<()> {
    let fine = !id.is_empty()
        && id.len() <= 128
        && id != "."
        && id != ".."
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte));
    if fine {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "id {id:?}: must be 1 to 128 letters, digits, -, _, + or ."
        )))
    }
}

/// `Some(path)` when the spec names a namespace of that type; the path is that of
/// one to join.
fn namespace(linux: &Linux, kind: LinuxNamespaceType) -> Option<&Option<PathBuf>> {
    linux
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == kind)
        .map(LinuxNamespace::path)
}

fn set_namespace(linux: &mut Linux, kind: LinuxNamespaceType, path: Option<&Path>) {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| namespace.typ() != kind);
    let mut own = LinuxNamespace::default();
    own.set_typ(kind).set_path(path.map(Into::into));
    namespaces.push(own);
    linux.set_namespaces(Some(namespaces));
}

fn has_hooks(hooks: &Hooks) -> bool {
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    [
        prestart,
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ]
    .into_iter()
    .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
}

/// Every set is named: an unset one would be left as PID 1 has it.
fn complete(capabilities: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut all = capabilities.cloned().unwrap_or_default();
    let of = |set: fn(&LinuxCapabilities) -> &Option<oci_spec::runtime::Capabilities>| {
        Some(
            capabilities
                .and_then(|given| set(given).clone())
                .unwrap_or_default(),
        )
    };
    all.set_bounding(of(LinuxCapabilities::bounding))
        .set_effective(of(LinuxCapabilities::effective))
        .set_inheritable(of(LinuxCapabilities::inheritable))
        .set_permitted(of(LinuxCapabilities::permitted))
        .set_ambient(of(LinuxCapabilities::ambient));
    all
}

fn add_devices(linux: &mut Linux, devices: &[Device]) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let wrong =
        |error: oci_spec::OciSpecError| Error::InvalidArgument(format!("block device: {error}"));
    let mut nodes = linux.devices().clone().unwrap_or_default();
    let mut resources: LinuxResources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    for device in devices {
        nodes.push(
            LinuxDeviceBuilder::default()
                .path(&device.path)
                .typ(LinuxDeviceType::B)
                .major(device.number.0)
                .minor(device.number.1)
                .file_mode(device.mode)
                .uid(device.uid)
                .gid(device.gid)
                .build()
                .map_err(wrong)?,
        );
        rules.push(
            LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(LinuxDeviceType::B)
                .major(device.number.0)
                .minor(device.number.1)
                .access(&device.access)
                .build()
                .map_err(wrong)?,
        );
    }
    resources.set_devices(Some(rules));
    linux
        .set_devices(Some(nodes))
        .set_resources(Some(resources));
    Ok(())
}

fn binds(mounts: &[Mount]) -> Result<Vec<(PathBuf, PathBuf)>> {
    mounts
        .iter()
        .filter(|mount| {
            mount.typ().as_deref() == Some("bind")
                || mount
                    .options()
                    .iter()
                    .flatten()
                    .any(|option| option == "bind" || option == "rbind")
        })
        .map(|mount| match mount.source() {
            Some(source) if source.is_absolute() => {
                Ok((source.clone(), mount.destination().clone()))
            }
            source => Err(Error::InvalidArgument(format!(
                "mounts: bind source {source:?} of {}: must be an absolute path in the guest",
                mount.destination().display()
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{
      "ociVersion": "1.2.0",
      "process": {
        "user": {"uid": 1000, "gid": 1000},
        "args": ["sleep", "1"], "cwd": "", "env": ["A=b"],
        "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x",
        "capabilities": {"bounding": ["CAP_CHOWN"]},
        "noNewPrivileges": true, "consoleSize": {"height": 24, "width": 80}
      },
      "root": {"path": "rootfs", "readonly": true},
      "hostname": "pod",
      "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/run/dyad/volumes/hosts", "options": ["rbind", "ro"]}
      ],
      "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}],
        "cgroupsPath": "/kubepods/x",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}
      }
    }"#;

    fn place(devices: &[Device]) -> Place<'_> {
        Place {
            rootfs: Path::new("/run/dyad/containers/c/rootfs"),
            cgroup: Path::new("/pod/c"),
            terminal: false,
            devices,
            pids: None,
        }
    }

    fn adapted(json: &str) -> Result<(Spec, Facts)> {
        adapt(parse(json.as_bytes())?, &place(&[]))
    }

    #[test]
    fn the_hosts_confinement_goes_and_the_rest_stays() {
        let (spec, facts) = adapted(SPEC).unwrap();
        let process = spec.process().as_ref().unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none());
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/pod/c")));
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
        assert_eq!(process.cwd(), Path::new("/"));
        assert_eq!(
            process.env().as_ref().unwrap(),
            &["A=b", DEFAULT_PATH, NO_HOME]
        );
        assert!(spec.hostname().is_none(), "no UTS namespace of its own");
        assert_eq!(console_size(process), Some((80, 24)));
        assert_eq!(namespace(linux, LinuxNamespaceType::Cgroup), Some(&None));
        assert_eq!(
            facts,
            Facts {
                own_pid_namespace: true,
                uid: 1000,
                find_home: true,
                cwd: "/".into(),
                binds: vec![("/run/dyad/volumes/hosts".into(), "/etc/hosts".into())],
            }
        );
    }

    #[test]
    fn a_container_joins_the_pid_namespace_it_is_told() {
        for (pids, own) in [(None, true), (Some(Path::new("/proc/77/ns/pid")), false)] {
            let place = Place { pids, ..place(&[]) };
            let (spec, facts) = adapt(parse(SPEC.as_bytes()).unwrap(), &place).unwrap();
            let linux = spec.linux().as_ref().unwrap();
            let joined = namespace(linux, LinuxNamespaceType::Pid).unwrap();
            assert_eq!((joined.as_deref(), facts.own_pid_namespace), (pids, own));
            let all = linux.namespaces().as_deref().unwrap_or_default();
            let of_pids = |n: &&LinuxNamespace| n.typ() == LinuxNamespaceType::Pid;
            assert_eq!(all.iter().filter(of_pids).count(), 1);
        }
    }

    #[test]
    fn a_home_that_is_missing_or_empty_is_the_users() {
        for (env, wanted) in [
            (vec!["A=1"], true),
            (vec!["HOME="], true),
            (vec!["HOME=/here"], false),
            (vec!["HOMER=/x"], true),
        ] {
            let mut process = parse(SPEC.as_bytes()).unwrap().process().clone().unwrap();
            process.set_env(Some(env.iter().map(ToString::to_string).collect()));
            assert_eq!(
                adapt_process(&mut process, false).unwrap(),
                wanted,
                "{env:?}"
            );
            let homes = process
                .env()
                .iter()
                .flatten()
                .filter(|entry| is_home(entry));
            assert_eq!(homes.count(), 1, "{env:?}");
        }
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbad\n\xff\nuser:x:1000:1000::/home/user:/bin/sh\nno:x:7:7:::\n";
        let found = [0, 1000, 7, 4242].map(|uid| home(passwd, uid));
        assert_eq!(found, ["/root", "/home/user", "/", "/"]);
        assert_eq!(home(b"", 0), "/");
    }

    #[test]
    fn a_device_wants_its_driver_unless_all_are_given() {
        let with = |rule: &str| {
            let devices = format!(
                r#""cgroupsPath": "/x", "devices": [
                    {{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}},
                    {{"path": "/dev/vpn", "type": "c", "major": 10, "minor": 200}}],
                   "resources": {{"devices": [{rule}]}},"#
            );
            let json = SPEC.replace(r#""cgroupsPath": "/kubepods/x","#, &devices);
            driven_devices(&parse(json.as_bytes()).unwrap())
        };
        let tun = vec![(PathBuf::from("/dev/vpn"), 200)];
        assert_eq!(with(r#"{"allow": false, "access": "rwm"}"#), tun);
        assert!(with(r#"{"allow": true, "access": "rwm"}"#).is_empty());
    }

    #[test]
    fn capability_sets_that_are_unset_are_empty_not_full() {
        let (spec, _) = adapted(SPEC).unwrap();
        let capabilities = spec
            .process()
            .as_ref()
            .unwrap()
            .capabilities()
            .clone()
            .unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 1);
        for set in [
            capabilities.effective(),
            capabilities.permitted(),
            capabilities.inheritable(),
            capabilities.ambient(),
        ] {
            assert!(set.as_ref().unwrap().is_empty());
        }
        let (spec, _) =
            adapted(&SPEC.replace(r#""capabilities": {"bounding": ["CAP_CHOWN"]},"#, "")).unwrap();
        let capabilities = spec
            .process()
            .as_ref()
            .unwrap()
            .capabilities()
            .clone()
            .unwrap();
        assert!(capabilities.bounding().as_ref().unwrap().is_empty());
    }

    #[test]
    fn a_hostname_with_its_own_namespace_stays() {
        let own = SPEC.replace(r#"{"type": "pid"}"#, r#"{"type": "uts"}"#);
        let (spec, facts) = adapted(&own).unwrap();
        assert_eq!(spec.hostname().as_deref(), Some("pod"));
        assert!(!facts.own_pid_namespace);
        let joined = SPEC.replace(
            r#"{"type": "pid"}"#,
            r#"{"type": "pid", "path": "/proc/7/ns/pid"}"#,
        );
        assert!(!adapted(&joined).unwrap().1.own_pid_namespace);
    }

    #[test]
    fn what_the_guest_cannot_honour_is_refused_by_name() {
        for (from, to, field) in [
            (
                r#""hostname": "pod""#,
                r#""hooks": {"poststop": [{"path": "/x"}]}"#,
                "hooks",
            ),
            (
                r#"{"type": "pid"}"#,
                r#"{"type": "user"}"#,
                "linux.namespaces",
            ),
            (r#""args": ["sleep", "1"]"#, r#""args": []"#, "process.args"),
            (r#""cwd": """#, r#""cwd": "a/b""#, "process.cwd"),
            (
                r#""source": "/run/dyad/volumes/hosts""#,
                r#""source": "hosts""#,
                "mounts",
            ),
        ] {
            let json = SPEC.replace(from, to);
            assert_ne!(json, SPEC);
            let error = adapted(&json).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
            assert!(error.to_string().starts_with(field), "{error}");
        }
        assert!(parse(b"\xff\x00{").is_err());
        assert!(parse_process(b"[]").is_err());
    }

    #[test]
    fn devices_are_made_and_allowed() {
        let device = Device {
            path: "/dev/data".into(),
            number: (8, 16),
            mode: 0o660,
            uid: 0,
            gid: 6,
            access: "rwm".into(),
        };
        let (spec, _) = adapt(parse(SPEC.as_bytes()).unwrap(), &place(&[device])).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let node = &linux.devices().as_ref().unwrap()[0];
        assert_eq!(
            (node.major(), node.minor(), node.typ()),
            (8, 16, LinuxDeviceType::B)
        );
        let rule = &linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .as_ref()
            .unwrap()[0];
        assert!(rule.allow());
    }

    #[test]
    fn filters_and_ids_of_foreign_shape_are_refused() {
        check_filter(&[], 0).unwrap();
        check_filter(&[0; 16], 2).unwrap();
        assert!(check_filter(&[0; 15], 0).is_err());
        assert!(check_filter(&[0; 8 * 4097], 0).is_err());
        assert!(check_filter(&[0; 8], FLAG_NEW_LISTENER).is_err());
        check_id("a-b_c.d+1").unwrap();
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }
}
