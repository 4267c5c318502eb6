//! The configuration: read raw, checked key by key, then made meaningful.
//!
//! It comes from one of three places, in this order: the file that the handler's
//! runtime options name (`ConfigPath`), the body of those options, or
//! `/etc/dyad/config.toml` with `/etc/dyad/config.d/*.toml` merged over it in the
//! order of their names. An unknown key is an error that names the file and the
//! nearest known key.

mod annotations;
#[cfg(test)]
mod documented;
mod fields;

use std::path::{Path, PathBuf};

use dyad_runtime_handler::config::{ContainerConfig, Kind, MachineConfig};
use dyad_runtime_handler::{Error, Result};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use annotations::PREFIX as ANNOTATION_PREFIX;

/// Read where the runtime options name no other file.
pub const DEFAULT_FILE: &str = "/etc/dyad/config.toml";
/// Merged over [`DEFAULT_FILE`].
pub const DEFAULT_DROP_INS: &str = "/etc/dyad/config.d";

/// Keys of containerd's own `[options]` table, which the body repeats.
const OPTIONS_KEYS: [&str; 3] = ["TypeUrl", "ConfigPath", "ConfigBody"];

/// Where a configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Source {
    /// [`DEFAULT_FILE`] and its drop-ins; missing files are empty ones.
    #[default]
    Default,
    /// This file, which must exist.
    Path(PathBuf),
    /// This TOML text.
    Body(String),
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Actions that failed.
    Error,
    /// And what we recovered from.
    Warn,
    /// And changes of state.
    #[default]
    Info,
    /// And what a developer wants to know.
    Debug,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
        }
    }
}

/// Section `[annotations]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnnotationsConfig {
    /// The `dyad.dev/*` annotations that a pod may set, by exact name.
    pub allow: Vec<String>,
}

/// The effective configuration of a handler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What runs a pod.
    pub kind: Kind,
    /// Sandbox records and sockets; lost on reboot.
    pub state_dir: PathBuf,
    /// Converted images, machine disks, probe results; kept.
    pub cache_dir: PathBuf,
    /// How much is logged.
    pub log_level: LogLevel,
    /// The container kind.
    pub container: ContainerConfig,
    /// The machine kind.
    pub machine: MachineConfig,
    /// What pods may override.
    pub annotations: AnnotationsConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kind: Kind::default(),
            state_dir: "/run/dyad".into(),
            cache_dir: "/var/lib/dyad".into(),
            log_level: LogLevel::default(),
            container: ContainerConfig::default(),
            machine: MachineConfig::default(),
            annotations: AnnotationsConfig::default(),
        }
    }
}

impl Config {
    /// Reads, merges and checks the configuration at `source`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and the key: a file that cannot be read or
    /// is not TOML, an unknown key, a value of the wrong type or out of range.
    pub fn load(source: &Source) -> Result<Self> {
        let mut merged = Table::new();
        match source {
            Source::Default => {
                for file in default_files()? {
                    merge(&mut merged, read_file(&file)?);
                }
            }
            Source::Path(path) => merged = read_file(path)?,
            Source::Body(text) => {
                let mut table = parse(text, "the runtime options")?;
                for key in OPTIONS_KEYS {
                    table.remove(key);
                }
                check(&table, "the runtime options")?;
                merged = table;
            }
        }
        let config: Self = merged
            .try_into()
            .map_err(|error| invalid(format!("configuration: {error}")))?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        for (key, dir) in [
            ("state_dir", &self.state_dir),
            ("cache_dir", &self.cache_dir),
        ] {
            if !dir.is_absolute() {
                return Err(invalid(format!(
                    "configuration: {key} = {dir:?} must be an absolute path"
                )));
            }
        }
        for name in &self.annotations.allow {
            annotations::check_known(name)
                .map_err(|error| invalid(format!("configuration: annotations.allow: {error}")))?;
        }
        Ok(())
    }
}

/// The files that are read for `source`, in the order in which they are merged.
///
/// # Errors
/// `InvalidArgument` where the folder of drop-ins cannot be listed.
pub fn files(source: &Source) -> Result<Vec<PathBuf>> {
    match source {
        Source::Default => default_files(),
        Source::Path(path) => Ok(vec![path.clone()]),
        Source::Body(_) => Ok(Vec::new()),
    }
}

fn default_files() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if Path::new(DEFAULT_FILE).exists() {
        files.push(DEFAULT_FILE.into());
    }
    match std::fs::read_dir(DEFAULT_DROP_INS) {
        Ok(entries) => {
            let mut drop_ins: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|ext| ext == "toml"))
                .collect();
            drop_ins.sort();
            files.append(&mut drop_ins);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(invalid(format!("read {DEFAULT_DROP_INS}: {error}"))),
    }
    Ok(files)
}

