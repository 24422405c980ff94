//! Numbers that several rooms share: row-wise exponentials, second moments and their Cholesky factors.

mod cholesky;
mod exp;
mod moments;

pub use cholesky::Cholesky;
pub use exp::{exp_neg, log_sum_exp};
pub use moments::{Moments, SymMatrix};
