//! Sources of calibration tokens: the model itself, text files, or both.
//!
//! All windows have one length. The last ones are held out: they pass through the model like the others,
//! but nothing is fitted to them, so they can judge the result. Tuning uses them once, to decide whether it
//! helped.

mod chats;
mod generate;
mod oddities;
mod text;
mod texts;

pub use generate::{Schedule, generate};
pub use oddities::oddities;
pub use text::{file_windows, text_windows};
pub use texts::{Text, collect_texts, expected_texts};

use crate::ggml::{GgmlError, LlamaModel, Token};
use crate::text::{Encoding, TextError, TextFile};
use std::ops::Range;
use std::path::PathBuf;

/// Reason why there are no calibration tokens.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// A text file cannot be read, or is not text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A text file is too short.
    #[error(
        "the text has {found} tokens; at least {needed} are needed for windows of {n_ctx}; give more text, or use shorter windows"
    )]
    TooShort {
        /// Number of tokens in all files.
        found: usize,
        /// Tokens of two windows.
        needed: usize,
        /// Tokens per window.
        n_ctx: usize,
    },
    /// The model has neither a BOS nor an EOS token to begin with.
    #[error(
        "the model names no start token to begin its own text from; give it a text to calibrate on, and no share of its own"
    )]
    NoStart,
    /// Conversations are requested, but there is no template for them.
    #[error("the model has no chat template that llama.cpp's core knows; calibrate without conversations")]
    NoTemplate,
    /// The progress callback asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// libllama failed.
    #[error(transparent)]
    Llama(#[from] GgmlError),
}

/// Request for calibration windows.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Number of windows to fit on, from all sources together.
    pub n_windows: usize,
    /// Paths of the text files.
    pub files: Vec<PathBuf>,
    /// Weight of each text file among the others; equal weights if there are none. Only texts that are kept
    /// apart have weights ([`collect_texts`]).
    pub weights: Vec<f64>,
    /// Encoding of the files that have no byte-order mark, if it is not UTF-8.
    pub encoding: Option<Encoding>,
    /// Whether names of special tokens in the files, such as `<|im_end|>`, are read as these tokens.
    pub parse_special: bool,
    /// Token that self-written text begins with; without it, the BOS or else the EOS that libllama names.
    /// In a vocabulary without these, libllama names ordinary words.
    pub start: Option<Token>,
    /// Share of the windows that the model writes itself, 0 to 1.
    pub self_share: f64,
    /// Share of the self-written windows that are conversations in the model's chat template.
    pub chat_share: f64,
    /// Seed of the sampling.
    pub seed: u64,
    /// Number of threads for generating.
    pub n_threads: usize,
    /// Largest number of windows that are generated side by side: each has a KV cache.
    pub n_parallel: usize,
}

impl Default for Recipe {
    /// Requests 16384 self-written tokens, on all cores.
    fn default() -> Recipe {
        Recipe {
            n_ctx: 512,
            n_windows: 32,
            files: Vec::new(),
            weights: Vec::new(),
            encoding: None,
            parse_special: false,
            start: None,
            self_share: 1.0,
            chat_share: 0.0,
            seed: 1,
            n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            n_parallel: 64,
        }
    }
}

impl Recipe {
    /// Number of windows to fit on that the model writes itself.
    fn n_self(&self) -> usize {
        let share = if self.files.is_empty() { 1.0 } else { self.self_share };
        let n_self = (self.n_windows as f64 * share).round() as usize;
        // A mixed request gets at least one window of each kind.
        if share > 0.0 && share < 1.0 { n_self.clamp(1, (self.n_windows - 1).max(1)) } else { n_self }
    }

    /// Schedule of the text that the model writes: `n_self` windows to fit on, and the held-out ones.
    fn schedule(&self, n_self: usize) -> Schedule {
        Schedule {
            n_ctx: self.n_ctx,
            n_windows: n_self + held_out(n_self),
            seed: self.seed,
            chat_share: self.chat_share,
            n_parallel: self.n_parallel,
            start: self.start,
        }
    }

    /// Number of tokens that the model writes itself, including held-out ones.
    pub fn self_written(&self) -> usize {
        let n_self = self.n_self();
        if n_self > 0 { (n_self + held_out(n_self)) * self.n_ctx } else { 0 }
    }

