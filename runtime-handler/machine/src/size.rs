//! How big a pod's machine is. Pure.
//!
//! ```text
//! annotation dyad.dev/vcpus, dyad.dev/memory  >  the pod's limits  >  its CPU request  >  config
//! ```

use std::collections::{BTreeMap, HashMap};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::{MachineConfig, annotation};
use dyad_runtime_handler::error::Result;

use crate::domain::Size;
use crate::resize::Basis;

/// Below this, guest kernel and agent do not come up.
pub const MEMORY_MIN_MIB: u64 = 96;
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

/// The pod's size, and its disk's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodSize {
    /// vCPUs and memory.
    pub size: Size,
    /// Virtual size of the writable disk.
    pub disk_gib: u64,
    /// The pod's CPU shares, for its cgroup.
    pub cpu_shares: Option<u64>,
    /// From where the size goes on when limits change.
    pub basis: Basis,
}

/// Decides the size from `cri`, the annotations that containerd's CRI puts into the
/// sandbox's spec, and `own`, the pod's `dyad.dev/*` that the configuration allows.
///
/// # Errors
/// `InvalidArgument` with the annotation or limit, its value, and the bounds.
pub fn plan(
    config: &MachineConfig,
    cri: &HashMap<String, String>,
    own: &BTreeMap<String, String>,
    host: Host,
) -> Result<PodSize> {
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
    let number = |name: &str| -> Result<Option<i64>> {
        let Some(text) = cri.get(name) else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|_| {
            Error::InvalidArgument(format!("annotation {name}: {text:?} is not a number"))
        })
    };
    let quota = number("io.kubernetes.cri.sandbox-cpu-quota")?.unwrap_or(0);
    let period = number("io.kubernetes.cri.sandbox-cpu-period")?.unwrap_or(0);
    let shares = number("io.kubernetes.cri.sandbox-cpu-shares")?.unwrap_or(0);
    let limit = number("io.kubernetes.cri.sandbox-memory")?.unwrap_or(0);

    let vcpus = match own.get(annotation::VCPUS) {
        Some(text) => text
            .parse()
            .ok()
            .filter(|n| (1..=VCPUS_MAX).contains(n))
            .ok_or_else(|| {
                Error::InvalidArgument(format!(
                    "annotation dyad.dev/vcpus: {text:?} is not a number from 1 to {VCPUS_MAX}"
                ))
            })?,
        None if quota > 0 && period > 0 => whole_cpus(quota.unsigned_abs(), period.unsigned_abs()),
        // 2 is what CRI writes for "no request".
        None if shares > 2 => whole_cpus(shares.unsigned_abs(), 1024),
        None => config.vcpus,
    }
    .clamp(1, VCPUS_MAX);

    let (memory_mib, memory_from) = match own.get(annotation::MEMORY) {
        Some(text) => (
            quantity_mib(annotation::MEMORY, text)?,
            format!("annotation dyad.dev/memory: {text}"),
        ),
        None if limit > 0 => (
            limit.unsigned_abs() >> 20,
            format!("the pod's memory limit of {} MiB", limit >> 20),
        ),
        None => (
            config.memory_mib,
            format!("memory_mib = {} of the configuration", config.memory_mib),
        ),
    };
    if memory_mib < MEMORY_MIN_MIB {
        return Err(Error::InvalidArgument(format!(
            "{memory_from}: too small to boot a machine, which takes at least {MEMORY_MIN_MIB} MiB; raise it or leave it out"
        )));
    }
    if memory_mib > host.memory_mib {
        return Err(Error::InvalidArgument(format!(
            "{memory_from}: more than this host's {} MiB",
            host.memory_mib
        )));
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
    let max_vcpus = match config.max_vcpus {
        0 => host.cpus.min(VCPUS_GROWTH),
        n => n.min(VCPUS_MAX),
    };
    let max_memory_mib = match config.max_memory_mib {
        0 => host.memory_mib,
        n => n,
    };
    let cpu_milli = match (quota, period) {
        (1.., 1..) => quota.unsigned_abs().saturating_mul(1000) / period.unsigned_abs(),
        _ => u64::from(vcpus) * 1000,
    };
    Ok(PodSize {
        size: Size {
            vcpus,
            max_vcpus: vcpus.max(max_vcpus),
            memory_mib,
            max_memory_mib: memory_mib.max(max_memory_mib),
        },
        disk_gib,
        cpu_shares: (shares > 0).then_some(shares.unsigned_abs()),
        basis: Basis {
            cpu_milli: (!own.contains_key(annotation::VCPUS)).then_some(cpu_milli),
            memory_mib: (!own.contains_key(annotation::MEMORY)).then_some(memory_mib),
        },
    })
}

