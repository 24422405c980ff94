//! Choice of the criterion by which neurons are removed.
//!
//! The loss of a neuron's own block says only part of its cost to the whole model, and how much differs from
//! model to model. Therefore each criterion is tried on many blocks at once, and the model's predictions
//! decide.

use super::blocks::at_block;
use super::trials::{Trials, is_beside};
use super::{CRITERION, Stage};
use crate::gguf::Value;
use crate::model::FfnUnit;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work, inverse_ops, removal_ops};
use crate::pipeline::prediction_loss::{Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::sensitivity::{Sensitivity, curve_windows};
use crate::pipeline::stream::planned_stream;
use crate::pipeline::{Plan, PruneError, Record, forward};
use crate::prune::{self, NeuronCriterion, Singular};

/// Share by which the divergence of the other criterion must be lower than that of the usual one. On a few
/// thousand tokens, a smaller difference is chance.
const CLEAR: f64 = 0.01;

/// Largest number of blocks that are narrowed on trial. With many large blocks, the algebra would be much of
/// the whole run.
const MAX_TRIED: usize = 16;

/// Returns whether block `il` of `n_layer` is narrowed on trial: all are, or [`MAX_TRIED`] spread evenly.
pub(in crate::pipeline) fn is_tried(il: usize, n_layer: usize) -> bool {
    let before = |il: usize| il * MAX_TRIED.min(n_layer) / n_layer;
    before(il) < before(il + 1)
}

/// Stage that chooses the criterion by which neurons are removed, if the settings name none.
pub(in crate::pipeline) struct ChooseCriterion;

impl Stage for ChooseCriterion {
    /// Forecast as for the widths, but for some blocks only. They are narrowed once for each criterion, and
    /// compared at the end.
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let n_ctx = w.c.n_ctx;
        let (trial_ctx, n_trial) = w.probes();
        let n = (curve_windows(w.s, n_ctx, w.c.n_fit) * n_ctx) as f64;
        let ways = NeuronCriterion::ALL.len() as f64;
        let e = w.n_embd();
        let whole = w.whole();
        let compared = w.model_ops(&whole, n_trial, trial_ctx) + w.judge_ops(n_trial, ways);
        let (mut operations, mut algebra) = (compared, 0.0);
        for (il, (b, narrowed)) in w.headless().into_iter().zip(w.pruned()).enumerate() {
            operations += w.block_ops(il, b, n, n_ctx);
            if !is_tried(il, whole.len()) {
                operations += ways * w.block_ops(il, b, n_trial, trial_ctx);
                continue;
            }
            operations += w.moment_ops(b.ff, 0.0, n);
            operations += ways * w.block_ops(il, narrowed, n_trial, trial_ctx);
            algebra += w.metric_ops(b.ff);
            algebra += inverse_ops(b.ff) + ways * removal_ops(b.ff, narrowed.ff, 3.0 * e);
        }
        let streams = w.stream_bytes(n * e) + w.sensitivity_bytes();
        let streams_tried = (2.0 + ways) * 4.0 * n_trial * e;
        let (sums, moments) = (w.sums_bytes(w.max_ff(), 0.0), 4.0 * w.max_ff().powi(2));
        let collecting = w.block_bytes() + moments + w.moment_graph_bytes(n_ctx, n) + sums;
        // The inverse for the next criterion is in memory as well.
        let trying = 2.0 * w.block_bytes() + 2.0 * moments + w.graph_bytes(trial_ctx, n_trial) + sums;
        let maps = 4.0 * w.max_ff() * e;
        let graphs = w.moment_graph_bytes(n_ctx, n);
        let choosing = w.block_bytes() + maps + w.choosing_bytes(0.0, true, 8.0) + graphs;
        let most = choosing.max(trying + maps);
        let most = if is_beside(w.s) { collecting + most } else { collecting.max(most) };
        let most = most.max(w.scratch_bytes() + w.predicting_bytes());
        vec![StageForecast {
            name: "neuron criterion",
            // Without curvature samples, there is nothing to choose by.
            operations: if w.s.sensitivity.tokens > 0 && w.s.criterion.is_none() { operations } else { 0.0 },
            algebra,
            memory: BASE_BYTES + streams + streams_tried + most,
            on_devices: w.kept_graph_bytes()
                + w.graph_bytes(trial_ctx, n_trial)
                + (w.block_bytes() + sums).max(w.predicting_bytes()),
        }]
    }

    fn records(&self, _: usize) -> Vec<String> {
        vec![CRITERION.into()]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let kept = run.kept_criterion()?;
        // Blocks of a run whose criterion is not known are pruned again.
        run.blocks_resume = kept.is_some();
        run.criterion = match kept.or(run.settings.criterion) {
            Some(criterion) => criterion,
            None => match run.sensitivity.take() {
                None => NeuronCriterion::Obs,
                Some(sensitivity) => {
                    let chosen = run.try_neuron_criteria(&sensitivity);
                    run.sensitivity = Some(sensitivity);
                    chosen?
                }
            },
        };
        let name = Value::Str(run.criterion.name().into());
        if run.settings.ffn_unit(run.model) == FfnUnit::Neuron {
            run.provenance.push(("neuron_criterion", name.clone()));
        }
        Ok(run.checkpoint.save(CRITERION, Record::default().with("criterion", name))?)
    }
}

