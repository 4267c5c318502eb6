//! What is said to an OCI runtime, and how its answer is understood. Pure.
//!
//! The command line is the one that runc and crun share; nothing specified it, so
//! runc's is the reference (`man/runc*.8.md`).

use std::ffi::{OsStr, OsString};
use std::path::Path;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::spec::Checkpoint;
use serde::Deserialize;

/// What stands before the command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Global<'a> {
    /// Where the runtime keeps its state.
    pub root: &'a Path,
    /// Where it writes its errors, as JSON lines.
    pub log: &'a Path,
    /// Cgroups are made by systemd.
    pub systemd_cgroup: bool,
}

/// One command.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Command<'a> {
    Create {
        id: &'a str,
        bundle: &'a Path,
        pid_file: &'a Path,
        console_socket: Option<&'a Path>,
        no_pivot: bool,
        no_new_keyring: bool,
    },
    Start {
        id: &'a str,
    },
    Exec {
        id: &'a str,
        process: &'a Path,
        pid_file: &'a Path,
        console_socket: Option<&'a Path>,
    },
    Pause {
        id: &'a str,
    },
    Resume {
        id: &'a str,
    },
    /// Reads the resources from its stdin.
    Update {
        id: &'a str,
    },
    /// Removes one without processes; with `force` whatever its state, also if there is
    /// none.
    Delete {
        id: &'a str,
        force: bool,
    },
    /// Writes what it is to `images`; it stays as it was, frozen if it was frozen.
    Checkpoint {
        id: &'a str,
        images: &'a Path,
        work: &'a Path,
        /// Images of a pre-dump before this one, relative to `images`.
        parent: Option<&'a Path>,
        /// Memory alone, while it runs; the next one writes only what changed since.
        pre_dump: bool,
        tcp_established: bool,
        criu: Criu<'a>,
    },
    /// Writes it down as a client wants it.
    Save {
        id: &'a str,
        work: &'a Path,
        to: &'a Checkpoint,
        criu: Criu<'a>,
    },
    /// Makes it from `images`, running.
    Restore {
        id: &'a str,
        bundle: &'a Path,
        pid_file: &'a Path,
        images: &'a Path,
        work: &'a Path,
        tcp_established: bool,
        criu: Criu<'a>,
    },
}

/// How the OCI runtime gets at CRIU, which it starts as `criu`, and what it has no
/// option for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Criu<'a> {
    /// Where the program is.
    pub dir: &'a Path,
    /// Read by CRIU before what the OCI runtime tells it.
    pub config: &'a Path,
}

