//! Calibration windows are reproducible, have the right length and the right origin.

use crate::common::test_model::TestModel;
use crate::common::{TEXT, smollm2};
use putri_gguf::calibrate::{
    CalibrateError, Origin, Recipe, Schedule, Windows, collect, collect_texts, generate,
};
use putri_gguf::evaluate::{Protocol, evaluate};
use putri_gguf::ggml::{LlamaModel, Token, silence_logs};

fn recipe(n_ctx: usize, n_windows: usize, self_share: f64) -> Recipe {
    Recipe {
        n_ctx,
        n_windows,
        files: Vec::new(),
        weights: Vec::new(),
        encoding: None,
        parse_special: false,
        start: None,
        self_share,
        chat_share: 0.0,
        seed: 3,
        n_threads: 1,
        n_parallel: 64,
    }
}

#[test]
fn generation_is_seeded_and_each_window_stands_alone() {
    silence_logs();
    let model = LlamaModel::load(&smollm2()).unwrap();
    let write = |n_windows: usize, seed: u64| {
        generate(
            &model,
            &Schedule { n_ctx: 24, n_windows, seed, chat_share: 0.0, n_parallel: 64, start: None },
            1,
            &mut |_, _| true,
        )
        .unwrap()
    };
    let a = write(4, 5);
    assert_eq!(a, write(4, 5));
    assert_ne!(a, write(4, 6));
    assert!(a.iter().all(|w| w.len() == 24 && w[0] == model.vocab().bos().unwrap()));
    assert!(a.iter().enumerate().all(|(i, w)| a[..i].iter().all(|v| v != w)), "two windows are the same");
}

#[test]
fn chats_follow_the_models_template() {
    silence_logs();
    let model = LlamaModel::load(&smollm2()).unwrap();
    let schedule =
        Schedule { n_ctx: 200, n_windows: 6, seed: 2, chat_share: 0.5, n_parallel: 64, start: None };
    let windows = generate(&model, &schedule, 1, &mut |_, _| true).unwrap();
    let texts: Vec<String> = windows.iter().map(|w| model.vocab().detokenize(w)).collect();
    let prompt = model.chat(&[("user", "hello")], true).unwrap();
    let (before, after) = prompt.split_once("hello").unwrap();
    let chats: Vec<&String> = texts.iter().filter(|t| t.starts_with(before)).collect();
    assert_eq!(chats.len(), 3, "{texts:?}");
    // The message ends, the reply begins, and the prefix is given once.
    let replied: Vec<_> = chats.iter().filter(|t| t.contains(after)).collect();
    assert!(!replied.is_empty(), "{chats:?}");
    for text in replied {
        let message = &text[before.len()..text.find(after).unwrap()];
        assert!(!message.trim().is_empty() && !message.contains("<|im_end|>"), "{message}");
    }
    // A model without a template has no conversations.
    let dir = tempfile::tempdir().unwrap();
    TestModel::default().write(&dir.path().join("m.gguf"));
    let plain = LlamaModel::load(&dir.path().join("m.gguf")).unwrap();
    let refused = generate(&plain, &schedule, 1, &mut |_, _| true);
    assert!(matches!(refused, Err(CalibrateError::NoTemplate)));
}

#[test]
fn a_likely_continuation_is_likely() {
    // Sampled text must be far likelier to the model than random tokens are.
    silence_logs();
    let path = smollm2();
    let model = LlamaModel::load(&path).unwrap();
    let own = generate(
        &model,
        &Schedule { n_ctx: 64, n_windows: 8, seed: 1, chat_share: 0.0, n_parallel: 3, start: None },
        1,
        &mut |_, _| true,
    )
    .unwrap();
    let ppl = evaluate(&model, None, &own, Protocol::Hf, 1, |_, _| true).unwrap().ppl;
    println!("perplexity of self-generated text: {ppl:.1}");
    assert!(ppl < 1000.0, "{ppl}");
}

