//! Evaluation of a file on a text by libllama, with the figures that a user of llama.cpp would measure.

use super::window::{Window, run_together, side_by_side};
use crate::ggml::{BatchToken, Context, GgmlError, LlamaModel, Token};
use crate::numeric::{Metrics, RowComparison, compare_rows, nll};
use crate::parallel::{Idle, each_telling};
use crate::text::{PIECE, TextError, TextFile};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::time::Instant;

/// Protocol that determines which tokens are scored, and after which context. Figures of the two are not
/// comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Protocol of `llama-perplexity`: BOS replaces the first token of each window if the tokenizer adds one,
    /// and the second half of each window is scored.
    Llama,
    /// Protocol of papers: no BOS, and all tokens of a window except the first are scored.
    Hf,
}

/// Upper bound of the bytes per token of nearly all texts, and smallest number of bytes that are read at a
/// time.
const BYTES_PER_TOKEN: usize = 8;
const LEAST_PIECE: usize = 16 << 10;

/// Numbers of tokens on which the speed of processing and of generation is measured: those of `llama-bench`'s
/// pp512, and half of tg128.
const PROMPT_TOKENS: usize = 512;
const WRITTEN_TOKENS: usize = 64;

/// Result of a file on a text.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation {
    /// Perplexity.
    pub ppl: f64,
    /// Standard error of the perplexity, as llama-perplexity prints it.
    pub ppl_error: f64,
    /// Number of scored tokens.
    pub n_scored: usize,
    /// Comparison with the base model, if there is one.
    pub compared: Option<Metrics>,
}

/// Speed in tokens per second.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Processed tokens (pp), many at a time.
    pub prompt: f64,
    /// Generated tokens (tg), one at a time.
    pub written: f64,
}

/// Error of an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// libllama failed.
    #[error(transparent)]
    Llama(#[from] GgmlError),
    /// A text file cannot be read, or is not text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// There is too little text.
    #[error("the text has {found} tokens; one window takes {needed}; give more text, or use shorter windows")]
    TooShort {
        /// Number of tokens of the text.
        found: usize,
        /// Number of tokens of a window.
        needed: usize,
    },
    /// The two files have different vocabularies.
    #[error("the files have {0} and {1} tokens in their vocabularies: they cannot be compared")]
    Vocabularies(usize, usize),
    /// Windows or tasks are longer than the context of the model.
    #[error("the model knows {most} positions, and {wanted} are asked for; use shorter windows or tasks")]
    TooLong {
        /// Largest number of positions of the model.
        most: usize,
        /// Requested number of positions.
        wanted: usize,
    },
    /// The file holds no tasks.
    #[error(
        "the file holds no tasks: six lines each, a context, the number of the right ending, four endings"
    )]
    NoTasks,
    /// Tasks are not in the format of `llama-perplexity --hellaswag`.
    #[error("line {line}: {problem}")]
    Tasks {
        /// Line of the file, counted from 1.
        line: usize,
        /// Description of the fault.
        problem: String,
    },
}

/// Windows of `n_ctx` tokens of `texts`, which are concatenated, at most `n_windows`.
/// A short text is tokenised as a whole, a long one piece by piece until there are enough windows. After each
/// piece that is not the last, `progress` receives the bytes read and their total, and returns whether to
/// continue. If not, the windows so far are returned.
///
/// # Errors
/// [`EvaluateError`] if there is no window, or a file cannot be read.
pub fn windows(
    model: &LlamaModel,
    texts: &[TextFile],
    protocol: Protocol,
    n_ctx: usize,
    n_windows: usize,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Vec<Vec<Token>>, EvaluateError> {
    let vocab = model.vocab();
    let bos = vocab.bos().filter(|_| protocol == Protocol::Llama && vocab.add_bos());
    let mut tokens: Vec<Token> = bos.into_iter().collect();
    let n_wanted = n_windows.saturating_mul(n_ctx);
    let n_bytes: u64 = texts.iter().map(TextFile::n_bytes).sum();
    let mut add = |text: &str, last: bool| {
        // llama.cpp removes one newline at the end of a file.
        let shorter = text.strip_suffix('\n').filter(|_| last && protocol == Protocol::Llama);
        tokens.extend(vocab.tokenize(shorter.unwrap_or(text), false)?);
        Ok::<_, GgmlError>(tokens.len() >= n_wanted)
    };
    if n_bytes <= PIECE as u64 {
        add(&texts.iter().map(TextFile::read).collect::<Result<String, _>>()?, true)?;
    } else {
        // Limits the bytes to about those of the windows.
        let most = n_wanted.saturating_mul(BYTES_PER_TOKEN).clamp(LEAST_PIECE, PIECE);
        let mut n_before = 0u64;
        'all: for text in texts {
            let mut pieces = text.pieces(most);
            while let Some(piece) = pieces.next() {
                let n_read = n_before + pieces.n_bytes();
                if add(&piece?, n_read == n_bytes)? || (n_read < n_bytes && !progress(n_read, n_bytes)) {
                    break 'all;
                }
            }
            n_before += text.n_bytes();
        }
    }
    let mut windows: Vec<Vec<Token>> =
        tokens.chunks_exact(n_ctx).take(n_windows).map(<[Token]>::to_vec).collect();
    if windows.is_empty() {
        return Err(EvaluateError::TooShort { found: tokens.len(), needed: n_ctx });
    }
    if let Some(bos) = bos {
        windows.iter_mut().for_each(|w| w[0] = bos);
    }
    Ok(windows)
}

