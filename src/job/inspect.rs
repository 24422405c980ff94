//! Content of a model and what could be removed from it, from its header alone.

use super::result::size_of;
use super::{JobError, Size, open_model};
use crate::ggml::Type;
use crate::gguf::Value;
use crate::model::{Arch, ExpertParams, Family, Heads, Model, OutputArchs};
use crate::pipeline::{Settings, check_budget};
use std::borrow::Cow;
use std::path::Path;

/// Description of a model from its header.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// `general.architecture`.
    pub arch: &'static str,
    /// `general.name`, if there is one.
    pub name: Option<String>,
    /// Sizes of the model.
    pub size: Size,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of tokens in the vocabulary.
    pub n_vocab: usize,
    /// Number of tokens of context that the model was trained for.
    pub n_ctx_train: usize,
    /// Whether the output head is the token embedding.
    pub tied: bool,
    /// Number of parameters of the attention matrices.
    pub attention_params: usize,
    /// Number of parameters of the FFN matrices.
    pub ffn_params: usize,
    /// Number of parameters of the embedding and the output head.
    pub embedding_params: usize,
    /// Types with the numbers of their tensors and bytes, in descending order of bytes.
    pub types: Vec<(Type, usize, u64)>,
    /// Parameters of the experts, if there are any.
    pub experts: Option<ExpertParams>,
    /// Output architecture of a pruned model.
    pub output_arch: Family,
    /// Reason for the output architecture.
    pub why: String,
    /// Whether layers may have different head counts and widths.
    pub per_block: bool,
    /// Largest share of the blocks' parameters that can be removed, in steps of a hundredth.
    pub reachable: f64,
}

/// Inspects the model at `path` without reading tensors.
///
/// # Errors
/// [`JobError`] if it cannot be opened or its architecture is not supported.
pub fn inspect(path: &Path) -> Result<Inspection, JobError> {
    let model = open_model(path)?;
    let h = &model.hparams;
    let size = size_of(&model);
    let params = |part: fn((usize, usize)) -> usize| h.blocks.iter().map(|b| part(h.block_params(b))).sum();
    let tied = model.output == model.token_embd;
    let heads = 1 + usize::from(!tied);
    let output_archs = Settings::default().output_archs(&model);
    let (output_arch, mut why) = output_arch(&model, &output_archs);
    if let Some(other) = model.output_archs(Heads::PerLayer, Arch::Auto).heads {
        why += &format!("; heads can be removed layer by layer in {}", other.name());
    }
    let can = |percent: &u32| {
        let settings = Settings { sparsity: f64::from(*percent) / 100.0, ..Settings::default() };
        check_budget(&model, &settings).is_ok()
    };
    Ok(Inspection {
        arch: h.family.name(),
        name: model.file.get("general.name").and_then(Value::as_text).map(Cow::into_owned),
        n_embd: h.n_embd,
        head_dim: h.head_dim,
        n_vocab: h.n_vocab,
        n_ctx_train: h.n_ctx_train,
        tied,
        attention_params: params(|p| p.0),
        ffn_params: params(|p| p.1),
        embedding_params: heads * h.n_embd * h.n_vocab,
        types: types(&model),
        experts: h.experts,
        output_arch,
        why,
        per_block: output_archs.per_block.is_some(),
        reachable: f64::from((1..100).rev().find(can).unwrap_or(0)) / 100.0,
        size,
    })
}

/// Output architecture of the pruned model, and the reason for it.
fn output_arch(model: &Model, output_archs: &OutputArchs) -> (Family, String) {
    let family = model.hparams.family;
    let (name, traits) = (family.name(), family.traits());
    match (output_archs.per_block, traits.per_layer_arch) {
        (Some(output_arch), _) if output_arch == family => {
            (output_arch, format!("{name} reads head counts and widths per block"))
        }
        (Some(output_arch), _) => {
            let other = output_arch.name();
            let own = if traits.loads_fewer_heads {
                format!("; stays {name} if all blocks end up equal")
            } else {
                format!("; {name} itself takes no fewer heads and no new biases")
            };
            let why =
                format!("{other} computes the same blocks and reads head counts and widths per block{own}");
            (output_arch, why)
        }
        (None, Some(output_arch)) => {
            let lacks = model.no_room_in(output_arch.traits()).unwrap_or("such blocks");
            let why = format!("{}, which reads sizes per block, has no room for {lacks}", output_arch.name());
            (family, why + &all_equal(name, output_archs))
        }
        (None, None) => {
            let why = "no stock architecture computes such blocks in different sizes";
            (family, why.to_string() + &all_equal(name, output_archs))
        }
    }
}

/// Explanation for a model that no output architecture supports with layers of different sizes.
fn all_equal(name: &str, output_archs: &OutputArchs) -> String {
    match output_archs.fewer_heads {
        true => ", so all stay equal".into(),
        false => format!(", and {name} takes no fewer heads: only feed-forwards shrink, all alike"),
    }
}

fn types(model: &Model) -> Vec<(Type, usize, u64)> {
    let mut types: Vec<(Type, usize, u64)> = Vec::new();
    for t in model.file.tensors() {
        let bytes = t.n_bytes() as u64;
        match types.iter_mut().find(|(ty, ..)| *ty == t.ty) {
            Some((_, n, sum)) => (*n, *sum) = (*n + 1, *sum + bytes),
            None => types.push((t.ty, 1, bytes)),
        }
    }
    types.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
    types
}
