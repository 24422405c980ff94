//! Content of a model and what could be removed from it, from its header alone.

use super::result::size_of;
use super::{JobError, Size, mixture, open_file, open_in};
use crate::ggml::Type;
use crate::gguf::{GgufFile, Value};
use crate::model::{Arch, Family, Heads, Mixture, Model, OutputArchs};
use crate::pipeline::{Settings, check_budget};
use std::borrow::Cow;
use std::path::Path;

/// Description of a model from its header.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// `general.architecture`.
    pub arch: String,
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
    /// Number of experts that a token passes through, if there are any.
    pub n_expert_used: Option<usize>,
    /// Removable parts of a mixture.
    pub mixture: Option<Removable>,
    /// Output architecture of a pruned model.
    pub output_arch: String,
    /// Reason for the output architecture.
    pub why: String,
    /// Whether layers may have different head counts and widths.
    pub per_block: bool,
    /// Largest sparsity that can be reached, in steps of a hundredth: the share of the blocks' parameters, or of
    /// a mixture's experts, that can be removed.
    pub reachable: f64,
}

/// Removable parts of a mixture of experts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Removable {
    /// Number of experts of a layer.
    pub n_expert: usize,
    /// Smallest number of experts that can stay in each layer.
    pub least: usize,
    /// Number of experts of a layer that can only go together.
    pub step: usize,
    /// Number of layers with experts.
    pub n_layers: usize,
    /// Number of those that draft tokens.
    pub n_drafts: usize,
    /// Widths that experts can be narrowed to, ascending; empty if they cannot.
    pub widths: Vec<usize>,
}

impl Removable {
    fn of(m: &Mixture) -> Removable {
        let n_drafts = m.layers.iter().filter(|l| l.drafts).count();
        let (n_expert, least, step) = (m.n_expert, m.least(), m.step());
        // Any share tells whether the architecture takes other widths.
        let widths = if m.narrowed(0.5).is_ok() { m.possible_widths() } else { Vec::new() };
        Removable { n_expert, least, step, n_layers: m.layers.len(), n_drafts, widths }
    }

    /// Largest share of the experts that can be removed, in hundredths.
    fn share(&self) -> f64 {
        ((self.n_expert - self.least) as f64 * 100.0 / self.n_expert as f64).floor() / 100.0
    }
}

/// Inspects the model at `path` without reading tensors.
///
/// # Errors
/// [`JobError`] if it cannot be opened or its architecture is not supported.
pub fn inspect(path: &Path) -> Result<Inspection, JobError> {
    let file = open_file(path)?;
    if Mixture::is_in(&file) {
        let m = Mixture::new(file).map_err(|source| JobError::Model { path: path.into(), source })?;
        return inspect_mixture(&m);
    }
    let model = open_in(path, file)?;
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
        arch: h.family.name().into(),
        name: model.file.get("general.name").and_then(Value::as_text).map(Cow::into_owned),
        n_embd: h.n_embd,
        head_dim: h.head_dim,
        n_vocab: h.n_vocab,
        n_ctx_train: h.n_ctx_train,
        tied,
        attention_params: params(|p| p.0),
        ffn_params: params(|p| p.1),
        embedding_params: heads * h.n_embd * h.n_vocab,
        types: types(&model.file),
        n_expert_used: None,
        mixture: None,
        output_arch: output_arch.name().into(),
        why,
        per_block: output_archs.per_block.is_some(),
        reachable: f64::from((1..100).rev().find(can).unwrap_or(0)) / 100.0,
        size,
    })
}

/// Inspects a mixture of experts, of any architecture.
fn inspect_mixture(m: &Mixture) -> Result<Inspection, JobError> {
    let key = |suffix: &str| format!("{}.{suffix}", m.arch);
    let number = |suffix: &str| m.file.get_u32(&key(suffix)).ok().flatten().unwrap_or(0);
    let params = |wanted: fn(&str) -> bool| -> usize {
        m.file.tensors().iter().filter(|t| t.ne.len() > 1 && wanted(&t.name)).map(|t| t.n_elements()).sum()
    };
    let in_block = |name: &str| name.starts_with("blk.");
    let of_ffn = |name: &str| name.starts_with("blk.") && (name.contains(".ffn_") || name.contains(".exp_"));
    let size = mixture::size(m);
    let ffn_params = params(of_ffn);
    let n_head = size.blocks.iter().map(|b| b.n_head).max().unwrap_or(0);
    let n_embd = number("embedding_length");
    let n_vocab = match m.file.get("tokenizer.ggml.tokens") {
        Some(Value::StrArray(tokens)) => tokens.len(),
        _ => number("vocab_size"),
    };
    let removable = Removable::of(m);
    Ok(Inspection {
        arch: m.arch.clone(),
        name: m.file.get("general.name").and_then(Value::as_text).map(Cow::into_owned),
        n_embd,
        head_dim: match number("attention.key_length") {
            0 => n_embd.checked_div(n_head).unwrap_or(0),
            n => n,
        },
        n_vocab,
        n_ctx_train: number("context_length"),
        tied: m.file.find("output.weight").is_none(),
        attention_params: params(in_block) - ffn_params,
        ffn_params,
        embedding_params: params(|name| name == "token_embd.weight" || name == "output.weight"),
        types: types(&m.file),
        n_expert_used: Some(m.n_used),
        output_arch: m.arch.clone(),
        why: "whole experts go, and all layers stay equal".into(),
        per_block: false,
        reachable: removable.share(),
        mixture: Some(removable),
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

fn types(file: &GgufFile) -> Vec<(Type, usize, u64)> {
    let mut types: Vec<(Type, usize, u64)> = Vec::new();
    for t in file.tensors() {
        let bytes = t.n_bytes() as u64;
        match types.iter_mut().find(|(ty, ..)| *ty == t.ty) {
            Some((_, n, sum)) => (*n, *sum) = (*n + 1, *sum + bytes),
            None => types.push((t.ty, 1, bytes)),
        }
    }
    types.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
    types
}
