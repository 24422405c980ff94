//! Compute backends, and the tensors that stay on them between graphs.

mod resident;

pub use resident::{Resident, TensorSpec, Values};

use super::GgmlError;
use super::device::{Compute, Device, Taken};
use llama_cpp_sys_2 as sys;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;

/// Largest number of tensors in a graph, including leaves and copies between devices.
const MAX_TENSORS: usize = 8192;

/// Backends with their scratch memory. One graph runs at a time.
pub struct Engine {
    cpu: sys::ggml_backend_t,
    n_threads: usize,
    pub(super) place: Place,
}

/// Place where graphs run.
pub(super) enum Place {
    /// The CPU; this allocator provides memory for intermediate results.
    Host { galloc: sys::ggml_gallocr_t },
    /// The devices that hold the weights; the CPU runs operations that they do not support.
    Devices {
        backends: Vec<sys::ggml_backend_t>,
        sched: sys::ggml_backend_sched_t,
        /// Index of the backend that the next tensors go to.
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

    /// Starts the backends that `compute` asks for.
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
            // From here on, any failure drops the started backends.
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

    /// Number of threads that a graph runs on.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Whether graphs run on devices.
    pub(crate) fn has_devices(&self) -> bool {
        matches!(self.place, Place::Devices { .. })
    }

    /// Allocates memory for all tensors of `graph`.
    ///
    /// # Safety
    /// The graph is alive, and no result of an earlier graph is still read.
    pub(super) unsafe fn allocate(&mut self, graph: *mut sys::ggml_cgraph) -> bool {
        // SAFETY: by the caller.
        unsafe {
            match &mut self.place {
                // The plan is made afresh each time. The allocator by itself keeps the plan of the previous
                // graph if node counts and sizes happen to match, whatever the two graphs compute.
                Place::Host { galloc } => {
                    sys::ggml_gallocr_reserve(*galloc, graph) && sys::ggml_gallocr_alloc_graph(*galloc, graph)
                }
                Place::Devices { backends, sched, scratch, .. } => {
                    sys::ggml_backend_sched_reset(*sched);
                    // The scheduler has no call to plan a graph that is then run. A graph of another size
                    // makes it plan afresh.
                    let planned =
                        reserve_another(*sched) && sys::ggml_backend_sched_alloc_graph(*sched, graph);
                    let sizes = backends.iter().map(|b| sys::ggml_backend_sched_get_buffer_size(*sched, *b));
                    scratch.resize(sizes.sum::<usize>() as u64);
                    planned
                }
            }
        }
    }

    /// Runs `graph`, whose inputs are set.
    ///
    /// # Safety
    /// [`Engine::allocate`] has allocated the graph's memory.
    pub(super) unsafe fn run(&mut self, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
        // SAFETY: by the caller.
        unsafe {
            match self.place {
                Place::Host { .. } => sys::ggml_backend_graph_compute(self.cpu, graph),
                Place::Devices { sched, .. } => sys::ggml_backend_sched_graph_compute(sched, graph),
            }
        }
    }

    /// Backend for the next tensors: devices take turns.
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

/// Starts `devices`, with the CPU for operations that they do not support.
///
/// # Safety
/// `cpu` is a live backend that outlives the result.
unsafe fn devices_of(cpu: sys::ggml_backend_t, devices: &[Device]) -> Result<Place, GgmlError> {
    let mut backends: Vec<sys::ggml_backend_t> = Vec::new();
    // SAFETY: devices are live; null is checked before use; if one fails, those that were started are
    // freed.
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
        // The last backend runs the unsupported operations.
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

/// Makes `sched` plan a tiny graph, so that it does not reuse the plan of the previous graph for the next
/// one.
/// It would do so if the numbers of nodes are equal and sizes fit. Buffers keep their size.
///
/// # Safety
/// `sched` is alive, and no graph still uses memory from it.
unsafe fn reserve_another(sched: sys::ggml_backend_sched_t) -> bool {
    // SAFETY: the context has room for both headers and the graph, and outlives the call; the plan keeps no
    // pointer to them.
    unsafe {
        let params = sys::ggml_init_params {
            mem_size: 2 * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead_custom(2, false),
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        let ctx = sys::ggml_init(params);
        if ctx.is_null() {
            return false;
        }
        let graph = sys::ggml_new_graph_custom(ctx, 2, false);
        let ne = [1];
        let number = sys::ggml_new_tensor(ctx, sys::GGML_TYPE_F32, 1, ne.as_ptr());
        sys::ggml_set_input(number);
        sys::ggml_build_forward_expand(graph, sys::ggml_scale(ctx, number, 1.0));
        let reserved = sys::ggml_backend_sched_reserve(sched, graph);
        sys::ggml_backend_sched_reset(sched);
        sys::ggml_free(ctx);
        reserved
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: `new` made all of them, and nothing borrows the engine any more.
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

#[cfg(test)]
mod tests {
    use super::super::Graph;
    use super::*;

    #[test]
    fn shared_values_are_computed_with_where_they_are() {
        let mut engine = Engine::cpu(1).unwrap();
        for n in [1, 7, 1000] {
            let values: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let shared = Arc::new(values.clone());
            let data = [Values::Shared(Arc::clone(&shared)), Values::Copied(&values)];
            let specs = data.map(|data| TensorSpec { ne: [n, 1], data });
            let set = Resident::upload(&engine, &specs).unwrap();
            drop(specs);
            assert_eq!(Arc::strong_count(&shared), 2);
            let mut g = Graph::new(&engine, 16);
            let [a, b] = [0, 1].map(|i| g.resident(&set, i));
            let y = g.mul(a, b);
            g.output(y);
            let squares: Vec<f32> = values.iter().map(|v| v * v).collect();
            assert_eq!(g.compute(&mut engine).unwrap().to_vec(y), squares);
            assert_eq!((set.read(0), set.read(1)), (values.clone(), values));
            drop(set);
            assert_eq!(Arc::strong_count(&shared), 1);
        }
    }

    #[test]
    #[should_panic(expected = "weights do not change")]
    fn weights_are_not_added_to() {
        let engine = Engine::cpu(1).unwrap();
        let data = Values::Shared(Arc::new(vec![1.0; 4]));
        let set = Resident::upload(&engine, &[TensorSpec { ne: [4, 1], data }]).unwrap();
        let mut g = Graph::new(&engine, 16);
        let (weights, x) = (g.resident(&set, 0), g.input_f32([4, 1], &[1.0; 4]));
        g.add_to(weights, x);
    }

    #[test]
    fn what_graphs_add_to_stays() {
        let mut engine = Engine::cpu(1).unwrap();
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let beside = [TensorSpec { ne: [6, 1], data: Values::Copied(&values) }];
        let beside = Resident::upload(&engine, &beside).unwrap();
        let mut totals = Resident::zeros(&engine, &beside, &[[2, 2], [3, 2]]).unwrap();
        for _ in 0..3 {
            let mut g = Graph::new(&engine, 16);
            let (total, x) = (g.resident(&totals, 1), g.input_f32([3, 2], &values));
            let sum = g.add_to(total, x);
            g.output(sum);
            g.compute(&mut engine).unwrap();
        }
        assert_eq!(totals.read(0), [0.0; 4]);
        assert_eq!(totals.read(1), [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]);
        totals.clear();
        assert_eq!(totals.read(1), [0.0; 6]);
    }
}
