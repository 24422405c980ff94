//! Evaluation of a pruned mixture without writing it: its routers never choose the experts that are gone.

use super::{ObserveError, Spot, spot};
use crate::ggml::{GgmlError, LlamaModel, Node, Token, Watched, Watcher};
use crate::numeric::{RowComparison, compare_rows, nll};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Masks by the number of the layer. Layers without an entry are whole.
pub type Mask = BTreeMap<usize, LayerMask>;

/// Remaining experts of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerMask {
    /// Whether each expert is kept, `[n_expert]`.
    pub kept: Vec<bool>,
    /// New rows of the router, `[n_expert, n_in]`; those of removed experts are not used.
    pub router: Option<Vec<f32>>,
    /// Experts by preference, the best first. They stand in for removed ones where a table assigns experts
    /// to tokens.
    pub order: Vec<usize>,
}

impl LayerMask {
    /// Replaces removed experts among those of a token by the most preferred of the others.
    ///
    /// # Panics
    /// If too few experts are kept.
    pub fn substitute(&self, row: &mut [i32]) {
        for i in 0..row.len() {
            if !self.kept[row[i] as usize] {
                let free = |e: &&usize| self.kept[**e] && !row.contains(&(**e as i32));
                row[i] = *self.order.iter().find(free).expect("as many as are used are kept") as i32;
            }
        }
    }

    /// Numbers of the kept experts, ascending.
    pub fn kept_experts(&self) -> Vec<usize> {
        (0..self.kept.len()).filter(|&e| self.kept[e]).collect()
    }
}

/// A model in libllama, of which a part is masked.
pub struct Masked<'m> {
    context: Watched<'m, MaskWatcher>,
    n_vocab: usize,
}

impl<'m> Masked<'m> {
    /// Whole model, for windows of up to `n_ctx` tokens.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama cannot make a context.
    pub fn new(model: &'m LlamaModel, n_ctx: usize, n_threads: usize) -> Result<Masked<'m>, GgmlError> {
        let context = Watched::new(model, n_ctx, n_threads, MaskWatcher { mask: Mask::new() })?;
        Ok(Masked { context, n_vocab: model.vocab().n_tokens() })
    }

    /// Negative log-likelihoods of each token of a window but the first, in nats.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama fails.
    pub fn losses(&mut self, window: &[Token]) -> Result<Vec<f64>, GgmlError> {
        self.context.decode(window, |at| at + 1 < window.len())?;
        let next = window[1..].iter().enumerate();
        Ok(next.map(|(at, &next)| nll(self.context.logits(at), next as usize)).collect())
    }

    /// Sets what is left of the model.
    pub fn set(&mut self, mask: Mask) {
        self.context.watcher().mask = mask;
    }
}

/// Largest memory of the reference's logits, in bytes.
const LOGIT_BYTES: usize = 512 << 20;

/// Predictions of the whole model on some windows.
pub struct Reference {
    windows: Vec<Vec<Token>>,
    /// Distance of the positions that are compared, in tokens.
    step: usize,
    /// Logits of each window at each of these positions, `[n_windows, n_positions, n_vocab]`.
    logits: Vec<Vec<f32>>,
}

impl Reference {
    /// Records the predictions of `model` on `windows`, at as many positions as fit into memory.
    ///
    /// # Errors
    /// [`GgmlError`] if libllama fails.
    pub fn new(model: &mut Masked, windows: &[&[Token]]) -> Result<Reference, GgmlError> {
        model.set(Mask::new());
        let n_positions: usize = windows.iter().map(|w| w.len() - 1).sum();
        let step = (n_positions * model.n_vocab * 4).div_ceil(LOGIT_BYTES).max(1);
        let windows: Vec<Vec<Token>> = windows.iter().map(|w| w.to_vec()).collect();
        let mut reference = Reference { windows, step, logits: Vec::new() };
        for i in 0..reference.windows.len() {
            let mut rows = Vec::new();
            reference.decode(model, i, |_, row| rows.extend_from_slice(row))?;
            reference.logits.push(rows);
        }
        Ok(reference)
    }

    /// Number of windows.
    pub fn n_windows(&self) -> usize {
        self.windows.len()
    }

