//! The machine kind's part, asked of the executable that serves machine pods.

use std::path::Path;
use std::time::Duration;

use dyad_runtime_handler::check::Check;
use dyad_shim::config::Config;

use crate::program;

/// The executable, which containerd's shim starts for machine pods.
const PROGRAM: &str = "containerd-shim-dyad-machine-v2";
/// A probe of the accelerator boots a small machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What the executable says of `config`; it is looked for beside the shim, beside us, and
/// on `PATH`.
pub async fn checks(config: &Config, shim_dir: Option<&Path>) -> Vec<Check> {
    let Some(program) = program::find_ours(PROGRAM, shim_dir) else {
        return vec![Check::fail(
            "machine",
            format!("{PROGRAM} is neither beside containerd-shim-dyad-v2 nor on PATH"),
            format!("install {PROGRAM} beside containerd-shim-dyad-v2"),
        )];
    };
    let config = match serde_json::to_vec(config) {
        Ok(config) => config,
        Err(error) => return vec![Check::fail("machine", error.to_string(), "")],
    };
    match program::output(&program, &["-check"], &config, LIMIT).await {
        Ok(answer) => parse(&answer),
        Err(error) => vec![Check::fail(
            "machine",
            error,
            "see that libvirt's client library (Debian: libvirt0) is installed, and that this \
             dyadctl and the shim are of one version",
        )],
    }
}

fn parse(answer: &[u8]) -> Vec<Check> {
    serde_json::from_slice(answer).unwrap_or_else(|error| {
        vec![Check::fail(
            "machine",
            format!("{PROGRAM} -check answered no checks: {error}"),
            "install dyadctl and the shim of one version",
        )]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checks_and_anything_else_is_a_failure() {
        let check = Check::warn("accelerator", "tcg", "enable KVM");
        let answer = serde_json::to_vec(&[&check]).unwrap();
        assert_eq!(parse(&answer), [check]);
        assert_eq!(parse(b"usage: ...")[0].name, "machine");
    }
}
