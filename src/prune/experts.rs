//! Choice of the experts to keep, by what a router did with the tokens of some texts.

use crate::model::Mixture;
use crate::observe::{LayerMask, LayerOutputs, Mask, PooledUse, Usage};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Criterion by which experts are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExpertCriterion {
    /// Mean length of the expert's output times its router weight, over the tokens that chose it (REAP, arXiv
    /// 2510.13999, equation 5).
    #[default]
    Reap,
    /// Number of tokens that chose it.
    Frequency,
    /// Sum of its router weights.
    RouterWeight,
}

impl ExpertCriterion {
    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ExpertCriterion::Reap => "reap",
            ExpertCriterion::Frequency => "frequency",
            ExpertCriterion::RouterWeight => "router-weight",
        }
    }
}

/// Router weights that scores use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RouterWeights {
    /// Weights as the layer applies them.
    #[default]
    Applied,
    /// Weights of each token divided by their sum, for routers that do not do so themselves.
    Normalised,
}

/// Smallest number of tokens whose mean is trusted. The outputs of an expert with fewer are averaged over
/// this many, as if the missing ones were 0.
pub const FEW_TOKENS: u64 = 32;

/// Scores of the experts of each layer, by the number of the layer; higher ones are kept.
/// A text counts by its weight, whatever its length.
pub fn scores(
    usage: &Usage,
    criterion: ExpertCriterion,
    weights: RouterWeights,
) -> BTreeMap<usize, Vec<f64>> {
    let layers = usage.texts.first().map(|t| t.layers.keys().copied().collect::<Vec<_>>());
    let scored = |layer: usize| (layer, of_layer(&usage.pooled(layer), criterion, weights));
    layers.unwrap_or_default().into_iter().map(scored).collect()
}

fn of_layer(used: &PooledUse, criterion: ExpertCriterion, weights: RouterWeights) -> Vec<f64> {
    let (weight, energy) = match weights {
        RouterWeights::Applied => (&used.weight, &used.energy),
        RouterWeights::Normalised => (&used.weight_normalised, &used.energy_normalised),
    };
    match criterion {
        ExpertCriterion::Frequency => used.tokens.clone(),
        ExpertCriterion::RouterWeight => weight.clone(),
        ExpertCriterion::Reap => {
            let mean = |e: usize| {
                let trust = (used.n_tokens[e] as f64 / FEW_TOKENS as f64).min(1.0);
                if used.tokens[e] > 0.0 { trust * energy[e] / used.tokens[e] } else { 0.0 }
            };
            (0..energy.len()).map(mean).collect()
        }
    }
}

/// Experts of each layer that one of the texts needs most: a share `share` of all experts, by the text's own
/// scores, the most needed first.
pub fn protected(
    usage: &Usage,
    criterion: ExpertCriterion,
    weights: RouterWeights,
    share: f64,
) -> BTreeMap<usize, Vec<usize>> {
    let n = (share * usage.n_expert as f64).ceil() as usize;
    let mut all: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let layers: Vec<usize> =
        usage.texts.first().map(|t| t.layers.keys().copied().collect()).unwrap_or_default();
    for layer in layers {
        let of_text = |scores: &[f64]| by_score(scores).into_iter().take(n).collect::<Vec<_>>();
        let tops: Vec<Vec<usize>> = usage
            .texts
            .iter()
            .filter_map(|t| t.pooled(layer))
            .map(|used| of_text(&of_layer(&used, criterion, weights)))
            .collect();
        // The first of every text come before the second of any; among equals the lower number does, so that
        // the order of the texts does not count.
        let mut found: Vec<usize> = Vec::new();
        for rank in 0..n {
            let mut here: Vec<usize> = tops.iter().filter_map(|top| top.get(rank).copied()).collect();
            here.sort_unstable();
            for e in here {
                if !found.contains(&e) {
                    found.push(e);
                }
            }
        }
        all.insert(layer, found);
    }
    all
}

/// Experts, those with the highest score first; among equals the lower number.
pub fn by_score(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order
}

/// Sets of experts that go and stay together, and how many of these stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    /// Size of a unit: the experts of a chunk.
    pub chunk: usize,
    /// Number of groups, from each of which as many units stay.
    pub n_groups: usize,
    /// Number of experts that stay.
    pub n_keep: usize,
}

