//! Hyper-parameters from metadata, with llama.cpp's defaults (`llama_model_base::load_hparams`).

mod scales;

use super::rope::{SlidingWindow, read_rope, read_sliding};
use super::traits::{Norm, Positions, Scales, SharedExpert, Traits};
use super::{BlockShape, Family, FfnUnit, ModelError};
use crate::ggml::RopeParams;
use crate::gguf::{GgufError, GgufFile, Value};
use scales::{read_scales, read_temperature};

/// Growth of queries with their position (`llm_graph_input_attn_temp` of llama.cpp).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Factor of the growth.
    pub scale: f32,
    /// Position from which queries grow.
    pub floor: usize,
}

/// Hyper-parameters of a decoder.
#[derive(Clone, Debug)]
pub struct Hparams {
    /// Family, which determines the block structure.
    pub family: Family,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Number of tokens in the vocabulary.
    pub n_vocab: usize,
    /// Context length that the model was trained for, in tokens.
    pub n_ctx_train: usize,
    /// Width of a head (the same for keys and values).
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeParams,
    /// Whether frequency factors depend on the context length (`rope_factors_long`, `rope_factors_short`).
    pub longrope: bool,
    /// Sliding window of some of the blocks.
    pub sliding: Option<SlidingWindow>,
    /// Factor of the token embeddings.
    pub embd_scale: f32,
    /// Factor of the contributions of attention and FFN to the residual stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// Factor of the products of queries and keys, if it does not follow from their width.
    pub kq_scale: Option<f32>,
    /// Whether queries and keys are rotated, except in the blocks that [`Traits`] names.
    pub rotates: bool,
    /// Temperature of attention: queries are multiplied by 1 + scale · ln(⌊position / floor⌋ + 1).
    pub temperature: Option<Temperature>,
    /// Cap c of the logits: they are c · tanh(logits / c).
    pub softcap: Option<f32>,
    /// Cap of the products of queries and keys, in the same way.
    pub attn_softcap: Option<f32>,
    /// Usage of the experts, if there are any.
    pub experts: Option<ExpertParams>,
    /// Sizes of each block.
    pub blocks: Vec<BlockShape>,
}

/// Usage of a block's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertParams {
    /// Number of experts that a token passes through.
    pub n_used: usize,
    /// Number of neurons of the shared expert, or 0.
    pub n_ff_shared: usize,
}

