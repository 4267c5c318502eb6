//! What a cgroup uses.
//!
//! A file that is not there is a controller that is off (or a kernel without that
//! figure) and counts 0; a file that cannot be understood is an error that names it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use super::{Cgroup, Dirs, is_gone};
use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::stats::{
    CpuStats, Hierarchy, IoStats, MemoryStats, PidsStats, Pressure, Stall, Stats,
};

/// v1 tells user and system time in ticks of `USER_HZ`, which is 100 on every
/// architecture that Linux gives to user space.
const TICK_NS: u64 = 1_000_000_000 / 100;
/// v1 writes "no limit" as the largest number of bytes in whole pages.
const V1_NO_LIMIT: u64 = 0x7fff_ffff_0000_0000;

impl Cgroup {
    /// Reads its usage.
    ///
    /// # Errors
    /// `NotFound` when the cgroup is gone; a file with something else in it than the
    /// kernel documents.
    pub fn stats(&self) -> Result<Stats> {
        if !self.exists() {
            return Err(Error::NotFound("the cgroup".into()));
        }
        match &self.dirs {
            Dirs::V2(dir) => v2(dir),
            Dirs::V1(dirs) => {
                let dir = |controller: &str| {
                    let found = dirs.get(controller).map(std::path::PathBuf::as_path);
                    // No such file, so every figure is 0.
                    found.unwrap_or(Path::new("/nonexistent"))
                };
                v1(dir)
            }
        }
    }

    /// How many processes were killed for memory (v1: 0 where the kernel, before 4.13,
    /// does not tell).
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn oom_kills(&self) -> Result<u64> {
        let (controller, name) = match self.dirs {
            Dirs::V2(_) => ("memory", "memory.events"),
            Dirs::V1(_) => ("memory", "memory.oom_control"),
        };
        match self.v1_file(controller, name) {
            Ok(file) => Ok(table(&file)?.get("oom_kill").copied().unwrap_or(0)),
            Err(_) => Ok(0),
        }
    }
}

