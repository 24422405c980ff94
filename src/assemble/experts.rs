//! Assembly of a mixture with fewer experts: whole slices of the source, byte for byte.

use super::Provenance;
use super::metadata::{is_carried, provenance, renamed, size_label};
use super::types::file_type;
use crate::gguf::{GgufError, GgufFile, OutTensor, TensorData, TensorInfo, Value, gguf_size, write_gguf};
use crate::model::{ExpertAxis, Mixture, block_and_role, count};
use crate::observe::LayerMask;
use crate::pipeline::experts::NarrowLayer;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Kept part of a mixture.
#[derive(Clone, Debug)]
pub struct ExpertPlan {
    /// Mask of each layer with experts, those that draft included, by the number of the layer.
    pub layers: BTreeMap<usize, LayerMask>,
    /// Number of experts of each layer.
    pub n_keep: usize,
    /// Whether the blocks that draft tokens are left out.
    pub drop_drafts: bool,
    /// Narrower experts, if that is what they become; then all of them are kept.
    pub narrowed: Option<Narrowed>,
}

impl ExpertPlan {
    /// Returns whether the tensor called `name` belongs to a block that is left out.
    pub(super) fn drops(&self, mixture: &Mixture, name: &str) -> bool {
        self.drop_drafts && mixture.drafts(name)
    }
}

/// Experts with fewer neurons.
#[derive(Clone, Debug)]
pub struct Narrowed {
    /// Number of neurons of each expert.
    pub width: usize,
    /// Remains of each layer, by the number of the layer.
    pub layers: BTreeMap<usize, NarrowLayer>,
}

/// Writes `mixture` with what `plan` keeps. `path` only names the file in errors.
///
/// # Errors
/// [`GgufError`] if a tensor cannot be read or the file not written.
pub fn assemble_experts(
    mixture: &Mixture,
    plan: &ExpertPlan,
    p: &Provenance,
    out: &mut impl Write,
    path: &Path,
) -> Result<(), GgufError> {
    let tensors = tensors(mixture, plan)?;
    let metadata = metadata(mixture, plan, &tensors, p);
    write_gguf(out, path, &metadata, &tensors)
}

/// Size in bytes of the file that [`assemble_experts`] writes, to the byte if `p` is of the same length. New
/// values are not looked at.
pub fn experts_size(mixture: &Mixture, plan: &ExpertPlan, p: &Provenance) -> Result<u64, GgufError> {
    let tensors = tensors(mixture, plan)?;
    Ok(gguf_size(&metadata(mixture, plan, &tensors, p), &tensors))
}

/// Tensors of the result, in the source's order.
fn tensors<'m>(mixture: &'m Mixture, plan: &'m ExpertPlan) -> Result<Vec<OutTensor<'m>>, GgufError> {
    let file = &mixture.file;
    if let Some(narrowed) = &plan.narrowed {
        return Ok(narrow_tensors(mixture, plan, narrowed));
    }
    let mut axes: BTreeMap<usize, (&LayerMask, ExpertAxis)> = BTreeMap::new();
    for layer in &mixture.layers {
        let mask = &plan.layers[&layer.block];
        axes.extend(layer.tensors.iter().map(|&(i, axis)| (i, (mask, axis))));
    }
    let tensors = file.tensors().iter().enumerate().filter(|(_, t)| !plan.drops(mixture, &t.name));
    tensors
        .map(|(i, t)| match axes.get(&i) {
            None => Ok(OutTensor::copy(file, t)),
            Some((mask, ExpertAxis::Tokens)) => remapped(file, t, mask),
            Some((mask, ExpertAxis::Experts)) => match &mask.router {
                Some(rows) if t.name.ends_with(".ffn_gate_inp.weight") => router(t, mask, rows),
                _ => Ok(sliced(file, t, &mask.kept_experts(), ExpertAxis::Experts)),
            },
            Some((mask, ExpertAxis::Chunks)) => {
                let first = mask.kept_experts().into_iter().step_by(mixture.chunk);
                let chunks: Vec<usize> = first.map(|e| e / mixture.chunk).collect();
                Ok(sliced(file, t, &chunks, ExpertAxis::Chunks))
            }
        })
        .collect()
}

/// Tensors of a mixture with narrower experts, in the source's order.
fn narrow_tensors<'m>(mixture: &'m Mixture, plan: &ExpertPlan, narrowed: &'m Narrowed) -> Vec<OutTensor<'m>> {
    let file = &mixture.file;
    let one = |t: &'m TensorInfo| {
        let layer = block_and_role(&t.name).and_then(|(block, _)| narrowed.layers.get(&block));
        let role = t.name.rsplit_once(".ffn_").map_or("", |(_, role)| role);
        let Some(layer) = layer else { return OutTensor::copy(file, t) };
        match role {
            "down_exps.weight" => OutTensor {
                name: t.name.clone(),
                ty: layer.down.ty,
                ne: vec![narrowed.width, t.ne[1], mixture.n_expert],
                data: TensorData::made(|| Ok(Cow::Borrowed(&layer.down.bytes[..]))),
            },
            "gate_exps.weight" | "up_exps.weight" | "gate_up_exps.weight" => {
                let row = t.ty.row_bytes(t.ne[0]);
                rows_of_experts(file, t, row, t.ne[1], &layer.neurons)
            }
            "gate_exps.bias" | "up_exps.bias" | "gate_up_exps.bias" => {
                rows_of_experts(file, t, t.ty.row_bytes(t.ty.block_size()), t.ne[0], &layer.neurons)
            }
            _ => OutTensor::copy(file, t),
        }
    };
    file.tensors().iter().filter(|t| !plan.drops(mixture, &t.name)).map(one).collect()
}

