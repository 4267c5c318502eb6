//! What containerd runs with: asked over CRI by `crictl info`, which tells what the
//! daemon has loaded; without crictl, what `containerd config dump` says it would load.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_runtime_handler::check::Check;
use dyad_shim::config::Source;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::{Map, Value};

use crate::program;

/// The runtime type that containerd turns into our executable's name.
const RUNTIME_TYPE: &str = "io.containerd.dyad.v2";
const SHIM: &str = "containerd-shim-dyad-v2";
const LIMIT: Duration = Duration::from_secs(10);

/// What is known of containerd.
#[derive(Debug, Default)]
pub struct Found {
    /// Those of Dyad's.
    pub handlers: Vec<Handler>,
    /// Where the daemon looks for shims; nothing where it could not be asked.
    path: Option<OsString>,
}

/// A runtime handler of Dyad's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// As a RuntimeClass names it.
    pub name: String,
    /// Its Dyad configuration.
    pub config: Source,
    /// Whether it hands a pod's `dyad.dev/*` annotations to the shim.
    pub passes_annotations: bool,
}

/// Asks containerd at `endpoint`.
pub async fn look(endpoint: &str) -> (Option<Found>, Vec<Check>) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let socket = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if let Some(crictl) = program::find("crictl", &path) {
        let endpoint = format!("unix://{socket}");
        let arguments = ["--runtime-endpoint", &endpoint, "--timeout", "5s", "info"];
        return match program::output(crictl, &arguments, b"", LIMIT).await {
            Ok(answer) => from_cri(&answer, socket),
            Err(error) => (None, vec![unreachable(socket, &error)]),
        };
    }
    if let Some(containerd) = program::find("containerd", &path) {
        return match program::output(containerd, &["config", "dump"], b"", LIMIT).await {
            Ok(answer) => from_dump(&answer),
            Err(error) => (None, vec![unreachable(socket, &error)]),
        };
    }
    let check = Check::warn(
        "containerd",
        "neither crictl nor containerd is on PATH: its configuration was not checked",
        "install crictl (https://github.com/kubernetes-sigs/cri-tools)",
    );
    (None, vec![check])
}

fn unreachable(socket: &str, error: &str) -> Check {
    Check::fail(
        "containerd",
        format!("no answer at {socket}: {error}"),
        "start containerd with its CRI plugin, or name its socket with --runtime-endpoint",
    )
}

fn from_cri(answer: &[u8], socket: &str) -> (Option<Found>, Vec<Check>) {
    let info: Value = match serde_json::from_slice(answer) {
        Ok(info) => info,
        Err(error) => {
            return (
                None,
                vec![unreachable(socket, &format!("crictl info: {error}"))],
            );
        }
    };
    let mut checks = vec![Check::ok("containerd", format!("answers at {socket}"))];
    let handlers = handlers(&info["config"]["containerd"]["runtimes"]);
    checks.push(handlers_check(&handlers));
    checks.push(cni_from_cri(&info));
    let path = daemon_path(Path::new(socket));
    (Some(Found { handlers, path }), checks)
}

fn from_dump(answer: &[u8]) -> (Option<Found>, Vec<Check>) {
    let parsed = std::str::from_utf8(answer)
        .map_err(|error| error.to_string())
        .and_then(|text| {
            text.parse::<toml::Table>()
                .map_err(|error| error.to_string())
        })
        .and_then(|table| serde_json::to_value(table).map_err(|error| error.to_string()));
    let config = match parsed {
        Ok(config) => config,
        Err(error) => {
            let mend = "run `containerd config dump` to see what is wrong";
            return (None, vec![Check::fail("containerd", error, mend)]);
        }
    };
    let mut checks = vec![Check::warn(
        "containerd",
        "no crictl: this is what its configuration file says, not what it runs with",
        "install crictl (https://github.com/kubernetes-sigs/cri-tools)",
    )];
    let plugins = &config["plugins"];
    // 2.x, else 1.x.
    let cri = match &plugins["io.containerd.cri.v1.runtime"] {
        Value::Null => &plugins["io.containerd.grpc.v1.cri"],
        cri => cri,
    };
    let handlers = handlers(&cri["containerd"]["runtimes"]);
    checks.push(handlers_check(&handlers));
    let conf_dir = cri["cni"]["conf_dir"].as_str().unwrap_or("/etc/cni/net.d");
    checks.push(cni_from_folder(Path::new(conf_dir)));
    (
        Some(Found {
            handlers,
            path: None,
        }),
        checks,
    )
}

