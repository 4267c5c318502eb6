//! `dyad.agent.v1.Sandbox`: makes the guest the pod.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dyad_agent_api::proto::agent::{
    GetFileRequest, GetFileResponse, PutFilesRequest, PutFilesResponse, ResourcesRequest,
    ResourcesResponse, SetupRequest, SetupResponse, ShutdownRequest, ShutdownResponse, StreamState,
    StreamsRequest, StreamsResponse, WaitEventsRequest, WaitEventsResponse,
};
use dyad_agent_api::proto::agent_ttrpc::Sandbox;
use dyad_agent_api::ttrpc::Result as RpcResult;
use dyad_agent_api::ttrpc::r#async::TtrpcContext;
use dyad_runtime_handler::{Error, Result, error::Context};
use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::guest::Agent;
use crate::rpc::{answer, blocking, detached};
use crate::{disk, entropy, files, net, power, rootfs, uevent};

/// The `/dev/shm` that the pod's containers share.
const SHM: &str = "/run/dyad/shm";

/// How long a vCPU may take to appear.
const CPU_WITHIN: Duration = Duration::from_secs(10);

/// Serves the calls that concern the pod as a whole.
pub struct SandboxService {
    agent: Arc<Agent>,
    boot_id: String,
    /// One Setup at a time.
    setup: Arc<tokio::sync::Mutex<()>>,
    /// One PutFiles at a time: two could write the same file.
    files: Arc<tokio::sync::Mutex<()>>,
}

impl SandboxService {
    /// A service of `agent`, in the boot of that id.
    pub fn new(agent: Arc<Agent>, boot_id: String) -> Self {
        Self {
            agent,
            boot_id,
            setup: Arc::default(),
            files: Arc::default(),
        }
    }
}

async fn set_up(agent: &Agent, request: &SetupRequest) -> Result<()> {
    // First what every later process depends on.
    set_clock(request.unix_time_ns)?;
    entropy::feed(&request.entropy)?;
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .context(|| format!("set hostname {:?}", request.hostname))?;
    }
    agent.drivers_loaded().await;
    if !request.pod_disk_serial.is_empty() {
        mount_pod_disk(&request.pod_disk_serial, request.pod_disk_inherited).await?;
    }
    mount_shm(request.shm_size)?;
    let localhost = request.localhost.as_ref();
    net::take_away(&request.former_interfaces, &request.former_routes).await?;
    net::set_up(&request.interfaces, &request.routes, localhost).await?;
    // After the interfaces: some are named after one.
    set_sysctls(&request.sysctls)
}

