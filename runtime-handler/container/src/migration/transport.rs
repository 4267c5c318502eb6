//! How two shims meet: a root-only unix socket, or the network with TLS on which both
//! prove themselves by certificates. In clear only where asked for and configured.
//!
//! ```text
//!  <state_dir>/migration/<source>.sock      always, where a pod waits for its source
//!  container.migration_listen               only where configured; the address that it
//!                                           got is in <source>.address beside the socket
//! ```

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Context, Error, Result};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::plan::Destination;
use super::wire::Wire;

/// For a connection and for its handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a pod that waited for the same source, and is being deleted, may take to go.
const LEAVING: Duration = Duration::from_secs(5);
/// A peer whose host is gone is noticed after this.
const DEAD: Duration = Duration::from_secs(30);

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum Failed {
    /// Nobody listens there: no such socket, or refused.
    Nobody(Error),
    Other(Error),
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Nobody(error) | Failed::Other(error) => error,
        }
    }
}

/// Meets the shim at `destination`.
pub(crate) async fn connect(
    destination: &Destination,
    config: &ContainerConfig,
) -> std::result::Result<Wire, Failed> {
    match destination {
        Destination::Unix(path) => {
            let stream = dialled(UnixStream::connect(path), &path.display().to_string()).await?;
            same_user(&stream).map_err(Failed::Other)?;
            Ok(Wire::new(stream))
        }
        Destination::Tcp { host, port } => {
            let stream = dial_tcp(host, *port).await?;
            Ok(Wire::new(stream))
        }
        Destination::Tls { host, port } => {
            let connector = client(config).map_err(Failed::Other)?;
            let name = ServerName::try_from(host.clone())
                .context(|| format!("host {host:?}"))
                .map_err(Failed::Other)?;
            let stream = dial_tcp(host, *port).await?;
            let stream = timeout(CONNECT, connector.connect(name, stream))
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .context(|| format!("TLS with {host}:{port}"))
                .map_err(Failed::Other)?;
            Ok(Wire::new(stream))
        }
    }
}

async fn dial_tcp(host: &str, port: u16) -> std::result::Result<TcpStream, Failed> {
    let stream = dialled(TcpStream::connect((host, port)), &format!("{host}:{port}")).await?;
    notice_death(&stream).map_err(Failed::Other)?;
    Ok(stream)
}

async fn dialled<T>(
    dial: impl Future<Output = io::Result<T>>,
    whom: &str,
) -> std::result::Result<T, Failed> {
    let dialled = timeout(CONNECT, dial)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    dialled.map_err(|error| {
        let nobody = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        );
        let context = format!("connect to {whom}");
        if nobody {
            Failed::Nobody(Error::FailedPrecondition(format!(
                "no pod waits for this one at {whom}: create the target pod first, with the annotation dyad.dev/migration-source"
            )))
        } else {
            Failed::Other(Error::other(context, error))
        }
    })
}

/// Only root's processes talk to each other here.
fn same_user(stream: &UnixStream) -> Result<()> {
    let peer = stream
        .peer_cred()
        .context(|| "ask who is at the other end of the migration socket".into())?;
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() == own {
        return Ok(());
    }
    Err(Error::FailedPrecondition(format!(
        "user {} is at the other end of the migration socket, not {own}",
        peer.uid()
    )))
}

fn notice_death(stream: &TcpStream) -> Result<()> {
    let set = || -> nix::Result<()> {
        setsockopt(stream, sockopt::TcpNoDelay, &true)?;
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &10)?;
        setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
        setsockopt(stream, sockopt::TcpKeepCount, &4)?;
        setsockopt(stream, sockopt::TcpUserTimeout, &(DEAD.as_millis() as u32))
    };
    set().context(|| "set the connection's options".into())
}

/// Certificates, read anew for each use: they are renewed while a pod runs.
struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(config: &ContainerConfig) -> Result<Self> {
        let dir = config.migration_tls.as_deref().ok_or_else(|| {
            Error::FailedPrecondition(
                "this node has no certificates: set container.migration_tls to a folder with ca.pem, cert.pem and key.pem".into(),
            )
        })?;
        let (ca, cert, key) = (
            dir.join("ca.pem"),
            dir.join("cert.pem"),
            dir.join("key.pem"),
        );
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots
                .add(root)
                .context(|| format!("use {}", ca.display()))?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            chain: certificates(&cert)?,
            key: PrivateKeyDer::from_pem_file(&key)
                .context(|| format!("read {}", key.display()))?,
        })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let context = || format!("read {}", path.display());
    let all = CertificateDer::pem_file_iter(path)
        .context(context)?
        .collect::<std::result::Result<Vec<_>, _>>()
        .context(context)?;
    if all.is_empty() {
        return Err(Error::FailedPrecondition(format!(
            "{} holds no certificate",
            path.display()
        )));
    }
    Ok(all)
}

fn client(config: &ContainerConfig) -> Result<TlsConnector> {
    let identity = Identity::read(config)?;
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .context(|| "use TLS 1.3".into())?
        .with_root_certificates(identity.roots)
        .with_client_auth_cert(identity.chain, identity.key)
        .context(|| "use the certificate of container.migration_tls".into())?;
    Ok(TlsConnector::from(Arc::new(config)))
}

