//! Traits that distinguish the model families.

use super::Family;

/// Traits of a model family, as in llama.cpp's loader and graph for it (`src/models/<name>.cpp`).
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Value of `general.architecture` and prefix of the metadata keys.
    pub name: &'static str,
    /// Stock architecture that computes the same blocks and reads head counts and widths per block.
    /// Without one, all blocks keep equal sizes. A model with a feature that it cannot represent does
    /// without it ([`Model::output_archs`](super::Model::output_archs)).
    pub per_layer_arch: Option<Family>,
    /// Stock architecture that reads head counts per block, but only one width. It is used only on request.
    pub per_layer_heads_arch: Option<Family>,
    /// Whether the family serves as an output architecture only: source models of this architecture have
    /// other blocks.
    pub output_only: bool,
    /// Whether blocks other than the first may have no attention.
    pub attention_free: bool,
    /// Whether its own loader takes fewer heads than n_embd / head_dim, and the biases that pruning adds,
    /// if any.
    /// A pruned model with equal blocks then keeps its architecture. Others are written in `per_layer_arch`
    /// or `uniform_arch`, or keep their heads.
    pub loads_fewer_heads: bool,
    /// Stock architecture that computes the same blocks, all of equal size, with fewer heads, if its own
    /// does not.
    pub uniform_arch: Option<Family>,
    /// Whether Q, K and V of a block are rows of one tensor, none has a bias, and every block has them.
    pub one_qkv: bool,
    /// Whether gate and up of a block are rows of one tensor, `ffn_up`, in this order.
    pub fused_gate_up: bool,
    /// Output head: its own tensor or the token embedding.
    pub head: OutputHead,
    /// Norm of the residual stream before attention, FFN and output head.
    pub norm: Norm,
    /// Whether attention and FFN read the residual stream through a norm.
    pub pre_norms: bool,
    /// Tensor name of the norm before the FFN.
    pub ffn_norm: &'static str,
    /// Whether outputs of attention and FFN pass through an RMS norm before they are added to the residual
    /// stream.
    pub post_norms: bool,
    /// Whether the FFN reads the residual stream before attention.
    pub parallel: Parallel,
    /// RMS norm of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Whether attn_output and the FFN may have biases. Q, K and V may have biases in any family.
    pub output_biases: bool,
    /// Activation function of the FFN.
    pub activation: Activation,
    /// Experts, in place of one FFN.
    pub experts: Option<ExpertTraits>,
    /// Encoding of positions.
    pub positions: Positions,
    /// Tensors of frequency factors that are read, such as `rope_freqs`.
    pub rope_factors: RopeFactors,
    /// Whether YaRN's bounds, the multiplier of its magnitude, and the temperature of attention are read.
    pub yarn_keys: bool,
    /// Period n of unrotated blocks: the last of every n blocks does not rotate queries and keys.
    pub unrotated: Option<usize>,
    /// Sliding window of some of the blocks.
    pub sliding: Option<Sliding>,
    /// Whether embeddings are multiplied by sqrt(n_embd).
    pub scaled_embedding: bool,
    /// Scale factors that are read from metadata.
    pub scales: Option<Scales>,
    /// Number of blocks of the one model that scales attention by 1/sqrt(n_embd / n_head) instead of
    /// 1/sqrt(head_dim).
    pub width_scaled: Option<usize>,
    /// Default of `final_logit_softcapping`, if that is read: logits are c · tanh(logits / c) unless c is
    /// 0.
    pub softcap: Option<f32>,
    /// Default of `attn_logit_softcapping`, in the same way, for the products of queries and keys.
    pub attn_softcap: Option<f32>,
}

/// Norm before a block half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Divides by the root mean square.
    Rms,
    /// Subtracts the mean and divides by the standard deviation.
    Layer,
    /// Subtracts the mean, divides by the standard deviation, and adds a bias.
    LayerWithBias,
}

/// Output head of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputHead {
    /// The token embedding, always.
    Tied,
    /// Its own tensor if there is one, else the token embedding.
    Either,
}