    /// Number of windows to fit on, and of held-out windows, if there is enough text.
    pub fn expected(&self) -> (usize, usize) {
        let n_self = self.n_self();
        let sources = [n_self, self.n_windows - n_self];
        (self.n_windows, sources.into_iter().filter(|n| *n > 0).map(held_out).sum())
    }
}

/// Calibration windows: first those to fit on, then those held out.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Tokens of all windows, one after another.
    pub tokens: Vec<Token>,
    /// Number of windows to fit on.
    pub n_fit: usize,
    /// Number of held-out windows.
    pub n_held_out: usize,
    /// Number of fitted windows that the model wrote itself.
    pub n_self: usize,
}

impl Windows {
    /// Number of all windows.
    pub fn n_windows(&self) -> usize {
        self.n_fit + self.n_held_out
    }

    /// Number of held-out tokens from files, and of those that the model wrote, without the kind that is not
    /// there.
    pub fn held_out_sets(&self) -> Vec<usize> {
        let own = if self.n_self > 0 { held_out(self.n_self).min(self.n_held_out) } else { 0 };
        let sets = [self.n_held_out - own, own].into_iter().filter(|n| *n > 0);
        sets.map(|n| n * self.n_ctx).collect()
    }

    /// Tokens of the windows `windows`.
    pub fn tokens_of(&self, windows: Range<usize>) -> &[Token] {
        &self.tokens[windows.start * self.n_ctx..windows.end * self.n_ctx]
    }

    /// Held-out windows, to judge on.
    pub fn held_out(&self) -> Vec<&[Token]> {
        self.tokens_of(self.n_fit..self.n_windows()).chunks_exact(self.n_ctx).collect()
    }

    /// About `n_tokens` tokens in windows of `n_ctx`: the beginnings of windows that are spread evenly over
    /// those to fit on.
    pub fn sample(&self, n_tokens: usize, n_ctx: usize) -> Vec<Token> {
        self.beginnings(&spread(n_tokens.div_ceil(n_ctx), self.n_fit), n_ctx)
    }

    /// About `n_tokens` tokens in windows of `n_ctx`, an even number, whose second half repeats the first.
    /// Long text repeats itself, which short windows rarely show.
    pub fn sample_twice(&self, n_tokens: usize, n_ctx: usize) -> Vec<Token> {
        let halves = self.beginnings(&spread(n_tokens.div_ceil(n_ctx), self.n_fit), n_ctx / 2);
        halves.chunks_exact(n_ctx / 2).flat_map(|half| [half, half].concat()).collect()
    }

    /// Sample like [`Windows::sample`], from the windows that it leaves out when it takes `n_taken`; from
    /// all, if it takes all.
    pub fn sample_beside(&self, n_tokens: usize, n_ctx: usize, n_taken: usize) -> Vec<Token> {
        let taken = spread(n_taken, self.n_fit);
        let mut rest: Vec<usize> = (0..self.n_fit).filter(|i| !taken.contains(i)).collect();
        if rest.is_empty() {
            rest = taken;
        }
        let chosen = spread(n_tokens.div_ceil(n_ctx), rest.len()).into_iter().map(|i| rest[i]);
        self.beginnings(&chosen.collect::<Vec<_>>(), n_ctx)
    }

    /// First `n_ctx` tokens of each of these windows.
    fn beginnings(&self, windows: &[usize], n_ctx: usize) -> Vec<Token> {
        windows.iter().flat_map(|&i| &self.tokens_of(i..i + 1)[..n_ctx]).copied().collect()
    }

    /// Adds resampled copies of all fitted windows, which are fitted on, too.
    /// `resample_copies` holds them one after another, one or more per window. They come after the windows
    /// and before the held-out ones.
    pub fn with_copies(&self, resample_copies: &[Token]) -> Windows {
        let parts =
            [self.tokens_of(0..self.n_fit), resample_copies, self.tokens_of(self.n_fit..self.n_windows())];
        let tokens = parts.concat();
        let copies = 1 + resample_copies.len() / (self.n_fit * self.n_ctx);
        Windows { tokens, n_fit: copies * self.n_fit, n_self: copies * self.n_self, ..*self }
    }

    /// Next token at every position of `windows`; `None` at the end of a window.
    pub fn targets(&self, windows: Range<usize>) -> Vec<Option<Token>> {
        let tokens = self.tokens_of(windows);
        (0..tokens.len())
            .map(|i| if (i + 1) % self.n_ctx == 0 { None } else { Some(tokens[i + 1]) })
            .collect()
    }
}

