//! Which OCI runtime runs this host's containers.
//!
//! The configured one; else the first of [`CANDIDATES`] on `PATH` whose `features`
//! (OCI runtime-spec, features.md) say that it can. Debian 12's crun 1.8.1, for one,
//! has no `features`, and refuses containerd 2.x specs and hybrid cgroups.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dyad_linux::cgroup::Hierarchies;
use dyad_linux::files::{PRIVATE, write_atomically};
use dyad_linux::reaper::Reaper;
use dyad_runtime_handler::check::Check;
use dyad_runtime_handler::config::ContainerConfig;
use dyad_runtime_handler::error::{Context as _, Error, Result};
use serde::{Deserialize, Serialize};

use crate::migration;
use crate::runtime;

/// Looked for in this order.
const CANDIDATES: [&str; 2] = ["crun", "runc"];
const MEND: &str = "install runc, or name an OCI runtime by container.runtime in the configuration";
/// containerd 2.3 writes this into its specs; what `check` asks for.
const SPEC_VERSION: &str = "1.3.0";
/// How long `check` lets a runtime think.
const CHECK_BOUND: Duration = Duration::from_secs(5);

/// What the host and its specs ask of a runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Need {
    /// `ociVersion` of the specs.
    pub spec_version: String,
    /// The host has v1 controllers.
    pub cgroup_v1: bool,
    /// It has v2 controllers beside v1's.
    pub hybrid: bool,
}

impl Need {
    pub(crate) fn new(spec_version: &str, hierarchies: &Hierarchies) -> Self {
        let cgroup_v1 = hierarchies.is_v1();
        let v2_controllers = hierarchies
            .unified()
            .and_then(|dir| fs::read_to_string(dir.join("cgroup.controllers")).ok())
            .is_some_and(|controllers| !controllers.trim().is_empty());
        Self {
            spec_version: spec_version.to_owned(),
            cgroup_v1,
            hybrid: cgroup_v1 && v2_controllers,
        }
    }
}

/// The part of a runtime's `features` that matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Features {
    oci_version_min: String,
    oci_version_max: String,
    #[serde(default)]
    linux: Linux,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default)]
    cgroup: CgroupSupport,
}

#[derive(Debug, Default, Deserialize)]
struct CgroupSupport {
    v1: Option<bool>,
    v2: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Serves,
    /// It does not know the specs' version, but reads any of its major version.
    ServesNewer,
    No(String),
}

/// Finds the runtime for `need`.
///
/// `cache` remembers an answer over processes, one of which serves each pod.
///
/// # Errors
/// `FailedPrecondition`, which names what was looked for and why each did not serve.
pub(crate) async fn choose(
    config: &ContainerConfig,
    need: &Need,
    cache: &Path,
    reaper: &Arc<Reaper>,
) -> Result<PathBuf> {
    if let Some(configured) = &config.runtime {
        return find_configured(configured);
    }
    if let Some(known) = Remembered::read(cache, need) {
        return Ok(known);
    }
    let mut candidates = Vec::new();
    for (name, found) in candidates_on_path() {
        let verdict = match &found {
            None => Verdict::No("not on PATH".into()),
            Some(binary) => match runtime::features(reaper, binary).await {
                Ok(text) => judge(name, &text, need),
                Err(error) => Verdict::No(error.to_string()),
            },
        };
        let serves = verdict == Verdict::Serves;
        candidates.push((name, found, verdict));
        if serves {
            break;
        }
    }
    let binary = best(candidates)?;
    // It is found again next time if this cannot be written.
    if let Err(error) = Remembered::write(cache, need, &binary) {
        log::debug!("{}", error.chain());
    }
    Ok(binary)
}

/// Whether the OCI runtime that is configured can checkpoint, as far as its name tells:
/// crun leaves the stdio of what it restores to its caller, which is not done here.
///
/// # Errors
/// `FailedPrecondition`.
pub(crate) fn checkpoints(config: &ContainerConfig) -> Result<()> {
    match &config.runtime {
        Some(runtime) if runtime.file_name().is_some_and(|name| name == "crun") => {
            Err(Error::FailedPrecondition(format!(
                "cannot migrate: the OCI runtime {} is not used for checkpoints: name runc by container.runtime",
                runtime.display()
            )))
        }
        _ => Ok(()),
    }
}