#[test]
fn windows_come_from_text_and_model_by_share() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (path, text) = (dir.path().join("m.gguf"), dir.path().join("t.txt"));
    TestModel::default().write(&path);
    std::fs::write(&text, TEXT.repeat(3)).unwrap();
    let model = LlamaModel::load(&path).unwrap();
    for (share, n_self) in [(0.0, 0), (0.5, 4), (1.0, 8)] {
        let r = Recipe { files: vec![text.clone()], ..recipe(32, 8, share) };
        let w = collect(&model, &r, &mut Vec::new(), |_, _, _| true).unwrap();
        assert_eq!((w.n_fit, w.n_self), (8, n_self), "share {share}");
        assert!(w.n_held_out >= 1);
        assert_eq!(w.tokens.len(), w.n_windows() * 32);
        assert_eq!(w.targets(0..1).iter().filter(|t| t.is_some()).count(), 31);
    }
    // The byte-level tokenizer adds BOS, so every window from text begins with it.
    let r = Recipe { files: vec![text], ..recipe(32, 8, 0.0) };
    let w = collect(&model, &r, &mut Vec::new(), |_, _, _| true).unwrap();
    assert!(w.tokens.chunks(32).all(|c| c[0] == 1));
}

#[test]
fn little_text_gives_fewer_windows_and_none_an_error() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (path, text) = (dir.path().join("m.gguf"), dir.path().join("t.txt"));
    TestModel::default().write(&path);
    let model = LlamaModel::load(&path).unwrap();
    let with = |n: usize| {
        std::fs::write(&text, "a".repeat(n)).unwrap();
        collect(
            &model,
            &Recipe { files: vec![text.clone()], ..recipe(32, 8, 0.0) },
            &mut Vec::new(),
            |_, _, _| true,
        )
    };
    for n in [2, 3, 5] {
        let w = with(31 * n).unwrap();
        assert_eq!(w.n_windows(), n);
        assert!(w.n_fit >= 1 && w.n_held_out >= 1);
    }
    assert!(matches!(with(40), Err(CalibrateError::TooShort { .. })));
}

#[test]
fn generation_can_be_stopped() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    TestModel::default().write(&path);
    let model = LlamaModel::load(&path).unwrap();
    let stopped = collect(&model, &recipe(32, 4, 1.0), &mut Vec::new(), |_, done, _| done < 20);
    assert!(matches!(stopped, Err(CalibrateError::Interrupted)));
}

#[test]
fn reading_a_text_can_be_stopped_and_is_told() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (path, text) = (dir.path().join("m.gguf"), dir.path().join("t.txt"));
    TestModel::default().write(&path);
    // The text is longer than one that is tokenised as a whole.
    std::fs::write(&text, (TEXT.to_owned() + "\n").repeat(4000)).unwrap();
    let model = LlamaModel::load(&path).unwrap();
    let r = Recipe { files: vec![text], ..recipe(32, 8, 0.5) };
    let stopped = collect(&model, &r, &mut Vec::new(), |_, done, _| done < 3 * 32);
    assert!(matches!(stopped, Err(CalibrateError::Interrupted)));
    let mut told = Vec::new();
    collect(&model, &r, &mut Vec::new(), |origin, done, total| {
        told.push((origin, done, total));
        true
    })
    .unwrap();
    // Each source has four windows to fit to and one held out.
    for origin in [Origin::Files, Origin::Model] {
        let last = told.iter().rfind(|(o, _, _)| *o == origin);
        assert_eq!(last, Some(&(origin, 5 * 32, 5 * 32)));
    }
}

#[test]
fn own_text_begins_with_the_token_that_is_given() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    TestModel::default().write(&path);
    let model = LlamaModel::load(&path).unwrap();
    for (start, first) in [(None, 1), (Some(2), 2)] {
        let r = Recipe { start, ..recipe(32, 2, 1.0) };
        let w = collect(&model, &r, &mut Vec::new(), |_, _, _| true).unwrap();
        assert!(w.tokens.chunks(32).all(|c| c[0] == first), "{start:?}");
    }
}

