//! Learning rate over the course of a training.

use std::f32::consts::PI;

/// Linear warm-up, then a cosine down to a share of the full rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Share of the steps over which the rate grows to its full size.
    pub warm_up: f32,
    /// Rate at the end, as a share of the full one.
    pub floor: f32,
}

impl Schedule {
    /// Factor of the full rate in step `n`, counted from 1, of `n_steps`.
    ///
    /// It is that of the middle of the step, so that even a single step has an effect.
    pub fn factor(self, n: usize, n_steps: usize) -> f32 {
        let progress = (n as f32 - 0.5) / n_steps as f32;
        let cosine = self.floor + (1.0 - self.floor) * 0.5 * (1.0 + (PI * progress).cos());
        (progress / self.warm_up).min(1.0) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_grow_at_first_and_fall_to_the_floor() {
        for (warm_up, floor) in [(0.1, 0.0), (0.05, 0.1)] {
            let s = Schedule { warm_up, floor };
            let factors: Vec<f32> = (1..=1000).map(|n| s.factor(n, 1000)).collect();
            let top = factors.iter().position(|f| *f == factors.iter().copied().fold(0.0, f32::max)).unwrap();
            assert!((top as f32 / 1000.0 - warm_up).abs() < 0.02, "{top}");
            assert!(factors[..top].is_sorted() && factors[top..].is_sorted_by(|a, b| a >= b));
            assert!((factors[999] - floor).abs() < 1e-3 && factors[top] > 0.95);
        }
        assert!(Schedule { warm_up: 0.1, floor: 0.0 }.factor(1, 1) > 0.4);
    }
}
