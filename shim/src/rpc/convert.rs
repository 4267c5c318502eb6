//! Between protobuf messages and our own types.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CreateTaskRequest, ExecProcessRequest, Status,
};
use containerd_shim_protos::cgroups;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::handler::ProcessId;
use dyad_runtime_handler::spec::{Checkpoint, Resources, RootMount};
use dyad_runtime_handler::stats::{Hierarchy, IoStats, Stats};
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Process;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::pod::state::TaskStatus;
use crate::pod::{CreateRequest, ExecRequest};
use crate::stdio::StdioUris;

/// How a client says what a checkpoint is to be.
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

/// A point in time.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

/// containerd names the init process by an empty exec id.
pub fn process_id(container: String, exec: String) -> ProcessId {
    ProcessId {
        container,
        exec: Some(exec).filter(|exec| !exec.is_empty()),
    }
}

/// containerd's word for a status.
pub fn status(status: TaskStatus) -> EnumOrUnknown<Status> {
    EnumOrUnknown::new(match status {
        TaskStatus::Created => Status::CREATED,
        TaskStatus::Running => Status::RUNNING,
        TaskStatus::Stopped => Status::STOPPED,
        TaskStatus::Paused => Status::PAUSED,
    })
}

/// # Errors
/// `InvalidArgument` for a mount that is not for the root itself.
pub fn create_request(request: CreateTaskRequest) -> Result<CreateRequest> {
    let rootfs = request
        .rootfs
        .into_iter()
        .map(|mount| match mount.target.as_str() {
            "" | "/" => Ok(RootMount {
                fstype: mount.type_,
                source: mount.source,
                options: mount.options,
            }),
            target => Err(Error::InvalidArgument(format!(
                "root mount of {} on {target:?}: only mounts of the root itself are supported",
                mount.source
            ))),
        })
        .collect::<Result<_>>()?;
    Ok(CreateRequest {
        id: request.id,
        bundle: request.bundle.into(),
        rootfs,
        stdio: StdioUris {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        checkpoint: Some(request.checkpoint)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
    })
}

/// Which container is to be written down, and how.
///
/// # Errors
/// `InvalidArgument` for options that are not runc's, and without a folder for it.
pub fn checkpoint(request: CheckpointTaskRequest) -> Result<(String, Checkpoint)> {
    let options = match request.options.into_option() {
        Some(any) if !any.type_url.is_empty() => {
            if any.type_url.rsplit('/').next() != Some(CHECKPOINT_OPTIONS) {
                return Err(Error::InvalidArgument(format!(
                    "options of type {:?}: want {CHECKPOINT_OPTIONS}",
                    any.type_url
                )));
            }
            CheckpointOptions::parse_from_bytes(&any.value)
                .map_err(|error| Error::InvalidArgument(format!("{CHECKPOINT_OPTIONS}: {error}")))?
        }
        _ => CheckpointOptions::default(),
    };
    let path = |text: String| {
        Some(text)
            .filter(|text| !text.is_empty())
            .map(PathBuf::from)
    };
    let images = path(options.image_path)
        .or(path(request.path))
        .ok_or_else(|| {
            Error::InvalidArgument(format!("checkpoint of {}: path: missing", request.id))
        })?;
    let to = Checkpoint {
        images,
        work: path(options.work_path),
        exit: options.exit,
        tcp_established: options.open_tcp,
        external_unix_sockets: options.external_unix_sockets,
        terminal: options.terminal,
        file_locks: options.file_locks,
        empty_namespaces: options.empty_namespaces,
        cgroups_mode: options.cgroups_mode,
    };
    Ok((request.id, to))
}

/// # Errors
/// `InvalidArgument` for a missing exec id, or a spec that is no OCI process.
pub fn exec_request(request: ExecProcessRequest) -> Result<(String, ExecRequest)> {
    if request.exec_id.is_empty() {
        return Err(Error::InvalidArgument("exec: the exec id is empty".into()));
    }
    let spec = request.spec.into_option().unwrap_or_default();
    let mut process: Process = serde_json::from_slice(&spec.value)
        .map_err(|error| Error::InvalidArgument(format!("exec {}: {error}", request.exec_id)))?;
    // The request's word counts, as with containerd's own shim: it says what the client reads.
    process.set_terminal(Some(request.terminal));
    Ok((
        request.id,
        ExecRequest {
            exec_id: request.exec_id,
            process,
            stdio: StdioUris {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        },
    ))
}

/// # Errors
/// `InvalidArgument` for resources that are no OCI `LinuxResources`.
pub fn resources(
    any: MessageField<Any>,
    annotations: impl IntoIterator<Item = (String, String)>,
) -> Result<Resources> {
    let any = any.into_option().unwrap_or_default();
    let linux = match any.value.is_empty() {
        true => oci_spec::runtime::LinuxResources::default(),
        false => serde_json::from_slice(&any.value).map_err(|error| {
            Error::InvalidArgument(format!("resources of type {:?}: {error}", any.type_url))
        })?,
    };
    Ok(Resources {
        linux,
        annotations: annotations.into_iter().collect::<BTreeMap<_, _>>(),
    })
}

/// Metrics of the type that belongs to the hierarchy: containerd takes no other.
///
/// # Errors
/// The message could not be encoded.
pub fn stats(stats: &Stats) -> Result<Any> {
    let (type_url, value) = match stats.hierarchy {
        Hierarchy::V1 => (
            "io.containerd.cgroups.v1.Metrics",
            stats_v1(stats).write_to_bytes(),
        ),
        Hierarchy::V2 => (
            "io.containerd.cgroups.v2.Metrics",
            dyad_agent_api::stats::encode(stats).write_to_bytes(),
        ),
    };
    Ok(Any {
        type_url: type_url.into(),
        value: value.context(|| "encode stats".into())?,
        ..Default::default()
    })
}

fn stats_v1(stats: &Stats) -> cgroups::metrics::Metrics {
    use cgroups::metrics::{
        BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, MemoryEntry, MemoryOomControl, MemoryStat,
        Metrics, PidsStat, Throttle,
    };
    let cpu = CPUStat {
        usage: Some(CPUUsage {
            total: stats.cpu.usage_ns,
            kernel: stats.cpu.system_ns,
            user: stats.cpu.user_ns,
            ..Default::default()
        })
        .into(),
        throttling: Some(Throttle {
            periods: stats.cpu.periods,
            throttled_periods: stats.cpu.throttled_periods,
            throttled_time: stats.cpu.throttled_ns,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let m = &stats.memory;
    let entry = |limit, usage, max, failcnt| {
        Some(MemoryEntry {
            limit,
            usage,
            max,
            failcnt,
            ..Default::default()
        })
        .into()
    };
    let memory = MemoryStat {
        cache: m.file,
        rss: m.anon,
        pg_fault: m.pgfault,
        pg_maj_fault: m.pgmajfault,
        inactive_anon: m.inactive_anon,
        active_anon: m.active_anon,
        inactive_file: m.inactive_file,
        active_file: m.active_file,
        hierarchical_memory_limit: m.limit,
        hierarchical_swap_limit: m.swap_limit,
        total_cache: m.file,
        total_rss: m.anon,
        total_pg_fault: m.pgfault,
        total_pg_maj_fault: m.pgmajfault,
        total_inactive_anon: m.inactive_anon,
        total_active_anon: m.active_anon,
        total_inactive_file: m.inactive_file,
        total_active_file: m.active_file,
        usage: entry(m.limit, m.usage, m.peak, m.max_events),
        // v1 counts swap together with memory.
        swap: entry(m.swap_limit, m.usage.saturating_add(m.swap_usage), 0, 0),
        kernel: entry(u64::MAX, m.kernel, 0, 0),
        ..Default::default()
    };
    let entries = |read: fn(&IoStats) -> u64, write: fn(&IoStats) -> u64| {
        let one = |io: &IoStats, op: &str, value| BlkIOEntry {
            op: op.into(),
            major: io.major,
            minor: io.minor,
            value,
            ..Default::default()
        };
        stats
            .io
            .iter()
            .flat_map(|io| [one(io, "Read", read(io)), one(io, "Write", write(io))])
            .collect()
    };
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids.current,
            limit: limit_or_zero(stats.pids.limit),
            ..Default::default()
        })
        .into(),
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        blkio: Some(BlkIOStat {
            io_service_bytes_recursive: entries(|io| io.read_bytes, |io| io.write_bytes),
            io_serviced_recursive: entries(|io| io.read_ios, |io| io.write_ios),
            ..Default::default()
        })
        .into(),
        memory_oom_control: Some(MemoryOomControl {
            oom_kill: m.oom_kills,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// containerd writes a pids limit that is not set as 0 on v1.
fn limit_or_zero(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::cgroups_v2;
    use dyad_runtime_handler::stats::{CpuStats, MemoryStats, PidsStats, Pressure, Stall};

    use super::*;

    fn example(hierarchy: Hierarchy) -> Stats {
        Stats {
            hierarchy,
            cpu: CpuStats {
                usage_ns: 5_000,
                ..CpuStats::default()
            },
            memory: MemoryStats {
                usage: 100,
                inactive_file: 40,
                limit: u64::MAX,
                ..MemoryStats::default()
            },
            pids: PidsStats {
                current: 2,
                limit: u64::MAX,
            },
            io: vec![IoStats {
                major: 8,
                read_bytes: 7,
                ..IoStats::default()
            }],
            io_pressure: Some(Pressure {
                some: Stall {
                    avg10: 1234,
                    total_us: 9,
                    ..Stall::default()
                },
                full: Stall::default(),
            }),
        }
    }

    #[test]
    fn each_hierarchy_has_its_metrics_type() {
        let any = stats(&example(Hierarchy::V1)).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let v1 = cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(v1.cpu.usage.total, 5_000);
        assert_eq!(v1.memory.usage.usage, 100);
        assert_eq!(v1.memory.total_inactive_file, 40);
        assert_eq!(v1.pids.limit, 0);
        assert_eq!(v1.blkio.io_service_bytes_recursive[0].value, 7);

        let any = stats(&example(Hierarchy::V2)).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let v2 = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(
            (v2.cpu.usage_usec, v2.memory.usage, v2.pids.limit),
            (5, 100, u64::MAX)
        );
        assert_eq!((v2.io.psi.some.avg10, v2.io.psi.some.total), (12.34, 9));
        assert!(v2.cpu.psi.is_none(), "the kernel does not tell");
    }

    #[test]
    fn an_empty_exec_id_is_the_init_process() {
        assert_eq!(process_id("c".into(), String::new()), ProcessId::init("c"));
        assert_eq!(
            process_id("c".into(), "e".into()),
            ProcessId::exec("c", "e")
        );
    }

    #[test]
    fn an_exec_has_a_terminal_where_its_request_asks_for_one() {
        for (spec, asked) in [("", true), (r#","terminal":true"#, false)] {
            let process =
                format!(r#"{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}{spec}}}"#);
            let request = ExecProcessRequest {
                exec_id: "e".into(),
                terminal: asked,
                spec: MessageField::some(Any {
                    value: process.into_bytes(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let (_, exec) = exec_request(request).unwrap();
            assert_eq!(exec.process.terminal(), Some(asked));
            assert_eq!(exec.stdio.terminal, asked);
        }
    }

    #[test]
    fn a_checkpoint_goes_where_the_options_or_the_request_say() {
        let request = |path: &str, options: Option<CheckpointOptions>| CheckpointTaskRequest {
            id: "c".into(),
            path: path.into(),
            options: MessageField(options.map(|options| {
                Box::new(Any {
                    type_url: CHECKPOINT_OPTIONS.into(),
                    value: options.write_to_bytes().unwrap(),
                    ..Default::default()
                })
            })),
            ..Default::default()
        };
        let (id, to) = checkpoint(request("/c", None)).unwrap();
        assert_eq!((id.as_str(), to.images), ("c", "/c".into()));
        assert!(!to.exit, "without a word it runs on");
        let options = CheckpointOptions {
            exit: true,
            image_path: "/i".into(),
            work_path: "/w".into(),
            ..Default::default()
        };
        let (_, to) = checkpoint(request("/c", Some(options))).unwrap();
        assert_eq!((to.images, to.work), ("/i".into(), Some("/w".into())));
        assert!(to.exit);
        assert!(checkpoint(request("", None)).is_err());
        let mut foreign = request("/c", Some(CheckpointOptions::default()));
        foreign.options.mut_or_insert_default().type_url = "a.b.C".into();
        let error = checkpoint(foreign).unwrap_err().to_string();
        assert!(error.contains("a.b.C"), "{error}");
    }

    #[test]
    fn a_foreign_spec_is_refused() {
        let request = ExecProcessRequest {
            exec_id: "e".into(),
            ..Default::default()
        };
        assert!(matches!(
            exec_request(request),
            Err(Error::InvalidArgument(_))
        ));
    }
}
