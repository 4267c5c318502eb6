//! From the agent's messages and refusals to ours. Pure.

use std::time::{Duration, SystemTime};

use dyad_agent_api::link::host::CallError;
use dyad_agent_api::protobuf::well_known_types::timestamp::Timestamp;
use dyad_agent_api::protobuf::{self, Message};
use dyad_agent_api::task_api::api::PidsResponse;
use dyad_agent_api::task_api::cgroups_v2::metrics::Metrics;
use dyad_agent_api::task_api::shim::oci::ProcessDetails;
use dyad_agent_api::ttrpc::Code;
use dyad_runtime_handler::Error;
use dyad_runtime_handler::stats::{CpuStats, Hierarchy, IoStats, MemoryStats, PidsStats, Stats};

/// Our error for one of the link; `doing` says what was asked.
pub fn error(error: CallError, doing: impl Fn() -> String) -> Error {
    let (code, message) = match error {
        CallError::Status { code, message } => (code, message),
        CallError::TooLarge(_) => return Error::InvalidArgument(format!("{}: {error}", doing())),
        CallError::Closed | CallError::Restarted => {
            return Error::Unavailable(doing(), Some(error.into()));
        }
        CallError::Message(_) => return Error::other(doing(), error),
    };
    let without = |end: &str| message.strip_suffix(end).unwrap_or(&message).to_owned();
    match code {
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => Error::InvalidArgument(message),
        // Ours add these words again.
        Code::NOT_FOUND => Error::NotFound(without(" not found")),
        Code::ALREADY_EXISTS => Error::AlreadyExists(without(" already exists")),
        Code::FAILED_PRECONDITION => Error::FailedPrecondition(message),
        Code::UNIMPLEMENTED => Error::Unimplemented(message),
        Code::UNAVAILABLE => Error::Unavailable(doing(), Some(message.into())),
        Code::DEADLINE_EXCEEDED => Error::DeadlineExceeded(message),
        Code::OK
        | Code::CANCELLED
        | Code::UNKNOWN
        | Code::PERMISSION_DENIED
        | Code::UNAUTHENTICATED
        | Code::RESOURCE_EXHAUSTED
        | Code::ABORTED
        | Code::INTERNAL
        | Code::DATA_LOSS => Error::other(doing(), message),
    }
}

/// A moment of the guest's clock; now, where it told none.
pub fn time(timestamp: Option<&Timestamp>) -> SystemTime {
    timestamp
        .and_then(|at| {
            let since = Duration::new(at.seconds.try_into().ok()?, at.nanos.try_into().ok()?);
            SystemTime::UNIX_EPOCH.checked_add(since)
        })
        .unwrap_or_else(SystemTime::now)
}

/// Processes with the exec that each is.
pub fn pids(answer: PidsResponse) -> protobuf::Result<Vec<(u32, Option<String>)>> {
    let process = |process: dyad_agent_api::task_api::api::ProcessInfo| {
        let exec = match process.info.as_ref() {
            None => None,
            Some(info) => Some(ProcessDetails::parse_from_bytes(&info.value)?.exec_id),
        };
        Ok((process.pid, exec.filter(|exec| !exec.is_empty())))
    };
    answer.processes.into_iter().map(process).collect()
}

/// containerd's cgroup v2 metrics.
pub fn stats(metrics: &[u8]) -> protobuf::Result<Stats> {
    let metrics = Metrics::parse_from_bytes(metrics)?;
    let ns = |usec: u64| usec.saturating_mul(1000);
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let events = &metrics.memory_events;
    Ok(Stats {
        hierarchy: Hierarchy::V2,
        cpu: CpuStats {
            // The agent does not read it.
            pressure: None,
            usage_ns: ns(cpu.usage_usec),
            user_ns: ns(cpu.user_usec),
            system_ns: ns(cpu.system_usec),
            periods: cpu.nr_periods,
            throttled_periods: cpu.nr_throttled,
            throttled_ns: ns(cpu.throttled_usec),
        },
        memory: MemoryStats {
            pressure: None,
            usage: memory.usage,
            limit: memory.usage_limit,
            peak: memory.max_usage,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            anon: memory.anon,
            file: memory.file,
            inactive_file: memory.inactive_file,
            active_file: memory.active_file,
            inactive_anon: memory.inactive_anon,
            active_anon: memory.active_anon,
            kernel: memory.kernel_stack.saturating_add(memory.slab),
            pgfault: memory.pgfault,
            pgmajfault: memory.pgmajfault,
            max_events: events.max,
            oom_kills: events.oom_kill,
        },
        pids: PidsStats {
            current: pids.current,
            limit: pids.limit,
        },
        io: metrics
            .io
            .usage
            .iter()
            .map(|entry| IoStats {
                major: entry.major,
                minor: entry.minor,
                read_bytes: entry.rbytes,
                write_bytes: entry.wbytes,
                read_ios: entry.rios,
                write_ios: entry.wios,
            })
            .collect(),
        io_pressure: None,
    })
}

