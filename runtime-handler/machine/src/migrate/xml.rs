//! The definition that is started over there: the source's own, as it runs, with the
//! target's files, sockets and taps in their places. Pure.
//!
//! It is taken from what runs, and not planned anew, because guest and device state must
//! meet the very devices they were saved from, also those plugged in meanwhile.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dyad_runtime_handler::error::{Error, Result};
use quick_xml::events::attributes::Attribute;
use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::{Reader, Writer};

use super::offer::Offer;
use crate::domain::METADATA_NAMESPACE;

/// What takes the place of what.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// The target's.
    pub offer: &'a Offer,
    /// The target's file for each image, by the source's serial.
    pub images: &'a BTreeMap<String, PathBuf>,
    /// Serial of the pod's disk.
    pub pod_disk_serial: &'a str,
    /// The record, as a whole metadata element with its namespace.
    pub record: &'a str,
}

/// What is in the source's XML, as far as it decides.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Each disk's serial and target device, in order.
    pub disks: Vec<(String, String)>,
    /// Hardware address of each interface, in order.
    pub macs: Vec<String>,
    /// Devices that cannot move, for people, with the way out.
    pub blockers: Vec<String>,
}

/// Reads the source's XML.
///
/// # Errors
/// `InvalidArgument`: it is no XML.
pub fn find(xml: &str) -> Result<Found> {
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = Vec::new();
    let mut found = Found::default();
    loop {
        let event = reader.read_event().map_err(|error| bad(&error))?;
        match event {
            Event::Eof => return Ok(found),
            Event::Start(start) => {
                path.push(name(&start));
                look(&path, &start, &mut found)?;
            }
            Event::Empty(start) => {
                path.push(name(&start));
                look(&path, &start, &mut found)?;
                path.pop();
            }
            Event::End(_) => {
                path.pop();
            }
            Event::Text(text) => {
                if is(&path, &["domain", "devices", "disk", "serial"])
                    && let Some((serial, _)) = found.disks.last_mut()
                {
                    *serial = text.trim().to_owned();
                }
            }
            _ => {}
        }
    }
}

fn look(path: &[String], start: &BytesStart<'_>, found: &mut Found) -> Result<()> {
    if is(path, &["domain", "devices", "disk"]) {
        found.disks.push(Default::default());
    } else if is(path, &["domain", "devices", "disk", "target"]) {
        if let (Some((_, device)), Some(value)) = (found.disks.last_mut(), get(start, "dev")?) {
            *device = value;
        }
    } else if is(path, &["domain", "devices", "interface", "mac"]) {
        found.macs.extend(get(start, "address")?);
    } else if is(path, &["domain", "devices", "filesystem"]) {
        let how = get(start, "type")?.unwrap_or_default();
        found.blockers.push(format!(
            "a directory shared with the host ({how}; a hostPath or file system volume), which stays \
             there: use volumes that are copied or attached as disks"
        ));
    } else if is(path, &["domain", "devices", "hostdev"])
        || (is(path, &["domain", "devices", "interface"])
            && get(start, "type")?.as_deref() == Some("hostdev"))
    {
        let how = get(start, "type")?.unwrap_or_default();
        found.blockers.push(format!(
            "a device of the host ({how}), which stays there: detach it first"
        ));
    }
    Ok(())
}