/// Of the table of runtimes, those that run our shim; keys as in either source.
fn handlers(runtimes: &Value) -> Vec<Handler> {
    let Some(runtimes) = runtimes.as_object() else {
        return Vec::new();
    };
    let text = |table: &Value, keys: [&str; 2]| {
        keys.iter()
            .find_map(|key| table[*key].as_str().map(str::to_owned))
            .unwrap_or_default()
    };
    runtimes
        .iter()
        .filter(|(_, table)| {
            let runtime_type = text(table, ["runtimeType", "runtime_type"]);
            let path = text(table, ["runtimePath", "runtime_path"]);
            runtime_type == RUNTIME_TYPE
                || [&runtime_type, &path].iter().any(|path| {
                    path.starts_with('/') && Path::new(path).file_name() == Some(SHIM.as_ref())
                })
        })
        .map(|(name, table)| {
            let annotations = match &table["PodAnnotations"] {
                Value::Null => &table["pod_annotations"],
                list => list,
            };
            let mut patterns = annotations.as_array().into_iter().flatten();
            Handler {
                name: name.clone(),
                config: config_source(table["options"].as_object()),
                passes_annotations: patterns.any(|pattern| {
                    pattern
                        .as_str()
                        .is_some_and(|pattern| pattern.starts_with("dyad.dev/") || pattern == "*")
                }),
            }
        })
        .collect()
}

