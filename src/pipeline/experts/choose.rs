//! First choice of the experts to keep, from statistics alone.

use super::ExpertSettings;
use crate::model::Mixture;
use crate::observe::{LayerMask, Mask, Usage};
use crate::prune::{self, FEW_TOKENS, Units};
use std::collections::BTreeMap;

/// Choice of experts.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Sets of experts that go together, and how many stay.
    pub units: Units,
    /// Scores of the experts by the number of the layer.
    pub scores: BTreeMap<usize, Vec<f64>>,
    /// Experts that must stay, by the number of the layer.
    pub protected: BTreeMap<usize, Vec<usize>>,
    /// Mask of each observed layer.
    pub mask: Mask,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Largest number of experts that a note names.
const NAMED: usize = 8;

/// Chooses `n_keep` experts of each layer of `mixture`: those that the texts protect, and then those with the
/// highest scores.
/// The scores follow from the statistics in `usage`, or are those in it, if it is a ranking from elsewhere.
pub fn choose(mixture: &Mixture, usage: &Usage, settings: &ExpertSettings, n_keep: usize) -> Choice {
    let units = Units::new(mixture, n_keep);
    let given = usage.texts.is_empty();
    let scores = match given {
        true => usage.scores.clone(),
        false => prune::scores(usage, settings.criterion, settings.weights),
    };
    let protected = prune::protected(usage, settings.criterion, settings.weights, settings.protect);
    let none = Vec::new();
    let kept: BTreeMap<usize, Vec<usize>> = scores
        .iter()
        .map(|(layer, scores)| (*layer, units.choose(scores, protected.get(layer).unwrap_or(&none))))
        .collect();
    let mask = prune::mask(&kept, &scores);
    let mut notes = Vec::new();
    if !given {
        notes.extend(rarely_seen(usage));
    }
    if let Some((layer, p)) = protected.iter().find(|(_, p)| p.len() > n_keep) {
        notes.push(format!(
            "layer {layer}: the texts protect {} experts together, and only {n_keep} stay; those that they need most do",
            p.len()
        ));
    }
    Choice { units, scores, protected, mask, notes }
}

/// Note on experts that so few tokens chose that their mean says little.
fn rarely_seen(usage: &Usage) -> Option<String> {
    let layers: Vec<usize> = usage.texts.first()?.layers.keys().copied().collect();
    let mut rare = Vec::new();
    for layer in layers {
        let n = usage.pooled(layer).n_tokens;
        rare.extend((0..n.len()).filter(|&e| n[e] < FEW_TOKENS).map(|e| (layer, e)));
    }
    if rare.is_empty() {
        return None;
    }
    let named: Vec<String> = rare.iter().take(NAMED).map(|(l, e)| format!("{l}:{e}")).collect();
    let more = if rare.len() > NAMED { ", …" } else { "" };
    Some(format!(
        "{} experts were chosen by fewer than {FEW_TOKENS} tokens, so their scores are lowered in proportion (layer:expert {}{more}); \
         more text shows whether they matter",
        rare.len(),
        named.join(", ")
    ))
}

impl Choice {
    /// Masks of the layers that draft tokens, whose routers cannot be observed.
    /// Evenly spread experts stay, as many in each group.
    pub fn of_drafts(&self, mixture: &Mixture) -> Mask {
        let n = mixture.n_expert;
        let (per_group, keep) = (n / self.units.n_groups, self.units.n_keep / self.units.n_groups);
        let (chunk, n_chunks) = (self.units.chunk, per_group / self.units.chunk);
        let n_kept = keep / chunk;
        let is_kept = |e: usize| {
            let c = e % per_group / chunk;
            (c + 1) * n_kept / n_chunks > c * n_kept / n_chunks
        };
        let mask = LayerMask { kept: (0..n).map(is_kept).collect(), router: None, order: (0..n).collect() };
        mixture.layers.iter().filter(|l| l.drafts).map(|l| (l.block, mask.clone())).collect()
    }
}
