//! Removal of neurons from every expert, and a refit of its `ffn_down` on those that stay.

use super::{Source, check};
use crate::ggml::Token;
use crate::gguf::GgufError;
use crate::model::{ExpertLayer, Matrix};
use crate::observe::{ExpertGram, Grams, gram_bytes};
use crate::pipeline::{Observer, PruneError, Settings};
use crate::prune::{self, Inverse, NeuronCriterion, Singular};
use crate::requant::{FeedbackError, Quantised, quantise, quantise_with_feedback, within_reason};
use std::collections::BTreeMap;

/// Remaining experts of a layer.
#[derive(Clone, Debug)]
pub struct NarrowLayer {
    /// Kept neurons of each expert, ascending.
    pub neurons: Vec<Vec<usize>>,
    /// New `ffn_down` of all experts, one after another.
    pub down: Quantised,
}

/// Largest memory of the moments of the layers that are observed together, in bytes.
const GRAM_BYTES: usize = 2 << 30;

/// Number of layers whose moments are observed together, within `limit` bytes if there is one.
pub fn layers_per_pass(source: &Source, limit: Option<u64>) -> usize {
    let width = source.mixture.layers.iter().map(|l| l.width).max().unwrap_or(1);
    let room = limit.map_or(GRAM_BYTES, |limit| GRAM_BYTES.min(limit as usize / 2));
    (room / gram_bytes(source.mixture.n_expert, width)).max(1)
}

/// Narrows all experts to `width` neurons. The moments of `per_pass` layers are in memory at a time, and the
/// texts are decoded once for each such part.
///
/// # Errors
/// [`PruneError`] if libllama fails, an expert cannot be fitted, or the observer interrupts.
pub fn narrow(
    source: Source,
    width: usize,
    per_pass: usize,
    settings: &Settings,
    notes: &mut Vec<String>,
    observer: &mut dyn Observer,
) -> Result<BTreeMap<usize, NarrowLayer>, PruneError> {
    let mixture = source.mixture;
    let windows: Vec<&[Token]> = source.texts.iter().flat_map(|t| t.fit.iter().map(Vec::as_slice)).collect();
    let observed: Vec<&ExpertLayer> = mixture.observed().collect();
    let n_passes = observed.len().div_ceil(per_pass);
    observer.stage("narrow experts", n_passes * windows.len() + mixture.layers.len());
    let (mut done, mut n_idle, mut found) = (0, 0, BTreeMap::new());
    for part in observed.chunks(per_pass) {
        let blocks: Vec<usize> = part.iter().map(|l| l.block).collect();
        let mut grams = Grams::new(source.llama, mixture, &blocks, source.n_ctx(), source.n_threads)?;
        for window in &windows {
            check(observer)?;
            grams.window(window)?;
            done += 1;
            observer.step(done, "");
        }
        let mut grams = grams.finish();
        for layer in part {
            check(observer)?;
            let of_layer = grams.remove(&layer.block).expect("the layer was observed");
            n_idle += of_layer.iter().filter(|e| e.n_tokens == 0).count();
            let narrowed = narrow_layer(&source, layer, Some(of_layer), width, settings)?;
            found.insert(layer.block, narrowed);
            done += 1;
            observer.step(done, &format!("layer {}", layer.block));
        }
    }
    for layer in mixture.layers.iter().filter(|l| l.drafts) {
        found.insert(layer.block, narrow_layer(&source, layer, None, width, settings)?);
    }
    if n_idle > 0 {
        notes.push(format!(
            "no token of the calibration chose {n_idle} of {} experts; their neurons went by the size of their weights",
            observed.len() * mixture.n_expert
        ));
    }
    Ok(found)
}

fn narrow_layer(
    source: &Source,
    layer: &ExpertLayer,
    grams: Option<Vec<ExpertGram>>,
    width: usize,
    settings: &Settings,
) -> Result<NarrowLayer, PruneError> {
    let file = &source.mixture.file;
    let name = format!("blk.{}.ffn_down_exps.weight", layer.block);
    let t = file.find(&name).ok_or_else(|| GgufError::MissingTensor(name.clone()))?;
    let (n_ff, n_embd) = (t.ne[0], t.ne[1]);
    let failed = |e: FeedbackError| match e {
        FeedbackError::Singular(source) => {
            PruneError::Singular { block: layer.block, part: "ffn_down", source }
        }
        FeedbackError::Grown(times) => PruneError::Grown { block: layer.block, part: "ffn_down", times },
        FeedbackError::Ggml(source) => GgufError::Tensor { name: name.clone(), source }.into(),
    };
    let (mut neurons, mut bytes, mut ty) = (Vec::new(), Vec::new(), t.ty);
    for e in 0..source.mixture.n_expert {
        let down = Matrix::new(n_ff, n_embd, file.floats(t, e * n_embd..(e + 1) * n_embd)?);
        let gram = grams.as_ref().map(|g| &g[e]).filter(|g| g.n_tokens > 0);
        let fitted = gram.map(|g| fit(&down, g, width, t.ty, settings)).transpose();
        let (kept, q) = match fitted.map_err(&failed)? {
            Some(fitted) => fitted,
            None => {
                let square = |j: usize| (0..n_embd).map(|i| f64::from(down.data[i * n_ff + j]).powi(2)).sum();
                let sizes: Vec<f64> = (0..n_ff).map(square).collect();
                let mut kept = prune::by_score(&sizes);
                kept.truncate(width);
                kept.sort_unstable();
                let q = quantise(&down.select_cols(&kept), t.ty, &vec![1.0; width])
                    .map_err(|e| failed(e.into()))?;
                (kept, q)
            }
        };
        within_reason(&q, &down).map_err(&failed)?;
        bytes.extend_from_slice(&q.bytes);
        neurons.push(kept);
        ty = q.ty;
    }
    let down = Quantised::new(ty, width, neurons.len() * n_embd, bytes).on(&settings.spill)?;
    Ok(NarrowLayer { neurons, down })
}

/// Kept neurons of an expert, and its `ffn_down` on them.
fn fit(
    down: &Matrix,
    gram: &ExpertGram,
    width: usize,
    ty: crate::ggml::Type,
    settings: &Settings,
) -> Result<(Vec<usize>, Quantised), FeedbackError> {
    let ridge = settings.ridge_of_neurons(down.n_in, gram.n_tokens);
    let inverse = Inverse::new(&gram.gram, ridge).map_err(|_| Singular)?;
    let (kept, refit) = prune::greedy(down, None, inverse, width, NeuronCriterion::Obs)?;
    let q = quantise_with_feedback(&refit.weights, &gram.gram, &kept, ridge, ty, None)?;
    Ok((kept, q))
}
