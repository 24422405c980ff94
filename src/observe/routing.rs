//! Observation of the routers: which experts the tokens of a window choose, and what these add.

use super::usage::LayerUse;
use super::{ObserveError, Spot, spot};
use crate::ggml::{GgmlError, LlamaModel, Node, Token, Watched, Watcher};
use crate::model::Mixture;
use std::collections::BTreeMap;

/// Observer of the routers of a model.
pub struct Routing<'m> {
    context: Watched<'m, RoutingWatcher>,
    blocks: Vec<usize>,
}

impl<'m> Routing<'m> {
    /// Observer of windows of up to `n_ctx` tokens.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama cannot make a context.
    pub fn new(
        model: &'m LlamaModel,
        mixture: &Mixture,
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<Routing<'m>, GgmlError> {
        let blocks: Vec<usize> = mixture.observed().map(|l| l.block).collect();
        let watcher = RoutingWatcher {
            n_expert: mixture.n_expert,
            weights_first: mixture.weighs_inputs(),
            blocks: blocks.clone(),
            seen: BTreeMap::new(),
        };
        Ok(Routing { context: Watched::new(model, n_ctx, n_threads, watcher)?, blocks })
    }

    /// Usage of the experts by one window, by the number of the layer.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails, or a layer did not see every token or was not finite.
    pub fn window(&mut self, tokens: &[Token]) -> Result<BTreeMap<usize, LayerUse>, ObserveError> {
        self.context.watcher().seen.clear();
        // The last layer computes only tokens with logits.
        self.context.decode(tokens, |_| true)?;
        let seen = std::mem::take(&mut self.context.watcher().seen);
        for &layer in &self.blocks {
            let found = seen.get(&layer).map_or(0, |s| s.n_tokens);
            if found != tokens.len() {
                return Err(ObserveError::Unequal { layer, found, expected: tokens.len() });
            }
        }
        seen.into_iter()
            .map(|(layer, s)| {
                let sums = [("a router weight", &s.used.weight), ("an expert's output", &s.used.energy)];
                let wrong = sums.into_iter().find(|(_, v)| v.iter().any(|v| !v.is_finite()));
                match wrong.map(|(what, _)| what) {
                    Some(what) => Err(ObserveError::NotFinite { layer, what }),
                    None => Ok((layer, s.used)),
                }
            })
            .collect()
    }
}

struct RoutingWatcher {
    n_expert: usize,
    /// Whether router weights multiply the experts' inputs (`llama4`), instead of their outputs.
    weights_first: bool,
    blocks: Vec<usize>,
    seen: BTreeMap<usize, Seen>,
}

/// Record of a layer in the current window.
struct Seen {
    used: LayerUse,
    n_tokens: usize,
    /// Chosen experts `[n_tokens, n_used]` of a product whose weighted outputs are still to come.
    chosen: Option<Vec<i32>>,
    /// Router weights `[n_tokens, n_used]` of a product that is still to come.
    weights: Option<Vec<f32>>,
}

impl Watcher for RoutingWatcher {
    fn wants(&mut self, node: &Node) -> bool {
        let Some((spot, block)) = spot(node) else { return false };
        match spot {
            Spot::Down => self.blocks.contains(&block),
            // An architecture may route twice in a layer; only the first product is that of the experts.
            Spot::Weighted if self.weights_first => self.blocks.contains(&block),
            Spot::Weighted => self.seen.get(&block).is_some_and(|s| s.chosen.is_some()),
            _ => false,
        }
    }

    fn computed(&mut self, node: Node) {
        let Some((spot, block)) = spot(&node) else { return };
        let n_expert = self.n_expert;
        let seen = self.seen.entry(block).or_insert_with(|| Seen {
            used: LayerUse::new(n_expert),
            n_tokens: 0,
            chosen: None,
            weights: None,
        });
        if spot == Spot::Down {
            let Some(ids) = node.source(2) else { return };
            let Some(chosen) = ids.integers() else { return };
            seen.count_near_misses(&ids, n_expert);
            match seen.weights.take() {
                // The weights are in the outputs already.
                Some(weights) => seen.count(&node, &chosen, &weights, node.ne()[1]),
                None => seen.chosen = Some(chosen),
            }
            return;
        }
        let Some(weights) = node.source(1).and_then(|w| w.floats()) else { return };
        match seen.chosen.take() {
            Some(chosen) => seen.count(&node, &chosen, &weights, node.ne()[1]),
            None => seen.weights = Some(weights),
        }
    }
}

impl Seen {
    /// Counts the expert behind the chosen ones. Their numbers are a view of all, in order of preference.
    fn count_near_misses(&mut self, ids: &Node, n_expert: usize) {
        let (n_used, n_tokens) = (ids.ne()[0], ids.ne()[1]);
        let Some(all) = ids.viewed().filter(|all| n_used < n_expert && all.ne()[0] == n_expert) else {
            return;
        };
        let Some(order) = all.integers().filter(|order| order.len() == n_expert * n_tokens) else { return };
        for row in order.chunks_exact(n_expert) {
            self.used.near_misses[row[n_used] as usize] += 1;
        }
    }

    /// Counts the tokens of a product of `n_used` experts each, by its weighted `outputs`.
    fn count(&mut self, outputs: &Node, chosen: &[i32], weights: &[f32], n_used: usize) {
        let n_embd = outputs.ne()[0];
        let Some(values) = outputs.floats() else { return };
        if values.len() != chosen.len() * n_embd || weights.len() != chosen.len() {
            return;
        }
        let rows = values.chunks_exact(n_embd * n_used);
        for ((rows, chosen), weights) in rows.zip(chosen.chunks(n_used)).zip(weights.chunks(n_used)) {
            let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            let sum = if sum.abs() > f64::from(f32::MIN_POSITIVE) { sum } else { 1.0 };
            for ((row, &e), &w) in rows.chunks_exact(n_embd).zip(chosen).zip(weights) {
                let length = f64::from(row.iter().map(|v| v * v).sum::<f32>()).sqrt();
                let (e, w, u) = (e as usize, f64::from(w), &mut self.used);
                u.tokens[e] += 1;
                u.weight[e] += w;
                u.weight_normalised[e] += w / sum;
                u.energy[e] += length;
                u.energy_normalised[e] += length / sum;
            }
        }
        self.n_tokens += chosen.len() / n_used;
    }
}
