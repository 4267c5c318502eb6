//! What virtio-mem has plugged, as a running domain's definition tells it.

use quick_xml::events::Event;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
