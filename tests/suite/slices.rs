//! Unchanged data is copied byte for byte.

use crate::common::test_model::{Rng, TestModel};
use crate::common::{compare_logits, libllama_logits, our_logits};
use putri_gguf::assemble::{Provenance, assemble};
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::{Arch, BlockMatrix, BlockVector, ExpertWeights, Family, Heads, Matrix, Model};
use putri_gguf::pipeline::Plan;
use putri_gguf::requant::quantise;
use std::path::Path;

fn provenance() -> Provenance {
    Provenance {
        source_sha256: "00".repeat(32),
        sparsity: 0.25,
        sparsity_reached: 0.26,
        method: "putri".into(),
        calibration: "none".into(),
        seed: 1,
        stages: Vec::new(),
        check_tokens: Vec::new(),
        check_nll: Vec::new(),
        check_exact: false,
    }
}

fn write(model: &Model, plan: &Plan, path: &Path) -> Family {
    let mut file = std::fs::File::create(path).unwrap();
    assemble(model, plan, &provenance(), None, &mut file, path).unwrap().output_arch
}

/// Rows of a tensor in the file as byte strings.
fn rows(f: &GgufFile, name: &str) -> Vec<Vec<u8>> {
    let t = f.find(name).unwrap_or_else(|| panic!("{name} is missing"));
    f.data(t).chunks_exact(t.ty.row_bytes(t.ne[0])).map(<[u8]>::to_vec).collect()
}

#[test]
fn removed_rows_leave_the_others_as_they_were() {
    for fused_qkv in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
        let small = TestModel {
            ty: Type::Q4_0,
            n_embd: 64,
            head_dim: 32,
            biases: true,
            fused_qkv,
            ..TestModel::default()
        };
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let mut plan = Plan::whole(&model);
        plan.blocks[1].groups = vec![1];
        plan.blocks[2].groups = vec![];
        plan.blocks[0].neurons = vec![5, 3, 90];
        assert_eq!(write(&model, &plan, &target), Family::Deci);
        let out = GgufFile::open(&target).unwrap();

        // Block 1: two query heads per KV head, 32 rows each; group 1 is rows 64.. of Q, 32.. of K and V.
        if fused_qkv {
            let (old, new) =
                (rows(&model.file, "blk.1.attn_qkv.weight"), rows(&out, "blk.1.attn_qkv.weight"));
            let expected: Vec<_> =
                (64..128).chain(160..192).chain(224..256).map(|i| old[i].clone()).collect();
            assert_eq!(new, expected);
        } else {
            for (name, from, n) in [("attn_q", 64, 64), ("attn_k", 32, 32), ("attn_v", 32, 32)] {
                let name = format!("blk.1.{name}.weight");
                assert_eq!(rows(&out, &name), rows(&model.file, &name)[from..from + n]);
            }
        }
        // attn_output loses columns: the quantisation blocks of 32 of each row that belong to group 0.
        let (old, new) =
            (rows(&model.file, "blk.1.attn_output.weight"), rows(&out, "blk.1.attn_output.weight"));
        let half = Type::Q4_0.row_bytes(64);
        assert!(old.iter().zip(&new).all(|(o, n)| o[half..] == n[..]));

        // Block 2 has no attention, and no attention tensors in the file.
        assert!(out.tensors().iter().all(|t| !t.name.starts_with("blk.2.attn")));

        // Block 0: three neurons, in the order of the plan.
        for name in ["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"] {
            let old = rows(&model.file, name);
            assert_eq!(rows(&out, name), [old[5].clone(), old[3].clone(), old[90].clone()]);
        }
        let bias = |f: &GgufFile| f.data(f.find("blk.0.ffn_up.bias").unwrap()).to_vec();
        let (old, new) = (bias(&model.file), bias(&out));
        assert_eq!(new, [&old[20..24], &old[12..16], &old[360..364]].concat());

        // Tensors that the plan does not change.
        for name in
            ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"]
        {
            assert_eq!(rows(&out, name), rows(&model.file, name), "{name}");
        }
    }
}

