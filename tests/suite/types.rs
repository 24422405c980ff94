//! Whole models in another mix of types: as llama-quantize writes them, and pruned.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::{FileType, LlamaModel, Type, quantize_file, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};

const QUICK: [&str; 9] =
    ["--sparsity", "0.3", "--ctx-size", "64", "--chunks", "8", "--threads", "1", "--quiet"];

fn small(ty: Type) -> TestModel {
    TestModel {
        n_embd: 256,
        head_dim: 64,
        blocks: vec![(4, 2, 1024); 4],
        ty,
        tied: false,
        ..TestModel::default()
    }
}

#[test]
fn types_are_those_of_llama_quantize() {
    silence_logs();
    let cli = Cli::new();
    small(Type::F16).write(&cli.path("in.gguf"));
    for name in ["Q4_K_M", "q8_0", "IQ4_XS", "Q2_K"] {
        cli.ok(&[&["in.gguf", "out.gguf", "--force", "--type", name][..], &QUICK].concat());
        LlamaModel::load(&cli.path("out.gguf")).unwrap();
        let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
        let flat = vec![("blk.0.ffn_up.weight".to_string(), vec![1.0f32; 256])];
        let file_type = FileType::from_name(name).unwrap();
        quantize_file(&cli.path("in.gguf"), &cli.path("whole.gguf"), file_type, &flat, false, 1).unwrap();
        let whole = GgufFile::open(&cli.path("whole.gguf")).unwrap();
        assert_eq!(out.get("general.file_type"), whole.get("general.file_type"));
        let mut quantised = 0;
        for t in whole.tensors() {
            // Blocks without attention have no such tensors.
            let Some(mine) = out.find(&t.name) else { continue };
            quantised += usize::from(t.ty.is_quantized());
            // Rows of attn_output that are not whole blocks of 256 fall back to another type.
            let fallback = mine.ty != t.ty && !mine.ne[0].is_multiple_of(t.ty.block_size());
            assert!(mine.ty == t.ty || fallback, "{name}: {} is {} instead of {}", t.name, mine.ty, t.ty);
        }
        assert!(quantised > 20, "{quantised}");
        assert_eq!(out.get_str("putri.method").unwrap(), Some("putri"));
    }
}

#[test]
fn types_that_rows_do_not_fit_are_named() {
    silence_logs();
    let cli = Cli::new();
    // Rows of 320 values are not whole blocks of 256; those of ffn_down are.
    let odd = TestModel {
        n_embd: 320,
        head_dim: 64,
        blocks: vec![(5, 5, 768); 3],
        ty: Type::F16,
        ..TestModel::default()
    };
    odd.write(&cli.path("in.gguf"));
    let said =
        cli.ok(&[&["in.gguf", "out.gguf", "--type", "Q4_K_M", "--report", "r.json"][..], &QUICK].concat());
    let note = said
        .lines()
        .find(|l| l.starts_with("note: ") && l.contains("ffn_up"))
        .unwrap_or_else(|| panic!("{said}"));
    assert!(note.contains("attn_q") && note.contains("in q5_0, not in a type of Q4_K_M"), "{note}");
    assert!(note.contains("rows of 320 values are no whole blocks of 256"), "{note}");
    let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
    assert_eq!(out.find("blk.0.ffn_up.weight").unwrap().ty, Type::Q5_0);
    assert_eq!(out.get("general.file_type"), Some(&Value::U32(FileType::from_name("Q5_0").unwrap().raw())));
    LlamaModel::load(&cli.path("out.gguf")).unwrap();
    let report = std::fs::read_to_string(cli.path("r.json")).unwrap();
    assert!(report.contains("no whole blocks of 256"), "{report}");
    // If all rows fit, there is no message.
    small(Type::F16).write(&cli.path("in.gguf"));
    let said = cli.ok(&[&["in.gguf", "out.gguf", "--type", "Q8_0", "--force"][..], &QUICK].concat());
    assert!(!said.contains("no whole blocks"), "{said}");
}

#[test]
fn in_f32_it_is_the_pruned_model_itself() {
    // Nothing is rounded, so the same job without --type has the same tensors.
    silence_logs();
    let cli = Cli::new();
    small(Type::F32).write(&cli.path("in.gguf"));
    cli.ok(&[&["in.gguf", "a.gguf"][..], &QUICK].concat());
    cli.ok(&[&["in.gguf", "b.gguf", "--type", "f32"][..], &QUICK].concat());
    let (a, b) = (GgufFile::open(&cli.path("a.gguf")).unwrap(), GgufFile::open(&cli.path("b.gguf")).unwrap());
    assert_eq!(a.tensors().len(), b.tensors().len());
    for t in a.tensors() {
        assert!(a.data(t) == b.data(b.find(&t.name).unwrap()), "{}", t.name);
    }
    assert_eq!(a.get("putri.source.sha256"), b.get("putri.source.sha256"));
    assert_eq!(b.get("general.file_type"), Some(&Value::U32(0)));
}

#[test]
fn what_it_is_compared_with_is_the_source() {
    // The perplexity before pruning is the source's, however coarse the types of the result are.
    silence_logs();
    let cli = Cli::new();
    small(Type::F16).write(&cli.path("in.gguf"));
    let before = |more: &[&str]| {
        let text = cli.ok(&[&["in.gguf", "out.gguf", "--force"][..], more, &QUICK].concat());
        let line = text.lines().find(|l| l.starts_with("perplexity")).expect("a row of the table");
        line.split_whitespace().find_map(|word| word.parse::<f64>().ok()).expect("a number")
    };
    assert_eq!(before(&[]), before(&["--type", "Q2_K"]));
}

#[test]
fn what_is_quantised_already_is_refused_unless_asked_for() {
    silence_logs();
    let cli = Cli::new();
    small(Type::Q8_0).write(&cli.path("in.gguf"));
    let args = [&["in.gguf", "out.gguf", "--type", "Q4_K_M"][..], &QUICK].concat();
    cli.fails(&args, 1, &["q8_0 already", "--allow-requantize"]);
    cli.ok(&[&args[..], &["--allow-requantize"]].concat());
    LlamaModel::load(&cli.path("out.gguf")).unwrap();
    assert_eq!(cli.listing().len(), 2, "no temporary file stays");
}
