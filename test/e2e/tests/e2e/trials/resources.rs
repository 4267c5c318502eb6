//! Limits are real, and what is used is told.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dyad_e2e::wait::{unchanged, until};
use serde_json::{Value, json};

use super::{Case, DYAD, MACHINES, case};
use crate::context::{Container, Context, SOON, names, refusal, same};

pub const CASES: &[Case] = &[
    case!(limits_are_seen_in_the_containers_cgroup).short(),
    case!(limits_are_updated_while_it_runs),
    case!(a_pod_of_32_mib_runs_and_its_container_has_its_limit).on(MACHINES),
    case!(a_running_machine_follows_the_limits_of_its_containers).on(MACHINES),
    case!(a_process_over_its_memory_limit_is_oom_killed).short(),
    case!(stats_tell_cpu_and_memory_of_container_and_pod).short(),
    case!(what_is_kept_stopped_or_paused_has_a_usage_to_tell).on(DYAD),
    case!(pids_of_a_task_are_listed),
];

const MIB: u64 = 1 << 20;

/// Memory limit in bytes, CPU quota and period, most processes: from the inside, by
/// cgroup v2 or v1, whichever is mounted there. Without a cgroup namespace v2 shows
/// the whole tree.
const LIMITS: &str = "cd /sys/fs/cgroup; if [ -e cgroup.controllers ]; then \
                      [ -e memory.max ] || cd ./$(sed -n 's/^0:://p' /proc/self/cgroup); cat memory.max cpu.max pids.max; else \
                      cat memory/memory.limit_in_bytes; echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); \
                      cat pids/pids.max 2>/dev/null; fi";

fn limited(config: &mut Value) {
    config["linux"]["resources"] = json!({
        "memory_limit_in_bytes": 64 * MIB, "cpu_quota": 50_000, "cpu_period": 100_000, "cpu_shares": 512,
    });
}

fn limits(container: &Container<'_>) -> Result<(u64, String)> {
    let out = container.output(LIMITS)?;
    let mut lines = out.lines();
    let memory = lines.next().context("no memory limit")?;
    Ok((
        memory
            .parse()
            .with_context(|| format!("memory limit {memory:?}"))?,
        lines.next().unwrap_or_default().to_owned(),
    ))
}

fn limits_are_seen_in_the_containers_cgroup(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run_with("trap 'exit 0' TERM; sleep 1000 & wait", limited)?;
    same(
        "memory and cpu",
        limits(&container)?,
        (64 * MIB, "50000 100000".to_owned()),
    )
}

fn limits_are_updated_while_it_runs(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run_with("trap 'exit 0' TERM; sleep 1000 & wait", limited)?;
    let memory = (96 * MIB).to_string();
    context.crictl.update(
        &container.id,
        &[
            "--memory",
            &memory,
            "--cpu-quota",
            "20000",
            "--cpu-period",
            "100000",
        ],
    )?;
    same(
        "memory and cpu",
        limits(&container)?,
        (96 * MIB, "20000 100000".to_owned()),
    )
}

/// The MiB of a machine that was made for containers of 256 MiB and is to hold `sum` now: what the
/// guest's kernel takes is on top (a 64th, and 96), and what is added comes in blocks of two.
pub fn machine_of(sum: u64) -> u64 {
    let with_kernel = |sum: u64| sum + sum.div_ceil(64) + 96;
    let (boot, wanted) = (with_kernel(256), with_kernel(sum));
    boot.min(wanted) + wanted.saturating_sub(boot).next_multiple_of(2)
}

fn a_pod_of_32_mib_runs_and_its_container_has_its_limit(context: &Context<'_>) -> Result<()> {
    let limit = json!({"memory_limit_in_bytes": 32 * MIB});
    let pod = context.pod_with(|config| config["linux"]["resources"] = limit.clone())?;
    let container = pod.run_with("echo up; sleep 1000", |config| {
        config["linux"]["resources"] = limit.clone();
    })?;
    container.says("up\n")?;
    // Most of it, in a memory file system.
    let filled = "head -c 25165824 /dev/zero >/dev/shm/x && wc -c </dev/shm/x";
    same("bytes", container.output(filled)?.trim(), "25165824")
}

