//! What holds for the whole host.

use std::path::Path;

use dyad_runtime_handler::check::Check;
use nix::unistd::Uid;

/// Who we are, and which cgroups the host has.
pub fn checks() -> Vec<Check> {
    vec![
        user(Uid::effective().as_raw()),
        cgroups(Path::new("/sys/fs/cgroup")),
    ]
}

fn user(uid: u32) -> Check {
    match uid {
        0 => Check::ok("user", "root"),
        uid => Check::warn(
            "user",
            format!("user {uid}: sockets and sections that only root can read are not checked"),
            "run this as root",
        ),
    }
}

fn cgroups(root: &Path) -> Check {
    let has = |name: &str| root.join(name).exists();
    match (
        has("cgroup.controllers"),
        has("unified/cgroup.controllers"),
        has("memory"),
    ) {
        (true, _, _) => Check::ok("cgroups", "version 2"),
        (false, true, true) => Check::ok("cgroups", "version 1 with a unified hierarchy (hybrid)"),
        (false, false, true) => Check::ok("cgroups", "version 1"),
        (false, _, false) => Check::fail(
            "cgroups",
            format!("no cgroups with a memory controller at {}", root.display()),
            "mount cgroup2 at /sys/fs/cgroup",
        ),
    }
}

#[cfg(test)]
mod tests {
    use dyad_runtime_handler::check::Status;

    use super::*;

    #[test]
    fn cgroup_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()).status, Status::Fail);
        std::fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 1");
        std::fs::create_dir(dir.path().join("unified")).unwrap();
        std::fs::write(dir.path().join("unified/cgroup.controllers"), "").unwrap();
        assert!(cgroups(dir.path()).found.contains("hybrid"));
        std::fs::write(dir.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2");
    }

    #[test]
    fn not_being_root_is_worth_a_word() {
        assert_eq!(user(0).status, Status::Ok);
        assert_eq!(user(1000).status, Status::Warn);
    }
}
