//! Assembly of a GGUF in the output architecture from a plan.

mod experts;
mod imatrix;
mod metadata;
mod tensors;
mod types;

pub use experts::{ExpertPlan, Narrowed, assemble_experts, experts_size};
pub(crate) use experts::{KEPT_EXPERTS, KEPT_LAYERS, experts_of_tokens};
pub use imatrix::{importance, slice_imatrix, write_imatrix};
pub use metadata::Provenance;
pub(crate) use metadata::{NEW_MATRICES, original_name};

use crate::ggml::FileType;
use crate::gguf::{GgufError, OutTensor, TensorData, write_gguf};
use crate::model::{BlockMatrix, BlockTensors, Family, Model, Segment};
use crate::pipeline::{BlockPlan, Plan};
use std::io::Write;
use std::path::Path;

/// Summary of the written file.
#[derive(Clone, Debug)]
pub struct Written {
    /// Output architecture.
    pub output_arch: Family,
    /// Matrices in other types than requested, one sentence each.
    pub fallbacks: Vec<String>,
}

/// Writes the pruned model to `out`.
/// `path` only names the file in errors. With `mix`, `model` was quantised to that mix.
///
/// # Errors
/// [`GgufError`] if a tensor cannot be read or the output cannot be written.
pub fn assemble(
    model: &Model,
    plan: &Plan,
    provenance: &Provenance,
    mix: Option<FileType>,
    out: &mut impl Write,
    path: &Path,
) -> Result<Written, GgufError> {
    let output_arch = plan.output_arch(model);
    let tensors = tensors::tensors(model, plan, output_arch)?;
    let metadata = metadata::metadata(model, plan, output_arch, &tensors, provenance);
    let fallbacks = match mix {
        Some(mix) => types::misfits_of(mix, &tensors),
        None => types::changed(model, &tensors),
    };
    let tensors: Vec<OutTensor> = tensors.into_iter().map(checked).collect();
    write_gguf(out, path, &metadata, &tensors)?;
    Ok(Written { output_arch, fallbacks })
}

/// Whether [`assemble`] writes exactly the values that `plan` was measured with.
/// It does not in two cases: groups are removed from an attn_output without new values, which may have to
/// be requantised; Q, K and V of different types are joined into one tensor.
pub fn writes_exactly(model: &Model, plan: &Plan) -> bool {
    let one_qkv = plan.output_arch(model).traits().one_qkv;
    let block = |(p, t): (&BlockPlan, &BlockTensors)| {
        let fewer = t.qkv.is_some_and(|[_, k, _]| p.groups.len() * model.hparams.head_dim < k.n);
        let type_of = |s: &Segment| model.tensor(s).ty;
        let mixed = t.qkv.is_some_and(|[q, k, v]| type_of(&q) != type_of(&k) || type_of(&k) != type_of(&v));
        (p.groups.is_empty() || p.matrix(BlockMatrix::AttnOutput).is_some() || !fewer) && !(one_qkv && mixed)
    };
    plan.blocks.iter().zip(&model.blocks).all(block)
}

/// Wraps a tensor so that it is rejected on writing if it holds NaN or infinite values, copied or new.
fn checked(t: OutTensor) -> OutTensor {
    let (ty, name) = (t.ty, t.name.clone());
    let sound = move |bytes: &[u8]| {
        if ty.decodes_to_numbers(bytes) { Ok(()) } else { Err(GgufError::Damaged(name.clone())) }
    };
    let data = match t.data {
        TensorData::Made(make) => TensorData::made(move || {
            let bytes = make()?;
            sound(&bytes).map(|()| bytes)
        }),
        // The source's values were checked before the run.
        parts @ TensorData::Parts(_) => parts,
    };
    OutTensor { data, ..t }
}
