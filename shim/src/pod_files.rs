//! What a pod without a pause container has in common, beside its namespaces: hostname,
//! hosts, resolv.conf and shared memory. With a pause container containerd makes these
//! and mounts them into each container; without one it leaves them to the shim.
//!
//! They lie in `pod-files` of the pod's directory and go with it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use dyad_runtime_handler::Result;
use dyad_runtime_handler::error::{Context as _, Error};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, MountBuilder, Spec};

use crate::plain_pod;
use crate::pod_spec::{Client, Dns, PodConfig};

/// The machine kind knows such files by this name (`volumes/plan.rs`).
const FOLDER: &str = "pod-files";
/// As CRI gives it.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// A pod's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFiles {
    dir: PathBuf,
    own_ipc: bool,
    client: Client,
    own_network: bool,
}

impl PodFiles {
    /// Writes the files and mounts the shared memory.
    ///
    /// # Errors
    /// What could not be made; what was made goes with [`remove`].
    pub fn make(pod_dir: &Path, pod: &PodConfig) -> Result<Self> {
        let dir = pod_dir.join(FOLDER);
        fs::create_dir_all(&dir).context(|| format!("make {}", dir.display()))?;
        let hostname = match pod.hostname.as_str() {
            "" => host_file("/proc/sys/kernel/hostname")?,
            name => format!("{name}\n"),
        };
        let resolv_conf = match &pod.dns {
            None => host_file("/etc/resolv.conf")?,
            Some(dns) => resolv_conf(dns),
        };
        for (name, text) in [
            ("hostname", hostname),
            ("hosts", host_file("/etc/hosts")?),
            ("resolv.conf", resolv_conf),
        ] {
            let path = dir.join(name);
            fs::write(&path, text).context(|| format!("write {}", path.display()))?;
        }
        let own_ipc = !pod.shares.ipc;
        if own_ipc {
            let shm = dir.join("shm");
            fs::create_dir_all(&shm).context(|| format!("make {}", shm.display()))?;
            mount(
                Some("shm"),
                &shm,
                Some("tmpfs"),
                MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                Some(SHM_OPTIONS),
            )
            .context(|| format!("mount {}", shm.display()))?;
        }
        Ok(Self {
            dir,
            own_ipc,
            client: pod.client,
            own_network: !pod.shares.network,
        })
    }

    /// Who made the pod.
    pub fn client(&self) -> Client {
        self.client
    }

    /// Has a container share what the pod has in common; `pid` is the pod's. CRI names the
    /// pod's namespaces itself. Returns whether the spec has changed.
    pub fn share_with(&self, spec: &mut Spec, pid: u32) -> bool {
        if self.client == Client::Cri {
            return self.mount_into(spec, self.own_ipc);
        }
        let shares_ipc = plain_pod::join(spec, pid, self.own_network);
        self.mount_into(spec, shares_ipc);
        true
    }

    /// Mounts them into a container, but nothing over what it mounts there itself.
    /// Returns whether the spec has changed.
    fn mount_into(&self, spec: &mut Spec, shares_ipc: bool) -> bool {
        let read_only = spec
            .root()
            .as_ref()
            .and_then(|root| root.readonly())
            .unwrap_or_default();
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let before = mounts.clone();
        let access = if read_only { "ro" } else { "rw" };
        for (name, target) in [
            ("hostname", "/etc/hostname"),
            ("hosts", "/etc/hosts"),
            ("resolv.conf", "/etc/resolv.conf"),
        ] {
            if !mounts.iter().any(|mount| is_on(mount, target)) {
                mounts.push(bind(
                    &self.dir.join(name),
                    target,
                    &["rbind", "rprivate", access],
                ));
            }
        }
        if shares_ipc {
            let target = "/dev/shm";
            // A container's own one would not be shared with the pod's others.
            mounts
                .retain(|mount| !(is_on(mount, target) && mount.typ().as_deref() == Some("tmpfs")));
            if !mounts.iter().any(|mount| is_on(mount, target)) {
                mounts.push(bind(
                    &self.dir.join("shm"),
                    target,
                    &["rbind", "rprivate", "rw"],
                ));
            }
        }
        let changed = mounts != before;
        spec.set_mounts(Some(mounts));
        changed
    }
}

