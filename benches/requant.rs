//! Loss from rounding ffn_down, per type, plainly and with error feedback.
//!
//!     cargo bench --bench requant -- --model M.gguf --text T.txt
//!
//! The activations are the dense model's. The weights are those of the best two thirds of the neurons,
//! refitted to its outputs, because the source's own lie on the grid of their quantised type. Refit,
//! importance and feedback come from the fitted windows. The loss is that of the outputs on held-out
//! windows, relative to the outputs' variance and averaged over the blocks.

use clap::Parser;
use putri_gguf::calibrate::file_windows;
use putri_gguf::forward::{BlockOutputs, Collect, Forward, Gathering};
use putri_gguf::ggml::{LlamaModel, Type, silence_logs};
use putri_gguf::model::{Matrix, Model};
use putri_gguf::numeric::{Moments, SymMatrix};
use putri_gguf::prune::{Inverse, NeuronCriterion, greedy};
use putri_gguf::requant::{Quantised, quantise, quantise_with_feedback};
use std::path::PathBuf;

#[derive(Parser)]
struct Args {
    /// Model.
    #[arg(long)]
    model: PathBuf,
    /// Text to run through it.
    #[arg(long)]
    text: Vec<PathBuf>,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    ctx: usize,
    /// Number of windows to fit to; half as many more are held out.
    #[arg(long, default_value_t = 16)]
    chunks: usize,
    /// Distance between measured blocks.
    #[arg(long, default_value_t = 5)]
    every: usize,
    /// Types.
    #[arg(long, value_delimiter = ',', default_value = "q2_K,q4_0,q4_1,iq4_nl,q4_K,q5_K,q6_K,q8_0")]
    types: Vec<String>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Flag that `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// tr((Q − W) H (Q − W)ᵀ) / tr(W H Wᵀ).
fn relative_loss(w: &Matrix, q: &Quantised, h: &SymMatrix) -> f64 {
    let curvature = faer::Mat::from_fn(h.n(), h.n(), |i, j| h.get(i, j));
    let form = |d: &[f32]| {
        let d = faer::Mat::from_fn(w.n_out, w.n_in, |i, j| f64::from(d[i * w.n_in + j]));
        let product = &d * &curvature;
        (0..w.n_in).map(|j| (0..w.n_out).map(|i| product[(i, j)] * d[(i, j)]).sum::<f64>()).sum::<f64>()
    };
    let back = q.to_matrix().expect("ggml reads what it wrote");
    let error: Vec<f32> = back.data.iter().zip(w.data.iter()).map(|(a, b)| a - b).collect();
    form(&error) / form(&w.data)
}

fn main() {
    silence_logs();
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().expect("threads");
    let model = Model::open(&args.model).expect("model");
    let vocab = LlamaModel::load_vocab(&args.model).expect("model");
    let n_judge = args.chunks.div_ceil(2);
    let windows = file_windows(&vocab, &args.text, args.ctx, args.chunks + n_judge).expect("text");
    assert_eq!(windows.len(), args.chunks + n_judge, "the text is too short");
    // Every third window is held out, so that both kinds come from all over the text.
    let judges = |i: usize| i % 3 == 2;
    let forward = Forward::new(&model, args.ctx, args.threads).expect("engine");
    let mut stream = forward.embed(&model, &windows.concat()).expect("embeddings");
    let types: Vec<Type> = args
        .types
        .iter()
        .map(|name| Type::from_name(name).unwrap_or_else(|| panic!("no type {name}")))
        .collect();
    let mut losses = vec![Vec::new(); types.len()];
    for il in 0..model.hparams.n_layer() {
        let w = model.block(il).expect("block");
        let block = forward.upload(&w).expect("engine");
        let mut moments = [(); 2].map(|()| forward.gathering(&block, w.ffn_down.n_in, 0).expect("engine"));
        for (i, x) in stream.chunks_exact_mut(args.ctx * forward.n_embd()).enumerate() {
            let heads = forward.attn_out_input(&block, x, None).expect("engine");
            let mut out = vec![0.0; x.len()];
            let scales = vec![1.0; args.ctx];
            let collect =
                Collect { target: None, scales: &scales, into: &mut moments[usize::from(judges(i))] };
            let moments = (il % args.every == 0).then_some(collect);
            let wanted = BlockOutputs { out: Some(&mut out), moments, mid: None };
            forward.from_attn_out_input(&block, x, &heads, wanted).expect("engine");
            x.copy_from_slice(&out);
        }
        if il % args.every != 0 {
            continue;
        }
        let mut moments = moments.map(Gathering::finish);
        moments.iter_mut().for_each(Moments::centre);
        let [fit, judge] = &moments;
        let width = (w.ffn_down.n_in * 2 / 3).next_multiple_of(256).min(w.ffn_down.n_in);
        let inverse = Inverse::new(&fit.gram, 1e-3).expect("a regular Gram matrix");
        let (keep, refitted) =
            greedy(&w.ffn_down, None, inverse, width, NeuronCriterion::Obs).expect("a regular Gram matrix");
        let refitted = refitted.weights;
        let (fit_gram, judge_gram) = (fit.gram.select(&keep), judge.gram.select(&keep));
        let importance: Vec<f32> =
            fit_gram.diagonal().iter().map(|v| (*v / fit.n_tokens as f64) as f32).collect();
        for (ty, losses) in types.iter().zip(&mut losses) {
            let plain = quantise(&refitted, *ty, &importance).expect("ggml writes the type");
            let fed = quantise_with_feedback(&refitted, &fit.gram, &keep, 1e-3, *ty, None)
                .expect("a regular Gram matrix");
            assert_eq!(plain.ty, fed.ty);
            let of = |q: &Quantised| relative_loss(&refitted, q, &judge_gram);
            losses.push((plain.ty, of(&plain), of(&fed)));
        }
        eprintln!("block {il}");
    }
    println!("| type | written as | plain | with feedback | ratio |");
    println!("|---|---|---|---|---|");
    for (ty, losses) in types.iter().zip(&losses) {
        let mean =
            |f: &dyn Fn(&(Type, f64, f64)) -> f64| losses.iter().map(f).sum::<f64>() / losses.len() as f64;
        let (plain, fed) = (mean(&|l| l.1), mean(&|l| l.2));
        println!("| {ty} | {} | {plain:.2e} | {fed:.2e} | {:.2} |", losses[0].0, fed / plain);
    }
}
