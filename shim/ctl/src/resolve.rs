//! From what people type to one pod, or one container of it. Pure.
//!
//! A word names a pod by its name, its uid, its sandbox id, or the id of one of its
//! containers; a whole one before the beginning of one. What is left ambiguous is an
//! error that lists the candidates. Kubelet keeps finished sandboxes and containers of a
//! pod beside the present ones: those that are over give way to one that is not.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::model::{Pod, Task, short};

/// `POD` or `POD/CONTAINER`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// Names the pod.
    pub pod: String,
    /// Names a container in it.
    pub container: Option<String>,
}

impl FromStr for Word {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = match text.split_once('/') {
            Some((pod, container)) => Self {
                pod: pod.into(),
                container: Some(container.into()),
            },
            None => Self {
                pod: text.into(),
                container: None,
            },
        };
        let empty_part = word.pod.is_empty() || word.container.as_deref() == Some("");
        if empty_part || text.matches('/').count() > 1 {
            return Err("write POD or POD/CONTAINER (a Kubernetes namespace goes into -n)".into());
        }
        Ok(word)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.container {
            Some(container) => write!(f, "{}/{container}", self.pod),
            None => f.write_str(&self.pod),
        }
    }
}

/// A shim that gave no answer: all that is known of its pod.
#[derive(Debug, Clone)]
pub struct Silent {
    /// The sandbox id.
    pub sandbox_id: String,
    /// Why it is silent, in one line.
    pub reason: String,
}

/// What a word names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container, where the word names one and not the whole pod.
    pub container: Option<&'a Task>,
}

impl Named<'_> {
    /// What a request calls it: empty for the whole pod.
    pub fn container_id(&self) -> &str {
        self.container.map_or("", |task| &task.container_id)
    }

    /// `namespace/pod` or `namespace/pod/container`.
    pub fn label(&self) -> String {
        match self.container {
            Some(task) => format!("{}/{}", self.pod.label(), task.label()),
            None => self.pod.label(),
        }
    }

    /// For telling candidates apart.
    fn describe(&self) -> String {
        match self.container {
            Some(task) => format!("{} (container {})", self.label(), short(&task.container_id)),
            None => format!("{} (sandbox {})", self.label(), short(&self.pod.sandbox_id)),
        }
    }

    fn is_over(&self) -> bool {
        self.pod.is_over() || self.container.is_some_and(|task| task.state.is_over())
    }
}

/// The one pod or container that `word` names, among those of the Kubernetes namespace
/// `pod_namespace` where one is given.
///
/// # Errors
/// [`Error::NotFound`]: none, or several, which are then listed.
/// [`Error::Unreachable`]: a pod whose shim is silent.
pub fn resolve<'a>(
    pods: &[&'a Pod],
    silent: &[Silent],
    word: &Word,
    pod_namespace: Option<&str>,
) -> Result<Named<'a>> {
    let whole: fn(&str, &str) -> bool = |name, word| name == word;
    let beginning: fn(&str, &str) -> bool = |name, word| name.starts_with(word);
    for matches in [whole, beginning] {
        let mut named = Vec::new();
        for pod in pods.iter().copied() {
            if pod_namespace.is_none_or(|namespace| pod.pod_namespace == namespace) {
                collect(pod, &word.pod, matches, &mut named);
            }
        }
        let lost: Vec<_> = silent
            .iter()
            .filter(|lost| pod_namespace.is_none() && matches(&lost.sandbox_id, &word.pod))
            .collect();
        match (named.len(), lost.as_slice()) {
            (0, []) => {}
            (0, [lost]) => {
                let context = format!("the shim of sandbox {}", short(&lost.sandbox_id));
                return Err(Error::unreachable(context, lost.reason.clone()));
            }
            _ => {
                let named = one(named, &lost, &word.pod)?;
                return match &word.container {
                    Some(container) => within(named, container),
                    None => Ok(named),
                };
            }
        }
    }
    let of_namespace = pod_namespace.map_or(String::new(), |name| format!(" in namespace {name}"));
    let unheard = match silent.len() {
        0 => String::new(),
        1 => "; 1 shim did not answer, see dyadctl list".to_owned(),
        count => format!("; {count} shims did not answer, see dyadctl list"),
    };
    Err(Error::NotFound(format!(
        "no pod or container is called {:?}{of_namespace}{unheard}",
        word.pod
    )))
}

/// Adds what `word` names in `pod`: the pod by any of its own names, else containers.
fn collect<'a>(
    pod: &'a Pod,
    word: &str,
    matches: fn(&str, &str) -> bool,
    into: &mut Vec<Named<'a>>,
) {
    if [&pod.pod_name, &pod.pod_uid, &pod.sandbox_id]
        .iter()
        .any(|name| matches(name, word))
    {
        into.push(Named {
            pod,
            container: None,
        });
        return;
    }
    for task in pod
        .containers()
        .filter(|task| matches(&task.container_id, word))
    {
        into.push(Named {
            pod,
            container: Some(task),
        });
    }
}