/// Rows of `row` bytes of the kept neurons of each expert, which has `n_rows` rows in the source. A tensor of
/// gate and up together has the neurons twice.
fn rows_of_experts<'m>(
    file: &'m GgufFile,
    t: &'m TensorInfo,
    row: usize,
    n_rows: usize,
    neurons: &[Vec<usize>],
) -> OutTensor<'m> {
    let bytes = file.data(t);
    let halves = if t.name.contains("gate_up_exps") { 2 } else { 1 };
    let mut parts = Vec::new();
    for (e, kept) in neurons.iter().enumerate() {
        for half in 0..halves {
            let first = e * n_rows + half * n_rows / halves;
            parts.extend(kept.iter().map(|j| &bytes[(first + j) * row..(first + j + 1) * row]));
        }
    }
    let mut ne = t.ne.clone();
    let axis = if t.name.ends_with(".bias") { 0 } else { 1 };
    ne[axis] = halves * neurons.first().map_or(0, Vec::len);
    OutTensor { name: t.name.clone(), ty: t.ty, ne, data: TensorData::Parts(parts) }
}

/// Entries `kept` along the last axis of a tensor.
fn sliced<'m>(file: &'m GgufFile, t: &'m TensorInfo, kept: &[usize], axis: ExpertAxis) -> OutTensor<'m> {
    let bytes = file.data(t);
    let each = bytes.len() / count(t, axis);
    // Neighbours are one part.
    let mut parts: Vec<std::ops::Range<usize>> = Vec::new();
    for &e in kept {
        match parts.last_mut() {
            Some(last) if last.end == e * each => last.end += each,
            _ => parts.push(e * each..(e + 1) * each),
        }
    }
    let mut ne = t.ne.clone();
    if let Some(last) = ne.last_mut() {
        *last = kept.len();
    }
    let data = TensorData::Parts(parts.into_iter().map(|part| &bytes[part]).collect());
    OutTensor { name: t.name.clone(), ty: t.ty, ne, data }
}

/// Router of the kept experts with new values, in the tensor's own type.
fn router<'m>(t: &'m TensorInfo, mask: &LayerMask, rows: &[f32]) -> Result<OutTensor<'m>, GgufError> {
    let n_in = t.ne[0];
    let kept = mask.kept_experts();
    let values: Vec<f32> = kept.iter().flat_map(|e| &rows[e * n_in..(e + 1) * n_in]).copied().collect();
    let bytes =
        t.ty.quantize(&values, n_in, None)
            .map_err(|source| GgufError::Tensor { name: t.name.clone(), source })?;
    let data = TensorData::made(move || Ok(Cow::Owned(bytes.clone())));
    Ok(OutTensor { name: t.name.clone(), ty: t.ty, ne: vec![n_in, kept.len()], data })
}

/// Table of the experts of each token, with the new numbers of kept experts and substitutes for the others.
fn remapped<'m>(file: &'m GgufFile, t: &'m TensorInfo, mask: &LayerMask) -> Result<OutTensor<'m>, GgufError> {
    let mut number = vec![-1i32; mask.kept.len()];
    for (new, old) in mask.kept_experts().into_iter().enumerate() {
        number[old] = new as i32;
    }
    let mut table = experts_of_tokens(file, t, mask.kept.len())?;
    for row in table.chunks_exact_mut(t.ne[0]) {
        mask.substitute(row);
        row.iter_mut().for_each(|e| *e = number[*e as usize]);
    }
    let bytes: Vec<u8> = table.into_iter().flat_map(i32::to_ne_bytes).collect();
    let data = TensorData::made(move || Ok(Cow::Owned(bytes.clone())));
    Ok(OutTensor { name: t.name.clone(), ty: t.ty, ne: t.ne.clone(), data })
}

/// Table `[n_vocab, n_used]` of the experts of each token (`ffn_gate_tid2eid`), each checked to be one of
/// `n_expert`.
///
/// # Errors
/// [`GgufError::Damaged`] if one is not.
pub(crate) fn experts_of_tokens(
    file: &GgufFile,
    t: &TensorInfo,
    n_expert: usize,
) -> Result<Vec<i32>, GgufError> {
    let table: Vec<i32> = file.data(t).as_chunks().0.iter().map(|b| i32::from_ne_bytes(*b)).collect();
    let known = |e: &i32| usize::try_from(*e).is_ok_and(|e| e < n_expert);
    if table.iter().all(known) { Ok(table) } else { Err(GgufError::Damaged(t.name.clone())) }
}

