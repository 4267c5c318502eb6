//! How big a running machine is to be, as its containers' limits change. Pure.
//!
//! kubelet resizes a pod by new limits for its containers; a container that it starts anew
//! for it comes with them. The machine was made for the pod's limits, so it follows by the
//! difference: made size + sum of (limit now - limit at first).
//!
//! ```text
//! memory  min ......... boot .................. max
//!          balloon takes |  virtio-mem adds
//! vCPUs   1 ...................... max
//!          of those that QEMU has, the guest runs as many
//! ```
//! vCPUs are not plugged: libvirt needs its own cgroup for that, which is empty, and gone on
//! hosts that tidy up, since QEMU is in the pod's; and QEMU never reports the end of one that
//! it emulates. One that is offline costs nothing and comes at once.

use std::collections::BTreeMap;

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::Result;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use quick_xml::events::Event;
use serde::{Deserialize, Serialize};

use crate::domain::Size;
use crate::size::MEMORY_MIN_MIB;

/// virtio-mem gives and takes blocks of this size.
pub const BLOCK_MIB: u64 = 2;
/// The CFS period where a spec names none, in microseconds.
const PERIOD: u64 = 100_000;

/// What a container may use; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory: Option<u64>,
}

impl Limits {
    /// The limits in a spec, or in an update of `self`: what is unset stays.
    #[must_use]
    pub fn changed_by(self, resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(|cpu| cpu.period()).filter(|p| *p > 0);
        let cpu_milli = match cpu.and_then(|cpu| cpu.quota()) {
            None | Some(0) => self.cpu_milli,
            Some(quota) => u64::try_from(quota)
                .ok()
                .map(|quota| quota.saturating_mul(1000) / period.unwrap_or(PERIOD)),
        };
        let memory = resources.memory().as_ref();
        let memory = match memory.and_then(|memory| memory.limit()) {
            None | Some(0) => self.memory,
            Some(limit) => u64::try_from(limit).ok(),
        };
        Self { cpu_milli, memory }
    }

    /// An update that brings a container to these limits.
    pub fn to_resources(self) -> LinuxResources {
        let mut resources = LinuxResources::default();
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        if let Some(milli) = self.cpu_milli {
            let mut cpu = LinuxCpu::default();
            cpu.set_quota(Some(signed(milli.saturating_mul(PERIOD) / 1000)));
            cpu.set_period(Some(PERIOD));
            resources.set_cpu(Some(cpu));
        }
        if let Some(limit) = self.memory {
            let mut memory = LinuxMemory::default();
            memory.set_limit(Some(signed(limit)));
            resources.set_memory(Some(memory));
        }
        resources
    }
}

/// What the machine was made for; `None`: that part does not follow, because an
/// annotation of the pod names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Basis {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// MiB.
    pub memory_mib: Option<u64>,
}

/// How big a machine is, or is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// vCPUs that the guest runs.
    pub vcpus: u32,
    /// Of the memory that it booted with, what the balloon leaves.
    pub balloon_mib: u64,
    /// Plugged by virtio-mem.
    pub plugged_mib: u64,
}

impl Reached {
    /// As the machine boots.
    pub fn at_boot(size: &Size) -> Self {
        Self {
            vcpus: size.vcpus,
            balloon_mib: size.memory_mib,
            plugged_mib: 0,
        }
    }

    /// In all.
    pub fn memory_mib(&self) -> u64 {
        self.balloon_mib + self.plugged_mib
    }
}

/// The limits of the pod's containers, at first and now, by container name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    basis: Basis,
    containers: BTreeMap<String, (Limits, Limits)>,
}

impl Ledger {
    /// No container yet.
    pub fn new(basis: Basis) -> Self {
        Self {
            basis,
            containers: BTreeMap::new(),
        }
    }

    /// The container's limits now. Its first ones count as those the machine was made for.
    pub fn set(&mut self, container: &str, limits: Limits) {
        let entry = self.containers.entry(container.to_owned());
        let (first, now) = entry.or_insert((limits, limits));
        // A limit that comes, or goes, later is no difference that could be told.
        first.cpu_milli = first.cpu_milli.or(limits.cpu_milli);
        first.memory = first.memory.or(limits.memory);
        *now = limits;
    }

    /// The container's limits now.
    pub fn limits(&self, container: &str) -> Limits {
        let found = self.containers.get(container);
        found.map(|(_, now)| *now).unwrap_or_default()
    }

