//! Construction and execution of a compute graph.
//!
//! A [`Graph`] is described first, op by op, and then run once on an [`Engine`]. The results are read from
//! the [`Computed`] that the run returns. Sizes follow ggml (`ne` order): ne\[0\] is the fastest dimension,
//! so a matrix of T rows of d floats is `[d, T]`.

mod elementwise;
mod rotary;
mod views;

pub use rotary::RopeParams;

use super::attend::Params;
use super::engine::Reserved;
use super::product::{count, multiply};
use super::{Engine, GgmlError, Resident, Type};
use llama_cpp_sys_2 as sys;
use std::ffi::CString;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Tensor of one particular [`Graph`].
#[derive(Clone, Copy, Debug)]
pub struct TensorId {
    graph: u32,
    index: u32,
}

static NEXT_GRAPH: AtomicU32 = AtomicU32::new(0);

/// Compute graph under construction. `'a` is the lifetime of the inputs and weights that it refers to.
pub struct Graph<'a> {
    ctx: NonNull<sys::ggml_context>,
    graph: *mut sys::ggml_cgraph,
    id: u32,
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    inputs: Vec<(NonNull<sys::ggml_tensor>, &'a [u8])>,
    /// Matrix products of the graph, with their floating-point operations.
    products: Vec<(TensorId, u64)>,
    /// Parameters of operations of ours.
    #[expect(clippy::vec_box, reason = "the operations hold their addresses")]
    params: Vec<Box<Params>>,
    /// Whether it runs on devices, whose backends multiply by themselves.
    on_devices: bool,
    _weights: PhantomData<&'a Resident>,
}