fn server(config: &ContainerConfig) -> Result<TlsAcceptor> {
    let identity = Identity::read(config)?;
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots, provider.clone())
        .build()
        .context(|| "use ca.pem of container.migration_tls".into())?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context(|| "use TLS 1.3".into())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)
        .context(|| "use the certificate of container.migration_tls".into())?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Waits for a source.
pub(crate) struct Listener {
    unix: UnixListener,
    net: Option<(TcpListener, Option<TlsAcceptor>)>,
    /// Gone with it.
    _files: Files,
}

/// Paths, with what was made there: its inode, whose number may be given to the next
/// file, and its change time.
#[derive(Default)]
struct Files(Vec<(PathBuf, Made)>);

type Made = (u64, i64, i64);

fn made(path: &Path) -> io::Result<Made> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

impl Files {
    fn add(&mut self, path: PathBuf) -> io::Result<()> {
        let made = made(&path)?;
        self.0.push((path, made));
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for (path, ours) in &self.0 {
            // Another pod may wait there by now.
            if made(path).is_ok_and(|there| there == *ours) {
                // What stays is replaced by the next who waits.
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Listener {
    /// For the source of this identity; sockets are below `dir`.
    ///
    /// # Errors
    /// Another pod waits for the same source; the configured address cannot be used.
    pub(crate) async fn bind(dir: &Path, source: &str, config: &ContainerConfig) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .context(|| format!("make {}", dir.display()))?;
        let path = dir.join(format!("{source}.sock"));
        let since = Instant::now();
        while UnixStream::connect(&path).await.is_ok() {
            if since.elapsed() >= LEAVING {
                return Err(Error::FailedPrecondition(format!(
                    "another pod of this node waits for {source} already: delete one of them"
                )));
            }
            sleep(LEAVING / 20).await;
        }
        let mut files = Files::default();
        let _ = fs::remove_file(&path);
        let unix = UnixListener::bind(&path).context(|| format!("listen on {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))
            .context(|| format!("make {} root's", path.display()))?;
        files
            .add(path.clone())
            .context(|| format!("look at {}", path.display()))?;
        let net = match &config.migration_listen {
            None => None,
            Some(uri) => {
                let (listener, tls, address) = listen(uri, config).await?;
                let file = path.with_extension("address");
                fs::write(&file, format!("{address}\n"))
                    .context(|| format!("write {}", file.display()))?;
                files
                    .add(file)
                    .context(|| "look at the address file".into())?;
                log::info!("waiting for {source} on {address}");
                Some((listener, tls))
            }
        };
        Ok(Self {
            unix,
            net,
            _files: files,
        })
    }

    /// The next peer that may talk to us; others are turned away and reported.
    pub(crate) async fn accept(&self) -> Wire {
        loop {
            match self.accept_one().await {
                Ok(wire) => return wire,
                Err(error) => log::warn!("a migration peer is turned away: {}", error.chain()),
            }
        }
    }

    async fn accept_one(&self) -> Result<Wire> {
        let accept = || "accept a migration peer".to_owned();
        let from_net = async {
            match &self.net {
                Some((listener, tls)) => (listener.accept().await, tls),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = self.unix.accept() => {
                let (stream, _) = accepted.context(accept)?;
                same_user(&stream)?;
                Ok(Wire::new(stream))
            }
            (accepted, tls) = from_net => {
                let (stream, address) = accepted.context(accept)?;
                notice_death(&stream)?;
                let Some(tls) = tls else {
                    return Ok(Wire::new(stream));
                };
                let stream = timeout(CONNECT, tls.accept(stream))
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                    .context(|| format!("TLS with {address}"))?;
                Ok(Wire::new(stream))
            }
        }
    }
}

async fn listen(
    uri: &str,
    config: &ContainerConfig,
) -> Result<(TcpListener, Option<TlsAcceptor>, String)> {
    let invalid = |what: &str| {
        Error::InvalidArgument(format!(
            "container.migration_listen {uri:?}: {what}; it wants tls://ADDRESS:PORT"
        ))
    };
    let (scheme, address) = uri
        .split_once("://")
        .ok_or_else(|| invalid("it has no scheme"))?;
    let address: SocketAddr = address
        .parse()
        .map_err(|_| invalid("that is no address with a port"))?;
    let tls = match scheme {
        "tls" => Some(server(config)?),
        "tcp" if config.migration_clear => None,
        "tcp" => {
            return Err(invalid(
                "the pod's memory would go over the network in clear, and container.migration_clear does not allow it",
            ));
        }
        _ => return Err(invalid("its scheme is unknown")),
    };
    let listener = TcpListener::bind(address)
        .await
        .context(|| format!("listen on {uri} (container.migration_listen)"))?;
    let got = listener
        .local_addr()
        .context(|| "ask for the address listened on".into())?;
    Ok((listener, tls, format!("{scheme}://{got}")))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use tempfile::TempDir;

    use super::super::wire::Message;
    use super::*;

    const SOURCE: &str = "11111111-2222-3333-4444-555555555555";

    /// A folder as `migration_tls` wants it, signed by an authority of its own.
    fn pki(authorities: usize) -> Vec<(TempDir, ContainerConfig)> {
        (0..authorities)
            .map(|_| {
                let mut ca = CertificateParams::new(Vec::new()).unwrap();
                ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                let issuer =
                    CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
                let key = KeyPair::generate().unwrap();
                let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
                let cert = CertificateParams::new(names).unwrap();
                let cert = cert.signed_by(&key, &issuer).unwrap();
                let dir = tempfile::tempdir().unwrap();
                fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
                fs::write(dir.path().join("cert.pem"), cert.pem()).unwrap();
                fs::write(dir.path().join("key.pem"), key.serialize_pem()).unwrap();
                let config = ContainerConfig {
                    migration_listen: Some("tls://127.0.0.1:0".into()),
                    migration_tls: Some(dir.path().into()),
                    ..ContainerConfig::default()
                };
                (dir, config)
            })
            .collect()
    }

    fn address(dir: &Path) -> u16 {
        let text = fs::read_to_string(dir.join(format!("{SOURCE}.address"))).unwrap();
        let address = text.trim().rsplit_once(':').unwrap();
        address.1.parse().unwrap()
    }

    #[tokio::test]
    async fn peers_meet_on_a_socket_that_is_roots_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = ContainerConfig::default();
        let listener = Listener::bind(dir.path(), SOURCE, &config).await.unwrap();
        let path = dir.path().join(format!("{SOURCE}.sock"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = Listener::bind(dir.path(), SOURCE, &config)
            .await
            .err()
            .unwrap();
        assert!(again.to_string().contains("another pod"), "{again}");
        // It looked whether somebody is there, several times.
        let looks = async { while listener.accept().await.receive().await.is_err() {} };
        assert!(timeout(Duration::from_millis(100), looks).await.is_err());
        let destination = Destination::Unix(path.clone());
        let (mut here, mut there) = tokio::join!(
            async { connect(&destination, &config).await.unwrap() },
            listener.accept()
        );
        here.send(&Message::Accept).await.unwrap();
        assert_eq!(there.receive().await.unwrap(), Message::Accept);
        drop(listener);
        assert!(!path.exists());
        let nobody = connect(&destination, &config).await.err().unwrap();
        assert!(matches!(nobody, Failed::Nobody(_)));
        fs::write(&path, "").unwrap();
        drop(
            Listener::bind(dir.path(), SOURCE, &config)
                .await
                .expect("a stale file is replaced"),
        );
    }

    #[tokio::test]
    async fn tls_wants_certificates_of_one_authority_on_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        let pki = pki(2);
        let (ours, stranger) = (&pki[0].1, &pki[1].1);
        let listener = Listener::bind(dir.path(), SOURCE, ours).await.unwrap();
        let port = address(dir.path());
        let tls = |host: &str| Destination::Tls {
            host: host.into(),
            port,
        };
        let serve = async {
            let mut wire = listener.accept().await;
            assert_eq!(wire.receive().await.unwrap(), Message::Accept);
            wire.send(&Message::End).await.unwrap();
        };
        let dial = async {
            // Turned away: another authority's, no TLS at all, another name.
            assert!(connect(&tls("localhost"), stranger).await.is_err());
            let mut clear = connect(
                &Destination::Tcp {
                    host: "127.0.0.1".into(),
                    port,
                },
                ours,
            )
            .await
            .unwrap();
            assert!(clear.send(&Message::Accept).await.is_err() || clear.receive().await.is_err());
            assert!(connect(&tls("127.0.0.2"), ours).await.is_err());
            let mut wire = connect(&tls("127.0.0.1"), ours)
                .await
                .map_err(Error::from)
                .unwrap();
            wire.send(&Message::Accept).await.unwrap();
            assert_eq!(wire.receive().await.unwrap(), Message::End);
        };
        tokio::join!(serve, dial);
        let none = ContainerConfig::default();
        let error: Error = connect(&tls("127.0.0.1"), &none)
            .await
            .err()
            .unwrap()
            .into();
        assert!(
            error.to_string().contains("container.migration_tls"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn nothing_listens_on_the_network_unless_configured() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = ContainerConfig::default();
        let listener = Listener::bind(dir.path(), SOURCE, &config).await.unwrap();
        assert!(listener.net.is_none());
        drop(listener);
        for (uri, says) in [
            ("tcp://127.0.0.1:0", "container.migration_clear"),
            ("tls://127.0.0.1:0", "container.migration_tls"),
            ("tls://here", "no address"),
            ("127.0.0.1:0", "no scheme"),
            ("udp://127.0.0.1:0", "scheme is unknown"),
        ] {
            config.migration_listen = Some(uri.into());
            let error = Listener::bind(dir.path(), SOURCE, &config)
                .await
                .err()
                .unwrap();
            assert!(error.to_string().contains(says), "{error}");
        }
        config.migration_clear = true;
        config.migration_listen = Some("tcp://127.0.0.1:0".into());
        let listener = Listener::bind(dir.path(), SOURCE, &config).await.unwrap();
        assert!(listener.net.is_some());
    }
}
