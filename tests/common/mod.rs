//! Shared parts of the tests: the real model, and small generated ones.
#![allow(dead_code)]

pub mod cli;
pub mod mixture_models;
pub mod test_model;

use putri_gguf::ggml::Type;
use putri_gguf::gguf::{GgufFile, OutTensor, TensorData, write_gguf};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Observer that ignores progress and never interrupts.
pub struct Silent;

impl putri_gguf::pipeline::Observer for Silent {
    fn stage(&mut self, _: &str, _: usize) {}
    fn step(&mut self, _: usize, _: &str) {}
}

/// Path of SmolLM2-135M-Instruct, which `make model` fetches.
pub fn smollm2() -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("PUTRI_TEST_MODEL").map_or_else(|| PathBuf::from(default), PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `make model`", path.display());
    path
}

/// Plain English that no model file or calibration text contains: written for these tests.
pub const TEXT: &str = "The lighthouse keeper wrote down the weather every morning, because the \
harbour office asked for it and because it gave the day a beginning. On the first of March there was \
fog until noon, then a light wind from the south-west. Two trawlers came in early with half their \
catch. The younger skipper said that the cod had moved north again, as they had in his grandfather's \
time, and that the price would follow. Nobody disagreed. In the afternoon the keeper cleaned the lens, \
replaced a cracked pane on the seaward side and read three chapters of a book about the history of \
cartography. He learned that early maps showed islands which had never existed, copied from one chart \
to the next for two hundred years, since no captain wanted to be the one who failed to see them. ";

/// Writes a copy of `source` with the metadata that `keep` selects; the tensors have the type `ty`, if
/// given.
pub fn rewrite(source: &GgufFile, target: &Path, keep: impl Fn(&str) -> bool, ty: Option<Type>) {
    write_again(source, target, keep, |_| ty);
}

/// Writes a copy of `source` whose tensors have the types that `ty` gives by name.
pub fn retype(source: &GgufFile, target: &Path, ty: impl Fn(&str) -> Option<Type>) {
    write_again(source, target, |_| true, ty);
}

fn write_again(
    source: &GgufFile,
    target: &Path,
    keep: impl Fn(&str) -> bool,
    ty: impl Fn(&str) -> Option<Type>,
) {
    let metadata: Vec<_> = source.metadata().iter().filter(|(k, _)| keep(k)).cloned().collect();
    let tensors: Vec<OutTensor> = source
        .tensors()
        .iter()
        .map(|t| {
            let ty = ty(&t.name);
            OutTensor {
                name: t.name.clone(),
                ty: ty.unwrap_or(t.ty),
                ne: t.ne.clone(),
                data: TensorData::made(move || match ty {
                    None => Ok(Cow::Borrowed(source.data(t))),
                    Some(ty) => {
                        let floats = source.floats(t, 0..t.n_rows())?;
                        Ok(Cow::Owned(ty.quantize(&floats, t.ne[0], None).unwrap()))
                    }
                }),
            }
        })
        .collect();
    let mut file = BufWriter::new(File::create(target).unwrap());
    write_gguf(&mut file, target, &metadata, &tensors).unwrap();
    file.flush().unwrap();
}

/// Logits of libllama, `[n_tokens, n_vocab]`, for one window, with its default settings.
pub fn libllama_logits(path: &std::path::Path, tokens: &[i32]) -> Vec<f32> {
    use putri_gguf::ggml::{BatchToken, Context, LlamaModel};
    let model = LlamaModel::load(path).unwrap();
    let mut ctx = Context::new(&model, tokens.len(), 1, tokens.len(), 1).unwrap();
    let batch: Vec<_> =
        tokens.iter().enumerate().map(|(i, &token)| BatchToken { token, pos: i as i32, seq: 0 }).collect();
    ctx.decode(&batch).unwrap();
    (0..tokens.len()).flat_map(|i| ctx.logits(i).to_vec()).collect()
}

/// Logits of the crate's own forward pass for the same window, `[n_tokens, n_vocab]`.
pub fn our_logits(path: &std::path::Path, tokens: &[i32]) -> Vec<f32> {
    let model = putri_gguf::model::Model::open(path).unwrap();
    logits(&model, tokens, 1, |il| model.block(il).unwrap())
}

/// Logits of the crate's own forward pass of `model` with the blocks that `block` returns, on the given
/// compute resources.
pub fn logits(
    model: &putri_gguf::model::Model,
    tokens: &[i32],
    compute: impl Into<putri_gguf::ggml::Compute>,
    block: impl Fn(usize) -> putri_gguf::model::BlockWeights,
) -> Vec<f32> {
    let (forward, x) = last_stream(model, tokens, compute, block);
    let head = forward.head(model).unwrap();
    let mut logits = Vec::new();
    forward.logits(&head, &x, |_, rows| logits.extend_from_slice(rows)).unwrap();
    logits
}

/// Residual stream after the last of these blocks, and the forward pass that computed it.
pub fn last_stream(
    model: &putri_gguf::model::Model,
    tokens: &[i32],
    compute: impl Into<putri_gguf::ggml::Compute>,
    block: impl Fn(usize) -> putri_gguf::model::BlockWeights,
) -> (putri_gguf::forward::Forward, Vec<f32>) {
    let forward = putri_gguf::forward::Forward::new(model, tokens.len(), compute).unwrap();
    let mut x = forward.embed(model, tokens).unwrap();
    let mut y = vec![0.0; x.len()];
    for il in 0..model.hparams.n_layer() {
        let block = forward.upload(&block(il)).unwrap();
        forward.block(&block, &x, None, &mut y).unwrap();
        std::mem::swap(&mut x, &mut y);
    }
    (forward, x)
}

/// Largest absolute difference, and mean KL divergence of b from a over rows of `n_vocab` logits.
pub fn compare_logits(a: &[f32], b: &[f32], n_vocab: usize) -> (f32, f64) {
    assert_eq!(a.len(), b.len());
    let max = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    let kl: f64 = a
        .chunks_exact(n_vocab)
        .zip(b.chunks_exact(n_vocab))
        .map(|(a, b)| {
            let lse = |r: &[f32]| {
                let m = r.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
                m + r.iter().map(|&v| (v as f64 - m).exp()).sum::<f64>().ln()
            };
            let (la, lb) = (lse(a), lse(b));
            a.iter()
                .zip(b)
                .map(|(&x, &y)| (x as f64 - la).exp() * ((x as f64 - la) - (y as f64 - lb)))
                .sum::<f64>()
        })
        .sum();
    (max, kl / (a.len() / n_vocab) as f64)
}
