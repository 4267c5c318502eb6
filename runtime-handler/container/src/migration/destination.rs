//! Where a pod is asked to go, and how.

use std::path::PathBuf;

use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::migration::{MigrationParameters, TimeoutAction};

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

#[cfg(test)]
mod tests {
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
}
