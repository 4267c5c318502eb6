//! libvirt, and the only module that imports `virt`.
//!
//! ```text
//! async caller --call--> blocking thread --virt--> libvirtd
//!                                                      |
//! watcher <--Change-- "libvirt-events" thread <--------+  (one per process, never ends)
//!                          | connection closed
//!                          +--> "libvirt-reconnect" thread: opens again, registers again,
//!                               *then* reads the state and tells what was missed
//! ```
//!
//! Nothing is opened before the first call. Calls are made so that asking again for what
//! is already so succeeds; a call that finds libvirtd restarted is made once more on the
//! new connection.

mod migrate;

pub use migrate::{Job, JobFigures, Of};

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use dyad_runtime_handler::Error;
use log::{debug, info, warn};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::sys;

use crate::domain::domain_name;
use crate::events::{self, Change, Ending, Observed};

/// How long a call waits for a libvirtd that restarts.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts to reach a libvirtd that is away.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Another host that says nothing for six times so long is gone: libvirt's own defaults
/// (`keepalive_interval`, `keepalive_count`), with which the two libvirts watch each other.
const KEEPALIVE_S: i32 = 5;
const KEEPALIVE_COUNT: u32 = 5;
/// Longer than that; also for a connection that is being made.
const REMOTE_ANSWERS_WITHIN: Duration = Duration::from_secs(35);

/// A call to libvirt that failed.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// No connection could be made.
    #[error(
        "libvirt at {uri} cannot be reached; start libvirtd (or virtqemud), or set `libvirt_uri` in section [machine] of the configuration"
    )]
    Unreachable {
        /// The configured URI.
        uri: String,
        /// What libvirt's client said.
        #[source]
        source: VirtError,
    },
    /// libvirtd answered with an error.
    #[error("{what}")]
    Refused {
        /// What was asked, of which domain.
        what: String,
        /// What libvirtd said.
        #[source]
        source: VirtError,
    },
    /// No such domain.
    #[error("domain {0}")]
    NoDomain(String),
    /// Another host's libvirt does not answer.
    #[error("libvirt at {0} has not answered for {limit} s", limit = REMOTE_ANSWERS_WITHIN.as_secs())]
    Silent(String),
    /// The thread that made the call died.
    #[error("libvirt call ended early: {0}")]
    Aborted(String),
}

impl From<LibvirtError> for Error {
    fn from(error: LibvirtError) -> Self {
        let text = error.to_string();
        match error {
            LibvirtError::Unreachable { source, .. } => {
                Self::Unavailable(text, Some(Box::new(source)))
            }
            LibvirtError::NoDomain(_) => Self::NotFound(text),
            LibvirtError::Refused { source, .. } => Self::other(text, source),
            LibvirtError::Silent(_) | LibvirtError::Aborted(_) => Self::Unavailable(text, None),
        }
    }
}

/// libvirt as one machine's shim uses it. Cheap to clone.
#[derive(Clone)]
pub struct Libvirt {
    shared: Arc<Shared>,
}

struct Shared {
    uri: String,
    /// Another host's: it may vanish without a word.
    remote: bool,
    state: Mutex<State>,
}

/// An open connection; `virt`'s own type closes nothing when dropped.
struct Connection(Connect);

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.0.close() {
            debug!("close the connection to libvirt: {error}");
        }
    }
}

#[derive(Default)]
struct State {
    connection: Option<Arc<Connection>>,
    watch: Option<Watch>,
}

struct Watch {
    domain: Uuid,
    last: Observed,
    changes: mpsc::UnboundedSender<Change>,
}

/// What answers at a URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    /// The daemon's libvirt: `9.0.0`.
    pub libvirt: String,
    /// Its QEMU.
    pub qemu: String,
}

/// libvirt's numbers: major * 1,000,000 + minor * 1,000 + release.
fn version(number: u32) -> String {
    format!(
        "{}.{}.{}",
        number / 1_000_000,
        number / 1000 % 1000,
        number % 1000
    )
}

impl Libvirt {
    /// This host's libvirt at `uri`; connects at the first call.
    pub fn new(uri: impl Into<String>) -> Self {
        Self::at(uri.into(), false)
    }

    /// Another host's. A call to it ends also when the network does not answer any more.
    pub fn remote(uri: impl Into<String>) -> Self {
        Self::at(uri.into(), true)
    }