fn v2(dir: &Path) -> Result<Stats> {
    let cpu = table(&dir.join("cpu.stat"))?;
    let memory = table(&dir.join("memory.stat"))?;
    let events = table(&dir.join("memory.events"))?;
    let cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let memory = |key: &str| memory.get(key).copied().unwrap_or(0);
    let events = |key: &str| events.get(key).copied().unwrap_or(0);
    let us = |microseconds: u64| microseconds.saturating_mul(1000);
    Ok(Stats {
        hierarchy: Hierarchy::V2,
        cpu: CpuStats {
            pressure: pressure(&dir.join("cpu.pressure"))?,
            usage_ns: us(cpu("usage_usec")),
            user_ns: us(cpu("user_usec")),
            system_ns: us(cpu("system_usec")),
            periods: cpu("nr_periods"),
            throttled_periods: cpu("nr_throttled"),
            throttled_ns: us(cpu("throttled_usec")),
        },
        memory: MemoryStats {
            pressure: pressure(&dir.join("memory.pressure"))?,
            usage: number(&dir.join("memory.current"))?.unwrap_or(0),
            limit: number(&dir.join("memory.max"))?.unwrap_or(u64::MAX),
            peak: number(&dir.join("memory.peak"))?.unwrap_or(0),
            swap_usage: number(&dir.join("memory.swap.current"))?.unwrap_or(0),
            swap_limit: number(&dir.join("memory.swap.max"))?.unwrap_or(u64::MAX),
            anon: memory("anon"),
            file: memory("file"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            kernel: memory("kernel_stack").saturating_add(memory("slab")),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            max_events: events("max"),
            oom_kills: events("oom_kill"),
        },
        pids: pids(dir)?,
        io: v2_io(&dir.join("io.stat"))?,
        io_pressure: pressure(&dir.join("io.pressure"))?,
    })
}

fn v1<'a>(dir: impl Fn(&str) -> &'a Path) -> Result<Stats> {
    let cpu = table(&dir("cpu").join("cpu.stat"))?;
    let ticks = table(&dir("cpuacct").join("cpuacct.stat"))?;
    let cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let time = |key: &str| ticks.get(key).map_or(0, |t| t.saturating_mul(TICK_NS));

    let memory = dir("memory");
    let stat = table(&memory.join("memory.stat"))?;
    let oom = table(&memory.join("memory.oom_control"))?;
    let stat = |key: &str| stat.get(key).copied().unwrap_or(0);
    let bytes = |name: &str| number(&memory.join(name));
    let limit = |name: &str| {
        let found = bytes(name)?.unwrap_or(u64::MAX);
        Ok::<_, Error>(if found >= V1_NO_LIMIT {
            u64::MAX
        } else {
            found
        })
    };
    let usage = bytes("memory.usage_in_bytes")?.unwrap_or(0);
    let with_swap = bytes("memory.memsw.usage_in_bytes")?.unwrap_or(usage);
    Ok(Stats {
        hierarchy: Hierarchy::V1,
        cpu: CpuStats {
            pressure: None,
            usage_ns: number(&dir("cpuacct").join("cpuacct.usage"))?.unwrap_or(0),
            user_ns: time("user"),
            system_ns: time("system"),
            periods: cpu("nr_periods"),
            throttled_periods: cpu("nr_throttled"),
            throttled_ns: cpu("throttled_time"),
        },
        memory: MemoryStats {
            pressure: None,
            usage,
            limit: limit("memory.limit_in_bytes")?,
            peak: bytes("memory.max_usage_in_bytes")?.unwrap_or(0),
            swap_usage: with_swap.saturating_sub(usage),
            swap_limit: limit("memory.memsw.limit_in_bytes")?,
            anon: stat("total_rss"),
            file: stat("total_cache"),
            inactive_file: stat("total_inactive_file"),
            active_file: stat("total_active_file"),
            inactive_anon: stat("total_inactive_anon"),
            active_anon: stat("total_active_anon"),
            kernel: bytes("memory.kmem.usage_in_bytes")?.unwrap_or(0),
            pgfault: stat("total_pgfault"),
            pgmajfault: stat("total_pgmajfault"),
            max_events: bytes("memory.failcnt")?.unwrap_or(0),
            oom_kills: oom.get("oom_kill").copied().unwrap_or(0),
        },
        pids: pids(dir("pids"))?,
        io: v1_io(dir("blkio"))?,
        io_pressure: None,
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and so `full` (not for the CPU of older
/// kernels).
fn pressure(file: &Path) -> Result<Option<Pressure>> {
    let Some(text) = text(file)? else {
        return Ok(None);
    };
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let garbage = || garbage(file, line);
        let mut words = line.split_ascii_whitespace();
        let stall = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            // What a later kernel adds.
            _ => continue,
        };
        *stall = Stall::default();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(garbage)?;
            let share = || hundredths(value).ok_or_else(garbage);
            match key {
                "avg10" => stall.avg10 = share()?,
                "avg60" => stall.avg60 = share()?,
                "avg300" => stall.avg300 = share()?,
                "total" => stall.total_us = value.parse().map_err(|_| garbage())?,
                _ => {}
            }
        }
    }
    Ok(Some(pressure))
}

/// `12.34`, as the kernel writes it: always with two digits.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, part) = text.split_once('.')?;
    let whole: u32 = whole.parse().ok()?;
    let part = (part.len() == 2).then(|| part.parse::<u32>().ok())??;
    whole.checked_mul(100)?.checked_add(part)
}

fn pids(dir: &Path) -> Result<PidsStats> {
    Ok(PidsStats {
        current: number(&dir.join("pids.current"))?.unwrap_or(0),
        limit: number(&dir.join("pids.max"))?.unwrap_or(u64::MAX),
    })
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn v2_io(file: &Path) -> Result<Vec<IoStats>> {
    let mut all = Vec::new();
    for line in text(file)?.unwrap_or_default().lines() {
        let garbage = || garbage(file, line);
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = device(words.next().unwrap_or_default()).ok_or_else(garbage)?;
        let mut io = IoStats {
            major,
            minor,
            ..IoStats::default()
        };
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(garbage)?;
            let place = match key {
                "rbytes" => &mut io.read_bytes,
                "wbytes" => &mut io.write_bytes,
                "rios" => &mut io.read_ios,
                "wios" => &mut io.write_ios,
                // Discards; cost.* of io.cost; whatever a later kernel adds.
                _ => continue,
            };
            *place = value.parse().map_err(|_| garbage())?;
        }
        all.push(io);
    }
    Ok(all)
}

/// `8:0 Read 4096` … `Total 4096`, in one file for bytes and one for operations. The
/// throttle policy's files count all I/O; CFQ's, of old kernels, only its own.
fn v1_io(dir: &Path) -> Result<Vec<IoStats>> {
    let mut all: BTreeMap<(u64, u64), IoStats> = BTreeMap::new();
    for (name, read, write) in [
        (
            "blkio.throttle.io_service_bytes_recursive",
            (|io| &mut io.read_bytes) as fn(&mut IoStats) -> &mut u64,
            (|io| &mut io.write_bytes) as fn(&mut IoStats) -> &mut u64,
        ),
        (
            "blkio.throttle.io_serviced_recursive",
            |io| &mut io.read_ios,
            |io| &mut io.write_ios,
        ),
    ] {
        let file = dir.join(name);
        for line in text(&file)?.unwrap_or_default().lines() {
            let garbage = || garbage(&file, line);
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let [on, what, value] = words[..] else {
                if words.first() == Some(&"Total") {
                    continue;
                }
                return Err(garbage());
            };
            let (major, minor) = device(on).ok_or_else(garbage)?;
            let value = value.parse().map_err(|_| garbage())?;
            let io = all.entry((major, minor)).or_insert(IoStats {
                major,
                minor,
                ..IoStats::default()
            });
            match what {
                "Read" => *read(io) = value,
                "Write" => *write(io) = value,
                _ => {}
            }
        }
    }
    Ok(all.into_values().collect())
}

fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A flat-keyed file: `key value` lines. Values that are no number (v1's
/// `under_oom`, hugetlb names …) do not occur in the files read here.
fn table(file: &Path) -> Result<BTreeMap<String, u64>> {
    let mut table = BTreeMap::new();
    for line in text(file)?.unwrap_or_default().lines() {
        let (key, value) = line.split_once(' ').ok_or_else(|| garbage(file, line))?;
        table.insert(
            key.to_owned(),
            parse(value).ok_or_else(|| garbage(file, line))?,
        );
    }
    Ok(table)
}

/// A file of one number, or `max`.
fn number(file: &Path) -> Result<Option<u64>> {
    let Some(text) = text(file)? else {
        return Ok(None);
    };
    match parse(text.trim_end()) {
        Some(number) => Ok(Some(number)),
        None => Err(garbage(file, &text)),
    }
}

fn parse(text: &str) -> Option<u64> {
    match text {
        "max" => Some(u64::MAX),
        // v1's memsw.limit can be -1 where swap accounting is off.
        "-1" => Some(u64::MAX),
        digits => u64::from_str(digits).ok(),
    }
}

fn text(file: &Path) -> Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        // A file of a controller that the kernel was booted without (swap accounting).
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(Error::other(format!("read {}", file.display()), error)),
    }
}

