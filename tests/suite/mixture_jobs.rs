//! Jobs on mixtures of experts, as a user runs them: statistics, texts, targets, interruptions, verification.

use crate::common::TEXT;
use crate::common::cli::Cli;
use crate::common::mixture_models::MixtureModel;
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::{GgufFile, OutTensor, TensorData, Value, write_gguf, write_parts};
use serde_json::Value as Json;
use std::borrow::Cow;
use std::path::Path;

/// Options that keep runs short.
const QUICK: [&str; 9] = ["-f", "text.txt", "--self-share", "0", "-c", "64", "--chunks", "8", "-q"];

/// Folder with the model called `name` and a text.
fn with(name: &str) -> Cli {
    silence_logs();
    let cli = Cli::new();
    MixtureModel::of(name).write(&cli.path("in.gguf"));
    std::fs::write(cli.path("text.txt"), TEXT.repeat(12)).unwrap();
    let other: String = TEXT.chars().rev().collect();
    std::fs::write(cli.path("other.txt"), other.repeat(12)).unwrap();
    cli
}

fn prune(cli: &Cli, output: &str, more: &[&str]) -> String {
    cli.ok(&[&["in.gguf", output, "--threads", "1"][..], more, &QUICK].concat())
}

fn numbers(file: &GgufFile, key: &str) -> Vec<u64> {
    file.get(key).and_then(Value::as_unsigned_array).unwrap()
}

/// Kept experts of all layers.
fn kept(path: &Path) -> Vec<u64> {
    numbers(&GgufFile::open(path).unwrap(), "putri.experts.kept")
}

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

const AS_CHOSEN: [&str; 4] = ["--refine", "0", "--refit-routers", "0"];

#[test]
fn statistics_can_be_taken_once_and_used_for_any_share() {
    let cli = with("qwen3moe");
    let quick = |output: &str, more: &[&str]| prune(&cli, output, &[more, &AS_CHOSEN].concat());
    quick("a.gguf", &["--sparsity", "0.5", "--stats-out", "s.json"]);
    quick("b.gguf", &["--sparsity", "0.5", "--stats-in", "s.json"]);
    assert_eq!(kept(&cli.path("a.gguf")), kept(&cli.path("b.gguf")));
    quick("c.gguf", &["--sparsity", "0.25", "--stats-in", "s.json"]);
    quick("d.gguf", &["--sparsity", "0.25"]);
    assert_eq!(kept(&cli.path("c.gguf")), kept(&cli.path("d.gguf")));
    let stats = json(&cli.path("s.json"));
    assert_eq!(stats["n_expert"], 8);
    assert_eq!(stats["texts"][0]["name"], "text.txt");
    let tokens = &stats["texts"][0]["layers"]["0"]["tokens"];
    let all: u64 = tokens.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(all, 2 * stats["texts"][0]["tokens"].as_u64().unwrap(), "two experts for a token");
    // A ranking from elsewhere needs no statistics.
    let layers: Vec<usize> =
        stats["scores"].as_object().unwrap().keys().map(|k| k.parse().unwrap()).collect();
    let scores: serde_json::Map<String, Json> =
        layers.iter().map(|l| (l.to_string(), (0..8).map(|e| e as f64).collect())).collect();
    let ranking = serde_json::json!({ "schema": 1, "n_expert": 8, "criterion": "mine", "scores": scores });
    std::fs::write(cli.path("r.json"), ranking.to_string()).unwrap();
    quick("e.gguf", &["--sparsity", "0.5", "--stats-in", "r.json"]);
    assert_eq!(kept(&cli.path("e.gguf")), [4, 5, 6, 7].repeat(layers.len()));
    let criterion = GgufFile::open(&cli.path("e.gguf")).unwrap().get("putri.experts.criterion").cloned();
    assert_eq!(criterion, Some(Value::Str("mine".into())));
}

