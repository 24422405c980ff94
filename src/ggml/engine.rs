//! Compute backends and the tensors that stay on them between graphs.

use super::device::{Compute, Device, Taken};
use super::{GgmlError, Type};
use llama_cpp_sys_2 as sys;
use std::cell::Cell;
use std::ptr::NonNull;

/// Tensors that a graph has at most, leaves and copies between devices included.
const MAX_TENSORS: usize = 8192;

/// Backends with their scratch memory. One graph runs at a time.
pub struct Engine {
    cpu: sys::ggml_backend_t,
    n_threads: usize,
    pub(super) place: Place,
}

/// Where graphs run.
pub(super) enum Place {
    /// On the CPU, with memory for intermediate results from this allocator.
    Host { galloc: sys::ggml_gallocr_t },
    /// Where the weights are, and on the CPU what devices cannot do.
    Devices {
        backends: Vec<sys::ggml_backend_t>,
        sched: sys::ggml_backend_sched_t,
        /// The one that the next tensors go to.
        next: Cell<usize>,
        /// The scheduler's buffers on devices.
        scratch: Taken,
    },
}

impl Engine {
    /// Starts the CPU backend with `n_threads` threads.
    ///
    /// # Errors
    /// [`GgmlError::Backend`] if ggml refuses.
    pub fn cpu(n_threads: usize) -> Result<Engine, GgmlError> {
        Engine::new(&n_threads.into())
    }

    /// Starts what graphs shall run on.
    ///
    /// # Errors
    /// [`GgmlError::Backend`] or [`GgmlError::Device`] if ggml refuses.
    pub fn new(compute: &Compute) -> Result<Engine, GgmlError> {
        let n_threads = compute.n_threads.max(1);
        // SAFETY: plain constructors; null is checked before use.
        unsafe {
            let cpu = sys::ggml_backend_cpu_init();
            if cpu.is_null() {
                return Err(GgmlError::Backend("CPU"));
            }
            sys::ggml_backend_cpu_set_n_threads(cpu, n_threads as i32);
            // Whatever fails from here on drops what there is.
            let mut engine = Engine { cpu, n_threads, place: Place::Host { galloc: std::ptr::null_mut() } };
            engine.place = if compute.devices.is_empty() {
                let galloc = sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(cpu));
                if galloc.is_null() {
                    return Err(GgmlError::Backend("CPU"));
                }
                Place::Host { galloc }
            } else {
                devices_of(cpu, &compute.devices)?
            };
            Ok(engine)
        }
    }

    /// Threads that a graph runs on.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Whether graphs run on devices.
    pub(crate) fn has_devices(&self) -> bool {
        matches!(self.place, Place::Devices { .. })
    }

    /// Gives all tensors of `graph` memory.
    ///
    /// # Safety
    /// The graph is alive, and no result of one before is read any more.
    pub(super) unsafe fn allocate(&mut self, graph: *mut sys::ggml_cgraph) -> bool {
        // SAFETY: by the caller.
        unsafe {
            match &mut self.place {
                // Planned anew each time: by itself the allocator keeps the plan of the graph before when
                // node counts and sizes happen to match, whatever the two graphs compute.
                Place::Host { galloc } => {
                    sys::ggml_gallocr_reserve(*galloc, graph) && sys::ggml_gallocr_alloc_graph(*galloc, graph)
                }
                Place::Devices { backends, sched, scratch, .. } => {
                    sys::ggml_backend_sched_reset(*sched);
                    // The scheduler has no call to plan a graph that is then run; one of another size makes it plan anew.
                    let planned =
                        reserve_another(*sched) && sys::ggml_backend_sched_alloc_graph(*sched, graph);
                    let sizes = backends.iter().map(|b| sys::ggml_backend_sched_get_buffer_size(*sched, *b));
                    scratch.resize(sizes.sum::<usize>() as u64);
                    planned
                }
            }
        }
    }

    /// Runs `graph`, whose inputs are there.
    ///
    /// # Safety
    /// The graph was given memory by [`Engine::allocate`].
    pub(super) unsafe fn run(&mut self, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
        // SAFETY: by the caller.
        unsafe {
            match self.place {
                Place::Host { .. } => sys::ggml_backend_graph_compute(self.cpu, graph),
                Place::Devices { sched, .. } => sys::ggml_backend_sched_graph_compute(sched, graph),
            }
        }
    }

    /// The backend that tensors are put on: devices take turns.
    fn next_backend(&self) -> sys::ggml_backend_t {
        match &self.place {
            Place::Host { .. } => self.cpu,
            Place::Devices { backends, next, .. } => {
                let i = next.get();
                next.set((i + 1) % backends.len());
                backends[i]
            }
        }
    }
}

