//! Positions and sliding windows, from metadata.

use super::ModelError;
use super::traits::{RopeFactors, SlidingRope, Traits};
use crate::ggml::RopeParams;
use crate::gguf::{GgufError, GgufFile, Value};

/// Sliding-window attention: some blocks attend only to the last few tokens.
#[derive(Clone, Debug)]
pub struct SlidingWindow {
    /// Number of tokens that a query sees, including its own.
    pub n_swa: usize,
    /// Whether each block's attention slides.
    pub blocks: Vec<bool>,
    /// Rotary embedding in the sliding blocks.
    pub rope: RopeParams,
}

/// Reads the rope parameters as llama.cpp derives them (`load_hparams`, `llama_context` constructor).
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
    let yarn = scaling == "yarn";
    let yarn_key = |suffix: &str, default: f32| match traits.yarn_keys {
        true => f32_or(&format!("rope.scaling.{suffix}"), default),
        false => Ok(default),
    };
    let rope = RopeParams {
        n_rot,
        neox: traits.positions.neox(),
        n_ctx_orig: file.get_u32(&key("rope.scaling.original_context_length"))?.unwrap_or(n_ctx_train),
        freq_base: f32_or("rope.freq_base", 10000.0)?,
        freq_scale,
        ext_factor: if yarn { 1.0 } else { 0.0 },
        attn_factor: yarn_magnitude(yarn, freq_scale, yarn_key("yarn_log_multiplier", 0.0)?)
            * f32_or("rope.scaling.attn_factor", 1.0)?,
        beta_fast: yarn_key("yarn_beta_fast", BETA_FAST)?,
        beta_slow: yarn_key("yarn_beta_slow", BETA_SLOW)?,
    };
    let longrope = match traits.rope_factors {
        RopeFactors::None => false,
        RopeFactors::ByType => scaling == "longrope",
        RopeFactors::Long => true,
    };
    Ok((rope, longrope))
}

/// Default bounds of YaRN.
pub(super) const BETA_FAST: f32 = 32.0;
pub(super) const BETA_SLOW: f32 = 1.0;

/// Magnitude factor of YaRN: `yarn_attn_factor` of llama.cpp before the model's own factor.
/// It is mscale(factor), divided by the mscale of all dimensions if they have a multiplier, and divided by
/// the factor that ggml's YaRN applies.
fn yarn_magnitude(yarn: bool, freq_scale: f32, log_multiplier: f32) -> f32 {
    if !yarn {
        return 1.0;
    }
    let factor = 1.0 / freq_scale;
    let mscale = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let all = if log_multiplier == 0.0 { 1.0 } else { mscale(log_multiplier) };
    mscale(1.0) / all / (1.0 + 0.1 * factor.ln())
}

/// Reads the sliding window, if the family has one and the metadata gives its length.
/// `rope` is that of the other blocks (llama.cpp: `load_swa_pattern`, `set_swa_pattern`,
/// `get_rope_freq_base`, `get_rope_freq_scale`).
pub(super) fn read_sliding(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    n_layer: usize,
    rope: &RopeParams,
) -> Result<Option<SlidingWindow>, ModelError> {
    let Some(sliding) = traits.sliding.filter(|s| s.n_layer.is_none_or(|n| n == n_layer)) else {
        return Ok(None);
    };
    let n_swa = file.get_u32(&key("attention.sliding_window"))?.or(sliding.n_swa).unwrap_or(0);
    if n_swa == 0 {
        return Ok(None);
    }
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
            let n = file.get_u32(&pattern_key)?.unwrap_or(sliding.pattern);
            (0..n_layer).map(|il| n == 0 || il % n < n - 1).collect()
        }
    };
    let own_base =
        |default: f32| Ok::<_, GgufError>(file.get_f32(&key("rope.freq_base_swa"))?.unwrap_or(default));
    let rope = match sliding.rope {
        SlidingRope::Same => *rope,
        SlidingRope::SameOrBase => RopeParams { freq_base: own_base(rope.freq_base)?, ..*rope },
        SlidingRope::Base(default) => RopeParams { freq_base: own_base(default)?, freq_scale: 1.0, ..*rope },
        SlidingRope::Plain => RopeParams { freq_scale: 1.0, ext_factor: 0.0, attn_factor: 1.0, ..*rope },
    };
    Ok(Some(SlidingWindow { n_swa, blocks, rope }))
}
