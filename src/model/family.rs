//! What tells one family of models from another: a row of a table each.

/// Block structure: which graph a model's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `llama`: Llama 1 to 3.x, Mistral, SmolLM, TinyLlama and others with the same blocks.
    Llama,
    /// `deci`: the same blocks with their own head counts and widths each.
    Deci,
    /// `gemma3`: Gemma 3, the text model.
    Gemma3,
    /// `qwen2`: Qwen 2 and 2.5.
    Qwen2,
    /// `qwen3`: Qwen 3, dense.
    Qwen3,
    /// `smollm3`: SmolLM3.
    SmolLm3,
    /// `internlm2`: InternLM 2 and 2.5.
    InternLm2,
    /// `ernie4_5`: ERNIE 4.5, dense.
    Ernie45,
    /// `exaone`: EXAONE 3.
    Exaone,
    /// `seed_oss`: Seed-OSS.
    SeedOss,
    /// `granite`: Granite 3, dense.
    Granite,
    /// `openelm`: OpenELM, and Qwen 3 with blocks that have their own head counts and widths each.
    OpenElm,
}

/// How gate and up become the input of ffn_down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate) · up.
    SwiGlu,
    /// gelu(gate) · up, with ggml's tanh approximation.
    GeGlu,
}

/// What tells a family from the others, as llama.cpp's loader and graph for it have it
/// (`src/models/<name>.cpp`).
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Value of `general.architecture` and prefix of the metadata keys.
    pub name: &'static str,
    /// The stock architecture that computes the same blocks and reads head counts and widths per block,
    /// if there is one; else all blocks keep equal sizes. Where it has no room for all of a model's tensors, that model
    /// goes without ([`Model::uneven`](super::Model::uneven)).
    pub uneven: Option<Family>,
    /// Q, K and V of a block are rows of one tensor, none has a bias, and no block goes without.
    pub one_qkv: bool,
    /// The output head may be a tensor of its own.
    pub untied: bool,
    /// A pruned model with equal blocks is written in this architecture: it takes fewer heads than n_embd / head_dim, and
    /// the biases that pruning adds, if any. Others are always written in `uneven`.
    pub stays: bool,
    /// The norm before the feed-forward, as its tensor is called.
    pub ffn_norm: &'static str,
    /// Of so many blocks in a row the last does not rotate queries and keys.
    pub unrotated: Option<usize>,
    /// Rotary embedding of pairs (j, j + n_rot/2) instead of (2j, 2j+1).
    pub rope_neox: bool,
    /// `rope_freqs` and the like are read.
    pub rope_factors: bool,
    /// Activation of the feed-forward.
    pub activation: Activation,
    /// Queries and keys pass through an RMS norm per head before they are rotated.
    pub qk_norm: bool,
    /// What attention and feed-forward put out passes through an RMS norm before it is added to the stream.
    pub post_norms: bool,
    /// attn_output and the feed-forward may have biases. Those of Q, K and V may be there in any family.
    pub output_biases: bool,
    /// Embeddings are multiplied by sqrt(n_embd).
    pub scaled_embedding: bool,
    /// `embedding_scale`, `residual_scale`, `attention.scale`, `logit_scale` and `rope.scaling.finetuned` are read.
    pub scales: bool,
    /// `final_logit_softcapping` is read: logits are c · tanh(logits / c).
    pub softcap: bool,
    /// `attention.sliding_window` is read: of so many blocks in a row the last sees all tokens, the others a
    /// window, unless the metadata has a pattern of its own.
    pub sliding_pattern: Option<usize>,
    /// The number of blocks of the one model that scales attention by 1/sqrt(n_embd / n_head) instead of
    /// 1/sqrt(head_dim).
    pub width_scaled: Option<usize>,
}

const LLAMA: Traits = Traits {
    name: "llama",
    uneven: Some(Family::Deci),
    one_qkv: false,
    untied: true,
    stays: true,
    ffn_norm: "ffn_norm",
    unrotated: None,
    rope_neox: false,
    rope_factors: true,
    activation: Activation::SwiGlu,
    qk_norm: false,
    post_norms: false,
    output_biases: true,
    scaled_embedding: false,
    scales: false,
    softcap: false,
    sliding_pattern: None,
    width_scaled: None,
};

const DECI: Traits = Traits { name: "deci", ..LLAMA };

const GEMMA3: Traits = Traits {
    name: "gemma3",
    uneven: None,
    one_qkv: false,
    untied: true,
    stays: true,
    ffn_norm: "ffn_norm",
    unrotated: None,
    rope_neox: true,
    rope_factors: false,
    activation: Activation::GeGlu,
    qk_norm: true,
    post_norms: true,
    output_biases: false,
    scaled_embedding: true,
    scales: false,
    softcap: true,
    sliding_pattern: Some(6),
    // The 27B model.
    width_scaled: Some(62),
};

const QWEN2: Traits = Traits {
    name: "qwen2",
    stays: false,
    rope_neox: true,
    rope_factors: false,
    output_biases: false,
    ..LLAMA
};

const QWEN3: Traits =
    Traits { name: "qwen3", uneven: Some(Family::OpenElm), stays: true, qk_norm: true, ..QWEN2 };

const OPENELM: Traits = Traits { name: "openelm", one_qkv: true, untied: false, ..QWEN3 };

const SMOLLM3: Traits = Traits {
    name: "smollm3",
    uneven: None,
    unrotated: Some(4),
    rope_factors: false,
    output_biases: false,
    ..LLAMA
};

const INTERNLM2: Traits =
    Traits { name: "internlm2", stays: false, rope_factors: false, output_biases: false, ..LLAMA };

const ERNIE45: Traits = Traits { name: "ernie4_5", output_biases: true, ..INTERNLM2 };

const EXAONE: Traits = Traits { name: "exaone", rope_factors: true, ..QWEN2 };

const SEED_OSS: Traits = Traits { name: "seed_oss", ffn_norm: "post_attention_norm", ..QWEN2 };

// deci could carry it only with its scales folded into quantised matrices.
const GRANITE: Traits = Traits { name: "granite", uneven: None, scales: true, ..LLAMA };

impl Family {
    /// All that are supported.
    pub const ALL: &'static [Family] = &[
        Family::Llama,
        Family::Deci,
        Family::Gemma3,
        Family::Qwen2,
        Family::Qwen3,
        Family::SmolLm3,
        Family::InternLm2,
        Family::Ernie45,
        Family::Exaone,
        Family::SeedOss,
        Family::OpenElm,
        Family::Granite,
    ];

    /// What tells it from the others.
    pub fn traits(self) -> &'static Traits {
        match self {
            Family::Llama => &LLAMA,
            Family::Deci => &DECI,
            Family::Gemma3 => &GEMMA3,
            Family::Qwen2 => &QWEN2,
            Family::Qwen3 => &QWEN3,
            Family::SmolLm3 => &SMOLLM3,
            Family::InternLm2 => &INTERNLM2,
            Family::Ernie45 => &ERNIE45,
            Family::Exaone => &EXAONE,
            Family::SeedOss => &SEED_OSS,
            Family::OpenElm => &OPENELM,
            Family::Granite => &GRANITE,
        }
    }

    /// The family of `general.architecture`.
    pub fn from_name(name: &str) -> Option<Family> {
        Family::ALL.iter().copied().find(|f| f.name() == name)
    }

    /// The prefix of its metadata keys.
    pub fn name(self) -> &'static str {
        self.traits().name
    }

    /// Names of all that are supported, for messages.
    pub(super) fn names() -> String {
        Family::ALL.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ")
    }
}