/// Starts `devices`, with the CPU for what they cannot do.
///
/// # Safety
/// `cpu` is a live backend that outlives the result.
unsafe fn devices_of(cpu: sys::ggml_backend_t, devices: &[Device]) -> Result<Place, GgmlError> {
    let mut backends: Vec<sys::ggml_backend_t> = Vec::new();
    // SAFETY: devices are live; null is checked before use; what was started is freed where another fails.
    unsafe {
        for device in devices {
            let raw = device.raw();
            let backend = sys::ggml_backend_dev_init(raw, std::ptr::null());
            if backend.is_null() {
                backends.iter().for_each(|b| sys::ggml_backend_free(*b));
                let name = super::system::static_text(sys::ggml_backend_dev_name(raw));
                return Err(GgmlError::Device(name.into()));
            }
            backends.push(backend);
        }
        let mut all = backends.clone();
        // The last is the one for the rest.
        all.push(cpu);
        let sched = sys::ggml_backend_sched_new(
            all.as_mut_ptr(),
            std::ptr::null_mut(),
            all.len() as i32,
            MAX_TENSORS,
            false,
            false,
        );
        Ok(Place::Devices { backends, sched, next: Cell::new(0), scratch: Taken::default() })
    }
}

/// Nodes of the graph that is planned between others: with one leaf only, no other has so many.
const ANOTHER: usize = 509;

