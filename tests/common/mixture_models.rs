//! Small random mixtures of experts, one for each architecture of libllama that has experts.
//!
//! [`MODELS`] describes them. A model has 64 channels, 4 heads of 16 numbers, and 8 experts of which 2 are
//! used, unless its own text says otherwise.

use super::test_model::{Rng, TestModel};
use putri_gguf::ggml::Type;
use putri_gguf::gguf::{OutTensor, TensorData, Value, write_gguf};
use std::borrow::Cow;
use std::path::Path;

/// Small random mixture of experts of any architecture, as a list of keys and tensors.
#[derive(Clone)]
pub struct MixtureModel {
    /// Architecture, and what is special about the variant: `glm4moe, MTP`.
    pub name: &'static str,
    pub arch: &'static str,
    pub keys: Vec<(String, Value)>,
    /// Name, type, sizes (`ne` order) and kind of values.
    pub tensors: Vec<(String, Type, Vec<usize>, Init)>,
    pub seed: u64,
}

/// Kind of the values of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Near 1: weights of norms, and scales.
    Norm,
    Matrix,
    /// Token embeddings that are the head as well: small, or every token would predict itself.
    TiedEmbedding,
    Bias,
    /// Negative: decay rates of recurrent layers.
    Decay,
    /// Distinct ids of experts in each row.
    Ids,
}

const N_VOCAB: usize = 288;
const N_EXPERT: usize = 8;

/// Names of groups of words in [`MODELS`]: name, then words. A line that begins with spaces continues the
/// one before.
const WORDS: &str = "
BASE context_length=256 embedding_length=64 feed_forward_length=96 attention.head_count=4
    attention.head_count_kv=2 attention.key_length=16 attention.value_length=16 rope.dimension_count=16
    rope.freq_base=10000.0 attention.layer_norm_rms_epsilon=0.00001 expert_count=8 expert_used_count=2
# Widths of the experts, of the FFN, and of the shared expert.
E64 expert_feed_forward_length=64
F64 feed_forward_length=64
S32 expert_shared_feed_forward_length=32
LEAD leading_dense_block_count=1
MTP nextn_predict_layers=1
# Router with sigmoids, whose chosen weights are normalised and scaled.
SIGMOID expert_gating_func=2 expert_weights_norm=true expert_weights_scale=1.5
GROUPS expert_group_count=2 expert_group_used_count=1
WINDOW attention.sliding_window=24
EVERY2 WINDOW attention.sliding_window_pattern=2
SECTIONS rope.dimension_sections=[4,2,2,0]
GRANITE logit_scale=0.5 residual_scale=0.7 embedding_scale=2.0 attention.scale=0.1
LAYER_NORM attention.layer_norm_epsilon=0.00001
# Tensors outside of the blocks.
TIED token_embd:64,288 output_norm:64
UNTIED TIED output:64,288
# Attention.
ATTN attn_norm:64 attn_q:64,64 attn_k:64,32 attn_v:64,32 attn_output:64,64
MHA attn_norm:64 attn_q:64,64 attn_k:64,64 attn_v:64,64 attn_output:64,64
FUSED_ATTN attn_norm:64 attn_qkv:64,128 attn_output:64,64
QKV_BIAS attn_q.bias:64 attn_k.bias:32 attn_v.bias:32
QK_NORM attn_q_norm:16 attn_k_norm:16
PLAIN ATTN ffn_norm:64
NORMED ATTN QK_NORM ffn_norm:64
# Of the FFN.
PROBS exp_probs_b.bias:8
SCALES ffn_gate_exps.scale:8 ffn_up_exps.scale:8 ffn_down_exps.scale:8
INPUT_SCALES ffn_gate_exps.input_scale:8 ffn_up_exps.input_scale:8 ffn_down_exps.input_scale:8
NEXTN nextn.eh_proj:128,64 nextn.enorm:64 nextn.hnorm:64 nextn.shared_head_norm:64
# Latent attention in its absorbed form.
MLA attention.head_count_kv=1 attention.key_length=48 attention.value_length=32 attention.key_length_mla=32
    attention.value_length_mla=16 attention.kv_lora_rank=32 attention.q_lora_rank=32
Q_LORA attn_q_a:64,32 attn_q_a_norm:32 attn_q_b:32,128
KV_LORA attn_kv_a_mqa:64,48 attn_kv_a_norm:32 attn_k_b:16,32,4 attn_v_b:32,16,4 attn_output:64,64
LATENT attn_norm:64 Q_LORA KV_LORA ffn_norm:64
OLD_MLA attention.key_length=32 attention.kv_lora_rank=32 attention.q_lora_rank=0
OLD_LATENT attn_norm:64 attn_q:64,128 attn_kv_a_mqa:64,48 attn_kv_a_norm:32 attn_kv_b:32,128
    attn_output:64,64 ffn_norm:64
INDEXER attention.indexer.head_count=2 attention.indexer.key_length=64 attention.indexer.top_k=8
INDEX indexer.k_norm:64 indexer.k_norm.bias:64 indexer.proj:64,2 indexer.attn_k:64,64
    indexer.attn_q_b:32,128
INDEX_QK indexer.q_proj:64,128 indexer.k_proj:64,64 indexer.q_norm:64 indexer.k_norm:64
# Gated delta nets.
DELTA ssm.conv_kernel=4 ssm.inner_size=64 ssm.state_size=16 ssm.time_step_rank=4 ssm.group_count=2
    full_attention_interval=2