/// The OCI runtime for [`Check`]'s report. Must not be called in a process that has a
/// [`Reaper`].
pub fn check(config: &ContainerConfig) -> Vec<Check> {
    let runtime = match checked(config) {
        Ok(found) => Check::ok("oci runtime", found),
        Err(error) => Check::fail("oci runtime", error.chain(), MEND),
    };
    vec![runtime, migration::check(config)]
}

/// The `features` document (JSON) of the OCI runtime that serves this host; `None` for
/// one that has no such document. Must not be called in a process that has a [`Reaper`].
///
/// # Errors
/// `FailedPrecondition` as for the creation of a container.
pub fn features(config: &ContainerConfig) -> Result<Option<String>> {
    if let Some(configured) = &config.runtime {
        let binary = find_configured(configured)?;
        return Ok(runtime::features_here(&binary, CHECK_BOUND).ok());
    }
    let need = Need::new(SPEC_VERSION, &Hierarchies::of_host()?);
    let mut documents = Vec::new();
    let mut candidates = Vec::new();
    for (name, found) in candidates_on_path() {
        let verdict = match &found {
            None => Verdict::No("not on PATH".into()),
            Some(binary) => match runtime::features_here(binary, CHECK_BOUND) {
                Ok(text) => {
                    let verdict = judge(name, &text, &need);
                    documents.push((binary.clone(), text));
                    verdict
                }
                Err(error) => Verdict::No(error.to_string()),
            },
        };
        candidates.push((name, found, verdict));
    }
    let chosen = best(candidates)?;
    let document = documents.into_iter().find(|(binary, _)| *binary == chosen);
    Ok(document.map(|(_, text)| text))
}

fn checked(config: &ContainerConfig) -> Result<String> {
    let need = Need::new(SPEC_VERSION, &Hierarchies::of_host()?);
    let mut candidates = Vec::new();
    match &config.runtime {
        Some(configured) => {
            // What is configured is used, whatever its features.
            let binary = find_configured(configured)?;
            candidates.push(("configured", Some(binary), Verdict::Serves));
        }
        None => {
            for (name, found) in candidates_on_path() {
                let verdict = match &found {
                    None => Verdict::No("not on PATH".into()),
                    Some(binary) => match runtime::features_here(binary, CHECK_BOUND) {
                        Ok(text) => judge(name, &text, &need),
                        Err(error) => Verdict::No(error.to_string()),
                    },
                };
                candidates.push((name, found, verdict));
            }
        }
    }
    let passed_over: Vec<String> = candidates
        .iter()
        .filter_map(|(name, _, verdict)| match verdict {
            Verdict::No(reason) => Some(format!("{name}: {reason}")),
            _ => None,
        })
        .collect();
    let binary = best(candidates)?;
    let features = runtime::features_here(&binary, CHECK_BOUND).ok();
    let version = features
        .and_then(|text| serde_json::from_str::<Features>(&text).ok())
        .map(|features| format!(", OCI {}", features.oci_version_max))
        .unwrap_or_default();
    let mut found = format!("{}{version}", binary.display());
    if !passed_over.is_empty() {
        found.push_str(&format!(" (not {})", passed_over.join("; ")));
    }
    Ok(found)
}

fn best(candidates: Vec<(&str, Option<PathBuf>, Verdict)>) -> Result<PathBuf> {
    let mut newer = None;
    let mut reasons = Vec::new();
    for (name, found, verdict) in candidates {
        match (verdict, found) {
            (Verdict::Serves, Some(binary)) => return Ok(binary),
            (Verdict::ServesNewer, Some(binary)) => newer = newer.or(Some(binary)),
            (Verdict::No(reason), _) => reasons.push(format!("{name}: {reason}")),
            (_, None) => {}
        }
    }
    newer.ok_or_else(|| {
        Error::FailedPrecondition(format!(
            "no OCI runtime serves this host: {}; {MEND}",
            reasons.join("; ")
        ))
    })
}

