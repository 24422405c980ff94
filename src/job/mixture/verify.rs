//! Verification of a file from which whole experts were removed.

use super::super::verify::{Check, LLAMA, Record, VerifyJob, is_source};
use super::super::{JobError, open_file};
use crate::assemble::{KEPT_EXPERTS, KEPT_LAYERS, NEW_MATRICES, experts_of_tokens};
use crate::evaluate::llama_losses;
use crate::ggml::LlamaModel;
use crate::gguf::{GgufFile, Value};
use crate::model::{ExpertAxis, ExpertLayer, Mixture, count};
use crate::pipeline::Observer;
use std::collections::BTreeMap;

/// Returns whether `file` says which experts it keeps.
pub(in crate::job) fn says_experts(file: &GgufFile) -> bool {
    file.get(KEPT_EXPERTS).is_some()
}

/// Checks a pruned mixture in an open file.
pub(in crate::job) fn verify(
    job: &VerifyJob,
    file: GgufFile,
    observer: &mut dyn Observer,
) -> Result<Vec<Check>, JobError> {
    let model = |path: &std::path::Path, file| {
        Mixture::new(file).map_err(|source| JobError::Model { path: path.into(), source })
    };
    let mixture = model(&job.model, file)?;
    mixture.file.check_values()?;
    let mut checks = Vec::new();
    let mut add = |name, found| checks.push(Check { name, found });
    let n = mixture.file.tensors().len();
    add("tensors", Ok(format!("{n} as the metadata says, all of finite numbers")));
    add("tables", tables(&mixture));
    if let Some(path) = &job.source {
        let source = model(path, open_file(path)?)?;
        observer.stage("hash the source", 1);
        add("source", is_source(&mixture.file, &source.file));
        observer.step(1, "");
        add("experts", experts_agree(&mixture, &source));
        add("slices", slices_agree(&mixture, &source));
    }
    match Record::of(&mixture.file) {
        None => add("predictions", Ok("not recorded in this file".into())),
        Some(record) => {
            observer.stage("llama.cpp", 1);
            let loaded = LlamaModel::load_mapped(&job.model);
            let losses = loaded.and_then(|m| llama_losses(&m, &record.tokens, job.n_threads));
            let found = losses.map_err(|e| e.to_string());
            add("llama.cpp", found.and_then(|losses| record.agrees(&losses, LLAMA)));
            observer.step(1, "");
        }
    }
    Ok(checks)
}

/// Checks that tables of the experts of tokens name experts that exist, each once for a token: CUDA fails on
/// others.
fn tables(mixture: &Mixture) -> Result<String, String> {
    let (mut n, mut n_wrong, mut first) = (0, 0, None);
    let of_layers = mixture.layers.iter().flat_map(|l| &l.tensors);
    for &(i, _) in of_layers.filter(|(_, axis)| *axis == ExpertAxis::Tokens) {
        let t = &mixture.file.tensors()[i];
        let table = experts_of_tokens(&mixture.file, t, mixture.n_expert)
            .map_err(|_| format!("{} names an expert that does not exist", t.name))?;
        for (token, row) in table.chunks_exact(t.ne[0]).enumerate() {
            n += 1;
            if row.iter().enumerate().any(|(i, e)| row[..i].contains(e)) {
                n_wrong += 1;
                first.get_or_insert_with(|| format!("token {token} of {}", t.name));
            }
        }
    }
    match first {
        None if n == 0 => Ok("none that assign experts to tokens".into()),
        None => Ok(format!("{n} rows, each of different experts")),
        Some(first) => Err(format!("{n_wrong} rows name an expert twice, first {first}")),
    }
}

/// Kept experts by the number of the layer, as the file says.
fn said(mixture: &Mixture) -> Result<BTreeMap<usize, Vec<usize>>, String> {
    let numbers = |key: &str| {
        let all = mixture.file.get(key).and_then(Value::as_unsigned_array);
        all.ok_or_else(|| format!("the file has no list {key}"))
    };
    let (layers, kept) = (numbers(KEPT_LAYERS)?, numbers(KEPT_EXPERTS)?);
    if kept.len() != layers.len() * mixture.n_expert {
        return Err(format!("{} experts are said to be kept in {} layers", kept.len(), layers.len()));
    }
    let of_layers = layers.iter().zip(kept.chunks(mixture.n_expert));
    Ok(of_layers.map(|(l, k)| (*l as usize, k.iter().map(|e| *e as usize).collect())).collect())
}

