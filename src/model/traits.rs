//! What can tell one family of models from another.

use super::Family;

/// What tells a family from the others, as llama.cpp's loader and graph for it have it
/// (`src/models/<name>.cpp`).
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Value of `general.architecture` and prefix of the metadata keys.
    pub name: &'static str,
    /// The stock architecture that computes the same blocks and reads head counts and widths per block,
    /// if there is one; else all blocks keep equal sizes. Where it has no room for all of a model, that model
    /// goes without ([`Model::carriers`](super::Model::carriers)).
    pub uneven: Option<Family>,
    /// The same where it reads head counts per block, but one width. Such a model is only written there if it is asked for.
    pub uneven_heads: Option<Family>,
    /// Nothing but such an architecture: models that came in it are others.
    pub carrier_only: bool,
    /// Blocks may go without attention, but for the first.
    pub attention_free: bool,
    /// Its own loader takes fewer heads than n_embd / head_dim, and the biases that pruning adds, if any. A pruned model
    /// with equal blocks then stays what it is. Others are written in `uneven` or `even`, or keep their heads.
    pub stays: bool,
    /// The stock architecture that computes the same blocks in equal sizes with fewer heads, where its own does not.
    pub even: Option<Family>,
    /// Q, K and V of a block are rows of one tensor, none has a bias, and no block goes without.
    pub one_qkv: bool,
    /// Gate and up of a block are rows of one tensor, `ffn_up`, in this order.
    pub fused_gate_up: bool,
    /// Whether the output head is a tensor of its own.
    pub head: OutputHead,
    /// What the stream passes through before attention, feed-forward and output head.
    pub norm: Norm,
    /// Attention and feed-forward see the stream through a norm.
    pub pre_norms: bool,
    /// The norm before the feed-forward, as its tensor is called.
    pub ffn_norm: &'static str,
    /// What attention and feed-forward put out passes through an RMS norm before it is added to the stream.
    pub post_norms: bool,
    /// Whether the feed-forward sees the stream as it is before attention.
    pub parallel: Parallel,
    /// The RMS norm that queries and keys pass through.
    pub qk_norm: Option<QkNorm>,
    /// attn_output and the feed-forward may have biases. Those of Q, K and V may be there in any family.
    pub output_biases: bool,
    /// Activation of the feed-forward.
    pub activation: Activation,
    /// Experts in place of a feed-forward.
    pub experts: Option<ExpertTraits>,
    /// What tells positions apart.
    pub positions: Positions,
    /// `rope_freqs` and the like are read.
    pub rope_factors: RopeFactors,
    /// YaRN's bounds and its magnitude's multiplier are read, and the temperature of attention.
    pub yarn_keys: bool,
    /// Of so many blocks in a row the last does not rotate queries and keys.
    pub unrotated: Option<usize>,
    /// Attention to a window in some of the blocks.
    pub sliding: Option<Sliding>,
    /// Embeddings are multiplied by sqrt(n_embd).
    pub scaled_embedding: bool,
    /// Factors that are read from metadata.
    pub scales: Option<Scales>,
    /// The number of blocks of the one model that scales attention by 1/sqrt(n_embd / n_head) instead of
    /// 1/sqrt(head_dim).
    pub width_scaled: Option<usize>,
    /// `final_logit_softcapping` is read, with this default: logits are c · tanh(logits / c) unless c is 0.
    pub softcap: Option<f32>,
    /// `attn_logit_softcapping` in the same way, for the products of queries and keys.
    pub attn_softcap: Option<f32>,
}

/// The norm before a half of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Divides by the root mean square.
    Rms,
    /// Takes the mean off and divides by the standard deviation.
    Layer,
    /// The same, and adds a bias at the end.
    LayerWithBias,
}

/// The output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputHead {
    /// Always the token embedding.
    Tied,
    /// The token embedding unless there is a tensor of its own.
    Either,
}

/// When the feed-forward sees the stream as it is before attention, so that both are added to it side by side. Where it
/// has no norm of its own, it then shares that of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallel {
    /// Never.
    Never,
    /// In every model.
    Always,
    /// In models without a norm before the feed-forward.
    WithoutNorm,
}

/// How queries and keys are normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Head by head, before they are rotated.
    Heads,
    /// Head by head, after that.
    RotatedHeads,
    /// All heads of a token together, before they are rotated.
    Whole,
}

/// How neurons become the input of ffn_down.
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
    /// Whether there is a gate besides up.
    pub fn gated(self) -> bool {
        matches!(self, Activation::SwiGlu | Activation::GeGlu)
    }
}

/// Feed-forwards among which a router chooses for each token, by the softmax of what it gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertTraits {
    /// There are models with one feed-forward, too.
    pub optional: bool,
    /// What the chosen count is divided by their sum.
    pub normed: bool,
    /// Their width has a key of its own.
    pub own_width: bool,
    /// One more that all tokens pass through.
    pub shared: SharedExpert,
}

/// The expert that all tokens pass through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedExpert {
    /// None.
    Never,
    /// If metadata gives it a width.
    Optional,
    /// Always, and multiplied by the sigmoid of a product with the token; as wide as metadata says of it or of a
    /// feed-forward.
    Gated,
}

/// What tells positions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Pairs (2j, 2j + 1) of queries and keys are rotated.
    Rope,
    /// Pairs (j, j + n_rot/2).
    RopeNeox,
    /// As [`Positions::Rope`], of the first n_rot numbers of a head.
    PartialRope,
    /// As [`Positions::RopeNeox`], of the first n_rot numbers of a head.
    PartialRopeNeox,
    /// A vector per position is added to the embedding.
    Learned,
}

impl Positions {
    /// Pairs (j, j + n_rot/2) instead of (2j, 2j + 1).
    pub fn neox(self) -> bool {
        matches!(self, Positions::RopeNeox | Positions::PartialRopeNeox)
    }

    /// A head may have more numbers than are rotated.
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

/// Attention to the last few tokens in some of the blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sliding {
    /// Of so many blocks in a row the last sees all tokens, unless the metadata has a pattern of its own.
    pub pattern: usize,
    /// Length of the window if metadata has none; without that, all blocks see all tokens.
    pub n_swa: Option<usize>,
    /// Only in the model with this number of blocks.
    pub n_layer: Option<usize>,
    /// Rotary embedding in those blocks.
    pub rope: SlidingRope,
    /// Blocks that see all tokens do not rotate queries and keys.
    pub full_unrotated: bool,
}

/// Rotary embedding in blocks that slide.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SlidingRope {
    /// As in the others, with `rope.freq_base_swa` if metadata has it.
    SameOrBase,
    /// As in the others.
    Same,
    /// `rope.freq_base_swa`, or this, and not stretched.
    Base(f32),
    /// As in the others, but neither stretched nor made stronger.
    Plain,
}

/// Factors from metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// `embedding_scale`, `residual_scale`, `attention.scale` and `logit_scale`, by which logits are divided.
    Granite {
        /// `rope.scaling.finetuned` says whether there is a rotary embedding.
        rope_switch: bool,
    },
    /// The first, second and fourth, with defaults of MiniCPM's.
    MiniCpm,
    /// `logit_scale`, by which logits are multiplied.
    Cohere,
}
