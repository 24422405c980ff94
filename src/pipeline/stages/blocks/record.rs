//! A pruned block as a record of a checkpoint.

use super::*;

/// Encodes a pruned block, with its warnings, as a record.
pub(super) fn encode(plan: &BlockPlan, warnings: &[String]) -> Record {
    let mut record = Record::default()
        .with_numbers("groups", plan.groups.iter().copied())
        .with_numbers("experts", plan.experts.iter().copied())
        .with_numbers("neurons", plan.neurons.iter().copied())
        .with("warnings", Value::StrArray(warnings.iter().map(|w| w.as_bytes().to_vec()).collect()));
    for m in BlockMatrix::ALL {
        record.tensors.extend(plan.matrix(m).map(|q| KeptTensor {
            name: m.name().into(),
            ty: q.ty,
            ne: vec![q.n_in, q.n_out],
            bytes: q.bytes.to_vec(),
        }));
    }
    for v in BlockVector::ALL {
        record.tensors.extend(plan.vector(v).as_ref().map(|values| KeptTensor {
            name: format!("{v:?}"),
            ty: Type::F32,
            ne: vec![values.len()],
            bytes: bytemuck::cast_slice(values).to_vec(),
        }));
    }
    record
}

/// Decodes the block of a record, for a source block of `shape`, with its warnings; or returns the part that
/// is damaged.
pub(super) fn decode(record: &Record, shape: &BlockShape) -> Result<(BlockPlan, Vec<String>), &'static str> {
    let subset = |key: &'static str, n: usize| {
        let found = record.numbers(key).ok_or(key)?;
        let mut sorted = found.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let sound = sorted.len() == found.len() && sorted.last().is_none_or(|&last| last < n);
        if sound { Ok(found) } else { Err(key) }
    };
    let matrix = |m: BlockMatrix| {
        let kept =
            |t: &KeptTensor| Quantised::new(t.ty, t.ne[0], t.ne.iter().skip(1).product(), t.bytes.clone());
        record.tensor(m.name()).map(kept)
    };
    let vector = |v: BlockVector| record.tensor(&format!("{v:?}")).map(|t| t.floats());
    let plan = BlockPlan {
        groups: subset("groups", shape.n_head_kv)?,
        experts: subset("experts", shape.n_expert)?,
        neurons: subset("neurons", shape.n_feed_forwards() * shape.n_ff)?,
        matrices: BlockMatrix::ALL.map(matrix),
        vectors: BlockVector::ALL.map(vector),
    };
    let left = shape.with_kept(&plan.experts, &plan.neurons);
    let of_its_own =
        |(i, n): (usize, &usize)| Some(&(n / shape.n_ff)) == plan.experts.get(i / left.n_ff.max(1));
    let in_order = shape.n_expert == 0 || plan.neurons.iter().enumerate().all(of_its_own);
    // Experts that are kept whole have no new values.
    let fits = plan.matrix(BlockMatrix::FfnDown).map_or(shape.n_expert > 0, |m| m.n_in == left.n_ff);
    if !fits || !in_order {
        return Err("ffn_down");
    }
    let Some(Value::StrArray(warnings)) = record.get("warnings") else { return Err("warnings") };
    Ok((plan, warnings.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect()))
}