#[test]
fn deci_with_everything_kept_gives_the_sources_logits() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    for small in [
        TestModel { biases: true, ..TestModel::default() },
        TestModel { rope_freqs: true, tied: false, ..TestModel::default() },
        TestModel {
            extra: vec![
                ("rope.scaling.type", Value::Str("yarn".into())),
                ("rope.scaling.factor", Value::F32(2.0)),
            ],
            ..TestModel::default()
        },
    ] {
        small.write(&source);
        let deci = TestModel { arch: "deci", ..small.clone() };
        deci.write(&target);
        let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
        let (a, b) = (libllama_logits(&source, &tokens), libllama_logits(&target, &tokens));
        let (max, _) = compare_logits(&a, &b, small.n_vocab);
        assert_eq!(max, 0.0, "the same weights in the other architecture");
    }
}

#[test]
fn families_give_their_logits_in_other_architectures() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
    let mut n_carried = 0;
    for (name, small) in TestModel::variants() {
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let own = model.hparams.family;
        for heads in [Heads::Auto, Heads::Uniform] {
            let plan = Plan { output_archs: model.output_archs(heads, Arch::Auto), ..Plan::whole(&model) };
            let output_arch = write(&model, &plan, &target);
            let loads_fewer_heads =
                own.traits().loads_fewer_heads || plan.output_archs == model.output_archs(heads, Arch::Keep);
            assert_eq!(output_arch == own, loads_fewer_heads, "{name}");
            n_carried += usize::from(!loads_fewer_heads);
            let (a, b) = (libllama_logits(&source, &tokens), libllama_logits(&target, &tokens));
            let (max, kl) = compare_logits(&a, &b, small.n_vocab);
            println!(
                "{name} in {}: largest difference {max:.2e}, KL divergence {kl:.2e}",
                output_arch.name()
            );
            // In another order of rows, sums of 16-bit numbers round differently.
            assert!(max < 0.02 && kl < 1e-6, "{name}: {max} {kl}");
            let kept = Plan { output_archs: model.output_archs(heads, Arch::Keep), ..plan };
            assert_eq!(kept.output_arch(&model), own, "{name}");
        }
    }
    assert!(n_carried >= 14);
}

#[test]
fn new_values_of_every_matrix_are_written_where_they_belong() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let mut rng = Rng(5);
    let base = ("llama", TestModel::default());
    for (name, small) in TestModel::variants().into_iter().chain([base]) {
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let mut plan = Plan::whole(&model);
        let per_layer = plan.output_archs.of_heads().is_some();
        if per_layer {
            plan.blocks[1].groups = vec![1];
        }
        if model.hparams.experts.is_none() && plan.output_archs.per_block.is_some() {
            plan.blocks[0].neurons = (0..model.hparams.blocks[0].n_ff).filter(|j| j % 3 > 0).collect();
        }
        for il in 0..model.hparams.n_layer() {
            let w = plan.block(&model, il).unwrap();
            let stacked = |each: &[Matrix]| {
                let rows = each.iter().flat_map(|m| m.data.iter().copied()).collect::<Vec<_>>();
                Matrix::new(each[0].n_in, rows.len() / each[0].n_in, rows)
            };
            let of_experts =
                |part: fn(&ExpertWeights) -> &Vec<Matrix>| w.experts.as_ref().map(|e| stacked(part(e)));
            let values = |m: BlockMatrix| match m {
                BlockMatrix::AttnQ => Some(w.qkv[0].clone()),
                BlockMatrix::AttnK => Some(w.qkv[1].clone()),
                BlockMatrix::AttnV => Some(w.qkv[2].clone()),
                BlockMatrix::AttnOutput => Some(w.attn_output.clone()),
                BlockMatrix::FfnGate => of_experts(|e| &e.gate).or(w.ffn_gate.clone()),
                BlockMatrix::FfnUp => of_experts(|e| &e.up).or(Some(w.ffn_up.clone())),
                BlockMatrix::FfnDown => of_experts(|e| &e.down).or(Some(w.ffn_down.clone())),
            };
            for m in BlockMatrix::ALL {
                // Some of the matrices of a block keep the source's values.
                let (Some(old), true) = (values(m), !(il + m as usize).is_multiple_of(4)) else { continue };
                let new: Vec<f32> = old.data.iter().map(|v| v * (1.0 + 0.5 * rng.uniform())).collect();
                let q = quantise(&Matrix::new(old.n_in, old.n_out, new), Type::F32, &vec![1.0; old.n_in]);
                plan.blocks[il].set_matrix(m, q.unwrap());
            }
        }
        write(&model, &plan, &target);
        let tokens: Vec<i32> = (0..60).map(|i| 3 + (i * 31) % 250).collect();
        let ours = crate::common::logits(&model, &tokens, 1, |il| plan.block(&model, il).unwrap());
        let unchanged = crate::common::our_logits(&source, &tokens);
        let found = libllama_logits(&target, &tokens);
        let (max, kl) = compare_logits(&found, &ours, small.n_vocab);
        let (_, moved) = compare_logits(&found, &unchanged, small.n_vocab);
        println!("{name}: largest difference {max:.2e}, KL divergence {kl:.2e}, from the source {moved:.2e}");
        assert!(kl < 5e-5 && kl < moved / 20.0, "{name}: {kl} {moved}");
    }
}

