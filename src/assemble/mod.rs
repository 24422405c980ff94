//! From a plan to a GGUF in the carrier architecture.

mod imatrix;
mod metadata;
mod tensors;

pub use imatrix::{importance, write_imatrix};
pub use metadata::Provenance;

use crate::gguf::{GgufError, OutTensor, write_gguf};
use crate::model::{BlockTensors, Family, Model, Segment};
use crate::pipeline::{BlockPlan, Plan};
use std::io::Write;
use std::path::Path;

/// Writes the pruned model to `out`; `path` only names the file in errors. Returns the architecture
/// it is written in.
///
/// # Errors
/// [`GgufError`] if a tensor cannot be read or the output cannot be written.
pub fn assemble(
    model: &Model,
    plan: &Plan,
    provenance: &Provenance,
    out: &mut impl Write,
    path: &Path,
) -> Result<Family, GgufError> {
    let carrier = plan.carrier(model);
    let tensors = tensors::tensors(model, plan, carrier)?;
    let n_params = tensors.iter().map(|t| t.ne.iter().product::<usize>()).sum();
    let metadata = metadata::metadata(model, plan, carrier, n_params, provenance);
    let tensors: Vec<OutTensor> = tensors.into_iter().map(checked).collect();
    write_gguf(out, path, &metadata, &tensors)?;
    Ok(carrier)
}

/// Whether what [`assemble`] writes holds exactly the values that `plan` was measured with: not where groups are taken out of
/// an attn_output that has no new values, which may have to be encoded anew, or Q, K and V of different types become one.
pub fn writes_exactly(model: &Model, plan: &Plan) -> bool {
    let one_qkv = plan.carrier(model).traits().one_qkv;
    let block = |(p, t): (&BlockPlan, &BlockTensors)| {
        let fewer = t.qkv.is_some_and(|[_, k, _]| p.groups.len() * model.hparams.head_dim < k.n);
        let type_of = |s: &Segment| model.tensor(s).ty;
        let mixed = t.qkv.is_some_and(|[q, k, v]| type_of(&q) != type_of(&k) || type_of(&k) != type_of(&v));
        (p.groups.is_empty() || p.attn_output.is_some() || !fewer) && !(one_qkv && mixed)
    };
    plan.blocks.iter().zip(&model.blocks).all(block)
}

/// The same tensor; one that holds what is no number, copied or new, is not written.
fn checked(t: OutTensor) -> OutTensor {
    let (ty, name, data) = (t.ty, t.name.clone(), t.data);
    let data = move || {
        let bytes = data()?;
        if ty.decodes_to_numbers(&bytes) { Ok(bytes) } else { Err(GgufError::Damaged(name.clone())) }
    };
    OutTensor { data: Box::new(data), ..t }
}
