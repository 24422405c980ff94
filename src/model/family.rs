//! Supported model families, one table row each.

use super::traits::{
    Activation, ExpertTraits, Norm, OutputHead, Parallel, Positions, QkNorm, RopeFactors, Scales,
    SharedExpert, Sliding, SlidingRope, Traits,
};

/// Defines the families and the row of each.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident = $row:ident,)*) => {
        /// Model family: the graph of a model's blocks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Family {
            $($(#[$doc])* $family,)*
        }

        impl Family {
            /// All families.
            pub const ALL: &'static [Family] = &[$(Family::$family,)*];

            /// Traits of the family.
            pub fn traits(self) -> &'static Traits {
                match self {
                    $(Family::$family => &$row,)*
                }
            }
        }
    };
}

families! {
    /// `llama`: Llama 1 to 3.x, Mistral, SmolLM, TinyLlama and others with the same blocks; Mixtral.
    Llama = LLAMA,
    /// `deci`: the blocks of `llama`, each with its own head counts and width.
    Deci = DECI,
    /// `mistral3`: Ministral 3 and others, where attention has a temperature.
    Mistral3 = MISTRAL3,
    /// `qwen2`: Qwen 2 and 2.5.
    Qwen2 = QWEN2,
    /// `qwen3`: Qwen 3, dense.
    Qwen3 = QWEN3,
    /// `qwen2moe`: Qwen 1.5 and 2, mixtures of experts.
    Qwen2Moe = QWEN2_MOE,
    /// `qwen3moe`: Qwen 3, mixtures of experts.
    Qwen3Moe = QWEN3_MOE,
    /// `openelm`: OpenELM, and Qwen 3 whose blocks have their own head counts and widths.
    OpenElm = OPENELM,
    /// `step35`: Qwen 3 whose blocks have their own head counts.
    Step35 = STEP35,
    /// `gemma2`: Gemma 2.
    Gemma2 = GEMMA2,
    /// `gemma3`: Gemma 3, the text model.
    Gemma3 = GEMMA3,
    /// `phi3`: Phi-3, 3.5 and 4, dense.
    Phi3 = PHI3,
    /// `granite`: Granite 3, dense.
    Granite = GRANITE,
    /// `granitemoe`: Granite 3, mixtures of experts.
    GraniteMoe = GRANITE_MOE,
    /// `minicpm`: MiniCPM 1 and 2, dense.
    MiniCpm = MINICPM,
    /// `smollm3`: SmolLM3.
    SmolLm3 = SMOLLM3,
    /// `glm4`: GLM-4, dense.
    Glm4 = GLM4,
    /// `olmo2`: OLMo 2 and 3.
    Olmo2 = OLMO2,
    /// `olmoe`: OLMoE.
    Olmoe = OLMOE,
    /// `exaone`: EXAONE 3.
    Exaone = EXAONE,
    /// `exaone4`: EXAONE 4.
    Exaone4 = EXAONE4,
    /// `internlm2`: InternLM 2 and 2.5.
    InternLm2 = INTERNLM2,
    /// `ernie4_5`: ERNIE 4.5, dense.
    Ernie45 = ERNIE45,
    /// `seed_oss`: Seed-OSS.
    SeedOss = SEED_OSS,
    /// `hunyuan-dense`: Hunyuan, dense.
    HunyuanDense = HUNYUAN_DENSE,
    /// `arcee`: AFM.
    Arcee = ARCEE,
    /// `starcoder2`: StarCoder 2.
    StarCoder2 = STARCODER2,
    /// `stablelm`: StableLM.
    StableLm = STABLELM,
    /// `gpt2`: GPT-2.
    Gpt2 = GPT2,
    /// `command-r`: Command R.
    CommandR = COMMAND_R,
    /// `cohere2`: Command R7B and Aya.
    Cohere2 = COHERE2,
    /// `falcon`: Falcon 1.
    Falcon = FALCON,
    /// `nemotron`: Nemotron and Minitron with their own blocks.
    Nemotron = NEMOTRON,
}

const LLAMA: Traits = Traits {
    name: "llama",
    per_layer_arch: Some(Family::Deci),
    per_layer_heads_arch: None,
    output_only: false,
    attention_free: false,
    loads_fewer_heads: true,
    uniform_arch: None,
    one_qkv: false,
    fused_gate_up: false,
    head: OutputHead::Either,
    norm: Norm::Rms,
    pre_norms: true,
    ffn_norm: "ffn_norm",
    post_norms: false,
    parallel: Parallel::Never,
    qk_norm: None,
    output_biases: true,
    activation: Activation::SwiGlu,
    experts: Some(ExpertTraits {
        optional: true,
        normed: true,
        own_width: false,
        shared: SharedExpert::Never,
    }),
    positions: Positions::Rope,
    rope_factors: RopeFactors::ByType,
    yarn_keys: false,
    unrotated: None,
    sliding: None,
    scaled_embedding: false,
    scales: None,
    width_scaled: None,
    softcap: None,
    attn_softcap: None,
};

