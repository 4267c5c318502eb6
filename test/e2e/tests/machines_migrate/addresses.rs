//! The source's address in the guest, after a migration.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dyad_e2e::env::Env;
use dyad_e2e::nodes::Nodes;
use dyad_e2e::wait::until;

use crate::pod::{Pod, SOON, connected, seamless};

/// A node's configuration of machines, with one more line; as before when dropped.
struct Configured {
    file: PathBuf,
    before: String,
}

impl Configured {
    fn machine(env: &Env, line: &str) -> Result<Self> {
        let file = env.dir.join("etc/dyad-vm.toml");
        let before = fs::read_to_string(&file)?;
        let section = "[machine]\n";
        ensure!(before.contains(section), "{before}");
        let with = before.replacen(section, &format!("{section}{line}\n"), 1);
        fs::write(&file, with)?;
        Ok(Self { file, before })
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.file, &self.before) {
            eprintln!("{}: {error}", self.file.display());
        }
    }
}

/// Until then it answers on both; then the target pod's own has its routes for itself.
pub fn the_source_s_address_goes_after_its_time(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let _configured = Configured::machine(n2, "source_address_s = 10")?;
    let source = Pod::counting(n1)?;
    let target = Pod::waiting(n2, &source.machine()?)?;
    let (old, new) = (source.ip()?, target.ip()?);
    ensure!(old != new, "both pods have {old}");
    source.migrate(n2, &[])?.moved()?;
    target.goes_on()?;
    let addresses = || target.output("ip -4 addr show dev eth0");
    let has = |addresses: &str, ip: &str| addresses.contains(&format!("inet {ip}/"));
    until(SOON, "both addresses to be there", || {
        let now = addresses()?;
        ensure!(has(&now, &old), "{now}");
        Ok(has(&now, &new).then_some(()))
    })?;
    let after = until(SOON, "the source's address to go", || {
        Ok(Some(addresses()?).filter(|now| !has(now, &old)))
    })?;
    ensure!(has(&after, &new) && !after.contains("secondary"), "{after}");
    let routes = target.output("ip -4 route")?;
    let gateway = routes
        .lines()
        .find_map(|line| line.strip_prefix("default via "));
    let gateway = gateway.and_then(|rest| rest.split(' ').next());
    let gateway = gateway.with_context(|| format!("no default route in {routes}"))?;
    ensure!(
        routes.contains(&format!("src {new}")) && !routes.contains(&old),
        "{routes}"
    );
    target.output(&format!("ping -c 1 -W 10 {gateway}"))?;
    connected(&new)?;
    let address = format!("{old}:7000").parse()?;
    let late = TcpStream::connect_timeout(&address, Duration::from_secs(2));
    ensure!(late.is_err(), "it still answers on {old}");
    target.goes_on()?;
    seamless(&[&source, &target])
}
