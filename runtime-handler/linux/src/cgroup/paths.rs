//! Where cgroups are: from mountinfo, `/proc/PID/cgroup` and OCI's `cgroupsPath`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{Cgroup, Dirs, UNIFIED};
use dyad_runtime_handler::error::{Context, Error, Result};

/// The usual place of the v2 hierarchy, or of the directory of the v1 ones.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where units without a slice of their own are.
const SYSTEM_SLICE: &str = "system.slice";

/// Where this host's cgroup hierarchies are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchies {
    /// v1, or hybrid: by controller; the v2 one of a hybrid host under `""`.
    V1(BTreeMap<String, Mount>),
    /// v2 only.
    V2(Mount),
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Which cgroup is seen at the mount point (`/`, except in containers).
    root: PathBuf,
    /// Mount point.
    point: PathBuf,
}

impl Mount {
    pub(super) fn point(&self) -> &Path {
        &self.point
    }

    /// The directory of the cgroup that `/proc/PID/cgroup` names `path`; `None`: root.
    fn dir(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let below = below.strip_prefix("/").unwrap_or(below);
        (below != Path::new("")).then(|| self.point.join(below))
    }
}

impl Hierarchies {
    /// Looks at this host.
    ///
    /// # Errors
    /// `FailedPrecondition` where no cgroup hierarchy is mounted.
    pub fn of_host() -> Result<Self> {
        // A v2 host needs no look at its mounts, which may be thousands.
        if statfs(CGROUP_ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            return Ok(Self::V2(Mount {
                root: "/".into(),
                point: CGROUP_ROOT.into(),
            }));
        }
        let mountinfo =
            fs::read_to_string("/proc/self/mountinfo").context(|| "read mountinfo".into())?;
        Self::parse(&mountinfo).ok_or_else(|| {
            Error::FailedPrecondition(format!(
                "no cgroup hierarchy is mounted (looked for cgroup and cgroup2 mounts, usually below {CGROUP_ROOT})"
            ))
        })
    }

    /// Reads the text of `/proc/PID/mountinfo`; `None`: no cgroup mounts.
    pub fn parse(mountinfo: &str) -> Option<Self> {
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for line in mountinfo.lines() {
            // 36 35 98:0 /root /point opts [optional]* - type source superopts
            let Some((mount, fs)) = line.split_once(" - ") else {
                continue;
            };
            let mut fields = mount.split(' ').skip(3);
            let (Some(root), Some(point)) = (fields.next(), fields.next()) else {
                continue;
            };
            let found = Mount {
                root: unescape(root),
                point: unescape(point),
            };
            let mut fs = fs.split(' ');
            match fs.next() {
                Some("cgroup2") => {
                    v2.get_or_insert(found);
                }
                Some("cgroup") => {
                    for option in fs.nth(1).unwrap_or_default().split(',') {
                        if !matches!(option, "rw" | "ro" | "xattr" | "clone_children")
                            && !option.starts_with("release_agent=")
                        {
                            v1.entry(option.to_owned()).or_insert_with(|| found.clone());
                        }
                    }
                }
                _ => {}
            }
        }
        // A hybrid host's controllers are v1's; so is one that has nothing but
        // systemd's named hierarchy beside v2 not hybrid to us.
        if v1.keys().all(|controller| controller.starts_with("name=")) {
            return v2.map(Self::V2);
        }
        if let Some(v2) = v2 {
            v1.insert(UNIFIED.into(), v2);
        }
        Some(Self::V1(v1))
    }

    /// Whether this is a host with v1 controllers (hybrid too).
    pub fn is_v1(&self) -> bool {
        matches!(self, Self::V1(_))
    }

    /// The mount point of the v2 hierarchy, where there is one.
    pub fn unified(&self) -> Option<&Path> {
        match self {
            Self::V1(mounts) => mounts.get(UNIFIED).map(|mount| mount.point.as_path()),
            Self::V2(mount) => Some(&mount.point),
        }
    }

