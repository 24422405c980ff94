//! Removal of whole experts from mixtures of every architecture that libllama loads.

use crate::common::Silent;
use crate::common::mixture_models::MixtureModel;
use putri_gguf::evaluate::llama_losses;
use putri_gguf::ggml::{LlamaModel, Token, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Mixture;
use putri_gguf::observe::{Grams, Mask, Masked, Routing};
use putri_gguf::prune::{self, ExpertCriterion, RouterWeights};
use putri_gguf::{DryRun, Job, Windows, dry_run, run};
use std::collections::BTreeMap;
use std::path::Path;

const N_CTX: usize = 32;

/// Random bytes as tokens: three windows to fit on, and one that is held out.
fn windows() -> Windows {
    let mut rng = crate::common::test_model::Rng(5);
    let tokens = (0..4 * N_CTX).map(|_| 3 + (rng.next_u64() % 256) as Token).collect();
    Windows { n_ctx: N_CTX, tokens, n_fit: 3, n_held_out: 1, n_self: 0 }
}

/// Job that removes a share of the experts by their statistics alone.
fn job(input: &Path, output: &Path, share: f64) -> Job {
    let mut job = Job::new(input, output);
    job.windows = Some(windows());
    job.recipe.n_ctx = N_CTX;
    job.settings.sparsity = share;
    job.settings.n_threads = 1;
    (job.settings.experts.refine, job.settings.experts.repair) = (0, 0);
    job.force = true;
    job
}

/// Kept experts by layer, as the file says.
fn kept(file: &GgufFile) -> BTreeMap<usize, Vec<usize>> {
    let numbers = |key: &str| file.get(key).and_then(Value::as_unsigned_array).unwrap();
    let (layers, kept) = (numbers("putri.experts.layers"), numbers("putri.experts.kept"));
    let each = kept.len() / layers.len();
    layers
        .iter()
        .zip(kept.chunks(each))
        .map(|(l, k)| (*l as usize, k.iter().map(|e| *e as usize).collect()))
        .collect()
}

/// Bytes of the entries `kept` of `n` along the last axis.
fn entries(bytes: &[u8], n: usize, kept: &[usize]) -> Vec<u8> {
    let each = bytes.len() / n;
    kept.iter().flat_map(|e| &bytes[e * each..(e + 1) * each]).copied().collect()
}

/// Checks that every tensor of `new` has the bytes of the source's kept experts, by the names of the tensors.
fn tensors_are_slices(name: &str, old: &GgufFile, new: &GgufFile, n_expert: usize) {
    let kept = kept(new);
    assert_eq!(old.tensors().len(), new.tensors().len(), "{name}");
    for (a, b) in old.tensors().iter().zip(new.tensors()) {
        assert_eq!((&a.name, a.ty), (&b.name, b.ty), "{name}");
        let block = a.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let kept = block.and_then(|(block, _)| kept.get(&block.parse().unwrap()));
        let role = block.map_or("", |(_, role)| role);
        let table = role.starts_with("ffn_gate_tid2eid");
        let counts = (role.contains("_exps.") && !role.starts_with("ffn_norm_exps"))
            || role.starts_with("exp_probs_b")
            || ["ffn_gate_inp.weight", "ffn_gate_inp.bias"].contains(&role);
        match kept {
            Some(_) if table => {}
            Some(kept) if counts => {
                assert_eq!(new.data(b), entries(old.data(a), n_expert, kept), "{name}: {}", a.name);
                assert_eq!(b.ne.last(), Some(&kept.len()), "{name}: {}", a.name);
            }
            Some(kept) if role.contains("_chexps.") => {
                let chunks: Vec<usize> = kept.iter().step_by(2).map(|e| e / 2).collect();
                assert_eq!(new.data(b), entries(old.data(a), n_expert / 2, &chunks), "{name}: {}", a.name);
            }
            _ => assert_eq!((old.data(a), &a.ne), (new.data(b), &b.ne), "{name}: {}", a.name),
        }
    }
}

/// Checks that the metadata is the source's, with the same types, but for the number of experts.
fn metadata_is_kept(name: &str, arch: &str, old: &GgufFile, new: &GgufFile, n_keep: usize) {
    for (key, value) in old.metadata() {
        let now = new.get(key).unwrap_or_else(|| panic!("{name}: {key} is missing"));
        assert_eq!(value.type_name(), now.type_name(), "{name}: {key}");
        if *key == format!("{arch}.expert_count") {
            assert_eq!(*now, Value::U32(n_keep as u32), "{name}");
        } else if key != "general.name" {
            assert_eq!(value, now, "{name}: {key}");
        }
    }
    let added = new.metadata().iter().filter(|(k, _)| old.get(k).is_none());
    assert!(added.clone().all(|(k, _)| k.starts_with("putri.")), "{name}");
}

#[test]
fn every_architecture_loses_experts() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
    let mut archs: Vec<&str> = Vec::new();
    for small in MixtureModel::all() {
        small.write(&input);
        let name = small.name;
        let source = Mixture::new(GgufFile::open(&input).unwrap()).unwrap();
        for share in [0.25, 0.5] {
            let job = job(&input, &output, share);
            let n_keep = (8.0 * (1.0 - share)) as usize;
            let outcome = run(&job, &mut Silent).unwrap_or_else(|e| panic!("{name}, {share}: {e:?}"));
            let found = GgufFile::open(&output).unwrap();
            tensors_are_slices(name, &source.file, &found, 8);
            metadata_is_kept(name, small.arch, &source.file, &found, n_keep);
            let Ok(DryRun::Experts(dry)) = dry_run(&job) else { panic!("{name}") };
            let bytes = output.metadata().unwrap().len();
            assert_eq!((dry.after.bytes, outcome.after.bytes), (bytes, bytes), "{name}");
            assert_eq!(dry.after.params, outcome.after.params);
            let params: usize = found.tensors().iter().map(|t| t.n_elements()).sum();
            assert_eq!(outcome.after.params, params, "{name}");
            let usage = &outcome.experts.as_ref().unwrap().usage;
            let scores = prune::scores(usage, ExpertCriterion::Reap, RouterWeights::Applied);
            let mask = prune::mask(&kept(&found), &scores);
            masked_is_sliced(name, &input, &output, mask, source.chunk > 1);
        }
        if !archs.contains(&small.arch) {
            archs.push(small.arch);
        }
    }
    assert!(archs.len() >= 54, "{}", archs.len());
}

