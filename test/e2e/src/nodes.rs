//! Two nodes to migrate between, made by `hack/up --nodes 2`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::command;
use crate::env::{ASK_TIMEOUT, Build, Env, UP_TIMEOUT, Version, repository};
use crate::host::remove_cgroup_parent;

/// Two environments on one L2, each in namespaces of its own; down when dropped, except
/// where `DYAD_E2E_KEEP` is set.
#[derive(Debug)]
pub struct Nodes {
    /// The folder above both.
    pub dir: PathBuf,
    /// The first is where pods come from.
    pub nodes: [Env; 2],
}

impl Nodes {
    /// Brings them up in `$DYAD_E2E_DIR-SUFFIX`. What an earlier run left there goes first;
    /// what it kept is used again.
    ///
    /// # Errors
    /// `hack/up` failed; the text holds its output.
    pub fn up(suffix: &str) -> Result<Self> {
        let dir = std::env::var("DYAD_E2E_DIR").unwrap_or_else(|_| "/tmp/dyad-e2e".into());
        Self::up_in(&PathBuf::from(format!("{dir}-{suffix}")), Build::asked())
    }

    /// Brings them up in `dir`.
    ///
    /// # Errors
    /// As [`Self::up`].
    pub fn up_in(dir: &Path, build: Build) -> Result<Self> {
        let node = |name: &str| Env {
            dir: dir.join(name),
            version: Version::V2_3,
        };
        let nodes = Self {
            nodes: [node("n1"), node("n2")],
            dir: dir.to_path_buf(),
        };
        if !is_kept() {
            nodes.hack("down", |_| {})?;
        }
        nodes.hack("up", |up| {
            up.args(["--nodes", "2", "--containerd", Version::V2_3.number()]);
            build.tell(up);
        })?;
        Ok(nodes)
    }

    /// The address of a node, counted from 1, in the network between them.
    ///
    /// # Errors
    /// They are not up.
    pub fn address(&self, node: u8) -> Result<String> {
        let subnet = std::fs::read_to_string(self.dir.join("subnet"))?;
        Ok(format!("{}.{}", subnet.trim(), node + 1))
    }

    /// Takes the cable between them away until what it gives is dropped.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut(&self) -> Result<Cut<'_>> {
        let cut = Cut(self);
        self.cable("down")?;
        Ok(cut)
    }

    fn cable(&self, end: &str) -> Result<()> {
        let mut ip = Command::new("nsenter");
        ip.arg("--target")
            .arg(self.nodes[1].daemon("node")?.to_string())
            .args(["--net", "--", "ip", "link", "set", "up0", end]);
        command::run(&mut ip, b"", ASK_TIMEOUT)?.success("ip link set up0")?;
        Ok(())
    }

    fn hack(&self, name: &str, options: impl FnOnce(&mut Command)) -> Result<()> {
        let mut program = Command::new(repository().join("hack").join(name));
        program.arg("--dir").arg(&self.dir);
        options(&mut program);
        command::run(&mut program, b"", UP_TIMEOUT)?.success(&format!("hack/{name}"))?;
        Ok(())
    }
}

/// Nothing passes between the nodes; the cable is back when this is dropped.
#[derive(Debug)]
pub struct Cut<'a>(&'a Nodes);

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.cable("up") {
            eprintln!("{error:#}");
        }
    }
}

fn is_kept() -> bool {
    std::env::var_os("DYAD_E2E_KEEP").is_some()
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &self.nodes {
            // What is left is told by who looks for it.
            let _ = node.crictl().run(&["rmp", "--force", "--all"], b"");
        }
        if !is_kept() {
            if let Err(error) = self.hack("down", |_| {}) {
                eprintln!("{error:#}");
            }
            for node in &self.nodes {
                remove_cgroup_parent(&node.dir);
            }
        }
    }
}
