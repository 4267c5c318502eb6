//! What the kernel's command line tells the agent. Pure.

use log::LevelFilter;

/// How the host reaches us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Channel {
    /// The virtio-serial port.
    #[default]
    Port,
    /// vsock; we listen.
    Vsock,
}

/// Our part of `/proc/cmdline`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cmdline {
    /// `dyad.log=off|error|warn|info|debug|trace`.
    pub log: LevelFilter,
    /// `dyad.channel=virtio-serial|vsock`.
    pub channel: Channel,
}

impl Cmdline {
    /// Reads the parameters named `dyad.*`; the last of a name counts. A value we do
    /// not know is left at its default: a machine that boots can still be asked why.
    pub fn parse(text: &str) -> Self {
        let value = |name: &str| {
            text.split_ascii_whitespace()
                .filter_map(|word| word.split_once('='))
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next_back()
        };
        Self {
            log: value("dyad.log")
                .and_then(|level| level.parse().ok())
                .unwrap_or(LevelFilter::Info),
            channel: match value("dyad.channel") {
                Some("vsock") => Channel::Vsock,
                _ => Channel::Port,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_hold_without_parameters() {
        let expected = Cmdline {
            log: LevelFilter::Info,
            channel: Channel::Port,
        };
        assert_eq!(Cmdline::parse("console=ttyS0 quiet"), expected);
        assert_eq!(Cmdline::parse(""), expected);
        assert_eq!(
            Cmdline::parse("dyad.log=loud dyad.channel=pigeon dyad"),
            expected
        );
    }

    #[test]
    fn the_last_value_counts() {
        let parsed = Cmdline::parse("dyad.log=error quiet dyad.channel=vsock dyad.log=debug\n");
        assert_eq!(parsed.log, LevelFilter::Debug);
        assert_eq!(parsed.channel, Channel::Vsock);
    }
}
