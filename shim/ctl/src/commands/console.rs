//! `dyadctl console`: this terminal on the machine's serial line.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::thread;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::Options;
use crate::client::{ConsoleReader, ConsoleWriter};
use crate::error::{Error, Result};
use crate::fleet::{Fleet, connect};
use crate::resolve::Word;
use crate::terminal::Raw;
use crate::text::printable;

/// ctrl-], which leaves the console (as virsh, telnet).
const ESCAPE: u8 = 0x1d;

/// Attaches to the console of the pod that `word` names, until it ends or is left.
///
/// # Errors
/// [`Error::Refused`]: a console is attached already, or there is none.
/// [`Error::Signal`]: ended from outside.
pub async fn run(fleet: &Fleet, word: &Word, options: &Options) -> Result<()> {
    let (place, named) = fleet.find(word, options.namespace.as_deref())?;
    let client = connect(place, options.ask_timeout()).await?;
    let (writer, mut reader) = client.console().await?;
    let terminal = io::stdin().is_terminal();
    let ended = {
        // First: from the moment that the terminal is raw, a signal must find us listening.
        let from_outside = ended_from_outside()?;
        let raw = if terminal {
            let raw =
                Raw::begin().map_err(|error| Error::failed("make the terminal raw", error))?;
            // From here on every key is the machine's.
            let label = named.pod.label();
            eprint!(
                "dyadctl: the console of {}; ctrl-] leaves\r\n",
                printable(&label)
            );
            Some(raw)
        } else {
            None
        };
        let ended = tokio::select! {
            result = output(&mut reader) => result.map(|()| "the console has ended"),
            result = input(&writer, typed(terminal), terminal) => result.map(|()| "left the console"),
            number = from_outside => Err(Error::Signal(number)),
        };
        drop(raw);
        ended
    };
    let text = ended?;
    if terminal {
        // A new line: the cursor is wherever the guest left it.
        eprintln!("\ndyadctl: {text}");
    }
    Ok(())
}

/// Copies what the machine writes until it ends.
async fn output(reader: &mut ConsoleReader) -> Result<()> {
    while let Some(data) = reader.read().await? {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(&data)
            .and_then(|()| stdout.flush())
            .map_err(Error::Output)?;
    }
    Ok(())
}

/// Sends what is typed until the escape key. When standard input ends, output goes on.
async fn input(
    writer: &ConsoleWriter,
    mut typed: mpsc::Receiver<Vec<u8>>,
    terminal: bool,
) -> Result<()> {
    while let Some(data) = typed.recv().await {
        let (send, leave) = if terminal {
            until_escape(data)
        } else {
            (data, false)
        };
        // Where sending fails, reading tells why.
        if !send.is_empty() && writer.write(send).await.is_err() {
            break;
        }
        if leave {
            writer.close().await;
            return Ok(());
        }
    }
    // The stream stays open: closing our half would end the console.
    std::future::pending().await
}

/// What is to be sent of `data`, and whether the escape key came behind it.
fn until_escape(mut data: Vec<u8>) -> (Vec<u8>, bool) {
    match data.iter().position(|byte| *byte == ESCAPE) {
        Some(at) => {
            data.truncate(at);
            (data, true)
        }
        None => (data, false),
    }
}

/// Standard input as it comes. A thread, because a terminal cannot be read without
/// blocking unless its open file, which the user's shell shares, is changed. It ends with
/// the process.
fn typed(terminal: bool) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    // Where no thread can be made the sender is dropped: nothing is typed.
    let _ = thread::Builder::new().name("typed".into()).spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) if terminal => {
                    // The terminal is gone: as if it had been left.
                    let _ = sender.blocking_send(vec![ESCAPE]);
                    break;
                }
                Ok(0) => break,
                Ok(count) => {
                    if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    });
    receiver
}

/// Listens from now on; then, the signal that asks us to end.
fn ended_from_outside() -> Result<impl Future<Output = i32>> {
    let of =
        |kind: SignalKind| signal(kind).map_err(|error| Error::failed("wait for signals", error));
    let mut terminate = of(SignalKind::terminate())?;
    let mut hangup = of(SignalKind::hangup())?;
    let mut interrupt = of(SignalKind::interrupt())?;
    let mut quit = of(SignalKind::quit())?;
    Ok(async move {
        let kind = tokio::select! {
            _ = terminate.recv() => SignalKind::terminate(),
            _ = hangup.recv() => SignalKind::hangup(),
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = quit.recv() => SignalKind::quit(),
        };
        kind.as_raw_value()
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::{FakeShim, State, state_of};

    #[test]
    fn the_escape_key_leaves_and_what_came_before_is_sent() {
        assert_eq!(until_escape(b"ls\r".to_vec()), (b"ls\r".to_vec(), false));
        assert_eq!(
            until_escape(b"ls\r\x1dxyz".to_vec()),
            (b"ls\r".to_vec(), true)
        );
        assert_eq!(until_escape(vec![ESCAPE]), (vec![], true));
    }

    #[tokio::test]
    async fn bytes_go_both_ways_until_the_end_and_a_second_client_is_refused() {
        let state = State::new();
        let _shim = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let limit = Duration::from_secs(10);
        let fleet = Fleet::ask(state.path(), limit).await.unwrap();
        let (place, _) = fleet.find(&"web".parse().unwrap(), None).unwrap();
        let client = connect(place, limit).await.unwrap();
        let (writer, mut reader) = client.console().await.unwrap();
        writer.write(b"hello".to_vec()).await.unwrap();
        assert_eq!(reader.read().await.unwrap().unwrap(), b"hello");

        let second = connect(place, limit).await.unwrap();
        let (_writer, mut refused) = second.console().await.unwrap();
        let error = refused.read().await.unwrap_err();
        assert_eq!(
            (error.exit_code(), error.chain().as_str()),
            (4, "another console is attached")
        );

        writer.write(b"end".to_vec()).await.unwrap();
        assert_eq!(reader.read().await.unwrap(), None);
    }
}
