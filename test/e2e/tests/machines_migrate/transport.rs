//! Over the nodes' network: encrypted, over several connections.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use dyad_e2e::nodes::Nodes;
use dyad_e2e::pki;

use crate::pod::{Pod, seamless};

/// Where libvirtd sees the folder `libvirt/etc/pki` of its node.
const FOLDER: &str = "/etc/libvirt/pki";

/// An authority's word counts, and nothing else; and back over parallel connections.
pub fn streams_are_encrypted_and_parallel(nodes: &Nodes) -> Result<()> {
    let [n1, n2] = &nodes.nodes;
    let authorities = nodes.dir.join("pki");
    for name in ["one", "other"] {
        pki::authority(&authorities, name)?;
    }
    for (node, signer, address) in [
        (n1, "one", nodes.address(1)?),
        (n2, "other", nodes.address(2)?),
    ] {
        certify(
            &authorities,
            signer,
            &node.dir.join("libvirt/etc/pki"),
            &address,
        )?;
        let conf = node.dir.join("libvirt/etc/qemu.conf");
        let text = fs::read_to_string(&conf)?;
        if !text.contains(FOLDER) {
            let mut conf = fs::OpenOptions::new().append(true).open(conf)?;
            writeln!(
                conf,
                "migrate_tls_x509_cert_dir = \"{FOLDER}\"\nmigrate_tls_x509_verify = 1"
            )?;
            node.kill_and_restart("libvirtd")?;
        }
    }
    let source = Pod::counting(n1)?;
    let machine = source.machine()?;
    let there = format!("tcp://{}", nodes.address(2)?);
    let encrypted = ["--migrate-uri", &there, "--disks-uri", &there, "--tls"];
    {
        let target = Pod::waiting(n2, &machine)?;
        source.migrate(n2, &encrypted)?.failed(&["certificate"])?;
        source
            .stayed(&target)
            .context("a target that nobody vouches for")?;
    }
    certify(
        &authorities,
        "one",
        &n2.dir.join("libvirt/etc/pki"),
        &nodes.address(2)?,
    )?;
    let target = Pod::waiting(n2, &machine)?;
    source.migrate(n2, &encrypted)?.moved()?;
    target.goes_on()?;
    seamless(&[&source, &target])?;

    let here = format!("tcp://{}", nodes.address(1)?);
    let parallel = [
        "--migrate-uri",
        &here,
        "--disks-uri",
        &here,
        "--allow-clear",
        "--parallel",
        "2",
    ];
    let back = Pod::waiting(n1, &machine)?;
    target.migrate(n1, &parallel)?.moved()?;
    back.goes_on()?;
    seamless(&[&source, &target, &back])
}

/// A node's certificate, as QEMU wants its files to be called.
fn certify(authorities: &Path, signer: &str, folder: &Path, address: &str) -> Result<()> {
    pki::certify(authorities, signer, address)?;
    fs::create_dir_all(folder)?;
    fs::copy(
        authorities.join(format!("{signer}.crt")),
        folder.join("ca-cert.pem"),
    )?;
    for role in ["server", "client"] {
        fs::copy(
            authorities.join("node.crt"),
            folder.join(format!("{role}-cert.pem")),
        )?;
        let key = folder.join(format!("{role}-key.pem"));
        fs::copy(authorities.join("node.key"), &key)?;
        // QEMU's user has no name outside of libvirtd's namespace, and this authority no worth.
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        fs::set_permissions(key, all)?;
    }
    Ok(())
}
