//! From what a pod's machine should be to libvirt's domain XML. Pure.
//!
//! ```text
//! q35, PVH kernel boot; everything virtio, on fixed slots of pcie.0 (no root ports: each
//! costs boot time):
//!   02 virtio-serial  -> agent channel        05 rng
//!   03 virtio-scsi    -> images, hot-plugged  06 balloon
//!   04 virtio-blk     -> the pod's disk       07 virtio-mem
//!   08.. interfaces, 1e vsock
//! ```
//!
//! Every file and socket the machine uses is named here, so that libvirt labels it
//! (DAC, AppArmor through virt-aa-helper, sVirt).

use std::io;
use std::path::{Path, PathBuf};

use quick_xml::Writer;
use quick_xml::events::BytesText;
use uuid::Uuid;

use crate::size::{BLOCK_MIB, Reached, Size};

/// The XML namespace of our metadata element.
pub const METADATA_NAMESPACE: &str = "https://dyad.dev/machine/1";

/// Name of the virtio-serial port the agent listens on.
pub use dyad_agent_api::link::PORT_NAME as AGENT_PORT;

/// QEMU's cache of translated code. Part of what the RuntimeClass's overhead is for.
const TCG_CACHE_MIB: &str = "128";

/// What executes guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// The way to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentChannel {
    /// A virtio-serial port on a unix socket that QEMU's side binds.
    VirtioSerial {
        /// The socket.
        socket: PathBuf,
    },
    /// vhost-vsock with this context id.
    Vsock {
        /// Unique on the host, at least 3.
        cid: u32,
    },
}

/// The pod's writable disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDisk {
    /// Raw image.
    pub file: PathBuf,
    /// The guest finds it by this; at most 20 characters (virtio-blk).
    pub serial: String,
}

/// One network interface of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Host-unique name of the tap.
    pub tap: String,
    /// The pod's own address.
    pub mac: String,
    /// The pod's own MTU.
    pub mtu: u32,
}

/// Where libvirt accounts the machine, other than in its own place.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Partition {
    /// `/a/b` is systemd's slice `a-b.slice`.
    pub path: String,
    /// cgroup v2's `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
}

/// All that decides a machine's definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainPlan {
    /// Derived from the pod; the domain is named after it.
    pub uuid: Uuid,
    /// For people: namespace/pod.
    pub title: String,
    /// Goes into the metadata.
    pub sandbox_id: String,
    /// Goes into the metadata.
    pub containerd_namespace: String,
    /// KVM or TCG.
    pub accelerator: Accelerator,
    /// The pod's slice; `None`: QEMU is moved into the pod's cgroup.
    pub partition: Option<Partition>,
    /// vCPUs and memory.
    pub size: Size,
    /// What of it is there at power-on.
    pub reached: Reached,
    /// PVH ELF.
    pub kernel: PathBuf,
    /// Has the agent as `/init`.
    pub initramfs: PathBuf,
    /// The configuration's addition to the command line.
    pub kernel_params: String,
    /// The way to the agent.
    pub channel: AgentChannel,
    /// The pod's writable disk.
    pub pod_disk: PodDisk,
    /// In the order of the pod's interfaces.
    pub nics: Vec<Nic>,
    /// The serial console, for one client at a time.
    pub console_socket: PathBuf,
    /// Keeps what the serial console said.
    pub console_log: PathBuf,
    /// Images that were plugged in, by their units.
    pub images: Vec<ImageDisk>,
    /// The guest kernel's modules.
    pub modules: Option<ModulesDisk>,
}

/// The read-only disk with the guest kernel's modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModulesDisk {
    /// EROFS image.
    pub file: PathBuf,
    /// The guest finds it by this; at most 36 characters (SCSI).
    pub serial: String,
}

/// A read-only image that is plugged into a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDisk {
    /// EROFS image.
    pub file: PathBuf,
    /// The guest finds it by this; at most 36 characters (SCSI).
    pub serial: String,
    /// SCSI unit, unique in the machine.
    pub unit: u32,
}

