//! The only module that speaks ttrpc: one shim's `dyad.lifecycle.v1.Lifecycle`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_api::lifecycle::{
    CancelMigrationRequest, ConsoleData, MigrateRequest, MigrationStage, MigrationStatusRequest,
    PauseRequest, RestartRequest, ResumeRequest, StartRequest, StateRequest, StateResponse,
    StopRequest, Target, TaskState as WireState, TimeoutAction, WatchRequest,
};
use dyad_api::lifecycle_ttrpc::LifecycleClient;
use dyad_api::protobuf::EnumOrUnknown;
use dyad_api::ttrpc;
use nix::unistd::Uid;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::duration::human;
use crate::error::{Error, Result};
use crate::migration::{After, MigrationRequest, Progress};
use crate::model::{Machine, Pod, ShimProcess, Task, TaskState, Time, Transition};

/// What a pod can be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// End what runs, keep all else.
    Stop {
        /// Time to end by itself.
        grace: Option<Duration>,
    },
    /// Run again what was stopped.
    Start,
    /// Stop and start in one.
    Restart {
        /// Without asking the guest or the process.
        force: bool,
        /// Time to end by itself.
        grace: Option<Duration>,
    },
}

/// The grace that a shim gives where the request names none (lifecycle.proto).
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

impl Change {
    /// How much of the wait is grace.
    pub fn grace(self) -> Duration {
        match self {
            Self::Stop { grace }
            | Self::Restart {
                force: false,
                grace,
            } => grace.unwrap_or(DEFAULT_GRACE),
            Self::Pause | Self::Resume | Self::Start | Self::Restart { force: true, .. } => {
                Duration::ZERO
            }
        }
    }
}

/// A connection to one shim.
pub struct Client {
    rpc: LifecycleClient,
    socket: PathBuf,
}

impl Client {
    /// Connects to the shim that listens on `socket`.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: nobody listens, not within `limit`, or it is a process of
    /// another user than root and ourselves.
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let context = || format!("connect to {}", socket.display());
        let stream = within(limit, context(), async {
            UnixStream::connect(socket)
                .await
                .map_err(|error| Error::unreachable(context(), error))
        })
        .await?;
        let peer = stream
            .peer_cred()
            .map_err(|error| Error::unreachable(context(), error))?;
        if peer.uid() != 0 && peer.uid() != Uid::effective().as_raw() {
            let text = format!("a process of user {} listens there", peer.uid());
            return Err(Error::unreachable(context(), text));
        }
        let transport = ttrpc::asynchronous::transport::Socket::new(stream);
        Ok(Self {
            rpc: LifecycleClient::new(ttrpc::r#async::Client::new(transport)),
            socket: socket.to_owned(),
        })
    }

    /// The pod as it is.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: no answer within `limit`, or one that is no Dyad shim's.
    pub async fn state(&self, limit: Duration) -> Result<Pod> {
        let context = ttrpc::context::Context::default();
        within(limit, self.asked("State"), async {
            self.rpc
                .state(context, &StateRequest::new())
                .await
                .map(pod)
                .map_err(|error| {
                    // A shim that does not serve State is none of ours, or not of this age.
                    Error::unreachable(self.asked("State"), reason(error).1)
                })
        })
        .await
    }

    /// Does `change` to `container_id`, or to the whole pod where that is empty, and
    /// returns the state reached.
    ///
    /// # Errors
    /// As the shim answers; [`Error::Unreachable`] without an answer within `limit`.
    pub async fn change(&self, change: Change, container_id: &str, limit: Duration) -> Result<Pod> {
        let target = dyad_api::protobuf::MessageField::some(Target {
            container_id: container_id.into(),
            ..Target::default()
        });
        let special_fields = dyad_api::protobuf::SpecialFields::new();
        let context = ttrpc::context::Context::default();
        let rpc = &self.rpc;
        let (name, answer) = match change {
            Change::Pause => {
                let request = PauseRequest {
                    target,
                    special_fields,
                };
                ("Pause", timeout(limit, rpc.pause(context, &request)).await)
            }
            Change::Resume => {
                let request = ResumeRequest {
                    target,
                    special_fields,
                };
                (
                    "Resume",
                    timeout(limit, rpc.resume(context, &request)).await,
                )
            }
            Change::Stop { grace } => {
                let request = StopRequest {
                    target,
                    grace_ms: grace.map(milliseconds),
                    special_fields,
                };
                ("Stop", timeout(limit, rpc.stop(context, &request)).await)
            }
            Change::Start => {
                let request = StartRequest {
                    target,
                    special_fields,
                };
                ("Start", timeout(limit, rpc.start(context, &request)).await)
            }
            Change::Restart { force, grace } => {
                let request = RestartRequest {
                    target,
                    force,
                    grace_ms: grace.map(milliseconds),
                    special_fields,
                };
                (
                    "Restart",
                    timeout(limit, rpc.restart(context, &request)).await,
                )
            }
        };
        match answer {
            Ok(answer) => answer.map(pod).map_err(|error| self.error(name, error)),
            Err(_) => Err(Error::unreachable(
                self.asked(name),
                format!(
                    "no answer within {}; it may still be at work, see dyadctl state",
                    human(limit)
                ),
            )),
        }
    }

