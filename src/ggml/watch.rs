//! Nodes of libllama's own graphs, watched and changed while they are computed.
//!
//! libllama calls back for every node of a graph (`llama_context_params::cb_eval`): first whether it is
//! wanted, and then, if so, right after it was computed. At that moment the node and its direct sources hold
//! their values; memory of older nodes may be in use by others.

use super::llama::{BatchToken, Context, LlamaModel};
use super::{GgmlError, Type};
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;

/// Node of a graph, or a source of one.
#[derive(Clone, Copy)]
pub struct Node<'g> {
    raw: *mut sys::ggml_tensor,
    _graph: PhantomData<&'g ()>,
}

/// Observer of the nodes of libllama's graphs.
pub trait Watcher {
    /// Returns whether `node` is wanted once it is computed. Its values are not there yet.
    fn wants(&mut self, node: &Node) -> bool;

    /// Receives a wanted node with its values.
    fn computed(&mut self, node: Node);
}

impl<'g> Node<'g> {
    /// Name, such as `ffn_moe_logits-3`. Weights on a device have their own name, not that of the copy.
    pub fn name(&self) -> &'g str {
        // SAFETY: tensors have names that end with NUL and live as long as the graph.
        let name = unsafe { CStr::from_ptr((*self.raw).name.as_ptr()) }.to_str().unwrap_or("");
        // The scheduler calls its copies `CUDA0#blk.3.ffn_down_exps.weight#0`.
        match name.split_once('#') {
            Some((_, rest)) => rest.rsplit_once('#').map_or(rest, |(name, _)| name),
            None => name,
        }
    }

    /// Returns whether the node is a product of a matrix and activations (`GGML_OP_MUL_MAT`).
    pub fn is_product(&self) -> bool {
        self.op() == sys::GGML_OP_MUL_MAT
    }

    /// Returns whether the node is a product with one matrix per chosen expert (`GGML_OP_MUL_MAT_ID`).
    pub fn is_product_by_expert(&self) -> bool {
        self.op() == sys::GGML_OP_MUL_MAT_ID
    }

    fn op(&self) -> sys::ggml_op {
        // SAFETY: a live tensor.
        unsafe { (*self.raw).op }
    }

    /// Sizes in `ne` order.
    pub fn ne(&self) -> [usize; 4] {
        // SAFETY: a live tensor.
        unsafe { (*self.raw).ne }.map(|n| n as usize)
    }

    /// Source `i` of the node's operation.
    pub fn source(&self, i: usize) -> Option<Node<'g>> {
        // SAFETY: a live tensor, whose sources live as long.
        let raw = unsafe { *(*self.raw).src.get(i)? };
        (!raw.is_null()).then_some(Node { raw, _graph: PhantomData })
    }

    /// Tensor that the node is a view of.
    pub fn viewed(&self) -> Option<Node<'g>> {
        // SAFETY: as above.
        let raw = unsafe { (*self.raw).view_src };
        (!raw.is_null()).then_some(Node { raw, _graph: PhantomData })
    }

    /// Values of a tensor of 32-bit floats, in `ne` order; `None` for other types.
    pub fn floats(&self) -> Option<Vec<f32>> {
        (self.ty()? == Type::F32).then(|| self.elements().into_iter().map(f32::from_bits).collect())
    }

    /// Values of a tensor of 32-bit integers, in `ne` order; `None` for other types.
    pub fn integers(&self) -> Option<Vec<i32>> {
        (self.ty()? == Type::I32).then(|| self.elements().into_iter().map(u32::cast_signed).collect())
    }

    /// Replaces the values of a tensor of 32-bit floats, which nodes behind it will see.
    ///
    /// # Panics
    /// If the tensor is of another type, not contiguous, or of another number of elements.
    pub fn set_floats(&self, values: &[f32]) {
        assert!(self.ty() == Some(Type::F32));
        self.set_elements(bytemuck::cast_slice(values));
    }

    /// Replaces the values of a tensor of 32-bit integers, as [`Node::set_floats`].
    ///
    /// # Panics
    /// As [`Node::set_floats`].
    pub fn set_integers(&self, values: &[i32]) {
        assert!(self.ty() == Some(Type::I32));
        self.set_elements(bytemuck::cast_slice(values));
    }

    fn ty(&self) -> Option<Type> {
        // SAFETY: a live tensor.
        Type::from_raw(unsafe { (*self.raw).type_ })
    }

    /// Elements of four bytes in `ne` order, whatever the strides.
    fn elements(&self) -> Vec<u32> {
        let ne = self.ne();
        // SAFETY: the tensor is computed, so it has a buffer, of which `ggml_nbytes` bytes are its own.
        let (all, nb, dense) = unsafe {
            let mut all = vec![0u32; sys::ggml_nbytes(self.raw) / 4];
            sys::ggml_backend_tensor_get(self.raw, all.as_mut_ptr().cast(), 0, 4 * all.len());
            (all, (*self.raw).nb.map(|n| n / 4), sys::ggml_is_contiguous(self.raw))
        };
        if dense {
            return all;
        }
        let mut out = Vec::with_capacity(ne.iter().product());
        for l in 0..ne[3] {
            for k in 0..ne[2] {
                for j in 0..ne[1] {
                    let row = j * nb[1] + k * nb[2] + l * nb[3];
                    out.extend((0..ne[0]).map(|i| all[row + i * nb[0]]));
                }
            }
        }
        out
    }

    fn set_elements(&self, bytes: &[u8]) {
        // SAFETY: a live tensor with a buffer; the length is checked.
        unsafe {
            assert!(sys::ggml_is_contiguous(self.raw) && bytes.len() == sys::ggml_nbytes(self.raw));
            sys::ggml_backend_tensor_set(self.raw, bytes.as_ptr().cast(), 0, bytes.len());
        }
    }
}

