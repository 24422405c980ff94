//! From a plan to a GGUF in the carrier architecture.

mod imatrix;
mod metadata;
mod tensors;
mod types;

pub use imatrix::{importance, write_imatrix};
pub use metadata::Provenance;
pub(crate) use metadata::original_name;

use crate::ggml::FileType;
use crate::gguf::{GgufError, OutTensor, write_gguf};
use crate::model::{BlockTensors, Family, Model, Segment};
use crate::pipeline::{BlockPlan, Plan};
use std::io::Write;
use std::path::Path;

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its architecture.
    pub carrier: Family,
    /// Matrices in other types than those asked for, in a sentence each.
    pub fallbacks: Vec<String>,
}

/// Writes the pruned model to `out`; `path` only names the file in errors. With `mix`, `model` was quantised to that mix.
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
    let carrier = plan.carrier(model);
    let tensors = tensors::tensors(model, plan, carrier)?;
    let metadata = metadata::metadata(model, plan, carrier, &tensors, provenance);
    let fallbacks = match mix {
        Some(mix) => types::misfits_of(mix, &tensors),
        None => types::changed(model, &tensors),
    };
    let tensors: Vec<OutTensor> = tensors.into_iter().map(checked).collect();
    write_gguf(out, path, &metadata, &tensors)?;
    Ok(Written { carrier, fallbacks })
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