/// The name of the machine's domain: a migration target must carry the source's,
/// so it comes from the machine and not from the pod.
pub fn domain_name(uuid: Uuid) -> String {
    format!("dyad-{uuid}")
}

impl DomainPlan {
    /// The guest kernel's command line. `quiet` and `loglevel=1` keep the emulated serial
    /// port, slow as it is, out of the boot's way; a panic still prints.
    /// `cryptomgr.notests` saves a third of a second under TCG. Hot-plugged memory is
    /// movable where the kernel's own share allows, so that it can be given back. Memory that
    /// may come above 4 GiB would cost 64 MiB of bounce buffers, which virtio does not need.
    /// The agent waits on its virtio-serial port unless the line says vsock; the last word
    /// counts, so the channel comes after the configuration's addition.
    pub fn cmdline(&self) -> String {
        let mut line = format!(
            "console=ttyS0 quiet loglevel=1 cryptomgr.notests random.trust_cpu=on \
            tsc=reliable no_timer_check i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd \
            panic=-1 memhp_default_state=online memory_hotplug.online_policy=auto-movable \
            swiotlb=noforce maxcpus={}",
            self.reached.vcpus
        );
        let extra = self.kernel_params.trim();
        if !extra.is_empty() {
            line.push(' ');
            line.push_str(extra);
        }
        if matches!(self.channel, AgentChannel::Vsock { .. }) {
            line.push_str(" dyad.channel=vsock");
        }
        line
    }

    /// The definition, as `virDomainDefineXML` takes it.
    pub fn to_xml(&self) -> String {
        render(|w| self.write(w))
    }

