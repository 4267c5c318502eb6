//! Takes away what machines left that nobody owns: after a power cut, and after a `delete` that
//! libvirt did not answer.
//!
//! ```text
//!   each folder of <cache_dir>/machines --look--> verdict (pure) --remove--> reclaim
//!   each domain dyad-* whose disk lay there, without a folder --------------> undefine
//!   sockets without a folder, images that nobody converts any more ---------> unlink
//! ```
//! One at a time on a host: [`sweep`] is called under the shim's own lock.

mod verdict;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dyad_linux::owner::Owner;
use dyad_runtime_handler::config::MachineConfig;
use dyad_runtime_handler::error::{Context, Error, Result};
use dyad_runtime_handler::sweep::Swept;
use log::{debug, info};
use uuid::Uuid;

use self::verdict::{Bundle, Traces, Verdict, verdict};
use crate::libvirt::{self, Libvirt};
use crate::record::{Folder, Record};
use crate::storage::cache;
use crate::{Paths, machine};

/// Clocks are set while a host boots.
const BOOT_MARGIN: Duration = Duration::from_secs(60);

/// Removes what nobody owns; goes on over what fails, and says so.
pub async fn sweep(config: &MachineConfig, paths: &Paths) -> Vec<Swept> {
    let libvirt = Libvirt::new(&config.libvirt_uri);
    let mut swept = Vec::new();
    for folder in Folder::all(paths) {
        if let Some(found) = folder_of_nobody(&libvirt, &folder).await {
            swept.push(found);
        }
    }
    swept.extend(domains_of_nobody(&libvirt, paths).await);
    swept.extend(sockets_of_nobody(paths));
    swept.extend(cache::sweep_unfinished(&paths.cache_dir.join("images")));
    if let Some(folder) = Folder::all(paths).first() {
        folder.kept.sweep();
    }
    cache::sweep(&paths.cache_dir.join("images"));
    for found in &swept {
        match found.error.as_str() {
            "" => info!("swept: {}", found.what),
            error => info!("not swept: {}: {error}", found.what),
        }
    }
    swept
}

/// Whether a `delete` did not get through, so that a sweep is still wanted.
pub fn is_wanted(paths: &Paths) -> bool {
    Folder::all(paths).iter().any(Folder::is_abandoned)
}

/// Removes what a machine left whose shim is gone: QEMU first, and without libvirt, for it must
/// not run on where libvirt does not answer.
///
/// # Errors
/// What could not be removed. The next sweep goes on from there.
pub async fn reclaim(libvirt: &Libvirt, folder: &Folder, mut record: Record) -> Result<()> {
    folder.abandon()?;
    if record.leaving && machine::left(libvirt, &record).await {
        record.moved = true;
        folder.save(&record)?;
    }
    if !record.moved && libvirt::kill_qemu(record.uuid, &folder.disk()) {
        debug!("machine {}: its QEMU is killed", record.uuid);
    }
    machine::remove(libvirt, folder, &record).await
}

async fn folder_of_nobody(libvirt: &Libvirt, folder: &Folder) -> Option<Swept> {
    let name = folder.dir.file_name().unwrap_or_default().to_string_lossy();
    let traces = match look(folder) {
        Ok(traces) => traces,
        Err(error) => {
            let what = format!("machine {name}");
            return Some(Swept::from_result(what, Err(error)));
        }
    };
    if verdict(traces) == Verdict::Keep {
        return None;
    }
    let removed = take_away(libvirt, folder).await;
    Some(Swept::from_result(
        format!("machine {name}"),
        removed.transpose()?,
    ))
}

/// `None`: somebody took it meanwhile.
async fn take_away(libvirt: &Libvirt, folder: &Folder) -> Result<Option<()>> {
    let path = folder.owner_lock();
    let owner = Owner::take(&path).context(|| format!("lock {}", path.display()))?;
    let Some(_owner) = owner else {
        return Ok(None);
    };
    let uuid = folder.uuid()?;
    let record = folder.load()?.unwrap_or_else(|| Record::of_uuid(uuid));
    reclaim(libvirt, folder, record).await.map(Some)
}

fn look(folder: &Folder) -> Result<Traces> {
    let path = folder.owner_lock();
    let is_owned = Owner::is_alive(&path).context(|| format!("look at {}", path.display()))?;
    // A record that a live shim is writing must not be put aside.
    let bundle = match is_owned {
        true => Bundle::NotKnown,
        false => match folder.load()?.and_then(|record| record.bundle) {
            None => Bundle::NotKnown,
            Some(bundle) if bundle.exists() => Bundle::There,
            Some(_) => Bundle::Gone,
        },
    };
    Ok(Traces {
        is_owned,
        is_abandoned: folder.is_abandoned(),
        bundle,
        is_older_than_boot: is_older_than(&folder.dir, booted_at()?),
    })
}

/// When the host was booted, by the clock of now.
fn booted_at() -> Result<SystemTime> {
    let up = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .context(|| "ask for the host's uptime".into())?;
    SystemTime::now()
        .checked_sub(Duration::from(up))
        .ok_or_else(|| Error::FailedPrecondition("the host's clock is before its boot".into()))
}

/// Whether neither the folder nor anything in it was written after `boot`.
fn is_older_than(dir: &Path, boot: SystemTime) -> bool {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all = files.map(|entry| entry.path()).chain([dir.to_owned()]);
    all.all(|path| {
        let written = path.symlink_metadata().and_then(|meta| meta.modified());
        written.is_ok_and(|written| written + BOOT_MARGIN < boot)
    })
}

