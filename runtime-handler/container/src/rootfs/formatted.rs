//! Mounts that are to be assembled: containerd's "formatted" mounts (docs/mounts.md), as its
//! EROFS snapshotter hands them over. Pure.
//!
//! ```text
//! ext4  scratch.ext4  rw,loop      mounted in folder 0
//! erofs layer.erofs   ro,loop      mounted in folder 1
//! format/mkdir/overlay overlay  lowerdir={{ mount 1 }},upperdir={{ mount 0 }}/upper,
//!                               X-containerd.mkdir.path={{ mount 0 }}/upper:0755
//!                                  mounted as the root
//! ```

use std::path::{Path, PathBuf};

use dyad_runtime_handler::error::{Error, Result};
use dyad_runtime_handler::spec::RootMount;

/// Before a type: options name other mounts; directories are to be made.
const FORMAT: &str = "format/";
const MKDIR: &str = "mkdir/";
/// `PATH[:MODE[:UID:GID]]`.
const MKDIR_OPTION: &str = "X-containerd.mkdir.path=";
/// As containerd's.
const MKDIR_MODE: u32 = 0o700;

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Assembly {
    /// Mounted first, each in the folder of its number.
    pub parts: Vec<RootMount>,
    /// Made then, below those.
    pub directories: Vec<Directory>,
    /// Mounted on the root at last, one on the other.
    pub root: Vec<RootMount>,
}

/// A directory to be made, unless it is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Directory {
    pub path: PathBuf,
    pub mode: u32,
    pub owner: Option<(u32, u32)>,
}

/// How `mounts` come together, with their parts in folders of `parts`; `None`: there is
/// nothing to assemble.
///
/// # Errors
/// `InvalidArgument` naming the option that cannot be understood.
pub(super) fn assembly(mounts: &[RootMount], parts: &Path) -> Result<Option<Assembly>> {
    let formatted =
        |mount: &RootMount| mount.fstype.starts_with(FORMAT) || mount.fstype.starts_with(MKDIR);
    let Some(first) = mounts.iter().position(formatted) else {
        return Ok(None);
    };
    let (before, rest) = mounts.split_at(first);
    let mut directories = Vec::new();
    let mut root = Vec::new();
    for mount in rest {
        let mut mount = mount.clone();
        if let Some(fstype) = mount.fstype.strip_prefix(FORMAT) {
            mount.fstype = fstype.to_owned();
            mount.source = fill(&mount.source, before, parts)?;
            mount.options = mount
                .options
                .iter()
                .map(|option| fill(option, before, parts))
                .collect::<Result<_>>()?;
        }
        if let Some(fstype) = mount.fstype.strip_prefix(MKDIR) {
            mount.fstype = fstype.to_owned();
            let (wanted, options): (Vec<_>, Vec<_>) = mount
                .options
                .into_iter()
                .partition(|option| option.starts_with(MKDIR_OPTION));
            mount.options = options;
            for option in wanted {
                directories.push(directory(&option, parts)?);
            }
        }
        root.push(mount);
    }
    Ok(Some(Assembly {
        parts: before.to_vec(),
        directories,
        root,
    }))
}

/// The folder in which part `number` is mounted.
pub(super) fn folder(parts: &Path, number: usize) -> PathBuf {
    parts.join(number.to_string())
}

/// Replaces `{{ mount N }}`, `{{ source N }}` and `{{ overlay FIRST LAST }}`.
fn fill(text: &str, before: &[RootMount], parts: &Path) -> Result<String> {
    let refuse = |why: &str| {
        Error::InvalidArgument(format!(
            "rootfs mount option {text:?}: {why}; known are {{{{ mount N }}}}, {{{{ source N }}}} and {{{{ overlay FIRST LAST }}}} of the {} mounts before it",
            before.len()
        ))
    };
    let number = |word: &str| match word.parse::<usize>() {
        Ok(number) if number < before.len() => Ok(number),
        _ => Err(refuse(&format!("{word:?} is none of them"))),
    };
    let mount = |number: usize| folder(parts, number).display().to_string();
    let mut filled = String::new();
    let mut left = text;
    while let Some((plain, rest)) = left.split_once("{{") {
        let (inside, rest) = rest
            .split_once("}}")
            .ok_or_else(|| refuse("a {{ without its }}"))?;
        filled.push_str(plain);
        match inside.split_whitespace().collect::<Vec<_>>()[..] {
            ["mount", at] => filled.push_str(&mount(number(at)?)),
            ["source", at] => filled.push_str(&before[number(at)?].source),
            // Either way round, as the lower ones come first or last.
            ["overlay", from, to] => {
                let (from, to) = (number(from)?, number(to)?);
                let all: Vec<_> = match from <= to {
                    true => (from..=to).map(mount).collect(),
                    false => (to..=from).rev().map(mount).collect(),
                };
                filled.push_str(&all.join(":"));
            }
            _ => return Err(refuse("no such word")),
        }
        left = rest;
    }
    filled.push_str(left);
    Ok(filled)
}

