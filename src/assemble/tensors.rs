//! Tensors of the output, in the source's order.

use crate::ggml::Type;
use crate::gguf::{GgufError, MakeBytes, OutTensor, TensorData, TensorInfo};
use crate::model::{BlockMatrix, BlockVector, Family, Model, Segment, group_rows};
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
    Joined(String, Vec<Part<'p>>),
    /// Splits into several tensors with these names and rows.
    Split([(String, Part<'p>); 2]),
    /// Selects these runs of columns of this length.
    Columns(usize, &'p [usize]),
    Replace(&'p Quantised),
    /// Writes a vector with these values.
    Values(&'p [f32]),
    /// Multiplies a vector by this factor.
    Scaled(f32),
}

/// Rows that become part of a tensor.
#[derive(Clone)]
struct Part<'p> {
    from: Rows<'p>,
    rows: Vec<usize>,
}

/// Where rows come from.
#[derive(Clone, Copy)]
enum Rows<'p> {
    /// The source's tensor of this number.
    Source(usize),
    /// New values of a matrix.
    New(&'p Quantised),
}

impl Rows<'_> {
    fn ty(&self, model: &Model) -> Type {
        match self {
            Rows::Source(tensor) => model.file.tensors()[*tensor].ty,
            Rows::New(q) => q.ty,
        }
    }
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
            for (name, part) in parts {
                out.push(join(model, name, t.ne[0], vec![part])?);
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
    OutTensor { name, ty: Type::F32, ne: vec![data.len()], data: TensorData::made(bytes) }
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
        let qkv = [BlockMatrix::AttnQ, BlockMatrix::AttnK, BlockMatrix::AttnV].map(|m| p.matrix(m));
        if fewer_heads || turned || one || qkv.iter().any(Option::is_some) {
            let order = |rows: Vec<usize>, turned: bool| {
                if turned { pairs_together(&rows, head_dim) } else { rows }
            };
            let kept = [heads, head_dim, head_dim].map(|n| group_rows(&p.groups, n));
            let turns = [turned, turned, false];
            let part = |i: usize, s: &Segment, new: Option<&'p Quantised>| match new {
                // New values are of the rows that are kept.
                Some(q) => Part { from: Rows::New(q), rows: order((0..q.n_out).collect(), turns[i]) },
                None => {
                    let rows = order(kept[i].clone(), turns[i]).into_iter().map(|r| s.start + r).collect();
                    Part { from: Rows::Source(s.tensor), rows }
                }
            };
            let at = |tensor: usize| Segment { tensor, start: 0, n: 0 };
            for (segments, new) in [(&t.qkv, qkv), (&t.qkv_bias, [None; 3])] {
                let Some(segments) = segments else { continue };
                let parts = |tensor: usize| {
                    let here = (0..3).filter(move |&i| segments[i].tensor == tensor);
                    here.map(|i| part(i, &segments[i], new[i])).collect::<Vec<_>>()
                };
                let mut tensors: Vec<usize> = segments.iter().map(|s| s.tensor).collect();
                tensors.dedup();
                if one && tensors.len() > 1 {
                    // The joined tensor takes the place of the first part.
                    tensors[1..].iter().for_each(|tensor| set(Some(&at(*tensor)), Action::Drop));
                    let all = tensors.iter().flat_map(|tensor| parts(*tensor)).collect();
                    let name = format!("blk.{il}.attn_qkv.weight");
                    set(Some(&at(tensors[0])), Action::Joined(name, all));
                } else {
                    for tensor in tensors {
                        set(Some(&at(tensor)), rows_of(model, tensor, parts(tensor)));
                    }
                }
            }
        }
        if fewer_heads {
            set(t.attn_output.as_ref(), Action::Columns(heads, &p.groups));
        }
        if let Some(q) = p.matrix(BlockMatrix::AttnOutput) {
            set(t.attn_output.as_ref(), Action::Replace(q));
        }
    }
    units(model, plan, il, output_arch, &mut set);
    if let Some(q) = p.matrix(BlockMatrix::FfnDown) {
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
    let [new_gate, new_up] = [BlockMatrix::FfnGate, BlockMatrix::FfnUp].map(|m| p.matrix(m));
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
            let part = |s: Segment, new: Option<&'p Quantised>| match new {
                Some(q) => Part { from: Rows::New(q), rows: (0..q.n_out).collect() },
                None => Part {
                    from: Rows::Source(s.tensor),
                    rows: p.neurons.iter().map(|n| s.start + n).collect(),
                },
            };
            let [gate, up_rows] = [part(gate, new_gate), part(up, new_up)];
            if !output_arch.traits().fused_gate_up {
                let name = |part: &str| format!("blk.{il}.ffn_{part}.weight");
                set(Some(&up), Action::Split([(name("gate"), gate), (name("up"), up_rows)]));
            } else if fewer || new_gate.is_some() || new_up.is_some() {
                set(Some(&up), rows_of(model, up.tensor, vec![gate, up_rows]));
            }
            return;
        }
        (None, gate, up) if fewer => {
            for s in [gate, up, t.ffn_gate_bias, t.ffn_up_bias] {
                set(s.as_ref(), Action::Rows(p.neurons.clone()));
            }
        }
        _ => {}
    }
    for (m, new) in [(BlockMatrix::FfnGate, new_gate), (BlockMatrix::FfnUp, new_up)] {
        if let Some(q) = new {
            set(t.matrix(m).as_ref(), Action::Replace(q));
        }
    }
}

/// The rows `parts` as the tensor of number `tensor`: copied as they are where all come from it.
fn rows_of<'p>(model: &Model, tensor: usize, parts: Vec<Part<'p>>) -> Action<'p> {
    if parts.iter().all(|p| matches!(p.from, Rows::Source(t) if t == tensor)) {
        return Action::Rows(parts.into_iter().flat_map(|p| p.rows).collect());
    }
    Action::Joined(model.file.tensors()[tensor].name.clone(), parts)
}

