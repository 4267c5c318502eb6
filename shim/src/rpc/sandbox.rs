//! containerd's Sandbox service: pods without a pause container, of CRI (`sandboxer =
//! "shim"`) or of any other client ([`crate::plain_pod`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as Service;
use dyad_runtime_handler::handler::{ProcessId, RuntimeHandler};
use dyad_runtime_handler::{Error, Result};
use serde_json::json;
use ttrpc::r#async::TtrpcContext;

use super::convert::{stats, timestamp};
use super::pod_config;
use super::task::{answer, read};
use crate::plain_pod;
use crate::pod::{Sandbox, SandboxRequest, SandboxView};

/// CRI's names of a pod's state.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Serves the Sandbox API of one pod.
pub struct SandboxService {
    sandbox: Sandbox,
    handler: Arc<dyn RuntimeHandler>,
}

impl SandboxService {
    /// Over this pod.
    pub fn new(sandbox: Sandbox, handler: Arc<dyn RuntimeHandler>) -> Self {
        Self { sandbox, handler }
    }

    async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        if let Some(mount) = request.rootfs.first() {
            return Err(Error::InvalidArgument(format!(
                "rootfs: {} mounts, the first of {:?}: a pod of this shim has no root file system of its own; leave it out",
                request.rootfs.len(),
                mount.source
            )));
        }
        let bundle = PathBuf::from(request.bundle_path);
        let netns = &request.netns_path;
        let pod = match request.options.into_option() {
            Some(options) if !options.type_url.is_empty() => pod_config::decode(&options, netns)?,
            _ => plain_pod::read(&bundle, netns, request.annotations)?,
        };
        let request = SandboxRequest {
            id: request.sandbox_id,
            bundle,
            pod,
        };
        self.sandbox.create_sandbox(request).await.map(drop)
    }

    async fn start(&self, id: String) -> Result<SandboxView> {
        match self.sandbox.view_sandbox(id.clone()).await {
            Err(Error::NotFound(_)) => {
                return Err(Error::FailedPrecondition(format!(
                    "start sandbox {id}: it has not been created; CreateSandbox comes first"
                )));
            }
            other => other?,
        };
        self.sandbox.run(ProcessId::init(&id)).await?;
        self.sandbox.view_sandbox(id).await
    }

    /// Asks where there is time for it, then kills.
    async fn stop(&self, id: String, patience: Duration) -> Result<()> {
        if self.sandbox.view_sandbox(id.clone()).await?.exit.is_some() {
            return Ok(());
        }
        let process = ProcessId::init(&id);
        if !patience.is_zero()
            && self
                .sandbox
                .signal(process.clone(), libc::SIGTERM, false)
                .await
                .is_ok()
            && tokio::time::timeout(patience, self.sandbox.wait(process))
                .await
                .is_ok()
        {
            return Ok(());
        }
        self.sandbox.kill(&id).await
    }

    /// In a task of its own: a client that hangs up in the middle would else leave a server
    /// without a pod, which nobody asks to end any more.
    async fn close(&self) -> Result<()> {
        let sandbox = self.sandbox.clone();
        tokio::spawn(async move { sandbox.close().await })
            .await
            .unwrap_or_else(|panic| Err(Error::other("shut the pod down", panic)))
    }

    /// What `crictl inspectp` prints: under `info`, which has containerd's own form, the pid
    /// as with a pause container; under `dyad` what else we know. Other clients look for
    /// `pid` and `state`.
    fn info(&self, view: &SandboxView) -> [(String, String); 4] {
        let machine = self.handler.machine().map(|machine| {
            json!({
                "uuid": machine.uuid,
                "domain": machine.domain,
                "accelerator": machine.accelerator,
                "vcpus": machine.vcpus,
                "memoryBytes": machine.memory_bytes,
                "kernelRelease": machine.kernel_release,
                "notes": machine.notes,
            })
        });
        let own = json!({"kind": self.handler.kind().to_string(), "machine": machine});
        [
            ("pid".into(), view.pid.to_string()),
            ("state".into(), state(view).into()),
            ("info".into(), json!({"pid": view.pid}).to_string()),
            ("dyad".into(), own.to_string()),
        ]
    }
}

#[async_trait]
impl Service for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let what = format!("create sandbox {}", request.sandbox_id);
        answer(&what, self.create(request).await)?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let what = format!("start sandbox {}", request.sandbox_id);
        let view = answer(&what, self.start(request.sandbox_id).await)?;
        Ok(StartSandboxResponse {
            pid: view.pid,
            created_at: Some(timestamp(view.created_at)).into(),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        read(
            "platform",
            self.sandbox.view_sandbox(request.sandbox_id).await,
        )?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        platform.architecture = architecture(std::env::consts::ARCH).into();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let what = format!("stop sandbox {}", request.sandbox_id);
        let patience = Duration::from_secs(request.timeout_secs.into());
        answer(&what, self.stop(request.sandbox_id, patience).await)?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let process = ProcessId::init(request.sandbox_id);
        let exit = read("wait for sandbox", self.sandbox.wait(process).await)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let id = request.sandbox_id;
        let view = read(
            "sandbox status",
            self.sandbox.view_sandbox(id.clone()).await,
        )?;
        let mut response = SandboxStatusResponse {
            sandbox_id: id,
            pid: view.pid,
            state: state(&view).into(),
            created_at: Some(timestamp(view.created_at)).into(),
            exited_at: view.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        };
        if request.verbose {
            response.info.extend(self.info(&view));
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        read("ping", self.sandbox.view_sandbox(request.sandbox_id).await)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        // Also of one that could not be created: containerd then asks the same.
        let what = format!("shutdown of sandbox {}", request.sandbox_id);
        answer(&what, self.close().await)?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let id = request.sandbox_id;
        let usage = async { stats(&self.sandbox.stats(id.clone()).await?) };
        let usage = read("sandbox metrics", usage.await)?;
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = Some(timestamp(SystemTime::now())).into();
        metrics.id = id;
        metrics.data = Some(usage).into();
        Ok(response)
    }
}

/// CRI's name of a pod's state.
fn state(view: &SandboxView) -> &'static str {
    if view.ready { READY } else { NOT_READY }
}

/// Go's names, which images use.
fn architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_have_the_names_that_images_use() {
        for (rust, go) in [
            ("x86_64", "amd64"),
            ("aarch64", "arm64"),
            ("riscv64", "riscv64"),
        ] {
            assert_eq!(architecture(rust), go);
        }
    }
}