/// Llama's blocks with neither frequency factors nor biases of attn_output and the FFN.
const BARE: Traits = Traits { experts: None, rope_factors: RopeFactors::None, output_biases: false, ..LLAMA };

/// Blocks as [`BARE`], for which no stock architecture takes per-layer sizes.
const EQUAL: Traits = Traits { per_layer_arch: None, ..BARE };

/// Blocks as [`EQUAL`], whose loader does not take fewer heads either.
const ALL_HEADS: Traits = Traits { loads_fewer_heads: false, ..EQUAL };

const DECI: Traits = Traits { name: "deci", attention_free: true, experts: None, ..LLAMA };

const MISTRAL3: Traits = Traits { name: "mistral3", experts: None, yarn_keys: true, ..LLAMA };

const QWEN2: Traits = Traits { name: "qwen2", positions: Positions::RopeNeox, ..INTERNLM2 };

const QWEN3: Traits = Traits {
    name: "qwen3",
    per_layer_arch: Some(Family::OpenElm),
    per_layer_heads_arch: Some(Family::Step35),
    loads_fewer_heads: true,
    uniform_arch: None,
    qk_norm: Some(QkNorm::Heads),
    ..QWEN2
};

const QWEN2_MOE: Traits = Traits {
    name: "qwen2moe",
    experts: Some(ExpertTraits {
        optional: false,
        normed: false,
        own_width: true,
        shared: SharedExpert::Gated,
    }),
    positions: Positions::RopeNeox,
    ..ALL_HEADS
};

const QWEN3_MOE: Traits = Traits {
    name: "qwen3moe",
    qk_norm: Some(QkNorm::Heads),
    experts: Some(ExpertTraits {
        optional: false,
        normed: true,
        own_width: true,
        shared: SharedExpert::Never,
    }),
    positions: Positions::RopeNeox,
    ..EQUAL
};

const OLMOE: Traits = Traits {
    name: "olmoe",
    qk_norm: Some(QkNorm::Whole),
    experts: Some(ExpertTraits {
        optional: false,
        normed: false,
        own_width: false,
        shared: SharedExpert::Never,
    }),
    positions: Positions::RopeNeox,
    ..ALL_HEADS
};

const OPENELM: Traits =
    Traits { name: "openelm", per_layer_heads_arch: None, one_qkv: true, head: OutputHead::Tied, ..QWEN3 };

// Without experts and gates, and with a window longer than any text, these are the blocks of Qwen 3.
const STEP35: Traits =
    Traits { name: "step35", per_layer_arch: None, per_layer_heads_arch: None, output_only: true, ..QWEN3 };

const GEMMA2: Traits = Traits {
    name: "gemma2",
    head: OutputHead::Tied,
    post_norms: true,
    activation: Activation::GeGlu,
    positions: Positions::RopeNeox,
    sliding: Some(Sliding {
        pattern: 2,
        n_swa: Some(4096),
        n_layer: None,
        rope: SlidingRope::SameOrBase,
        full_unrotated: false,
    }),
    scaled_embedding: true,
    // The 27B model.
    width_scaled: Some(46),
    softcap: Some(30.0),
    attn_softcap: Some(50.0),
    ..EQUAL
};

const GEMMA3: Traits = Traits {
    name: "gemma3",
    head: OutputHead::Either,
    qk_norm: Some(QkNorm::Heads),
    sliding: Some(Sliding {
        pattern: 6,
        n_swa: None,
        n_layer: None,
        rope: SlidingRope::Base(10000.0),
        full_unrotated: false,
    }),
    // The 27B model.
    width_scaled: Some(62),
    softcap: Some(0.0),
    attn_softcap: None,
    ..GEMMA2
};

const PHI3: Traits = Traits {
    name: "phi3",
    fused_gate_up: true,
    positions: Positions::PartialRopeNeox,
    rope_factors: RopeFactors::Long,
    ..INTERNLM2
};

// deci could hold it only with its scales folded into quantised matrices.
const GRANITE: Traits = Traits {
    name: "granite",
    per_layer_arch: None,
    scales: Some(Scales::Granite { rope_switch: true }),
    experts: None,
    ..LLAMA
};

