//! The tokenizer of a model, by libllama.

use super::{GgmlError, Token};
use llama_cpp_sys_2 as sys;
use std::marker::PhantomData;

/// Bytes that a SentencePiece tokenizer gets at once.
const SPM_PART: usize = 8 << 10;

/// Tokenizer of a [`LlamaModel`](super::LlamaModel).
#[derive(Clone, Copy)]
pub struct Vocab<'m> {
    raw: *const sys::llama_vocab,
    /// The model owns the vocabulary.
    _model: PhantomData<&'m ()>,
}

// SAFETY: libllama's vocabularies are immutable after loading.
unsafe impl Send for Vocab<'_> {}
// SAFETY: as above.
unsafe impl Sync for Vocab<'_> {}

impl<'m> Vocab<'m> {
    /// The vocabulary `raw` of a model that lives for `'m`.
    pub(super) fn new(raw: *const sys::llama_vocab) -> Vocab<'m> {
        Vocab { raw, _model: PhantomData }
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> usize {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_n_tokens(self.raw) as usize }
    }

    /// Beginning-of-sequence token, if there is one.
    pub fn bos(&self) -> Option<Token> {
        // SAFETY: a live vocabulary.
        let t = unsafe { sys::llama_vocab_bos(self.raw) };
        (t >= 0).then_some(t)
    }

    /// End-of-sequence token, if there is one.
    pub fn eos(&self) -> Option<Token> {
        // SAFETY: a live vocabulary.
        let t = unsafe { sys::llama_vocab_eos(self.raw) };
        (t >= 0).then_some(t)
    }

    /// Whether the tokenizer puts the BOS token in front of a text.
    pub fn add_bos(&self) -> bool {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_get_add_bos(self.raw) }
    }

    /// Whether `token` ends a generation.
    pub fn is_eog(&self, token: Token) -> bool {
        // SAFETY: a live vocabulary; libllama accepts any number as a token.
        unsafe { sys::llama_vocab_is_eog(self.raw, token) }
    }

    /// Tokenises `text` without adding special tokens.
    /// With `parse_special`, text such as `<|im_end|>` becomes the special token of that name: for chat
    /// templates, not for a user's text.
    ///
    /// A SentencePiece tokenizer gets a long text in parts, each up to the end of a line. libllama's time
    /// for bytes without a token of their own grows with the square of the text
    /// (`llm_tokenizer_spm_session::resegment`).
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if the text is too long for one call (2 GiB) or the tokenizer fails.
    pub fn tokenize(&self, text: &str, parse_special: bool) -> Result<Vec<Token>, GgmlError> {
        // SAFETY: a live vocabulary.
        let ty = unsafe { sys::llama_vocab_type(self.raw) };
        if ty == sys::LLAMA_VOCAB_TYPE_NONE {
            return Err(GgmlError::Llama("finds no tokenizer in the model".into()));
        }
        if ty != sys::LLAMA_VOCAB_TYPE_SPM {
            return self.tokenize_at_once(text, parse_special);
        }
        let (mut tokens, mut rest) = (Vec::new(), text);
        while rest.len() > SPM_PART {
            let most = (0..=SPM_PART).rev().find(|&i| rest.is_char_boundary(i)).unwrap_or(0);
            let end = rest[..most].rfind('\n').map_or(most, |i| i + 1);
            tokens.extend(self.tokenize_at_once(&rest[..end], parse_special)?);
            rest = &rest[end..];
        }
        tokens.extend(self.tokenize_at_once(rest, parse_special)?);
        Ok(tokens)
    }

    fn tokenize_at_once(&self, text: &str, parse_special: bool) -> Result<Vec<Token>, GgmlError> {
        let too_long = |_| GgmlError::Llama("cannot tokenise 2 GiB at once".into());
        // Tokens are rarely shorter than a byte, except for added spaces.
        let mut tokens: Vec<Token> = vec![0; text.len() + 16];
        for _ in 0..2 {
            let (len, room) = (i32::try_from(text.len()), i32::try_from(tokens.len()));
            let (len, room) = (len.map_err(too_long)?, room.map_err(too_long)?);
            // SAFETY: text and buffer are passed with their lengths.
            let n = unsafe {
                let (text, tokens) = (text.as_ptr().cast(), tokens.as_mut_ptr());
                sys::llama_tokenize(self.raw, text, len, tokens, room, false, parse_special)
            };
            match n {
                0.. => {
                    tokens.truncate(n as usize);
                    return Ok(tokens);
                }
                i32::MIN => break,
                // libllama returns the negated number of tokens.
                _ => tokens.resize(n.unsigned_abs() as usize, 0),
            }
        }
        Err(GgmlError::Llama("failed to tokenise the text".into()))
    }

    /// Bytes that `token` stands for.
    pub fn piece(&self, token: Token) -> Vec<u8> {
        let mut buf = vec![0u8; 64];
        for _ in 0..2 {
            // SAFETY: the buffer is passed with its length; special tokens are rendered too.
            let n = unsafe {
                sys::llama_token_to_piece(self.raw, token, buf.as_mut_ptr().cast(), buf.len() as i32, 0, true)
            };
            if n >= 0 {
                buf.truncate(n as usize);
                return buf;
            }
            buf.resize(n.unsigned_abs() as usize, 0);
        }
        Vec::new()
    }

    /// Text of `tokens`; invalid UTF-8 is replaced.
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
