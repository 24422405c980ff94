//! Text that the model writes itself, in batches with libllama's KV cache.
//!
//! A model's own samples cover what it knows, in every language that it speaks, without a dataset.
//! Each document begins with the start token; the temperature falls from 2 to 1 over the first ten
//! tokens, so that documents differ, and stays at 1, the model's own distribution.

use super::CalibrateError;
use crate::ggml::{BatchToken, Context, LlamaModel, Token};
use crate::numeric::exp_neg;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Tokens over which the temperature falls from 2 to 1.
const WARM_TOKENS: usize = 10;

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Number of windows.
    pub n_windows: usize,
    /// Seed; window i depends on seed and i only.
    pub seed: u64,
    /// Windows that are generated side by side at most.
    pub n_parallel: usize,
}

/// Generates the windows of `schedule`. `progress` is told (tokens done, tokens in all)
/// and returns whether to go on.
///
/// # Errors
/// [`CalibrateError::NoStart`] if there is no start token, or what libllama failed on.
pub fn generate(
    model: &LlamaModel,
    schedule: &Schedule,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let start = vocab.bos().or(vocab.eos()).ok_or(CalibrateError::NoStart)?;
    let Schedule { n_ctx, n_windows, seed, n_parallel } = *schedule;
    let parallel = n_parallel.clamp(1, n_windows);
    let mut context = Context::new(model, n_ctx, parallel, parallel, n_threads)?;
    let total = n_ctx * n_windows;
    let mut windows: Vec<Vec<Token>> = Vec::with_capacity(n_windows);
    while windows.len() < n_windows {
        let first = windows.len();
        let n = parallel.min(n_windows - first);
        let mut batch: Vec<Writer> = (first..first + n).map(|i| Writer::new(start, seed, i)).collect();
        context.clear();
        for pos in 0..n_ctx - 1 {
            let tokens: Vec<_> = batch
                .iter()
                .enumerate()
                .map(|(seq, w)| BatchToken { token: w.tokens[pos], pos: pos as i32, seq: seq as i32 })
                .collect();
            context.decode(&tokens)?;
            let logits: Vec<&[f32]> = (0..n).map(|i| context.logits(i)).collect();
            let sampled: Vec<Token> =
                batch.par_iter_mut().zip(logits).map(|(w, logits)| w.sample(logits)).collect();
            for (w, next) in batch.iter_mut().zip(sampled) {
                w.push(next, start, vocab.is_eog(next));
            }
            if !progress(first * n_ctx + (pos + 2) * n, total) {
                return Err(CalibrateError::Interrupted);
            }
        }
        windows.extend(batch.into_iter().map(|w| w.tokens));
    }
    Ok(windows)
}

/// One window being written.
struct Writer {
    tokens: Vec<Token>,
    /// Tokens since the document began.
    age: usize,
    /// The last token ended its document.
    ended: bool,
    rng: ChaCha8Rng,
}

impl Writer {
    fn new(start: Token, seed: u64, index: usize) -> Writer {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        Writer { tokens: vec![start], age: 0, ended: false, rng }
    }

    /// Draws from softmax(logits / temperature).
    fn sample(&mut self, logits: &[f32]) -> Token {
        let temperature = 2.0 - (self.age as f32 / WARM_TOKENS as f32).min(1.0);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|v| exp_neg((v - max) / temperature)).collect();
        let sums: Vec<f64> = weights.chunks(256).map(|c| f64::from(c.iter().sum::<f32>())).collect();
        let mut left = self.rng.random::<f64>() * sums.iter().sum::<f64>();
        let chunk = sums.iter().position(|s| {
            let here = left < *s;
            left -= if here { 0.0 } else { *s };
            here
        });
        let from = chunk.unwrap_or(sums.len() - 1) * 256;
        let inside = weights[from..].iter().position(|w| {
            left -= f64::from(*w);
            left < 0.0
        });
        // Rounding may leave a crumb behind the last token of the chunk.
        inside.map_or_else(|| argmax(logits), |i| (from + i) as Token)
    }

    /// Appends `next`; after the end of a document the next one begins with the start token.
    fn push(&mut self, next: Token, start: Token, ends: bool) {
        let next = if self.ended { start } else { next };
        self.age = if self.ended { 0 } else { self.age + 1 };
        self.ended = ends && !self.ended;
        self.tokens.push(next);
    }
}

fn argmax(v: &[f32]) -> Token {
    let best = v.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i as Token)
}
