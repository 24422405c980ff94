//! Whole jobs, on small models and on SmolLM2.

use crate::common::cli::{Cli, arg};
use crate::common::test_model::TestModel;
use crate::common::{Silent, TEXT, smollm2};
use putri_gguf::Job;
use putri_gguf::calibrate::Recipe;
use putri_gguf::ggml::{LlamaModel, Type, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Model;
use putri_gguf::pipeline::{Method, Settings};
use std::path::Path;

// Each job uses one thread, because tests run in parallel.
const QUICK: [&str; 6] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1"];

/// Opens `path` with libllama and with a third-party parser.
fn opens_everywhere(path: &Path, arch: &str) {
    LlamaModel::load(path).unwrap();
    let mut container = gguf_rs::get_gguf_container(path.to_str().unwrap()).unwrap();
    let other = container.decode().unwrap();
    assert_eq!(other.model_family(), arch);
    let ours = GgufFile::open(path).unwrap();
    assert_eq!(other.tensors().len(), ours.tensors().len());
    for (a, b) in other.tensors().iter().zip(ours.tensors()) {
        let shape: Vec<u64> = b.ne.iter().map(|&n| n as u64).collect();
        assert_eq!((&a.name, &a.shape, a.size), (&b.name, &shape, b.n_bytes() as u64));
    }
}

#[test]
fn small_models_are_pruned_and_run() {
    silence_logs();
    let cli = Cli::new();
    let variants = [
        ("plain", TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }),
        ("biases", TestModel { biases: true, blocks: vec![(4, 4, 256); 3], ..TestModel::default() }),
        ("untied", TestModel { tied: false, ty: Type::Q4_0, head_dim: 32, ..TestModel::default() }),
        ("fused", TestModel { fused_qkv: true, biases: true, rope_freqs: true, ..TestModel::default() }),
        ("odd width", TestModel { blocks: vec![(2, 1, 200); 3], ..TestModel::default() }),
        (
            "deci",
            TestModel {
                arch: "deci",
                blocks: vec![(4, 2, 256), (0, 0, 128), (2, 1, 192)],
                ..TestModel::default()
            },
        ),
    ];
    let mut n_tuned = 0;
    for (name, small) in variants {
        small.write(&cli.path("in.gguf"));
        let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
        for sparsity in ["0.25", "0.5"] {
            let out = format!("{name}-{sparsity}.gguf");
            let more = ["--resample-copies", "2", "--tune", "2", "--quiet"];
            let args = [&["in.gguf", &out, "--sparsity", sparsity][..], &more, &QUICK].concat();
            let text = cli.ok(&args);
            assert!(text.contains("perplexity") && text.contains("written file in llama.cpp"), "{text}");
            let path = cli.path(&out);
            let model = Model::open(&path).unwrap();
            opens_everywhere(&path, model.hparams.family.name());
            let Some(Value::F32(reached)) = model.file.get("putri.sparsity_reached") else {
                panic!("no provenance")
            };
            let asked: f32 = sparsity.parse().unwrap();
            assert!(*reached >= asked - 1e-6 && *reached < asked + 0.1, "{name}: {reached} for {asked}");
            assert_eq!(model.file.get("putri.resample_copies"), Some(&Value::U32(2)), "{name}");
            let norm = |f: &GgufFile| f.data(f.find("blk.0.ffn_norm.weight").unwrap()).to_vec();
            let tuned = model.file.get("putri.tune") == Some(&Value::U32(2));
            assert_eq!(norm(&source) != norm(&model.file), tuned, "{name}");
            n_tuned += usize::from(tuned);
            let before: usize = source.tensors().iter().map(|t| t.n_elements()).sum();
            let after: usize = model.file.tensors().iter().map(|t| t.n_elements()).sum();
            assert!(after < before);
        }
    }
    assert!(n_tuned > 6, "only {n_tuned} of 12 were tuned");
}

#[test]
fn families_of_one_row_are_pruned_and_run() {
    families_are_pruned_and_run(|i| i % 2 == 0);
}

#[test]
fn the_other_half_of_them_too() {
    families_are_pruned_and_run(|i| i % 2 == 1);
}