/// Evaluates `model` on `windows` of one length, and compares it with `base` if that is given.
/// `progress` receives the number of windows done and the perplexity so far, and returns whether to continue.
/// If not, the results so far are returned.
///
/// # Errors
/// [`EvaluateError`] if libllama fails, or the two cannot be compared.
pub fn evaluate(
    model: &LlamaModel,
    base: Option<&LlamaModel>,
    windows: &[impl AsRef<[Token]>],
    protocol: Protocol,
    n_threads: usize,
    mut progress: impl FnMut(usize, f64) -> bool,
) -> Result<Evaluation, EvaluateError> {
    let n_ctx = windows[0].as_ref().len();
    fits(model, n_ctx)?;
    let first = match protocol {
        Protocol::Llama => n_ctx / 2,
        Protocol::Hf => 0,
    };
    let n_vocab = model.vocab().n_tokens();
    if let Some(other) = base.map(|b| b.vocab().n_tokens()).filter(|n| *n != n_vocab) {
        return Err(EvaluateError::Vocabularies(n_vocab, other));
    }
    let n_models = if base.is_some() { 2 } else { 1 };
    let n_windows = if model.is_offloaded() { 1 } else { windows.len() };
    let (at_once, n_threads) = side_by_side(n_windows, n_ctx, n_vocab, n_models, n_threads);
    let idle = Idle::default();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mut losses, mut compared) = (Vec::<f64>::new(), Vec::<RowComparison>::new());
    // Results of windows that were done before an earlier one.
    let mut early: BTreeMap<usize, Compared> = BTreeMap::new();
    let (mut n_done, mut goes_on) = (0, true);
    let work = |(i, window): (usize, &[Token]), tell: &dyn Fn((usize, Compared)) -> bool| {
        let of = |model| Window::new(model, n_ctx, n_threads);
        let (mut own, mut other) =
            idle.take(|| Ok::<_, GgmlError>((of(model)?, base.map(of).transpose()?)))?;
        let found = compare_window(&mut own, other.as_mut(), window, first)?;
        idle.put((own, other));
        tell((i, found));
        Ok::<_, GgmlError>(())
    };
    let items = windows.iter().map(AsRef::as_ref).enumerate().collect();
    each_telling(items, at_once, work, |(i, found)| {
        early.insert(i, found);
        while let Some((own, rows)) = early.remove(&n_done).filter(|_| goes_on) {
            losses.extend(own);
            compared.extend(rows);
            n_done += 1;
            goes_on = progress(n_done, mean(&losses).exp());
        }
        goes_on
    })?;
    let n = losses.len() as f64;
    let ppl = mean(&losses).exp();
    let variance = losses.iter().map(|l| l * l).sum::<f64>() / n - mean(&losses).powi(2);
    let compared = base.map(|_| Metrics::of(&compared));
    let ppl_error = ppl * (variance.max(0.0) / (n - 1.0).max(1.0)).sqrt();
    Ok(Evaluation { ppl, ppl_error, n_scored: losses.len(), compared })
}

/// Losses of a window's tokens, and their comparisons with the base model, if there is one.
type Compared = (Vec<f64>, Vec<RowComparison>);

