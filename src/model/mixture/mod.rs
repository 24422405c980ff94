//! Mixtures of experts of any architecture, as far as their experts go.
//!
//! All of llama.cpp's architectures with experts share one graph for them (`build_moe_ffn`) and one set of
//! tensor names. The names tell which axis of a tensor counts experts, so whole experts can be removed
//! without knowing how a block computes.

mod width;

use super::{BlockShape, ModelError};
use crate::gguf::{GgufError, GgufFile, TensorInfo};

/// Largest number of experts that llama.cpp loads (`LLAMA_MAX_EXPERTS`).
const MAX_EXPERTS: usize = 1024;

/// A file with experts.
pub struct Mixture {
    /// GGUF container.
    pub file: GgufFile,
    /// `general.architecture`.
    pub arch: String,
    /// Number of blocks, those that draft tokens (MTP) included.
    pub n_layer: usize,
    /// Number of blocks at the end that draft tokens.
    pub n_draft: usize,
    /// Number of experts of each layer that has some.
    pub n_expert: usize,
    /// Largest number of experts that a token passes through.
    pub n_used: usize,
    /// Groups among which the router chooses first, if it does.
    pub groups: Option<ExpertGroups>,
    /// Number of neighbouring experts that share a chunk expert (`grovemoe`); 1 elsewhere.
    pub chunk: usize,
    /// Layers with experts, ascending.
    pub layers: Vec<ExpertLayer>,
}

/// Groups of neighbouring experts of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Number of groups.
    pub n: usize,
    /// Number of groups that a token's experts come from.
    pub n_used: usize,
}

/// Layer with experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLayer {
    /// Number of the block.
    pub block: usize,
    /// Whether the block drafts tokens, so that it does not take part in ordinary decoding.
    pub drafts: bool,
    /// Number of neurons of an expert.
    pub width: usize,
    /// Tensors with an axis that counts experts: their numbers in the file.
    pub tensors: Vec<(usize, ExpertAxis)>,
}

/// Meaning of the last axis of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertAxis {
    /// One entry per expert.
    Experts,
    /// One entry per chunk of neighbouring experts.
    Chunks,
    /// One row per token of the vocabulary, with the numbers of its experts (`ffn_gate_tid2eid`).
    Tokens,
}

/// Tensors of a mixture whose names look as if they counted experts, but do not.
const WITHOUT_EXPERTS: [&str; 12] = [
    "ffn_gate_inp.scale",
    "ffn_gate_inp_shexp",
    "ffn_norm_exps",
    "ffn_latent_",
    "ffn_routed_",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
    "post_ffw_norm",
    "pre_ffw_norm",
    "ffn_post_norm",
    "ffn_pre_norm",
];

/// Axis of the tensor with the name `role` within its block that counts experts, if one does.
///
/// # Errors
/// `Err` if the name may be that of such a tensor, but is not known.
fn axis_of(role: &str) -> Result<Option<ExpertAxis>, ()> {
    let of_experts = ["_exps.weight", "_exps.bias", "_exps.scale", "_exps.input_scale"];
    let of_router = ["ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b", "exp_probs_b_vl"];
    if WITHOUT_EXPERTS.iter().any(|name| role.starts_with(name)) {
        return Ok(None);
    }
    if role.starts_with("ffn_") && of_experts.iter().any(|end| role.ends_with(end)) {
        return Ok(Some(ExpertAxis::Experts));
    }
    let bare = role.strip_suffix(".bias").filter(|_| role.starts_with("exp_probs_b")).unwrap_or(role);
    if of_router.contains(&bare) {
        return Ok(Some(ExpertAxis::Experts));
    }
    if role.ends_with("_chexps.weight") {
        return Ok(Some(ExpertAxis::Chunks));
    }
    match role {
        "ffn_gate_tid2eid.weight" | "ffn_gate_tid2eid" => Ok(Some(ExpertAxis::Tokens)),
        _ if role.contains("exps") || role.contains("exp_") || role.contains("gate_inp") => Err(()),
        _ => Ok(None),
    }
}

/// Reason why the experts of an architecture cannot be removed, if there is one.
fn refusal(arch: &str, n_expert: usize) -> Option<&'static str> {
    match arch {
        "llama4" if n_expert == 128 => {
            Some("llama.cpp normalises queries and keys of llama4 unless there are exactly 128 experts")
        }
        "nomic-bert-moe" => Some("it is an encoder, which generates no text to judge"),
        "llada-moe" | "rnd1" => Some("it is a diffusion model, which does not predict the next token"),
        "dflash" => Some("it drafts for another model and cannot be observed alone"),
        _ => None,
    }
}