/// As the shim chooses it: the file that the options name, else their body, else the
/// default files.
fn config_source(options: Option<&Map<String, Value>>) -> Source {
    let Some(options) = options else {
        return Source::Default;
    };
    match options.get("ConfigPath").and_then(Value::as_str) {
        Some(path) if !path.is_empty() => return Source::Path(path.into()),
        _ => {}
    }
    let body: Map<String, Value> = options
        .iter()
        .filter(|(key, value)| !key.starts_with(char::is_uppercase) && !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    match toml::to_string(&body) {
        Ok(text) if !body.is_empty() => Source::Body(text),
        _ => Source::Default,
    }
}

fn handlers_check(handlers: &[Handler]) -> Check {
    const MEND: &str = "add [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.dyad] \
                        (1.x: \"io.containerd.grpc.v1.cri\") with runtime_type = \
                        \"io.containerd.dyad.v2\" to its configuration, and restart it";
    if handlers.is_empty() {
        return Check::fail(
            "handlers",
            "containerd has no runtime handler of Dyad's",
            MEND,
        );
    }
    let names: Vec<_> = handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    let deaf: Vec<_> = handlers
        .iter()
        .filter(|handler| !handler.passes_annotations)
        .map(|handler| handler.name.as_str())
        .collect();
    match deaf.as_slice() {
        [] => Check::ok("handlers", names.join(", ")),
        deaf => Check::warn(
            "handlers",
            format!(
                "{}; annotations dyad.dev/* do not reach {}",
                names.join(", "),
                deaf.join(", ")
            ),
            "set pod_annotations = [\"dyad.dev/*\"] and container_annotations likewise in the \
             handler's table",
        ),
    }
}

const CNI_MEND: &str = "install CNI plugins and put a network configuration into the folder";

fn cni_from_cri(info: &Value) -> Check {
    let folder = info["cniconfig"]["PluginConfDir"]
        .as_str()
        .or_else(|| info["config"]["cni"]["confDir"].as_str())
        .unwrap_or("its CNI folder");
    let ready = info["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "NetworkReady");
    let names: Vec<_> = info["cniconfig"]["Networks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|network| network["Config"]["Name"].as_str())
        .filter(|name| *name != "cni-loopback")
        .collect();
    match ready {
        Some(ready) if ready["status"] == true => {
            Check::ok("cni", format!("network {} from {folder}", names.join(", ")))
        }
        Some(ready) => {
            let why = ready["message"].as_str().unwrap_or("no reason given");
            Check::fail("cni", format!("{folder}: {why}"), CNI_MEND)
        }
        None => Check::warn(
            "cni",
            format!("{folder}: containerd does not say whether it is ready"),
            "",
        ),
    }
}

fn cni_from_folder(folder: &Path) -> Check {
    let is_config = |path: &PathBuf| {
        path.extension()
            .is_some_and(|ext| ["conf", "conflist", "json"].iter().any(|e| ext == *e))
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| {
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect()
        })
        .unwrap_or_default();
    files.retain(is_config);
    files.sort();
    match files.first() {
        Some(file) => Check::ok("cni", file.display().to_string()),
        None => Check::fail(
            "cni",
            format!("no network configuration in {}", folder.display()),
            CNI_MEND,
        ),
    }
}

/// The shim's executable, where containerd would find it, and whether it runs.
pub async fn shim(found: Option<&Found>) -> (Check, Option<PathBuf>) {
    let daemon = found.and_then(|found| found.path.clone());
    let whose = if daemon.is_some() {
        "containerd's PATH"
    } else {
        "PATH"
    };
    let path = daemon
        .or_else(|| std::env::var_os("PATH"))
        .unwrap_or_default();
    let Some(file) = program::find(SHIM, &path) else {
        let check = Check::fail(
            "shim",
            format!("{SHIM} is not on {whose}"),
            format!("install {SHIM} into a folder of {whose}, such as /usr/local/bin"),
        );
        return (check, None);
    };
    let check = match program::output(&file, &["-v"], b"", LIMIT).await {
        Ok(said) => {
            let said = String::from_utf8_lossy(&said);
            let words: Vec<_> = said.split_whitespace().collect();
            Check::ok("shim", format!("{} ({})", file.display(), words.join(" ")))
        }
        Err(error) => Check::fail(
            "shim",
            format!("{}: {error}", file.display()),
            "install it anew",
        ),
    };
    (check, Some(file))
}

/// The search path of the process that listens on `socket`, where we may see it.
fn daemon_path(socket: &Path) -> Option<OsString> {
    use std::os::unix::ffi::OsStringExt as _;
    let stream = UnixStream::connect(socket).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    let environ = std::fs::read(format!("/proc/{}/environ", peer.pid())).ok()?;
    environ
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .map(|path| OsString::from_vec(path.to_vec()))
}

#[cfg(test)]
mod tests {
    use dyad_runtime_handler::check::Status;

    use super::*;

    /// Cut from `crictl info` against containerd 2.3.4.
    const INFO: &str = r#"{
      "cniconfig": {
        "Networks": [
          {"Config": {"Name": "cni-loopback"}, "IFName": "lo"},
          {"Config": {"Name": "bridge0"}, "IFName": "eth0"}
        ],
        "PluginConfDir": "/etc/cni/net.d"
      },
      "config": {"containerd": {"runtimes": {
        "dyad": {
          "PodAnnotations": ["dyad.dev/*"],
          "options": {"ConfigPath": "/etc/dyad.toml"},
          "runtimePath": "", "runtimeType": "io.containerd.dyad.v2"
        },
        "dyad-vm": {
          "PodAnnotations": null,
          "options": {"kind": "machine", "machine": {"vcpus": 2}},
          "runtimePath": "", "runtimeType": "io.containerd.dyad.v2"
        },
        "runc": {"options": {"BinaryName": ""}, "runtimeType": "io.containerd.runc.v2"}
      }}},
      "status": {"conditions": [
        {"message": "", "reason": "", "status": true, "type": "RuntimeReady"},
        {"message": "", "reason": "", "status": true, "type": "NetworkReady"}
      ]}
    }"#;

    #[test]
    fn handlers_and_their_configurations_are_read_from_cri() {
        let (found, checks) = from_cri(INFO.as_bytes(), "/nonexistent");
        let handlers = found.unwrap().handlers;
        assert_eq!(handlers.len(), 2);
        assert_eq!(handlers[0].config, Source::Path("/etc/dyad.toml".into()));
        let Source::Body(body) = &handlers[1].config else {
            panic!("{handlers:?}")
        };
        let config = dyad_shim::config::Config::load(&Source::Body(body.clone())).unwrap();
        assert_eq!(config.machine.vcpus, 2);
        let found: Vec<_> = checks
            .iter()
            .map(|check| (check.status, check.found.as_str()))
            .collect();
        assert_eq!(found[0].0, Status::Ok);
        assert_eq!(
            found[1],
            (
                Status::Warn,
                "dyad, dyad-vm; annotations dyad.dev/* do not reach dyad-vm"
            )
        );
        assert_eq!(
            found[2],
            (Status::Ok, "network bridge0 from /etc/cni/net.d")
        );
    }

    #[test]
    fn a_network_that_is_not_ready_says_why() {
        let mut info: Value = serde_json::from_str(INFO).unwrap();
        info["status"]["conditions"][1]["status"] = false.into();
        info["status"]["conditions"][1]["message"] = "cni plugin not initialized".into();
        let check = cni_from_cri(&info);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("cni plugin not initialized") && !check.mend.is_empty());
    }

    #[test]
    fn both_generations_of_containerds_file_are_read() {
        for (plugin, dir) in [
            ("io.containerd.grpc.v1.cri", "/nonexistent/1"),
            ("io.containerd.cri.v1.runtime", "/nonexistent/2"),
        ] {
            let text = format!(
                "[plugins.\"{plugin}\".cni]\nconf_dir = \"{dir}\"\n\
                 [plugins.\"{plugin}\".containerd.runtimes.vm]\n\
                 runtime_type = \"io.containerd.dyad.v2\"\npod_annotations = [\"dyad.dev/*\"]\n\
                 [plugins.\"{plugin}\".containerd.runtimes.vm.options]\nConfigPath = \"/c\"\n"
            );
            let (found, checks) = from_dump(text.as_bytes());
            let expected = Handler {
                name: "vm".into(),
                config: Source::Path("/c".into()),
                passes_annotations: true,
            };
            assert_eq!(found.unwrap().handlers, [expected]);
            assert!(checks[2].found.contains(dir), "{checks:?}");
        }
    }

    #[test]
    fn no_handler_of_ours_and_no_answer_at_all_are_failures() {
        let (found, checks) = from_cri(b"{}", "/nonexistent");
        assert!(found.unwrap().handlers.is_empty());
        assert_eq!(checks[1].status, Status::Fail);
        assert_eq!(
            from_cri(b"no json", "/nonexistent").1[0].status,
            Status::Fail
        );
        assert_eq!(from_dump(b"no = toml =").1[0].status, Status::Fail);
    }

    #[test]
    fn a_handler_may_name_the_executable_itself() {
        let table = serde_json::json!({
            "a": {"runtime_type": "/opt/bin/containerd-shim-dyad-v2"},
            "b": {"runtimeType": "io.containerd.other.v2", "runtimePath": "/x/containerd-shim-dyad-v2"},
            "c": {"runtimeType": "io.containerd.runc.v2"},
        });
        let names: Vec<_> = handlers(&table)
            .into_iter()
            .map(|handler| handler.name)
            .collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(handlers(&table)[0].config, Source::Default);
    }
}
