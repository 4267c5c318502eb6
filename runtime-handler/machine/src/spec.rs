//! From containerd's OCI spec, written for a host, to what a machine can honour. Pure.
//!
//! What the host alone can give is either meaningless in the guest and dropped (its
//! namespaces' paths, AppArmor and SELinux labels, CPU numbers), or wanted by name and
//! refused by name. What differs inside the guest is the agent's to adapt.

use std::collections::HashMap;
use std::path::PathBuf;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use oci_spec::runtime::{
    Hooks, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Process,
    Spec,
};

/// The pod as its sandbox's spec describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxSpec {
    /// The pod's network namespace; `None` outside CRI: no network.
    pub netns: Option<PathBuf>,
    /// Host name of the guest.
    pub hostname: String,
    /// Where the pod is accounted.
    pub cgroups_path: Option<String>,
    /// Pod-level sysctls.
    pub sysctls: HashMap<String, String>,
}

/// A container's spec for the guest.
#[derive(Debug)]
pub struct GuestSpec {
    /// What the agent runs; mounts and seccomp are taken out, to be filled in.
    pub oci: Spec,
    /// The process of the host whose PID namespace it is to join: of the pod, or of another of
    /// its containers. `None`: it has one of its own.
    pub joins_pids_of: Option<u32>,
    /// The profile to compile on the host.
    pub seccomp: Option<LinuxSeccomp>,
    /// The root is read-only.
    pub readonly_root: bool,
}

/// Character devices that the guest has under the same numbers, wherever in the container
/// they are: those of every container (OCI runtime spec, default devices), and /dev/net/tun,
/// /dev/fuse and /dev/kvm, for which the agent finds a driver or refuses
/// (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64); 11] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 200),
    (10, 229),
    (10, 232),
];

/// Reads the sandbox's spec.
///
/// # Errors
/// `InvalidArgument` for a pod that shares a namespace with the host, naming the field.
pub fn sandbox(oci: &Spec) -> Result<SandboxSpec> {
    let linux = oci.linux().as_ref();
    let namespaces = linux
        .and_then(|l| l.namespaces().as_deref())
        .unwrap_or_default();
    let find = |kind| namespaces.iter().find(|n| n.typ() == kind);
    for (kind, field) in [
        (LinuxNamespaceType::Network, "hostNetwork"),
        (LinuxNamespaceType::Pid, "hostPID"),
        (LinuxNamespaceType::Ipc, "hostIPC"),
    ] {
        if find(kind).is_none() {
            return Err(Error::InvalidArgument(format!(
                "{field}: true is not possible for a machine pod, whose guest has a kernel of its own; remove it, or run the pod as containers (runtimeClassName: dyad)"
            )));
        }
    }
    if find(LinuxNamespaceType::User).is_some() {
        return Err(Error::InvalidArgument(
            "hostUsers: false is not supported for a machine pod, which is isolated by its machine; remove it".into(),
        ));
    }
    Ok(SandboxSpec {
        netns: find(LinuxNamespaceType::Network).and_then(|n| n.path().clone()),
        hostname: oci.hostname().clone().unwrap_or_default(),
        cgroups_path: linux
            .and_then(|l| l.cgroups_path().as_deref())
            .map(|path| path.to_string_lossy().into_owned())
            .filter(|path| !path.is_empty()),
        sysctls: linux.and_then(|l| l.sysctl().clone()).unwrap_or_default(),
    })
}

