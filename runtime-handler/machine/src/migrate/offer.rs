//! What the two sides tell each other, and whether they fit. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dyad_runtime_handler::error::{Context, Error, Result};
use quick_xml::Reader;
use quick_xml::escape::escape;
use quick_xml::events::Event;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::domain::{Accelerator, Partition};
use crate::network::plan::Held;
use crate::size::{Ledger, Reached, Size};

/// The version of all three messages.
pub const VERSION: u32 = 2;

/// Prefix and namespace of the target's offer.
pub const OFFER: (&str, &str) = ("dyadoffer", "https://dyad.dev/migration/offer/1");
/// Prefix and namespace of the source's record.
pub const RECORD: (&str, &str) = ("dyadrecord", "https://dyad.dev/migration/record/1");
/// Prefix and namespace of the source's hand-over.
pub const HANDOVER: (&str, &str) = ("dyadhandover", "https://dyad.dev/migration/handover/1");

/// What a waiting target has ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// See [`VERSION`].
    pub version: u32,
    /// The target's dyad.
    pub release: String,
    /// For people.
    pub title: String,
    /// The target pod's namespace; empty outside Kubernetes.
    pub kubernetes_namespace: String,
    /// The target's sandbox.
    pub sandbox_id: String,
    /// Its containerd namespace.
    pub containerd_namespace: String,
    /// What runs guests there.
    pub accelerator: Accelerator,
    /// The target pod's slice.
    #[serde(default)]
    pub partition: Option<Partition>,
    /// What the target pod was given.
    pub vcpus: u32,
    /// What the target pod was given.
    pub memory_mib: u64,
    /// The guest's kernel, for a later power-on.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// The guest kernel's modules: their disk's serial and file.
    pub modules: Option<(String, PathBuf)>,
    /// The pod's disk: empty, of the right size.
    pub disk: PathBuf,
    /// Its virtual size.
    pub disk_bytes: u64,
    /// What the file system below it has left.
    pub free_bytes: u64,
    /// The agent's socket; empty: vsock.
    pub agent_socket: PathBuf,
    /// vsock context id; 0: virtio-serial.
    pub vsock_cid: u32,
    /// The serial console.
    pub console_socket: PathBuf,
    /// What it said.
    pub console_log: PathBuf,
    /// Taps in the order of the interfaces, with their MTU.
    pub taps: Vec<(String, u32)>,
    /// Where streams go when both are on one host.
    pub migrate_socket: PathBuf,
    /// So for the disks.
    pub disks_socket: PathBuf,
    /// The pod's containers, by name.
    pub containers: BTreeMap<String, OfferedContainer>,
}

/// A container that waits for its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedContainer {
    /// Its image, converted.
    pub image: PathBuf,
    /// SHA-256 of that file.
    pub digest: String,
    /// Whether it was started: then containerd is not about to change it.
    pub started: bool,
}

/// What goes with the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// See [`VERSION`].
    pub version: u32,
    /// The source's containers, by Kubernetes' name.
    pub containers: BTreeMap<String, Traveller>,
    /// Images that are plugged in: serial and SCSI unit.
    pub images: BTreeMap<String, u32>,
    /// How big it is: it may have been resized.
    pub sizing: Sizing,
    /// The guest's hardware addresses, in the order of its interfaces.
    pub macs: Vec<String>,
    /// Its addresses and routes.
    pub network: Held,
    /// `uname -r`.
    pub kernel_release: String,
    /// The last of the guest's events that was told.
    pub events_after: u64,
    /// The shim's own.
    pub pod: Vec<u8>,
}

/// What a machine was made for, and what became of that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizing {
    /// At power-on, and its bounds.
    pub size: Size,
    /// Now.
    pub reached: Reached,
    /// Its containers' limits.
    pub ledger: Ledger,
}

/// A container that goes along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traveller {
    /// The guest's id for it.
    pub guest_id: String,
    /// The serial by which the guest knows its image.
    pub serial: String,
}

/// Where each of the guest's streams goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Handover {
    /// See [`VERSION`].
    pub version: u32,
    /// All output below these offsets is where it belongs.
    pub streams: Vec<Position>,
}

/// How far a stream is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The guest's id of the container.
    pub container: String,
    /// The exec, or empty.
    pub exec: String,
    /// 1 or 2.
    pub fd: u32,
    /// The first byte that is not written yet.
    pub offset: u64,
}

/// A message as a metadata element.
pub fn element(name: &str, message: &impl Serialize) -> Result<String> {
    let json = serde_json::to_string(message).context(|| format!("write the {name}"))?;
    Ok(format!("<{name}>{}</{name}>", escape(&json)))
}

/// Reads a metadata element.
///
/// # Errors
/// `InvalidArgument`: damaged, or of another version.
pub fn read<T: DeserializeOwned>(name: &str, element: &str) -> Result<T> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let damaged = |why: String| Error::InvalidArgument(format!("migration {name}: {why}"));
    let text = text_of(element).map_err(damaged)?;
    let Versioned { version } =
        serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    if version != VERSION {
        return Err(damaged(format!(
            "version {version}, this program speaks {VERSION}: use the same release of dyad on \
             both nodes"
        )));
    }
    serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))
}

