//! A pod as its shim describes it, in the words and keys of dyadctl's output.
//!
//! The JSON keys are a promise (docs/dyadctl.md): add, never rename.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

/// The true state of a task; `unknown` is one that a newer shim has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    Unknown,
    Created,
    Running,
    Paused,
    Stopping,
    Stopped,
    Migrating,
    Incoming,
    Exited,
    Migrated,
    Failed,
}

impl TaskState {
    /// As it is written everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Migrating => "migrating",
            Self::Incoming => "incoming",
            Self::Exited => "exited",
            Self::Migrated => "migrated",
            Self::Failed => "failed",
        }
    }

    /// Nothing will run here any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Exited | Self::Migrated | Self::Failed)
    }
}

/// ns since the epoch; 0 is "not known".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

impl Time {
    /// How long ago; nothing where it is not known.
    pub fn elapsed(self) -> Option<std::time::Duration> {
        (self.0 != 0).then(|| {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            now.saturating_sub(std::time::Duration::from_nanos(self.0))
        })
    }
}

/// RFC 3339 in UTC with milliseconds. Days to date by Howard Hinnant's civil_from_days.
impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (seconds, millis) = (self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000);
        let shifted = seconds / 86_400 + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
        let month = if month_shifted < 10 {
            month_shifted + 3
        } else {
            month_shifted - 9
        };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (seconds % 86_400 / 3600, seconds % 3600 / 60, seconds % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z"
        )
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            0 => serializer.serialize_none(),
            _ => serializer.collect_str(self),
        }
    }
}

/// One task of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Task {
    /// containerd's id.
    pub container_id: String,
    /// Kubernetes' container name; empty for the sandbox and outside CRI.
    pub name: String,
    /// The pod's own task: the pause container, or the machine.
    pub sandbox: bool,
    /// The true state.
    pub state: TaskState,
    /// Why, for people.
    pub reason: String,
    /// Host pid, where there is one.
    pub pid: Option<u32>,
    /// In state `exited`.
    pub exit_status: Option<u32>,
    /// In this state since.
    pub since: Time,
    /// Times it was started in place.
    pub starts: u32,
}

impl Task {
    /// What to call it: its name, else the beginning of its id.
    pub fn label(&self) -> &str {
        match (self.name.as_str(), self.sandbox) {
            ("", true) => "(pod)",
            ("", false) => short(&self.container_id),
            (name, _) => name,
        }
    }
}

/// The pod's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    pub uuid: String,
    pub domain: String,
    pub libvirt_uri: String,
    pub accelerator: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub kernel_release: String,
    pub notes: Vec<String>,
}

/// The process that answers for the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShimProcess {
    pub pid: u32,
    pub version: String,
}

/// A pod as its shim describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub containerd_namespace: String,
    pub sandbox_id: String,
    pub pod_namespace: String,
    pub pod_name: String,
    pub pod_uid: String,
    pub kind: String,
    pub tasks: Vec<Task>,
    pub machine: Option<Machine>,
    pub shim: ShimProcess,
}

impl Pod {
    /// `namespace/name`, or the beginning of the sandbox id outside CRI.
    pub fn label(&self) -> String {
        match (self.pod_namespace.as_str(), self.pod_name.as_str()) {
            (_, "") => short(&self.sandbox_id).to_owned(),
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        }
    }

    /// What a migration target names in `dyad.dev/migration-source`: the machine's UUID, for
    /// containers one that is made from the sandbox's id.
    pub fn migration_source(&self) -> String {
        match &self.machine {
            Some(machine) => machine.uuid.clone(),
            None => dyad_runtime_handler::identity::pod_uuid(
                &self.containerd_namespace,
                &self.sandbox_id,
            )
            .to_string(),
        }
    }

    /// The pod's own task.
    pub fn sandbox(&self) -> Option<&Task> {
        self.tasks.iter().find(|task| task.sandbox)
    }

    /// The containers, without the sandbox.
    pub fn containers(&self) -> impl Iterator<Item = &Task> {
        self.tasks.iter().filter(|task| !task.sandbox)
    }

    /// Whether anything can still run in it.
    pub fn is_over(&self) -> bool {
        self.sandbox().is_some_and(|task| task.state.is_over())
    }

    /// One word for the pod, or several joined by `,` where its containers differ: the
    /// sandbox's state where that is not running (a machine's holds for all in it), else
    /// the states of the containers that are not over.
    pub fn summary(&self) -> String {
        let sandbox = self.sandbox().map_or(TaskState::Unknown, |task| task.state);
        if !matches!(sandbox, TaskState::Running | TaskState::Unknown) {
            return sandbox.as_str().to_owned();
        }
        let mut states: Vec<TaskState> = Vec::new();
        for task in self.containers() {
            if !task.state.is_over() && !states.contains(&task.state) {
                states.push(task.state);
            }
        }
        if states.is_empty() {
            states.push(sandbox);
        }
        let words: Vec<_> = states.iter().map(|state| state.as_str()).collect();
        words.join(",")
    }
}