impl Mixture {
    /// Returns whether `file` holds experts.
    pub fn is_in(file: &GgufFile) -> bool {
        file.tensors().iter().any(|t| t.name.ends_with(".ffn_down_exps.weight"))
    }

    /// Reads the experts of an open file.
    ///
    /// # Errors
    /// [`ModelError`] naming the key or tensor at fault, or the reason why the architecture is refused.
    pub fn new(file: GgufFile) -> Result<Mixture, ModelError> {
        let missing = |key: &str| ModelError::Gguf(GgufError::MissingKey(key.into()));
        let arch = file.get_str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
        let arch = arch.to_string();
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let bad =
            |suffix: &str, problem: String| ModelError::Gguf(GgufError::BadKey { key: key(suffix), problem });
        let required = |suffix: &str| file.get_u32(&key(suffix))?.ok_or_else(|| missing(&key(suffix)));
        let n_layer = required("block_count")?;
        let n_expert = required("expert_count")?;
        if let Some(why) = refusal(&arch, n_expert) {
            return Err(ModelError::Unusable(format!("architecture {arch}: no expert can go: {why}")));
        }
        if !(2..=MAX_EXPERTS).contains(&n_expert) {
            return Err(bad("expert_count", format!("is {n_expert}; there is nothing to choose from")));
        }
        let n_used = file
            .get_per_block(&key("expert_used_count"), n_layer)?
            .and_then(|used| used.into_iter().max())
            .ok_or_else(|| missing(&key("expert_used_count")))?;
        if n_used == 0 || n_used > n_expert {
            return Err(bad("expert_used_count", format!("is {n_used} of {n_expert} experts")));
        }
        let number = |suffix: &str| file.get_u32(&key(suffix));
        let n_draft = number("nextn_predict_layers")?.unwrap_or(0);
        if n_draft >= n_layer {
            return Err(bad("nextn_predict_layers", format!("is {n_draft} of {n_layer} blocks")));
        }
        let groups = match number("expert_group_count")?.unwrap_or(0) {
            0 | 1 => None,
            n => Some(ExpertGroups { n, n_used: number("expert_group_used_count")?.unwrap_or(0) }),
        };
        if let Some(g) = groups
            && (n_expert % g.n != 0 || g.n_used == 0 || g.n_used >= g.n)
        {
            let problem = format!("is {}, of which {} are used, for {n_expert} experts", g.n, g.n_used);
            return Err(bad("expert_group_count", problem));
        }
        let chunk = number("experts_per_group")?.filter(|_| arch == "grovemoe").unwrap_or(1);
        if chunk == 0 || n_expert % chunk != 0 {
            return Err(bad("experts_per_group", format!("is {chunk} for {n_expert} experts")));
        }
        let mut layers: Vec<ExpertLayer> = Vec::new();
        for (i, t) in file.tensors().iter().enumerate() {
            let Some((block, role)) = block_and_role(&t.name) else { continue };
            let axis = axis_of(role).map_err(|()| {
                ModelError::Unusable(format!(
                    "tensor {} may count experts, but is not known; the file would be cut wrongly",
                    t.name
                ))
            })?;
            let Some(axis) = axis else { continue };
            if block >= n_layer {
                return Err(bad("block_count", format!("is {n_layer}, but there is a tensor {}", t.name)));
            }
            let expected = match axis {
                ExpertAxis::Experts => Some(n_expert),
                ExpertAxis::Chunks => Some(n_expert / chunk),
                ExpertAxis::Tokens => None,
            };
            let n = count(t, axis);
            if expected.is_some_and(|expected| n != expected) {
                let problem = format!("is {n_expert}, but tensor {} is {:?}", t.name, t.ne);
                return Err(bad("expert_count", problem));
            }
            let at = match layers.binary_search_by_key(&block, |l| l.block) {
                Ok(at) => at,
                Err(at) => {
                    let drafts = block >= n_layer - n_draft;
                    layers.insert(at, ExpertLayer { block, drafts, width: 0, tensors: Vec::new() });
                    at
                }
            };
            if role == "ffn_down_exps.weight" {
                layers[at].width = t.ne[0];
            }
            layers[at].tensors.push((i, axis));
        }
        // A router without experts is that of another kind of layer.
        layers.retain(|l| l.width > 0);
        for l in &layers {
            let router = format!("blk.{}.ffn_gate_inp.weight", l.block);
            if file.find(&router).is_none() {
                return Err(GgufError::MissingTensor(router).into());
            }
        }
        if layers.iter().all(|l| l.drafts) {
            return Err(GgufError::MissingTensor("blk.0.ffn_down_exps.weight".into()).into());
        }
        Ok(Mixture { arch, n_layer, n_draft, n_expert, n_used, groups, chunk, layers, file })
    }

