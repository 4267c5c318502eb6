//! What containerd writes to a shim's stdin, and the reply that the same containerd
//! reads from its stdout.
//!
//! | containerd | stdin of `start` | reply |
//! |---|---|---|
//! | 1.6 - 2.2 | runtime options as a protobuf `Any`, or nothing | the bare address: Task v2 |
//! | 2.3 on | `BootstrapParams`, options among its extensions | `BootstrapResult`: Task v3 |
//!
//! Either message parses as the other (two strings first), so nothing but a
//! comparison with the command line tells them apart.

use std::io::Read;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim::oci::Options as RuncOptions;
use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::{Error, Result};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

use super::args::Args;
use crate::config::{Config, Source};

/// containerd's own limit (pkg/shim: 10 MiB).
const MAX_INPUT_BYTES: u64 = 10 << 20;

/// Which containerd is asking, as far as the reply depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Up to 2.2.
    Legacy,
    /// 2.3 on.
    Bootstrap,
}

impl Protocol {
    /// The bytes that tell this containerd where the pod's server listens.
    ///
    /// # Errors
    /// The message could not be encoded.
    pub fn reply(self, address: &str) -> Result<Vec<u8>> {
        match self {
            Self::Legacy => Ok(address.as_bytes().to_vec()),
            Self::Bootstrap => BootstrapResult {
                version: containerd_shim_protos::TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            }
            .write_to_bytes()
            .context(|| "encode the reply to start".into()),
        }
    }
}

/// The runtime options of a handler in containerd's configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RuntimeOptions {
    /// Where the configuration is.
    pub source: Source,
    /// `containerd.runc.v1.Options`: of clients other than CRI, and of a handler whose
    /// `runtime_type` is that of containerd's own shim and whose `runtime_path` is ours.
    pub runc: Option<Box<RuncOptions>>,
}

impl RuntimeOptions {
    /// The configuration with what the options say beside it.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and the key, or the option.
    pub fn load(&self) -> Result<Config> {
        let mut config = Config::load(&self.source)?;
        let Some(runc) = &self.runc else {
            return Ok(config);
        };
        let container = &mut config.container;
        if !runc.binary_name.is_empty() {
            container.runtime = Some(runc.binary_name.clone().into());
        }
        for (name, value, key) in [
            ("Root", &runc.root, &mut container.root),
            (
                "CriuWorkPath",
                &runc.criu_work_path,
                &mut container.criu_work,
            ),
        ] {
            if value.is_empty() {
                continue;
            }
            if !value.starts_with('/') {
                return Err(Error::InvalidArgument(format!(
                    "containerd.runc.v1.Options: {name} {value:?} must be an absolute path"
                )));
            }
            *key = Some(value.into());
        }
        container.systemd_cgroup |= runc.systemd_cgroup;
        container.no_pivot_root |= runc.no_pivot_root;
        container.no_new_keyring |= runc.no_new_keyring;
        if (runc.io_uid, runc.io_gid) != (0, 0) {
            (container.io_uid, container.io_gid) = (runc.io_uid, runc.io_gid);
        }
        Ok(config)
    }

    /// The cgroup that the pod's server is to be in; empty: where it is.
    pub fn shim_cgroup(&self) -> &str {
        self.runc.as_ref().map_or("", |runc| &runc.shim_cgroup)
    }
}

/// What `start` was given.
#[derive(Debug, Clone, PartialEq)]
pub struct StartInput {
    /// Decides the reply.
    pub protocol: Protocol,
    /// The handler's options.
    pub options: RuntimeOptions,
    /// Where containerd wants our socket, if it says.
    pub socket_dir: Option<String>,
    /// containerd's ttrpc address, for events.
    pub ttrpc_address: String,
    /// Log at debug level.
    pub debug: bool,
}

/// All of stdin, bounded. Empty where stdin is a terminal.
///
/// # Errors
/// stdin could not be read, or is longer than containerd would ever write.
pub fn read_stdin() -> Result<Vec<u8>> {
    use std::io::IsTerminal as _;
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if stdin.is_terminal() {
        return Ok(input);
    }
    stdin
        .lock()
        .take(MAX_INPUT_BYTES + 1)
        .read_to_end(&mut input)
        .context(|| "read stdin".into())?;
    if input.len() as u64 > MAX_INPUT_BYTES {
        return Err(Error::InvalidArgument(format!(
            "stdin is longer than {MAX_INPUT_BYTES} bytes"
        )));
    }
    Ok(input)
}

