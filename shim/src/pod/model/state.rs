//! What a task may do next, decided by one pure function: (state, request) gives a
//! [`Step`] or a named [`Refusal`].
//!
//! ```text
//!             Run                 Pause
//!  Created ---------> Running <----------> Paused
//!     |   (fails)    ^  |  |  \   Resume
//!     v              |  |  |   \  Migrate                (source)
//!  Failed      Start |  |  |    `-----------> Migrating ----------> Migrated
//!                    |  |  |                      | failed, cancelled
//!                    |  |  |  <-------------------'
//!                    |  |  `--- the process ends ---> Exited
//!                    |  v Stop
//!                    | Stopping ---> Stopped (kept: pod, address and disks stay)
//!                    |                  |  Kill that ends it ---> Exited
//!                    `------------------'
//!  Incoming (a target that waits for its source) ---> Running | Failed | Exited
//! ```
//! `Delete` leads from Created, Stopped, Exited, Migrated and Failed to gone. The
//! driver does the steps; nothing here touches the world.

use std::fmt;

/// A task's state. The one truth; what containerd is told is [`status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Made, not yet run.
    Created,
    /// Its process (machine: its guest) runs.
    Running,
    /// Frozen by us or by an administrator.
    Paused,
    /// On its way to Stopped.
    Stopping,
    /// Its process ended because it was asked to; the rest is kept for `Start`.
    Stopped,
    /// On its way to another node, running here.
    Migrating,
    /// A migration target, waiting for its source.
    Incoming,
    /// Its process ended for good, with this status.
    Exited(u32),
    /// It runs on another node; must never run here again.
    Migrated,
    /// It could not be run, for this reason.
    Failed(String),
}

/// What somebody wants of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Task `Create` of the same id.
    Create,
    /// Task `Start`: run it for the first time.
    Run,
    /// Lifecycle `Stop`: end the process, keep the rest.
    Stop,
    /// Lifecycle `Start`: run what was stopped again.
    Start,
    /// Freeze.
    Pause,
    /// Undo `Pause`.
    Resume,
    /// Lifecycle `Restart`, `force`d: without asking the process.
    Restart {
        /// Without asking the process.
        force: bool,
    },
    /// Task `Kill`.
    Kill {
        /// Whether the signal is one that asks a process to end.
        ends: bool,
    },
    /// Task `Delete`.
    Delete,
    /// Task `Exec`, and the start of what it added.
    Exec,
    /// Task `Update`: new limits.
    Update,
    /// Lifecycle `Migrate`.
    Migrate,
    /// Lifecycle `CancelMigration`.
    CancelMigration,
}

/// What the driver has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is as asked already.
    AlreadySo,
    /// Run the process: Created -> Running.
    Run,
    /// End the process and keep the rest: Running -> Stopping -> Stopped.
    Stop,
    /// Run the process again: Stopped -> Running.
    RunAgain,
    /// Freeze: Running -> Paused.
    Freeze,
    /// Thaw: Paused -> Running.
    Thaw,
    /// Stop and run again: Running -> Running.
    Restart {
        /// Without asking the process.
        force: bool,
    },
    /// Deliver the signal.
    Signal,
    /// Thaw, so that the signal can take effect, and deliver it.
    ThawAndSignal,
    /// What is being stopped is no longer to be kept: kill it, Stopping -> Exited.
    EndStopping,
    /// Give up what was kept; there is no process: Stopped | Incoming -> Exited.
    EndKept,
    /// Cancel the migration, then deliver the signal.
    CancelAndSignal,
    /// Remove all of it.
    Remove,
    /// Add or run a further process.
    Exec,
    /// Apply the limits.
    Update,
    /// Running -> Migrating.
    Migrate,
    /// Migrating -> Running.
    CancelMigration,
}

/// Which error containerd is to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalClass {
    /// The state forbids it.
    Precondition,
    /// There is no process (any more).
    NoProcess,
    /// The id is taken.
    Exists,
}

/// A request that the state refuses, with the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which error.
    pub class: RefusalClass,
    state: State,
    request: Request,
    way_out: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.class {
            RefusalClass::NoProcess => write!(f, "process of a task that {}", self.state)?,
            RefusalClass::Exists => f.write_str("a task of this id")?,
            RefusalClass::Precondition => {
                write!(f, "cannot {} a task that {}", self.request, self.state)?;
            }
        }
        if !self.way_out.is_empty() {
            write!(f, ": {}", self.way_out)?;
        }
        Ok(())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created => f.write_str("has not been started"),
            Self::Running => f.write_str("is running"),
            Self::Paused => f.write_str("is paused"),
            Self::Stopping => f.write_str("is being stopped"),
            Self::Stopped => f.write_str("is stopped and kept"),
            Self::Migrating => f.write_str("is migrating"),
            Self::Incoming => f.write_str("waits for its migration source"),
            Self::Exited(status) => write!(f, "has exited with status {status}"),
            Self::Migrated => f.write_str("has migrated to another node"),
            Self::Failed(reason) => write!(f, "has failed ({reason})"),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Run | Self::Start => "start",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Restart { .. } => "restart",
            Self::Kill { .. } => "signal",
            Self::Delete => "delete",
            Self::Exec => "exec in",
            Self::Update => "update",
            Self::Migrate => "migrate",
            Self::CancelMigration => "cancel the migration of",
        })
    }
}

