//! The services on the pod's socket. Only here and in `events` and `bootstrap` are
//! protobuf types known.

pub mod convert;
pub mod lifecycle;
mod migration;
mod pod_config;
mod sandbox;
pub mod status;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use dyad_api::lifecycle_ttrpc::create_lifecycle;
use dyad_runtime_handler::handler::RuntimeHandler;
use ttrpc::r#async::Service;

use crate::pod::Sandbox;

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Every service of a pod's server, by name. The two versions of Task have the same
/// messages and methods.
pub fn services(sandbox: &Sandbox, handler: &Arc<dyn RuntimeHandler>) -> HashMap<String, Service> {
    let lifecycle = lifecycle::LifecycleService::new(sandbox.clone(), Arc::clone(handler));
    let mut services = create_lifecycle(Arc::new(lifecycle));
    let pod = sandbox::SandboxService::new(sandbox.clone(), Arc::clone(handler));
    services.extend(create_sandbox(Arc::new(pod)));
    for name in [TASK_V2, TASK_V3] {
        let made = create_task(Arc::new(task::TaskService::new(sandbox.clone())));
        services.extend(made.into_values().map(|service| (name.to_owned(), service)));
    }
    services
}