/// Whether the runtime called `name`, whose `features` are `text`, can do what is needed.
fn judge(name: &str, text: &str, need: &Need) -> Verdict {
    let features: Features = match serde_json::from_str(text) {
        Ok(features) => features,
        Err(error) => return Verdict::No(format!("cannot understand its features: {error}")),
    };
    let (supported, version) = if need.cgroup_v1 {
        (features.linux.cgroup.v1, "v1")
    } else {
        (features.linux.cgroup.v2, "v2")
    };
    if supported != Some(true) {
        return Verdict::No(format!(
            "does not support cgroup {version}, which this host has"
        ));
    }
    let is_runc = features
        .annotations
        .contains_key("org.opencontainers.runc.version");
    if need.hybrid && !is_runc {
        // crun: "cgroups in hybrid mode not supported, drop all controllers from cgroup v2".
        return Verdict::No(format!(
            "{name} does not support hybrid cgroups, which this host has"
        ));
    }
    let (Some(spec), Some(min), Some(max)) = (
        version_of(&need.spec_version),
        version_of(&features.oci_version_min),
        version_of(&features.oci_version_max),
    ) else {
        return Verdict::No(format!(
            "cannot compare the specs' version {:?} with {:?} to {:?}",
            need.spec_version, features.oci_version_min, features.oci_version_max
        ));
    };
    if min <= spec && spec <= max {
        Verdict::Serves
    } else if is_runc && spec.0 == max.0 {
        // Seen with runc 1.1.5 (up to 1.0.2-dev) and containerd 2.3's specs (1.3.0).
        Verdict::ServesNewer
    } else {
        Verdict::No(format!(
            "serves OCI specs {} to {}, not {}",
            features.oci_version_min, features.oci_version_max, need.spec_version
        ))
    }
}

/// `1.2.0-rc.1+dev` as (1, 2, 0).
fn version_of(text: &str) -> Option<(u64, u64, u64)> {
    let numbers = text.split(['-', '+']).next()?;
    let mut parts = numbers.split('.').map(|part| part.parse::<u64>().ok());
    let version = (parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(version)
}

fn find_configured(configured: &Path) -> Result<PathBuf> {
    let found = if configured.is_absolute() {
        Some(configured.to_owned()).filter(|path| is_executable(path))
    } else {
        find_on_path(configured)
    };
    found.ok_or_else(|| {
        Error::FailedPrecondition(format!(
            "container.runtime {:?} in the configuration: no such executable; {MEND}",
            configured
        ))
    })
}

fn candidates_on_path() -> impl Iterator<Item = (&'static str, Option<PathBuf>)> {
    CANDIDATES
        .into_iter()
        .map(|name| (name, find_on_path(Path::new(name))))
}

fn find_on_path(name: &Path) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// An answer from before, good for as long as nothing that it came from changed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    binary: PathBuf,
    inode: u64,
    mtime_ns: i64,
    size: u64,
    search_path: String,
    spec_version: String,
    cgroup_v1: bool,
    hybrid: bool,
}

impl Remembered {
    fn new(binary: PathBuf, need: &Need) -> io::Result<Self> {
        let meta = fs::metadata(&binary)?;
        Ok(Self {
            inode: meta.ino(),
            mtime_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            size: meta.size(),
            search_path: env::var("PATH").unwrap_or_default(),
            binary,
            spec_version: need.spec_version.clone(),
            cgroup_v1: need.cgroup_v1,
            hybrid: need.hybrid,
        })
    }

    fn read(file: &Path, need: &Need) -> Option<PathBuf> {
        let known: Self = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        let now = Self::new(known.binary.clone(), need).ok()?;
        (now == known).then_some(known.binary)
    }

    fn write(file: &Path, need: &Need, binary: &Path) -> Result<()> {
        let what = || format!("remember {}", binary.display());
        let remembered = Self::new(binary.to_owned(), need).context(what)?;
        let text = serde_json::to_vec(&remembered).context(what)?;
        // Shims of several pods may write it at once; none may read a half.
        write_atomically(file, &text, PRIVATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(spec_version: &str) -> Need {
        Need {
            spec_version: spec_version.into(),
            cgroup_v1: false,
            hybrid: false,
        }
    }

    fn features(min: &str, max: &str, runc: bool) -> String {
        let annotations = if runc {
            r#""org.opencontainers.runc.version":"1.1.5""#
        } else {
            r#""run.oci.crun.version":"1.14""#
        };
        format!(
            r#"{{"ociVersionMin":"{min}","ociVersionMax":"{max}","hooks":[],
               "linux":{{"cgroup":{{"v1":true,"v2":true}}}},"annotations":{{{annotations}}}}}"#
        )
    }

