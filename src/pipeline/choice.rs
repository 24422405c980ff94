//! By what neurons are chosen.
//!
//! What a neuron that goes costs its own block says only so much about what it costs the whole model, and how much differs from
//! model to model. So each way to choose is tried on all blocks at once, and the model's predictions decide.

use super::judge::{Judge, Loss};
use super::sensitivity::Sensitivity;
use super::stream::{embedded, planned_stream};
use super::{Plan, PruneError, Run, curves, forward};
use crate::prune::{self, Choice};

/// By how much less of a divergence another way has to be better than the usual one: what it is on a few thousand tokens
/// is partly chance.
const CLEAR: f64 = 0.01;

impl Run<'_> {
    /// The way to choose neurons that leaves the predictions closest to the dense model's where all blocks are narrowed to
    /// `widths`, each fitted to few tokens of the dense stream; on tokens that nothing is fitted to.
    pub(super) fn choice_of_neurons(
        &mut self,
        widths: &[usize],
        sensitivity: &Sensitivity,
    ) -> Result<Choice, PruneError> {
        let (s, n_ctx) = (self.settings, self.windows.n_ctx);
        let n_windows = curves::n_windows(s, n_ctx, self.windows.n_fit);
        let tokens = self.windows.sample(n_windows * n_ctx, n_ctx);
        let mut stream = embedded(&self.forward, self.model, &tokens, &s.shelf)?;
        let mut trial = forward(self.model, sensitivity.n_ctx, s)?;
        let start = trial.embed(self.model, &sensitivity.tokens)?;
        let mut next = vec![0.0; start.len()];
        let mut tried = Choice::ALL.map(|choice| (choice, start.clone()));
        // The last step compares.
        self.observer.stage("choice", widths.len() + 1);
        for (il, &width) in widths.iter().enumerate() {
            self.checkpoint()?;
            let w = self.plan.block(self.model, il)?;
            let moments = self.moments_of_neurons(&w, n_windows, &mut stream)?;
            let failed = |source| PruneError::Singular { block: il, part: "ffn_down", source };
            let costs = sensitivity.costs(il, &w, &w.ffn_down).map_err(failed)?;
            let ridge = s.ridge_of_neurons(w.shape.n_ff, moments.n_tokens);
            for (choice, x) in &mut tried {
                let chosen = prune::greedy(&w.ffn_down, Some(&costs), &moments.gram, ridge, width, *choice);
                let (keep, refit) = chosen.map_err(failed)?;
                let less = trial.upload(&self.narrowed(w.clone(), keep, refit.weights, &moments))?;
                trial.stream(&less, x, &mut next)?;
                std::mem::swap(x, &mut next);
            }
            self.observer.step(il + 1, "");
        }
        let whole = Plan::whole(self.reference);
        let (tokens, observer) = (&sensitivity.tokens, &*self.observer);
        let dense = planned_stream(&mut trial, self.reference, &whole, tokens, observer, |_| Ok(()))?;
        let judge = Judge::new(&mut trial, self.model, self.reference, tokens, &dense, Loss::Divergence)?;
        let [by_loss, by_energy] = &tried;
        let by_loss = judge.loss(&mut trial, &by_loss.1)?;
        let by_energy = judge.loss(&mut trial, &by_energy.1)?;
        let note = format!("divergence {by_loss:.4} by loss, {by_energy:.4} by energy");
        self.observer.step(widths.len() + 1, &note);
        Ok(if by_energy < by_loss * (1.0 - CLEAR) { Choice::Energy } else { Choice::Loss })
    }
}