    /// Compares the model that `model` now is with the whole one on window `i`.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails.
    pub fn compare_window(&self, model: &mut Masked, i: usize) -> Result<Vec<RowComparison>, ObserveError> {
        let (n_vocab, window) = (model.n_vocab, &self.windows[i]);
        let mut own = Vec::with_capacity(self.logits[i].len());
        let mut next = Vec::new();
        self.decode(model, i, |at, row| {
            own.extend_from_slice(row);
            next.push(window[at + 1] as usize);
        })?;
        let rows = own.par_chunks(n_vocab).zip(self.logits[i].par_chunks(n_vocab)).zip(&next);
        Ok(rows.map(|((own, base), &next)| compare_rows(own, base, next)).collect())
    }

    /// Mean KL divergence of the model under `mask` from the whole one, in nats.
    /// `watch` is called after each window and returns whether to go on.
    ///
    /// # Errors
    /// [`ObserveError`] if libllama fails, or `watch` says no.
    pub fn divergence(
        &self,
        model: &mut Masked,
        mask: &Mask,
        watch: &mut dyn FnMut() -> bool,
    ) -> Result<f64, ObserveError> {
        model.set(mask.clone());
        let (mut sum, mut n) = (0.0, 0);
        for i in 0..self.windows.len() {
            let rows = self.compare_window(model, i)?;
            sum += rows.iter().map(|r| r.kl).sum::<f64>();
            n += rows.len();
            if !watch() {
                return Err(ObserveError::Interrupted);
            }
        }
        Ok(sum / n as f64)
    }

    /// Decodes window `i` and calls `f` with each compared position and its logits.
    fn decode(
        &self,
        model: &mut Masked,
        i: usize,
        mut f: impl FnMut(usize, &[f32]),
    ) -> Result<(), GgmlError> {
        let window = &self.windows[i];
        let wanted = |at: usize| at + 1 < window.len() && at % self.step == self.step - 1;
        model.context.decode(window, wanted)?;
        for at in (0..window.len()).filter(|&at| wanted(at)) {
            f(at, model.context.logits(at));
        }
        Ok(())
    }
}

struct MaskWatcher {
    mask: Mask,
}

impl Watcher for MaskWatcher {
    fn wants(&mut self, node: &Node) -> bool {
        if self.mask.is_empty() {
            return false;
        }
        match spot(node) {
            Some((Spot::Router | Spot::Biased, block)) => self.mask.contains_key(&block),
            // Elsewhere the chosen experts are a view of their order.
            Some((Spot::Chosen, block)) => self.mask.contains_key(&block) && node.viewed().is_none(),
            _ => false,
        }
    }

    fn computed(&mut self, node: Node) {
        let Some((spot, block)) = spot(&node) else { return };
        if let Some(mask) = self.mask.get(&block) {
            mask.apply(spot, &node);
        }
    }
}

impl LayerMask {
    /// Makes a node of the layer what it would be without the removed experts.
    pub(super) fn apply(&self, spot: Spot, node: &Node) {
        let n_expert = self.kept.len();
        if spot == Spot::Chosen {
            let Some(mut chosen) = node.integers() else { return };
            chosen.chunks_exact_mut(node.ne()[0]).for_each(|row| self.substitute(row));
            node.set_integers(&chosen);
            return;
        }
        let inputs = self.router.as_ref().filter(|_| spot == Spot::Router);
        let inputs = inputs.and_then(|router| Some((router, node.source(1)?.floats()?)));
        let values = match inputs {
            Some((router, inputs)) => Some(products(router, &inputs, n_expert)),
            None => node.floats(),
        };
        let Some(mut values) = values else { return };
        for row in values.chunks_exact_mut(n_expert) {
            row.iter_mut()
                .zip(&self.kept)
                .filter(|(_, kept)| !**kept)
                .for_each(|(v, _)| *v = f32::NEG_INFINITY);
        }
        node.set_floats(&values);
    }
}

/// Logits `[n_tokens, n_expert]` of `inputs` `[n_tokens, n_in]` by a router `[n_expert, n_in]`.
fn products(router: &[f32], inputs: &[f32], n_expert: usize) -> Vec<f32> {
    let n_in = router.len() / n_expert;
    let rows = inputs.par_chunks_exact(n_in);
    rows.flat_map_iter(|x| {
        router.chunks_exact(n_in).map(move |w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>())
    })
    .collect()
}
