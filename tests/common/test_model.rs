//! Small random models with a real tokenizer layout, written through the library's own writer.

use putri_gguf::ggml::Type;
use putri_gguf::gguf::{OutTensor, TensorData, Value, write_gguf};
use putri_gguf::model::{Family, Norm, Parallel, Positions, QkNorm, RopeFactors, SharedExpert, Traits};
use std::borrow::Cow;
use std::path::Path;

/// Description of a generated model.
#[derive(Clone)]
pub struct TestModel {
    pub arch: &'static str,
    pub n_embd: usize,
    pub head_dim: usize,
    /// Number of query heads, number of KV heads and width, per block.
    pub blocks: Vec<(usize, usize, usize)>,
    pub n_vocab: usize,
    /// Context length in its metadata, in tokens.
    pub n_ctx_train: usize,
    pub biases: bool,
    pub tied: bool,
    pub rope_freqs: bool,
    pub fused_qkv: bool,
    /// Rotated numbers per head, if not all.
    pub n_rot: Option<usize>,
    /// Second variant of a family that has two: without a norm before the FFN (StableLM), or with two norms
    /// (Falcon).
    pub parallel: bool,
    /// Number of experts, of experts per token, and of neurons of the shared expert.
    pub experts: Option<[usize; 3]>,
    /// Extra metadata, under the architecture's prefix.
    pub extra: Vec<(&'static str, Value)>,
    /// Type of the matrices.
    pub ty: Type,
    pub seed: u64,
}

impl TestModel {
    /// Gemma 3 with seven blocks; with the usual pattern, one of them sees all tokens.
    pub fn gemma3() -> TestModel {
        let extra =
            vec![("attention.sliding_window", Value::U32(24)), ("final_logit_softcapping", Value::F32(8.0))];
        TestModel { arch: "gemma3", n_embd: 48, blocks: vec![(4, 2, 96); 7], extra, ..TestModel::default() }
    }
}

impl TestModel {
    /// Models of the families other than Llama's and Gemma 3, in all their variants.
    pub fn variants() -> Vec<(&'static str, TestModel)> {
        let granite = vec![
            ("logit_scale", Value::F32(3.0)),
            ("residual_scale", Value::F32(0.4)),
            ("embedding_scale", Value::F32(6.0)),
            ("attention.scale", Value::F32(0.1)),
        ];
        let of = |arch| TestModel { arch, blocks: vec![(4, 2, 96); 5], ..TestModel::default() };
        let orig = |n| ("rope.scaling.original_context_length", Value::U32(n));
        let yarn = vec![
            ("rope.scaling.type", Value::Str("yarn".into())),
            ("rope.scaling.factor", Value::F32(4.0)),
            orig(64),
            ("rope.scaling.yarn_beta_fast", Value::F32(16.0)),
            ("rope.scaling.yarn_beta_slow", Value::F32(2.0)),
            ("rope.scaling.yarn_log_multiplier", Value::F32(0.8)),
            ("attention.temperature_scale", Value::F32(0.3)),
        ];
        let gemma2 = TestModel {
            extra: vec![
                ("attention.sliding_window", Value::U32(24)),
                ("attn_logit_softcapping", Value::F32(2.0)),
                ("final_logit_softcapping", Value::F32(8.0)),
            ],
            ..of("gemma2")
        };
        let window = vec![("attention.sliding_window", Value::U32(24))];
        let logits = vec![("logit_scale", Value::F32(0.5))];
        vec![
            ("mistral3", of("mistral3")),
            ("mistral3, temperature, YaRN", TestModel { extra: yarn, ..of("mistral3") }),
            ("gemma2", gemma2.clone()),
            (
                "gemma2, biases, own base",
                TestModel {
                    biases: true,
                    extra: [gemma2.extra.clone(), vec![("rope.freq_base_swa", Value::F32(500.0))]].concat(),
                    ..gemma2
                },
            ),
            ("phi3", TestModel { fused_qkv: true, ..of("phi3") }),
            (
                "phi3, long",
                TestModel {
                    rope_freqs: true,
                    fused_qkv: true,
                    tied: false,
                    extra: [window.clone(), vec![orig(4096), ("rope.scaling.attn_factor", Value::F32(1.2))]]
                        .concat(),
                    ..of("phi3")
                },
            ),
            ("phi3, rotated in part", TestModel { n_rot: Some(12), rope_freqs: true, ..of("phi3") }),
            ("minicpm", TestModel { biases: true, ..of("minicpm") }),
            ("glm4", TestModel { biases: true, n_rot: Some(8), tied: false, ..of("glm4") }),
            ("olmo2", TestModel { tied: false, ..of("olmo2") }),
            ("olmo2, sliding", TestModel { tied: false, extra: window.clone(), ..of("olmo2") }),
            ("exaone4", TestModel { rope_freqs: true, ..of("exaone4") }),
            ("hunyuan-dense", of("hunyuan-dense")),
            ("arcee", TestModel { rope_freqs: true, ..of("arcee") }),
            ("starcoder2", TestModel { biases: true, ..of("starcoder2") }),
            ("stablelm", TestModel { biases: true, tied: false, n_rot: Some(4), ..of("stablelm") }),
            (
                "stablelm, parallel",
                TestModel { parallel: true, tied: false, n_rot: Some(4), ..of("stablelm") },
            ),
            ("gpt2", TestModel { biases: true, fused_qkv: true, blocks: vec![(4, 4, 96); 5], ..of("gpt2") }),
            ("command-r", TestModel { extra: logits.clone(), ..of("command-r") }),
            ("cohere2", TestModel { extra: [logits, window].concat(), ..of("cohere2") }),
            ("falcon", TestModel { fused_qkv: true, blocks: vec![(4, 1, 96); 5], ..of("falcon") }),
            ("falcon, two norms", TestModel { fused_qkv: true, parallel: true, tied: false, ..of("falcon") }),
            ("nemotron", TestModel { n_rot: Some(8), tied: false, ..of("nemotron") }),
            ("nemotron, biases", TestModel { biases: true, n_rot: Some(8), tied: false, ..of("nemotron") }),
            ("qwen2", TestModel { biases: true, ..of("qwen2") }),
            ("qwen2, untied, fused", TestModel { biases: true, tied: false, fused_qkv: true, ..of("qwen2") }),
            ("qwen3", of("qwen3")),
            ("qwen3, fused", TestModel { fused_qkv: true, ..of("qwen3") }),
            ("granite", TestModel { extra: granite.clone(), ..of("granite") }),
            (
                "granite, biases, not rotated",
                TestModel {
                    biases: true,
                    extra: [granite, vec![("rope.scaling.finetuned", Value::Bool(false))]].concat(),
                    ..of("granite")
                },
            ),
            ("openelm", TestModel { fused_qkv: true, ..of("openelm") }),
            ("qwen3, untied, wide heads", TestModel { tied: false, head_dim: 32, ..of("qwen3") }),
            ("smollm3", of("smollm3")),
            ("internlm2", TestModel { tied: false, ..of("internlm2") }),
            ("ernie4_5", of("ernie4_5")),
            ("exaone", TestModel { rope_freqs: true, ..of("exaone") }),
            ("seed_oss", TestModel { biases: true, head_dim: 32, ..of("seed_oss") }),
        ]
    }
}

impl TestModel {
    /// Mixtures of experts of every family that has them.
    pub fn mixtures() -> Vec<(&'static str, TestModel)> {
        let of = |arch, experts| TestModel {
            arch,
            experts: Some(experts),
            blocks: vec![(4, 2, 96); 4],
            ..TestModel::default()
        };
        let scales = vec![
            ("logit_scale", Value::F32(3.0)),
            ("residual_scale", Value::F32(0.4)),
            ("embedding_scale", Value::F32(6.0)),
            ("attention.scale", Value::F32(0.1)),
        ];
        vec![
            ("mixtral", TestModel { tied: false, ..of("llama", [8, 2, 0]) }),
            ("qwen3moe", of("qwen3moe", [12, 3, 0])),
            ("olmoe", TestModel { tied: false, blocks: vec![(4, 4, 96); 4], ..of("olmoe", [8, 3, 0]) }),
            ("qwen2moe", TestModel { tied: false, biases: true, ..of("qwen2moe", [10, 2, 64]) }),
            ("granitemoe", TestModel { extra: scales.clone(), ..of("granitemoe", [8, 2, 0]) }),
            (
                "granitemoe, shared, a switch that is not read",
                TestModel {
                    extra: [scales, vec![("rope.scaling.finetuned", Value::Bool(false))]].concat(),
                    ..of("granitemoe", [8, 2, 64])
                },
            ),
        ]
    }
}

impl Default for TestModel {
    fn default() -> TestModel {
        TestModel {
            arch: "llama",
            n_embd: 64,
            head_dim: 16,
            blocks: vec![(4, 2, 96); 3],
            n_vocab: 288,
            n_ctx_train: 256,
            biases: false,
            tied: true,
            rope_freqs: false,
            fused_qkv: false,
            n_rot: None,
            parallel: false,
            experts: None,
            extra: Vec::new(),
            ty: Type::F32,
            seed: 1,
        }
    }
}

/// Small, fast, seeded generator (SplitMix64) of numbers in [-1, 1).
pub struct Rng(pub u64);

impl Rng {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn vec(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.uniform() * scale).collect()
    }
}

