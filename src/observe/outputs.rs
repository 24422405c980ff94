//! Outputs of all experts of a layer for the same tokens, and what a layer with fewer of them would compute.
//!
//! A token passes through a few experts only. To see what the others would add, the same window is decoded
//! several times with the router forced to choose other experts each time. The layer's output is put back to
//! what the source computes, so that all layers behind see what they always do.

use super::gating::{Decision, Gating};
use super::{ObserveError, Spot, add_bias, router_biases, spot};
use crate::ggml::{GgmlError, LlamaModel, Node, Token, Watched, Watcher};
use crate::model::Mixture;
use std::collections::BTreeMap;

/// Effect of a layer's experts on some tokens.
#[derive(Clone, Debug)]
pub struct LayerOutputs {
    /// Number of experts.
    pub n_expert: usize,
    /// Number of experts that a token passes through.
    pub n_used: usize,
    /// How router weights follow from logits.
    pub gating: Gating,
    /// Logits of the router, `[n_tokens, n_expert]`.
    pub logits: Vec<f32>,
    /// Scores that experts are chosen by, `[n_tokens, n_expert]`.
    pub scores: Vec<f32>,
    /// Inner products of the outputs of two experts, `[n_tokens, n_expert, n_expert]`.
    pub products: Vec<f32>,
    /// Inner products of the outputs with that of the layer, `[n_tokens, n_expert]`.
    pub with_layer: Vec<f32>,
    /// Squared length of the layer's output, `[n_tokens]`.
    pub layer: Vec<f64>,
}

impl LayerOutputs {
    /// Number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.layer.len()
    }

    /// Experts that token `t` passes through if only those with `kept` are left, the best first.
    ///
    /// # Panics
    /// If fewer experts are left than a token passes through.
    pub fn chosen(&self, t: usize, kept: &[bool]) -> Vec<i32> {
        let scores = &self.scores[t * self.n_expert..][..self.n_expert];
        let mut order: Vec<i32> = (0..self.n_expert as i32).filter(|&e| kept[e as usize]).collect();
        assert!(order.len() >= self.n_used);
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order.truncate(self.n_used);
        order
    }

    /// Squared distance of the layer's output for token `t` from that with the experts `chosen` out of those
    /// with `kept`, divided by its length. Tokens with huge activations count for more than others, and not
    /// for all of them.
    pub fn error(&self, t: usize, chosen: &[i32], kept: &[bool]) -> f64 {
        let n = self.n_expert;
        let row = &self.logits[t * n..][..n];
        let masked: Vec<f32> =
            row.iter().zip(kept).map(|(z, kept)| if *kept { *z } else { f32::NEG_INFINITY }).collect();
        let weights = self.gating.weights(&masked, chosen);
        let products = &self.products[t * n * n..][..n * n];
        let with_layer = &self.with_layer[t * n..][..n];
        let mut sum = self.layer[t];
        for (&i, wi) in chosen.iter().zip(&weights) {
            let i = i as usize;
            sum -= 2.0 * wi * f64::from(with_layer[i]);
            for (&j, wj) in chosen.iter().zip(&weights) {
                sum += wi * wj * f64::from(products[i * n + j as usize]);
            }
        }
        sum.max(0.0) / self.layer[t].sqrt().max(f64::MIN_POSITIVE)
    }

    /// Appends the tokens of another part of the same layer.
    pub fn append(&mut self, mut other: LayerOutputs) {
        self.logits.append(&mut other.logits);
        self.scores.append(&mut other.scores);
        self.products.append(&mut other.products);
        self.with_layer.append(&mut other.with_layer);
        self.layer.append(&mut other.layer);
    }
}

/// Largest length of the outputs that are kept. Longer ones are sketched: each number is added to one of so
/// many sums, with a sign. Inner products stay the same on average, and vary by a few percent.
const SKETCH: usize = 512;

/// Sketch of the rows of `values`, `n_embd` numbers each.
fn sketched(values: &[f32], n_embd: usize) -> Vec<f32> {
    if n_embd <= SKETCH {
        return values.to_vec();
    }
    // A multiplicative hash gives each number its place and its sign, the same in every row.
    let place = |i: usize| (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let places: Vec<(usize, f32)> = (0..n_embd)
        .map(|i| ((place(i) >> 32) as usize % SKETCH, if place(i) >> 63 == 0 { 1.0 } else { -1.0 }))
        .collect();
    let mut out = vec![0.0; values.len() / n_embd * SKETCH];
    for (row, out) in values.chunks_exact(n_embd).zip(out.chunks_exact_mut(SKETCH)) {
        row.iter().zip(&places).for_each(|(v, &(at, sign))| out[at] += sign * v);
    }
    out
}

/// Bytes of the outputs of the experts of a layer for `n_tokens` tokens.
pub fn output_bytes(n_expert: usize, n_embd: usize, n_tokens: usize) -> usize {
    n_expert * n_embd.min(SKETCH) * n_tokens * size_of::<f32>()
}

/// Returns whether the outputs of a mixture's experts can be observed alone: their router chooses freely, and
/// weighs outputs.
pub fn can_observe_outputs(mixture: &Mixture) -> bool {
    mixture.groups.is_none() && mixture.chunk == 1 && !mixture.weighs_inputs()
}

/// Observer of the outputs of all experts.
pub struct Outputs<'m> {
    context: Watched<'m, OutputWatcher>,
    n_expert: usize,
    biases: BTreeMap<usize, Vec<f32>>,
}

