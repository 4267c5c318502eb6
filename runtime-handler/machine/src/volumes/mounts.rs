//! What lies behind a mount that others made on the host, by `/proc/self/mountinfo`.

use std::path::{Path, PathBuf};

use dyad_runtime_handler::error::{Context, Result};
use dyad_runtime_handler::spec::RootMount;

/// One line of mountinfo (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// `major:minor`.
    device: String,
    /// What of the file system is mounted.
    root: PathBuf,
    target: PathBuf,
    fstype: String,
    source: String,
    /// Of the file system, not of the mount.
    options: Vec<String>,
}

/// All mounts of this process, the latest last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounts(Vec<Entry>);

impl Mounts {
    /// Those of now.
    ///
    /// # Errors
    /// /proc is not there.
    pub fn read() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/self/mountinfo")
            .context(|| "read /proc/self/mountinfo".into())?;
        Ok(Self::parse(&text))
    }

    /// Lines that are not understood are left out.
    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(entry).collect())
    }

    fn at(&self, target: &Path) -> Option<&Entry> {
        self.0.iter().rev().find(|entry| entry.target == target)
    }

    /// The file system that is mounted on `target`, as a snapshotter would describe it.
    pub fn mounted(&self, target: &Path) -> Option<RootMount> {
        let entry = self.at(target)?;
        Some(RootMount {
            fstype: entry.fstype.clone(),
            source: entry.source.clone(),
            options: entry.options.clone(),
        })
    }

    /// The way below `volume` that is mounted on `target`.
    pub fn way_below(&self, volume: &Path, target: &Path) -> Option<PathBuf> {
        let mounted = self.at(target)?;
        let holds = volume.ancestors().find_map(|above| self.at(above))?;
        let inside = volume.strip_prefix(&holds.target).ok()?;
        let volume_root = match inside.as_os_str().is_empty() {
            true => holds.root.clone(),
            false => holds.root.join(inside),
        };
        let way = mounted.root.strip_prefix(volume_root).ok()?;
        (mounted.device == holds.device).then(|| way.to_owned())
    }
}

fn entry(line: &str) -> Option<Entry> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(2);
    let (device, root, target) = (mount.next()?, mount.next()?, mount.next()?);
    let mut filesystem = filesystem.split(' ');
    let (fstype, source, options) = (filesystem.next()?, filesystem.next()?, filesystem.next()?);
    Some(Entry {
        device: device.to_owned(),
        root: unescaped(root).into(),
        target: unescaped(target).into(),
        fstype: fstype.to_owned(),
        source: unescaped(source),
        options: options.split(',').map(unescaped).collect(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        30 21 0:40 / /k/pods/u/volumes/kubernetes.io~empty-dir/mem rw - tmpfs tmpfs rw,size=64k\n\
        31 21 8:1 /k/pods/u/volumes/kubernetes.io~empty-dir/disk/a\\040b /k/pods/u/volume-subpaths/disk/app/0 rw shared:1 - ext4 /dev/sda1 rw\n\
        32 21 0:40 /deep/er /k/pods/u/volume-subpaths/mem/app/0 rw - tmpfs tmpfs rw,size=64k\n\
        33 21 8:1 /etc /k/pods/u/volume-subpaths/disk/app/1 rw - ext4 /dev/sda1 rw\n\
        34 21 0:50 / /s/image-volumes/s1/d rw - overlay overlay rw,lowerdir=/l/2/fs:/l/1/fs,upperdir=/l/9/fs\n\
        damaged\n";

    #[test]
    fn a_sub_path_leads_back_into_its_volume() {
        let mounts = Mounts::parse(TEXT);
        let below = |volume: &str, index: u32| {
            let volumes = Path::new("/k/pods/u/volumes/kubernetes.io~empty-dir");
            let target = format!("/k/pods/u/volume-subpaths/{volume}/app/{index}");
            mounts.way_below(&volumes.join(volume), Path::new(&target))
        };
        assert_eq!(below("disk", 0), Some("a b".into()));
        assert_eq!(below("mem", 0), Some("deep/er".into()));
        assert_eq!(below("disk", 1), None, "elsewhere on the same disk");
        assert_eq!(below("disk", 2), None, "no mount");
    }

    #[test]
    fn an_image_that_containerd_mounted_has_its_layers() {
        let mounts = Mounts::parse(TEXT);
        let mounted = mounts
            .mounted(Path::new("/s/image-volumes/s1/d"))
            .expect("mount");
        assert_eq!(mounted.fstype, "overlay");
        assert!(mounted.options.contains(&"lowerdir=/l/2/fs:/l/1/fs".into()));
        assert_eq!(mounts.mounted(Path::new("/s/image-volumes/s1/e")), None);
    }

    #[test]
    fn odd_escapes_stay_as_they_are() {
        assert_eq!(unescaped("a\\134b\\9\\"), "a\\b\\9\\");
    }
}