    /// The cgroup that `pid` is in.
    ///
    /// Of v1's controllers those where it is in the root, and so in nobody's group, are
    /// left out.
    ///
    /// # Errors
    /// `NotFound` when there is no such process (any more); `FailedPrecondition` when
    /// it is in the root of all.
    pub fn of_pid(&self, pid: u32) -> Result<Cgroup> {
        match fs::read_to_string(format!("/proc/{pid}/cgroup")) {
            Ok(text) => self.parse_proc(&text),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                Err(Error::NotFound(format!("process {pid}")))
            }
            Err(error) => Err(Error::other(format!("read /proc/{pid}/cgroup"), error)),
        }
    }

    /// Reads the text of `/proc/PID/cgroup`.
    fn parse_proc(&self, text: &str) -> Result<Cgroup> {
        let mut paths = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) =
                (fields.next(), fields.next(), fields.next())
            else {
                return Err(Error::InvalidArgument(format!(
                    "/proc/PID/cgroup: cannot read line {line:?}"
                )));
            };
            for controller in controllers.split(',') {
                paths.insert(controller, path);
            }
        }
        let dirs = match self {
            Self::V2(mount) => {
                let path = paths
                    .get(UNIFIED)
                    .ok_or_else(|| Error::InvalidArgument("/proc/PID/cgroup: no v2 line".into()))?;
                mount.dir(path).map(Dirs::V2)
            }
            Self::V1(mounts) => {
                let dirs: BTreeMap<_, _> = mounts
                    .iter()
                    .filter_map(|(controller, mount)| {
                        let path = paths.get(controller.as_str())?;
                        Some((controller.clone(), mount.dir(path)?))
                    })
                    .collect();
                (!dirs.is_empty()).then_some(Dirs::V1(dirs))
            }
        };
        // Who signals or removes this cgroup must never get the host's.
        dirs.map(|dirs| Cgroup { dirs })
            .ok_or_else(|| Error::FailedPrecondition("the process is in the root cgroup".into()))
    }

    /// The cgroup that an OCI runtime makes for `cgroups_path` of a spec: a path of
    /// the cgroupfs driver (`/a/b`), or the systemd driver's `slice:prefix:name`.
    ///
    /// # Errors
    /// `InvalidArgument` for a relative path (it would depend on the runtime), or one
    /// that leaves the hierarchy.
    pub fn at(&self, cgroups_path: &str) -> Result<Cgroup> {
        let path = match systemd_path(cgroups_path) {
            Some(path) => path,
            None => checked(cgroups_path)?,
        };
        let path = path.to_string_lossy();
        let dirs = match self {
            Self::V2(mount) => Dirs::V2(mount.point.join(path.trim_start_matches('/'))),
            Self::V1(mounts) => Dirs::V1(
                mounts
                    .iter()
                    .map(|(controller, mount)| {
                        let dir = mount.point.join(path.trim_start_matches('/'));
                        (controller.clone(), dir)
                    })
                    .collect(),
            ),
        };
        Ok(Cgroup { dirs })
    }
}

/// Whether a spec's `cgroupsPath` is for the systemd driver (`slice:prefix:name`).
pub fn is_systemd(cgroups_path: &str) -> bool {
    systemd_path(cgroups_path).is_some()
}

/// The slice that a spec's `cgroupsPath` for the systemd driver names (`a-b.slice`).
pub fn systemd_slice(cgroups_path: &str) -> Option<&str> {
    systemd_path(cgroups_path)?;
    let (slice, _) = cgroups_path.split_once(':')?;
    Some(if slice.is_empty() {
        SYSTEM_SLICE
    } else {
        slice
    })
}

