//! Safe interface to ggml and libllama: the only module with `unsafe` code.
//!
//! Everything that leaves this module is an owned Rust type with checked methods. ggml reports programming
//! errors by aborting the process. Shapes are therefore asserted here before each call, and
//! [`install_abort_handler`] turns any remaining abort into one clear line.

mod attend;
mod device;
mod engine;
mod gguf;
mod graph;
mod llama;
mod memory;
mod process;
mod product;
mod quantize;
mod system;
mod types;
mod vocab;
mod watch;

pub use attend::Causal;
pub use device::{Compute, Device, DeviceInfo, add_server, device_memory_peak, devices, serve, total_memory};
pub use engine::{Engine, Resident, TensorSpec, Values};
pub use gguf::{RawGguf, RawValue};
pub use graph::{Computed, Graph, RopeParams, TensorId};
pub use llama::{BatchToken, Context, LlamaModel, Offload, Token};
pub use memory::{RunMemory, repacked_bytes, run_memory, taken_memory};
pub use process::{
    Allocator, cpu_time, exit_now, install_out_of_memory_handler, keeping_ignored, let_large_writes_fail,
};
pub(crate) use product::count;
pub use product::{operations, product_rate};
pub use quantize::{FileType, quantize_file};
pub use system::{
    FileMap, cpu_features, engine_version, gave_up, install_abort_handler, install_fault_handler,
    map_scratch, silence_logs,
};
pub use types::Type;
pub use vocab::Vocab;
pub use watch::{Node, Watched, Watcher};

use std::path::PathBuf;

/// Error of ggml or libllama.
#[derive(Debug, thiserror::Error)]
pub enum GgmlError {
    /// A backend could not be created.
    #[error("ggml could not start its {0} backend")]
    Backend(&'static str),
    /// A device could not be started.
    #[error("ggml could not start device {0}")]
    Device(String),
    /// The build has no RPC backend, so other machines cannot be used.
    #[error(
        "this build has no RPC backend; build with GGML_RPC=ON in the environment, as in this project's own .cargo/config.toml"
    )]
    NoRpc,
    /// A machine does not answer.
    #[error("{0}: {1}")]
    Server(String, String),
    /// A buffer could not be allocated.
    #[error(
        "ggml could not allocate {0} MiB for {1}; use shorter windows or fewer threads, or free some memory"
    )]
    Memory(usize, &'static str),
    /// A graph did not run to its end.
    #[error("ggml failed to compute a graph (status {0})")]
    Compute(i32),
    /// The bytes are not a GGUF header that ggml accepts.
    #[error("{0}")]
    Header(String),
    /// ggml has no way to turn this type into floats, or back.
    #[error("ggml cannot {0} tensors of type {1}")]
    Type(&'static str, String),
    /// The quantiser wrote data that does not decode to finite numbers.
    #[error("ggml produced invalid data while quantising to {0}")]
    Quantise(String),
    /// libllama does not load a model.
    #[error("{}: llama.cpp {}", path.display(), reason)]
    Load {
        /// Model file.
        path: PathBuf,
        /// Refused action, and the reason.
        reason: String,
    },
    /// libllama refused a context or a batch.
    #[error("llama.cpp {0}")]
    Llama(String),
}