impl Command<'_> {
    /// Its word, for messages.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Start { .. } => "start",
            Self::Exec { .. } => "exec",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Update { .. } => "update",
            Self::Delete { .. } => "delete",
            Self::Checkpoint { .. } | Self::Save { .. } => "checkpoint",
            Self::Restore { .. } => "restore",
        }
    }

    /// The arguments, without the program.
    pub(crate) fn argv(&self, global: Global<'_>) -> Vec<OsString> {
        let mut argv = Argv::default();
        argv.option("--root", global.root)
            .option("--log", global.log)
            .option("--log-format", "json");
        if global.systemd_cgroup {
            argv.word("--systemd-cgroup");
        }
        argv.word(self.word());
        match self {
            Self::Create {
                id,
                bundle,
                pid_file,
                console_socket,
                no_pivot,
                no_new_keyring,
            } => {
                argv.option("--bundle", bundle)
                    .option("--pid-file", pid_file);
                if let Some(socket) = console_socket {
                    argv.option("--console-socket", socket);
                }
                if *no_pivot {
                    argv.word("--no-pivot");
                }
                if *no_new_keyring {
                    argv.word("--no-new-keyring");
                }
                argv.word(id);
            }
            Self::Exec {
                id,
                process,
                pid_file,
                console_socket,
            } => {
                argv.option("--process", process)
                    .word("--detach")
                    .option("--pid-file", pid_file);
                if let Some(socket) = console_socket {
                    argv.option("--console-socket", socket);
                }
                argv.word(id);
            }
            Self::Update { id } => {
                argv.option("--resources", "-").word(id);
            }
            Self::Delete { id, force } => {
                if *force {
                    argv.word("--force");
                }
                argv.word(id);
            }
            Self::Start { id } | Self::Pause { id } | Self::Resume { id } => {
                argv.word(id);
            }
            Self::Checkpoint {
                id,
                images,
                work,
                parent,
                pre_dump,
                tcp_established,
                criu: _,
            } => {
                argv.option("--image-path", images)
                    .option("--work-path", work);
                if let Some(parent) = parent {
                    argv.option("--parent-path", parent);
                }
                argv.word(if *pre_dump {
                    "--pre-dump"
                } else {
                    "--leave-running"
                });
                argv.checkpoint_options(*tcp_established).word(id);
            }
            Self::Save {
                id,
                work,
                to,
                criu: _,
            } => {
                argv.option("--image-path", &to.images)
                    .option("--work-path", work);
                for (wanted, word) in [
                    (!to.exit, "--leave-running"),
                    (to.tcp_established, "--tcp-established"),
                    (to.external_unix_sockets, "--ext-unix-sk"),
                    (to.terminal, "--shell-job"),
                    (to.file_locks, "--file-locks"),
                ] {
                    if wanted {
                        argv.word(word);
                    }
                }
                for namespace in &to.empty_namespaces {
                    argv.option("--empty-ns", namespace);
                }
                let mode = match to.cgroups_mode.as_str() {
                    "" => "ignore",
                    mode => mode,
                };
                argv.option("--manage-cgroups-mode", mode).word(id);
            }
            Self::Restore {
                id,
                bundle,
                pid_file,
                images,
                work,
                tcp_established,
                criu: _,
            } => {
                argv.word("--detach")
                    .word("--no-subreaper")
                    .option("--bundle", bundle)
                    .option("--pid-file", pid_file)
                    .option("--image-path", images)
                    .option("--work-path", work)
                    .checkpoint_options(*tcp_established)
                    .word(id);
            }
        }
        argv.0
    }

    /// Variables for the runtime's process, beside those it inherits; `path` is the
    /// `PATH` that it would inherit.
    pub(crate) fn env(&self, path: Option<&OsStr>) -> Vec<(&'static str, OsString)> {
        let (Self::Checkpoint { criu, .. } | Self::Save { criu, .. } | Self::Restore { criu, .. }) =
            self
        else {
            return Vec::new();
        };
        let mut search = criu.dir.as_os_str().to_owned();
        if let Some(path) = path.filter(|path| !path.is_empty()) {
            search.push(":");
            search.push(path);
        }
        vec![
            ("PATH", search),
            ("CRIU_CONFIG_FILE", criu.config.as_os_str().to_owned()),
        ]
    }
}

#[derive(Default)]
struct Argv(Vec<OsString>);

impl Argv {
    fn word(&mut self, word: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(word.as_ref().to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.word(name).word(value)
    }

    /// Those that both sides must agree on. Cgroups are left to the OCI runtime, since
    /// the target's have other names.
    fn checkpoint_options(&mut self, tcp_established: bool) -> &mut Self {
        if tcp_established {
            self.word("--tcp-established");
        }
        self.word("--file-locks")
            .option("--manage-cgroups-mode", "ignore")
    }
}

/// The last error in the runtime's JSON log, which is the one it ended with.
pub(crate) fn error_in_log(log: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg)
}

