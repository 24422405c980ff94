//! A last adjustment of norms and biases, by descent on what the whole model loses.
//!
//! The sequential pass fits every map to what its own block should give. Here the loss is that of the
//! predictions, the KL divergence from the dense model, and all blocks move together. Only vectors move: there
//! are too few of them to learn the calibration text by heart, they are written as F32, so that nothing is
//! rounded anew, and what is kept per number is small. That norms and biases alone win back much of what
//! pruning costs was found in PERP, arXiv 2312.15230.

use super::judge::{Judge, Loss};
use super::sequential::Streams;
use super::stream::planned_stream;
use super::{Plan, PruneError, Run, forward};
use crate::forward::{BlockGradient, Forward, Head, MAX_GRADIENT_CTX};
use crate::ggml::Token;
use crate::model::BlockVector;
use crate::spill::Array;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use std::f32::consts::PI;

/// Decay of the running means of gradients and of their squares (Adam, arXiv 1412.6980); the second shorter than
/// usual, for there are few steps.
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;

/// Keeps a direction finite where there are no gradients.
const EPSILON: f32 = 1e-15;

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
            let direction = *mean / mean_part / ((*square / square_part).sqrt() + EPSILON);
            *value -= rate * self.size * direction;
        }
    }
}

/// The vectors of one block that move, in the order of [`BlockVector::ALL`].
type BlockState = [Option<Moving>; BlockVector::ALL.len()];

/// What is learnt from.
struct Lessons<'a> {
    forward: Forward,
    own: Head,
    /// The dense model's head, where it is not the same.
    dense: Option<Head>,
    windows: Vec<&'a [Token]>,
    /// The dense model's last stream of these windows.
    target: Array<f32>,
}

impl<'a> Run<'a> {
    /// Moves norms and biases to where predictions on the fitted windows are closer to the dense model's.
    /// `streams` are those behind the last block; the pruned one of the held-out windows is brought up to date.
    /// If they are no better off, everything stays as it was. Returns whether anything moved.
    pub(super) fn tune(&mut self, streams: &mut Streams) -> Result<bool, PruneError> {
        if self.settings.tune == 0 {
            return Ok(false);
        }
        self.observer.stage("tune, preparing", 1);
        let held_out = self.windows.n_fit..self.windows.n_windows();
        let span = self.forward.span(&held_out);
        let tokens = self.windows.tokens_of(held_out);
        let dense = &streams.dense[span.clone()];
        let (model, reference) = (self.model, self.reference);
        // It reads a whole head, and is done with it before the lessons need theirs.
        let judge = Judge::new(&mut self.forward, model, reference, tokens, dense, Loss::Divergence)?;
        let mut lessons = self.lessons(&streams.dense)?;
        let per_step = (self.settings.tune_tokens / lessons.forward.n_ctx()).clamp(1, lessons.windows.len());
        let n_steps = self.settings.tune * lessons.windows.len().div_ceil(per_step);
        let before = judge.loss(&mut self.forward, &streams.pruned[span.clone()])?;
        let untuned: Vec<_> = self.plan.blocks.iter().map(|b| b.vectors.clone()).collect();
        let mut state: Vec<BlockState> =
            (0..self.plan.blocks.len()).map(|il| self.vectors(il)).collect::<Result<_, _>>()?;
        self.observer.stage("tune", n_steps);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        let mut n = 0;
        for _ in 0..self.settings.tune {
            let mut order: Vec<usize> = (0..lessons.windows.len()).collect();
            order.shuffle(&mut rng);
            for batch in order.chunks(per_step) {
                n += 1;
                // In the middle of each step: even a single one moves something.
                let progress = (n as f32 - 0.5) / n_steps as f32;
                let rate = (progress / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * progress).cos());
                self.tune_step(&mut lessons, batch, &mut state, rate * self.settings.tune_rate as f32, n)?;
                self.observer.step(n, "");
            }
        }
        let tuned =
            planned_stream(&mut self.forward, self.model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let after = judge.loss(&mut self.forward, &tuned)?;
        let better = after < before;
        if better {
            streams.pruned[span].copy_from_slice(&tuned);
        } else {
            self.plan.blocks.iter_mut().zip(untuned).for_each(|(b, vectors)| b.vectors = vectors);
        }
        let verdict = if better { "" } else { ", undone" };
        self.observer.step(n, &format!("held-out divergence {before:.4} to {after:.4}{verdict}"));
        Ok(better)
    }

    /// The fitted windows, cut to a length that gradients can go through, or some of them, spread evenly; `dense`
    /// is the dense model's last stream of all windows as they are.
    fn lessons(&self, dense: &[f32]) -> Result<Lessons<'a>, PruneError> {
        let (w, s) = (self.windows, self.settings);
        let n_ctx = w.n_ctx / w.n_ctx.div_ceil(MAX_GRADIENT_CTX);
        let mut forward = forward(self.model, n_ctx, s)?;
        let pieces: Vec<&[Token]> = w.tokens_of(0..w.n_fit).chunks_exact(n_ctx).collect();
        let n = (s.tune_limit / n_ctx).clamp(1, pieces.len());
        let chosen: Vec<usize> = (0..n).map(|i| (2 * i + 1) * pieces.len() / (2 * n)).collect();
        let windows: Vec<&[Token]> = chosen.iter().map(|&i| pieces[i]).collect();
        let target = if n_ctx == w.n_ctx {
            let spans = chosen.iter().map(|&i| forward.span(&(i..i + 1)));
            spans.flat_map(|span| &dense[span]).copied().collect()
        } else {
            let whole = Plan::whole(self.reference);
            let tokens = windows.concat();
            planned_stream(&mut forward, self.reference, &whole, &tokens, &*self.observer, |_| Ok(()))?
        };
        let target = s.shelf.put(target)?;
        let (own, dense) = self.output_heads(&forward)?;
        Ok(Lessons { forward, own, dense, windows, target })
    }

    /// The `n`-th step, on the windows `batch`. Every block moves as soon as its gradient is known.
    fn tune_step(
        &mut self,
        lessons: &mut Lessons,
        batch: &[usize],
        state: &mut [BlockState],
        rate: f32,
        n: usize,
    ) -> Result<(), PruneError> {
        let Lessons { forward, own, dense, windows, target } = lessons;
        let tokens: Vec<Token> = batch.iter().flat_map(|&i| windows[i]).copied().collect();
        let spans = batch.iter().map(|&i| forward.span(&(i..i + 1)));
        let target: Vec<f32> = spans.flat_map(|span| &target[span]).copied().collect();
        let mut inputs = Vec::with_capacity(state.len());
        let keep = |x| {
            inputs.push(self.settings.shelf.put(x)?);
            Ok(())
        };
        let last = planned_stream(forward, self.model, &self.plan, &tokens, &*self.observer, keep)?;
        let mut grad = forward.divergence_gradient(own, dense.as_ref(), &last, &target)?;
        for ((il, vectors), x) in state.iter_mut().enumerate().zip(inputs).rev() {
            self.checkpoint()?;
            let block = forward.upload(&self.plan.block(self.model, il)?)?;
            let mut gradient = BlockGradient::default();
            forward.block_gradient(&block, &x, &mut grad, &mut gradient)?;
            for ((v, moving), gradient) in BlockVector::ALL.into_iter().zip(vectors).zip(&gradient) {
                if let Some(moving) = moving {
                    moving.step(gradient, rate, n as i32);
                    self.plan.blocks[il].set_vector(v, Some(moving.values.clone()));
                }
            }
        }
        Ok(())
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
    (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len().max(1) as f64).sqrt() as f32
}
