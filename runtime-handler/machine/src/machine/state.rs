//! What a machine is: one value, changed in one place, by one pure function.
//!
//! ```text
//!  power                                          role
//!                PoweredOn                           send            Moves
//!   Off(ending) -----------> On(Booting)      Home ------> Leaving(Preparing) ----> Leaving(Moving)
//!     ^                        | Booted        ^  ^------------'  StaysHere             |      |
//!     |                        v               |  ^-------------------------------------'      |
//!     |        Rebooted   On(Ready|Failed)     |                     StaysHere                 |
//!     |      <----------->     |               | Arrived                            HasMoved   v
//!     +------------------------+            Arriving(Waiting -> Prepared -> Running)         Moved
//!               Ended                          | StopsWaiting, Failed
//!                                              v
//!                                             Home                any --Deleted--> Deleted
//! ```
//! Effects (`boot`, `power`, `leaving`, `arriving`) tell what happened as an [`Input`]; whoever
//! waits follows the published value. A second migration while one is under way, a boot of what is
//! off, an arrival of what runs: these are no values of the type, or inputs that change nothing.

use crate::events::{Change, Ending};

/// Power and role, and what tells one boot from the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Whether it is on.
    pub power: Power,
    /// Where it belongs.
    pub role: Role,
    /// How often its guest rebooted in the same QEMU.
    pub reboots: u64,
}

/// Whether the machine is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Power {
    /// Never was, or ended so.
    Off(Option<Ending>),
    /// vCPUs run, or are paused.
    On {
        /// QEMU.
        pid: u32,
        /// How far its guest is.
        boot: Boot,
        /// Its vCPUs are stopped.
        is_suspended: bool,
        /// The signal that we end it with.
        ended_by: Option<i32>,
    },
}

/// How far a guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// Not set up yet.
    Booting,
    /// The agent serves.
    Ready,
    /// It never came up.
    Failed(String),
}

/// Where the machine belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Here.
    Home,
    /// Here, once its source has sent it.
    Arriving(Arriving),
    /// It is being migrated away.
    Leaving(Leaving),
    /// On another node.
    Moved(Link),
    /// Nowhere any more.
    Deleted,
}

/// How far a migration's target is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arriving {
    /// Defined, off.
    Waiting,
    /// QEMU is there and takes in; nothing runs.
    Prepared,
    /// It runs.
    Running,
    /// The source gave up, or failed.
    Failed(String),
}

/// How far a migration's source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leaving {
    /// libvirt has it in hand: the machine's end here may be a step of the migration.
    pub is_moving: bool,
    /// The caller cancelled it.
    pub is_cancelled: bool,
    /// It has been told to run there before all of its memory was.
    pub post_copy: bool,
    /// Whose the link to the guest is.
    pub link: Link,
}

/// Whose the link to a guest that moves is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    /// Ours.
    #[default]
    Held,
    /// Nobody's: the target is being told how far each stream is.
    LetGo,
    /// The target's.
    HandedOver,
}

/// What happened to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// QEMU runs it.
    PoweredOn {
        /// QEMU.
        pid: u32,
    },
    /// The boot that began after that many reboots came to this.
    Booted {
        /// [`State::reboots`] when it began.
        reboots: u64,
        /// What it came to.
        boot: Boot,
    },
    /// Its guest begins anew in the same QEMU.
    Rebooted,
    /// Its vCPUs were stopped.
    Suspended,
    /// Its vCPUs run again.
    Resumed,
    /// We end it with this signal; the first one counts.
    EndAsked(i32),
    /// It is off.
    Ended(Ending),
    /// libvirt tells of a waiting target.
    Arrival(Change),
    /// It came, and runs here.
    Arrived {
        /// QEMU.
        pid: u32,
    },
    /// It waits for no source any more.
    StopsWaiting,
    /// A migration away is asked for.
    Leaves,
    /// libvirt takes it in hand.
    Moves,
    /// The caller cancels the migration.
    Cancelled,
    /// It is told to run there; `false`: that was refused.
    PostCopy(bool),
    /// The link to its guest is given up, or the target's.
    LinkIs(Link),
    /// The migration is over, and it runs here.
    StaysHere,
    /// The migration is over, and it runs there.
    HasMoved,
    /// All of it is removed.
    Deleted,
}