impl<'a> Graph<'a> {
    /// Creates an empty graph with room for `max_nodes` tensors, to be run on `engine`.
    pub fn new(engine: &Engine, max_nodes: usize) -> Graph<'a> {
        // SAFETY: the context is sized for max_nodes headers and the graph; null is checked.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: max_nodes * sys::ggml_tensor_overhead()
                    + sys::ggml_graph_overhead_custom(max_nodes, false),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = NonNull::new(sys::ggml_init(params)).expect("out of memory for a graph of headers");
            let graph = sys::ggml_new_graph_custom(ctx.as_ptr(), max_nodes, false);
            let id = NEXT_GRAPH.fetch_add(1, Ordering::Relaxed);
            Graph {
                ctx,
                graph,
                id,
                tensors: Vec::new(),
                inputs: Vec::new(),
                products: Vec::new(),
                params: Vec::new(),
                on_devices: engine.has_devices(),
                _weights: PhantomData,
            }
        }
    }

    fn push(&mut self, raw: *mut sys::ggml_tensor) -> TensorId {
        self.tensors.push(NonNull::new(raw).expect("ggml built no tensor"));
        TensorId { graph: self.id, index: self.tensors.len() as u32 - 1 }
    }

    fn raw(&self, t: TensorId) -> *mut sys::ggml_tensor {
        assert_eq!(t.graph, self.id, "tensor of another graph");
        self.tensors[t.index as usize].as_ptr()
    }

    /// Whether it runs on devices, which lack some operations.
    pub fn on_devices(&self) -> bool {
        self.on_devices
    }

    /// Sizes of `t`, ne\[0\] first.
    pub fn ne(&self, t: TensorId) -> [usize; 4] {
        // SAFETY: `raw` returns a live header of this graph's context.
        unsafe { (*self.raw(t)).ne.map(|n| n as usize) }
    }

    fn contiguous(&self, t: TensorId) -> bool {
        // SAFETY: a live header.
        unsafe { sys::ggml_is_contiguous(self.raw(t)) }
    }

    fn input(&mut self, ty: Type, ne: [usize; 4], bytes: &'a [u8]) -> TensorId {
        assert_eq!(
            bytes.len(),
            ty.row_bytes(ne[0]) * ne[1] * ne[2] * ne[3],
            "input bytes and shape disagree"
        );
        // SAFETY: a new header in our context.
        let raw = unsafe {
            let ne = ne.map(|n| n as i64);
            let raw = sys::ggml_new_tensor(self.ctx.as_ptr(), ty.raw(), 4, ne.as_ptr());
            sys::ggml_set_input(raw);
            raw
        };
        let t = self.push(raw);
        self.inputs.push((self.tensors[t.index as usize], bytes));
        t
    }

    /// Float matrix, `ne` `[n0, n1]`, that is copied in when the graph runs.
    pub fn input_f32(&mut self, ne: [usize; 2], data: &'a [f32]) -> TensorId {
        self.input(Type::F32, [ne[0], ne[1], 1, 1], bytemuck::cast_slice(data))
    }

    /// Vector of 32-bit integers (positions, row indices).
    pub fn input_i32(&mut self, data: &'a [i32]) -> TensorId {
        self.input(Type::I32, [data.len(), 1, 1, 1], bytemuck::cast_slice(data))
    }

    /// Tensor with index `index` of a resident set.
    pub fn resident(&mut self, set: &'a Resident, index: usize) -> TensorId {
        self.push(set.tensors[index].as_ptr())
    }

    /// Matrix product `aᵀ b` over ne\[0\], both F32 with any strides: a `[k, m]`, b `[k, n]` → `[m, n]`, in
    /// `ne` order.
    /// `a` is repeated over outer dimensions.
    pub fn mul_mat(&mut self, a: TensorId, b: TensorId) -> TensorId {
        let (x, y) = (self.ne(a), self.ne(b));
        assert!(
            x[0] == y[0] && y[2].is_multiple_of(x[2]) && y[3].is_multiple_of(x[3]),
            "mul_mat of {x:?} and {y:?}"
        );
        let operations = 2 * (x[0] * x[1] * y[1] * y[2] * y[3]) as u64;
        if self.on_devices {
            let (a, b) = (self.with_rows(a), self.with_rows(b));
            // SAFETY: sizes are asserted above; rows have no gaps.
            let raw = unsafe {
                let raw = sys::ggml_mul_mat(self.ctx.as_ptr(), self.raw(a), self.raw(b));
                // Backends may otherwise use half precision, which is too little for Gram matrices.
                sys::ggml_mul_mat_set_prec(raw, sys::GGML_PREC_F32);
                raw
            };
            let product = self.push(raw);
            self.products.push((product, operations));
            return product;
        }
        let [m, n, n2, n3] = [x[1], y[1], y[2], y[3]].map(|n| n as i64);
        let mut sources = [self.raw(a), self.raw(b)];
        // SAFETY: live F32 headers of this context, of the sizes that `multiply` expects.
        let raw = unsafe {
            assert!(sources.iter().all(|t| (**t).type_ == sys::GGML_TYPE_F32));
            sys::ggml_custom_4d(
                self.ctx.as_ptr(),
                sys::GGML_TYPE_F32,
                m,
                n,
                n2,
                n3,
                sources.as_mut_ptr(),
                sources.len() as i32,
                Some(multiply),
                1,
                std::ptr::null_mut(),
            )
        };
        let product = self.push(raw);
        self.products.push((product, operations));
        product
    }

    /// Makes neighbours along ne\[0\] adjacent in memory; copies only if they are not.
    fn with_rows(&mut self, a: TensorId) -> TensorId {
        // SAFETY: a live header.
        let dense = unsafe { (*self.raw(a)).nb[0] == sys::ggml_type_size((*self.raw(a)).type_) };
        if dense { a } else { self.cont(a) }
    }

    fn assert_repeats(&self, a: TensorId, b: TensorId, op: &str) {
        let (x, y) = (self.ne(a), self.ne(b));
        assert!(x.iter().zip(y).all(|(x, y)| x % y == 0), "{op} of {x:?} and {y:?}");
    }

    /// Sum `a + b`, with `b` repeated to the shape of `a`.
    pub fn add(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.assert_repeats(a, b, "add");
        // SAFETY: b can be repeated to a.
        let raw = unsafe { sys::ggml_add(self.ctx.as_ptr(), self.raw(a), self.raw(b)) };
        self.push(raw)
    }

    /// Adds `b` to `total`, one of [`Resident::zeros`], in place. Graphs that run later find the sum there.
    pub fn add_to(&mut self, total: TensorId, b: TensorId) -> TensorId {
        assert_eq!(self.ne(total), self.ne(b));
        // SAFETY: same shape, and a buffer that owns its memory; that of weights may not.
        let raw = unsafe {
            let buffer = (*self.raw(total)).buffer;
            assert!(!buffer.is_null(), "not a resident tensor");
            let usage = sys::ggml_backend_buffer_get_usage(buffer);
            assert_ne!(usage, sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS, "weights do not change");
            sys::ggml_add_inplace(self.ctx.as_ptr(), self.raw(total), self.raw(b))
        };
        self.push(raw)
    }

    /// Difference `a − b`, with `b` repeated to the shape of `a`.
    pub fn sub(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.assert_repeats(a, b, "sub");
        // SAFETY: b can be repeated to a.
        let raw = unsafe { sys::ggml_sub(self.ctx.as_ptr(), self.raw(a), self.raw(b)) };
        self.push(raw)
    }

    /// Elementwise product `a · b`, with `b` repeated to the shape of `a`.
    pub fn mul(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.assert_repeats(a, b, "mul");
        // SAFETY: b can be repeated to a.
        let raw = unsafe { sys::ggml_mul(self.ctx.as_ptr(), self.raw(a), self.raw(b)) };
        self.push(raw)
    }

    /// Elementwise quotient `a / b`, with `b` repeated to the shape of `a`.
    pub fn div(&mut self, a: TensorId, b: TensorId) -> TensorId {
        self.assert_repeats(a, b, "div");
        // SAFETY: b can be repeated to a.
        let raw = unsafe { sys::ggml_div(self.ctx.as_ptr(), self.raw(a), self.raw(b)) };
        self.push(raw)
    }

    /// Marks `t` as a result, which is computed and kept until it is read.
    pub fn output(&mut self, t: TensorId) {
        // SAFETY: a live header.
        unsafe {
            sys::ggml_set_output(self.raw(t));
            sys::ggml_build_forward_expand(self.graph, self.raw(t));
        }
    }

    /// Gives the nodes names that no other graph has.
    ///
    /// CUDA's backend records a graph whose nodes equal those of the last graph at the same address, to
    /// replay it. Our graphs are short-lived and reuse addresses. With recordings, an H100 stops at an
    /// illegal instruction; without them it does not. The cause is unknown.
    fn look_new(&self) {
        let name = CString::new(self.id.to_string()).expect("digits");
        // SAFETY: live headers of this graph, and a C string that ggml copies.
        unsafe {
            for i in 0..sys::ggml_graph_n_nodes(self.graph) {
                sys::ggml_set_name(sys::ggml_graph_node(self.graph, i), name.as_ptr());
            }
        }
    }

    /// Runs the graph.
    ///
    /// # Errors
    /// [`GgmlError::Memory`] if there is no room for scratch memory, [`GgmlError::Compute`] otherwise.
    pub fn compute<'e>(self, engine: &'e Engine) -> Result<Computed<'a, 'e>, GgmlError> {
        assert_eq!(self.on_devices, engine.has_devices(), "a graph for another engine");
        let mut reserved = engine.reserve()?;
        // SAFETY: the reservation is held until the results are dropped, so no other graph can reuse its
        // scratch memory; inputs are checked against their shapes.
        unsafe {
            if self.on_devices {
                self.look_new();
            }
            if !reserved.allocate(self.graph) {
                return Err(GgmlError::Memory(0, "a compute graph"));
            }
            for (t, bytes) in &self.inputs {
                // An input that no result depends on gets no memory.
                if !(*t.as_ptr()).buffer.is_null() {
                    sys::ggml_backend_tensor_set(t.as_ptr(), bytes.as_ptr().cast(), 0, bytes.len());
                }
            }
            let status = reserved.run(self.graph);
            if status != sys::GGML_STATUS_SUCCESS {
                return Err(GgmlError::Compute(status));
            }
        }
        // SAFETY: live headers; a node that no result depends on gets no memory, and does not run.
        let ran = |t: &TensorId| unsafe { !(*self.raw(*t)).buffer.is_null() };
        count(self.products.iter().filter(|(t, _)| ran(t)).map(|(_, n)| n).sum());
        Ok(Computed { graph: self, _reserved: reserved })
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `new`; no header of it outlives the graph.
        unsafe { sys::ggml_free(self.ctx.as_ptr()) }
    }
}

