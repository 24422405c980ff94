//! Report, for machines and as a page.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::silence_logs;
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Model;
use serde_json::Value as Json;

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

/// Names of all fields of `v`, at any depth.
fn fields(v: &Json) -> Vec<&str> {
    match v {
        Json::Object(o) => o.iter().flat_map(|(key, v)| [vec![key.as_str()], fields(v)].concat()).collect(),
        Json::Array(list) => list.iter().flat_map(fields).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn it_says_what_the_files_say() {
    silence_logs();
    let cli = Cli::new();
    let mixture = TestModel { experts: Some([8, 2, 0]), blocks: vec![(4, 2, 64); 3], ..TestModel::default() };
    for small in [TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }, mixture] {
        small.write(&cli.path("in.gguf"));
        let args =
            ["in.gguf", "out.gguf", "--sparsity", "0.5", "--report", "r.json", "--force", "--seed", "3"];
        cli.ok(&[&args[..], &QUICK].concat());
        let r: Json = serde_json::from_slice(&std::fs::read(cli.path("r.json")).unwrap()).unwrap();
        let [source, result] = ["in.gguf", "out.gguf"].map(|f| GgufFile::open(&cli.path(f)).unwrap());
        assert_eq!(r["schema"], 2);
        for (part, file) in [("input", &source), ("output", &result)] {
            assert_eq!(r[part]["sha256"], file.sha256(), "{part}");
        }
        for (part, file) in [("before", &source), ("after", &result)] {
            assert_eq!(r[part]["bytes"], file.n_bytes());
        }
        let h = Model::new(result).unwrap().hparams;
        assert_eq!(r["output"]["architecture"], h.family.name());
        for (b, found) in h.blocks.iter().zip(r["blocks"].as_array().unwrap()) {
            let after = &found["after"];
            assert_eq!(after["n_head"], b.n_head);
            assert_eq!(after["n_ff"], b.n_ff);
            assert_eq!(after["n_expert"], b.n_expert);
            assert_eq!(found["kept_groups"].as_array().unwrap().len(), b.n_head_kv);
            assert_eq!(found["loss"].is_f64(), small.experts.is_none());
        }
        let q = &r["held_out"];
        let ppl = |key: &str| q[key].as_f64().unwrap();
        assert!((ppl("ppl_after") / ppl("ppl_after_llama_cpp") - 1.0).abs() < 0.05);
        assert!(ppl("kl_divergence") > 0.0 && (0.0..=1.0).contains(&ppl("top1")));
        assert!(r["samples"]["after"].is_string() && !r["samples"]["prompt"].as_str().unwrap().is_empty());
        assert_eq!((&r["options"]["seed"], &r["options"]["sparsity"]), (&Json::from(3), &Json::from(0.5)));
        let by = Model::open(&cli.path("out.gguf")).unwrap().file.get("putri.neuron_criterion").cloned();
        assert_eq!(r["neuron_criterion"].as_str().map(|by| Value::Str(by.into())), by);
        assert_eq!(by.is_some(), small.experts.is_none());
        // The names are those of the command line.
        for (option, value) in [("method", "putri"), ("heads", "auto"), ("arch", "auto"), ("moe", "experts")]
        {
            assert_eq!(r["options"][option], value, "{option}");
        }
        assert_eq!(r["ffn_unit"], if small.experts.is_some() { "experts" } else { "neurons" });
        // The documentation explains every field.
        let explained = include_str!("../../docs/report.md");
        for field in fields(&r) {
            let names = [("`", "`"), (".", "`"), ("`", "."), ("`", "[]`")];
            let told = names.iter().any(|(a, b)| explained.contains(&format!("{a}{field}{b}")));
            assert!(told, "docs/report.md says nothing of {field}");
        }
    }
}

#[test]
fn the_page_needs_nothing_else_and_shows_every_block() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("a<b>&c.gguf"));
    cli.ok(&[&["a<b>&c.gguf", "out.gguf", "--sparsity", "0.4", "--report", "r.html"][..], &QUICK].concat());
    let page = std::fs::read_to_string(cli.path("r.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    for outside in ["http:", "https:", "<script", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("a&lt;b&gt;&amp;c.gguf") && !page.contains("a<b>"));
    for part in
        ["prefers-color-scheme: dark", "width=device-width", "block 3:", "KL divergence", "SHA-256", "seed"]
    {
        assert!(page.contains(part), "no {part}");
    }
    // Every opened element is closed.
    for tag in ["section", "figure", "svg", "div", "table", "tr", "td", "th", "title", "text", "g"] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn a_report_that_cannot_be_is_refused_before_any_work() {
    let cli = Cli::new();
    TestModel::default().write(&cli.path("in.gguf"));
    std::fs::write(cli.path("r.html"), "mine").unwrap();
    let fails = |report: &str, code: i32, parts: &[&str]| {
        let args = ["in.gguf", "out.gguf", "--sparsity", "0.3", "--report", report];
        cli.fails(&[&args[..], &QUICK].concat(), code, parts);
    };
    fails("r.html", 1, &["r.html", "--force"]);
    fails("nowhere/r.html", 1, &["nowhere/r.html"]);
    fails("r.txt", 2, &["r.txt", ".html", ".json"]);
}

#[test]
fn quant_baselines_are_the_mixes_that_come_closest_in_size() {
    silence_logs();
    let cli = Cli::new();
    // The model is wide enough for types in blocks of 256.
    let blocks = vec![(4, 2, 1024); 3];
    let ty = putri_gguf::ggml::Type::F16;
    TestModel { ty, n_embd: 256, head_dim: 64, blocks, ..TestModel::default() }.write(&cli.path("in.gguf"));
    let args = [
        "in.gguf",
        "out.gguf",
        "--sparsity",
        "0.25",
        "--type",
        "q6_k",
        "--compare-quant",
        "--report",
        "r.json",
    ];
    let text = cli.ok(&[&args[..], &QUICK].concat());
    let r: Json = serde_json::from_slice(&std::fs::read(cli.path("r.json")).unwrap()).unwrap();
    let quant_baselines = r["quant_baselines"].as_array().unwrap();
    let bytes = |i: usize| quant_baselines[i]["bytes"].as_u64().unwrap();
    assert_eq!(
        (quant_baselines.len(), &quant_baselines[0]["name"], &r["after"]["bytes"]),
        (3, &Json::from("pruned"), &quant_baselines[0]["bytes"])
    );
    assert!(bytes(1) <= bytes(0) && bytes(0) < bytes(2), "{quant_baselines:?}");
    for file in quant_baselines {
        assert!(text.contains(file["name"].as_str().unwrap()), "{text}");
        assert!(file["kl_divergence"].as_f64().unwrap() > 0.0 && file["ppl"].as_f64().unwrap() > 1.0);
    }
    // No temporary files are left.
    let names: Vec<_> = cli.listing().into_iter().map(|(p, _)| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["in.gguf", "out.gguf", "r.json"]);
}

#[test]
fn events_are_lines_for_a_machine() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let args = ["in.gguf", "out.gguf", "--sparsity", "0.4", "--heads", "per-layer", "--json"];
    let text = cli.ok(&[&args[..], &QUICK].concat());
    let events: Vec<Json> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (done, others) = events.split_last().unwrap();
    assert_eq!((&done["event"], &done["report"]["schema"]), (&Json::from("done"), &Json::from(2)));
    assert_eq!(done["report"]["options"]["heads"], "per-layer");
    let mut stage = Json::Null;
    for e in others {
        match e["event"].as_str().unwrap() {
            "stage" => stage = e["stage"].clone(),
            "step" => assert!(e["stage"] == stage && e["done"].is_u64() && e["note"].is_string(), "{e}"),
            other => panic!("{other}"),
        }
    }
    assert!(others.iter().any(|e| e["stage"] == "blocks" && e["done"] == 4), "{text}");
}
