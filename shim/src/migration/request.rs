//! What a caller may ask of a migration, checked for shape. Pure.

use std::time::Duration;

use dyad_runtime_handler::migration::{MigrationParameters, TimeoutAction};
use dyad_runtime_handler::{Error, Result};

/// More connections than that help nobody.
const PARALLEL_MAX: u32 = 64;
/// A pod that stands still for longer is stopped rather than moved.
const DOWNTIME_MAX: Duration = Duration::from_secs(60);

/// Checks what can be known to be wrong without asking anybody.
///
/// # Errors
/// `InvalidArgument` naming the field, its value and the way out.
pub fn check(parameters: &MigrationParameters) -> Result<()> {
    let invalid = |text: String| Err(Error::InvalidArgument(text));
    let p = parameters;
    if !p.destination.contains("://") {
        return invalid(format!(
            "destination {:?} is no URI: name the other node's libvirt (qemu+tls://node2/system) \
             for a machine, its migration address (tls://node2:16515, unix:///…) for containers",
            p.destination
        ));
    }
    for (name, uri) in [("migrate_uri", &p.migrate_uri), ("disks_uri", &p.disks_uri)] {
        // libvirt reads more out of a URI than an address: only an address goes to it.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/.-_+@:[]".contains(&byte);
        if let Some(uri) = uri
            && !["unix:///", "tcp://"].iter().any(|start| {
                uri.strip_prefix(start)
                    .is_some_and(|rest| rest.bytes().all(plain))
            })
        {
            return invalid(format!(
                "{name} {uri:?}: tcp://HOST[:PORT] and unix:///PATH are known; encryption is \
                 asked for with tls_required"
            ));
        }
    }
    if p.parallel > PARALLEL_MAX {
        return invalid(format!("parallel {}: at most {PARALLEL_MAX}", p.parallel));
    }
    if p.max_downtime
        .is_some_and(|downtime| downtime > DOWNTIME_MAX)
    {
        return invalid(format!(
            "max_downtime_ms: at most {} ms",
            DOWNTIME_MAX.as_millis()
        ));
    }
    if p.timeout_action != TimeoutAction::Abort && p.timeout.is_none() {
        return invalid("timeout_action says what to do after timeout_ms: set that too".into());
    }
    if p.tls_required && p.allow_clear {
        return invalid("tls_required and allow_clear exclude each other: choose one".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let good = MigrationParameters {
            destination: "qemu+tls://node2/system".into(),
            ..MigrationParameters::default()
        };
        check(&good).unwrap();
        let table: [(MigrationParameters, &str); 7] = [
            (
                MigrationParameters {
                    destination: "node2".into(),
                    ..good.clone()
                },
                "destination \"node2\"",
            ),
            (
                MigrationParameters {
                    migrate_uri: Some("rdma://x".into()),
                    ..good.clone()
                },
                "migrate_uri",
            ),
            (
                MigrationParameters {
                    disks_uri: Some("unix:///x?y=z".into()),
                    ..good.clone()
                },
                "disks_uri",
            ),
            (
                MigrationParameters {
                    parallel: 65,
                    ..good.clone()
                },
                "parallel 65",
            ),
            (
                MigrationParameters {
                    max_downtime: Some(Duration::from_secs(61)),
                    ..good.clone()
                },
                "max_downtime_ms",
            ),
            (
                MigrationParameters {
                    timeout_action: TimeoutAction::Pause,
                    ..good.clone()
                },
                "timeout_ms",
            ),
            (
                MigrationParameters {
                    tls_required: true,
                    allow_clear: true,
                    ..good
                },
                "exclude",
            ),
        ];
        for (parameters, part) in table {
            let error = check(&parameters).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    proptest::proptest! {
        /// Whatever is asked, the check answers; what passes is an address.
        #[test]
        fn fuzz_migration_request(destination: String, uri in "(tcp|unix)://[/a-z?&=%:.]{0,8}|.{0,12}", parallel: u32) {
            let parameters = MigrationParameters {
                destination,
                migrate_uri: Some(uri.clone()),
                parallel,
                ..MigrationParameters::default()
            };
            if check(&parameters).is_ok() {
                proptest::prop_assert!(!uri.contains(['?', '&', '=', '%']), "{}", uri);
            }
        }
    }
}
