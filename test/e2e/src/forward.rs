//! `crictl port-forward`, as long as it is held.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::crictl::Crictl;

/// For one request to be answered through all hops.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A forwarded port; ends when dropped.
#[derive(Debug)]
pub struct Forward {
    child: Child,
    /// crictl writes a line for each connection, and dies of a pipe that nobody holds.
    _output: BufReader<ChildStdout>,
    local: u16,
}

impl Forward {
    /// Forwards a free local port to `port` of the pod.
    ///
    /// # Errors
    /// crictl did not say that it listens.
    pub fn start(crictl: &Crictl, pod_id: &str, port: u16) -> Result<Self> {
        let mut command: Command = crictl.command();
        command
            .args(["port-forward", pod_id, &format!(":{port}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().context("start crictl port-forward")?;
        let stdout = child.stdout.take().context("crictl has no stdout")?;
        let mut output = BufReader::new(stdout);
        let mut line = String::new();
        // Ends at the latest when crictl does.
        let read = output.read_line(&mut line);
        // "Forwarding from 127.0.0.1:40123 -> 8080"
        let local = read.ok().and_then(|_| {
            let rest = line.split_once("127.0.0.1:")?.1;
            rest.split_whitespace().next()?.parse().ok()
        });
        let Some(local) = local else {
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("crictl port-forward says {line:?}");
        };
        Ok(Self {
            child,
            _output: output,
            local,
        })
    }

    /// What the port answers to an HTTP request; empty where the connection just ends.
    ///
    /// # Errors
    /// crictl does not listen, or there is no answer in time.
    pub fn get(&self) -> Result<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.local));
        let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error).context("read the answer"),
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