    fn at(uri: String, remote: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                uri,
                remote,
                state: Mutex::default(),
            }),
        }
    }

    /// Defines the domain, replacing an earlier definition of the same UUID.
    ///
    /// # Errors
    /// libvirt refused the XML, or the name is another domain's.
    pub async fn define(&self, uuid: Uuid, xml: String) -> Result<(), LibvirtError> {
        self.call("define domain", uuid, move |connection| {
            Domain::define_xml(connection, &xml).map(drop)
        })
        .await
    }

    /// Tells every change of the domain from now on, across restarts of libvirtd. The
    /// domain must be defined. A later watch replaces this one.
    ///
    /// # Errors
    /// libvirt cannot be reached, or does not know the domain.
    pub async fn watch(&self, uuid: Uuid) -> Result<mpsc::UnboundedReceiver<Change>, LibvirtError> {
        let (changes, receiver) = mpsc::unbounded_channel();
        let weak = Arc::downgrade(&self.shared);
        let shared = Arc::clone(&self.shared);
        self.call("watch domain", uuid, move |connection| {
            let domain = Domain::lookup_by_uuid(connection, uuid)?;
            shared.lock().watch = Some(Watch {
                domain: uuid,
                last: Observed::Off(Ending::CleanShutdown),
                changes: changes.clone(),
            });
            register_domain_events(connection, &domain, &weak)?;
            let now = observe(&domain)?;
            shared.catch_up(now);
            Ok(())
        })
        .await?;
        Ok(receiver)
    }

    /// Stops watching; the receiver ends.
    pub fn unwatch(&self) {
        self.shared.lock().watch = None;
    }

    /// Powers the domain on with its vCPUs stopped.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn create_paused(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("power on domain", uuid, |domain| {
            if domain.is_active()? {
                return Ok(());
            }
            domain
                .create_with_flags(sys::VIR_DOMAIN_START_PAUSED)
                .map(drop)
        })
        .await
    }

    /// Runs the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("resume domain", uuid, |domain| match observe(domain)? {
            Observed::Running => Ok(()),
            _ => domain.resume().map(drop),
        })
        .await
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("suspend domain", uuid, |domain| match observe(domain)? {
            Observed::Paused => Ok(()),
            _ => domain.suspend().map(drop),
        })
        .await
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn press_power_button(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("shut down domain", uuid, |domain| {
            domain
                .shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
                .map(drop)
        })
        .await
    }

    /// Powers the domain off; nothing happens where it is off or not defined.
    ///
    /// # Errors
    /// libvirt could not end QEMU.
    pub async fn destroy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let ended = self
            .on_domain("destroy domain", uuid, |domain| {
                if !domain.is_active()? {
                    return Ok(());
                }
                match domain.destroy() {
                    // It ended meanwhile.
                    Err(error) if error.code() == ErrorNumber::OperationInvalid => Ok(()),
                    other => other,
                }
            })
            .await;
        ignore_absent(ended)
    }

    /// Removes the domain's definition with all that libvirt keeps for it; nothing
    /// happens where it is not defined.
    ///
    /// # Errors
    /// libvirt refused.
    pub async fn undefine(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let gone = self
            .on_domain("undefine domain", uuid, |domain| {
                domain.undefine_flags(
                    sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                        | sys::VIR_DOMAIN_UNDEFINE_NVRAM
                        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
                )
            })
            .await;
        ignore_absent(gone)
    }

    /// Plugs a device into the running domain and into its definition.
    ///
    /// # Errors
    /// libvirt or QEMU refused the device.
    pub async fn attach(&self, uuid: Uuid, xml: String) -> Result<(), LibvirtError> {
        self.on_domain("attach device to domain", uuid, move |domain| {
            domain
                .attach_device_flags(
                    &xml,
                    sys::VIR_DOMAIN_AFFECT_LIVE | sys::VIR_DOMAIN_AFFECT_CONFIG,
                )
                .map(drop)
        })
        .await
    }

    /// Undoes [`Self::attach`].
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn detach(&self, uuid: Uuid, xml: String) -> Result<(), LibvirtError> {
        self.on_domain("detach device from domain", uuid, move |domain| {
            let active = domain.is_active()?;
            let live = if active {
                sys::VIR_DOMAIN_AFFECT_LIVE
            } else {
                0
            };
            domain
                .detach_device_flags(&xml, live | sys::VIR_DOMAIN_AFFECT_CONFIG)
                .map(drop)
        })
        .await
    }

    /// Asks the guest's balloon to leave it `mib` of the memory that it booted with.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn set_balloon(&self, uuid: Uuid, mib: u64) -> Result<(), LibvirtError> {
        self.on_domain("set the balloon of domain", uuid, move |domain| {
            domain
                .set_memory_flags(mib << 10, sys::VIR_DOMAIN_MEM_LIVE)
                .map(drop)
        })
        .await
    }

    /// Changes a device of the running domain.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn update(&self, uuid: Uuid, xml: String) -> Result<(), LibvirtError> {
        self.on_domain("update a device of domain", uuid, move |domain| {
            domain
                .update_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE)
                .map(drop)
        })
        .await
    }

    /// The running domain's memory: what the balloon leaves, as QEMU tells, in MiB, and its
    /// definition, with what virtio-mem has plugged.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub async fn memory(&self, uuid: Uuid) -> Result<(u64, String), LibvirtError> {
        self.on_domain("read the memory of domain", uuid, |domain| {
            let actual = sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON;
            let stats = domain.memory_stats(0)?;
            let balloon = stats.iter().find(|stat| stat.tag == actual);
            Ok((
                balloon.map_or(0, |stat| stat.val >> 10),
                domain.get_xml_desc(0)?,
            ))
        })
        .await
    }

    /// Resets the machine, as its button would.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub async fn reset(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.on_domain("reset domain", uuid, |domain| domain.reset().map(drop))
            .await
    }

    /// The domain's state now; [`Observed::Absent`] where it is not defined.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub async fn state(&self, uuid: Uuid) -> Result<Observed, LibvirtError> {
        match self.on_domain("read state of domain", uuid, observe).await {
            Err(LibvirtError::NoDomain(_)) => Ok(Observed::Absent),
            other => other,
        }
    }

    /// The host's capabilities as libvirt's XML.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub async fn capabilities(&self) -> Result<String, LibvirtError> {
        self.call("read capabilities", Uuid::nil(), Connect::get_capabilities)
            .await
    }

    /// Which libvirt and which QEMU answer.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub async fn versions(&self) -> Result<Versions, LibvirtError> {
        self.call("read versions", Uuid::nil(), |connection| {
            Ok(Versions {
                libvirt: version(connection.get_lib_version()?),
                qemu: version(connection.get_hyp_version()?),
            })
        })
        .await
    }

    /// UUID and definition of every domain of ours, running or not.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub async fn domains(&self) -> Result<Vec<(Uuid, String)>, LibvirtError> {
        self.call("list domains", Uuid::nil(), |connection| {
            let mut found = Vec::new();
            for domain in connection.list_all_domains(0)? {
                let Ok(uuid) = domain.get_uuid() else {
                    continue;
                };
                // One that is gone meanwhile has no name any more.
                let is_ours = domain
                    .get_name()
                    .is_ok_and(|name| name == domain_name(uuid));
                if let (true, Ok(xml)) = (is_ours, domain.get_xml_desc(0)) {
                    found.push((uuid, xml));
                }
            }
            Ok(found)
        })
        .await
    }

    async fn on_domain<T: Send + 'static>(
        &self,
        what: &'static str,
        uuid: Uuid,
        mut body: impl FnMut(&Domain) -> Result<T, VirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        self.call(what, uuid, move |connection| {
            body(&Domain::lookup_by_uuid(connection, uuid)?)
        })
        .await
    }

    async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        uuid: Uuid,
        body: impl FnMut(&Connect) -> Result<T, VirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let shared = Arc::clone(&self.shared);
        let called = tokio::task::spawn_blocking(move || shared.call_blocking(what, uuid, body));
        let called = if self.shared.remote {
            // Its thread ends when TCP gives the connection up.
            tokio::time::timeout(REMOTE_ANSWERS_WITHIN, called)
                .await
                .map_err(|_| LibvirtError::Silent(self.shared.uri.clone()))?
        } else {
            called.await
        };
        called.map_err(|error| LibvirtError::Aborted(error.to_string()))?
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after every statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call_blocking<T>(
        self: &Arc<Self>,
        what: &str,
        uuid: Uuid,
        mut body: impl FnMut(&Connect) -> Result<T, VirtError>,
    ) -> Result<T, LibvirtError> {
        let started = Instant::now();
        let mut connection = self.connection()?;
        loop {
            let error = match body(&connection.0) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if error.code() == ErrorNumber::NoDomain {
                return Err(LibvirtError::NoDomain(uuid.to_string()));
            }
            let connection_lost = !connection.0.is_alive().unwrap_or(false);
            if !connection_lost || started.elapsed() > RECONNECT_PATIENCE {
                return Err(LibvirtError::Refused {
                    what: format!("{what} {uuid}"),
                    source: error,
                });
            }
            debug!("{what} {uuid}: connection lost, asking again");
            drop(connection);
            connection = loop {
                match self.connection() {
                    Ok(connection) => break connection,
                    Err(error) if started.elapsed() > RECONNECT_PATIENCE => return Err(error),
                    Err(_) => std::thread::sleep(RECONNECT_PAUSE),
                }
            };
        }
    }

    /// The connection, made if there is none that lives.
    fn connection(self: &Arc<Self>) -> Result<Arc<Connection>, LibvirtError> {
        let mut state = self.lock();
        if let Some(connection) = &state.connection
            && connection.0.is_alive().unwrap_or(false)
        {
            return Ok(Arc::clone(connection));
        }
        // Unreferenced only after the lock is gone: its last close runs callbacks.
        let dead = state.connection.take();
        let watched = state.watch.as_ref().map(|watch| watch.domain);
        drop(state);
        drop(dead);

        let unreachable = |source| LibvirtError::Unreachable {
            uri: self.uri.clone(),
            source,
        };
        start_event_loop().map_err(unreachable)?;
        let connection = Connect::open(Some(&self.uri))
            .map(|open| Arc::new(Connection(open)))
            .map_err(unreachable)?;
        register_close(&connection.0, &Arc::downgrade(self)).map_err(unreachable)?;
        if self.remote {
            let keepalive = connection.0.set_keep_alive(KEEPALIVE_S, KEEPALIVE_COUNT);
            keepalive.map_err(unreachable)?;
        }
        if let Some(uuid) = watched {
            // Events first, then the state: what changes in between is seen twice, not never.
            match Domain::lookup_by_uuid(&connection.0, uuid) {
                Ok(domain) => {
                    register_domain_events(&connection.0, &domain, &Arc::downgrade(self))
                        .map_err(unreachable)?;
                    let now = observe(&domain).map_err(unreachable)?;
                    self.catch_up(now);
                }
                Err(error) if error.code() == ErrorNumber::NoDomain => {
                    self.catch_up(Observed::Absent);
                }
                Err(error) => return Err(unreachable(error)),
            }
        }
        let mut state = self.lock();
        // Another thread may have been quicker; one of the two is let go.
        let surplus = state.connection.replace(Arc::clone(&connection));
        drop(state);
        drop(surplus);
        debug!("connected to libvirt at {}", self.uri);
        Ok(connection)
    }

    /// Tells what must have happened, given the state now.
    fn catch_up(&self, now: Observed) {
        let mut state = self.lock();
        if let Some(watch) = &mut state.watch {
            if let Some(change) = events::missed(watch.last, now) {
                watch.tell(change);
            }
            watch.last = now;
        }
    }

    fn tell(&self, change: Change) {
        if let Some(watch) = &mut self.lock().watch {
            watch.tell(change);
        }
    }
}