/// Checks that the source, whose routers never choose the removed experts, predicts what the file does.
fn masked_is_sliced(name: &str, source: &Path, file: &Path, mask: Mask, in_chunks: bool) {
    let windows = windows();
    let window = &windows.tokens[3 * N_CTX..];
    let source = LlamaModel::load_mapped(source).unwrap();
    let file = LlamaModel::load_mapped(file).unwrap();
    let sliced = llama_losses(&file, window, 1).unwrap();
    let n_kept = mask.values().map(|m| m.kept_experts().len()).max().unwrap();
    let mut model = Masked::new(&source, N_CTX, 1).unwrap();
    let whole = model.losses(window).unwrap();
    model.set(mask);
    let masked = model.losses(window).unwrap();
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("{name}: {:.1e} off, {:.1e} from the whole", apart(&masked, &sliced), apart(&masked, &whole));
    // llama.cpp weighs grovemoe's chunks by the scores of other experts, which depend on their numbers.
    // Quantised products round activations to eight bits.
    assert!(in_chunks || apart(&masked, &sliced) < 0.02, "{name}: {masked:?} {sliced:?}");
    // A quarter of the experts may be those that no token chooses.
    assert!(n_kept > 4 || apart(&masked, &whole) > 1e-3, "{name}: nothing was masked");
}