    /// The pod's transitions, beginning with one for each task as it is.
    ///
    /// # Errors
    /// As the shim answers.
    pub async fn watch(&self) -> Result<Transitions> {
        let context = ttrpc::context::Context::default();
        match self.rpc.watch(context, &WatchRequest::new()).await {
            Ok(stream) => Ok(Transitions {
                stream,
                asked: self.asked("Watch"),
            }),
            Err(error) => Err(self.error("Watch", error)),
        }
    }

    /// Asks for a migration; answers once it is under way.
    ///
    /// # Errors
    /// [`Error::Refused`] with what forbids it.
    pub async fn migrate(&self, request: &MigrationRequest, limit: Duration) -> Result<u64> {
        let context = ttrpc::context::Context::default();
        let request = request.wire();
        let asked = self.rpc.migrate(context, &request);
        within(limit, self.asked("Migrate"), async {
            asked
                .await
                .map(|answer| answer.migration)
                .map_err(|error| self.error("Migrate", error))
        })
        .await
    }

    /// The migration under way, or the last one, until it has ended.
    ///
    /// # Errors
    /// As the shim answers.
    pub async fn migration_status(&self) -> Result<Migration> {
        let context = ttrpc::context::Context::default();
        let request = MigrationStatusRequest::new();
        match self.rpc.migration_status(context, &request).await {
            Ok(stream) => Ok(Migration {
                stream,
                asked: self.asked("MigrationStatus"),
            }),
            Err(error) => Err(self.error("MigrationStatus", error)),
        }
    }

    /// Gives the migration up.
    ///
    /// # Errors
    /// [`Error::Refused`]: there is none, or it cannot be given up any more.
    pub async fn cancel_migration(&self, limit: Duration) -> Result<Pod> {
        let context = ttrpc::context::Context::default();
        let request = CancelMigrationRequest::new();
        within(limit, self.asked("CancelMigration"), async {
            self.rpc
                .cancel_migration(context, &request)
                .await
                .map(pod)
                .map_err(|error| self.error("CancelMigration", error))
        })
        .await
    }

    /// The machine's serial console. Whether it is free shows at the first
    /// [`ConsoleReader::read`].
    ///
    /// # Errors
    /// As the shim answers.
    pub async fn console(&self) -> Result<(ConsoleWriter, ConsoleReader)> {
        let context = ttrpc::context::Context::default();
        let stream = self
            .rpc
            .console(context)
            .await
            .map_err(|error| self.error("Console", error))?;
        let (sender, receiver) = stream.split();
        let asked = self.asked("Console");
        Ok((
            ConsoleWriter {
                sender,
                asked: asked.clone(),
            },
            ConsoleReader { receiver, asked },
        ))
    }

    fn asked(&self, method: &str) -> String {
        format!("ask {} of {}", method, self.socket.display())
    }

    fn error(&self, method: &str, error: ttrpc::Error) -> Error {
        classify(self.asked(method), error)
    }
}

/// A pod's transitions as they happen.
pub struct Transitions {
    stream: ttrpc::r#async::ClientStreamReceiver<dyad_api::lifecycle::Transition>,
    asked: String,
}

impl Transitions {
    /// The next one; nothing when the shim has ended.
    ///
    /// # Errors
    /// As the shim answers.
    pub async fn next(&mut self) -> Result<Option<Transition>> {
        match self.stream.recv().await {
            Ok(Some(transition)) => Ok(Some(Transition {
                sequence: transition.sequence,
                time: Time(transition.unix_ns),
                from: state(transition.from),
                task: task(transition.task.unwrap_or_default()),
            })),
            Ok(None) => Ok(None),
            Err(error) if is_end(&error) => Ok(None),
            Err(error) => Err(classify(self.asked.clone(), error)),
        }
    }
}