    fn write(&self, w: &mut Xml) -> io::Result<()> {
        let kind = match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        };
        element(w, "domain", &[("type", kind)], |w| {
            text(w, "name", &[], &domain_name(self.uuid))?;
            text(w, "uuid", &[], &self.uuid.to_string())?;
            if !self.title.is_empty() {
                text(w, "title", &[], &self.title)?;
            }
            element(w, "metadata", &[], |w| {
                let namespace = [("xmlns:dyad", METADATA_NAMESPACE)];
                element(w, "dyad:machine", &namespace, |w| {
                    text(w, "dyad:sandbox", &[], &self.sandbox_id)?;
                    text(w, "dyad:namespace", &[], &self.containerd_namespace)
                })
            })?;
            if let Some(partition) = &self.partition {
                element(w, "resource", &[], |w| {
                    text(w, "partition", &[], &partition.path)
                })?;
                if let Some(weight) = partition.cpu_weight {
                    element(w, "cputune", &[], |w| {
                        text(w, "shares", &[], &weight.to_string())
                    })?;
                }
            }
            self.write_size(w)?;
            element(w, "os", &[], |w| {
                let machine = [("arch", "x86_64"), ("machine", "q35")];
                text(w, "type", &machine, "hvm")?;
                text(w, "kernel", &[], &self.kernel.to_string_lossy())?;
                text(w, "initrd", &[], &self.initramfs.to_string_lossy())?;
                text(w, "cmdline", &[], &self.cmdline())
            })?;
            element(w, "features", &[], |w| {
                empty(w, "acpi", &[])?;
                empty(w, "apic", &[])?;
                match self.accelerator {
                    Accelerator::Kvm => Ok(()),
                    // Without a bound it is an eighth of the host's memory, up to 1 GiB, which no
                    // pod's cgroup counts on.
                    Accelerator::Tcg => element(w, "tcg", &[], |w| {
                        text(w, "tb-cache", &[("unit", "MiB")], TCG_CACHE_MIB)
                    }),
                }
            })?;
            self.write_cpu(w)?;
            element(w, "clock", &[("offset", "utc")], |w| {
                empty(w, "timer", &[("name", "hpet"), ("present", "no")])
            })?;
            text(w, "on_poweroff", &[], "destroy")?;
            text(w, "on_reboot", &[], "restart")?;
            text(w, "on_crash", &[], "destroy")?;
            element(w, "devices", &[], |w| self.write_devices(w))
        })
    }

    /// A NUMA cell and `maxMemory` are what virtio-mem needs.
    fn write_size(&self, w: &mut Xml) -> io::Result<()> {
        let size = &self.size;
        let slots = [("slots", "16"), ("unit", "MiB")];
        text(w, "maxMemory", &slots, &size.max_memory_mib.to_string())?;
        let unit = [("unit", "MiB")];
        let all = size.memory_mib + size.pluggable_mib();
        text(w, "memory", &unit, &all.to_string())?;
        let left = self.reached.memory_mib().to_string();
        text(w, "currentMemory", &unit, &left)?;
        // All that it can grow to: those beyond its size the guest never brings online.
        let vcpu = [("placement", "static")];
        text(w, "vcpu", &vcpu, &size.max_vcpus.to_string())
    }

    fn write_cpu(&self, w: &mut Xml) -> io::Result<()> {
        // host-model can be migrated; under TCG the bare default lacks what x86-64-v2 images need.
        let mode = match self.accelerator {
            Accelerator::Kvm => "host-model",
            Accelerator::Tcg => "maximum",
        };
        element(w, "cpu", &[("mode", mode)], |w| {
            element(w, "numa", &[], |w| {
                let cpus = match self.size.max_vcpus {
                    1 => "0".to_owned(),
                    n => format!("0-{}", n - 1),
                };
                let memory = self.size.memory_mib.to_string();
                let cell = [
                    ("id", "0"),
                    ("cpus", cpus.as_str()),
                    ("memory", memory.as_str()),
                    ("unit", "MiB"),
                ];
                empty(w, "cell", &cell)
            })
        })
    }

    fn write_devices(&self, w: &mut Xml) -> io::Result<()> {
        empty(w, "controller", &[("type", "usb"), ("model", "none")])?;
        element(
            w,
            "controller",
            &[("type", "virtio-serial"), ("index", "0")],
            |w| slot(w, 0x02),
        )?;
        element(
            w,
            "controller",
            &[("type", "scsi"), ("index", "0"), ("model", "virtio-scsi")],
            |w| slot(w, 0x03),
        )?;
        element(w, "disk", &[("type", "file"), ("device", "disk")], |w| {
            // The disk lives no longer than the pod, so a host crash has nothing to recover:
            // the guest's flushes need not wait for the host's disk.
            let driver = [
                ("name", "qemu"),
                ("type", "raw"),
                ("cache", "unsafe"),
                ("discard", "unmap"),
            ];
            empty(w, "driver", &driver)?;
            source_file(w, &self.pod_disk.file)?;
            empty(w, "target", &[("dev", "vda"), ("bus", "virtio")])?;
            text(w, "serial", &[], &self.pod_disk.serial)?;
            slot(w, 0x04)
        })?;
        self.write_channel(w)?;
        for (index, nic) in self.nics.iter().enumerate() {
            element(w, "interface", &[("type", "ethernet")], |w| {
                empty(w, "mac", &[("address", nic.mac.as_str())])?;
                empty(w, "target", &[("dev", nic.tap.as_str())])?;
                empty(w, "model", &[("type", "virtio")])?;
                empty(w, "mtu", &[("size", nic.mtu.to_string().as_str())])?;
                slot(w, 0x08 + index as u32)
            })?;
        }
        element(w, "serial", &[("type", "unix")], |w| {
            let socket = self.console_socket.to_string_lossy();
            empty(w, "source", &[("mode", "bind"), ("path", socket.as_ref())])?;
            let log = self.console_log.to_string_lossy();
            // Without append, libvirt truncates it when it restores a machine.
            empty(w, "log", &[("file", log.as_ref()), ("append", "on")])?;
            empty(w, "target", &[("type", "isa-serial"), ("port", "0")])
        })?;
        element(w, "rng", &[("model", "virtio")], |w| {
            text(w, "backend", &[("model", "random")], "/dev/urandom")?;
            slot(w, 0x05)
        })?;
        let balloon = [("model", "virtio"), ("freePageReporting", "on")];
        element(w, "memballoon", &balloon, |w| slot(w, 0x06))?;
        for image in &self.images {
            image.write(w)?;
        }
        if let Some(ModulesDisk { file, serial }) = &self.modules {
            write_read_only(w, file, serial, MODULES)?;
        }
        if let Some(memory) = self.plugged_memory() {
            memory.write(w)?;
        }
        empty(w, "panic", &[("model", "isa")])
    }

    /// The device that adds memory; `None`: there is none to add.
    pub fn plugged_memory(&self) -> Option<PluggedMemory> {
        let size_mib = self.size.pluggable_mib();
        (size_mib > 0).then_some(PluggedMemory {
            size_mib,
            requested_mib: self.reached.plugged_mib,
        })
    }

    fn write_channel(&self, w: &mut Xml) -> io::Result<()> {
        match &self.channel {
            AgentChannel::VirtioSerial { socket } => {
                element(w, "channel", &[("type", "unix")], |w| {
                    let path = socket.to_string_lossy();
                    empty(w, "source", &[("mode", "bind"), ("path", path.as_ref())])?;
                    empty(w, "target", &[("type", "virtio"), ("name", AGENT_PORT)])?;
                    let address = [
                        ("type", "virtio-serial"),
                        ("controller", "0"),
                        ("bus", "0"),
                        ("port", "1"),
                    ];
                    empty(w, "address", &address)
                })
            }
            AgentChannel::Vsock { cid } => element(w, "vsock", &[("model", "virtio")], |w| {
                let cid = cid.to_string();
                empty(w, "cid", &[("auto", "no"), ("address", cid.as_str())])?;
                slot(w, 0x1e)
            }),
        }
    }
}

