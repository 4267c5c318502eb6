//! CRIU's words: what it is told, and what it says.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// CRIU older than this cannot dump what is frozen already and leave it so.
const CRIU_OLDEST: (u32, u32) = (4, 0);

/// What `criu --version` says.
///
/// # Errors
/// It cannot be understood, or is too old.
pub(crate) fn version(text: &str) -> std::result::Result<(u32, u32), String> {
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
            numbers(CRIU_OLDEST)
        ));
    }
    Ok(found)
}

/// As people write it.
pub(crate) fn numbers((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// What CRIU is told beside the OCI runtime's words: a line an option.
///
/// Without open connections nothing has to be kept from the network while it works. A
/// restored process joins the namespaces of its pod; the network is the OCI runtime's
/// business. `hold`: what is restored waits for SIGCONT.
pub(crate) fn config(tcp_established: bool, join: &[(&str, PathBuf)], hold: bool) -> String {
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
pub(crate) fn errors(log: &str) -> Option<String> {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn crius_version_and_errors_are_found_in_its_words() {
        assert_eq!(version("Version: 4.2.1\nGitID: x"), Ok((4, 2)));
        assert_eq!(version("Version: 5"), Ok((5, 0)));
        for (text, says) in [
            ("Version: 3.17.1", "too old: 4.0"),
            ("", "cannot be read"),
            ("Version: x.y", "understood"),
        ] {
            assert!(version(text).unwrap_err().contains(says), "{text}");
        }
        let log = "(00.1) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self
(00.2) Warn  (criu/x.c:1): careful
(00.3) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.
(00.4) Error (criu/cr-dump.c:1975): Dumping FAILED.";
        assert_eq!(
            errors(log).unwrap(),
            "inet: Connected TCP socket, consider using --tcp-established option."
        );
        assert_eq!(errors("all is well"), None);
    }

    #[test]
    fn criu_joins_the_namespaces_of_the_target_pod() {
        assert_eq!(
            config(false, &[], false),
            "network-lock skip\nghost-limit 268435456\nlink-remap\n"
        );
        let spec = json!({"ociVersion": "1.2.0", "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
            {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/n"}]}});
        let join = joined_namespaces(&serde_json::from_value(spec).unwrap());
        assert_eq!(
            config(true, &join, true),
            "network-lock nftables\nghost-limit 268435456\nlink-remap\nleave-stopped\njoin-ns ipc:/proc/7/ns/ipc\njoin-ns uts:/proc/7/ns/uts\n"
        );
    }
}
