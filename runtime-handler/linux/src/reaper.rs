//! The one owner of `waitpid(-1)`.
//!
//! A shim (or the guest's init) is the subreaper of processes that it did not start
//! itself: `runc create` exits and leaves the container's init to us, which may be
//! dead before we read its pid. So every exit is reaped here, in one place, and
//! handed to whoever named the pid, before or after.
//!
//! ```text
//!  spawn ----> waiting[pid] --exit--> Waiter
//!  claim ----> waiting[pid] --exit--> Waiter
//!                 exit, pid unknown, an Expectation is held --> unclaimed --claim--> Waiter
//!                 exit, pid unknown, nobody expects any     --> dropped (an orphan)
//! ```
//!
//! The lock is held while a child is spawned and while exits are reaped, so an exit
//! can never fall between `fork` and the entry of its waiter; and a pid that is
//! still in `waiting` is unreaped, so [`Reaper::kill`] cannot hit a recycled one.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use dyad_runtime_handler::handler::Exit;

/// How many exits of unknown pids are kept for a later [`Reaper::claim`]. A pod that
/// shares the host's pid namespace sends us all its orphans; the one that is looked
/// for is among the last.
const UNCLAIMED_MAX: usize = 1024;

/// Reaps every child of this process. One per process.
#[derive(Debug)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Live (or not yet reaped) processes that somebody waits for.
    waiting: HashMap<i32, Vec<oneshot::Sender<Exit>>>,
    /// Exits of pids that nobody has named yet, oldest first.
    unclaimed: VecDeque<(i32, Exit)>,
    /// Held [`Expectation`]s.
    expectations: usize,
}

/// A child that [`Reaper::spawn`] started.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid.
    pub pid: u32,
    /// Its stdin, where piped.
    pub stdin: Option<ChildStdin>,
    /// Its stdout, where piped.
    pub stdout: Option<ChildStdout>,
    /// Its stderr, where piped.
    pub stderr: Option<ChildStderr>,
    /// Its end.
    pub exit: Waiter,
}

/// Waits for one process. Dropping it loses nothing but the interest.
#[derive(Debug)]
pub struct Waiter {
    receiver: oneshot::Receiver<Exit>,
    /// Keeps the sender's table alive, so that the receiver always gets an answer.
    _reaper: Arc<Reaper>,
}

impl Waiter {
    /// How and when the process ended.
    pub async fn wait(self) -> Exit {
        match self.receiver.await {
            Ok(exit) => exit,
            // The sender leaves the table only by sending, and we hold the table.
            Err(_) => std::future::pending().await,
        }
    }

    /// The exit, where the process has been reaped already.
    pub fn try_wait(&mut self) -> Option<Exit> {
        self.receiver.try_recv().ok()
    }
}

/// While held, exits of unknown pids are kept, so that a process which another one
/// starts for us may die before we learn its pid.
#[derive(Debug)]
pub struct Expectation {
    reaper: Arc<Reaper>,
}

impl Expectation {
    /// See [`Reaper::claim`].
    pub fn claim(&self, pid: u32) -> Waiter {
        self.reaper.claim(pid)
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.unclaimed = VecDeque::new();
        }
    }
}

