//! Residual streams of tokens through a whole plan.

use super::{Observer, Plan, PruneError};
use crate::forward::{Forward, whole_windows};
use crate::ggml::Token;
use crate::gguf::GgufError;
use crate::model::{BlockWeights, Model};
use crate::spill::{SpillStore, SpillVec};

/// Number of tokens whose embeddings are in memory before they are stored; at least those of a window.
const PART: usize = 2048;

/// Embeddings `[n_tokens, n_embd]` of `tokens`, in windows of `forward`, in the spill store.
pub(super) fn embedded(
    forward: &Forward,
    model: &Model,
    tokens: &[Token],
    spill: &SpillStore,
) -> Result<SpillVec<f32>, PruneError> {
    let n_embd = model.hparams.n_embd;
    let mut out = spill.zeros(tokens.len() * n_embd)?;
    let part = whole_windows(PART, forward.n_ctx());
    for (tokens, out) in tokens.chunks(part).zip(out.chunks_mut(part * n_embd)) {
        out.copy_from_slice(&forward.embed(model, tokens)?);
    }
    Ok(out)
}

/// Final residual stream `[n_tokens, n_embd]` of `tokens` under the plan. The streams before each block are
/// passed to `before`.
pub(super) fn planned_stream(
    forward: &Forward,
    model: &Model,
    plan: &Plan,
    tokens: &[Token],
    observer: &dyn Observer,
    before: impl FnMut(Vec<f32>) -> Result<(), PruneError>,
) -> Result<Vec<f32>, PruneError> {
    let weights = |il: usize| plan.block(model, il);
    stream_through(forward, model, plan.blocks.len(), weights, tokens, observer, before)
}

/// Does the same for the `n_layer` blocks whose weights `weights` returns.
pub(super) fn stream_through(
    forward: &Forward,
    model: &Model,
    n_layer: usize,
    weights: impl Fn(usize) -> Result<BlockWeights, GgufError>,
    tokens: &[Token],
    observer: &dyn Observer,
    mut before: impl FnMut(Vec<f32>) -> Result<(), PruneError>,
) -> Result<Vec<f32>, PruneError> {
    let mut x = forward.embed(model, tokens)?;
    for il in 0..n_layer {
        if observer.interrupted() {
            return Err(PruneError::Interrupted);
        }
        let block = forward.upload(&weights(il)?)?;
        let mut next = vec![0.0; x.len()];
        forward.stream(&block, &x, &mut next)?;
        before(std::mem::replace(&mut x, next))?;
    }
    Ok(x)
}

/// Residual streams `[n_tokens, n_embd]` of all windows in the dense and the pruned model, at the input of
/// the same block.
pub(super) struct Streams {
    pub(super) dense: SpillVec<f32>,
    pub(super) pruned: SpillVec<f32>,
}
