//! State of an unfinished training in the checkpoint: a record of where it is, and one per block.
//!
//! Blocks are kept in two sets by turns. The record that names the newer one is written last, so that a run
//! that ends in between goes on from the older one.

use super::course::{Best, Trained};
use crate::ggml::Type;
use crate::gguf::Value;
use crate::pipeline::run::Run;
use crate::pipeline::training::BlockParams;
use crate::pipeline::{KeptTensor, PruneError, Record};

/// Name of the record of where the training is.
pub(super) const STATE: &str = "recover";

/// Names of the two sets of records of blocks.
const SETS: [&str; 2] = ["a", "b"];

/// Names of all records for a model of `n_layer` blocks.
pub(super) fn names(n_layer: usize) -> Vec<String> {
    let blocks = (0..SETS.len()).flat_map(|set| (0..n_layer).map(move |il| block(set, il)));
    std::iter::once(STATE.to_string()).chain(blocks).collect()
}

fn block(set: usize, il: usize) -> String {
    format!("{STATE}-{}-{il:03}", SETS[set])
}

/// Where a training is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    /// Steps that were taken, and steps in all.
    pub(super) n: usize,
    pub(super) n_steps: usize,
    /// Factor of the rate.
    pub(super) slower: f32,
    /// Judgements in a row without a gain.
    pub(super) without_gain: usize,
}

/// Keeps the state of a training in the older of the sets.
pub(super) fn save(
    run: &mut Run,
    place: &Place,
    params: &mut [BlockParams],
    best: &Best,
    set: usize,
) -> Result<(), PruneError> {
    let mut values = best.values.iter();
    for (il, params) in params.iter_mut().enumerate() {
        let mut record = Record::default();
        for (i, adam) in params.each_mut().enumerate() {
            for (name, size, bytes) in adam.arrays() {
                record.tensors.push(tensor(i, name, size, bytes));
            }
            let best = values.next().expect("as many as parameters");
            record.tensors.push(tensor(i, "best", 4, bytemuck::cast_slice(best)));
        }
        run.checkpoint.save(&block(set, il), record)?;
    }
    let floats =
        [best.score, f64::from(place.slower)].into_iter().chain(best.trained.divergences.iter().copied());
    let bits: Vec<usize> = floats.map(|v| v.to_bits() as usize).collect();
    let counts = [place.n, place.n_steps, place.without_gain, best.trained.tokens];
    let record = Record::default()
        .with_numbers("counts", counts)
        .with_numbers("floats", bits)
        .with("set", Value::U32(set as u32));
    run.checkpoint.save(STATE, record)?;
    Ok(())
}

/// Reads the state that an earlier run kept, if there is one. Returns where it was and the set that it is in.
pub(super) fn load(
    run: &mut Run,
    params: &mut [BlockParams],
    best: &mut Best,
) -> Result<Option<(Place, usize)>, PruneError> {
    let Some(record) = run.checkpoint.load(STATE)? else { return Ok(None) };
    let damaged = |run: &Run, name: &str, part: &str| PruneError::from(run.checkpoint.damaged(name, part));
    let (counts, floats) = (record.numbers("counts"), record.numbers("floats"));
    let (
        Some([n, n_steps, without_gain, tokens]),
        Some([score, slower, divergences @ ..]),
        Some(Value::U32(set)),
    ) = (counts.as_deref(), floats.as_deref(), record.get("set"))
    else {
        return Err(damaged(run, STATE, "counts"));
    };
    let set = *set as usize;
    if set >= SETS.len() || divergences.len() != best.trained.divergences.len() {
        return Err(damaged(run, STATE, "set"));
    }
    let float = |bits: &usize| f64::from_bits(*bits as u64);
    let mut values = best.values.iter_mut();
    for (il, params) in params.iter_mut().enumerate() {
        let name = block(set, il);
        let Some(record) = run.checkpoint.load(&name)? else { return Err(damaged(run, &name, "record")) };
        for (i, adam) in params.each_mut().enumerate() {
            let best = values.next().expect("as many as parameters");
            let all = adam.arrays().into_iter().map(|(name, _, bytes)| (name, bytes));
            for (part, into) in all.chain([("best", bytemuck::cast_slice_mut(&mut best[..]))]) {
                let found = record.tensor(&format!("{i}.{part}")).filter(|t| t.bytes.len() == into.len());
                let Some(found) = found else { return Err(damaged(run, &name, part)) };
                into.copy_from_slice(&found.bytes);
            }
        }
    }
    best.score = float(score);
    best.trained = Trained { tokens: *tokens, divergences: divergences.iter().map(float).collect() };
    let place = Place { n: *n, n_steps: *n_steps, slower: float(slower) as f32, without_gain: *without_gain };
    Ok(Some((place, set)))
}

/// Array of the `i`-th parameter. Bits of 16 are kept under the type of that size.
fn tensor(i: usize, name: &str, size: usize, bytes: &[u8]) -> KeptTensor {
    KeptTensor {
        name: format!("{i}.{name}"),
        ty: if size == 2 { Type::BF16 } else { Type::F32 },
        ne: vec![bytes.len() / size],
        bytes: bytes.to_vec(),
    }
}
