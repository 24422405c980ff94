//! How much the model's predictions mind errors in the stream behind each block, direction by direction.
//!
//! For small errors that is the curvature of the KL divergence, the Fisher information, of which random vectors
//! carried back through the dense model are samples. Layers have been quantised under such curvatures (YAQA,
//! arXiv 2505.22988); here they say which neurons matter.

use super::stream::planned_stream;
use super::{Plan, PruneError, Run, forward, mean_square};
use crate::forward::{BlockGradient, whole_windows};
use crate::model::{BlockWeights, Matrix};
use crate::prune::{Metric, Singular};
use crate::spill::Array;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::borrow::Cow;
use std::sync::Arc;

/// Length of the windows that are measured on: short, so that they come from many places.
pub(super) const CTX: usize = 256;

/// Tokens whose streams before all blocks are in memory at a time.
pub(super) const BATCH_TOKENS: usize = 2048;

/// Per block, random directions `[n_tokens, n_embd]` of length 1 that the predictions mind.
pub(super) struct Sensitivity {
    behind: Vec<Array<bf16>>,
    n_embd: usize,
}

impl Sensitivity {
    /// What errors of ffn_down, which has the values `ffn_down` in block `il` and otherwise is the one of `w`,
    /// cost: the squares of the outputs of the map that this returns. Rows of the norm behind it count by its
    /// weights.
    ///
    /// # Errors
    /// [`Singular`] if what was measured is not finite.
    pub(super) fn costs(&self, il: usize, w: &BlockWeights, ffn_down: &Matrix) -> Result<Matrix, Singular> {
        let samples: Vec<f32> = self.behind[il].iter().map(|v| v.to_f32()).collect();
        let mut map = Cow::Borrowed(ffn_down);
        if let Some(post_norm) = &w.ffn_post_norm {
            let rows = Arc::make_mut(&mut map.to_mut().data).chunks_exact_mut(ffn_down.n_in);
            rows.zip(post_norm).for_each(|(row, g)| row.iter_mut().for_each(|v| *v *= g));
        }
        Ok(Metric::new(&samples, self.n_embd)?.apply(&map))
    }
}

impl Run<'_> {
    /// Measures on about `n_tokens` calibration tokens of the dense model. Tokens count alike: the first of each
    /// window, whose errors can cost hundreds of times as much, would be most of a plain sum.
    pub(super) fn sensitivity(&mut self, n_tokens: usize) -> Result<Sensitivity, PruneError> {
        let s = self.settings;
        let n_ctx = self.windows.n_ctx.min(CTX);
        let tokens = self.windows.sample(n_tokens, n_ctx);
        let whole = Plan::whole(self.model);
        let mut forward = forward(self.model, n_ctx, s)?;
        let head = forward.head(self.model)?;
        let (n_layer, n_embd) = (whole.blocks.len(), forward.n_embd());
        let behind = (0..n_layer).map(|_| s.shelf.zeros(tokens.len() * n_embd));
        let mut behind: Vec<Array<bf16>> = behind.collect::<Result<_, _>>()?;
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let batch = whole_windows(BATCH_TOKENS, n_ctx);
        self.observer.stage("sensitivity", n_layer * tokens.len().div_ceil(batch));
        let mut done = 0;
        for (i, tokens) in tokens.chunks(batch).enumerate() {
            let mut inputs = Vec::with_capacity(n_layer);
            let keep = |x| {
                inputs.push(s.shelf.put(x)?);
                Ok(())
            };
            let last = planned_stream(&mut forward, self.model, &whole, tokens, &*self.observer, keep)?;
            let mut grad = forward.curvature_sample(&head, &last, || rng.random())?;
            for (il, x) in inputs.into_iter().enumerate().rev() {
                self.checkpoint()?;
                let samples = behind[il][i * batch * n_embd..].chunks_exact_mut(n_embd);
                for (sample, g) in samples.zip(grad.chunks_exact(n_embd)) {
                    let norm = (mean_square(g) * n_embd as f32).sqrt().max(f32::MIN_POSITIVE);
                    sample.iter_mut().zip(g).for_each(|(s, g)| *s = bf16::from_f32(g / norm));
                }
                // Nobody asks for what is before the first block.
                if il > 0 {
                    let block = forward.upload(&self.model.block(il)?)?;
                    forward.block_gradient(&block, &x, &mut grad, &mut BlockGradient::default())?;
                }
                done += 1;
                self.observer.step(done, "");
            }
        }
        Ok(Sensitivity { behind, n_embd })
    }
}