/// Makes `sched` plan a small graph, so that it does not take the plan of the graph before for the next one. Buffers stay as
/// large as they are.
///
/// # Safety
/// `sched` is alive, and no graph has its memory from it any more.
unsafe fn reserve_another(sched: sys::ggml_backend_sched_t) -> bool {
    // SAFETY: the context has room for all headers and the graph, and outlives the call; the plan keeps no pointer to them.
    unsafe {
        let params = sys::ggml_init_params {
            mem_size: (ANOTHER + 2) * sys::ggml_tensor_overhead()
                + sys::ggml_graph_overhead_custom(ANOTHER + 2, false),
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        let ctx = sys::ggml_init(params);
        if ctx.is_null() {
            return false;
        }
        let graph = sys::ggml_new_graph_custom(ctx, ANOTHER + 2, false);
        let ne = [1];
        let mut t = sys::ggml_new_tensor(ctx, sys::GGML_TYPE_F32, 1, ne.as_ptr());
        sys::ggml_set_input(t);
        for _ in 0..ANOTHER {
            t = sys::ggml_scale(ctx, t, 1.0);
        }
        sys::ggml_build_forward_expand(graph, t);
        let reserved = sys::ggml_backend_sched_reserve(sched, graph);
        sys::ggml_backend_sched_reset(sched);
        sys::ggml_free(ctx);
        reserved
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: all were made by `new` and nothing borrows the engine any more.
        unsafe {
            match &self.place {
                Place::Host { galloc } => sys::ggml_gallocr_free(*galloc),
                Place::Devices { backends, sched, .. } => {
                    sys::ggml_backend_sched_free(*sched);
                    backends.iter().for_each(|b| sys::ggml_backend_free(*b));
                }
            }
            sys::ggml_backend_free(self.cpu);
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

/// Tensors that live on a backend (weights, masks, sums), addressed by index.
pub struct Resident {
    ctx: NonNull<sys::ggml_context>,
    buffer: sys::ggml_backend_buffer_t,
    /// Where it is.
    backend: sys::ggml_backend_t,
    _taken: Taken,
    pub(super) tensors: Vec<NonNull<sys::ggml_tensor>>,
}

impl Resident {
    /// Copies `specs` onto one of the engine's backends.
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
        let shapes: Vec<_> = specs.iter().map(|s| (s.ty, s.ne)).collect();
        let set = Resident::allocate(engine, engine.next_backend(), &shapes, "weights")?;
        // SAFETY: both are alive, and a tensor has as many bytes as its spec, which was checked.
        unsafe {
            // So that operations run where their weights are.
            sys::ggml_backend_buffer_set_usage(set.buffer, sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            for (t, s) in set.tensors.iter().zip(specs) {
                sys::ggml_backend_tensor_set(t.as_ptr(), s.bytes.as_ptr().cast(), 0, s.bytes.len());
            }
        }
        Ok(set)
    }

    /// Floats of these sizes, all 0, where `beside` is: what graphs add to ([`super::Graph::add_to`]).
    ///
    /// # Errors
    /// [`GgmlError::Memory`] if the backend has no room.
    pub fn zeros(engine: &Engine, beside: &Resident, shapes: &[[usize; 2]]) -> Result<Resident, GgmlError> {
        let shapes: Vec<_> = shapes.iter().map(|ne| (Type::F32, *ne)).collect();
        let set = Resident::allocate(engine, beside.backend, &shapes, "sums")?;
        // SAFETY: the buffer is alive.
        unsafe { sys::ggml_backend_buffer_clear(set.buffer, 0) };
        Ok(set)
    }

    /// Tensors of these types and sizes on `backend`, one of the engine's.
    fn allocate(
        engine: &Engine,
        backend: sys::ggml_backend_t,
        shapes: &[(Type, [usize; 2])],
        what: &'static str,
    ) -> Result<Resident, GgmlError> {
        let total: usize = shapes.iter().map(|(ty, ne)| ty.row_bytes(ne[0]) * ne[1]).sum();
        // SAFETY: the context has room for one header per tensor.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: (shapes.len() + 1) * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = NonNull::new(sys::ggml_init(params)).ok_or(GgmlError::Memory(0, "tensor headers"))?;
            let tensors: Vec<_> = shapes
                .iter()
                .map(|(ty, ne)| {
                    let ne = ne.map(|n| n as i64);
                    NonNull::new_unchecked(sys::ggml_new_tensor(ctx.as_ptr(), ty.raw(), 2, ne.as_ptr()))
                })
                .collect();
            let buffer = sys::ggml_backend_alloc_ctx_tensors(ctx.as_ptr(), backend);
            if buffer.is_null() {
                sys::ggml_free(ctx.as_ptr());
                return Err(GgmlError::Memory(total >> 20, what));
            }
            let on_device = if engine.has_devices() { sys::ggml_backend_buffer_get_size(buffer) } else { 0 };
            Ok(Resident { ctx, buffer, backend, _taken: Taken::new(on_device as u64), tensors })
        }
    }

    /// The floats of the `index`-th tensor.
    ///
    /// # Panics
    /// If they are of another type.
    pub fn read(&self, index: usize) -> Vec<f32> {
        let t = self.tensors[index].as_ptr();
        // SAFETY: the tensor is alive, and has as many bytes as are asked for.
        unsafe {
            assert_eq!((*t).type_, sys::GGML_TYPE_F32);
            let mut out = vec![0.0f32; sys::ggml_nelements(t) as usize];
            let bytes = std::mem::size_of_val(&out[..]);
            sys::ggml_backend_tensor_get(t, out.as_mut_ptr().cast(), 0, bytes);
            out
        }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: made by `allocate`; graphs that refer to them borrow `self` and are gone.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.ctx.as_ptr());
        }
    }
}
