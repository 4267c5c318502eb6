//! Certificates for tests, by openssl: authorities, and what they sign for nodes.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::command;

/// An authority: `NAME.crt` and `NAME.key` in `folder`.
///
/// # Errors
/// openssl failed.
pub fn authority(folder: &Path, name: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    let subject = format!("/CN=dyad-{name}");
    openssl(
        folder,
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            &subject,
            "-addext",
            "keyUsage=critical,digitalSignature,keyCertSign,cRLSign",
            "-keyout",
            &format!("{name}.key"),
            "-out",
            &format!("{name}.crt"),
        ],
    )
}

/// A node's certificate by the authority `signer`, both as server and as client: `node.crt`
/// and `node.key` in the authorities' folder.
///
/// # Errors
/// openssl failed.
pub fn certify(authorities: &Path, signer: &str, address: &str) -> Result<()> {
    let extensions = format!(
        "subjectAltName=IP:{address}\nextendedKeyUsage=serverAuth,clientAuth\n\
         keyUsage=critical,digitalSignature,keyEncipherment\n"
    );
    fs::write(authorities.join("extensions"), extensions)?;
    openssl(
        authorities,
        &[
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            &format!("/CN={address}"),
            "-keyout",
            "node.key",
            "-out",
            "node.csr",
        ],
    )?;
    openssl(
        authorities,
        &[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            "node.csr",
            "-CA",
            &format!("{signer}.crt"),
            "-CAkey",
            &format!("{signer}.key"),
            "-CAcreateserial",
            "-extfile",
            "extensions",
            "-out",
            "node.crt",
        ],
    )
}

fn openssl(folder: &Path, arguments: &[&str]) -> Result<()> {
    let mut openssl = Command::new("openssl");
    openssl.current_dir(folder).args(arguments);
    command::run(&mut openssl, b"", Duration::from_secs(60))?.success("openssl")?;
    Ok(())
}