impl Units {
    /// Units of a mixture's experts, of which `n_keep` stay.
    pub fn new(mixture: &Mixture, n_keep: usize) -> Units {
        Units { chunk: mixture.chunk, n_groups: mixture.groups.map_or(1, |g| g.n), n_keep }
    }

    /// Experts that stay, ascending: `first`, as far as there is room, and then those with the highest
    /// scores.
    ///
    /// # Panics
    /// If the numbers do not divide.
    pub fn choose(&self, scores: &[f64], first: &[usize]) -> Vec<usize> {
        let (n, chunk) = (scores.len(), self.chunk);
        let (per_group, n_keep) = (n / self.n_groups, self.n_keep / self.n_groups);
        assert!(per_group * self.n_groups == n && n_keep * self.n_groups == self.n_keep);
        assert!(per_group.is_multiple_of(chunk) && n_keep.is_multiple_of(chunk));
        let mut kept = Vec::with_capacity(self.n_keep);
        for group in 0..self.n_groups {
            let units = group * per_group / chunk..(group + 1) * per_group / chunk;
            let score = |unit: usize| scores[unit * chunk..(unit + 1) * chunk].iter().sum::<f64>();
            let rank = |unit: usize| {
                let of_unit = |e: &usize| e / chunk == unit;
                first.iter().position(of_unit).unwrap_or(usize::MAX)
            };
            let mut order: Vec<usize> = units.collect();
            order.sort_by(|&a, &b| rank(a).cmp(&rank(b)).then(score(b).total_cmp(&score(a))).then(a.cmp(&b)));
            kept.extend(order.into_iter().take(n_keep / chunk).flat_map(|u| u * chunk..(u + 1) * chunk));
        }
        kept.sort_unstable();
        kept
    }

    /// Unit of an expert, and the group that it belongs to.
    pub fn unit_and_group(&self, expert: usize, n_expert: usize) -> (usize, usize) {
        (expert / self.chunk, expert / (n_expert / self.n_groups))
    }
}

/// Experts that stay, ascending, if they go one by one, each time the one whose loss changes the layer's output
/// least; those in `protected` last.
/// The layer's output is that of the tokens in `outputs`, and an expert's tokens pass through the next best.
pub fn eliminate(outputs: &LayerOutputs, n_keep: usize, protected: &[usize]) -> Vec<usize> {
    let n = outputs.n_expert;
    let mut kept = vec![true; n];
    let mut now: Vec<(Vec<i32>, f64)> = (0..outputs.n_tokens())
        .into_par_iter()
        .map(|t| {
            let chosen = outputs.chosen(t, &kept);
            let error = outputs.error(t, &chosen, &kept);
            (chosen, error)
        })
        .collect();
    for n_left in (n_keep..n).rev() {
        // A token's error changes if one of its experts goes. Where the softmax runs over all experts, other
        // tokens' errors change a little, too, which does not count here.
        let changes: Vec<Vec<(i32, f64)>> = now
            .par_iter()
            .enumerate()
            .map(|(t, (chosen, error))| {
                let without = |&e: &i32| {
                    let mut fewer = kept.clone();
                    fewer[e as usize] = false;
                    let next = outputs.chosen(t, &fewer);
                    (e, outputs.error(t, &next, &fewer) - error)
                };
                chosen.iter().map(without).collect()
            })
            .collect();
        let mut cost = vec![0.0; n];
        for &(e, change) in changes.iter().flatten() {
            cost[e as usize] += change;
        }
        let free = (0..n).filter(|e| kept[*e] && !protected.contains(e));
        let any = (0..n).filter(|e| kept[*e]);
        let least = |all: &mut dyn Iterator<Item = usize>| all.min_by(|&a, &b| cost[a].total_cmp(&cost[b]));
        let Some(gone) = least(&mut free.into_iter()).or_else(|| least(&mut any.into_iter())) else { break };
        kept[gone] = false;
        now.par_iter_mut().enumerate().filter(|(_, (chosen, _))| chosen.contains(&(gone as i32))).for_each(
            |(t, (chosen, error))| {
                *chosen = outputs.chosen(t, &kept);
                *error = outputs.error(t, chosen, &kept);
            },
        );
        debug_assert_eq!(kept.iter().filter(|k| **k).count(), n_left);
    }
    (0..n).filter(|&e| kept[e]).collect()
}

