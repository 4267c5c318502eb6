//! All shims of this host, asked at once.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;

use crate::client::Client;
use crate::discover::{Place, scan};
use crate::error::{Error, Result};
use crate::model::Pod;
use crate::resolve::{Named, Silent, Word, resolve};

/// Connections open at a time: far below the usual limit of 1024 descriptors.
const AT_ONCE: usize = 128;

/// What the shims said.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Those that answered, by pod namespace and name.
    pub pods: Vec<(Place, Pod)>,
    /// Those that did not, and why.
    pub silent: Vec<(Place, Error)>,
}

impl Fleet {
    /// Asks every shim below `state_dir` for its pod's state, each for at most `limit`.
    ///
    /// # Errors
    /// [`Error::Failed`] where `state_dir` cannot be listed.
    pub async fn ask(state_dir: &Path, limit: Duration) -> Result<Self> {
        let mut fleet = Self::default();
        let mut answers = futures::stream::iter(scan(state_dir)?)
            .map(|place| async move {
                let answer = ask_one(&place, limit).await;
                (place, answer)
            })
            .buffer_unordered(AT_ONCE);
        while let Some((place, answer)) = answers.next().await {
            match answer {
                Ok(pod) => fleet.pods.push((place, pod)),
                // Gone while we asked: a pod that was deleted is no leftover.
                Err(_) if !place.dir.exists() => {}
                Err(error) => fleet.silent.push((place, error)),
            }
        }
        fleet.pods.sort_by(|(_, a), (_, b)| order(a).cmp(&order(b)));
        fleet.silent.sort_by(|(a, _), (b, _)| a.dir.cmp(&b.dir));
        Ok(fleet)
    }

    /// The one that `word` names, see [`resolve`], and the place of its shim.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn find(&self, word: &Word, pod_namespace: Option<&str>) -> Result<(&Place, Named<'_>)> {
        let pods: Vec<&Pod> = self.pods.iter().map(|(_, pod)| pod).collect();
        let silent: Vec<Silent> = self
            .silent
            .iter()
            .map(|(place, error)| Silent {
                sandbox_id: place.sandbox_id.clone(),
                reason: error.chain(),
            })
            .collect();
        let named = resolve(&pods, &silent, word, pod_namespace)?;
        let place = self
            .pods
            .iter()
            .find_map(|(place, pod)| std::ptr::eq(pod, named.pod).then_some(place))
            .ok_or_else(|| Error::NotFound(format!("{word} is gone")))?;
        Ok((place, named))
    }
}

/// Asks the shim at `place`; its answer must be about the pod that the place is named for.
///
/// # Errors
/// [`Error::Unreachable`].
pub async fn ask_one(place: &Place, limit: Duration) -> Result<Pod> {
    let client = connect(place, limit).await?;
    let pod = client.state(limit).await?;
    let (named, answered) = (
        (&place.containerd_namespace, &place.sandbox_id),
        (&pod.containerd_namespace, &pod.sandbox_id),
    );
    if named != answered {
        return Err(Error::Unreachable {
            context: format!(
                "{}: its address leads to the shim of another pod, {}",
                place.dir.display(),
                answered.1
            ),
            source: None,
        });
    }
    Ok(pod)
}

/// Connects to the shim at `place`.
///
/// # Errors
/// [`Error::Unreachable`].
pub async fn connect(place: &Place, limit: Duration) -> Result<Client> {
    match &place.socket {
        Ok(socket) => Client::connect(socket, limit).await,
        Err(error) => Err(Error::Unreachable {
            context: format!("{}: {}", place.dir.display(), error_chain(error)),
            source: None,
        }),
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn order(pod: &Pod) -> (&str, &str, &str) {
    (&pod.pod_namespace, &pod.pod_name, &pod.sandbox_id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use super::*;
    use crate::testing::{FakeShim, State, state_of};

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn every_shim_is_asked_and_found_by_what_it_says() {
        let state = State::new();
        let _web = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let _db = FakeShim::serve(&state, "other", state_of("2bbb", "db")).await;
        let fleet = Fleet::ask(state.path(), LIMIT).await.unwrap();
        assert!(fleet.silent.is_empty(), "{:?}", fleet.silent);
        let names: Vec<_> = fleet.pods.iter().map(|(_, pod)| pod.label()).collect();
        assert_eq!(names, ["default/db", "default/web"]);
        let (place, named) = fleet.find(&"db".parse().unwrap(), None).unwrap();
        assert_eq!(
            (place.sandbox_id.as_str(), named.container_id()),
            ("2bbb", "")
        );
    }

    #[tokio::test]
    async fn dead_shims_are_leftovers_with_a_reason() {
        let state = State::new();
        let gone = state.place("k8s.io", "gone");
        state.write_address(&gone, &gone.join("s"));
        let closed = state.place("k8s.io", "closed");
        drop(UnixListener::bind(closed.join("s")).unwrap());
        state.write_address(&closed, &closed.join("s"));
        let empty = state.place("k8s.io", "empty");
        std::fs::write(empty.join("address"), "").unwrap();
        let fleet = Fleet::ask(state.path(), LIMIT).await.unwrap();
        assert!(fleet.pods.is_empty());
        let reasons: Vec<_> = fleet
            .silent
            .iter()
            .map(|(place, error)| {
                assert_eq!(error.exit_code(), 5);
                format!("{} {}", place.sandbox_id, error.chain())
            })
            .collect();
        assert_eq!(reasons.len(), 3);
        assert!(reasons[0].contains("Connection refused"), "{reasons:?}");
        assert!(reasons[1].contains("not one line"), "{reasons:?}");
        assert!(reasons[2].contains("No such file"), "{reasons:?}");
    }

    #[tokio::test]
    async fn shims_that_never_answer_cost_one_timeout_together() {
        let state = State::new();
        let mut listeners = Vec::new();
        for id in 0..20 {
            let dir = state.place("k8s.io", &format!("deaf{id}"));
            listeners.push(UnixListener::bind(dir.join("s")).unwrap());
            state.write_address(&dir, &dir.join("s"));
        }
        let begun = Instant::now();
        let fleet = Fleet::ask(state.path(), Duration::from_millis(300))
            .await
            .unwrap();
        assert_eq!(fleet.silent.len(), 20);
        assert!(fleet.silent[0].1.chain().contains("no answer within 300ms"));
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
    }

    #[tokio::test]
    async fn an_address_that_leads_to_another_pods_shim_is_not_believed() {
        let state = State::new();
        let web = FakeShim::serve(&state, "k8s.io", state_of("1aaa", "web")).await;
        let stale = state.place("k8s.io", "stale");
        state.write_address(&stale, &web.socket);
        let fleet = Fleet::ask(state.path(), LIMIT).await.unwrap();
        assert_eq!((fleet.pods.len(), fleet.silent.len()), (1, 1));
        assert!(fleet.silent[0].1.chain().contains("another pod, 1aaa"));
    }

    #[tokio::test]
    async fn a_server_that_is_no_dyad_shim_is_silent() {
        let state = State::new();
        let _foreign = FakeShim::serve_nothing(&state, "k8s.io", "foreign").await;
        let fleet = Fleet::ask(state.path(), LIMIT).await.unwrap();
        assert_eq!(fleet.silent.len(), 1);
        assert_eq!(fleet.silent[0].1.exit_code(), 5);
    }
}