impl Run<'_> {
    /// Criterion of an earlier run.
    fn kept_criterion(&mut self) -> Result<Option<NeuronCriterion>, PruneError> {
        let Some(record) = self.checkpoint.load(CRITERION)? else { return Ok(None) };
        let name = record.get("criterion").and_then(Value::as_text);
        let criterion = name.and_then(|name| NeuronCriterion::named(&name));
        Ok(Some(criterion.ok_or_else(|| self.checkpoint.damaged(CRITERION, "criterion"))?))
    }

    /// Returns the criterion that changes the predictions of the dense model less.
    /// Blocks are narrowed to `widths`, all at once. Each is fitted to few tokens of the residual stream of
    /// whole FFNs. Other tokens decide, if there are others.
    fn try_neuron_criteria(&mut self, sensitivity: &Sensitivity) -> Result<NeuronCriterion, PruneError> {
        let (plan, model, s, widths) = (&self.plan, self.model, self.settings, &self.widths);
        let trials = Trials { forward: &self.forward, model, windows: self.windows, settings: s };
        let mut stream = trials.stream()?;
        let trial = forward(model, sensitivity.n_ctx, s)?;
        let start = trial.embed(model, &sensitivity.tokens)?;
        let mut streams = [start.clone(), start];
        let n_layer = widths.len();
        // Moments of the blocks that are tried.
        let mut collect = |il: usize| {
            let w = plan.block(model, il)?;
            if is_tried(il, n_layer) {
                let moments = trials.moments(&w, &mut stream)?;
                return Ok((w, Some(moments)));
            }
            self.forward.advance(&self.forward.upload(&w)?, &mut stream)?;
            Ok::<_, PruneError>((w, None))
        };
        // The last step compares the criteria.
        self.observer.stage("neuron criterion", n_layer + 1);
        let mut ahead = Some(collect(0)?);
        for (il, &width) in widths.iter().enumerate() {
            if self.observer.interrupted() {
                return Err(PruneError::Interrupted);
            }
            let (w, moments) = ahead.take().expect("it was collected beside the block before");
            let narrow = || {
                let Some(moments) = moments else {
                    let block = trial.upload(&w)?;
                    for x in &mut streams {
                        trial.advance(&block, x)?;
                    }
                    return Ok(());
                };
                let failed = |e: Singular| at_block(il, "ffn_down")(e.into());
                let costs = sensitivity.costs(il, &w, &w.ffn_down).map_err(failed)?;
                let inverse = trials.inverse(il, &moments)?;
                let ways = NeuronCriterion::ALL.into_iter().zip([inverse.clone(), inverse]);
                for ((criterion, inverse), x) in ways.zip(&mut streams) {
                    let chosen = prune::greedy(&w.ffn_down, Some(&costs), inverse, width, criterion);
                    let (keep, refit) = chosen.map_err(failed)?;
                    let less = trial.upload(&trials.narrowed(w.clone(), keep, refit.weights, &moments))?;
                    trial.advance(&less, x)?;
                }
                Ok::<_, PruneError>(())
            };
            let (narrowed, collected) =
                trials.beside(narrow, || (il + 1 < n_layer).then(|| collect(il + 1)).transpose());
            narrowed?;
            ahead = collected?;
            self.observer.step(il + 1, "");
        }
        let whole = Plan::whole(self.reference);
        let (tokens, observer) = (&sensitivity.tokens, &*self.observer);
        let dense = planned_stream(&trial, self.reference, &whole, tokens, observer, |_| Ok(()))?;
        let judge =
            PredictionLoss::new(&trial, self.model, self.reference, tokens, &dense, Loss::Divergence)?;
        let [obs, magnitude] = streams;
        let [obs, magnitude] = [judge.loss(&trial, &obs)?, judge.loss(&trial, &magnitude)?];
        let note = format!("divergence {obs:.4} with obs, {magnitude:.4} with magnitude");
        self.observer.step(n_layer + 1, &note);
        // Any criterion is better than one whose divergence is NaN.
        let better = magnitude < obs * (1.0 - CLEAR) || (obs.is_nan() && !magnitude.is_nan());
        Ok(if better { NeuronCriterion::Magnitude } else { NeuronCriterion::Obs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_tried_all_or_spread_evenly() {
        for n in [1usize, 6, 16, 18, 30, 32, 126] {
            let tried: Vec<usize> = (0..n).filter(|&il| is_tried(il, n)).collect();
            assert_eq!(tried.len(), n.min(MAX_TRIED));
            let gaps = tried.windows(2).map(|w| w[1] - w[0]);
            assert!(gaps.clone().max().unwrap_or(1) - gaps.min().unwrap_or(1) <= 1, "{tried:?}");
        }
    }
}
