//! What libvirt tells of a domain, as one closed list. Pure.
//!
//! ```text
//! lifecycle event (event, detail) --+
//! reboot event ---------------------+--> Change --> what the machine does about it
//! state read after a reconnect -----+
//! ```
//!
//! Numbers are libvirt's (`virDomainEventType` and its details, `virDomainState` and its
//! reasons); they are ABI and do not change.

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off.
    CleanShutdown,
    /// Somebody destroyed it.
    Destroyed,
    /// Its OS panicked, or QEMU died.
    Crashed,
    /// It runs on another host now.
    Migrated,
    /// It was saved to a file.
    Saved,
}

impl Ending {
    /// The exit status that the pod's processes get.
    pub fn status(self) -> u32 {
        match self {
            Self::CleanShutdown | Self::Migrated => 0,
            Self::Destroyed | Self::Saved => 137,
            Self::Crashed => 255,
        }
    }
}

/// A change of the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was powered on.
    Started,
    /// It was made ready to take in a migration; its vCPUs stand still.
    Arriving,
    /// The vCPUs stopped.
    Suspended,
    /// The vCPUs run.
    Resumed,
    /// The guest rebooted or was reset.
    Rebooted,
    /// The guest's OS panicked; [`Change::Stopped`] follows.
    Panicked,
    /// It is off.
    Stopped(Ending),
    /// Its definition is gone.
    Undefined,
}

/// A lifecycle event's meaning; `None`: of no interest.
pub fn lifecycle(event: i32, detail: i32) -> Option<Change> {
    match (event, detail) {
        (1, _) => Some(Change::Undefined),
        (2, 1) => Some(Change::Arriving),
        (2, _) => Some(Change::Started),
        // Asked for (0), I/O error (2), watchdog (3), API error (6). Stops that belong to a
        // migration, a restore or a snapshot are no pause.
        (3, 0 | 2 | 3 | 6) => Some(Change::Suspended),
        (4, _) => Some(Change::Resumed),
        (5, detail) => Some(Change::Stopped(stopped_event(detail))),
        (8, _) => Some(Change::Panicked),
        _ => None,
    }
}

/// `virDomainEventStoppedDetailType`.
fn stopped_event(detail: i32) -> Ending {
    match detail {
        0 => Ending::CleanShutdown,
        1 => Ending::Destroyed,
        3 => Ending::Migrated,
        4 => Ending::Saved,
        _ => Ending::Crashed,
    }
}

/// The domain's state, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// It runs.
    Running,
    /// vCPUs are stopped.
    Paused,
    /// Off.
    Off(Ending),
    /// Not defined at all.
    Absent,
}

/// `virDomainGetState`'s answer.
pub fn observed(state: u32, reason: i32) -> Observed {
    match state {
        // blocked and shutting down still execute.
        1 | 2 | 4 => Observed::Running,
        3 | 7 => Observed::Paused,
        6 => Observed::Off(Ending::Crashed),
        5 => Observed::Off(match reason {
            1 => Ending::CleanShutdown,
            2 => Ending::Destroyed,
            4 => Ending::Migrated,
            5 => Ending::Saved,
            _ => Ending::Crashed,
        }),
        _ => Observed::Running,
    }
}

/// What must have happened while nobody listened, from the last known state to the one
/// read now.
pub fn missed(last: Observed, now: Observed) -> Option<Change> {
    match (last, now) {
        (Observed::Running, Observed::Paused) => Some(Change::Suspended),
        (Observed::Paused, Observed::Running) => Some(Change::Resumed),
        (Observed::Running | Observed::Paused, Observed::Off(ending)) => {
            Some(Change::Stopped(ending))
        }
        (Observed::Running | Observed::Paused, Observed::Absent) => {
            Some(Change::Stopped(Ending::Destroyed))
        }
        (Observed::Off(_), Observed::Running | Observed::Paused) => Some(Change::Started),
        _ => None,
    }
}

/// The state after a change.
pub fn after(last: Observed, change: Change) -> Observed {
    match change {
        Change::Started | Change::Resumed | Change::Rebooted => Observed::Running,
        Change::Suspended | Change::Arriving => Observed::Paused,
        Change::Panicked => last,
        Change::Stopped(ending) => Observed::Off(ending),
        Change::Undefined => match last {
            Observed::Off(_) => Observed::Absent,
            other => other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_give_the_exit_status_of_the_pod() {
        assert_eq!(Ending::CleanShutdown.status(), 0);
        assert_eq!(Ending::Destroyed.status(), 137);
        assert_eq!(Ending::Crashed.status(), 255);
    }

    #[test]
    fn lifecycle_events_have_one_meaning_each() {
        let table = [
            (0, 0, None),
            (1, 0, Some(Change::Undefined)),
            (2, 0, Some(Change::Started)),
            (2, 1, Some(Change::Arriving)),
            (3, 0, Some(Change::Suspended)),
            (3, 1, None),
            (4, 0, Some(Change::Resumed)),
            (5, 0, Some(Change::Stopped(Ending::CleanShutdown))),
            (5, 1, Some(Change::Stopped(Ending::Destroyed))),
            (5, 2, Some(Change::Stopped(Ending::Crashed))),
            (5, 3, Some(Change::Stopped(Ending::Migrated))),
            (5, 5, Some(Change::Stopped(Ending::Crashed))),
            (6, 0, None),
            (8, 0, Some(Change::Panicked)),
        ];
        for (event, detail, change) in table {
            assert_eq!(lifecycle(event, detail), change, "event {event}/{detail}");
        }
    }

    #[test]
    fn what_happened_while_libvirtd_was_away_is_found_out() {
        let off = Observed::Off(Ending::CleanShutdown);
        assert_eq!(missed(Observed::Running, Observed::Running), None);
        assert_eq!(
            missed(Observed::Running, off),
            Some(Change::Stopped(Ending::CleanShutdown))
        );
        assert_eq!(
            missed(Observed::Paused, Observed::Absent),
            Some(Change::Stopped(Ending::Destroyed))
        );
        assert_eq!(
            missed(Observed::Running, Observed::Paused),
            Some(Change::Suspended)
        );
        assert_eq!(missed(off, Observed::Absent), None);
    }

    #[test]
    fn states_read_from_libvirt_are_understood() {
        assert_eq!(observed(1, 1), Observed::Running);
        assert_eq!(observed(3, 1), Observed::Paused);
        assert_eq!(observed(5, 1), Observed::Off(Ending::CleanShutdown));
        assert_eq!(observed(5, 2), Observed::Off(Ending::Destroyed));
        assert_eq!(observed(5, 3), Observed::Off(Ending::Crashed));
        assert_eq!(observed(6, 0), Observed::Off(Ending::Crashed));
    }
}
