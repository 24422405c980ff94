//! Quantising of changed matrices, and slices of tensors that do not change.

mod feedback;
mod quantise;
mod slice;

pub use feedback::{FeedbackError, quantise_with_feedback};
pub use quantise::{Quantised, output_type, quantise, within_reason};
pub use slice::{select_columns, select_rows};
