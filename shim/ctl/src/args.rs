//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::client::Change;
use crate::duration::{parse_grace, parse_timeout};
use crate::error::EXIT_CODES;
use crate::migration::After;
use crate::resolve::Word;
use crate::text::Format;

/// Asks Dyad's shims on this host what Kubernetes cannot ask for.
///
/// Pause, resume, stop, start and restart act in place: the pod keeps its name, uid,
/// address, disks and restart count, and kubelet sees it Running throughout.
#[derive(Debug, Parser)]
#[command(name = "dyadctl", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub options: Options,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, Args)]
pub struct Options {
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Format,
    /// Only pods of this Kubernetes namespace
    #[arg(short, long, global = true, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Where shims keep their sockets [default: the configuration's state_dir, else /run/dyad]
    #[arg(long, global = true, value_name = "DIR", env = "DYAD_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Dyad's configuration [default: /etc/dyad/config.toml and /etc/dyad/config.d/*.toml]
    #[arg(long, global = true, value_name = "FILE", env = "DYAD_CONFIG")]
    pub config: Option<PathBuf>,
    /// How long a shim may take to answer [default: 3s; for a change 2m and its grace]
    #[arg(long, global = true, value_name = "TIME", value_parser = parse_timeout)]
    pub timeout: Option<Duration>,
}

impl Options {
    /// How long a shim may take to say how it is.
    pub fn ask_timeout(&self) -> Duration {
        self.timeout.unwrap_or(Duration::from_secs(3))
    }

    /// How long a shim may take to do `change`; a machine may have to boot.
    pub fn change_timeout(&self, change: Change) -> Duration {
        self.timeout
            .unwrap_or(Duration::from_secs(120) + change.grace())
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the pods of all shims, and shims that do not answer
    #[command(visible_aliases = ["ls", "ps"])]
    List,
    /// Show a pod: its tasks' true states, its machine, its shim
    State(PodArgument),
    /// Print transitions as they happen, of one pod or of all
    Watch {
        /// Name, uid, sandbox id or container id, or the beginning of one
        #[arg(value_name = "POD[/CONTAINER]")]
        pod: Option<Word>,
    },
    /// Freeze: containers by their cgroup, a machine by its vCPUs
    Pause(PodArgument),
    /// Go on after pause
    #[command(visible_alias = "unpause")]
    Resume(PodArgument),
    /// End the processes, or power the machine off; the pod and all it has stay
    Stop {
        /// What to stop.
        #[command(flatten)]
        pod: PodArgument,
        /// Time to end by itself before it is killed [default: 30s]; 0 kills at once
        #[arg(long, value_name = "TIME", value_parser = parse_grace)]
        grace: Option<Duration>,
    },
    /// Run again what stop ended
    Start(PodArgument),
    /// Stop and start in one; a machine's guest reboots
    #[command(visible_alias = "soft-reboot")]
    Restart {
        /// What to restart.
        #[command(flatten)]
        pod: PodArgument,
        /// Reset the machine, or kill the processes, without asking them
        #[arg(long, conflicts_with = "grace")]
        force: bool,
        /// Time to end by itself before it is killed [default: 30s]
        #[arg(long, value_name = "TIME", value_parser = parse_grace)]
        grace: Option<Duration>,
    },
    /// restart --force
    Reset(PodArgument),
    /// Move a pod to another node, where a target pod waits for it
    ///
    /// The target is a pod of the same spec with the annotation dyad.dev/migration-source:
    /// UUID, where UUID is the machine's as `dyadctl state` tells it; its init containers are named
    /// in dyad.dev/migration-init-containers. What forbids the move is told before anything moves;
    /// one that fails or is cancelled leaves the pod running here.
    Migrate(Box<MigrateArguments>),
    /// Attach this terminal to the machine's serial console (ctrl-] leaves)
    ///
    /// One client at a time can be attached. Without a terminal on standard input, what
    /// comes from there is sent as it is, and output goes on after its end.
    Console(PodArgument),
    /// Check whether this host can run both kinds of pods, and say how to mend it
    Check {
        /// containerd's CRI socket
        #[arg(
            long,
            value_name = "ENDPOINT",
            env = "CONTAINER_RUNTIME_ENDPOINT",
            default_value = "unix:///run/containerd/containerd.sock"
        )]
        runtime_endpoint: String,
    },
    /// Remove what pods left here that nobody owns any more: after a power cut, or when libvirt
    /// did not answer
    ///
    /// Shims do so by themselves when a pod starts. What a live shim or containerd still owns is
    /// never touched.
    Sweep {
        /// containerd's CRI socket
        #[arg(
            long,
            value_name = "ENDPOINT",
            env = "CONTAINER_RUNTIME_ENDPOINT",
            default_value = "unix:///run/containerd/containerd.sock"
        )]
        runtime_endpoint: String,
    },
    /// Show the effective configuration, and where each value comes from
    Config,
    /// Print a completion script
    Completion {
        /// For this shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the version
    Version,
}

