//! Comparison of two predictions, position by position.

use super::exp::{exp_neg, log_sum_exp};

/// Difference of two rows of logits, and the likelihood that each gives to the next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowComparison {
    /// Negative log-likelihood of the next token, in nats.
    pub nll: f64,
    /// Negative log-likelihood of the next token by the base row, in nats.
    pub base_nll: f64,
    /// KL divergence from the base row's distribution, in nats.
    pub kl: f64,
    /// Whether both rows have the same most likely token.
    pub same_top: bool,
}

/// Compares the logits `own` with `base`, both `[n_vocab]`; `next` is the next token of the text.
pub fn compare_rows(own: &[f32], base: &[f32], next: usize) -> RowComparison {
    let (lse, lse_base) = (log_sum_exp(own), log_sum_exp(base));
    // KL = Σ p (log p − log q), with p as exact as its own sum.
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

/// Comparison of a model's predictions with those of a base model over many positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Perplexity.
    pub ppl: f64,
    /// Perplexity of the base model.
    pub base_ppl: f64,
    /// KL divergence from the base model's predictions.
    pub kl: Kl,
    /// Share of positions at which both models have the same most likely token, 0 to 1.
    pub top1: f64,
}

/// Distribution of the KL divergences at single positions, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kl {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Metrics {
    /// Metrics over `rows`, one per position; NaN without rows.
    pub fn of(rows: &[RowComparison]) -> Metrics {
        let mean = |f: fn(&RowComparison) -> f64| rows.iter().map(f).sum::<f64>() / rows.len() as f64;
        let mut sorted: Vec<f64> = rows.iter().map(|r| r.kl).collect();
        sorted.sort_by(f64::total_cmp);
        let quantile = |share: f64| {
            let at = (rows.len().saturating_sub(1) as f64 * share).round() as usize;
            sorted.get(at).copied().unwrap_or(f64::NAN)
        };
        Metrics {
            ppl: mean(|r| r.nll).exp(),
            base_ppl: mean(|r| r.base_nll).exp(),
            kl: Kl { mean: mean(|r| r.kl), median: quantile(0.5), p99: quantile(0.99), max: quantile(1.0) },
            top1: mean(|r| f64::from(u8::from(r.same_top))),
        }
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

    #[test]
    fn metrics_are_means_and_quantiles_of_rows() {
        let row = |i: u32| RowComparison {
            nll: f64::from(i % 2),
            base_nll: 1.0,
            kl: f64::from((i * 7) % 101),
            same_top: i.is_multiple_of(4),
        };
        let rows: Vec<RowComparison> = (0..101).map(row).collect();
        let found = Metrics::of(&rows);
        assert_eq!(found.kl, Kl { mean: 50.0, median: 50.0, p99: 99.0, max: 100.0 });
        assert_eq!((found.ppl, found.base_ppl), ((50.0f64 / 101.0).exp(), 1.0f64.exp()));
        assert_eq!(found.top1, 26.0 / 101.0);
        assert!(Metrics::of(&[]).kl.mean.is_nan());
    }
}