impl Serialize for Pod {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Keys<'a> {
            pod_namespace: &'a str,
            pod_name: &'a str,
            pod_uid: &'a str,
            containerd_namespace: &'a str,
            sandbox_id: &'a str,
            kind: &'a str,
            state: String,
            tasks: &'a [Task],
            machine: Option<&'a Machine>,
            shim: &'a ShimProcess,
        }
        Keys {
            pod_namespace: &self.pod_namespace,
            pod_name: &self.pod_name,
            pod_uid: &self.pod_uid,
            containerd_namespace: &self.containerd_namespace,
            sandbox_id: &self.sandbox_id,
            kind: &self.kind,
            state: self.summary(),
            tasks: &self.tasks,
            machine: self.machine.as_ref(),
            shim: &self.shim,
        }
        .serialize(serializer)
    }
}

/// A task that changed its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    pub sequence: u64,
    pub time: Time,
    pub from: TaskState,
    pub task: Task,
}

/// The beginning of a long id, as crictl shows it.
pub fn short(id: &str) -> &str {
    id.get(..13).unwrap_or(id)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A task to test with.
    pub fn task(id: &str, name: &str, state: TaskState) -> Task {
        Task {
            container_id: id.into(),
            name: name.into(),
            sandbox: false,
            state,
            reason: String::new(),
            pid: Some(42),
            exit_status: (state == TaskState::Exited).then_some(0),
            since: Time(1_767_225_599_123_456_789),
            starts: 1,
        }
    }

    /// A running pod of the container kind to test with; its sandbox is among `tasks`.
    pub fn pod(id: &str, name: &str, mut tasks: Vec<Task>) -> Pod {
        let mut sandbox = task(id, "", TaskState::Running);
        sandbox.sandbox = true;
        tasks.insert(0, sandbox);
        Pod {
            containerd_namespace: "k8s.io".into(),
            sandbox_id: id.into(),
            pod_namespace: "default".into(),
            pod_name: name.into(),
            pod_uid: format!("uid-of-{id}"),
            kind: "container".into(),
            tasks,
            machine: None,
            shim: ShimProcess {
                pid: 7,
                version: "0.1.0".into(),
            },
        }
    }

    #[test]
    fn the_summary_is_what_the_living_containers_do() {
        let of = |states: &[TaskState]| {
            let tasks = states.iter().map(|state| task("c", "c", *state)).collect();
            pod("p", "p", tasks).summary()
        };
        assert_eq!(of(&[]), "running");
        assert_eq!(of(&[TaskState::Exited]), "running");
        assert_eq!(of(&[TaskState::Paused, TaskState::Exited]), "paused");
        assert_eq!(
            of(&[TaskState::Running, TaskState::Stopped]),
            "running,stopped"
        );
        let mut over = pod("p", "p", vec![task("c", "c", TaskState::Running)]);
        over.tasks[0].state = TaskState::Migrated;
        assert_eq!(over.summary(), "migrated");
        // A machine that is paused has containers that would run.
        over.tasks[0].state = TaskState::Paused;
        assert_eq!(over.summary(), "paused");
    }

    #[test]
    fn the_keys_of_a_pod_are_those_that_are_documented() {
        let mut pod = pod("p", "web", vec![task("c", "app", TaskState::Exited)]);
        pod.machine = Some(Machine {
            uuid: "u".into(),
            domain: "dyad-u".into(),
            libvirt_uri: "qemu:///system".into(),
            accelerator: "kvm".into(),
            vcpus: 2,
            memory_bytes: 1,
            kernel_release: "6.1".into(),
            notes: Vec::new(),
        });
        let json = serde_json::to_value(&pod).unwrap();
        let keys = |value: &serde_json::Value| {
            value
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            keys(&json),
            "containerd_namespace kind machine pod_name pod_namespace pod_uid sandbox_id shim \
             state tasks"
        );
        assert_eq!(
            keys(&json["tasks"][1]),
            "container_id exit_status name pid reason sandbox since starts state"
        );
        assert_eq!(
            keys(&json["machine"]),
            "accelerator domain kernel_release libvirt_uri memory_bytes notes uuid vcpus"
        );
        assert_eq!(json["tasks"][1]["since"], "2025-12-31T23:59:59.123Z");
        assert_eq!(json["tasks"][0]["exit_status"], serde_json::Value::Null);
    }

    #[test]
    fn times_are_utc_dates_and_nothing_where_they_are_not_known() {
        for (seconds, text) in [
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(Time(seconds * 1_000_000_000).to_string(), text);
        }
        assert_eq!(serde_json::to_string(&Time(0)).unwrap(), "null");
        assert_eq!(Time(0).elapsed(), None);
        assert_eq!(Time(u64::MAX).elapsed(), Some(std::time::Duration::ZERO));
    }

    #[test]
    fn a_short_id_of_anything_is_no_panic() {
        assert_eq!(short("0123456789abcdef"), "0123456789abc");
        assert_eq!(short("short"), "short");
        assert_eq!(short("äääääääääääääää"), "äääääääääääääää");
    }
}