impl ImageDisk {
    /// The device, as `virDomainAttachDevice` takes it.
    ///
    /// The unit is explicit: libvirt's own choice ends at the eighth disk. The image is
    /// shared between machines, so its owner and mode are ours, not libvirt's to change;
    /// sVirt still labels it as shared, read-only content.
    pub fn to_xml(&self) -> String {
        render(|w| self.write(w))
    }

    fn write(&self, w: &mut Xml) -> io::Result<()> {
        let place = ScsiPlace {
            target: 0,
            unit: self.unit,
            name: self.unit,
        };
        write_read_only(w, &self.file, &self.serial, place)
    }
}

/// Where a disk is on the virtio-scsi controller.
struct ScsiPlace {
    target: u32,
    unit: u32,
    /// Which of libvirt's names it has.
    name: u32,
}

/// A target of its own, which the guest does not look at before the pod's disks are there. The
/// name is one that no image's unit gives (virtio-scsi has 16384 units).
const MODULES: ScsiPlace = ScsiPlace {
    target: 1,
    unit: 0,
    name: 1 << 14,
};

fn write_read_only(w: &mut Xml, file: &Path, serial: &str, place: ScsiPlace) -> io::Result<()> {
    element(w, "disk", &[("type", "file"), ("device", "disk")], |w| {
        empty(w, "driver", &[("name", "qemu"), ("type", "raw")])?;
        let path = file.to_string_lossy();
        element(w, "source", &[("file", path.as_ref())], |w| {
            empty(w, "seclabel", &[("model", "dac"), ("relabel", "no")])
        })?;
        let name = scsi_name(place.name);
        empty(w, "target", &[("dev", name.as_str()), ("bus", "scsi")])?;
        empty(w, "readonly", &[])?;
        empty(w, "shareable", &[])?;
        text(w, "serial", &[], serial)?;
        let (target, unit) = (place.target.to_string(), place.unit.to_string());
        let address = [
            ("type", "drive"),
            ("controller", "0"),
            ("bus", "0"),
            ("target", target.as_str()),
            ("unit", unit.as_str()),
        ];
        empty(w, "address", &address)
    })
}

