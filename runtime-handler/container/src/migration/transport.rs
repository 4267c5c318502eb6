//! How two shims meet: a root-only unix socket, or the network with TLS on which both
//! prove themselves by certificates. In clear only where asked for and configured.
//!
//! ```text
//!  <state_dir>/migration/<source>.sock      always, where a pod waits for its source
//!  container.migration_listen               only where configured; the address that it
//!                                           got is in <source>.address beside the socket
//! ```

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dyad_linux::program;
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Context, Error, Result};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::destination::Destination;
use super::wire::{Message, Wire, broken};
use crate::tls;

/// For a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longer than `dyad-tls` gives its handshake.
const SECURED: Duration = Duration::from_secs(15);
/// Bytes of a reason why there is no connection.
const REASON_MAX: usize = 4096;
/// How long a pod that waited for the same source, and is being deleted, may take to go.
const LEAVING: Duration = Duration::from_secs(5);
/// A peer says who it is within this, its handshake included.
const HELLO: Duration = Duration::from_secs(20);
/// Peers that are heard at once.
const PEERS_MAX: usize = 16;
/// Peers that are turned away are logged once in this time.
const LOGGED: Duration = Duration::from_secs(10);
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
    reaper: &Arc<Reaper>,
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
            let tls = Tls::new(config, reaper).map_err(Failed::Other)?;
            let stream = dial_tcp(host, *port).await?;
            let stream = tls.connect(host, stream).await;
            Ok(Wire::new(stream.map_err(Failed::Other)?))
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

/// Secures connections, each by a process of its own ([`crate::tls`]), which reads the
/// certificates anew: they are renewed while a pod runs.
struct Tls {
    program: PathBuf,
    folder: PathBuf,
    reaper: Arc<Reaper>,
}

impl Tls {
    fn new(config: &ContainerConfig, reaper: &Arc<Reaper>) -> Result<Self> {
        let folder = config.migration_tls.clone().ok_or_else(|| {
            Error::FailedPrecondition(
                "this node has no certificates: set container.migration_tls to a folder with ca.pem, cert.pem and key.pem".into(),
            )
        })?;
        Ok(Self {
            program: program::beside(tls::PROGRAM)?,
            folder,
            reaper: Arc::clone(reaper),
        })
    }

    async fn connect(&self, host: &str, peer: TcpStream) -> Result<UnixStream> {
        self.run("client", Some(host), Some(peer)).await
    }

    async fn accept(&self, peer: TcpStream) -> Result<UnixStream> {
        self.run("server", None, Some(peer)).await
    }

    /// Whether the certificates can be used.
    async fn check(&self) -> Result<()> {
        self.run("check", None, None).await.map(drop)
    }

    async fn run(
        &self,
        role: &str,
        host: Option<&str>,
        peer: Option<TcpStream>,
    ) -> Result<UnixStream> {
        let what = || format!("run {}", self.program.display());
        let whom = match &peer {
            Some(peer) => format!("{}: ", peer.peer_addr().context(what)?),
            None => String::new(),
        };
        let (own, its) = UnixStream::pair().context(what)?;
        let its = its.into_std().context(what)?;
        let peer = match peer {
            Some(peer) => Stdio::from(OwnedFd::from(peer.into_std().context(what)?)),
            None => Stdio::null(),
        };
        let mut command = Command::new(&self.program);
        command
            .arg(role)
            .arg(&self.folder)
            .args(host)
            .env_clear()
            .stdin(OwnedFd::from(its))
            .stdout(peer)
            .stderr(Stdio::null());
        // It ends with the connection, of which the shim hears by the socket.
        self.reaper.spawn(&mut command).context(what)?;
        // It holds our copies of the ends that are its own.
        drop(command);
        self.first_line(own, &whom).await
    }

