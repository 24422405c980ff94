//! Windows from text files, tokenised by libllama.

use super::CalibrateError;
use crate::ggml::{LlamaModel, Token, Vocab};
use crate::text::{PIECE, TextError, TextFile};
use std::path::PathBuf;

/// Upper limit of a text's bytes per token that nearly always holds: English has 4 to 5.
const BYTES_PER_TOKEN: usize = 8;

/// Smallest first excerpt in bytes: the rest of a line is dropped from its start.
const LEAST_EXCERPT: usize = 4096;

/// Bytes at the beginning of the text that are searched for chat markers.
const MARKER_BYTES: usize = 16 << 10;

/// Largest number of markers that a note names.
const NAMED_MARKERS: usize = 3;

/// Runs [`text_windows`] on UTF-8 `files`, without special tokens.
///
/// # Errors
/// [`CalibrateError`] if a file cannot be read or there is not enough text for two windows.
pub fn file_windows(
    model: &LlamaModel,
    files: &[PathBuf],
    n_ctx: usize,
    wanted: usize,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let open = |path: &PathBuf| TextFile::open(path, None);
    let files = files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    text_windows(model, &files, false, n_ctx, wanted, &mut |_| true)
}

/// Up to `wanted` windows of `n_ctx` tokens from `files`, spread evenly over the text.
///
/// Each begins with BOS if the tokenizer adds one. With `parse_special`, names of special tokens are read
/// as these tokens. A short text is tokenised as a whole. Of a long one, only a part at the place of each
/// window is tokenised, so that memory does not grow with the text. `progress` gets about how many of the
/// `wanted * n_ctx` tokens are done, and returns whether to go on.
///
/// # Errors
/// [`CalibrateError`] if a file cannot be read or there is not enough text for two windows.
pub fn text_windows(
    model: &LlamaModel,
    files: &[TextFile],
    parse_special: bool,
    n_ctx: usize,
    wanted: usize,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<Vec<Token>>, CalibrateError> {
    let vocab = model.vocab();
    let bos = vocab.bos().filter(|_| vocab.add_bos());
    let body = n_ctx - usize::from(bos.is_some());
    let n_bytes: u64 = files.iter().map(TextFile::n_bytes).sum();
    let most = BYTES_PER_TOKEN.saturating_mul(wanted).saturating_mul(body).max(PIECE);
    let mut read = Reader { vocab, parse_special, body, wanted, found: 0 };
    let bodies = if n_bytes <= most as u64 {
        read.spread_over(files, n_bytes, &mut |done| progress(done * n_ctx / body))?
    } else {
        read.at_places(files, n_bytes, &mut |done| progress(done * n_ctx / body))?
    };
    if bodies.len() < 2 {
        return Err(CalibrateError::TooShort { found: read.found, needed: 2 * body, n_ctx });
    }
    Ok(bodies.into_iter().map(|tokens| bos.into_iter().chain(tokens).collect()).collect())
}

/// Reader of windows without their BOS.
struct Reader<'m> {
    vocab: Vocab<'m>,
    parse_special: bool,
    /// Number of tokens of a window without its BOS.
    body: usize,
    /// Largest number of windows.
    wanted: usize,
    /// Number of tokens found so far.
    found: usize,
}

