//! Forecast of a run's needs, compared with its actual needs.

mod common;

use common::cli::Cli;
use common::test_model::TestModel;
use putri_gguf::calibrate::Windows;
use putri_gguf::ggml::{Token, silence_logs};
use putri_gguf::gguf::GgufFile;
use putri_gguf::model::{FfnUnit, Model};
use putri_gguf::pipeline::{
    Calibration, HeadSettings, NoRoom, Observer, RecoverBudget, RecoverSettings, ResampleSettings, Settings,
    TuneSettings, WidthSettings, forecast, run, within_memory,
};
use putri_gguf::prune::NeuronCriterion;
use putri_gguf::report::Timings;
use putri_gguf::spill::SpillStore;

fn models() -> Vec<(&'static str, TestModel, usize, FfnUnit)> {
    let mixture = TestModel {
        arch: "qwen2moe",
        tied: false,
        experts: Some([8, 2, 64]),
        blocks: vec![(4, 2, 128); 4],
        n_embd: 128,
        head_dim: 32,
        ..TestModel::default()
    };
    let dense = [
        (
            "short windows",
            TestModel { blocks: vec![(8, 4, 512); 4], n_embd: 256, ..TestModel::default() },
            256,
        ),
        (
            "long windows",
            TestModel {
                blocks: vec![(4, 2, 384); 3],
                n_embd: 128,
                n_ctx_train: 1024,
                ..TestModel::default()
            },
            1024,
        ),
        (
            "gemma3",
            TestModel { arch: "gemma3", blocks: vec![(4, 1, 512); 7], n_embd: 128, ..TestModel::default() },
            256,
        ),
        (
            "deep",
            TestModel { arch: "gemma3", blocks: vec![(4, 1, 512); 20], n_embd: 128, ..TestModel::default() },
            256,
        ),
        (
            "deep, every block as wide as it should be",
            TestModel { blocks: vec![(4, 2, 256); 18], n_embd: 128, head_dim: 32, ..TestModel::default() },
            256,
        ),
        (
            "no gate",
            TestModel {
                arch: "arcee",
                head_dim: 32,
                blocks: vec![(4, 2, 512); 4],
                n_embd: 128,
                ..TestModel::default()
            },
            256,
        ),
        (
            "fused gate, written as deci",
            TestModel {
                arch: "phi3",
                head_dim: 32,
                blocks: vec![(4, 2, 512); 4],
                n_embd: 128,
                ..TestModel::default()
            },
            256,
        ),
    ];
    let dense = dense.into_iter().map(|(name, small, n_ctx)| (name, small, n_ctx, FfnUnit::Neuron));
    let mixtures = [
        ("experts", mixture.clone(), 256, FfnUnit::Expert),
        ("narrow experts", mixture, 256, FfnUnit::Neuron),
    ];
    dense.chain(mixtures).collect()
}

/// Stages as announced, and their progress.
#[derive(Default)]
struct Steps(Vec<[usize; 2]>);

impl Observer for Steps {
    fn stage(&mut self, _: &str, steps: usize) {
        self.0.push([steps, 0]);
    }
    fn step(&mut self, done: usize, _: &str) {
        let stage = self.0.last_mut().unwrap();
        assert!(done == stage[1] || done == stage[1] + 1, "step {done} after {}", stage[1]);
        stage[1] = done;
    }
}

