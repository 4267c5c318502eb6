//! The services on the pod's socket. Only here and in `events` and `bootstrap` are
//! protobuf types known.

pub mod convert;
pub mod status;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_shim_protos::shim_async::create_task;
use ttrpc::r#async::Service;

use crate::sandbox::Sandbox;

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Every service of a pod's server, by name. The two versions of Task have the same
/// messages and methods.
pub fn services(sandbox: &Sandbox) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in [TASK_V2, TASK_V3] {
        let made = create_task(Arc::new(task::TaskService::new(sandbox.clone())));
        services.extend(made.into_values().map(|service| (name.to_owned(), service)));
    }
    services
}
