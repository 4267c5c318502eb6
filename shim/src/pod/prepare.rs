//! What a container is to be, read before the model is asked for it: its bundle's spec, its pod,
//! and the fence that its pod may stand behind.

use std::collections::{BTreeSet, HashMap};
use std::time::SystemTime;

use dyad_runtime_handler::config::Kind;
use dyad_runtime_handler::migration;
use dyad_runtime_handler::spec::{ContainerSpec, Role, Stdio};
use dyad_runtime_handler::{Error, Result};
use oci_spec::runtime::Spec;

use super::driver::Driver;
use super::effects::on_helper;
use super::model::change::{Input, Prepared};
use super::{CreateRequest, Pending, Reply, SandboxRequest};
use crate::bootstrap::launch::Launch;
use crate::pod_spec::{self, Client, PodConfig};
use crate::spec::{self, Identity};
use crate::stdio::StdioUris;

impl Driver {
    pub(super) fn prepare(&mut self, request: CreateRequest, reply: Reply<u32>) {
        let prepared = self.prepared_container(request);
        self.create_prepared(prepared, reply);
    }

    pub(super) fn prepare_sandbox(&mut self, request: SandboxRequest, reply: Reply<u32>) {
        let prepared = self.prepared_sandbox(request);
        self.create_prepared(prepared, reply);
    }

    fn prepared_container(&self, request: CreateRequest) -> Result<Prepared> {
        let launch = &self.pod.launch;
        if request.checkpoint.is_some() && launch.kind == Kind::Machine {
            return Err(Error::Unimplemented(format!(
                "create {} from a checkpoint: not in a machine pod, where no process of the host \
                 is restored; create it without one, or run the pod as containers \
                 (runtimeClassName: dyad)",
                request.id
            )));
        }
        let oci = spec::read(&request.bundle)?;
        let files = self.files.as_ref();
        let is_plain = files.is_some_and(|files| files.client() == Client::Other);
        prepared(launch, request, oci, None, is_plain)
    }

    fn prepared_sandbox(&self, request: SandboxRequest) -> Result<Prepared> {
        let launch = &self.pod.launch;
        let SandboxRequest { id, bundle, pod } = request;
        if id != launch.sandbox_id {
            // A server has one pod, whatever the id that is asked for.
            if let Some((existing, _)) = self.model.sandbox() {
                return Err(Error::AlreadyExists(format!("create {id}: pod {existing}")));
            }
            return Err(Error::InvalidArgument(format!(
                "sandbox_id: {id:?}; this server was started for {:?}",
                launch.sandbox_id
            )));
        }
        let oci = pod_spec::spec(&id, &pod)?;
        let request = CreateRequest {
            id,
            bundle,
            rootfs: Vec::new(),
            stdio: StdioUris::default(),
            checkpoint: None,
        };
        prepared(launch, request, oci, Some(Box::new(pod)), false)
    }

    /// Puts it into the model; a sandbox, when it is known whether it stands behind a fence.
    fn create_prepared(&mut self, prepared: Result<Prepared>, reply: Reply<u32>) {
        let mut prepared = match prepared {
            Ok(prepared) => Box::new(prepared),
            Err(error) => return drop(reply.send(Err(error))),
        };
        let token = self.caller(Pending::Pid(reply));
        if prepared.identity.role == Role::Container {
            return self.step(Input::Create(prepared, token));
        }
        let fence = self.fence();
        let namespace = self.pod.launch.containerd_namespace.clone();
        let (id, uid) = (prepared.request.id.clone(), prepared.spec.pod.uid.clone());
        let fenced = on_helper(move || {
            fence.prune(SystemTime::now());
            Ok(fence.find(&namespace, &id, &uid))
        });
        self.effect(fenced, move |driver, fenced| match fenced {
            Ok(fenced) => {
                prepared.fenced = fenced;
                driver.step(Input::Create(prepared, token));
            }
            Err(error) => driver.refuse(token, error),
        });
    }
}

/// What the bundle and the request say. The bundle lies in memory (a tmpfs), so reading it
/// holds up nobody.
fn prepared(
    launch: &Launch,
    request: CreateRequest,
    oci: Spec,
    bare: Option<Box<PodConfig>>,
    is_of_plain_pod: bool,
) -> Result<Prepared> {
    let no_annotations = HashMap::new();
    let annotations = oci.annotations().as_ref().unwrap_or(&no_annotations);
    let mut identity = Identity::of(&request.id, annotations)?;
    if is_of_plain_pod && !identity.cri {
        identity = identity.member_of(&launch.sandbox_id);
    }
    let mut pod = spec::pod_info(&identity, annotations, &launch.config)?;
    if let Some(config) = &bare {
        pod.size = config.size;
    }
    let done_on_source = match identity.role {
        Role::Container => BTreeSet::new(),
        Role::Sandbox => migration::done_on_source(&pod)?,
    };
    let is_target = identity.role == Role::Sandbox && migration::source_of(&pod)?.is_some();
    let spec = ContainerSpec {
        id: request.id.clone(),
        containerd_namespace: launch.containerd_namespace.clone(),
        name: identity.name.clone(),
        role: identity.role,
        pod,
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        oci,
        stdio: Stdio::default(),
        checkpoint: request.checkpoint.clone(),
    };
    Ok(Prepared {
        request,
        identity,
        spec,
        bare,
        fenced: None,
        is_target,
        done_on_source,
    })
}
