//! Second moments of the inputs of each expert's `ffn_down`.

use super::{ObserveError, Spot, spot};
use crate::ggml::{GgmlError, LlamaModel, Node, Token, Watched, Watcher};
use crate::model::Mixture;
use crate::numeric::SymMatrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Second moments of one expert's neurons.
#[derive(Clone, Debug)]
pub struct ExpertGram {
    /// Sum over the expert's tokens of the products of two neurons, times the squared router weight.
    pub gram: SymMatrix,
    /// Number of its tokens.
    pub n_tokens: usize,
}

/// Observer of the neurons of experts.
pub struct Grams<'m> {
    context: Watched<'m, GramWatcher>,
}

/// Bytes of the moments of a layer of `n_expert` experts of `width` neurons.
pub fn gram_bytes(n_expert: usize, width: usize) -> usize {
    n_expert * width * (width + 1) / 2 * size_of::<f64>()
}

impl<'m> Grams<'m> {
    /// Observer of the layers `layers` in windows of up to `n_ctx` tokens.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama cannot make a context.
    pub fn new(
        model: &'m LlamaModel,
        mixture: &Mixture,
        layers: &[usize],
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<Grams<'m>, GgmlError> {
        let wanted = mixture.layers.iter().filter(|l| layers.contains(&l.block));
        let layer = |width: usize| Layer {
            experts: (0..mixture.n_expert)
                .map(|_| ExpertGram { gram: SymMatrix::zero(width), n_tokens: 0 })
                .collect(),
            ..Layer::default()
        };
        let watcher = GramWatcher {
            weights_first: mixture.weighs_inputs(),
            layers: wanted.map(|l| (l.block, layer(l.width))).collect(),
        };
        Ok(Grams { context: Watched::new(model, n_ctx, n_threads, watcher)? })
    }

    /// Adds the tokens of a window.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails, or a layer did not see every token or was not finite.
    pub fn window(&mut self, tokens: &[Token]) -> Result<(), ObserveError> {
        self.context.watcher().layers.values_mut().for_each(|l| l.seen = 0);
        self.context.decode(tokens, |_| true)?;
        for (&layer, l) in &self.context.watcher().layers {
            if l.seen != tokens.len() {
                return Err(ObserveError::Unequal { layer, found: l.seen, expected: tokens.len() });
            }
            let sound = |e: &ExpertGram| e.gram.diagonal().iter().all(|v| v.is_finite());
            if !l.experts.iter().all(sound) {
                return Err(ObserveError::NotFinite { layer, what: "a neuron" });
            }
        }
        Ok(())
    }

    /// Moments of all experts, by the number of the layer.
    pub fn finish(mut self) -> BTreeMap<usize, Vec<ExpertGram>> {
        let layers = std::mem::take(&mut self.context.watcher().layers);
        layers.into_iter().map(|(layer, l)| (layer, l.experts)).collect()
    }
}

struct GramWatcher {
    weights_first: bool,
    layers: BTreeMap<usize, Layer>,
}

#[derive(Default)]
struct Layer {
    experts: Vec<ExpertGram>,
    /// Tokens of the current window.
    seen: usize,
    /// Inputs `[n_tokens, n_used, width]` and chosen experts `[n_tokens, n_used]` whose weights are to come.
    inputs: Vec<f32>,
    chosen: Vec<i32>,
}

impl Watcher for GramWatcher {
    fn wants(&mut self, node: &Node) -> bool {
        let Some((spot, block)) = spot(node) else { return false };
        let Some(layer) = self.layers.get(&block) else { return false };
        spot == Spot::Down || (spot == Spot::Weighted && !layer.chosen.is_empty())
    }

    fn computed(&mut self, node: Node) {
        let Some((spot, block)) = spot(&node) else { return };
        let Some(layer) = self.layers.get_mut(&block) else { return };
        if spot == Spot::Down {
            layer.inputs = node.source(1).and_then(|x| x.floats()).unwrap_or_default();
            layer.chosen = node.source(2).and_then(|ids| ids.integers()).unwrap_or_default();
            if self.weights_first {
                let ones = vec![1.0; layer.chosen.len()];
                layer.add(&ones, node.ne()[2]);
            }
        } else if let Some(weights) = node.source(1).and_then(|w| w.floats()) {
            layer.add(&weights, node.ne()[2]);
        }
    }
}

impl Layer {
    /// Adds the tokens of the current window, whose router weights are `weights`.
    fn add(&mut self, weights: &[f32], n_tokens: usize) {
        let (inputs, chosen) = (std::mem::take(&mut self.inputs), std::mem::take(&mut self.chosen));
        let width = inputs.len() / chosen.len().max(1);
        if weights.len() != chosen.len() || width == 0 {
            return;
        }
        self.seen += n_tokens;
        self.experts.par_iter_mut().enumerate().for_each(|(e, sums)| {
            let mine = (0..chosen.len()).filter(|&i| chosen[i] == e as i32);
            let rows: Vec<f32> = mine
                .flat_map(|i| inputs[i * width..(i + 1) * width].iter().map(move |x| x * weights[i]))
                .collect();
            let n = rows.len() / width;
            if n == 0 {
                return;
            }
            let x = MatRef::from_row_major_slice(&rows, n, width);
            let mut product = Mat::<f32>::zeros(width, width);
            matmul(product.as_mut(), Accum::Replace, x.transpose(), x, 1.0, Par::Seq);
            for (i, row) in sums.gram.rows_mut().into_iter().enumerate() {
                row.iter_mut().enumerate().for_each(|(j, sum)| *sum += f64::from(product[(i, i + j)]));
            }
            sums.n_tokens += n;
        });
    }
}
