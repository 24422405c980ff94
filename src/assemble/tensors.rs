//! Tensors of the output, in the source's order.

use crate::ggml::Type;
use crate::gguf::{GgufError, OutTensor, TensorInfo};
use crate::model::{BlockVector, Family, Model, Segment, group_rows};
use crate::pipeline::Plan;
use crate::requant::{Quantised, output_type, quantise, select_columns, select_rows};
use std::borrow::Cow;

/// Change of a source tensor.
enum Action<'p> {
    Copy,
    Drop,
    /// Selects these rows (elements of a vector), in this order.
    Rows(Vec<usize>),
    /// Selects the same rows in each of this many stacked matrices.
    RowsOfEach(usize, Vec<usize>),
    /// Joins rows of several tensors into one tensor of that name.
    Joined(String, Vec<(usize, Vec<usize>)>),
    /// Splits into several tensors with these names and rows.
    Split([(String, Vec<usize>); 2]),
    /// Selects these runs of columns of this length.
    Columns(usize, &'p [usize]),
    Replace(&'p Quantised),
    /// Writes a vector with these values.
    Values(&'p [f32]),
    /// Multiplies a vector by this factor.
    Scaled(f32),
}

/// Tensors of the pruned model; their data is produced as it is written.
///
/// # Errors
/// [`GgufError`] if a tensor cannot be converted.
pub(super) fn tensors<'m>(
    model: &'m Model,
    plan: &'m Plan,
    output_arch: Family,
) -> Result<Vec<OutTensor<'m>>, GgufError> {
    let mut actions: Vec<Action> = model.file.tensors().iter().map(|_| Action::Copy).collect();
    let mut biases: Vec<Option<&[f32]>> = vec![None; actions.len()];
    let query_scale = query_scale(model, plan);
    if query_scale != 1.0 {
        // Only families with a query norm have such a factor.
        for [q, _] in model.blocks.iter().filter_map(|t| t.qk_norm) {
            actions[q.tensor] = Action::Scaled(query_scale);
        }
    }
    for il in 0..plan.blocks.len() {
        plan_block(model, plan, il, output_arch, &mut actions, &mut biases);
    }
    let [old, new] = [model.hparams.family, output_arch].map(|f| format!(".{}.", f.traits().ffn_norm));
    let mut out = Vec::new();
    for ((t, action), bias) in model.file.tensors().iter().zip(actions).zip(biases) {
        let renamed = |o: OutTensor<'m>| OutTensor { name: o.name.replace(&old, &new), ..o };
        if let Action::Split(parts) = action {
            for (name, rows) in parts {
                let part = output(model, t, Action::Rows(rows))?;
                out.extend(part.map(|o| OutTensor { name, ..o }));
            }
            continue;
        }
        out.extend(output(model, t, action)?.map(renamed));
        out.extend(bias.map(|data| values(t.name.replace(".weight", ".bias"), data)));
    }
    Ok(out)
}

/// Factor of the queries that keeps the products of queries and keys unchanged.
/// llama.cpp's attention scale depends on the head count of the first block, which pruning may change.
fn query_scale(model: &Model, plan: &Plan) -> f32 {
    let h = &model.hparams;
    let now = plan.shapes(model)[0].n_head;
    // The first block keeps at least one group.
    h.attention_scale(h.blocks[0].n_head) / h.attention_scale(now)
}

/// Creates a float vector with the values `data`.
fn values(name: String, data: &[f32]) -> OutTensor<'_> {
    let bytes = move || Ok(Cow::Borrowed(bytemuck::cast_slice(data)));
    OutTensor { name, ty: Type::F32, ne: vec![data.len()], data: Box::new(bytes) }
}

