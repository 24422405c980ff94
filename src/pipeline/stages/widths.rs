//! Widths per layer, from the loss of each block as it narrows.

use super::blocks::at_block;
use super::trials::{Trials, is_beside};
use super::{Stage, WIDTHS};
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work, inverse_ops, removal_ops};
use crate::pipeline::run::Run;
use crate::pipeline::sensitivity::{Sensitivity, curve_windows};
use crate::pipeline::{
    PruneError, Record, Settings, equal_widths, equally_narrowed, forward, neurons_for_target,
    neurons_to_remove,
};
use crate::prune::{self, Curve, Singular};

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
            memory: BASE_BYTES
                + streams
                + probes
                + if is_beside(w.s) {
                    collecting + choosing.max(moments + probing + sums)
                } else {
                    collecting.max(choosing).max(moments + probing + sums)
                },
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
        let (plan, model, s) = (&self.plan, self.model, self.settings);
        let trials = Trials { forward: &self.forward, model, windows: self.windows, settings: s };
        let mut stream = trials.stream()?;
        let probe = forward(model, sensitivity.n_ctx, s)?;
        let mut base = probe.embed(model, &sensitivity.tokens)?;
        let (mut next, mut without) = (vec![0.0; base.len()], vec![0.0; base.len()]);
        let n_layer = self.budgets.len();
        let mut curves: Vec<Curve> = Vec::with_capacity(n_layer);
        let mut collect = |il: usize| {
            let w = plan.block(model, il)?;
            let moments = trials.moments(&w, &mut stream)?;
            Ok::<_, PruneError>((w, moments))
        };
        self.observer.stage("widths", n_layer);
        let mut ahead = Some(collect(0)?);
        for (il, budget) in self.budgets.iter().enumerate() {
            if self.observer.interrupted() {
                return Err(PruneError::Interrupted);
            }
            let (w, moments) = ahead.take().expect("it was collected beside the block before");
            let curve = || {
                probe.stream(&probe.upload(&w)?, &base, &mut next)?;
                let widths = prune::possible_widths(budget);
                let at = probe_at(s, &widths);
                let inverse = trials.inverse(il, &moments)?;
                let n = prune::narrow(&w.ffn_down, inverse, &widths, widths[at]);
                let loss = n.losses[at];
                let less = probe.upload(&trials.narrowed(w, n.kept, n.weights, &moments))?;
                probe.stream(&less, &base, &mut without)?;
                let lost = sensitivity.divergence(il, &next, &without);
                if !lost.is_finite() || n.losses.iter().any(|l| !l.is_finite()) {
                    return Err(at_block(il, "ffn_down")(Singular.into()));
                }
                // A block that cannot be narrowed loses nothing. Rounding may hide a small divergence.
                let unit = if loss > 0.0 { loss / lost.max(MIN_DIVERGENCE) } else { 1.0 };
                Ok(Curve { widths, losses: n.losses, unit })
            };
            let (curve, collected) =
                trials.beside(curve, || (il + 1 < n_layer).then(|| collect(il + 1)).transpose());
            curves.push(curve?);
            ahead = collected?;
            std::mem::swap(&mut base, &mut next);
            self.observer.step(il + 1, "");
        }
        Ok(curves)
    }
}

/// Index of the width at which a block is probed: about the width that it will keep.
fn probe_at(s: &Settings, widths: &[usize]) -> usize {
    let goal = widths[0] as f64 * (1.0 - s.sparsity);
    let at = widths.iter().position(|&w| w as f64 <= goal).unwrap_or(widths.len() - 1);
    at.max(1).min(widths.len() - 1)
}
