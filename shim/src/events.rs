//! Publishes what happened to containerd, in order, without ever holding up the pod.
//!
//! One worker sends one event at a time over containerd's ttrpc address. While
//! containerd is away it tries again with growing pauses and keeps the newest
//! [`KEPT_MAX`] events; when containerd is back they follow in order. Where ttrpc
//! cannot be had at all, containerd's own binary (`containerd publish`) is run
//! instead.

use std::collections::VecDeque;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as proto;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::types::mount::Mount;
use log::{debug, warn};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::pod::TaskEvent;
use crate::rpc::convert::timestamp;
use crate::rpc::lifecycle;

/// Our own transitions.
const TRANSITION_TOPIC: &str = "/dyad/lifecycle/transition";
/// Events kept while containerd is away.
const KEPT_MAX: usize = 1024;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// One event must not hold up the others for longer.
const FORWARD_MAX: Duration = Duration::from_secs(5);
/// Tries of one event that containerd answers with an error.
const REFUSED_MAX: u32 = 3;

/// Where events go.
#[derive(Debug, Clone)]
pub struct Destination {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's ttrpc address; empty: it has none.
    pub ttrpc_address: String,
    /// containerd's gRPC address, for its binary.
    pub grpc_address: String,
    /// containerd's binary; empty: unknown.
    pub publish_binary: String,
}

/// Ends the publisher.
#[derive(Debug)]
pub struct Publisher {
    flush: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

impl Publisher {
    /// Publishes all that comes from `events`.
    pub fn start(destination: Destination, events: mpsc::UnboundedReceiver<TaskEvent>) -> Self {
        let (flush, flushes) = mpsc::unbounded_channel();
        let worker = Worker {
            destination,
            client: None,
            kept: VecDeque::new(),
            dropped: 0,
        };
        tokio::spawn(worker.run(events, flushes));
        Self { flush }
    }

    /// Returns when all events so far are out, or after `longest`.
    pub async fn flush(&self, longest: Duration) {
        let (sender, receiver) = oneshot::channel();
        if self.flush.send(sender).is_ok() {
            let _ = timeout(longest, receiver).await;
        }
    }
}

struct Worker {
    destination: Destination,
    client: Option<EventsClient>,
    kept: VecDeque<Envelope>,
    dropped: u64,
}

/// What became of one event.
enum Sent {
    Yes,
    /// containerd is away.
    Away(String),
    /// containerd will not have it.
    Refused(String),
}

impl Worker {
    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<TaskEvent>,
        mut flushes: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    ) {
        let mut waiting_for_flush: Vec<oneshot::Sender<()>> = Vec::new();
        let mut pause = FIRST_PAUSE;
        let mut refused = 0;
        let mut open = true;
        loop {
            // Take in all there is before the slow part.
            while let Ok(event) = events.try_recv() {
                self.keep(&event);
            }
            let Some(envelope) = self.kept.front().cloned() else {
                for flushed in waiting_for_flush.drain(..) {
                    let _ = flushed.send(());
                }
                if !open {
                    return;
                }
                tokio::select! {
                    event = events.recv() => match event {
                        Some(event) => self.keep(&event),
                        None => open = false,
                    },
                    Some(flush) = flushes.recv() => waiting_for_flush.push(flush),
                }
                continue;
            };
            match self.send(envelope).await {
                Sent::Yes => {
                    self.kept.pop_front();
                    (pause, refused) = (FIRST_PAUSE, 0);
                    continue;
                }
                Sent::Refused(why) => {
                    refused += 1;
                    if refused >= REFUSED_MAX {
                        warn!("event dropped: {why}");
                        self.kept.pop_front();
                        refused = 0;
                        continue;
                    }
                }
                Sent::Away(why) => debug!("events wait for containerd: {why}"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            while let Ok(flush) = flushes.try_recv() {
                waiting_for_flush.push(flush);
            }
        }
    }

    fn keep(&mut self, event: &TaskEvent) {
        let (topic, any) = match encode(event) {
            Ok(encoded) => encoded,
            Err(error) => {
                warn!("event {event:?} cannot be encoded: {error}");
                return;
            }
        };
        if self.kept.len() >= KEPT_MAX {
            self.kept.pop_front();
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                warn!("{} events dropped: containerd is away", self.dropped);
            }
        }
        self.kept.push_back(Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.destination.namespace.clone(),
            topic: topic.into(),
            event: Some(any).into(),
            ..Default::default()
        });
    }