#[test]
fn statistics_are_those_of_the_definition() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.gguf");
    // Families whose forward pass this crate computes itself.
    for name in ["qwen3moe", "qwen2moe", "olmoe", "granitemoe", "granitemoe, shared", "llama"] {
        MixtureModel::of(name).write(&path);
        let model = putri_gguf::model::Model::open(&path).unwrap();
        let h = &model.hparams;
        let forward = putri_gguf::forward::Forward::new(&model, N_CTX, 1).unwrap();
        let llama = LlamaModel::load_mapped(&path).unwrap();
        let mixture = Mixture::new(GgufFile::open(&path).unwrap()).unwrap();
        let mut routing = Routing::new(&llama, &mixture, N_CTX, 1).unwrap();
        let window = &windows().tokens[..N_CTX];
        let seen = routing.window(window).unwrap();
        let mut stream = forward.embed(&model, window).unwrap();
        for il in 0..h.n_layer() {
            let block = forward.upload(&model.block(il).unwrap()).unwrap();
            let mut used = putri_gguf::forward::ExpertUse::new(8);
            let (mut mid, mut out) = (vec![0.0; stream.len()], vec![0.0; stream.len()]);
            forward.block(&block, &stream, Some(&mut mid), &mut out).unwrap();
            forward.experts(&block, &mid, &mut out, Some(&mut used)).unwrap();
            let found = &seen[&il];
            // libllama rounds keys and values to half precision, which may tip a close decision.
            let moved: u64 =
                found.tokens.iter().zip(&used.n_tokens).map(|(a, b)| a.abs_diff(*b as u64)).sum();
            assert!(moved <= 2, "{name}, layer {il}: {:?} {:?}", found.tokens, used.n_tokens);
            for ((a, b), (n, m)) in
                found.energy.iter().zip(&used.energy).zip(found.tokens.iter().zip(&used.n_tokens))
            {
                let close = (a - b).abs() < 0.01 * b.max(0.1);
                assert!(close || *n != *m as u64, "{name}, layer {il}: {a} {b}");
            }
            assert_eq!(found.near_misses.iter().sum::<u64>(), N_CTX as u64, "{name}");
            stream = out;
        }
    }
}

/// Rows of a matrix as bytes.
fn rows(file: &GgufFile, name: &str) -> Vec<Vec<u8>> {
    let t = file.find(name).unwrap();
    let bytes = file.data(t);
    bytes.chunks_exact(bytes.len() / t.n_rows()).map(<[u8]>::to_vec).collect()
}