/// Graph after its run; its outputs can be read until it is dropped.
pub struct Computed<'a, 'e> {
    graph: Graph<'a>,
    _reserved: Reserved<'e>,
}

impl Computed<'_, '_> {
    /// Copies the F32 output `t` into `dst`.
    ///
    /// # Panics
    /// If `t` is not a contiguous F32 output of this graph, or `dst` has another length.
    pub fn read(&self, t: TensorId, dst: &mut [f32]) {
        let raw = self.graph.raw(t);
        assert!(self.graph.contiguous(t));
        // SAFETY: type, length and the output flag are checked; the buffer is alive.
        unsafe {
            assert_eq!((*raw).type_, sys::GGML_TYPE_F32);
            assert!((*raw).flags & sys::GGML_TENSOR_FLAG_OUTPUT as i32 != 0, "not an output");
            assert_eq!(sys::ggml_nelements(raw) as usize, dst.len());
            sys::ggml_backend_tensor_get(raw, dst.as_mut_ptr().cast(), 0, std::mem::size_of_val(dst));
        }
    }

    /// Copies the F32 output `t` into a new vector.
    pub fn to_vec(&self, t: TensorId) -> Vec<f32> {
        let mut v = vec![0.0; self.graph.ne(t).iter().product()];
        self.read(t, &mut v);
        v
    }
}