/// The virtio-mem device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PluggedMemory {
    /// As much as it can add.
    pub size_mib: u64,
    /// As much as it is to add.
    pub requested_mib: u64,
}

impl PluggedMemory {
    /// The device, as `virDomainUpdateDevice` takes it: found by its alias, all but the
    /// requested size as it is.
    pub fn to_xml(&self) -> String {
        render(|w| self.write(w))
    }

    fn write(&self, w: &mut Xml) -> io::Result<()> {
        let mib = [("unit", "MiB")];
        element(w, "memory", &[("model", "virtio-mem")], |w| {
            element(w, "target", &[], |w| {
                text(w, "size", &mib, &self.size_mib.to_string())?;
                text(w, "node", &[], "0")?;
                text(w, "block", &mib, &BLOCK_MIB.to_string())?;
                text(w, "requested", &mib, &self.requested_mib.to_string())
            })?;
            // libvirt finds the device to change by the address, and then asks QEMU for the
            // alias that the change names; `ua-` is the prefix for those of users.
            empty(w, "alias", &[("name", "ua-memory")])?;
            slot(w, 0x07)
        })
    }
}

/// `sda` … `sdz`, `sdaa` …: libvirt wants each disk to have one; the guest's names differ.
fn scsi_name(unit: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = unit;
    loop {
        letters.push(char::from(b'a' + (rest % 26) as u8));
        if rest < 26 {
            break;
        }
        rest = rest / 26 - 1;
    }
    format!("sd{}", letters.iter().rev().collect::<String>())
}

type Xml = Writer<Vec<u8>>;

fn render(body: impl FnOnce(&mut Xml) -> io::Result<()>) -> String {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    // A Vec takes every write, and all text is UTF-8 or was made so.
    body(&mut writer).expect("writing to memory");
    let mut xml = String::from_utf8(writer.into_inner()).expect("UTF-8 in, UTF-8 out");
    xml.push('\n');
    xml
}

