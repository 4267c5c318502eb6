//! What libvirt does for a migration: definitions, metadata, the job itself.

use std::ffi::CStr;
use std::ptr;
use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;
use virt::domain::{Domain, MigrateParameters};
use virt::error::{Error as VirtError, ErrorNumber};
use virt::sys;

use super::{Libvirt, LibvirtError};

/// A migration job, as libvirt is asked for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Job {
    /// The other libvirt.
    pub destination: String,
    /// The definition that it is to run there.
    pub xml: String,
    /// Where QEMU's stream goes; `None`: libvirt chooses.
    pub migrate_uri: Option<String>,
    /// Where the disks go; `None`: libvirt chooses.
    pub disks_uri: Option<String>,
    /// Disks to copy, by target device (`vda`).
    pub disks: Vec<String>,
    /// MiB per second; 0: no bound.
    pub bandwidth_mib_s: u64,
    /// Slow the guest down when it does not converge.
    pub auto_converge: bool,
    /// Allow the switch before all memory is copied.
    pub post_copy: bool,
    /// Connections; 0 and 1: one.
    pub parallel: u32,
    /// Encrypt.
    pub tls: bool,
}

/// Figures of the job under way; bytes, bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobFigures {
    /// There is a job.
    pub active: bool,
    /// It failed or was cancelled; libvirt may not be done with it.
    pub given_up: bool,
    /// Copied.
    pub done: u64,
    /// To copy.
    pub total: u64,
    /// Still to copy.
    pub remaining: u64,
    /// Speed.
    pub rate: u64,
    /// What the guest dirties.
    pub dirty_rate: u64,
    /// Expected while it is under way, real afterwards.
    pub downtime: Option<Duration>,
    /// Of that, memory: 0 while disks are copied.
    pub memory_done: u64,
    /// Pages that the other side asked for: it is in post-copy.
    pub fetched: u64,
}

/// Where metadata is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Of what runs.
    Live,
    /// Of the definition.
    Definition,
}

impl Of {
    fn flags(self) -> u32 {
        match self {
            Self::Live => sys::VIR_DOMAIN_AFFECT_LIVE,
            Self::Definition => sys::VIR_DOMAIN_AFFECT_CONFIG,
        }
    }
}

impl Libvirt {
    /// The running domain's XML, as it may be given to another host.
    ///
    /// # Errors
    /// It is not defined, or libvirt cannot be reached.
    pub async fn migratable_xml(&self, uuid: Uuid) -> Result<String, LibvirtError> {
        self.on_domain("read XML of domain", uuid, |domain| {
            domain.get_xml_desc(sys::VIR_DOMAIN_XML_MIGRATABLE)
        })
        .await
    }

