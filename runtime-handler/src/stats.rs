//! Resource usage of a cgroup, whichever hierarchy it came from.

/// The cgroup hierarchy the figures were read from; containerd wants the
/// metrics type that belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchy {
    /// cgroup v1 (also the v1 controllers of a hybrid host).
    V1,
    /// cgroup v2.
    V2,
}

/// Usage of one cgroup. Byte counts in bytes, times in nanoseconds; a counter
/// the kernel does not give is 0, a limit that is not set is `u64::MAX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Where the figures come from.
    pub hierarchy: Hierarchy,
    /// CPU time and throttling.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Tasks.
    pub pids: PidsStats,
    /// Block I/O, one entry per device.
    pub io: Vec<IoStats>,
    /// `io.pressure`; `None` as for the CPU.
    pub io_pressure: Option<Pressure>,
}

/// What waiting for a resource cost (`accounting/psi.rst`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// While at least one task waited.
    pub some: Stall,
    /// While all tasks waited at once.
    pub full: Stall,
}

/// One line of a pressure file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stall {
    /// Share of the last 10 s, in hundredths of a percent.
    pub avg10: u32,
    /// So for the last minute.
    pub avg60: u32,
    /// So for the last five minutes.
    pub avg300: u32,
    /// All time of it in microseconds.
    pub total_us: u64,
}

/// CPU time and throttling.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// `cpu.pressure`; `None` on v1, and where the kernel does not tell.
    pub pressure: Option<Pressure>,
    /// All time used.
    pub usage_ns: u64,
    /// Part of it in user mode.
    pub user_ns: u64,
    /// Part of it in the kernel.
    pub system_ns: u64,
    /// Enforcement periods that passed.
    pub periods: u64,
    /// Periods in which the group was throttled.
    pub throttled_periods: u64,
    /// Time it was throttled.
    pub throttled_ns: u64,
}

/// Memory use. v2 names; the v1 files that mean the same fill them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// `memory.pressure`; `None` as for the CPU.
    pub pressure: Option<Pressure>,
    /// `memory.current` / `usage_in_bytes`.
    pub usage: u64,
    /// `memory.max` / `limit_in_bytes`.
    pub limit: u64,
    /// `memory.peak` / `max_usage_in_bytes`.
    pub peak: u64,
    /// `memory.swap.current` / `memsw.usage - usage`.
    pub swap_usage: u64,
    /// `memory.swap.max` / `memsw.limit`.
    pub swap_limit: u64,
    /// Anonymous memory (`anon` / `total_rss`).
    pub anon: u64,
    /// Page cache (`file` / `total_cache`).
    pub file: u64,
    /// `inactive_file` / `total_inactive_file`: what the working set leaves out.
    pub inactive_file: u64,
    /// `active_file` / `total_active_file`.
    pub active_file: u64,
    /// `inactive_anon` / `total_inactive_anon`.
    pub inactive_anon: u64,
    /// `active_anon` / `total_active_anon`.
    pub active_anon: u64,
    /// `kernel_stack` + `slab` / `kmem.usage_in_bytes`.
    pub kernel: u64,
    /// `pgfault` / `total_pgfault`.
    pub pgfault: u64,
    /// `pgmajfault` / `total_pgmajfault`.
    pub pgmajfault: u64,
    /// Times the limit was hit (`memory.events` max / `failcnt`).
    pub max_events: u64,
    /// Processes killed for memory (`oom_kill`).
    pub oom_kills: u64,
}

/// Number of tasks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// `pids.current`.
    pub current: u64,
    /// `pids.max`.
    pub limit: u64,
}

/// I/O of one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Device major number.
    pub major: u64,
    /// Device minor number.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Read operations.
    pub read_ios: u64,
    /// Write operations.
    pub write_ios: u64,
}