fn element(
    w: &mut Xml,
    name: &str,
    attributes: &[(&str, &str)],
    inner: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> io::Result<()> {
    w.create_element(name)
        .with_attributes(attributes.iter().copied())
        .write_inner_content(inner)?;
    Ok(())
}

fn empty(w: &mut Xml, name: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    w.create_element(name)
        .with_attributes(attributes.iter().copied())
        .write_empty()?;
    Ok(())
}

fn text(w: &mut Xml, name: &str, attributes: &[(&str, &str)], content: &str) -> io::Result<()> {
    w.create_element(name)
        .with_attributes(attributes.iter().copied())
        .write_text_content(BytesText::new(content))?;
    Ok(())
}

fn source_file(w: &mut Xml, path: &Path) -> io::Result<()> {
    empty(w, "source", &[("file", path.to_string_lossy().as_ref())])
}

fn slot(w: &mut Xml, slot: u32) -> io::Result<()> {
    let slot = format!("0x{slot:02x}");
    let address = [
        ("type", "pci"),
        ("domain", "0x0000"),
        ("bus", "0x00"),
        ("slot", slot.as_str()),
        ("function", "0x0"),
    ];
    empty(w, "address", &address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> DomainPlan {
        DomainPlan {
            uuid: Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888),
            title: "default/web".into(),
            sandbox_id: "abc123".into(),
            containerd_namespace: "k8s.io".into(),
            accelerator: Accelerator::Tcg,
            partition: None,
            size: Size {
                vcpus: 1,
                max_vcpus: 4,
                memory_mib: 256,
                max_memory_mib: 8192,
            },
            reached: Reached {
                vcpus: 1,
                balloon_mib: 256,
                plugged_mib: 0,
            },
            kernel: "/var/lib/dyad/guest/vmlinux".into(),
            initramfs: "/var/lib/dyad/guest/initramfs.zst".into(),
            kernel_params: String::new(),
            channel: AgentChannel::VirtioSerial {
                socket: "/run/dyad/m/11112222/agent.sock".into(),
            },
            pod_disk: PodDisk {
                file: "/var/lib/dyad/machines/11112222/disk.img".into(),
                serial: "pod".into(),
            },
            nics: vec![Nic {
                tap: "dy11112222333".into(),
                mac: "0a:58:0a:58:00:05".into(),
                mtu: 1450,
            }],
            console_socket: "/run/dyad/m/11112222/console.sock".into(),
            console_log: "/var/lib/dyad/machines/11112222/console.log".into(),
            images: Vec::new(),
            modules: None,
        }
    }

    /// Compares with `tests/golden/NAME`; `UPDATE_GOLDEN=1` writes it anew.
    fn golden(name: &str, xml: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, xml).expect("write golden file");
        }
        let expected = std::fs::read_to_string(&path).expect("golden file");
        assert_eq!(xml, expected, "{name} changed; UPDATE_GOLDEN=1 accepts it");
    }

    #[test]
    fn the_ordinary_machine_is_as_in_its_golden_file() {
        golden("ordinary.xml", &plan().to_xml());
    }

    #[test]
    fn a_kvm_machine_in_a_slice_with_vsock_and_two_nics_is_as_in_its_golden_file() {
        let mut plan = plan();
        plan.accelerator = Accelerator::Kvm;
        plan.partition = Some(Partition {
            path: "/kubepods/besteffort/pod1_2".into(),
            cpu_weight: Some(39),
        });
        plan.channel = AgentChannel::Vsock { cid: 4711 };
        plan.size.max_vcpus = 1;
        plan.size.max_memory_mib = 256;
        plan.nics.push(Nic {
            tap: "dy1111222233x".into(),
            mac: "0a:58:0a:58:01:05".into(),
            mtu: 9000,
        });
        plan.kernel_params = "debug".into();
        golden("kvm-vsock.xml", &plan.to_xml());
    }

    #[test]
    fn an_image_disk_is_as_in_its_golden_file() {
        let disk = ImageDisk {
            file: "/var/lib/dyad/images/5a5a.erofs".into(),
            serial: "5a5a".into(),
            unit: 27,
        };
        golden("image-disk.xml", &disk.to_xml());
    }

    #[test]
    fn a_machine_that_was_resized_is_as_in_its_golden_file() {
        let mut plan = plan();
        plan.reached = Reached {
            vcpus: 3,
            balloon_mib: 256,
            plugged_mib: 128,
        };
        plan.images.push(ImageDisk {
            file: "/var/lib/dyad/images/5a5a.erofs".into(),
            serial: "5a5a".into(),
            unit: 0,
        });
        plan.modules = Some(ModulesDisk {
            file: "/var/lib/dyad/guest/modules.erofs".into(),
            serial: "modules-0123456789abcdef01234567".into(),
        });
        golden("resized.xml", &plan.to_xml());
    }

    #[test]
    fn names_from_outside_cannot_break_out_of_their_element() {
        let mut plan = plan();
        plan.title = "a</title><os>&\"'".into();
        plan.nics[0].mac = "'/><evil x='".into();
        let xml = plan.to_xml();
        assert!(!xml.contains("<os>&"));
        assert!(!xml.contains("<evil"));
        assert_eq!(xml.matches("<os>").count(), 1);
    }

    #[test]
    fn scsi_names_go_on_after_z() {
        assert_eq!(scsi_name(0), "sda");
        assert_eq!(scsi_name(25), "sdz");
        assert_eq!(scsi_name(26), "sdaa");
        assert_eq!(scsi_name(701), "sdzz");
        assert_eq!(scsi_name(702), "sdaaa");
    }
}