/// The definition for the target.
///
/// # Errors
/// `InvalidArgument`: it is no XML; `FailedPrecondition`: a disk that the target has no
/// file for.
pub fn rewrite(xml: &str, places: Places<'_>) -> Result<String> {
    let found = find(xml)?;
    let mut reader = Reader::from_str(xml);
    let mut writer = Writer::new(Vec::new());
    let mut path: Vec<String> = Vec::new();
    let (mut disk, mut interface) = (0, 0);
    loop {
        let event = reader.read_event().map_err(|error| bad(&error))?;
        match event {
            Event::Eof => break,
            Event::Start(start) => {
                path.push(name(&start));
                let end = start.to_end().into_owned();
                if let Some(text) = text_for(&path, places.offer) {
                    reader
                        .read_to_end(end.name())
                        .map_err(|error| bad(&error))?;
                    path.pop();
                    write(&mut writer, Event::Start(start.into_owned()))?;
                    write(&mut writer, Event::Text(BytesText::new(&text)))?;
                    write(&mut writer, Event::End(end))?;
                    continue;
                }
                if is(&path, &["domain", "resource"]) {
                    // The source pod's slice; the target's comes with the metadata.
                    reader
                        .read_to_end(end.name())
                        .map_err(|error| bad(&error))?;
                    path.pop();
                    continue;
                }
                if is(&path, &["domain", "metadata"]) {
                    reader
                        .read_to_end(end.name())
                        .map_err(|error| bad(&error))?;
                    path.pop();
                    write_metadata(&mut writer, places)?;
                    continue;
                }
                let start = changed(&path, start, places, &found, (disk, interface))?;
                write(&mut writer, Event::Start(start))?;
            }
            Event::Empty(start) => {
                path.push(name(&start));
                let start = changed(&path, start, places, &found, (disk, interface))?;
                path.pop();
                write(&mut writer, Event::Empty(start))?;
            }
            Event::End(end) => {
                if is(&path, &["domain", "devices", "disk"]) {
                    disk += 1;
                } else if is(&path, &["domain", "devices", "interface"]) {
                    interface += 1;
                }
                path.pop();
                write(&mut writer, Event::End(end.into_owned()))?;
            }
            other => write(&mut writer, other.into_owned())?,
        }
    }
    String::from_utf8(writer.into_inner()).map_err(|error| bad(&error))
}

fn text_for(path: &[String], offer: &Offer) -> Option<String> {
    let text = |path: &PathBuf| path.to_string_lossy().into_owned();
    if is(path, &["domain", "title"]) {
        Some(offer.title.clone())
    } else if is(path, &["domain", "cputune", "shares"]) {
        let weight = offer.partition.as_ref()?.cpu_weight?;
        Some(weight.to_string())
    } else if is(path, &["domain", "os", "kernel"]) {
        Some(text(&offer.kernel))
    } else if is(path, &["domain", "os", "initrd"]) {
        Some(text(&offer.initramfs))
    } else {
        None
    }
}

fn changed(
    path: &[String],
    start: BytesStart<'_>,
    places: Places<'_>,
    found: &Found,
    (disk, interface): (usize, usize),
) -> Result<BytesStart<'static>> {
    let offer = places.offer;
    let path_text = |path: &PathBuf| path.to_string_lossy().into_owned();
    if is(path, &["domain", "devices", "disk", "source"]) {
        let (serial, device) = found.disks.get(disk).cloned().unwrap_or_default();
        let file = if serial == places.pod_disk_serial {
            &offer.disk
        } else {
            places.images.get(&serial).ok_or_else(|| {
                Error::FailedPrecondition(format!(
                    "cannot migrate: disk {device} (serial {serial:?}) is none that the target has: \
                     detach it first"
                ))
            })?
        };
        return set(start, "file", &path_text(file));
    }
    if is(path, &["domain", "devices", "channel", "source"]) {
        return set(start, "path", &path_text(&offer.agent_socket));
    }
    if is(path, &["domain", "devices", "vsock", "cid"]) {
        return set(start, "address", &offer.vsock_cid.to_string());
    }
    if is(path, &["domain", "devices", "interface", "target"]) {
        let tap = offer.taps.get(interface).map(|(tap, _)| tap.as_str());
        return set(start, "dev", tap.unwrap_or_default());
    }
    for device in ["serial", "console"] {
        if is(path, &["domain", "devices", device, "source"]) {
            return set(start, "path", &path_text(&offer.console_socket));
        }
        if is(path, &["domain", "devices", device, "log"]) {
            return set(start, "file", &path_text(&offer.console_log));
        }
    }
    Ok(start.into_owned())
}

