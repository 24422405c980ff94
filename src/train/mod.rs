//! Training: steps along gradients, on parameters that are plain slices.

mod adam;
mod adapter;
mod schedule;

pub use adam::{Adam, AdamState};
pub use adapter::Adapter;
pub use schedule::Schedule;