#[test]
fn equal_blocks_stay_what_they_are_where_they_can() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("a.gguf");
    let whole = |small: TestModel| {
        small.write(&source);
        let model = Model::open(&source).unwrap();
        (Plan::whole(&model), model)
    };
    for (small, equal, per_layer_arch) in [
        (TestModel::default(), Family::Llama, Family::Deci),
        (TestModel { arch: "deci", ..TestModel::default() }, Family::Deci, Family::Deci),
        (TestModel { arch: "qwen2", ..TestModel::default() }, Family::Deci, Family::Deci),
        (TestModel { arch: "qwen3", ..TestModel::default() }, Family::Qwen3, Family::OpenElm),
    ] {
        let (mut plan, model) = whole(small);
        assert_eq!(plan.output_arch(&model), equal);
        plan.blocks[1].neurons.truncate(64);
        assert_eq!(plan.output_arch(&model), per_layer_arch);
    }
}

#[test]
#[should_panic(expected = "blocks of gemma3 must be equal")]
fn gemma3_has_no_carrier_for_uneven_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("a.gguf");
    TestModel::gemma3().write(&source);
    let model = Model::open(&source).unwrap();
    let mut plan = Plan::whole(&model);
    plan.blocks[1].neurons.truncate(64);
    plan.output_arch(&model);
}

#[test]
fn a_qwen3_with_uneven_blocks_is_an_openelm() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
    for (fused_qkv, ty) in [(false, Type::F32), (true, Type::F32), (false, Type::Q8_0)] {
        let small = TestModel { arch: "qwen3", fused_qkv, ty, ..TestModel::default() };
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let mut plan = Plan::whole(&model);
        plan.blocks[1].groups = vec![1];
        assert_eq!(write(&model, &plan, &target), Family::OpenElm);
        let ours = crate::common::logits(&model, &tokens, 1, |il| plan.block(&model, il).unwrap());
        let (max, kl) = compare_logits(&libllama_logits(&target, &tokens), &ours, small.n_vocab);
        println!("{ty}: largest difference {max:.2e}, KL divergence {kl:.2e}");
        assert!(kl < if ty == Type::F32 { 2e-5 } else { 2e-3 }, "{ty}: {max} {kl}");
        // All rows of Q are followed by those of K and V, unchanged.
        let found = rows(&GgufFile::open(&target).unwrap(), "blk.0.attn_qkv.weight");
        let names = if fused_qkv { vec!["attn_qkv"] } else { vec!["attn_q", "attn_k", "attn_v"] };
        let old = names.iter().flat_map(|n| rows(&model.file, &format!("blk.0.{n}.weight")));
        assert!(old.eq(found));
    }
    // The output architecture has no separate output head.
    TestModel { arch: "qwen3", tied: false, ..TestModel::default() }.write(&source);
    assert_eq!(Plan::whole(&Model::open(&source).unwrap()).output_archs.per_block, None);
}

