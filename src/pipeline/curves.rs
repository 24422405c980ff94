//! Widths per block, from what each block loses as it narrows.

use super::{PruneError, Run, mean_square, token_scales};
use crate::forward::{Collect, Wanted};
use crate::numeric::Moments;
use crate::prune::{self, Budget, Curve};

impl Run<'_> {
    /// Width per block such that the sparsity is reached.
    pub(super) fn choose_widths(
        &mut self,
        budgets: &[Budget],
        attention_removed: usize,
    ) -> Result<Vec<usize>, PruneError> {
        if !self.settings.per_block_widths {
            return self.equal_widths(budgets, attention_removed);
        }
        let n_remove = self.neurons_to_remove(budgets, attention_removed)?;
        let curves = self.loss_curves(budgets)?;
        Ok(prune::allocate(&curves, n_remove))
    }

    /// Loss curves of all blocks, on the model with its groups removed and its feed-forwards whole.
    fn loss_curves(&mut self, budgets: &[Budget]) -> Result<Vec<Curve>, PruneError> {
        let n_layer = self.model.hparams.n_layer();
        let tokens = self.windows.sample(self.settings.curve_tokens, self.windows.n_ctx);
        let n_windows = tokens.len() / self.windows.n_ctx;
        let mut stream = crate::forward::embed(self.model, &tokens)?;
        let n_embd = self.forward.n_embd();
        let mut curves = Vec::with_capacity(n_layer);
        self.observer.stage("widths", n_layer);
        for (il, budget) in budgets.iter().enumerate() {
            self.checkpoint()?;
            let w = self.plan.block(self.model, il)?;
            let block = self.forward.upload(&w)?;
            let mut moments = Moments::new(w.shape.n_ff, 0);
            for chunk in self.forward.chunks(0..n_windows) {
                let span = self.forward.span(&chunk);
                let x = &stream[span.clone()];
                let heads = self.forward.heads(&block, x, None)?;
                let mut out = vec![0.0; x.len()];
                let scales = token_scales(x, n_embd, self.settings.token_weight);
                let collect = Collect { target: None, scales: &scales, into: &mut moments };
                let wanted = Wanted { out: Some(&mut out), moments: Some(collect), ..Wanted::default() };
                self.forward.from_heads(&block, x, &heads, wanted)?;
                stream[span].copy_from_slice(&out);
            }
            self.finish(&mut moments);
            let widths = prune::possible_widths(budget.n_ff, budget.ff_step);
            let losses = prune::loss_curve(&w.ffn_down, &moments.gram, self.settings.ridge_ffn, &widths)
                .map_err(|source| PruneError::Singular { block: il, part: "ffn_down", source })?;
            // What the tokens' weights have not taken care of.
            let energy = typical_energy(&stream, n_embd).powf(1.0 - self.settings.token_weight);
            self.observer.step(il + 1, "");
            curves.push(Curve { widths, losses, energy });
        }
        Ok(curves)
    }
}

/// Median over tokens of the mean of x². The mean over tokens would be that of the few tokens with massive activations.
fn typical_energy(stream: &[f32], n_embd: usize) -> f64 {
    let mut energies: Vec<f32> = stream.chunks_exact(n_embd).map(mean_square).collect();
    let middle = energies.len() / 2;
    let (_, median, _) = energies.select_nth_unstable_by(middle, f32::total_cmp);
    f64::from(*median).max(f64::MIN_POSITIVE)
}