impl State {
    /// One that was never on; `waits`: for its migration source.
    pub fn new(waits: bool) -> Self {
        Self {
            power: Power::Off(None),
            role: match waits {
                true => Role::Arriving(Arriving::Waiting),
                false => Role::Home,
            },
            reboots: 0,
        }
    }

    /// What it becomes; `None`: the input changes nothing, or does not belong to this state.
    pub fn after(&self, input: Input) -> Option<Self> {
        let next = match input {
            Input::PoweredOn { pid } => match (&self.power, &self.role) {
                (Power::Off(_), Role::Home) => self.with_power(on(pid, Boot::Booting)),
                _ => return None,
            },
            Input::Booted { reboots, boot } if reboots == self.reboots => self.booted(boot)?,
            Input::Booted { .. } => return None,
            Input::Rebooted => Self {
                reboots: self.reboots + 1,
                ..self.booted(Boot::Booting)?.suspended(false)?
            },
            Input::Suspended => self.suspended(true)?,
            Input::Resumed => self.suspended(false)?,
            Input::EndAsked(signal) => self.end_asked(signal)?,
            Input::Ended(ending) => self.with_power(Power::Off(Some(ending))),
            Input::Arrival(change) => self.arrival(change)?,
            Input::Arrived { pid } => match &self.role {
                Role::Arriving(Arriving::Running) => Self {
                    role: Role::Home,
                    ..self.with_power(on(pid, Boot::Ready))
                },
                _ => return None,
            },
            Input::StopsWaiting => match &self.role {
                Role::Arriving(_) => self.with_role(Role::Home),
                _ => return None,
            },
            Input::Leaves => match &self.role {
                Role::Home => self.with_role(Role::Leaving(Leaving::default())),
                _ => return None,
            },
            Input::Moves => self.leaving(|leaving| {
                (!leaving.is_cancelled).then_some(Leaving {
                    is_moving: true,
                    ..leaving
                })
            })?,
            Input::Cancelled => self.leaving(|leaving| {
                Some(Leaving {
                    is_cancelled: true,
                    ..leaving
                })
            })?,
            Input::PostCopy(post_copy) => self.leaving(|leaving| {
                leaving.is_moving.then_some(Leaving {
                    post_copy,
                    ..leaving
                })
            })?,
            Input::LinkIs(link) => match &self.role {
                Role::Leaving(leaving) => {
                    self.with_role(Role::Leaving(Leaving { link, ..*leaving }))
                }
                Role::Moved(_) => self.with_role(Role::Moved(link)),
                _ => return None,
            },
            Input::StaysHere => self.leaving_role().map(|_| self.with_role(Role::Home))?,
            Input::HasMoved => Self {
                role: Role::Moved(self.leaving_role()?.link),
                ..self.with_power(Power::Off(Some(Ending::Migrated)))
            },
            Input::Deleted => self.with_role(Role::Deleted),
        };
        (next != *self).then_some(next)
    }

    /// QEMU's pid while it is on.
    pub fn pid(&self) -> Option<u32> {
        match self.power {
            Power::On { pid, .. } => Some(pid),
            Power::Off(_) => None,
        }
    }

    /// Whether it is powered off.
    pub fn is_off(&self) -> bool {
        matches!(self.power, Power::Off(_))
    }

    /// Whether its vCPUs are stopped.
    pub fn is_suspended(&self) -> bool {
        matches!(
            self.power,
            Power::On {
                is_suspended: true,
                ..
            }
        )
    }

    /// The signal that we end it with.
    pub fn ended_by(&self) -> Option<i32> {
        match self.power {
            Power::On { ended_by, .. } => ended_by,
            Power::Off(_) => None,
        }
    }

    /// Whether it waits for its source.
    pub fn is_waiting(&self) -> bool {
        matches!(self.role, Role::Arriving(_))
    }

