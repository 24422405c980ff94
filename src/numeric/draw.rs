//! Sampling of tokens from logits.

use super::exp::exp_neg;

/// Samples a token from softmax(logits / temperature) at the quantile `at`, 0 ≤ at < 1.
/// Only tokens with a surprise of at most `most` bits take part, and always the most likely one. Also
/// returns the token's surprise among these, in bits.
pub fn draw(logits: &[f32], temperature: f32, most: f32, at: f64) -> (usize, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<f32> = logits.iter().map(|v| exp_neg((v - max) / temperature)).collect();
    let sums_of = |weights: &[f32]| -> Vec<f64> {
        weights.chunks(256).map(|c| f64::from(c.iter().sum::<f32>())).collect()
    };
    // The most likely token has a weight of 1.
    let least = (sums_of(&weights).iter().sum::<f64>() * f64::from(-most).exp2()).min(1.0) as f32;
    weights.iter_mut().filter(|w| **w < least).for_each(|w| *w = 0.0);
    let sums = sums_of(&weights);
    let sum: f64 = sums.iter().sum();
    let mut left = at * sum;
    let chunk = sums.iter().position(|s| {
        let here = left < *s;
        left -= if here { 0.0 } else { *s };
        here
    });
    let from = chunk.unwrap_or(sums.len() - 1) * 256;
    let inside = weights[from..].iter().position(|w| {
        left -= f64::from(*w);
        left < 0.0
    });
    // Rounding may leave a rest behind the last token of the chunk.
    let token = inside.map_or_else(|| argmax(logits), |i| from + i);
    (token, -(f64::from(weights[token]) / sum).log2() as f32)
}

fn argmax(v: &[f32]) -> usize {
    let best = v.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Softmax in f64.
    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let powers: Vec<f64> = logits.iter().map(|v| (f64::from(*v) / temperature).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|p| p / sum).collect()
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        const DRAWS: usize = 20000;
        for n in [5usize, 300, 3000] {
            let logits: Vec<f32> = (0..n).map(|i| (i * 7919 % 613) as f32 / 60.0).collect();
            for (temperature, most) in [(1.0, f32::INFINITY), (2.0, f32::INFINITY), (1.0, 9.0), (1.0, 0.0)] {
                let plain = softmax(&logits, 1.0);
                let top = plain.iter().copied().fold(0.0, f64::max);
                let allowed = |p: &f64| *p == top || -p.log2() <= f64::from(most);
                let mut expected = softmax(&logits, temperature);
                expected.iter_mut().zip(&plain).filter(|(_, p)| !allowed(p)).for_each(|(e, _)| *e = 0.0);
                let sum: f64 = expected.iter().sum();
                let mut found = vec![0; n];
                for i in 0..DRAWS {
                    let at = (i as f64 + 0.5) / DRAWS as f64;
                    let (token, surprise) = draw(&logits, temperature as f32, most, at);
                    found[token] += 1;
                    let expected = -(expected[token] / sum).log2();
                    assert!((f64::from(surprise) - expected).abs() < 1e-3, "{surprise} {expected}");
                }
                for (found, expected) in found.iter().zip(&expected) {
                    let expected = expected / sum * DRAWS as f64;
                    assert!((f64::from(*found) - expected).abs() < 1.5, "{n}, {most}: {found} {expected}");
                }
            }
        }
    }
}