    /// The connection behind its first line, which is empty where there is one.
    async fn first_line(&self, mut stream: UnixStream, whom: &str) -> Result<UnixStream> {
        let mut line = Vec::new();
        let read = async {
            while line.len() < REASON_MAX {
                // What follows is the peer's.
                match stream.read_u8().await? {
                    b'\n' => break,
                    byte => line.push(byte),
                }
            }
            io::Result::Ok(())
        };
        timeout(SECURED, read)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .context(|| format!("{whom}{} told nothing", self.program.display()))?;
        if line.is_empty() {
            return Ok(stream);
        }
        Err(Error::FailedPrecondition(format!(
            "{whom}{} (container.migration_tls is {})",
            String::from_utf8_lossy(&line),
            self.folder.display()
        )))
    }
}

/// Waits for a source.
///
/// Anybody on the network may connect, and then say nothing. So all peers are heard at
/// once, up to [`PEERS_MAX`]; one more ends the one that has said nothing for longest, for an
/// honest one is quick.
pub(crate) struct Listener {
    unix: UnixListener,
    net: Option<(TcpListener, Option<Arc<Tls>>)>,
    /// Those that have not said who they are.
    peers: JoinSet<Result<(Wire, Message)>>,
    /// The same, the oldest first.
    order: VecDeque<AbortHandle>,
    /// When a peer that was turned away was logged last.
    logged: Option<Instant>,
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
    pub(crate) async fn bind(
        dir: &Path,
        source: &str,
        config: &ContainerConfig,
        reaper: &Arc<Reaper>,
    ) -> Result<Self> {
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
                let (listener, tls, address) = listen(uri, config, reaper).await?;
                let file = path.with_extension("address");
                fs::write(&file, format!("{address}\n"))
                    .context(|| format!("write {}", file.display()))?;
                files
                    .add(file)
                    .context(|| "look at the address file".into())?;
                log::info!("waiting for {source} on {address}");
                Some((listener, tls.map(Arc::new)))
            }
        };
        Ok(Self {
            unix,
            net,
            peers: JoinSet::new(),
            order: VecDeque::new(),
            logged: None,
            _files: files,
        })
    }

    /// The next peer that may talk to us, and the first it says; others are turned away and
    /// reported. Cancel safe.
    pub(crate) async fn accept(&mut self) -> (Wire, Message) {
        loop {
            let from_net = async {
                match &self.net {
                    Some((listener, tls)) => (listener.accept().await, tls.clone()),
                    None => std::future::pending().await,
                }
            };
            let turned_away = tokio::select! {
                Some(heard) = self.peers.join_next() => match heard {
                    Ok(Ok(peer)) => return peer,
                    Ok(Err(error)) => Some(error),
                    // It made room for another.
                    Err(_) => None,
                },
                accepted = self.unix.accept() => match accepted {
                    Ok((stream, _)) => {
                        self.hear(async move { same_user(&stream).map(|()| Wire::new(stream)) });
                        None
                    }
                    Err(error) => Some(accept_failed(error).await),
                },
                (accepted, tls) = from_net => match accepted {
                    Ok((stream, _)) => {
                        self.hear(secure(stream, tls));
                        None
                    }
                    Err(error) => Some(accept_failed(error).await),
                },
            };
            if let Some(error) = turned_away {
                self.log(&error);
            }
        }
    }

    fn hear(&mut self, secured: impl Future<Output = Result<Wire>> + Send + 'static) {
        self.order.retain(|peer| !peer.is_finished());
        if self.order.len() >= PEERS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        let heard = async {
            let mut wire = secured.await?;
            let hello = wire.receive().await?;
            Ok((wire, hello))
        };
        self.order.push_back(self.peers.spawn(async {
            timeout(HELLO, heard)
                .await
                .unwrap_or_else(|_| Err(broken("nothing came".into())))
        }));
    }

    fn log(&mut self, error: &Error) {
        if self.logged.is_none_or(|logged| logged.elapsed() > LOGGED) {
            self.logged = Some(Instant::now());
            log::warn!("a migration peer is turned away: {}", error.chain());
        }
    }
}

/// A host without descriptors fails at once, again and again.
async fn accept_failed(error: io::Error) -> Error {
    sleep(Duration::from_millis(100)).await;
    Error::other("accept a migration peer", error)
}