impl Hparams {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`ModelError`] naming the key at fault, or the architecture if it is not supported.
    pub fn read(file: &GgufFile) -> Result<Hparams, ModelError> {
        let missing = |key: &str| ModelError::Gguf(GgufError::MissingKey(key.into()));
        let bad =
            |key: &str, problem: String| ModelError::Gguf(GgufError::BadKey { key: key.into(), problem });
        if let Some(problem) = no_model(file)? {
            return Err(ModelError::Unusable(problem.into()));
        }
        let arch = file.get_str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
        let family = Family::from_name(arch).ok_or_else(|| ModelError::Unsupported(arch.into()))?;
        let traits = family.traits();
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let required = |suffix: &str| file.get_u32(&key(suffix))?.ok_or_else(|| missing(&key(suffix)));

        if file.get(&key("attention.causal")).is_some_and(|v| *v == Value::Bool(false)) {
            return Err(ModelError::Unusable(
                "attention is not causal: embedding models cannot be pruned".into(),
            ));
        }
        if file.get_u32(&key("nextn_predict_layers"))?.unwrap_or(0) > 0 {
            return Err(ModelError::Unusable(
                "the model has blocks for multi-token prediction, which cannot be pruned".into(),
            ));
        }

        let n_layer = required("block_count")?;
        let n_embd = required("embedding_length")?;
        let n_ctx_train = required("context_length")?;
        // llama.cpp's LLAMA_MAX_LAYERS.
        if n_layer == 0 || n_layer > 512 {
            return Err(bad(&key("block_count"), format!("is {n_layer}; llama.cpp takes 1 to 512")));
        }
        for (size, suffix) in [(n_embd, "embedding_length"), (n_ctx_train, "context_length")] {
            if size == 0 {
                return Err(bad(&key(suffix), "is 0".into()));
            }
        }
        let per_block = |suffix: &str| file.get_per_block(&key(suffix), n_layer);
        let n_head =
            per_block("attention.head_count")?.ok_or_else(|| missing(&key("attention.head_count")))?;
        let n_head_kv = per_block("attention.head_count_kv")?.unwrap_or_else(|| n_head.clone());
        let mut n_ff =
            per_block("feed_forward_length")?.ok_or_else(|| missing(&key("feed_forward_length")))?;
        let (n_expert, experts) = read_experts(file, &key, traits, &mut n_ff)?;

        let blocks: Vec<BlockShape> = (0..n_layer)
            .map(|i| BlockShape { n_head: n_head[i], n_head_kv: n_head_kv[i], n_ff: n_ff[i], n_expert })
            .collect();
        for (i, b) in blocks.iter().enumerate() {
            check_block(family, i, b, blocks[0], &key)?;
        }
        if n_head[0] == 0 {
            return Err(bad(&key("attention.head_count"), "is 0 in the first block".into()));
        }

        let head_dim = file.get_u32(&key("attention.key_length"))?.unwrap_or(n_embd / n_head[0]);
        let v_dim = file.get_u32(&key("attention.value_length"))?.unwrap_or(n_embd / n_head[0]);
        let n_rot = file.get_u32(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        if head_dim == 0 || head_dim % 2 != 0 || head_dim > 1 << 16 {
            return Err(bad(
                &key("attention.key_length"),
                format!("is {head_dim}; it must be even and positive"),
            ));
        }
        if v_dim != head_dim {
            return Err(bad(
                &key("attention.value_length"),
                format!("is {v_dim}, but key_length is {head_dim}"),
            ));
        }
        let part = traits.positions.partial() && n_rot < head_dim && n_rot > 0 && n_rot % 2 == 0;
        if n_rot != head_dim && !part {
            return Err(bad(
                &key("rope.dimension_count"),
                format!("is {n_rot}, but key_length is {head_dim}"),
            ));
        }
        // Models for images have this key; llama.cpp then rotates by three positions.
        if file.get(&key("rope.dimension_sections")).is_some() {
            return Err(bad(
                &key("rope.dimension_sections"),
                "is not supported: positions have parts".into(),
            ));
        }

        let eps_key = key(match traits.norm {
            Norm::Rms => "attention.layer_norm_rms_epsilon",
            Norm::Layer | Norm::LayerWithBias => "attention.layer_norm_epsilon",
        });
        let norm_eps = file.get_f32(&eps_key)?.ok_or_else(|| missing(&eps_key))?;
        if !(0.0..1.0).contains(&norm_eps) {
            return Err(bad(&eps_key, format!("is {norm_eps}")));
        }
        let (rope, longrope) = read_rope(file, &key, traits, n_rot, n_ctx_train)?;
        let sliding = read_sliding(file, &key, traits, n_layer, &rope)?;
        let cap = |default: Option<f32>, suffix: &str| match default {
            Some(c) => {
                Ok::<_, GgufError>(Some(file.get_f32(&key(suffix))?.unwrap_or(c)).filter(|c| *c != 0.0))
            }
            None => Ok(None),
        };
        let softcap = cap(traits.softcap, "final_logit_softcapping")?;
        let attn_softcap = cap(traits.attn_softcap, "attn_logit_softcapping")?;
        let temperature = read_temperature(file, &key, traits, rope.n_ctx_orig)?;
        let embd_scale = if traits.scaled_embedding { (n_embd as f32).sqrt() } else { 1.0 };
        let embd = file
            .find("token_embd.weight")
            .ok_or_else(|| GgufError::MissingTensor("token_embd.weight".into()))?;
        let n_vocab = embd.ne.get(1).copied().unwrap_or(1);
        let scales = read_scales(file, &key, traits, [n_embd, n_layer])?;
        let h = Hparams {
            family,
            n_embd,
            n_vocab,
            n_ctx_train,
            head_dim,
            norm_eps,
            rope,
            longrope,
            sliding,
            embd_scale: embd_scale * scales.embedding,
            residual_scale: scales.residual,
            logit_scale: scales.logit,
            kq_scale: scales.attention,
            rotates: scales.rotates && traits.positions != Positions::Learned,
            temperature,
            softcap,
            attn_softcap,
            experts,
            blocks,
        };
        if !h.attention_scale(n_head[0]).is_finite() {
            let problem = format!("is {}, more than embedding_length", n_head[0]);
            return Err(bad(&key("attention.head_count"), problem));
        }
        Ok(h)
    }

    /// Whether block `il` attends to a sliding window only.
    pub fn slides(&self, il: usize) -> bool {
        self.sliding.as_ref().is_some_and(|s| s.blocks[il])
    }

    /// Whether block `il` rotates queries and keys.
    pub fn rotates(&self, il: usize) -> bool {
        let traits = self.family.traits();
        let full = self.sliding.is_some() && !self.slides(il);
        self.rotates
            && traits.unrotated.is_none_or(|n| !(il + 1).is_multiple_of(n))
            && !(full && traits.sliding.is_some_and(|s| s.full_unrotated))
    }

    /// Factor of the products of queries and keys if the first block has `n_head` heads
    /// (`f_attention_scale` of llama.cpp, which depends on them for one model).
    pub fn attention_scale(&self, n_head: usize) -> f32 {
        if let Some(scale) = self.kq_scale {
            return scale;
        }
        let width = if self.scaled_by_width() { self.n_embd / n_head } else { self.head_dim };
        1.0 / (width as f32).sqrt()
    }

    /// Whether [`Hparams::attention_scale`] depends on the number of heads.
    fn scaled_by_width(&self) -> bool {
        self.family.traits().width_scaled == Some(self.n_layer())
    }

    /// Whether the family's own loader and graph take fewer heads and compute the same with them, if all
    /// blocks have equally many.
    /// A query norm has to compensate a scale that changes with the number of heads.
    pub fn takes_fewer_heads(&self) -> bool {
        let traits = self.family.traits();
        traits.loads_fewer_heads && (traits.qk_norm.is_some() || !self.scaled_by_width())
    }

    /// Number of blocks.
    pub fn n_layer(&self) -> usize {
        self.blocks.len()
    }

    /// Parameters of one attention group: its rows of Q, K and V and its columns of attn_output.
    pub fn group_params(&self, b: &BlockShape) -> usize {
        (2 * b.heads_per_group() + 2) * self.head_dim * self.n_embd
    }

    /// Number of matrices of an FFN: gate if there is one, up and down.
    pub fn ffn_matrices(&self) -> usize {
        if self.family.traits().activation.gated() { 3 } else { 2 }
    }

    /// Parameters of a neuron: its rows of gate and up and its column of down.
    fn neuron_params(&self) -> usize {
        self.ffn_matrices() * self.n_embd
    }

    /// Parameters of an FFN unit; an expert includes its row of the router.
    pub fn unit_params(&self, b: &BlockShape, ffn_unit: FfnUnit) -> usize {
        match ffn_unit {
            FfnUnit::Neuron => b.n_feed_forwards() * self.neuron_params(),
            FfnUnit::Expert => b.n_ff * self.neuron_params() + self.n_embd,
        }
    }

    /// Smallest number of FFN units: for experts, the number that each token uses.
    pub fn fewest_units(&self, ffn_unit: FfnUnit) -> usize {
        match (ffn_unit, self.experts) {
            (FfnUnit::Expert, Some(e)) => e.n_used,
            _ => 1,
        }
    }

    /// Prunable parameters of a block's attention and FFN: |A| and |F| of the paper, without norms and
    /// biases.
    pub fn block_params(&self, b: &BlockShape) -> (usize, usize) {
        let ffn = b.n_ff * self.unit_params(b, FfnUnit::Neuron) + b.n_expert * self.n_embd;
        (b.n_head_kv * self.group_params(b), ffn)
    }

    /// Total of [`Hparams::block_params`] over `blocks`.
    pub fn blocks_params(&self, blocks: &[BlockShape]) -> usize {
        let params = |b: &BlockShape| {
            let (attention, ffn) = self.block_params(b);
            attention + ffn
        };
        blocks.iter().map(params).sum()
    }
}

