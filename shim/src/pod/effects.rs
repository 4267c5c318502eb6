//! What each [`Call`] of the model does, beside the driver's loop. What waits for a disk or
//! mounts is done by tokio's helper threads, which come when they are needed and go again: the
//! loop's thread serves the pod. (A thread's heap stays, so what only touches memory, as a
//! bundle, does not go there: a container pod's shim must stay small.)

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dyad_runtime_handler::error::Context as _;
use dyad_runtime_handler::handler::{Instance, RuntimeHandler};
use dyad_runtime_handler::migration::{
    Arrival, Hurry, MigrationParameters, MigrationProgress, Sent,
};
use dyad_runtime_handler::spec::{ContainerSpec, ExecSpec, Role};
use dyad_runtime_handler::{Error, Result};
use log::{info, warn};
use tokio::sync::watch;

use super::ExecRequest;
use super::driver::{Driver, Held};
use super::model::change::{Call, Ended, Input, Job, Plain, Prepared, Start};
use super::model::task::Made;
use crate::bootstrap::launch::Launch;
use crate::fence::{Tombstone, Tombstones};
use crate::migration::PodState;
use crate::pod_files::{self, PodFiles};
use crate::pod_spec::PodConfig;
use crate::spec;
use crate::stdio::{OpenStdio, Owner, StdioUris};

impl Driver {
    /// Begins an effect, whose end comes back as an input.
    pub(super) fn begin(&mut self, call: Call) {
        match call {
            Call::Create(job, prepared) => self.begin_create(job, *prepared),
            Call::AddExec(job, exec, request) => self.begin_exec(job, exec, *request),
            Call::Start(job, how) => self.begin_start(job, how),
            Call::Stop(job, grace, after) => self.call(
                job,
                move |instance| async move { instance.stop(grace).await },
                move |job, result| Ended::Stop(job, after, result),
            ),
            Call::Reboot { job, force, grace } => self.call(
                job,
                move |instance| async move {
                    match instance.reboot() {
                        Some(reboot) => reboot.reboot(force, grace).await,
                        None => Err(Error::Unimplemented("a reboot".into())),
                    }
                },
                Ended::Reboot,
            ),
            Call::Pause(job) => self.call(
                job,
                |instance| async move { instance.pause().await },
                Ended::Pause,
            ),
            Call::Checkpoint(job, to) => {
                let images = to.images.clone();
                self.call(
                    job,
                    move |instance| async move { instance.checkpoint(&to).await },
                    move |job, result| Ended::Checkpoint(job, images, result),
                );
            }
            Call::Resume(job) => self.call(
                job,
                |instance| async move { instance.resume().await },
                Ended::Resume,
            ),
            Call::ThawFor { holder, signal } => {
                let frozen = holder.as_ref().unwrap_or(&signal.job).clone();
                let id = frozen.container.clone();
                self.call(
                    frozen,
                    move |instance| async move {
                        let result = instance.resume().await;
                        if let Err(error) = &result {
                            warn!("resume {id} for a signal: {}", error.chain());
                        }
                        result
                    },
                    move |_, result| Ended::ThawFor {
                        holder,
                        signal,
                        result,
                    },
                );
            }
            Call::LetGo { job, signal } => {
                let id = job.container.clone();
                self.call(
                    job,
                    move |instance| async move {
                        let stopped = instance.stop(Duration::ZERO).await;
                        if let Err(error) = stopped {
                            warn!("{id}: {}", error.chain());
                        }
                        Ok(())
                    },
                    move |job, _| Ended::LetGo { job, signal },
                );
            }
            Call::Plain { job, exec, what } => self.call(
                job,
                move |instance| async move { plain(&*instance, exec.as_deref(), what).await },
                Ended::Plain,
            ),
            Call::Delete(job) => self.begin_delete(job),
            Call::StartExec(job, exec) => {
                let id = exec.clone();
                self.call(
                    job,
                    move |instance| async move { instance.start_exec(&id).await },
                    move |job, result| Ended::StartExec(job, exec, result),
                );
            }
            Call::DeleteExec(job, exec) => {
                let id = exec.clone();
                self.call(
                    job,
                    move |instance| async move {
                        match instance.delete_exec(&id).await {
                            // One that could not be run may be gone on the backend's side.
                            Err(Error::NotFound(_)) => Ok(()),
                            result => result,
                        }
                    },
                    move |job, result| Ended::DeleteExec(job, exec, result),
                );
            }
            Call::CheckMigration(number, parameters) => self.begin_check(number, parameters),
            Call::PutFence(number) => {
                let (fence, tombstone) = (self.fence(), self.tombstone(false));
                let put = on_helper(move || fence.put(&tombstone));
                self.input(put, move |result| Ended::PutFence(number, result));
            }
            Call::SettleFence(number) => {
                let (fence, tombstone) = (self.fence(), self.tombstone(true));
                let put = on_helper(move || fence.put(&tombstone));
                self.input(warned(put), move |()| Ended::SettleFence(number));
            }
            Call::LiftFence(number) => {
                let (fence, launch) = (self.fence(), &self.pod.launch);
                let namespace = launch.containerd_namespace.clone();
                let sandbox = launch.sandbox_id.clone();
                let removed = on_helper(move || fence.remove(&namespace, &sandbox));
                self.input(warned(removed), move |()| Ended::LiftFence(number));
            }
            Call::Send(number, parameters, pod) => self.begin_send(number, parameters, &pod),
            Call::Deadline(number, timeout) => {
                let passed = tokio::time::sleep(timeout);
                self.input(passed, move |()| Ended::Deadline(number, timeout));
            }
            Call::AskMover(number, hurry) => self.begin_ask(number, hurry),
            Call::Receive => {
                let handler = Arc::clone(&self.handler);
                self.input(receive(handler), Ended::Receive);
            }
        }
    }

