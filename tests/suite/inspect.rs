//! Output of `inspect` for a model.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::gguf::Value;
use putri_gguf::model::{Heads, Model};
use putri_gguf::pipeline::{Settings, check_budget};
use serde_json::Value as Json;

fn inspect(cli: &Cli) -> Json {
    serde_json::from_str(&cli.ok(&["inspect", "in.gguf", "--json"])).unwrap()
}

#[test]
fn it_counts_what_is_there_and_names_the_carrier() {
    let cli = Cli::new();
    let variants = [
        (TestModel::default(), "deci", true),
        (TestModel { arch: "qwen2", biases: true, ..TestModel::default() }, "deci", true),
        (TestModel { arch: "qwen3", ..TestModel::default() }, "openelm", true),
        (TestModel { arch: "qwen3", tied: false, ..TestModel::default() }, "qwen3", false),
        (
            TestModel { arch: "deci", blocks: vec![(4, 2, 96), (0, 0, 64)], ..TestModel::default() },
            "deci",
            true,
        ),
        (TestModel::gemma3(), "gemma3", false),
        (TestModel { arch: "starcoder2", ..TestModel::default() }, "starcoder2", false),
        (TestModel { arch: "qwen3moe", experts: Some([8, 2, 0]), ..TestModel::default() }, "qwen3moe", false),
    ];
    for (small, output_arch, per_block) in variants {
        small.write(&cli.path("in.gguf"));
        let found = inspect(&cli);
        let count = |part: &str| -> usize {
            let of = |name: &str| name.contains(part) && !name.contains("norm") && name.ends_with("weight");
            let parts = small.layout().into_iter().filter(|(name, ..)| of(name));
            parts.map(|(_, _, ne, _)| ne.iter().product::<usize>()).sum()
        };
        let params = &found["parameters"];
        assert_eq!(params["attention"], count("attn_"), "{}", small.arch);
        assert_eq!(params["feed_forward"], count("ffn_"), "{}", small.arch);
        assert_eq!(
            params["embeddings"],
            count("token_embd") + count("output.weight") - count("attn_output.weight")
        );
        assert_eq!(found["architecture"], small.arch);
        assert_eq!(found["bytes"], std::fs::metadata(cli.path("in.gguf")).unwrap().len());
        let heads: Vec<usize> = small.blocks.iter().map(|b| b.0).collect();
        assert_eq!(found["n_head"], Json::from(heads));
        assert_eq!(found["output_arch"]["architecture"], output_arch);
        assert_eq!(found["output_arch"]["per_block"], per_block);
        let text = cli.ok(&["inspect", "in.gguf"]);
        assert!(text.contains(found["output_arch"]["why"].as_str().unwrap()), "{text}");
    }
}

#[test]
fn the_sparsity_that_it_calls_reachable_is_and_more_is_not() {
    let cli = Cli::new();
    let mixture = TestModel { experts: Some([8, 2, 0]), ..TestModel::default() };
    for small in [TestModel::default(), TestModel::gemma3(), mixture] {
        small.write(&cli.path("in.gguf"));
        let reachable = inspect(&cli)["reachable_sparsity"].as_f64().unwrap();
        assert!(reachable > 0.3 && reachable < 1.0, "{reachable}");
        let dry =
            |s: f64| cli.run(&["in.gguf", "out.gguf", "--dry-run", "-c", "64", "--sparsity", &s.to_string()]);
        assert!(dry(reachable).status.success());
        // Shares of eight experts are rounded to the nearest.
        let more = if small.experts.is_some() { 0.0626 } else { 0.011 };
        assert!(!dry(reachable + more).status.success());
    }
}

/// Checks that heads removed at the same number per layer leave no gap below the sparsities that more of them
/// reach.
#[test]
fn every_sparsity_up_to_the_largest_can_be_had() {
    let cli = Cli::new();
    // With a step of 32 in 64 neurons, FFNs give up at most half, and heads the rest.
    let narrow = |n_kv| TestModel { blocks: vec![(8, n_kv, 64); 4], ..TestModel::default() };
    let mixtures = TestModel::mixtures().into_iter().map(|(_, small)| small);
    for small in [narrow(2), narrow(4), narrow(8), TestModel::gemma3()].into_iter().chain(mixtures) {
        small.write(&cli.path("in.gguf"));
        let model = Model::open(&cli.path("in.gguf")).unwrap();
        for heads in [Heads::Auto, Heads::Uniform, Heads::None] {
            let can = |percent: &u32| {
                let settings =
                    Settings { sparsity: f64::from(*percent) / 100.0, heads, ..Settings::default() };
                check_budget(&model, &settings).is_ok()
            };
            let reachable = (1..100).filter(can).count();
            let largest = (1..100).rev().find(can).unwrap();
            assert_eq!(reachable, largest as usize, "{} {heads:?} {:?}", small.arch, small.blocks[0]);
        }
    }
}

#[test]
fn what_cannot_be_pruned_is_said_in_a_line() {
    let cli = Cli::new();
    cli.fails(&["inspect", "nowhere.gguf"], 1, &["nowhere.gguf"]);
    let extra = vec![("expert_count", Value::U32(8))];
    TestModel { arch: "qwen2", extra, ..TestModel::default() }.write(&cli.path("in.gguf"));
    cli.fails(&["inspect", "in.gguf"], 1, &["in.gguf", "8 experts"]);
}