/// Description of a file that accompanies a model but is none; `None` for a model.
fn no_model(file: &GgufFile) -> Result<Option<&'static str>, GgufError> {
    Ok(match (file.get_str("general.type")?, file.get_str("general.architecture")?) {
        (Some("adapter"), _) => {
            Some("it is a LoRA adapter: merge it into its model first; it does not fit a pruned one")
        }
        (Some("mmproj"), _) | (_, Some("clip")) => {
            Some("it is a projector of images or sound: prune its language model, which it fits as before")
        }
        (Some("imatrix"), _) => Some("it is an importance matrix, not a model"),
        _ => None,
    })
}

/// Reads the number of experts and their usage; `n_ff` becomes their width
/// (`llama_model_base::load_hparams` and the families' loaders in llama.cpp).
fn read_experts(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    n_ff: &mut [usize],
) -> Result<(usize, Option<ExpertParams>), ModelError> {
    let bad = |suffix: &str, problem: String| GgufError::BadKey { key: key(suffix), problem };
    let n_expert = file.get_u32(&key("expert_count"))?.unwrap_or(0);
    let Some(t) = traits.experts.filter(|t| n_expert > 0 || !t.optional) else {
        return if n_expert > 0 { Err(ModelError::Experts(n_expert, traits.name)) } else { Ok((0, None)) };
    };
    let n_used = file.get_u32(&key("expert_used_count"))?.unwrap_or(0);
    if n_used == 0 || n_used > n_expert {
        return Err(bad("expert_used_count", format!("is {n_used} of {n_expert} experts")).into());
    }
    if file.get_u32(&key("expert_group_count"))?.unwrap_or(0) > 1 {
        return Err(bad("expert_group_count", "is not supported: experts have groups".into()).into());
    }
    let dense = n_ff[0];
    if t.own_width {
        let own = file.get_per_block(&key("expert_feed_forward_length"), n_ff.len())?;
        n_ff.copy_from_slice(&own.unwrap_or_else(|| vec![dense / n_used; n_ff.len()]));
    }
    let shared = file.get_u32(&key("expert_shared_feed_forward_length"))?.filter(|n| *n > 0);
    let n_ff_shared = match t.shared {
        SharedExpert::Never => 0,
        SharedExpert::Optional => shared.unwrap_or(0),
        SharedExpert::Gated => shared.unwrap_or(dense),
    };
    Ok((n_expert, Some(ExpertParams { n_used, n_ff_shared })))
}

