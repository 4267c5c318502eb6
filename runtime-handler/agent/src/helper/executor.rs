//! The last steps before the container's program: filter, capabilities, execve.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dyad_linux::pump::resize;
use dyad_runtime_handler::{Result, error::Context};
use libcontainer::capabilities::drop_privileges;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{AccessFlags, Uid, access, fchown};
use oci_spec::runtime::{LinuxCapabilities, Process, Spec};
use rustix::termios::tcgetwinsize;

use super::Job;
use crate::spec;

/// Marks the reason in libcontainer's chain of texts.
pub const CANNOT_RUN: &str = "cannot run: ";

/// What a shell says of a program that is not there, and of one that cannot run.
const NOT_FOUND_STATUS: i32 = 127;
const NOT_RUNNABLE_STATUS: i32 = 126;

/// Runs the container's program as the host's spec says.
#[derive(Clone)]
pub struct GuestExecutor {
    filter: Option<Rc<LoadedFilter>>,
    capabilities: Rc<LinuxCapabilities>,
    find_home: bool,
    is_init: bool,
}

struct LoadedFilter {
    instructions: Vec<libc::sock_filter>,
    flags: u32,
}

impl GuestExecutor {
    /// Reads what it needs while it still sees the guest's files.
    ///
    /// # Errors
    /// The filter cannot be read.
    pub fn new(job: &Job) -> Result<Self> {
        let filter = match &job.filter {
            None => None,
            Some(filter) => {
                let bytes = std::fs::read(&filter.file)
                    .context(|| format!("read {}", filter.file.display()))?;
                spec::check_filter(&bytes, filter.flags)?;
                Some(Rc::new(LoadedFilter {
                    instructions: instructions(&bytes),
                    flags: filter.flags,
                }))
            }
        };
        Ok(Self {
            filter,
            capabilities: Rc::new(job.capabilities.clone()),
            find_home: job.find_home,
            is_init: job.process.is_none(),
        })
    }

    /// Everything before execve that can fail, and execve. Returns why it did not run.
    fn run(&self, process: &Process) -> std::result::Result<Infallible, Refusal> {
        let program = find_program(process)?;
        let path = c_string(program.as_os_str().as_encoded_bytes())?;
        let arguments = process
            .args()
            .iter()
            .flatten()
            .map(|argument| c_string(argument.as_bytes()))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let environment = self.environment(process)?;
        if process.terminal() == Some(true) {
            prepare_terminal(process).map_err(Refusal::other("give the terminal to its user"))?;
        }
        default_sigpipe().map_err(Refusal::other("reset SIGPIPE"))?;
        // Where new privileges may be gained, a filter is loaded only with CAP_SYS_ADMIN; else
        // as late as can be, since it may refuse the dropping.
        if process.no_new_privileges() == Some(true) {
            self.drop_capabilities()?;
            self.load_filter()?;
        } else {
            self.load_filter()?;
            self.drop_capabilities()?;
        }
        let Err(error) = nix::unistd::execve(&path, &arguments, &environment);
        Err(Refusal {
            status: if error == Errno::ENOENT {
                NOT_FOUND_STATUS
            } else {
                NOT_RUNNABLE_STATUS
            },
            text: format!(
                "exec {}: {}",
                program.display(),
                error.desc().to_lowercase()
            ),
        })
    }

    fn load_filter(&self) -> std::result::Result<(), Refusal> {
        self.filter.as_ref().map_or(Ok(()), |filter| {
            filter
                .load()
                .map_err(Refusal::other("load the seccomp filter"))
        })
    }

    fn drop_capabilities(&self) -> std::result::Result<(), Refusal> {
        drop_privileges(&self.capabilities, create_syscall().as_ref())
            .map_err(Refusal::other("drop capabilities"))
    }

    /// The spec's variables in its order, with the user's HOME where it is to be looked up.
    fn environment(&self, process: &Process) -> std::result::Result<Vec<CString>, Refusal> {
        let entry = |entry: &String| {
            if self.find_home && spec::is_home(entry) {
                let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
                let home = spec::home(&passwd, process.user().uid());
                c_string(format!("HOME={home}").as_bytes())
            } else {
                c_string(entry.as_bytes())
            }
        };
        process.env().iter().flatten().map(entry).collect()
    }
}

/// Gives the terminal to the process's user, who opens it again by name, and its size.
fn prepare_terminal(process: &Process) -> nix::Result<()> {
    let stdin = std::io::stdin();
    let user = Uid::from_raw(process.user().uid());
    fchown(&stdin, Some(user), None)?;
    // Somebody may have resized it already, and knows better.
    if let Some((width, height)) = spec::console_size(process)
        && tcgetwinsize(&stdin).is_ok_and(|size| (size.ws_row, size.ws_col) == (0, 0))
    {
        let _ = resize(&stdin, width, height);
    }
    Ok(())
}

impl Executor for GuestExecutor {
    fn validate(&self, spec: &Spec) -> std::result::Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref().ok_or_else(|| {
            ExecutorValidationError::ArgValidationError("the spec has no process".into())
        })?;
        find_program(process).map(drop).map_err(|refusal| {
            ExecutorValidationError::ArgValidationError(format!("{CANNOT_RUN}{}", refusal.text))
        })
    }

    /// The environment is made from the spec, whose order libcontainer's map has lost.
    fn setup_envs(
        &self,
        _: HashMap<String, String>,
    ) -> std::result::Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> std::result::Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let Err(refusal) = self.run(process);
        log::error!("{}", refusal.text);
        if self.is_init {
            // Who started it has been told so already: say it where its output goes.
            let _ = writeln!(std::io::stderr(), "dyad: {}", refusal.text);
            std::process::exit(refusal.status);
        }
        Err(ExecutorError::Other(format!(
            "{CANNOT_RUN}{}",
            refusal.text
        )))
    }
}