/// Plans the tensors of block `il`.
/// `biases` receives the biases that the source does not have, at the tensor that they follow.
fn plan_block<'p>(
    model: &Model,
    plan: &'p Plan,
    il: usize,
    output_arch: Family,
    actions: &mut [Action<'p>],
    biases: &mut [Option<&'p [f32]>],
) {
    let (t, p, shape) = (&model.blocks[il], &plan.blocks[il], &model.hparams.blocks[il]);
    let head_dim = model.hparams.head_dim;
    let heads = shape.heads_per_group() * head_dim;
    let mut set = |s: Option<&Segment>, action: Action<'p>| {
        if let Some(s) = s {
            actions[s.tensor] = action;
        }
    };
    if p.groups.is_empty() {
        let single =
            [&t.attn_norm, &t.attn_norm_bias, &t.attn_output, &t.attn_output_bias, &t.attn_post_norm];
        let triple = [&t.qkv, &t.qkv_bias].into_iter().flatten().flatten();
        let pair = t.qk_norm.iter().flatten();
        single.into_iter().flatten().chain(triple).chain(pair).for_each(|s| set(Some(s), Action::Drop));
    } else {
        let [old, new] = [model.hparams.family, output_arch].map(|f| f.traits().positions.neox());
        let turned = old && !new;
        let fewer_heads = p.groups.len() < shape.n_head_kv;
        let one = output_arch.traits().one_qkv;
        if fewer_heads || turned || one {
            let mut kept = [heads, head_dim, head_dim].map(|n| group_rows(&p.groups, n));
            if turned {
                kept[..2].iter_mut().for_each(|rows| pairs_together(rows, head_dim));
            }
            for segments in [&t.qkv, &t.qkv_bias].into_iter().flatten() {
                let parts = joined(segments, &kept);
                let at = |tensor: usize| Segment { tensor, start: 0, n: 0 };
                if one && parts.len() > 1 {
                    // The joined tensor takes the place of the first part.
                    parts[1..].iter().for_each(|(tensor, _)| set(Some(&at(*tensor)), Action::Drop));
                    let first = at(parts[0].0);
                    set(Some(&first), Action::Joined(format!("blk.{il}.attn_qkv.weight"), parts));
                } else {
                    parts.into_iter().for_each(|(tensor, rows)| set(Some(&at(tensor)), Action::Rows(rows)));
                }
            }
        }
        if fewer_heads {
            set(t.attn_output.as_ref(), Action::Columns(heads, &p.groups));
        }
        if let Some(q) = &p.attn_output {
            set(t.attn_output.as_ref(), Action::Replace(q));
        }
    }
    units(model, plan, il, output_arch, &mut set);
    if let Some(q) = &p.ffn_down {
        set(Some(&t.down()), Action::Replace(q));
    }
    for (v, new) in BlockVector::ALL.into_iter().zip(&p.vectors) {
        // Stock llama.cpp adds no bias in a block without attention.
        let Some(new) = new.as_deref().filter(|_| !v.of_attention() || !p.groups.is_empty()) else {
            continue;
        };
        match (t.vector(v), v) {
            (Some(old), _) => actions[old.tensor] = Action::Values(new),
            (None, BlockVector::FfnDownBias) => {
                let weight = t.ffn_down.expect("a block without experts has ffn_down");
                biases[weight.tensor] = Some(new);
            }
            (None, BlockVector::AttnOutputBias) => {
                let weight = t.attn_output.expect("a block with attention has attn_output");
                biases[weight.tensor] = Some(new);
            }
            (None, _) => unreachable!("a plan gives new values to norms that are there"),
        }
    }
}

/// Change of the rows of gate and up, or of experts, in block `il`.
fn units<'p>(
    model: &Model,
    plan: &'p Plan,
    il: usize,
    output_arch: Family,
    set: &mut impl FnMut(Option<&Segment>, Action<'p>),
) {
    let (t, p, shape) = (&model.blocks[il], &plan.blocks[il], &model.hparams.blocks[il]);
    let fewer = p.neurons.iter().copied().ne(0..shape.n_feed_forwards() * shape.n_ff);
    match (&t.experts, t.ffn_gate, t.ffn_up) {
        (Some(experts), ..) if fewer => {
            set(Some(&experts.router), Action::Rows(p.experts.clone()));
            for each in [&experts.gate, &experts.up] {
                set(each.first(), Action::RowsOfEach(p.experts.len(), p.neurons.clone()));
            }
            let of_each = |&e: &usize| experts.down[e].start..experts.down[e].start + experts.down[e].n;
            let rows = p.experts.iter().flat_map(of_each).collect();
            set(experts.down.first(), Action::RowsOfEach(p.experts.len(), rows));
        }
        (None, Some(gate), Some(up)) if gate.tensor == up.tensor => {
            let [gate, up_rows] =
                [gate, up].map(|s| p.neurons.iter().map(|n| s.start + n).collect::<Vec<_>>());
            if !output_arch.traits().fused_gate_up {
                let name = |part: &str| format!("blk.{il}.ffn_{part}.weight");
                set(Some(&up), Action::Split([(name("gate"), gate), (name("up"), up_rows)]));
            } else if fewer {
                set(Some(&up), Action::Rows([gate, up_rows].concat()));
            }
        }
        (None, gate, up) if fewer => {
            for s in [gate, up, t.ffn_gate_bias, t.ffn_up_bias] {
                set(s.as_ref(), Action::Rows(p.neurons.clone()));
            }
        }
        _ => {}
    }
}

/// Joins rows of several tensors into one, in the widest of their types; rows of other types are
/// requantised.
fn join(model: &Model, name: String, parts: Vec<(usize, Vec<usize>)>) -> Result<OutTensor<'_>, GgufError> {
    let tensor = |(i, _): &(usize, Vec<usize>)| &model.file.tensors()[*i];
    let n_in = tensor(&parts[0]).ne[0];
    let types = parts.iter().map(|p| tensor(p).ty);
    let ty = types.max_by_key(|t| t.row_bytes(n_in)).map(|t| output_type(t, n_in)).expect("there are parts");
    let n_rows = parts.iter().map(|p| p.1.len()).sum();
    let data = move || {
        let mut bytes = Vec::new();
        for (i, rows) in &parts {
            let t = &model.file.tensors()[*i];
            let encoded = if t.ty == ty {
                Cow::Borrowed(model.file.data(t))
            } else {
                let failed = |source| GgufError::Tensor { name: t.name.clone(), source };
                Cow::Owned(ty.quantize(&model.file.floats(t, 0..t.n_rows())?, n_in, None).map_err(failed)?)
            };
            bytes.extend(select_rows(&encoded, ty, n_in, rows));
        }
        Ok(Cow::Owned(bytes))
    };
    Ok(OutTensor { name, ty, ne: vec![n_in, n_rows], data: Box::new(data) })
}

