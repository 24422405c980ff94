//! Memory that libllama needs to run a model, by its own account, without reading a weight.

use super::GgmlError;
use super::llama::LlamaModel;
use super::system::{logged_by, silence_logs};
use llama_cpp_sys_2 as sys;
use std::path::Path;

/// Bytes that libllama needs to run a model on the CPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunMemory {
    /// Bytes of the weights.
    pub weights: u64,
    /// Bytes of keys and values, in F16.
    pub kv_cache: u64,
    /// Bytes of the compute buffers and of the logits of a step.
    pub compute: u64,
}

impl RunMemory {
    /// Sum of all parts, in bytes. The vocabulary and the program itself come on top.
    pub fn total(&self) -> u64 {
        self.weights + self.kv_cache + self.compute
    }
}

/// Predicts libllama's allocations for the model at `path` and one sequence of `n_ctx` tokens, with the
/// defaults of llama-cli.
///
/// Allocations are simulated (`no_alloc`). Their sizes are read from libllama's log, because its C
/// interface does not report them, to a hundredth of a MiB each. Silences the log as [`silence_logs`] does.
///
/// # Errors
/// [`GgmlError::Llama`] if libllama refuses the file or logs nothing.
pub fn run_memory(path: &Path, n_ctx: usize) -> Result<RunMemory, GgmlError> {
    logged_memory(path, n_ctx, |params| {
        params.no_alloc = true;
        params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
    })
}

/// Measures the same by really loading the model and making a context: the values that [`run_memory`]
/// predicts.
///
/// # Errors
/// As [`run_memory`].
pub fn taken_memory(path: &Path, n_ctx: usize) -> Result<RunMemory, GgmlError> {
    logged_memory(path, n_ctx, |_| {})
}

/// Bytes of the weights at `path` that libllama keeps in another order on the CPU, for its faster kernels.
///
/// # Errors
/// [`GgmlError::Llama`] if libllama refuses the file.
pub fn repacked_bytes(path: &Path) -> Result<u64, GgmlError> {
    silence_logs();
    let (model, lines) = logged_by(|| LlamaModel::load(path));
    model?;
    Ok(sum(&lines, &["_REPACK", "model buffer size ="]))
}

/// Sum of the sizes, in bytes, in the log lines that hold all of `parts`.
fn sum(lines: &[String], parts: &[&str]) -> u64 {
    let lines = lines.iter().filter(|line| parts.iter().all(|part| line.contains(part)));
    let sizes = lines.filter_map(|line| {
        let (_, rest) = line.split_once("size =")?;
        rest.split_whitespace().next()?.parse::<f64>().ok()
    });
    (sizes.sum::<f64>() * f64::from(1 << 20)) as u64
}

fn logged_memory(
    path: &Path,
    n_ctx: usize,
    set: impl FnOnce(&mut sys::llama_model_params),
) -> Result<RunMemory, GgmlError> {
    silence_logs();
    let model = LlamaModel::open_with(path, set)?;
    let (made, lines) = logged_by(|| model.try_context(n_ctx));
    made?;
    // Log lines: `llama_kv_cache: size = 45.00 MiB (512 cells, ...`, one per cache;
    // `sched_reserve: CPU compute buffer size = 9.00 MiB`.
    let compute = sum(&lines, &["compute buffer size ="]);
    if compute == 0 {
        return Err(GgmlError::Llama(format!("does not say what {} takes to run", path.display())));
    }
    Ok(RunMemory {
        weights: model.n_bytes(),
        kv_cache: sum(&lines, &["size =", " cells,"]),
        compute: compute + sum(&lines, &["output buffer size ="]),
    })
}