impl Reaper {
    /// Makes this process a subreaper and reaps on the current tokio runtime for as
    /// long as that runs. Call once per process, before the first child.
    ///
    /// # Errors
    /// The signal handler could not be installed.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start() -> io::Result<Arc<Self>> {
        nix::sys::prctl::set_child_subreaper(true)?;
        let child = signal(SignalKind::child())?;
        let reaper = Arc::new(Self {
            table: Mutex::new(Table::default()),
        });
        reaper.reap();
        tokio::spawn(reap_on(child, Arc::downgrade(&reaper)));
        Ok(reaper)
    }

    /// Starts `command` so that its exit cannot be missed. `wait` must not be called
    /// on the child by other means.
    ///
    /// # Errors
    /// The program could not be run.
    pub fn spawn(self: &Arc<Self>, command: &mut Command) -> io::Result<Spawned> {
        let mut table = self.lock();
        let mut child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        let pid = child.id();
        table.waiting.insert(pid as i32, vec![sender]);
        Ok(Spawned {
            pid,
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            exit: Waiter {
                receiver,
                _reaper: Arc::clone(self),
            },
        })
    }

    /// From now on keeps exits of unknown pids. Take it before starting the process
    /// that will tell the pid, hold it until [`Expectation::claim`].
    #[must_use]
    pub fn expect(self: &Arc<Self>) -> Expectation {
        self.lock().expectations += 1;
        Expectation {
            reaper: Arc::clone(self),
        }
    }

    /// Waits for `pid`, which is our child, will be (when the process between us
    /// ends), or was and died under an [`Expectation`].
    pub fn claim(self: &Arc<Self>, pid: u32) -> Waiter {
        let pid = pid as i32;
        let (sender, receiver) = oneshot::channel();
        let mut table = self.lock();
        match table.take_unclaimed(pid) {
            // A live child of the same pid means that the exit we kept was that of an
            // earlier process.
            Some(exit) if !is_child(pid) => {
                let _ = sender.send(exit);
            }
            _ => table.waiting.entry(pid).or_default().push(sender),
        }
        drop(table);
        Waiter {
            receiver,
            _reaper: Arc::clone(self),
        }
    }

    /// Signals a process that was spawned or claimed here, and only while it has not
    /// been reaped: never a stranger that got its pid.
    ///
    /// # Errors
    /// `ESRCH` when it has ended or was never ours; else what `kill(2)` says.
    pub fn kill(&self, pid: u32, signal: i32) -> nix::Result<()> {
        let table = self.lock();
        if !table.waiting.contains_key(&(pid as i32)) {
            return Err(Errno::ESRCH);
        }
        kill_raw(pid as i32, signal)
    }

    /// Hands out every exit there is.
    fn reap(&self) {
        let mut table = self.lock();
        while let Some((pid, status)) = reap_one() {
            let exit = Exit {
                status,
                at: SystemTime::now(),
            };
            table.deliver(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn deliver(&mut self, pid: i32, exit: Exit) {
        if let Some(waiters) = self.waiting.remove(&pid) {
            for waiter in waiters {
                // The waiter may have lost interest.
                let _ = waiter.send(exit);
            }
        } else if self.expectations > 0 {
            if self.unclaimed.len() == UNCLAIMED_MAX {
                self.unclaimed.pop_front();
            }
            self.unclaimed.push_back((pid, exit));
        }
    }

    /// The last exit kept for `pid`.
    fn take_unclaimed(&mut self, pid: i32) -> Option<Exit> {
        let index = self.unclaimed.iter().rposition(|(of, _)| *of == pid)?;
        self.unclaimed.remove(index).map(|(_, exit)| exit)
    }
}

async fn reap_on(mut child: Signal, reaper: Weak<Reaper>) {
    while child.recv().await.is_some() {
        let Some(reaper) = reaper.upgrade() else {
            return;
        };
        reaper.reap();
    }
}

/// Reaps one child that has ended: its pid and exit code, or 128 + signal. Not nix's
/// `waitpid`: that turns death by a real-time signal into an error and loses the pid.
fn reap_one() -> Option<(i32, u32)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the call to write to.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            0 => return None,
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return None,
            pid if libc::WIFEXITED(status) => {
                return Some((pid, libc::WEXITSTATUS(status) as u32));
            }
            pid if libc::WIFSIGNALED(status) => {
                return Some((pid, 128 + libc::WTERMSIG(status) as u32));
            }
            // Stops and continues are reported only when asked for.
            _ => {}
        }
    }
}

/// Whether `pid` is a child of ours, dead or alive, that is not reaped yet.
fn is_child(pid: i32) -> bool {
    waitid(
        Id::Pid(Pid::from_raw(pid)),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT,
    ) != Err(Errno::ECHILD)
}

