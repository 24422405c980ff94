//! Numbers that several rooms share: row-wise exponentials, and second moments.

mod exp;
mod moments;

pub use exp::{exp_neg, log_sum_exp};
pub use moments::{Moments, SymMatrix};
