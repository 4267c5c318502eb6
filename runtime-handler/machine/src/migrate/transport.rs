//! Which way the machine's memory and disks take, and whether that way is safe. Pure.

use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::migration::{MigrationParameters, TimeoutAction};

use super::offer::Offer;

/// The streams of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Streams {
    /// Of the memory; `None`: libvirt chooses.
    pub migrate_uri: Option<String>,
    /// Of the disks; `None`: libvirt chooses.
    pub disks_uri: Option<String>,
    /// QEMU encrypts both.
    pub tls: bool,
}

/// Decides the streams.
///
/// # Errors
/// `FailedPrecondition`: they would go over a network in clear, or what is asked for does
/// not go together; with the way out.
pub fn streams(parameters: &MigrationParameters, offer: &Offer) -> Result<Streams> {
    let refuse = |text: &str| Err(Error::FailedPrecondition(format!("cannot migrate: {text}")));
    let p = parameters;
    if p.tcp_established {
        return refuse(
            "tcp_established is for containers: a machine always takes its connections along",
        );
    }
    if p.parallel > 1 && p.timeout_action == TimeoutAction::PostCopy {
        return refuse("QEMU has no post-copy over parallel connections: choose one of the two");
    }
    let one_host = is_local(&p.destination);
    let socket = |path: &std::path::Path| Some(format!("unix://{}", path.display()));
    let (migrate_uri, disks_uri) = match (&p.migrate_uri, &p.disks_uri) {
        // Both libvirts are on one host: so are the sockets.
        (None, None) if one_host => (socket(&offer.migrate_socket), socket(&offer.disks_socket)),
        (Some(migrate), None) if migrate.starts_with("unix://") => {
            return refuse(&format!(
                "migrate_uri {migrate:?} is a unix socket, so the disks need one too: set disks_uri"
            ));
        }
        (migrate, disks) => (migrate.clone(), disks.clone()),
    };
    let stays = |uri: &Option<String>| uri.as_ref().is_some_and(|uri| uri.starts_with("unix://"));
    let on_network = !(stays(&migrate_uri) && stays(&disks_uri));
    if p.tls_required && !on_network {
        return refuse(
            "tls_required, but both nodes' libvirts are on one host and the streams are unix \
             sockets: name tcp:// URIs, or leave tls_required away",
        );
    }
    if on_network && !p.tls_required && !p.allow_clear {
        return refuse(
            "the machine's memory would cross a network in clear: set tls_required (and certificates \
             in libvirt's migrate_tls_x509_cert_dir), or allow_clear",
        );
    }
    if p.tls_required && p.destination.starts_with("qemu+tcp://") {
        return refuse(
            "tls_required, and the destination is qemu+tcp: use qemu+tls:// or qemu+ssh://",
        );
    }
    if p.destination.starts_with("qemu+tcp://") && !p.allow_clear {
        return refuse(
            "the destination is qemu+tcp, which is neither encrypted nor authenticated: use \
             qemu+tls:// or qemu+ssh://, or set allow_clear",
        );
    }
    Ok(Streams {
        migrate_uri,
        disks_uri,
        tls: p.tls_required,
    })
}