/// Context of libllama whose graphs `W` watches.
pub struct Watched<'m, W: Watcher> {
    context: Context<'m>,
    /// From a box; libllama's context holds the address, too.
    watcher: *mut W,
}

impl<'m, W: Watcher> Watched<'m, W> {
    /// Creates a context for one sequence of `n_ctx` tokens, decoded in one call, whose graphs `watcher`
    /// watches.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama cannot make it.
    pub fn new(model: &'m LlamaModel, n_ctx: usize, n_threads: usize, watcher: W) -> Result<Self, GgmlError> {
        let watcher = Box::into_raw(Box::new(watcher));
        let made = Context::with(model, n_ctx, 1, n_ctx, n_threads, |params| {
            params.cb_eval = Some(on_node::<W>);
            params.cb_eval_user_data = watcher.cast();
        });
        match made {
            Ok(context) => Ok(Watched { context, watcher }),
            Err(e) => {
                // SAFETY: the box from above, which nothing else knows any more.
                drop(unsafe { Box::from_raw(watcher) });
                Err(e)
            }
        }
    }

    /// Decodes `tokens` as a sequence of their own, with logits where `wanted` says so.
    ///
    /// # Errors
    /// [`GgmlError::Llama`] if libllama fails.
    ///
    /// # Panics
    /// If there are more tokens than the context holds.
    pub fn decode(
        &mut self,
        tokens: &[super::Token],
        wanted: impl Fn(usize) -> bool,
    ) -> Result<(), GgmlError> {
        self.context.clear();
        let tokens = tokens.iter().enumerate();
        let batch: Vec<_> = tokens.map(|(i, &token)| BatchToken { token, pos: i as i32, seq: 0 }).collect();
        self.context.decode_at(&batch, wanted)
    }

    /// Logits `[n_vocab]` of the i-th token of the last call of [`Watched::decode`].
    ///
    /// # Panics
    /// If that call wanted none there.
    pub fn logits(&self, i: usize) -> &[f32] {
        self.context.logits(i)
    }

    /// The watcher.
    pub fn watcher(&mut self) -> &mut W {
        // SAFETY: from a box that lives as long as `self`; libllama uses it during `decode` only.
        unsafe { &mut *self.watcher }
    }
}

impl<W: Watcher> Drop for Watched<'_, W> {
    fn drop(&mut self) {
        // SAFETY: from a box, and no graph is computed after the last call of `decode`.
        drop(unsafe { Box::from_raw(self.watcher) });
    }
}

/// `ggml_backend_sched_eval_callback`: whether a node is wanted, or whether to go on after it.
unsafe extern "C" fn on_node<W: Watcher>(
    raw: *mut sys::ggml_tensor,
    ask: bool,
    watcher: *mut c_void,
) -> bool {
    // SAFETY: the address is that of the context's watcher, which nobody else uses while a graph is computed.
    let watcher = unsafe { &mut *watcher.cast::<W>() };
    let node = Node { raw, _graph: PhantomData };
    if ask {
        return watcher.wants(&node);
    }
    watcher.computed(node);
    true
}
