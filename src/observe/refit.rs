//! Gradients of routers, towards the outputs of the whole layers.
//!
//! A window is decoded twice: by the whole model, whose layers' outputs are recorded, and by what is left of
//! it, where the outputs of the layers are put back. In the second pass, the outputs of the chosen experts
//! tell how a layer's output depends on its router weights, and the gating function how these depend on the
//! router's rows.

use super::gating::{Decision, Gating};
use super::masked::LayerMask;
use super::{Mask, ObserveError, Spot, add_bias, router_biases, spot};
use crate::ggml::{GgmlError, LlamaModel, Node, Token, Watched, Watcher};
use crate::model::Mixture;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Observer of the gradients of routers.
pub struct RouterGradients<'m> {
    context: Watched<'m, GradientWatcher>,
    biases: BTreeMap<usize, Vec<f32>>,
}

/// Gradient of one router over a window.
#[derive(Clone, Debug)]
pub struct RouterGradient {
    /// Squared distance of the layer's output from that of the whole layer, relative to the length of that.
    pub error: f64,
    /// Gradient of the error, `[n_expert, n_in]`.
    pub gradient: Vec<f32>,
}

impl<'m> RouterGradients<'m> {
    /// Observer of windows of up to `n_ctx` tokens.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama cannot make a context.
    pub fn new(
        model: &'m LlamaModel,
        mixture: &Mixture,
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<RouterGradients<'m>, GgmlError> {
        let context = Watched::new(model, n_ctx, n_threads, GradientWatcher::default())?;
        Ok(RouterGradients { context, biases: router_biases(mixture) })
    }

    /// Gradients of the routers in `mask` over one window, by the number of the layer.
    /// Layers whose gating function is unknown, or that choose by a table, have none.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails.
    pub fn window(
        &mut self,
        tokens: &[Token],
        mask: &Mask,
    ) -> Result<BTreeMap<usize, RouterGradient>, ObserveError> {
        let watcher = self.context.watcher();
        let of =
            |l: &usize| Layer { bias: self.biases.get(l).cloned().unwrap_or_default(), ..Layer::default() };
        watcher.layers = mask.keys().map(|l| (*l, of(l))).collect();
        watcher.mask = None;
        self.context.decode(tokens, |_| true)?;
        self.context.watcher().mask = Some(mask.clone());
        self.context.decode(tokens, |_| true)?;
        let seen = std::mem::take(&mut self.context.watcher().layers);
        Ok(seen.into_iter().filter_map(|(layer, l)| Some((layer, l.found?))).collect())
    }
}

#[derive(Default)]
struct GradientWatcher {
    layers: BTreeMap<usize, Layer>,
    /// Mask of the model; the whole model without.
    mask: Option<Mask>,
}

/// Record of a layer. All lists have one row per token.
#[derive(Default)]
struct Layer {
    /// Bias of the router.
    bias: Vec<f32>,
    /// Output of the whole layer, `[n_tokens, n_embd]`.
    whole: Vec<f32>,
    logits: Vec<f32>,
    chosen: Vec<i32>,
    gating: Option<Gating>,
    inputs: Vec<f32>,
    found: Option<RouterGradient>,
}

impl Watcher for GradientWatcher {
    fn wants(&mut self, node: &Node) -> bool {
        let Some((spot, block)) = spot(node) else { return false };
        let chosen_by_table = spot == Spot::Chosen && node.viewed().is_none();
        let wanted = match spot {
            Spot::Chosen => chosen_by_table && self.mask.is_some(),
            Spot::Biased => self.mask.is_some(),
            Spot::Router | Spot::Down | Spot::Weighted | Spot::Out => true,
        };
        wanted && self.layers.contains_key(&block)
    }

    fn computed(&mut self, node: Node) {
        let Some((spot, block)) = spot(&node) else { return };
        let Some(layer) = self.layers.get_mut(&block) else { return };
        match self.mask.as_ref().and_then(|mask| mask.get(&block)) {
            None => layer.watch(spot, &node),
            Some(mask) => layer.derive(spot, &node, mask),
        }
    }
}

