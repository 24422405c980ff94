//! The mathematics of pruning: how much, which, and how what stays makes up for it.
//!
//! Pure functions of matrices; nothing here knows files, devices or threads of a model. Sizes follow
//! `model`: a weight matrix W has `n_out` rows of `n_in` numbers, and H = Σ x xᵀ over its inputs.

mod budget;
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
pub use heads::{Candidate, GroupId, LazyGreedy, rounds};
pub use inverse::{Inverse, InverseIn};
pub use metric::Metric;
pub(crate) use obs::PENDING;
pub use obs::{Choice, Obs};
pub(crate) use refit::factor;
pub use refit::{Refit, bias_change, refit};
pub use select::{Narrowing, busiest, greedy, heaviest, loudest, narrow, paper_keep};
pub use widths::{Curve, allocate, possible_widths, uniform};

/// Weights `[n_out, n_in]`, as the algebra takes them.
pub(crate) fn dense<T: Real>(w: &Matrix) -> Mat<T> {
    let mut m = Mat::zeros(w.n_out, w.n_in);
    m.par_col_iter_mut().enumerate().for_each(|(j, column)| {
        column.iter_mut().enumerate().for_each(|(i, v)| *v = T::of(w.data[i * w.n_in + j].into()));
    });
    m
}

/// The matrix could not be factored, whatever the ridge.
#[derive(Debug, thiserror::Error)]
#[error("the activations of this layer have no usable second moments (they are not finite)")]
pub struct Singular;