/// The only one, or the only one that is not over among attempts of the same pod.
fn one<'a>(mut named: Vec<Named<'a>>, lost: &[&Silent], word: &str) -> Result<Named<'a>> {
    let same_pod = named.windows(2).all(|pair| {
        let [a, b] = [pair[0].pod, pair[1].pod];
        !a.pod_name.is_empty() && (&a.pod_namespace, &a.pod_name) == (&b.pod_namespace, &b.pod_name)
    });
    if same_pod && named.iter().any(|named| !named.is_over()) {
        named.retain(|named| !named.is_over());
    }
    if let ([only], []) = (named.as_slice(), lost) {
        return Ok(*only);
    }
    let mut candidates: Vec<_> = named.iter().map(Named::describe).collect();
    candidates.extend(lost.iter().map(|lost| {
        format!(
            "sandbox {} (its shim does not answer)",
            short(&lost.sandbox_id)
        )
    }));
    Err(ambiguous(word, &candidates))
}

/// The container of `named.pod` that `word` names: by its name or id, whole or beginning.
fn within<'a>(named: Named<'a>, word: &str) -> Result<Named<'a>> {
    let pod = named.pod;
    if named.container.is_some() {
        return Err(Error::NotFound(format!(
            "{} is a container already: it has none called {word:?}",
            named.label()
        )));
    }
    let ways: [fn(&Task, &str) -> bool; 2] = [
        |task, word| task.name == word || task.container_id == word,
        |task, word| task.name.starts_with(word) || task.container_id.starts_with(word),
    ];
    for way in ways {
        let mut found: Vec<_> = pod.containers().filter(|task| way(task, word)).collect();
        if found.iter().any(|task| !task.state.is_over()) {
            found.retain(|task| !task.state.is_over());
        } else if found.windows(2).all(|pair| pair[0].name == pair[1].name) {
            // All are past attempts of one container: the last one.
            found.sort_by_key(|task| std::cmp::Reverse(task.since));
            found.truncate(1);
        }
        match found.as_slice() {
            [] => {}
            [task] => {
                return Ok(Named {
                    pod,
                    container: Some(*task),
                });
            }
            several => {
                let candidates: Vec<_> = several
                    .iter()
                    .map(|task| {
                        Named {
                            pod,
                            container: Some(*task),
                        }
                        .describe()
                    })
                    .collect();
                return Err(ambiguous(word, &candidates));
            }
        }
    }
    let names: Vec<_> = pod.containers().map(Task::label).collect();
    Err(Error::NotFound(match names.as_slice() {
        [] => format!("pod {} has no containers", pod.label()),
        names => format!(
            "pod {} has no container {word:?}; it has {}",
            pod.label(),
            names.join(", ")
        ),
    }))
}

