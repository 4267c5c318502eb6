//! `dyadctl console` on a real (pseudo) terminal: what is typed, the way out, and that the
//! terminal is given back whatever ends it.

#[allow(dead_code)]
#[path = "../src/testing.rs"]
mod testing;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;

use testing::{FakeShim, State, state_of};

const LIMIT: Duration = Duration::from_secs(20);

/// dyadctl on a terminal of its own.
struct Terminal {
    /// What the user's keyboard and screen are attached to.
    keyboard: File,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// The terminal's other end, kept open to look at its settings.
    device: File,
    before: Termios,
    child: Child,
}

impl Terminal {
    fn run(state: &State, arguments: &[&str]) -> Self {
        let pty = openpty(None, None).unwrap();
        let device = File::from(pty.slave);
        let before = tcgetattr(&device).unwrap();
        let stdio = || Stdio::from(device.try_clone().unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_dyadctl"))
            .arg("--state-dir")
            .arg(state.path())
            .args(arguments)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let keyboard = File::from(pty.master);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            keyboard,
            screen,
            seen: Vec::new(),
            device,
            before,
            child,
        }
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.device).unwrap()
    }

    fn type_in(&mut self, text: &[u8]) {
        self.keyboard.write_all(text).unwrap();
    }

    /// Waits until `text` is on the screen.
    fn await_text(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            match self.screen.recv_timeout(LIMIT) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => panic!("no {text:?} in {:?}", String::from_utf8_lossy(&self.seen)),
            }
        }
    }

    async fn end(mut self) -> (ExitStatus, Termios, Termios) {
        let status = tokio::task::spawn_blocking(move || {
            let status = self.child.wait().unwrap();
            (status, self)
        });
        let (status, this) = tokio::time::timeout(LIMIT, status).await.unwrap().unwrap();
        (status, this.settings(), this.before.clone())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The fake shim is served by this thread's runtime: what blocks goes beside it.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// A console that echoes, open: what was typed has come back.
async fn open_console(state: &State) -> Terminal {
    let mut terminal = Terminal::run(state, &["console", "web"]);
    beside(move || {
        terminal.await_text("ctrl-]");
        terminal.type_in(b"hello");
        terminal.await_text("hello");
        terminal
    })
    .await
}

#[tokio::test]
async fn keys_go_to_the_machine_and_the_escape_key_leaves() {
    let state = State::new();
    let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
    let mut terminal = open_console(&state).await;
    // ctrl-c is the machine's, not ours.
    let terminal = beside(move || {
        assert!(
            !terminal
                .settings()
                .local_flags
                .intersects(LocalFlags::ECHO | LocalFlags::ISIG)
        );
        terminal.type_in(b"\x03again");
        terminal.await_text("\x03again");
        terminal.type_in(b"\x1d");
        terminal
    })
    .await;
    let (status, after, before) = terminal.end().await;
    assert!(status.success(), "{status}");
    assert_eq!(after, before);
}

#[tokio::test]
async fn the_terminal_is_given_back_when_a_signal_ends_it() {
    let state = State::new();
    let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
    let terminal = open_console(&state).await;
    let pid = Pid::from_raw(terminal.child.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let (status, after, before) = terminal.end().await;
    assert_eq!((status.code(), status.signal()), (Some(143), None));
    assert_eq!(after, before);
}

#[tokio::test]
async fn the_terminal_is_given_back_when_the_machine_ends() {
    let state = State::new();
    let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
    let mut terminal = open_console(&state).await;
    terminal.type_in(b"end");
    let terminal = beside(move || {
        terminal.await_text("the console has ended");
        terminal
    })
    .await;
    let (status, after, before) = terminal.end().await;
    assert!(status.success(), "{status}");
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_second_console_is_told_so_and_its_terminal_is_given_back() {
    let state = State::new();
    let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
    let _first = open_console(&state).await;
    let mut second = Terminal::run(&state, &["console", "web"]);
    let second = beside(move || {
        second.await_text("dyadctl: another console is attached");
        second
    })
    .await;
    let (status, after, before) = second.end().await;
    assert_eq!(status.code(), Some(4));
    assert_eq!(after, before);
}

#[tokio::test]
async fn exit_codes_and_one_line_of_error() {
    let state = State::new();
    let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
    for (arguments, code, text) in [
        (&["state", "web"][..], 0, "default/web"),
        (
            &["state", "nobody"],
            3,
            "dyadctl: no pod or container is called \"nobody\"",
        ),
        (&["stop", "web", "--grace", "25h"], 2, "at most 24h"),
    ] {
        let mut terminal = Terminal::run(&state, arguments);
        let terminal = beside(move || {
            terminal.await_text(text);
            terminal
        })
        .await;
        assert_eq!(terminal.end().await.0.code(), Some(code), "{arguments:?}");
    }
}