/// Whether `uri` is a libvirt of the kinds below, and asks nothing else of the client.
///
/// libvirt's client reads a URI as root of this node, and obeys what is in its query:
/// `command=` runs a program, `no_verify=` believes any server, and the transport `ext` is a
/// program and nothing else. So this is a list of what is allowed.
///
/// ```text
/// qemu+tls://HOST[:PORT]/system      qemu+ssh://[USER@]HOST[:PORT]/system
/// qemu+tcp://HOST[:PORT]/system      qemu:///system
/// qemu+unix:///system[?socket=/PATH] (another libvirt of this host)
/// ```
///
/// # Errors
/// `InvalidArgument`, which names the forms.
pub fn check_destination(uri: &str) -> Result<()> {
    let invalid = |why: &str| {
        Err(Error::InvalidArgument(format!(
            "destination {uri:?}: {why}; a machine goes to qemu+tls://HOST/system, \
             qemu+ssh://[USER@]HOST/system, qemu+tcp://HOST/system or \
             qemu+unix:///system?socket=/PATH"
        )))
    };
    let Some((scheme, rest)) = uri.split_once("://") else {
        return invalid("it has no scheme");
    };
    let (target, query) = match rest.split_once('?') {
        Some((target, query)) => (target, Some(query)),
        None => (rest, None),
    };
    let Some(authority) = target.strip_suffix("/system") else {
        return invalid("its path is not /system");
    };
    match (scheme, query) {
        ("qemu+unix", Some(query)) => {
            let path = query.strip_prefix("socket=");
            if !path.is_some_and(is_plain_path) {
                return invalid("of its query only socket=/PATH is known, of plain characters");
            }
        }
        ("qemu" | "qemu+unix" | "qemu+tls" | "qemu+ssh" | "qemu+tcp", None) => {}
        ("qemu" | "qemu+tls" | "qemu+ssh" | "qemu+tcp", Some(_)) => {
            return invalid(
                "a query is not allowed: it would tell this node's libvirt what to run and whom to believe",
            );
        }
        _ => return invalid("its scheme is unknown for machines"),
    }
    if matches!(scheme, "qemu" | "qemu+unix") {
        return match authority {
            "" => Ok(()),
            _ => invalid("it names a host, but this scheme stays on this one"),
        };
    }
    let (user, address) = match authority.split_once('@') {
        Some((user, address)) => (Some(user), address),
        None => (None, authority),
    };
    if user.is_some_and(|user| scheme != "qemu+ssh" || !is_name(user)) {
        return invalid("its user is no name, or none is wanted");
    }
    if !is_address(address) {
        return invalid("its host is no name or address");
    }
    Ok(())
}

/// `HOST`, `[IPv6]`, either with `:PORT`.
fn is_address(text: &str) -> bool {
    let (host_is_fine, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        (address.parse::<std::net::Ipv6Addr>().is_ok(), port)
    } else {
        let end = text.find(':').unwrap_or(text.len());
        (is_name(&text[..end]), &text[end..])
    };
    let port_is_fine = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(port) => port.parse::<u16>().is_ok_and(|port| port != 0),
    };
    host_is_fine && port_is_fine
}

/// A name that no program takes for an option.
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !text.is_empty() && !text.starts_with('-') && text.bytes().all(plain)
}

/// An absolute path that means the same in a URI.
fn is_plain_path(text: &str) -> bool {
    let plain = |byte: u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_' | b'+' | b'@')
    };
    text.starts_with('/') && text.bytes().all(plain)
}

/// Whether the destination's libvirt is on this host.
fn is_local(destination: &str) -> bool {
    let unix = destination.starts_with("qemu+unix://");
    unix || destination.starts_with("qemu:///")
}

#[cfg(test)]
mod tests {
    use super::super::offer::tests_offer as offer;
    use super::*;

    fn to(destination: &str) -> MigrationParameters {
        MigrationParameters {
            destination: destination.into(),
            ..MigrationParameters::default()
        }
    }

    const LOCAL: &str = "qemu+unix:///system?socket=/n2/libvirt-sock";

