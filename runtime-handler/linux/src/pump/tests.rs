use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;

use nix::pty::openpty;
use nix::sys::stat::Mode;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::fd::unread_bytes;

const BOUND: Duration = Duration::from_secs(10);

/// A FIFO as the shim opens it, and a second handle as containerd has.
fn fifo() -> (TempDir, OwnedFd, Fd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
    let open =
        || nix::fcntl::open(&path, OFlag::O_RDWR | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
    let (ours, theirs) = (open(), Fd::new(open()).unwrap());
    (dir, ours, theirs)
}

async fn read_exactly(fd: &Fd, length: usize) -> Vec<u8> {
    let mut all = vec![0; length];
    let mut at = 0;
    while at < length {
        let got = timeout(BOUND, fd.read(&mut all[at..]))
            .await
            .unwrap()
            .unwrap();
        assert!(got > 0);
        at += got;
    }
    all
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

#[tokio::test]
async fn no_byte_is_lost_when_the_process_ends_and_the_reader_is_slow() {
    let (_dir, ours, theirs) = fifo();
    let (pump, ends) = Pump::pipes(Stdio {
        stdout: Some(ours),
        ..Stdio::default()
    })
    .unwrap();
    let sent = pattern(1_000_000);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || File::from(ends.stdout.unwrap()).write_all(&sent).unwrap()
    });
    assert_eq!(read_exactly(&theirs, sent.len()).await, sent);
    writer.join().unwrap();
    assert!(pump.drained(BOUND).await);
}

#[tokio::test]
async fn draining_is_bounded_when_something_holds_the_pipe() {
    let (_dir, ours, theirs) = fifo();
    let (pump, ends) = Pump::pipes(Stdio {
        stderr: Some(ours),
        ..Stdio::default()
    })
    .unwrap();
    let mut held = File::from(ends.stderr.unwrap());
    held.write_all(b"last words").unwrap();
    assert!(!pump.drained(Duration::from_millis(50)).await);
    assert_eq!(read_exactly(&theirs, 10).await, b"last words");
    drop(held);
    assert!(pump.drained(BOUND).await);
}

#[tokio::test]
async fn closing_stdin_hands_over_what_the_fifo_holds() {
    let (_dir, ours, theirs) = fifo();
    let (pump, ends) = Pump::pipes(Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    })
    .unwrap();
    // All of it is in the FIFO before the pump has run once.
    let sent = pattern(50_000);
    theirs.write_all(&sent).await.unwrap();
    pump.close_stdin();
    let reader = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        File::from(ends.stdin.unwrap())
            .read_to_end(&mut got)
            .unwrap();
        got
    });
    let got = timeout(BOUND, reader).await.unwrap().unwrap();
    assert_eq!(got, sent);
}

#[tokio::test]
async fn stdin_waits_for_a_process_that_reads_slowly_and_then_closes() {
    let (_dir, ours, theirs) = fifo();
    let (pump, ends) = Pump::pipes(Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    })
    .unwrap();
    // More than FIFO and pipe together hold.
    let sent = pattern(500_000);
    let expected = sent.clone();
    let end = Fd::new(ends.stdin.unwrap()).unwrap();
    let (written, got) = tokio::join!(
        async {
            theirs.write_all(&sent).await.unwrap();
            pump.close_stdin();
        },
        async {
            let got = read_exactly(&end, expected.len()).await;
            let mut rest = [0; 1];
            let end_of_file = end.read(&mut rest);
            assert_eq!(timeout(BOUND, end_of_file).await.unwrap().unwrap(), 0);
            got
        }
    );
    let () = written;
    assert_eq!(got, expected);
}

#[tokio::test]
async fn stdin_that_the_process_closed_stays_in_the_fifo() {
    let (_dir, ours, theirs) = fifo();
    let (mut pump, ends) = Pump::pipes(Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    })
    .unwrap();
    drop(ends);
    timeout(BOUND, pump._tasks.join_next()).await.unwrap();
    theirs.write_all(b"for the next").await.unwrap();
    assert_eq!(read_exactly(&theirs, 12).await, b"for the next");
}

