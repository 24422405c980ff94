//! A last adjustment of norms and biases, by descent on what the whole model loses.
//!
//! The sequential pass fits every map to what its own block should give. Here the loss is that of the
//! predictions, the KL divergence from the dense model, and all blocks move together. Only vectors move: there
//! are too few of them to learn the calibration text by heart, they are F32 in the file, so that nothing is
//! rounded anew, and what is kept per number is small. That norms and biases alone win back much of what
//! pruning costs was found in PERP, arXiv 2312.15230.

use super::judge::{Judge, Loss};
use super::sequential::Streams;
use super::{PruneError, Run};
use crate::forward::{BlockGradient, Head, LossHead, embed};
use crate::model::BlockVector;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use std::f32::consts::PI;

/// Decay of the running means of gradients and of their squares (Adam, arXiv 1412.6980); the second shorter than
/// usual, for there are few steps.
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;

/// Share of the steps over which the rate grows to its full size.
const WARM_UP: f32 = 0.1;

/// A vector that moves.
struct Moving {
    values: Vec<f32>,
    /// Running means of the gradient and of its square.
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Size of what it adds to or multiplies, which steps are relative to.
    size: f32,
}

impl Moving {
    fn new(values: &[f32], size: f32) -> Moving {
        let zero = vec![0.0; values.len()];
        Moving { values: values.to_vec(), mean: zero.clone(), square: zero, size }
    }

    /// The `n`-th step of Adam, counted from 1.
    fn step(&mut self, gradient: &[f32], rate: f32, n: i32) {
        let (mean_part, square_part) = (1.0 - MEAN_DECAY.powi(n), 1.0 - SQUARE_DECAY.powi(n));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((value, (mean, square)), g) in self.values.iter_mut().zip(moments).zip(gradient) {
            *mean += (1.0 - MEAN_DECAY) * (g - *mean);
            *square += (1.0 - SQUARE_DECAY) * (g * g - *square);
            let direction = *mean / mean_part / ((*square / square_part).sqrt() + f32::MIN_POSITIVE);
            *value -= rate * self.size * direction;
        }
    }
}

/// The vectors of one block that move, in the order of [`BlockVector::ALL`].
type BlockState = [Option<Moving>; BlockVector::ALL.len()];

/// What predictions are compared with.
struct Reference<'a> {
    own: LossHead,
    dense: Head,
    /// The dense model's last stream of all windows.
    stream: &'a [f32],
}

impl Run<'_> {
    /// Moves norms and biases to where predictions on the fitted windows are closer to the dense model's.
    /// `streams` are those behind the last block; the pruned one of the held-out windows is brought up to date.
    /// If they are no better off, everything stays as it was.
    pub(super) fn tune(&mut self, streams: &mut Streams) -> Result<(), PruneError> {
        let w = self.windows;
        let (n_epochs, per_step) =
            (self.settings.tune, (self.settings.tune_tokens / w.n_ctx).clamp(1, w.n_fit));
        let n_steps = n_epochs * w.n_fit.div_ceil(per_step);
        if n_steps == 0 {
            return Ok(());
        }
        self.observer.stage("tune", n_steps);
        let to = Reference {
            own: self.forward.loss_head(self.model)?,
            dense: self.forward.head(self.reference)?,
            stream: &streams.dense,
        };
        let held_out = w.n_fit..w.n_windows();
        let span = self.forward.span(&held_out);
        let tokens = w.tokens_of(held_out);
        let judge =
            Judge::new(&mut self.forward, &to.dense, tokens, &to.stream[span.clone()], Loss::Divergence)?;
        let before = judge.loss(&mut self.forward, to.own.head(), &streams.pruned[span.clone()])?;
        let plan = self.plan.clone();
        let mut state: Vec<BlockState> =
            (0..plan.blocks.len()).map(|il| self.vectors(il)).collect::<Result<_, _>>()?;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        let mut n = 0;
        for _ in 0..n_epochs {
            let mut order: Vec<usize> = (0..w.n_fit).collect();
            order.shuffle(&mut rng);
            for batch in order.chunks(per_step) {
                self.checkpoint()?;
                n += 1;
                let progress = n as f32 / n_steps as f32;
                let rate = (progress / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * progress).cos());
                self.tune_step(batch, &to, &mut state, rate * self.settings.tune_rate as f32, n)?;
                self.observer.step(n, "");
            }
        }
        let tuned = self.planned_streams(tokens)?.pop().expect("a stream behind the last block");
        let after = judge.loss(&mut self.forward, to.own.head(), &tuned)?;
        if after < before {
            streams.pruned[span].copy_from_slice(&tuned);
        } else {
            self.plan = plan;
        }
        self.observer.step(n, &format!("held-out divergence {before:.4} to {after:.4}"));
        Ok(())
    }

    /// One step on the windows `batch`. Every block moves as soon as its gradient is known.
    fn tune_step(
        &mut self,
        batch: &[usize],
        to: &Reference,
        state: &mut [BlockState],
        rate: f32,
        n: usize,
    ) -> Result<(), PruneError> {
        let w = self.windows;
        let tokens: Vec<_> = batch.iter().flat_map(|&i| w.tokens_of(i..i + 1)).copied().collect();
        let spans = batch.iter().map(|&i| self.forward.span(&(i..i + 1)));
        let target: Vec<f32> = spans.flat_map(|span| &to.stream[span]).copied().collect();
        let mut streams = self.planned_streams(&tokens)?;
        let last = streams.pop().expect("a stream behind the last block");
        let mut grad = self.forward.divergence_gradient(&to.own, &to.dense, &last, &target)?;
        for (il, vectors) in state.iter_mut().enumerate().rev() {
            let block = self.forward.upload(&self.plan.block(self.model, il)?)?;
            let mut gradient = BlockGradient::default();
            self.forward.block_gradient(&block, &streams[il], &mut grad, &mut gradient)?;
            for ((v, moving), gradient) in BlockVector::ALL.into_iter().zip(vectors).zip(&gradient) {
                if let Some(moving) = moving {
                    moving.step(gradient, rate, n as i32);
                    self.plan.blocks[il].set_vector(v, Some(moving.values.clone()));
                }
            }
        }
        Ok(())
    }

    /// The streams of `tokens` under the plan, before each block and behind the last.
    fn planned_streams(&mut self, tokens: &[crate::ggml::Token]) -> Result<Vec<Vec<f32>>, PruneError> {
        let mut streams = vec![embed(self.model, tokens)?];
        for il in 0..self.plan.blocks.len() {
            let block = self.forward.upload(&self.plan.block(self.model, il)?)?;
            let mut next = vec![0.0; streams[il].len()];
            self.forward.stream(&block, &streams[il], &mut next)?;
            streams.push(next);
        }
        Ok(streams)
    }

    /// The vectors of block `il` that move.
    fn vectors(&self, il: usize) -> Result<BlockState, PruneError> {
        let w = self.plan.block(self.model, il)?;
        Ok(BlockVector::ALL.map(|v| {
            let there = !v.of_attention() || w.shape.n_head_kv > 0;
            let may = !v.is_bias() || self.settings.biases;
            let values = w.vector(v).filter(|_| there && may)?;
            // A bias is a weight whose input is always 1.
            let size = match v {
                BlockVector::AttnOutputBias => &w.attn_output.data,
                BlockVector::FfnDownBias => &w.ffn_down.data,
                _ => values,
            };
            Some(Moving::new(values, rms(size)))
        }))
    }
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| v * v).sum::<f32>() / x.len().max(1) as f32).sqrt()
}
