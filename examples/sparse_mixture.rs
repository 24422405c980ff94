//! Writes a mixture of experts in the shapes of Qwen3-30B-A3B as a sparse file of about 20 GB, to measure how
//! putri-gguf gets along with models that are larger than the memory.
//!
//!     cargo run --release --example sparse_mixture -- mixture.gguf
//!     putri-gguf mixture.gguf out.gguf --sparsity 0.25 -f text.txt --self-share 0 -c 128 --chunks 2 --refine 0 \
//!         --refit-routers 0 --no-verify --timings
//!
//! Norms are 1, embeddings and routers random, so that experts are chosen; all other weights are holes in the
//! file, which read as 0.

use putri_gguf::ggml::{RawGguf, Type};
use putri_gguf::gguf::{GgufFile, Value};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

const N_LAYER: usize = 48;
const N_EMBD: usize = 2048;
const N_EXPERT: usize = 128;
const WIDTH: usize = 768;
const HEAD: usize = 128;
const N_VOCAB: usize = 151_936;

/// Small, fast, seeded generator (SplitMix64) of numbers in [-1, 1).
struct Rng(u64);

impl Rng {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn main() {
    let path = std::env::args().nth(1).expect("the path of the file to write");
    let q5 = Type::from_name("q5_K").expect("the engine has it");
    let mut header = RawGguf::empty();
    let number = |n: usize| Value::U32(n as u32);
    let arch = [
        ("block_count", number(N_LAYER)),
        ("context_length", number(4096)),
        ("embedding_length", number(N_EMBD)),
        ("feed_forward_length", number(6144)),
        ("attention.head_count", number(32)),
        ("attention.head_count_kv", number(4)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("attention.key_length", number(HEAD)),
        ("attention.value_length", number(HEAD)),
        ("rope.freq_base", Value::F32(1e6)),
        ("expert_count", number(N_EXPERT)),
        ("expert_used_count", number(8)),
        ("expert_feed_forward_length", number(WIDTH)),
    ];
    header.set("general.architecture", &Value::Str("qwen3moe".into()));
    arch.iter().for_each(|(key, v)| header.set(&format!("qwen3moe.{key}"), v));
    // Single bytes, then filler.
    let token = |i: usize| match i {
        0 => "<unk>".to_string(),
        1 => "<s>".into(),
        2 => "</s>".into(),
        3..259 => format!("<0x{:02X}>", i - 3),
        _ => format!("▁w{i}"),
    };
    let types: Vec<i32> = (0..N_VOCAB)
        .map(|i| match i {
            0 => 2,
            1 | 2 => 3,
            3..259 => 6,
            _ => 1,
        })
        .collect();
    let scores: Vec<f32> = (0..N_VOCAB).map(|i| -(i as f32)).collect();
    let vocab = [
        ("model", Value::Str("llama".into())),
        ("tokens", Value::StrArray((0..N_VOCAB).map(|i| token(i).into_bytes()).collect())),
        ("scores", Value::f32_array(&scores)),
        ("token_type", Value::i32_array(&types)),
        ("bos_token_id", number(1)),
        ("eos_token_id", number(2)),
    ];
    vocab.iter().for_each(|(key, v)| header.set(&format!("tokenizer.ggml.{key}"), v));

    header.add_tensor("token_embd.weight", q5, &[N_EMBD, N_VOCAB]);
    header.add_tensor("output_norm.weight", Type::F32, &[N_EMBD]);
    header.add_tensor("output.weight", q5, &[N_EMBD, N_VOCAB]);
    for il in 0..N_LAYER {
        let mut add =
            |role: &str, ty, ne: &[usize]| header.add_tensor(&format!("blk.{il}.{role}.weight"), ty, ne);
        add("attn_norm", Type::F32, &[N_EMBD]);
        add("attn_q", q5, &[N_EMBD, 32 * HEAD]);
        add("attn_k", q5, &[N_EMBD, 4 * HEAD]);
        add("attn_v", q5, &[N_EMBD, 4 * HEAD]);
        add("attn_q_norm", Type::F32, &[HEAD]);
        add("attn_k_norm", Type::F32, &[HEAD]);
        add("attn_output", q5, &[32 * HEAD, N_EMBD]);
        add("ffn_norm", Type::F32, &[N_EMBD]);
        add("ffn_gate_inp", Type::F32, &[N_EMBD, N_EXPERT]);
        add("ffn_gate_exps", q5, &[N_EMBD, WIDTH, N_EXPERT]);
        add("ffn_up_exps", q5, &[N_EMBD, WIDTH, N_EXPERT]);
        add("ffn_down_exps", q5, &[WIDTH, N_EMBD, N_EXPERT]);
    }
    let n = header.n_tensors();
    let bytes = header.to_bytes();
    let end = (0..n).map(|i| header.tensor(i)).map(|(_, ty, ne, offset)| {
        let ty = Type::from_raw(ty).expect("a type of the engine");
        let ne = ne.map(|n| n as usize);
        offset + (ty.row_bytes(ne[0]) * ne[1] * ne[2] * ne[3]) as u64
    });
    let end = bytes.len() as u64 + end.max().unwrap_or(0);
    let mut file = File::create(&path).expect("the file can be created");
    file.write_all(&bytes).expect("the header can be written");
    file.set_len(end.next_multiple_of(32)).expect("the file can be long");

    let mut rng = Rng(1);
    for i in 0..n {
        let (name, ty, ne, offset) = header.tensor(i);
        let (len, ty) = (ne.iter().product::<u64>() as usize, Type::from_raw(ty).expect("as above"));
        let values: Vec<f32> = if name.contains("norm") {
            vec![1.0; len]
        } else if name.contains("ffn_gate_inp") {
            (0..len).map(|_| 0.1 * rng.uniform()).collect()
        } else if name.starts_with("token_embd") {
            // Tokens beyond the bytes do not occur in texts.
            (0..300 * N_EMBD).map(|_| rng.uniform()).collect()
        } else {
            continue;
        };
        let data = ty.quantize(&values, ne[0] as usize, None).expect("the type can be written");
        file.seek(SeekFrom::Start(bytes.len() as u64 + offset)).expect("within the file");
        file.write_all(&data).expect("the values can be written");
    }
    drop(file);
    let file = GgufFile::open(path.as_ref()).expect("what was written can be read");
    println!("{path}: {:.1} GB, {} tensors", file.n_bytes() as f64 / 1e9, file.tensors().len());
}
