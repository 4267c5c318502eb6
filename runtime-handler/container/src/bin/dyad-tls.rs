//! TLS for a migration's connection; see `dyad_container::tls`.

use std::process::ExitCode;

fn main() -> ExitCode {
    dyad_container::tls::main(std::env::args_os().skip(1))
}
