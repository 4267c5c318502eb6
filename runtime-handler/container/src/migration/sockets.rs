//! The sockets that a process's network namespace tells of.

use std::net::IpAddr;

/// A connection or bound socket of `/proc/PID/net/{tcp,tcp6,udp,udp6}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Socket {
    pub local: IpAddr,
    pub local_port: u16,
    pub remote: IpAddr,
    pub remote_port: u16,
    /// Data may be under way.
    pub connected: bool,
}

/// Reads one of those files.
pub(crate) fn sockets(text: &str, tcp: bool) -> Vec<Socket> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, local_port) = address(words.next()?)?;
            let (remote, remote_port) = address(words.next()?)?;
            let state = u8::from_str_radix(words.next()?, 16).ok()?;
            // TCP_TIME_WAIT (6) belongs to no process; TCP_CLOSE is 7, TCP_LISTEN 10.
            (!tcp || state != 6).then_some(Socket {
                local,
                local_port,
                remote,
                remote_port,
                connected: tcp && !matches!(state, 7 | 10),
            })
        })
        .collect()
}

/// `0100007F:1F90`: words of four bytes, as this machine has them in memory.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..ip.len()).step_by(8) {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_from_proc() {
        let text = "  sl  local_address rem_address   st tx_queue
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000
   1: 0700000A:1F90 0900000A:D431 01 00000000:00000000
   2: 0700000A:1F91 0900000A:D431 06 00000000:00000000
   x: nonsense
   3: 0700000A";
        let found = sockets(text, true);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(
            (found[0].local, found[0].connected),
            ([127, 0, 0, 1].into(), false)
        );
        assert_eq!(
            (found[1].local, found[1].remote_port),
            ([10, 0, 0, 7].into(), 0xd431)
        );
        assert!(found[1].connected);
        let v6 = "h\n 0: 0000000000000000FFFF00000700000A:0050 00000000000000000000000000000000:0000 07 0";
        assert_eq!(sockets(v6, false)[0].local, IpAddr::from([10, 0, 0, 7]));
    }
}