#[test]
fn a_qwen3_with_its_own_head_is_a_step35_if_it_shall_be() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
    let base = ("rope.freq_base", Value::F32(50000.0));
    let small = TestModel { arch: "qwen3", tied: false, extra: vec![base], ..TestModel::default() };
    small.write(&source);
    let model = Model::open(&source).unwrap();
    assert_eq!(model.output_archs(Heads::Auto, Arch::Auto).of_heads(), None);
    let output_archs = model.output_archs(Heads::PerLayer, Arch::Auto);
    let mut plan = Plan { output_archs, ..Plan::whole(&model) };
    assert_eq!(plan.output_arch(&model), Family::Qwen3);
    // The whole model gives the same bits in libllama; with fewer heads, the reference is the crate's own
    // logits.
    let loads_fewer_heads = plan.output_archs.equal;
    plan.output_archs.equal = Family::Step35;
    write(&model, &plan, &target);
    let (max, _) =
        compare_logits(&libllama_logits(&source, &tokens), &libllama_logits(&target, &tokens), small.n_vocab);
    assert_eq!(max, 0.0);
    plan.output_archs.equal = loads_fewer_heads;
    plan.blocks[1].groups = vec![1];
    assert_eq!(write(&model, &plan, &target), Family::Step35);
    let ours = crate::common::logits(&model, &tokens, 1, |il| plan.block(&model, il).unwrap());
    let (max, kl) = compare_logits(&libllama_logits(&target, &tokens), &ours, small.n_vocab);
    println!("largest difference {max:.2e}, KL divergence {kl:.2e}");
    assert!(max < 0.06 && kl < 2e-5, "{max} {kl}");
    // That architecture does not support a scaled rotary embedding.
    let factor = ("rope.scaling.factor", Value::F32(4.0));
    TestModel { extra: vec![factor], ..small }.write(&source);
    let model = Model::open(&source).unwrap();
    assert_eq!(model.output_archs(Heads::PerLayer, Arch::Auto).of_heads(), None);
}

#[test]
fn rows_of_different_types_are_joined_in_the_widest() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, mixed, target) =
        (dir.path().join("a.gguf"), dir.path().join("m.gguf"), dir.path().join("b.gguf"));
    let small = TestModel { arch: "qwen3", ..TestModel::default() };
    small.write(&source);
    crate::common::retype(&GgufFile::open(&source).unwrap(), &mixed, |name| {
        let narrow = name.contains("attn_q.") || name.contains("attn_k.");
        narrow.then_some(Type::Q4_0).or(name.contains("attn_v.").then_some(Type::Q8_0))
    });
    let model = Model::open(&mixed).unwrap();
    let mut plan = Plan::whole(&model);
    plan.blocks[1].groups = vec![0];
    write(&model, &plan, &target);
    let out = GgufFile::open(&target).unwrap();
    assert_eq!(out.find("blk.1.attn_qkv.weight").unwrap().ty, Type::Q8_0);
    let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
    let ours = crate::common::logits(&model, &tokens, 1, |il| plan.block(&model, il).unwrap());
    let (max, kl) = compare_logits(&libllama_logits(&target, &tokens), &ours, small.n_vocab);
    println!("largest difference {max:.2e}, KL divergence {kl:.2e}");
    assert!(kl < 2e-3, "{max} {kl}");
}