    /// Layers that take part in ordinary decoding, so that their router can be observed.
    pub fn observed(&self) -> impl Iterator<Item = &ExpertLayer> {
        self.layers.iter().filter(|l| !l.drafts)
    }

    /// Returns whether the tensor called `name` belongs to a block that drafts tokens.
    pub fn drafts(&self, name: &str) -> bool {
        block_and_role(name).is_some_and(|(block, _)| block >= self.n_layer - self.n_draft)
    }

    /// Number of experts that can only go together: one per group, or one chunk.
    pub fn step(&self) -> usize {
        self.groups.map_or(self.chunk, |g| g.n)
    }

    /// Smallest number of experts that llama.cpp runs in each layer.
    pub fn least(&self) -> usize {
        let grouped = self.groups.map_or(0, |g| g.n * self.n_used.div_ceil(g.n_used).max(2));
        self.n_used.max(grouped).next_multiple_of(self.step())
    }

    /// Number of experts that are kept if a share `share` goes, rounded to the nearest that can go.
    ///
    /// # Errors
    /// [`ModelError`] if that is none, or leaves too few.
    pub fn n_keep(&self, share: f64) -> Result<usize, ModelError> {
        let (step, n) = (self.step(), self.n_expert);
        let steps = (share * n as f64 / step as f64).round() as usize;
        let unusable = |problem: String| Err(ModelError::Unusable(problem));
        if steps == 0 {
            return unusable(format!(
                "{} % of {n} experts rounds to none; the least that can go is {:.4} %",
                share * 100.0,
                (step * 100) as f64 / n as f64
            ));
        }
        let keep = n.saturating_sub(steps * step);
        if keep < self.least() {
            return unusable(format!(
                "{} % of {n} experts leaves {keep} in each layer; at least {} have to stay, because a token passes through {}{}; \
                 the most that can go is {:.2} %",
                share * 100.0,
                self.least(),
                self.n_used,
                self.groups.map_or(String::new(), |g| format!(" from {} of {} groups", g.n_used, g.n)),
                (n - self.least()) as f64 * 100.0 / n as f64
            ));
        }
        if self.arch == "llama4" && keep == 128 {
            return unusable(
                "llama.cpp drops the norm of queries and keys of llama4 with exactly 128 experts".into(),
            );
        }
        Ok(keep)
    }

    /// Shape of each block, as far as the metadata tells; attention heads are 0 where it does not.
    pub fn shapes(&self) -> Vec<BlockShape> {
        let per_block = |suffix: &str| {
            let key = format!("{}.{suffix}", self.arch);
            self.file.get_per_block(&key, self.n_layer).ok().flatten()
        };
        let n_head = per_block("attention.head_count").unwrap_or_else(|| vec![0; self.n_layer]);
        let n_head_kv = per_block("attention.head_count_kv").unwrap_or_else(|| n_head.clone());
        let n_ff = per_block("feed_forward_length").unwrap_or_else(|| vec![0; self.n_layer]);
        (0..self.n_layer)
            .map(|il| {
                let (n_head, n_head_kv) = (n_head[il], n_head_kv[il]);
                match self.layers.iter().find(|l| l.block == il) {
                    Some(l) => BlockShape { n_head, n_head_kv, n_ff: l.width, n_expert: self.n_expert },
                    None => BlockShape { n_head, n_head_kv, n_ff: n_ff[il], n_expert: 0 },
                }
            })
            .collect()
    }

