//! Widths per layer, from the loss of each block as it narrows.

use super::blocks::at_block;
use super::{Stage, WIDTHS};
use crate::forward::{BlockOutputs, Collect};
use crate::model::{BlockWeights, Matrix};
use crate::numeric::Moments;
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work, inverse_ops, removal_ops};
use crate::pipeline::run::Run;
use crate::pipeline::sensitivity::{Sensitivity, curve_windows};
use crate::pipeline::stream::embedded;
use crate::pipeline::{
    PruneError, Record, equal_widths, equally_narrowed, forward, neurons_for_target, neurons_to_remove,
    token_scales,
};
use crate::prune::{self, Curve, Inverse, Singular};
use crate::spill::SpillVec;

/// Smallest divergence, in nats, that counts as different from 0.
const MIN_DIVERGENCE: f64 = 1e-9;

/// Settings of the widths.
#[derive(Clone, Debug, PartialEq)]
pub struct WidthSettings {
    /// Whether every block gets its own width.
    pub per_layer: bool,
    /// Smallest width of a block if each gets its own, relative to the width with the same share removed
    /// everywhere.
    pub least: f64,
    /// Number of tokens on which the loss curves of the widths are measured and the trials of the neuron
    /// criteria are fitted.
    pub curve_tokens: usize,
}

impl Default for WidthSettings {
    fn default() -> WidthSettings {
        WidthSettings { per_layer: true, least: 0.0, curve_tokens: 4096 }
    }
}

/// Stage that chooses a width per layer such that the sparsity or target is reached, from the loss of each
/// block as it narrows.
pub(in crate::pipeline) struct LossCurveWidths;

impl Stage for LossCurveWidths {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let n_ctx = w.c.n_ctx;
        let (probe_ctx, n_probe) = w.probes();
        let n = (curve_windows(w.s, n_ctx, w.c.n_fit) * n_ctx) as f64;
        let (mut operations, mut algebra) = (0.0, 0.0);
        for (il, b) in w.headless().into_iter().enumerate() {
            let narrowed = Sizes { ff: b.ff * (1.0 - w.s.sparsity), ..b };
            operations += w.block_ops(il, b, n, n_ctx) + w.moment_ops(b.ff, 0.0, n);
            operations += w.block_ops(il, b, n_probe, probe_ctx);
            operations += w.block_ops(il, narrowed, n_probe, probe_ctx);
            algebra += inverse_ops(b.ff) + removal_ops(b.ff, 0.0, 2.0 * w.n_embd());
        }
        let streams = w.stream_bytes(n * w.n_embd()) + w.sensitivity_bytes();
        let probes = 3.0 * 4.0 * n_probe * w.n_embd();
        let sums = w.sums_bytes(w.max_ff(), 0.0);
        let moments = 4.0 * w.max_ff().powi(2);
        let collecting = w.block_bytes() + moments + w.moment_graph_bytes(n_ctx, n) + sums;
        let probing = w.block_bytes() + w.graph_bytes(probe_ctx, n_probe);
        // Half of an inverse computed next to its factor is never touched. Graphs keep the memory of their
        // largest need.
        let graphs = w.moment_graph_bytes(n_ctx, n);
        let choosing = w.block_bytes() + w.choosing_bytes(0.0, false, 6.0) + graphs;
        vec![StageForecast {
            name: "widths",
            operations: if w.s.widths.per_layer { operations } else { 0.0 },
            algebra,
            memory: BASE_BYTES + streams + probes + collecting.max(choosing).max(moments + probing + sums),
            on_devices: w.kept_graph_bytes() + probing.max(w.block_bytes() + sums),
        }]
    }

    fn records(&self, _: usize) -> Vec<String> {
        vec![WIDTHS.into()]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        run.widths = match run.kept_widths()? {
            Some(widths) => widths,
            None => {
                let sensitivity = run.sensitivity.take();
                let chosen = run.choose_widths(sensitivity.as_ref());
                run.sensitivity = sensitivity;
                chosen?
            }
        };
        let record = Record::default().with_numbers("widths", run.widths.iter().copied());
        Ok(run.checkpoint.save(WIDTHS, record)?)
    }
}

/// Stage that sets uniform widths before the removed attention groups are known.
pub(in crate::pipeline) struct UniformWidths;

impl Stage for UniformWidths {
    fn forecast(&self, _: &Work) -> Vec<StageForecast> {
        Vec::new()
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        run.widths = equal_widths(run.model, &run.budgets, run.settings, run.n_groups)?;
        Ok(())
    }
}

