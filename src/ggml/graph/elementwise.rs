//! Operations on single values and on rows: activations, norms, soft max, and their derivatives.

use super::{Graph, TensorId};
use crate::ggml::attend::{Causal, Params, attend};
use llama_cpp_sys_2 as sys;

impl Graph<'_> {
    /// Hyperbolic tangent of each element.
    pub fn tanh(&mut self, a: TensorId) -> TensorId {
        assert!(self.contiguous(a));
        // SAFETY: contiguous, as ggml's unary operations require.
        let raw = unsafe { sys::ggml_tanh(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// Square root of each element.
    pub fn sqrt(&mut self, a: TensorId) -> TensorId {
        // SAFETY: accepts any float tensor.
        let raw = unsafe { sys::ggml_sqrt(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// Mean of each row: ne\[0\] becomes 1.
    pub fn mean(&mut self, a: TensorId) -> TensorId {
        // SAFETY: accepts any float tensor.
        let raw = unsafe { sys::ggml_mean(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// RMS norm: rows divided by their root mean square.
    pub fn rms_norm(&mut self, a: TensorId, eps: f32) -> TensorId {
        assert!(eps >= 0.0);
        // SAFETY: accepts any float tensor.
        let raw = unsafe { sys::ggml_rms_norm(self.ctx.as_ptr(), self.raw(a), eps) };
        self.push(raw)
    }

    /// Layer norm: rows minus their mean, divided by their standard deviation.
    pub fn layer_norm(&mut self, a: TensorId, eps: f32) -> TensorId {
        assert!(eps >= 0.0);
        // SAFETY: accepts any float tensor.
        let raw = unsafe { sys::ggml_norm(self.ctx.as_ptr(), self.raw(a), eps) };
        self.push(raw)
    }

    /// SwiGLU: `silu(gate) · up`.
    pub fn swiglu(&mut self, gate: TensorId, up: TensorId) -> TensorId {
        assert_eq!(self.ne(gate), self.ne(up));
        assert!(self.contiguous(gate) && self.contiguous(up));
        // SAFETY: same shape, both contiguous.
        let raw = unsafe { sys::ggml_swiglu_split(self.ctx.as_ptr(), self.raw(gate), self.raw(up)) };
        self.push(raw)
    }

    /// GeGLU: `gelu(gate) · up`, with ggml's tanh approximation.
    pub fn geglu(&mut self, gate: TensorId, up: TensorId) -> TensorId {
        assert_eq!(self.ne(gate), self.ne(up));
        assert!(self.contiguous(gate) && self.contiguous(up));
        // SAFETY: same shape, both contiguous.
        let raw = unsafe { sys::ggml_geglu_split(self.ctx.as_ptr(), self.raw(gate), self.raw(up)) };
        self.push(raw)
    }

    /// GELU of each element, with ggml's tanh approximation.
    pub fn gelu(&mut self, a: TensorId) -> TensorId {
        assert!(self.contiguous(a));
        // SAFETY: contiguous, as ggml's unary operations require.
        let raw = unsafe { sys::ggml_gelu(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// ReLU of each element: max(0, x).
    pub fn relu(&mut self, a: TensorId) -> TensorId {
        assert!(self.contiguous(a));
        // SAFETY: contiguous, as ggml's unary operations require.
        let raw = unsafe { sys::ggml_relu(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// Computes softmax(scale · a + mask) over ne\[0\]; a is `ne` `[n_kv, n_tokens, n_head, n_seq]`, mask
    /// F32 `ne` `[n_kv, n_tokens]`.
    pub fn soft_max(&mut self, a: TensorId, mask: Option<TensorId>, scale: f32) -> TensorId {
        let ne = self.ne(a);
        assert!(self.contiguous(a));
        assert!(mask.is_none_or(|m| self.contiguous(m) && self.ne(m)[..2] == ne[..2]));
        let mask = mask.map_or(std::ptr::null_mut(), |m| self.raw(m));
        // SAFETY: contiguous, with a mask of the same row length.
        let raw = unsafe { sys::ggml_soft_max_ext(self.ctx.as_ptr(), self.raw(a), mask, scale, 0.0) };
        self.push(raw)
    }

    /// Computes softmax(scale · a) over the keys that each query sees, and 0 elsewhere; a is `ne`
    /// `[n_keys, n_queries, n_head, n_seq]`. It runs on the CPU only.
    pub fn causal_soft_max(&mut self, a: TensorId, causal: Causal, scale: f32) -> TensorId {
        assert!(self.contiguous(a) && !self.on_devices);
        let ne = self.ne(a).map(|n| n as i64);
        let params = Box::new(Params { causal, scale });
        let mut source = self.raw(a);
        // SAFETY: a contiguous F32 tensor of the size that `attend` expects; the parameters live as long as
        // the graph, at one address.
        let raw = unsafe {
            assert_eq!((*source).type_, sys::GGML_TYPE_F32);
            let user = std::ptr::from_ref(&*params).cast_mut().cast();
            let (ctx, ty) = (self.ctx.as_ptr(), sys::GGML_TYPE_F32);
            sys::ggml_custom_4d(ctx, ty, ne[0], ne[1], ne[2], ne[3], &mut source, 1, Some(attend), 1, user)
        };
        self.params.push(params);
        self.push(raw)
    }

    /// Gradient before a [`Graph::soft_max`] with the result `y`, from the gradient `grad` behind it.
    pub fn soft_max_back(&mut self, grad: TensorId, y: TensorId, scale: f32) -> TensorId {
        assert!(self.ne(grad) == self.ne(y) && self.contiguous(grad) && self.contiguous(y));
        // SAFETY: same shape, both contiguous.
        let raw = unsafe {
            sys::ggml_soft_max_ext_back(self.ctx.as_ptr(), self.raw(grad), self.raw(y), scale, 0.0)
        };
        self.push(raw)
    }

    /// Gradient before a [`Graph::rms_norm`] of `x`, from the gradient `grad` behind it.
    pub fn rms_norm_back(&mut self, grad: TensorId, x: TensorId, eps: f32) -> TensorId {
        assert!(self.ne(grad) == self.ne(x) && eps >= 0.0);
        // SAFETY: same shape.
        let raw = unsafe { sys::ggml_rms_norm_back(self.ctx.as_ptr(), self.raw(grad), self.raw(x), eps) };
        self.push(raw)
    }

    /// Sigmoid of each element: 1 / (1 + exp(−x)).
    pub fn sigmoid(&mut self, x: TensorId) -> TensorId {
        assert!(self.contiguous(x));
        // SAFETY: contiguous, as ggml's unary operations require.
        let raw = unsafe { sys::ggml_sigmoid(self.ctx.as_ptr(), self.raw(x)) };
        self.push(raw)
    }

    /// SiLU of each element: `x · sigmoid(x)`.
    pub fn silu(&mut self, x: TensorId) -> TensorId {
        assert!(self.contiguous(x));
        // SAFETY: contiguous, as ggml's unary operations require.
        let raw = unsafe { sys::ggml_silu(self.ctx.as_ptr(), self.raw(x)) };
        self.push(raw)
    }

    /// Gradient before [`Graph::silu`] of `x`, from the gradient `grad` behind it.
    pub fn silu_back(&mut self, grad: TensorId, x: TensorId) -> TensorId {
        assert!(self.ne(grad) == self.ne(x) && self.contiguous(grad) && self.contiguous(x));
        // SAFETY: same shape, both contiguous.
        let raw = unsafe { sys::ggml_silu_back(self.ctx.as_ptr(), self.raw(grad), self.raw(x)) };
        self.push(raw)
    }

    /// Linear function `factor · a + offset` of each element.
    pub fn scale(&mut self, a: TensorId, factor: f32, offset: f32) -> TensorId {
        assert!(self.contiguous(a));
        // SAFETY: contiguous, as ggml_scale_bias requires.
        let raw = unsafe { sys::ggml_scale_bias(self.ctx.as_ptr(), self.raw(a), factor, offset) };
        self.push(raw)
    }
}