    /// Runs `future` and puts its end into the model.
    fn input<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
        ended: impl FnOnce(T) -> Ended + Send + 'static,
    ) {
        self.effect(future, move |driver, output| {
            driver.step(Input::Ended(ended(output)));
        });
    }

    /// A call of a container's instance.
    fn call<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
        &self,
        job: Job,
        call: impl FnOnce(Arc<dyn Instance>) -> F,
        ended: impl FnOnce(Job, Result<T>) -> Ended + Send + 'static,
    ) {
        // The model asks it of what is there, so the error is none that happens.
        match self.instance(&job.container).map(call) {
            Ok(future) => self.input(future, move |result| ended(job, result)),
            Err(error) => self.input(std::future::ready(()), move |()| ended(job, Err(error))),
        }
    }

    // --- Containers --------------------------------------------------------------

    fn begin_create(&mut self, job: Job, prepared: Prepared) {
        let Prepared {
            request,
            identity,
            spec,
            bare,
            ..
        } = prepared;
        if identity.role == Role::Sandbox {
            self.info = spec.pod.clone();
        }
        let making = Making {
            launch: self.pod.launch.for_container(&request.id, identity.role),
            bundle: request.bundle.clone(),
            bare,
            files: self
                .files
                .clone()
                .filter(|_| identity.role == Role::Container),
            pod_pid: self.pod_pid(),
        };
        let handler = Arc::clone(&self.handler);
        let bundle = request.bundle;
        let effect = async move {
            let created = create(&*handler, making, spec, &request.stdio).await;
            if created.is_err() {
                forget_launch(&bundle);
            }
            created
        };
        let rootfs = request.rootfs;
        self.effect(effect, move |driver, result| {
            let made = result.map(|created| driver.hold(&job.container, created));
            driver.step(Input::Ended(Ended::Create(job, rootfs, made)));
        });
    }

    /// The pod's host pid, or 0.
    fn pod_pid(&self) -> u32 {
        let pod = self.held.get(&self.pod.launch.sandbox_id);
        pod.and_then(|held| held.instance.pid()).unwrap_or(0)
    }

    fn hold(&mut self, container: &str, created: Created) -> Made {
        let Created {
            stdio,
            instance,
            files,
        } = created;
        if files.is_some() {
            self.files = files;
        }
        let made = Made {
            pid: instance.pid().unwrap_or(0),
            reboots: instance.reboot().is_some(),
        };
        let held = Held {
            instance,
            stdio: Some(stdio),
            execs: BTreeMap::new(),
            usage: None,
        };
        self.held.insert(container.to_owned(), held);
        made
    }

    fn begin_start(&self, job: Job, how: Start) {
        let held = self.held.get(&job.container);
        let stdio = match held.and_then(|held| held.stdio.as_ref()) {
            Some(stdio) if how == Start::Again => stdio.duplicate().map(Some),
            _ => Ok(None),
        };
        let id = job.container.clone();
        self.call(
            job,
            move |instance| async move {
                match how {
                    Start::First => instance.start(None).await,
                    Start::Again => instance.start(stdio?).await.inspect_err(|error| {
                        warn!("start {id} again: {}", error.chain());
                    }),
                    Start::DoneOnSource => {
                        instance.stop(Duration::ZERO).await?;
                        Ok(std::process::id())
                    }
                }
            },
            move |job, result| Ended::Start(job, how, result),
        );
    }

    fn begin_delete(&self, job: Job) {
        let bundle = self
            .model
            .task(&job.container)
            .map(|task| task.bundle.clone());
        self.call(
            job,
            move |instance| async move {
                instance.delete().await?;
                forget_launch(&bundle?);
                Ok(())
            },
            Ended::Delete,
        );
    }

    fn begin_exec(&self, job: Job, exec: String, request: ExecRequest) {
        let namespace = self.pod.launch.containerd_namespace.clone();
        let instance = self.instance(&job.container);
        let container = job.container.clone();
        let effect = async move {
            let owner = Owner {
                namespace: &namespace,
                container: &container,
            };
            let stdio = OpenStdio::open(&request.stdio, owner).await?;
            let spec = ExecSpec {
                exec_id: request.exec_id,
                process: request.process,
                stdio: stdio.duplicate()?,
            };
            instance?.exec(spec).await?;
            Ok(stdio)
        };
        self.effect(effect, move |driver, result: Result<OpenStdio>| {
            let result = result.map(|stdio| {
                if let Some(held) = driver.held.get_mut(&job.container) {
                    held.execs.insert(exec.clone(), stdio);
                }
            });
            driver.step(Input::Ended(Ended::AddExec(job, exec, result)));
        });
    }

    // --- Migration ---------------------------------------------------------------

    pub(super) fn fence(&self) -> Tombstones {
        Tombstones::new(&self.pod.launch.config.cache_dir)
    }

    fn tombstone(&self, settled: bool) -> Tombstone {
        let launch = &self.pod.launch;
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Tombstone {
            containerd_namespace: launch.containerd_namespace.clone(),
            sandbox_id: launch.sandbox_id.clone(),
            pod_uid: self.info.uid.clone(),
            pod: format!("{}/{}", self.info.namespace, self.info.name),
            destination: self.migrations.borrow().destination.clone(),
            settled,
            unix_s: since.as_secs(),
        }
    }

    fn begin_check(&self, number: u64, parameters: Arc<MigrationParameters>) {
        let handler = Arc::clone(&self.handler);
        let check = async move {
            let checked = handler.migration()?.check(&parameters).await;
            checked.inspect_err(|error| info!("migration refused: {}", error.chain()))
        };
        self.input(check, move |result| Ended::CheckMigration(number, result));
    }

    fn begin_send(&self, number: u64, parameters: Arc<MigrationParameters>, pod: &PodState) {
        let pod = pod.encode();
        let (progress, mut told) = watch::channel(MigrationProgress::default());
        let migrations = self.migrations.clone();
        let began = self.migration_began;
        tokio::spawn(async move {
            while told.changed().await.is_ok() {
                let progress = *told.borrow_and_update();
                migrations.send_if_modified(|view| {
                    let same = view.number == number && view.outcome.is_none();
                    if same {
                        view.progress = progress;
                        view.elapsed = began.elapsed();
                    }
                    same
                });
            }
        });
        let handler = Arc::clone(&self.handler);
        let send = async move { handler.migration()?.send(&parameters, pod, progress).await };
        self.input(send, move |result: Result<Sent>| {
            Ended::Send(number, result)
        });
    }

    /// Cancels, or (`hurry`) brings to an end.
    fn begin_ask(&self, number: u64, hurry: Option<Hurry>) {
        let handler = Arc::clone(&self.handler);
        let ask = async move {
            let migration = handler.migration()?;
            match hurry {
                None => migration.cancel().await.inspect_err(|error| {
                    info!("the migration cannot be cancelled: {}", error.chain());
                }),
                Some(how) => migration.hurry(how).await.inspect_err(|error| {
                    warn!("{how:?}: {}; giving the migration up", error.chain());
                }),
            }
        };
        self.input(ask, move |result| Ended::AskMover(number, hurry, result));
    }
}