    /// The text of our metadata element of namespace `uri`; `None`: there is none.
    ///
    /// # Errors
    /// The domain is not defined (or not running), or libvirt cannot be reached.
    pub async fn metadata(
        &self,
        uuid: Uuid,
        uri: &'static str,
        of: Of,
    ) -> Result<Option<String>, LibvirtError> {
        self.on_domain("read metadata of domain", uuid, move |domain| {
            let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
            match domain.get_metadata(kind, Some(uri), of.flags()) {
                Ok(element) => Ok(Some(element)),
                Err(error) if error.code() == ErrorNumber::NoDomainMetadata => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Sets (or with `None` removes) the metadata element of namespace `uri`.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn set_metadata(
        &self,
        uuid: Uuid,
        (key, uri): (&'static str, &'static str),
        element: Option<String>,
        of: Of,
    ) -> Result<(), LibvirtError> {
        self.on_domain("write metadata of domain", uuid, move |domain| {
            let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
            domain
                .set_metadata(kind, element.as_deref(), Some(key), Some(uri), of.flags())
                .map(drop)
        })
        .await
    }

    /// Whether the domain runs, or stands, while a part of its memory is on its source still.
    ///
    /// # Errors
    /// It is not defined, or libvirt cannot be reached.
    pub async fn is_in_post_copy(&self, uuid: Uuid) -> Result<bool, LibvirtError> {
        self.on_domain("read state of domain", uuid, |domain| {
            let (state, reason) = domain.get_state()?;
            let reason = reason.cast_unsigned();
            Ok(matches!(
                (state, reason),
                (
                    sys::VIR_DOMAIN_RUNNING,
                    sys::VIR_DOMAIN_RUNNING_POSTCOPY | sys::VIR_DOMAIN_RUNNING_POSTCOPY_FAILED
                ) | (
                    sys::VIR_DOMAIN_PAUSED,
                    sys::VIR_DOMAIN_PAUSED_POSTCOPY | sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED
                )
            ))
        })
        .await
    }

    /// Moves the running domain; returns when that has ended either way. Not repeated
    /// when the connection breaks: what it came to must be looked up.
    ///
    /// # Errors
    /// libvirt's words.
    pub async fn migrate(&self, uuid: Uuid, job: Job) -> Result<(), LibvirtError> {
        // On a connection of its own: calls on one connection wait for each other, and this
        // one takes as long as the migration.
        let own = Self::new(self.shared.uri.clone());
        tokio::task::spawn_blocking(move || {
            let connection = own.shared.connection()?;
            let migrated =
                Domain::lookup_by_uuid(&connection.0, uuid).and_then(|domain| run(&domain, job));
            migrated.map_err(|source| LibvirtError::Refused {
                what: format!("migrate domain {uuid}"),
                source,
            })
        })
        .await
        .map_err(|error| LibvirtError::Aborted(error.to_string()))?
    }

    /// Figures of the domain's job under way.
    ///
    /// # Errors
    /// It does not run, or libvirt cannot be reached.
    pub async fn job(&self, uuid: Uuid) -> Result<JobFigures, LibvirtError> {
        self.on_domain("read the job of domain", uuid, |domain| {
            job_figures(domain, 0)
        })
        .await
    }

    /// Figures of the job that ended last: of a domain that arrived, of its migration.
    ///
    /// # Errors
    /// It does not run, or libvirt cannot be reached.
    pub async fn finished_job(&self, uuid: Uuid) -> Result<JobFigures, LibvirtError> {
        self.on_domain("read the last job of domain", uuid, |domain| {
            job_figures(domain, sys::VIR_DOMAIN_JOB_STATS_COMPLETED)
        })
        .await
    }

    /// Gives the job up.
    ///
    /// # Errors
    /// There is none, or it cannot be given up any more.
    pub async fn abort_job(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("abort the migration of domain", uuid, |domain| {
            // SAFETY: the domain is open.
            check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
        })
        .await
    }

    /// Closes QEMU's connections to the other QEMU: what waits for the network fails at once.
    /// libvirt has no call for it, QEMU has (`yank`). Says whether there were any.
    ///
    /// # Errors
    /// It does not run, or libvirt cannot be reached.
    pub async fn break_streams(&self, uuid: Uuid) -> Result<bool, LibvirtError> {
        self.on_domain("break off the migration of domain", uuid, |domain| {
            let known = domain.qemu_monitor_command(r#"{"execute":"query-yank"}"#, 0)?;
            let command = yank(&known);
            if let Some(command) = &command {
                domain.qemu_monitor_command(command, 0)?;
            }
            Ok(command.is_some())
        })
        .await
    }

    /// Runs the domain over there now; the rest of its memory follows.
    ///
    /// # Errors
    /// The job was not started for that, or is not so far.
    pub async fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("start post-copy of domain", uuid, |domain| {
            // SAFETY: the domain is open.
            check(unsafe { sys::virDomainMigrateStartPostCopy(domain.as_ptr(), 0) })
        })
        .await
    }

    /// Stops the vCPUs of a domain that is being migrated, so that it converges.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn suspend_for_migration(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("suspend domain", uuid, |domain| domain.suspend().map(drop))
            .await
    }

    /// Bounds the job under way, in MiB per second.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn set_bandwidth(&self, uuid: Uuid, mib_s: u64) -> Result<(), LibvirtError> {
        self.on_domain("bound the migration of domain", uuid, move |domain| {
            domain.migrate_set_max_speed(mib_s, 0).map(drop)
        })
        .await
    }

    /// How long the domain may stand still at the switch.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn set_max_downtime(
        &self,
        uuid: Uuid,
        downtime: Duration,
    ) -> Result<(), LibvirtError> {
        let ms = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX);
        self.on_domain("set the downtime of domain", uuid, move |domain| {
            domain.migrate_set_max_downtime(ms, 0).map(drop)
        })
        .await
    }
}

/// Of what `query-yank` answered, the command that closes a migration's; `None`: there is none.
fn yank(known: &str) -> Option<String> {
    let known: Value = serde_json::from_str(known).ok()?;
    let of_migration = |instance: &&Value| {
        let node = instance["node-name"].as_str().unwrap_or_default();
        // As libvirt calls the other side's disks.
        instance["type"] == "migration" || node.starts_with("migration-")
    };
    let instances: Vec<&Value> = known["return"]
        .as_array()?
        .iter()
        .filter(of_migration)
        .collect();
    let command = json!({"execute": "yank", "arguments": {"instances": instances}});
    (!instances.is_empty()).then(|| command.to_string())
}

