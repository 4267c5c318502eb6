//! The way into the guest: images that are plugged in, and its agent.

use std::path::PathBuf;

use dyad_agent_api::link::host::Client;
use dyad_runtime_handler::error::Result;

use super::{Machine, lock};
use crate::domain::{AgentChannel, ImageDisk};
use crate::guest::Agent;
use crate::storage::apply::{Image, QemuUser};
use crate::volumes::roots::Roots;

impl Machine {
    /// Plugs the image in, unless it is; gives the serial that the guest finds it by. It
    /// stays until the machine ends: a container that is started again finds it warm.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn plug(&self, image: &Image) -> Result<String> {
        let _turn = self.plugging.turn().await;
        let disk = {
            let plan = lock(&self.plan);
            if plan.images.iter().any(|disk| disk.serial == image.key) {
                return Ok(image.key.clone());
            }
            ImageDisk {
                file: image.file.clone(),
                serial: image.key.clone(),
                unit: free_unit(&plan.images),
            }
        };
        self.libvirt.attach(self.record.uuid, disk.to_xml()).await?;
        lock(&self.plan).images.push(disk);
        self.save()?;
        Ok(image.key.clone())
    }

    /// Takes out the images of which no container is left, in whose guest they are unmounted
    /// then.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub(super) async fn unplug_idle(&self) -> Result<()> {
        let _turn = self.plugging.turn().await;
        let used: Vec<String> = self
            .named_containers()
            .iter()
            .flat_map(|(_, container)| container.image_serials())
            .collect();
        let mut idle = lock(&self.plan).images.clone();
        idle.retain(|disk| !used.contains(&disk.serial));
        for disk in idle {
            self.libvirt.detach(self.record.uuid, disk.to_xml()).await?;
            lock(&self.plan).images.retain(|other| *other != disk);
            self.save()?;
        }
        Ok(())
    }

    /// The guest's agent.
    pub fn agent(&self) -> Agent {
        lock(&self.agent).clone()
    }

    /// Where converted images are kept, and where those of one pod only.
    pub fn image_dirs(&self) -> (PathBuf, PathBuf) {
        (self.folder.images.clone(), self.folder.dir.join("images"))
    }

    /// Where others keep what they mount into its pod.
    pub fn roots(&self) -> Roots {
        Roots::new(&self.config, &self.paths.state_dir)
    }

    /// The user that must be able to read images.
    pub fn qemu_user(&self) -> Option<QemuUser> {
        self.qemu_user
    }
}

/// The first SCSI unit that no image is on.
fn free_unit(images: &[ImageDisk]) -> u32 {
    let taken = |unit: &u32| images.iter().any(|disk| disk.unit == *unit);
    (0..).find(|unit| !taken(unit)).unwrap_or(u32::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_that_was_left_is_taken_again() {
        let on = |unit: u32| ImageDisk {
            file: "/f".into(),
            serial: unit.to_string(),
            unit,
        };
        assert_eq!(free_unit(&[]), 0);
        assert_eq!(free_unit(&[on(0), on(1)]), 2);
        assert_eq!(free_unit(&[on(2), on(0)]), 1);
    }
}