#[test]
fn statistics_of_another_model_are_refused() {
    let cli = with("qwen3moe");
    let refused = |text: &str, parts: &[&str]| {
        std::fs::write(cli.path("s.json"), text).unwrap();
        let args = ["in.gguf", "out.gguf", "--sparsity", "0.5", "--stats-in", "s.json"];
        cli.fails(&[&args[..], &QUICK].concat(), 1, &[&["s.json"][..], parts].concat());
    };
    refused("experts", &["no statistics file"]);
    refused(r#"{"schema":9,"n_expert":8,"scores":{"0":[1]}}"#, &["schema 9"]);
    refused(r#"{"schema":1,"n_expert":9,"scores":{"0":[1]}}"#, &["9 experts", "8"]);
    refused(r#"{"schema":1,"n_expert":8,"architecture":"dbrx","scores":{"0":[1]}}"#, &["dbrx", "qwen3moe"]);
    refused(r#"{"schema":1,"n_expert":8,"scores":{"7":[1]}}"#, &["layers [7]"]);
    refused(r#"{"schema":1,"n_expert":8}"#, &["neither"]);
}

#[test]
fn impossible_shares_are_refused_before_any_work() {
    let cli = with("deepseek2");
    let refused = |s: &str, parts: &[&str]| {
        cli.fails(&[&["in.gguf", "out.gguf", "--sparsity", s][..], &QUICK].concat(), 1, parts);
    };
    refused("0.01", &["rounds to none", "25"]);
    // Two groups of four experts, of which a token uses two from one group.
    refused("0.8", &["at least 4", "groups"]);
    let cli = with("qwen3moe");
    cli.fails(&[&["in.gguf", "out.gguf", "--sparsity", "0.9"][..], &QUICK].concat(), 1, &["at least 2"]);
    let text = std::fs::read(cli.path("in.gguf")).unwrap();
    std::fs::write(cli.path("in.gguf"), &text[..text.len() / 2]).unwrap();
    cli.fails(&[&["in.gguf", "out.gguf", "--sparsity", "0.5"][..], &QUICK].concat(), 1, &["cut short"]);
}

#[test]
fn texts_count_in_any_order_and_protect_their_own() {
    let cli = with("qwen3moe");
    let quick = |output: &str, files: [&str; 2], more: &[&str]| {
        let args =
            ["in.gguf", output, "--sparsity", "0.5", "--self-share", "0", "-c", "64", "--chunks", "8", "-q"];
        let files = ["-f", files[0], "-f", files[1], "--threads", "1"];
        cli.ok(&[&args[..], &files, more].concat())
    };
    let said = quick("a.gguf", ["text.txt", "other.txt"], &["--refine", "1"]);
    quick("b.gguf", ["other.txt", "text.txt"], &["--refine", "1"]);
    assert_eq!(kept(&cli.path("a.gguf")), kept(&cli.path("b.gguf")));
    assert!(
        said.contains("text.txt") && said.contains("other.txt") && said.contains("worst first"),
        "{said}"
    );
    // Each text protects the expert that it needs most.
    let protect = [&["--protect", "0.1", "--stats-out", "s.json"][..], &AS_CHOSEN].concat();
    quick("c.gguf", ["text.txt", "other.txt"], &protect);
    let (stats, kept) = (json(&cli.path("s.json")), kept(&cli.path("c.gguf")));
    for text in stats["texts"].as_array().unwrap() {
        for (i, (layer, used)) in text["layers"].as_object().unwrap().iter().enumerate() {
            let of = |key: &str, e: usize| used[key][e].as_f64().unwrap();
            let score = |e: usize| {
                let n = of("tokens", e);
                if n > 0.0 { of("energy", e) / n * (n / 32.0).min(1.0) } else { 0.0 }
            };
            let top = (0..8).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap();
            let here = &kept[4 * i..4 * (i + 1)];
            assert!(here.contains(&(top as u64)), "{layer}: {top} is not in {here:?}");
        }
    }
}

#[test]
fn targets_and_limits_are_met() {
    let cli = with("qwen3moe");
    let size = |name: &str| std::fs::metadata(cli.path(name)).unwrap().len();
    let goal = (size("in.gguf") * 3 / 4).to_string();
    prune(&cli, "a.gguf", &[&["--target-size", &goal][..], &AS_CHOSEN].concat());
    assert!(size("a.gguf") <= goal.parse().unwrap());
    let n_keep = kept(&cli.path("a.gguf")).len();
    assert!(!n_keep.is_multiple_of(8) && n_keep > 0);
    prune(&cli, "b.gguf", &[&["--max-kld", "100"][..], &AS_CHOSEN].concat());
    let file = GgufFile::open(&cli.path("b.gguf")).unwrap();
    assert_eq!(file.get_u32("qwen3moe.expert_count").unwrap(), Some(2));
    let out = cli.run(&[&["in.gguf", "c.gguf", "--max-kld", "1e-12"][..], &AS_CHOSEN, &QUICK].concat());
    assert_eq!(out.status.code(), Some(3));
    // Several results of one observation are those of runs of their own.
    prune(&cli, "n.gguf", &[&["--nested", "0.25,0.5"][..], &AS_CHOSEN].concat());
    for (percent, share) in [("25", "0.25"), ("50", "0.5")] {
        prune(&cli, "own.gguf", &[&["--sparsity", share, "--force"][..], &AS_CHOSEN].concat());
        let nested = std::fs::read(cli.path(&format!("n-{percent}.gguf"))).unwrap();
        assert!(nested == std::fs::read(cli.path("own.gguf")).unwrap(), "{share}");
    }
}

/// Writes `source` to `target` with other bytes for tensors, and other values for keys.
fn edited(
    source: &Path,
    target: &Path,
    tensor: impl Fn(&str, &[usize], &[u8]) -> Option<(Vec<usize>, Vec<u8>)>,
    value: impl Fn(&str, &Value) -> Option<Value>,
) {
    let source = GgufFile::open(source).unwrap();
    let metadata: Vec<_> = source
        .metadata()
        .iter()
        .map(|(k, v)| (k.clone(), value(k, v).unwrap_or_else(|| v.clone())))
        .collect();
    let tensors = source.tensors().iter().map(|t| {
        let (ne, bytes) =
            tensor(&t.name, &t.ne, source.data(t)).unwrap_or((t.ne.clone(), source.data(t).to_vec()));
        OutTensor {
            name: t.name.clone(),
            ty: t.ty,
            ne,
            data: TensorData::made(move || Ok(Cow::Owned(bytes.clone()))),
        }
    });
    let tensors: Vec<OutTensor> = tensors.collect();
    write_gguf(&mut std::fs::File::create(target).unwrap(), target, &metadata, &tensors).unwrap();
}

#[test]
fn verify_catches_planted_faults() {
    for name in ["qwen3moe", "gpt-oss", "deepseek2", "deepseek4", "glm4moe, MTP", "grovemoe"] {
        let cli = with(name);
        prune(&cli, "out.gguf", &[&["--sparsity", "0.5"][..], &AS_CHOSEN].concat());
        let verify = ["verify", "bad.gguf", "--source", "in.gguf", "-q"];
        cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-q"]);
        let (good, bad) = (cli.path("out.gguf"), cli.path("bad.gguf"));
        let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
        let same = |_: &str, _: &Value| None;
        // The tensor `part` as the source has it, so that it was not cut.
        let uncut = |part: &str| {
            let mut found = false;
            edited(
                &good,
                &bad,
                |name, _, _| {
                    let t = source.find(name).filter(|_| name.ends_with(part))?;
                    Some((t.ne.clone(), source.data(t).to_vec()))
                },
                same,
            );
            for t in GgufFile::open(&bad).unwrap().tensors() {
                found |= t.name.ends_with(part);
            }
            assert!(found, "{name} has no {part}");
            cli.fails(&verify, 1, &["expert_count", part.rsplit('.').next().unwrap()]);
        };
        match name {
            "gpt-oss" => uncut("ffn_down_exps.bias"),
            "deepseek2" => uncut("exp_probs_b.bias"),
            "deepseek4" => uncut("exp_probs_b_vl.bias"),
            "glm4moe, MTP" => uncut("2.ffn_gate_exps.weight"),
            _ => uncut("ffn_gate_inp.weight"),
        }
        // Two experts change places in one tensor.
        edited(
            &good,
            &bad,
            |name, ne, bytes| {
                let each = bytes.len() / ne.last().filter(|_| name.ends_with("ffn_up_exps.weight"))?;
                let swapped = [&bytes[each..2 * each], &bytes[..each], &bytes[2 * each..]].concat();
                Some((ne.to_vec(), swapped))
            },
            same,
        );
        cli.fails(&verify, 1, &["checks failed"]);
        if name == "deepseek2" {
            // The file says that three experts of one group were kept, and one of the other.
            edited(
                &good,
                &bad,
                |_, _, _| None,
                |key, value| {
                    let mut kept = value.as_unsigned_array().filter(|_| key == "putri.experts.kept")?;
                    kept.chunks_mut(4).for_each(|k| k.copy_from_slice(&[0, 1, 2, 4]));
                    Some(Value::i32_array(&kept.iter().map(|e| *e as i32).collect::<Vec<_>>()))
                },
            );
            let said = cli.run(&verify);
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            assert!(said.contains("of group 0 are kept"), "{said}");
        }
        if name == "deepseek4" {
            edited(
                &good,
                &bad,
                |name, ne, bytes| {
                    let table = name.contains("tid2eid").then_some(bytes)?;
                    Some((ne.to_vec(), [&table[..4], &table[..4], &table[8..]].concat()))
                },
                same,
            );
            let said = cli.run(&verify);
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            assert!(said.contains("name an expert twice"), "{said}");
        }
    }
}

#[test]
fn layers_that_draft_can_be_left_out() {
    for name in ["glm4moe, MTP", "qwen3next, fused, MTP", "step35, MTP"] {
        let cli = with(name);
        let said = prune(&cli, "kept.gguf", &[&["--sparsity", "0.5"][..], &AS_CHOSEN].concat());
        assert!(said.contains("MTP"), "{said}");
        let args = [&["--sparsity", "0.5", "--drop-mtp"][..], &AS_CHOSEN].concat();
        let dry = prune(&cli, "x.gguf", &[&args[..], &["--dry-run"]].concat());
        prune(&cli, "out.gguf", &args);
        let [source, file] = ["in.gguf", "out.gguf"].map(|f| GgufFile::open(&cli.path(f)).unwrap());
        let bytes = std::fs::metadata(cli.path("out.gguf")).unwrap().len();
        assert!(dry.contains(&format!("{bytes} bytes")), "{name}: {dry}");
        let arch = name.split(',').next().unwrap();
        let n = |f: &GgufFile| f.get_u32(&format!("{arch}.block_count")).unwrap().unwrap();
        let drafts = source.get_u32(&format!("{arch}.nextn_predict_layers")).unwrap().unwrap();
        assert_eq!(n(&file), n(&source) - drafts, "{name}");
        assert!(file.get(&format!("{arch}.nextn_predict_layers")).is_none());
        assert!(!file.tensors().iter().any(|t| t.name.contains("nextn")), "{name}");
        cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-q"]);
    }
}

#[test]
fn an_importance_matrix_is_cut_along() {
    let cli = with("qwen3moe");
    let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
    let entry = |name: String, ne: Vec<usize>, f: &dyn Fn(usize) -> f32| {
        let bytes: Vec<u8> = (0..ne.iter().product()).flat_map(|i| f(i).to_ne_bytes()).collect();
        OutTensor { name, ty: Type::F32, ne, data: TensorData::made(move || Ok(Cow::Owned(bytes.clone()))) }
    };
    let mut entries = Vec::new();
    for t in source.tensors().iter().filter(|t| t.ne.len() > 1 && t.name.starts_with("blk.")) {
        let n = t.ne.get(2).copied().unwrap_or(1);
        entries.push(entry(format!("{}.in_sum2", t.name), vec![t.ne[0], n], &|i| i as f32));
        entries.push(entry(format!("{}.counts", t.name), vec![1, n], &|i| 100.0 + i as f32));
    }
    let metadata = [("general.type".to_string(), Value::Str("imatrix".into()))];
    let path = cli.path("imatrix.gguf");
    write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &metadata, &entries).unwrap();
    let args = ["--sparsity", "0.5", "--imatrix", "imatrix.gguf", "--imatrix-out", "cut.gguf"];
    prune(&cli, "out.gguf", &[&args[..], &AS_CHOSEN].concat());
    let (cut, kept) = (GgufFile::open(&cli.path("cut.gguf")).unwrap(), kept(&cli.path("out.gguf")));
    assert_eq!(cut.tensors().len(), entries.len());
    let counts = cut.find("blk.0.ffn_down_exps.weight.counts").unwrap();
    let found = cut.floats(counts, 0..counts.n_rows()).unwrap();
    assert_eq!(found, kept[..4].iter().map(|e| 100.0 + *e as f32).collect::<Vec<_>>());
    // The importance matrix is of the pruned model: every entry has as many experts as its tensor.
    let file = GgufFile::open(&cli.path("out.gguf")).unwrap();
    for t in cut.tensors() {
        let name = t.name.strip_suffix(".in_sum2").or_else(|| t.name.strip_suffix(".counts")).unwrap();
        let of = file.find(name).unwrap().ne.get(2).copied().unwrap_or(1);
        assert_eq!(t.ne.get(1).copied().unwrap_or(1), of, "{}", t.name);
    }
    let args = ["in.gguf", "x.gguf", "--sparsity", "0.5", "--imatrix", "in.gguf", "--imatrix-out", "y.gguf"];
    cli.fails(&[&args[..], &AS_CHOSEN, &QUICK].concat(), 1, &["in.gguf", "no importance matrix"]);
}

#[test]
fn refinement_brings_the_predictions_closer() {
    // Ordinary routers, groups, and a table of experts by token.
    for name in ["qwen3moe", "gpt-oss", "deepseek2", "deepseek4", "grovemoe", "llama4", "minimax-m2"] {
        let cli = with(name);
        let args = ["--sparsity", "0.5", "--refine", "8", "--refit-routers", "2", "--report", "r.json"];
        prune(&cli, "out.gguf", &args);
        let report = json(&cli.path("r.json"));
        let steps = report["experts"]["steps"].as_array().unwrap();
        let of = |i: usize| steps[i]["kl_divergence"].as_f64().unwrap();
        assert!(steps.len() > 1, "{name}: {steps:?}");
        let best =
            (0..steps.len()).filter(|&i| steps[i]["kept"] == true).map(of).fold(f64::INFINITY, f64::min);
        assert!(best <= of(0), "{name}");
        let said = report["held_out"]["kl_divergence"].as_f64().unwrap();
        assert!((said - best).abs() < 1e-6 + 1e-3 * best, "{name}: {said} {best}");
        cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-q"]);
        println!("{name}: {steps:?}");
    }
}

#[test]
fn inspect_says_what_can_go() {
    let cli = with("deepseek2");
    let found: Json = serde_json::from_str(&cli.ok(&["inspect", "in.gguf", "--json"])).unwrap();
    assert_eq!(
        (&found["mixture"]["n_expert_least"], &found["mixture"]["n_expert_step"]),
        (&4.into(), &2.into())
    );
    assert!(cli.ok(&["inspect", "in.gguf"]).contains("in steps of 2"));
    for small in MixtureModel::all() {
        small.write(&cli.path("in.gguf"));
        let found: Json = serde_json::from_str(&cli.ok(&["inspect", "in.gguf", "--json"])).unwrap();
        assert_eq!(found["architecture"], small.arch);
        assert!(found["reachable_sparsity"].as_f64().unwrap() >= 0.5, "{}", small.name);
    }
    // The loader of llama4 depends on exactly 128 experts.
    MixtureModel::of("llama4").write(&cli.path("in.gguf"));
    let many = |key: &str, value: &Value| match value {
        Value::U32(8) if key.ends_with("expert_count") => Some(Value::U32(128)),
        _ => None,
    };
    edited(&cli.path("in.gguf"), &cli.path("bad.gguf"), |_, _, _| None, many);
    cli.fails(&["inspect", "bad.gguf"], 1, &["llama4", "128"]);
}

#[test]
fn a_split_mixture_becomes_one_file_or_as_many() {
    let cli = with("gpt-oss");
    let part = |i: usize| cli.path(&format!("big-{:05}-of-00003.gguf", i + 1));
    write_parts(&GgufFile::open(&cli.path("in.gguf")).unwrap(), 3, part).unwrap();
    let run = |output: &str, more: &[&str]| {
        let args = ["big-00001-of-00003.gguf", output, "--sparsity", "0.5", "--threads", "1"];
        cli.ok(&[&args[..], more, &AS_CHOSEN, &QUICK].concat());
    };
    run("one.gguf", &[]);
    run("many.gguf", &["--keep-split"]);
    let [one, many] = ["one.gguf", "many-00001-of-00003.gguf"].map(|f| GgufFile::open(&cli.path(f)).unwrap());
    assert_eq!(many.paths().count(), 3);
    for t in one.tensors() {
        assert_eq!(one.data(t), many.data(many.find(&t.name).unwrap()), "{}", t.name);
    }
    cli.ok(&["verify", "many-00001-of-00003.gguf", "--source", "big-00001-of-00003.gguf", "-q"]);
}
