//! Sparsities that follow from a quality limit, and several sparsities on one calibration.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::silence_logs;
use putri_gguf::gguf::{GgufFile, Value};
use serde_json::Value as Json;

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

fn sparsity(cli: &Cli, name: &str) -> f64 {
    match GgufFile::open(&cli.path(name)).unwrap().get("putri.sparsity") {
        Some(Value::F32(s)) => (f64::from(*s) * 1e4).round() / 1e4,
        other => panic!("{other:?}"),
    }
}

/// Figure of the summary's table: the last number of the line.
fn figure(text: &str, line: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(line)).unwrap();
    line.split_whitespace().filter_map(|w| w.parse().ok()).next_back().unwrap()
}

#[test]
fn the_largest_sparsity_within_a_limit_is_found() {
    silence_logs();
    let cli = Cli::new();
    for small in [
        TestModel { blocks: vec![(4, 2, 512); 4], ..TestModel::default() },
        TestModel { blocks: vec![(4, 2, 256); 7], ..TestModel::gemma3() },
    ] {
        small.write(&cli.path("in.gguf"));
        let at = |s: f64| {
            let text = s.to_string();
            cli.ok(&[&["in.gguf", "at.gguf", "--force", "--sparsity", &text][..], &QUICK].concat())
        };
        // The limit lies between the losses of a fifth and of a third.
        let limit = (figure(&at(0.2), "KL divergence") + figure(&at(0.34), "KL divergence")) / 2.0;
        let text = limit.to_string();
        let said = cli.ok(&[&["in.gguf", "out.gguf", "--force", "--max-kld", &text][..], &QUICK].concat());
        assert!(figure(&said, "KL divergence") <= limit + 1e-4, "{said}");
        let found = sparsity(&cli, "out.gguf");
        println!("{}: {found} for {limit}", small.arch);
        assert!((0.2..0.34).contains(&found), "{found}");
        // The file is the same as with that sparsity given.
        at(found);
        let [a, b] = ["at.gguf", "out.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
        assert!(a == b, "{}", small.arch);
        assert!(figure(&at(found + 0.01), "KL divergence") > limit - 1e-4, "{found} is not the largest");
    }
    let said = cli.ok(&[&["in.gguf", "out.gguf", "--force", "--max-ppl-ratio", "1.2"][..], &QUICK].concat());
    assert!(figure(&said, "perplexity") <= 1.2 + 5e-3, "{said}");
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
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let more = ["--report", "r.json", "--imatrix-out", "i.gguf"];
    let nested = [&["in.gguf", "out.gguf", "--nested", "0.3,0.45,0.6"][..], &more].concat();
    let said = cli.ok(&[&nested[..], &QUICK].concat());
    let json = |text: &[u8]| serde_json::from_slice::<Json>(text).unwrap();
    for (share, percent) in [("0.3", 30), ("0.45", 45), ("0.6", 60)] {
        let name = format!("out-{percent}.gguf");
        assert!(said.lines().any(|l| l == name), "{said}");
        let one = ["in.gguf", "one.gguf", "--force", "--imatrix-out", "one.imatrix", "--sparsity", share];
        cli.ok(&[&one[..], &QUICK].concat());
        let read = |f: &str| std::fs::read(cli.path(f)).unwrap();
        assert!(read(&name) == read("one.gguf"), "{name}");
        assert!(read(&format!("i-{percent}.gguf")) == read("one.imatrix"), "{name}");
        let report = json(&read(&format!("r-{percent}.json")));
        assert_eq!(report["output"]["path"], name);
        assert_eq!(report["options"]["sparsity"], share.parse::<f64>().unwrap());
        assert_eq!(report["output"]["sha256"], GgufFile::open(&cli.path(&name)).unwrap().sha256());
    }
    for file in ["out.gguf", "r.json", "i.gguf"] {
        assert!(!cli.path(file).exists(), "{file}");
    }
    let events = cli.ok(&[&nested[..], &["--force", "--json"], &QUICK].concat());
    let events: Vec<Json> = events.lines().map(|line| json(line.as_bytes())).collect();
    let done = events.iter().filter(|e| e["event"] == "done").map(|e| e["report"]["output"]["path"].clone());
    assert_eq!(done.collect::<Vec<_>>(), ["out-30.gguf", "out-45.gguf", "out-60.gguf"]);
    // Perplexity is shown while windows are scored.
    let verifies = |e: &&Json| e["stage"] == "verify" && e["event"] == "step";
    let notes: Vec<&str> = events.iter().filter(verifies).map(|e| e["note"].as_str().unwrap()).collect();
    assert!(notes.len() >= 3 && notes.iter().all(|n| n.starts_with("perplexity ")), "{notes:?}");
    // An existing output is detected before any work.
    for file in ["out-30.gguf", "i-30.gguf", "r-30.json", "i-45.gguf", "r-45.json"] {
        std::fs::remove_file(cli.path(file)).unwrap();
    }
    let nested = [&["in.gguf", "out.gguf", "--nested", "0.3,0.45"][..], &more].concat();
    cli.fails(&[&nested[..], &QUICK].concat(), 1, &["out-45.gguf", "--force"]);
    std::fs::remove_file(cli.path("out-45.gguf")).unwrap();
    std::fs::write(cli.path("r-45.json"), "").unwrap();
    cli.fails(&[&nested[..], &QUICK].concat(), 1, &["r-45.json", "--force"]);
}
