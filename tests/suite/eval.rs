//! Results of `eval`, compared with sums over the logits of the crate's own forward pass.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use crate::common::{TEXT, our_logits};
use putri_gguf::ggml::{LlamaModel, silence_logs};
use serde_json::Value as Json;

const N_CTX: usize = 64;

fn small() -> TestModel {
    TestModel { blocks: vec![(4, 2, 96); 3], ..TestModel::default() }
}

fn cli() -> Cli {
    silence_logs();
    let cli = Cli::new();
    small().write(&cli.path("a.gguf"));
    TestModel { seed: 2, ..small() }.write(&cli.path("b.gguf"));
    std::fs::write(cli.path("t.txt"), TEXT.to_owned() + "\n").unwrap();
    cli
}

fn eval(cli: &Cli, args: &[&str]) -> Json {
    let common = ["-t", "1", "-q", "--json", "--no-speed"];
    serde_json::from_str(&cli.ok(&[&["eval", "a.gguf"][..], args, &common].concat())).unwrap()
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
    row.iter().map(|v| f64::from(*v) - sum.ln()).collect()
}

#[test]
fn both_protocols_score_the_tokens_that_they_should() {
    let cli = cli();
    let model = LlamaModel::load_vocab(&cli.path("a.gguf")).unwrap();
    let vocab = model.vocab();
    let text = vocab.tokenize(TEXT, false).unwrap();
    let bos = vocab.bos().unwrap();
    assert!(vocab.add_bos());
    for style in ["llama", "hf"] {
        // llama-perplexity puts BOS before the text, and in place of the first token of every window.
        let (mut tokens, first) = match style {
            "llama" => ([&[bos], &text[..]].concat(), N_CTX / 2),
            _ => (vocab.tokenize(&format!("{TEXT}\n"), false).unwrap(), 0),
        };
        tokens.truncate(tokens.len() / N_CTX * N_CTX);
        let (mut sum, mut base_sum, mut divergences, mut same) = (0.0, 0.0, Vec::new(), 0usize);
        for window in tokens.chunks_exact_mut(N_CTX) {
            if style == "llama" {
                window[0] = bos;
            }
            let [own, base] = ["a.gguf", "b.gguf"].map(|f| our_logits(&cli.path(f), window));
            let rows = |l: &[f32]| l.chunks_exact(288).map(log_softmax).collect::<Vec<_>>();
            let (own, base) = (rows(&own), rows(&base));
            for at in first..N_CTX - 1 {
                let next = window[at + 1] as usize;
                sum -= own[at][next];
                base_sum -= base[at][next];
                divergences.push(base[at].iter().zip(&own[at]).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
                let top = |row: &[f64]| (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j])).unwrap();
                same += usize::from(top(&own[at]) == top(&base[at]));
            }
        }
        divergences.sort_by(f64::total_cmp);
        let n = divergences.len() as f64;
        let args = ["--base", "b.gguf", "-f", "t.txt", "-c", "64", "--ppl-style", style];
        let found = eval(&cli, &args);
        let close = |found: &Json, expected: f64| {
            let found = found.as_f64().unwrap();
            assert!((found / expected - 1.0).abs() < 2e-3, "{style}: {found} for {expected}");
        };
        let text = &found["text"];
        assert_eq!(
            (&text["ppl_style"], &text["tokens"]),
            (&Json::from(style), &Json::from(divergences.len()))
        );
        close(&text["ppl"], (sum / n).exp());
        close(&text["base_ppl"], (base_sum / n).exp());
        let kl = &text["kl_divergence"];
        close(&kl["mean"], divergences.iter().sum::<f64>() / n);
        close(&kl["median"], divergences[((n - 1.0) / 2.0).round() as usize]);
        close(&kl["max"], *divergences.last().unwrap());
        let top1 = kl["top1"].as_f64().unwrap();
        // In a near tie, either ending may win.
        assert!((top1 - same as f64 / n).abs() < 2.5 / n, "{style}: {top1} for {}", same as f64 / n);
    }
}

#[test]
fn a_file_is_not_far_from_itself() {
    let cli = cli();
    let found = eval(&cli, &["--base", "a.gguf", "-f", "t.txt", "-c", "64", "--chunks", "2"]);
    let kl = &found["text"]["kl_divergence"];
    assert!(kl["max"].as_f64().unwrap().abs() < 1e-6 && kl["top1"] == 1.0, "{found}");
    assert_eq!(found["text"]["tokens"], 2 * 31);
    assert_eq!(found["bytes"]["file"], found["bytes"]["base"]);
}