impl Watch {
    /// Passes a change on unless it only repeats the last known state.
    fn tell(&mut self, change: Change) {
        let next = events::after(self.last, change);
        let repeats = match change {
            Change::Stopped(_) => matches!(self.last, Observed::Off(_) | Observed::Absent),
            Change::Suspended | Change::Resumed => next == self.last,
            _ => false,
        };
        self.last = next;
        if !repeats {
            debug!("domain {}: {change:?}", self.domain);
            // No receiver: nobody watches any more.
            let _ = self.changes.send(change);
        }
    }
}

fn ignore_absent(result: Result<(), LibvirtError>) -> Result<(), LibvirtError> {
    match result {
        Err(LibvirtError::NoDomain(_)) => Ok(()),
        other => other,
    }
}

fn observe(domain: &Domain) -> Result<Observed, VirtError> {
    let (state, reason) = domain.get_state()?;
    Ok(events::observed(state, reason))
}

/// Runs libvirt's event loop on a thread of its own; once per process, before the first
/// connection, as libvirt demands.
fn start_event_loop() -> Result<(), VirtError> {
    static STARTED: OnceLock<Result<(), VirtError>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl()?;
            let spawned = std::thread::Builder::new()
                .name("libvirt-events".into())
                .spawn(|| {
                    loop {
                        if let Err(error) = virt::event::event_run_default_impl() {
                            warn!("libvirt event loop: {error}");
                            std::thread::sleep(RECONNECT_PAUSE);
                        }
                    }
                });
            if let Err(error) = spawned {
                warn!("start the libvirt event thread: {error}");
            }
            Ok(())
        })
        .clone()
}

