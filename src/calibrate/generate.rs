//! Self-written calibration text, generated in batches with libllama's KV cache.
//!
//! A model's own samples cover its knowledge, in all its languages, without a dataset. Each document begins
//! with the start token. Its first tokens are sampled at a higher temperature, so that documents differ.
//! The others come from the model's own distribution without its least likely tokens. Some of the windows
//! can be conversations in the model's chat template, sampled this way from the first token on. The model
//! then writes the user's message, too, after the template has opened it (the idea of Magpie, arXiv
//! 2406.08464).

use super::CalibrateError;
use crate::ggml::{BatchToken, Context, LlamaModel, Token};
use crate::numeric::draw;
use crate::parallel::{Idle, each_telling};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::ops::Range;

/// First tokens of a document, over which the temperature falls from 2 to 1.
const WARM_TOKENS: usize = 2;

/// Target mean surprise of the other tokens in bits, by Mirostat 2.0 (arXiv 2007.14966), with the value of
/// llama.cpp.
/// A small model gives much probability to many unlikely tokens, so text sampled from all of them soon
/// loses its meaning. Under a fixed bound it repeats itself. A good model stays below the target by itself,
/// and nothing is cut off.
const SURPRISE: f32 = 5.0;

/// Rate at which the bound follows the surprise; the bound carries over from one document of a window to
/// the next.
const FOLLOWS: f32 = 0.1;

/// Number of windows that are written together in one batch. Each group of windows is written by threads of
/// its own, which do not wait for those of others.
const GROUP: usize = 8;

/// Longest message of a user, in tokens: small models do not always end it, and the reply should fit, too.
const MESSAGE_TOKENS: usize = 64;

/// Request for self-written windows.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Number of windows.
    pub n_windows: usize,
    /// Seed; window i depends only on the seed and on i.
    pub seed: u64,
    /// Share of the windows that are conversations in the model's chat template.
    pub chat_share: f64,
    /// Largest number of windows that are generated side by side.
    pub n_parallel: usize,
    /// Token that documents begin with; without it, the BOS or else the EOS that libllama names.
    pub start: Option<Token>,
}

/// Given text of a document. The model ends its own text before each piece, and continues after it.
struct Frame {
    pieces: Vec<Vec<Token>>,
}

/// Placeholder for the user's message in a template.
const MESSAGE: &str = "putri-message";

impl Frame {
    /// Frame with nothing but the start token.
    fn plain(start: Token) -> Frame {
        Frame { pieces: vec![vec![start]] }
    }

    /// Frame with the text that the model's chat template puts before and after a user's message.
    fn chat(model: &LlamaModel) -> Result<Frame, CalibrateError> {
        let prompt = model.chat(&[("user", MESSAGE)], true).ok_or(CalibrateError::NoTemplate)?;
        let (before, after) = prompt.split_once(MESSAGE).ok_or(CalibrateError::NoTemplate)?;
        let vocab = model.vocab();
        let bos = vocab.bos().filter(|_| vocab.add_bos());
        let before = vocab.tokenize(before, true)?;
        // Some templates include the start token.
        let bos = bos.filter(|b| before.first() != Some(b));
        let pieces = vec![bos.into_iter().chain(before).collect(), vocab.tokenize(after, true)?];
        if pieces.iter().any(Vec::is_empty) { Err(CalibrateError::NoTemplate) } else { Ok(Frame { pieces }) }
    }
}

/// Generates the windows of `schedule`.
/// `progress` gets (tokens done, tokens in all) and returns whether to go on.
///
/// # Errors
/// [`CalibrateError::NoStart`] if there is no start token. [`CalibrateError::NoTemplate`] if conversations
/// are requested and libllama recognises no template for them. Otherwise the error of libllama.
pub fn generate(
    model: &LlamaModel,
    schedule: &Schedule,
    n_threads: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let start = schedule.start.or(vocab.bos()).or(vocab.eos()).ok_or(CalibrateError::NoStart)?;
    let plain = Frame::plain(start);
    let chat = if schedule.chat_share > 0.0 { Some(Frame::chat(model)?) } else { None };
    let chats = |i: usize| (i as f64 * schedule.chat_share).floor();
    let frame = |i: usize| chat.as_ref().filter(|_| chats(i + 1) > chats(i)).unwrap_or(&plain);
    let Schedule { n_ctx, n_windows, seed, n_parallel, .. } = *schedule;
    let per_group = GROUP.min(n_parallel).clamp(1, n_windows);
    let groups: Vec<Range<usize>> =
        (0..n_windows).step_by(per_group).map(|first| first..(first + per_group).min(n_windows)).collect();
    let at_once = (n_parallel / per_group).min(n_threads).clamp(1, groups.len());
    let idle = Idle::default();
    let write = |group: Range<usize>, tell: &dyn Fn(usize) -> bool| {
        let n = group.len();
        let mut batch: Vec<Writer> = group.map(|i| Writer::new(frame(i), seed, i)).collect();
        let mut context =
            idle.take(|| Context::new(model, n_ctx, per_group, per_group, n_threads / at_once))?;
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
            // The first token of a window is given.
            if !tell(if pos == 0 { 2 * n } else { n }) {
                return Err(CalibrateError::Interrupted);
            }
        }
        idle.put(context);
        Ok(batch.into_iter().map(|w| w.tokens).collect::<Vec<_>>())
    };
    let (total, mut done) = (n_ctx * n_windows, 0);
    let written = each_telling(groups, at_once, write, |n| {
        done += n;
        progress(done, total)
    })?;
    let windows: Vec<_> = written.into_iter().flatten().collect();
    if windows.len() == n_windows { Ok(windows) } else { Err(CalibrateError::Interrupted) }
}

