//! Positions, and how far attention sees, from metadata.

use super::{ModelError, Traits};
use crate::ggml::RopeParams;
use crate::gguf::{GgufError, GgufFile, Value};

/// Attention to the last few tokens only, in some of the blocks.
#[derive(Clone, Debug)]
pub struct SlidingWindow {
    /// Tokens that a query sees, its own included.
    pub n_swa: usize,
    /// Whether a block's attention slides.
    pub blocks: Vec<bool>,
    /// Rotary embedding in those blocks: never stretched, with a base of its own.
    pub rope: RopeParams,
}

/// Rope parameters as llama.cpp derives them (`load_hparams`, `llama_context` constructor).
pub(super) fn read_rope(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    n_rot: usize,
    n_ctx_train: usize,
) -> Result<(RopeParams, bool), ModelError> {
    let f32_or =
        |suffix: &str, default: f32| Ok::<f32, GgufError>(file.get_f32(&key(suffix))?.unwrap_or(default));
    let scaling = file.get_str(&key("rope.scaling.type"))?.unwrap_or("linear");
    if !["none", "linear", "yarn", "longrope"].contains(&scaling) {
        let problem = format!("is {scaling:?}, which llama.cpp does not know");
        return Err(GgufError::BadKey { key: key("rope.scaling.type"), problem }.into());
    }
    let mut factor = f32_or("rope.scaling.factor", 0.0)?;
    if file.get(&key("rope.scaling.factor")).is_none() {
        factor = f32_or("rope.scale_linear", 0.0)?;
    }
    let freq_scale = if factor == 0.0 || scaling == "none" { 1.0 } else { 1.0 / factor };
    // With YaRN, llama.cpp multiplies by mscale and cancels the same factor that ggml applies again.
    let yarn = scaling == "yarn";
    let rope = RopeParams {
        n_rot,
        neox: traits.rope_neox,
        n_ctx_orig: file.get_u32(&key("rope.scaling.original_context_length"))?.unwrap_or(n_ctx_train),
        freq_base: f32_or("rope.freq_base", 10000.0)?,
        freq_scale,
        ext_factor: if yarn { 1.0 } else { 0.0 },
        attn_factor: yarn_magnitude(yarn, freq_scale) * f32_or("rope.scaling.attn_factor", 1.0)?,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    Ok((rope, scaling == "longrope"))
}

/// `yarn_attn_factor` of llama.cpp before the model's own factor: mscale(factor) divided by what
/// ggml's YaRN multiplies by.
fn yarn_magnitude(yarn: bool, freq_scale: f32) -> f32 {
    if !yarn {
        return 1.0;
    }
    let factor = 1.0 / freq_scale;
    let mscale = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
    mscale / (1.0 + 0.1 * factor.ln())
}

/// The sliding window, if the family has one and the metadata gives its length. `rope` is that of the other
/// blocks (llama.cpp: `load_swa_pattern`, `set_swa_pattern`, `get_rope_freq_base`, `get_rope_freq_scale`).
pub(super) fn read_sliding(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    n_layer: usize,
    rope: &RopeParams,
) -> Result<Option<SlidingWindow>, ModelError> {
    let n_swa = file.get_u32(&key("attention.sliding_window"))?.unwrap_or(0);
    let Some(pattern) = traits.sliding_pattern.filter(|_| n_swa > 0) else {
        return Ok(None);
    };
    for suffix in ["attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"] {
        let n = file.get_u32(&key(suffix))?.unwrap_or(rope.n_rot);
        if n != rope.n_rot {
            let problem = format!("is {n}, but other blocks have {}", rope.n_rot);
            return Err(GgufError::BadKey { key: key(suffix), problem }.into());
        }
    }
    let pattern_key = key("attention.sliding_window_pattern");
    let blocks = match file.get(&pattern_key) {
        Some(Value::Array { .. }) => {
            let each = file.get_per_block(&pattern_key, n_layer)?.unwrap_or_default();
            each.into_iter().map(|slides| slides != 0).collect()
        }
        _ => {
            let n = file.get_u32(&pattern_key)?.unwrap_or(pattern);
            (0..n_layer).map(|il| n == 0 || il % n < n - 1).collect()
        }
    };
    let freq_base = file.get_f32(&key("rope.freq_base_swa"))?.unwrap_or(10000.0);
    let rope = RopeParams { freq_base, freq_scale: 1.0, ..*rope };
    Ok(Some(SlidingWindow { n_swa, blocks, rope }))
}