fn a_running_machine_follows_the_limits_of_its_containers(context: &Context<'_>) -> Result<()> {
    let size = |memory: u64, cpus: u64| json!({"memory_limit_in_bytes": memory * MIB, "cpu_quota": cpus * 100_000, "cpu_period": 100_000});
    let pod = context.pod_with(|config| config["linux"]["resources"] = size(256, 1))?;
    let container = pod.run_with("trap 'exit 0' TERM; sleep 1000 & wait", |config| {
        config["linux"]["resources"] = size(128, 1);
    })?;
    let update = |memory: u64, cpus: u64| {
        let (memory, quota) = ((memory * MIB).to_string(), (cpus * 100_000).to_string());
        context.crictl.update(
            &container.id,
            &[
                "--memory",
                &memory,
                "--cpu-quota",
                &quota,
                "--cpu-period",
                "100000",
            ],
        )
    };
    // The guest's CPUs and, in MiB, its memory: less than the machine's by what its kernel takes.
    let guest = || -> Result<(u64, u64)> {
        let out =
            container.output("nproc; sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")?;
        let mut numbers = out.lines().map(str::parse);
        let (cpus, kib) = (numbers.next(), numbers.next());
        let (cpus, kib) = cpus.zip(kib).with_context(|| format!("{out:?}"))?;
        Ok((cpus?, kib? >> 10))
    };
    let told = || Ok::<_, anyhow::Error>(context.env.dyadctl(&["state", &pod.id])?.text());
    let (_, at_boot) = guest()?;
    let host_cpus = std::thread::available_parallelism()?.get() as u64;
    let two = host_cpus.min(2);
    for (memory, cpus, sum) in [
        (384, two, 512),
        (128, 1, 256),
        (64, 1, 192),
        (192, two, 320),
    ] {
        update(memory, cpus)?;
        let machine = machine_of(sum);
        let should = at_boot + machine - machine_of(256);
        let (seen_cpus, seen) = guest()?;
        same("vCPUs", seen_cpus, cpus)?;
        if seen.abs_diff(should) > 4 {
            bail!("the guest has {seen} MiB and should have {should}");
        }
        names(
            &told()?,
            &[&format!("{cpus} vCPU"), &format!("{machine} MiB")],
        )?;
        same(
            "own limits",
            limits(&container)?,
            (memory * MIB, format!("{}00000 100000", cpus)),
        )?;
    }
    names(&refusal(update(64 << 20, 1))?, &["from 96 to", "MiB"])?;
    names(&refusal(update(128, 500))?, &["500 vCPUs", "from 1 to"])?;
    for verb in ["stop", "start"] {
        context.env.dyadctl(&[verb, &pod.id])?.success(verb)?;
    }
    names(&told()?, &[&format!("{} MiB", machine_of(320))])?;
    same("vCPUs after a stop and a start", guest()?.0, two)?;
    same("own limits", limits(&container)?.0, 192 * MIB)
}