impl<'m> Outputs<'m> {
    /// Observer of windows of up to `n_ctx` tokens.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama cannot make a context.
    pub fn new(
        model: &'m LlamaModel,
        mixture: &Mixture,
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<Outputs<'m>, GgmlError> {
        let context = Watched::new(model, n_ctx, n_threads, OutputWatcher::default())?;
        Ok(Outputs { context, n_expert: mixture.n_expert, biases: router_biases(mixture) })
    }

    /// Number of times that a window is decoded for a layer whose tokens pass through `n_used` experts.
    pub fn n_decodes(n_expert: usize, n_used: usize) -> usize {
        1 + n_expert.div_ceil(n_used)
    }

    /// Outputs of the experts of `layers` for every `step`-th token of a window.
    /// Layers whose gating function is unknown are left out.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails.
    pub fn window(
        &mut self,
        tokens: &[Token],
        layers: &[usize],
        step: usize,
    ) -> Result<BTreeMap<usize, LayerOutputs>, ObserveError> {
        // The first token is among them: its activations may be huge, and all others attend to it.
        let wanted = |i: usize| i.is_multiple_of(step);
        let rows: Vec<usize> = (0..tokens.len()).filter(|&i| wanted(i)).collect();
        *self.context.watcher() = OutputWatcher {
            layers: layers
                .iter()
                .map(|&l| (l, Layer { bias: self.biases[&l].clone(), ..Layer::default() }))
                .collect(),
            rows: rows.clone(),
            ..OutputWatcher::default()
        };
        self.context.decode(tokens, wanted)?;
        let n_used = self.context.watcher().layers.values().map(|l| l.n_used).max().unwrap_or(0);
        let n_expert = self.n_expert;
        if n_used == 0 {
            return Ok(BTreeMap::new());
        }
        for first in (0..n_expert).step_by(n_used) {
            // The last group overlaps the one before it.
            let first = first.min(n_expert - n_used);
            self.context.watcher().forced = Some(first..first + n_used);
            self.context.decode(tokens, wanted)?;
        }
        let seen = std::mem::take(&mut self.context.watcher().layers);
        let found = seen.into_iter().filter_map(|(layer, l)| Some((layer, l.finish(n_expert, rows.len())?)));
        Ok(found.collect())
    }
}

#[derive(Default)]
struct OutputWatcher {
    layers: BTreeMap<usize, Layer>,
    /// Tokens of the window that are looked at.
    rows: Vec<usize>,
    /// Experts that routers are forced to choose; the source's choice is watched without.
    forced: Option<std::ops::Range<usize>>,
}

/// Record of a layer.
#[derive(Default)]
struct Layer {
    /// Bias of the router.
    bias: Vec<f32>,
    n_used: usize,
    logits: Vec<f32>,
    biased: Vec<f32>,
    chosen: Vec<i32>,
    weights: Vec<f32>,
    /// Output of the layer's experts for all tokens that it computed.
    out: Vec<f32>,
    n_embd: usize,
    /// Experts of the current product, for the tokens that are looked at.
    now: Vec<i32>,
    /// Outputs of each expert, `[n_expert][n_tokens * n_embd]`.
    outputs: BTreeMap<usize, Vec<f32>>,
}

impl Watcher for OutputWatcher {
    fn wants(&mut self, node: &Node) -> bool {
        let Some((spot, block)) = spot(node) else { return false };
        spot != Spot::Chosen && self.layers.contains_key(&block)
    }

    fn computed(&mut self, node: Node) {
        let Some((spot, block)) = spot(&node) else { return };
        let Some(layer) = self.layers.get_mut(&block) else { return };
        match &self.forced {
            None => layer.watch(spot, &node, &self.rows),
            Some(experts) => layer.force(spot, &node, &self.rows, experts),
        }
    }
}

/// Rows of `values`, one per token, of the tokens `tokens`; all, if only those were computed.
fn of_tokens<T: Copy>(values: &[T], n_tokens: usize, tokens: &[usize]) -> Vec<T> {
    if n_tokens == tokens.len() {
        return values.to_vec();
    }
    let each = values.len() / n_tokens;
    tokens.iter().flat_map(|t| &values[t * each..(t + 1) * each]).copied().collect()
}