/// Evaluates the positions of `window` from `first` on.
fn compare_window<'m>(
    own: &mut Window<'m>,
    other: Option<&mut Window<'m>>,
    window: &[Token],
    first: usize,
) -> Result<Compared, GgmlError> {
    let (mut losses, mut compared) = (Vec::new(), Vec::new());
    let Some(other) = other else {
        own.run(window, first, |at, rows| {
            let rows = rows.par_iter().zip(&window[at + 1..]);
            losses.par_extend(rows.map(|(row, &next)| nll(row, next as usize)));
        })?;
        return Ok((losses, compared));
    };
    run_together([own, other], window, first, |at, [own, base]| {
        let rows = own.par_iter().zip(&base).zip(&window[at + 1..]);
        compared.par_extend(rows.map(|((own, base), &next)| compare_rows(own, base, next as usize)));
    })?;
    losses.extend(compared.iter().map(|r: &RowComparison| r.nll));
    Ok((losses, compared))
}

/// Negative log-likelihoods under `model` of each token of a window except the first, in nats, by libllama.
///
/// # Errors
/// [`GgmlError`] if libllama fails.
pub fn llama_losses(model: &LlamaModel, tokens: &[Token], n_threads: usize) -> Result<Vec<f64>, GgmlError> {
    let mut losses = Vec::with_capacity(tokens.len());
    Window::new(model, tokens.len(), n_threads)?.run(tokens, 0, |at, rows| {
        losses.extend(rows.iter().zip(&tokens[at + 1..]).map(|(row, &next)| nll(row, next as usize)));
    })?;
    Ok(losses)
}

/// Checks that a model has positions for `wanted` tokens.
fn fits(model: &LlamaModel, wanted: usize) -> Result<(), EvaluateError> {
    let most = model.n_ctx_train();
    if model.positions_are_learnt() && wanted > most {
        return Err(EvaluateError::TooLong { most, wanted });
    }
    Ok(())
}

/// Speed at which `model` processes and generates tokens: the best of three measurements each.
///
/// # Errors
/// [`EvaluateError`] if libllama fails.
pub fn speed(model: &LlamaModel, n_threads: usize) -> Result<Speed, EvaluateError> {
    // A model with few positions processes fewer tokens.
    let room = if model.positions_are_learnt() { model.n_ctx_train() } else { usize::MAX };
    let n = PROMPT_TOKENS.min(room.saturating_sub(WRITTEN_TOKENS)).max(1);
    let mut context = Context::new(model, n + WRITTEN_TOKENS, 1, n, n_threads)?;
    let n_vocab = model.vocab().n_tokens();
    let token = |i: usize| BatchToken { token: (i * 7919 % n_vocab) as Token, pos: i as i32, seq: 0 };
    let prompt: Vec<BatchToken> = (0..n).map(token).collect();
    let mut best = [0.0f64; 2];
    // The first round warms up.
    for round in 0..4 {
        context.clear();
        let start = Instant::now();
        context.decode_quietly(&prompt)?;
        let read = n as f64 / start.elapsed().as_secs_f64();
        let start = Instant::now();
        for i in 0..WRITTEN_TOKENS {
            context.decode_quietly(&[token(n + i)])?;
        }
        let wrote = WRITTEN_TOKENS as f64 / start.elapsed().as_secs_f64();
        if round > 0 {
            best = [best[0].max(read), best[1].max(wrote)];
        }
    }
    Ok(Speed { prompt: best[0], written: best[1] })
}

/// Greedy continuation of `prompt` by `model`: `n` tokens, or fewer if it ends earlier.
///
/// # Errors
/// [`GgmlError`] if libllama fails.
pub fn continuation(
    model: &LlamaModel,
    prompt: &[Token],
    n: usize,
    n_threads: usize,
) -> Result<String, GgmlError> {
    let vocab = model.vocab();
    let room = if model.positions_are_learnt() { model.n_ctx_train() } else { usize::MAX };
    let n = n.min(room.saturating_sub(prompt.len()));
    let mut context = Context::new(model, prompt.len() + n, 1, prompt.len(), n_threads)?;
    let (mut batch, mut written) = (prompt.to_vec(), Vec::new());
    let mut pos = 0;
    while written.len() < n {
        let tokens = batch.iter().enumerate();
        let tokens: Vec<_> =
            tokens.map(|(i, &token)| BatchToken { token, pos: pos + i as i32, seq: 0 }).collect();
        context.decode(&tokens)?;
        pos += tokens.len() as i32;
        let logits = context.logits(tokens.len() - 1);
        let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        let token = likeliest as Token;
        if vocab.is_eog(token) {
            break;
        }
        written.push(token);
        batch = vec![token];
    }
    Ok(vocab.detokenize(&written))
}