#[test]
fn gemma3_computes_the_same_with_fewer_heads() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let tokens: Vec<i32> = (0..100).map(|i| 3 + (i * 31) % 250).collect();
    // With 62 blocks, llama.cpp derives the scale of attention from the number of heads.
    for n_blocks in [7, 62] {
        let small = TestModel { n_embd: 32, blocks: vec![(4, 2, 64); n_blocks], ..TestModel::gemma3() };
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let mut plan = Plan::whole(&model);
        plan.blocks.iter_mut().for_each(|b| b.groups = vec![1]);
        assert_eq!(write(&model, &plan, &target).name(), "gemma3");
        let out = GgufFile::open(&target).unwrap();
        assert_eq!(out.get("gemma3.attention.head_count"), Some(&Value::U32(2)));
        for (name, copied) in [("attn_q_norm", n_blocks == 7), ("attn_k_norm", true), ("post_ffw_norm", true)]
        {
            let name = format!("blk.3.{name}.weight");
            assert_eq!(rows(&out, &name) == rows(&model.file, &name), copied, "{name}");
        }
        let planned = crate::common::logits(&model, &tokens, 1, |il| plan.block(&model, il).unwrap());
        let (max, kl) = compare_logits(&libllama_logits(&target, &tokens), &planned, small.n_vocab);
        println!("{n_blocks} blocks: largest difference {max:.2e}, KL divergence {kl:.2e}");
        assert!(max < 0.06 && kl < 2e-5, "{n_blocks} blocks: largest difference {max}, KL divergence {kl}");
    }
}

#[test]
fn new_biases_and_norms_are_written_and_used() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let tokens: Vec<i32> = (0..150).map(|i| 3 + (i * 31) % 250).collect();
    for biases in [false, true] {
        let small = TestModel { biases, ..TestModel::default() };
        small.write(&source);
        let model = Model::open(&source).unwrap();
        let n_embd = model.hparams.n_embd;
        let mut plan = Plan::whole(&model);
        let values = |scale: f32| Some((0..n_embd).map(|i| scale * (i as f32 - 20.0)).collect::<Vec<_>>());
        plan.blocks[0].set_vector(BlockVector::AttnOutputBias, values(0.01));
        plan.blocks[1].set_vector(BlockVector::FfnDownBias, values(0.02));
        plan.blocks[2].groups.clear();
        plan.blocks[2].set_vector(BlockVector::AttnOutputBias, values(1.0));
        for block in 0..3 {
            plan.blocks[block].set_vector(BlockVector::AttnNorm, values(0.03));
            plan.blocks[block].set_vector(BlockVector::FfnNorm, values(0.04));
        }
        write(&model, &plan, &target);
        let written = Model::open(&target).unwrap();
        let (b0, b1) = (written.block(0).unwrap(), written.block(1).unwrap());
        assert_eq!(b0.attn_output_bias, values(0.01));
        assert_eq!(b1.ffn_down_bias, values(0.02));
        assert_eq!(b1.attn_output_bias.is_some(), biases, "only the biases of the plan are new");
        // llama.cpp adds no bias in a block without attention, so the file has none.
        assert_eq!(written.block(2).unwrap().attn_output_bias, None);
        assert_eq!((b0.attn_norm, b0.ffn_norm), (values(0.03), values(0.04)));
        assert!(written.blocks[2].attn_norm.is_none(), "a block without attention has no norm before it");
        assert_eq!(written.block(2).unwrap().ffn_norm, values(0.04));
        let theirs = libllama_logits(&target, &tokens);
        let (max, _) = compare_logits(&theirs, &our_logits(&target, &tokens), small.n_vocab);
        assert!(max < 0.01, "largest difference of a logit {max}");
        let (felt, _) = compare_logits(&theirs, &libllama_logits(&source, &tokens), small.n_vocab);
        assert!(felt > 0.1, "the new values change nothing: {felt}");
    }
}

