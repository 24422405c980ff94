//! Settings that reduce the memory of a run.

use super::{Calibration, Moves, RecoverSettings, Settings, forecast};
use crate::model::Model;
use crate::prune::BudgetError;
use crate::spill::SpillStore;
use crate::train::AdamState;
use std::path::Path;

/// Settings with which a run stays within `limit` bytes, not counting the memory-mapped source.
///
/// If needed, recovery keeps a smaller state of its optimiser. If that is not enough, residual streams, and
/// all that moves, are spilled to files in `folder`, and then fewer tokens pass through a block at a time.
///
/// # Errors
/// [`NoRoom`] with the smallest limit that is enough, or [`BudgetError`].
pub fn within_memory(
    model: &Model,
    c: &Calibration,
    settings: &Settings,
    limit: u64,
    folder: &Path,
) -> Result<Settings, NoRoom> {
    let spilling = Settings { spill: SpillStore::in_files(folder.into()), ..settings.clone() };
    let smaller: Vec<Settings> = with_less_at_a_time(&spilling).collect();
    let mut least = (f64::INFINITY, "");
    let leaner =
        [AdamState::Bf16, AdamState::Factored].into_iter().filter(|_| settings.recover.may_be_leaner());
    let leaner = leaner.map(|state| {
        let recover = RecoverSettings { moves: Moves::Full(state), ..settings.recover.clone() };
        Settings { recover, ..settings.clone() }
    });
    let all = std::iter::once(settings.clone()).chain(leaner).chain([spilling]).chain(smaller);
    for s in all {
        let forecast = forecast(model, c, &s)?;
        if forecast.memory() <= limit as f64 {
            return Ok(s);
        }
        let stage = forecast.stages.iter().max_by(|a, b| a.memory.total_cmp(&b.memory));
        if forecast.memory() < least.0 {
            least = (forecast.memory(), stage.map_or("", |s| s.name));
        }
    }
    Err(NoRoom::Memory { limit, least: least.0 as u64, stage: least.1 })
}

/// Settings with which graphs and their weights stay within `limit` bytes on a device. If needed, fewer
/// tokens pass through a block at a time.
///
/// # Errors
/// [`NoRoom`] with the smallest limit that is enough, or [`BudgetError`].
pub fn within_device_memory(
    model: &Model,
    c: &Calibration,
    settings: &Settings,
    limit: u64,
) -> Result<Settings, NoRoom> {
    let mut least = f64::INFINITY;
    for s in std::iter::once(settings.clone()).chain(with_less_at_a_time(settings)) {
        let needed = forecast(model, c, &s)?.on_devices();
        if needed <= limit as f64 {
            return Ok(s);
        }
        least = least.min(needed);
    }
    Err(NoRoom::Device { limit, least: least as u64 })
}

/// The same settings with fewer and fewer tokens that pass through a block at a time, down to one window.
fn with_less_at_a_time(settings: &Settings) -> impl Iterator<Item = Settings> {
    let smaller = [4096, 2048, 1024, 512, 1].into_iter().filter(|n| *n < settings.chunk_tokens);
    smaller.map(|chunk_tokens| Settings { chunk_tokens, ..settings.clone() })
}

/// Error of a memory limit that is too low.
#[derive(Debug, thiserror::Error)]
pub enum NoRoom {
    /// The run needs more memory than the limit.
    #[error(
        "{:.2} GiB of memory are not enough: stage \"{stage}\" needs {:.2} GiB even with streams in files and one window at a time",
        *limit as f64 / f64::from(1 << 30),
        *least as f64 / f64::from(1 << 30)
    )]
    Memory {
        /// Limit in bytes.
        limit: u64,
        /// Smallest limit that is enough, in bytes.
        least: u64,
        /// Stage with the largest need.
        stage: &'static str,
    },
    /// The run needs more memory on a device than the limit.
    #[error(
        "{:.2} GiB of memory on a device are not enough: {:.2} GiB are needed even with one window at a time",
        *limit as f64 / f64::from(1 << 30),
        *least as f64 / f64::from(1 << 30)
    )]
    Device {
        /// Limit in bytes.
        limit: u64,
        /// Smallest limit that is enough, in bytes.
        least: u64,
    },
    /// The sparsity is out of reach with any amount of memory.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}
