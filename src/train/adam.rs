//! Adam (arXiv 1412.6980), with several ways to keep its running means.

use crate::spill::{SpillStore, SpillVec};
use half::bf16;
use rayon::prelude::*;

/// Decay of the running means of gradients and of their squares. The second is shorter than usual, because
/// there are few steps.
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;

/// Keeps a direction finite if its gradients are 0.
const EPSILON: f32 = 1e-15;

/// Gradients that are this many times as long as their running mean are shortened to that. Outliers would
/// otherwise set the running mean of squares for many steps.
const LONGEST: f32 = 3.0;

/// Number of values that one thread works on at a time.
const PART: usize = 1 << 14;

/// How the running means are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AdamState {
    /// Both in 32 bits: 8 bytes per value.
    #[default]
    F32,
    /// Both in BF16, rounded at random so that small changes are not lost: 4 bytes per value.
    Bf16,
    /// Squares as a product of a column and a row, and no mean of gradients, as in Adafactor (arXiv
    /// 1804.04235): next to nothing.
    Factored,
}

impl AdamState {
    /// Bytes per value, besides the value itself.
    pub fn bytes(self) -> f64 {
        match self {
            AdamState::F32 => 8.0,
            AdamState::Bf16 => 4.0,
            AdamState::Factored => 0.0,
        }
    }
}

/// Running means of the gradient, and of its square.
#[derive(Debug)]
enum Means {
    F32 { mean: SpillVec<f32>, square: SpillVec<f32> },
    Bf16 { mean: SpillVec<u16>, square: SpillVec<u16> },
    Factored { rows: Vec<f32>, cols: Vec<f32> },
}

/// Parameters that move along their gradients, `[n_out, n_in]`.
#[derive(Debug)]
pub struct Adam {
    /// Current values.
    pub values: SpillVec<f32>,
    means: Means,
    /// Running mean of the gradient's squared length.
    length: f32,
    n_in: usize,
    /// Size of the values that the parameters are added to or multiplied with; steps are relative to it.
    size: f32,
}

impl Adam {
    /// Starts at `values`, rows of `n_in`, with steps relative to `size`. Values and means lie in `spill`.
    ///
    /// # Errors
    /// Returns the system's error if a file cannot be made or the disk is full.
    pub fn new(
        values: Vec<f32>,
        n_in: usize,
        size: f32,
        state: AdamState,
        spill: &SpillStore,
    ) -> std::io::Result<Adam> {
        let n = values.len();
        let means = match state {
            AdamState::F32 => Means::F32 { mean: spill.zeros(n)?, square: spill.zeros(n)? },
            AdamState::Bf16 => Means::Bf16 { mean: spill.zeros(n)?, square: spill.zeros(n)? },
            AdamState::Factored => Means::Factored { rows: vec![0.0; n / n_in], cols: vec![0.0; n_in] },
        };
        Ok(Adam { values: spill.put(values)?, means, length: 0.0, n_in, size })
    }

    /// Starts at the vector `values`, with steps relative to `size`, all in memory and in 32 bits.
    pub fn of_vector(values: Vec<f32>, size: f32) -> Adam {
        let zeros = || SpillVec::from(vec![0.0; values.len()]);
        let (means, n_in) = (Means::F32 { mean: zeros(), square: zeros() }, values.len());
        Adam { values: values.into(), means, length: 0.0, n_in, size }
    }

