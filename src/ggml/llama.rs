//! Safe interface to libllama: the tokenizer, and the runtime that validates our files.

use super::GgmlError;
use super::device::Device;
use super::system::{init_once, logged_error, with_cause};
use super::vocab::Vocab;
use llama_cpp_sys_2 as sys;
use std::ffi::CString;
use std::path::Path;
use std::ptr::NonNull;

/// Token id.
pub type Token = i32;

/// Converts `path` to the string that libllama takes.
pub(super) fn c_path(path: &Path) -> Result<CString, GgmlError> {
    let text =
        path.to_str().ok_or_else(|| GgmlError::Llama(format!("cannot open {path:?}: not a UTF-8 path")))?;
    CString::new(text).map_err(|_| GgmlError::Llama(format!("cannot open {path:?}: NUL in path")))
}

/// Part of the model that libllama keeps on devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Devices; an empty list means the CPU alone.
    pub devices: Vec<Device>,
    /// Largest number of layers on the devices.
    pub n_layers: usize,
}

/// Model (or only its vocabulary) loaded by libllama.
pub struct LlamaModel {
    raw: NonNull<sys::llama_model>,
    offloaded: bool,
}

// SAFETY: libllama models are immutable after loading and may be shared between threads.
unsafe impl Send for LlamaModel {}
// SAFETY: as above.
unsafe impl Sync for LlamaModel {}

impl LlamaModel {
    /// Loads the whole model.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama refuses the file.
    pub fn load(path: &Path) -> Result<LlamaModel, GgmlError> {
        LlamaModel::open(path, false, true)
    }

    /// Loads only the vocabulary: enough for tokenising, fast and small.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama refuses the file.
    pub fn load_vocab(path: &Path) -> Result<LlamaModel, GgmlError> {
        LlamaModel::open(path, true, false)
    }

    /// Loads the model so that its weights stay in the mapped file.
    /// It is slower if libllama has faster kernels for weights in another order, which it would copy.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama refuses the file.
    pub fn load_mapped(path: &Path) -> Result<LlamaModel, GgmlError> {
        LlamaModel::open(path, false, false)
    }

    /// Loads the model with `offload.n_layers` of its layers on devices.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama refuses the file.
    pub fn load_on(path: &Path, offload: &Offload) -> Result<LlamaModel, GgmlError> {
        let ends = std::iter::once(std::ptr::null_mut());
        let mut devices: Vec<_> = offload.devices.iter().map(|d| d.raw()).chain(ends).collect();
        LlamaModel::open_with(path, |params| {
            params.devices = devices.as_mut_ptr();
            params.n_gpu_layers = i32::try_from(offload.n_layers).unwrap_or(i32::MAX);
        })
    }

    fn open(path: &Path, vocab_only: bool, repack: bool) -> Result<LlamaModel, GgmlError> {
        LlamaModel::open_with(path, |params| {
            params.vocab_only = vocab_only;
            params.use_extra_bufts = repack;
        })
    }