fn ambiguous(word: &str, candidates: &[String]) -> Error {
    Error::NotFound(format!("{word:?} is ambiguous: {}", candidates.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TaskState;
    use crate::model::tests::{pod, task};

    fn pods() -> Vec<Pod> {
        let mut other = pod("2bbb", "web", vec![task("c3", "app", TaskState::Running)]);
        other.pod_namespace = "prod".into();
        vec![
            pod(
                "1aaa",
                "web",
                vec![
                    task("c1", "app", TaskState::Running),
                    task("c2", "sidecar", TaskState::Paused),
                ],
            ),
            other,
            pod(
                "3ccc",
                "database-0",
                vec![task("d1", "db", TaskState::Running)],
            ),
            pod(
                "4ddd",
                "database-1",
                vec![task("d2", "db", TaskState::Running)],
            ),
        ]
    }

    fn ask(pods: &[Pod], word: &str) -> Result<(String, String)> {
        ask_in(pods, word, None)
    }

    fn ask_in(pods: &[Pod], word: &str, namespace: Option<&str>) -> Result<(String, String)> {
        let pods: Vec<_> = pods.iter().collect();
        let named = resolve(&pods, &[], &word.parse().unwrap(), namespace)?;
        Ok((
            named.pod.sandbox_id.clone(),
            named.container_id().to_owned(),
        ))
    }

    #[test]
    fn a_pod_goes_by_its_name_uid_and_sandbox_id_and_their_beginnings() {
        for word in ["database-0", "uid-of-3ccc", "uid-of-3", "3ccc", "3"] {
            assert_eq!(
                ask(&pods(), word).unwrap(),
                ("3ccc".into(), String::new()),
                "{word}"
            );
        }
    }

    #[test]
    fn a_container_goes_by_its_id_or_below_its_pod_by_its_name() {
        for word in ["c2", "1aaa/sidecar", "1aaa/side", "1aaa/c2", "uid-of-1/s"] {
            assert_eq!(
                ask(&pods(), word).unwrap(),
                ("1aaa".into(), "c2".into()),
                "{word}"
            );
        }
    }

    #[test]
    fn a_whole_name_wins_over_the_beginning_of_another() {
        let mut pods = pods();
        pods.push(pod("5eee", "database", vec![]));
        assert_eq!(ask(&pods, "database").unwrap().0, "5eee");
    }

    #[test]
    fn ambiguity_lists_the_candidates_and_a_namespace_ends_it() {
        let error = ask(&pods(), "web").unwrap_err();
        assert_eq!(error.exit_code(), 3);
        let text = error.chain();
        for part in ["default/web (sandbox 1aaa)", "prod/web (sandbox 2bbb)"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(ask_in(&pods(), "web", Some("prod")).unwrap().0, "2bbb");
        assert!(
            ask(&pods(), "database")
                .unwrap_err()
                .chain()
                .contains("default/database-1")
        );
        assert!(
            ask(&pods(), "c")
                .unwrap_err()
                .chain()
                .contains("prod/web/app (container c3)")
        );
    }

    #[test]
    fn what_is_nowhere_is_named_and_silent_shims_are_mentioned() {
        let silent = [Silent {
            sandbox_id: "9fff".into(),
            reason: "nobody listens".into(),
        }];
        let word = "nothing".parse().unwrap();
        let text = resolve(&[&pods()[0]], &silent, &word, None)
            .unwrap_err()
            .chain();
        assert!(
            text.contains("\"nothing\"") && text.contains("1 shim did not answer"),
            "{text}"
        );
        let text = ask(&pods(), "3ccc/x").unwrap_err().chain();
        assert!(text.contains("it has db"), "{text}");
        assert_eq!(ask(&pods(), "c1/app").unwrap_err().exit_code(), 3);
    }

    #[test]
    fn a_silent_shim_goes_by_its_sandbox_id_and_is_unreachable() {
        let silent = [Silent {
            sandbox_id: "3fff".into(),
            reason: "nobody listens".into(),
        }];
        let of = |word: &str| resolve(&[], &silent, &word.parse().unwrap(), None).unwrap_err();
        assert_eq!(of("3fff").exit_code(), 5);
        assert!(of("3f").chain().contains("nobody listens"));
        // It may be the one that was meant.
        let database = &pods()[2];
        let error = resolve(&[database], &silent, &"3".parse().unwrap(), None).unwrap_err();
        assert!(
            error.chain().contains("does not answer"),
            "{}",
            error.chain()
        );
    }

    #[test]
    fn finished_attempts_of_a_pod_give_way_to_the_living_one() {
        let mut old = pod(
            "8aaa",
            "database-0",
            vec![task("d0", "db", TaskState::Exited)],
        );
        old.tasks[0].state = TaskState::Exited;
        let mut pods = pods();
        pods.push(old.clone());
        assert_eq!(ask(&pods, "database-0").unwrap().0, "3ccc");
        // By its own id it can still be asked.
        assert_eq!(ask(&pods, "8aaa").unwrap().0, "8aaa");
        // Two dead ones: neither is better.
        let mut other = old.clone();
        other.sandbox_id = "7aaa".into();
        assert!(ask(&[old, other], "database-0").is_err());
    }

    #[test]
    fn past_attempts_of_a_container_give_way_to_the_present_one() {
        let mut first = task("x1", "app", TaskState::Exited);
        first.since = crate::model::Time(1);
        let second = task("x2", "app", TaskState::Exited);
        let running = task("x3", "app", TaskState::Running);
        let with = |tasks: &[&Task]| {
            vec![pod(
                "p",
                "web",
                tasks.iter().map(|t| (*t).clone()).collect(),
            )]
        };
        assert_eq!(
            ask(&with(&[&first, &second, &running]), "web/app")
                .unwrap()
                .1,
            "x3"
        );
        assert_eq!(ask(&with(&[&first, &second]), "web/app").unwrap().1, "x2");
        assert_eq!(ask(&with(&[&first, &running]), "web/x1").unwrap().1, "x1");
    }

    #[test]
    fn a_word_has_one_slash_at_most_and_no_empty_part() {
        for text in ["", "/", "a/", "/a", "a/b/c"] {
            assert!(text.parse::<Word>().is_err(), "{text:?}");
        }
        assert_eq!("a/b".parse::<Word>().unwrap().to_string(), "a/b");
    }

    #[test]
    fn pods_without_names_are_not_attempts_of_each_other() {
        let mut a = pod("1a", "", vec![]);
        let mut b = pod("1b", "", vec![]);
        (a.pod_uid, b.pod_uid) = (String::new(), String::new());
        a.tasks[0].state = TaskState::Exited;
        assert!(ask(&[a, b], "1").unwrap_err().chain().contains("ambiguous"));
    }
}
