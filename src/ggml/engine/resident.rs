//! Weights that stay on the backend between graphs.

use super::*;

/// Matrix or vector of floats to be placed on a backend.
pub struct TensorSpec<'a> {
    /// Sizes ne\[0\], ne\[1\].
    pub ne: [usize; 2],
    /// Row-major values, exactly as many as the sizes say.
    pub data: Values<'a>,
}

/// Values of a tensor.
pub enum Values<'a> {
    /// Values that are copied.
    Copied(&'a [f32]),
    /// Values that the CPU uses in place; they are copied to a device.
    Shared(Arc<Vec<f32>>),
}

impl Values<'_> {
    fn floats(&self) -> &[f32] {
        match self {
            Values::Copied(data) => data,
            Values::Shared(data) => data,
        }
    }
}

/// Alignment of a backend's memory; ggml's TENSOR_ALIGNMENT divides it.
const ALIGNMENT: usize = 64;

/// Float tensors that live on a backend (weights, masks, sums), addressed by index.
pub struct Resident {
    ctx: NonNull<sys::ggml_context>,
    /// Buffers that the device allocated, or that wrap `shared`.
    buffers: Vec<sys::ggml_backend_buffer_t>,
    /// Device that holds the buffers.
    device: sys::ggml_backend_dev_t,
    taken: Taken,
    shared: Vec<Arc<Vec<f32>>>,
    pub(in crate::ggml) tensors: Vec<NonNull<sys::ggml_tensor>>,
}

// SAFETY: the context is touched only by its owner. Graphs of other threads read the headers and the values;
// they write only to sums (`Graph::add_to`), which exist on devices, where one graph runs at a time.
unsafe impl Send for Resident {}
// SAFETY: as above.
unsafe impl Sync for Resident {}

impl Resident {
    /// Places `specs` on one of the engine's devices, or on the CPU, which uses shared values in place.
    /// Metal could, too, but wants whole pages from the system, not from an allocator.
    ///
    /// # Errors
    /// [`GgmlError::Memory`] if the backend has no room.
    ///
    /// # Panics
    /// If there are not as many values as a tensor's sizes say.
    pub fn upload(engine: &Engine, specs: &[TensorSpec]) -> Result<Resident, GgmlError> {
        let shapes: Vec<_> = specs.iter().map(|s| s.ne).collect();
        let mut set = Resident::headers(engine.next_device(), &shapes)?;
        let mut copied = Vec::new();
        for (i, s) in specs.iter().enumerate() {
            assert_eq!(s.data.floats().len(), s.ne[0] * s.ne[1], "values and shape disagree");
            match &s.data {
                Values::Shared(data) if !engine.has_devices() && !data.is_empty() => set.share(i, data),
                data => copied.push((i, data.floats())),
            }
        }
        set.allocate(engine, "weights")?;
        // SAFETY: all are alive; a tensor has as many floats as its spec, which is checked.
        unsafe {
            // With this usage, operations run where their weights are.
            for buffer in &set.buffers {
                sys::ggml_backend_buffer_set_usage(*buffer, sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            }
            for (i, values) in copied {
                let n_bytes = std::mem::size_of_val(values);
                sys::ggml_backend_tensor_set(set.tensors[i].as_ptr(), values.as_ptr().cast(), 0, n_bytes);
            }
        }
        Ok(set)
    }

    /// Allocates zeroed floats of these sizes on the device of `beside`, for graphs to add to
    /// ([`super::Graph::add_to`]).
    ///
    /// # Errors
    /// [`GgmlError::Memory`] if the backend has no room.
    pub fn zeros(engine: &Engine, beside: &Resident, shapes: &[[usize; 2]]) -> Result<Resident, GgmlError> {
        let mut set = Resident::headers(beside.device, shapes)?;
        set.allocate(engine, "sums")?;
        set.clear();
        Ok(set)
    }

    /// Sets all values to 0.
    ///
    /// # Panics
    /// If they are weights.
    pub fn clear(&mut self) {
        for &buffer in &self.buffers {
            // SAFETY: the buffer is alive and owns its memory; that of weights may not.
            unsafe {
                let usage = sys::ggml_backend_buffer_get_usage(buffer);
                assert_ne!(usage, sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS, "weights do not change");
                sys::ggml_backend_buffer_clear(buffer, 0);
            }
        }
    }

    /// Creates headers of tensors of these sizes, without memory.
    fn headers(device: sys::ggml_backend_dev_t, shapes: &[[usize; 2]]) -> Result<Resident, GgmlError> {
        // SAFETY: the context has room for one header per tensor.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: (shapes.len() + 1) * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = NonNull::new(sys::ggml_init(params)).ok_or(GgmlError::Memory(0, "tensor headers"))?;
            let header = |ne: &[usize; 2]| {
                let ne = ne.map(|n| n as i64);
                let raw = sys::ggml_new_tensor(ctx.as_ptr(), sys::GGML_TYPE_F32, 2, ne.as_ptr());
                // Graphs name tensors that have no name, and graphs of several threads share these.
                sys::ggml_set_name(raw, c"resident".as_ptr());
                NonNull::new_unchecked(raw)
            };
            let tensors = shapes.iter().map(header).collect();
            let (buffers, shared) = (Vec::new(), Vec::new());
            Ok(Resident { ctx, buffers, device, taken: Taken::default(), shared, tensors })
        }
    }

