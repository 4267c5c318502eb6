//! The messages of a migration, to and from what the shim means by them.

use std::time::Duration;

use dyad_api::lifecycle as wire;
use dyad_runtime_handler::migration::{MigrationParameters, Stage, TimeoutAction};
use dyad_runtime_handler::{Error, Result};
use protobuf::EnumOrUnknown;

use crate::migration::{MigrationView, Outcome};

/// What is asked for.
///
/// # Errors
/// `InvalidArgument`: a timeout action of a newer client.
pub fn parameters(request: wire::MigrateRequest) -> Result<MigrationParameters> {
    let timeout_action = match request.timeout_action.enum_value() {
        Ok(wire::TimeoutAction::ABORT) => TimeoutAction::Abort,
        Ok(wire::TimeoutAction::POST_COPY) => TimeoutAction::PostCopy,
        Ok(wire::TimeoutAction::PAUSE) => TimeoutAction::Pause,
        Err(number) => {
            return Err(Error::InvalidArgument(format!(
                "timeout_action {number}: known are 0 (abort), 1 (post-copy) and 2 (pause)"
            )));
        }
    };
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let duration = |ms| (ms != 0).then(|| Duration::from_millis(ms));
    Ok(MigrationParameters {
        destination: request.destination,
        migrate_uri: text(request.migrate_uri),
        disks_uri: text(request.disks_uri),
        bandwidth_mib_s: request.bandwidth_mib_s,
        max_downtime: duration(request.max_downtime_ms),
        timeout: duration(request.timeout_ms),
        timeout_action,
        auto_converge: request.auto_converge,
        parallel: request.parallel,
        tls_required: request.tls_required,
        allow_clear: request.allow_clear,
        tcp_established: request.tcp_established,
    })
}

/// A migration, as it is told.
pub fn progress(view: &MigrationView) -> wire::MigrationProgress {
    let (stage, reason) = match (&view.outcome, view.number) {
        (None, 0) => (wire::MigrationStage::NONE, ""),
        (None, _) => (stage(view.progress.stage), ""),
        (Some(Outcome::Completed), _) => (wire::MigrationStage::COMPLETED, ""),
        (Some(Outcome::Abandoned(reason)), _) => (wire::MigrationStage::ABANDONED, reason.as_str()),
        (Some(Outcome::Lost(reason)), _) => (wire::MigrationStage::LOST, reason.as_str()),
    };
    let figures = &view.progress;
    wire::MigrationProgress {
        migration: view.number,
        stage: EnumOrUnknown::new(stage),
        reason: reason.to_owned(),
        bytes_done: figures.bytes_done,
        bytes_total: figures.bytes_total,
        bytes_remaining: figures.bytes_remaining,
        rate: figures.rate,
        dirty_rate: figures.dirty_rate,
        expected_downtime_us: figures.expected_downtime.map(microseconds),
        downtime_us: figures.downtime.map(microseconds),
        elapsed_ms: u64::try_from(view.elapsed.as_millis()).unwrap_or(u64::MAX),
        destination: view.destination.clone(),
        ..Default::default()
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn stage(stage: Stage) -> wire::MigrationStage {
    match stage {
        Stage::Checking => wire::MigrationStage::CHECKING,
        Stage::Preparing => wire::MigrationStage::PREPARING,
        Stage::Copying => wire::MigrationStage::COPYING,
        Stage::Switching => wire::MigrationStage::SWITCHING,
        Stage::PostCopy => wire::MigrationStage::FETCHING,
        Stage::Finishing => wire::MigrationStage::FINISHING,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_unset_and_an_unknown_action_is_refused() {
        let request = wire::MigrateRequest {
            destination: "qemu+tls://n/system".into(),
            max_downtime_ms: 50,
            ..Default::default()
        };
        let read = parameters(request.clone()).unwrap();
        assert_eq!(read.max_downtime, Some(Duration::from_millis(50)));
        assert_eq!((read.timeout, read.migrate_uri), (None, None));
        let newer = wire::MigrateRequest {
            timeout_action: EnumOrUnknown::from_i32(9),
            ..request
        };
        assert!(parameters(newer).unwrap_err().to_string().contains("9"));
    }

    #[test]
    fn an_end_is_told_with_its_reason() {
        let mut view = MigrationView::default();
        assert_eq!(progress(&view).stage, wire::MigrationStage::NONE.into());
        view.number = 1;
        assert_eq!(progress(&view).stage, wire::MigrationStage::CHECKING.into());
        view.outcome = Some(Outcome::Abandoned("no space".into()));
        let told = progress(&view);
        assert_eq!(told.stage, wire::MigrationStage::ABANDONED.into());
        assert_eq!(told.reason, "no space");
    }
}
