//! The effective configuration, and where each value comes from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dyad_shim::config::{Config, Source, files};
use serde_json::Value;

use crate::args::Options;
use crate::error::{Error, Result};

/// Where `options` say that the configuration is.
pub fn source(options: &Options) -> Source {
    options.config.clone().map_or(Source::Default, Source::Path)
}

/// Reads the configuration at `source`.
///
/// # Errors
/// [`Error::Failed`], with the file and the key.
pub fn load(source: &Source) -> Result<Config> {
    Config::load(source).map_err(|error| Error::Failed {
        context: error.chain(),
        source: None,
    })
}

/// Where shims keep their sockets. The configuration is read only where the command line
/// and the environment do not say it.
///
/// # Errors
/// As [`load`].
pub fn state_dir(options: &Options) -> Result<PathBuf> {
    match &options.state_dir {
        Some(dir) => Ok(dir.clone()),
        None => Ok(load(&source(options))?.state_dir),
    }
}

/// One value of the effective configuration.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Origin {
    /// `machine.vcpus`
    pub key: String,
    /// The value; null where it is unset.
    pub value: Value,
    /// The file, `default`, or `command line`.
    pub from: String,
}

/// Every value with its origin, by key.
///
/// # Errors
/// As [`load`].
pub fn origins(options: &Options) -> Result<Vec<Origin>> {
    let source = source(options);
    let config = load(&source)?;
    let mut from = BTreeMap::new();
    let failed = |error: dyad_runtime_handler::Error| Error::Failed {
        context: error.chain(),
        source: None,
    };
    for file in files(&source).map_err(failed)? {
        let context = || format!("read configuration {}", file.display());
        let text =
            std::fs::read_to_string(&file).map_err(|error| Error::failed(context(), error))?;
        let table: toml::Table = text
            .parse()
            .map_err(|error| Error::failed(context(), error))?;
        let table = serde_json::to_value(table).map_err(|error| Error::failed(context(), error))?;
        for (key, _) in leaves(table) {
            // A later file has the last word.
            from.insert(key, file.display().to_string());
        }
    }
    let config = serde_json::to_value(&config)
        .map_err(|error| Error::failed("print the configuration", error))?;
    let mut origins: Vec<Origin> = leaves(config)
        .into_iter()
        .map(|(key, value)| Origin {
            from: from.remove(&key).unwrap_or_else(|| "default".to_owned()),
            key,
            value,
        })
        .collect();
    if let Some(dir) = &options.state_dir {
        for origin in origins
            .iter_mut()
            .filter(|origin| origin.key == "state_dir")
        {
            origin.value = dir.display().to_string().into();
            origin.from = "--state-dir or DYAD_STATE_DIR (dyadctl only)".to_owned();
        }
    }
    Ok(origins)
}

/// The values that are no tables, by their dotted keys.
fn leaves(value: Value) -> Vec<(String, Value)> {
    fn walk(prefix: &str, value: Value, into: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let key = if prefix.is_empty() {
                        key
                    } else {
                        format!("{prefix}.{key}")
                    };
                    walk(&key, value, into);
                }
            }
            value => into.push((prefix.to_owned(), value)),
        }
    }
    let mut found = Vec::new();
    walk("", value, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;

    fn options(arguments: &[&str]) -> Options {
        let line = ["dyadctl", "config"].iter().chain(arguments);
        Cli::try_parse_from(line).unwrap().options
    }

    #[test]
    fn every_value_is_there_with_its_origin() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dyad.toml");
        std::fs::write(&file, "kind = \"machine\"\n[machine]\nvcpus = 3\n").unwrap();
        let file = file.to_str().unwrap();
        let origins = origins(&options(&["--config", file])).unwrap();
        let of = |key: &str| {
            let origin = origins.iter().find(|origin| origin.key == key).unwrap();
            (origin.value.to_string(), origin.from.clone())
        };
        assert_eq!(of("kind"), ("\"machine\"".into(), file.into()));
        assert_eq!(of("machine.vcpus"), ("3".into(), file.into()));
        assert_eq!(of("machine.memory_mib").1, "default");
        assert_eq!(of("container.runtime"), ("null".into(), "default".into()));
        assert_eq!(of("annotations.allow"), ("[]".into(), "default".into()));
    }

    #[test]
    fn the_state_dir_of_the_command_line_wins_and_needs_no_configuration() {
        let options = options(&["--state-dir", "/tmp/x", "--config", "/nonexistent"]);
        assert_eq!(state_dir(&options).unwrap(), PathBuf::from("/tmp/x"));
    }

    #[test]
    fn a_bad_configuration_is_named() {
        let error = state_dir(&options(&["--config", "/nonexistent/d.toml"])).unwrap_err();
        assert!(
            error.chain().contains("/nonexistent/d.toml"),
            "{}",
            error.chain()
        );
    }
}