    async fn send(&mut self, envelope: Envelope) -> Sent {
        if self.destination.ttrpc_address.is_empty() {
            return self.run_publish_binary(&envelope).await;
        }
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let path = &self.destination.ttrpc_address;
                let path = path.strip_prefix("unix://").unwrap_or(path);
                match Client::connect(&format!("unix://{path}")).await {
                    Ok(connection) => self.client.insert(EventsClient::new(connection)).clone(),
                    Err(error) => return Sent::Away(format!("connect to {path}: {error}")),
                }
            }
        };
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..Default::default()
        };
        let sent = timeout(
            FORWARD_MAX,
            client.forward(ttrpc::context::Context::default(), &request),
        );
        match sent.await {
            Ok(Ok(_)) => Sent::Yes,
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Sent::Refused(status.message),
            Ok(Err(error)) => {
                self.client = None;
                Sent::Away(error.to_string())
            }
            Err(_) => {
                self.client = None;
                Sent::Away("no answer".into())
            }
        }
    }

    /// `containerd --address A publish --topic T --namespace N`, the event on stdin.
    async fn run_publish_binary(&self, envelope: &Envelope) -> Sent {
        let destination = &self.destination;
        if destination.publish_binary.is_empty() {
            return Sent::Refused("containerd gave neither a ttrpc address nor its binary".into());
        }
        let run = async {
            let mut child = tokio::process::Command::new(&destination.publish_binary)
                .args(["--address", &destination.grpc_address])
                .args(["publish", "--topic", &envelope.topic])
                .args(["--namespace", &envelope.namespace])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(&envelope.event.write_to_bytes()?).await?;
            }
            // The process's one reaper may take its exit before us; it ran all the same.
            let _ = child.wait().await;
            Ok::<_, std::io::Error>(())
        };
        match timeout(FORWARD_MAX, run).await {
            Ok(Ok(())) => Sent::Yes,
            Ok(Err(error)) => Sent::Refused(format!("{}: {error}", destination.publish_binary)),
            Err(_) => Sent::Refused(format!("{}: no answer", destination.publish_binary)),
        }
    }
}

fn encode(event: &TaskEvent) -> protobuf::Result<(&'static str, Any)> {
    let id = |id: &String| id.clone();
    match event {
        TaskEvent::Create {
            container,
            bundle,
            rootfs,
            stdio,
            pid,
        } => {
            let io = proto::TaskIO {
                stdin: id(&stdio.stdin),
                stdout: id(&stdio.stdout),
                stderr: id(&stdio.stderr),
                terminal: stdio.terminal,
                ..Default::default()
            };
            let rootfs = rootfs.iter().map(|mount| Mount {
                type_: mount.fstype.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
                ..Default::default()
            });
            let message = proto::TaskCreate {
                container_id: id(container),
                bundle: bundle.display().to_string(),
                rootfs: rootfs.collect(),
                io: MessageField::some(io),
                pid: *pid,
                ..Default::default()
            };
            any(topics::TASK_CREATE_EVENT_TOPIC, &message)
        }
        TaskEvent::Start { container, pid } => any(
            topics::TASK_START_EVENT_TOPIC,
            &proto::TaskStart {
                container_id: id(container),
                pid: *pid,
                ..Default::default()
            },
        ),
        TaskEvent::Exit { process, pid, exit } => any(
            topics::TASK_EXIT_EVENT_TOPIC,
            &proto::TaskExit {
                container_id: id(&process.container),
                // containerd's clients expect the container's id for its init process.
                id: process
                    .exec
                    .clone()
                    .unwrap_or_else(|| id(&process.container)),
                pid: *pid,
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..Default::default()
            },
        ),
        TaskEvent::Delete {
            container,
            pid,
            exit,
        } => any(
            topics::TASK_DELETE_EVENT_TOPIC,
            &proto::TaskDelete {
                container_id: id(container),
                pid: *pid,
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..Default::default()
            },
        ),
        TaskEvent::ExecAdded { container, exec } => any(
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            &proto::TaskExecAdded {
                container_id: id(container),
                exec_id: id(exec),
                ..Default::default()
            },
        ),
        TaskEvent::ExecStarted {
            container,
            exec,
            pid,
        } => any(
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            &proto::TaskExecStarted {
                container_id: id(container),
                exec_id: id(exec),
                pid: *pid,
                ..Default::default()
            },
        ),
        TaskEvent::Paused { container } => any(
            topics::TASK_PAUSED_EVENT_TOPIC,
            &proto::TaskPaused {
                container_id: id(container),
                ..Default::default()
            },
        ),
        TaskEvent::Resumed { container } => any(
            topics::TASK_RESUMED_EVENT_TOPIC,
            &proto::TaskResumed {
                container_id: id(container),
                ..Default::default()
            },
        ),
        TaskEvent::Checkpointed { container, images } => any(
            topics::TASK_CHECKPOINTED_EVENT_TOPIC,
            &proto::TaskCheckpointed {
                container_id: id(container),
                checkpoint: images.display().to_string(),
                ..Default::default()
            },
        ),
        TaskEvent::Transition(transition) => Ok((
            TRANSITION_TOPIC,
            Any {
                type_url: "dyad.lifecycle.v1.Transition".into(),
                value: lifecycle::transition(transition).write_to_bytes()?,
                ..Default::default()
            },
        )),
        TaskEvent::OutOfMemory { container } => any(
            topics::TASK_OOM_EVENT_TOPIC,
            &proto::TaskOOM {
                container_id: id(container),
                ..Default::default()
            },
        ),
    }
}