impl Run<'_> {
    /// Widths of an earlier run.
    fn kept_widths(&mut self) -> Result<Option<Vec<usize>>, PruneError> {
        let Some(record) = self.checkpoint.load(WIDTHS)? else { return Ok(None) };
        let (shapes, unit) = (&self.model.hparams.blocks, self.settings.ffn_unit(self.model));
        let fits = |widths: &Vec<usize>| {
            widths.len() == shapes.len()
                && widths.iter().zip(shapes).all(|(&w, s)| w > 0 && w <= s.n_units(unit))
        };
        let widths = record.numbers("widths").filter(fits);
        Ok(Some(widths.ok_or_else(|| self.checkpoint.damaged(WIDTHS, "widths"))?))
    }

    fn choose_widths(&mut self, sensitivity: Option<&Sensitivity>) -> Result<Vec<usize>, PruneError> {
        let attention_removed = self.plan.attention_params_removed(&self.budgets);
        let by_loss = sensitivity.filter(|_| self.settings.widths.per_layer);
        let curves = by_loss.map(|s| self.loss_curves(s)).transpose()?;
        let (model, s, budgets) = (self.model, self.settings, &self.budgets);
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

    /// Loss curves of all blocks, on the model with its groups removed and its FFNs whole.
    /// The loss of a block is that of its own output. To make different blocks comparable, it is scaled by
    /// the loss of the model's predictions (in nats of KL divergence, from the curvature) when only this
    /// block is narrowed.
    fn loss_curves(&mut self, sensitivity: &Sensitivity) -> Result<Vec<Curve>, PruneError> {
        let budgets = self.budgets.clone();
        let (n_windows, mut stream) = self.few_windows()?;
        let probe = forward(self.model, sensitivity.n_ctx, self.settings)?;
        let mut base = probe.embed(self.model, &sensitivity.tokens)?;
        let (mut next, mut without) = (vec![0.0; base.len()], vec![0.0; base.len()]);
        let mut curves: Vec<Curve> = Vec::with_capacity(budgets.len());
        self.observer.stage("widths", budgets.len());
        for (il, budget) in budgets.iter().enumerate() {
            self.check_interrupted()?;
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
            // A block that cannot be narrowed loses nothing. Rounding may hide a small divergence.
            let unit = if loss > 0.0 { loss / lost.max(MIN_DIVERGENCE) } else { 1.0 };
            curves.push(Curve { widths, losses: n.losses, unit });
            std::mem::swap(&mut base, &mut next);
            self.observer.step(il + 1, "");
        }
        Ok(curves)
    }

    /// Number of windows on which blocks are narrowed in trials, and their residual stream before the first
    /// block.
    pub(in crate::pipeline) fn few_windows(&self) -> Result<(usize, SpillVec<f32>), PruneError> {
        let (s, n_ctx) = (self.settings, self.windows.n_ctx);
        let n_windows = curve_windows(s, n_ctx, self.windows.n_fit);
        let tokens = self.windows.sample(n_windows * n_ctx, n_ctx);
        Ok((n_windows, embedded(&self.forward, self.model, &tokens, &s.spill)?))
    }

    /// Inverse by which the neurons of block `il` are chosen on few windows. Its ridge is that of the later
    /// fit, which sees all tokens.
    pub(in crate::pipeline) fn inverse_of(
        &self,
        il: usize,
        moments: &Moments,
    ) -> Result<Inverse, PruneError> {
        let n_fitted = self.windows.n_fit * self.windows.n_ctx;
        let ridge = self.settings.ridge_of_neurons(moments.gram.n(), n_fitted);
        Inverse::new(&moments.gram, ridge).map_err(|e| at_block(il, "ffn_down")(e.into()))
    }

    /// Moments at `ffn_down` of the block `w` over `stream` of `n_windows` windows. `stream` becomes the
    /// stream after the block.
    pub(in crate::pipeline) fn moments_of_neurons(
        &mut self,
        w: &BlockWeights,
        n_windows: usize,
        stream: &mut SpillVec<f32>,
    ) -> Result<Moments, PruneError> {
        let block = self.forward.upload(w)?;
        let mut moments = self.forward.gathering(&block, w.shape.n_ff, 0)?;
        for chunk in self.forward.chunks(0..n_windows) {
            let span = self.forward.span(&chunk);
            let x = &stream[span.clone()];
            let attn_out_input = self.forward.attn_out_input(&block, x, None)?;
            let mut out = vec![0.0; x.len()];
            let scales = token_scales(x, self.forward.n_embd(), self.settings.blocks.token_weight);
            let collect = Collect { target: None, scales: &scales, into: &mut moments };
            let wanted =
                BlockOutputs { out: Some(&mut out), moments: Some(collect), ..BlockOutputs::default() };
            self.forward.from_attn_out_input(&block, x, &attn_out_input, wanted)?;
            stream[span].copy_from_slice(&out);
        }
        let mut moments = moments.finish();
        if self.settings.blocks.biases {
            moments.centre();
        }
        Ok(moments)
    }

    /// Block `w` with only the neurons `kept` and the map `weights` on them.
    pub(in crate::pipeline) fn narrowed(
        &self,
        mut w: BlockWeights,
        kept: Vec<usize>,
        weights: Matrix,
        m: &Moments,
    ) -> BlockWeights {
        let maps = [&w.ffn_down, &weights];
        w.ffn_down_bias = self.adapted_bias(w.ffn_down_bias.clone(), maps, &kept, m, 0.0);
        w.keep_units(&[], &kept);
        w.ffn_down = weights;
        w
    }

    /// Index of the width at which a block is probed: about the width that it will keep.
    fn probe_at(&self, widths: &[usize]) -> usize {
        let goal = widths[0] as f64 * (1.0 - self.settings.sparsity);
        let at = widths.iter().position(|&w| w as f64 <= goal).unwrap_or(widths.len() - 1);
        at.max(1).min(widths.len() - 1)
    }
}