NET attn_qkv:64,128 attn_gate:64,64 ssm_conv1d:4,128 ssm_dt.bias:4 ssm_a!:4 ssm_norm:16 ssm_out:64,64
AROUND attn_norm:64 post_attention_norm:64
RATES ssm_alpha:64,4 ssm_beta:64,4
GATED attn_q:64,128 attn_k:64,32 attn_v:64,32 attn_output:64,64 QK_NORM
GATED_SHARED ffn_gate_inp_shexp:64 shared32
KDA_KEYS ssm.conv_kernel=4 kda.head_dim=16
KDA MHA ffn_norm:64 ssm_conv1d_q:4,1,64 ssm_conv1d_k:4,1,64 ssm_conv1d_v:4,1,64 ssm_beta:64,4 ssm_dt.bias:64
    ssm_norm:16
LOW_RANK ssm_f_a:64,16 ssm_f_b:16,64
# Mamba 1 and 2.
MAMBA_KEYS ssm.conv_kernel=4 ssm.inner_size=128 ssm.state_size=16
MAMBA attn_norm:64 ssm_in:64,256 ssm_conv1d:4,128 ssm_conv1d.bias:128 ssm_x:128,36 ssm_dt_norm:4
    ssm_dt:4,128 ssm_dt.bias:128 ssm_b_norm:16 ssm_c_norm:16 ssm_a!:16,128 ssm_d!:128 ssm_out:128,64
    ffn_norm:64
MAMBA2_KEYS MAMBA_KEYS ssm.time_step_rank=8 ssm.group_count=2
MAMBA2 attn_norm:64 ssm_in:64,328 ssm_conv1d:4,192 ssm_conv1d.bias:192 ssm_dt.bias:8 ssm_a!:1,8 ssm_d!:1,8
    ssm_norm:64,2 ssm_out:128,64
NEMOTRON MAMBA2_KEYS SIGMOID LAYER_NORM expert_shared_feed_forward_length=64 expert_shared_count=1
RELU_ROUTER attn_norm:64 ffn_gate_inp:64,8 PROBS ffn_up_shexp:64,64 ffn_down_shexp:64,64
RELU64 ffn_up_exps:64,64,8 ffn_down_exps:64,64,8
RELU32 ffn_up_exps:64,32,8 ffn_down_exps:32,64,8
RELU_LATENT ffn_latent_down:64,32 ffn_latent_up:32,64 ffn_up_exps:32,64,8 ffn_down_exps:64,32,8
CONV attn_norm:64 shortconv.conv:3,64 shortconv.in_proj:64,192 shortconv.out_proj:64,64 ffn_norm:64
# Several residual streams.
HYPER hyper_connection.count=4 hyper_connection.epsilon=0.000001
SINKHORN HYPER hyper_connection.sinkhorn_iterations=3
MIX hc_attn_fn:256,24 hc_attn_base:24 hc_attn_scale:3 hc_ffn_fn:256,24 hc_ffn_base:24 hc_ffn_scale:3
MIX_HEAD output_hc_fn:256,4 output_hc_base:4 output_hc_scale:1
MIX_LOW hc_attn_norm:64,4 hc_attn_down:256,8 hc_attn_up:8,256 hc_attn_inject:256,4 hc_ffn_norm:64,4
    hc_ffn_down:256,8 hc_ffn_up:8,256 hc_ffn_inject:256,4
# Parts of single architectures.
OSS ATTN QKV_BIAS attn_output.bias:64 attn_sinks:4 post_attention_norm:64 experts64 ffn_gate_inp.bias:8
    ffn_gate_exps.bias:64,8 ffn_up_exps.bias:64,8 ffn_down_exps.bias:64,8
GEMMA E64 WINDOW attention.sliding_window_pattern=[true,true,false] attention.key_length=32
    attention.value_length=32 attention.key_length_swa=16 attention.value_length_swa=16
    rope.dimension_count=32 rope.dimension_count_swa=16 rope.freq_base_swa=5000.0
    embedding_length_per_layer_input=0 final_logit_softcapping=8.0
NEAR ATTN QK_NORM post_attention_norm:64 ffn_norm:64 dense96 post_ffw_norm:64 layer_output_scale:1
FAR attn_norm:64 attn_q:64,128 attn_k:64,64 attn_output:128,64 attn_q_norm:32 attn_k_norm:32
    post_attention_norm:64 ffn_norm:64 dense96 post_ffw_norm:64 layer_output_scale:1
BESIDE ffn_gate_inp.scale:64 pre_ffw_norm_2:64 post_ffw_norm_1:64 post_ffw_norm_2:64 ffn_down_exps.scale:8
DOTS3_KEYS expert_shared_count=1 attention.kv_lora_rank_swa=32 attention.key_length_mla_swa=32
    attention.value_length_mla_swa=16 attention.key_length_swa=48 attention.value_length_swa=32 WINDOW
    rope.freq_base_swa=5000.0
HY4 LATENT attn_sinks:4 attn_gate:64,64 hc_attn_fn:256,8 hc_attn_base:8 hc_attn_scale:2 hc_ffn_fn:256,8
    hc_ffn_base:8 hc_ffn_scale:2
K3 ffn_gate_inp:64,8 PROBS ffn_gate_exps:32,64,8 ffn_up_exps:32,64,8 ffn_down_exps:64,32,8
    ffn_routed_down:64,32 ffn_routed_up:32,64 ffn_routed_norm:32 shared64
V4_KEYS E64 expert_gating_func=4 expert_weights_norm=true expert_weights_scale=1.5 expert_shared_count=1
    INDEXER SINKHORN WINDOW attention.head_count_kv=1 attention.key_length=32 attention.value_length=32
    attention.q_lora_rank=32 attention.output_group_count=2 attention.output_lora_rank=16
    attention.compress_rope_freq_base=5000.0 hash_layer_count=1 swiglu_clamp_exp=[10.0,10.0,10.0]
