//! The contract's [`Stats`] as containerd's cgroup v2 metrics: what the guest answers to the
//! shim, and the shim to containerd.

use dyad_runtime_handler::stats::{
    self, CpuStats, Hierarchy, IoStats, MemoryStats, Pressure, Stall, Stats,
};
use protobuf::{Message as _, MessageField};

use crate::task_api::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};

/// The metrics; those that the contract does not have are not filled.
pub fn encode(stats: &Stats) -> Metrics {
    let usec = |ns: u64| ns / 1000;
    let psi = |pressure: Option<Pressure>| MessageField(pressure.map(psi_stats).map(Box::new));
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    Metrics {
        cpu: MessageField::some(CPUStat {
            psi: psi(cpu.pressure),
            usage_usec: usec(cpu.usage_ns),
            user_usec: usec(cpu.user_ns),
            system_usec: usec(cpu.system_ns),
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: usec(cpu.throttled_ns),
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            psi: psi(memory.pressure),
            usage: memory.usage,
            usage_limit: memory.limit,
            max_usage: memory.peak,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            anon: memory.anon,
            file: memory.file,
            inactive_file: memory.inactive_file,
            active_file: memory.active_file,
            inactive_anon: memory.inactive_anon,
            active_anon: memory.active_anon,
            // The kernel's stacks are in this figure: apart nobody adds the two up wrongly.
            slab: memory.kernel,
            pgfault: memory.pgfault,
            pgmajfault: memory.pgmajfault,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            max: memory.max_events,
            oom_kill: memory.oom_kills,
            ..Default::default()
        }),
        pids: MessageField::some(PidsStat {
            current: pids.current,
            limit: pids.limit,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            psi: psi(stats.io_pressure),
            usage: stats
                .io
                .iter()
                .map(|io| IOEntry {
                    major: io.major,
                    minor: io.minor,
                    rbytes: io.read_bytes,
                    wbytes: io.write_bytes,
                    rios: io.read_ios,
                    wios: io.write_ios,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn psi_stats(pressure: Pressure) -> PSIStats {
    let share = |hundredths: u32| f64::from(hundredths) / 100.0;
    let data = |stall: Stall| PSIData {
        avg10: share(stall.avg10),
        avg60: share(stall.avg60),
        avg300: share(stall.avg300),
        total: stall.total_us,
        ..Default::default()
    };
    PSIStats {
        some: MessageField::some(data(pressure.some)),
        full: MessageField::some(data(pressure.full)),
        ..Default::default()
    }
}

/// What a guest answered.
///
/// # Errors
/// The bytes are not containerd's cgroup v2 metrics.
pub fn decode(metrics: &[u8]) -> protobuf::Result<Stats> {
    let metrics = Metrics::parse_from_bytes(metrics)?;
    let ns = |usec: u64| usec.saturating_mul(1000);
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let events = &metrics.memory_events;
    Ok(Stats {
        hierarchy: Hierarchy::V2,
        cpu: CpuStats {
            // Of a guest nobody asks it yet.
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
        pids: stats::PidsStats {
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
    use super::*;

    #[test]
    fn the_host_reads_all_that_the_guest_read() {
        // Every figure another one, times in whole microseconds.
        let stats = Stats {
            hierarchy: Hierarchy::V2,
            cpu: CpuStats {
                pressure: None,
                usage_ns: 1000,
                user_ns: 2000,
                system_ns: 3000,
                periods: 4,
                throttled_periods: 5,
                throttled_ns: 6000,
            },
            memory: MemoryStats {
                pressure: None,
                usage: 7,
                limit: u64::MAX,
                peak: 9,
                swap_usage: 10,
                swap_limit: 11,
                anon: 12,
                file: 13,
                inactive_file: 14,
                active_file: 15,
                inactive_anon: 16,
                active_anon: 17,
                kernel: 18,
                pgfault: 19,
                pgmajfault: 20,
                max_events: 21,
                oom_kills: 22,
            },
            pids: stats::PidsStats {
                current: 23,
                limit: 24,
            },
            io_pressure: None,
            io: vec![IoStats {
                major: 25,
                minor: 26,
                read_bytes: 27,
                write_bytes: 28,
                read_ios: 29,
                write_ios: 30,
            }],
        };
        let carried = decode(&encode(&stats).write_to_bytes().unwrap()).unwrap();
        assert_eq!(carried, stats);
    }

    #[test]
    fn metrics_become_ours() {
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 3;
        metrics.memory.mut_or_insert_default().kernel_stack = 10;
        metrics.memory.mut_or_insert_default().slab = 5;
        metrics.memory.mut_or_insert_default().usage_limit = u64::MAX;
        metrics.memory_events.mut_or_insert_default().oom_kill = 1;
        let stats = decode(&metrics.write_to_bytes().unwrap()).unwrap();
        assert_eq!(stats.cpu.usage_ns, 3000);
        assert_eq!(stats.memory.kernel, 15);
        assert_eq!((stats.memory.limit, stats.memory.oom_kills), (u64::MAX, 1));
        assert!(decode(b"\xff").is_err());
    }
}
