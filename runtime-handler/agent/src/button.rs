//! The machine's power button: `virsh shutdown`, and the host's way to a guest whose link
//! does not answer.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dyad_runtime_handler::{Error, Result, error::Context};
use tokio::sync::mpsc;

use crate::guest::Agent;
use crate::power;

/// Nobody says with the button how long the processes may take: Kubernetes' own default.
const GRACE: Duration = Duration::from_secs(30);
/// The kernel's name for it (drivers/acpi/button.c).
const NAME: &str = "Power Button";

/// `struct input_event` on a 64-bit machine: a time, then type, code and value.
const EVENT_BYTES: usize = 24;
/// `EV_KEY`.
const KEY: u16 = 1;
/// `KEY_POWER`.
const POWER: u16 = 116;

/// Shuts the machine down when the button is pressed.
pub async fn obey(agent: Arc<Agent>, mut presses: mpsc::Receiver<()>) {
    if presses.recv().await.is_some() {
        log::info!("the power button is pressed");
        power::shut_down(agent, power::Kind::Off, GRACE).await;
    }
}

/// Tells `presses` of the first press from now on; its drivers are loaded. A press that came
/// before is lost, as the kernel clears it.
///
/// # Errors
/// There is no such button, or its device cannot be read.
pub fn listen(presses: mpsc::Sender<()>) -> Result<()> {
    let node = find(Path::new("/sys/class/input"))
        .ok_or_else(|| Error::NotFound(format!("no input device is a {NAME:?}")))?;
    let mut device = File::open(&node).context(|| format!("open {}", node.display()))?;
    // evdev blocks; this thread lives as long as the machine.
    std::thread::Builder::new()
        .name("power-button".into())
        .spawn(move || {
            let mut event = [0; EVENT_BYTES];
            while device.read_exact(&mut event).is_ok() {
                if is_press(&event) {
                    let _ = presses.blocking_send(());
                    return;
                }
            }
        })
        .map_err(|error| Error::other("watch the power button", error))?;
    Ok(())
}

/// The node of the button's event device.
fn find(class: &Path) -> Option<PathBuf> {
    let devices = fs::read_dir(class).ok()?;
    devices
        .filter_map(std::result::Result::ok)
        .find_map(|device| {
            let name = device.file_name().into_string().ok()?;
            let is_button = name.starts_with("event")
                && fs::read_to_string(device.path().join("device/name"))
                    .is_ok_and(|text| text.trim() == NAME);
            is_button.then(|| Path::new("/dev/input").join(name))
        })
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let number = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    (number(16), number(18), value) == (KEY, POWER, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> [u8; EVENT_BYTES] {
        let mut event = [0xff; EVENT_BYTES];
        event[16..18].copy_from_slice(&kind.to_ne_bytes());
        event[18..20].copy_from_slice(&code.to_ne_bytes());
        event[20..24].copy_from_slice(&value.to_ne_bytes());
        event
    }

    #[test]
    fn only_the_power_key_going_down_is_a_press() {
        assert!(is_press(&event(KEY, POWER, 1)));
        for other in [
            event(KEY, POWER, 0),
            event(KEY, 142, 1),
            event(0, 0, 0),
            event(4, POWER, 1),
        ] {
            assert!(!is_press(&other));
        }
    }

    #[test]
    fn the_button_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        for (device, name) in [
            ("event0", "AT keyboard"),
            ("event3", NAME),
            ("input3", NAME),
        ] {
            let folder = class.path().join(device).join("device");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("name"), format!("{name}\n")).unwrap();
        }
        assert_eq!(find(class.path()), Some("/dev/input/event3".into()));
        assert_eq!(find(Path::new("/nowhere")), None);
    }
}
