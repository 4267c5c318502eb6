//! `-info`: what containerd 2.x asks of a runtime before any pod exists.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use dyad_runtime_handler::Result;
use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::error::Context as _;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use super::input::{legacy_options, read_stdin};
use crate::backend::Backend;

/// The OCI runtime-spec document that `features` carries, as JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The encoded `RuntimeInfo`.
///
/// # Errors
/// The options or the configuration they name are wrong, or the OCI runtime does not
/// answer. containerd logs it and goes without.
pub fn info(backend: Backend) -> Result<Vec<u8>> {
    let options = legacy_options(&read_stdin()?)?;
    let config = options.load()?;
    // A machine pod is not run by the host's OCI runtime: its features say nothing.
    let features = match config.kind {
        Kind::Container if backend.kind == Kind::Container => (backend.features)(&config)?,
        _ => None,
    };
    let info = RuntimeInfo {
        name: "io.containerd.dyad.v2".into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
        .into(),
        features: features
            .map(|json| Any {
                type_url: FEATURES_TYPE.into(),
                value: json.into_bytes(),
                ..Default::default()
            })
            .into(),
        annotations: [("dyad.dev/kind".to_owned(), config.kind.to_string())].into(),
        ..Default::default()
    };
    info.write_to_bytes()
        .context(|| "encode the runtime info".into())
}