    /// What the machine is to become; `size` has its bounds.
    ///
    /// # Errors
    /// `InvalidArgument`, with the bounds, for what it cannot become.
    pub fn target(&self, size: &Size) -> Result<Reached> {
        let mut target = Reached::at_boot(size);
        if let Some(basis) = self.basis.cpu_milli {
            let milli = self.shifted(basis, |limits| limits.cpu_milli);
            let vcpus = milli.max(1).div_ceil(1000);
            target.vcpus = u32::try_from(vcpus)
                .ok()
                .filter(|vcpus| *vcpus <= size.max_vcpus)
                .ok_or_else(|| {
                    Error::InvalidArgument(format!(
                        "the pod's CPU limit of {milli}m: takes {vcpus} vCPUs, and this machine has from 1 to {}; stay within, or delete the pod and create it with the new size",
                        size.max_vcpus
                    ))
                })?;
        }
        if let Some(basis) = self.basis.memory_mib {
            let bytes = self.shifted(basis << 20, |limits| limits.memory);
            let mib = bytes >> 20;
            if !(MEMORY_MIN_MIB..=size.max_memory_mib).contains(&mib) {
                return Err(Error::InvalidArgument(format!(
                    "the pod's memory limit of {mib} MiB: this machine can have from {MEMORY_MIN_MIB} to {} MiB; stay within, or delete the pod and create it with the new size",
                    size.max_memory_mib
                )));
            }
            target.balloon_mib = mib.min(size.memory_mib);
            // A limit is what may be had, so the last block counts whole, unless it is the last there is.
            let more = mib - target.balloon_mib;
            target.plugged_mib = more.next_multiple_of(BLOCK_MIB).min(pluggable_mib(size));
        }
        Ok(target)
    }

    fn shifted(&self, basis: u64, part: impl Fn(&Limits) -> Option<u64>) -> u64 {
        let shift: i128 = self
            .containers
            .values()
            .map(|(first, now)| match (part(first), part(now)) {
                (Some(first), Some(now)) => i128::from(now) - i128::from(first),
                _ => 0,
            })
            .sum();
        u64::try_from((i128::from(basis) + shift).max(0)).unwrap_or(u64::MAX)
    }
}

/// What virtio-mem has plugged, in MiB, read from a running domain's definition. `None`:
/// there is no such device, or it does not say.
pub fn plugged_mib(xml: &str) -> Option<u64> {
    let mut reader = quick_xml::Reader::from_str(xml);
    let (mut in_device, mut in_current) = (false, false);
    loop {
        match reader.read_event().ok()? {
            Event::Start(tag) if tag.name().as_ref() == "memory" => {
                let model = tag.try_get_attribute("model").ok()?;
                in_device = model.is_some_and(|model| model.value.as_ref() == "virtio-mem");
            }
            Event::Start(tag) if in_device && tag.name().as_ref() == "current" => {
                let unit = tag.try_get_attribute("unit").ok()??;
                in_current = unit.value.as_ref() == "KiB";
            }
            Event::Text(text) if in_current => {
                let kib: u64 = text.trim().parse().ok()?;
                return Some(kib >> 10);
            }
            Event::End(tag) if tag.name().as_ref() == "memory" => in_device = false,
            Event::End(_) => in_current = false,
            Event::Eof => return None,
            _ => {}
        }
    }
}

