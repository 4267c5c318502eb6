//! Two nodes on one L2, made by `hack/up --nodes 2`: each with a containerd and a libvirtd
//! of its own, to migrate between.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::command;
use crate::env::{Build, Env, UP_TIMEOUT, Version, repository};
use crate::host::remove_cgroup_parent;

/// Both nodes; down when dropped, with what still runs on them.
#[derive(Debug)]
pub struct Nodes {
    dir: PathBuf,
    /// The nodes.
    pub nodes: [Env; 2],
}

impl Nodes {
    /// Brings both up in `dir`; what an earlier run left there goes first.
    ///
    /// # Errors
    /// `hack/up` failed; the text holds its output.
    pub fn up(dir: &Path, build: Build) -> Result<Self> {
        let node = |name: &str| Env {
            dir: dir.join(name),
            version: Version::V2_3,
        };
        let nodes = Self {
            nodes: [node("n1"), node("n2")],
            dir: dir.to_path_buf(),
        };
        nodes.down()?;
        let mut up = nodes.hack("up");
        up.args(["--nodes", "2", "--containerd", Version::V2_3.number()]);
        build.tell(&mut up);
        command::run(&mut up, b"", UP_TIMEOUT)?.success("hack/up --nodes 2")?;
        Ok(nodes)
    }

    fn down(&self) -> Result<()> {
        command::run(&mut self.hack("down"), b"", UP_TIMEOUT)?.success("hack/down")?;
        for node in &self.nodes {
            remove_cgroup_parent(&node.dir);
        }
        Ok(())
    }

    fn hack(&self, name: &str) -> Command {
        let mut command = Command::new(repository().join("hack").join(name));
        command.arg("--dir").arg(&self.dir);
        command
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = node.crictl().run(&["rmp", "--force", "--all"], b"");
        }
        if let Err(error) = self.down() {
            eprintln!("take the nodes down: {error:#}");
        }
    }
}