impl Reader<'_> {
    /// Windows spread over the tokens of all files.
    fn spread_over(
        &mut self,
        files: &[TextFile],
        n_bytes: u64,
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Vec<Vec<Token>>, CalibrateError> {
        let (body, all) = (self.body, self.wanted * self.body);
        let (mut tokens, mut n_before) = (Vec::new(), 0u64);
        for file in files {
            let mut pieces = file.pieces(PIECE);
            while let Some(piece) = pieces.next() {
                tokens.extend(self.vocab.tokenize(&piece?, self.parse_special)?);
                let share = (n_before + pieces.n_bytes()) as f64 / n_bytes.max(1) as f64;
                if !progress((share * all as f64) as usize) {
                    return Err(CalibrateError::Interrupted);
                }
            }
            n_before += file.n_bytes();
        }
        self.found = tokens.len();
        let available = tokens.len() / body;
        let n = self.wanted.min(available);
        let starts = (0..n).map(|i| i * available / n * body);
        Ok(starts.map(|start| tokens[start..start + body].to_vec()).collect())
    }

    /// Windows at places spread over the bytes of all files; none if the text up to the next place is too
    /// short.
    fn at_places(
        &mut self,
        files: &[TextFile],
        n_bytes: u64,
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Vec<Vec<Token>>, CalibrateError> {
        let place = |i: usize| (u128::from(n_bytes) * i as u128 / self.wanted as u128) as u64;
        let places: Vec<(u64, u64)> = (0..self.wanted).map(|i| (place(i), place(i + 1))).collect();
        let mut windows = Vec::new();
        for (i, (from, to)) in places.into_iter().enumerate() {
            windows.extend(self.at(files, from, to)?);
            if !progress((i + 1) * self.body) {
                return Err(CalibrateError::Interrupted);
            }
        }
        Ok(windows)
    }

    /// First tokens of the text between two places, from the beginning of a line if one begins soon.
    fn at(&mut self, files: &[TextFile], from: u64, to: u64) -> Result<Option<Vec<Token>>, CalibrateError> {
        let most = usize::try_from(to - from).unwrap_or(PIECE).min(PIECE);
        let mut n_bytes = (BYTES_PER_TOKEN * self.body).max(LEAST_EXCERPT).min(most);
        loop {
            let text = excerpt(files, from, n_bytes)?;
            let line = if from == 0 { None } else { text.find('\n').map(|i| i + 1) };
            let start = line.filter(|start| 2 * start <= text.len()).unwrap_or(0);
            let mut tokens = self.vocab.tokenize(&text[start..], self.parse_special)?;
            let last = n_bytes == most;
            // The last token of an excerpt may be part of a longer one.
            if tokens.len() > self.body || (last && tokens.len() == self.body) {
                self.found += self.body;
                tokens.truncate(self.body);
                return Ok(Some(tokens));
            }
            if last {
                self.found += tokens.len();
                return Ok(None);
            }
            n_bytes = (2 * n_bytes).min(most);
        }
    }
}

/// Up to `n_bytes` bytes of text from byte `from` on of all files, taken as one.
fn excerpt(files: &[TextFile], from: u64, n_bytes: usize) -> Result<String, TextError> {
    let (mut text, mut from, mut left) = (String::new(), from, n_bytes);
    for file in files {
        if from >= file.n_bytes() {
            from -= file.n_bytes();
            continue;
        }
        let n = usize::try_from(file.n_bytes() - from).unwrap_or(left).min(left);
        text += &file.excerpt(from, n)?;
        (from, left) = (0, left - n);
        if left == 0 {
            break;
        }
    }
    Ok(text)
}

/// Note for a text that begins with names of the model's special tokens, which are read as text.
pub(super) fn markers(model: &LlamaModel, files: &[TextFile]) -> Result<Option<String>, CalibrateError> {
    let vocab = model.vocab();
    let text = excerpt(files, 0, MARKER_BYTES)?;
    let (plain, parsed) = (vocab.tokenize(&text, false)?, vocab.tokenize(&text, true)?);
    let mut named: Vec<String> = Vec::new();
    for token in parsed {
        // Words next to a marker may be split differently, too; a marker stands in brackets of some kind.
        let name = String::from_utf8_lossy(&vocab.piece(token)).into_owned();
        let framed = |c: Option<char>| c.is_some_and(|c| c.is_ascii_punctuation());
        let marker = name.len() > 2 && framed(name.chars().next()) && framed(name.chars().next_back());
        if marker && !named.contains(&name) && !plain.contains(&token) && text.contains(&name) {
            named.push(name);
            if named.len() == NAMED_MARKERS {
                break;
            }
        }
    }
    Ok((!named.is_empty()).then(|| {
        format!(
            "the calibration text has chat markers such as {}, which were read as plain text; let special tokens be parsed \
             if it is made of conversations",
            named.join(" ")
        )
    }))
}
