//! What a container is to be, read before the model is asked for it: its bundle's spec, its pod,
//! and the fence that its pod may stand behind.

use std::collections::{BTreeSet, HashMap};
use std::time::SystemTime;

use dyad_runtime_handler::migration::{self, Tombstone, Tombstones};
use dyad_runtime_handler::spec::{ContainerSpec, PodInfo, Role, Stdio};
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Spec;

use super::driver::Driver;
use super::effects::on_helper;
use super::model::change::{Input, Prepared};
use super::{CreateRequest, Pending, Reply, SandboxRequest};
use crate::bootstrap::launch::Launch;
use crate::spec::{self, Identity};
use crate::stdio::StdioUris;
use crate::{pod_spec, pod_spec::PodConfig};

impl Driver {
    pub(super) fn prepare(&mut self, request: CreateRequest, reply: Reply<u32>) {
        let reading = Reading::of(&self.pod.launch, self.fence());
        let read = move || {
            let oci = spec::read(&request.bundle)?;
            reading.prepare(request, oci, None)
        };
        self.read_then_create(read, reply);
    }

    pub(super) fn prepare_sandbox(&mut self, request: SandboxRequest, reply: Reply<u32>) {
        let reading = Reading::of(&self.pod.launch, self.fence());
        let expected = self.pod.launch.sandbox_id.clone();
        let read = move || {
            let SandboxRequest { id, bundle, pod } = request;
            if id != expected {
                return Err(Error::InvalidArgument(format!(
                    "sandbox_id: {id:?}; this server was started for {expected:?}"
                )));
            }
            let oci = pod_spec::spec(&id, &pod)?;
            let request = CreateRequest {
                id,
                bundle,
                rootfs: Vec::new(),
                stdio: StdioUris::default(),
            };
            reading.prepare(request, oci, Some(Box::new(pod)))
        };
        self.read_then_create(read, reply);
    }

    fn read_then_create(
        &self,
        read: impl FnOnce() -> Result<Prepared> + Send + 'static,
        reply: Reply<u32>,
    ) {
        self.effect(on_helper(read), |driver, prepared| match prepared {
            Err(error) => drop(reply.send(Err(error))),
            Ok(prepared) => {
                let token = driver.caller(Pending::Pid(reply));
                driver.step(Input::Create(Box::new(prepared), token));
            }
        });
    }
}

/// What is read for any container of the pod.
struct Reading {
    launch: Launch,
    fence: Tombstones,
}

impl Reading {
    fn of(launch: &Launch, fence: Tombstones) -> Self {
        Self {
            launch: launch.clone(),
            fence,
        }
    }

    /// Blocks.
    fn prepare(
        self,
        request: CreateRequest,
        oci: Spec,
        bare: Option<Box<PodConfig>>,
    ) -> Result<Prepared> {
        let no_annotations = HashMap::new();
        let annotations = oci.annotations().as_ref().unwrap_or(&no_annotations);
        let identity = Identity::of(&request.id, annotations)?;
        let pod = spec::pod_info(&identity, annotations, &self.launch.config)?;
        let (fenced, done_on_source) = match identity.role {
            Role::Container => (None, BTreeSet::new()),
            Role::Sandbox => (
                self.fence_of(&request.id, &pod),
                migration::done_on_source(&pod)?,
            ),
        };
        let spec = ContainerSpec {
            id: request.id.clone(),
            containerd_namespace: self.launch.containerd_namespace.clone(),
            name: identity.name.clone(),
            role: identity.role,
            pod,
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            oci,
            stdio: Stdio::default(),
        };
        Ok(Prepared {
            request,
            identity,
            spec,
            bare,
            fenced,
            done_on_source,
        })
    }

    /// The tombstone of a sandbox that left, or of another one of its pod.
    fn fence_of(&self, sandbox_id: &str, pod: &PodInfo) -> Option<Tombstone> {
        self.fence.prune(SystemTime::now());
        let namespace = &self.launch.containerd_namespace;
        self.fence.find(namespace, sandbox_id, &pod.uid)
    }
}