/// Joins rows of `n_in` values into one tensor, in the widest of their types. Rows of other types are
/// requantised.
fn join<'m>(
    model: &'m Model,
    name: String,
    n_in: usize,
    parts: Vec<Part<'m>>,
) -> Result<OutTensor<'m>, GgufError> {
    let types = parts.iter().map(|p| p.from.ty(model));
    let ty = types.max_by_key(|t| t.row_bytes(n_in)).map(|t| output_type(t, n_in)).expect("there are parts");
    let n_rows = parts.iter().map(|p| p.rows.len()).sum();
    let source_name = name.clone();
    let data = move || {
        let mut bytes = Vec::new();
        let failed = |source| GgufError::Tensor { name: source_name.clone(), source };
        for Part { from, rows } in &parts {
            let encoded = match from {
                _ if from.ty(model) == ty => match from {
                    Rows::Source(tensor) => Cow::Borrowed(model.file.data(&model.file.tensors()[*tensor])),
                    Rows::New(q) => Cow::Borrowed(&q.bytes[..]),
                },
                Rows::Source(tensor) => {
                    let t = &model.file.tensors()[*tensor];
                    Cow::Owned(
                        ty.quantize(&model.file.floats(t, 0..t.n_rows())?, n_in, None).map_err(failed)?,
                    )
                }
                Rows::New(q) => {
                    let values = q.to_matrix().map_err(failed)?;
                    Cow::Owned(ty.quantize(&values.data, n_in, None).map_err(failed)?)
                }
            };
            bytes.extend(select_rows(&encoded, ty, n_in, rows));
        }
        Ok(Cow::Owned(bytes))
    };
    Ok(OutTensor { name, ty, ne: vec![n_in, n_rows], data: TensorData::made(data) })
}

/// Reorders the rows of each head from NEOX pairs (j, j + n/2), which are rotated together, to pairs (2j,
/// 2j + 1), as `LlamaModel.permute` of llama.cpp's converter does.
/// The same permutation of queries and keys changes none of their products.
fn pairs_together(rows: &[usize], head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    let head = |head: &[usize]| (0..head_dim).map(|i| head[i % 2 * half + i / 2]).collect::<Vec<_>>();
    rows.chunks_exact(head_dim).flat_map(head).collect()
}

fn output<'m>(
    model: &'m Model,
    t: &'m TensorInfo,
    action: Action<'m>,
) -> Result<Option<OutTensor<'m>>, GgufError> {
    let (ty, ne, data): (Type, Vec<usize>, MakeBytes<'m>) = match action {
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
        Action::Joined(name, parts) => return Ok(Some(join(model, name, t.ne[0], parts)?)),
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
    Ok(Some(OutTensor { name: t.name.clone(), ty, ne, data: TensorData::Made(data) }))
}
