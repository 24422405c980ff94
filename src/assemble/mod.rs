//! From a plan to a GGUF in the carrier architecture.

mod imatrix;
mod metadata;
mod tensors;

pub use imatrix::{importance, write_imatrix};
pub use metadata::Provenance;

use crate::gguf::{GgufError, OutTensor, write_gguf};
use crate::model::{Family, Model};
use crate::pipeline::Plan;
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

/// The same tensor; one that holds what is no number, copied or new, is not written.
fn checked(t: OutTensor) -> OutTensor {
    let (ty, name, data) = (t.ty, t.name.clone(), t.data);
    let data = move || {
        let bytes = data()?;
        if ty.decodes_to_numbers(&bytes) { Ok(bytes) } else { Err(GgufError::Damaged(name.clone())) }
    };
    OutTensor { data: Box::new(data), ..t }
}