/// containerd's typeurl: the bare message name. Not from the message's descriptor, which
/// would build the reflection of every file that it imports: half a megabyte for good.
fn any<M: Message>(topic: &'static str, message: &M) -> protobuf::Result<(&'static str, Any)> {
    Ok((
        topic,
        Any {
            type_url: format!("containerd.events.{}", M::NAME),
            value: message.write_to_bytes()?,
            ..Default::default()
        },
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use dyad_runtime_handler::handler::{Exit, ProcessId};
    use protobuf::MessageFull as _;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::default())
        }
    }

    async fn serve(address: &str) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    fn start_event(pid: u32) -> TaskEvent {
        TaskEvent::Start {
            container: "c".into(),
            pid,
        }
    }

    fn destination(address: &str) -> Destination {
        Destination {
            namespace: "k8s.io".into(),
            ttrpc_address: address.into(),
            grpc_address: String::new(),
            publish_binary: String::new(),
        }
    }

    async fn next_pid(received: &mut mpsc::UnboundedReceiver<Envelope>) -> u32 {
        let envelope = timeout(Duration::from_secs(20), received.recv())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(envelope.topic, "/tasks/start");
        assert_eq!(envelope.namespace, "k8s.io");
        let event = envelope.event.unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskStart");
        proto::TaskStart::parse_from_bytes(&event.value)
            .unwrap()
            .pid
    }

    #[tokio::test]
    async fn events_survive_a_restart_of_containerd_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("e").display().to_string();
        let (sender, receiver) = mpsc::unbounded_channel();
        let publisher = Publisher::start(destination(&address), receiver);

        let (mut server, mut received) = serve(&address).await;
        sender.send(start_event(1)).unwrap();
        assert_eq!(next_pid(&mut received).await, 1);
        server.shutdown().await.unwrap();
        drop(server);
        let _ = std::fs::remove_file(&address);

        for pid in 2..5 {
            sender.send(start_event(pid)).unwrap();
        }
        let (_server, mut received) = serve(&address).await;
        for pid in 2..5 {
            assert_eq!(next_pid(&mut received).await, pid);
        }
        publisher.flush(Duration::from_secs(5)).await;
    }

    #[test]
    fn the_exit_of_an_init_process_carries_the_containers_id() {
        let exit = Exit {
            status: 3,
            at: SystemTime::now(),
        };
        for (process, id) in [
            (ProcessId::init("c"), "c"),
            (ProcessId::exec("c", "e"), "e"),
        ] {
            let (topic, any) = encode(&TaskEvent::Exit {
                process,
                pid: 7,
                exit,
            })
            .unwrap();
            assert_eq!(topic, "/tasks/exit");
            assert_eq!(any.type_url, proto::TaskExit::descriptor().full_name());
            let event = proto::TaskExit::parse_from_bytes(&any.value).unwrap();
            assert_eq!((event.id.as_str(), event.exit_status), (id, 3));
        }
    }
}