/// Rust's runtime ignores SIGPIPE, and execve keeps what is ignored: `yes | head` would not
/// end, or end with an error.
fn default_sigpipe() -> nix::Result<()> {
    // SAFETY: no handler is installed, so none can run.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map(drop)
}

/// Why a program does not run.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    /// Exit code of an init that was started already.
    status: i32,
    text: String,
}

impl Refusal {
    fn other<E: std::error::Error>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| {
            let mut text = format!("{what}: {error}");
            if let Some(cause) = error.source() {
                text.push_str(&format!(": {cause}"));
            }
            Self {
                status: NOT_RUNNABLE_STATUS,
                text,
            }
        }
    }
}

/// Looks the program up as execvp does, in the container's root and PATH. The texts
/// are those of runc's `exec.LookPath`, which kubelet's users know.
fn find_program(process: &Process) -> std::result::Result<PathBuf, Refusal> {
    let name = process
        .args()
        .as_ref()
        .and_then(|arguments| arguments.first())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Refusal {
            status: NOT_FOUND_STATUS,
            text: "process.args is empty".into(),
        })?;
    if name.contains('/') {
        return check_program(Path::new(name))
            .map(|()| name.into())
            .map_err(|errno| Refusal {
                status: status_of(errno),
                text: format!(
                    "exec: {name:?}: stat {name}: {}",
                    errno.desc().to_lowercase()
                ),
            });
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut denied = false;
    for folder in path.split(':') {
        let program = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match check_program(&program) {
            Ok(()) => return Ok(program),
            Err(errno) => denied |= errno == Errno::EACCES,
        }
    }
    Err(if denied {
        Refusal {
            status: NOT_RUNNABLE_STATUS,
            text: format!("exec: {name:?}: permission denied"),
        }
    } else {
        Refusal {
            status: NOT_FOUND_STATUS,
            text: format!("exec: {name:?}: executable file not found in $PATH"),
        }
    })
}

fn status_of(errno: Errno) -> i32 {
    if errno == Errno::ENOENT {
        NOT_FOUND_STATUS
    } else {
        NOT_RUNNABLE_STATUS
    }
}

fn check_program(path: &Path) -> std::result::Result<(), Errno> {
    if nix::sys::stat::stat(path)?.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    access(path, AccessFlags::X_OK)
}

fn c_string(bytes: &[u8]) -> std::result::Result<CString, Refusal> {
    CString::new(bytes).map_err(|_| Refusal {
        status: NOT_RUNNABLE_STATUS,
        text: "process: a zero byte in an argument or variable".into(),
    })
}

/// The host is of the guest's architecture, so the bytes are in the kernel's order.
fn instructions(bytes: &[u8]) -> Vec<libc::sock_filter> {
    bytes
        .chunks_exact(8)
        .map(|chunk| libc::sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect()
}

impl LoadedFilter {
    fn load(&self) -> nix::Result<()> {
        let mut instructions = self.instructions.clone();
        let program = libc::sock_fprog {
            // check_filter has bounded it to 4096.
            len: instructions.len() as u16,
            filter: instructions.as_mut_ptr(),
        };
        // SAFETY: `program` points to `len` instructions that live until the call
        // returns; the kernel copies and checks them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
                libc::c_long::from(self.flags),
                &raw const program,
            )
        };
        Errno::result(result).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::ProcessBuilder;

    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        ProcessBuilder::default()
            .args(args.iter().map(ToString::to_string).collect::<Vec<_>>())
            .env(env.iter().map(ToString::to_string).collect::<Vec<_>>())
            .build()
            .unwrap()
    }

    #[test]
    fn programs_are_found_as_execvp_finds_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = format!("PATH=/nowhere:{}:/bin", folder.path().display());
        let found = find_program(&process(&["sh"], &[&path])).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
        let text = |args: &[&str]| find_program(&process(args, &[&path])).unwrap_err().text;
        assert_eq!(
            text(&["no-such"]),
            r#"exec: "no-such": executable file not found in $PATH"#
        );
        assert_eq!(
            text(&["/no/such"]),
            r#"exec: "/no/such": stat /no/such: no such file or directory"#
        );
        assert_eq!(
            text(&["/bin/"]),
            r#"exec: "/bin/": stat /bin/: is a directory"#
        );
        assert_eq!(text(&[""]), "process.args is empty");
    }

    #[test]
    fn the_environment_keeps_its_order_and_gains_home() {
        let executor = GuestExecutor {
            filter: None,
            capabilities: Rc::default(),
            find_home: true,
            is_init: true,
        };
        let environment = executor
            .environment(&process(&["x"], &["B=1", "A=2", "=odd", "HOME=/"]))
            .unwrap();
        let texts: Vec<_> = environment
            .iter()
            .map(|entry| entry.to_str().unwrap())
            .collect();
        assert_eq!(texts, ["B=1", "A=2", "=odd", "HOME=/root"]);
        assert!(executor.environment(&process(&["x"], &["A=\0"])).is_err());
    }

    #[test]
    fn instructions_keep_their_fields() {
        let mut bytes = Vec::new();
        bytes.extend(0x15u16.to_ne_bytes());
        bytes.extend([1, 2]);
        bytes.extend(0xc000_003eu32.to_ne_bytes());
        let found = &instructions(&bytes)[0];
        assert_eq!(
            (found.code, found.jt, found.jf, found.k),
            (0x15, 1, 2, 0xc000_003e)
        );
    }
}
