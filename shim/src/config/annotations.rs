//! `dyad.dev/*` annotations: exact names, allow-listed, fail closed.

use std::collections::{BTreeMap, HashMap};

use dyad_runtime_handler::config::annotation;
use dyad_runtime_handler::{Error, Result};

use super::{Config, invalid, nearest};

/// The domain of our annotations.
pub const PREFIX: &str = "dyad.dev/";

/// # Errors
/// `InvalidArgument` with the nearest name, where `name` is no annotation of ours.
pub(super) fn check_known(name: &str) -> Result<()> {
    if annotation::ALL.contains(&name) {
        return Ok(());
    }
    Err(invalid(match nearest(name, annotation::ALL.into_iter()) {
        Some(near) => format!("unknown annotation {name}; did you mean {near}?"),
        None => format!(
            "unknown annotation {name}; known: {}",
            annotation::ALL.join(", ")
        ),
    }))
}

impl Config {
    /// Those of `annotations` that are ours.
    ///
    /// # Errors
    /// `InvalidArgument` naming one that is unknown or not allowed here.
    pub fn pod_annotations(
        &self,
        annotations: &HashMap<String, String>,
    ) -> Result<BTreeMap<String, String>> {
        let ours: BTreeMap<_, _> = annotations
            .iter()
            .filter(|(name, _)| name.starts_with(PREFIX))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        for name in ours.keys() {
            check_known(name)?;
            if !self.annotations.allow.contains(name) {
                return Err(Error::InvalidArgument(format!(
                    "annotation {name} is not allowed: add it to annotations.allow in the \
                     configuration of this runtime handler"
                )));
            }
        }
        Ok(ours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_allowed(names: &[&str]) -> Config {
        let mut config = Config::default();
        config.annotations.allow = names.iter().map(ToString::to_string).collect();
        config
    }

    fn annotations(names: &[&str]) -> HashMap<String, String> {
        names
            .iter()
            .map(|name| ((*name).to_owned(), "1".to_owned()))
            .collect()
    }

    #[test]
    fn allowed_ones_pass_and_foreign_ones_are_not_ours() {
        let ours = with_allowed(&["dyad.dev/vcpus"])
            .pod_annotations(&annotations(&["dyad.dev/vcpus", "io.kubernetes.cri.x"]))
            .unwrap();
        assert_eq!(ours.keys().collect::<Vec<_>>(), ["dyad.dev/vcpus"]);
    }

    #[test]
    fn the_rest_is_refused_by_name() {
        let config = with_allowed(&[]);
        for (name, text) in [
            ("dyad.dev/vcpus", "dyad.dev/vcpus is not allowed"),
            ("dyad.dev/vcpu", "did you mean dyad.dev/vcpus?"),
            ("dyad.dev/Vcpus", "unknown annotation dyad.dev/Vcpus"),
        ] {
            let error = config.pod_annotations(&annotations(&[name])).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
