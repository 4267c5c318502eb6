//! How big a pod's machine is made. Pure.
//!
//! ```text
//! annotation dyad.dev/vcpus, dyad.dev/memory  >  the pod's limits  >  its CPU request  >  config
//! ```

use std::collections::BTreeMap;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::{MachineConfig, annotation};
use dyad_runtime_handler::error::Result;
use dyad_runtime_handler::spec::PodSize;

use super::{Asked, Basis, MEMORY_MIN_MIB, Size};

/// A machine can grow to this many vCPUs, where the host has them.
const VCPUS_GROWTH: u32 = 16;
/// More than QEMU's q35 takes.
const VCPUS_MAX: u32 = 255;
/// Disks beyond are a mistake in units.
const DISK_MAX_GIB: u64 = 64 << 10;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs online.
    pub cpus: u32,
    /// Memory in all.
    pub memory_mib: u64,
}

/// What the machine is made as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// vCPUs and memory.
    pub size: Size,
    /// Virtual size of the writable disk.
    pub disk_gib: u64,
    /// The pod's CPU shares, for its cgroup.
    pub cpu_shares: Option<u64>,
    /// From where the size goes on when limits change.
    pub basis: Basis,
}

/// Decides the size from the pod's, and `own`, its `dyad.dev/*` annotations that the
/// configuration allows. Limits above what the host has are cut to that.
///
/// # Errors
/// `InvalidArgument` with the annotation, its value, and the bounds.
pub fn plan(
    config: &MachineConfig,
    pod: &PodSize,
    own: &BTreeMap<String, String>,
    host: Host,
) -> Result<Plan> {
    check_known(own)?;
    let max_vcpus = match config.max_vcpus {
        0 => host.cpus.clamp(1, VCPUS_GROWTH),
        n => n.min(VCPUS_MAX),
    };
    let cpu = cpu_asked(config, pod);
    let vcpus = match own.get(annotation::VCPUS) {
        Some(text) => vcpus(text)?,
        None => u32::try_from(cpu.at_boot().max(1).div_ceil(1000))
            .unwrap_or(VCPUS_MAX)
            .min(max_vcpus.max(config.vcpus))
            .clamp(1, VCPUS_MAX),
    };

    let memory = Asked {
        limits: pod.memory_limit(),
        unlimited: config.memory_mib << 20,
    };
    let mut basis = Basis {
        cpu_milli: Some(cpu),
        memory: Some(memory),
        overhead_mib: config.guest_overhead_mib,
    };
    let memory_mib = match own.get(annotation::MEMORY) {
        Some(text) => memory_mib(text, host)?,
        None => basis.machine_mib(memory.at_boot()).min(host.memory_mib),
    };
    if own.contains_key(annotation::VCPUS) {
        basis.cpu_milli = None;
    }
    if own.contains_key(annotation::MEMORY) {
        basis.memory = None;
    }
    let disk_gib = match own.get(annotation::DISK) {
        Some(text) => quantity_mib(annotation::DISK, text)?.div_ceil(1024),
        None => config.disk_gib,
    };
    if !(1..=DISK_MAX_GIB).contains(&disk_gib) {
        return Err(Error::InvalidArgument(format!(
            "a pod's disk of {disk_gib} GiB: must be from 1 to {DISK_MAX_GIB} GiB"
        )));
    }
    let max_memory_mib = match config.max_memory_mib {
        0 => host.memory_mib,
        n => n,
    };
    Ok(Plan {
        size: Size {
            vcpus,
            max_vcpus: vcpus.max(max_vcpus),
            memory_mib,
            max_memory_mib: memory_mib.max(max_memory_mib),
        },
        disk_gib,
        cpu_shares: pod.cpu_shares(),
        basis,
    })
}

fn check_known(own: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in own {
        if !annotation::ALL.contains(&name.as_str()) {
            return Err(Error::InvalidArgument(format!(
                "annotation {name}: unknown; a machine knows {}",
                annotation::ALL.join(", ")
            )));
        }
        if name == annotation::BOOT && value != "image" {
            return Err(Error::InvalidArgument(format!(
                "annotation {name}: {value:?} is not supported, only \"image\" is"
            )));
        }
    }
    Ok(())
}