fn check_block(
    family: Family,
    i: usize,
    b: &BlockShape,
    first: BlockShape,
    key: &impl Fn(&str) -> String,
) -> Result<(), ModelError> {
    let bad = |suffix: &str, problem: String| {
        Err(ModelError::Gguf(GgufError::BadKey {
            key: key(suffix),
            problem: format!("{problem} in block {i}"),
        }))
    };
    // The limit is far beyond any model, and small enough that no product of sizes overflows.
    let limit = 1 << 20;
    if b.n_ff > limit * 16 {
        return bad("feed_forward_length", format!("is {}", b.n_ff));
    }
    if b.n_head > limit || b.n_ff > limit * 16 {
        return bad(
            "attention.head_count",
            format!("or width is absurd ({} heads, {} neurons)", b.n_head, b.n_ff),
        );
    }
    if *b != first && family.traits().per_layer_arch != Some(family) {
        return bad("attention.head_count", "or width differs".into());
    }
    if b.n_ff == 0 {
        return bad("feed_forward_length", "is 0 (such blocks are not supported)".into());
    }
    match (b.n_head, b.n_head_kv) {
        (0, 0) => Ok(()),
        (_, 0) => bad("attention.head_count_kv", "is 0 (linear attention is not supported)".into()),
        (n, kv) if n == 0 || !n.is_multiple_of(kv) => {
            bad("attention.head_count", format!("is {n}, not a multiple of {kv} KV heads"))
        }
        _ => Ok(()),
    }
}