/// Indices of `n` windows, at least one, that are spread evenly over `len`.
fn spread(n: usize, len: usize) -> Vec<usize> {
    let n = n.clamp(1, len);
    // Windows of different origin alternate, so that even steps might select one kind only.
    let odd = |i: usize| if len >= 2 * n { i % 2 } else { 0 };
    (0..n).map(|i| i * len / n + odd(i)).collect()
}

/// Spreads the last `n_last` windows evenly among the others, so that every part of the list holds both
/// kinds in proportion.
fn interleaved(mut windows: Vec<Vec<Token>>, n_last: usize) -> Vec<Vec<Token>> {
    let last = windows.split_off(windows.len() - n_last.min(windows.len()));
    let (n, m) = (windows.len(), last.len());
    let keyed = |list: Vec<Vec<Token>>, len: usize| {
        list.into_iter().enumerate().map(move |(i, w)| ((2 * i + 1) * (n + m) / len.max(1), w))
    };
    let mut all: Vec<_> = keyed(windows, n).chain(keyed(last, m)).collect();
    all.sort_by_key(|(key, _)| *key);
    all.into_iter().map(|(_, w)| w).collect()
}

/// `windows` to fit on, about `n_fit`, and the others, which are spread over the text like these.
fn apart(windows: Vec<Vec<Token>>, n_fit: usize) -> (Vec<Vec<Token>>, Vec<Vec<Token>>) {
    let every = windows.len().div_ceil(windows.len() - n_fit);
    let (mut fit, mut judge) = (Vec::new(), Vec::new());
    for (i, w) in windows.into_iter().enumerate() {
        if i % every == every - 1 || every == 1 { judge.push(w) } else { fit.push(w) }
    }
    (fit, judge)
}

/// Number of held-out windows for `n` windows to fit on.
fn held_out(n: usize) -> usize {
    (n / 8).clamp(1, 8)
}

/// Origin of windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Text files, which are read and tokenised.
    Files,
    /// Text that the model writes.
    Model,
}

/// Collects the windows of `recipe`, those from files first.
/// `progress` gets, for each origin, the tokens done and the tokens in all, and returns whether to go on.
/// `notes` gets warnings about the text for the user, one line each.
///
/// # Errors
/// [`CalibrateError`] if a file cannot be read, the text is too short, or libllama fails.
///
/// # Panics
/// If `n_ctx` or `n_windows` is 0.
pub fn collect(
    model: &LlamaModel,
    recipe: &Recipe,
    notes: &mut Vec<String>,
    mut progress: impl FnMut(Origin, usize, usize) -> bool,
) -> Result<Windows, CalibrateError> {
    assert!(recipe.n_ctx > 1 && recipe.n_windows > 0);
    let n_self = recipe.n_self();
    let (mut fit, mut judge) = (Vec::new(), Vec::new());
    if n_self < recipe.n_windows {
        let wanted = recipe.n_windows - n_self;
        let wanted_all = wanted + held_out(wanted);
        let n_tokens = wanted_all * recipe.n_ctx;
        let open = |path: &PathBuf| TextFile::open(path, recipe.encoding);
        let files = recipe.files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let special = recipe.parse_special;
        let found = text_windows(model, &files, special, recipe.n_ctx, wanted_all, &mut |done| {
            progress(Origin::Files, done, n_tokens)
        })?;
        if !special {
            notes.extend(text::markers(model, &files)?);
        }
        let n_fit = found.len() - held_out(found.len().min(wanted)).min(found.len() - 1);
        (fit, judge) = apart(found, n_fit);
    }
    if n_self > 0 {
        let mut told = |done: usize, total: usize| progress(Origin::Model, done, total);
        let mut own = generate(model, &recipe.schedule(n_self), recipe.n_threads, &mut told)?;
        judge.extend(own.split_off(n_self));
        fit.extend(own);
    }
    let fit = interleaved(fit, n_self);
    let (n_fit, n_held_out) = (fit.len(), judge.len());
    let tokens = fit.into_iter().chain(judge).flatten().collect();
    Ok(Windows { n_ctx: recipe.n_ctx, tokens, n_fit, n_held_out, n_self })
}