impl MigrationRequest {
    fn wire(&self) -> MigrateRequest {
        let action = match self.then {
            After::Abort => TimeoutAction::ABORT,
            After::PostCopy => TimeoutAction::POST_COPY,
            After::Pause => TimeoutAction::PAUSE,
        };
        MigrateRequest {
            destination: self.destination.clone(),
            migrate_uri: self.migrate_uri.clone().unwrap_or_default(),
            disks_uri: self.disks_uri.clone().unwrap_or_default(),
            bandwidth_mib_s: self.bandwidth_mib_s,
            max_downtime_ms: self.max_downtime.map_or(0, milliseconds),
            timeout_ms: self.max_time.map_or(0, milliseconds),
            timeout_action: EnumOrUnknown::new(action),
            auto_converge: self.auto_converge,
            parallel: self.parallel,
            tls_required: self.tls_required,
            allow_clear: self.allow_clear,
            tcp_established: self.tcp_established,
            ..MigrateRequest::default()
        }
    }
}

/// A migration's progress as it is told.
pub struct Migration {
    stream: ttrpc::r#async::ClientStreamReceiver<dyad_api::lifecycle::MigrationProgress>,
    asked: String,
}

impl Migration {
    /// The next figures; nothing after the end.
    ///
    /// # Errors
    /// As the shim answers.
    pub async fn next(&mut self) -> Result<Option<Progress>> {
        match self.stream.recv().await {
            Ok(Some(told)) => Ok(Some(Progress {
                migration: told.migration,
                stage: stage(told.stage),
                reason: told.reason,
                destination: told.destination,
                bytes_done: told.bytes_done,
                bytes_total: told.bytes_total,
                bytes_remaining: told.bytes_remaining,
                rate: told.rate,
                dirty_rate: told.dirty_rate,
                expected_downtime_us: told.expected_downtime_us,
                downtime_us: told.downtime_us,
                elapsed_ms: told.elapsed_ms,
            })),
            Ok(None) => Ok(None),
            Err(error) if is_end(&error) => Ok(None),
            Err(error) => Err(classify(self.asked.clone(), error)),
        }
    }
}

fn stage(stage: EnumOrUnknown<MigrationStage>) -> &'static str {
    match stage.enum_value() {
        Ok(MigrationStage::NONE) => "none",
        Ok(MigrationStage::CHECKING) => "checking",
        Ok(MigrationStage::PREPARING) => "preparing",
        Ok(MigrationStage::COPYING) => "copying",
        Ok(MigrationStage::SWITCHING) => "switching",
        Ok(MigrationStage::FETCHING) => "fetching",
        Ok(MigrationStage::FINISHING) => "finishing",
        Ok(MigrationStage::COMPLETED) => "completed",
        Ok(MigrationStage::ABANDONED) => "abandoned",
        Ok(MigrationStage::LOST) => "lost",
        // Of a newer shim.
        Err(_) => "unknown",
    }
}

/// What is typed.
pub struct ConsoleWriter {
    sender: ttrpc::r#async::CSSender<ConsoleData>,
    asked: String,
}

impl ConsoleWriter {
    /// Sends `data` to the machine.
    ///
    /// # Errors
    /// As the shim answers; the reader tells more.
    pub async fn write(&self, data: Vec<u8>) -> Result<()> {
        let data = ConsoleData {
            data,
            ..ConsoleData::default()
        };
        self.sender
            .send(&data)
            .await
            .map_err(|error| classify(self.asked.clone(), error))
    }

    /// Ends the console.
    pub async fn close(&self) {
        // Where that fails it has ended.
        let _ = self.sender.close_send().await;
    }
}

/// What the machine writes.
pub struct ConsoleReader {
    receiver: ttrpc::r#async::CSReceiver<ConsoleData>,
    asked: String,
}

impl ConsoleReader {
    /// The next bytes; nothing when the machine or the shim has ended.
    ///
    /// # Errors
    /// [`Error::Refused`]: another client is attached, or the pod has no console.
    pub async fn read(&mut self) -> Result<Option<Vec<u8>>> {
        match self.receiver.recv().await {
            Ok(data) => Ok(Some(data.data)),
            Err(error) if is_end(&error) => Ok(None),
            Err(error) => Err(classify(self.asked.clone(), error)),
        }
    }
}

async fn within<T>(
    limit: Duration,
    asked: String,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::unreachable(
            asked,
            format!("no answer within {}", human(limit)),
        )),
    }
}

fn is_end(error: &ttrpc::Error) -> bool {
    use ttrpc::Error::{Eof, RemoteClosed, Socket};
    matches!(error, Eof | RemoteClosed | Socket(_))
}

