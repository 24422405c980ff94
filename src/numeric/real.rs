//! The floats that algebra is done in.

use faer::traits::RealField;

/// 32 bits, which take half the time and memory, or 64.
pub trait Real: RealField + Copy + Into<f64> {
    /// The nearest to `x`.
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> f32 {
        x as f32
    }
}

impl Real for f64 {
    fn of(x: f64) -> f64 {
        x
    }
}
