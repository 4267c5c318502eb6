//! `dyad-tls` as a shim runs it: whom it lets through, and what it carries.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dyad-tls");
/// More than any pipe or socket holds.
const MUCH: usize = 8 << 20;

/// A folder as `container.migration_tls` wants it, signed by an authority of its own.
fn certificates() -> TempDir {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let cert = CertificateParams::new(names).unwrap();
    let cert = cert.signed_by(&key, &issuer).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
    fs::write(dir.path().join("cert.pem"), cert.pem()).unwrap();
    fs::write(dir.path().join("key.pem"), key.serialize_pem()).unwrap();
    dir
}

/// One side: the program, and the shim's end of its socket.
struct Side {
    child: Child,
    shim: BufReader<UnixStream>,
}

impl Side {
    fn run(role: &[&str], folder: &Path, peer: Option<TcpStream>) -> Self {
        let (shim, its) = UnixStream::pair().unwrap();
        shim.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let child = Command::new(PROGRAM)
            .arg(role[0])
            .arg(folder)
            .args(&role[1..])
            .stdin(OwnedFd::from(its))
            .stdout(peer.map_or_else(Stdio::null, |peer| OwnedFd::from(peer).into()))
            .spawn()
            .unwrap();
        Self {
            child,
            shim: BufReader::new(shim),
        }
    }

    /// Its first line: why there is no connection, or nothing.
    fn verdict(&mut self) -> String {
        let mut line = String::new();
        self.shim.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn end(mut self) {
        drop(self.shim);
        self.child.wait().unwrap();
    }
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

/// Both sides of one connection.
fn both(host: &str, client: &Path, server: &Path) -> [Side; 2] {
    let (dialled, accepted) = tcp();
    [
        Side::run(&["client", host], client, Some(dialled)),
        Side::run(&["server"], server, Some(accepted)),
    ]
}

#[test]
fn bytes_go_both_ways_and_the_end_of_one_side_is_the_others() {
    let ours = certificates();
    let [mut client, mut server] = both("localhost", ours.path(), ours.path());
    assert_eq!([client.verdict(), server.verdict()], ["", ""]);
    let bytes: Vec<u8> = (0..MUCH).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| {
        let mut to = client.shim.get_ref().try_clone().unwrap();
        let bytes = &bytes;
        scope.spawn(move || to.write_all(bytes).unwrap());
        let mut found = vec![0; MUCH];
        server.shim.read_exact(&mut found).unwrap();
        assert!(found == *bytes, "other bytes arrived");
    });
    server.shim.get_mut().write_all(b"answer").unwrap();
    server.end();
    let mut rest = Vec::new();
    client.shim.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"answer");
    client.end();
}

#[test]
fn strangers_and_other_names_are_turned_away() {
    let (ours, strangers) = (certificates(), certificates());
    for (host, client, says) in [
        ("localhost", strangers.path(), "certificate"),
        ("127.0.0.2", ours.path(), "not valid for name"),
        ("no host", ours.path(), "no host"),
    ] {
        let [mut client, mut server] = both(host, client, ours.path());
        let told = client.verdict();
        assert!(told.contains(says), "{host}: {told:?}");
        client.end();
        assert_ne!(server.verdict(), "", "{host}: the server trusts it");
        server.end();
    }
}

#[test]
fn a_peer_without_tls_is_turned_away() {
    let ours = certificates();
    let (mut dialled, accepted) = tcp();
    let mut server = Side::run(&["server"], ours.path(), Some(accepted));
    dialled.write_all(b"a pod's memory, in clear").unwrap();
    assert!(server.verdict().starts_with("TLS: "));
    server.end();
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let ours = certificates();
    let check = |folder: &Path| {
        let mut side = Side::run(&["check"], folder, None);
        let told = side.verdict();
        side.end();
        told
    };
    assert_eq!(check(ours.path()), "");
    for (file, text) in [
        ("key.pem", "no key"),
        ("cert.pem", ""),
        (
            "ca.pem",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ),
    ] {
        let there = ours.path().join(file);
        let kept = fs::read(&there).unwrap();
        fs::write(&there, text).unwrap();
        let told = check(ours.path());
        assert!(told.contains(file), "{file}: {told:?}");
        fs::remove_file(&there).unwrap();
        let told = check(ours.path());
        assert!(told.contains(file), "{file}: {told:?}");
        fs::write(&there, kept).unwrap();
    }
}
