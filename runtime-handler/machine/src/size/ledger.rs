//! How big a running machine is to be, as its containers' limits change. Pure.
//!
//! kubelet resizes a pod by new limits for its containers; a container that it starts anew
//! for it comes with them. The machine was made for the sum of the pod's limits, so it follows
//! by the difference; containers without a limit have a part of their own, on top:
//!
//! ```text
//! pod's limits + sum of (limit now - limit at first)     no limit at first: 0
//!   + the unlimited part, while a container has no limit
//! ```
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
use serde::{Deserialize, Serialize};

use super::{Asked, BLOCK_MIB, Basis, MEMORY_MIN_MIB, Reached, Size};

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

    /// As it is once the container has these limits. Its first ones count as those that the
    /// pod's sum has.
    ///
    /// # Errors
    /// `InvalidArgument`, with the bounds, where a container that is known asks for more than
    /// the machine can become. What a pod was created with is cut to the bounds instead.
    pub fn with(&self, container: &str, limits: Limits, size: &Size) -> Result<Self> {
        let known = self.containers.contains_key(container);
        let mut changed = self.clone();
        let entry = changed.containers.entry(container.to_owned());
        entry.or_insert((limits, limits)).1 = limits;
        if known {
            changed.check_growth(self, size)?;
        }
        Ok(changed)
    }

    fn check_growth(&self, before: &Self, size: &Size) -> Result<()> {
        let (vcpus, was) = (self.vcpus(), before.vcpus());
        if vcpus > u64::from(size.max_vcpus) && vcpus > was {
            return Err(Error::InvalidArgument(format!(
                "the pod's CPU limit: takes {vcpus} vCPUs, and this machine has from 1 to {}; stay within, or delete the pod and create it with the new size",
                size.max_vcpus
            )));
        }
        let (mib, was) = (self.memory_mib(), before.memory_mib());
        if mib > size.max_memory_mib && mib > was {
            return Err(Error::InvalidArgument(format!(
                "the pod's memory limit: takes a machine of {mib} MiB, and this machine can have from {MEMORY_MIN_MIB} to {} MiB; stay within, or delete the pod and create it with the new size",
                size.max_memory_mib
            )));
        }
        Ok(())
    }

    /// The container's limits now.
    pub fn limits(&self, container: &str) -> Limits {
        let found = self.containers.get(container);
        found.map(|(_, now)| *now).unwrap_or_default()
    }

    /// What the machine is to become, within the bounds that `size` has.
    pub fn target(&self, size: &Size) -> Reached {
        let mut target = Reached::at_boot(size);
        if self.basis.cpu_milli.is_some() {
            target.vcpus = u32::try_from(self.vcpus())
                .unwrap_or(u32::MAX)
                .min(size.max_vcpus);
        }
        if self.basis.memory.is_some() {
            let mib = self.memory_mib().min(size.max_memory_mib);
            target.balloon_mib = mib.min(size.memory_mib);
            // A limit is what may be had, so the last block counts whole, unless it is the last there is.
            let more = mib - target.balloon_mib;
            target.plugged_mib = more.next_multiple_of(BLOCK_MIB).min(size.pluggable_mib());
        }
        target
    }

    /// What of the pod's size the machine cannot give, for people; empty: nothing.
    pub fn shortfalls(&self, size: &Size) -> Vec<String> {
        let mut shortfalls = Vec::new();
        let vcpus = self.vcpus();
        if self.basis.cpu_milli.is_some() && vcpus > u64::from(size.max_vcpus) {
            shortfalls.push(format!(
                "the containers' CPU limits take {vcpus} vCPUs; the machine has at most {}",
                size.max_vcpus
            ));
        }
        let mib = self.memory_mib();
        if self.basis.memory.is_some() && mib > size.max_memory_mib {
            shortfalls.push(format!(
                "the containers' memory limits take a machine of {mib} MiB; it has at most {} MiB",
                size.max_memory_mib
            ));
        }
        shortfalls
    }

    fn vcpus(&self) -> u64 {
        let milli = self
            .basis
            .cpu_milli
            .map_or(0, |asked| self.sum(asked, |limits| limits.cpu_milli));
        milli.max(1).div_ceil(1000)
    }

    fn memory_mib(&self) -> u64 {
        let bytes = self
            .basis
            .memory
            .map_or(0, |asked| self.sum(asked, |limits| limits.memory));
        self.basis.machine_mib(bytes)
    }

    fn sum(&self, asked: Asked, part: impl Fn(&Limits) -> Option<u64>) -> u64 {
        let of = |limits: &Limits| i128::from(part(limits).unwrap_or(0));
        let all = self.containers.values();
        let limited: i128 = match asked.limits {
            Some(limits) => {
                i128::from(limits)
                    + all
                        .clone()
                        .map(|(first, now)| of(now) - of(first))
                        .sum::<i128>()
            }
            None => all.clone().map(|(_, now)| of(now)).sum(),
        };
        let limited = u64::try_from(limited.max(0)).unwrap_or(u64::MAX);
        let is_unlimited = all.clone().any(|(_, now)| part(now).is_none());
        let total = match is_unlimited {
            true => limited.saturating_add(asked.unlimited),
            false => limited,
        };
        // A pod that does not say is as large at least as one that asks for nothing.
        total.max(if asked.limits.is_none() {
            asked.unlimited
        } else {
            0
        })
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const OVERHEAD: u64 = 100;

    /// Of a pod with a limit of 256 MiB: 256 + 4 for their pages + 100.
    const SIZE: Size = Size {
        vcpus: 1,
        max_vcpus: 4,
        memory_mib: 360,
        max_memory_mib: 1024,
    };
    const BASIS: Basis = Basis {
        cpu_milli: Some(Asked {
            limits: Some(1000),
            unlimited: 1000,
        }),
        memory: Some(Asked {
            limits: Some(256 * MIB),
            unlimited: 128 * MIB,
        }),
        overhead_mib: OVERHEAD,
    };

    fn limits(cpu_milli: u64, memory_mib: u64) -> Limits {
        Limits {
            cpu_milli: Some(cpu_milli),
            memory: Some(memory_mib << 20),
        }
    }

    fn ledger(basis: Basis, changes: &[(&str, Limits)]) -> Result<Ledger> {
        let none = Ledger::new(basis);
        changes.iter().try_fold(none, |ledger, (name, limits)| {
            ledger.with(name, *limits, &SIZE)
        })
    }

    fn resized(basis: Basis, changes: &[(&str, Limits)]) -> Result<Reached> {
        Ok(ledger(basis, changes)?.target(&SIZE))
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
        let cases: [(&[(&str, Limits)], Reached); 7] = [
            (&[], reached(1, 360, 0)),
            (&[("a", a), ("b", b)], reached(1, 360, 0)),
            // 512 + 8 + 100
            (
                &[("a", a), ("b", b), ("a", limits(1500, 384))],
                reached(2, 360, 260),
            ),
            (
                &[
                    ("a", a),
                    ("b", b),
                    ("a", limits(1500, 384)),
                    ("b", limits(2500, 64)),
                ],
                reached(4, 360, 196),
            ),
            (
                &[("a", a), ("b", b), ("a", limits(100, 64))],
                reached(1, 295, 0),
            ),
            (
                &[("a", a), ("b", b), ("a", limits(1500, 384)), ("a", a)],
                reached(1, 360, 0),
            ),
            // An odd MiB takes a whole block.
            (&[("a", a), ("a", limits(500, 129))], reached(1, 360, 2)),
        ];
        for (changes, expected) in cases {
            assert_eq!(
                resized(BASIS, changes).expect("target"),
                expected,
                "{changes:?}"
            );
        }
    }

    #[test]
    fn a_container_without_a_limit_has_its_part_on_top_of_the_others() {
        let none = Limits::default();
        let (app, sidecar) = (("app", none), ("sidecar", limits(1000, 256)));
        // 256 + 128 + 6 + 100, and a CPU of its own.
        let both = reached(2, 360, 130);
        assert_eq!(resized(BASIS, &[sidecar]).expect("target").plugged_mib, 0);
        for order in [[app, sidecar], [sidecar, app]] {
            assert_eq!(resized(BASIS, &order).expect("target"), both);
        }
        // Two of them share the part.
        let two = [sidecar, app, ("other", none)];
        assert_eq!(resized(BASIS, &two).expect("target"), both);
        // A limit that comes later takes its place.
        let bound = [sidecar, app, ("app", limits(1000, 64))];
        assert_eq!(resized(BASIS, &bound).expect("target"), reached(2, 360, 66));
    }

    #[test]
    fn a_pod_that_does_not_say_what_it_asks_for_is_as_large_as_its_containers() {
        let silent = Basis {
            memory: Some(Asked {
                limits: None,
                unlimited: 256 * MIB,
            }),
            ..BASIS
        };
        let mib =
            |changes: &[(&str, Limits)]| resized(silent, changes).expect("target").memory_mib();
        assert_eq!(mib(&[]), 360);
        assert_eq!(mib(&[("a", Limits::default())]), 360);
        assert_eq!(mib(&[("a", limits(100, 64))]), 360);
        assert_eq!(mib(&[("a", limits(100, 512))]), 620);
        assert_eq!(
            mib(&[("a", limits(100, 256)), ("b", Limits::default())]),
            620
        );
    }

    #[test]
    fn what_cannot_be_reached_is_refused_with_the_bounds() {
        let cases = [
            (limits(4001, 256), "from 1 to 4"),
            (limits(1000, 1025), "from 96 to 1024 MiB"),
            (limits(u64::MAX, 256), "from 1 to 4"),
        ];
        for (limits, bounds) in cases {
            let error = resized(BASIS, &[("a", self::limits(1000, 256)), ("a", limits)]);
            let error = error.expect_err("refused").to_string();
            assert!(error.contains(bounds), "{error}");
        }
    }

    #[test]
    fn a_pod_created_beyond_the_bounds_has_what_there_is_and_may_shrink() {
        let basis = Basis {
            cpu_milli: Some(Asked {
                limits: Some(9000),
                unlimited: 1000,
            }),
            memory: Some(Asked {
                limits: Some(4096 * MIB),
                unlimited: 256 * MIB,
            }),
            overhead_mib: OVERHEAD,
        };
        let first = ledger(basis, &[("a", limits(9000, 4096))]).expect("cut");
        assert_eq!(first.target(&SIZE), reached(4, 360, 664));
        let told = first.shortfalls(&SIZE);
        assert_eq!(told.len(), 2);
        assert!(
            told[0].contains("9 vCPUs") && told[1].contains("4260 MiB"),
            "{told:?}"
        );
        let less = first.with("a", limits(8000, 2048), &SIZE).expect("less");
        assert_eq!(less.target(&SIZE), reached(4, 360, 664));
        assert!(first.with("a", limits(9000, 4097), &SIZE).is_err());
        assert!(
            ledger(BASIS, &[])
                .expect("none")
                .shortfalls(&SIZE)
                .is_empty()
        );
    }

    #[test]
    fn what_an_annotation_names_does_not_follow() {
        let changes = [("a", limits(1000, 256)), ("a", limits(9000, 9000))];
        assert_eq!(
            resized(Basis::default(), &changes).expect("target"),
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

    fn some_limits() -> impl Strategy<Value = Limits> {
        (
            proptest::option::of(1_u64..6000),
            proptest::option::of(0_u64..(2 << 30)),
        )
            .prop_map(|(cpu_milli, memory)| Limits { cpu_milli, memory })
    }

    proptest! {
        /// Whatever is asked: a target is within the bounds, and going back to the first
        /// limits goes back to the size at first.
        #[test]
        fn a_target_is_within_the_bounds_and_the_way_back_leads_home(
            changes in proptest::collection::vec(("[ab]", some_limits()), 0..12),
        ) {
            let mut ledger = Ledger::new(BASIS);
            for (name, limits) in &changes {
                let Ok(changed) = ledger.with(name, *limits, &SIZE) else {
                    continue;
                };
                ledger = changed;
                let target = ledger.target(&SIZE);
                prop_assert!((1..=SIZE.max_vcpus).contains(&target.vcpus));
                prop_assert!(target.balloon_mib >= MEMORY_MIN_MIB);
                prop_assert!(target.balloon_mib <= SIZE.memory_mib);
                prop_assert!(target.memory_mib() <= SIZE.max_memory_mib);
                prop_assert_eq!(target.plugged_mib % BLOCK_MIB, 0);
                prop_assert!(target.plugged_mib == 0 || target.balloon_mib == SIZE.memory_mib);
            }
            let mut home = Ledger::new(BASIS);
            for (name, (first, _)) in ledger.containers.clone() {
                home = home.with(&name, first, &SIZE).expect("admitted");
                ledger.containers.insert(name, (first, first));
            }
            prop_assert_eq!(ledger.target(&SIZE), home.target(&SIZE));
        }
    }
}