async fn secure(stream: TcpStream, tls: Option<Arc<Tls>>) -> Result<Wire> {
    notice_death(&stream)?;
    match tls {
        None => Ok(Wire::new(stream)),
        Some(tls) => Ok(Wire::new(tls.accept(stream).await?)),
    }
}

async fn listen(
    uri: &str,
    config: &ContainerConfig,
    reaper: &Arc<Reaper>,
) -> Result<(TcpListener, Option<Tls>, String)> {
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
        "tls" => {
            let tls = Tls::new(config, reaper)?;
            tls.check().await?;
            Some(tls)
        }
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
    use super::*;

    const SOURCE: &str = "11111111-2222-3333-4444-555555555555";

    #[tokio::test]
    async fn peers_meet_on_a_socket_that_is_roots_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (config, reaper) = (ContainerConfig::default(), Reaper::start().unwrap());
        let mut listener = Listener::bind(dir.path(), SOURCE, &config, &reaper)
            .await
            .unwrap();
        let path = dir.path().join(format!("{SOURCE}.sock"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = Listener::bind(dir.path(), SOURCE, &config, &reaper)
            .await
            .err()
            .unwrap();
        assert!(again.to_string().contains("another pod"), "{again}");
        // It looked whether somebody is there, several times.
        let looks = listener.accept();
        assert!(timeout(Duration::from_millis(100), looks).await.is_err());
        let destination = Destination::Unix(path.clone());
        let (_here, (_there, first)) = tokio::join!(
            async {
                let mut here = connect(&destination, &config, &reaper).await.unwrap();
                here.send(&Message::Accept).await.unwrap();
                here
            },
            listener.accept()
        );
        assert_eq!(first, Message::Accept);
        drop(listener);
        assert!(!path.exists());
        let nobody = connect(&destination, &config, &reaper).await.err().unwrap();
        assert!(matches!(nobody, Failed::Nobody(_)));
        fs::write(&path, "").unwrap();
        drop(
            Listener::bind(dir.path(), SOURCE, &config, &reaper)
                .await
                .expect("a stale file is replaced"),
        );
    }

    #[tokio::test]
    async fn peers_that_say_nothing_keep_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let reaper = Reaper::start().unwrap();
        let config = ContainerConfig {
            migration_clear: true,
            migration_listen: Some("tcp://127.0.0.1:0".into()),
            ..ContainerConfig::default()
        };
        let mut listener = Listener::bind(dir.path(), SOURCE, &config, &reaper)
            .await
            .unwrap();
        let (net, _) = listener.net.as_ref().unwrap();
        let port = net.local_addr().unwrap().port();
        let destination = Destination::Tcp {
            host: "127.0.0.1".into(),
            port,
        };
        let mut silent = Vec::new();
        for _ in 0..3 * PEERS_MAX {
            silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        }
        let source = async {
            let mut wire = connect(&destination, &config, &reaper).await.unwrap();
            wire.send(&Message::Accept).await.unwrap();
            wire
        };
        let met = async { tokio::join!(source, listener.accept()) };
        let (_, (_, first)) = timeout(HELLO / 2, met).await.expect("heard among others");
        assert_eq!(first, Message::Accept);
        assert!(listener.peers.len() <= 2 * PEERS_MAX);
    }

    #[tokio::test]
    async fn nothing_listens_on_the_network_unless_configured() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = ContainerConfig::default();
        let reaper = Reaper::start().unwrap();
        let listener = Listener::bind(dir.path(), SOURCE, &config, &reaper)
            .await
            .unwrap();
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
            let error = Listener::bind(dir.path(), SOURCE, &config, &reaper)
                .await
                .err()
                .unwrap();
            assert!(error.to_string().contains(says), "{error}");
        }
        config.migration_clear = true;
        config.migration_listen = Some("tcp://127.0.0.1:0".into());
        let listener = Listener::bind(dir.path(), SOURCE, &config, &reaper)
            .await
            .unwrap();
        assert!(listener.net.is_some());
    }
}