/// `kill(2)` for any signal number, real-time ones too.
///
/// # Errors
/// What the call says: `ESRCH`, `EPERM`, or `EINVAL` for a number that is no signal.
pub fn kill_raw(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::sync::OnceLock;
    use std::time::Duration;

    use tokio::runtime::Runtime;
    use tokio::time::timeout;

    use super::*;

    /// `waitpid(-1)` is the process's, and so is the reaper: all tests share one, and
    /// the runtime that drives it.
    fn with_reaper<F: Future>(test: impl FnOnce(Arc<Reaper>) -> F) -> F::Output {
        static SHARED: OnceLock<(Runtime, Arc<Reaper>)> = OnceLock::new();
        let (runtime, reaper) = SHARED.get_or_init(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let reaper = runtime.block_on(async { Reaper::start().unwrap() });
            (runtime, reaper)
        });
        runtime.block_on(async {
            timeout(Duration::from_secs(20), test(Arc::clone(reaper)))
                .await
                .expect("test takes too long")
        })
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    async fn read_pid(stdout: Option<ChildStdout>) -> u32 {
        let mut stdout =
            tokio::net::unix::pipe::Receiver::from_owned_fd(stdout.unwrap().into()).unwrap();
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut text)
            .await
            .unwrap();
        text.trim().parse().unwrap()
    }

    #[test]
    fn exit_codes_and_signals_come_through() {
        with_reaper(|reaper| async move {
            for (script, status) in [
                ("exit 0", 0),
                ("exit 37", 37),
                ("kill -9 $$", 137),
                ("kill -TERM $$", 143),
                ("kill -40 $$", 168),
            ] {
                let child = reaper.spawn(&mut sh(script)).unwrap();
                assert_eq!(child.exit.wait().await.status, status, "{script}");
            }
        });
    }

    #[test]
    fn a_program_that_cannot_run_is_an_error() {
        with_reaper(|reaper| async move {
            let error = reaper.spawn(&mut Command::new("/no/such/program"));
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn a_grandchild_that_died_before_it_was_claimed_is_not_missed() {
        with_reaper(|reaper| async move {
            let expectation = reaper.expect();
            // It ends when its stdin does, which is after its parent (who, being a shell,
            // would reap it): so it is a stranger's child that comes to us.
            let script = "exec 3<&0; sh -c 'read x; exit 5' <&3 >/dev/null & echo $!; exec true";
            let mut command = sh(script);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut parent = reaper.spawn(&mut command).unwrap();
            let pid = read_pid(parent.stdout.take()).await;
            assert_eq!(parent.exit.wait().await.status, 0);
            drop(parent.stdin.take());
            let proc = format!("/proc/{pid}");
            while std::fs::exists(&proc).unwrap() {
                tokio::task::yield_now().await;
            }
            assert_eq!(expectation.claim(pid).wait().await.status, 5);
        });
    }

    #[test]
    fn a_grandchild_that_lives_is_waited_for_and_killed() {
        with_reaper(|reaper| async move {
            let expectation = reaper.expect();
            let mut command = sh("sleep 1000 >/dev/null & echo $!");
            let mut parent = reaper.spawn(command.stdout(Stdio::piped())).unwrap();
            let pid = read_pid(parent.stdout.take()).await;
            parent.exit.wait().await;
            let exit = expectation.claim(pid);
            drop(expectation);
            reaper.kill(pid, libc::SIGKILL).unwrap();
            assert_eq!(exit.wait().await.status, 137);
            assert_eq!(reaper.kill(pid, libc::SIGKILL), Err(Errno::ESRCH));
        });
    }

    #[test]
    fn a_stranger_is_never_signalled() {
        with_reaper(|reaper| async move {
            assert_eq!(reaper.kill(1, 0), Err(Errno::ESRCH));
        });
    }

    #[test]
    fn exits_of_strangers_are_bounded_and_forgotten() {
        let exit = |status| Exit {
            status,
            at: SystemTime::UNIX_EPOCH,
        };
        let mut table = Table::default();
        table.deliver(7, exit(1));
        assert!(table.unclaimed.is_empty(), "nobody expects any");

        table.expectations = 1;
        for pid in 0..2 * UNCLAIMED_MAX as i32 {
            table.deliver(pid, exit(0));
        }
        assert_eq!(table.unclaimed.len(), UNCLAIMED_MAX);
        table.deliver(1_000_000, exit(3));
        table.deliver(1_000_000, exit(4));
        assert_eq!(table.take_unclaimed(1_000_000), Some(exit(4)), "the last");
    }
}
