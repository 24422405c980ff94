//! The container: opening a GGUF, its metadata and tensors, and writing a new one.
//!
//! This room knows nothing of models. Parsing and encoding are ggml's; what is added here is that
//! every tensor is checked against the file's size once, at the door.

mod open;
mod write;

pub use open::{GgufFile, TensorInfo};
pub(crate) use open::{part_suffix, sha256};
pub use write::{OutTensor, write_gguf, write_parts};

pub use crate::ggml::RawValue as Value;

use std::path::PathBuf;

/// What is wrong with a file, naming the key or tensor at fault.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be opened, mapped or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file does not begin as a GGUF does.
    #[error("{}: not a GGUF file (it starts with {magic:?}, not \"GGUF\")", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        magic: String,
    },
    /// The file is what Git LFS leaves in the place of a large one.
    #[error("{}: is a Git LFS pointer, not the model; `git lfs pull` fetches it", .0.display())]
    LfsPointer(PathBuf),
    /// ggml does not accept the header.
    #[error("{}: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor reaches beyond the end of the file.
    #[error("{}: cut short: tensor {name} ends at byte {end}, the file at byte {len}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Where its data would end.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// A tensor has a type that the engine does not know.
    #[error("{}: tensor {name} has unknown type number {ty}; a newer llama.cpp may read it", path.display())]
    UnknownType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// ggml's number.
        ty: u32,
    },
    /// A key that must be there is not.
    #[error("key {0} is missing")]
    MissingKey(String),
    /// A key has a value that cannot be used.
    #[error("key {key} {problem}")]
    BadKey {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that must be there is not.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor has other sizes than the metadata says.
    #[error("tensor {name} is {found:?}, but the metadata says {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Sizes in the file.
        found: Vec<usize>,
        /// Sizes that the metadata implies.
        expected: Vec<usize>,
    },
    /// A tensor holds what is no number.
    #[error("tensor {name} holds {value} in row {row}: the file is damaged, or was made wrongly")]
    NotFinite {
        /// The tensor.
        name: String,
        /// The value.
        value: f32,
        /// The row of ne\[0\] elements that it is in.
        row: usize,
    },
    /// A tensor holds what is no number.
    #[error("tensor {0} does not decode to finite numbers: the file is damaged, or was made wrongly")]
    Damaged(String),
    /// ggml failed on a tensor.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// The tensor.
        name: String,
        /// Why.
        source: crate::ggml::GgmlError,
    },
}
