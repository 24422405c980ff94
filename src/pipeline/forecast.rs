//! Forecast of a run from shapes alone: operations and memory of every stage.
//!
//! Each stage counts its own, beside its code in `stages/`; this module holds what they count with. Tests
//! compare the counts with those of the graphs. Quantities that depend on the weights have their usual size:
//! how often candidates are scored, and how many tokens are likely at some position.

mod work;

pub(super) use work::{Sizes, Work, inverse_ops, removal_ops};

use super::{
    NewMatrices, Settings, budgets, equal_widths, even_shapes, file_size, groups_to_remove, new_matrices,
    within_family,
};
use crate::calibrate::Windows;
use crate::forward::{
    GRADIENT_TOKENS, GRAPH_TOKENS, LOGIT_ROWS, LOSS_ROWS, MAX_GRADIENT_CTX, largest_product, query_slice,
    whole_windows,
};
use crate::ggml::Type;
use crate::model::{BlockShape, BlockTensors, Family, FfnUnit, KvCache, Model, Segment};
use crate::numeric::{PANEL_ROWS, products_per_token};
use crate::prune::{self, BudgetError};
use crate::requant::output_type;

/// Bytes of the process besides arrays, and bytes that the allocator does not return between them.
pub(super) const BASE_BYTES: f64 = 150e6;

/// Sizes of the calibration: tokens per window, windows to fit to, held-out windows.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    /// Number of tokens per window.
    pub n_ctx: usize,
    /// Number of windows that blocks are fitted to.
    pub n_fit: usize,
    /// Number of held-out windows.
    pub n_held_out: usize,
}

impl From<&Windows> for Calibration {
    fn from(w: &Windows) -> Calibration {
        Calibration { n_ctx: w.n_ctx, n_fit: w.n_fit, n_held_out: w.n_held_out }
    }
}

/// Forecast of a run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Forecast {
    /// Number of attention groups that are removed.
    pub n_groups: usize,
    /// Mean number of neurons that are kept in a block.
    pub mean_width: f64,
    /// Share of the blocks' parameters that is removed.
    pub sparsity: f64,
    /// Approximate number of bytes of the written file.
    pub file_bytes: u64,
    /// Number of parameters of the written file.
    pub params: u64,
    /// KV cache of the pruned model in llama.cpp.
    pub kv_cache: KvCache,
    /// Most likely output architecture.
    pub output_arch: Family,
    /// Types of the matrices that get new values.
    pub new_matrices: Vec<NewMatrices>,
    /// Stages, in the order in which they run.
    pub stages: Vec<StageForecast>,
}

/// Operations and memory of one stage.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StageForecast {
    /// Name under which the stage is announced.
    pub name: &'static str,
    /// Floating-point operations of matrix products in graphs, in 32 bits.
    pub operations: f64,
    /// Floating-point operations of linear algebra in 64 bits; two operations in 32 bits count as one.
    pub algebra: f64,
    /// Peak memory in bytes, not counting the memory-mapped source.
    pub memory: f64,
    /// Peak memory on a device in bytes, if graphs run on one.
    pub on_devices: f64,
}

impl Forecast {
    /// Peak memory of all stages in bytes, not counting the memory-mapped source.
    pub fn memory(&self) -> f64 {
        self.stages.iter().map(|s| s.memory).fold(0.0, f64::max)
    }

    /// Peak memory of all stages on a device in bytes, if graphs run on one. Each of several devices holds
    /// its own graphs and a part of the rest.
    pub fn on_devices(&self) -> f64 {
        self.stages.iter().map(|s| s.on_devices).fold(0.0, f64::max)
    }
}

/// Forecast of a run of putri-gguf's own method with `settings` on `model`.
///
/// # Errors
/// [`BudgetError`] if the sparsity is out of reach.
pub fn forecast(model: &Model, c: &Calibration, settings: &Settings) -> Result<Forecast, BudgetError> {
    let s = &within_family(model, settings);
    let budgets = budgets(model, s);
    let n_groups = groups_to_remove(model, &budgets, s);
    let widths = equal_widths(model, &budgets, s, n_groups)?;
    let all_groups: usize = budgets.iter().map(|b| b.n_groups).sum();
    let kept = if all_groups > 0 { 1.0 - n_groups as f64 / all_groups as f64 } else { 1.0 };
    let total: usize = budgets.iter().map(prune::Budget::params).sum();
    let units: usize = budgets.iter().zip(&widths).map(|(b, w)| b.n_units - w).sum();
    let removed = n_groups * prune::smallest_group(&budgets) + units * budgets[0].unit_params;
    let (shapes, output_archs) = (even_shapes(model, settings)?, s.output_archs(model));
    let size = file_size(model, s, &shapes);
    let w = Work { model, c: *c, s, kept, n_groups_removed: n_groups, widths: &widths };
    let stages = s.method.stages().into_iter().flat_map(|stage| stage.forecast(&w));
    Ok(Forecast {
        n_groups,
        mean_width: widths.iter().sum::<usize>() as f64 / widths.len() as f64,
        sparsity: removed as f64 / total as f64,
        file_bytes: size.bytes,
        params: size.params,
        kv_cache: size.kv_cache,
        // Widths per block are hardly ever all the same.
        output_arch: output_archs
            .per_block
            .filter(|_| s.widths.per_layer)
            .unwrap_or_else(|| output_archs.of(&shapes)),
        new_matrices: new_matrices(model, s, &shapes),
        // Stages that do not run have no operations.
        stages: stages.filter(|s| s.operations > 0.0).collect(),
    })
}