#[test]
fn operations_are_those_that_graphs_count() {
    silence_logs();
    let cli = Cli::new();
    for (name, small, n_ctx, moe_unit) in models() {
        small.write(&cli.path("in.gguf"));
        let model = Model::open(&cli.path("in.gguf")).unwrap();
        let c = Calibration { n_ctx, n_fit: 6, n_held_out: 2 };
        let n_vocab = model.hparams.n_vocab as Token;
        let tokens = (0..(8 * n_ctx) as Token).map(|i| 3 + i * 31 % (n_vocab - 3)).collect();
        let windows = Windows { n_ctx, tokens, n_fit: 6, n_held_out: 2, n_self: 0 };
        // In a deep model with random weights, the search ends sooner than in others.
        let groups = Some(if small.blocks.len() > 16 { 0 } else { 4 });
        let settings = Settings {
            sparsity: 0.4,
            head_search: HeadSettings { groups, ..HeadSettings::default() },
            resample: ResampleSettings { copies: 2, ..ResampleSettings::default() },
            tune: TuneSettings { limit: 1024, ..TuneSettings::default() },
            moe_unit,
            recover: RecoverSettings {
                budget: small.experts.is_none().then_some(RecoverBudget::Tokens(1024)),
                tokens: Some(512),
                ..RecoverSettings::default()
            },
            ..Settings::default()
        };
        let mut said = forecast(&model, &c, &settings).unwrap();
        let mut steps = Steps::default();
        let mut watched = Timings::new(&mut steps);
        run(&model, &model, &windows, &settings, &mut (), &mut watched).unwrap();
        let stages = watched.finish().0;
        for (stage, [announced, done]) in stages.iter().zip(&steps.0) {
            // The search may run out of removable groups; preparing is a single step.
            let whole = !["heads", "tune, preparing"].contains(&stage.name.as_str());
            assert!(announced == done || !whole, "{name}, {}: {done} of {announced}", stage.name);
        }
        // Nothing is rounded if held-out windows gained nothing in so few steps.
        said.stages.retain(|s| s.name != "recover, rounding" || stages.iter().any(|ran| ran.name == s.name));
        assert_eq!(stages.len(), said.stages.len(), "{name}");
        for (stage, said) in stages.iter().zip(&said.stages) {
            let ratio = said.operations / stage.operations as f64;
            println!(
                "{name}, {}: {ratio:.3} of what was counted, {} {}",
                stage.name, said.operations, stage.operations
            );
            assert_eq!(stage.name, said.name);
            let bound = match stage.name.as_str() {
                // How often candidates are scored depends on the weights.
                "heads" => 2.0,
                // The blocks that lose heads depend on them, too; gradients do not go back through the first.
                "sensitivity" => 1.12,
                _ => 1.06,
            };
            assert!(ratio < bound && ratio > 1.0 / bound, "{name}, {}: {ratio}", stage.name);
        }
    }
}

#[test]
fn what_was_told_takes_no_time() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 512); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let model = Model::open(&cli.path("in.gguf")).unwrap();
    let c = Calibration { n_ctx: 256, n_fit: 6, n_held_out: 2 };
    let stages = |per_block_widths: bool, criterion: Option<NeuronCriterion>| {
        let widths = WidthSettings { per_layer: per_block_widths, ..WidthSettings::default() };
        let settings = Settings { widths, criterion, ..Settings::default() };
        let stages = forecast(&model, &c, &settings).unwrap().stages;
        ["widths", "neuron criterion"].map(|name| stages.iter().any(|s| s.name == name))
    };
    let told = Some(NeuronCriterion::Obs);
    assert_eq!([stages(true, None), stages(true, told)], [[true, true], [true, false]]);
    assert_eq!([stages(false, None), stages(false, told)], [[false, true], [false, false]]);
}

#[test]
fn a_dry_run_says_how_large_the_file_will_be_and_writes_nothing() {
    let cli = Cli::new();
    for (name, small, _, moe_unit) in models() {
        small.write(&cli.path("in.gguf"));
        let experts = if moe_unit == FfnUnit::Neuron { "narrow" } else { "whole" };
        let common =
            ["--sparsity", "0.4", "--experts", experts, "-c", "64", "--chunks", "8", "-t", "1", "-q"];
        let before = cli.listing();
        let text = cli.ok(&[&["in.gguf", "out.gguf", "--dry-run"][..], &common].concat());
        assert_eq!(cli.listing(), before);
        if small.experts.is_some() && moe_unit == FfnUnit::Expert {
            assert!(text.contains("to the byte"), "{text}");
            continue;
        }
        assert!(text.contains("blocks") && text.contains("GiB") && text.contains("in f32"), "{text}");
        let model = Model::open(&cli.path("in.gguf")).unwrap();
        let settings = Settings { sparsity: 0.4, moe_unit, ..Settings::default() };
        let c = Calibration { n_ctx: 64, n_fit: 8, n_held_out: 1 };
        let said = forecast(&model, &c, &settings).unwrap();
        cli.ok(&[&["in.gguf", "out.gguf", "--force"][..], &common].concat());
        let written = GgufFile::open(&cli.path("out.gguf")).unwrap();
        // The crate's own metadata and the padding are not counted, and weigh more in a small file.
        let (said, is) = (said.file_bytes as f64, written.n_bytes() as f64);
        assert!((said / is - 1.0).abs() < 0.02, "{name}: {said} for {is}");
        std::fs::remove_file(cli.path("out.gguf")).unwrap();
    }
}

