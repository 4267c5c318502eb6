//! The way into the guest: images that are plugged in, and its agent.

use std::path::PathBuf;

use dyad_agent_api::link::host::Client;
use dyad_runtime_handler::error::Result;

use super::{Machine, lock};
use crate::domain::{AgentChannel, ImageDisk};
use crate::guest::Agent;
use crate::storage::apply::{Image, QemuUser};

impl Machine {
    /// Plugs the image in, unless it is; gives the serial that the guest finds it by. It
    /// stays until the machine ends: a container that is started again finds it warm.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn plug(&self, image: &Image) -> Result<String> {
        let _one_at_a_time = self.plugging.lock().await;
        let disk = {
            let plan = lock(&self.plan);
            if plan.images.iter().any(|disk| disk.serial == image.key) {
                return Ok(image.key.clone());
            }
            ImageDisk {
                file: image.file.clone(),
                serial: image.key.clone(),
                unit: u32::try_from(plan.images.len()).unwrap_or(u32::MAX),
            }
        };
        self.libvirt.attach(self.record.uuid, disk.to_xml()).await?;
        lock(&self.plan).images.push(disk);
        self.save()?;
        Ok(image.key.clone())
    }

    /// The guest's agent.
    pub fn agent(&self) -> Agent {
        lock(&self.agent).clone()
    }

    /// Where converted images are kept, and where those of one pod only.
    pub fn image_dirs(&self) -> (PathBuf, PathBuf) {
        (self.folder.images.clone(), self.folder.dir.join("images"))
    }

    /// The user that must be able to read images.
    pub fn qemu_user(&self) -> Option<QemuUser> {
        self.qemu_user
    }
}

/// A new link to a guest.
pub(super) fn connect(channel: &AgentChannel) -> Agent {
    Agent::new(match channel {
        AgentChannel::VirtioSerial { socket } => {
            Client::new(dyad_agent_api::link::host::unix(socket.clone()))
        }
        AgentChannel::Vsock { cid } => Client::new(dyad_agent_api::link::host::vsock(*cid)),
    })
}