type Opaque = *mut libc::c_void;

/// A callback's handle on the machine: weak, so that libvirt keeps nothing alive.
fn opaque(shared: &Weak<Shared>) -> Opaque {
    Box::into_raw(Box::new(shared.clone())).cast()
}

/// What [`opaque`] made, borrowed.
///
/// # Safety
/// `opaque` comes from [`opaque`] and was not freed.
unsafe fn shared_of(opaque: Opaque) -> Option<Arc<Shared>> {
    // SAFETY: by the caller's promise it points at a live Weak<Shared>.
    unsafe { &*opaque.cast::<Weak<Shared>>() }.upgrade()
}

unsafe extern "C" fn free_opaque(opaque: Opaque) {
    // SAFETY: libvirt calls this exactly once per registration, with what `opaque` made.
    drop(unsafe { Box::from_raw(opaque.cast::<Weak<Shared>>()) });
}

unsafe extern "C" fn on_lifecycle(
    _connection: sys::virConnectPtr,
    _domain: sys::virDomainPtr,
    event: libc::c_int,
    detail: libc::c_int,
    opaque: Opaque,
) -> libc::c_int {
    // SAFETY: registered with `opaque`, freed only by `free_opaque` afterwards.
    let shared = unsafe { shared_of(opaque) };
    if let (Some(shared), Some(change)) = (shared, events::lifecycle(event, detail)) {
        shared.tell(change);
    }
    0
}