fn a_process_over_its_memory_limit_is_oom_killed(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // tail keeps what has no line end.
    let container = pod.run_with("exec tail /dev/zero", |config| {
        config["linux"]["resources"] =
            json!({"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 24 * MIB});
    })?;
    let status = container.exited()?;
    same("exit code", status.exit_code, 137)?;
    // The OOM event and the exit come by different ways.
    until(SOON, "the reason OOMKilled", || {
        Ok((container.status()?.reason == "OOMKilled").then_some(()))
    })
    .with_context(|| {
        format!(
            "reason {:?}",
            container.status().map(|status| status.reason)
        )
    })
}

fn number(value: &Value) -> u64 {
    value["value"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

fn stats_tell_cpu_and_memory_of_container_and_pod(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    // 20 MiB held and some CPU burnt.
    let container = pod.run(
        "dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2>/dev/null; i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; \
         echo burnt; trap 'exit 0' TERM; sleep 1000 & wait",
    )?;
    container.says("burnt")?;
    let stats = until(SOON, "plausible stats", || {
        let stats = context.crictl.stats(&container.id)?;
        let (cpu, memory) = (
            number(&stats["cpu"]["usageCoreNanoSeconds"]),
            number(&stats["memory"]["workingSetBytes"]),
        );
        Ok((cpu > 10_000_000 && memory > 0).then_some((cpu, memory)))
    })?;
    let (cpu, memory) = stats;
    if cpu > 120_000_000_000 || memory > 512 * MIB {
        bail!("{cpu} ns of CPU and {memory} bytes are not this container's");
    }
    // Pods' statistics came with containerd 1.7.
    if context.env.version >= dyad_e2e::env::Version::V1_7 {
        let stats = context.crictl.pod_stats(&pod.id)?;
        let whole = number(&stats["linux"]["memory"]["workingSetBytes"]);
        let least = if context.handler.is_machine() {
            64 * MIB
        } else {
            100 << 10
        };
        if whole < least {
            bail!("the pod's working set is {whole} bytes: {stats}");
        }
    }
    Ok(())
}

/// containerd asks each second, and logs each error.
const ROUNDS: Duration = Duration::from_secs(4);

fn what_is_kept_stopped_or_paused_has_a_usage_to_tell(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.run(
        "dd if=/dev/zero of=/dev/shm/held bs=1M count=8 2>/dev/null; i=0; \
         while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo burnt; exec sleep 1000",
    )?;
    container.says("burnt")?;
    let usage = || -> Result<(u64, u64)> {
        let stats = context.crictl.stats(&container.id)?;
        Ok((
            number(&stats["cpu"]["usageCoreNanoSeconds"]),
            number(&stats["memory"]["usageBytes"]),
        ))
    };
    let (cpu, _) = until(SOON, "plausible stats", || {
        let (cpu, memory) = usage()?;
        Ok((cpu > 1_000_000 && memory > 0).then_some((cpu, memory)))
    })?;
    let log = context.env.dir.join("log/containerd.log");
    // Lines that tell of an error with this container or its pod.
    let errors = || -> Result<Vec<String>> {
        let text = fs::read_to_string(&log)?;
        let ours = |line: &&str| line.contains(&container.id) || line.contains(&pod.id);
        Ok(text
            .lines()
            .filter(ours)
            .filter(|line| line.contains("metrics") || line.contains("stats"))
            .map(str::to_owned)
            .collect())
    };
    for (verb, back) in [("pause", "resume"), ("stop", "start")] {
        context.env.dyadctl(&[verb, &pod.id])?.success(verb)?;
        unchanged(ROUNDS, "containerd's complaints", errors).with_context(|| verb.to_owned())?;
        let (now, memory) = usage().with_context(|| verb.to_owned())?;
        if now < cpu {
            bail!("{verb}: {now} ns, and it was {cpu} ns");
        }
        same(verb, memory > 0, verb == "pause")?;
        context.env.dyadctl(&[back, &pod.id])?.success(back)?;
    }
    Ok(())
}

fn pids_of_a_task_are_listed(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let container = pod.idle()?;
    let table = context.env.ctr(&["tasks", "ps", &container.id])?.text();
    let pid = context.crictl.inspect(&container.id)?["info"]["pid"].to_string();
    if !table
        .lines()
        .any(|line| line.split_whitespace().next() == Some(pid.as_str()))
    {
        bail!("{pid} is not in {table}");
    }
    if !std::path::Path::new("/proc").join(&pid).exists() {
        bail!("{pid} is not a process of the host");
    }
    Ok(())
}
