//! How to do with less memory.

use super::{Calibration, Settings, forecast};
use crate::model::Model;
use crate::prune::BudgetError;
use crate::spill::SpillStore;
use std::path::Path;

/// The settings with which a run stays within `limit` bytes, without the mapped file: streams go into files of
/// `folder` where they must, and then less passes through a block at a time.
///
/// # Errors
/// [`NoRoom`] with the least that is needed, or [`BudgetError`].
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
    for s in [settings.clone(), spilling].into_iter().chain(smaller) {
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

/// The settings with which graphs and their weights stay within `limit` bytes on a device: less passes through a block at a
/// time where it must.
///
/// # Errors
/// [`NoRoom`] with the least that is needed, or [`BudgetError`].
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

/// The same settings with less and less that passes through a block at a time, down to a window.
fn with_less_at_a_time(settings: &Settings) -> impl Iterator<Item = Settings> {
    let smaller = [1024, 512, 1].into_iter().filter(|n| *n < settings.chunk_tokens);
    smaller.map(|chunk_tokens| Settings { chunk_tokens, ..settings.clone() })
}

/// Why a run cannot do with so little memory.
#[derive(Debug, thiserror::Error)]
pub enum NoRoom {
    /// It needs more.
    #[error(
        "{:.2} GiB of memory are not enough: stage \"{stage}\" needs {:.2} GiB even with streams in files and one window at a time",
        *limit as f64 / f64::from(1 << 30),
        *least as f64 / f64::from(1 << 30)
    )]
    Memory {
        /// What is there.
        limit: u64,
        /// What would do.
        least: u64,
        /// What it is needed for.
        stage: &'static str,
    },
    /// So does a device.
    #[error(
        "{:.2} GiB of memory on a device are not enough: {:.2} GiB are needed even with one window at a time",
        *limit as f64 / f64::from(1 << 30),
        *least as f64 / f64::from(1 << 30)
    )]
    Device {
        /// What is there.
        limit: u64,
        /// What would do.
        least: u64,
    },
    /// Nor with more.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}