fn systemd_path(cgroups_path: &str) -> Option<PathBuf> {
    let mut parts = cgroups_path.split(':');
    let (Some(slice), Some(prefix), Some(name), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    if cgroups_path.contains('/') {
        return None;
    }
    let slice = if slice.is_empty() {
        SYSTEM_SLICE
    } else {
        slice
    };
    let unit = match (name.ends_with(".slice"), prefix) {
        (true, _) => name.to_owned(),
        (false, "") => format!("{name}.scope"),
        (false, prefix) => format!("{prefix}-{name}.scope"),
    };
    let mut path = expand_slice(slice);
    path.push(unit);
    Some(path)
}

/// `a-b.slice` lies in `a.slice`; `-.slice` is the root (systemd.slice(5)).
fn expand_slice(slice: &str) -> PathBuf {
    let mut path = PathBuf::from("/");
    let Some(name) = slice.strip_suffix(".slice") else {
        path.push(slice);
        return path;
    };
    if name == "-" {
        return path;
    }
    let dashes = name.match_indices('-').map(|(at, _)| at);
    for end in dashes.chain([name.len()]) {
        path.push(format!("{}.slice", &name[..end]));
    }
    path
}

fn checked(cgroups_path: &str) -> Result<PathBuf> {
    let path = Path::new(cgroups_path);
    let leaves = path
        .components()
        .any(|part| matches!(part, Component::ParentDir));
    if !path.is_absolute() || leaves || path == Path::new("/") {
        return Err(Error::InvalidArgument(format!(
            "linux.cgroupsPath {cgroups_path:?}: must be absolute and below /, or slice:prefix:name"
        )));
    }
    Ok(path.to_owned())
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> PathBuf {
    if !field.contains('\\') {
        return field.into();
    }
    let mut text = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        match after
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok())
        {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text.push_str(rest);
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "\
24 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
";
    const HYBRID: &str = "\
24 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
30 24 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn v1_dir<'a>(cgroup: &'a Cgroup, controller: &str) -> &'a str {
        match &cgroup.dirs {
            Dirs::V1(dirs) => dirs[controller].to_str().unwrap(),
            Dirs::V2(_) => panic!("v2"),
        }
    }

    #[test]
    fn the_cgroup_of_a_pid_on_v2() {
        let hierarchies = Hierarchies::parse(V2).unwrap();
        assert!(!hierarchies.is_v1());
        let cgroup = hierarchies.parse_proc("0::/kubepods/pod1/c1\n").unwrap();
        assert_eq!(cgroup, Cgroup::v2("/sys/fs/cgroup/kubepods/pod1/c1"));
    }

    #[test]
    fn the_cgroup_of_a_pid_on_a_hybrid_host() {
        let hierarchies = Hierarchies::parse(HYBRID).unwrap();
        assert!(hierarchies.is_v1());
        assert_eq!(
            hierarchies.unified(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        let text = "5:cpu,cpuacct:/a\n4:memory:/a/b:c\n1:name=systemd:/s\n0::/u\n";
        let cgroup = hierarchies.parse_proc(text).unwrap();
        assert_eq!(v1_dir(&cgroup, "cpu"), "/sys/fs/cgroup/cpu,cpuacct/a");
        assert_eq!(v1_dir(&cgroup, "cpuacct"), "/sys/fs/cgroup/cpu,cpuacct/a");
        assert_eq!(v1_dir(&cgroup, "memory"), "/sys/fs/cgroup/memory/a/b:c");
        assert_eq!(v1_dir(&cgroup, "name=systemd"), "/sys/fs/cgroup/systemd/s");
        assert_eq!(v1_dir(&cgroup, UNIFIED), "/sys/fs/cgroup/unified/u");
    }

    #[test]
    fn systemds_named_hierarchy_alone_makes_no_hybrid() {
        let text = format!(
            "{V2}33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        );
        assert!(!Hierarchies::parse(&text).unwrap().is_v1());
    }

    #[test]
    fn a_mount_that_shows_a_part_of_the_hierarchy_is_followed() {
        let text = "35 24 0:30 /docker/x /my\\040cgroups rw - cgroup2 cgroup2 rw\n";
        let cgroup = Hierarchies::parse(text)
            .unwrap()
            .parse_proc("0::/docker/x/pod\n")
            .unwrap();
        assert_eq!(cgroup, Cgroup::v2("/my cgroups/pod"));
    }

    #[test]
    fn the_root_cgroup_is_nobodys() {
        let v2 = Hierarchies::parse(V2).unwrap();
        let error = v2.parse_proc("0::/\n").unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        let hybrid = Hierarchies::parse(HYBRID).unwrap();
        let cgroup = hybrid.parse_proc("4:memory:/a\n0::/\n").unwrap();
        assert_eq!(cgroup.dirs(), [Path::new("/sys/fs/cgroup/memory/a")].into());
        assert!(hybrid.parse_proc("4:memory:/\n0::/\n").is_err());
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(Hierarchies::parse(""), None);
        assert_eq!(Hierarchies::parse("a b - cgroup\n - cgroup2\nx"), None);
        let hierarchies = Hierarchies::parse(V2).unwrap();
        for text in ["nonsense", "4:memory", "4:memory:/a"] {
            let error = hierarchies.parse_proc(text).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{text}");
        }
    }

    #[test]
    fn cgroups_paths_of_both_drivers() {
        let hierarchies = Hierarchies::parse(V2).unwrap();
        for (path, dir) in [
            ("/k8s.io/abc", "k8s.io/abc"),
            ("/a:b:c/abc", "a:b:c/abc"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            (":runc:x", "system.slice/runc-x.scope"),
            ("-.slice::x", "x.scope"),
            ("a.slice:p:b.slice", "a.slice/b.slice"),
        ] {
            let expected = Cgroup::v2(Path::new("/sys/fs/cgroup").join(dir));
            assert_eq!(hierarchies.at(path).unwrap(), expected, "{path}");
        }
        let hybrid = Hierarchies::parse(HYBRID).unwrap();
        let cgroup = hybrid.at("/pod/c").unwrap();
        assert_eq!(v1_dir(&cgroup, "memory"), "/sys/fs/cgroup/memory/pod/c");
    }

    #[test]
    fn a_cgroups_path_that_leaves_the_hierarchy_is_refused() {
        let hierarchies = Hierarchies::parse(V2).unwrap();
        for path in ["", "/", "relative", "/../etc", "/a/../../b"] {
            let error = hierarchies.at(path).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{path}");
        }
    }
}
