//! Whether a machine's folder is anybody's. Pure; [`super`] looks and acts.
//!
//! | a live shim has its lock | `delete` was asked and failed | its bundle | made before the host's boot | verdict |
//! |---|---|---|---|---|
//! | yes | any | any | any | keep: the shim answers for it |
//! | no | yes | any | any | remove: nobody asks again |
//! | no | no | there | any | keep: containerd will ask for its `delete` |
//! | no | no | gone | any | remove |
//! | no | no | not known | yes | remove: whoever made it died with the host |
//! | no | no | not known | no | keep: an older release's, or one in the making |

/// What can be seen of a machine's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traces {
    /// A live process holds its owner's lock.
    pub is_owned: bool,
    /// `delete` was asked for it, and did not get through.
    pub is_abandoned: bool,
    /// containerd's bundle of its sandbox.
    pub bundle: Bundle,
    /// Nothing in it is younger than the host's boot.
    pub is_older_than_boot: bool,
}

/// containerd's bundle of a machine's sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bundle {
    /// containerd still has it.
    There,
    /// It is gone.
    Gone,
    /// The record names none, or cannot be read.
    NotKnown,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is somebody's.
    Keep,
    /// It is nobody's.
    Remove,
}

/// See the table above.
pub fn verdict(traces: Traces) -> Verdict {
    match traces {
        Traces { is_owned: true, .. } => Verdict::Keep,
        Traces {
            is_abandoned: true, ..
        } => Verdict::Remove,
        Traces {
            bundle: Bundle::There,
            ..
        } => Verdict::Keep,
        Traces {
            bundle: Bundle::Gone,
            ..
        } => Verdict::Remove,
        Traces {
            bundle: Bundle::NotKnown,
            is_older_than_boot,
            ..
        } => match is_older_than_boot {
            true => Verdict::Remove,
            false => Verdict::Keep,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every() -> impl Iterator<Item = Traces> {
        let bundles = [Bundle::There, Bundle::Gone, Bundle::NotKnown];
        (0..8).flat_map(move |bits: u8| {
            bundles.map(|bundle| Traces {
                is_owned: bits & 1 != 0,
                is_abandoned: bits & 2 != 0,
                is_older_than_boot: bits & 4 != 0,
                bundle,
            })
        })
    }

    #[test]
    fn what_a_live_shim_owns_is_never_removed() {
        for traces in every().filter(|traces| traces.is_owned) {
            assert_eq!(verdict(traces), Verdict::Keep, "{traces:?}");
        }
    }

    #[test]
    fn what_containerd_will_delete_is_left_to_it() {
        for traces in every().filter(|t| t.bundle == Bundle::There && !t.is_abandoned) {
            assert_eq!(verdict(traces), Verdict::Keep, "{traces:?}");
        }
    }

    #[test]
    fn after_a_power_cut_everything_goes() {
        // The runtime's folder is in memory: no bundle is left, and no process.
        for traces in
            every().filter(|t| !t.is_owned && t.is_older_than_boot && t.bundle != Bundle::There)
        {
            assert_eq!(verdict(traces), Verdict::Remove, "{traces:?}");
        }
    }

    #[test]
    fn one_in_the_making_is_kept() {
        let made_now = Traces {
            is_owned: false,
            is_abandoned: false,
            bundle: Bundle::NotKnown,
            is_older_than_boot: false,
        };
        assert_eq!(verdict(made_now), Verdict::Keep);
    }

    #[test]
    fn a_failed_delete_is_finished_though_its_bundle_stays() {
        let traces = Traces {
            is_owned: false,
            is_abandoned: true,
            bundle: Bundle::There,
            is_older_than_boot: false,
        };
        assert_eq!(verdict(traces), Verdict::Remove);
    }
}