#[test]
fn streams_go_into_files_where_memory_is_short() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let model = Model::open(&cli.path("in.gguf")).unwrap();
    let settings = Settings { sparsity: 0.4, ..Settings::default() };
    let c = Calibration { n_ctx: 64, n_fit: 4096, n_held_out: 8 };
    let whole = forecast(&model, &c, &settings).unwrap().memory() as u64;
    let within = |limit| within_memory(&model, &c, &settings, limit, cli.dir.path());
    assert!(within(whole + 1).unwrap().spill.is_memory());
    let spilling = within(whole - 1).unwrap();
    assert!(!spilling.spill.is_memory());
    assert!(forecast(&model, &c, &spilling).unwrap().memory() < whole as f64);
    let Err(NoRoom::Memory { least, .. }) = within(1 << 20) else { panic!("a megabyte is not enough") };
    assert!(within(least).is_ok(), "what is said to be needed is enough");

    // The spill store does not change the result.
    let common = ["--sparsity", "0.4", "-c", "64", "--chunks", "64", "-t", "1", "-q"];
    cli.ok(&[&["in.gguf", "memory.gguf"][..], &common].concat());
    let c = Calibration { n_fit: 64, ..c };
    let limit = (forecast(&model, &c, &settings).unwrap().memory() as u64 - 1).to_string();
    let args = [&["in.gguf", "files.gguf", "--max-memory", &limit][..], &common].concat();
    let said = cli.ok(&[&args[..], &["--dry-run"]].concat());
    assert!(said.contains("in files beside the output. 4096 tokens"), "{said}");
    cli.ok(&args);
    let [a, b] = ["memory.gguf", "files.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
    assert!(a == b);
    // One window at a time changes only the order of sums.
    let little = Settings { chunk_tokens: 1, spill: SpillStore::in_files(cli.dir.path().into()), ..settings };
    let limit = (forecast(&model, &c, &little).unwrap().memory() as u64 + 1).to_string();
    let args = [&["in.gguf", "little.gguf", "--max-memory", &limit][..], &common].concat();
    let said = cli.ok(&[&args[..], &["--dry-run"]].concat());
    assert!(said.contains("output. 64 tokens pass"), "{said}");
    cli.ok(&args);
    let shapes = |name: &str| -> Vec<(String, Vec<usize>)> {
        let file = GgufFile::open(&cli.path(name)).unwrap();
        file.tensors().iter().map(|t| (t.name.clone(), t.ne.clone())).collect()
    };
    assert_eq!(shapes("memory.gguf"), shapes("little.gguf"));
    cli.fails(
        &[&["in.gguf", "x.gguf", "--max-memory", "1M"][..], &common].concat(),
        1,
        &["--max-memory", "not enough", "needs"],
    );
}

#[test]
fn a_dry_run_names_types_and_why_they_change() {
    let cli = Cli::new();
    // A group of 4 query heads has 64 columns: three of four groups are not whole quantisation blocks of 256,
    // all of them are.
    let ty = putri_gguf::ggml::Type::from_name("q4_K").unwrap();
    let small = TestModel { ty, n_embd: 256, blocks: vec![(16, 4, 1024); 4], ..TestModel::default() };
    small.write(&cli.path("in.gguf"));
    let dry =
        |sparsity| cli.ok(&["in.gguf", "out.gguf", "--dry-run", "-c", "64", "-q", "--sparsity", sparsity]);
    let text = dry("0.25");
    assert!(text.contains("ffn_down     of   4 blocks, in q4_K\n"), "{text}");
    assert!(text.contains("architecture deci"), "{text}");
    let text = dry("0.6");
    assert!(text.contains("attn_output") && text.contains("in q5_0 instead of q4_K"), "{text}");
}