fn set_clock(unix_time_ns: u64) -> Result<()> {
    if unix_time_ns == 0 {
        return Ok(());
    }
    let now = TimeSpec::from_duration(Duration::from_nanos(unix_time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, now).context(|| "set the clock".into())
}

async fn mount_pod_disk(serial: &str, inherited: bool) -> Result<()> {
    if rootfs::is_mount_point(Path::new(rootfs::POD_DISK)) {
        return Ok(());
    }
    let node = disk::by_serial(serial).await?;
    blocking(move || {
        let target = rootfs::POD_DISK;
        fs::create_dir_all(target).context(|| format!("create {target}"))?;
        // The disk is sparse on the host: let the kernel not write out its inode tables.
        mount(
            Some(&node),
            target,
            Some("ext4"),
            MsFlags::MS_NODEV | MsFlags::MS_NOATIME,
            Some("noinit_itable"),
        )
        .context(|| format!("mount the pod's disk {} on {target}", node.display()))?;
        let layers = Path::new(target).join("containers");
        if inherited && layers.exists() {
            fs::remove_dir_all(&layers).context(|| format!("remove {}", layers.display()))?;
        }
        for folder in ["containers", "volumes"] {
            let folder = Path::new(target).join(folder);
            fs::create_dir_all(&folder).context(|| format!("create {}", folder.display()))?;
        }
        Ok(())
    })
    .await
}

fn mount_shm(size: u64) -> Result<()> {
    if rootfs::is_mount_point(Path::new(SHM)) {
        return Ok(());
    }
    fs::create_dir_all(SHM).context(|| format!("create {SHM}"))?;
    let options = if size == 0 {
        "mode=1777".into()
    } else {
        format!("mode=1777,size={size}")
    };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("shm"),
        SHM,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .context(|| format!("mount {SHM}"))
}

fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<()> {
    for (name, value) in sysctls {
        let file = sysctl_file(name)?;
        fs::write(&file, value).context(|| format!("set sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

/// `net.ipv4.ip_forward` and `net/ipv4/conf/eth0.5/forwarding` are both usual: with a
/// slash in it, dots are part of the names (sysctl.d(5)).
fn sysctl_file(name: &str) -> Result<PathBuf> {
    let relative = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let fine = !relative.is_empty()
        && relative.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
        });
    if fine {
        Ok(Path::new("/proc/sys").join(relative))
    } else {
        Err(Error::InvalidArgument(format!("{name:?} is no sysctl")))
    }
}

async fn put_files(agent: &Agent, request: PutFilesRequest) -> Result<()> {
    let mut disks = Vec::new();
    for (path, serial) in files::wanted_disks(&request)? {
        agent.drivers_loaded().await;
        disks.push((path, disk::by_serial(&serial).await?));
    }
    let mounted = agent.containers.mounted_files();
    blocking(move || files::put(&request, &mounted, &disks)).await
}

async fn resources(wanted: u32) -> Result<ResourcesResponse> {
    let cpus = Path::new("/sys/devices/system/cpu");
    let mut online = set_online(cpus, wanted)?;
    if online < wanted {
        let what = format!("vCPU {wanted}");
        online = uevent::wait_for(&what, CPU_WITHIN, || {
            let online = set_online(cpus, wanted)?;
            Ok((online >= wanted).then_some(online))
        })
        .await?;
    }
    let meminfo = fs::read_to_string("/proc/meminfo").context(|| "read /proc/meminfo".into())?;
    Ok(ResourcesResponse {
        online_vcpus: online,
        memory_bytes: memory_bytes(&meminfo),
        ..Default::default()
    })
}

/// Brings CPUs online, or takes the last ones offline, until `wanted` are (0: leaves them as
/// they are), and counts those that are.
fn set_online(cpus: &Path, wanted: u32) -> Result<u32> {
    let mut online = 0;
    let (mut running, mut resting) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(cpus).context(|| "list the vCPUs".into())? {
        let entry = entry.context(|| "list the vCPUs".into())?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        let Some(number) = number.and_then(|number| number.parse::<u32>().ok()) else {
            continue;
        };
        let switch = entry.path().join("online");
        match fs::read_to_string(&switch) {
            Ok(text) if text.trim() == "0" => resting.push((number, switch)),
            Ok(_) => {
                online += 1;
                running.push((number, switch));
            }
            // The boot CPU has no such file: it is always online.
            Err(_) => online += 1,
        }
    }
    resting.sort();
    running.sort();
    if wanted == 0 {
        return Ok(online);
    }
    let turn = |number: u32, switch: &Path, to: &str| {
        fs::write(switch, to).context(|| format!("turn vCPU {number} to online={to}"))
    };
    for (number, switch) in resting
        .into_iter()
        .take(wanted.saturating_sub(online) as usize)
    {
        turn(number, &switch, "1")?;
        online += 1;
    }
    let surplus = online.saturating_sub(wanted) as usize;
    for (number, switch) in running.into_iter().rev().take(surplus) {
        turn(number, &switch, "0")?;
        online -= 1;
    }
    Ok(online)
}

fn memory_bytes(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> RpcResult<SetupResponse> {
        let (agent, gate) = (Arc::clone(&self.agent), Arc::clone(&self.setup));
        let done = detached(async move {
            let _one_at_a_time = gate.lock().await;
            set_up(&agent, &request).await
        })
        .await;
        answer(
            "Setup",
            done.map(|()| SetupResponse {
                agent_version: env!("CARGO_PKG_VERSION").into(),
                kernel_release: fs::read_to_string("/proc/sys/kernel/osrelease")
                    .unwrap_or_default()
                    .trim()
                    .into(),
                boot_id: self.boot_id.clone(),
                ..Default::default()
            }),
        )
    }

    async fn put_files(
        &self,
        _: &TtrpcContext,
        request: PutFilesRequest,
    ) -> RpcResult<PutFilesResponse> {
        let (agent, gate) = (Arc::clone(&self.agent), Arc::clone(&self.files));
        let done = detached(async move {
            let _one_at_a_time = gate.lock().await;
            put_files(&agent, request).await
        })
        .await;
        answer("PutFiles", done.map(|()| PutFilesResponse::default()))
    }

    async fn get_file(
        &self,
        _: &TtrpcContext,
        request: GetFileRequest,
    ) -> RpcResult<GetFileResponse> {
        let data = blocking(move || files::get(&request.path, request.max_bytes)).await;
        answer(
            "GetFile",
            data.map(|data| GetFileResponse {
                data,
                ..Default::default()
            }),
        )
    }

    async fn streams(&self, _: &TtrpcContext, _: StreamsRequest) -> RpcResult<StreamsResponse> {
        let streams = self.agent.link().map(|link| link.streams());
        answer(
            "Streams",
            streams.map(|streams| StreamsResponse {
                streams: streams
                    .into_iter()
                    .map(|stream| StreamState {
                        container_id: stream.key.container_id,
                        exec_id: stream.key.exec_id.unwrap_or_default(),
                        fd: stream.key.fd.number().into(),
                        offset: stream.offset,
                        end: stream.end,
                        closed: stream.closed,
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            }),
        )
    }

    async fn wait_events(
        &self,
        _: &TtrpcContext,
        request: WaitEventsRequest,
    ) -> RpcResult<WaitEventsResponse> {
        Ok(WaitEventsResponse {
            events: self.agent.events.after(request.after).await,
            ..Default::default()
        })
    }

    async fn resources(
        &self,
        _: &TtrpcContext,
        request: ResourcesRequest,
    ) -> RpcResult<ResourcesResponse> {
        answer("Resources", resources(request.online_vcpus).await)
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: ShutdownRequest,
    ) -> RpcResult<ShutdownResponse> {
        let kind = if request.reboot {
            power::Kind::Reboot
        } else {
            power::Kind::Off
        };
        let grace = Duration::from_millis(request.grace_ms.into());
        power::shut_down_soon(Arc::clone(&self.agent), kind, grace);
        Ok(ShutdownResponse::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_below_proc_sys() {
        let file = |name| sysctl_file(name).unwrap();
        assert_eq!(
            file("net.ipv4.ip_forward"),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            file("net/ipv4/conf/eth0.5/forwarding"),
            Path::new("/proc/sys/net/ipv4/conf/eth0.5/forwarding")
        );
        for bad in [
            "",
            "../../etc/passwd",
            "net/../../x",
            "/etc/passwd",
            "net..x",
            "a b",
            "a\0",
        ] {
            assert!(sysctl_file(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(
            memory_bytes("MemTotal:         239712 kB\nMemFree: 1 kB\n"),
            239_712 * 1024
        );
        for strange in ["", "MemTotal:", "MemTotal: x kB", "MemTotal: 5"] {
            assert_eq!(memory_bytes(strange), 0);
        }
    }

    #[test]
    fn vcpus_come_online_in_order_and_go_in_reverse_but_for_the_first() {
        let cpus = tempfile::tempdir().unwrap();
        for name in ["cpu0", "cpufreq", "cpu1", "cpu2", "possible"] {
            fs::create_dir(cpus.path().join(name)).unwrap();
        }
        let online = |cpu: &str| cpus.path().join(cpu).join("online");
        fs::write(online("cpu1"), "0\n").unwrap();
        fs::write(online("cpu2"), "0\n").unwrap();
        assert_eq!(set_online(cpus.path(), 0).unwrap(), 1);
        assert_eq!(set_online(cpus.path(), 2).unwrap(), 2);
        assert_eq!(fs::read_to_string(online("cpu1")).unwrap(), "1");
        assert_eq!(fs::read_to_string(online("cpu2")).unwrap(), "0\n");
        assert_eq!(set_online(cpus.path(), 5).unwrap(), 3);
        // The last come first, and the boot CPU stays.
        assert_eq!(set_online(cpus.path(), 2).unwrap(), 2);
        assert_eq!(fs::read_to_string(online("cpu2")).unwrap(), "0");
        assert_eq!(set_online(cpus.path(), 1).unwrap(), 1);
        assert_eq!(set_online(cpus.path(), 0).unwrap(), 1);
    }
}
