//! Exponentials over whole rows of logits, fast enough to compute at every position.

/// Numbers that are processed side by side, so that no addition waits for the one before.
const LANES: usize = 16;

/// Log-sum-exp of a row, log Σ exp(row), in a form that the compiler vectorises.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let max = largest(row);
    if !max.is_finite() {
        return f64::from(max);
    }
    let mut sum: f64 = rest.iter().map(|v| f64::from(exp_neg(v - max))).sum();
    // Short runs keep the lanes exact.
    for run in blocks.chunks(16) {
        let mut lanes = [0.0f32; LANES];
        for block in run {
            lanes.iter_mut().zip(block).for_each(|(s, v)| *s += exp_neg(v - max));
        }
        sum += f64::from(lanes.iter().sum::<f32>());
    }
    f64::from(max) + sum.ln()
}

/// Largest value of a row; NaN is left out.
fn largest(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        max.iter_mut().zip(block).for_each(|(m, v)| *m = if *v > *m { *v } else { *m });
    }
    max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Soft max of `scale` · `row`, for `scale` ≥ 0, into `out` of the same length.
pub fn soft_max(row: &[f32], scale: f32, out: &mut [f32]) {
    let max = largest(row) * scale;
    let (blocks, rest) = row.as_chunks::<LANES>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (block, out) in blocks.iter().zip(&mut *out_blocks) {
        for ((sum, v), out) in sums.iter_mut().zip(block).zip(out) {
            *out = exp_neg(v * scale - max);
            *sum += *out;
        }
    }
    for ((sum, v), out) in sums.iter_mut().zip(rest).zip(&mut *out_rest) {
        *out = exp_neg(v * scale - max);
        *sum += *out;
    }
    let by = 1.0 / sums.iter().sum::<f32>();
    out.iter_mut().for_each(|v| *v *= by);
}

/// Negative log-likelihood, in nats, of the token `next` by a row of logits.
pub fn nll(row: &[f32], next: usize) -> f64 {
    log_sum_exp(row) - f64::from(row[next])
}

/// Exponential exp(x) for x ≤ 0 to about 2e-7 relative: 2^n · p(r) with a polynomial on |r| ≤ ln2/2.
pub(super) fn exp_neg(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that r keeps its low bits (Cody and Waite).
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Unlike `max`, this keeps NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let n = (x * LOG2E).round_ties_even();
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.0
        + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0))))));
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        for n in [1usize, 7, 256, 1000] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 7919) % 613) as f32 / 20.0 - 15.0).collect();
            let exact: f64 = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&row) - exact).abs() < 1e-5, "n {n}");
        }
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY]), f64::NEG_INFINITY);
    }
}
