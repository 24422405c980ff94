//! Sparsities that a limit sets, and several on one calibration.

mod common;

use common::cli::Cli;
use common::small::Small;
use putri_gguf::ggml::silence_logs;
use putri_gguf::gguf::{GgufFile, Value};

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

fn sparsity(cli: &Cli, name: &str) -> f64 {
    match GgufFile::open(&cli.path(name)).unwrap().get("putri.sparsity") {
        Some(Value::F32(s)) => (f64::from(*s) * 1e4).round() / 1e4,
        other => panic!("{other:?}"),
    }
}

/// A figure of the summary's table: the last number of the line.
fn figure(text: &str, line: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(line)).unwrap();
    line.split_whitespace().filter_map(|w| w.parse().ok()).next_back().unwrap()
}

#[test]
fn the_largest_sparsity_within_a_limit_is_found() {
    silence_logs();
    let cli = Cli::new();
    for small in [
        Small { blocks: vec![(4, 2, 512); 4], ..Small::default() },
        Small { blocks: vec![(4, 2, 256); 7], ..Small::gemma3() },
    ] {
        small.write(&cli.path("in.gguf"));
        let at = |s: f64| {
            let text = s.to_string();
            cli.ok(&[&["in.gguf", "at.gguf", "--force", "--sparsity", &text][..], &QUICK].concat())
        };
        // Between what a fifth and what a third costs.
        let limit = (figure(&at(0.2), "KL divergence") + figure(&at(0.34), "KL divergence")) / 2.0;
        let text = limit.to_string();
        let said = cli.ok(&[&["in.gguf", "out.gguf", "--force", "--max-kld", &text][..], &QUICK].concat());
        assert!(figure(&said, "KL divergence") <= limit + 1e-4, "{said}");
        let found = sparsity(&cli, "out.gguf");
        println!("{}: {found} for {limit}", small.arch);
        assert!((0.2..0.34).contains(&found), "{found}");
        // The same as when that sparsity is asked for.
        at(found);
        let [a, b] = ["at.gguf", "out.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
        assert!(a == b, "{}", small.arch);
        assert!(figure(&at(found + 0.01), "KL divergence") > limit - 1e-4, "{found} is not the largest");
    }
    let said = cli.ok(&[&["in.gguf", "out.gguf", "--force", "--max-ppl-ratio", "1.05"][..], &QUICK].concat());
    assert!(said.contains("perplexity"));
    cli.fails(
        &[&["in.gguf", "x.gguf", "--max-kld", "1e-9"][..], &QUICK].concat(),
        3,
        &["no sparsity gives a KL divergence of", "1 %"],
    );
}

#[test]
fn nested_outputs_are_those_of_single_runs() {
    silence_logs();
    let cli = Cli::new();
    Small { blocks: vec![(4, 2, 256); 4], ..Small::default() }.write(&cli.path("in.gguf"));
    let said = cli.ok(&[&["in.gguf", "out.gguf", "--nested", "0.3,0.45,0.6"][..], &QUICK].concat());
    for (share, name) in [("0.3", "out-30.gguf"), ("0.45", "out-45.gguf"), ("0.6", "out-60.gguf")] {
        assert!(said.lines().any(|l| l == name), "{said}");
        cli.ok(&[&["in.gguf", "one.gguf", "--force", "--sparsity", share][..], &QUICK].concat());
        let [a, b] = [name, "one.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
        assert!(a == b, "{name}");
    }
    assert!(!cli.path("out.gguf").exists());
    // One that is there already is seen before any work.
    std::fs::remove_file(cli.path("out-30.gguf")).unwrap();
    let args = ["in.gguf", "out.gguf", "--nested", "0.3,0.45"];
    cli.fails(&[&args[..], &QUICK].concat(), 1, &["out-45.gguf", "--force"]);
}