fn families_are_pruned_and_run(which: impl Fn(&usize) -> bool) {
    silence_logs();
    let cli = Cli::new();
    for (_, (name, small)) in TestModel::variants().into_iter().enumerate().filter(|(i, _)| which(i)) {
        TestModel { ty: Type::Q8_0, blocks: vec![(4, 2, 256); 5], ..small.clone() }
            .write(&cli.path("in.gguf"));
        for sparsity in ["0.25", "0.5"] {
            let args = ["in.gguf", "out.gguf", "--force", "--quiet", "--sparsity", sparsity];
            // The command itself compares llama.cpp's perplexity of the file with that of the crate's own
            // forward pass.
            cli.ok(&[&args[..], &QUICK].concat());
            let model = Model::open(&cli.path("out.gguf")).unwrap();
            let output_archs = Settings::default().output_archs(&Model::open(&cli.path("in.gguf")).unwrap());
            opens_everywhere(
                &cli.path("out.gguf"),
                output_archs.per_block.unwrap_or(output_archs.equal).name(),
            );
            let groups: usize = model.hparams.blocks.iter().map(|b| b.n_head_kv).sum();
            assert!(
                sparsity == "0.25" || output_archs.per_block.is_none() || groups < 10,
                "{name}: no heads went"
            );
            if !output_archs.fewer_heads {
                assert_eq!(groups, 10, "{name}");
            }
        }
    }
}

#[test]
fn mixtures_lose_whole_experts() {
    silence_logs();
    let cli = Cli::new();
    for (name, small) in TestModel::mixtures() {
        let small = TestModel { ty: Type::Q8_0, ..small };
        small.write(&cli.path("in.gguf"));
        let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
        let [n_expert, n_used, _] = small.experts.unwrap();
        for sparsity in [0.25, 0.5] {
            let text = sparsity.to_string();
            let args = ["in.gguf", "out.gguf", "--force", "--quiet", "--sparsity", &text];
            // The command itself compares llama.cpp's perplexity of the file with that of the source whose
            // other experts are masked.
            let said = cli.ok(&[&args[..], &QUICK, &["--refit-routers", "0"]].concat());
            assert!(said.contains("experts"), "{said}");
            opens_everywhere(&cli.path("out.gguf"), small.arch);
            let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
            let h = Model::open(&cli.path("out.gguf")).unwrap().hparams;
            let kept = h.blocks[0].n_expert;
            let Some(Value::F32(reached)) = out.get("putri.sparsity_reached") else {
                panic!("no provenance")
            };
            let wanted = n_expert - (sparsity * n_expert as f64).round() as usize;
            assert!(*reached > 0.0 && kept == wanted, "{name}: {reached} {kept}");
            assert!(h.blocks.iter().all(|b| b.n_expert == kept && b.n_ff == 96), "{name}");
            assert_eq!(
                out.get(&format!("{}.expert_used_count", small.arch)),
                Some(&Value::U32(n_used as u32))
            );
            // Every kept expert is one of the source, byte for byte, and so is its row of the router.
            for il in 0..4 {
                let parts = |f: &GgufFile, role: &str, n: usize| -> Vec<Vec<u8>> {
                    let t = f.find(&format!("blk.{il}.ffn_{role}.weight")).unwrap();
                    let bytes = f.data(t);
                    bytes.chunks_exact(bytes.len() / n).map(<[u8]>::to_vec).collect()
                };
                let positions = |role: &str| -> Vec<usize> {
                    let old = parts(&source, role, n_expert);
                    let new = parts(&out, role, kept);
                    new.iter().map(|e| old.iter().position(|o| o == e).unwrap()).collect()
                };
                let router = positions("gate_inp");
                for role in ["gate_exps", "up_exps", "down_exps"] {
                    assert_eq!(positions(role), router, "{name}, block {il}, {role}");
                }
            }
        }
    }
    mixture_refusals(&cli);
}