V4 attn_norm:64 attn_sinks:4 Q_LORA attn_kv:64,32 attn_kv_a_norm:32 attn_output_a:64,16,2
    attn_output_b:32,64 MIX ffn_norm:64 experts64 shared64
V4_PROBS PROBS exp_probs_b_vl.bias:8
V4_4 attn_compressor_kv:64,64 attn_compressor_gate:64,64 attn_compressor_ape:64,4 attn_compressor_norm:32
    indexer.proj:64,2 indexer.attn_q_b:32,128 indexer_compressor_kv:64,128 indexer_compressor_gate:64,128
    indexer_compressor_ape:128,4 indexer_compressor_norm:64
V4_128 attn_compressor_kv:64,32 attn_compressor_gate:64,32 attn_compressor_ape:32,128
    attn_compressor_norm:32
";

/// The models. The first line of each has its name: the architecture, and the variant behind a comma.
/// The other lines begin with what they hold:
///
/// - `-`: keys (`name=value`), and tensors outside of the blocks.
/// - `3x`: tensors of each of the next three blocks.
/// - `+`: more tensors of the blocks of the line before.
///
/// A tensor is `name:ne0,ne1`; its name gets the ending `.weight` if it has none, and `name!` gets none.
/// `@Q8_0` is the type of the experts, if not F32. `dense96` is an FFN of 96 neurons, `experts64` a router
/// with experts of 64 neurons, `fused64` the same with gate and up in one tensor, `shared32` a shared expert.
/// Other words stand in [`WORDS`].
const MODELS: &str = "
qwen3moe
    - E64 TIED
    3x NORMED experts64
qwen3moe, arrays
    - expert_feed_forward_length=[64,64,64] expert_used_count=[2,2,2] UNTIED
    3x NORMED experts64
qwen3moe, width not given
    - feed_forward_length=128 UNTIED
    2x NORMED experts64
qwen3moe, scales
    - E64 UNTIED
    2x NORMED experts64 SCALES INPUT_SCALES
qwen3moe, Q8_0
    - E64 expert_used_count=3 UNTIED @Q8_0
    3x NORMED experts64
qwen3vlmoe
    - E64 SECTIONS n_deepstack_layers=2 UNTIED
    3x NORMED experts64
qwen2moe
    - expert_feed_forward_length=32 S32 UNTIED
    3x PLAIN QKV_BIAS experts32 GATED_SHARED
qwen3next
    - E64 S32 DELTA UNTIED
    1x AROUND NET ssm_ba:64,8 experts64 GATED_SHARED
    1x AROUND GATED experts64 GATED_SHARED
    1x AROUND NET ssm_ba:64,8 experts64 GATED_SHARED
qwen3next, fused, MTP
    - E64 S32 DELTA MTP UNTIED
    1x AROUND NET ssm_ba:64,8 fused64 GATED_SHARED
    1x AROUND GATED fused64 GATED_SHARED
    1x AROUND GATED fused64 GATED_SHARED NEXTN
qwen35moe
    - E64 S32 DELTA SECTIONS UNTIED
    1x AROUND NET RATES experts64 GATED_SHARED
    1x AROUND GATED experts64 GATED_SHARED
    1x AROUND NET RATES experts64 GATED_SHARED
qwen35moe, fused
    - E64 S32 DELTA SECTIONS TIED
    1x AROUND NET RATES fused64 GATED_SHARED
    1x AROUND GATED fused64 GATED_SHARED
qwen35moe, MTP
    - E64 S32 DELTA SECTIONS MTP UNTIED
    1x AROUND NET RATES experts64 GATED_SHARED
    1x AROUND GATED experts64 GATED_SHARED
    1x AROUND GATED experts64 GATED_SHARED NEXTN
qwen4exp
    - E64 S32 DELTA SECTIONS HYPER INDEXER hyper_connection.low_rank=8
    - token_embd:64,288 output:64,288 output_hc_norm:64,4 output_hc_down:256,8 output_hc_up:8,256
    1x NET RATES MIX_LOW experts64 GATED_SHARED
    1x GATED INDEX_QK MIX_LOW experts64 GATED_SHARED
    1x NET RATES MIX_LOW experts64 GATED_SHARED
qwen4exp, fused, MTP
    - E64 S32 DELTA SECTIONS HYPER INDEXER hyper_connection.low_rank=8 MTP
    - token_embd:64,288 output:64,288 output_hc_norm:64,4 output_hc_down:256,8 output_hc_up:8,256
    1x NET RATES MIX_LOW fused64 GATED_SHARED
    1x GATED INDEX_QK MIX_LOW fused64 GATED_SHARED
    1x GATED INDEX_QK MIX_LOW fused64 GATED_SHARED nextn.eh_proj:128,64 nextn.enorm:64 nextn.hnorm:64,4
    +  nextn.hc_head_norm:64,4 nextn.hc_head_down:256,8 nextn.hc_head_up:8,256
llama
    - F64 UNTIED
    3x PLAIN experts64
llama, scales, Q8_0
    - F64 expert_used_count=3 UNTIED @Q8_0
    2x PLAIN experts64 SCALES
mistral3
    - F64 UNTIED
    3x PLAIN experts64
granite
    - F64 GRANITE TIED
    3x PLAIN experts64
minicpm
    - F64 logit_scale=0.5 embedding_scale=2.0 residual_scale=0.7 TIED
    3x PLAIN experts64
granitemoe
    - F64 GRANITE TIED
    3x PLAIN experts64