/// In thousandths of a CPU. Containers without a limit have what is requested beyond the
/// limits of the others, or the configured number.
fn cpu_asked(config: &MachineConfig, pod: &PodSize) -> Asked {
    let configured = u64::from(config.vcpus) * 1000;
    let requested = pod.cpu_request_milli();
    let limits = pod.cpu_limit_milli();
    Asked {
        limits,
        unlimited: match (limits, requested) {
            (None, Some(requested)) => requested,
            (Some(limits), Some(requested)) => configured.max(requested.saturating_sub(limits)),
            (_, None) => configured,
        },
    }
}

fn vcpus(text: &str) -> Result<u32> {
    text.parse()
        .ok()
        .filter(|n| (1..=VCPUS_MAX).contains(n))
        .ok_or_else(|| {
            Error::InvalidArgument(format!(
                "annotation dyad.dev/vcpus: {text:?} is not a number from 1 to {VCPUS_MAX}"
            ))
        })
}

fn memory_mib(text: &str, host: Host) -> Result<u64> {
    let mib = quantity_mib(annotation::MEMORY, text)?;
    if mib < MEMORY_MIN_MIB {
        return Err(Error::InvalidArgument(format!(
            "annotation dyad.dev/memory: {text}: too small to boot a machine, which takes at least {MEMORY_MIN_MIB} MiB; raise it or leave it out"
        )));
    }
    if mib > host.memory_mib {
        return Err(Error::InvalidArgument(format!(
            "annotation dyad.dev/memory: {text}: more than this host's {} MiB",
            host.memory_mib
        )));
    }
    Ok(mib)
}