    /// Length of a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// All arrays that change, by name, with the bytes per element: what a later run needs to go on.
    pub fn arrays(&mut self) -> Vec<(&'static str, usize, &mut [u8])> {
        let mut all = vec![
            ("values", 4, bytemuck::cast_slice_mut(&mut self.values)),
            ("length", 4, bytemuck::bytes_of_mut(&mut self.length)),
        ];
        let (size, [a, b]): (usize, [(&'static str, &mut [u8]); 2]) = match &mut self.means {
            Means::F32 { mean, square } => {
                let arrays = [("mean", mean), ("square", square)];
                (4, arrays.map(|(name, array)| (name, bytemuck::cast_slice_mut(&mut array[..]))))
            }
            Means::Bf16 { mean, square } => {
                let arrays = [("mean", mean), ("square", square)];
                (2, arrays.map(|(name, array)| (name, bytemuck::cast_slice_mut(&mut array[..]))))
            }
            Means::Factored { rows, cols } => {
                let arrays = [("rows", rows), ("cols", cols)];
                (4, arrays.map(|(name, array)| (name, bytemuck::cast_slice_mut(&mut array[..]))))
            }
        };
        all.extend([(a.0, size, a.1), (b.0, size, b.1)]);
        all
    }

    /// Takes the `n`-th step, counted from 1.
    ///
    /// # Panics
    /// If the gradient is shorter than the parameters.
    pub fn step(&mut self, gradient: &[f32], rate: f32, n: i32) {
        let gradient = &gradient[..self.values.len()];
        let (mean_part, square_part) = (1.0 - MEAN_DECAY.powi(n), 1.0 - SQUARE_DECAY.powi(n));
        let squares: Vec<f64> = gradient.par_chunks(PART).map(sum_of_squares).collect();
        let mut length = squares.iter().sum::<f64>() as f32;
        let usual = self.length / (1.0 - SQUARE_DECAY.powi(n - 1)).max(f32::MIN_POSITIVE);
        let mut shorter = 1.0;
        if n > 1 && length > LONGEST * LONGEST * usual && usual > 0.0 {
            shorter = LONGEST * (usual / length).sqrt();
            length *= shorter * shorter;
        }
        self.length += (1.0 - SQUARE_DECAY) * (length - self.length);
        let by = rate * self.size;
        let direction = |mean: f32, square: f32| mean / mean_part / ((square / square_part).sqrt() + EPSILON);
        let values = self.values.par_chunks_mut(PART).zip(gradient.par_chunks(PART));
        match &mut self.means {
            Means::F32 { mean, square } => {
                let means = mean.par_chunks_mut(PART).zip(square.par_chunks_mut(PART));
                values.zip(means).for_each(|((values, gradient), (mean, square))| {
                    let means = mean.iter_mut().zip(square);
                    for ((value, g), (mean, square)) in values.iter_mut().zip(gradient).zip(means) {
                        let g = g * shorter;
                        *mean += (1.0 - MEAN_DECAY) * (g - *mean);
                        *square += (1.0 - SQUARE_DECAY) * (g * g - *square);
                        *value -= by * direction(*mean, *square);
                    }
                });
            }
            Means::Bf16 { mean, square } => {
                let means = mean.par_chunks_mut(PART).zip(square.par_chunks_mut(PART));
                values.zip(means).enumerate().for_each(|(part, ((values, gradient), (mean, square)))| {
                    let mut noise = Noise::new(n as u64, part as u64);
                    let means = mean.iter_mut().zip(square);
                    for ((value, g), (mean, square)) in values.iter_mut().zip(gradient).zip(means) {
                        let g = g * shorter;
                        let [mut m, mut s] = [*mean, *square].map(|bits| bf16::from_bits(bits).to_f32());
                        m += (1.0 - MEAN_DECAY) * (g - m);
                        s += (1.0 - SQUARE_DECAY) * (g * g - s);
                        *value -= by * direction(m, s);
                        let bits = noise.next();
                        *mean = rounded(m, bits as u16);
                        *square = rounded(s, (bits >> 16) as u16);
                    }
                });
            }
            Means::Factored { rows, cols } => {
                let n_in = self.n_in;
                let scale = shorter * shorter;
                // A gradient of 0 would divide by 0; 1e-30 is Adafactor's.
                let squared = |g: &f32| g * g * scale + 1e-30;
                rows.par_iter_mut().zip(gradient.par_chunks(n_in)).for_each(|(mean, row)| {
                    let new = row.iter().map(squared).sum::<f32>() / n_in as f32;
                    *mean += (1.0 - SQUARE_DECAY) * (new - *mean);
                });
                let mut sums = vec![0.0; n_in];
                for row in gradient.chunks_exact(n_in) {
                    sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += squared(g));
                }
                let n_out = rows.len() as f32;
                cols.iter_mut().zip(&sums).for_each(|(mean, sum)| {
                    *mean += (1.0 - SQUARE_DECAY) * (sum / n_out - *mean);
                });
                let mean = rows.iter().sum::<f32>() / n_out;
                let (rows, cols): (&[f32], &[f32]) = (rows, cols);
                let along = |i: usize, j: usize, g: f32| {
                    g * shorter / ((rows[i] / mean * cols[j]) / square_part).sqrt()
                };
                // Steps are as long as Adam's, at most.
                let sizes: Vec<f64> = gradient
                    .par_chunks(n_in)
                    .enumerate()
                    .map(|(i, row)| {
                        row.iter().enumerate().map(|(j, g)| f64::from(along(i, j, *g)).powi(2)).sum()
                    })
                    .collect();
                let size = (sizes.iter().sum::<f64>() / gradient.len().max(1) as f64).sqrt() as f32;
                let by = by / size.max(1.0);
                let values = self.values.par_chunks_mut(n_in).zip(gradient.par_chunks(n_in)).enumerate();
                values.for_each(|(i, (values, row))| {
                    for (j, (value, g)) in values.iter_mut().zip(row).enumerate() {
                        *value -= by * along(i, j, *g);
                    }
                });
            }
        }
    }
}

fn sum_of_squares(x: &[f32]) -> f64 {
    x.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// Bits of the BF16 above or below `x`, with the nearer one more likely. `random` is uniform.
fn rounded(x: f32, random: u16) -> u16 {
    (x.to_bits().wrapping_add(u32::from(random)) >> 16) as u16
}

/// Pseudo-random bits (SplitMix64), the same for the same step and part.
struct Noise(u64);

impl Noise {
    fn new(step: u64, part: u64) -> Noise {
        Noise(step << 32 ^ part)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Gradients of ½ Σ c (v − v₀)², with noise.
    fn gradient(values: &[f32], rng: &mut ChaCha8Rng) -> Vec<f32> {
        let slope = |i: usize, v: f32| (1 + i % 7) as f32 * (v - i as f32 * 0.01);
        values.iter().enumerate().map(|(i, v)| slope(i, *v) + rng.random_range(-0.1f32..0.1)).collect()
    }

    /// Adam by the algorithm in the paper, in f64, with whole histories in place of running means.
    fn naive(history: &[Vec<f32>], i: usize) -> f64 {
        let n = history.len() as i32;
        let mean = |decay: f64, of: &dyn Fn(f64) -> f64| {
            let sum: f64 =
                (0..n).map(|t| decay.powi(n - 1 - t) * of(f64::from(history[t as usize][i]))).sum();
            sum * (1.0 - decay) / (1.0 - decay.powi(n))
        };
        mean(f64::from(MEAN_DECAY), &|g| g) / mean(f64::from(SQUARE_DECAY), &|g| g * g).sqrt()
    }

    #[test]
    fn steps_are_those_of_the_paper() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for (n_out, n_in) in [(1, 5), (40, 30), (300, 128)] {
            let start: Vec<f32> = (0..n_out * n_in).map(|_| rng.random_range(-1.0..1.0)).collect();
            let spill = SpillStore::default();
            let mut adam = Adam::new(start.clone(), n_in, 0.5, AdamState::F32, &spill).unwrap();
            let (mut expected, mut history) = (start, Vec::new());
            for n in 1..=12 {
                let g = gradient(&adam.values, &mut rng);
                history.push(g.clone());
                adam.step(&g, 0.01, n);
                for (i, v) in expected.iter_mut().enumerate().step_by(n_in.div_ceil(4)) {
                    *v -= (0.01 * 0.5 * naive(&history, i)) as f32;
                    assert!((*v - adam.values[i]).abs() < 1e-5, "step {n}, {i}: {v} {}", adam.values[i]);
                }
            }
        }
    }

    #[test]
    fn every_state_leads_to_the_minimum() {
        for state in [AdamState::F32, AdamState::Bf16, AdamState::Factored] {
            let mut rng = ChaCha8Rng::seed_from_u64(8);
            let start: Vec<f32> = (0..60 * 50).map(|_| rng.random_range(-20.0..40.0)).collect();
            let off = |values: &[f32]| {
                let squares = values.iter().enumerate().map(|(i, v)| (v - i as f32 * 0.01).powi(2));
                (squares.sum::<f32>() / values.len() as f32).sqrt()
            };
            let before = off(&start);
            let mut adam = Adam::new(start, 50, 1.0, state, &SpillStore::default()).unwrap();
            for n in 1..=400 {
                let g = gradient(&adam.values, &mut rng);
                adam.step(&g, if n < 300 { 0.2 } else { 0.02 }, n);
            }
            let after = off(&adam.values);
            println!("{state:?}: {before} to {after}");
            assert!(after < 0.03 * before, "{state:?}: {before} to {after}");
        }
    }

    #[test]
    fn rounding_at_random_is_right_on_average() {
        let mut noise = Noise::new(1, 2);
        for x in [1.0f32, 1.001, -0.3333, 7e-9] {
            let n = 20_000;
            let sum: f64 =
                (0..n).map(|_| f64::from(bf16::from_bits(rounded(x, noise.next() as u16)).to_f32())).sum();
            assert!((sum / f64::from(n) / f64::from(x) - 1.0).abs() < 1e-4, "{x}: {}", sum / f64::from(n));
        }
    }

    #[test]
    fn an_outlier_does_not_carry_far() {
        let mut adam = Adam::new(vec![0.0; 100], 10, 1.0, AdamState::F32, &SpillStore::default()).unwrap();
        for n in 1..=20 {
            let g = if n == 10 { vec![1e6; 100] } else { vec![if n % 2 == 0 { 1.0 } else { -1.0 }; 100] };
            adam.step(&g, 0.01, n);
        }
        // Had the outlier entered as it was, later steps would be a thousandth as long.
        let Means::F32 { square, .. } = &adam.means else { unreachable!() };
        assert!(square[0] < 10.0, "{}", square[0]);
    }
}