granitemoe, shared
    - F64 GRANITE S32 TIED
    3x PLAIN experts64 shared32
granite_swa
    - F64 GRANITE S32 WINDOW attention.sliding_window_pattern=[true,false,true] TIED
    3x PLAIN attn_sinks:4 experts64 ffn_up_shexp:64,64 ffn_down_shexp:32,64
granite_swa, fused
    - F64 GRANITE S32 WINDOW attention.sliding_window_pattern=[true,false,true] TIED
    3x PLAIN attn_sinks:4 fused64 ffn_up_shexp:64,64 ffn_down_shexp:32,64
granitehybrid
    - F64 GRANITE MAMBA2_KEYS attention.head_count_kv=[0,2,0] TIED
    1x MAMBA2 ffn_norm:64 experts64
    1x PLAIN experts64
    1x MAMBA2 ffn_norm:64 experts64
granitehybrid, shared
    - F64 GRANITE S32 MAMBA2_KEYS attention.head_count_kv=[0,2,0] TIED
    1x MAMBA2 ffn_norm:64 experts64 shared32
    1x PLAIN experts64 shared32
    1x MAMBA2 ffn_norm:64 experts64 shared32
olmoe
    - F64 attention.head_count_kv=4 UNTIED
    3x MHA attn_q_norm:64 attn_k_norm:64 ffn_norm:64 experts64
phimoe
    - F64 UNTIED output_norm.bias:64 output.bias:288
    3x PLAIN QKV_BIAS attn_norm.bias:64 attn_output.bias:64 ffn_norm.bias:64 experts64
dbrx
    - F64 LAYER_NORM attention.clamp_kqv=8.0 UNTIED
    3x FUSED_ATTN attn_output_norm:64 experts64
grok
    - F64 embedding_scale=8.0 TIED
    3x PLAIN attn_output_norm:64 layer_output_norm:64 experts64
grok, dense in parallel
    - E64 UNTIED
    3x PLAIN attn_output_norm:64 post_ffw_norm:64 experts64 dense96
arctic
    - F64 UNTIED
    3x PLAIN dense64 ffn_norm_exps:64 experts64
jamba
    - F64 MAMBA_KEYS ssm.time_step_rank=4 attention.head_count_kv=[0,2,0] TIED
    1x MAMBA dense64
    1x PLAIN experts64
    1x MAMBA experts64
llama4
    - E64 interleave_moe_layer_step=2 UNTIED
    1x PLAIN dense96
    1x PLAIN experts64 shared64
    1x PLAIN dense96
    1x PLAIN experts64 shared64
gpt-oss
    - E64 WINDOW UNTIED
    4x OSS
gpt-oss, MXFP4
    - E64 WINDOW expert_used_count=3 UNTIED @MXFP4
    2x OSS
gemma4
    - GEMMA TIED rope_freqs:16
    2x NEAR fused64 BESIDE
    1x FAR fused64 BESIDE
gemma4, apart
    - GEMMA TIED rope_freqs:16
    1x NEAR
    1x NEAR experts64 BESIDE
    1x FAR experts64 BESIDE
deepseek
    - E64 LEAD expert_shared_count=2 expert_weights_scale=1.5 UNTIED
    1x PLAIN dense96
    2x PLAIN experts64 shared128
deepseek2, lite
    - expert_feed_forward_length=32 LEAD OLD_MLA attention.head_count_kv=4 expert_shared_count=2 UNTIED
    1x OLD_LATENT dense96
    2x OLD_LATENT experts32 shared64
deepseek2
    - E64 LEAD MLA SIGMOID GROUPS expert_shared_count=1 UNTIED
    1x LATENT dense96
    2x LATENT experts64 PROBS shared64
deepseek2, fused, MTP
    - E64 LEAD MLA SIGMOID expert_shared_count=1 MTP UNTIED
    1x LATENT dense96
    1x LATENT fused64 shared64
    1x LATENT fused64 shared64 NEXTN
deepseek2-ocr
    - E64 LEAD attention.head_count_kv=4 expert_shared_count=2 UNTIED
    1x MHA ffn_norm:64 dense96
    1x MHA ffn_norm:64 experts64 shared128
    1x MHA ffn_norm:64 fused64 shared128
deepseek32
    - E64 LEAD MLA SIGMOID GROUPS INDEXER expert_shared_count=1 UNTIED
    1x LATENT INDEX dense96
    2x LATENT INDEX experts64 PROBS shared64
deepseek32, MTP
    - E64 LEAD MLA SIGMOID GROUPS INDEXER expert_shared_count=1 MTP UNTIED
    1x LATENT INDEX dense96
    1x LATENT INDEX experts64 PROBS shared64
    1x LATENT INDEX experts64 PROBS shared64 NEXTN
deepseek4
    - V4_KEYS attention.compress_ratios=[0,4,128] UNTIED MIX_HEAD
    1x V4 ffn_gate_tid2eid:2,288
    1x V4 V4_PROBS V4_4
    1x V4 V4_PROBS V4_128
deepseek4, MTP
    - V4_KEYS attention.compress_ratios=[0,4,0] MTP UNTIED MIX_HEAD
    1x V4 ffn_gate_tid2eid:2,288
    1x V4 V4_PROBS V4_4
    1x V4 V4_PROBS NEXTN
mistral4
    - E64 LEAD MLA expert_weights_norm=true expert_shared_count=1 UNTIED
    1x LATENT dense96
    2x LATENT experts64 PROBS shared64