const GRANITE_MOE: Traits = Traits {
    name: "granitemoe",
    experts: Some(ExpertTraits {
        optional: false,
        normed: true,
        own_width: false,
        shared: SharedExpert::Optional,
    }),
    scales: Some(Scales::Granite { rope_switch: false }),
    ..GRANITE
};

const MINICPM: Traits = Traits { name: "minicpm", scales: Some(Scales::MiniCpm), ..GRANITE };

const SMOLLM3: Traits = Traits { name: "smollm3", unrotated: Some(4), ..EQUAL };

const GLM4: Traits = Traits {
    name: "glm4",
    fused_gate_up: true,
    post_norms: true,
    positions: Positions::PartialRope,
    ..EQUAL
};

const OLMO2: Traits = Traits {
    name: "olmo2",
    pre_norms: false,
    post_norms: true,
    qk_norm: Some(QkNorm::Whole),
    positions: Positions::RopeNeox,
    sliding: Some(Sliding {
        pattern: 4,
        n_swa: None,
        n_layer: None,
        rope: SlidingRope::Plain,
        full_unrotated: false,
    }),
    ..ALL_HEADS
};

const EXAONE: Traits = Traits { name: "exaone", rope_factors: RopeFactors::ByType, ..QWEN2 };

const EXAONE4: Traits = Traits {
    name: "exaone4",
    qk_norm: Some(QkNorm::Heads),
    rope_factors: RopeFactors::ByType,
    sliding: Some(Sliding {
        pattern: 4,
        n_swa: Some(4096),
        // The 32B model.
        n_layer: Some(64),
        rope: SlidingRope::Same,
        full_unrotated: true,
    }),
    ..OLMO2
};

const INTERNLM2: Traits =
    Traits { name: "internlm2", loads_fewer_heads: false, uniform_arch: Some(Family::Llama), ..BARE };

const ERNIE45: Traits = Traits { name: "ernie4_5", output_biases: true, ..INTERNLM2 };

const SEED_OSS: Traits = Traits { name: "seed_oss", ffn_norm: "post_attention_norm", ..QWEN2 };

const HUNYUAN_DENSE: Traits = Traits {
    name: "hunyuan-dense",
    qk_norm: Some(QkNorm::RotatedHeads),
    positions: Positions::RopeNeox,
    ..EQUAL
};

const ARCEE: Traits =
    Traits { name: "arcee", activation: Activation::ReluSquared, rope_factors: RopeFactors::ByType, ..EQUAL };

const STARCODER2: Traits = Traits {
    name: "starcoder2",
    norm: Norm::LayerWithBias,
    output_biases: true,
    activation: Activation::Gelu,
    positions: Positions::RopeNeox,
    ..ALL_HEADS
};

const STABLELM: Traits = Traits {
    name: "stablelm",
    norm: Norm::LayerWithBias,
    parallel: Parallel::WithoutNorm,
    positions: Positions::PartialRopeNeox,
    ..ALL_HEADS
};

const GPT2: Traits = Traits { name: "gpt2", positions: Positions::Learned, ..STARCODER2 };

const COMMAND_R: Traits = Traits {
    name: "command-r",
    head: OutputHead::Tied,
    norm: Norm::Layer,
    parallel: Parallel::Always,
    positions: Positions::PartialRope,
    scales: Some(Scales::Cohere),
    ..ALL_HEADS
};

const COHERE2: Traits = Traits {
    name: "cohere2",
    sliding: Some(Sliding {
        pattern: 4,
        n_swa: None,
        n_layer: None,
        rope: SlidingRope::Same,
        full_unrotated: true,
    }),
    ..COMMAND_R
};

const FALCON: Traits = Traits {
    name: "falcon",
    norm: Norm::LayerWithBias,
    parallel: Parallel::Always,
    activation: Activation::Gelu,
    positions: Positions::RopeNeox,
    ..ALL_HEADS
};

const NEMOTRON: Traits = Traits {
    name: "nemotron",
    norm: Norm::LayerWithBias,
    output_biases: true,
    activation: Activation::ReluSquared,
    positions: Positions::PartialRopeNeox,
    ..ALL_HEADS
};

impl Family {
    /// Family with the `general.architecture` value `name`.
    pub fn from_name(name: &str) -> Option<Family> {
        Family::sources().find(|f| f.name() == name)
    }

    /// Value of `general.architecture`, and prefix of the metadata keys.
    pub fn name(self) -> &'static str {
        self.traits().name
    }

    /// Families that source models may have.
    fn sources() -> impl Iterator<Item = Family> {
        Family::ALL.iter().copied().filter(|f| !f.traits().output_only)
    }

    /// Names of the source families, for messages.
    pub(super) fn names() -> String {
        Family::sources().map(|f| f.name()).collect::<Vec<_>>().join(", ")
    }
}