/// Unmounts what [`PodFiles::make`] mounted below `pod_dir`, so that the folder can go.
///
/// # Errors
/// It stays mounted.
pub fn unmount(pod_dir: &Path) -> Result<()> {
    let shm = pod_dir.join(FOLDER).join("shm");
    match umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(error) => Err(Error::other(format!("unmount {}", shm.display()), error)),
    }
}

/// The host's own; a host without has none to give.
fn host_file(path: &str) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        other => other.context(|| format!("read {path}")),
    }
}

/// resolv.conf(5).
fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn is_on(mount: &Mount, target: &str) -> bool {
    mount.destination() == Path::new(target)
}

fn bind(source: &Path, target: &str, options: &[&str]) -> Mount {
    MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(
            options
                .iter()
                .map(|&option| option.to_owned())
                .collect::<Vec<_>>(),
        )
        .build()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> PodFiles {
        PodFiles {
            dir: "/pod/pod-files".into(),
            own_ipc: true,
            client: Client::Cri,
            own_network: true,
        }
    }

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    fn sources(spec: &Spec) -> Vec<(String, String)> {
        spec.mounts()
            .iter()
            .flatten()
            .map(|mount| {
                let source = mount.source().clone().unwrap_or_default();
                let target = mount.destination();
                (target.display().to_string(), source.display().to_string())
            })
            .collect()
    }

    #[test]
    fn a_container_gets_what_it_does_not_have() {
        let mut spec = spec(
            r#"{"ociVersion":"1.0.2","mounts":[
                {"destination":"/dev/shm","type":"tmpfs","source":"shm"},
                {"destination":"/etc/hosts","type":"bind","source":"/kubelet/etc-hosts"}]}"#,
        );
        assert!(files().share_with(&mut spec, 7));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            sources(&spec),
            [
                pair("/etc/hosts", "/kubelet/etc-hosts"),
                pair("/etc/hostname", "/pod/pod-files/hostname"),
                pair("/etc/resolv.conf", "/pod/pod-files/resolv.conf"),
                pair("/dev/shm", "/pod/pod-files/shm"),
            ]
        );
        assert!(!files().share_with(&mut spec, 7), "nothing is missing now");
    }

    #[test]
    fn a_read_only_root_has_read_only_files_and_the_hosts_memory_stays() {
        let mut spec = spec(
            r#"{"ociVersion":"1.0.2","root":{"path":"rootfs","readonly":true},"mounts":[
                {"destination":"/dev/shm","type":"bind","source":"/dev/shm"}]}"#,
        );
        files().share_with(&mut spec, 7);
        assert!(sources(&spec).contains(&("/dev/shm".into(), "/dev/shm".into())));
        let mounts = spec.mounts().as_ref().unwrap();
        let hosts = mounts
            .iter()
            .find(|mount| is_on(mount, "/etc/hosts"))
            .unwrap();
        assert!(
            hosts
                .options()
                .iter()
                .flatten()
                .any(|option| option == "ro")
        );
    }

    #[test]
    fn shared_memory_goes_with_the_ipc_namespace_where_the_client_is_not_cri() {
        let plain = PodFiles {
            client: Client::Other,
            ..files()
        };
        for (namespace, source) in [
            (
                r#"{"type":"ipc","path":"/proc/1/ns/ipc"}"#,
                "/pod/pod-files/shm",
            ),
            (r#"{"type":"ipc"}"#, "shm"),
        ] {
            let mut spec = spec(&format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespace}]}},
                    "mounts":[{{"destination":"/dev/shm","type":"tmpfs","source":"shm"}}]}}"#
            ));
            assert!(plain.share_with(&mut spec, 7));
            assert!(sources(&spec).contains(&("/dev/shm".into(), source.into())));
        }
    }

    #[test]
    fn a_resolver_is_told_in_its_own_words() {
        let dns = Dns {
            servers: vec!["10.0.0.1".into(), "fd00::1".into()],
            searches: vec!["a.b".into(), "b".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.b b\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&Dns::default()), "");
    }

    #[test]
    fn unmounting_nothing_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        unmount(dir.path()).unwrap();
    }
}
