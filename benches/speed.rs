//! Speed gain of pruning in llama.cpp: tokens per second of a model and of its pruned versions at several
//! sparsities.
//!
//!     cargo bench --bench speed -- MODEL.gguf --sparsity 0.1,0.25,0.5 --threads 1,2
//!
//! Files are measured in turn, several times over, and the best of each counts, so that a slow phase of the
//! machine affects all of them. "Ideal" is the speed if time were proportional to the weights that a token
//! passes through. For processing (pp), these are the weights of the blocks, since a prompt needs logits
//! for its last token only. For generation (tg), they are the bytes of all matrices, including the output
//! head's.

use clap::Parser;
use putri_gguf::calibrate::Recipe;
use putri_gguf::evaluate::speed;
use putri_gguf::ggml::{FileType, LlamaModel, repacked_bytes, silence_logs};
use putri_gguf::model::Model;
use putri_gguf::pipeline::{
    HeadSettings, Observer, ResampleSettings, SensitivitySettings, Settings, TuneSettings, WidthSettings,
};
use putri_gguf::{Job, Nested, Quantise, run_nested};
use std::path::{Path, PathBuf};

#[derive(Parser)]
struct Args {
    /// Dense model.
    model: PathBuf,
    /// Sparsities, rising.
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.25,0.5")]
    sparsity: Vec<f64>,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Number of measurements of each file.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure in another mix of types; quantised tensors are rounded again, which does not affect speed.
    #[arg(long = "type")]
    to: Option<String>,
    /// Flag that `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Silent;

impl Observer for Silent {
    fn stage(&mut self, _: &str, _: usize) {}
    fn step(&mut self, _: usize, _: &str) {}
    fn interrupted(&self) -> bool {
        false
    }
}

/// File, and the weights that a token passes through in it.
struct Candidate {
    name: String,
    path: PathBuf,
    /// Parameters in blocks.
    blocks: f64,
    /// Bytes of all matrices that a generated token passes through.
    bytes: f64,
}

impl Candidate {
    fn new(name: String, path: PathBuf) -> Candidate {
        let model = Model::open(&path).expect("a model");
        let h = &model.hparams;
        let token_embd = model.file.tensors().iter().find(|t| t.name == "token_embd.weight");
        // If the embedding is not also the output head, one row of it is read.
        let unread = if model.token_embd == model.output { 0 } else { token_embd.map_or(0, |t| t.n_bytes()) };
        let bytes = model.file.n_bytes() as f64 - unread as f64;
        Candidate { name, blocks: h.blocks_params(&h.blocks) as f64, bytes, path }
    }
}

fn main() {
    silence_logs();
    let args = Args::parse();
    let folder = tempfile::tempdir().expect("temporary folder");
    let found = candidates(&args, folder.path());
    for c in &found {
        let repacked = repacked_bytes(&c.path).expect("a model that loads");
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        println!(
            "{}: {:.1} MiB, {:.1} MiB of them repacked for faster kernels",
            c.name,
            mib(c.bytes),
            mib(repacked as f64)
        );
    }
    println!("\n| threads | file | reads, tokens/s | times | ideal | writes, tokens/s | times | ideal |");
    println!("|---|---|---|---|---|---|---|---|");
    for &n_threads in &args.threads {
        let mut best = vec![[0.0f64; 2]; found.len()];
        for _ in 0..args.rounds {
            for (c, best) in found.iter().zip(&mut best) {
                let model = LlamaModel::load(&c.path).expect("a model that loads");
                let s = speed(&model, n_threads).expect("a model that runs");
                *best = [best[0].max(s.prompt), best[1].max(s.written)];
            }
        }
        for (c, [reads, writes]) in found.iter().zip(&best) {
            println!(
                "| {n_threads} | {} | {reads:.0} | {:.2} | {:.2} | {writes:.1} | {:.2} | {:.2} |",
                c.name,
                reads / best[0][0],
                found[0].blocks / c.blocks,
                writes / best[0][1],
                found[0].bytes / c.bytes
            );
        }
    }
}

/// The source in the requested types, and its pruned versions. The quality of the calibration does not matter
/// here.
fn candidates(args: &Args, folder: &Path) -> Vec<Candidate> {
    let recipe = Recipe { n_ctx: 64, n_windows: 4, ..Recipe::default() };
    let mut source = args.model.clone();
    if let Some(name) = &args.to {
        let to = FileType::from_name(name).expect("a type of llama-quantize's");
        source = folder.join("source.gguf");
        putri_gguf::ggml::quantize_file(&args.model, &source, to, &[], true, recipe.n_threads)
            .expect("a model that can be quantised");
    }
    let quantise = args.to.as_ref().map(|name| Quantise {
        to: FileType::from_name(name).expect("a type of llama-quantize's"),
        again: true,
    });
    let settings = Settings {
        head_search: HeadSettings { tokens: 64, ctx: 64, ..HeadSettings::default() },
        widths: WidthSettings { curve_tokens: 256, ..WidthSettings::default() },
        sensitivity: SensitivitySettings { tokens: 64 },
        resample: ResampleSettings { copies: 0, ..ResampleSettings::default() },
        tune: TuneSettings { passes: 0, ..TuneSettings::default() },
        n_threads: recipe.n_threads,
        ..Settings::default()
    };
    let job =
        Job { quantise, recipe, settings, verify: false, ..Job::new(&args.model, folder.join("out.gguf")) };
    let results: Vec<Nested> = args
        .sparsity
        .iter()
        .map(|&sparsity| Nested {
            sparsity,
            output: folder.join(format!("{sparsity}.gguf")),
            imatrix_out: None,
        })
        .collect();
    let mut found = vec![Candidate::new("dense".into(), source)];
    run_nested(&job, &results, &mut Silent, |_, outcome| {
        let name = format!("{:.1} % pruned", outcome.sparsity * 100.0);
        found.push(Candidate::new(name, outcome.output.clone()));
        Ok(())
    })
    .expect("a model that can be pruned");
    found
}
