//! Search for the largest sparsity within a quality limit.

use crate::evaluate::Metrics;
use std::fmt;

/// Quality limit on the held-out windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QualityLimit {
    /// Mean KL divergence from the source's predictions, in nats.
    Kld(f64),
    /// Perplexity divided by the source's.
    PplRatio(f64),
}

impl QualityLimit {
    /// Measured value that is compared with the limit.
    pub fn of(self, found: &Metrics) -> f64 {
        match self {
            QualityLimit::Kld(_) => found.kl.mean,
            QualityLimit::PplRatio(_) => found.ppl / found.base_ppl,
        }
    }

    /// Value on a scale that is 0 if nothing is removed, and grows about as the square of the sparsity.
    fn loss(self, value: f64) -> f64 {
        match self {
            QualityLimit::Kld(_) => value,
            QualityLimit::PplRatio(_) => value.ln(),
        }
    }

    fn most(self) -> f64 {
        match self {
            QualityLimit::Kld(most) | QualityLimit::PplRatio(most) => most,
        }
    }
}

impl fmt::Display for QualityLimit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            QualityLimit::Kld(most) => write!(f, "a KL divergence of {most}"),
            QualityLimit::PplRatio(most) => write!(f, "{most} times the perplexity"),
        }
    }
}

/// First sparsity to measure, in hundredths.
const FIRST: u32 = 25;

/// Search over whole hundredths of sparsity, guided by the measurements so far.
pub(super) struct Search {
    limit: QualityLimit,
    /// Largest sparsity within the limit, and smallest that is not or cannot be reached, with their losses if
    /// known.
    within: (u32, f64),
    beyond: (u32, Option<f64>),
    least: Option<(u32, f64)>,
}

impl Search {
    /// Creates a search up to `most` hundredths.
    pub(super) fn new(limit: QualityLimit, most: u32) -> Search {
        Search { limit, within: (0, 0.0), beyond: (most + 1, None), least: None }
    }

    /// Next sparsity to measure, in hundredths, if there is one.
    pub(super) fn next(&self) -> Option<u32> {
        let (low, high) = (self.within.0, self.beyond.0);
        if high - low < 2 {
            return None;
        }
        let goal = self.limit.loss(self.limit.most());
        let guess = match (self.within, self.beyond) {
            ((0, _), (_, None)) => f64::from(FIRST),
            // Extrapolates the square from the known loss to the goal.
            ((0, _), (high, Some(loss))) => f64::from(high) * (goal / loss).sqrt(),
            ((low, loss), (_, None)) => f64::from(low) * (goal / loss.max(1e-9)).sqrt(),
            ((low, a), (high, Some(b))) => {
                let [a, b, goal] = [a, b, goal].map(|v| v.max(1e-9).sqrt());
                f64::from(low) + f64::from(high - low) * (goal - a) / (b - a)
            }
        };
        let guess = if guess.is_finite() { guess.round() as u32 } else { (low + high) / 2 };
        Some(guess.clamp(low + 1, high - 1))
    }

    /// Records that `percent` gave `value`. Returns whether it is the best result so far.
    pub(super) fn tell(&mut self, percent: u32, value: f64) -> bool {
        let loss = self.limit.loss(value);
        if self.least.is_none_or(|(least, _)| percent < least) {
            self.least = Some((percent, value));
        }
        // NaN is not within the limit.
        if value <= self.limit.most() {
            self.within = (percent, loss);
            true
        } else {
            self.beyond = (percent, Some(loss).filter(|l| l.is_finite()));
            false
        }
    }

    /// Smallest sparsity that was measured, in hundredths, with its value.
    pub(super) fn least(&self) -> Option<(u32, f64)> {
        self.least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of measurements of a search, and its result, for the loss `loss` of each share.
    fn found(limit: QualityLimit, most: u32, loss: impl Fn(f64) -> f64) -> (usize, Option<u32>) {
        let mut search = Search::new(limit, most);
        let (mut n, mut best) = (0, None);
        while let Some(percent) = search.next() {
            n += 1;
            if search.tell(percent, loss(f64::from(percent) / 100.0)) {
                best = Some(percent);
            }
        }
        (n, best)
    }

    #[test]
    fn the_largest_share_within_the_limit_is_found_in_few_steps() {
        for power in [1.0, 1.5, 2.0, 3.0] {
            let loss = |s: f64| 6.0 * s.powf(power);
            for goal in [0.03, 0.2, 0.7, 2.0, 10.0] {
                let (n, best) = found(QualityLimit::Kld(goal), 90, loss);
                let expected = (1..=90).rev().find(|&p| loss(f64::from(p) / 100.0) <= goal);
                assert_eq!(best, expected, "{goal} {power}");
                assert!(n <= 9, "{n} steps for {goal} with power {power}");
            }
        }
        let (_, best) = found(QualityLimit::PplRatio(1.5), 90, |s| (3.0 * s).exp());
        assert_eq!(best, Some(13));
    }

    #[test]
    fn what_cannot_be_is_not_found() {
        assert_eq!(found(QualityLimit::Kld(0.01), 90, |_| 1.0).1, None);
        assert_eq!(found(QualityLimit::Kld(0.01), 0, |_| 0.0), (0, None));
        assert_eq!(found(QualityLimit::Kld(1.0), 50, |_| f64::NAN).1, None);
        assert_eq!(found(QualityLimit::Kld(1.0), 50, |_| 0.0).1, Some(50));
    }
}