/// Tells the two stdin formats apart and reads either. `ttrpc_env` is
/// `$TTRPC_ADDRESS`, where containerds before 2.3 put it; it also counts where
/// `BootstrapParams` name none.
///
/// # Errors
/// `InvalidArgument` for input that is neither, or options of a type we do not know.
pub fn start_input(input: &[u8], args: &Args, ttrpc_env: &str) -> Result<StartInput> {
    if let Some(params) = bootstrap_params(input, args)? {
        let options = params
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref())
            .find_map(|any| match options_from(any) {
                // Other extensions (CRI, NRI …) are not for us.
                Err(Error::Unimplemented(_)) => None,
                result => Some(result),
            })
            .transpose()?
            .unwrap_or_default();
        return Ok(StartInput {
            protocol: Protocol::Bootstrap,
            options,
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
            ttrpc_address: Some(params.containerd_ttrpc_address)
                .filter(|address| !address.is_empty())
                .unwrap_or_else(|| ttrpc_env.to_owned()),
            // The enum is open: more verbose levels are negative.
            debug: args.debug || params.log_level.value() < 0,
        });
    }
    Ok(StartInput {
        protocol: Protocol::Legacy,
        options: legacy_options(input)?,
        socket_dir: None,
        ttrpc_address: ttrpc_env.to_owned(),
        debug: args.debug,
    })
}

/// The options that `-info` gets: an `Any`, or nothing.
///
/// # Errors
/// `InvalidArgument` for input that is no such message.
pub fn legacy_options(input: &[u8]) -> Result<RuntimeOptions> {
    if input.is_empty() {
        return Ok(RuntimeOptions::default());
    }
    let any = Any::parse_from_bytes(input)
        .map_err(|error| Error::InvalidArgument(format!("runtime options on stdin: {error}")))?;
    if any.type_url.is_empty() {
        return Ok(RuntimeOptions::default());
    }
    options_from(&any).map_err(|error| match error {
        Error::Unimplemented(text) => Error::InvalidArgument(text),
        other => other,
    })
}

fn bootstrap_params(input: &[u8], args: &Args) -> Result<Option<BootstrapParams>> {
    if input.is_empty() {
        return Ok(None);
    }
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == args.id && params.namespace == args.namespace {
        return Ok(Some(params));
    }
    // An `Any` fills the first two fields and no other.
    let more_than_an_any = !params.containerd_version.is_empty()
        || !params.containerd_ttrpc_address.is_empty()
        || !params.containerd_grpc_address.is_empty();
    if more_than_an_any {
        return Err(Error::InvalidArgument(format!(
            "stdin is meant for {}/{}, the command line for {}/{}",
            params.namespace, params.instance_id, args.namespace, args.id
        )));
    }
    Ok(None)
}

/// containerd's typeurl writes bare message names, others prefix a host.
fn options_from(any: &Any) -> Result<RuntimeOptions> {
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "runtimeoptions.v1.Options" => generic_options(&any.value),
        "containerd.runc.v1.Options" => {
            let options = RuncOptions::parse_from_bytes(&any.value).map_err(|error| {
                Error::InvalidArgument(format!("containerd.runc.v1.Options: {error}"))
            })?;
            Ok(RuntimeOptions {
                source: Source::Default,
                runc: Some(Box::new(options)),
            })
        }
        other => Err(Error::Unimplemented(format!(
            "runtime options of type {other:?}: give runtimeoptions.v1.Options (ConfigPath)"
        ))),
    }
}

/// `runtimeoptions.v1.Options` (containerd: api/types/runtimeoptions/v1/api.proto):
/// `string type_url = 1; string config_path = 2; bytes config_body = 3`.
fn generic_options(bytes: &[u8]) -> Result<RuntimeOptions> {
    let decode = || -> protobuf::Result<(String, Vec<u8>)> {
        let mut stream = CodedInputStream::from_bytes(bytes);
        let (mut path, mut body) = (String::new(), Vec::new());
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                0x12 => path = stream.read_string()?,
                0x1a => body = stream.read_bytes()?,
                other => skip_field(&mut stream, other)?,
            }
        }
        Ok((path, body))
    };
    let (path, body) = decode()
        .map_err(|error| Error::InvalidArgument(format!("runtimeoptions.v1.Options: {error}")))?;
    let source = match (path.is_empty(), body.is_empty()) {
        (false, _) => Source::Path(path.into()),
        (true, false) => Source::Body(String::from_utf8(body).map_err(|_| {
            Error::InvalidArgument("the body of the runtime options is not UTF-8".into())
        })?),
        (true, true) => Source::Default,
    };
    Ok(RuntimeOptions { source, runc: None })
}