#[test]
fn mixtures_lose_neurons_of_each_expert() {
    silence_logs();
    let cli = Cli::new();
    for (name, small) in TestModel::mixtures() {
        TestModel { ty: Type::Q8_0, ..small.clone() }.write(&cli.path("in.gguf"));
        let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
        let [n_expert, n_used, _] = small.experts.unwrap();
        for (sparsity, width) in [("0.25", 64), ("0.5", 32)] {
            let args = ["in.gguf", "out.gguf", "--force", "--quiet", "--experts", "narrow"];
            let args = [&args[..], &["--sparsity", sparsity], &QUICK].concat();
            // The command itself compares llama.cpp's perplexity of the file with that of the crate's own
            // forward pass.
            let said = cli.ok(&args);
            assert!(said.contains("neurons of an expert"), "{said}");
            opens_everywhere(&cli.path("out.gguf"), small.arch);
            let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
            let h = Model::open(&cli.path("out.gguf")).unwrap().hparams;
            assert!(h.blocks.iter().all(|b| (b.n_expert, b.n_ff) == (n_expert, width)), "{name}");
            assert_eq!(h.experts.unwrap().n_used, n_used);
            let Some(Value::F32(reached)) = out.get("putri.sparsity_reached") else {
                panic!("no provenance")
            };
            let params = |f: &GgufFile| -> usize {
                let prunable = |name: &str| {
                    let parts =
                        ["attn_q.w", "attn_k.w", "attn_v.w", "attn_output.w", "_exps.w", "gate_inp.w"];
                    parts.iter().any(|part| name.contains(part))
                };
                f.tensors().iter().filter(|t| prunable(&t.name)).map(|t| t.n_elements()).sum()
            };
            let gone = 1.0 - params(&out) as f32 / params(&source) as f32;
            let asked: f32 = sparsity.parse().unwrap();
            assert!(*reached >= asked && (*reached - gone).abs() < 1e-6, "{name}: {reached} {gone}");
            for il in 0..4 {
                let rows = |f: &GgufFile, role: &str, n_ff: usize| -> Vec<Vec<Vec<u8>>> {
                    let t = f.find(&format!("blk.{il}.ffn_{role}.weight")).unwrap();
                    assert_eq!((t.ty, &t.ne[1..]), (Type::Q8_0, &[n_ff, n_expert][..]), "{name}, {role}");
                    let row = t.ty.row_bytes(t.ne[0]);
                    let experts = f.data(t).chunks_exact(row * n_ff);
                    experts.map(|e| e.chunks_exact(row).map(<[u8]>::to_vec).collect()).collect()
                };
                let down = out.find(&format!("blk.{il}.ffn_down_exps.weight")).unwrap();
                assert_eq!((down.ty, &down.ne[..]), (Type::Q8_0, &[width, h.n_embd, n_expert][..]));
                // Each row of gate and up is one of the same expert's, byte for byte, and both are from the
                // same neuron.
                let [gate, up] = ["gate_exps", "up_exps"].map(|role| {
                    let (old, new) = (rows(&source, role, 96), rows(&out, role, width));
                    let place = |(old, new): (&Vec<Vec<u8>>, &Vec<Vec<u8>>)| -> Vec<usize> {
                        new.iter().map(|row| old.iter().position(|o| o == row).unwrap()).collect()
                    };
                    old.iter().zip(&new).map(place).collect::<Vec<_>>()
                });
                assert_eq!(gate, up, "{name}, block {il}");
                assert!(gate.windows(2).any(|two| two[0] != two[1]), "each expert loses neurons of its own");
                let router =
                    |f: &GgufFile| f.data(f.find(&format!("blk.{il}.ffn_gate_inp.weight")).unwrap()).to_vec();
                assert!(router(&source) == router(&out), "{name}: the router stays");
            }
        }
    }
    // With so few tokens, all of them the same, some experts have none.
    std::fs::write(cli.path("same.txt"), "a ".repeat(200)).unwrap();
    let idle = ["in.gguf", "out.gguf", "--force", "--experts", "narrow", "--sparsity", "0.4", "-c", "16"];
    let few = ["-f", "same.txt", "--self-share", "0", "--chunks", "1", "--resample-copies", "0"];
    let said = cli.ok(&[&idle[..], &few, &["--threads", "1", "--no-verify", "-q"]].concat());
    assert!(said.contains("no token of the calibration chose"), "{said}");
    opens_everywhere(&cli.path("out.gguf"), "granitemoe");
    mixture_refusals(&cli);
}

/// Checks that unsupported jobs on the mixture `in.gguf` are rejected.
fn mixture_refusals(cli: &Cli) {
    let asked = |more: &[&str], parts: &[&str]| {
        cli.fails(&[&["in.gguf", "x.gguf", "--sparsity", "0.3"][..], more, &QUICK].concat(), 1, parts);
    };
    asked(&["--method", "paper"], &["--method paper", "experts"]);
    asked(&["--imatrix-out", "i.gguf"], &["--imatrix-out", "mixtures of experts"]);
    asked(&["--type", "q4_0"], &["--type", "mixtures of experts"]);
    cli.fails(&[&["in.gguf", "x.gguf", "--sparsity", "0.9"][..], &QUICK].concat(), 1, &["90 %", "at least"]);
}