    #[test]
    fn a_destination_is_a_libvirt_and_nothing_that_its_client_would_run_or_believe() {
        for good in [
            LOCAL,
            "qemu:///system",
            "qemu+unix:///system",
            "qemu+tls://node2/system",
            "qemu+tls://node-2.example:16514/system",
            "qemu+ssh://root@192.0.2.7/system",
            "qemu+ssh://node2/system",
            "qemu+tcp://[2001:db8::7]:16509/system",
        ] {
            check_destination(good).expect(good);
        }
        for bad in [
            "",
            "node2",
            "qemu+ext:///system?command=/tmp/x",
            "qemu+ext://node2/system",
            "qemu+ssh://node2/system?command=/tmp/x",
            "qemu+ssh://node2/system?netcat=/tmp/x",
            "qemu+ssh://-oProxyCommand=x/system",
            "qemu+ssh://-l@node2/system",
            "qemu+libssh2://node2/system",
            "qemu+tls://node2/system?no_verify=1",
            "qemu+tls://node2/system?",
            "qemu+tls://node2/system#x",
            "qemu+tls://node2/session",
            "qemu+tls://node2/system?pkipath=/tmp",
            "qemu+tls://user@node2/system",
            "qemu+tls:///system",
            "qemu+tls://node2:0/system",
            "qemu+tls://node2:99999/system",
            "qemu+tls://[x]/system",
            "qemu+unix://node2/system",
            "qemu+unix:///system?mode=direct",
            "qemu+unix:///system?socket=/a&command=/tmp/x",
            "qemu+unix:///system?socket=a",
            "qemu+unix:///system?socket=/a%26command=x",
            "test:///system",
            "xen+tls://node2/system",
            "qemu+tls://no de/system",
            "qemu+tls://node2\n/system",
        ] {
            let error = check_destination(bad).expect_err(bad);
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        }
    }

    #[test]
    fn on_one_host_the_target_s_own_sockets_are_taken() {
        let streams = streams(&to(LOCAL), &offer()).expect("decided");
        assert_eq!(streams.migrate_uri.as_deref(), Some("unix:///m"));
        assert_eq!(streams.disks_uri.as_deref(), Some("unix:///n"));
        assert!(!streams.tls);
    }

    #[test]
    fn over_a_network_it_is_encrypted_or_asked_for_in_clear() {
        let remote = "qemu+tls://node2/system";
        let error = streams(&to(remote), &offer()).expect_err("in clear");
        assert!(error.to_string().contains("in clear"), "{error}");
        let tls = MigrationParameters {
            tls_required: true,
            ..to(remote)
        };
        assert!(streams(&tls, &offer()).expect("decided").tls);
        let clear = MigrationParameters {
            allow_clear: true,
            ..to(remote)
        };
        assert!(!streams(&clear, &offer()).expect("decided").tls);
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let table = [
            (
                MigrationParameters {
                    tls_required: true,
                    ..to(LOCAL)
                },
                "unix sockets",
            ),
            (
                MigrationParameters {
                    tls_required: true,
                    ..to("qemu+tcp://n/system")
                },
                "qemu+tcp",
            ),
            (
                MigrationParameters {
                    migrate_uri: Some("unix:///x".into()),
                    ..to(LOCAL)
                },
                "disks_uri",
            ),
            (
                MigrationParameters {
                    parallel: 2,
                    timeout_action: TimeoutAction::PostCopy,
                    ..to(LOCAL)
                },
                "parallel",
            ),
            (
                MigrationParameters {
                    tcp_established: true,
                    ..to(LOCAL)
                },
                "tcp_established",
            ),
        ];
        for (parameters, part) in table {
            let error = streams(&parameters, &offer()).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    proptest::proptest! {
        /// What passes tells libvirt's client where to go and nothing more.
        #[test]
        fn fuzz_destination(
            uri in "(qemu|test|xen)?(\\+(tls|ssh|tcp|unix|ext))?(://)?[a-z@:.\\[\\]0-9%-]{0,8}(/system|/session)?(\\?(socket|command|no_verify)=[/a-z&=?#%]{0,6})?",
        ) {
            if check_destination(&uri).is_ok() {
                proptest::prop_assert!(uri.starts_with("qemu"), "{}", uri);
                for word in ["+ext", "command=", "no_verify=", "&", "#", "%", "/session", "://-"] {
                    proptest::prop_assert!(!uri.contains(word), "{}", uri);
                }
            }
        }
    }
}