fn read_file(path: &Path) -> Result<Table> {
    let place = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|error| invalid(format!("read configuration {place}: {error}")))?;
    let table = parse(&text, &place)?;
    check(&table, &place)?;
    Ok(table)
}

fn parse(text: &str, place: &str) -> Result<Table> {
    text.parse()
        .map_err(|error| invalid(format!("{place}: {error}")))
}

/// Unknown keys by name first, then types, so that both errors name the file.
fn check(table: &Table, place: &str) -> Result<()> {
    for (key, value) in table {
        known(key, "", fields::of::<Config>(), place)?;
        let section = match key.as_str() {
            "container" => fields::of::<ContainerConfig>(),
            "machine" => fields::of::<MachineConfig>(),
            "annotations" => fields::of::<AnnotationsConfig>(),
            _ => continue,
        };
        if let Value::Table(inner) = value {
            for inner_key in inner.keys() {
                known(inner_key, key, section, place)?;
            }
        }
    }
    Config::deserialize(Value::Table(table.clone()))
        .map(drop)
        .map_err(|error| invalid(format!("{place}: {}", error.to_string().trim_end())))
}

fn known(key: &str, section: &str, fields: &[&str], place: &str) -> Result<()> {
    if fields.contains(&key) {
        return Ok(());
    }
    let full = |name: &str| match section {
        "" => name.to_owned(),
        section => format!("{section}.{name}"),
    };
    let hint = match nearest(key, fields.iter().copied()) {
        Some(name) => format!("did you mean {}?", full(name)),
        None => format!("known keys: {}", fields.join(", ")),
    };
    Err(invalid(format!(
        "{place}: unknown key {}; {hint}",
        full(key)
    )))
}

/// The candidate that `word` was probably meant to be.
fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Tables merge key by key; anything else replaces what was there.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn invalid(text: String) -> Error {
    Error::InvalidArgument(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> Result<Config> {
        Config::load(&Source::Body(text.into()))
    }

    #[test]
    fn the_example_of_every_section_is_read() {
        let config = body(
            r#"
            kind = "machine"
            state_dir = "/tmp/d/run"
            log_level = "debug"
            [container]
            runtime = "/usr/bin/crun"
            [machine]
            vcpus = 2
            accelerator = "tcg"
            channel = "virtio-serial"
            [annotations]
            allow = ["dyad.dev/vcpus"]
            "#,
        )
        .unwrap();
        assert_eq!(config.kind, Kind::Machine);
        assert_eq!(config.machine.vcpus, 2);
        assert_eq!(
            config.machine.memory_mib,
            MachineConfig::default().memory_mib
        );
        assert_eq!(config.container.runtime, Some("/usr/bin/crun".into()));
        assert_eq!(config.annotations.allow, ["dyad.dev/vcpus"]);
    }

    #[test]
    fn containerds_own_keys_in_the_body_are_passed_over() {
        assert_eq!(
            body("TypeUrl = \"x\"\nConfigPath = \"\"\nkind = \"machine\"")
                .unwrap()
                .kind,
            Kind::Machine
        );
        assert_eq!(body("").unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_is_named_with_the_way_out() {
        for (text, parts) in [
            (
                "knd = \"machine\"",
                &["unknown key knd", "did you mean kind?"][..],
            ),
            (
                "[machine]\nmemory_mb = 3",
                &["machine.memory_mb", "machine.memory_mib?"],
            ),
            (
                "[container]\nruntim = \"x\"",
                &["container.runtim", "container.runtime?"],
            ),
            ("[zzz]\na = 1", &["unknown key zzz", "known keys: kind"]),
            (
                "kind = \"vm\"",
                &["the runtime options", "unknown variant", "machine"],
            ),
            (
                "[machine]\nvcpus = \"two\"",
                &["the runtime options", "invalid type"],
            ),
            ("kind = ", &["the runtime options", "line 1"]),
            ("state_dir = \"run\"", &["state_dir", "absolute"]),
            (
                "[annotations]\nallow = [\"dyad.dev/vcpu\"]",
                &["dyad.dev/vcpu", "dyad.dev/vcpus"],
            ),
        ] {
            let error = body(text).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{text:?}: {error:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn a_file_that_is_named_must_exist() {
        let error = Config::load(&Source::Path("/nonexistent/d.toml".into())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/d.toml"), "{error}");
    }

    #[test]
    fn later_files_win_key_by_key() {
        let mut first: Table = "kind = \"machine\"\n[machine]\nvcpus = 1\nmemory_mib = 512"
            .parse()
            .unwrap();
        merge(&mut first, "[machine]\nvcpus = 4".parse().unwrap());
        let config: Config = first.try_into().unwrap();
        assert_eq!((config.machine.vcpus, config.machine.memory_mib), (4, 512));
        assert_eq!(config.kind, Kind::Machine);
    }

    #[test]
    fn a_configuration_survives_json() {
        let config = body("[container]\nruntime = \"/r\"").unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
    }
}