/// Mask that keeps the experts `kept` of each layer that has `scores`, which give the order of preference.
pub fn mask(kept: &BTreeMap<usize, Vec<usize>>, scores: &BTreeMap<usize, Vec<f64>>) -> Mask {
    let known = kept.iter().filter_map(|(&layer, kept)| Some((layer, kept, scores.get(&layer)?)));
    known
        .map(|(layer, kept, scores)| {
            let is_kept = (0..scores.len()).map(|e| kept.contains(&e)).collect();
            (layer, LayerMask { kept: is_kept, router: None, order: by_score(scores) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{LayerUse, TextUse};

    /// Name, weight, number of tokens, and tokens and energy of each expert.
    type OneText<'a> = (&'a str, f64, u64, &'a [(u64, f64)]);

    fn usage(texts: &[OneText]) -> Usage {
        let n = texts[0].3.len();
        let text = |&(name, weight, tokens, experts): &OneText| TextUse {
            name: name.into(),
            weight,
            tokens,
            layers: BTreeMap::from([(
                3,
                LayerUse {
                    tokens: experts.iter().map(|e| e.0).collect(),
                    energy: experts.iter().map(|e| e.1).collect(),
                    ..LayerUse::new(n)
                },
            )]),
        };
        Usage { texts: texts.iter().map(text).collect(), ..Usage::new(n) }
    }

    #[test]
    fn reap_is_the_mean_over_an_experts_tokens() {
        let u = usage(&[("a", 1.0, 1000, &[(400, 800.0), (100, 900.0), (8, 80.0), (0, 0.0)])]);
        let found = &scores(&u, ExpertCriterion::Reap, RouterWeights::Applied)[&3];
        // Eight tokens are a quarter of the number whose mean is trusted.
        assert_eq!(*found, [2.0, 9.0, 2.5, 0.0]);
        let found = &scores(&u, ExpertCriterion::Frequency, RouterWeights::Applied)[&3];
        assert_eq!(*found, [0.4, 0.1, 0.008, 0.0]);
    }

    #[test]
    fn texts_count_by_weight_and_in_any_order() {
        let a: OneText = ("a", 1.0, 1000, &[(500, 500.0), (500, 1000.0)]);
        let b: OneText = ("b", 3.0, 100, &[(80, 800.0), (20, 20.0)]);
        let score = |texts: &[_]| scores(&usage(texts), ExpertCriterion::Reap, RouterWeights::Applied);
        let (one, other) = (score(&[a, b]), score(&[b, a]));
        for (x, y) in one[&3].iter().zip(&other[&3]) {
            assert!((x - y).abs() < 1e-12);
        }
        // (0.25 · 0.5 + 0.75 · 8) / (0.25 · 0.5 + 0.75 · 0.8)
        assert!((one[&3][0] - 6.125 / 0.725).abs() < 1e-12, "{one:?}");
    }

    #[test]
    fn each_text_protects_its_own() {
        let a: OneText = ("a", 1.0, 100, &[(50, 500.0), (50, 400.0), (0, 0.0), (0, 0.0)]);
        let b: OneText = ("b", 1.0, 100, &[(0, 0.0), (0, 0.0), (50, 5.0), (50, 4.0)]);
        let found = |texts: &[_], share| {
            protected(&usage(texts), ExpertCriterion::Reap, RouterWeights::Applied, share)[&3].clone()
        };
        assert_eq!(found(&[a, b], 0.25), [0, 2]);
        assert_eq!(found(&[b, a], 0.5), [0, 2, 1, 3]);
        assert!(found(&[a, b], 0.0).is_empty());
    }

    #[test]
    fn units_stay_whole_and_groups_alike() {
        let scores = [5.0, 1.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0];
        let units = |chunk, n_groups, n_keep| Units { chunk, n_groups, n_keep };
        assert_eq!(units(1, 1, 4).choose(&scores, &[]), [4, 5, 6, 7]);
        assert_eq!(units(1, 2, 4).choose(&scores, &[]), [0, 3, 4, 5]);
        assert_eq!(units(2, 1, 4).choose(&scores, &[]), [4, 5, 6, 7]);
        assert_eq!(units(2, 1, 4).choose(&scores, &[1]), [0, 1, 4, 5]);
        assert_eq!(units(1, 1, 2).choose(&scores, &[1, 2, 3]), [1, 2]);
    }
}