fn write_metadata(writer: &mut Writer<Vec<u8>>, places: Places<'_>) -> Result<()> {
    let offer = places.offer;
    let mut machine = BytesStart::new("dyad:machine");
    machine.push_attribute(("xmlns:dyad", METADATA_NAMESPACE));
    write(writer, Event::Start(BytesStart::new("metadata")))?;
    write(writer, Event::Start(machine))?;
    for (name, text) in [
        ("dyad:sandbox", &offer.sandbox_id),
        ("dyad:namespace", &offer.containerd_namespace),
    ] {
        write(writer, Event::Start(BytesStart::new(name)))?;
        write(writer, Event::Text(BytesText::new(text)))?;
        write(writer, Event::End(BytesEnd::new(name)))?;
    }
    write(writer, Event::End(BytesEnd::new("dyad:machine")))?;
    // Made by us, escaped already.
    write(writer, Event::Text(BytesText::from_escaped(places.record)))?;
    write(writer, Event::End(BytesEnd::new("metadata")))?;
    let Some(partition) = &offer.partition else {
        return Ok(());
    };
    for name in ["resource", "partition"] {
        write(writer, Event::Start(BytesStart::new(name)))?;
    }
    write(writer, Event::Text(BytesText::new(&partition.path)))?;
    for name in ["partition", "resource"] {
        write(writer, Event::End(BytesEnd::new(name)))?;
    }
    Ok(())
}

