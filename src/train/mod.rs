//! Training: steps along gradients, on parameters that are plain slices.

mod adam;

pub use adam::Adam;