glm4moe
    - E64 LEAD SIGMOID expert_shared_count=1 rope.dimension_count=8 UNTIED
    1x ATTN QKV_BIAS QK_NORM post_attention_norm:64 dense96
    2x ATTN QKV_BIAS QK_NORM post_attention_norm:64 experts64 PROBS shared64
glm4moe, MTP
    - E64 LEAD SIGMOID expert_shared_count=1 rope.dimension_count=8 MTP UNTIED
    1x ATTN QKV_BIAS post_attention_norm:64 dense96
    1x ATTN QKV_BIAS post_attention_norm:64 experts64 PROBS shared64
    1x ATTN QKV_BIAS post_attention_norm:64 experts64 PROBS shared64 NEXTN
glm-dsa
    - E64 LEAD MLA SIGMOID GROUPS INDEXER expert_shared_count=1 UNTIED
    1x LATENT INDEX dense96
    2x LATENT INDEX experts64 PROBS shared64
glm-dsa, MTP
    - E64 LEAD MLA SIGMOID INDEXER expert_shared_count=1 MTP UNTIED
    1x LATENT INDEX dense96
    1x LATENT INDEX experts64 PROBS shared64
    1x LATENT INDEX experts64 PROBS shared64 NEXTN
glm5-next
    - LEAD MLA SIGMOID KDA_KEYS INDEXER SINKHORN expert_feed_forward_length=[0,64,32] expert_shared_count=1
    - attention.key_length=32 attention.key_length_mla=16 attention.head_count_kv=[0,1,0]
    - rope.dimension_count=0 kda.gate_lower_bound=-5.0 attention.indexer.kpool=2 UNTIED
    1x KDA LOW_RANK ssm_g_a:64,16 ssm_g_b:16,64 ssm_a!:4 MIX dense96
    1x attn_norm:64 attn_q_a:64,32 attn_q_a_norm:32 attn_q_b:32,64 attn_kv_a_mqa:64,32 attn_kv_a_norm:32
    +  attn_k_b:16,32,4 attn_v_b:32,16,4 attn_output:64,64 ffn_norm:64 MIX INDEX
    +  indexer_compressor_gate:64,64 indexer_compressor_ape:64,2 experts64 PROBS shared64
    1x KDA LOW_RANK ssm_g_a:64,16 ssm_g_b:16,64 ssm_a!:4 MIX experts32 PROBS shared32
lfm2moe
    - E64 LEAD shortconv.l_cache=3 attention.head_count_kv=[0,2,0,2] expert_gating_func=2
    - token_embd:64,288 token_embd_norm:64
    1x CONV dense96
    1x NORMED experts64 PROBS
    1x CONV experts64 PROBS
    1x NORMED experts64 PROBS
nemotron_h_moe
    - E64 NEMOTRON feed_forward_length=[0,64,0,64] attention.head_count_kv=[0,0,2,0] UNTIED
    1x MAMBA2
    1x RELU_ROUTER RELU64
    1x ATTN
    1x RELU_ROUTER RELU64
nemotron_h_moe, uneven
    - NEMOTRON feed_forward_length=[0,64,0,64] attention.head_count_kv=[0,0,2,0]
    - expert_feed_forward_length=[0,64,0,32] expert_used_count=[0,2,0,3] UNTIED
    1x MAMBA2
    1x RELU_ROUTER RELU64
    1x ATTN
    1x RELU_ROUTER RELU32
nemotron_h_moe, latent
    - E64 NEMOTRON moe_latent_size=32 feed_forward_length=[0,64,0,64] attention.head_count_kv=[0,0,2,0]
    - UNTIED
    1x MAMBA2
    1x RELU_ROUTER RELU_LATENT
    1x ATTN
    1x RELU_ROUTER RELU_LATENT
nemotron_h_moe, MTP
    - E64 NEMOTRON feed_forward_length=[0,64,0,0] attention.head_count_kv=[0,0,2,2] MTP UNTIED
    1x MAMBA2
    1x RELU_ROUTER RELU64
    1x ATTN
    1x RELU_ROUTER RELU64 attn_q:64,64 attn_k:64,32 attn_v:64,32 attn_output:64,64 post_attention_norm:64
    +  NEXTN
minimax-01
    - F64 residual_scale=1.0 full_attention_interval=2 UNTIED
    1x attn_norm:64 attn_norm_2:64 attn_qkv:64,192 attn_gate:64,64 attn_output:64,64 ffn_norm:64 experts64
    1x PLAIN experts64
    1x attn_norm:64 attn_norm_2:64 attn_qkv:64,192 attn_gate:64,64 attn_output:64,64 ffn_norm:64 experts64
    1x PLAIN experts64
minimax-m2
    - E64 F64 expert_gating_func=2 UNTIED
    3x PLAIN attn_q_norm:64 attn_k_norm:32 experts64 PROBS
minimax-m3
    - E64 LEAD SIGMOID INDEXER attention.indexer.block_size=4 attention.indexer.local_blocks=1
    - expert_shared_count=1 UNTIED
    1x NORMED dense96
    2x NORMED INDEX_QK experts64 PROBS shared64
bailingmoe
    - E64 expert_shared_count=1 expert_weights_norm=true UNTIED
    3x PLAIN experts64 shared64
bailingmoe2
    - E64 LEAD SIGMOID GROUPS expert_shared_count=1 UNTIED
    1x FUSED_ATTN QK_NORM ffn_norm:64 dense96
    2x FUSED_ATTN QK_NORM ffn_norm:64 experts64 PROBS shared64
bailingmoe2, MTP
    - E64 LEAD SIGMOID S32 expert_shared_count=2 MTP UNTIED
    1x FUSED_ATTN QK_NORM ffn_norm:64 dense96
    1x FUSED_ATTN QK_NORM ffn_norm:64 experts64 PROBS shared64
    1x FUSED_ATTN QK_NORM ffn_norm:64 experts64 PROBS shared64 NEXTN layer_output_norm:64