impl TestModel {
    /// Traits of its family; libllama checks whether they are right.
    fn traits(&self) -> &'static Traits {
        Family::from_name(self.arch).unwrap_or(Family::Llama).traits()
    }

    /// Metadata as a converter writes it.
    pub fn metadata(&self) -> Vec<(String, Value)> {
        let per_block = |f: fn(&(usize, usize, usize)) -> usize| {
            let v: Vec<u32> = self.blocks.iter().map(|b| f(b) as u32).collect();
            if v.iter().all(|n| *n == v[0]) { Value::U32(v[0]) } else { Value::u32_array(&v) }
        };
        let arch = |s: &str| format!("{}.{s}", self.arch);
        let u32 = |n: usize| Value::U32(n as u32);
        let mut m = vec![
            ("general.architecture".into(), Value::Str(self.arch.into())),
            ("general.name".into(), Value::Str("Small Random".into())),
            ("general.alignment".into(), Value::U32(32)),
            (arch("block_count"), u32(self.blocks.len())),
            (arch("context_length"), u32(self.n_ctx_train)),
            (arch("embedding_length"), u32(self.n_embd)),
            (arch("feed_forward_length"), per_block(|b| b.2)),
            (arch("attention.head_count"), per_block(|b| b.0)),
            (arch("attention.head_count_kv"), per_block(|b| b.1)),
            (
                arch(match self.traits().norm {
                    Norm::Rms => "attention.layer_norm_rms_epsilon",
                    Norm::Layer | Norm::LayerWithBias => "attention.layer_norm_epsilon",
                }),
                Value::F32(1e-5),
            ),
            (arch("attention.key_length"), u32(self.head_dim)),
            (arch("attention.value_length"), u32(self.head_dim)),
            (arch("rope.dimension_count"), u32(self.n_rot.unwrap_or(self.head_dim))),
            (arch("rope.freq_base"), Value::F32(10000.0)),
        ];
        if let Some([n, n_used, n_shared]) = self.experts {
            m.push((arch("expert_count"), u32(n)));
            m.push((arch("expert_used_count"), u32(n_used)));
            if self.traits().experts.is_some_and(|e| e.own_width) {
                m.push((arch("expert_feed_forward_length"), u32(self.blocks[0].2)));
            }
            if n_shared > 0 {
                m.push((arch("expert_shared_feed_forward_length"), u32(n_shared)));
            }
        }
        m.extend(self.extra.iter().map(|(k, v)| (arch(k), v.clone())));
        m.extend(self.tokenizer());
        m
    }

    /// Byte-level SentencePiece vocabulary: three special tokens, 256 bytes, then filler.
    pub fn tokenizer(&self) -> Vec<(String, Value)> {
        let mut tokens = vec!["<unk>".to_string(), "<s>".into(), "</s>".into()];
        tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        tokens.extend((tokens.len()..self.n_vocab).map(|i| format!("▁w{i}")));
        let types: Vec<i32> = (0..self.n_vocab)
            .map(|i| match i {
                0 => 2,
                1 | 2 => 3,
                3..259 => 6,
                _ => 1,
            })
            .collect();
        let scores: Vec<f32> = (0..self.n_vocab).map(|i| -(i as f32)).collect();
        // GGUF type 6 is float32.
        let scores = Value::Array { ty: 6, bytes: bytemuck::cast_slice(&scores).to_vec(), len: self.n_vocab };
        let key = |s: &str| format!("tokenizer.ggml.{s}");
        vec![
            (key("model"), Value::Str("llama".into())),
            (key("tokens"), Value::StrArray(tokens.into_iter().map(String::into_bytes).collect())),
            (key("scores"), scores),
            (key("token_type"), Value::i32_array(&types)),
            (key("bos_token_id"), Value::U32(1)),
            (key("eos_token_id"), Value::U32(2)),
            (key("unknown_token_id"), Value::U32(0)),
        ]
    }

    /// Names, types, sizes (`ne` order) and values of all tensors.
    pub fn tensors(&self) -> Vec<(String, Type, Vec<usize>, Vec<f32>)> {
        let mut rng = Rng(self.seed);
        let with_values = |(name, ty, ne, norm): (String, Type, Vec<usize>, bool)| {
            let n = ne.iter().product();
            let values = if norm {
                rng.vec(n, 0.3).iter().map(|v| v + 1.0).collect()
            } else if ne.len() == 1 {
                rng.vec(n, 0.2)
            } else {
                rng.vec(n, 1.5 / (ne[0] as f32).sqrt())
            };
            (name, ty, ne, values)
        };
        self.layout().into_iter().map(with_values).collect()
    }

    /// Names, types and sizes (`ne` order) of all tensors, and whether they are norm weights.
    pub fn layout(&self) -> Vec<(String, Type, Vec<usize>, bool)> {
        let mut out = Vec::new();
        let d = self.n_embd;
        let mut add = |name: String, ne: &[usize], norm: bool| {
            let ty = if ne.len() == 1 || !ne[0].is_multiple_of(self.ty.block_size()) {
                Type::F32
            } else {
                self.ty
            };
            out.push((name, ty, ne.to_vec(), norm));
        };
        let t = self.traits();
        let more_biases = self.biases && t.output_biases;
        let with_bias = t.norm == Norm::LayerWithBias;
        let n_rot = self.n_rot.unwrap_or(self.head_dim);
        add("token_embd.weight".into(), &[d, self.n_vocab], false);
        if t.positions == Positions::Learned {
            add("position_embd.weight".into(), &[d, self.n_ctx_train], false);
        }
        add("output_norm.weight".into(), &[d], true);
        if with_bias {
            add("output_norm.bias".into(), &[d], false);
        }
        if !self.tied {
            add("output.weight".into(), &[d, self.n_vocab], false);
        }
        if self.rope_freqs {
            let long = ["rope_factors_long", "rope_factors_short"];
            let names = if t.rope_factors == RopeFactors::Long { &long[..] } else { &["rope_freqs"] };
            names.iter().for_each(|name| add(format!("{name}.weight"), &[n_rot / 2], true));
        }
        for (i, &(heads, kv, ff)) in self.blocks.iter().enumerate() {
            let (q, kv) = (heads * self.head_dim, kv * self.head_dim);
            let mut blk = |role: &str, ne: &[usize], norm: bool| add(format!("blk.{i}.{role}"), ne, norm);
            let attn_norms = match t.parallel {
                _ if !t.pre_norms || kv == 0 => &[][..],
                Parallel::Always if self.parallel => &["attn_norm", "attn_norm_2"],
                _ => &["attn_norm"],
            };
            let shared =
                t.parallel == Parallel::Always || (t.parallel == Parallel::WithoutNorm && self.parallel);
            let ffn_norm = (t.pre_norms && !shared).then_some(t.ffn_norm);
            let stream_norm = |blk: &mut dyn FnMut(&str, &[usize], bool), name: &str| {
                blk(&format!("{name}.weight"), &[d], true);
                if with_bias {
                    blk(&format!("{name}.bias"), &[d], false);
                }
            };
            attn_norms.iter().for_each(|name| stream_norm(&mut blk, name));
            if kv > 0 {
                let parts = [("attn_q", q), ("attn_k", kv), ("attn_v", kv)];
                let fused = [("attn_qkv", q + 2 * kv)];
                for (name, n) in if self.fused_qkv { &fused[..] } else { &parts[..] } {
                    blk(&format!("{name}.weight"), &[d, *n], false);
                    if self.biases {
                        blk(&format!("{name}.bias"), &[*n], false);
                    }
                }
                if let Some(kind) = t.qk_norm {
                    let widths = if kind == QkNorm::Whole { [q, kv] } else { [self.head_dim; 2] };
                    blk("attn_q_norm.weight", &widths[..1], true);
                    blk("attn_k_norm.weight", &widths[1..], true);
                }
                if t.post_norms {
                    blk("post_attention_norm.weight", &[d], true);
                }
                blk("attn_output.weight", &[q, d], false);
                if more_biases {
                    blk("attn_output.bias", &[d], false);
                }
            }
            ffn_norm.iter().for_each(|name| stream_norm(&mut blk, name));
            if t.post_norms {
                blk("post_ffw_norm.weight", &[d], true);
            }
            if let Some([n, _, n_shared]) = self.experts {
                blk("ffn_gate_inp.weight", &[d, n], false);
                for (name, ne) in [("gate", [d, ff]), ("up", [d, ff]), ("down", [ff, d])] {
                    blk(&format!("ffn_{name}_exps.weight"), &[ne[0], ne[1], n], false);
                }
                if n_shared > 0 {
                    for (name, ne) in
                        [("gate", [d, n_shared]), ("up", [d, n_shared]), ("down", [n_shared, d])]
                    {
                        blk(&format!("ffn_{name}_shexp.weight"), &ne, false);
                    }
                    if t.experts.is_some_and(|e| e.shared == SharedExpert::Gated) {
                        blk("ffn_gate_inp_shexp.weight", &[d], false);
                    }
                }
                continue;
            }
            let up = if t.fused_gate_up { 2 * ff } else { ff };
            let gate = (t.activation.gated() && !t.fused_gate_up).then_some(("ffn_gate", [d, ff]));
            for (name, ne) in gate.into_iter().chain([("ffn_up", [d, up]), ("ffn_down", [ff, d])]) {
                blk(&format!("{name}.weight"), &ne, false);
                if more_biases {
                    blk(&format!("{name}.bias"), &ne[1..], false);
                }
            }
        }
        out
    }

    /// Writes the model to `path`.
    pub fn write(&self, path: &Path) {
        let tensors: Vec<OutTensor> = self
            .tensors()
            .into_iter()
            .map(|(name, ty, ne, values)| {
                let bytes = ty.quantize(&values, ne[0], None).unwrap();
                OutTensor { name, ty, ne, data: TensorData::made(move || Ok(Cow::Owned(bytes.clone()))) }
            })
            .collect();
        let mut file = std::fs::File::create(path).unwrap();
        write_gguf(&mut file, path, &self.metadata(), &tensors).unwrap();
    }
}