/// Names a pod, or one of its containers.
#[derive(Debug, Args)]
pub struct PodArgument {
    /// Name, uid, sandbox id or container id, or the beginning of one
    #[arg(value_name = "POD[/CONTAINER]")]
    pub pod: Word,
}

/// How to move.
#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// What moves.
    #[command(flatten)]
    pub pod: PodArgument,
    /// Where to: a machine to the other node's libvirt (qemu+tls://node2/system), containers to
    /// the target pod's migration socket or address
    #[arg(long, value_name = "URI", required_unless_present = "cancel")]
    pub to: Option<String>,
    /// First make the target pod, over this CRI endpoint of the other node's containerd (for
    /// setups without an API server); it is removed again if the pod does not arrive
    #[arg(long, value_name = "ENDPOINT", requires = "to")]
    pub create_target: Option<String>,
    /// The CRI endpoint of this node's containerd, which knows how the pod was asked for
    #[arg(
        long,
        value_name = "ENDPOINT",
        env = "CONTAINER_RUNTIME_ENDPOINT",
        default_value = "unix:///run/containerd/containerd.sock"
    )]
    pub runtime_endpoint: String,
    /// Give up the migration that is under way
    #[arg(long, conflicts_with = "to")]
    pub cancel: bool,
    /// Machine: where the memory goes: tcp://HOST[:PORT] or unix:///PATH [default: libvirt's choice]
    #[arg(long, value_name = "URI")]
    pub migrate_uri: Option<String>,
    /// Machine: where the disks go [default: as the memory]
    #[arg(long, value_name = "URI")]
    pub disks_uri: Option<String>,
    /// At most so many MiB per second
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub bandwidth: u64,
    /// How long the pod may stand still at the switch [default: QEMU's 300ms]
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    pub max_downtime: Option<Duration>,
    /// How long it may take in all
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    pub max_time: Option<Duration>,
    /// What to do then
    #[arg(long, value_enum, default_value_t, requires = "max_time")]
    pub then: After,
    /// Slow the pod down when it changes memory faster than it is copied
    #[arg(long)]
    pub auto_converge: bool,
    /// Connections for the memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub parallel: u32,
    /// Refuse to send anything that is not encrypted
    #[arg(long, conflicts_with = "allow_clear")]
    pub tls: bool,
    /// Allow a network connection that is not encrypted
    #[arg(long)]
    pub allow_clear: bool,
    /// Containers: take open TCP connections along, where the address moves too
    #[arg(long)]
    pub tcp_established: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn virtctls_words_are_understood() {
        assert!(matches!(
            parse("dyadctl unpause web"),
            Ok(Command::Resume(_))
        ));
        assert!(matches!(
            parse("dyadctl soft-reboot web"),
            Ok(Command::Restart { force: false, .. })
        ));
        assert!(matches!(parse("dyadctl reset web"), Ok(Command::Reset(_))));
        for word in ["list", "ls", "ps"] {
            assert!(matches!(
                parse(&format!("dyadctl {word}")),
                Ok(Command::List)
            ));
        }
    }

    #[test]
    fn a_target_is_a_pod_or_a_container_of_it() {
        let Ok(Command::Stop { pod, grace }) = parse("dyadctl stop web/app --grace 1m") else {
            panic!("no stop");
        };
        assert_eq!(
            (pod.pod.pod.as_str(), pod.pod.container.as_deref()),
            ("web", Some("app"))
        );
        assert_eq!(grace, Some(Duration::from_secs(60)));
        assert!(matches!(
            parse("dyadctl watch"),
            Ok(Command::Watch { pod: None })
        ));
    }

    #[test]
    fn nonsense_is_refused() {
        for (line, kind) in [
            ("dyadctl pause", ErrorKind::MissingRequiredArgument),
            ("dyadctl pause a/b/c", ErrorKind::ValueValidation),
            ("dyadctl stop web --grace 25h", ErrorKind::ValueValidation),
            ("dyadctl stop web --grace -1s", ErrorKind::UnknownArgument),
            (
                "dyadctl restart web --force --grace 1s",
                ErrorKind::ArgumentConflict,
            ),
            ("dyadctl list --timeout 0", ErrorKind::ValueValidation),
            ("dyadctl list -o yaml", ErrorKind::InvalidValue),
            ("dyadctl frobnicate", ErrorKind::InvalidSubcommand),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), kind, "{line}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn options_may_stand_behind_the_command() {
        let cli = Cli::try_parse_from(["dyadctl", "list", "-o", "json", "-n", "prod"]).unwrap();
        assert_eq!(cli.options.output, Format::Json);
        assert_eq!(cli.options.namespace.as_deref(), Some("prod"));
    }

    #[test]
    fn a_change_may_take_its_grace_and_a_boot() {
        let options = Cli::try_parse_from(["dyadctl", "list"]).unwrap().options;
        let long = Change::Stop {
            grace: Some(Duration::from_secs(600)),
        };
        assert_eq!(options.change_timeout(long), Duration::from_secs(720));
        assert_eq!(
            options.change_timeout(Change::Pause),
            Duration::from_secs(120)
        );
    }
}