/// The shim's answer as ours. A refusal is the shim's own words: they name the state and
/// the way out.
fn classify(asked: String, error: ttrpc::Error) -> Error {
    use ttrpc::Code;
    let (code, text) = reason(error);
    match code {
        Some(Code::NOT_FOUND) => Error::NotFound(text),
        Some(Code::FAILED_PRECONDITION | Code::UNIMPLEMENTED) => Error::Refused(text),
        Some(Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE) => Error::Usage(text),
        Some(_) => Error::failed(asked, text),
        None => Error::unreachable(asked, text),
    }
}

/// The status code of a shim's answer, and the text; no code where there was no answer.
fn reason(error: ttrpc::Error) -> (Option<ttrpc::Code>, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let code = status.code.enum_value_or(ttrpc::Code::UNKNOWN);
            let text = match status.message.as_str() {
                "" => format!("{code:?}"),
                text => text.to_owned(),
            };
            (Some(code), text)
        }
        ttrpc::Error::RemoteClosed | ttrpc::Error::Eof | ttrpc::Error::Socket(_) => {
            (None, "the shim closed the connection".into())
        }
        other => (None, other.to_string()),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn state(wire: EnumOrUnknown<WireState>) -> TaskState {
    match wire.enum_value_or(WireState::TASK_STATE_UNSPECIFIED) {
        WireState::TASK_STATE_UNSPECIFIED => TaskState::Unknown,
        WireState::CREATED => TaskState::Created,
        WireState::RUNNING => TaskState::Running,
        WireState::PAUSED => TaskState::Paused,
        WireState::STOPPING => TaskState::Stopping,
        WireState::STOPPED => TaskState::Stopped,
        WireState::MIGRATING => TaskState::Migrating,
        WireState::INCOMING => TaskState::Incoming,
        WireState::EXITED => TaskState::Exited,
        WireState::MIGRATED => TaskState::Migrated,
        WireState::FAILED => TaskState::Failed,
    }
}

fn task(wire: dyad_api::lifecycle::Task) -> Task {
    let state = state(wire.state);
    Task {
        container_id: wire.container_id,
        name: wire.name,
        sandbox: wire.sandbox,
        state,
        reason: wire.reason,
        pid: (wire.pid != 0).then_some(wire.pid),
        exit_status: (state == TaskState::Exited).then_some(wire.exit_status),
        since: Time(wire.since_unix_ns),
        starts: wire.starts,
    }
}

/// The sandbox first, then the containers by name.
fn pod(wire: StateResponse) -> Pod {
    let mut tasks: Vec<Task> = wire.tasks.into_iter().map(task).collect();
    tasks.sort_by(|a, b| (!a.sandbox, &a.name, a.since).cmp(&(!b.sandbox, &b.name, b.since)));
    Pod {
        containerd_namespace: wire.containerd_namespace,
        sandbox_id: wire.sandbox_id,
        pod_namespace: wire.pod_namespace,
        pod_name: wire.pod_name,
        pod_uid: wire.pod_uid,
        kind: wire.kind,
        tasks,
        machine: wire.machine.into_option().map(|machine| Machine {
            uuid: machine.uuid,
            domain: machine.domain,
            libvirt_uri: machine.libvirt_uri,
            accelerator: machine.accelerator,
            vcpus: machine.vcpus,
            memory_bytes: machine.memory_bytes,
            kernel_release: machine.kernel_release,
            notes: machine.notes,
        }),
        shim: ShimProcess {
            pid: wire.shim_pid,
            version: wire.shim_version,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_its_exit_code() {
        use ttrpc::Code;
        for (code, exit) in [
            (Code::NOT_FOUND, 3),
            (Code::FAILED_PRECONDITION, 4),
            (Code::UNIMPLEMENTED, 4),
            (Code::INVALID_ARGUMENT, 2),
            (Code::UNAVAILABLE, 1),
            (Code::INTERNAL, 1),
        ] {
            let status =
                ttrpc::Error::RpcStatus(ttrpc::get_status(code, "paused; resume it first"));
            let error = classify("ask Stop of /s".into(), status);
            assert_eq!(error.exit_code(), exit, "{code:?}");
            assert!(
                error.chain().contains("paused; resume it first"),
                "{error:?}"
            );
        }
        assert_eq!(
            classify("x".into(), ttrpc::Error::RemoteClosed).exit_code(),
            5
        );
    }

    #[test]
    fn a_state_of_a_newer_shim_is_unknown_and_no_error() {
        assert_eq!(state(EnumOrUnknown::from_i32(99)), TaskState::Unknown);
    }
}