#[test]
fn samples_are_of_every_kind_and_those_beside_them_of_other_windows() {
    for n_ctx in [4, 16] {
        for n_fit in [1usize, 2, 3, 8, 12, 32, 48] {
            // Every token is the number of its window; even numbers are of one kind, odd ones of the other.
            let tokens = (0..n_fit * n_ctx).map(|i| (i / n_ctx) as Token).collect();
            let windows = Windows { n_ctx, tokens, n_fit, n_held_out: 0, n_self: 0 };
            for n_taken in [1, n_fit.div_ceil(4), n_fit.div_ceil(2)] {
                let taken = windows.sample(n_taken * n_ctx, n_ctx);
                assert_eq!(taken.len(), n_taken * n_ctx);
                let every_kind = |of: &[Token]| [0, 1].iter().all(|kind| of.iter().any(|i| i % 2 == *kind));
                assert!(n_taken == 1 || n_fit < 2 * n_taken || every_kind(&taken), "{n_fit}: {taken:?}");
                let beside = windows.sample_beside(8 * 4, 4, n_taken);
                let mut numbers: Vec<Token> = beside.iter().step_by(4).copied().collect();
                let free = if n_fit > n_taken { n_fit - n_taken } else { n_fit };
                assert_eq!(numbers.len(), 8.min(free));
                assert!(n_fit == n_taken || !numbers.iter().any(|i| taken.contains(i)), "{n_fit} {n_taken}");
                // Half of all windows may be all windows of one kind.
                if n_fit >= 32 && n_taken <= n_fit / 4 {
                    assert!(every_kind(&numbers), "{numbers:?}");
                }
                numbers.dedup();
                assert_eq!(numbers.len(), 8.min(free));
            }
        }
    }
}

#[test]
fn what_is_sampled_twice_is_one_half_and_again_the_same() {
    let tokens: Vec<Token> = (0..6 * 8).collect();
    let windows = Windows { n_ctx: 8, tokens, n_fit: 5, n_held_out: 1, n_self: 0 };
    for (n_ctx, n_windows) in [(2, 5), (4, 3), (8, 2)] {
        let twice = windows.sample_twice(n_windows * n_ctx, n_ctx);
        let once = windows.sample(n_windows * n_ctx, n_ctx);
        assert_eq!(twice.len(), n_windows * n_ctx);
        for (twice, once) in twice.chunks(n_ctx).zip(once.chunks(n_ctx)) {
            assert_eq!(twice, [&once[..n_ctx / 2], &once[..n_ctx / 2]].concat());
        }
    }
}

#[test]
fn texts_are_kept_apart_and_conversations_pass_through_the_template() {
    silence_logs();
    let model = LlamaModel::load(&smollm2()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (chat, text) = (dir.path().join("chat.jsonl"), dir.path().join("text.txt"));
    let line = r#"{"messages": [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "<think>North</think> That one."}]}"#;
    std::fs::write(&chat, [line, "\n"].concat().repeat(60)).unwrap();
    std::fs::write(&text, crate::common::TEXT.repeat(4)).unwrap();
    let texts = |files: [&std::path::PathBuf; 2], weights: Vec<f64>| {
        let recipe = Recipe { files: files.map(Clone::clone).to_vec(), weights, ..recipe(32, 8, 0.0) };
        collect_texts(&model, &recipe, &mut Vec::new(), |_, _, _| true)
    };
    let found = texts([&text, &chat], Vec::new()).unwrap();
    assert_eq!(found, texts([&chat, &text], Vec::new()).unwrap(), "the order of the files does not count");
    let names: Vec<&str> = found.iter().map(|t| t.name.as_str()).collect();
    assert_eq!((names, found[0].fit.len(), found[1].fit.len()), (vec!["chat.jsonl", "text.txt"], 4, 4));
    assert!(found.iter().all(|t| t.held_out.len() == 1 && t.weight == 0.5));
    // Names of special tokens are these tokens, and thinking is part of the content.
    let start = model.vocab().tokenize("<|im_start|>", true).unwrap();
    let all: Vec<Token> = found[0].fit.concat();
    assert!(start.len() == 1 && all.contains(&start[0]));
    assert!(model.vocab().detokenize(&all).contains("North</think>"), "{}", model.vocab().detokenize(&all));
    let weighed = texts([&chat, &text], vec![3.0, 1.0]).unwrap();
    assert_eq!([weighed[0].fit.len(), weighed[1].fit.len()], [6, 2]);
    assert_eq!([weighed[0].weight, weighed[1].weight], [0.75, 0.25]);
    std::fs::write(&chat, [line, "\n{\"text\": \"no\"}\n"].concat()).unwrap();
    let said = putri_gguf::with_causes(&texts([&chat, &text], Vec::new()).unwrap_err());
    assert!(said.contains("chat.jsonl: line 2") && said.contains("messages"), "{said}");
}
