//! GGUF container: opening a file, its metadata and tensors, and writing a new one.
//!
//! This module knows nothing of models. ggml parses and encodes. This module adds one check on opening:
//! every tensor lies inside the file.

mod open;
mod write;

pub use open::{GgufFile, TensorInfo};
pub(crate) use open::{part_suffix, sha256};
pub use write::{MakeBytes, OutTensor, TensorData, gguf_size, write_gguf, write_parts};

pub use crate::ggml::RawValue as Value;

use std::path::PathBuf;

/// Fault of a file, with the key or tensor that causes it.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be opened, mapped or written.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// The path is not a file that can be mapped.
    #[error("{}: {problem}", path.display())]
    NoFile {
        /// Path.
        path: PathBuf,
        /// Description of what is at the path.
        problem: &'static str,
    },
    /// The file does not begin as a GGUF does.
    #[error("{}: not a GGUF file (it starts with {magic:?}, not \"GGUF\")", path.display())]
    Magic {
        /// Path of the file.
        path: PathBuf,
        /// First bytes of the file.
        magic: String,
    },
    /// The file is a Git LFS pointer, which stands for a large file.
    #[error("{}: is a Git LFS pointer, not the model; `git lfs pull` fetches it", .0.display())]
    LfsPointer(PathBuf),
    /// ggml does not accept the header.
    #[error("{}: {reason}", path.display())]
    Header {
        /// Path of the file.
        path: PathBuf,
        /// Reason.
        reason: String,
    },
    /// A tensor reaches beyond the end of the file.
    #[error("{}: cut short: tensor {name} ends at byte {end}, the file at byte {len}", path.display())]
    Truncated {
        /// Path of the file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Offset where its data would end.
        end: u64,
        /// Length of the file in bytes.
        len: u64,
    },
    /// A tensor has a type that the engine does not know.
    #[error("{}: tensor {name} has unknown type number {ty}; a newer llama.cpp may read it", path.display())]
    UnknownType {
        /// Path of the file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// ggml's type number.
        ty: u32,
    },
    /// A required key is missing.
    #[error("key {0} is missing")]
    MissingKey(String),
    /// A key has a value that cannot be used.
    #[error("key {key} {problem}")]
    BadKey {
        /// Name of the key.
        key: String,
        /// Problem with its value.
        problem: String,
    },
    /// A required tensor is missing.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor's sizes differ from those that the metadata implies.
    #[error("tensor {name} is {found:?}, but the metadata says {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Sizes in the file, in `ne` order.
        found: Vec<usize>,
        /// Sizes that the metadata implies, in `ne` order.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or an infinite value.
    #[error("tensor {name} holds {value} in row {row}: the file is damaged, or was made wrongly")]
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// NaN or infinite value.
        value: f32,
        /// Index of its row of ne\[0\] elements.
        row: usize,
    },
    /// A tensor does not decode to finite numbers.
    #[error("tensor {0} does not decode to finite numbers: the file is damaged, or was made wrongly")]
    Damaged(String),
    /// ggml failed on a tensor.
    #[error("cannot convert tensor {name}")]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// Error of ggml.
        source: crate::ggml::GgmlError,
    },
}