/// Window that is being written.
struct Writer<'f> {
    tokens: Vec<Token>,
    frame: &'f Frame,
    /// Index of the last given piece of the frame, and the number of its given tokens.
    piece: usize,
    given: usize,
    /// Number of tokens written since the last given piece.
    age: usize,
    /// Bound of the next token's surprise, in bits.
    most: f32,
    rng: ChaCha8Rng,
}

impl Writer<'_> {
    fn new(frame: &Frame, seed: u64, index: usize) -> Writer<'_> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        Writer {
            tokens: vec![frame.pieces[0][0]],
            frame,
            piece: 0,
            given: 1,
            age: 0,
            most: 2.0 * SURPRISE,
            rng,
        }
    }

    /// Samples the next token.
    fn sample(&mut self, logits: &[f32]) -> Token {
        let warmth = if self.frame.pieces.len() > 1 { 0 } else { WARM_TOKENS.saturating_sub(self.age) };
        let temperature = 1.0 + warmth as f32 / WARM_TOKENS as f32;
        let most = if warmth > 0 { f32::INFINITY } else { self.most };
        let (token, surprise) = draw(logits, temperature, most, self.rng.random());
        // A given token is not sampled and nearly certain; the bound must not follow it.
        let given = self.frame.pieces[self.piece].get(self.given).is_some();
        if warmth == 0 && !given {
            self.most -= FOLLOWS * (surprise - SURPRISE);
        }
        token as Token
    }

    /// Appends the next given token if there is one, else `next`; `ends` says that it ends the text being
    /// written.
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
                // The next piece starts with the end of the text before it.
                self.tokens.push(pieces[self.piece][0]);
                self.given = 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::log_sum_exp;

    #[test]
    fn what_is_given_does_not_move_the_bound() {
        let frame = Frame { pieces: vec![vec![1; 30], vec![2; 10]] };
        let mut writer = Writer::new(&frame, 7, 0);
        let sure: Vec<f32> = (0..50).map(|t| if t == 1 { 50.0 } else { 0.0 }).collect();
        for _ in 1..30 {
            let token = writer.sample(&sure);
            writer.push(token, false);
        }
        assert_eq!(writer.most, 2.0 * SURPRISE);
        let token = writer.sample(&sure);
        writer.push(token, false);
        assert!((writer.most - (2.0 + FOLLOWS) * SURPRISE).abs() < 1e-3, "{}", writer.most);
    }

    /// Mean surprise, in bits, of a document's tokens among the candidates, for logits spread evenly over
    /// `spread`.
    fn mean_surprise(spread: f32) -> f64 {
        const N: usize = 2000;
        let frame = Frame::plain(0);
        let mut writer = Writer::new(&frame, 7, 0);
        let mut sum = 0.0;
        for i in 0..WARM_TOKENS + N {
            let logit = |t: usize| ((t * 7919 + i * 613) % 997) as f32 / 997.0 * spread;
            let logits: Vec<f32> = (0..2000).map(logit).collect();
            let most = f64::from(writer.most);
            let token = writer.sample(&logits) as usize;
            writer.push(token as Token, false);
            if i < WARM_TOKENS {
                continue;
            }
            let all = log_sum_exp(&logits);
            let p: Vec<f64> = logits.iter().map(|v| (f64::from(*v) - all).exp()).collect();
            let others: f64 = p.iter().filter(|p| -p.log2() <= most).sum();
            sum -= (p[token] / others.max(p[token])).log2();
        }
        sum / N as f64
    }

    #[test]
    fn documents_surprise_no_more_than_they_should() {
        // Unbounded, these are about 9.1, 7.5 and 4.2 bits.
        for (spread, least, most) in [(10.0, 4.7, 5.1), (30.0, 4.7, 5.1), (300.0, 3.0, 4.9)] {
            let found = mean_surprise(spread);
            assert!(least < found && found < most, "{spread}: {found}");
        }
    }
}