    /// Opens the model at `path` on the CPU, with the default parameters as changed by `set`.
    pub(super) fn open_with(
        path: &Path,
        set: impl FnOnce(&mut sys::llama_model_params),
    ) -> Result<LlamaModel, GgmlError> {
        init_once();
        let _ = logged_error();
        let c_path = c_path(path)?;
        // SAFETY: parameters are plain data.
        let mut params = unsafe { sys::llama_model_default_params() };
        // The list ends at once: libllama does not even look at a device.
        let mut no_devices = [std::ptr::null_mut()];
        params.devices = no_devices.as_mut_ptr();
        params.n_gpu_layers = 0;
        set(&mut params);
        let what = if params.vocab_only { "cannot read its vocabulary" } else { "does not load it" };
        // SAFETY: a valid C string; null is checked.
        let raw = unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) };
        let offloaded = params.n_gpu_layers > 0;
        NonNull::new(raw).map(|raw| LlamaModel { raw, offloaded }).ok_or_else(|| {
            // `error loading model: ` precedes the actual error.
            let reason = with_cause(what.into()).replace("error loading model: ", "");
            GgmlError::Load { path: path.into(), reason }
        })
    }

    /// Whether some of its layers are on devices.
    pub fn is_offloaded(&self) -> bool {
        self.offloaded
    }

    /// Context length that the model was trained for, in tokens.
    pub fn n_ctx_train(&self) -> usize {
        // SAFETY: a live model.
        usize::try_from(unsafe { sys::llama_model_n_ctx_train(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Whether each position has a learned embedding, so that the model knows only the positions that it
    /// was trained for.
    /// libllama stops the process on others.
    pub fn positions_are_learnt(&self) -> bool {
        // SAFETY: a live model.
        unsafe { sys::llama_model_rope_type(self.raw.as_ptr()) == sys::LLAMA_ROPE_TYPE_NONE }
    }

    /// Size of all weights in bytes.
    pub(super) fn n_bytes(&self) -> u64 {
        // SAFETY: a live model.
        unsafe { sys::llama_model_size(self.raw.as_ptr()) }
    }

    /// Makes a context as llama-cli does by default, for one sequence of `n_ctx` tokens, and drops it.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama cannot make it.
    pub(super) fn try_context(&self, n_ctx: usize) -> Result<(), GgmlError> {
        // SAFETY: parameters are plain data; null is checked; nothing else knows the context.
        unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = n_ctx as u32;
            params.swa_full = false;
            let raw = NonNull::new(sys::llama_init_from_model(self.raw.as_ptr(), params));
            let raw = raw.ok_or_else(|| {
                GgmlError::Llama(with_cause(format!("cannot make a context of {n_ctx} tokens")))
            })?;
            sys::llama_free(raw.as_ptr());
        }
        Ok(())
    }

    /// Formats `messages` (role and content each) in the model's own chat template, up to the start of the
    /// next reply if `open` is set.
    /// Returns `None` if the model has no template or libllama does not recognise it (it has the common
    /// ones built in and runs no Jinja).
    pub fn chat(&self, messages: &[(&str, &str)], open: bool) -> Option<String> {
        let c_string = |text: &str| CString::new(text).ok();
        let texts: Vec<(CString, CString)> =
            messages.iter().map(|(r, c)| Some((c_string(r)?, c_string(c)?))).collect::<Option<_>>()?;
        let message = |(role, content): &(CString, CString)| sys::llama_chat_message {
            role: role.as_ptr(),
            content: content.as_ptr(),
        };
        let raw: Vec<sys::llama_chat_message> = texts.iter().map(message).collect();
        let n_bytes: usize = texts.iter().map(|(_, content)| content.as_bytes().len()).sum();
        let mut text = vec![0u8; 2 * n_bytes + 1024];
        // SAFETY: the template is owned by a live model; messages and buffer outlive the calls, and the
        // buffer is passed with its length.
        unsafe {
            let template = sys::llama_model_chat_template(self.raw.as_ptr(), std::ptr::null());
            if template.is_null() {
                return None;
            }
            for _ in 0..2 {
                let n = sys::llama_chat_apply_template(
                    template,
                    raw.as_ptr(),
                    raw.len(),
                    open,
                    text.as_mut_ptr().cast(),
                    text.len() as i32,
                );
                let n = usize::try_from(n).ok()?;
                if n <= text.len() {
                    text.truncate(n);
                    return String::from_utf8(text).ok();
                }
                text.resize(n, 0);
            }
        }
        None
    }

    /// Tokenizer of the model.
    pub fn vocab(&self) -> Vocab<'_> {
        // SAFETY: a live model; the vocabulary lives as long as it.
        let raw = unsafe { sys::llama_model_get_vocab(self.raw.as_ptr()) };
        Vocab::new(raw)
    }
}

impl Drop for LlamaModel {
    fn drop(&mut self) {
        // SAFETY: loaded by us; contexts borrow the model and no longer exist.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

/// Token to decode.
#[derive(Clone, Copy, Debug)]
pub struct BatchToken {
    /// Token id.
    pub token: Token,
    /// Position in its sequence.
    pub pos: i32,
    /// Sequence id.
    pub seq: i32,
}

/// Context of libllama: KV cache and logits.
pub struct Context<'m> {
    raw: NonNull<sys::llama_context>,
    batch: sys::llama_batch,
    n_batch: usize,
    n_vocab: usize,
    /// Whether each token of the last batch has logits.
    has_logits: Vec<bool>,
    _model: &'m LlamaModel,
}

// SAFETY: a context may be used on any thread, by one at a time; the model is shared.
unsafe impl Send for Context<'_> {}

impl<'m> Context<'m> {
    /// Creates a context for `n_seq` sequences of `n_ctx` tokens each, which decodes at most `n_batch`
    /// tokens a call.
    /// Flash attention is left to libllama's choice.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama cannot make it (most often: memory).
    pub fn new(
        model: &'m LlamaModel,
        n_ctx: usize,
        n_seq: usize,
        n_batch: usize,
        n_threads: usize,
    ) -> Result<Self, GgmlError> {
        Context::with(model, n_ctx, n_seq, n_batch, n_threads, |_| {})
    }

    /// Creates a context as [`Context::new`] does, with its parameters as changed by `set`.
    pub(super) fn with(
        model: &'m LlamaModel,
        n_ctx: usize,
        n_seq: usize,
        n_batch: usize,
        n_threads: usize,
        set: impl FnOnce(&mut sys::llama_context_params),
    ) -> Result<Self, GgmlError> {
        // SAFETY: parameters are plain data; null is checked; the batch is freed with the context.
        unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = (n_ctx * n_seq) as u32;
            params.n_batch = n_batch as u32;
            params.n_ubatch = n_batch as u32;
            params.n_seq_max = n_seq as u32;
            params.n_threads = n_threads as i32;
            params.n_threads_batch = n_threads as i32;
            params.no_perf = true;
            params.op_offload = false;
            set(&mut params);
            let raw =
                NonNull::new(sys::llama_init_from_model(model.raw.as_ptr(), params)).ok_or_else(|| {
                    let message = format!("cannot make a context of {n_seq} x {n_ctx} tokens");
                    GgmlError::Llama(with_cause(message))
                })?;
            let batch = sys::llama_batch_init(n_batch as i32, 0, 1);
            let n_vocab = model.vocab().n_tokens();
            Ok(Context { raw, batch, n_batch, n_vocab, has_logits: Vec::new(), _model: model })
        }
    }

    /// Clears all sequences.
    pub fn clear(&mut self) {
        // SAFETY: a live context.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.raw.as_ptr()), false) }
    }

    /// Decodes `tokens`, with logits for each of them.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama fails.
    ///
    /// # Panics
    /// If there are more tokens than `n_batch`.
    pub fn decode(&mut self, tokens: &[BatchToken]) -> Result<(), GgmlError> {
        self.decode_at(tokens, |_| true)
    }

    /// Decodes `tokens`, with logits for the last only, as a chat does.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama fails.
    ///
    /// # Panics
    /// If there are more tokens than `n_batch`.
    pub fn decode_quietly(&mut self, tokens: &[BatchToken]) -> Result<(), GgmlError> {
        self.decode_at(tokens, |i| i + 1 == tokens.len())
    }

    /// Decodes `tokens`, with logits for those whose numbers `wanted` wants.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama fails.
    ///
    /// # Panics
    /// If there are more tokens than `n_batch`.
    pub fn decode_at(
        &mut self,
        tokens: &[BatchToken],
        wanted: impl Fn(usize) -> bool,
    ) -> Result<(), GgmlError> {
        assert!(tokens.len() <= self.n_batch);
        self.has_logits.clear();
        let has_logits: Vec<bool> = (0..tokens.len()).map(wanted).collect();
        // SAFETY: the batch has room for n_batch tokens with one sequence id each.
        let status = unsafe {
            for (i, t) in tokens.iter().enumerate() {
                *self.batch.token.add(i) = t.token;
                *self.batch.pos.add(i) = t.pos;
                *self.batch.n_seq_id.add(i) = 1;
                **self.batch.seq_id.add(i) = t.seq;
                *self.batch.logits.add(i) = i8::from(has_logits[i]);
            }
            self.batch.n_tokens = tokens.len() as i32;
            sys::llama_decode(self.raw.as_ptr(), self.batch)
        };
        if status != 0 {
            return Err(GgmlError::Llama(format!("failed to decode a batch (status {status})")));
        }
        self.has_logits = has_logits;
        Ok(())
    }

    /// Logits `[n_vocab]` of the i-th token of the last batch.
    ///
    /// # Panics
    /// If `i` is not a token of the last successful batch that has logits.
    pub fn logits(&self, i: usize) -> &[f32] {
        assert!(self.has_logits[i]);
        // SAFETY: logits are requested at this position; the pointer lives until the next decode, which
        // needs `&mut self`.
        unsafe {
            let p = sys::llama_get_logits_ith(self.raw.as_ptr(), i as i32);
            assert!(!p.is_null());
            std::slice::from_raw_parts(p, self.n_vocab)
        }
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` made both.
        unsafe {
            sys::llama_batch_free(self.batch);
            sys::llama_free(self.raw.as_ptr());
        }
    }
}