fn check(result: libc::c_int) -> Result<(), VirtError> {
    if result < 0 {
        return Err(VirtError::last_error());
    }
    Ok(())
}

fn run(domain: &Domain, job: Job) -> Result<(), VirtError> {
    let mut flags = sys::VIR_MIGRATE_LIVE
        | sys::VIR_MIGRATE_PEER2PEER
        | sys::VIR_MIGRATE_NON_SHARED_DISK
        | sys::VIR_MIGRATE_PERSIST_DEST
        | sys::VIR_MIGRATE_UNDEFINE_SOURCE
        | sys::VIR_MIGRATE_ABORT_ON_ERROR;
    for (wanted, flag) in [
        (job.auto_converge, sys::VIR_MIGRATE_AUTO_CONVERGE),
        (job.post_copy, sys::VIR_MIGRATE_POSTCOPY),
        (job.parallel > 1, sys::VIR_MIGRATE_PARALLEL),
        (job.tls, sys::VIR_MIGRATE_TLS),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    let parameters = MigrateParameters {
        dest_xml: Some(job.xml.clone()),
        persist_xml: Some(job.xml),
        uri: job.migrate_uri,
        disks_uri: job.disks_uri,
        migrate_disks: job.disks,
        bandwidth: (job.bandwidth_mib_s != 0).then_some(job.bandwidth_mib_s),
        parallel_connections: (job.parallel > 1).then(|| job.parallel.cast_signed()),
        ..MigrateParameters::default()
    };
    domain.migrate_to_uri3(Some(&job.destination), parameters, flags)
}

/// Not through `virt`'s own wrapper, which makes a Vec of what libvirt allocated, also
/// where that is nothing.
fn job_figures(domain: &Domain, flags: u32) -> Result<JobFigures, VirtError> {
    let mut kind: libc::c_int = 0;
    let mut count: libc::c_int = 0;
    let mut parameters: sys::virTypedParameterPtr = ptr::null_mut();
    // SAFETY: the domain is open; libvirt allocates the list, which is freed below.
    check(unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut parameters,
            &raw mut count,
            flags,
        )
    })?;
    let get = |name: &CStr| -> Option<u64> {
        let mut value: libc::c_ulonglong = 0;
        // SAFETY: the list has `count` entries (none: libvirt reads nothing).
        let found = unsafe {
            sys::virTypedParamsGetULLong(parameters, count, name.as_ptr(), &raw mut value)
        };
        (found == 1).then_some(value)
    };
    let number = |name| get(name).unwrap_or_default();
    let page = number(sys::VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE).max(1);
    let figures = JobFigures {
        active: kind != sys::VIR_DOMAIN_JOB_NONE as libc::c_int,
        given_up: [sys::VIR_DOMAIN_JOB_FAILED, sys::VIR_DOMAIN_JOB_CANCELLED]
            .contains(&kind.cast_unsigned()),
        done: number(sys::VIR_DOMAIN_JOB_DATA_PROCESSED),
        total: number(sys::VIR_DOMAIN_JOB_DATA_TOTAL),
        remaining: number(sys::VIR_DOMAIN_JOB_DATA_REMAINING),
        rate: number(sys::VIR_DOMAIN_JOB_MEMORY_BPS) + number(sys::VIR_DOMAIN_JOB_DISK_BPS),
        dirty_rate: number(sys::VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE).saturating_mul(page),
        downtime: get(sys::VIR_DOMAIN_JOB_DOWNTIME).map(Duration::from_millis),
        memory_done: number(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED),
        fetched: number(sys::VIR_DOMAIN_JOB_MEMORY_POSTCOPY_REQS),
    };
    // SAFETY: allocated by libvirt, not used after this.
    unsafe { sys::virTypedParamsFree(parameters, count) };
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::yank;

    #[test]
    fn only_a_migration_s_connections_are_closed() {
        // QEMU 10.0.2, while memory was copied.
        let known = r#"{"return":[{"type":"chardev","id":"charmonitor"},
            {"type":"chardev","id":"charchannel0"},{"type":"migration"},
            {"node-name":"migration-vda-storage","type":"block-node"}],"id":"libvirt-802"}"#;
        let command = yank(known).expect("a command");
        assert!(command.contains("migration-vda-storage"), "{command}");
        assert!(command.contains(r#"{"type":"migration"}"#), "{command}");
        assert!(!command.contains("char"), "{command}");
        for nothing in [
            r#"{"return":[{"type":"chardev","id":"charmonitor"}]}"#,
            r#"{"return":[]}"#,
            "",
        ] {
            assert_eq!(yank(nothing), None, "{nothing}");
        }
    }
}
