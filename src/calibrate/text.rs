//! Windows from text files, tokenised by libllama.

use super::CalibrateError;
use crate::ggml::{LlamaModel, Token};
use std::path::PathBuf;

/// Up to `wanted` windows of `n_ctx` tokens from `files`, spread evenly over the text, each
/// beginning with BOS where the tokenizer adds one.
///
/// # Errors
/// [`CalibrateError`] if a file cannot be read or there is not enough text for two windows.
pub fn file_windows(
    model: &LlamaModel,
    files: &[PathBuf],
    n_ctx: usize,
    wanted: usize,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let mut tokens = Vec::new();
    for path in files {
        let bytes =
            std::fs::read(path).map_err(|source| CalibrateError::Io { path: path.clone(), source })?;
        tokens.extend(vocab.tokenize(&String::from_utf8_lossy(&bytes), false)?);
    }
    let bos = vocab.bos().filter(|_| vocab.add_bos());
    let body = n_ctx - usize::from(bos.is_some());
    let available = tokens.len() / body;
    if available < 2 {
        return Err(CalibrateError::TooShort { found: tokens.len(), needed: 2 * body, n_ctx });
    }
    let n = wanted.min(available);
    Ok((0..n)
        .map(|i| {
            let start = i * available / n * body;
            bos.into_iter().chain(tokens[start..start + body].iter().copied()).collect()
        })
        .collect())
}