/// Domains whose folder is gone, so that no verdict finds them. A folder is made before its
/// domain is defined, and removed after that is undefined.
async fn domains_of_nobody(libvirt: &Libvirt, paths: &Paths) -> Vec<Swept> {
    let domains = match libvirt.domains().await {
        Ok(domains) => domains,
        Err(error) => {
            let error = Err(error.into());
            return vec![Swept::from_result("the domains of libvirt".into(), error)];
        }
    };
    let mut swept = Vec::new();
    for (uuid, xml) in domains {
        let folder = match folder_in(&xml, &paths.cache_dir.join("machines")) {
            Some(folder) if !folder.exists() => folder,
            _ => continue,
        };
        debug!("domain {uuid}: {} is gone", folder.display());
        let removed = async {
            libvirt.destroy(uuid).await?;
            libvirt.undefine(uuid).await?;
            Ok(())
        };
        let what = format!("domain {}", crate::domain::domain_name(uuid));
        swept.push(Swept::from_result(what, removed.await));
    }
    swept
}

/// The folder of a machine that the definition names as its disk's.
fn folder_in(xml: &str, machines: &Path) -> Option<PathBuf> {
    let prefix = format!("{}/", machines.display());
    let (_, rest) = xml.split_once(&prefix)?;
    let (name, _) = rest.split_once("/disk.img")?;
    let uuid: Uuid = name.parse().ok()?;
    Some(machines.join(uuid.to_string()))
}

/// Socket folders of machines that have no other folder. That one is made first.
fn sockets_of_nobody(paths: &Paths) -> Vec<Swept> {
    let dirs = std::fs::read_dir(paths.state_dir.join("machines"));
    let dirs = dirs.into_iter().flatten().flatten();
    dirs.filter_map(|entry| {
        let uuid: Uuid = entry.file_name().to_str()?.parse().ok()?;
        let folder = Folder::new(&paths.state_dir, &paths.cache_dir, uuid);
        if folder.dir.exists() {
            return None;
        }
        let what = format!("sockets of machine {uuid}");
        Some(Swept::from_result(what, folder.remove()))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(dir: &Path) -> Paths {
        Paths {
            state_dir: dir.join("run"),
            cache_dir: dir.join("lib"),
        }
    }

    fn machine(paths: &Paths, sandbox: &str) -> (Folder, Record) {
        let record = Record::new("k8s.io", sandbox);
        let folder = Folder::new(&paths.state_dir, &paths.cache_dir, record.uuid);
        std::fs::create_dir_all(&folder.dir).unwrap();
        (folder, record)
    }

    #[test]
    fn a_folder_is_seen_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let (folder, mut record) = machine(&paths, "s1");
        let bundle = dir.path().join("bundle");
        let seen = |folder: &Folder| look(folder).unwrap();

        assert_eq!(seen(&folder).bundle, Bundle::NotKnown, "no record yet");
        assert!(!seen(&folder).is_older_than_boot, "it was made now");
        record.bundle = Some(bundle.clone());
        folder.save(&record).unwrap();
        assert_eq!(seen(&folder).bundle, Bundle::Gone);
        std::fs::create_dir(&bundle).unwrap();
        assert_eq!(seen(&folder).bundle, Bundle::There);
        assert_eq!(verdict(seen(&folder)), Verdict::Keep);
        folder.abandon().unwrap();
        assert_eq!(verdict(seen(&folder)), Verdict::Remove);
        let owner = Owner::take(&folder.owner_lock()).unwrap();
        assert_eq!(verdict(seen(&folder)), Verdict::Keep, "a live shim has it");
        drop(owner);
        assert!(is_wanted(&paths));
    }

    #[test]
    fn what_was_written_before_the_boot_is_told_from_what_was_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk.img"), "").unwrap();
        let now = SystemTime::now();
        assert!(!is_older_than(dir.path(), now));
        assert!(is_older_than(dir.path(), now + 2 * BOOT_MARGIN));
    }

    #[test]
    fn a_domain_names_its_folder_by_its_disk() {
        let machines = Path::new("/var/lib/dyad/machines");
        let uuid = Uuid::from_u128(7);
        let disk = format!("<source file='/var/lib/dyad/machines/{uuid}/disk.img'/>");
        assert_eq!(
            folder_in(&disk, machines),
            Some(machines.join(uuid.to_string()))
        );
        for other in [
            format!("<source file='/srv/dyad/machines/{uuid}/disk.img'/>"),
            "<source file='/var/lib/dyad/machines/../../x/disk.img'/>".into(),
            String::new(),
        ] {
            assert_eq!(folder_in(&other, machines), None, "{other}");
        }
    }

    #[test]
    fn sockets_go_with_their_machines_folder() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let (folder, _) = machine(&paths, "s1");
        let (gone, _) = machine(&paths, "s2");
        std::fs::remove_dir(&gone.dir).unwrap();
        for folder in [&folder, &gone] {
            std::fs::create_dir_all(&folder.run_dir).unwrap();
        }
        assert_eq!(sockets_of_nobody(&paths).len(), 1);
        assert!(folder.run_dir.exists());
        assert!(!gone.run_dir.exists());
    }
}
