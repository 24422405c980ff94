//! Shared numerics: row-wise exponentials, sampling and comparison of logits, second moments and their
//! Cholesky factors, sums of outer products.

mod cholesky;
mod compare;
mod draw;
mod exp;
mod moments;
mod outer;
mod real;

pub use cholesky::Cholesky;
pub use compare::{Kl, Metrics, RowComparison, compare_rows};
pub use draw::draw;
pub use exp::{log_sum_exp, nll, soft_max};
pub use moments::{Moments, SymMatrix};
pub(crate) use moments::{PANEL_ROWS, products_per_token};
pub use outer::{OuterSum, add_outer};
pub use real::Real;