    #[test]
    fn a_runtime_serves_the_spec_versions_it_names() {
        for (version, serves) in [
            ("1.0.0", true),
            ("1.1.0", true),
            ("1.2.0-rc.1", true),
            ("1.3.0", false),
        ] {
            let verdict = judge("crun", &features("1.0.0", "1.2.1", false), &need(version));
            assert_eq!(verdict == Verdict::Serves, serves, "{version}: {verdict:?}");
        }
    }

    #[test]
    fn runc_reads_newer_specs_of_its_major_version() {
        let text = features("1.0.0", "1.0.2-dev", true);
        assert_eq!(judge("runc", &text, &need("1.3.0")), Verdict::ServesNewer);
        assert!(matches!(
            judge("runc", &text, &need("2.0.0")),
            Verdict::No(_)
        ));
    }

    #[test]
    fn the_hosts_cgroups_decide() {
        let v1_only = r#"{"ociVersionMin":"1.0.0","ociVersionMax":"1.2.0","linux":{"cgroup":{"v1":true,"v2":false}}}"#;
        assert!(matches!(
            judge("x", v1_only, &need("1.0.0")),
            Verdict::No(_)
        ));
        let v1 = Need {
            cgroup_v1: true,
            ..need("1.0.0")
        };
        assert_eq!(judge("x", v1_only, &v1), Verdict::Serves);
        let hybrid = Need { hybrid: true, ..v1 };
        let crun = features("1.0.0", "1.2.0", false);
        assert!(matches!(judge("crun", &crun, &hybrid), Verdict::No(_)));
        let runc = features("1.0.0", "1.2.0", true);
        assert_eq!(judge("runc", &runc, &hybrid), Verdict::Serves);
    }

    #[test]
    fn garbage_is_no_runtime() {
        for text in [
            "",
            "unknown command",
            "{}",
            r#"{"ociVersionMin":"a","ociVersionMax":"1.0","linux":{"cgroup":{"v2":true}}}"#,
        ] {
            assert!(
                matches!(judge("x", text, &need("1.0.0")), Verdict::No(_)),
                "{text}"
            );
        }
        let text = features("1.0.0", "1.2.0", true);
        for version in ["", "1", "1.2", "1.2.x", "1.2.3.4"] {
            assert!(
                matches!(judge("runc", &text, &need(version)), Verdict::No(_)),
                "{version}"
            );
        }
    }

    #[test]
    fn one_that_knows_the_version_is_better_than_one_that_copes() {
        let chosen = best(vec![
            ("crun", Some("/crun".into()), Verdict::No("too old".into())),
            ("runc", Some("/runc-old".into()), Verdict::ServesNewer),
            ("runc", Some("/runc".into()), Verdict::Serves),
        ]);
        assert_eq!(chosen.unwrap(), Path::new("/runc"));
    }

    #[test]
    fn the_error_names_what_was_looked_for_and_why_it_did_not_serve() {
        let error = best(vec![
            ("crun", Some("/crun".into()), Verdict::No("too old".into())),
            ("runc", None, Verdict::No("not on PATH".into())),
        ])
        .unwrap_err()
        .to_string();
        for part in ["crun: too old", "runc: not on PATH", "container.runtime"] {
            assert!(error.contains(part), "{error}");
        }
        let error = find_configured(Path::new("/no/runc")).unwrap_err();
        assert!(error.to_string().contains("/no/runc"), "{error}");
    }

    #[test]
    fn an_answer_is_remembered_until_the_binary_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, binary) = (dir.path().join("choice.json"), dir.path().join("runc"));
        fs::write(&binary, "one").unwrap();
        assert_eq!(Remembered::read(&cache, &need("1.0.0")), None);
        Remembered::write(&cache, &need("1.0.0"), &binary).unwrap();
        assert_eq!(
            Remembered::read(&cache, &need("1.0.0")),
            Some(binary.clone())
        );
        assert_eq!(Remembered::read(&cache, &need("1.3.0")), None);
        fs::write(&binary, "another").unwrap();
        assert_eq!(Remembered::read(&cache, &need("1.0.0")), None);
        fs::write(&cache, "{\"binary\":").unwrap();
        assert_eq!(Remembered::read(&cache, &need("1.0.0")), None);
    }
}