    /// Makes `data` the memory of the `index`-th tensor, on the CPU.
    fn share(&mut self, index: usize, data: &Arc<Vec<f32>>) {
        let values = data.as_ptr().cast_mut().cast::<u8>();
        // ggml wants buffers to begin at aligned addresses; tensors may lie anywhere in them.
        let before = values.addr() % ALIGNMENT;
        let n_bytes = std::mem::size_of_val(&data[..]);
        // SAFETY: the buffer does not own its memory, and the part of it outside `data` is never touched.
        // `data` lives as long as `self`, which holds it, so that nobody can change it; no graph writes to
        // weights (`Graph::add_to`).
        unsafe {
            let base = values.wrapping_sub(before);
            let buffer = sys::ggml_backend_cpu_buffer_from_ptr(base.cast(), before + n_bytes);
            assert!(!buffer.is_null());
            self.buffers.push(buffer);
            self.shared.push(Arc::clone(data));
            let status = sys::ggml_backend_tensor_alloc(buffer, self.tensors[index].as_ptr(), values.cast());
            assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a tensor inside its buffer");
        }
    }

    /// Allocates memory of the device for all tensors that have none.
    fn allocate(&mut self, engine: &Engine, what: &'static str) -> Result<(), GgmlError> {
        // SAFETY: headers are alive, and ggml never removes devices.
        unsafe {
            let without = self.tensors.iter().filter(|t| (*t.as_ptr()).buffer.is_null());
            let n_bytes: usize = without.map(|t| sys::ggml_nbytes(t.as_ptr())).sum();
            if n_bytes == 0 {
                return Ok(());
            }
            let memory = sys::ggml_backend_dev_buffer_type(self.device);
            let buffer = sys::ggml_backend_alloc_ctx_tensors_from_buft(self.ctx.as_ptr(), memory);
            if buffer.is_null() {
                return Err(GgmlError::Memory(n_bytes >> 20, what));
            }
            self.buffers.push(buffer);
            if engine.has_devices() {
                self.taken.resize(sys::ggml_backend_buffer_get_size(buffer) as u64);
            }
        }
        Ok(())
    }

    /// Shared values that are the memory of the `index`-th tensor, on the CPU.
    pub fn shared(&self, index: usize) -> Option<Arc<Vec<f32>>> {
        // SAFETY: a live header.
        let data = unsafe { (*self.tensors[index].as_ptr()).data };
        self.shared.iter().find(|values| values.as_ptr().addr() == data.addr()).cloned()
    }

    /// Values of the `index`-th tensor.
    pub fn read(&self, index: usize) -> Vec<f32> {
        let t = self.tensors[index].as_ptr();
        // SAFETY: the tensor is alive, of floats, and has as many bytes as requested.
        unsafe {
            let mut out = vec![0.0f32; sys::ggml_nelements(t) as usize];
            let bytes = std::mem::size_of_val(&out[..]);
            sys::ggml_backend_tensor_get(t, out.as_mut_ptr().cast(), 0, bytes);
            out
        }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: made above; graphs that refer to them borrow `self` and no longer exist.
        unsafe {
            self.buffers.iter().for_each(|b| sys::ggml_backend_buffer_free(*b));
            sys::ggml_free(self.ctx.as_ptr());
        }
    }
}
