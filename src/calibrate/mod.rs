//! Where calibration tokens come from: the model itself, text files, or both.
//!
//! All windows have one length. The last ones are held out: they pass through the model like the
//! others, but nothing is fitted to them, so they can judge; tuning asks them once whether it was of use.

mod generate;
mod oddities;
mod text;

pub use generate::{Schedule, generate};
pub use oddities::oddities;
pub use text::{file_windows, text_windows};

use crate::ggml::{GgmlError, LlamaModel, Token};
use crate::text::{Encoding, TextError, TextFile};
use std::ops::Range;
use std::path::PathBuf;

/// Why there are no calibration tokens.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// A text file cannot be read, or is not text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A text file is too short.
    #[error(
        "the text has {found} tokens; at least {needed} are needed for windows of {n_ctx} (lower --ctx-size, or give more text)"
    )]
    TooShort {
        /// Tokens in all files.
        found: usize,
        /// Two windows' worth.
        needed: usize,
        /// Tokens per window.
        n_ctx: usize,
    },
    /// The model has neither a BOS nor an EOS token to begin with.
    #[error(
        "the model names no start token to begin its own text from; give it a text to calibrate on, and no share of its own"
    )]
    NoStart,
    /// Conversations were asked for, and there is no template for them.
    #[error("the model has no chat template that llama.cpp's core knows; leave out --chat-share")]
    NoTemplate,
    /// The progress callback asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// libllama failed.
    #[error(transparent)]
    Llama(#[from] GgmlError),
}

/// What to calibrate on.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Tokens per window.
    pub n_ctx: usize,
    /// Windows to fit on, from all sources together.
    pub n_windows: usize,
    /// Text files.
    pub files: Vec<PathBuf>,
    /// Encoding of the files that have no byte-order mark, if it is not UTF-8.
    pub encoding: Option<Encoding>,
    /// Read the names of special tokens in the files, such as `<|im_end|>`, as these tokens.
    pub parse_special: bool,
    /// The token that self-written text begins with; without it, the BOS or else the EOS that libllama names, which are
    /// words in a vocabulary that has none.
    pub start: Option<Token>,
    /// Share of the windows that the model writes itself, 0 to 1.
    pub self_share: f64,
    /// Share of those that are conversations in the model's chat template.
    pub chat_share: f64,
    /// Seed of the sampling.
    pub seed: u64,
    /// Threads for generating.
    pub n_threads: usize,
    /// Windows that are generated side by side at most: each has a KV cache.
    pub n_parallel: usize,
}

