//! A container is written down for a client, and another one goes on from it.
//!
//! ```text
//!  running, paused --save--> images in a folder (it runs on, or ends)
//!  create from images: mounted, no process --start--> restored, running
//! ```
//! Unlike a migration's, such images are anybody's to keep: nothing is known of the
//! container that they are for, so what does not fit is CRIU's to refuse.

use std::fs;
use std::path::{Path, PathBuf};

use dyad_linux::pump::Unread;
use dyad_runtime_handler::error::{Context as _, Error, Result};
use dyad_runtime_handler::spec::{Checkpoint, Stdio};

use crate::choose::checkpoints;
use crate::command::{self, Command};
use crate::container::{Container, Images, Init};
use crate::migration::{Criu, find_criu, words};
use crate::runtime::ShortLived;

impl Container {
    /// Writes it down.
    ///
    /// # Errors
    /// It does not run; there is no CRIU that serves; CRIU's own words.
    pub(crate) async fn save(&self, to: &Checkpoint) -> Result<()> {
        let init = self.init()?;
        if !init.started || init.process.exit().is_some() {
            return Err(Error::FailedPrecondition(format!(
                "checkpoint of container {}: it does not run",
                self.id()
            )));
        }
        let criu = self.criu_of_host().await?;
        let work = self.work_folder(to.work.as_deref())?;
        fs::create_dir_all(&to.images).context(|| format!("make {}", to.images.display()))?;
        let config = self.criu_config(&words::config(to.tcp_established, &[], false))?;
        let command = Command::Save {
            id: self.id(),
            work: &work,
            to,
            criu: command::Criu {
                dir: criu.dir(),
                config: &config.0,
            },
        };
        let saved = self.ask_runtime(command).await;
        saved.map_err(|error| self.explained(error, &work.join("dump.log")))
    }

    /// Makes its process from the images in `images`.
    ///
    /// # Errors
    /// As [`Self::save`]; nothing is left then but what `create` made.
    pub(crate) async fn restore_from(&self, stdio: Stdio, images: &Path) -> Result<Init> {
        if stdio.terminal {
            return Err(Error::Unimplemented(format!(
                "restore of container {} from {}: with a terminal it is not supported; create it without one",
                self.id(),
                images.display()
            )));
        }
        let criu = self.criu_of_host().await?;
        let work = self.work_folder(None)?;
        let join = words::joined_namespaces(&self.read_spec()?);
        let config = self.criu_config(&words::config(false, &join, false))?;
        let images = Images {
            dir: images,
            work: &work,
            unread: &Unread::default(),
            tcp_established: false,
            criu: command::Criu {
                dir: criu.dir(),
                config: &config.0,
            },
        };
        let restored = self.restored(stdio, &images).await;
        restored.map_err(|error| self.explained(error, &work.join("restore.log")))
    }

    async fn criu_of_host(&self) -> Result<Criu> {
        checkpoints(self.config())?;
        Criu::ask(find_criu(self.config())?, self.reaper()).await
    }

    /// Where CRIU has its log: what the client names, else the configuration, else the bundle.
    fn work_folder(&self, asked: Option<&Path>) -> Result<PathBuf> {
        let work = asked
            .or(self.config().criu_work.as_deref())
            .map_or_else(|| self.own_work_folder(), Path::to_owned);
        fs::create_dir_all(&work).context(|| format!("make {}", work.display()))?;
        Ok(work)
    }

    fn own_work_folder(&self) -> PathBuf {
        self.bundle().join("criu-work")
    }

    /// Removes CRIU's logs from the bundle, where there are any.
    pub(crate) fn remove_own_work_folder(&self) {
        // The bundle goes as a whole in the end.
        let _ = fs::remove_dir_all(self.own_work_folder());
    }

    fn criu_config(&self, text: &str) -> Result<ShortLived> {
        let file = ShortLived(self.bundle().join("criu.conf"));
        fs::write(&file.0, text).context(|| format!("write {}", file.0.display()))?;
        Ok(file)
    }
}