fn directory(option: &str, parts: &Path) -> Result<Directory> {
    let refuse = |why: &str| {
        Error::InvalidArgument(format!(
            "rootfs mount option {option:?}: {why}; want {MKDIR_OPTION}PATH[:MODE[:UID:GID]], in one of the mounts before it"
        ))
    };
    let mut words = option
        .strip_prefix(MKDIR_OPTION)
        .unwrap_or_default()
        .split(':');
    let path = PathBuf::from(words.next().unwrap_or_default());
    let climbs = path
        .components()
        .any(|part| matches!(part, std::path::Component::ParentDir));
    if climbs || !path.starts_with(parts) {
        return Err(refuse("a directory elsewhere"));
    }
    let mode = match words.next() {
        None | Some("") => MKDIR_MODE,
        Some(mode) => u32::from_str_radix(mode, 8).map_err(|_| refuse("the mode is not octal"))?,
    };
    let id = |word: &str| word.parse().map_err(|_| refuse("an owner is a number"));
    let owner = match (words.next(), words.next(), words.next()) {
        (None, None, None) => None,
        (Some(uid), Some(gid), None) => Some((id(uid)?, id(gid)?)),
        _ => return Err(refuse("too few or too many parts")),
    };
    Ok(Directory { path, mode, owner })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fstype: &str, source: &str, options: &[&str]) -> RootMount {
        RootMount {
            fstype: fstype.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn overlay(options: &[&str]) -> Result<Option<Assembly>> {
        let mounts = [
            mount("ext4", "/i/scratch", &["rw", "loop"]),
            mount("erofs", "/i/a", &["ro", "loop"]),
            mount("erofs", "/i/b", &["ro", "loop"]),
            mount("format/mkdir/overlay", "overlay", options),
        ];
        assembly(&mounts, Path::new("/b/parts"))
    }

    #[test]
    fn an_overlay_of_images_is_put_together() {
        let made = overlay(&[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{mount 0}}/work:0711:5:6",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 2 1 }}",
        ])
        .unwrap()
        .unwrap();
        assert_eq!(made.parts.len(), 3);
        assert_eq!(
            made.directories,
            [
                Directory {
                    path: "/b/parts/0/upper".into(),
                    mode: 0o755,
                    owner: None
                },
                Directory {
                    path: "/b/parts/0/work".into(),
                    mode: 0o711,
                    owner: Some((5, 6))
                },
            ]
        );
        let options = [
            "upperdir=/b/parts/0/upper",
            "lowerdir=/b/parts/2:/b/parts/1",
        ];
        assert_eq!(made.root, [mount("overlay", "overlay", &options)]);
    }

    #[test]
    fn ordinary_mounts_need_no_assembly() {
        let mounts = [mount("overlay", "overlay", &["lowerdir=/a:/b"])];
        assert_eq!(assembly(&mounts, Path::new("/p")).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        for (option, says) in [
            ("lowerdir={{ mount 3 }}", "\"3\" is none of them"),
            ("lowerdir={{ mount", "without its }}"),
            ("lowerdir={{ target 1 }}", "no such word"),
            ("X-containerd.mkdir.path=/etc/x", "elsewhere"),
            ("X-containerd.mkdir.path={{ mount 0 }}/../../x", "elsewhere"),
            ("X-containerd.mkdir.path={{ mount 0 }}/x:9", "not octal"),
            ("X-containerd.mkdir.path={{ mount 0 }}/x:7:1", "too few"),
            ("X-containerd.mkdir.path={{ mount 0 }}/x:7:a:1", "a number"),
        ] {
            let error = overlay(&[option]).unwrap_err().to_string();
            assert!(error.contains(says), "{option}: {error}");
        }
    }
}
