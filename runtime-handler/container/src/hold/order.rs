//! What a pod's spec asks of its holder. Pure.

use std::path::{Component, Path, PathBuf};

use dyad_runtime_handler::error::{Error, Result};
use oci_spec::runtime::{LinuxNamespaceType as Type, Spec};
use serde::{Deserialize, Serialize};

/// The maker's order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Order {
    /// For people, in `ps`.
    pub name: String,
    /// The network namespace to be in; `None`: the host's, or a new one.
    pub netns: Option<PathBuf>,
    /// New namespaces.
    pub network: bool,
    /// See `network`.
    pub uts: bool,
    /// See `network`.
    pub ipc: bool,
    /// See `network`.
    pub pid: bool,
    /// Of the new UTS namespace.
    pub hostname: Option<String>,
    /// Files below /proc/sys and what is written to them.
    pub sysctls: Vec<(PathBuf, String)>,
    /// Where the process's pid is written, to be accounted there.
    pub procs_files: Vec<PathBuf>,
}

impl Order {
    /// The order for a sandbox's spec; cgroups are the caller's.
    ///
    /// # Errors
    /// `InvalidArgument` naming what a holder cannot give, and the way out.
    pub(super) fn new(id: &str, oci: &Spec) -> Result<Self> {
        let linux = oci.linux().as_ref();
        let namespaces = linux
            .and_then(|linux| linux.namespaces().as_deref())
            .unwrap_or_default();
        let find = |kind| namespaces.iter().find(|namespace| namespace.typ() == kind);
        if find(Type::User).is_some() {
            return Err(Error::InvalidArgument(
                "hostUsers: false is not supported without a pause container; use a handler without sandboxer = \"shim\"".into(),
            ));
        }
        let mut order = Self {
            name: id.to_owned(),
            netns: find(Type::Network).and_then(|namespace| namespace.path().clone()),
            network: find(Type::Network).is_some_and(|namespace| namespace.path().is_none()),
            uts: find(Type::Uts).is_some(),
            ipc: find(Type::Ipc).is_some(),
            pid: find(Type::Pid).is_some(),
            hostname: oci.hostname().clone(),
            ..Self::default()
        };
        let sysctls = linux.and_then(|linux| linux.sysctl().clone());
        for (name, value) in sysctls.unwrap_or_default() {
            let file = order.sysctl(&name)?;
            order.sysctls.push((file, value));
        }
        order.sysctls.sort();
        Ok(order)
    }

    /// The file of a kernel parameter, where it is the pod's own and not the host's.
    fn sysctl(&self, name: &str) -> Result<PathBuf> {
        // Both spellings are in use; an interface's name may hold a dot.
        let path = match name.contains('/') {
            true => name.to_owned(),
            false => name.replace('.', "/"),
        };
        let plain = Path::new(&path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let own = match path.split('/').collect::<Vec<_>>()[..] {
            _ if !plain => false,
            ["net", _, ..] => self.netns.is_some() || self.network,
            ["fs", "mqueue", _] => self.ipc,
            [
                "kernel",
                "msgmax" | "msgmnb" | "msgmni" | "sem" | "shmall" | "shmmax" | "shmmni"
                | "shm_rmid_forced",
            ] => self.ipc,
            ["kernel", "domainname"] => self.uts,
            _ => false,
        };
        if own {
            return Ok(Path::new("/proc/sys").join(path));
        }
        Err(Error::InvalidArgument(format!(
            "sysctl {name}: not of a namespace that this pod has of its own; it would change the host"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(text: &str) -> Result<Order> {
        Order::new("s1", &serde_json::from_str(text).unwrap())
    }

    fn with_sysctl(name: &str, namespaces: &str) -> Result<Order> {
        order(&format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"sysctl":{{"{name}":"1"}},"namespaces":{namespaces}}}}}"#
        ))
    }

    const ALL: &str = r#"[{"type":"network","path":"/n"},{"type":"ipc"},{"type":"uts"}]"#;

    #[test]
    fn a_pod_gets_what_its_spec_names() {
        let got = order(
            r#"{"ociVersion":"1.0.2","hostname":"web","linux":{"namespaces":[
                {"type":"network","path":"/n"},{"type":"uts"},{"type":"pid"}]}}"#,
        )
        .unwrap();
        assert_eq!(got.netns, Some("/n".into()));
        assert!(got.uts && got.pid && !got.ipc);
        assert_eq!(got.hostname.as_deref(), Some("web"));
    }

    #[test]
    fn a_user_namespace_is_refused_by_name() {
        let text = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"user"}]}}"#;
        let error = order(text).unwrap_err().to_string();
        assert!(error.contains("hostUsers"), "{error}");
    }

    #[test]
    fn a_pods_own_parameters_are_set() {
        for (name, file) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
            ),
            ("kernel.shmmax", "/proc/sys/kernel/shmmax"),
            ("fs.mqueue.msg_max", "/proc/sys/fs/mqueue/msg_max"),
            ("kernel.domainname", "/proc/sys/kernel/domainname"),
        ] {
            let order = with_sysctl(name, ALL).unwrap();
            assert_eq!(order.sysctls, [(file.into(), "1".into())]);
        }
    }

    #[test]
    fn what_would_change_the_host_is_refused_by_name() {
        for (name, namespaces) in [
            ("kernel.panic", ALL),
            ("vm.swappiness", ALL),
            ("kernel.hostname", ALL),
            ("net.ipv4.ip_forward", r#"[{"type":"ipc"}]"#),
            ("kernel.shmmax", r#"[{"type":"uts"}]"#),
            ("net/../kernel/panic", ALL),
            ("/etc/passwd", ALL),
            ("net", ALL),
            ("", ALL),
        ] {
            let error = with_sysctl(name, namespaces).unwrap_err().to_string();
            assert!(error.contains(&format!("sysctl {name}:")), "{error}");
        }
    }
}
