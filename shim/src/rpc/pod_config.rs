//! Reads the pod's configuration out of the Sandbox API's `CreateSandbox`.

use dyad_api::cri as wire;
use dyad_runtime_handler::spec::PodSize;
use dyad_runtime_handler::{Error, Result};
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, Message as _};

use crate::pod_spec::{Client, Dns, HostNamespaces, PodConfig};

const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// CRI allows no more; a pod's annotations are at most 256 KiB.
const MAX_BYTES: usize = 16 << 20;

/// The pod of `options`, whose network namespace is at `netns` (empty: the host's).
///
/// # Errors
/// `InvalidArgument` naming what is missing, of a foreign type, damaged or unknown.
pub fn decode(options: &Any, netns: &str) -> Result<PodConfig> {
    // containerd's typeurl writes bare message names, others prefix a host.
    if options.type_url.rsplit('/').next() != Some(TYPE) {
        return Err(Error::InvalidArgument(format!(
            "options of type {:?}: want {TYPE}, or none at all for a pod outside Kubernetes",
            options.type_url
        )));
    }
    if options.value.len() > MAX_BYTES {
        return Err(Error::InvalidArgument(format!(
            "options of {} bytes: at most {MAX_BYTES}",
            options.value.len()
        )));
    }
    let config = wire::PodSandboxConfig::parse_from_bytes(&options.value)
        .map_err(|error| Error::InvalidArgument(format!("options: {TYPE}: {error}")))?;
    let metadata = config
        .metadata
        .into_option()
        .filter(|metadata| !metadata.name.is_empty())
        .ok_or_else(|| Error::InvalidArgument("options: metadata.name: missing".into()))?;
    let linux = config.linux.into_option().unwrap_or_default();
    let security = linux.security_context.into_option().unwrap_or_default();
    let namespaces = security.namespace_options.into_option().unwrap_or_default();
    let user_namespace = match namespaces.userns_options.into_option() {
        None => false,
        Some(user) => !is_host("userns_options.mode", user.mode)?,
    };
    Ok(PodConfig {
        client: Client::Cri,
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        hostname: config.hostname,
        dns: config.dns_config.into_option().map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        annotations: config.annotations.into_iter().collect(),
        cgroup_parent: linux.cgroup_parent,
        shares: HostNamespaces {
            network: is_host("network", namespaces.network)?,
            pid: is_host("pid", namespaces.pid)?,
            ipc: is_host("ipc", namespaces.ipc)?,
        },
        user_namespace,
        netns: Some(netns).filter(|path| !path.is_empty()).map(Into::into),
        sysctls: linux.sysctls.into_iter().collect(),
        size: linux
            .resources
            .into_option()
            .map(|size| PodSize {
                cpu_period: size.cpu_period,
                cpu_quota: size.cpu_quota,
                cpu_shares: size.cpu_shares,
                memory_limit: size.memory_limit_in_bytes,
            })
            .unwrap_or_default(),
    })
}

/// Whether a pod's namespace is the host's.
fn is_host(field: &str, mode: EnumOrUnknown<wire::NamespaceMode>) -> Result<bool> {
    match mode.enum_value() {
        Ok(wire::NamespaceMode::NODE) => Ok(true),
        Ok(wire::NamespaceMode::POD | wire::NamespaceMode::CONTAINER) => Ok(false),
        Ok(wire::NamespaceMode::TARGET) => Err(Error::InvalidArgument(format!(
            "namespace_options.{field}: TARGET is for containers; a pod has POD, CONTAINER or NODE"
        ))),
        Err(unknown) => Err(Error::InvalidArgument(format!(
            "namespace_options.{field}: unknown mode {unknown}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Default::default()
        }
    }

    fn encoded(config: &wire::PodSandboxConfig) -> Any {
        any(TYPE, config.write_to_bytes().unwrap())
    }

    fn config() -> wire::PodSandboxConfig {
        wire::PodSandboxConfig {
            metadata: MessageField::some(wire::PodSandboxMetadata {
                name: "web".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn with_namespaces(options: wire::NamespaceOption) -> wire::PodSandboxConfig {
        let mut config = config();
        config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default()
            .namespace_options = MessageField::some(options);
        config
    }

    #[test]
    fn a_pod_is_read_whole() {
        let mut message = with_namespaces(wire::NamespaceOption {
            pid: wire::NamespaceMode::CONTAINER.into(),
            ipc: wire::NamespaceMode::NODE.into(),
            ..Default::default()
        });
        message.dns_config.mut_or_insert_default().servers = vec!["10.0.0.1".into()];
        let linux = message.linux.mut_or_insert_default();
        linux.cgroup_parent = "/a".into();
        linux
            .resources
            .mut_or_insert_default()
            .memory_limit_in_bytes = 7;
        let pod = decode(&encoded(&message), "/run/netns/x").unwrap();
        assert_eq!(
            (pod.name.as_str(), pod.cgroup_parent.as_str()),
            ("web", "/a")
        );
        assert_eq!(pod.netns, Some("/run/netns/x".into()));
        assert!(pod.shares.ipc && !pod.shares.pid && !pod.shares.network);
        assert_eq!(pod.dns.unwrap().servers, ["10.0.0.1"]);
        assert_eq!(pod.size.memory_limit, 7);
        assert!(!pod.user_namespace);
        // Some clients prefix the type.
        let prefixed = any(
            "types.googleapis.com/runtime.v1.PodSandboxConfig",
            config().write_to_bytes().unwrap(),
        );
        assert_eq!(decode(&prefixed, "").unwrap().netns, None);
    }

    #[test]
    fn fields_of_a_newer_cri_are_skipped() {
        let mut bytes = config().write_to_bytes().unwrap();
        // Field 99, a string; and field 5, port mappings, which we do not name.
        bytes.extend([0x9a, 0x06, 0x01, b'x', 0x2a, 0x02, 0x10, 0x50]);
        assert_eq!(decode(&any(TYPE, bytes), "").unwrap().name, "web");
    }

    #[test]
    fn bad_input_is_named() {
        let unknown_mode = with_namespaces(wire::NamespaceOption {
            network: EnumOrUnknown::from_i32(9),
            ..Default::default()
        });
        let target = with_namespaces(wire::NamespaceOption {
            pid: wire::NamespaceMode::TARGET.into(),
            ..Default::default()
        });
        let cut = {
            let mut bytes = config().write_to_bytes().unwrap();
            bytes.truncate(bytes.len() - 1);
            bytes
        };
        for (options, text) in [
            (any("a.b.C", Vec::new()), "options of type \"a.b.C\""),
            (any(TYPE, vec![0xff; 3]), "options: runtime.v1"),
            (any(TYPE, cut), "options: runtime.v1"),
            (any(TYPE, Vec::new()), "metadata.name"),
            (any(TYPE, vec![0; MAX_BYTES + 1]), "at most"),
            (encoded(&unknown_mode), "network: unknown mode 9"),
            (encoded(&target), "pid: TARGET"),
        ] {
            let error = decode(&options, "").unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)));
            assert!(error.to_string().contains(text), "{error} lacks {text}");
        }
    }
}