unsafe extern "C" fn on_reboot(
    _connection: sys::virConnectPtr,
    _domain: sys::virDomainPtr,
    opaque: Opaque,
) {
    // SAFETY: registered with `opaque`, freed only by `free_opaque` afterwards.
    if let Some(shared) = unsafe { shared_of(opaque) } {
        shared.tell(Change::Rebooted);
    }
}

unsafe extern "C" fn on_close(
    _connection: sys::virConnectPtr,
    reason: libc::c_int,
    opaque: Opaque,
) {
    // SAFETY: registered with `opaque`, freed only by `free_opaque` afterwards.
    let shared = unsafe { shared_of(opaque) };
    if let Some(shared) = shared {
        warn!("connection to libvirt closed (reason {reason})");
        let weak = Arc::downgrade(&shared);
        drop(shared);
        let spawned = std::thread::Builder::new()
            .name("libvirt-reconnect".into())
            .spawn(move || reconnect(&weak));
        if let Err(error) = spawned {
            warn!("start the reconnect thread: {error}");
        }
    }
}

/// Tries until libvirtd is back, while there is a domain to watch.
fn reconnect(weak: &Weak<Shared>) {
    let mut pause = RECONNECT_PAUSE;
    while let Some(shared) = weak.upgrade() {
        if shared.lock().watch.is_none() {
            return;
        }
        match shared.connection() {
            Ok(_) => {
                info!("connected to libvirt again");
                return;
            }
            Err(error) => debug!("{error}"),
        }
        drop(shared);
        std::thread::sleep(pause);
        pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
    }
}

fn register_close(connection: &Connect, shared: &Weak<Shared>) -> Result<(), VirtError> {
    let data = opaque(shared);
    // SAFETY: the connection is open; libvirt frees `data` through `free_opaque`.
    let registered = unsafe {
        sys::virConnectRegisterCloseCallback(
            connection.as_ptr(),
            Some(on_close),
            data,
            Some(free_opaque),
        )
    };
    if registered < 0 {
        // SAFETY: libvirt does not free the data of a registration that failed.
        unsafe { free_opaque(data) };
        return Err(VirtError::last_error());
    }
    Ok(())
}

fn register_domain_events(
    connection: &Connect,
    domain: &Domain,
    shared: &Weak<Shared>,
) -> Result<(), VirtError> {
    type Lifecycle = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        libc::c_int,
        libc::c_int,
        Opaque,
    ) -> libc::c_int;
    type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, Opaque);
    // SAFETY: libvirt casts it back to virConnectDomainEventCallback for the lifecycle id,
    // as its documentation of virConnectDomainEventRegisterAny demands of callers.
    let lifecycle = unsafe { std::mem::transmute::<Lifecycle, Generic>(on_lifecycle) };
    register_event(
        connection,
        domain,
        shared,
        sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
        lifecycle,
    )?;
    register_event(
        connection,
        domain,
        shared,
        sys::VIR_DOMAIN_EVENT_ID_REBOOT,
        on_reboot,
    )
}