    /// Numbers of all parameters, and of those of the blocks' matrices, that are not in a file with `n_keep`
    /// experts of `width` neurons in each layer, without the blocks that draft tokens if `drop_drafts` is set.
    pub fn removed_params(&self, n_keep: usize, width: usize, drop_drafts: bool) -> [usize; 2] {
        let mut removed = [0, 0];
        for (i, t) in self.file.tensors().iter().enumerate() {
            let Some((_, role)) = block_and_role(&t.name) else { continue };
            let all = t.n_elements();
            let layer = self.layers.iter().find(|l| l.tensors.iter().any(|(j, _)| *j == i));
            let axis = layer.and_then(|l| l.tensors.iter().find(|(j, _)| *j == i)).map(|(_, axis)| *axis);
            let left = match (layer, axis) {
                _ if drop_drafts && self.drafts(&t.name) => 0,
                (Some(layer), Some(ExpertAxis::Experts | ExpertAxis::Chunks)) => {
                    let kept = all / self.n_expert * n_keep;
                    let has_neurons =
                        role.contains("_exps.") && !role.ends_with("scale") && role != "ffn_down_exps.bias";
                    if has_neurons && width < layer.width { kept / layer.width * width } else { kept }
                }
                _ => all,
            };
            removed[0] += all - left;
            removed[1] += if t.ne.len() > 1 { all - left } else { 0 };
        }
        removed
    }

    /// Number of parameters of the matrices of all blocks.
    pub fn block_params(&self) -> usize {
        let of_block = |t: &&TensorInfo| block_and_role(&t.name).is_some() && t.ne.len() > 1;
        self.file.tensors().iter().filter(of_block).map(TensorInfo::n_elements).sum()
    }

    /// Number of all parameters.
    pub fn params(&self) -> usize {
        self.file.tensors().iter().map(TensorInfo::n_elements).sum()
    }

    /// Whether router weights multiply the inputs of experts, instead of their outputs.
    pub fn weighs_inputs(&self) -> bool {
        self.arch == "llama4"
    }

    /// Whether the file is meant to see pictures or hear sounds with the help of a projector.
    pub fn is_multimodal(&self) -> bool {
        const ARCHS: [&str; 7] =
            ["qwen3vlmoe", "qwen35moe", "gemma4", "llama4", "mistral3", "deepseek2-ocr", "ernie4_5-moe"];
        ARCHS.contains(&self.arch.as_str())
    }
}

/// Number of entries along the last axis of a tensor.
pub fn count(t: &TensorInfo, axis: ExpertAxis) -> usize {
    match axis {
        // A dimension of size 1 at the end is not in `ne`, so that a single expert has none of its own.
        ExpertAxis::Experts | ExpertAxis::Chunks if t.name.ends_with("exps.weight") => {
            t.ne.get(2).copied().unwrap_or(1)
        }
        ExpertAxis::Experts | ExpertAxis::Chunks => t.ne.last().copied().unwrap_or(1),
        ExpertAxis::Tokens => t.ne.get(1).copied().unwrap_or(1),
    }
}

/// Number of the block of a tensor, and its name within the block.
pub fn block_and_role(name: &str) -> Option<(usize, &str)> {
    let (block, role) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((block.parse().ok()?, role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_axis_of_experts() {
        use ExpertAxis::{Chunks, Experts, Tokens};
        for (role, axis) in [
            ("ffn_gate_exps.weight", Ok(Some(Experts))),
            ("ffn_gate_up_exps.weight", Ok(Some(Experts))),
            ("ffn_down_exps.bias", Ok(Some(Experts))),
            ("ffn_down_exps.scale", Ok(Some(Experts))),
            ("ffn_up_exps.input_scale", Ok(Some(Experts))),
            ("ffn_gate_inp.weight", Ok(Some(Experts))),
            ("ffn_gate_inp.bias", Ok(Some(Experts))),
            ("exp_probs_b.bias", Ok(Some(Experts))),
            ("exp_probs_b", Ok(Some(Experts))),
            ("exp_probs_b_vl.bias", Ok(Some(Experts))),
            ("ffn_down_chexps.weight", Ok(Some(Chunks))),
            ("ffn_gate_tid2eid.weight", Ok(Some(Tokens))),
            ("ffn_gate_inp.scale", Ok(None)),
            ("ffn_gate_inp_shexp.weight", Ok(None)),
            ("ffn_norm_exps.weight", Ok(None)),
            ("ffn_latent_down.weight", Ok(None)),
            ("ffn_down_shexp.weight", Ok(None)),
            ("ffn_down.weight", Ok(None)),
            ("attn_q.weight", Ok(None)),
            ("ffn_gate_exps.norm", Err(())),
            ("exp_new.weight", Err(())),
            ("ffn_gate_inp.gain", Err(())),
        ] {
            assert_eq!(axis_of(role), axis, "{role}");
        }
    }
}
