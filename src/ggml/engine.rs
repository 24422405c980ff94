//! Compute backends, and the tensors that stay on them between graphs.

mod resident;

pub use resident::{Resident, TensorSpec, Values};

use super::GgmlError;
use super::device::{Compute, Device, Taken};
use crate::parallel::Idle;
use llama_cpp_sys_2 as sys;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Largest number of tensors in a graph, including leaves and copies between devices.
const MAX_TENSORS: usize = 8192;

/// Hardware that graphs run on, with their scratch memory.
///
/// On the CPU, each graph runs on the thread that computes it, and several threads can compute graphs at a
/// time. Matrix products inside a graph are spread over the threads of rayon's pool that have nothing else
/// to do. So no thread waits at a barrier after each operation, as ggml's own threads do. On devices, one
/// graph runs at a time.
pub struct Engine(Place);

/// Place where graphs run.
enum Place {
    /// The CPU, with the runners that no graph uses.
    Host(Idle<Runner>),
    /// The devices that hold the weights; the CPU runs operations that they do not support.
    Devices {
        scheduler: Mutex<Scheduler>,
        devices: Vec<sys::ggml_backend_dev_t>,
        /// Index of the device that the next tensors go to.
        next: AtomicUsize,
    },
}

// SAFETY: devices are never removed and may be used from any thread; all else is behind a mutex.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

/// CPU backend of one thread, with memory for the intermediate results of one graph.
pub(super) struct Runner {
    cpu: sys::ggml_backend_t,
    galloc: sys::ggml_gallocr_t,
}

impl Runner {
    fn new() -> Result<Runner, GgmlError> {
        let cpu = cpu_backend(1)?;
        // SAFETY: a live backend; null is checked.
        let galloc = unsafe { sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(cpu)) };
        let runner = Runner { cpu, galloc };
        if galloc.is_null() { Err(GgmlError::Backend("CPU")) } else { Ok(runner) }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // SAFETY: `new` made both, and no graph uses them any more; null is not freed.
        unsafe {
            sys::ggml_gallocr_free(self.galloc);
            sys::ggml_backend_free(self.cpu);
        }
    }
}

/// Backends of several devices and of the CPU, among which the operations of a graph are divided.
pub(super) struct Scheduler {
    backends: Vec<sys::ggml_backend_t>,
    /// Last of the scheduler's backends.
    cpu: sys::ggml_backend_t,
    sched: sys::ggml_backend_sched_t,
    /// The scheduler's buffers on devices.
    scratch: Taken,
}

impl Scheduler {
    /// Starts `devices`, with the CPU on `n_threads` threads for operations that they do not support.
    fn new(devices: &[Device], n_threads: usize) -> Result<Scheduler, GgmlError> {
        let mut all = Scheduler {
            backends: Vec::new(),
            cpu: cpu_backend(n_threads)?,
            sched: std::ptr::null_mut(),
            scratch: Taken::default(),
        };
        // SAFETY: devices are live; null is checked before use; a failure drops what was started.
        unsafe {
            for device in devices {
                let raw = device.raw();
                let backend = sys::ggml_backend_dev_init(raw, std::ptr::null());
                if backend.is_null() {
                    let name = super::system::static_text(sys::ggml_backend_dev_name(raw));
                    return Err(GgmlError::Device(name.into()));
                }
                all.backends.push(backend);
            }
            // The last backend runs the unsupported operations.
            let mut backends = [&all.backends[..], &[all.cpu]].concat();
            let n = backends.len() as i32;
            let types = std::ptr::null_mut();
            all.sched =
                sys::ggml_backend_sched_new(backends.as_mut_ptr(), types, n, MAX_TENSORS, false, false);
        }
        Ok(all)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        // SAFETY: `new` made all of them, and no graph uses them any more; null is not freed.
        unsafe {
            if !self.sched.is_null() {
                sys::ggml_backend_sched_free(self.sched);
            }
            self.backends.iter().for_each(|b| sys::ggml_backend_free(*b));
            sys::ggml_backend_free(self.cpu);
        }
    }
}

/// Starts the CPU backend with `n_threads` threads.
fn cpu_backend(n_threads: usize) -> Result<sys::ggml_backend_t, GgmlError> {
    // SAFETY: a plain constructor; null is checked before use.
    unsafe {
        let cpu = sys::ggml_backend_cpu_init();
        if cpu.is_null() {
            return Err(GgmlError::Backend("CPU"));
        }
        sys::ggml_backend_cpu_set_n_threads(cpu, n_threads.max(1) as i32);
        Ok(cpu)
    }
}

impl Engine {
    /// Creates an engine on the CPU.
    pub fn cpu() -> Engine {
        Engine(Place::Host(Idle::default()))
    }

    /// Starts the hardware that `compute` asks for.
    ///
    /// # Errors
    /// [`GgmlError::Backend`] or [`GgmlError::Device`] if ggml refuses.
    pub fn new(compute: &Compute) -> Result<Engine, GgmlError> {
        if compute.devices.is_empty() {
            return Ok(Engine::cpu());
        }
        let scheduler = Mutex::new(Scheduler::new(&compute.devices, compute.n_threads)?);
        let devices = compute.devices.iter().map(|d| d.raw()).collect();
        Ok(Engine(Place::Devices { scheduler, devices, next: AtomicUsize::new(0) }))
    }