bailingmoe3
    - E64 S32 LEAD MLA SIGMOID GROUPS KDA_KEYS kda.gate_lower_bound=-5.0 expert_shared_count=1
    - attention.head_count_kv=[0,1,0] UNTIED
    1x KDA ssm_f_a:64,64 ssm_g_a:64,64 ssm_a!:1,4 dense96
    1x LATENT attn_gate:64,4 experts64 PROBS shared32
    1x KDA ssm_f_a:64,64 ssm_g_a:64,64 ssm_a!:1,4 experts64 PROBS shared32
bailingmoe3, MTP
    - E64 LEAD MLA SIGMOID GROUPS KDA_KEYS kda.gate_lower_bound=-5.0 expert_shared_count=1
    - attention.head_count_kv=[0,1,1] MTP UNTIED
    1x KDA ssm_f_a:64,64 ssm_g_a:64,64 ssm_a!:1,4 dense96
    1x LATENT attn_gate:64,4 experts64 PROBS shared64
    1x LATENT attn_gate:64,4 experts64 PROBS shared64 nextn.eh_proj:128,64 nextn.enorm:64 nextn.hnorm:64
    +  layer_output_norm:64
ernie4_5-moe
    - E64 S32 LEAD interleave_moe_layer_step=1 TIED
    1x PLAIN dense96
    2x PLAIN experts64 PROBS shared32
hunyuan-moe
    - E64 F64 S32 TIED
    3x NORMED experts64 shared32
hunyuan-moe, width of the shared expert not given
    - E64 F64 TIED
    2x NORMED experts64 shared64
hy_v3
    - E64 S32 SIGMOID UNTIED
    1x NORMED dense96
    2x NORMED experts64 exp_probs_b!:8 shared32
hy_v3, fused, MTP
    - E64 SIGMOID MTP TIED
    1x NORMED dense96
    1x NORMED fused64 exp_probs_b!:8 shared64
    1x NORMED fused64 exp_probs_b!:8 shared64 NEXTN
hy_v4
    - E64 LEAD MLA SIGMOID HYPER INDEXER hyper_connection.magnitude=2.0 expert_shared_count=1
    - attention.indexer.types=[true,false,true] UNTIED MIX_HEAD
    1x HY4 INDEX dense96
    1x HY4 experts64 PROBS shared64
    1x HY4 INDEX experts64 PROBS shared64
dots1
    - E64 LEAD SIGMOID attention.head_count_kv=4 expert_shared_count=1 UNTIED
    1x MHA QK_NORM ffn_norm:64 dense96
    2x MHA QK_NORM ffn_norm:64 experts64 PROBS shared64
dots3note
    - E64 LEAD MLA SIGMOID INDEXER DOTS3_KEYS attention.sliding_window_pattern=[true,false,true]
    - attention.indexer.types=[false,true,false] UNTIED
    1x LATENT attn_k_norm:16 attn_gate:64,4 dense96
    1x LATENT attn_k_norm:16 attn_gate:64,4 INDEX experts64 PROBS shared64
    1x LATENT attn_k_norm:16 attn_gate:64,4 experts64 PROBS shared64
dots3note, MTP
    - E64 LEAD MLA SIGMOID INDEXER DOTS3_KEYS attention.sliding_window_pattern=[true,false,true]
    - attention.indexer.types=[false,true,false] MTP UNTIED
    1x LATENT attn_k_norm:16 attn_gate:64,4 dense96
    1x LATENT attn_k_norm:16 attn_gate:64,4 INDEX experts64 PROBS shared64
    1x LATENT attn_k_norm:16 attn_gate:64,4 dense96 NEXTN
exaone-moe
    - E64 S32 LEAD SIGMOID EVERY2 UNTIED
    1x NORMED dense96
    2x NORMED experts64 PROBS shared32
exaone-moe, MTP
    - E64 LEAD SIGMOID EVERY2 MTP UNTIED
    1x NORMED dense96
    1x NORMED experts64 PROBS shared64
    1x NORMED dense96 NEXTN
afmoe
    - E64 LEAD SIGMOID EVERY2 expert_shared_count=1 UNTIED
    1x NORMED post_attention_norm:64 post_ffw_norm:64 attn_gate:64,64 dense96
    2x NORMED post_attention_norm:64 post_ffw_norm:64 attn_gate:64,64 experts64 PROBS shared64
smallthinker
    - E64 EVERY2 expert_gating_func=2 TIED
    3x PLAIN experts64
grovemoe
    - E64 expert_chunk_feed_forward_length=32 expert_group_scale=0.05 experts_per_group=2 TIED
    3x NORMED experts64 ffn_gate_chexps:64,32,4 ffn_up_chexps:64,32,4 ffn_down_chexps:32,64,4
step35
    - E64 S32 SIGMOID WINDOW attention.sliding_window_pattern=[true,false,true]
    - swiglu_clamp_exp=[0.0,7.0,7.0] swiglu_clamp_shexp=[0.0,0.0,7.0] UNTIED
    1x NORMED attn_gate:64,4 dense96
    2x NORMED attn_gate:64,4 experts64 PROBS shared32
step35, MTP
    - E64 S32 SIGMOID WINDOW attention.sliding_window_pattern=[true,false,true,true]
    - nextn_predict_layers=2 UNTIED
    1x NORMED attn_gate:64,4 dense96
    1x NORMED attn_gate:64,4 experts64 PROBS shared32
    1x NORMED attn_gate:64,4 experts64 PROBS shared32 NEXTN
    1x NORMED attn_gate:64,4 dense96 NEXTN
