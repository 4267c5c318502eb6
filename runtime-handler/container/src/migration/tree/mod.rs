//! A directory's files, as they travel: scanned and sent here, made again there.
//!
//! It goes twice: once while the pod runs, and then, when it is frozen, what changed
//! since. What changed is told by inode, change time and size.
//!
//! Neither end believes a path: the container changes the tree while it is read, and a peer
//! says what is to be made. Each is resolved below the tree's root by the kernel, without
//! following any link ([`dyad_linux::open_below`]).

mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, PathBuf};

use dyad_runtime_handler::error::Result;
use serde::{Deserialize, Serialize};

use super::wire::broken;

pub(crate) use receive::Receiver;
pub(crate) use send::{Sent, devices, scan, send, size};

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Below the tree's root, [`escape`]d; `.`: the root itself.
    pub path: String,
    pub kind: Kind,
    /// Permissions, with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Values escaped as paths are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Dir,
    File {
        size: u64,
    },
    Symlink {
        target: String,
    },
    /// Another name of a file that came before.
    Hard {
        to: String,
    },
    Fifo,
    Socket,
    /// Overlay's mark that a lower layer's file is gone (a character device 0:0).
    Whiteout,
}

/// Text of any bytes: what is not UTF-8, and `%`, as `%XX`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '%' | '\0' => text.push_str(&format!("%{:02x}", c as u32)),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("%{byte:02x}"));
        }
    }
    text
}

fn unescape(text: &str) -> Result<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let byte = after
            .get(..2)
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .ok_or_else(|| broken(format!("{text:?} is badly escaped")))?;
        bytes.push(byte);
        rest = &after[2..];
    }
    Ok(OsString::from_vec(bytes))
}

/// A path below a root, as a peer names it.
fn below(text: &str) -> Result<PathBuf> {
    let path = PathBuf::from(unescape(text)?);
    let bytes = path.as_os_str().as_bytes();
    let plain = path
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if bytes.is_empty() || bytes.len() > 4095 || bytes.contains(&0) || !plain {
        return Err(broken(format!("{text:?} is no path below a directory")));
    }
    Ok(path)
}
