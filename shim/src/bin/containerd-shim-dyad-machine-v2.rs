//! Serves machine pods; `containerd-shim-dyad-v2` runs it. With `-check` it says whether it
//! could: `dyadctl check` runs that, because only this program is linked to libvirt.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use dyad_runtime_handler::Result;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use dyad_shim::config::Config;
use dyad_shim::{Backend, BackendContext, HandlerFuture};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("-check") {
        return match check() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "{}", error.chain());
                ExitCode::FAILURE
            }
        };
    }
    dyad_shim::main(Backend {
        kind: Kind::Machine,
        handler,
        features: |_| Ok(None),
        sweep: |config| {
            Box::pin(async move { dyad_machine::sweep(&config.machine, &paths(&config)).await })
        },
        is_sweep_wanted: |config| dyad_machine::is_sweep_wanted(&paths(config)),
    })
}

fn handler(context: BackendContext) -> HandlerFuture {
    Box::pin(async move {
        let paths = paths(&context.config);
        dyad_machine::new(Arc::new(context.config.machine), paths, context.events)
    })
}

fn paths(config: &Config) -> dyad_machine::Paths {
    dyad_machine::Paths {
        state_dir: config.state_dir.clone(),
        cache_dir: config.cache_dir.clone(),
    }
}

/// Reads a [`Config`] from stdin and prints what was found as JSON.
fn check() -> Result<()> {
    let config: Config = serde_json::from_reader(std::io::stdin())
        .context(|| "read the configuration to check from stdin".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the tokio runtime".into())?;
    let found = runtime.block_on(dyad_machine::check::check(
        &config.machine,
        &config.cache_dir,
    ));
    // A libvirt that hangs does not keep us.
    runtime.shutdown_background();
    serde_json::to_writer(std::io::stdout(), &found).context(|| "print what was found".into())
}