impl Default for Recipe {
    /// 16384 tokens that the model writes itself, on all cores.
    fn default() -> Recipe {
        Recipe {
            n_ctx: 512,
            n_windows: 32,
            files: Vec::new(),
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
    /// How many windows the model writes itself.
    fn n_self(&self) -> usize {
        let share = if self.files.is_empty() { 1.0 } else { self.self_share };
        let n_self = (self.n_windows as f64 * share).round() as usize;
        // Whoever asks for a mixture gets some of each.
        if share > 0.0 && share < 1.0 { n_self.clamp(1, (self.n_windows - 1).max(1)) } else { n_self }
    }

    /// Tokens that the model writes itself.
    pub fn self_written(&self) -> usize {
        let n_self = self.n_self();
        if n_self > 0 { (n_self + held_out(n_self)) * self.n_ctx } else { 0 }
    }

    /// Windows to fit on, and windows held out, if there is text enough.
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
    /// All windows one after another.
    pub tokens: Vec<Token>,
    /// Windows to fit on.
    pub n_fit: usize,
    /// Windows held out.
    pub n_held_out: usize,
    /// How many of the fitted windows the model wrote itself.
    pub n_self: usize,
}

impl Windows {
    /// All windows.
    pub fn n_windows(&self) -> usize {
        self.n_fit + self.n_held_out
    }

    /// Tokens of the windows `windows`.
    pub fn tokens_of(&self, windows: Range<usize>) -> &[Token] {
        &self.tokens[windows.start * self.n_ctx..windows.end * self.n_ctx]
    }

    /// The windows to judge on.
    pub fn held_out(&self) -> Vec<&[Token]> {
        self.tokens_of(self.n_fit..self.n_windows()).chunks_exact(self.n_ctx).collect()
    }

    /// About `n_tokens` tokens in windows of `n_ctx`, the beginnings of windows that are spread evenly
    /// over those to fit on.
    pub fn sample(&self, n_tokens: usize, n_ctx: usize) -> Vec<Token> {
        self.beginnings(&spread(n_tokens.div_ceil(n_ctx), self.n_fit), n_ctx)
    }

    /// The same in windows that are one half twice, of `n_ctx` tokens, an even number: text that repeats itself, as long text does
    /// and short windows hardly.
    pub fn sample_twice(&self, n_tokens: usize, n_ctx: usize) -> Vec<Token> {
        let halves = self.beginnings(&spread(n_tokens.div_ceil(n_ctx), self.n_fit), n_ctx / 2);
        halves.chunks_exact(n_ctx / 2).flat_map(|half| [half, half].concat()).collect()
    }

    /// Like [`Windows::sample`], of windows that it leaves out when it takes `n_taken`; of all, if it takes all.
    pub fn sample_beside(&self, n_tokens: usize, n_ctx: usize, n_taken: usize) -> Vec<Token> {
        let taken = spread(n_taken, self.n_fit);
        let mut rest: Vec<usize> = (0..self.n_fit).filter(|i| !taken.contains(i)).collect();
        if rest.is_empty() {
            rest = taken;
        }
        let chosen = spread(n_tokens.div_ceil(n_ctx), rest.len()).into_iter().map(|i| rest[i]);
        self.beginnings(&chosen.collect::<Vec<_>>(), n_ctx)
    }

    /// The first `n_ctx` tokens of these windows.
    fn beginnings(&self, windows: &[usize], n_ctx: usize) -> Vec<Token> {
        windows.iter().flat_map(|&i| &self.tokens_of(i..i + 1)[..n_ctx]).copied().collect()
    }

    /// With `twins` of all fitted windows, one after another, once or more often, which are fitted on, too: behind the windows,
    /// before those held out.
    pub fn with_twins(&self, twins: &[Token]) -> Windows {
        let parts = [self.tokens_of(0..self.n_fit), twins, self.tokens_of(self.n_fit..self.n_windows())];
        let tokens = parts.concat();
        let copies = 1 + twins.len() / (self.n_fit * self.n_ctx);
        Windows { tokens, n_fit: copies * self.n_fit, n_self: copies * self.n_self, ..*self }
    }

    /// The next token for every position of `windows`; none at the end of a window.
    pub fn targets(&self, windows: Range<usize>) -> Vec<Option<Token>> {
        let tokens = self.tokens_of(windows);
        (0..tokens.len())
            .map(|i| if (i + 1) % self.n_ctx == 0 { None } else { Some(tokens[i + 1]) })
            .collect()
    }
}

/// The numbers of `n` windows, at least one, that are spread evenly over `len`.
fn spread(n: usize, len: usize) -> Vec<usize> {
    let n = n.clamp(1, len);
    // Windows of different origin take turns, so that even steps might meet one kind only.
    let odd = |i: usize| if len >= 2 * n { i % 2 } else { 0 };
    (0..n).map(|i| i * len / n + odd(i)).collect()
}

/// The last `n_last` windows spread evenly among the others, so that every part of the list holds both
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

/// Held-out windows beside `n` windows to fit on.
fn held_out(n: usize) -> usize {
    (n / 8).clamp(1, 8)
}

/// Where windows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Text files are read and tokenised.
    Files,
    /// The model writes.
    Model,
}

/// Collects the windows of `recipe`, first those from files. `progress` is told, for each origin, how many of how many tokens
/// there are, and returns whether to go on. `notes` gets what the user should know about the text, a line each.
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
        // Windows to judge on are spread over the text like the others.
        let every = found.len().div_ceil(found.len() - n_fit);
        for (i, w) in found.into_iter().enumerate() {
            if i % every == every - 1 || every == 1 { judge.push(w) } else { fit.push(w) }
        }
    }
    if n_self > 0 {
        let schedule = Schedule {
            n_ctx: recipe.n_ctx,
            n_windows: n_self + held_out(n_self),
            seed: recipe.seed,
            chat_share: recipe.chat_share,
            n_parallel: recipe.n_parallel,
            start: recipe.start,
        };
        let mut told = |done: usize, total: usize| progress(Origin::Model, done, total);
        let mut own = generate(model, &schedule, recipe.n_threads, &mut told)?;
        judge.extend(own.split_off(n_self));
        fit.extend(own);
    }
    let fit = interleaved(fit, n_self);
    let (n_fit, n_held_out) = (fit.len(), judge.len());
    let tokens = fit.into_iter().chain(judge).flatten().collect();
    Ok(Windows { n_ctx: recipe.n_ctx, tokens, n_fit, n_held_out, n_self })
}