#[test]
fn other_alignments_are_read_and_written_as_32() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let small = TestModel { biases: true, ..TestModel::default() };
    small.write(&source);
    // The same file with its tensors aligned at 64 differs in the key's value, the header's padding, and the
    // offsets.
    let old = GgufFile::open(&source).unwrap();
    let old_bytes = old.bytes().next().unwrap();
    let mut bytes = old_bytes.to_vec();
    let key = b"general.alignment";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    assert_eq!(bytes[at..at + 4], 32u32.to_le_bytes());
    bytes[at..at + 4].copy_from_slice(&64u32.to_le_bytes());
    let data_start = old.data(&old.tensors()[0]).as_ptr() as usize - old_bytes.as_ptr() as usize;
    let mut out = bytes[..data_start].to_vec();
    out.resize(out.len().next_multiple_of(64), 0);
    let mut offset = 0u64;
    let mut cursor = 0;
    let body = out.len();
    for t in old.tensors() {
        // The name is followed by n_dims, the sizes, the type and the offset.
        let name = t.name.as_bytes();
        cursor += out[cursor..body].windows(name.len()).position(|w| w == name).unwrap() + name.len();
        let field = cursor + 4 + 8 * t.ne.len() + 4;
        out[field..field + 8].copy_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(old.data(t));
        out.resize(body + (out.len() - body).next_multiple_of(64), 0);
        offset = (out.len() - body) as u64;
    }
    std::fs::write(&source, out).unwrap();
    let model = Model::open(&source).unwrap();
    let mut plan = Plan::whole(&model);
    plan.blocks[0].groups = vec![1];
    write(&model, &plan, &target);
    let new = GgufFile::open(&target).unwrap();
    assert_eq!(new.get("general.alignment"), Some(&Value::U32(32)));
    assert_eq!(rows(&new, "blk.2.ffn_down.weight"), rows(&old, "blk.2.ffn_down.weight"));
    putri_gguf::ggml::LlamaModel::load(&target).unwrap();
}

#[test]
fn metadata_keeps_its_order_and_types() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let extra = vec![
        ("vocab_size", Value::U32(288)),
        ("odd.key", Value::U16(7)),
        ("list", Value::i32_array(&[1, -2])),
    ];
    let small = TestModel { extra, ..TestModel::default() };
    small.write(&source);
    let model = Model::open(&source).unwrap();
    let mut plan = Plan::whole(&model);
    plan.blocks[1].groups = vec![0];
    write(&model, &plan, &target);
    let out = GgufFile::open(&target).unwrap();
    let renamed = |k: &str| k.strip_prefix("llama.").map_or(k.to_string(), |s| format!("deci.{s}"));
    let expected: Vec<String> = model.file.metadata().iter().map(|(k, _)| renamed(k)).collect();
    let found: Vec<String> =
        out.metadata().iter().map(|(k, _)| k.clone()).filter(|k| !k.starts_with("putri.")).collect();
    assert_eq!(found, expected);
    let changed =
        ["general.architecture", "general.name", "deci.attention.head_count", "deci.attention.head_count_kv"];
    for (k, v) in model.file.metadata() {
        let k = renamed(k);
        if !changed.contains(&k.as_str()) {
            assert_eq!(out.get(&k), Some(v), "{k}");
        }
    }
    assert_eq!(out.get("deci.attention.head_count"), Some(&Value::i32_array(&[4, 2, 4])));
    assert_eq!(out.get("deci.attention.head_count_kv"), Some(&Value::i32_array(&[2, 1, 2])));
    assert_eq!(out.get("general.name"), Some(&Value::Str("Small Random (pruned 26%)".into())));
    assert_eq!(out.get("putri.source.sha256"), Some(&Value::Str("00".repeat(32).into())));
}

#[test]
fn defaults_that_depend_on_the_head_count_are_written_out() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let small = TestModel::default();
    small.write(&source);
    // The same file without the keys that have defaults.
    let bare = dir.path().join("bare.gguf");
    let has_default = ["key_length", "value_length", "dimension_count"];
    let keep = |k: &str| !has_default.iter().any(|d| k.ends_with(d));
    crate::common::rewrite(&GgufFile::open(&source).unwrap(), &bare, keep, None);

    let model = Model::open(&bare).unwrap();
    let mut plan = Plan::whole(&model);
    plan.blocks.iter_mut().for_each(|b| b.groups = vec![1]);
    assert_eq!(write(&model, &plan, &target).name(), "llama", "equal blocks stay in their architecture");
    let out = GgufFile::open(&target).unwrap();
    for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
        assert_eq!(out.get(&format!("llama.{key}")), Some(&Value::U32(16)), "{key}");
    }
    assert_eq!(Model::open(&target).unwrap().hparams.head_dim, 16);
}