#[test]
fn heads_and_architecture_are_what_was_asked_for() {
    silence_logs();
    let cli = Cli::new();
    let of = |arch| TestModel { arch, blocks: vec![(4, 4, 256); 4], head_dim: 16, ..TestModel::default() };
    // Architecture, total number of heads, and whether blocks are equal.
    let prune = |small: &TestModel, args: &[&str]| {
        small.write(&cli.path("in.gguf"));
        cli.ok(&[&["in.gguf", "out.gguf", "--force", "-q", "--sparsity", "0.5"][..], args, &QUICK].concat());
        let h = Model::open(&cli.path("out.gguf")).unwrap().hparams;
        let n_head: usize = h.blocks.iter().map(|b| b.n_head).sum();
        opens_everywhere(&cli.path("out.gguf"), h.family.name());
        (h.family.name(), n_head, h.blocks.iter().all(|b| *b == h.blocks[0]))
    };
    let (arch, n_head, _) = prune(&of("llama"), &["--heads", "per-layer"]);
    assert!(arch == "deci" && n_head < 16, "{arch} {n_head}");
    for (source, output_arch) in
        [("llama", "llama"), ("qwen2", "llama"), ("qwen3", "qwen3"), ("phi3", "llama")]
    {
        let (arch, n_head, alike) = prune(&of(source), &["--heads", "uniform"]);
        assert!(arch == output_arch && n_head < 16 && alike, "{source}: {arch} {n_head}");
    }
    let untied = TestModel { tied: false, ..of("qwen3") };
    let (arch, n_head) = {
        untied.write(&cli.path("in.gguf"));
        let args = ["in.gguf", "out.gguf", "--force", "-q", "--sparsity", "0.5", "--heads", "per-layer"];
        cli.ok(&[&args[..], &QUICK].concat());
        opens_everywhere(&cli.path("out.gguf"), "step35");
        let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
        let heads = out.get("step35.attention.head_count").unwrap().as_unsigned_array().unwrap();
        (out.get_str("general.architecture").unwrap().unwrap().to_string(), heads.iter().sum::<u64>())
    };
    assert!(arch == "step35" && n_head < 16, "{arch} {n_head}");
    assert_eq!(prune(&of("llama"), &["--heads", "none"]).1, 16);
    let (arch, n_head, alike) = prune(&of("llama"), &["--arch", "keep"]);
    assert!(arch == "llama" && n_head < 16 && alike, "{arch} {n_head}");
    assert_eq!(prune(&of("qwen2"), &["--arch", "keep"]), ("qwen2", 16, true));
    let (arch, n_head, _) = prune(&of("deci"), &["--arch", "keep", "--heads", "per-layer"]);
    assert!(arch == "deci" && n_head < 16, "{arch} {n_head}");

    let refused = |small: &TestModel, args: &[&str], parts: &[&str]| {
        small.write(&cli.path("in.gguf"));
        let common = ["in.gguf", "x.gguf", "--sparsity", "0.3", "--heads", "per-layer"];
        cli.fails(&[&common[..], args, &QUICK].concat(), 1, parts);
    };
    refused(&TestModel::gemma3(), &[], &["--heads per-layer", "gemma3"]);
    refused(&of("llama"), &["--arch", "keep"], &["--heads per-layer", "llama"]);
}

