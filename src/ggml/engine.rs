//! A compute backend and the tensors that stay on it between graphs.

use super::{GgmlError, Type};
use llama_cpp_sys_2 as sys;
use std::ptr::NonNull;

/// A ggml backend with its scratch memory. One graph runs on it at a time.
pub struct Engine {
    pub(super) backend: sys::ggml_backend_t,
    pub(super) galloc: sys::ggml_gallocr_t,
    n_threads: usize,
}

impl Engine {
    /// Starts the CPU backend with `n_threads` threads.
    ///
    /// # Errors
    /// [`GgmlError::Backend`] if ggml refuses.
    pub fn cpu(n_threads: usize) -> Result<Engine, GgmlError> {
        let n_threads = n_threads.max(1);
        // SAFETY: plain constructors; null is checked before use.
        unsafe {
            let backend = sys::ggml_backend_cpu_init();
            if backend.is_null() {
                return Err(GgmlError::Backend("CPU"));
            }
            sys::ggml_backend_cpu_set_n_threads(backend, n_threads as i32);
            let galloc = sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(backend));
            if galloc.is_null() {
                sys::ggml_backend_free(backend);
                return Err(GgmlError::Backend("CPU"));
            }
            Ok(Engine { backend, galloc, n_threads })
        }
    }

    /// Threads that a graph runs on.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: both were made by `cpu` and nothing borrows the engine any more.
        unsafe {
            sys::ggml_gallocr_free(self.galloc);
            sys::ggml_backend_free(self.backend);
        }
    }
}

/// A tensor to be placed on a backend: its type, its sizes (ne\[0\] first) and its bytes.
pub struct TensorSpec<'a> {
    /// Element type.
    pub ty: Type,
    /// ne\[0\], ne\[1\].
    pub ne: [usize; 2],
    /// Row-major bytes, exactly as many as type and sizes say.
    pub bytes: &'a [u8],
}

impl<'a> TensorSpec<'a> {
    /// A tensor of floats.
    pub fn f32(ne: [usize; 2], data: &'a [f32]) -> TensorSpec<'a> {
        TensorSpec { ty: Type::F32, ne, bytes: bytemuck::cast_slice(data) }
    }
}

/// Tensors that live on a backend (weights, masks), addressed by index.
pub struct Resident {
    ctx: NonNull<sys::ggml_context>,
    buffer: sys::ggml_backend_buffer_t,
    pub(super) tensors: Vec<NonNull<sys::ggml_tensor>>,
}

impl Resident {
    /// Copies `specs` onto the engine's backend.
    ///
    /// # Errors
    /// [`GgmlError::Memory`] if the backend has no room.
    ///
    /// # Panics
    /// If the bytes of a tensor do not match its type and sizes.
    pub fn upload(engine: &Engine, specs: &[TensorSpec]) -> Result<Resident, GgmlError> {
        for s in specs {
            assert_eq!(s.bytes.len(), s.ty.row_bytes(s.ne[0]) * s.ne[1], "tensor bytes and shape disagree");
        }
        let total: usize = specs.iter().map(|s| s.bytes.len()).sum();
        // SAFETY: the context has room for one header per tensor; each header's data pointer is
        // set by ggml_backend_alloc_ctx_tensors before the copies, whose lengths were checked.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: (specs.len() + 1) * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = NonNull::new(sys::ggml_init(params)).ok_or(GgmlError::Memory(0, "tensor headers"))?;
            let tensors: Vec<_> = specs
                .iter()
                .map(|s| {
                    let ne = s.ne.map(|n| n as i64);
                    NonNull::new_unchecked(sys::ggml_new_tensor(ctx.as_ptr(), s.ty.raw(), 2, ne.as_ptr()))
                })
                .collect();
            let buffer = sys::ggml_backend_alloc_ctx_tensors(ctx.as_ptr(), engine.backend);
            if buffer.is_null() {
                sys::ggml_free(ctx.as_ptr());
                return Err(GgmlError::Memory(total >> 20, "weights"));
            }
            for (t, s) in tensors.iter().zip(specs) {
                sys::ggml_backend_tensor_set(t.as_ptr(), s.bytes.as_ptr().cast(), 0, s.bytes.len());
            }
            Ok(Resident { ctx, buffer, tensors })
        }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: made by `upload`; graphs that refer to them borrow `self` and are gone.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.ctx.as_ptr());
        }
    }
}