#[test]
fn experts_are_narrowed_where_the_loader_allows_it() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
    let (mut n_narrowed, mut refused) = (0, Vec::new());
    for small in MixtureModel::all() {
        let own = putri_gguf::model::Family::from_name(small.arch);
        if own.is_some_and(|f| f.traits().experts.is_some()) {
            continue;
        }
        small.write(&input);
        let name = small.name;
        let source = Mixture::new(GgufFile::open(&input).unwrap()).unwrap();
        let mut job = job(&input, &output, 0.5);
        job.settings.moe_unit = putri_gguf::FfnUnit::Neuron;
        let width = match source.narrowed(0.5) {
            Ok(width) => width,
            Err(e) => {
                assert!(run(&job, &mut Silent).is_err() && !output.exists(), "{name}");
                refused.push(format!("{name}: {e}"));
                continue;
            }
        };
        let outcome = run(&job, &mut Silent).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let q = outcome.quality.unwrap();
        assert!(q.held_out.kl.mean.is_finite() && q.held_out.kl.mean > 0.0, "{name}");
        let Ok(DryRun::Experts(dry)) = dry_run(&job) else { panic!("{name}") };
        let bytes = output.metadata().unwrap().len();
        let found = Mixture::new(GgufFile::open(&output).unwrap()).unwrap();
        assert_eq!((dry.after.bytes, outcome.after.bytes), (bytes, bytes), "{name}");
        assert_eq!(
            (outcome.after.params, outcome.after.block_params),
            (found.params(), found.block_params())
        );
        assert!(found.layers.iter().all(|l| l.width == width), "{name}");
        let said = putri_gguf::verify(
            &putri_gguf::VerifyJob { model: output.clone(), source: Some(input.clone()), n_threads: 1 },
            &mut Silent,
        );
        assert!(said.unwrap().iter().all(|c| c.found.is_ok()), "{name}");
        // Rows of gate and up are the source's, of the same neurons in both.
        let layer = source.observed().next().unwrap().block;
        let part = |part: &str| format!("blk.{layer}.ffn_{part}_exps.weight");
        if source.file.find(&part("up")).is_some() {
            let (old, new) = (rows(&source.file, &part("up")), rows(&found.file, &part("up")));
            let places: Vec<usize> =
                new.iter().map(|row| old.iter().position(|o| o == row).unwrap()).collect();
            if source.file.find(&part("gate")).is_some() {
                let (old, new) = (rows(&source.file, &part("gate")), rows(&found.file, &part("gate")));
                assert!(places.iter().zip(&new).all(|(&at, row)| old[at] == *row), "{name}");
            }
            let mut kept = places.clone();
            kept.dedup();
            assert!(kept.len() == new.len() && kept.is_sorted(), "{name}");
        }
        std::fs::remove_file(&output).unwrap();
        n_narrowed += 1;
    }
    println!("{n_narrowed} narrowed; refused:\n{}", refused.join("\n"));
    assert!(n_narrowed >= 30, "{n_narrowed}");
}

#[test]
fn moments_of_experts_are_sums_over_their_tokens() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.gguf");
    for name in ["qwen3moe", "granitemoe, shared"] {
        MixtureModel::of(name).write(&path);
        let model = putri_gguf::model::Model::open(&path).unwrap();
        let forward = putri_gguf::forward::Forward::new(&model, N_CTX, 1).unwrap();
        let llama = LlamaModel::load_mapped(&path).unwrap();
        let mixture = Mixture::new(GgufFile::open(&path).unwrap()).unwrap();
        let mut grams = Grams::new(&llama, &mixture, &[0], N_CTX, 1).unwrap();
        let window = &windows().tokens[..N_CTX];
        grams.window(window).unwrap();
        let found = &grams.finish()[&0];
        let stream = forward.embed(&model, window).unwrap();
        let weights = model.block(0).unwrap();
        let block = forward.upload(&weights).unwrap();
        let (mut mid, mut out) = (vec![0.0; stream.len()], vec![0.0; stream.len()]);
        forward.block(&block, &stream, Some(&mut mid), &mut out).unwrap();
        let n_embd = forward.n_embd();
        for (e, tokens) in forward.choices(&block, &mid).unwrap().iter().enumerate() {
            assert_eq!(found[e].n_tokens, tokens.len(), "{name}, expert {e}");
            if tokens.is_empty() {
                continue;
            }
            let rows: Vec<f32> =
                tokens.iter().flat_map(|&(t, _)| &mid[t * n_embd..][..n_embd]).copied().collect();
            let scales: Vec<f32> = tokens.iter().map(|t| t.1).collect();
            let mut sums = forward.gathering(&block, weights.shape.n_ff, 0).unwrap();
            forward.expert_moments(&block, e, &rows, &scales, &mut sums).unwrap();
            let expected = sums.finish().gram;
            let size = expected.diagonal().into_iter().fold(0.0, f64::max);
            for i in 0..weights.shape.n_ff {
                for j in i..weights.shape.n_ff {
                    let off = (found[e].gram.get(i, j) - expected.get(i, j)).abs();
                    assert!(off < 0.01 * size, "{name}, expert {e}, {i} {j}: {off} of {size}");
                }
            }
        }
    }
}