/// What a create leaves in the driver.
struct Created {
    stdio: OpenStdio,
    instance: Arc<dyn Instance>,
    /// Of a pod without a pause container: its own.
    files: Option<PodFiles>,
}

/// What is made of a container before the backend is asked.
struct Making {
    launch: Launch,
    bundle: PathBuf,
    bare: Option<Box<PodConfig>>,
    /// The pod's files, for a container of it.
    files: Option<PodFiles>,
    pod_pid: u32,
}

async fn create(
    handler: &dyn RuntimeHandler,
    making: Making,
    mut spec: ContainerSpec,
    uris: &StdioUris,
) -> Result<Created> {
    let Making {
        launch,
        bundle,
        bare,
        files,
        pod_pid,
    } = making;
    // From here on something may be left, should we die. The bundle lies in memory.
    launch.write(&bundle)?;
    if let Some(files) = files
        && files.share_with(&mut spec.oci, pod_pid)
    {
        // The OCI runtime reads it there, now and at each start in place.
        spec::write(&bundle, &spec.oci)?;
    }
    let files = match bare {
        None => None,
        Some(pod) => Some(on_helper(move || remake_files(&launch.pod_dir(), &pod)).await?),
    };
    let owner = Owner {
        namespace: &spec.containerd_namespace,
        container: &spec.id,
    };
    let stdio = OpenStdio::open(uris, owner).await?;
    spec.stdio = stdio.duplicate()?;
    let instance = handler.create(spec).await?;
    Ok(Created {
        stdio,
        instance,
        files,
    })
}