    /// Whether graphs run on devices.
    pub(crate) fn has_devices(&self) -> bool {
        matches!(self.0, Place::Devices { .. })
    }

    /// Reserves what a graph needs in order to run; on devices, waits until no other graph runs.
    ///
    /// # Errors
    /// [`GgmlError::Backend`] if ggml refuses.
    pub(super) fn reserve(&self) -> Result<Reserved<'_>, GgmlError> {
        Ok(match &self.0 {
            Place::Host(idle) => Reserved::Host { runner: ManuallyDrop::new(idle.take(Runner::new)?), idle },
            Place::Devices { scheduler, .. } => {
                // A graph that failed leaves nothing behind that the next one reads.
                Reserved::Devices(scheduler.lock().unwrap_or_else(PoisonError::into_inner))
            }
        })
    }

    /// Device for the next tensors: devices take turns.
    fn next_device(&self) -> sys::ggml_backend_dev_t {
        match &self.0 {
            // SAFETY: there is always a CPU device.
            Place::Host(_) => unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) },
            Place::Devices { devices, next, .. } => {
                devices[next.fetch_add(1, Ordering::Relaxed) % devices.len()]
            }
        }
    }
}

/// Part of an engine that one graph uses.
pub(super) enum Reserved<'e> {
    /// Runner, with the others to which it returns.
    Host {
        runner: ManuallyDrop<Runner>,
        idle: &'e Idle<Runner>,
    },
    Devices(MutexGuard<'e, Scheduler>),
}

impl Reserved<'_> {
    /// Allocates memory for all tensors of `graph`.
    ///
    /// # Safety
    /// The graph is alive, and no result of an earlier graph that had this reservation is still read.
    pub(super) unsafe fn allocate(&mut self, graph: *mut sys::ggml_cgraph) -> bool {
        // SAFETY: by the caller.
        unsafe {
            match self {
                // The plan is made afresh each time. The allocator by itself keeps the plan of the previous
                // graph if node counts and sizes happen to match, whatever the two graphs compute.
                Reserved::Host { runner, .. } => {
                    sys::ggml_gallocr_reserve(runner.galloc, graph)
                        && sys::ggml_gallocr_alloc_graph(runner.galloc, graph)
                }
                Reserved::Devices(s) => {
                    sys::ggml_backend_sched_reset(s.sched);
                    // The scheduler has no call to plan a graph that is then run. A graph of another size
                    // makes it plan afresh.
                    let planned =
                        reserve_another(s.sched) && sys::ggml_backend_sched_alloc_graph(s.sched, graph);
                    let size = |b: &sys::ggml_backend_t| sys::ggml_backend_sched_get_buffer_size(s.sched, *b);
                    let bytes = s.backends.iter().map(size).sum::<usize>() as u64;
                    s.scratch.resize(bytes);
                    planned
                }
            }
        }
    }

    /// Runs `graph`, whose inputs are set.
    ///
    /// # Safety
    /// [`Reserved::allocate`] has allocated the graph's memory.
    pub(super) unsafe fn run(&mut self, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
        // SAFETY: by the caller.
        unsafe {
            match self {
                Reserved::Host { runner, .. } => sys::ggml_backend_graph_compute(runner.cpu, graph),
                Reserved::Devices(s) => sys::ggml_backend_sched_graph_compute(s.sched, graph),
            }
        }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Reserved::Host { runner, idle } = self {
            // SAFETY: it is not used after the drop.
            idle.put(unsafe { ManuallyDrop::take(runner) });
        }
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

#[cfg(test)]
mod tests {
    use super::super::Graph;
    use super::*;

    #[test]
    fn shared_values_are_computed_with_where_they_are() {
        let engine = Engine::cpu();
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
            assert_eq!(g.compute(&engine).unwrap().to_vec(y), squares);
            assert_eq!((set.read(0), set.read(1)), (values.clone(), values));
            drop(set);
            assert_eq!(Arc::strong_count(&shared), 1);
        }
    }

    #[test]
    #[should_panic(expected = "weights do not change")]
    fn weights_are_not_added_to() {
        let engine = Engine::cpu();
        let data = Values::Shared(Arc::new(vec![1.0; 4]));
        let set = Resident::upload(&engine, &[TensorSpec { ne: [4, 1], data }]).unwrap();
        let mut g = Graph::new(&engine, 16);
        let (weights, x) = (g.resident(&set, 0), g.input_f32([4, 1], &[1.0; 4]));
        g.add_to(weights, x);
    }

    #[test]
    fn what_graphs_add_to_stays() {
        let engine = Engine::cpu();
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let beside = [TensorSpec { ne: [6, 1], data: Values::Copied(&values) }];
        let beside = Resident::upload(&engine, &beside).unwrap();
        let mut totals = Resident::zeros(&engine, &beside, &[[2, 2], [3, 2]]).unwrap();
        for _ in 0..3 {
            let mut g = Graph::new(&engine, 16);
            let (total, x) = (g.resident(&totals, 1), g.input_f32([3, 2], &values));
            let sum = g.add_to(total, x);
            g.output(sum);
            g.compute(&engine).unwrap();
        }
        assert_eq!(totals.read(0), [0.0; 4]);
        assert_eq!(totals.read(1), [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]);
        totals.clear();
        assert_eq!(totals.read(1), [0.0; 6]);
    }
}
