//! Text that the model writes itself, in batches with libllama's KV cache.
//!
//! A model's own samples cover what it knows, in every language that it speaks, without a dataset.
//! Each document begins with the start token; the temperature falls from 2 to 1 over the first ten
//! tokens, so that documents differ, and stays at 1, the model's own distribution. A part of the windows
//! can be conversations in the model's chat template: the model writes the user's message, too, once the
//! template has opened it (the idea of Magpie, arXiv 2406.08464), all at a temperature of 1.

use super::CalibrateError;
use crate::ggml::{BatchToken, Context, LlamaModel, Token};
use crate::numeric::exp_neg;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Tokens over which the temperature falls from 2 to 1.
const WARM_TOKENS: usize = 10;

/// Longest message of a user: small models do not always find an end, and the reply should be there, too.
const MESSAGE_TOKENS: usize = 64;

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Number of windows.
    pub n_windows: usize,
    /// Seed; window i depends on seed and i only.
    pub seed: u64,
    /// Share of the windows that are conversations in the model's chat template.
    pub chat_share: f64,
    /// Windows that are generated side by side at most.
    pub n_parallel: usize,
}

/// What is given in a document: before each piece the model has ended what it wrote, and after it the
/// model goes on.
struct Frame {
    pieces: Vec<Vec<Token>>,
}

/// Stands for the user's message in a template.
const MESSAGE: &str = "putri-message";

impl Frame {
    /// Nothing but the start token.
    fn plain(start: Token) -> Frame {
        Frame { pieces: vec![vec![start]] }
    }

    /// What the model's chat template puts before and after a user's message.
    fn chat(model: &LlamaModel) -> Result<Frame, CalibrateError> {
        let prompt = model.chat_prompt(MESSAGE).ok_or(CalibrateError::NoTemplate)?;
        let (before, after) = prompt.split_once(MESSAGE).ok_or(CalibrateError::NoTemplate)?;
        let vocab = model.vocab();
        let bos = vocab.bos().filter(|_| vocab.add_bos());
        let before = vocab.tokenize(before, true)?;
        // Some templates spell the start token out.
        let bos = bos.filter(|b| before.first() != Some(b));
        let pieces = vec![bos.into_iter().chain(before).collect(), vocab.tokenize(after, true)?];
        if pieces.iter().any(Vec::is_empty) { Err(CalibrateError::NoTemplate) } else { Ok(Frame { pieces }) }
    }
}

/// Generates the windows of `schedule`. `progress` is told (tokens done, tokens in all)
/// and returns whether to go on.
///
/// # Errors
/// [`CalibrateError::NoStart`] if there is no start token, [`CalibrateError::NoTemplate`] if there shall be
/// conversations and libllama knows no template for them, or what libllama failed on.
pub fn generate(
    model: &LlamaModel,
    schedule: &Schedule,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let start = vocab.bos().or(vocab.eos()).ok_or(CalibrateError::NoStart)?;
    let plain = Frame::plain(start);
    let chat = if schedule.chat_share > 0.0 { Some(Frame::chat(model)?) } else { None };
    let chats = |i: usize| (i as f64 * schedule.chat_share).floor();
    let frame = |i: usize| chat.as_ref().filter(|_| chats(i + 1) > chats(i)).unwrap_or(&plain);
    let Schedule { n_ctx, n_windows, seed, n_parallel, .. } = *schedule;
    let parallel = n_parallel.clamp(1, n_windows);
    let mut context = Context::new(model, n_ctx, parallel, parallel, n_threads)?;
    let total = n_ctx * n_windows;
    let mut windows: Vec<Vec<Token>> = Vec::with_capacity(n_windows);
    while windows.len() < n_windows {
        let first = windows.len();
        let n = parallel.min(n_windows - first);
        let mut batch: Vec<Writer> = (first..first + n).map(|i| Writer::new(frame(i), seed, i)).collect();
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
                w.push(next, vocab.is_eog(next));
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
struct Writer<'f> {
    tokens: Vec<Token>,
    frame: &'f Frame,
    /// Piece of the frame that was given last, and how many of its tokens.
    piece: usize,
    given: usize,
    /// Tokens written since the last piece was given.
    age: usize,
    rng: ChaCha8Rng,
}

impl Writer<'_> {
    fn new(frame: &Frame, seed: u64, index: usize) -> Writer<'_> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        Writer { tokens: vec![frame.pieces[0][0]], frame, piece: 0, given: 1, age: 0, rng }
    }

    /// Draws from softmax(logits / temperature).
    fn sample(&mut self, logits: &[f32]) -> Token {
        let warmth = if self.frame.pieces.len() > 1 { 0 } else { WARM_TOKENS.saturating_sub(self.age) };
        let temperature = 1.0 + warmth as f32 / WARM_TOKENS as f32;
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

    /// Appends what is given, if anything is, else `next`; `ends` says that it ends what is being written.
    fn push(&mut self, next: Token, ends: bool) {
        let pieces = &self.frame.pieces;
        if let Some(&token) = pieces[self.piece].get(self.given) {
            self.tokens.push(token);
            self.given += 1;
            return;
        }
        self.age += 1;
        let goes_on = self.piece + 1 < pieces.len();
        let ends = ends || (goes_on && self.age > MESSAGE_TOKENS);
        if !ends || !goes_on {
            self.tokens.push(next);
        }
        if ends {
            self.piece = if goes_on { self.piece + 1 } else { 0 };
            (self.given, self.age) = (0, 0);
            if goes_on {
                // The next piece begins with the end of what came before it.
                self.tokens.push(pieces[self.piece][0]);
                self.given = 1;
            }
        }
    }
}

fn argmax(v: &[f32]) -> Token {
    let best = v.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i as Token)
}