/// The class of a runtime's refusal. It has nothing but English to tell it by; these
/// are the few that the caller can act on, anything else is `Other`.
pub(crate) fn classify(word: &str, name: &str, message: &str) -> Error {
    let says = |text: &str| message.contains(text);
    match word {
        // runc 1.0 to 1.4; crun.
        "create" if says("with given ID already exists") || says("` already exists") => {
            Error::AlreadyExists(format!("container {name}"))
        }
        // An exec in one that has just ended, or is paused.
        "exec"
            if says("cannot exec in a stopped container")
                || says("cannot exec in a paused container")
                || says("is not running")
                || says("is paused") =>
        {
            Error::FailedPrecondition(format!("exec in container {name}: {message}"))
        }
        // runc on cgroup v1, where its processes are not scheduled soon enough.
        "pause" if says("unable to freeze") => {
            Error::DeadlineExceeded(format!("OCI runtime pause failed: {message}"))
        }
        _ if says("container does not exist") => Error::NotFound(format!("container {name}")),
        // As containerd's own shim words it; people look for these words.
        _ => Error::other(format!("OCI runtime {word} failed"), message.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(command: Command<'_>, systemd_cgroup: bool) -> String {
        let global = Global {
            root: Path::new("/run/dyad/oci/k8s.io"),
            log: Path::new("/b/log"),
            systemd_cgroup,
        };
        command
            .argv(global)
            .join(OsStr::new(" "))
            .into_string()
            .unwrap()
    }

    #[test]
    fn command_lines() {
        let id = "web";
        let socket = Some(Path::new("/s"));
        let (bundle, pid_file) = (Path::new("/b"), Path::new("/b/init.pid"));
        let process = Path::new("/b/p.json");
        let global = "--root /run/dyad/oci/k8s.io --log /b/log --log-format json";
        for (command, expected) in [
            (
                Command::Create {
                    id,
                    bundle,
                    pid_file,
                    console_socket: None,
                    no_pivot: false,
                    no_new_keyring: false,
                },
                "create --bundle /b --pid-file /b/init.pid web",
            ),
            (
                Command::Create {
                    id,
                    bundle,
                    pid_file,
                    console_socket: socket,
                    no_pivot: true,
                    no_new_keyring: true,
                },
                "create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot --no-new-keyring web",
            ),
            (Command::Start { id }, "start web"),
            (
                Command::Exec {
                    id,
                    process,
                    pid_file,
                    console_socket: None,
                },
                "exec --process /b/p.json --detach --pid-file /b/init.pid web",
            ),
            (
                Command::Exec {
                    id,
                    process,
                    pid_file,
                    console_socket: socket,
                },
                "exec --process /b/p.json --detach --pid-file /b/init.pid --console-socket /s web",
            ),
            (Command::Pause { id }, "pause web"),
            (Command::Resume { id }, "resume web"),
            (Command::Update { id }, "update --resources - web"),
            (Command::Delete { id, force: false }, "delete web"),
            (Command::Delete { id, force: true }, "delete --force web"),
            (
                Command::Checkpoint {
                    id,
                    images: Path::new("/i/dump"),
                    work: Path::new("/w"),
                    parent: None,
                    pre_dump: false,
                    tcp_established: false,
                    criu: criu(),
                },
                "checkpoint --image-path /i/dump --work-path /w --leave-running --file-locks --manage-cgroups-mode ignore web",
            ),
            (
                Command::Checkpoint {
                    id,
                    images: Path::new("/i/pre-2"),
                    work: Path::new("/w"),
                    parent: Some(Path::new("../pre-1")),
                    pre_dump: true,
                    tcp_established: true,
                    criu: criu(),
                },
                "checkpoint --image-path /i/pre-2 --work-path /w --parent-path ../pre-1 --pre-dump --tcp-established --file-locks --manage-cgroups-mode ignore web",
            ),
            (
                Command::Restore {
                    id,
                    bundle,
                    pid_file,
                    images: Path::new("/i/dump"),
                    work: Path::new("/w"),
                    tcp_established: true,
                    criu: criu(),
                },
                "restore --detach --no-subreaper --bundle /b --pid-file /b/init.pid --image-path /i/dump --work-path /w --tcp-established --file-locks --manage-cgroups-mode ignore web",
            ),
        ] {
            assert_eq!(line(command, false), format!("{global} {expected}"));
            assert_eq!(
                line(command, true),
                format!("{global} --systemd-cgroup {expected}")
            );
        }
    }

    #[test]
    fn a_clients_checkpoint_has_the_options_that_it_asks_for() {
        let line = |to: &Checkpoint| {
            let work = Path::new("/w");
            let (id, criu) = ("web", criu());
            line(Command::Save { id, work, to, criu }, false)
        };
        let plain = Checkpoint {
            images: "/i".into(),
            ..Checkpoint::default()
        };
        assert!(line(&plain).ends_with(
            "checkpoint --image-path /i --work-path /w --leave-running --manage-cgroups-mode ignore web"
        ));
        let all = Checkpoint {
            exit: true,
            tcp_established: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "soft".into(),
            ..plain
        };
        assert!(line(&all).ends_with(
            "--work-path /w --tcp-established --ext-unix-sk --shell-job --file-locks --empty-ns network --manage-cgroups-mode soft web"
        ));
    }

    fn criu() -> Criu<'static> {
        Criu {
            dir: Path::new("/opt/criu"),
            config: Path::new("/w/criu.conf"),
        }
    }

    #[test]
    fn criu_is_found_and_told_by_the_environment() {
        let restore = Command::Restore {
            id: "web",
            bundle: Path::new("/b"),
            pid_file: Path::new("/p"),
            images: Path::new("/i"),
            work: Path::new("/w"),
            tcp_established: false,
            criu: criu(),
        };
        let env = |path: Option<&str>| restore.env(path.map(OsStr::new));
        assert_eq!(
            env(Some("/bin:/sbin")),
            [
                ("PATH", "/opt/criu:/bin:/sbin".into()),
                ("CRIU_CONFIG_FILE", "/w/criu.conf".into())
            ]
        );
        assert_eq!(env(None)[0].1, "/opt/criu");
        assert_eq!(env(Some(""))[0].1, "/opt/criu", "no working directory");
        let other = Command::Start { id: "web" };
        assert_eq!(other.env(Some(OsStr::new("/bin"))), []);
    }

    #[test]
    fn the_last_error_of_the_log_is_the_one() {
        let log = r#"{"level":"warning","msg":"careful","time":"t"}
{"level":"error","msg":"first","time":"t"}
{"level":"error","msg":"runc create failed: unable to start container process: exec: \"x\": not found","time":"t"}
{"level":"info","msg":"bye","time":"t"}
"#;
        assert_eq!(
            error_in_log(log).unwrap(),
            "runc create failed: unable to start container process: exec: \"x\": not found"
        );
    }

    #[test]
    fn a_log_without_an_error_or_without_sense_gives_none() {
        for log in [
            "",
            "\n",
            "panic: oh",
            "{\"level\":\"error\"}",
            "{\"level\":\"debug\",\"msg\":\"x\"}",
        ] {
            assert_eq!(error_in_log(log), None, "{log:?}");
        }
    }

    #[test]
    fn refusals_that_the_caller_can_act_on_keep_their_class() {
        let class = |word, message| classify(word, "web", message);
        assert!(matches!(
            class("create", "container with given ID already exists"),
            Error::AlreadyExists(_)
        ));
        assert!(matches!(
            class("create", "container `web` already exists"),
            Error::AlreadyExists(_)
        ));
        assert!(matches!(
            class(
                "exec",
                "cannot exec in a paused container (use --ignore-paused to override)"
            ),
            Error::FailedPrecondition(_)
        ));
        assert!(matches!(
            class("pause", "container does not exist"),
            Error::NotFound(_)
        ));
        assert!(matches!(
            class("pause", "unable to freeze"),
            Error::DeadlineExceeded(_)
        ));
        let other = class("create", "no such file: \"/x\" already exists not");
        assert_eq!(
            other.chain(),
            "OCI runtime create failed: no such file: \"/x\" already exists not"
        );
    }
}
