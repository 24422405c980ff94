//! Calibration texts that are kept apart: each with its own windows, weight and held-out part.

use super::{CalibrateError, Origin, Recipe, apart, chats, generate, held_out, text, text_windows};
use crate::ggml::{LlamaModel, Token};
use crate::text::TextFile;
use std::path::Path;

/// Text with its windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// Name: that of the file, or `self-generated`.
    pub name: String,
    /// Weight among the texts.
    pub weight: f64,
    /// Windows that statistics are taken of.
    pub fit: Vec<Vec<Token>>,
    /// Windows that only judge.
    pub held_out: Vec<Vec<Token>>,
}

/// Name of the text that the model generates.
const SELF_GENERATED: &str = "self-generated";

/// Number of windows to fit on, and weight, of each text file and of the text that the model generates.
struct Shares {
    files: Vec<(usize, f64)>,
    own: (usize, f64),
}

fn shares(recipe: &Recipe) -> Shares {
    let n_self = recipe.n_self();
    let rest = recipe.n_windows - n_self;
    let weight = |i: usize| recipe.weights.get(i).copied().unwrap_or(1.0);
    let all: f64 = (0..recipe.files.len()).map(weight).sum();
    let of_files = if n_self == 0 { 1.0 } else { 1.0 - recipe.self_share };
    let share = |i: usize| weight(i) / all;
    let n = |i: usize| ((rest as f64 * share(i)).round() as usize).max(1);
    let files = if rest == 0 { 0 } else { recipe.files.len() };
    Shares {
        files: (0..files).map(|i| (n(i), of_files * share(i))).collect(),
        own: (n_self, if files == 0 { 1.0 } else { recipe.self_share }),
    }
}

/// Number of windows to fit on, and of held-out windows, if there is enough text.
pub fn expected_texts(recipe: &Recipe) -> (usize, usize) {
    let shares = shares(recipe);
    let all = shares.files.iter().map(|f| f.0).chain([shares.own.0]).filter(|n| *n > 0);
    all.fold((0, 0), |(fit, held), n| (fit + n, held + held_out(n)))
}

/// Collects the texts of `recipe`, in an order that does not depend on the order of its files.
/// Files whose names end in `.jsonl` hold conversations. `progress` and `notes` are as in
/// [`collect`](super::collect).
///
/// # Errors
/// [`CalibrateError`] if a file cannot be read, a text is too short, or libllama fails.
pub fn collect_texts(
    model: &LlamaModel,
    recipe: &Recipe,
    notes: &mut Vec<String>,
    mut progress: impl FnMut(Origin, usize, usize) -> bool,
) -> Result<Vec<Text>, CalibrateError> {
    let shares = shares(recipe);
    let mut texts = Vec::new();
    let n_tokens = shares.files.iter().map(|(n, _)| (n + held_out(*n)) * recipe.n_ctx).sum();
    let mut before = 0;
    for (path, &(n, weight)) in recipe.files.iter().zip(&shares.files) {
        let wanted = n + held_out(n);
        let mut told = |done: usize| progress(Origin::Files, before + done, n_tokens);
        let windows = if is_chat(path) {
            chats::windows(model, path, recipe.n_ctx, wanted)?
        } else {
            let file = [TextFile::open(path, recipe.encoding)?];
            if !recipe.parse_special {
                notes.extend(text::markers(model, &file)?);
            }
            text_windows(model, &file, recipe.parse_special, recipe.n_ctx, wanted, &mut told)?
        };
        before += wanted * recipe.n_ctx;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        texts.push(split(name, weight, windows, n));
    }
    let (n_self, weight) = shares.own;
    if n_self > 0 {
        let mut told = |done: usize, total: usize| progress(Origin::Model, done, total);
        let windows = generate(model, &recipe.schedule(n_self), recipe.n_threads, &mut told)?;
        texts.push(split(SELF_GENERATED.into(), weight, windows, n_self));
    }
    texts.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.fit.cmp(&b.fit)));
    Ok(texts)
}

/// Whether a file holds conversations, one JSON object per line.
fn is_chat(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"))
}

/// Holds out some windows, spread evenly over the text, so that at most `n` are left to fit on.
fn split(name: String, weight: f64, windows: Vec<Vec<Token>>, n: usize) -> Text {
    let n_fit = windows.len() - held_out(windows.len().min(n)).min(windows.len() - 1);
    let (fit, held_out) = apart(windows, n_fit);
    Text { name, weight, fit, held_out }
}