/// A Kubernetes quantity of bytes (`512Mi`, `1G`, `268435456`), rounded down to MiB.
fn quantity_mib(name: &str, text: &str) -> Result<u64> {
    const UNITS: [(&str, u64); 9] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("", 1),
    ];
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    UNITS
        .iter()
        .find(|(suffix, _)| *suffix == unit)
        .and_then(|(_, factor)| digits.parse::<u64>().ok()?.checked_mul(*factor))
        .map(|bytes| bytes >> 20)
        .ok_or_else(|| {
            Error::InvalidArgument(format!(
                "annotation {name}: {text:?} is not a quantity such as 512Mi or 2Gi"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 2,
        memory_mib: 8192,
    };

    fn own(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| (format!("dyad.dev/{k}"), (*v).to_owned()))
            .collect()
    }

    const MIB: i64 = 1 << 20;

    /// The configured default is 256 MiB, and 100 MiB for the guest's own.
    fn config() -> MachineConfig {
        MachineConfig {
            guest_overhead_mib: 100,
            ..MachineConfig::default()
        }
    }

    fn made(pod: PodSize, own_pairs: &[(&str, &str)]) -> Result<Plan> {
        plan(&config(), &pod, &own(own_pairs), HOST)
    }

    fn memory(limit: i64) -> PodSize {
        PodSize {
            memory_limit: limit,
            ..PodSize::default()
        }
    }

    const NOTHING: PodSize = PodSize {
        cpu_period: 0,
        cpu_quota: 0,
        cpu_shares: 2,
        memory_limit: 0,
    };
    const LIMITS: PodSize = PodSize {
        cpu_period: 100_000,
        cpu_quota: 150_000,
        cpu_shares: 4096,
        memory_limit: 512 * MIB,
    };

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_configured_size_and_the_guests_own() {
        let got = made(NOTHING, &[]).expect("size");
        assert_eq!(
            (got.size.vcpus, got.size.memory_mib, got.disk_gib),
            (1, 256 + 4 + 100, 10)
        );
        assert_eq!(got.size.max_vcpus, 2);
        assert_eq!(got.size.max_memory_mib, 8192);
    }

    #[test]
    fn limits_win_over_requests_and_annotations_over_both() {
        let got = made(LIMITS, &[]).expect("size");
        assert_eq!((got.size.vcpus, got.size.memory_mib), (2, 512 + 8 + 100));
        assert_eq!(got.cpu_shares, Some(4096));
        let fixed = [("vcpus", "3"), ("memory", "1Gi"), ("disk", "20Gi")];
        let got = made(LIMITS, &fixed).expect("size");
        // What an annotation names is the machine, whole.
        assert_eq!(
            (got.size.vcpus, got.size.memory_mib, got.disk_gib),
            (3, 1024, 20)
        );
        assert_eq!(got.size.max_vcpus, 3);
        let requests = PodSize {
            cpu_shares: 1536,
            ..PodSize::default()
        };
        assert_eq!(made(requests, &[]).expect("size").size.vcpus, 2);
    }

    #[test]
    fn the_smallest_pods_boot_and_each_mib_of_a_limit_counts() {
        for (limit, mib) in [
            (32 * MIB, 32 + 1 + 100),
            (64 * MIB, 64 + 1 + 100),
            (64 * MIB + 1, 65 + 2 + 100),
            (4096 * MIB, 4096 + 64 + 100),
        ] {
            let got = made(memory(limit), &[]).expect("size");
            assert_eq!(got.size.memory_mib, mib, "{limit}");
        }
        let bare = MachineConfig {
            guest_overhead_mib: 0,
            ..config()
        };
        let got = plan(&bare, &memory(32 * MIB), &own(&[]), HOST).expect("size");
        assert_eq!(got.size.memory_mib, MEMORY_MIN_MIB);
    }

    #[test]
    fn limits_above_the_host_start_with_what_the_host_has() {
        let pod = PodSize {
            cpu_quota: 9_000_000,
            ..LIMITS
        };
        let got = made(pod, &[]).expect("size");
        assert_eq!((got.size.vcpus, got.size.max_vcpus), (2, 2));
        let got = made(memory(1 << 40), &[]).expect("size");
        assert_eq!((got.size.memory_mib, got.size.max_memory_mib), (8192, 8192));
        assert!(made(memory(i64::MAX), &[]).is_ok());
    }

    #[test]
    fn what_a_machine_can_grow_to_is_the_host_s_or_configured() {
        let grown = |max_vcpus, max_memory_mib| {
            let config = MachineConfig {
                max_vcpus,
                max_memory_mib,
                ..config()
            };
            let size = plan(&config, &NOTHING, &own(&[]), HOST).expect("size").size;
            (size.max_vcpus, size.max_memory_mib)
        };
        assert_eq!(grown(0, 0), (2, 8192));
        assert_eq!(grown(6, 1024), (6, 1024));
        // Never less than it boots with, nor more than QEMU takes.
        assert_eq!(grown(1000, 64), (VCPUS_MAX, 360));
    }

    #[test]
    fn what_an_annotation_fixes_has_no_basis_to_grow_from() {
        let basis = |own_pairs: &[(&str, &str)]| made(LIMITS, own_pairs).expect("size").basis;
        let limits = |asked: Option<Asked>| asked.and_then(|asked| asked.limits);
        assert_eq!(limits(basis(&[]).cpu_milli), Some(1500));
        assert_eq!(limits(basis(&[]).memory), Some(512 << 20));
        assert_eq!(basis(&[("vcpus", "3")]).cpu_milli, None);
        assert_eq!(basis(&[("memory", "1Gi")]).memory, None);
    }

    #[test]
    fn requests_beyond_the_limits_are_those_of_containers_without_one() {
        let unlimited = |pod: PodSize| made(pod, &[]).expect("size").basis.cpu_milli;
        let asked = |limits, unlimited| Some(Asked { limits, unlimited });
        assert_eq!(unlimited(LIMITS), asked(Some(1500), 2500));
        assert_eq!(unlimited(NOTHING), asked(None, 1000));
        let small = PodSize {
            cpu_shares: 512,
            ..LIMITS
        };
        assert_eq!(unlimited(small), asked(Some(1500), 1000));
    }

    #[test]
    fn an_annotation_too_small_to_boot_or_above_the_host_is_refused_with_the_bound() {
        let error = made(NOTHING, &[("memory", "16Mi")]).expect_err("refused");
        assert!(error.to_string().contains("96 MiB"), "{error}");
        let error = made(NOTHING, &[("memory", "1Ti")]).expect_err("refused");
        assert!(error.to_string().contains("8192 MiB"), "{error}");
    }

    #[test]
    fn annotations_are_read_strictly() {
        for (name, value) in [
            ("vcpus", "0"),
            ("vcpus", "two"),
            ("vcpus", "1.5"),
            ("vcpus", "-1"),
            ("memory", "512"),
            ("memory", "12XB"),
            ("memory", "99999999999999999999Gi"),
            ("memory", ""),
            ("disk", "0"),
            ("boot", "disk"),
            ("vcpu", "1"),
        ] {
            let error = made(NOTHING, &[(name, value)]).expect_err(name);
            assert!(error.to_string().contains(name), "{name}={value}: {error}");
        }
        assert!(made(NOTHING, &[("boot", "image")]).is_ok());
    }
}