#[test]
fn gemma3_is_pruned_to_equal_blocks() {
    silence_logs();
    let cli = Cli::new();
    let gemma = TestModel { blocks: vec![(4, 2, 256); 7], ..TestModel::gemma3() };
    let variants = [
        ("f32", gemma.clone()),
        ("q4_0", TestModel { ty: Type::Q4_0, n_embd: 64, tied: false, biases: true, ..gemma }),
    ];
    for (name, small) in variants {
        small.write(&cli.path("in.gguf"));
        for (method, sparsity) in [("putri", "0.25"), ("putri", "0.5"), ("paper", "0.25")] {
            let out = format!("{name}-{method}-{sparsity}.gguf");
            let args = ["in.gguf", &out, "--sparsity", sparsity, "--method", method];
            let text = cli.ok(&[&args[..], &QUICK].concat());
            println!("{text}");
            let path = cli.path(&out);
            opens_everywhere(&path, "gemma3");
            let model = Model::open(&path).unwrap();
            let first = model.hparams.blocks[0];
            assert!(first.n_head <= 4 && first.n_ff < 256, "{first:?}");
            assert!(model.hparams.blocks.iter().all(|b| *b == first), "{name}: {:?}", model.hparams.blocks);
            assert!(model.file.tensors().iter().all(|t| !t.name.ends_with("attn_output.bias")));
            let Some(Value::F32(reached)) = model.file.get("putri.sparsity_reached") else {
                panic!("no provenance")
            };
            assert!(*reached >= sparsity.parse::<f32>().unwrap() - 1e-6, "{name}: {reached} for {sparsity}");
        }
    }
    // Every block keeps a group, so the largest sparsity is lower.
    let args = [&["in.gguf", "out.gguf", "--sparsity", "0.9"][..], &QUICK].concat();
    cli.fails(&args, 1, &["0.9", "at most"]);
}

#[test]
fn timings_name_the_stages_and_what_they_reached() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let text = cli.ok(&[&["in.gguf", "out.gguf", "--sparsity", "0.3", "--timings"][..], &QUICK].concat());
    for stage in [
        "heads",
        "widths",
        "sensitivity",
        "neuron criterion",
        "resample",
        "blocks",
        "tune",
        "write",
        "verify",
        "all stages",
    ] {
        assert!(text.lines().any(|l| l.starts_with(stage)), "no {stage} in {text}");
    }
    let all = text.lines().find(|l| l.starts_with("all stages")).unwrap();
    let numbers: Vec<f64> = all.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    assert!(numbers[0] > 0.0 && numbers[2] > 0.0, "{all}");
    assert!(text.trim_end().ends_with("out.gguf"), "the last line is not the path: {text}");
}

#[test]
fn the_papers_method_gives_equal_widths() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    cli.ok(&[&["in.gguf", "out.gguf", "--sparsity", "0.5", "--method", "paper"][..], &QUICK].concat());
    let model = Model::open(&cli.path("out.gguf")).unwrap();
    let widths: Vec<usize> = model.hparams.blocks.iter().map(|b| b.n_ff).collect();
    assert!(widths.iter().max().unwrap() - widths.iter().min().unwrap() <= 32, "{widths:?}");
    opens_everywhere(&cli.path("out.gguf"), model.hparams.family.name());
}

#[test]
fn the_two_stage_baseline_takes_whole_attentions_and_equal_widths() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 6], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let job = Job {
        recipe: Recipe { n_ctx: 64, n_windows: 8, n_threads: 1, n_parallel: 8, ..Recipe::default() },
        settings: Settings { sparsity: 0.6, method: Method::TwoStage, ..Settings::default() },
        ..Job::new(cli.path("in.gguf"), cli.path("out.gguf"))
    };
    let outcome = putri_gguf::run(&job, &mut Silent).unwrap();
    let blocks = &outcome.after.blocks;
    assert!(blocks.iter().all(|b| b.n_head_kv == 0 || b.n_head_kv == 2), "{blocks:?}");
    assert!(blocks.iter().any(|b| b.n_head_kv == 0) && blocks[0].n_head_kv == 2, "{blocks:?}");
    let widths: Vec<usize> = blocks.iter().map(|b| b.n_ff).collect();
    assert!(widths.iter().max().unwrap() - widths.iter().min().unwrap() <= 32, "{widths:?}");
    assert!(outcome.sparsity >= 0.6 - 1e-6);
    opens_everywhere(&cli.path("out.gguf"), "deci");
}

#[test]
fn a_pruned_model_can_be_pruned_again() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("a.gguf"));
    cli.ok(&[&["a.gguf", "b.gguf", "--sparsity", "0.3"][..], &QUICK].concat());
    cli.ok(&[&["b.gguf", "c.gguf", "--sparsity", "0.3"][..], &QUICK].concat());
    let c = GgufFile::open(&cli.path("c.gguf")).unwrap();
    assert_eq!(c.metadata().iter().filter(|(k, _)| k == "putri.version").count(), 1);
    opens_everywhere(&cli.path("c.gguf"), c.get_str("general.architecture").unwrap().unwrap());
}