/// Decides `request` in `state`.
///
/// # Errors
/// The refusal, with the state and the way out in its text.
pub fn decide(state: &State, request: Request) -> Result<Step, Refusal> {
    use Request as R;
    use State as S;

    let refuse = |way_out| Err(refusal(RefusalClass::Precondition, state, request, way_out));
    let no_process = || Err(refusal(RefusalClass::NoProcess, state, request, ""));

    match (state, request) {
        (_, R::Create) => Err(refusal(RefusalClass::Exists, state, request, "")),

        (S::Created, R::Run) => Ok(Step::Run),
        (S::Created, R::Kill { .. }) => Ok(Step::Signal),
        (S::Created, R::Delete) => Ok(Step::Remove),
        (S::Created, R::Exec) => Ok(Step::Exec),
        (S::Created, R::Update) => Ok(Step::Update),
        (
            S::Created,
            R::Stop
            | R::Start
            | R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("containerd starts it first"),

        (S::Running, R::Run) => refuse(""),
        (S::Running, R::Start | R::Resume) => Ok(Step::AlreadySo),
        (S::Running, R::Stop) => Ok(Step::Stop),
        (S::Running, R::Pause) => Ok(Step::Freeze),
        (S::Running, R::Restart { force }) => Ok(Step::Restart { force }),
        (S::Running, R::Kill { .. }) => Ok(Step::Signal),
        (S::Running, R::Delete) => refuse("kill it first"),
        (S::Running, R::Exec) => Ok(Step::Exec),
        (S::Running, R::Update) => Ok(Step::Update),
        (S::Running, R::Migrate) => Ok(Step::Migrate),
        (S::Running, R::CancelMigration) => refuse("there is no migration"),

        (S::Paused, R::Pause) => Ok(Step::AlreadySo),
        (S::Paused, R::Resume) => Ok(Step::Thaw),
        (S::Paused, R::Kill { ends: true }) => Ok(Step::ThawAndSignal),
        // It takes effect when the task is resumed.
        (S::Paused, R::Kill { ends: false }) => Ok(Step::Signal),
        (S::Paused, R::Update) => Ok(Step::Update),
        (S::Paused, R::Delete) => refuse("kill it first"),
        (
            S::Paused,
            R::Run
            | R::Start
            | R::Stop
            | R::Restart { .. }
            | R::Exec
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("resume it first"),

        (S::Stopping, R::Stop) => Ok(Step::AlreadySo),
        (S::Stopping, R::Kill { ends: true }) => Ok(Step::EndStopping),
        (S::Stopping, R::Kill { ends: false }) => Ok(Step::Signal),
        (
            S::Stopping,
            R::Run
            | R::Start
            | R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Delete
            | R::Exec
            | R::Update
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("wait until it is stopped"),

        (S::Stopped, R::Stop) => Ok(Step::AlreadySo),
        (S::Stopped, R::Start) => Ok(Step::RunAgain),
        (S::Stopped, R::Kill { ends: true }) => Ok(Step::EndKept),
        (S::Stopped, R::Kill { ends: false }) => no_process(),
        (S::Stopped, R::Delete) => Ok(Step::Remove),
        (S::Stopped, R::Run) => refuse("start it through the Lifecycle service"),
        (
            S::Stopped,
            R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Exec
            | R::Update
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("start it first"),

        (S::Migrating, R::Migrate) => refuse("wait for that migration, or cancel it"),
        (S::Migrating, R::CancelMigration) => Ok(Step::CancelMigration),
        (S::Migrating, R::Kill { ends: true }) => Ok(Step::CancelAndSignal),
        (S::Migrating, R::Kill { ends: false }) => Ok(Step::Signal),
        (
            S::Migrating,
            R::Run
            | R::Start
            | R::Stop
            | R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Delete
            | R::Exec
            | R::Update,
        ) => refuse("wait for the migration, or cancel it"),

        (S::Incoming, R::Kill { ends: true }) => Ok(Step::EndKept),
        (S::Incoming, R::Kill { ends: false }) => no_process(),
        (S::Incoming, R::Delete) => refuse("kill it first"),
        (
            S::Incoming,
            R::Run
            | R::Start
            | R::Stop
            | R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Exec
            | R::Update
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("migrate its source to it, or delete it"),

        (S::Exited(_) | S::Migrated | S::Failed(_), R::Kill { .. }) => no_process(),
        (S::Exited(_) | S::Migrated | S::Failed(_), R::Delete) => Ok(Step::Remove),
        (S::Migrated, R::Run | R::Start | R::Restart { .. }) => {
            refuse("it would run twice; delete this task")
        }
        (
            S::Exited(_) | S::Migrated | S::Failed(_),
            R::Run
            | R::Start
            | R::Stop
            | R::Pause
            | R::Resume
            | R::Restart { .. }
            | R::Exec
            | R::Update
            | R::Migrate
            | R::CancelMigration,
        ) => refuse("it can only be deleted"),
    }
}

fn refusal(class: RefusalClass, state: &State, request: Request, way_out: &'static str) -> Refusal {
    Refusal {
        class,
        state: state.clone(),
        request,
        way_out,
    }
}

/// Whether a signal asks a process to end, by its default action or (systemd's
/// SIGRTMIN+3: halt) by custom.
pub fn signal_ends(signal: i32) -> bool {
    const HALT: i32 = 34 + 3;
    matches!(
        signal,
        libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGQUIT | libc::SIGHUP | HALT
    )
}

/// The state that others meet in a container: where the pod is one machine, what
/// holds for the machine holds for all in it.
pub fn effective(own: State, machine: Option<&State>) -> State {
    let over = matches!(own, State::Exited(_) | State::Migrated | State::Failed(_));
    match machine {
        // It may be started, so that it waits too.
        Some(State::Incoming) if own == State::Created => own,
        Some(
            state @ (State::Paused
            | State::Stopping
            | State::Stopped
            | State::Migrating
            | State::Incoming
            | State::Migrated),
        ) if !over => state.clone(),
        _ => own,
    }
}

/// containerd's task status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskStatus {
    /// CREATED.
    Created,
    /// RUNNING.
    Running,
    /// STOPPED.
    Stopped,
    /// PAUSED.
    Paused,
}

/// One line of the table below: how a state looks from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outside {
    /// Our word for the state.
    pub name: &'static str,
    /// Task `State` for a task of CRI. Its plugin marks a container Unknown when,
    /// after a restart of containerd, its task says anything but Created, Running or
    /// Stopped, and kubelet then kills it.
    pub cri_status: TaskStatus,
    /// Task `State` for any other client.
    pub status: TaskStatus,
    /// CRI's state of the container.
    pub cri: &'static str,
    /// The Pod's phase, where the task is its pod's only container.
    pub pod_phase: &'static str,
    /// The domain's state and reason in libvirt, machine kind.
    pub libvirt: &'static str,
}

/// Our states as the outside sees them: the product's table, used by the code.
pub fn outside(state: &State) -> Outside {
    use TaskStatus as T;
    let row = |name, cri_status, status, cri, pod_phase, libvirt| Outside {
        name,
        cri_status,
        status,
        cri,
        pod_phase,
        libvirt,
    };
    match state {
        State::Created => row(
            "created",
            T::Created,
            T::Created,
            "CREATED",
            "Pending",
            "no domain, or shut off",
        ),
        State::Running => row(
            "running",
            T::Running,
            T::Running,
            "RUNNING",
            "Running",
            "running",
        ),
        State::Paused => row(
            "paused",
            T::Running,
            T::Paused,
            "RUNNING",
            "Running",
            "paused (user)",
        ),
        State::Stopping => row(
            "stopping",
            T::Running,
            T::Running,
            "RUNNING",
            "Running",
            "running, or in shutdown",
        ),
        State::Stopped => row(
            "stopped",
            T::Running,
            T::Stopped,
            "RUNNING",
            "Running",
            "shut off (shutdown, destroyed)",
        ),
        State::Migrating => row(
            "migrating",
            T::Running,
            T::Running,
            "RUNNING",
            "Running",
            "running, or paused (migration)",
        ),
        State::Incoming => row(
            "incoming",
            T::Running,
            T::Running,
            "RUNNING",
            "Running",
            "shut off, then paused (migration)",
        ),
        State::Exited(0) => row(
            "exited",
            T::Stopped,
            T::Stopped,
            "EXITED",
            "Succeeded",
            "shut off (shutdown)",
        ),
        State::Exited(_) => row(
            "exited",
            T::Stopped,
            T::Stopped,
            "EXITED",
            "Failed",
            "shut off (destroyed, crashed)",
        ),
        State::Migrated => row(
            "migrated",
            T::Stopped,
            T::Stopped,
            "EXITED",
            "Succeeded",
            "shut off (migrated)",
        ),
        State::Failed(_) => row(
            "failed",
            T::Stopped,
            T::Stopped,
            "EXITED",
            "Failed",
            "no domain, or shut off (failed)",
        ),
    }
}

/// What Task `State` answers.
pub fn status(state: &State, cri: bool) -> TaskStatus {
    let row = outside(state);
    if cri { row.cri_status } else { row.status }
}

#[cfg(test)]
mod tests;