/// Condition for a parallel FFN, which reads the residual stream before attention, so that both are added
/// side by side.
/// Without its own norm, the FFN then shares that of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallel {
    /// Never.
    Never,
    /// In every model.
    Always,
    /// In models without a norm before the FFN.
    WithoutNorm,
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Head by head, before the rotation.
    Heads,
    /// Head by head, after the rotation.
    RotatedHeads,
    /// All heads of a token together, before the rotation.
    Whole,
}

/// Activation function, which gives the input of ffn_down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate) · up.
    SwiGlu,
    /// gelu(gate) · up, with ggml's tanh approximation.
    GeGlu,
    /// gelu(up).
    Gelu,
    /// max(0, up)².
    ReluSquared,
}

impl Activation {
    /// Whether there is a gate beside up.
    pub fn gated(self) -> bool {
        matches!(self, Activation::SwiGlu | Activation::GeGlu)
    }
}

/// Traits of FFNs among which a router chooses for each token, by the softmax of its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertTraits {
    /// Whether the family also has models with one FFN.
    pub optional: bool,
    /// Whether router weights of the chosen experts are divided by their sum.
    pub normed: bool,
    /// Whether the experts' width has its own key.
    pub own_width: bool,
    /// Shared expert, through which all tokens pass.
    pub shared: SharedExpert,
}

/// Presence of a shared expert, through which all tokens pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedExpert {
    /// No shared expert.
    Never,
    /// Shared expert if metadata gives its width.
    Optional,
    /// Shared expert in every model, multiplied by the sigmoid of a product with the token.
    /// Metadata gives its width, or else that of an FFN.
    Gated,
}

/// Encoding of positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Rotation of the pairs (2j, 2j + 1) of queries and keys.
    Rope,
    /// Rotation of the pairs (j, j + n_rot/2).
    RopeNeox,
    /// As [`Positions::Rope`], for the first n_rot numbers of a head.
    PartialRope,
    /// As [`Positions::RopeNeox`], for the first n_rot numbers of a head.
    PartialRopeNeox,
    /// A learned vector per position, which is added to the embedding.
    Learned,
}

impl Positions {
    /// Whether pairs are (j, j + n_rot/2) instead of (2j, 2j + 1).
    pub fn neox(self) -> bool {
        matches!(self, Positions::RopeNeox | Positions::PartialRopeNeox)
    }

    /// Whether a head may have more numbers than are rotated.
    pub fn partial(self) -> bool {
        matches!(self, Positions::PartialRope | Positions::PartialRopeNeox)
    }
}

/// Tensors of frequency factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeFactors {
    /// Not read.
    None,
    /// `rope_factors_long` and `rope_factors_short` if metadata says `longrope`, else `rope_freqs`.
    ByType,
    /// `rope_factors_long` and `rope_factors_short` whatever metadata says.
    Long,
}

/// Traits of sliding-window attention in some of the blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sliding {
    /// Period n: the last of every n blocks sees all tokens, unless the metadata has its own pattern.
    pub pattern: usize,
    /// Default length of the window in tokens; without one, all blocks see all tokens.
    pub n_swa: Option<usize>,
    /// Number of blocks of the only model that slides; `None` if all models do.
    pub n_layer: Option<usize>,
    /// Rotary embedding in the sliding blocks.
    pub rope: SlidingRope,
    /// Whether blocks that see all tokens do not rotate queries and keys.
    pub full_unrotated: bool,
}

/// Rotary embedding in the sliding blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SlidingRope {
    /// As in the other blocks, with `rope.freq_base_swa` if metadata has it.
    SameOrBase,
    /// As in the other blocks.
    Same,
    /// `rope.freq_base_swa`, or this default, without frequency scaling.
    Base(f32),
    /// As in the other blocks, without frequency scaling, YaRN and magnitude factor.
    Plain,
}

/// Scale factors from metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// `embedding_scale`, `residual_scale`, `attention.scale` and `logit_scale`, by which logits are divided.
    Granite {
        /// Whether `rope.scaling.finetuned` switches the rotary embedding.
        rope_switch: bool,
    },
    /// `embedding_scale`, `residual_scale` and `logit_scale`, with MiniCPM's defaults.
    MiniCpm,
    /// `logit_scale`, by which logits are multiplied.
    Cohere,
}