fn skip_field(stream: &mut CodedInputStream<'_>, tag: u32) -> protobuf::Result<()> {
    match tag & 7 {
        0 => stream.read_raw_varint64().map(drop),
        1 => stream.read_fixed64().map(drop),
        2 => stream.read_bytes().map(drop),
        _ => stream.read_fixed32().map(drop),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;
    use protobuf::CodedOutputStream;

    use super::super::args;
    use super::*;

    fn command_line() -> Args {
        args::parse(["-namespace", "k8s.io", "-id", "abc", "start"].map(String::from)).unwrap()
    }

    fn options_any(path: &str, body: &str) -> Any {
        let mut value = Vec::new();
        {
            let mut out = CodedOutputStream::vec(&mut value);
            out.write_string(1, "ignored").unwrap();
            if !path.is_empty() {
                out.write_string(2, path).unwrap();
            }
            if !body.is_empty() {
                out.write_bytes(3, body.as_bytes()).unwrap();
            }
            out.flush().unwrap();
        }
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn bootstrap_params_are_known_by_the_id_and_namespace_of_the_command_line() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            extensions: vec![Extension {
                value: Some(options_any("/etc/d.toml", "")).into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let read =
            start_input(&params.write_to_bytes().unwrap(), &command_line(), "/other").unwrap();
        assert_eq!(read.protocol, Protocol::Bootstrap);
        assert_eq!(read.ttrpc_address, "/run/c.ttrpc");
        assert_eq!(read.socket_dir.as_deref(), Some("/run/s"));
        assert_eq!(read.options.source, Source::Path("/etc/d.toml".into()));
    }

    #[test]
    fn bootstrap_params_without_a_ttrpc_address_leave_it_to_the_environment() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            ..Default::default()
        };
        let read = start_input(&params.write_to_bytes().unwrap(), &command_line(), "/env").unwrap();
        assert_eq!(read.protocol, Protocol::Bootstrap);
        assert_eq!(read.ttrpc_address, "/env");
    }

    #[test]
    fn an_any_that_parses_as_bootstrap_params_is_still_an_any() {
        let input = options_any("", "kind = \"machine\"")
            .write_to_bytes()
            .unwrap();
        let read = start_input(&input, &command_line(), "/env").unwrap();
        assert_eq!(read.protocol, Protocol::Legacy);
        assert_eq!(read.ttrpc_address, "/env");
        assert_eq!(
            read.options.source,
            Source::Body("kind = \"machine\"".into())
        );
    }

    #[test]
    fn bootstrap_params_for_someone_else_are_refused() {
        let params = BootstrapParams {
            instance_id: "other".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.4".into(),
            ..Default::default()
        };
        let error =
            start_input(&params.write_to_bytes().unwrap(), &command_line(), "").unwrap_err();
        assert!(error.to_string().contains("k8s.io/other"), "{error}");
    }

    #[test]
    fn empty_stdin_is_a_legacy_containerd_without_options() {
        let read = start_input(&[], &command_line(), "/env").unwrap();
        assert_eq!(read.protocol, Protocol::Legacy);
        assert_eq!(read.options, RuntimeOptions::default());
    }

    #[test]
    fn unknown_option_types_are_refused_by_name() {
        let any = Any {
            type_url: "containerd.runhcs.v1.Options".into(),
            ..Default::default()
        };
        let error = legacy_options(&any.write_to_bytes().unwrap()).unwrap_err();
        assert!(error.to_string().contains("runhcs"), "{error}");
    }

    fn runc_any(options: &RuncOptions) -> Vec<u8> {
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        any.write_to_bytes().unwrap()
    }

    #[test]
    fn runcs_own_options_become_keys_of_the_configuration() {
        let read = legacy_options(&runc_any(&RuncOptions {
            binary_name: "/r".into(),
            root: "/state".into(),
            systemd_cgroup: true,
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/shims".into(),
            io_uid: 5,
            io_gid: 6,
            criu_work_path: "/work".into(),
            ..Default::default()
        }))
        .unwrap();
        assert_eq!(read.shim_cgroup(), "/shims");
        let container = read.load().unwrap().container;
        assert_eq!(container.runtime, Some("/r".into()));
        assert_eq!(container.root, Some("/state".into()));
        assert_eq!(container.criu_work, Some("/work".into()));
        assert!(container.systemd_cgroup && container.no_pivot_root && container.no_new_keyring);
        assert_eq!((container.io_uid, container.io_gid), (5, 6));
        let relative = legacy_options(&runc_any(&RuncOptions {
            root: "state".into(),
            ..Default::default()
        }));
        let error = relative.unwrap().load().unwrap_err().to_string();
        assert!(error.contains("Root \"state\""), "{error}");
    }

    #[test]
    fn replies_differ_by_protocol() {
        assert_eq!(
            Protocol::Legacy.reply("unix:///s").unwrap(),
            b"unix:///s".to_vec()
        );
        let result =
            BootstrapResult::parse_from_bytes(&Protocol::Bootstrap.reply("unix:///s").unwrap())
                .unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
    }
}
