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
}
