//! Predictions against others, position by position.

use super::exp::{exp_neg, log_sum_exp};

/// How two rows of logits differ, and what each thinks of the token that came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowComparison {
    /// Negative log-likelihood of the token.
    pub nll: f64,
    /// The same by the other row.
    pub base_nll: f64,
    /// KL divergence from the other row's distribution, in nats.
    pub kl: f64,
    /// Both think the same token likeliest.
    pub same_top: bool,
}

/// Compares the logits `own` with `base`, where `next` is the token that came.
pub fn compare_rows(own: &[f32], base: &[f32], next: usize) -> RowComparison {
    let (lse, lse_base) = (log_sum_exp(own), log_sum_exp(base));
    // Σ p (log p − log q), with p as exact as its own sum.
    let (mut mass, mut excess) = (0.0f64, 0.0f64);
    for (b, o) in base.iter().zip(own) {
        let p = exp_neg(b - lse_base as f32);
        mass += f64::from(p);
        excess += f64::from(p * (b - o));
    }
    let top = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
    RowComparison {
        nll: lse - f64::from(own[next]),
        base_nll: lse_base - f64::from(base[next]),
        kl: excess / mass - (lse_base - lse),
        same_top: top(own) == top(base),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_compared_as_the_formulas_say() {
        for n in [3usize, 40, 5000] {
            let base: Vec<f32> = (0..n).map(|i| (i * 7919 % 613) as f32 / 30.0 - 10.0).collect();
            let own: Vec<f32> =
                base.iter().enumerate().map(|(i, b)| b + (i * 31 % 17) as f32 / 9.0).collect();
            let softmax = |row: &[f32]| -> Vec<f64> {
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                row.iter().map(|v| f64::from(*v).exp() / sum).collect()
            };
            let (p, q) = (softmax(&base), softmax(&own));
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            let found = compare_rows(&own, &base, 2);
            let mine = found.kl;
            assert!((found.nll + q[2].ln()).abs() < 1e-5 && (mine - kl).abs() < 1e-5, "n {n}: {mine} {kl}");
            assert!((found.base_nll + p[2].ln()).abs() < 1e-5, "n {n}");
            let first = |v: &[f64]| (0..n).rev().max_by(|&a, &b| v[a].total_cmp(&v[b])).unwrap();
            assert_eq!(found.same_top, p[first(&p)] == p[first(&q)], "n {n}");
        }
        let same = compare_rows(&[1.0, 2.0], &[1.0, 2.0], 0);
        assert!(same.kl == 0.0 && same.same_top && same.nll == same.base_nll);
    }
}