/// The element with one attribute replaced, or added.
fn set(start: BytesStart<'_>, key: &str, value: &str) -> Result<BytesStart<'static>> {
    let mut new = BytesStart::new(name(&start));
    let mut done = false;
    for attribute in start.attributes() {
        let attribute: Attribute<'_> = attribute.map_err(|error| bad(&error))?;
        if attribute.key.as_ref() == key {
            new.push_attribute((key, value));
            done = true;
        } else {
            new.push_attribute(attribute);
        }
    }
    if !done {
        new.push_attribute((key, value));
    }
    Ok(new.into_owned())
}

fn get(start: &BytesStart<'_>, key: &str) -> Result<Option<String>> {
    let found = start
        .try_get_attribute(key)
        .map_err(|error| bad(&error))?
        .map(|attribute| attribute.value.into_owned());
    Ok(found)
}

fn write(writer: &mut Writer<Vec<u8>>, event: Event<'_>) -> Result<()> {
    writer.write_event(event).map_err(|error| bad(&error))
}

fn name(start: &BytesStart<'_>) -> String {
    start.name().as_ref().to_owned()
}

fn is(path: &[String], wanted: &[&str]) -> bool {
    path.len() == wanted.len() && path.iter().zip(wanted).all(|(have, want)| have == want)
}

fn bad(error: &dyn std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("the domain's XML: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::offer::tests_offer;
    use super::*;

    const SOURCE: &str = r#"<domain type="qemu">
  <name>dyad-1</name>
  <title>default/web-1</title>
  <metadata><dyad:machine xmlns:dyad="https://dyad.dev/machine/1"><dyad:sandbox>s1</dyad:sandbox></dyad:machine></metadata>
  <resource>
    <partition>/kubepods/podOLD</partition>
  </resource>
  <cputune><shares>7</shares></cputune>
  <os><kernel>/n1/vmlinux</kernel><initrd>/n1/initramfs</initrd><cmdline>a &lt; b</cmdline></os>
  <devices>
    <disk type="file" device="disk">
      <source file="/n1/disk.img" index="1"/>
      <target dev="vda" bus="virtio"/>
      <serial>dyad-pod</serial>
    </disk>
    <disk type="file" device="disk">
      <source file="/n1/img.erofs"><seclabel model="dac" relabel="no"/></source>
      <target dev="sda" bus="scsi"/>
      <readonly/>
      <serial>5a5a</serial>
    </disk>
    <interface type="ethernet">
      <mac address="0a:58:0a:58:00:05"/>
      <target dev="dyOLD"/>
    </interface>
    <serial type="unix"><source mode="bind" path="/n1/console.sock"/><log file="/n1/console.log" append="on"/></serial>
    <channel type="unix"><source mode="bind" path="/n1/agent.sock"/></channel>
  </devices>
</domain>"#;

    fn rewritten(images: &BTreeMap<String, PathBuf>) -> Result<String> {
        rewrite(
            SOURCE,
            Places {
                offer: &tests_offer(),
                images,
                pod_disk_serial: "dyad-pod",
                record: "<r xmlns=\"u\">{&quot;}</r>",
            },
        )
    }

    #[test]
    fn everything_of_the_source_s_host_is_replaced_and_nothing_else() {
        let images = BTreeMap::from([("5a5a".to_owned(), PathBuf::from("/n2/img.erofs"))]);
        let xml = rewritten(&images).expect("rewritten");
        assert!(!xml.contains("/n1/"), "{xml}");
        assert!(!xml.contains("dyOLD"), "{xml}");
        assert!(!xml.contains("podOLD"), "{xml}");
        for part in [
            "<title>default/web</title>",
            "<kernel>/k</kernel>",
            "<cmdline>a &lt; b</cmdline>",
            r#"<source file="/d" index="1"/>"#,
            r#"<source file="/n2/img.erofs"><seclabel"#,
            "<serial>5a5a</serial>",
            r#"<mac address="0a:58:0a:58:00:05"/>"#,
            r#"<target dev="dy1"/>"#,
            r#"<target dev="sda" bus="scsi"/>"#,
            r#"path="/c""#,
            r#"<log file="/l" append="on"/>"#,
            r#"path="/a""#,
            "<dyad:sandbox>t1</dyad:sandbox>",
            "<resource><partition>/kubepods/pod2</partition></resource>",
            "<shares>39</shares>",
            "<r xmlns=\"u\">{&quot;}</r>",
        ] {
            assert!(xml.contains(part), "{part} is missing in\n{xml}");
        }
        let found = find(&xml).expect("XML");
        assert_eq!(found.disks[1], ("5a5a".into(), "sda".into()));
        assert_eq!(found.macs, ["0a:58:0a:58:00:05"]);
    }

    #[test]
    fn a_disk_that_the_target_does_not_have_is_refused_by_name() {
        let error = rewritten(&BTreeMap::new())
            .expect_err("refused")
            .to_string();
        assert!(error.contains("sda") && error.contains("5a5a"), "{error}");
    }

    #[test]
    fn what_stays_on_its_host_is_found() {
        let blockers = |devices: &str| {
            let xml = format!("<domain><devices>{devices}</devices></domain>");
            find(&xml).expect("XML").blockers
        };
        let virtiofs =
            "<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/></filesystem>";
        for (devices, words) in [
            (virtiofs, "a directory shared with the host (mount"),
            (
                "<filesystem type='mount'/>",
                "a directory shared with the host",
            ),
            (
                "<hostdev mode='subsystem' type='pci'/>",
                "a device of the host (pci)",
            ),
            (
                "<hostdev mode='subsystem' type='usb'><x/></hostdev>",
                "(usb)",
            ),
            ("<interface type='hostdev'><x/></interface>", "(hostdev)"),
        ] {
            let found = blockers(devices);
            assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
        }
        assert_eq!(
            blockers(&format!("{virtiofs}<hostdev type='mdev'/>")).len(),
            2
        );
        // By name alone they are none.
        let named = "<disk><serial>hostdev</serial></disk><interface type='ethernet'><hostdev/></interface>";
        assert!(blockers(named).is_empty());
        assert!(find(SOURCE).expect("XML").blockers.is_empty());
        assert!(find("<domain><devices></domain>").is_err());
    }

    proptest::proptest! {
        /// A peer's XML, changed anywhere: it is read and rewritten, or refused.
        #[test]
        fn fuzz_migration_xml(
            changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), "[<>/&;\"'a-z =!\\-\\[\\]?]{0,6}"), 0..6),
            cut in proptest::option::of(proptest::prelude::any::<proptest::sample::Index>()),
        ) {
            let mut xml: Vec<char> = SOURCE.chars().collect();
            for (at, text) in changes {
                let at = at.index(xml.len());
                let end = (at + text.chars().count()).min(xml.len());
                xml.splice(at..end, text.chars());
            }
            if let Some(cut) = cut {
                xml.truncate(cut.index(xml.len()));
            }
            let xml: String = xml.into_iter().collect();
            let _ = find(&xml);
            let images = BTreeMap::new();
            let _ = rewrite(&xml, Places {
                offer: &super::super::offer::tests_offer(),
                images: &images,
                pod_disk_serial: "pod",
                record: "<x/>",
            });
            for name in ["offer", "record"] {
                let _ = super::super::offer::read::<Offer>(name, &xml);
            }
        }
    }
}