mimo2
    - E64 WINDOW attention.sliding_window_pattern=[true,false,true] UNTIED
    1x PLAIN attn_sinks:4 dense96
    2x PLAIN attn_sinks:4 experts64 PROBS
mimo2, MTP
    - E64 WINDOW attention.sliding_window_pattern=[true,false,true] MTP UNTIED
    2x PLAIN attn_sinks:4 experts64 PROBS
    1x PLAIN attn_sinks:4 experts64 PROBS NEXTN layer_output_norm:64
laguna
    - E64 S32 LEAD SIGMOID EVERY2 UNTIED
    1x NORMED attn_gate:64,4 dense96
    2x NORMED attn_gate:64,4 experts64 PROBS shared32
laguna, width of the shared expert not given
    - E64 LEAD SIGMOID EVERY2 expert_shared_count=1 UNTIED
    1x NORMED attn_gate:64,64 dense96
    1x NORMED attn_gate:64,64 experts64 PROBS shared64
cohere2moe
    - E64 LEAD SIGMOID EVERY2 LAYER_NORM logit_scale=0.5 expert_shared_count=1 TIED
    1x ATTN dense96
    2x ATTN experts64 shared64
cohere2moe, fused, MTP
    - E64 S32 LEAD SIGMOID EVERY2 LAYER_NORM logit_scale=0.5 expert_shared_count=1 MTP TIED
    1x ATTN dense96
    1x ATTN fused64 shared32
    1x ATTN fused64 shared32 NEXTN
kimi-linear
    - E64 LEAD MLA KDA_KEYS expert_gating_func=2 expert_weights_scale=1.5 expert_shared_count=1
    - attention.head_count_kv=[0,1,0] attention.q_lora_rank=0 UNTIED
    1x KDA LOW_RANK ssm_g_a:64,16 ssm_g_b:16,64 ssm_a!:1,4 dense96
    1x attn_norm:64 attn_q:64,128 KV_LORA ffn_norm:64 experts64 PROBS shared64
    1x KDA LOW_RANK ssm_g_a:64,16 ssm_g_b:16,64 ssm_a!:1,4 experts64 PROBS shared64
kimi-k3
    - E64 LEAD MLA SIGMOID KDA_KEYS kda.gate_lower_bound=-5.0 expert_latent_length=32 expert_shared_count=1
    - attn_res.block_size=2 activation.situ_beta=1.0 activation.situ_linear_beta=1.0
    - attention.head_count_kv=[0,1,0] UNTIED output_res_score:64
    1x KDA LOW_RANK ssm_g:64,64 ssm_a!:4 attn_res_score:64 ffn_res_score:64 dense96
    1x LATENT attn_gate:64,64 attn_res_score:64 ffn_res_score:64 K3
    1x KDA LOW_RANK ssm_g:64,64 ssm_a!:4 attn_res_score:64 ffn_res_score:64 K3
mellum
    - E64 EVERY2 UNTIED
    3x NORMED experts64
maple
    - E64 WINDOW attention.sliding_window_pattern=[true,false,true] swiglu_clamp_exp=[7.0,7.0,7.0] UNTIED
    3x NORMED experts64
";

/// Tensors of an FFN or of experts, if `word` is such a word with a number of neurons behind it.
fn neurons(word: &str) -> Option<String> {
    let (kind, n) = word.split_at(word.find(|c: char| c.is_ascii_digit())?);
    let n: usize = n.parse().ok()?;
    let three =
        |s: &str, end: &str| format!("ffn_gate{s}:64,{n}{end} ffn_up{s}:64,{n}{end} ffn_down{s}:{n},64{end}");
    match kind {
        "dense" => Some(three("", "")),
        "shared" => Some(three("_shexp", "")),
        "experts" => Some(format!("ffn_gate_inp:64,8 {}", three("_exps", ",8"))),
        "fused" => Some(format!("ffn_gate_inp:64,8 ffn_gate_up_exps:64,{},8 ffn_down_exps:{n},64,8", 2 * n)),
        _ => None,
    }
}

/// Entries of a text: their first lines, and the lines that follow them without their indentation.
fn entries(text: &'static str) -> Vec<Vec<&'static str>> {
    let lines: Vec<_> = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    let groups = lines.chunk_by(|_, next| next.starts_with(' '));
    groups.map(|g| g.iter().map(|l| l.trim_start()).collect()).collect()
}

/// Keys, tensors and types of a text, in its order.
fn expand(text: &str) -> Vec<String> {
    let one = |word: &str| {
        if word.contains(['=', ':', '@']) {
            return vec![word.to_owned()];
        }
        let meaning = entries(WORDS).into_iter().map(|lines| lines.join(" "));
        let mut meaning = meaning.filter_map(|e| Some(e.strip_prefix(word)?.strip_prefix(' ')?.to_owned()));
        expand(&meaning.next().or_else(|| neurons(word)).unwrap_or_else(|| panic!("word {word}")))
    };
    text.split_whitespace().flat_map(one).collect()
}

/// Value of a key. A number with a point is a float.
fn value(text: &str) -> Value {
    fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(items: &str) -> Vec<T> {
        items.split(',').map(|v| v.parse().unwrap()).collect()
    }
    match text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        Some(t) if t.contains(['t', 'f']) => Value::bool_array(&all(t)),
        Some(t) if t.contains('.') => Value::f32_array(&all(t)),
        Some(t) => Value::u32_array(&all(t)),
        None if text.contains(['t', 'f']) => Value::Bool(text.parse().unwrap()),
        None if text.contains('.') => Value::F32(text.parse().unwrap()),
        None => Value::U32(text.parse().unwrap()),
    }
}