#[cfg(test)]
mod tests {
    use dyad_agent_api::protobuf::MessageField;
    use dyad_agent_api::protobuf::well_known_types::any::Any;
    use dyad_agent_api::task_api::api::ProcessInfo;

    use super::*;

    fn refused(code: Code, message: &str) -> Error {
        let message = message.to_owned();
        error(CallError::Status { code, message }, || {
            "start container a in the guest".into()
        })
    }

    #[test]
    fn a_refusal_keeps_its_class_and_says_it_once() {
        assert_eq!(
            refused(Code::NOT_FOUND, "container a not found").chain(),
            "container a not found"
        );
        assert_eq!(
            refused(Code::ALREADY_EXISTS, "exec b already exists").chain(),
            "exec b already exists"
        );
        let failed = refused(Code::UNKNOWN, "no such file: /bin/x");
        assert_eq!(
            failed.chain(),
            "start container a in the guest: no such file: /bin/x"
        );
        assert!(matches!(
            refused(Code::FAILED_PRECONDITION, "x"),
            Error::FailedPrecondition(_)
        ));
        assert!(matches!(
            refused(Code::UNIMPLEMENTED, "x"),
            Error::Unimplemented(_)
        ));
    }

    #[test]
    fn a_guest_that_is_gone_is_unavailable() {
        let gone = error(CallError::Restarted, || {
            "start container a in the guest".into()
        });
        assert_eq!(
            gone.chain(),
            "start container a in the guest: the guest restarted"
        );
        assert!(matches!(gone, Error::Unavailable(..)));
    }

    #[test]
    fn times_that_cannot_be_are_now() {
        let at = Timestamp {
            seconds: 5,
            nanos: 7,
            ..Default::default()
        };
        assert_eq!(
            time(Some(&at)),
            SystemTime::UNIX_EPOCH + Duration::new(5, 7)
        );
        let before = SystemTime::now();
        let odd = Timestamp {
            seconds: i64::MIN,
            nanos: -1,
            ..Default::default()
        };
        assert!(time(Some(&odd)) >= before && time(None) >= before);
    }

    #[test]
    fn execs_are_told_from_the_rest() {
        let details = ProcessDetails {
            exec_id: "e".into(),
            ..Default::default()
        };
        let value = details.write_to_bytes().unwrap();
        let info = MessageField::some(Any {
            value,
            ..Default::default()
        });
        let processes = vec![
            ProcessInfo {
                pid: 7,
                ..Default::default()
            },
            ProcessInfo {
                pid: 8,
                info,
                ..Default::default()
            },
        ];
        let answer = PidsResponse {
            processes,
            ..Default::default()
        };
        assert_eq!(pids(answer).unwrap(), [(7, None), (8, Some("e".into()))]);
    }

    #[test]
    fn metrics_become_ours() {
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 3;
        metrics.memory.mut_or_insert_default().kernel_stack = 10;
        metrics.memory.mut_or_insert_default().slab = 5;
        metrics.memory.mut_or_insert_default().usage_limit = u64::MAX;
        metrics.memory_events.mut_or_insert_default().oom_kill = 1;
        let stats = stats(&metrics.write_to_bytes().unwrap()).unwrap();
        assert_eq!(stats.cpu.usage_ns, 3000);
        assert_eq!(stats.memory.kernel, 15);
        assert_eq!((stats.memory.limit, stats.memory.oom_kills), (u64::MAX, 1));
        assert!(super::stats(b"\xff").is_err());
    }
}
