//! Rotary position embeddings, and the way back.

use super::{Graph, TensorId};
use llama_cpp_sys_2 as sys;

/// Parameters of a rotary position embedding, as `ggml_rope_ext` takes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParams {
    /// Rotated dimensions per head.
    pub n_rot: usize,
    /// Whether pairs are (j, j + n_rot/2) instead of (2j, 2j+1).
    pub neox: bool,
    /// Context length that the model was trained for, before scaling, in tokens.
    pub n_ctx_orig: usize,
    /// Base frequency.
    pub freq_base: f32,
    /// Frequency scale: the inverse of the linear scaling factor.
    pub freq_scale: f32,
    /// YaRN extrapolation mix; 0 without YaRN.
    pub ext_factor: f32,
    /// Magnitude factor.
    pub attn_factor: f32,
    /// YaRN high-frequency bound.
    pub beta_fast: f32,
    /// YaRN low-frequency bound.
    pub beta_slow: f32,
}

/// Value of GGML_ROPE_TYPE_NEOX.
const ROPE_TYPE_NEOX: i32 = 2;

/// Signature of ggml_rope_ext and ggml_rope_ext_back.
type RopeOp = unsafe extern "C" fn(
    *mut sys::ggml_context,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    i32,
    i32,
    i32,
    f32,
    f32,
    f32,
    f32,
    f32,
    f32,
) -> *mut sys::ggml_tensor;

impl Graph<'_> {
    /// Rotary embedding of `ne` `[head_dim, n_head, n_tokens]`, one position per token, with optional
    /// frequency factors `[n_rot/2]`.
    pub fn rope(
        &mut self,
        a: TensorId,
        positions: TensorId,
        factors: Option<TensorId>,
        p: &RopeParams,
    ) -> TensorId {
        self.rotate(sys::ggml_rope_ext, a, positions, factors, p)
    }

    /// Gradient before [`Graph::rope`] from the gradient behind it: the opposite rotation.
    pub fn rope_back(
        &mut self,
        a: TensorId,
        positions: TensorId,
        factors: Option<TensorId>,
        p: &RopeParams,
    ) -> TensorId {
        self.rotate(sys::ggml_rope_ext_back, a, positions, factors, p)
    }

    fn rotate(
        &mut self,
        op: RopeOp,
        a: TensorId,
        positions: TensorId,
        factors: Option<TensorId>,
        p: &RopeParams,
    ) -> TensorId {
        let ne = self.ne(a);
        assert!(
            p.n_rot.is_multiple_of(2) && p.n_rot <= ne[0] && self.ne(positions)[0] == ne[2] && ne[3] == 1
        );
        assert!(factors.is_none_or(|f| self.ne(f)[0] >= p.n_rot / 2));
        let factors = factors.map_or(std::ptr::null_mut(), |f| self.raw(f));
        let mode = if p.neox { ROPE_TYPE_NEOX } else { 0 };
        // SAFETY: shapes as ggml_rope_ext requires, asserted above.
        let raw = unsafe {
            op(
                self.ctx.as_ptr(),
                self.raw(a),
                self.raw(positions),
                factors,
                p.n_rot as i32,
                mode,
                p.n_ctx_orig as i32,
                p.freq_base,
                p.freq_scale,
                p.ext_factor,
                p.attn_factor,
                p.beta_fast,
                p.beta_slow,
            )
        };
        self.push(raw)
    }
}
