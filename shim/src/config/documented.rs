//! docs/configuration.md names every key with its default.

use dyad_runtime_handler::config::{ContainerConfig, MachineConfig, annotation};
use toml::{Table, Value};

use super::{AnnotationsConfig, Config, fields};

const PAGE: &str = include_str!("../../../docs/configuration.md");

/// The keys of the table with what stands in its column "default".
fn documented() -> Vec<(String, String)> {
    let rows = PAGE.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.splitn(3, " | ");
        let key = cells.next()?.strip_suffix('`')?;
        Some((key.to_owned(), cells.next()?.to_owned()))
    });
    rows.filter(|(key, _)| !key.contains(['/', ' '])).collect()
}

fn keys() -> Vec<String> {
    let sections = [
        ("container", fields::of::<ContainerConfig>()),
        ("machine", fields::of::<MachineConfig>()),
        ("annotations", fields::of::<AnnotationsConfig>()),
    ];
    let mut keys = Vec::new();
    for field in fields::of::<Config>() {
        match sections.iter().find(|(section, _)| section == field) {
            Some((section, inner)) => {
                keys.extend(inner.iter().map(|key| format!("{section}.{key}")));
            }
            None => keys.push((*field).to_owned()),
        }
    }
    keys
}

#[test]
fn the_page_names_every_key_and_no_other() {
    let mut documented: Vec<String> = documented().into_iter().map(|(key, _)| key).collect();
    let mut keys = keys();
    documented.sort();
    keys.sort();
    assert_eq!(documented, keys);
}

#[test]
fn the_page_names_the_defaults() {
    let defaults = Table::try_from(Config::default()).unwrap();
    for (key, documented) in documented() {
        let value = key
            .split('.')
            .try_fold(&Value::Table(defaults.clone()), |at, part| at.get(part))
            .cloned();
        // A key without a default says in words what holds instead.
        let Some(value) = value else { continue };
        let plain = match &value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let written = documented.trim_matches('`').trim_matches('"');
        assert_eq!(written, plain, "default of {key}");
    }
}

#[test]
fn the_page_names_every_annotation() {
    for name in annotation::ALL {
        assert!(
            PAGE.contains(&format!("| `{name}` |")),
            "docs/configuration.md lacks a row for {name}"
        );
    }
}