/// All text below the root element.
fn text_of(element: &str) -> std::result::Result<String, String> {
    let mut reader = Reader::from_str(element);
    let mut text = String::new();
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Eof => return Ok(text),
            Event::Text(part) => {
                text.push_str(&part);
            }
            Event::GeneralRef(name) => {
                let whole = format!("&{};", &*name);
                let meant =
                    quick_xml::escape::unescape(&whole).map_err(|error| error.to_string())?;
                text.push_str(&meant);
            }
            _ => {}
        }
    }
}

/// The source, as far as a target must fit it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The pod's namespace.
    pub kubernetes_namespace: String,
    /// The source's dyad.
    pub release: String,
    /// What runs it.
    pub accelerator: Accelerator,
    /// Its size now.
    pub vcpus: u32,
    /// Its size now.
    pub memory_mib: u64,
    /// Its disk's virtual size.
    pub disk_bytes: u64,
    /// What of that is in use.
    pub disk_used_bytes: u64,
    /// MTU of each interface.
    pub mtus: Vec<u32>,
    /// Serial of the disk with its kernel's modules.
    pub modules: Option<String>,
    /// Containers that run: name, and their image's digest.
    pub containers: BTreeMap<String, String>,
}

/// Whether the machine can go there.
///
/// # Errors
/// `FailedPrecondition`, naming the blocker and the way out.
pub fn fits(wanted: &Wanted, offer: &Offer) -> Result<()> {
    let refuse = |text: String| Err(Error::FailedPrecondition(format!("cannot migrate: {text}")));
    if offer.release != wanted.release {
        return refuse(format!(
            "the target runs dyad {}, this node {}: use the same release on both",
            offer.release, wanted.release
        ));
    }
    // Whoever may make pods of this namespace may have this one's memory; nobody else. Names
    // cannot be compared: two pods of a cluster have two.
    if offer.kubernetes_namespace != wanted.kubernetes_namespace {
        return refuse(format!(
            "the target pod is of the namespace {:?}, this one of {:?}: make the target in the \
             same namespace",
            offer.kubernetes_namespace, wanted.kubernetes_namespace
        ));
    }
    if offer.accelerator != wanted.accelerator {
        return refuse(format!(
            "the target runs machines by {:?}, this node by {:?}: a running machine cannot change \
             that; set `accelerator` on both nodes",
            offer.accelerator, wanted.accelerator
        ));
    }
    if let Some(modules) = &wanted.modules
        && offer.modules.as_ref().map(|(serial, _)| serial) != Some(modules)
    {
        return refuse(format!(
            "the guest's kernel modules ({modules}) are others on the target ({}): give both nodes \
             the same output of hack/guest",
            offer.modules.as_ref().map_or("none", |(serial, _)| serial)
        ));
    }
    if offer.memory_mib < wanted.memory_mib || offer.vcpus < wanted.vcpus {
        return refuse(format!(
            "the target pod is of {} vCPUs and {} MiB, the machine of {} and {}: give the target \
             the same limits",
            offer.vcpus, offer.memory_mib, wanted.vcpus, wanted.memory_mib
        ));
    }
    if offer.disk_bytes != wanted.disk_bytes {
        return refuse(format!(
            "the target's disk has {} bytes, the machine's {}: give the target the same dyad.dev/disk",
            offer.disk_bytes, wanted.disk_bytes
        ));
    }
    if offer.free_bytes < wanted.disk_used_bytes {
        return refuse(format!(
            "no space: the machine's disk holds {} bytes, the target node has {} left in its \
             cache_dir",
            wanted.disk_used_bytes, offer.free_bytes
        ));
    }
    let mtus: Vec<u32> = offer.taps.iter().map(|(_, mtu)| *mtu).collect();
    if mtus != wanted.mtus {
        return refuse(format!(
            "the target pod has interfaces of MTU {mtus:?}, the machine of {:?}: attach the target \
             to the same networks",
            wanted.mtus
        ));
    }
    for (name, digest) in &wanted.containers {
        match offer.containers.get(name) {
            None => {
                return refuse(format!(
                    "container {name} is not in the target pod: make the target from the same spec"
                ));
            }
            Some(offered) if !offered.started => {
                return refuse(format!(
                    "container {name} of the target is not started yet: ask again in a moment"
                ));
            }
            Some(offered) if offered.digest != *digest => {
                return refuse(format!(
                    "the image of container {name} has other content on the target ({}, here {}): \
                     name images by digest",
                    short(&offered.digest),
                    short(digest)
                ));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = offer
        .containers
        .keys()
        .find(|name| !wanted.containers.contains_key(*name))
    {
        return refuse(format!(
            "container {name} of the target pod does not run here: make the target from the same \
             spec, without what has ended"
        ));
    }
    Ok(())
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// An offer for tests.
#[cfg(test)]
pub(super) fn tests_offer() -> Offer {
    Offer {
        version: VERSION,
        release: "0.1.0".into(),
        title: "default/web".into(),
        kubernetes_namespace: "default".into(),
        sandbox_id: "t1".into(),
        containerd_namespace: "k8s.io".into(),
        accelerator: Accelerator::Tcg,
        partition: Some(Partition {
            path: "/kubepods/pod2".into(),
            cpu_weight: Some(39),
        }),
        vcpus: 1,
        memory_mib: 256,
        kernel: "/k".into(),
        initramfs: "/i".into(),
        modules: Some(("modules-1".into(), "/x".into())),
        disk: "/d".into(),
        disk_bytes: 10 << 30,
        free_bytes: 1 << 40,
        agent_socket: "/a".into(),
        vsock_cid: 0,
        console_socket: "/c".into(),
        console_log: "/l".into(),
        taps: vec![("dy1".into(), 1450)],
        migrate_socket: "/m".into(),
        disks_socket: "/n".into(),
        containers: BTreeMap::from([(
            "web".to_owned(),
            OfferedContainer {
                image: "/img".into(),
                digest: "aaaa".into(),
                started: true,
            },
        )]),
    }
}

#[cfg(test)]
mod tests {
    use super::tests_offer as offer;
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            kubernetes_namespace: "default".into(),
            release: "0.1.0".into(),
            accelerator: Accelerator::Tcg,
            vcpus: 1,
            memory_mib: 256,
            disk_bytes: 10 << 30,
            disk_used_bytes: 1 << 20,
            mtus: vec![1450],
            modules: Some("modules-1".into()),
            containers: BTreeMap::from([("web".to_owned(), "aaaa".to_owned())]),
        }
    }

    #[test]
    fn a_target_of_the_same_spec_fits() {
        fits(&wanted(), &offer()).expect("fits");
    }

    #[test]
    fn every_blocker_is_named() {
        type Change = fn(&mut Wanted, &mut Offer);
        let table: [(Change, &str); 12] = [
            (|_, o| o.release = "9".into(), "dyad 9"),
            (
                |_, o| o.kubernetes_namespace = "tenant-b".into(),
                "namespace \"tenant-b\"",
            ),
            (|_, o| o.kubernetes_namespace.clear(), "namespace \"\""),
            (|_, o| o.accelerator = Accelerator::Kvm, "Kvm"),
            (|w, _| w.memory_mib = 512, "512"),
            (|w, _| w.vcpus = 2, "vCPUs"),
            (|_, o| o.disk_bytes = 1, "dyad.dev/disk"),
            (|_, o| o.free_bytes = 1, "no space"),
            (|_, o| o.taps.clear(), "MTU"),
            (
                |w, _| drop(w.containers.insert("db".into(), "b".into())),
                "container db is not in the target pod",
            ),
            (
                |w, _| drop(w.containers.insert("web".into(), "b".into())),
                "other content",
            ),
            (|w, _| w.containers.clear(), "does not run here"),
        ];
        for (change, part) in table {
            let (mut wanted, mut offer) = (wanted(), offer());
            change(&mut wanted, &mut offer);
            let error = fits(&wanted, &offer).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
        let mut offer = offer();
        for container in offer.containers.values_mut() {
            container.started = false;
        }
        let error = fits(&wanted(), &offer).expect_err("refused").to_string();
        assert!(error.contains("not started yet"), "{error}");
    }

    #[test]
    fn messages_come_through_xml_whole() {
        let mut sent = offer();
        sent.title = "a<b>&\"'é".into();
        let element = element("offer", &sent).expect("written");
        let read: Offer = read("offer", &element).expect("read");
        assert_eq!(read, sent);
    }

    #[test]
    fn damaged_and_newer_messages_are_refused_by_name() {
        for (element, part) in [
            ("<offer>{\"version\":3}</offer>", "version 3"),
            ("<offer>{\"version\":2}</offer>", "missing field"),
            ("<offer>{</offer>", "offer"),
            ("<offer>", "offer"),
            ("", "offer"),
        ] {
            let error = read::<Offer>("offer", element).expect_err(element);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    proptest::proptest! {
        /// A peer's messages in metadata, changed anywhere: read or refused.
        #[test]
        fn fuzz_offer(
            changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), "[<>&;{}\\[\\]:,\"0-9e.\\-]{1,4}"), 0..5),
        ) {
            let element = element("offer", &offer()).unwrap();
            let mut text: Vec<char> = element.chars().collect();
            for (at, new) in changes {
                let at = at.index(text.len());
                let end = (at + new.chars().count()).min(text.len());
                text.splice(at..end, new.chars());
            }
            let text: String = text.into_iter().collect();
            if let Ok(offer) = read::<Offer>("offer", &text) {
                let _ = fits(&wanted(), &offer);
            }
            let _ = read::<Record>("record", &text);
            let _ = read::<Handover>("handover", &text);
        }
    }
}