/// Multiple-choice task: a context with endings to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    context: String,
    endings: Vec<String>,
    right: usize,
}

/// Number of endings per task.
const N_ENDINGS: usize = 4;

/// Parses tasks in the format of `llama-perplexity --hellaswag`: six lines each, the context, the number of
/// the right ending, and four endings.
///
/// # Errors
/// [`EvaluateError::Tasks`] with the line at fault.
pub fn tasks(text: &str) -> Result<Vec<Task>, EvaluateError> {
    let lines: Vec<&str> = text.lines().collect();
    if text.trim().is_empty() {
        return Err(EvaluateError::NoTasks);
    }
    let bad = |line: usize, problem: String| Err(EvaluateError::Tasks { line: line + 1, problem });
    let mut tasks = Vec::new();
    for (i, task) in lines.chunks(2 + N_ENDINGS).enumerate() {
        let first = i * (2 + N_ENDINGS);
        let [context, right, endings @ ..] = task else {
            return bad(
                first,
                "a task has six lines: context, number of the right ending, four endings".into(),
            );
        };
        if endings.len() < N_ENDINGS {
            return bad(first + task.len() - 1, "the last task has less than six lines".into());
        }
        match right.trim().parse() {
            Ok(right) if right < N_ENDINGS => {
                let endings = endings.iter().map(|e| e.to_string()).collect();
                tasks.push(Task { context: context.to_string(), endings, right });
            }
            _ => return bad(first + 1, format!("{right:?} is not the number of an ending, 0 to 3")),
        }
    }
    Ok(tasks)
}

/// Share of `tasks` whose right ending is the likeliest per token (`hellaswag_score` of llama.cpp, acc_norm).
/// `progress` receives the number of tasks done and the share so far, and returns whether to continue.
///
/// # Errors
/// [`EvaluateError`] if libllama fails.
pub fn accuracy(
    model: &LlamaModel,
    tasks: &[Task],
    n_threads: usize,
    mut progress: impl FnMut(usize, f64) -> bool,
) -> Result<f64, EvaluateError> {
    let vocab = model.vocab();
    let bos = vocab.bos().filter(|_| vocab.add_bos());
    let (mut right, mut share) = (0, 0.0);
    for (i, task) in tasks.iter().enumerate() {
        let texts: Vec<Vec<Token>> = task
            .endings
            .iter()
            .map(|e| {
                Ok(bos.into_iter().chain(vocab.tokenize(&format!("{} {e}", task.context), false)?).collect())
            })
            .collect::<Result<_, GgmlError>>()?;
        // The common beginning of all endings is not scored.
        let given = (0..)
            .take_while(|&j| texts.iter().all(|t| t.len() > j + 1 && t[j] == texts[0][j]))
            .count()
            .max(1);
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        fits(model, longest)?;
        let mut window = Window::new(model, longest, n_threads)?;
        let mut best = (f64::INFINITY, 0);
        for (ending, tokens) in texts.iter().enumerate() {
            let mut sum = 0.0;
            window.run(tokens, given - 1, |at, rows| {
                let rows = rows.iter().zip(&tokens[at + 1..]);
                sum += rows.map(|(row, &next)| nll(row, next as usize)).sum::<f64>();
            })?;
            let per_token = sum / (tokens.len() - given) as f64;
            if per_token < best.0 {
                best = (per_token, ending);
            }
        }
        right += usize::from(best.1 == task.right);
        share = right as f64 / (i + 1) as f64;
        if !progress(i + 1, share) {
            break;
        }
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_six_lines_each() {
        let text = "A man\n2\nruns.\nsleeps.\neats.\nsings.\nA dog\n0\nbarks.\nb\nc\nd\n";
        let found = tasks(text).unwrap();
        assert_eq!((found.len(), found[0].right, found[1].endings[0].as_str()), (2, 2, "barks."));
        let line = |text: &str| match tasks(text) {
            Err(EvaluateError::Tasks { line, .. }) => line,
            other => panic!("{other:?}"),
        };
        assert_eq!(line("A\n4\na\nb\nc\nd\n"), 2);
        assert_eq!(line("A\n1\na\nb\nc\n"), 5);
        assert_eq!(line("A\n"), 1);
    }
}