#[test]
fn changed_tensors_get_the_type_that_was_asked_for() {
    silence_logs();
    let cli = Cli::new();
    TestModel { ty: Type::Q4_0, blocks: vec![(4, 2, 256); 3], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    let args = ["in.gguf", "out.gguf", "--sparsity", "0.3", "--tensor-type", "ffn_down=q8_0"];
    cli.ok(&[&args[..], &QUICK].concat());
    let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
    for t in out.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.ne.len() == 2) {
        let wanted = if t.name.contains("ffn_down") { Type::Q8_0 } else { Type::Q4_0 };
        assert_eq!(t.ty, wanted, "{}", t.name);
    }
}

#[test]
fn sparsity_zero_is_the_same_bytes() {
    let cli = Cli::new();
    TestModel { ty: Type::Q8_0, biases: true, ..TestModel::default() }.write(&cli.path("in.gguf"));
    cli.ok(&["in.gguf", "out.gguf", "--sparsity", "0"]);
    let read = |n: &str| std::fs::read(cli.path(n)).unwrap();
    assert!(read("in.gguf") == read("out.gguf"));
}

#[test]
fn the_same_job_gives_the_same_bytes_whatever_the_threads() {
    silence_logs();
    let cli = Cli::new();
    std::fs::write(cli.path("text.txt"), TEXT).unwrap();
    let wide = TestModel { ty: Type::Q4_0, blocks: vec![(4, 2, 384); 3], ..TestModel::default() };
    let mixture = TestModel { experts: Some([8, 2, 0]), blocks: vec![(4, 2, 96); 3], ..TestModel::default() };
    for (small, more) in [
        (wide.clone(), &[][..]),
        (TestModel { arch: "gemma3", ..wide }, &[]),
        (mixture.clone(), &[]),
        (mixture, &["--experts", "narrow"]),
    ] {
        small.write(&cli.path("in.gguf"));
        let run = |threads: &str| {
            let args = ["in.gguf", "out.gguf", "--sparsity", "0.4", "-f", "text.txt", "--force", "-q"];
            // Enough windows for several chunks, and for several groups that are written side by side.
            let done = cli.run(&[&args[..], more, &["-c", "64", "--chunks", "24", "-t", threads]].concat());
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{said}");
            (std::fs::read(cli.path("out.gguf")).unwrap(), said)
        };
        let (one, _) = run("1");
        assert!(run("2").0 == one, "{} {more:?}", small.arch);
        // More threads than processors would only wait for each other.
        let (many, said) = run("512");
        assert!(many == one, "{} {more:?}", small.arch);
        assert!(said.contains("so --threads 512 counts as"), "{said}");
    }
}

#[test]
fn smollm2_is_pruned_with_text_and_its_own() {
    silence_logs();
    let cli = Cli::new();
    let model = smollm2();
    std::fs::write(cli.path("text.txt"), TEXT.repeat(4)).unwrap();
    let before = std::fs::read(&model).unwrap();
    let args = [
        arg(&model),
        "out.gguf",
        "--sparsity",
        "0.2",
        "-f",
        "text.txt",
        "--ctx-size",
        "128",
        "--chunks",
        "8",
    ];
    let args = [&args[..], &["--threads", "1"]].concat();
    let text = cli.ok(&args);
    println!("{text}");
    assert!(std::fs::read(&model).unwrap() == before, "the source is never touched");
    let path = cli.path("out.gguf");
    opens_everywhere(&path, "deci");
    let (a, b) = (GgufFile::open(&model).unwrap(), GgufFile::open(&path).unwrap());
    // The tokenizer is unchanged, and ffn_down keeps its type.
    for (k, v) in a.metadata().iter().filter(|(k, _)| k.starts_with("tokenizer.")) {
        assert_eq!(b.get(k), Some(v), "{k}");
    }
    for t in b.tensors() {
        let (block_part, is_new) = (t.name.rsplit('.').nth(1).unwrap(), a.find(&t.name).is_none());
        if is_new {
            let biased = ["attn_output", "ffn_down"].contains(&block_part) && t.name.ends_with(".bias");
            assert!(biased && t.ty == Type::F32, "{} {}", t.name, t.ty);
        } else {
            assert_eq!(t.ty, a.find(&t.name).unwrap().ty, "{}", t.name);
        }
    }
    assert!(b.n_bytes() < a.n_bytes() * 92 / 100);
}
