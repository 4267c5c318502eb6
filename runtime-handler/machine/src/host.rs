//! What the host's libvirt says of itself: QEMU's user, its binary, its accelerators.

use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use quick_xml::events::Event;
use quick_xml::reader::Reader;
use uuid::Uuid;

use crate::libvirt::Libvirt;
use crate::storage::apply::QemuUser;

/// The part of libvirt's capabilities that we use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// The user that QEMU runs as, where libvirt is privileged.
    pub qemu_user: Option<QemuUser>,
    /// QEMU for x86-64 guests.
    pub emulator: PathBuf,
    /// libvirt sees KVM. It may still not run a guest.
    pub kvm: bool,
}

/// Asks libvirt.
///
/// # Errors
/// libvirt cannot be reached, or has no QEMU for x86-64.
pub async fn capabilities(libvirt: &Libvirt) -> Result<Capabilities> {
    parse(&libvirt.capabilities().await?)
}

/// Reads libvirt's capabilities XML.
///
/// # Errors
/// It is not XML, or names no QEMU for x86-64.
pub fn parse(xml: &str) -> Result<Capabilities> {
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = Vec::new();
    let mut secmodel = String::new();
    let mut arch = String::new();
    let mut label_of_qemu = false;
    let mut qemu_user = None;
    let mut emulator = None;
    let mut kvm = false;
    loop {
        let event = reader
            .read_event()
            .context(|| "read libvirt's capabilities".into())?;
        match &event {
            Event::Start(tag) | Event::Empty(tag) => {
                let name = tag.name().as_ref().to_owned();
                let attribute = |wanted: &str| {
                    tag.attributes().flatten().find_map(|attribute| {
                        (attribute.key.as_ref() == wanted)
                            .then(|| attribute.value.clone().into_owned())
                    })
                };
                match name.as_str() {
                    "arch" if path.last().is_some_and(|p| p == "guest") => {
                        arch = attribute("name").unwrap_or_default();
                    }
                    "baselabel" => label_of_qemu = attribute("type").as_deref() != Some("none"),
                    "domain" if arch == "x86_64" && attribute("type").as_deref() == Some("kvm") => {
                        kvm = true;
                    }
                    _ => {}
                }
                if matches!(event, Event::Start(_)) {
                    path.push(name);
                }
            }
            Event::Text(text) => {
                let text = text.trim().to_owned();
                match path.last().map(String::as_str) {
                    Some("model") if path.iter().any(|p| p == "secmodel") => secmodel = text,
                    Some("baselabel") if secmodel == "dac" && label_of_qemu => {
                        qemu_user = qemu_user.or_else(|| parse_dac(&text));
                    }
                    Some("emulator") if arch == "x86_64" && emulator.is_none() => {
                        emulator = Some(PathBuf::from(text));
                    }
                    _ => {}
                }
            }
            Event::End(_) => {
                path.pop();
            }
            Event::Eof => break,
            _ => {}
        }
    }
    let emulator = emulator.ok_or_else(|| {
        Error::FailedPrecondition(
            "libvirt knows no QEMU for x86_64 guests; install qemu-system-x86".into(),
        )
    })?;
    Ok(Capabilities {
        qemu_user,
        emulator,
        kvm,
    })
}

/// `+64055:+64055`.
fn parse_dac(label: &str) -> Option<QemuUser> {
    let (uid, gid) = label.split_once(':')?;
    Some(QemuUser {
        uid: uid.trim_start_matches('+').parse().ok()?,
        gid: gid.trim_start_matches('+').parse().ok()?,
    })
}

/// Where libvirt keeps the AppArmor profile of each domain.
const PROFILES: &str = "/etc/apparmor.d/libvirt";

/// Removes the AppArmor profile of a domain that is gone: libvirt unloads it, and leaves its file
/// for the domain's next life, which a pod's machine does not have.
///
/// # Errors
/// It is there and cannot be removed.
pub fn remove_profile(uuid: Uuid) -> Result<()> {
    remove_profile_in(Path::new(PROFILES), uuid)
}

fn remove_profile_in(dir: &Path, uuid: Uuid) -> Result<()> {
    for name in [format!("libvirt-{uuid}"), format!("libvirt-{uuid}.files")] {
        let file = dir.join(name);
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(|| format!("remove {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<capabilities><host><cpu><arch>x86_64</arch><model>Snow</model></cpu>
        <secmodel><model>none</model><doi>0</doi></secmodel>
        <secmodel><model>dac</model><doi>0</doi>
          <baselabel type='kvm'>+64055:+106</baselabel>
          <baselabel type='qemu'>+64055:+106</baselabel></secmodel></host>
      <guest><os_type>hvm</os_type><arch name='i686'><wordsize>32</wordsize>
        <emulator>/usr/bin/qemu-system-i386</emulator><domain type='kvm'/></arch></guest>
      <guest><os_type>hvm</os_type><arch name='x86_64'><wordsize>64</wordsize>
        <emulator>/usr/bin/qemu-system-x86_64</emulator>
        <domain type='qemu'/></arch></guest></capabilities>";

    #[test]
    fn user_emulator_and_accelerator_are_found() {
        let found = parse(XML).expect("capabilities");
        assert_eq!(
            found.qemu_user,
            Some(QemuUser {
                uid: 64055,
                gid: 106
            })
        );
        assert_eq!(found.emulator, PathBuf::from("/usr/bin/qemu-system-x86_64"));
        assert!(!found.kvm);
        let kvm = XML.replace(
            "<domain type='qemu'/>",
            "<domain type='qemu'/><domain type='kvm'/>",
        );
        assert!(parse(&kvm).expect("capabilities").kvm);
    }

    #[test]
    fn a_host_without_qemu_is_told_what_to_install() {
        let error = parse("<capabilities><host/></capabilities>").expect_err("refused");
        assert!(error.to_string().contains("qemu-system-x86"));
        assert!(parse("<capabilities><host></capabilities>").is_err());
    }

    #[test]
    fn a_profile_goes_with_its_machine_and_no_other_does() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, others) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let file = |uuid: Uuid, end: &str| dir.path().join(format!("libvirt-{uuid}{end}"));
        let kept = [dir.path().join("TEMPLATE.qemu"), file(others, "")];
        for path in kept.iter().chain([&file(ours, ""), &file(ours, ".files")]) {
            std::fs::write(path, "").unwrap();
        }
        remove_profile_in(dir.path(), ours).unwrap();
        assert!(!file(ours, "").exists() && !file(ours, ".files").exists());
        assert!(kept.iter().all(|path| path.exists()));
        remove_profile_in(&dir.path().join("no-apparmor-here"), ours).unwrap();
    }
}