/// Blocks.
fn remake_files(pod_dir: &Path, pod: &PodConfig) -> Result<PodFiles> {
    // Of an earlier try.
    pod_files::unmount(pod_dir)?;
    PodFiles::make(pod_dir, pod)
}

async fn plain(instance: &dyn Instance, exec: Option<&str>, what: Plain) -> Result<()> {
    match what {
        Plain::Signal { signal, all } => instance.signal(exec, signal, all).await,
        Plain::Resize { width, height } => instance.resize(exec, width, height).await,
        Plain::CloseStdin => instance.close_stdin(exec).await,
        Plain::Update(resources) => instance.update(&resources).await,
    }
}

async fn receive(handler: Arc<dyn RuntimeHandler>) -> Result<(Arrival, PodState)> {
    let arrived = async {
        let arrival = handler.migration()?.receive().await?;
        let state = PodState::decode(&arrival.pod)?;
        Ok((arrival, state))
    };
    arrived.await.inspect_err(|error: &Error| {
        warn!("the migration to this pod failed: {}", error.chain());
    })
}

/// Nothing of the container is left that a later process of ours would have to know.
fn forget_launch(bundle: &Path) {
    if let Err(error) = Launch::remove(bundle) {
        warn!("{}", error.chain());
    }
}

async fn warned(work: impl Future<Output = Result<()>>) {
    if let Err(error) = work.await {
        warn!("{}", error.chain());
    }
}

/// Work that blocks, on a thread of its own.
///
/// # Errors
/// Its own; or it panicked.
pub(super) async fn on_helper<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context(|| "work on files".into())?
}
