//! `dyad-tls`: TLS for one connection of a migration, in a process of its own, so that the
//! code for it does not stay in memory with the shim of every pod.
//!
//! ```text
//!  shim --stdin: socket pair--> dyad-tls --stdout: TCP, now TLS 1.3--> dyad-tls --> other shim
//! ```
//! The first line to the shim is empty, or why there is no connection; then bytes are
//! carried both ways until one side has gone. Both sides prove themselves by certificates
//! of the same authority.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::error::{Context, Error, Result};
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Its name; it lies beside the shim.
pub const PROGRAM: &str = "dyad-tls";

/// For the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How it is called.
const USAGE: &str = "dyad-tls is run by Dyad's shim, with sockets as stdin and stdout:
dyad-tls client FOLDER HOST | server FOLDER | check FOLDER
FOLDER holds ca.pem, cert.pem and key.pem";

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    /// The side that dialled this host.
    Client(String),
    /// The side that was dialled.
    Server,
    /// No connection: whether the folder can be used.
    Check,
}

impl Role {
    fn parse(mut words: impl Iterator<Item = OsString>) -> Option<(Self, PathBuf)> {
        let role = words.next()?;
        let folder = PathBuf::from(words.next()?);
        let role = match role.to_str()? {
            "client" => Self::Client(words.next()?.into_string().ok()?),
            "server" => Self::Server,
            "check" => Self::Check,
            _ => return None,
        };
        words.next().is_none().then_some((role, folder))
    }
}

/// The program; its arguments are without its name.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some((role, folder)) = Role::parse(arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime.and_then(|runtime| runtime.block_on(serve(&role, &folder))) {
        Ok(()) => ExitCode::SUCCESS,
        // The shim knows by its end of the socket, whose other end goes with us.
        Err(_) => ExitCode::FAILURE,
    }
}

async fn serve(role: &Role, folder: &Path) -> io::Result<()> {
    let shim = std::os::unix::net::UnixStream::from(owned(io::stdin())?);
    shim.set_nonblocking(true)?;
    let mut shim = UnixStream::from_std(shim)?;
    let secured = timeout(HANDSHAKE, secure(role, folder))
        .await
        .unwrap_or_else(|_| Err(Error::DeadlineExceeded("TLS handshake".into())));
    match secured {
        Ok(peer) => {
            shim.write_all(b"\n").await?;
            if let Some(peer) = peer {
                carry(shim, peer).await?;
            }
        }
        Err(error) => {
            let line = error.chain().replace('\n', " ");
            shim.write_all(format!("{line}\n").as_bytes()).await?;
        }
    }
    Ok(())
}

/// Carries bytes both ways until one side has gone: none of them closes only one direction.
async fn carry(mut shim: UnixStream, peer: TlsStream<TcpStream>) -> io::Result<()> {
    let (mut from_shim, mut to_shim) = shim.split();
    let (mut from_peer, mut to_peer) = split(peer);
    tokio::select! {
        gone = copy(&mut from_shim, &mut to_peer) => gone?,
        gone = copy(&mut from_peer, &mut to_shim) => gone?,
    };
    to_peer.shutdown().await
}

fn owned(stdio: impl AsFd) -> io::Result<OwnedFd> {
    stdio.as_fd().try_clone_to_owned()
}

async fn secure(role: &Role, folder: &Path) -> Result<Option<TlsStream<TcpStream>>> {
    let identity = Identity::read(folder)?;
    let handshake = || "TLS".to_owned();
    match role {
        Role::Client(host) => {
            let name = ServerName::try_from(host.clone()).context(|| format!("host {host:?}"))?;
            let connector = identity.client()?;
            let stream = connector.connect(name, peer()?).await.context(handshake)?;
            Ok(Some(stream.into()))
        }
        Role::Server => {
            let stream = identity.server()?.accept(peer()?).await;
            Ok(Some(stream.context(handshake)?.into()))
        }
        Role::Check => {
            identity.server()?;
            Ok(None)
        }
    }
}

fn peer() -> Result<TcpStream> {
    let take = || {
        let stream = std::net::TcpStream::from(owned(io::stdout())?);
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    };
    take().context(|| "take the connection".into())
}

/// Certificates and key of this node.
struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(folder: &Path) -> Result<Self> {
        let ca = folder.join("ca.pem");
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots
                .add(root)
                .context(|| format!("use {}", ca.display()))?;
        }
        let key = folder.join("key.pem");
        Ok(Self {
            roots: Arc::new(roots),
            chain: certificates(&folder.join("cert.pem"))?,
            key: PrivateKeyDer::from_pem_file(&key)
                .context(|| format!("read {}", key.display()))?,
        })
    }

    fn client(self) -> Result<TlsConnector> {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])
            .context(|| "use TLS 1.3".into())?
            .with_root_certificates(self.roots)
            .with_client_auth_cert(self.chain, self.key)
            .context(|| "use cert.pem and key.pem".into())?;
        Ok(TlsConnector::from(Arc::new(config)))
    }

    fn server(self) -> Result<TlsAcceptor> {
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots, provider.clone())
            .build()
            .context(|| "use ca.pem".into())?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .context(|| "use TLS 1.3".into())?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain, self.key)
            .context(|| "use cert.pem and key.pem".into())?;
        Ok(TlsAcceptor::from(Arc::new(config)))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Option<(Role, PathBuf)> {
        Role::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn a_call_names_role_and_folder() {
        let folder = PathBuf::from("/f");
        let client = Role::Client("node2".into());
        assert_eq!(
            parse(&["client", "/f", "node2"]),
            Some((client, folder.clone()))
        );
        assert_eq!(
            parse(&["server", "/f"]),
            Some((Role::Server, folder.clone()))
        );
        assert_eq!(parse(&["check", "/f"]), Some((Role::Check, folder)));
        for wrong in [
            &[][..],
            &["client"],
            &["client", "/f"],
            &["server"],
            &["server", "/f", "node2"],
            &["proxy", "/f"],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
