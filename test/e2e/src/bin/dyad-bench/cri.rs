//! The few CRI calls that are measured, over gRPC (k8s.io/cri-api, runtime/v1/api.proto).

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_prost::ProstCodec;

/// A pod's configuration.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    /// Who it is.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
    /// Its hostname.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where its containers' logs go.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// Among them `dyad.dev/*`.
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    /// Linux's part.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandboxConfig>,
}

/// Who a pod is.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its uid.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Its Kubernetes namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// Linux's part of a pod's configuration.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPodSandboxConfig {
    /// The pod's cgroup.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
}

/// A container's configuration.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerConfig {
    /// Who it is.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<ContainerMetadata>,
    /// What it runs from.
    #[prost(message, optional, tag = "2")]
    pub image: Option<ImageSpec>,
    /// What it runs.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// Its log, below the pod's folder.
    #[prost(string, tag = "11")]
    pub log_path: String,
}

/// Who a container is.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// An image's name.
#[derive(Clone, PartialEq, Message)]
pub struct ImageSpec {
    /// The reference.
    #[prost(string, tag = "1")]
    pub image: String,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
    #[prost(string, tag = "2")]
    runtime_handler: String,
}

/// StopPodSandbox, RemovePodSandbox, StartContainer, RemoveContainer and the answers
/// that carry one id: all have it in field 1.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct StopContainerRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(int64, tag = "2")]
    timeout_s: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// A connection to containerd's CRI.
pub struct Cri {
    grpc: Grpc<Channel>,
}

impl Cri {
    /// Connects to containerd's socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_path_buf();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move {
                tokio::net::UnixStream::connect(path)
                    .await
                    .map(TokioIo::new)
            }
        });
        let channel = Endpoint::from_static("http://containerd")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self {
            grpc: Grpc::new(channel),
        })
    }

    async fn call<Q, A>(&mut self, method: &'static str, request: Q) -> Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        self.grpc.ready().await.context("containerd's CRI")?;
        let path = PathAndQuery::from_static(method);
        let answer = self
            .grpc
            .unary(
                tonic::Request::new(request),
                path,
                ProstCodec::<Q, A>::default(),
            )
            .await
            .with_context(|| method)?;
        Ok(answer.into_inner())
    }

    /// RunPodSandbox; gives the pod's id.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn run_pod(&mut self, handler: &str, config: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let answer: Id = self
            .call("/runtime.v1.RuntimeService/RunPodSandbox", request)
            .await?;
        Ok(answer.id)
    }

    /// CreateContainer; gives the container's id.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn create(
        &mut self,
        pod_id: &str,
        pod: &PodSandboxConfig,
        config: &ContainerConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_id.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.clone()),
        };
        let answer: Id = self
            .call("/runtime.v1.RuntimeService/CreateContainer", request)
            .await?;
        Ok(answer.id)
    }

    /// StartContainer.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn start(&mut self, id: &str) -> Result<()> {
        self.by_id("/runtime.v1.RuntimeService/StartContainer", id)
            .await
    }

    /// StopContainer with a grace that is never used up.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn stop(&mut self, id: &str) -> Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout_s: 60,
        };
        let _: Empty = self
            .call("/runtime.v1.RuntimeService/StopContainer", request)
            .await?;
        Ok(())
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn stop_pod(&mut self, id: &str) -> Result<()> {
        self.by_id("/runtime.v1.RuntimeService/StopPodSandbox", id)
            .await
    }

    /// RemovePodSandbox.
    ///
    /// # Errors
    /// What containerd told.
    pub async fn remove_pod(&mut self, id: &str) -> Result<()> {
        self.by_id("/runtime.v1.RuntimeService/RemovePodSandbox", id)
            .await
    }

    async fn by_id(&mut self, method: &'static str, id: &str) -> Result<()> {
        let _: Empty = self.call(method, Id { id: id.to_owned() }).await?;
        Ok(())
    }
}