/// Adapts a container's spec.
///
/// # Errors
/// `InvalidArgument` naming the field that a machine cannot honour, and the way out.
pub fn container(mut oci: Spec) -> Result<GuestSpec> {
    if oci.hooks().as_ref().is_some_and(has_hooks) {
        return Err(Error::InvalidArgument(
            "hooks: programs of the host cannot run in a machine's guest; remove the hook or device injection (CDI), or run the pod as containers (runtimeClassName: dyad)".into(),
        ));
    }
    let mut process = oci
        .process()
        .clone()
        .ok_or_else(|| Error::InvalidArgument("process: must be set".into()))?;
    self::process(&mut process)?;
    oci.set_process(Some(process));
    oci.set_hooks(None);

    let mut linux = oci
        .linux()
        .clone()
        .ok_or_else(|| Error::InvalidArgument("linux: must be set".into()))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    if namespaces
        .iter()
        .any(|n| n.typ() == LinuxNamespaceType::User)
    {
        return Err(Error::InvalidArgument(
            "hostUsers: false is not supported for a machine pod, which is isolated by its machine; remove it".into(),
        ));
    }
    let joins_pids_of = pids_joined(&namespaces)?;
    // The guest is the pod: its own network, IPC and UTS namespaces are the pod's.
    namespaces.retain(|namespace| match namespace.typ() {
        LinuxNamespaceType::Network | LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => false,
        LinuxNamespaceType::Time => false,
        LinuxNamespaceType::Pid => joins_pids_of.is_none(),
        _ => true,
    });
    for namespace in &mut namespaces {
        namespace.set_path(None);
    }
    // The guest has cgroup v2, whatever the host has: there a container sees its own group
    // as the root, as containerd asks for where it knows of v2.
    if !namespaces
        .iter()
        .any(|n| n.typ() == LinuxNamespaceType::Cgroup)
    {
        let mut cgroup = LinuxNamespace::default();
        cgroup.set_typ(LinuxNamespaceType::Cgroup);
        namespaces.push(cgroup);
    }
    linux.set_namespaces(Some(namespaces));

    let mut resources = linux.resources().clone().unwrap_or_default();
    // CRI names every page size of the host, with 0 where none is asked for.
    if let Some(pages) = resources
        .hugepage_limits()
        .iter()
        .flatten()
        .find(|limit| limit.limit() > 0)
    {
        return Err(Error::InvalidArgument(format!(
            "resources.limits: hugepages of {}: a machine's guest has no huge pages of its own; remove the limit, or run the pod as containers (runtimeClassName: dyad)",
            pages.page_size()
        )));
    }
    let privileged = resources.devices().iter().flatten().any(|rule| {
        rule.allow()
            && rule.major().is_none()
            && rule.minor().is_none()
            && rule
                .access()
                .as_deref()
                .is_some_and(|access| access.contains('w'))
            && rule.typ().is_none_or(|t| t == LinuxDeviceType::A)
    });
    let devices = linux.devices().clone().unwrap_or_default();
    linux.set_devices(Some(guest_devices(devices, privileged)?));
    // CPU and memory node numbers, block devices and RDMA are the host's.
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None)
            .set_mems(None)
            .set_realtime_period(None)
            .set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    resources
        .set_block_io(None)
        .set_rdma(None)
        .set_network(None)
        .set_hugepage_limits(None);
    linux.set_resources(Some(resources));

    let seccomp = linux.seccomp().clone();
    linux
        .set_seccomp(None)
        .set_mount_label(None)
        .set_intel_rdt(None)
        .set_cgroups_path(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    oci.set_linux(Some(linux));
    oci.set_hostname(None);
    oci.set_domainname(None);
    let readonly_root = oci
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false);
    Ok(GuestSpec {
        oci,
        joins_pids_of,
        seccomp,
        readonly_root,
    })
}

/// Adapts a process: a container's init, or an exec.
///
/// # Errors
/// `InvalidArgument` without a command.
pub fn process(process: &mut Process) -> Result<()> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::InvalidArgument(
            "process.args is empty: the image has no entrypoint and the container no command; set `command`".into(),
        ));
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
    Ok(())
}

/// The process whose PID namespace the spec joins. containerd names that of the sandbox
/// (`shareProcessNamespace`) or of another container (`kubectl debug --target`), by the
/// process ids that it was told.
fn pids_joined(namespaces: &[LinuxNamespace]) -> Result<Option<u32>> {
    let found = namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
    let Some(namespace) = found else {
        return Err(Error::InvalidArgument(
            "hostPID: true is not possible for a machine pod, whose guest has a kernel of its own; remove it, or run the pod as containers (runtimeClassName: dyad)".into(),
        ));
    };
    let Some(path) = namespace.path() else {
        return Ok(None);
    };
    let pid = path
        .to_str()
        .and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/pid"))
        .and_then(|pid| pid.parse().ok());
    pid.map(Some).ok_or_else(|| {
        Error::InvalidArgument(format!(
            "linux.namespaces: PID namespace {}: only that of the pod or of one of its containers (/proc/PID/ns/pid) can be joined",
            path.display()
        ))
    })
}

