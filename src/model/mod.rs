//! What a model is made of: hyper-parameters, tensors by role, and which architecture can carry it
//! once it is pruned.

mod carrier;
mod family;
mod hparams;
mod kv_cache;
mod open;
mod rope;
mod tensors;
mod traits;
mod weights;

pub use carrier::{Arch, Carriers, Heads};
pub use family::Family;
pub use hparams::{BlockShape, ExpertParams, Hparams, Piece, Temperature};
pub use kv_cache::KvCache;
pub use open::Model;
pub use rope::SlidingWindow;
pub use tensors::{BlockTensors, BlockVector, ExpertTensors, Segment, SharedTensors};
pub use traits::*;
pub(crate) use weights::group_rows;
pub use weights::{BlockWeights, ExpertWeights, Matrix, SharedWeights};

use crate::gguf::GgufError;

/// Why a model cannot be worked on.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The container is at fault.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The architecture is not supported.
    #[error("architecture {0:?} is not supported; supported: {list}", list = Family::names())]
    Unsupported(String),
    /// A mixture of experts.
    #[error("this is a mixture of experts ({0} experts), which architecture {1} is not known to be")]
    Experts(usize, &'static str),
    /// A tensor that the architecture does not have.
    #[error("tensor {0} is not known in architecture {1}; the file would be carried over wrongly")]
    UnknownTensor(String, &'static str),
    /// A part of the model that we do not handle.
    #[error("{0}")]
    Unusable(String),
}
