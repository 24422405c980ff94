//! Widths per block, from what each block loses as it narrows.

use super::sensitivity::Sensitivity;
use super::sequential::at_block;
use super::stream::embedded;
use super::{
    PruneError, Run, Settings, equally_narrowed, forward, neurons_for_target, neurons_to_remove, token_scales,
};
use crate::forward::{Collect, Wanted};
use crate::model::{BlockWeights, Matrix};
use crate::numeric::Moments;
use crate::prune::{self, Budget, Curve, Inverse, Singular};
use crate::spill::Array;

/// The least divergence in nats that is told from none.
const MIN_DIVERGENCE: f64 = 1e-9;

/// Windows that the curves are measured on, of `n_fit` to fit on: half of them at most, for what narrowing costs is
/// measured on others.
pub(super) fn n_windows(s: &Settings, n_ctx: usize, n_fit: usize) -> usize {
    s.curve_tokens.div_ceil(n_ctx).clamp(1, n_fit.div_ceil(2))
}

impl Run<'_> {
    /// Width per block such that the sparsity is reached, or the target.
    pub(super) fn choose_widths(
        &mut self,
        budgets: &[Budget],
        attention_removed: usize,
        sensitivity: Option<&Sensitivity>,
    ) -> Result<Vec<usize>, PruneError> {
        let by_loss = sensitivity.filter(|_| self.settings.per_block_widths);
        let curves = by_loss.map(|s| self.loss_curves(budgets, s)).transpose()?;
        let (model, s) = (self.model, self.settings);
        let narrowed = |n_remove: usize| match &curves {
            Some(curves) => prune::allocate(curves, n_remove),
            None => equally_narrowed(model, budgets, s, n_remove),
        };
        let n_remove = match s.target {
            None => neurons_to_remove(budgets, s, attention_removed)?,
            Some(target) => {
                let groups: Vec<usize> = self.plan.blocks.iter().map(|b| b.groups.len()).collect();
                neurons_for_target(model, budgets, s, target, &groups, narrowed)
            }
        };
        let widths = narrowed(n_remove);
        self.block_losses = curves.map(|curves| {
            let loss = |(c, width): (&Curve, &usize)| {
                let at = c.widths.iter().position(|w| w == width).expect("widths are those of the curves");
                c.losses[at] / c.unit
            };
            curves.iter().zip(&widths).map(loss).collect()
        });
        Ok(widths)
    }

    /// Loss curves of all blocks, on the model with its groups removed and its feed-forwards whole. A block's
    /// loss is that of its own output; what the model's predictions lose (in nats of KL divergence) where this block alone is
    /// narrowed, by the curvature, makes the losses of different blocks comparable.
    fn loss_curves(
        &mut self,
        budgets: &[Budget],
        sensitivity: &Sensitivity,
    ) -> Result<Vec<Curve>, PruneError> {
        let (n_windows, mut stream) = self.few_windows()?;
        let mut probe = forward(self.model, sensitivity.n_ctx, self.settings)?;
        let mut base = probe.embed(self.model, &sensitivity.tokens)?;
        let (mut next, mut without) = (vec![0.0; base.len()], vec![0.0; base.len()]);
        let mut curves: Vec<Curve> = Vec::with_capacity(budgets.len());
        self.observer.stage("widths", budgets.len());
        for (il, budget) in budgets.iter().enumerate() {
            self.checkpoint()?;
            let w = self.plan.block(self.model, il)?;
            let moments = self.moments_of_neurons(&w, n_windows, &mut stream)?;
            probe.stream(&probe.upload(&w)?, &base, &mut next)?;
            let widths = prune::possible_widths(budget);
            let at = self.probe_at(&widths);
            let inverse = self.inverse_of(il, &moments)?;
            let n = prune::narrow(&w.ffn_down, inverse, &widths, widths[at]);
            let loss = n.losses[at];
            let less = probe.upload(&self.narrowed(w, n.kept, n.weights, &moments))?;
            probe.stream(&less, &base, &mut without)?;
            let lost = sensitivity.divergence(il, &next, &without);
            if !lost.is_finite() || n.losses.iter().any(|l| !l.is_finite()) {
                return Err(at_block(il, "ffn_down")(Singular.into()));
            }
            // A block that cannot be narrowed loses nothing. Rounding may leave no divergence where there is some.
            let unit = if loss > 0.0 { loss / lost.max(MIN_DIVERGENCE) } else { 1.0 };
            curves.push(Curve { widths, losses: n.losses, unit });
            std::mem::swap(&mut base, &mut next);
            self.observer.step(il + 1, "");
        }
        Ok(curves)
    }

    /// How many windows blocks are narrowed on before all tokens are looked at, and the stream before the first block of them.
    pub(super) fn few_windows(&self) -> Result<(usize, Array<f32>), PruneError> {
        let (s, n_ctx) = (self.settings, self.windows.n_ctx);
        let n_windows = n_windows(s, n_ctx, self.windows.n_fit);
        let tokens = self.windows.sample(n_windows * n_ctx, n_ctx);
        Ok((n_windows, embedded(&self.forward, self.model, &tokens, &s.shelf)?))
    }

    /// The inverse that neurons of block `il` are chosen by on few windows. Its ridge is that of the fit to come, which sees all
    /// tokens.
    pub(super) fn inverse_of(&self, il: usize, moments: &Moments) -> Result<Inverse, PruneError> {
        let n_fitted = self.windows.n_fit * self.windows.n_ctx;
        let ridge = self.settings.ridge_of_neurons(moments.gram.n(), n_fitted);
        Inverse::new(&moments.gram, ridge).map_err(|e| at_block(il, "ffn_down")(e.into()))
    }

    /// Moments at ffn_down of the block `w` over `stream`, of `n_windows`, which moves on to the stream behind the block.
    pub(super) fn moments_of_neurons(
        &mut self,
        w: &BlockWeights,
        n_windows: usize,
        stream: &mut Array<f32>,
    ) -> Result<Moments, PruneError> {
        let block = self.forward.upload(w)?;
        let mut moments = self.forward.gathering(&block, w.shape.n_ff, 0)?;
        for chunk in self.forward.chunks(0..n_windows) {
            let span = self.forward.span(&chunk);
            let x = &stream[span.clone()];
            let heads = self.forward.heads(&block, x, None)?;
            let mut out = vec![0.0; x.len()];
            let scales = token_scales(x, self.forward.n_embd(), self.settings.token_weight);
            let collect = Collect { target: None, scales: &scales, into: &mut moments };
            let wanted = Wanted { out: Some(&mut out), moments: Some(collect), ..Wanted::default() };
            self.forward.from_heads(&block, x, &heads, wanted)?;
            stream[span].copy_from_slice(&out);
        }
        let mut moments = moments.finish();
        if self.settings.biases {
            moments.centre();
        }
        Ok(moments)
    }

    /// Block `w` with the neurons `kept` and the map `weights` on them.
    pub(super) fn narrowed(
        &self,
        mut w: BlockWeights,
        kept: Vec<usize>,
        weights: Matrix,
        m: &Moments,
    ) -> BlockWeights {
        let maps = [&w.ffn_down, &weights];
        w.ffn_down_bias = self.adapted_bias(w.ffn_down_bias.clone(), maps, &kept, m, 0.0);
        w.keep_pieces(&[], &kept);
        w.ffn_down = weights;
        w
    }

    /// Index of the width at which a block is probed: about what will stay of it.
    fn probe_at(&self, widths: &[usize]) -> usize {
        let goal = widths[0] as f64 * (1.0 - self.settings.sparsity);
        let at = widths.iter().position(|&w| w as f64 <= goal).unwrap_or(widths.len() - 1);
        at.max(1).min(widths.len() - 1)
    }
}
