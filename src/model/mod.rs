//! Model description: hyper-parameters, tensors by role, and the possible output architectures after
//! pruning.

mod family;
mod hparams;
mod kv_cache;
mod mixture;
mod open;
mod output_arch;
mod rope;
mod shape;
mod tensors;
mod traits;
mod weights;

pub use family::Family;
pub use hparams::{ExpertParams, Hparams, Temperature};
pub use kv_cache::KvCache;
pub use mixture::{ExpertAxis, ExpertGroups, ExpertLayer, Mixture, block_and_role, count};
pub use open::Model;
pub use output_arch::{Arch, Heads, OutputArchs};
pub use rope::SlidingWindow;
pub use shape::{BlockShape, FfnUnit};
pub use tensors::{BlockMatrix, BlockTensors, BlockVector, ExpertTensors, Segment, SharedTensors};
pub use traits::*;
pub(crate) use weights::group_rows;
pub use weights::{BlockWeights, ExpertWeights, Matrix, SharedWeights};

use crate::gguf::GgufError;

/// Reason why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The container is at fault.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The architecture is not supported.
    #[error("architecture {0:?} is not supported; supported: {list}", list = Family::names())]
    Unsupported(String),
    /// The model is a mixture of experts, but its architecture is not known to have experts.
    #[error("this is a mixture of experts ({0} experts), which architecture {1} is not known to be")]
    Experts(usize, &'static str),
    /// The architecture does not have this tensor.
    #[error("tensor {0} is not known in architecture {1}; the file would be carried over wrongly")]
    UnknownTensor(String, &'static str),
    /// A part of the model is not supported.
    #[error("{0}")]
    Unusable(String),
}