#[tokio::test]
async fn output_is_settled_when_all_of_it_is_in_the_fifo() {
    let (_dir, ours, theirs) = fifo();
    let stdio = Stdio {
        stdout: Some(ours),
        ..Stdio::default()
    };
    let (pump, ends) = Pump::pipes(stdio).unwrap();
    assert!(pump.settled(BOUND).await, "nothing was written");
    // More than the FIFO takes, less than it and the pipe do.
    let process = Fd::new(ends.stdout.unwrap()).unwrap();
    let bytes = pattern(100_000);
    process.write_all(&bytes[..60_000]).await.unwrap();
    assert!(pump.settled(BOUND).await);
    assert_eq!(unread_bytes(theirs.as_fd()), 60_000);
    process.write_all(&bytes[60_000..]).await.unwrap();
    assert!(
        !pump.settled(Duration::from_millis(50)).await,
        "nobody reads"
    );
    assert!(read_exactly(&theirs, 90_000).await == bytes[..90_000]);
    assert!(pump.settled(BOUND).await);
    assert!(read_exactly(&theirs, 10_000).await == bytes[90_000..]);
}

#[tokio::test]
async fn stdin_that_was_not_read_goes_on_in_another_process() {
    let (_dir, ours, theirs) = fifo();
    let stdio = Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    };
    let (pump, ends) = Pump::pipes(stdio).unwrap();
    let bytes = pattern(135_000);
    // The pipe is full, there is a rest, and the FIFO holds more.
    theirs.write_all(&bytes).await.unwrap();
    let process = Fd::new(ends.stdin.unwrap()).unwrap();
    let mut read = vec![0; 1000];
    process.read(&mut read).await.unwrap();
    let unread = pump.hold_stdin().unwrap();
    assert!(!unread.closed);
    assert_eq!(pump.hold_stdin().unwrap(), unread, "looking takes nothing");
    let taken = 1000 + unread.bytes.len();
    assert!(unread.bytes == bytes[1000..taken]);
    let left = usize::try_from(unread_bytes(theirs.as_fd())).unwrap();
    assert_eq!(taken + left, bytes.len(), "held back");

    // It did not leave after all.
    pump.release_stdin();
    assert!(read_exactly(&process, 134_000).await == bytes[1000..]);

    let (_dir, ours, theirs) = fifo();
    let stdio = Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    };
    let (pump, ends) = Pump::resumed(stdio, &unread).unwrap();
    let process = Fd::new(ends.stdin.unwrap()).unwrap();
    theirs.write_all(b"more").await.unwrap();
    let got = read_exactly(&process, unread.bytes.len() + 4).await;
    assert!(got[..unread.bytes.len()] == unread.bytes && got.ends_with(b"more"));
    pump.close_stdin();
    assert_eq!(process.read(&mut read).await.unwrap(), 0);
    assert!(pump.hold_stdin().unwrap().closed);
}

#[tokio::test]
async fn stdin_that_was_closed_stays_so_in_another_process() {
    let (_dir, ours, _theirs) = fifo();
    let stdio = Stdio {
        stdin: Some(ours),
        ..Stdio::default()
    };
    let unread = Unread {
        bytes: b"last".to_vec(),
        closed: true,
    };
    let (_pump, ends) = Pump::resumed(stdio, &unread).unwrap();
    let process = Fd::new(ends.stdin.unwrap()).unwrap();
    assert_eq!(read_exactly(&process, 4).await, b"last");
    assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_terminal_ends_with_its_last_user() {
    let (_in, stdin, type_here) = fifo();
    let (_out, stdout, shown) = fifo();
    let pty = openpty(None, None).unwrap();
    let pump = Pump::terminal(
        Stdio {
            stdin: Some(stdin),
            stdout: Some(stdout),
            terminal: true,
            ..Stdio::default()
        },
        pty.master,
    )
    .unwrap();
    pump.resize(123, 45).unwrap();
    let (input, output) = (pty.slave.try_clone().unwrap(), pty.slave);
    let child = Command::new("sh")
        .args(["-c", "stty -echo; read line; stty size; echo \"<$line>\""])
        .stdin(input)
        .stdout(output)
        .spawn();
    type_here.write_all(b"hello\n").await.unwrap();
    assert!(pump.drained(BOUND).await);
    let mut text = vec![0; 1000];
    let length = shown.try_read(&mut text).unwrap().unwrap();
    let text = String::from_utf8_lossy(&text[..length]);
    assert!(text.ends_with("45 123\r\n<hello>\r\n"), "{text:?}");
    // Waited for here or by the reaper's tests, whoever comes first.
    let _ = child.unwrap().wait();
}

/// A terminal's other side, closed, and a way to open it again.
fn closed_terminal(stdio: Stdio) -> (Pump, impl Fn() -> File) {
    let pty = openpty(None, None).unwrap();
    let name = nix::unistd::ttyname(&pty.slave).unwrap();
    let master = pty.master;
    // What a process writes comes as it is.
    let mut settings = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut settings);
    let now = nix::sys::termios::SetArg::TCSANOW;
    nix::sys::termios::tcsetattr(&pty.slave, now, &settings).unwrap();
    let pump = Pump::terminal(stdio, master).unwrap();
    drop(pty.slave);
    let open = move || {
        let mut options = File::options();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOCTTY);
        options.read(true).write(true).open(&name).unwrap()
    };
    (pump, open)
}