/// How much virtio-mem can add to a machine of this size.
pub fn pluggable_mib(size: &Size) -> u64 {
    let room = size.max_memory_mib.saturating_sub(size.memory_mib);
    room - room % BLOCK_MIB
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};
    use proptest::prelude::*;

    use super::*;

    const SIZE: Size = Size {
        vcpus: 1,
        max_vcpus: 4,
        memory_mib: 256,
        max_memory_mib: 1024,
    };
    const BASIS: Basis = Basis {
        cpu_milli: Some(1000),
        memory_mib: Some(256),
    };

    fn limits(cpu_milli: u64, memory_mib: u64) -> Limits {
        Limits {
            cpu_milli: Some(cpu_milli),
            memory: Some(memory_mib << 20),
        }
    }

    fn resized(changes: &[(&str, Limits)]) -> Result<Reached> {
        let mut ledger = Ledger::new(BASIS);
        for (name, limits) in changes {
            ledger.set(name, *limits);
        }
        ledger.target(&SIZE)
    }

    fn reached(vcpus: u32, balloon_mib: u64, plugged_mib: u64) -> Reached {
        Reached {
            vcpus,
            balloon_mib,
            plugged_mib,
        }
    }

    #[test]
    fn the_machine_follows_the_sum_of_the_containers_up_and_down() {
        let (a, b) = (limits(500, 128), limits(500, 128));
        let none = Limits::default();
        let cases: [(&[(&str, Limits)], Reached); 8] = [
            (&[], reached(1, 256, 0)),
            (&[("a", a), ("b", b)], reached(1, 256, 0)),
            (
                &[("a", a), ("b", b), ("a", limits(1500, 384))],
                reached(2, 256, 256),
            ),
            (
                &[
                    ("a", a),
                    ("b", b),
                    ("a", limits(1500, 384)),
                    ("b", limits(2500, 64)),
                ],
                reached(4, 256, 192),
            ),
            (
                &[("a", a), ("b", b), ("a", limits(100, 64))],
                reached(1, 192, 0),
            ),
            (
                &[("a", a), ("b", b), ("a", limits(1500, 384)), ("a", a)],
                reached(1, 256, 0),
            ),
            // An odd MiB takes a whole block.
            (&[("a", a), ("a", limits(500, 131))], reached(1, 256, 4)),
            // A container without limits had none of the machine's size.
            (
                &[
                    ("a", none),
                    ("a", limits(4000, 512)),
                    ("a", limits(5000, 513)),
                ],
                reached(2, 256, 2),
            ),
        ];
        for (changes, expected) in cases {
            assert_eq!(resized(changes).expect("target"), expected, "{changes:?}");
        }
    }

    #[test]
    fn what_cannot_be_reached_is_refused_with_the_bounds() {
        let cases = [
            (limits(4001, 256), "from 1 to 4"),
            (limits(1000, 1025), "from 96 to 1024 MiB"),
            (limits(1000, 95), "from 96 to 1024 MiB"),
            (limits(u64::MAX, 256), "from 1 to 4"),
        ];
        for (limits, bounds) in cases {
            let error = resized(&[("a", super::tests::limits(1000, 256)), ("a", limits)]);
            let error = error.expect_err("refused").to_string();
            assert!(error.contains(bounds), "{error}");
        }
    }

    #[test]
    fn what_an_annotation_names_does_not_follow() {
        let mut ledger = Ledger::new(Basis::default());
        ledger.set("a", limits(1000, 256));
        ledger.set("a", limits(9000, 9000));
        assert_eq!(
            ledger.target(&SIZE).expect("target"),
            Reached::at_boot(&SIZE)
        );
    }

    #[test]
    fn limits_are_read_from_a_spec_and_an_update_changes_only_what_it_names() {
        let cpu = |quota, period| {
            LinuxCpuBuilder::default()
                .quota(quota)
                .period(period)
                .build()
        };
        let memory = |limit| LinuxMemoryBuilder::default().limit(limit).build();
        let spec = LinuxResourcesBuilder::default()
            .cpu(cpu(50_000_i64, 100_000_u64).expect("cpu"))
            .memory(memory(64_i64 << 20).expect("memory"))
            .build()
            .expect("resources");
        let first = Limits::default().changed_by(&spec);
        assert_eq!(first, limits(500, 64));
        let more = LinuxResourcesBuilder::default()
            .memory(memory(96_i64 << 20).expect("memory"))
            .build()
            .expect("resources");
        assert_eq!(first.changed_by(&more), limits(500, 96));
        let unlimited = LinuxResourcesBuilder::default()
            .cpu(cpu(-1_i64, 100_000_u64).expect("cpu"))
            .build()
            .expect("resources");
        assert_eq!(first.changed_by(&unlimited).cpu_milli, None);
        assert_eq!(Limits::default().changed_by(&first.to_resources()), first);
    }

    #[test]
    fn what_is_plugged_is_read_from_the_virtio_mem_device_only() {
        let xml = |device: &str| {
            format!(
                "<domain><memory unit='KiB'>262144</memory><devices>{device}</devices></domain>"
            )
        };
        let device = "<memory model='virtio-mem'><target><size unit='KiB'>8388608</size>\
            <requested unit='KiB'>131072</requested><current unit='KiB'>65536</current></target></memory>";
        assert_eq!(plugged_mib(&xml(device)), Some(64));
        for none in [
            "",
            "<memory model='dimm'><target><current unit='KiB'>1024</current></target></memory>",
            "<memory model='virtio-mem'><target><size unit='KiB'>8</size></target></memory>",
            "<memory model='virtio-mem'><target><current unit='GiB'>1</current></target></memory>",
            "<memory model='virtio-mem'><target><current unit='KiB'>x</current></target></memory>",
            "<memory model='virtio-mem'><target><current",
        ] {
            assert_eq!(plugged_mib(&xml(none)), None, "{none}");
        }
    }

    fn some_limits() -> impl Strategy<Value = Limits> {
        (
            proptest::option::of(1_u64..6000),
            proptest::option::of(0_u64..(2 << 30)),
        )
            .prop_map(|(cpu_milli, memory)| Limits { cpu_milli, memory })
    }

    proptest! {
        /// Whatever is asked: a target is within the bounds, and going back to the first
        /// limits goes back to the size at boot.
        #[test]
        fn a_target_is_within_the_bounds_and_the_way_back_leads_home(
            changes in proptest::collection::vec(("[ab]", some_limits()), 0..12),
        ) {
            let mut ledger = Ledger::new(BASIS);
            for (name, limits) in &changes {
                ledger.set(name, *limits);
                if let Ok(target) = ledger.target(&SIZE) {
                    prop_assert!((1..=SIZE.max_vcpus).contains(&target.vcpus));
                    prop_assert!(target.balloon_mib >= MEMORY_MIN_MIB);
                    prop_assert!(target.balloon_mib <= SIZE.memory_mib);
                    prop_assert!(target.memory_mib() <= SIZE.max_memory_mib);
                    prop_assert_eq!(target.plugged_mib % BLOCK_MIB, 0);
                    prop_assert!(target.plugged_mib == 0 || target.balloon_mib == SIZE.memory_mib);
                }
            }
            let firsts: Vec<(String, Limits)> = ledger
                .containers
                .iter()
                .map(|(name, (first, _))| (name.clone(), *first))
                .collect();
            for (name, first) in firsts {
                ledger.set(&name, first);
            }
            prop_assert_eq!(ledger.target(&SIZE).expect("home"), Reached::at_boot(&SIZE));
        }
    }
}