/// Metadata of the result: the source's, in its order and with its types, with fewer experts.
fn metadata(
    mixture: &Mixture,
    plan: &ExpertPlan,
    tensors: &[OutTensor],
    p: &Provenance,
) -> Vec<(String, Value)> {
    let n_params = tensors.iter().map(|t| t.ne.iter().product::<usize>()).sum();
    let key = |suffix: &str| format!("{}.{suffix}", mixture.arch);
    let (experts, blocks, drafts) = (key("expert_count"), key("block_count"), key("nextn_predict_layers"));
    let n_left = mixture.n_layer - if plan.drop_drafts { mixture.n_draft } else { 0 };
    let mut width_keys = plan.narrowed.as_ref().map_or(Vec::new(), |n| mixture.width_keys(n.width));
    let mut out: Vec<(String, Value)> = Vec::new();
    for (name, value) in mixture.file.metadata() {
        if !is_carried(name) || (plan.drop_drafts && *name == drafts) {
            continue;
        }
        let value = match (name.as_str(), value) {
            ("general.name", Value::Str(name)) => Value::Str(renamed(name, p.sparsity)),
            ("general.size_label", Value::Str(said)) => {
                Value::Str(experts_label(&String::from_utf8_lossy(said), plan.n_keep, n_params).into())
            }
            ("general.parameter_count", Value::U64(_)) => Value::U64(n_params as u64),
            ("general.file_type", Value::U32(said)) => Value::U32(file_type(*said, tensors)),
            _ if *name == experts => same_type(value, plan.n_keep),
            _ if *name == blocks => same_type(value, n_left),
            (name, _) if name.starts_with(&key("")) && plan.drop_drafts => {
                shorter(value, mixture.n_layer, n_left)
            }
            _ => value.clone(),
        };
        let value = match width_keys.iter().position(|(k, _)| *name == key(k)) {
            Some(at) => width_keys.remove(at).1,
            None => value,
        };
        out.push((name.clone(), value));
    }
    // Keys that had a default until now.
    let at = out.iter().rposition(|(k, _)| k.starts_with(&key(""))).map_or(out.len(), |i| i + 1);
    out.splice(at..at, width_keys.into_iter().map(|(suffix, v)| (key(suffix), v)));
    out.extend(provenance(p));
    let new_routers = plan.layers.values().any(|mask| mask.router.is_some());
    let new = [(new_routers, "ffn_gate_inp"), (plan.narrowed.is_some(), "ffn_down_exps")];
    let names = new.into_iter().filter(|(is, _)| *is).map(|(_, name)| name.into()).collect();
    out.push((super::NEW_MATRICES.into(), Value::StrArray(names)));
    let layers: Vec<i32> = plan.layers.keys().map(|&l| l as i32).collect();
    out.push((KEPT_LAYERS.into(), Value::i32_array(&layers)));
    let kept: Vec<i32> =
        plan.layers.values().flat_map(|mask| mask.kept_experts()).map(|e| e as i32).collect();
    out.push((KEPT_EXPERTS.into(), Value::i32_array(&kept)));
    out
}

/// Keys of the layers with experts, and of the source's experts that each of them keeps, one layer after
/// another.
pub(crate) const KEPT_LAYERS: &str = "putri.experts.layers";
pub(crate) const KEPT_EXPERTS: &str = "putri.experts.kept";

/// A number in the type of `old`.
fn same_type(old: &Value, n: usize) -> Value {
    match old {
        Value::I32(_) => Value::I32(n as i32),
        _ => Value::U32(n as u32),
    }
}

/// An array with one entry per block, cut to the blocks that are left; other values as they are.
fn shorter(value: &Value, n_layer: usize, n_left: usize) -> Value {
    match value {
        Value::Array { ty, bytes, len } if *len == n_layer => {
            let each = bytes.len() / len;
            Value::Array { ty: *ty, bytes: bytes[..n_left * each].to_vec(), len: n_left }
        }
        other => other.clone(),
    }
}

/// Size label of a mixture: `128x1.8B` counts experts, `30B-A3B` all and active parameters.
fn experts_label(said: &str, n_expert: usize, n_params: usize) -> String {
    if let Some((n, each)) = said.split_once('x')
        && n.parse::<usize>().is_ok()
    {
        return format!("{n_expert}x{each}");
    }
    match said.split_once("-A") {
        Some((_, active)) => format!("{}-A{active}", size_label(n_params)),
        None => size_label(n_params),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_count_what_is_left() {
        assert_eq!(experts_label("128x1.8B", 96, 1), "96x1.8B");
        assert_eq!(experts_label("30B-A3B", 96, 23_000_000_000), "23B-A3B");
        assert_eq!(experts_label("30B", 96, 23_000_000_000), "23B");
    }
}
