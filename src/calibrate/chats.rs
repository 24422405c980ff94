//! Windows from conversations in the model's own chat template.

use super::CalibrateError;
use crate::ggml::{LlamaModel, Token};
use crate::text::{TextError, TextFile};
use serde::Deserialize;
use std::path::Path;

/// One line of a file of conversations, as chat services and fine-tuning tools write them.
#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Message>,
}

/// One message. Thinking and calls of tools are part of its content, in the model's own markup.
#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// Up to `wanted` windows of `n_ctx` tokens, from the conversations of a file one after another.
/// Each line is a JSON object with `messages`, each of which has a `role` and a `content`. Names of special
/// tokens are read as these tokens.
///
/// # Errors
/// [`CalibrateError`] if a line is no conversation, the model has no template that libllama knows, or there
/// are not enough tokens for two windows.
pub(super) fn windows(
    model: &LlamaModel,
    path: &Path,
    n_ctx: usize,
    wanted: usize,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let bos = vocab.bos().filter(|_| vocab.add_bos());
    let body = n_ctx - usize::from(bos.is_some());
    let text = TextFile::open(path, None)?.read()?;
    let mut tokens: Vec<Token> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |problem: String| TextError::Conversation { path: path.into(), line: i + 1, problem };
        let c: Conversation = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        let messages: Vec<(&str, &str)> =
            c.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        let formatted = model.chat(&messages, false).ok_or(CalibrateError::NoTemplate)?;
        tokens.extend(vocab.tokenize(&formatted, true)?);
    }
    let available = tokens.len() / body;
    if available < 2 {
        return Err(CalibrateError::TooShort { found: tokens.len(), needed: 2 * body, n_ctx });
    }
    let n = wanted.min(available);
    let starts = (0..n).map(|i| i * available / n * body);
    Ok(starts.map(|s| bos.into_iter().chain(tokens[s..s + body].iter().copied()).collect()).collect())
}
