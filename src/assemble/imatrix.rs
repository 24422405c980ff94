//! Importance matrix of the pruned model, in llama.cpp's format (`common/imatrix-loader.cpp`).

use super::ExpertPlan;
use crate::calibrate::Windows;
use crate::forward::InputSquares;
use crate::ggml::Type;
use crate::gguf::{GgufError, GgufFile, OutTensor, TensorData, Value, write_gguf};
use crate::model::{Family, Mixture, Model, Segment, block_and_role};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Writes an importance matrix that `llama-quantize --imatrix` reads.
/// It holds per matrix the sums of its squared inputs (`squares`, block by block over the fitted `windows`)
/// and the number of tokens. `dataset` describes them; `path` only names the file in errors. Matrices have
/// the names of the output architecture. The output head has no entry, as in llama-imatrix.
///
/// # Errors
/// [`GgufError`] if the output cannot be written.
pub fn write_imatrix(
    out: &mut impl Write,
    path: &Path,
    model: &Model,
    output_arch: Family,
    squares: &[InputSquares],
    windows: &Windows,
    dataset: &str,
) -> Result<(), GgufError> {
    let metadata = [
        ("general.type", Value::Str("imatrix".into())),
        ("imatrix.datasets", Value::StrArray(vec![dataset.into()])),
        ("imatrix.chunk_count", Value::U32(windows.n_fit as u32)),
        ("imatrix.chunk_size", Value::U32(windows.n_ctx as u32)),
    ]
    .map(|(k, v)| (k.to_string(), v));
    let n_tokens = (windows.n_fit * windows.n_ctx) as f64;
    let mut tensors = Vec::new();
    let joined = output_arch.traits().one_qkv;
    let split = model.hparams.family.traits().fused_gate_up && !output_arch.traits().fused_gate_up;
    let named = |name: &str| match name.rsplit_once('.').and_then(|(role, _)| role.rsplit_once('.')) {
        Some((block, "attn_q" | "attn_k" | "attn_v")) if joined => vec![format!("{block}.attn_qkv.weight")],
        Some((block, "ffn_up")) if split => {
            ["gate", "up"].map(|part| format!("{block}.ffn_{part}.weight")).to_vec()
        }
        _ => vec![name.to_string()],
    };
    // A matrix that one architecture joins and the other splits has the same inputs in both.
    let entries: BTreeMap<String, &[f64]> = entries(model, squares)
        .into_iter()
        .flat_map(|(name, sums)| named(name).into_iter().map(move |name| (name, sums)))
        .collect();
    for (name, sums) in entries {
        tensors.push(floats(format!("{name}.in_sum2"), vec![sums.len(), 1], sums));
        tensors.push(floats(format!("{name}.counts"), vec![1, 1], &[n_tokens]));
    }
    write_gguf(out, path, &metadata, &tensors)
}

/// Importance for libllama's quantiser: the mean squared inputs of each matrix, by its name.
/// `squares` are sums over the fitted `windows`.
pub fn importance(model: &Model, squares: &[InputSquares], windows: &Windows) -> Vec<(String, Vec<f32>)> {
    let n_tokens = (windows.n_fit * windows.n_ctx) as f64;
    let mean = |sums: &[f64]| sums.iter().map(|s| (s / n_tokens) as f32).collect();
    entries(model, squares).into_iter().map(|(name, sums)| (name.to_string(), mean(sums))).collect()
}

/// Sums of squared inputs of each matrix, by its name in the model; a matrix without inputs has none.
fn entries<'m>(model: &'m Model, squares: &'m [InputSquares]) -> BTreeMap<&'m str, &'m [f64]> {
    let mut entries = BTreeMap::new();
    for (t, s) in model.blocks.iter().zip(squares) {
        let qkv = t.qkv.iter().flatten().map(|segment| (segment, &s.qkv));
        let rest: [(Option<&Segment>, &Vec<f64>); 4] = [
            (t.attn_output.as_ref(), &s.attn_output),
            (t.ffn_gate.as_ref(), &s.ffn),
            (t.ffn_up.as_ref(), &s.ffn),
            (t.ffn_down.as_ref(), &s.ffn_down),
        ];
        let rest = rest.into_iter().filter_map(|(segment, sums)| Some((segment?, sums)));
        let with_inputs = qkv.chain(rest).filter(|(_, sums)| !sums.is_empty());
        entries.extend(with_inputs.map(|(s, sums)| (model.tensor(s).name.as_str(), sums.as_slice())));
    }
    entries
}

/// Writes the importance matrix in the file at `from`, which is one of `mixture`, for what `plan` keeps of it.
/// `path` only names the output in errors.
///
/// # Errors
/// [`GgufError`] if it is no importance matrix of the mixture in GGUF, or the output cannot be written.
pub fn slice_imatrix(
    from: &Path,
    mixture: &Mixture,
    plan: &ExpertPlan,
    out: &mut impl Write,
    path: &Path,
) -> Result<(), GgufError> {
    let file = GgufFile::open(from)?;
    let wrong = |reason: String| GgufError::Header { path: from.into(), reason };
    if file.get_str("general.type")? != Some("imatrix") {
        return Err(wrong("is no importance matrix in GGUF, as llama-imatrix writes it".into()));
    }
    let mut n_cut = 0;
    let mut tensors = Vec::new();
    for t in file.tensors() {
        let name = t.name.strip_suffix(".in_sum2").or_else(|| t.name.strip_suffix(".counts"));
        let of = name.and_then(|name| Some((name, mixture.file.find(name)?)));
        let Some((name, _)) = of else {
            let reason = format!("has an entry {}, which is no tensor of the model", t.name);
            return Err(wrong(reason));
        };
        if plan.drops(mixture, name) {
            continue;
        }
        let block = block_and_role(name).filter(|(_, role)| role.ends_with("_exps.weight"));
        let mask = block.and_then(|(block, _)| plan.layers.get(&block));
        let Some(mask) = mask else {
            tensors.push(OutTensor::copy(&file, t));
            continue;
        };
        if t.ne.get(1) != Some(&mixture.n_expert) {
            return Err(wrong(format!(
                "entry {} is {:?}, not of {} experts",
                t.name, t.ne, mixture.n_expert
            )));
        }
        let (bytes, kept) = (file.data(t), mask.kept_experts());
        let each = bytes.len() / mixture.n_expert;
        let parts = kept.iter().map(|e| &bytes[e * each..(e + 1) * each]).collect();
        let ne = vec![t.ne[0], kept.len()];
        tensors.push(OutTensor { name: t.name.clone(), ty: t.ty, ne, data: TensorData::Parts(parts) });
        n_cut += 1;
    }
    if n_cut == 0 {
        return Err(wrong("has no entries of experts".into()));
    }
    write_gguf(out, path, file.metadata(), &tensors)
}

fn floats<'a>(name: String, ne: Vec<usize>, values: &[f64]) -> OutTensor<'a> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| (*v as f32).to_ne_bytes()).collect();
    OutTensor { name, ty: Type::F32, ne, data: TensorData::made(move || Ok(Cow::Owned(bytes.clone()))) }
}