/// Checks that the kept experts are some of the source's, as many in each group.
fn experts_agree(mixture: &Mixture, source: &Mixture) -> Result<String, String> {
    let n = source.n_expert;
    for (layer, kept) in said(mixture)? {
        if !kept.is_sorted_by(|a, b| a < b) || kept.iter().any(|&e| e >= n) {
            return Err(format!("layer {layer}: the list of kept experts is no ascending part of {n}"));
        }
        let groups = source.groups.map_or(1, |g| g.n);
        let in_group = |g: usize| kept.iter().filter(|&&e| e * groups / n == g).count();
        if let Some(g) = (1..groups).find(|&g| in_group(g) != in_group(0)) {
            let (a, b) = (in_group(0), in_group(g));
            return Err(format!("layer {layer}: {a} experts of group 0 are kept, and {b} of group {g}"));
        }
    }
    Ok(format!("{} of {n} are kept in each layer", mixture.n_expert))
}

/// Whether a tensor of experts has a row or a number for each neuron.
fn has_neurons(name: &str) -> bool {
    let of_gate_or_up = ["gate_exps", "up_exps", "gate_up_exps"];
    let role = name.rsplit_once(".ffn_").and_then(|(_, role)| role.split_once('.'));
    role.is_some_and(|(part, kind)| of_gate_or_up.contains(&part) && (kind == "weight" || kind == "bias"))
}

/// Whether each of `n` matrices in `new` has rows, of `row` bytes, of the same matrix in `old`, in their order.
fn rows_are_of(new: &[u8], old: &[u8], n: usize, row: usize) -> bool {
    if row == 0 || !new.len().is_multiple_of(n * row) {
        return false;
    }
    let (each, all) = (new.len() / n, old.len() / n);
    new.chunks_exact(each).zip(old.chunks_exact(all)).all(|(new, old)| {
        let mut left = old.chunks_exact(row);
        new.chunks_exact(row).all(|row| left.any(|old| old == row))
    })
}

/// Checks that all tensors hold the bytes of the source, those of experts the bytes of the kept ones.
fn slices_agree(mixture: &Mixture, source: &Mixture) -> Result<String, String> {
    let kept = said(mixture)?;
    let is_new = |role: &str| match mixture.file.get(NEW_MATRICES) {
        Some(Value::StrArray(names)) => names.iter().any(|name| name == role.as_bytes()),
        _ => false,
    };
    let (new_router, narrowed) = (is_new("ffn_gate_inp"), is_new("ffn_down_exps"));
    let axes: BTreeMap<&str, (&ExpertLayer, ExpertAxis)> = source
        .layers
        .iter()
        .flat_map(|l| l.tensors.iter().map(move |&(i, axis)| (i, (l, axis))))
        .map(|(i, of)| (source.file.tensors()[i].name.as_str(), of))
        .collect();
    let (mut n_sliced, mut n_whole) = (0, 0);
    for t in mixture.file.tensors() {
        let old = source.file.find(&t.name).ok_or_else(|| format!("{} is not in the source", t.name))?;
        let (new, bytes) = (mixture.file.data(t), source.file.data(old));
        let same = match axes.get(t.name.as_str()) {
            None => new == bytes,
            // Substitutes are checked by themselves.
            Some((_, ExpertAxis::Tokens)) => t.ne == old.ne,
            Some(_) if new_router && t.name.ends_with(".ffn_gate_inp.weight") => t.ne[0] == old.ne[0],
            Some(_) if narrowed && t.name.ends_with(".ffn_down_exps.weight") => t.ne[1..] == old.ne[1..],
            Some((layer, _)) if narrowed && has_neurons(&t.name) => {
                let halves = if t.name.contains("gate_up_exps") { 2 } else { 1 };
                let matrices = source.n_expert * halves;
                n_sliced += 1;
                rows_are_of(new, bytes, matrices, bytes.len() / matrices / layer.width)
            }
            Some((layer, axis)) => {
                let kept = kept.get(&layer.block).ok_or_else(|| {
                    format!("the file does not say which experts layer {} keeps", layer.block)
                })?;
                let step = if *axis == ExpertAxis::Chunks { source.chunk } else { 1 };
                let each = bytes.len() / count(old, *axis);
                n_sliced += 1;
                let slices = kept.iter().step_by(step).map(|e| e / step);
                new.len() == kept.len() / step * each
                    && slices
                        .zip(new.chunks_exact(each))
                        .all(|(e, new)| bytes.get(e * each..(e + 1) * each) == Some(new))
            }
        };
        if t.ty != old.ty || !same {
            return Err(format!("{} does not hold the source's bytes", t.name));
        }
        n_whole += 1;
    }
    let routers = if new_router { "; routers have new values" } else { "" };
    Ok(format!("{n_whole} tensors are the source's, {n_sliced} of them cut to the kept experts{routers}"))
}
