//! Requested sizes of the result.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::GgufFile;

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

fn sizes(cli: &Cli, name: &str) -> (u64, u64) {
    let file = GgufFile::open(&cli.path(name)).unwrap();
    (file.n_bytes(), file.tensors().iter().map(|t| t.n_elements() as u64).sum())
}

fn models() -> Vec<(&'static str, TestModel)> {
    let q8 = TestModel { ty: Type::Q8_0, blocks: vec![(4, 2, 512); 4], ..TestModel::default() };
    let experts = Some([12, 2, 0]);
    vec![
        ("llama", q8.clone()),
        ("qwen3", TestModel { arch: "qwen3", ..q8.clone() }),
        ("phi3", TestModel { arch: "phi3", fused_qkv: true, ..q8.clone() }),
        (
            "gemma3",
            TestModel { ty: Type::Q4_0, n_embd: 64, blocks: vec![(4, 2, 512); 7], ..TestModel::gemma3() },
        ),
        ("experts", TestModel { arch: "qwen3moe", experts, blocks: vec![(4, 2, 96); 4], ..q8 }),
    ]
}

#[test]
fn they_are_kept_and_as_much_as_fits_stays() {
    silence_logs();
    let cli = Cli::new();
    for (name, small) in models() {
        small.write(&cli.path("in.gguf"));
        let (bytes, params) = sizes(&cli, "in.gguf");
        let n_blocks = small.blocks.len() as u64;
        // Smallest number of parameters that all blocks can lose together.
        let d = small.n_embd as u64;
        let step = n_blocks * if small.experts.is_some() { (3 * 96 + 1) * d } else { 32 * 3 * d };
        for share in [0.9, 0.7, 0.55] {
            for (flag, whole, slack) in
                [("--target-size", bytes, step * 9 / 8 + 8192), ("--target-params", params, step)]
            {
                let target = (whole as f64 * share) as u64;
                let text = target.to_string();
                cli.ok(&[&["in.gguf", "out.gguf", "--force", flag, &text][..], &QUICK].concat());
                let (bytes, params) = sizes(&cli, "out.gguf");
                let is = if flag == "--target-size" { bytes } else { params };
                println!("{name} {flag} {target}: {is}");
                assert!(is <= target, "{name}: {flag} {target} gave {is}");
                assert!(is + slack >= target, "{name}: {flag} {target} gave only {is}");
            }
        }
    }
}

#[test]
fn they_are_those_of_the_types_that_are_written() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 512); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let (bytes, _) = sizes(&cli, "in.gguf");
    let target = bytes / 5;
    let text = target.to_string();
    let args = ["in.gguf", "out.gguf", "--target-size", &text, "--type", "q8_0"];
    cli.ok(&[&args[..], &QUICK].concat());
    assert!(sizes(&cli, "out.gguf").0 <= target);
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    let cli = Cli::new();
    TestModel::default().write(&cli.path("in.gguf"));
    let fails = |args: &[&str], parts: &[&str]| {
        cli.fails(&[&["in.gguf", "out.gguf"][..], args, &QUICK].concat(), 1, parts);
    };
    fails(&["--target-size", "10M"], &["no larger than that"]);
    fails(&["--target-size", "50K"], &["too small", "MiB", "sparsity"]);
    fails(&["--target-params", "1K"], &["too small", "parameters"]);
}