    /// Whether its end here is the migration's to explain.
    pub fn leaves(&self) -> bool {
        match &self.role {
            Role::Leaving(leaving) => leaving.is_moving,
            role => matches!(role, Role::Moved(_)),
        }
    }

    /// Whether the link to its guest is, or is becoming, the target's.
    pub fn has_let_go(&self) -> bool {
        match &self.role {
            Role::Leaving(leaving) => leaving.link != Link::Held,
            role => matches!(role, Role::Moved(_)),
        }
    }

    /// Whether libvirt has a migration of it in hand.
    pub fn is_moving(&self) -> bool {
        self.leaving_role().is_some_and(|leaving| leaving.is_moving)
    }

    /// Whether it runs on another node.
    pub fn has_moved(&self) -> bool {
        matches!(self.role, Role::Moved(_))
    }

    /// Whether the target has been told how far each stream is.
    pub fn is_handed_over(&self) -> bool {
        match &self.role {
            Role::Leaving(leaving) => leaving.link == Link::HandedOver,
            Role::Moved(link) => *link == Link::HandedOver,
            _ => false,
        }
    }

    /// Whether it has been told to run on the target before all of its memory is there.
    pub fn is_in_post_copy(&self) -> bool {
        self.leaving_role().is_some_and(|leaving| leaving.post_copy)
    }

    /// How far a migration away is, where one is under way.
    pub fn leaving_role(&self) -> Option<Leaving> {
        match &self.role {
            Role::Leaving(leaving) => Some(*leaving),
            _ => None,
        }
    }

    fn with_power(&self, power: Power) -> Self {
        Self {
            power,
            role: self.role.clone(),
            reboots: self.reboots,
        }
    }

    fn with_role(&self, role: Role) -> Self {
        Self {
            role,
            power: self.power.clone(),
            reboots: self.reboots,
        }
    }

    fn booted(&self, to: Boot) -> Option<Self> {
        let mut power = self.power.clone();
        match &mut power {
            Power::On { boot, .. } => *boot = to,
            // It ended meanwhile; whoever waits is told why it did not come up.
            Power::Off(_) => return None,
        }
        Some(self.with_power(power))
    }

    fn suspended(&self, stopped: bool) -> Option<Self> {
        let mut power = self.power.clone();
        match &mut power {
            Power::On { is_suspended, .. } => *is_suspended = stopped,
            Power::Off(_) => return None,
        }
        Some(self.with_power(power))
    }

    fn end_asked(&self, signal: i32) -> Option<Self> {
        let mut power = self.power.clone();
        match &mut power {
            Power::On { ended_by, .. } => {
                ended_by.get_or_insert(signal);
            }
            Power::Off(_) => return None,
        }
        Some(self.with_power(power))
    }

    fn leaving(&self, change: impl FnOnce(Leaving) -> Option<Leaving>) -> Option<Self> {
        let changed = change(self.leaving_role()?)?;
        Some(self.with_role(Role::Leaving(changed)))
    }

    fn arrival(&self, change: Change) -> Option<Self> {
        let Role::Arriving(arriving) = &self.role else {
            return None;
        };
        let next = match (arriving, change) {
            (Arriving::Waiting, Change::Arriving | Change::Started) => Arriving::Prepared,
            (Arriving::Waiting | Arriving::Prepared, Change::Resumed) => Arriving::Running,
            (Arriving::Prepared | Arriving::Running, Change::Stopped(ending)) => {
                Arriving::Failed(match ending {
                    Ending::Crashed => "its source gave up, or QEMU failed".into(),
                    other => format!("{other:?}"),
                })
            }
            (_, Change::Undefined) => Arriving::Failed("its definition was removed".into()),
            _ => return None,
        };
        Some(self.with_role(Role::Arriving(next)))
    }
}

fn on(pid: u32, boot: Boot) -> Power {
    Power::On {
        pid,
        boot,
        is_suspended: false,
        ended_by: None,
    }
}

#[cfg(test)]
mod tests;
