//! Mathematics of pruning: how much is removed, which groups and neurons, and how the rest compensates.
//!
//! Pure functions of matrices: this module knows no files, devices or model threads. Shapes follow `model`:
//! a weight matrix W is `[n_out, n_in]` row-major, and H = Σ x xᵀ is `[n_in, n_in]` over its inputs x.

mod budget;
mod experts;
mod heads;
mod inverse;
mod metric;
mod obs;
mod refit;
mod select;
mod widths;

use crate::model::Matrix;
use crate::numeric::Real;
use faer::Mat;
use rayon::prelude::*;

pub use budget::{
    Budget, BudgetError, fewest_head_groups, ffn_params_to_remove, head_groups, head_groups_paper,
    smallest_group,
};
pub use experts::{
    ExpertCriterion, FEW_TOKENS, RouterWeights, Units, by_score, eliminate, mask, protected, scores,
};
pub use heads::{Candidate, GroupId, LazyGreedy, rounds};
pub use inverse::{Inverse, InverseIn};
pub use metric::Metric;
pub(crate) use obs::PENDING;
pub use obs::{NeuronCriterion, Obs};
pub(crate) use refit::factor;
pub use refit::{Refit, bias_change, refit};
pub use select::{
    Narrowing, greedy, narrow, paper_keep, top_by_activation_norm, top_by_router_weighted_norm,
    top_by_weight_norm,
};
pub use widths::{Curve, allocate, possible_widths, uniform};

/// Converts weights `[n_out, n_in]` to a faer matrix.
pub(crate) fn dense<T: Real>(w: &Matrix) -> Mat<T> {
    let mut m = Mat::zeros(w.n_out, w.n_in);
    m.par_col_iter_mut().enumerate().for_each(|(j, column)| {
        column.iter_mut().enumerate().for_each(|(i, v)| *v = T::of(w.data[i * w.n_in + j].into()));
    });
    m
}

/// Error: no ridge makes the matrix positive definite.
#[derive(Debug, thiserror::Error)]
#[error("the activations of this layer have no usable second moments (they are not finite)")]
pub struct Singular;
