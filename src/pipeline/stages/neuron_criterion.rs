//! By what neurons are chosen.
//!
//! What a neuron that goes costs its own block says only so much about what it costs the whole model, and how much differs from
//! model to model. So each way to choose is tried on many blocks at once, and the model's predictions decide.

use super::judge::{Judge, Loss};
use super::sensitivity::Sensitivity;
use super::sequential::at_block;
use super::stream::planned_stream;
use super::{Plan, PruneError, Run, forward};
use crate::prune::{self, Choice, Singular};

/// Share by which the other way's divergence must be lower than the usual one's: on a few thousand tokens, less is chance.
const CLEAR: f64 = 0.01;

/// Blocks that are narrowed on trial at most: with many large ones the algebra would be much of the whole run.
const MAX_TRIED: usize = 16;

/// Whether block `il` of `n_layer` is narrowed on trial: all are, or [`MAX_TRIED`] spread evenly.
pub(super) fn is_tried(il: usize, n_layer: usize) -> bool {
    let before = |il: usize| il * MAX_TRIED.min(n_layer) / n_layer;
    before(il) < before(il + 1)
}

impl Run<'_> {
    /// The way to choose neurons that leaves the predictions closest to the dense model's where blocks are narrowed to
    /// `widths`, all at once, each fitted to few tokens of the stream of whole feed-forwards; on other tokens, where there are others.
    pub(super) fn choice_of_neurons(
        &mut self,
        widths: &[usize],
        sensitivity: &Sensitivity,
    ) -> Result<Choice, PruneError> {
        let s = self.settings;
        let (n_windows, mut stream) = self.few_windows()?;
        let mut trial = forward(self.model, sensitivity.n_ctx, s)?;
        let start = trial.embed(self.model, &sensitivity.tokens)?;
        let mut streams = [start.clone(), start];
        // The last step compares.
        self.observer.stage("choice", widths.len() + 1);
        for (il, &width) in widths.iter().enumerate() {
            self.checkpoint()?;
            let w = self.plan.block(self.model, il)?;
            if !is_tried(il, widths.len()) {
                let block = self.forward.upload(&w)?;
                self.forward.advance(&block, &mut stream)?;
                drop(block);
                let block = trial.upload(&w)?;
                for x in &mut streams {
                    trial.advance(&block, x)?;
                }
                self.observer.step(il + 1, "");
                continue;
            }
            let moments = self.moments_of_neurons(&w, n_windows, &mut stream)?;
            let failed = |e: Singular| at_block(il, "ffn_down")(e.into());
            let costs = sensitivity.costs(il, &w, &w.ffn_down).map_err(failed)?;
            let inverse = self.inverse_of(il, &moments)?;
            let ways = Choice::ALL.into_iter().zip([inverse.clone(), inverse]);
            for ((choice, inverse), x) in ways.zip(&mut streams) {
                let chosen = prune::greedy(&w.ffn_down, Some(&costs), inverse, width, choice);
                let (keep, refit) = chosen.map_err(failed)?;
                let less = trial.upload(&self.narrowed(w.clone(), keep, refit.weights, &moments))?;
                trial.advance(&less, x)?;
            }
            self.observer.step(il + 1, "");
        }
        let whole = Plan::whole(self.reference);
        let (tokens, observer) = (&sensitivity.tokens, &*self.observer);
        let dense = planned_stream(&mut trial, self.reference, &whole, tokens, observer, |_| Ok(()))?;
        let judge = Judge::new(&mut trial, self.model, self.reference, tokens, &dense, Loss::Divergence)?;
        let [by_loss, by_energy] = streams;
        let [by_loss, by_energy] = [judge.loss(&mut trial, &by_loss)?, judge.loss(&mut trial, &by_energy)?];
        let note = format!("divergence {by_loss:.4} by loss, {by_energy:.4} by energy");
        self.observer.step(widths.len() + 1, &note);
        // Against a way that gives none at all any is better.
        let better = by_energy < by_loss * (1.0 - CLEAR) || (by_loss.is_nan() && !by_energy.is_nan());
        Ok(if better { Choice::Energy } else { Choice::Loss })
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