#[test]
fn tasks_are_won_by_the_likeliest_ending_per_token() {
    let cli = cli();
    let model = LlamaModel::load_vocab(&cli.path("a.gguf")).unwrap();
    let vocab = model.vocab();
    let (mut file, mut right) = (String::new(), 0);
    for i in 0..6 {
        let context = format!("Number {i} of the questions is");
        let endings: Vec<String> =
            (0..4).map(|e| format!("{}{e}", "long ".repeat((i + e) % 3 + 1))).collect();
        let texts: Vec<Vec<i32>> = endings
            .iter()
            .map(|e| {
                let text = vocab.tokenize(&format!("{context} {e}"), false).unwrap();
                [&[vocab.bos().unwrap()], &text[..]].concat()
            })
            .collect();
        let given =
            (0..).take_while(|&j| texts.iter().all(|t| t.len() > j + 1 && t[j] == texts[0][j])).count();
        let score = |t: &Vec<i32>| {
            let logits = our_logits(&cli.path("a.gguf"), t);
            let rows: Vec<_> = logits.chunks_exact(288).map(log_softmax).collect();
            (given..t.len()).map(|j| rows[j - 1][t[j] as usize]).sum::<f64>() / (t.len() - given) as f64
        };
        let scores: Vec<f64> = texts.iter().map(score).collect();
        let best = (0..4).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        // Every other task is marked wrong.
        let marked = if i % 2 == 0 { best } else { (best + 1) % 4 };
        right += usize::from(marked == best);
        file += &format!("{context}\n{marked}\n{}\n", endings.join("\n"));
    }
    std::fs::write(cli.path("tasks.txt"), file).unwrap();
    let found = eval(&cli, &["--hellaswag", "tasks.txt"]);
    assert_eq!(
        (&found["tasks"]["n"], &found["tasks"]["file"]),
        (&Json::from(6), &Json::from(right as f64 / 6.0))
    );
    let one = eval(&cli, &["--hellaswag", "tasks.txt", "--hellaswag-tasks", "1", "--base", "b.gguf"]);
    assert_eq!((&one["tasks"]["n"], &one["tasks"]["file"]), (&Json::from(1), &Json::from(1.0)));
    assert!(one["tasks"]["base"].is_f64());
}

#[test]
fn speed_is_measured_and_tables_name_everything() {
    let cli = cli();
    let args = ["eval", "a.gguf", "--base", "b.gguf", "-f", "t.txt", "-c", "64", "-t", "1", "-q"];
    let text = cli.ok(&args);
    for part in [
        "perplexity",
        "KL divergence",
        "same top token",
        "reading",
        "writing",
        "tokens/s",
        "llama-perplexity",
    ] {
        assert!(text.contains(part), "no {part} in {text}");
    }
}

#[test]
fn a_model_of_few_positions_is_measured_within_them() {
    let cli = cli();
    let gpt2 = TestModel {
        arch: "gpt2",
        biases: true,
        fused_qkv: true,
        blocks: vec![(2, 2, 64); 2],
        n_embd: 32,
        n_ctx_train: 128,
        ..small()
    };
    gpt2.write(&cli.path("g.gguf"));
    let text = cli.ok(&["eval", "g.gguf", "-t", "1", "-q"]);
    assert!(text.contains("tokens/s"), "{text}");
    cli.fails(&["eval", "g.gguf", "-f", "t.txt", "-c", "256", "-q", "-t", "1"], 1, &["128 positions", "256"]);
    // Source and result continue a text for the report.
    let args = "g.gguf o.gguf --sparsity 0.2 -c 128 --chunks 4 -t 1 -q --report r.html";
    cli.ok(&args.split(' ').collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let cli = cli();
    cli.fails(&["eval", "nothing.gguf", "-f", "t.txt"], 1, &["nothing.gguf"]);
    cli.fails(&["eval", "a.gguf", "-f", "nothing.txt"], 1, &["nothing.txt"]);
    cli.fails(
        &["eval", "a.gguf", "-f", "t.txt", "-c", "16384", "-q"],
        1,
        &["t.txt", "one window takes 16384"],
    );
    cli.fails(&["eval", "a.gguf", "--no-speed"], 2, &["nothing to measure"]);
    for empty in ["", "\n\n", " \n"] {
        std::fs::write(cli.path("empty.txt"), empty).unwrap();
        cli.fails(&["eval", "a.gguf", "--hellaswag", "empty.txt"], 1, &["empty.txt"]);
    }
    std::fs::write(cli.path("bad.txt"), "a\n9\nb\nc\nd\ne\n").unwrap();
    cli.fails(&["eval", "a.gguf", "--hellaswag", "bad.txt"], 1, &["bad.txt", "line 2"]);
    TestModel { n_vocab: 300, ..small() }.write(&cli.path("c.gguf"));
    let args = ["eval", "a.gguf", "--base", "c.gguf", "-f", "t.txt", "-c", "64", "-q"];
    cli.fails(&args, 1, &["288 and 300", "cannot be compared"]);
}