/// Name, sizes and kind of a tensor of a text, without the name of its block.
fn tensor(item: &str, tied: bool) -> (String, Vec<usize>, Init) {
    let (name, ne) = item.split_once(':').unwrap();
    let ne: Vec<usize> = ne.split(',').map(|n| n.parse().unwrap()).collect();
    let init = match name {
        "ffn_gate_tid2eid" => Init::Ids,
        "token_embd" if tied => Init::TiedEmbedding,
        "ssm_a!" => Init::Decay,
        n if n.ends_with(".bias") => Init::Bias,
        n if n.contains("norm") || n.ends_with("scale") || n == "rope_freqs" => Init::Norm,
        _ if ne.iter().filter(|n| **n > 1).count() < 2 => Init::Bias,
        _ => Init::Matrix,
    };
    let whole = match name.strip_suffix('!') {
        Some(bare) => bare.into(),
        None if [".bias", ".scale", ".input_scale"].iter().any(|e| name.ends_with(e)) => name.into(),
        None => format!("{name}.weight"),
    };
    (whole, ne, init)
}

/// The model of an entry of [`MODELS`].
fn model(entry: &[&'static str]) -> MixtureModel {
    let (name, text) = (entry[0], &entry[1..]);
    let arch = name.split(',').next().unwrap();
    let (mut words, mut blocks) = (expand("BASE"), Vec::<Vec<String>>::new());
    for line in text {
        let (kind, rest) = line.split_once(' ').unwrap();
        let more = expand(rest);
        match kind {
            "-" => words.extend(more),
            "+" => blocks.last_mut().unwrap().extend(more),
            times => blocks.extend(vec![more; times.trim_end_matches('x').parse().unwrap()]),
        }
    }
    let mut keys = vec![
        ("general.architecture".into(), Value::Str(arch.into())),
        ("general.name".into(), Value::Str("Small Random Mixture".into())),
        ("general.alignment".into(), Value::U32(32)),
        (format!("{arch}.block_count"), Value::U32(blocks.len() as u32)),
    ];
    for (key, v) in words.iter().filter_map(|w| w.split_once('=')) {
        let (key, v) = (format!("{arch}.{key}"), value(v));
        match keys.iter_mut().find(|(k, _)| *k == key) {
            Some(old) => old.1 = v,
            None => keys.push((key, v)),
        }
    }
    keys.extend(TestModel { n_vocab: N_VOCAB, ..TestModel::default() }.tokenizer());

    let expert_type = words.iter().find_map(|w| w.strip_prefix('@'));
    let expert_type = expert_type.map_or(Type::F32, |name| Type::from_name(name).unwrap());
    let tied = !words.iter().any(|w| w.starts_with("output:"));
    let mut tensors = Vec::new();
    let mut add = |prefix: &str, words: &[String]| {
        for item in words.iter().filter(|w| w.contains(':')) {
            let (name, ne, init) = tensor(item, tied);
            let ty = match init {
                Init::Ids => Type::I32,
                Init::Matrix if name.ends_with("_exps.weight") => expert_type,
                _ => Type::F32,
            };
            tensors.push((format!("{prefix}{name}"), ty, ne, init));
        }
    };
    add("", &words);
    blocks.iter().enumerate().for_each(|(i, words)| add(&format!("blk.{i}."), words));
    let seed = name.bytes().fold(1, |h: u64, b| h.wrapping_mul(31) + u64::from(b));
    MixtureModel { name, arch, keys, tensors, seed }
}

impl MixtureModel {
    /// One model per architecture, and per variant that changes which tensors or keys there are.
    pub fn all() -> Vec<MixtureModel> {
        entries(MODELS).iter().map(|e| model(e)).collect()
    }

    /// The model called `name`.
    pub fn of(name: &str) -> MixtureModel {
        model(entries(MODELS).iter().find(|e| e[0] == name).unwrap())
    }

    /// Writes the model to `path`.
    pub fn write(&self, path: &Path) {
        let mut rng = Rng(self.seed);
        let mut bytes = |ty: Type, ne: &[usize], init: Init| {
            let n: usize = ne.iter().product();
            let values: Vec<f32> = match init {
                Init::Norm => rng.vec(n, 0.3).iter().map(|v| v + 1.0).collect(),
                Init::Matrix => rng.vec(n, 1.5 / (ne[0] as f32).sqrt()),
                Init::TiedEmbedding => rng.vec(n, 0.1),
                Init::Bias => rng.vec(n, 0.2),
                Init::Decay => rng.vec(n, 0.5).iter().map(|v| v - 1.0).collect(),
                Init::Ids => {
                    let ids = (0..n).map(|i| (i / ne[0] * 3 + i % ne[0] * 5) % N_EXPERT);
                    return ids.flat_map(|id| (id as i32).to_ne_bytes()).collect();
                }
            };
            ty.quantize(&values, ne[0], None).unwrap()
        };
        let tensor = |(name, ty, ne, init): &(String, Type, Vec<usize>, Init)| {
            let bytes = bytes(*ty, ne, *init);
            let data = TensorData::made(move || Ok(Cow::Owned(bytes.clone())));
            OutTensor { name: name.clone(), ty: *ty, ne: ne.clone(), data }
        };
        let tensors: Vec<OutTensor> = self.tensors.iter().map(tensor).collect();
        let mut file = std::fs::File::create(path).unwrap();
        write_gguf(&mut file, path, &self.keys, &tensors).unwrap();
    }
}
