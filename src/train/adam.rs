//! Adam (arXiv 1412.6980).

/// Decay of the running means of gradients and of their squares. The second is shorter than usual, because
/// there are few steps.
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;

/// Keeps a direction finite if its gradients are 0.
const EPSILON: f32 = 1e-15;

/// Parameters that move along their gradients.
#[derive(Clone, Debug)]
pub struct Adam {
    /// Current values.
    pub values: Vec<f32>,
    /// Running means of the gradient, and of its square.
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Size of the values that the parameters are added to or multiplied with; steps are relative to it.
    size: f32,
}

impl Adam {
    /// Starts at `values`, with steps relative to `size`.
    pub fn new(values: &[f32], size: f32) -> Adam {
        let zero = vec![0.0; values.len()];
        Adam { values: values.to_vec(), mean: zero.clone(), square: zero, size }
    }

    /// Takes the `n`-th step, counted from 1.
    ///
    /// # Panics
    /// If the gradient is shorter than the parameters.
    pub fn step(&mut self, gradient: &[f32], rate: f32, n: i32) {
        assert!(gradient.len() >= self.values.len());
        let (mean_part, square_part) = (1.0 - MEAN_DECAY.powi(n), 1.0 - SQUARE_DECAY.powi(n));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((value, (mean, square)), g) in self.values.iter_mut().zip(moments).zip(gradient) {
            *mean += (1.0 - MEAN_DECAY) * (g - *mean);
            *square += (1.0 - SQUARE_DECAY) * (g * g - *square);
            let direction = *mean / mean_part / ((*square / square_part).sqrt() + EPSILON);
            *value -= rate * self.size * direction;
        }
    }
}