/// Keeps what the guest has. A privileged container is given every device of the host:
/// those are the machine's boundary and stay outside. One that is named is refused.
fn guest_devices(devices: Vec<LinuxDevice>, privileged: bool) -> Result<Vec<LinuxDevice>> {
    let mut kept = Vec::new();
    for device in devices {
        let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if is_character && GUEST_DEVICES.contains(&(device.major(), device.minor())) {
            kept.push(device);
        } else if !privileged {
            return Err(Error::InvalidArgument(format!(
                "device {}: a host device does not exist in a machine's guest; remove it, or run the pod as containers (runtimeClassName: dyad)",
                device.path().display()
            )));
        }
    }
    Ok(kept)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).expect("spec")
    }

    const SANDBOX: &str = r#"{"ociVersion": "1.1.0", "hostname": "web",
        "annotations": {"io.kubernetes.cri.sandbox-memory": "0"},
        "linux": {"cgroupsPath": "/k8s.io/s1", "sysctl": {"net.ipv4.ip_forward": "1"},
          "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                         {"type": "network", "path": "/run/netns/x"}]}}"#;

    #[test]
    fn the_sandbox_s_spec_tells_the_pod() {
        let pod = sandbox(&spec(SANDBOX)).expect("pod");
        assert_eq!(pod.netns.as_deref(), Some(Path::new("/run/netns/x")));
        assert_eq!(pod.hostname, "web");
        assert_eq!(pod.cgroups_path.as_deref(), Some("/k8s.io/s1"));
        assert_eq!(pod.sysctls["net.ipv4.ip_forward"], "1");
    }

    #[test]
    fn namespaces_shared_with_the_host_are_refused_by_the_pod_s_field() {
        for (kind, field) in [
            (LinuxNamespaceType::Network, "hostNetwork"),
            (LinuxNamespaceType::Pid, "hostPID"),
            (LinuxNamespaceType::Ipc, "hostIPC"),
        ] {
            let mut oci = spec(SANDBOX);
            let mut linux = oci.linux().clone().expect("linux");
            let mut namespaces = linux.namespaces().clone().expect("namespaces");
            namespaces.retain(|n| n.typ() != kind);
            linux.set_namespaces(Some(namespaces));
            oci.set_linux(Some(linux));
            let error = sandbox(&oci).expect_err(field).to_string();
            assert!(
                error.contains(field) && error.contains("runtimeClassName"),
                "{error}"
            );
        }
    }

    fn container_spec(extra_linux: &str) -> Spec {
        spec(&format!(
            r#"{{"ociVersion": "1.1.0", "hostname": "web",
              "root": {{"path": "rootfs", "readonly": true}},
              "process": {{"cwd": "/", "args": ["sh"], "user": {{"uid": 0, "gid": 0}},
                          "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x"}},
              "linux": {{"cgroupsPath": "/k8s.io/c1",
                "namespaces": [{{"type": "pid"}}, {{"type": "mount"}},
                  {{"type": "ipc", "path": "/proc/7/ns/ipc"}},
                  {{"type": "uts", "path": "/proc/7/ns/uts"}},
                  {{"type": "network", "path": "/proc/7/ns/net"}}]
                {extra_linux}}}}}"#
        ))
    }

    fn kinds(spec: &GuestSpec) -> Vec<LinuxNamespaceType> {
        let linux = spec.oci.linux().as_ref().expect("linux");
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        assert!(namespaces.iter().all(|n| n.path().is_none()));
        namespaces.iter().map(|n| n.typ()).collect()
    }

    #[test]
    fn what_belongs_to_the_host_is_taken_out() {
        let got = container(container_spec(
            r#", "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}, "mountLabel": "m",
               "resources": {"cpu": {"shares": 512, "cpus": "0-1", "mems": "0"}}"#,
        ))
        .expect("spec");
        assert_eq!(
            kinds(&got),
            [
                LinuxNamespaceType::Pid,
                LinuxNamespaceType::Mount,
                LinuxNamespaceType::Cgroup
            ]
        );
        assert!(got.readonly_root);
        assert!(got.seccomp.is_some());
        let linux = got.oci.linux().as_ref().expect("linux");
        assert!(linux.seccomp().is_none() && linux.mount_label().is_none());
        let cpu = linux
            .resources()
            .as_ref()
            .and_then(|r| r.cpu().clone())
            .expect("cpu");
        assert_eq!((cpu.shares(), cpu.cpus().is_none()), (Some(512), true));
        let process = got.oci.process().as_ref().expect("process");
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
        assert!(got.oci.hostname().is_none());
    }

    #[test]
    fn a_pid_namespace_that_is_joined_is_named_by_its_process() {
        let json = serde_json::to_string(&container_spec("")).expect("json");
        let shared = json.replace(
            r#"{"type":"pid"}"#,
            r#"{"type":"pid","path":"/proc/7/ns/pid"}"#,
        );
        assert_ne!(json, shared);
        let got = container(spec(&shared)).expect("spec");
        assert_eq!(
            kinds(&got),
            [LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup]
        );
        assert_eq!(got.joins_pids_of, Some(7));
        let own = container(container_spec("")).expect("spec");
        assert_eq!(own.joins_pids_of, None);
        for path in ["/proc/self/ns/pid", "/run/x", "/proc/7/ns/net"] {
            let elsewhere = shared.replace("/proc/7/ns/pid", path);
            let error = container(spec(&elsewhere)).expect_err(path).to_string();
            assert!(error.contains(path), "{error}");
        }
        let hosts = json.replace(r#"{"type":"pid"},"#, "");
        let error = container(spec(&hosts)).expect_err("refused").to_string();
        assert!(error.contains("hostPID"), "{error}");
    }

    #[test]
    fn huge_pages_are_refused_by_their_size_and_none_are_no_huge_pages() {
        let with = |limit: u64| {
            container(container_spec(&format!(
                r#", "resources": {{"hugepageLimits": [{{"pageSize": "2MB", "limit": {limit}}}]}}"#
            )))
        };
        assert!(with(0).is_ok());
        let error = with(1 << 21).expect_err("refused").to_string();
        assert!(error.contains("hugepages of 2MB"), "{error}");
    }

    #[test]
    fn a_device_is_known_by_its_number_wherever_it_is() {
        let devices = |path: &str, typ: &str, major: i64, minor: i64| {
            container(container_spec(&format!(
                r#", "devices": [{{"path": "{path}", "type": "{typ}", "major": {major}, "minor": {minor}}}]"#
            )))
        };
        for (path, minor) in [
            ("/dev/net/tun", 200),
            ("/dev/vpn", 200),
            ("/dev/fuse", 229),
            ("/dev/kvm", 232),
        ] {
            assert!(devices(path, "c", 10, minor).is_ok(), "{path}");
        }
        for (path, typ, major, minor) in [
            ("/dev/fuse", "b", 8, 0),
            ("/dev/null", "b", 1, 3),
            ("/dev/net/tun", "c", 10, 63),
        ] {
            let error = devices(path, typ, major, minor)
                .expect_err(path)
                .to_string();
            assert!(error.contains(path), "{error}");
        }
    }

    #[test]
    fn an_image_without_entrypoint_is_refused_by_name() {
        let mut oci = container_spec("");
        let mut process = oci.process().clone().expect("process");
        process.set_args(Some(Vec::new()));
        oci.set_process(Some(process));
        let error = container(oci).expect_err("refused").to_string();
        assert!(error.contains("entrypoint"), "{error}");
    }

    const DEVICE: &str = r#", "devices": [
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/sdz", "type": "b", "major": 8, "minor": 400}]"#;

    #[test]
    fn a_named_host_device_is_refused_and_a_privileged_container_loses_them() {
        let error = container(container_spec(DEVICE))
            .expect_err("refused")
            .to_string();
        assert!(error.contains("/dev/sdz"), "{error}");
        let all = format!(
            r#"{DEVICE}, "resources": {{"devices": [{{"allow": true, "access": "rwm"}}]}}"#
        );
        let got = container(container_spec(&all)).expect("spec");
        let linux = got.oci.linux().as_ref().expect("linux");
        assert_eq!(linux.devices().as_ref().expect("devices").len(), 1);
    }

    #[test]
    fn hooks_and_user_namespaces_are_refused_by_name() {
        let mut oci = container_spec("");
        let hooks: Hooks =
            serde_json::from_str(r#"{"createRuntime": [{"path": "/bin/x"}]}"#).expect("hooks");
        oci.set_hooks(Some(hooks));
        assert!(
            container(oci)
                .expect_err("refused")
                .to_string()
                .contains("hooks")
        );
        let json = serde_json::to_string(&container_spec("")).expect("json");
        let user = json.replace(r#"{"type":"pid"}"#, r#"{"type":"user"}"#);
        let error = container(spec(&user)).expect_err("refused").to_string();
        assert!(error.contains("hostUsers"), "{error}");
    }
}