fn garbage(file: &Path, text: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    Error::other(
        format!("read {}", file.display()),
        format!("cannot understand {shown:?}"),
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const V2: &[(&str, &str)] = &[
        (
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\nnr_throttled 2\nthrottled_usec 30\n",
        ),
        ("memory.current", "1048576\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "2097152\n"),
        ("memory.swap.current", "4096\n"),
        ("memory.swap.max", "0\n"),
        (
            "memory.stat",
            "anon 10\nfile 20\nkernel_stack 3\nslab 4\ninactive_anon 5\nactive_anon 6\ninactive_file 7\nactive_file 8\npgfault 9\npgmajfault 1\n",
        ),
        (
            "memory.events",
            "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n",
        ),
        ("pids.current", "3\n"),
        ("pids.max", "100\n"),
        (
            "cpu.pressure",
            "some avg10=12.34 avg60=0.05 avg300=100.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
        ),
        (
            "memory.pressure",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\n",
        ),
        (
            "io.stat",
            "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:0 \n",
        ),
    ];

    #[test]
    fn v2_figures() {
        let dir = fixture(V2);
        let stats = Cgroup::v2(dir.path()).stats().unwrap();
        assert_eq!(
            stats,
            Stats {
                hierarchy: Hierarchy::V2,
                cpu: CpuStats {
                    pressure: Some(Pressure {
                        some: Stall {
                            avg10: 1234,
                            avg60: 5,
                            avg300: 10_000,
                            total_us: 42,
                        },
                        full: Stall {
                            total_us: 7,
                            ..Stall::default()
                        },
                    }),
                    usage_ns: 1_500_000,
                    user_ns: 1_000_000,
                    system_ns: 500_000,
                    periods: 7,
                    throttled_periods: 2,
                    throttled_ns: 30_000,
                },
                memory: MemoryStats {
                    pressure: Some(Pressure {
                        some: Stall {
                            total_us: 9,
                            ..Stall::default()
                        },
                        full: Stall::default(),
                    }),
                    usage: 1_048_576,
                    limit: u64::MAX,
                    peak: 2_097_152,
                    swap_usage: 4096,
                    swap_limit: 0,
                    anon: 10,
                    file: 20,
                    inactive_file: 7,
                    active_file: 8,
                    inactive_anon: 5,
                    active_anon: 6,
                    kernel: 7,
                    pgfault: 9,
                    pgmajfault: 1,
                    max_events: 12,
                    oom_kills: 1,
                },
                pids: PidsStats {
                    current: 3,
                    limit: 100,
                },
                io: vec![
                    IoStats {
                        major: 254,
                        minor: 0,
                        read_bytes: 1,
                        write_bytes: 2,
                        read_ios: 3,
                        write_ios: 4,
                    },
                    IoStats {
                        major: 7,
                        ..IoStats::default()
                    },
                ],
                io_pressure: None,
            }
        );
    }

    #[test]
    fn v1_figures() {
        let cpu = fixture(&[
            (
                "cpu.stat",
                "nr_periods 7\nnr_throttled 2\nthrottled_time 30\n",
            ),
            ("cpuacct.stat", "user 3\nsystem 4\n"),
            ("cpuacct.usage", "71000000\n"),
        ]);
        let memory = fixture(&[
            ("memory.usage_in_bytes", "1000\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.max_usage_in_bytes", "2000\n"),
            ("memory.memsw.usage_in_bytes", "1500\n"),
            ("memory.memsw.limit_in_bytes", "4000\n"),
            ("memory.kmem.usage_in_bytes", "70\n"),
            ("memory.failcnt", "5\n"),
            (
                "memory.stat",
                "rss 1\ntotal_rss 10\ntotal_cache 20\ntotal_inactive_file 7\ntotal_active_file 8\n",
            ),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
            ),
        ]);
        let pids = fixture(&[("pids.current", "3\n"), ("pids.max", "max\n")]);
        let blkio = fixture(&[
            (
                "blkio.throttle.io_service_bytes_recursive",
                "254:0 Read 100\n254:0 Write 200\n254:0 Sync 300\nTotal 300\n",
            ),
            (
                "blkio.throttle.io_serviced_recursive",
                "254:0 Read 1\n254:0 Write 2\nTotal 3\n",
            ),
        ]);
        let place = |controller: &str, dir: &tempfile::TempDir| {
            (controller.to_owned(), PathBuf::from(dir.path()))
        };
        let cgroup = Cgroup {
            dirs: Dirs::V1(BTreeMap::from([
                place("cpu", &cpu),
                place("cpuacct", &cpu),
                place("memory", &memory),
                place("pids", &pids),
                place("blkio", &blkio),
            ])),
        };
        let stats = cgroup.stats().unwrap();
        assert_eq!(stats.hierarchy, Hierarchy::V1);
        assert_eq!(
            stats.cpu,
            CpuStats {
                pressure: None,
                usage_ns: 71_000_000,
                user_ns: 30_000_000,
                system_ns: 40_000_000,
                periods: 7,
                throttled_periods: 2,
                throttled_ns: 30,
            }
        );
        assert_eq!(
            stats.memory,
            MemoryStats {
                usage: 1000,
                limit: u64::MAX,
                peak: 2000,
                swap_usage: 500,
                swap_limit: 4000,
                anon: 10,
                file: 20,
                inactive_file: 7,
                active_file: 8,
                kernel: 70,
                max_events: 5,
                oom_kills: 4,
                ..MemoryStats::default()
            }
        );
        assert_eq!((stats.pids.current, stats.pids.limit), (3, u64::MAX));
        assert_eq!(
            stats.io,
            [IoStats {
                major: 254,
                minor: 0,
                read_bytes: 100,
                write_bytes: 200,
                read_ios: 1,
                write_ios: 2,
            }]
        );
        assert_eq!(cgroup.oom_kills().unwrap(), 4);
    }

    #[test]
    fn a_controller_that_is_off_counts_nothing() {
        let dir = fixture(&[]);
        let stats = Cgroup::v2(dir.path()).stats().unwrap();
        assert_eq!(stats.memory.usage, 0);
        assert_eq!(stats.memory.limit, u64::MAX);
        assert_eq!(stats.io, []);
    }

    #[test]
    fn garbage_is_an_error_that_names_the_file() {
        for (name, text) in [
            ("cpu.stat", "usage_usec\n"),
            ("cpu.stat", "usage_usec many\n"),
            ("memory.current", ""),
            ("memory.current", "12 34\n"),
            ("memory.current", "-7\n"),
            ("memory.max", "maximum\n"),
            ("memory.events", "oom_kill 99999999999999999999999\n"),
            ("pids.current", "\0\n"),
            ("io.stat", "254 rbytes=1\n"),
            ("io.stat", "254:0 rbytes=x\n"),
            ("io.stat", "254:0 rbytes\n"),
        ] {
            let dir = fixture(&[(name, text)]);
            let error = Cgroup::v2(dir.path()).stats().unwrap_err().chain();
            assert!(error.contains(name), "{name} {text:?}: {error}");
        }
    }

    #[test]
    fn a_cgroup_that_is_gone_is_not_found() {
        let error = Cgroup::v2("/no/such/cgroup").stats().unwrap_err();
        assert!(matches!(error, Error::NotFound(_)));
    }
}
