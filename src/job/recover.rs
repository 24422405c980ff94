//! Recovery of a model that was pruned before, by this program or another.

use super::{Job, JobError, open_model};
use crate::gguf::Value;
use crate::model::Model;
use std::path::Path;

/// Opens the model at `path`, which `pruned` was made from, and checks that it can be.
///
/// # Errors
/// [`JobError::OtherModel`] if vocabularies or widths differ, or what opening returns.
pub(super) fn origin(path: &Path, pruned: &Model) -> Result<Model, JobError> {
    let origin = open_model(path)?;
    let other = |problem: String| Err(JobError::OtherModel { path: path.into(), problem });
    let [ours, theirs] = [pruned, &origin].map(|m| &m.hparams);
    if ours.n_embd != theirs.n_embd {
        return other(format!("its n_embd is {}, that of the pruned file {}", theirs.n_embd, ours.n_embd));
    }
    if ours.n_vocab != theirs.n_vocab {
        return other(format!(
            "its vocabulary has {} tokens, that of the pruned file {}",
            theirs.n_vocab, ours.n_vocab
        ));
    }
    for key in
        ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"]
    {
        if pruned.file.get(key) != origin.file.get(key) {
            return other(format!("its {key} is not that of the pruned file"));
        }
    }
    Ok(origin)
}

/// Share of the parameters of `origin`'s blocks that `pruned` lacks.
pub(super) fn removed(pruned: &Model, origin: &Model) -> f64 {
    let params = |m: &Model| m.hparams.blocks_params(&m.hparams.blocks) as f64;
    1.0 - params(pruned) / params(origin)
}

/// Sparsity that was asked for, now or when the input was pruned.
pub(super) fn asked(job: &Job, input: &Model, origin: &Model) -> f64 {
    match (&job.recover_from, input.file.get("putri.sparsity")) {
        (None, _) => job.settings.sparsity,
        (Some(_), Some(Value::F32(asked))) => f64::from(*asked),
        (Some(_), _) => removed(input, origin),
    }
}

/// Name of the method by which the result was pruned.
pub(super) fn method(job: &Job, input: &Model) -> String {
    match (&job.recover_from, input.file.get("putri.method")) {
        (Some(_), Some(Value::Str(name))) => String::from_utf8_lossy(name).into_owned(),
        (Some(_), _) => "unknown".into(),
        _ => job.settings.method.name().into(),
    }
}