impl Layer {
    /// Looks at what the source computes.
    fn watch(&mut self, spot: Spot, node: &Node, rows: &[usize]) {
        let ne = node.ne();
        match spot {
            Spot::Router => {
                self.logits = of_tokens(&node.floats().unwrap_or_default(), ne[1], rows);
                add_bias(&mut self.logits, &self.bias);
            }
            Spot::Biased => self.biased = of_tokens(&node.floats().unwrap_or_default(), ne[1], rows),
            Spot::Down => {
                let Some(ids) = node.source(2).and_then(|ids| ids.integers()) else { return };
                self.n_used = ne[1];
                self.chosen = of_tokens(&ids, ne[2], rows);
            }
            Spot::Weighted => {
                let Some(weights) = node.source(1).and_then(|w| w.floats()) else { return };
                self.weights = of_tokens(&weights, ne[2], rows);
            }
            Spot::Out => {
                self.out = node.floats().unwrap_or_default();
                self.n_embd = ne[0].min(SKETCH);
            }
            Spot::Chosen => {}
        }
    }

    /// Makes the router choose `experts`, looks at their outputs, and puts the layer's output back.
    fn force(&mut self, spot: Spot, node: &Node, rows: &[usize], experts: &std::ops::Range<usize>) {
        let ne = node.ne();
        match spot {
            Spot::Router | Spot::Biased => {
                let row: Vec<f32> =
                    (0..ne[0]).map(|e| if experts.contains(&e) { 0.0 } else { f32::NEG_INFINITY }).collect();
                node.set_floats(&row.repeat(ne[1]));
            }
            Spot::Down => {
                let ids = node.source(2).and_then(|ids| ids.integers()).unwrap_or_default();
                self.now = of_tokens(&ids, ne[2], rows);
            }
            Spot::Weighted => {
                let Some(weights) = node.source(1).and_then(|w| w.floats()) else { return };
                let Some(values) = node.floats() else { return };
                let n_used = ne[1];
                let weights = of_tokens(&weights, ne[2], rows);
                let values = sketched(&of_tokens(&values, ne[2], rows), ne[0]);
                let n_embd = ne[0].min(SKETCH);
                for (i, ((row, &w), &e)) in values.chunks(n_embd).zip(&weights).zip(&self.now).enumerate() {
                    let token = i / n_used;
                    let output =
                        self.outputs.entry(e as usize).or_insert_with(|| vec![0.0; rows.len() * n_embd]);
                    let output = &mut output[token * n_embd..][..n_embd];
                    output.iter_mut().zip(row).for_each(|(o, v)| *o = v / w);
                }
            }
            Spot::Out if self.out.len() == ne[0] * ne[1] => node.set_floats(&self.out),
            Spot::Out | Spot::Chosen => {}
        }
    }

    /// Inner products of what was seen; `None` if something was not, or the gating function is unknown.
    fn finish(self, n_expert: usize, n_tokens: usize) -> Option<LayerOutputs> {
        let (n_embd, n_used) = (self.n_embd, self.n_used);
        let whole = self.logits.len() == n_tokens * n_expert
            && self.chosen.len() == n_tokens * n_used
            && self.weights.len() == self.chosen.len()
            && self.outputs.len() == n_expert;
        if !whole || n_embd == 0 {
            return None;
        }
        let decisions = (0..n_tokens).map(|t| Decision {
            logits: &self.logits[t * n_expert..][..n_expert],
            chosen: &self.chosen[t * n_used..][..n_used],
            weights: &self.weights[t * n_used..][..n_used],
        });
        let gating = Gating::recognise(decisions)?;
        let mut found = LayerOutputs {
            n_expert,
            n_used,
            gating,
            scores: if self.biased.len() == self.logits.len() { self.biased } else { self.logits.clone() },
            logits: self.logits,
            products: Vec::with_capacity(n_tokens * n_expert * n_expert),
            with_layer: Vec::with_capacity(n_tokens * n_expert),
            layer: Vec::with_capacity(n_tokens),
        };
        for t in 0..n_tokens {
            let output = |e: usize| &self.outputs[&e][t * n_embd..][..n_embd];
            // The layer's output is the weighted sum, which needs no rows of tokens that were not computed.
            let mut sum = vec![0.0f32; n_embd];
            for (&e, &w) in self.chosen[t * n_used..][..n_used].iter().zip(&self.weights[t * n_used..]) {
                sum.iter_mut().zip(output(e as usize)).for_each(|(s, v)| *s += w * v);
            }
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            found.layer.push(f64::from(dot(&sum, &sum)));
            let first = found.products.len();
            for i in 0..n_expert {
                found.with_layer.push(dot(&sum, output(i)));
                // Products are symmetric: those with an earlier expert are there already.
                for j in 0..n_expert {
                    let known = (j < i).then(|| found.products[first + j * n_expert + i]);
                    found.products.push(known.unwrap_or_else(|| dot(output(i), output(j))));
                }
            }
        }
        Some(found)
    }
}