#[tokio::test]
async fn a_terminal_that_was_closed_is_read_again_once_it_is_opened_again() {
    let (_out, stdout, shown) = fifo();
    let stdio = Stdio {
        stdout: Some(stdout),
        terminal: true,
        ..Stdio::default()
    };
    let (pump, open) = closed_terminal(stdio);
    for _ in 0..3 {
        // The pump has seen that nobody has it open.
        let ended = pump.outputs.ended(Duration::from_millis(50)).await;
        assert!(!ended, "the process lives");
        let mut terminal = open();
        // More than a terminal holds, so a writer would hang if nobody read.
        let sent = pattern(100_000);
        let expected = sent.clone();
        let writer = std::thread::spawn(move || terminal.write_all(&sent).unwrap());
        assert!(read_exactly(&shown, expected.len()).await == expected);
        writer.join().unwrap();
    }
    open().write_all(b"last words").unwrap();
    assert!(pump.drained(BOUND).await, "the process has ended");
    assert_eq!(read_exactly(&shown, 10).await, b"last words");
}

#[tokio::test]
async fn input_for_a_terminal_that_was_closed_waits_until_it_is_opened_again() {
    let (_in, stdin, type_here) = fifo();
    let stdio = Stdio {
        stdin: Some(stdin),
        terminal: true,
        ..Stdio::default()
    };
    let (_pump, open) = closed_terminal(stdio);
    type_here.write_all(b"hello").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut terminal = open();
    let reader = tokio::task::spawn_blocking(move || {
        let mut got = [0; 5];
        terminal.read_exact(&mut got).map(|()| got)
    });
    let got = timeout(BOUND, reader).await.unwrap().unwrap().unwrap();
    assert_eq!(&got, b"hello");
}

#[tokio::test]
async fn the_end_of_a_process_ends_the_output_of_its_closed_terminal() {
    let (_out, stdout, _shown) = fifo();
    let stdio = Stdio {
        stdout: Some(stdout),
        terminal: true,
        ..Stdio::default()
    };
    let (mut pump, _open) = closed_terminal(stdio);
    assert!(!pump.outputs.ended(Duration::from_millis(50)).await);
    assert!(pump.take_outlet().taken().await);
    assert!(pump.outputs.ended(BOUND).await);
}

#[tokio::test]
async fn only_a_terminal_can_be_resized() {
    let (pump, _ends) = Pump::pipes(Stdio::default()).unwrap();
    let error = pump.resize(80, 25).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
}

#[tokio::test]
async fn output_goes_to_files_and_dev_null_as_well() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (pump, ends) = Pump::pipes(Stdio {
        stdout: Some(file.reopen().unwrap().into()),
        stderr: Some(
            File::options()
                .write(true)
                .open("/dev/null")
                .unwrap()
                .into(),
        ),
        ..Stdio::default()
    })
    .unwrap();
    for end in [ends.stdout, ends.stderr] {
        File::from(end.unwrap()).write_all(b"text").unwrap();
    }
    assert!(pump.drained(BOUND).await);
    assert_eq!(std::fs::read(file.path()).unwrap(), b"text");
}

#[tokio::test]
async fn a_process_goes_on_when_nobody_can_take_its_output() {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    drop(reader);
    let (pump, ends) = Pump::pipes(Stdio {
        stdout: Some(writer),
        ..Stdio::default()
    })
    .unwrap();
    let process =
        std::thread::spawn(move || File::from(ends.stdout.unwrap()).write_all(&pattern(300_000)));
    assert!(pump.drained(BOUND).await);
    process.join().unwrap().unwrap();
}
