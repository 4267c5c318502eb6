//! The yardstick: a plain domain of the same size, devices and kernel, moved by
//! `virsh migrate` with the options that Dyad asks libvirt for. Its init is a shell
//! script in a second archive behind the guest's initramfs, which answers at an address.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;

use super::echo::Echo;
use super::{ANSWER, Work, settle};
use crate::machines::{NAME, Plain};

/// Each node's own bridge (hack/lib/node.sh), and its MTU.
const BRIDGE: &str = "dyad0";
const MTU: u32 = 1450;

/// Moves a domain that is like the one of `xml` from the first node to the second: how
/// long that takes, and for how long it does not answer.
pub fn measure(
    nodes: &Nodes,
    xml: &str,
    work: &Work,
    address: Ipv4Addr,
) -> Result<(Duration, Duration)> {
    let [from, to] = &nodes.nodes;
    let folders = [from, to].map(|node| node.dir.join("bench"));
    for folder in &folders {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)?;
        // QEMU's user writes here.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?;
    }
    let [here, there] = &folders;
    let initrd = here.join("initramfs");
    with_init(
        &from.dir.join("guest/initramfs.zst"),
        &initrd,
        here,
        &init(work, address),
    )?;
    let write = |folder: &Path| -> Result<PathBuf> {
        let plain = Plain {
            folder,
            initrd: Some(&initrd),
            bridge: Some(BRIDGE),
        };
        let file = folder.join("domain.xml");
        fs::write(&file, plain.domain(xml)?)?;
        Ok(file)
    };
    let (xml_here, xml_there) = (write(here)?, write(there)?);
    from.virsh(&["create", &xml_here.display().to_string()])?;
    let moved = migrate(from, to, there, &xml_there, address);
    for node in [from, to] {
        // It is on one of them, or on none.
        let _ = node.virsh(&["destroy", NAME]);
        let _ = node.virsh(&["undefine", NAME]);
    }
    moved
}

fn migrate(
    from: &Env,
    to: &Env,
    there: &Path,
    xml: &Path,
    address: Ipv4Addr,
) -> Result<(Duration, Duration)> {
    let echo = Echo::begin(address, ANSWER)?;
    settle();
    let socket = |name: &str| format!("unix://{}", there.join(name).display());
    let (memory, disks) = (socket("migrate.sock"), socket("disks.sock"));
    let xml = xml.display().to_string();
    let uri = to.libvirt_uri();
    let begin = Instant::now();
    from.virsh(&[
        "migrate",
        "--live",
        "--p2p",
        "--persistent",
        "--abort-on-error",
        "--copy-storage-all",
        "--migrate-disks",
        "vda",
        "--migrateuri",
        &memory,
        "--disks-uri",
        &disks,
        "--xml",
        &xml,
        "--persistent-xml",
        &xml,
        NAME,
        &uri,
    ])?;
    let total = begin.elapsed();
    settle();
    Ok((total, echo.end()?))
}

/// Loads the guest's modules, takes the address, and does the work.
fn init(work: &Work, address: Ipv4Addr) -> String {
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs -o size=64m shm /dev/shm
while read -r module; do insmod \"/${{module#/}}\"; done </etc/dyad/modules
ip link set eth0 mtu {MTU} up
ip addr add {address}/24 dev eth0
{}
",
        work.script
    )
}

/// The kernel unpacks one archive after the other, and the later file counts.
fn with_init(initramfs: &Path, out: &Path, scratch: &Path, init: &str) -> Result<()> {
    let root = scratch.join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("copy busybox-static's program")?;
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--quiet", "--format=newc", "--owner=0:0"])
        .current_dir(&root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("run cpio")?;
    let names = cpio.stdin.take().context("cpio's stdin")?;
    std::io::Write::write_all(&mut { names }, b"bin\nbin/busybox\ninit\n")?;
    let archive = cpio.wait_with_output()?;
    if !archive.status.success() {
        bail!("cpio: {}", archive.status);
    }
    let mut whole = fs::read(initramfs)?;
    // An archive begins at a multiple of 4 bytes.
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(archive.stdout);
    fs::write(out, whole)?;
    fs::remove_dir_all(root)?;
    Ok(())
}
