//! The command line that containerd gives a shim (containerd: pkg/shim/util.go), in
//! the manner of Go's `flag` package: one or two dashes, `-name value` or
//! `-name=value`, flags end at the first word that is none.

use std::path::PathBuf;

use dyad_runtime_handler::{Error, Result};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start (or find) the pod's server and reply with its address.
    Start,
    /// Remove what a dead server left of one container.
    Delete,
    /// Be the pod's server; only `start` runs this.
    Serve,
    /// Describe the runtime.
    Info,
    /// Remove what nobody owns any more, as the configuration on stdin says.
    Sweep {
        /// Try again for a while where something stays.
        patiently: bool,
    },
    /// Print the version.
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// containerd's binary, for publishing events where ttrpc is not served.
    pub publish_binary: String,
    /// The bundle, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// Log at debug level.
    pub debug: bool,
}

/// Parses the words after the program's name.
///
/// # Errors
/// `InvalidArgument` naming the flag or action that is unknown or incomplete.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Args> {
    let mut words = words.into_iter();
    let mut args = Args {
        action: Action::Start,
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        publish_binary: String::new(),
        bundle: None,
        debug: false,
    };
    let mut info = false;
    let mut version = false;
    let mut sweep = None;
    let mut action = None;
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            action = Some(word);
            break;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let switch = |inline: Option<String>| match inline.as_deref() {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(invalid(format!("flag -{name}: {other:?} is not a boolean"))),
        };
        match name {
            "debug" => args.debug = switch(inline)?,
            "info" => info = switch(inline)?,
            "v" | "version" => version = switch(inline)?,
            "sweep" => sweep = switch(inline)?.then_some(false),
            "sweep-patiently" => sweep = switch(inline)?.then_some(true),
            "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                let value = inline
                    .or_else(|| words.next())
                    .ok_or_else(|| invalid(format!("flag -{name} wants a value")))?;
                match name {
                    "namespace" => args.namespace = value,
                    "id" => args.id = value,
                    "address" => args.address = value,
                    "publish-binary" => args.publish_binary = value,
                    "bundle" => args.bundle = Some(value.into()),
                    // Given by some callers; the socket's place is ours to choose.
                    _ => {}
                }
            }
            _ => return Err(invalid(format!("unknown flag -{name}"))),
        }
    }
    args.action = match (version, info, action.as_deref()) {
        (true, _, _) => Action::Version,
        (_, true, _) => Action::Info,
        _ if sweep.is_some() => Action::Sweep {
            patiently: sweep == Some(true),
        },
        (_, _, Some("start")) => Action::Start,
        (_, _, Some("delete")) => Action::Delete,
        (_, _, Some("serve")) => Action::Serve,
        (_, _, Some(other)) => return Err(invalid(format!("unknown action {other:?}"))),
        (_, _, None) => {
            return Err(invalid(
                "no action: containerd runs this program with start or delete; -v prints the version"
                    .into(),
            ));
        }
    };
    if matches!(args.action, Action::Start | Action::Delete | Action::Serve) {
        check_name("-id", &args.id)?;
        check_name("-namespace", &args.namespace)?;
    }
    Ok(args)
}

/// Both become parts of paths, so nothing that walks out of a directory may pass.
fn check_name(flag: &str, value: &str) -> Result<()> {
    if value.is_empty() {
        return Err(invalid(format!("flag {flag} is missing")));
    }
    if value.contains('/') || value.contains('\0') || value == "." || value == ".." {
        return Err(invalid(format!("flag {flag}: {value:?} is not a name")));
    }
    Ok(())
}

fn invalid(text: String) -> Error {
    Error::InvalidArgument(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Args> {
        parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn containerds_own_command_line_is_understood() {
        let args = parse_words(&[
            "-namespace",
            "k8s.io",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "abc",
            "-debug",
            "start",
        ])
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.id, "abc");
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert!(args.debug);
    }

    #[test]
    fn two_dashes_and_equals_signs_work_as_in_go() {
        let args = parse_words(&["--namespace=a", "--id=b", "--debug=false", "delete"]).unwrap();
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str(), args.debug),
            ("a", "b", false)
        );
        assert_eq!(args.action, Action::Delete);
    }

    #[test]
    fn info_and_version_need_no_id() {
        assert_eq!(parse_words(&["-info"]).unwrap().action, Action::Info);
        assert_eq!(parse_words(&["-v"]).unwrap().action, Action::Version);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, text) in [
            (&["-frobnicate", "start"][..], "unknown flag -frobnicate"),
            (&["-id"], "flag -id wants a value"),
            (
                &["-id", "a", "-namespace", "b", "halt"],
                "unknown action \"halt\"",
            ),
            (
                &["-id", "../a", "-namespace", "b", "start"],
                "-id: \"../a\"",
            ),
            (&["-id", "a", "start"], "flag -namespace is missing"),
            (&["-debug=maybe", "start"], "-debug: \"maybe\""),
            (&[], "no action"),
        ] {
            let error = parse_words(words).unwrap_err();
            assert!(error.to_string().contains(text), "{error} lacks {text}");
        }
    }
}