fn register_event(
    connection: &Connect,
    domain: &Domain,
    shared: &Weak<Shared>,
    id: sys::virDomainEventID,
    callback: unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, Opaque),
) -> Result<(), VirtError> {
    let data = opaque(shared);
    // SAFETY: connection and domain are open; the callback has the signature that belongs
    // to `id`; libvirt frees `data` through `free_opaque`.
    let registered = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connection.as_ptr(),
            domain.as_ptr(),
            id as libc::c_int,
            Some(callback),
            data,
            Some(free_opaque),
        )
    };
    if registered < 0 {
        // SAFETY: libvirt does not free the data of a registration that failed.
        unsafe { free_opaque(data) };
        return Err(VirtError::last_error());
    }
    Ok(())
}

/// QEMU's pid, found by the UUID and the pod's disk on its command line: libvirt does not
/// tell it, and its pid file may lie in another mount namespace. While a machine migrates
/// between two nodes of one host, both have the UUID.
///
/// # Errors
/// `/proc` cannot be read, or no such process is there.
pub fn find_qemu(uuid: Uuid, disk: &Path) -> std::io::Result<u32> {
    let mut pids: Vec<u32> = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    // It was started a moment ago.
    pids.sort_unstable_by(|a, b| b.cmp(a));
    let found = pids
        .into_iter()
        .find(|pid| is_qemu(*pid, uuid) && names(*pid, disk));
    found.ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::NotFound,
            format!("no QEMU process has UUID {uuid}"),
        )
    })
}

fn names(pid: u32, path: &Path) -> bool {
    let wanted = path.as_os_str().as_encoded_bytes();
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.windows(wanted.len()).any(|part| part == wanted))
}

fn is_qemu(pid: u32, uuid: Uuid) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let mut words = cmdline.split(|byte| *byte == 0);
    words.any(|word| word == b"-uuid") && words.next() == Some(uuid.to_string().as_bytes())
}

/// Returns when QEMU has ended, or the pid is (now) another's. libvirt says so only once
/// QEMU is reaped, too.
///
/// # Errors
/// The kernel gives no handle on it.
pub async fn qemu_ended(pid: u32, uuid: Uuid) -> std::io::Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or(std::io::ErrorKind::InvalidInput)?;
    let handle = match pidfd_open(raw, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        handle => handle?,
    };
    // Looked at with the handle in hand: from here on the pid stays this process's.
    if is_qemu(pid, uuid) {
        // SAFETY: an OwnedFd is open, and the AsyncFd that now owns it never swaps it for
        // another nor hands it out before its end.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        handle.readable().await?.retain_ready();
    }
    Ok(())
}

/// Sends SIGTERM to QEMU, if the pid is (still) that machine's; says whether it was.
pub fn terminate_qemu(pid: u32, uuid: Uuid) -> bool {
    let Ok(raw) = i32::try_from(pid) else {
        return false;
    };
    is_qemu(pid, uuid)
        && nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(raw),
            nix::sys::signal::Signal::SIGTERM,
        )
        .is_ok()
}

/// Kills the QEMU that runs this machine on this disk, and says whether there was one. libvirt is
/// not asked: it may not answer.
pub fn kill_qemu(uuid: Uuid, disk: &Path) -> bool {
    let Ok(pid) = find_qemu(uuid, disk) else {
        return false;
    };
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    let Ok(handle) = pidfd_open(raw, PidfdFlags::empty()) else {
        return false;
    };
    // Looked at again with the handle in hand: from here on the pid stays this process's.
    is_qemu(pid, uuid)
        && names(pid, disk)
        && rustix::process::pidfd_send_signal(handle, rustix::process::Signal::KILL).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn qemu_has_ended_before_it_is_reaped() {
        let uuid = Uuid::from_u128(7);
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read _; true", "-uuid", &uuid.to_string()])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let soon = Duration::from_millis(50);
        // Its parent goes on a moment before its command line is told.
        while !is_qemu(child.id(), uuid) {
            tokio::time::sleep(soon).await;
        }
        let ended = qemu_ended(child.id(), uuid);
        tokio::pin!(ended);
        assert!(tokio::time::timeout(soon, &mut ended).await.is_err());
        drop(child.stdin.take());
        ended.await.expect("ended");
        // Another's process counts as ended, too.
        qemu_ended(std::process::id(), uuid).await.expect("another");
        child.wait().expect("reaped");
    }
}
