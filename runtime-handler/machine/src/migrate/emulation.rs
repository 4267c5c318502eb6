//! What QEMU's software emulation cannot move, which KVM can; and which QEMU takes in what
//! another one ran. Pure.

use crate::domain::Accelerator;

/// The first that tells its emulated TLBs when it takes the marks off changed pages (QEMU's
/// commit 03bfc2188f). Before, stores are lost and the guest hangs or crashes over there.
const TELLS_ITS_TLBS: &str = "9.0.0";

/// Why this machine must stay here, with the way out.
pub fn blocker(accelerator: Accelerator, qemu: &str, plugged_mib: u64) -> Option<String> {
    if accelerator == Accelerator::Kvm {
        return None;
    }
    if version_key(qemu) < version_key(TELLS_ITS_TLBS) {
        return Some(format!(
            "software emulation of this node's QEMU {qemu} loses what a guest writes while it moves: \
             use KVM, or QEMU {TELLS_ITS_TLBS} or newer"
        ));
    }
    // Of memory beside the machine's first, it tells them wrong addresses, and aborts when
    // there is none of these (seen with 10.0.2).
    (plugged_mib != 0).then(|| {
        format!(
            "software emulation cannot move the {plugged_mib} MiB that were added to the machine while \
             it ran: use KVM, or take them away again"
        )
    })
}

/// Why a machine of this node's QEMU cannot go on in the target's.
pub fn older_qemu(here: &str, there: &str) -> Option<String> {
    (version_key(there) < version_key(here)).then(|| {
        format!(
            "the target's QEMU {there} is older than this node's {here}: a machine moves to the same or a \
             newer one"
        )
    })
}

/// A version by its numbers.
fn version_key(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map(|part| part.parse().unwrap_or_default())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(version_key("10.0.0") > version_key("9.2.1"));
        assert!(version_key("7.2.22") > version_key("7.2.9"));
    }

    #[test]
    fn a_machine_does_not_move_to_an_older_qemu() {
        assert_eq!(older_qemu("10.0.2", "10.0.2"), None);
        assert_eq!(older_qemu("9.2.0", "10.0.2"), None);
        let told = older_qemu("10.0.2", "9.2.0").expect("refused");
        assert!(told.contains("QEMU 9.2.0 is older than this node's 10.0.2"));
    }

    #[test]
    fn emulation_stays_where_it_would_lose_memory() {
        use Accelerator::{Kvm, Tcg};
        for (accelerator, qemu, plugged_mib, words) in [
            (Kvm, "7.2.22", 64, None),
            (Tcg, "10.0.2", 0, None),
            (Tcg, "9.0.0", 0, None),
            (Tcg, "8.2.9", 0, Some("QEMU 9.0.0 or newer")),
            (Tcg, "10.0.2", 64, Some("the 64 MiB that were added")),
        ] {
            let found = blocker(accelerator, qemu, plugged_mib);
            match words {
                None => assert_eq!(found, None),
                Some(words) => assert!(found.is_some_and(|text| text.contains(words))),
            }
        }
    }
}
