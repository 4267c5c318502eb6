//! The addresses that a machine came with: they stay for the connections that are open, and
//! go after a configured time. Until then its source pod holds them, so that CNI gives them
//! to nobody else.

use std::sync::Arc;
use std::time::Duration;

use dyad_agent_api::proto::agent::{Interface, SetupRequest};
use dyad_runtime_handler::error::Result;
use log::{info, warn};

use super::boot::route;
use super::{Machine, lock};

/// Its guest may be paused.
const AGAIN: Duration = Duration::from_secs(30);

impl Machine {
    /// Takes what only its source had out of the guest, when its time has come.
    pub(super) fn leave_former_later(self: &Arc<Self>) {
        let after = self.config.source_address_s;
        if after == 0 || lock(&self.former).is_empty() {
            return;
        }
        let machine = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(after)).await;
            while let Some(machine) = machine.upgrade() {
                match machine.leave_former().await {
                    Ok(()) => return,
                    Err(error) => warn!(
                        "machine {}: its source's addresses: {}",
                        machine.record.uuid,
                        error.chain()
                    ),
                }
                drop(machine);
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    async fn leave_former(&self) -> Result<()> {
        // What boots here has this pod's alone; what has gone on is the next target's.
        if !self.is_off() && !self.has_let_go() {
            let former = lock(&self.former).clone();
            let request = SetupRequest {
                former_interfaces: former
                    .interfaces
                    .iter()
                    .map(|(name, addresses)| Interface {
                        name: name.clone(),
                        addresses: addresses.clone(),
                        ..Default::default()
                    })
                    .collect(),
                former_routes: former.routes.into_iter().map(route).collect(),
                ..self.network_request()
            };
            self.agent().setup(request).await?;
            info!(
                "machine {}: its source's addresses are gone: {:?}",
                self.record.uuid, former.interfaces
            );
        }
        *lock(&self.former) = Default::default();
        Ok(())
    }
}