fn whole_cpus(amount: u64, of: u64) -> u32 {
    amount.div_ceil(of).min(u64::from(VCPUS_MAX)) as u32
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

    fn cri(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| (format!("io.kubernetes.cri.sandbox-{k}"), (*v).to_owned()))
            .collect()
    }

    fn own(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| (format!("dyad.dev/{k}"), (*v).to_owned()))
            .collect()
    }

    fn size(cri_pairs: &[(&str, &str)], own_pairs: &[(&str, &str)]) -> Result<PodSize> {
        plan(
            &MachineConfig::default(),
            &cri(cri_pairs),
            &own(own_pairs),
            HOST,
        )
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_configured_size() {
        let got = size(&[("cpu-shares", "2")], &[]).expect("size");
        assert_eq!(
            (got.size.vcpus, got.size.memory_mib, got.disk_gib),
            (1, 256, 10)
        );
        assert_eq!(got.size.max_vcpus, 2);
        assert_eq!(got.size.max_memory_mib, 8192);
    }

    #[test]
    fn limits_win_over_requests_and_annotations_over_both() {
        let limits = [
            ("cpu-quota", "150000"),
            ("cpu-period", "100000"),
            ("cpu-shares", "4096"),
            ("memory", "536870912"),
        ];
        let got = size(&limits, &[]).expect("size");
        assert_eq!((got.size.vcpus, got.size.memory_mib), (2, 512));
        assert_eq!(got.cpu_shares, Some(4096));
        let got = size(
            &limits,
            &[("vcpus", "3"), ("memory", "1Gi"), ("disk", "20Gi")],
        )
        .expect("size");
        assert_eq!(
            (got.size.vcpus, got.size.memory_mib, got.disk_gib),
            (3, 1024, 20)
        );
        assert_eq!(got.size.max_vcpus, 3);
        let got = size(&[("cpu-shares", "1536")], &[]).expect("size");
        assert_eq!(got.size.vcpus, 2);
    }

    #[test]
    fn what_a_machine_can_grow_to_is_the_host_s_or_configured() {
        let grown = |max_vcpus, max_memory_mib| {
            let config = MachineConfig {
                max_vcpus,
                max_memory_mib,
                ..MachineConfig::default()
            };
            let size = plan(&config, &cri(&[]), &own(&[]), HOST)
                .expect("size")
                .size;
            (size.max_vcpus, size.max_memory_mib)
        };
        assert_eq!(grown(0, 0), (2, 8192));
        assert_eq!(grown(6, 1024), (6, 1024));
        // Never less than it boots with, nor more than QEMU takes.
        assert_eq!(grown(1000, 64), (VCPUS_MAX, 256));
    }

    #[test]
    fn what_an_annotation_fixes_has_no_basis_to_grow_from() {
        let limits = [
            ("cpu-quota", "150000"),
            ("cpu-period", "100000"),
            ("memory", "536870912"),
        ];
        let basis = |own_pairs: &[(&str, &str)]| size(&limits, own_pairs).expect("size").basis;
        assert_eq!(basis(&[]).cpu_milli, Some(1500));
        assert_eq!(basis(&[]).memory_mib, Some(512));
        assert_eq!(basis(&[("vcpus", "3")]).cpu_milli, None);
        assert_eq!(basis(&[("memory", "1Gi")]).memory_mib, None);
    }

    #[test]
    fn a_memory_too_small_to_boot_is_refused_with_the_least() {
        let error = size(&[("memory", "33554432")], &[]).expect_err("refused");
        assert!(error.to_string().contains("limit of 32 MiB"), "{error}");
        assert!(error.to_string().contains("96 MiB"), "{error}");
        assert!(size(&[], &[("memory", "16Mi")]).is_err());
        let error = size(&[], &[("memory", "1Ti")]).expect_err("refused");
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
            let error = size(&[], &[(name, value)]).expect_err(name);
            assert!(error.to_string().contains(name), "{name}={value}: {error}");
        }
        assert!(size(&[], &[("boot", "image")]).is_ok());
        assert!(size(&[("cpu-quota", "x")], &[]).is_err());
    }
}