/// Reorders the rows of each head from NEOX pairs (j, j + n/2), which are rotated together, to pairs (2j,
/// 2j + 1), as `LlamaModel.permute` of llama.cpp's converter does.
/// The same permutation of queries and keys changes none of their products.
fn pairs_together(rows: &mut Vec<usize>, head_dim: usize) {
    let half = head_dim / 2;
    let head = |head: &[usize]| (0..head_dim).map(|i| head[i % 2 * half + i / 2]).collect::<Vec<_>>();
    *rows = rows.chunks_exact(head_dim).flat_map(head).collect();
}

/// Kept rows per tensor; several segments may share one tensor.
fn joined(segments: &[Segment; 3], kept: &[Vec<usize>; 3]) -> Vec<(usize, Vec<usize>)> {
    let mut out: Vec<(usize, Vec<usize>)> = Vec::new();
    for (s, rows) in segments.iter().zip(kept) {
        let rows = rows.iter().map(|r| s.start + r);
        match out.iter_mut().find(|(tensor, _)| *tensor == s.tensor) {
            Some((_, all)) => all.extend(rows),
            None => out.push((s.tensor, rows.collect())),
        }
    }
    out
}

fn output<'m>(
    model: &'m Model,
    t: &'m TensorInfo,
    action: Action<'m>,
) -> Result<Option<OutTensor<'m>>, GgufError> {
    let (ty, ne, data): (Type, Vec<usize>, Box<dyn Fn() -> _ + 'm>) = match action {
        Action::Drop => return Ok(None),
        Action::Values(data) => return Ok(Some(values(t.name.clone(), data))),
        Action::Scaled(factor) => {
            let mut floats = model.file.floats(t, 0..1)?;
            floats.iter_mut().for_each(|v| *v *= factor);
            let bytes = bytemuck::cast_slice(&floats).to_vec();
            (Type::F32, t.ne.clone(), Box::new(move || Ok(Cow::Owned(bytes.clone()))))
        }
        Action::Copy => return Ok(Some(OutTensor::copy(&model.file, t))),
        Action::Replace(q) => {
            // Each of several stacked matrices keeps its number of rows.
            let ne = match t.ne.as_slice() {
                [_, each, _] => vec![q.n_in, *each, q.n_out / each],
                _ => vec![q.n_in, q.n_out],
            };
            (q.ty, ne, Box::new(|| Ok(Cow::Borrowed(&q.bytes[..]))))
        }
        Action::Rows(rows) => {
            // The rows of a vector are its elements.
            let (row, ne) = match t.ne.as_slice() {
                [_] => (1, vec![rows.len()]),
                [n, ..] => (*n, vec![*n, rows.len()]),
                [] => unreachable!("a tensor has a dimension"),
            };
            (t.ty, ne, Box::new(move || Ok(Cow::Owned(select_rows(model.file.data(t), t.ty, row, &rows)))))
        }
        Action::RowsOfEach(matrices, rows) => {
            let (row, ne) = (t.ne[0], vec![t.ne[0], rows.len() / matrices, matrices]);
            (t.ty, ne, Box::new(move || Ok(Cow::Owned(select_rows(model.file.data(t), t.ty, row, &rows)))))
        }
        Action::Joined(name, parts) => return Ok(Some(join(model, name, parts)?)),
        Action::Split(_) => unreachable!("its parts are rows"),
        Action::Columns(run, runs) => {
            let n_in = run * runs.len();
            let ne = vec![n_in, t.n_rows()];
            match select_columns(model.file.data(t), t.ty, t.ne[0], run, runs) {
                Some(bytes) => (t.ty, ne, Box::new(move || Ok(Cow::Owned(bytes.clone())))),
                None => {
                    // Groups are not whole quantisation blocks: the values are kept, but have to be
                    // requantised.
                    let all = model.file.floats(t, 0..t.n_rows())?;
                    let m = crate::model::Matrix::new(t.ne[0], t.n_rows(), all)
                        .select_cols(&group_rows(runs, run));
                    let q = quantise(&m, output_type(t.ty, n_in), &vec![1.0; n_in])
                        .map_err(|source| GgufError::Tensor { name: t.name.clone(), source })?;
                    (q.ty, ne, Box::new(move || Ok(Cow::Owned(q.bytes.to_vec()))))
                }
            }
        }
    };
    Ok(Some(OutTensor { name: t.name.clone(), ty, ne, data }))
}