impl Layer {
    /// Looks at the whole model.
    fn watch(&mut self, spot: Spot, node: &Node) {
        match spot {
            Spot::Router => {
                self.logits = node.floats().unwrap_or_default();
                add_bias(&mut self.logits, &self.bias);
            }
            Spot::Down => {
                self.chosen = node.source(2).and_then(|ids| ids.integers()).unwrap_or_default();
            }
            Spot::Weighted => {
                let weights = node.source(1).and_then(|w| w.floats()).unwrap_or_default();
                let (n_used, n_tokens) = (node.ne()[1], node.ne()[2]);
                let n_expert = self.logits.len() / n_tokens.max(1);
                if weights.len() != self.chosen.len() || n_expert == 0 {
                    return;
                }
                let rows = self.logits.chunks(n_expert).zip(self.chosen.chunks(n_used));
                let decisions = rows
                    .zip(weights.chunks(n_used))
                    .map(|((logits, chosen), weights)| Decision { logits, chosen, weights });
                self.gating = Gating::recognise(decisions);
            }
            Spot::Out => self.whole = node.floats().unwrap_or_default(),
            Spot::Biased | Spot::Chosen => {}
        }
    }

    /// Masks the layer and derives the gradient of its router.
    fn derive(&mut self, spot: Spot, node: &Node, mask: &LayerMask) {
        match spot {
            Spot::Router => {
                self.inputs = node.source(1).and_then(|x| x.floats()).unwrap_or_default();
                mask.apply(spot, node);
                self.logits = node.floats().unwrap_or_default();
                add_bias(&mut self.logits, &self.bias);
            }
            Spot::Biased | Spot::Chosen => mask.apply(spot, node),
            Spot::Down => {
                self.chosen = node.source(2).and_then(|ids| ids.integers()).unwrap_or_default();
            }
            Spot::Weighted => {
                let weights = node.source(1).and_then(|w| w.floats()).unwrap_or_default();
                let values = node.floats().unwrap_or_default();
                self.found = self.gradient(&values, &weights, node.ne()[0], node.ne()[1], mask.kept.len());
            }
            // Layers behind see what they do in the whole model, or errors would be those of other layers.
            Spot::Out if self.whole.len() == node.ne()[0] * node.ne()[1] => node.set_floats(&self.whole),
            Spot::Out => {}
        }
    }

    /// Gradient with respect to the router's rows, by the weighted outputs `[n_tokens, n_used, n_embd]` of the
    /// chosen experts and their weights.
    fn gradient(
        &self,
        outputs: &[f32],
        weights: &[f32],
        n_embd: usize,
        n_used: usize,
        n_expert: usize,
    ) -> Option<RouterGradient> {
        let gating = self.gating?;
        let n_tokens = weights.len() / n_used;
        let n_in = self.inputs.len() / n_tokens.max(1);
        let whole = self.whole.len() == n_tokens * n_embd
            && outputs.len() == weights.len() * n_embd
            && self.chosen.len() == weights.len()
            && self.logits.len() == n_tokens * n_expert;
        if !whole || n_in == 0 {
            return None;
        }
        // As in `LayerOutputs::error`, an error counts relative to the length of the output.
        let of_token = |t: usize| -> (f64, f64, Vec<f64>) {
            let target = &self.whole[t * n_embd..][..n_embd];
            let rows = &outputs[t * n_used * n_embd..][..n_used * n_embd];
            let mut error: Vec<f32> = target.iter().map(|v| -v).collect();
            for row in rows.chunks_exact(n_embd) {
                error.iter_mut().zip(row).for_each(|(e, v)| *e += v);
            }
            let dot = |a: &[f32], b: &[f32]| f64::from(a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>());
            let weights = &weights[t * n_used..][..n_used];
            let length = dot(target, target).sqrt().max(1e-12);
            let of_weights: Vec<f64> = rows
                .chunks_exact(n_embd)
                .zip(weights)
                .map(|(row, w)| if *w == 0.0 { 0.0 } else { 2.0 * dot(&error, row) / f64::from(*w) / length })
                .collect();
            let logits = &self.logits[t * n_expert..][..n_expert];
            let chosen = &self.chosen[t * n_used..][..n_used];
            (dot(&error, &error) / length, length, gating.gradient(logits, chosen, &of_weights))
        };
        let tokens: Vec<(f64, f64, Vec<f64>)> = (0..n_tokens).into_par_iter().map(of_token).collect();
        let (error, length) = tokens.iter().fold((0.0, 0.0), |(e, l), t| (e + t.0, l + t.1));
        let mut gradient = vec![0.0f32; n_expert * n_in];
        gradient.par_chunks_exact_mut(n_in).enumerate().for_each(|(e, row)| {
            for ((.., of_logits), x) in tokens.iter().zip(self.inputs.chunks_exact(n_in)) {
                let g = (of_logits[e] / length.max(1e-30)) as f32;
                if g != 0.0 {
                    row.iter_mut().zip(x).for_each(|(r, x)| *r += g * x);
                }
            }
        });
        let finite = error.is_finite() && gradient.iter().all(|g| g.is_finite());
        finite.then_some(RouterGradient { error: error / length.max(1e-30), gradient })
    }
}
