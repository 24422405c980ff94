//! Floating-point types of the algebra.

use faer::traits::RealField;

/// Floating-point type: 32 bits, which take half the time and memory, or 64.
pub trait Real: RealField + Copy + Into<f64> {
    /// Nearest value to `x`.
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
