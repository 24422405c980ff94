//! Quality loss of pruning on text that it is not calibrated on.
//!
//!     cargo bench --bench quality -- --model M.gguf --calibrate C.txt --judge A.txt --judge B.txt
//!
//! Prints a row per method and sparsity: perplexity, KL divergence from the dense model and top-1 agreement
//! on every judging text. Judging texts are cut into windows of `--judge-ctx` tokens. All rows are
//! calibrated on the same tokens. With `--windows FILE`, so are all runs that name that file.

use clap::Parser;
use putri_gguf::calibrate::{Recipe, Windows, file_windows};
use putri_gguf::evaluate::{Judge, Metrics};
use putri_gguf::ggml::{LlamaModel, Token, Type, silence_logs};
use putri_gguf::model::Model;
use putri_gguf::pipeline::{Among, Loss, Method, Moves, Observer, RecoverBudget, Settings};
use putri_gguf::prune::NeuronCriterion;
use putri_gguf::train::AdamState;
use putri_gguf::{Job, calibration, run};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Parser)]
struct Args {
    /// Dense model.
    #[arg(long)]
    model: PathBuf,
    /// Calibration text; without it, the model generates its own.
    #[arg(long)]
    calibrate: Vec<PathBuf>,
    /// Share of self-generated windows beside --calibrate.
    #[arg(long, default_value_t = 0.0)]
    self_share: f64,
    /// Share of the self-generated windows that are conversations.
    #[arg(long, default_value_t = 0.0)]
    chat_share: f64,
    /// File of calibration tokens: read if it exists, else written.
    #[arg(long)]
    windows: Option<PathBuf>,
    /// Texts to evaluate on.
    #[arg(long, required = true)]
    judge: Vec<PathBuf>,
    /// Windows per judge.
    #[arg(long, default_value_t = 8)]
    judge_windows: usize,
    /// Tokens per judging window.
    #[arg(long, default_value_t = 2048)]
    judge_ctx: usize,
    /// Tokens per calibration window.
    #[arg(long, default_value_t = 2048)]
    ctx: usize,
    /// Calibration windows.
    #[arg(long, default_value_t = 16)]
    chunks: usize,
    /// Sparsities.
    #[arg(long, value_delimiter = ',', default_value = "0.5")]
    sparsity: Vec<f64>,
    /// Rows: putri, paper, 2ssp, or one of them with settings changed as in `putri:dense_target_weight=0.3,uniform`; a
    /// pruned file, to judge it as it is; or `pruned.gguf:recover=250000,rate=0.002`, to recover it.
    #[arg(long, default_values_t = ["paper".to_string(), "putri".to_string()])]
    row: Vec<String>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Keep the pruned files in this folder.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Flag that `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Stages with their seconds, on stderr.
struct Stages(Option<(String, Instant)>);

impl Stages {
    fn end(&mut self) {
        if let Some((name, start)) = self.0.take() {
            eprintln!("  {name}: {:.1} s", start.elapsed().as_secs_f64());
        }
    }
}

impl Observer for Stages {
    fn stage(&mut self, name: &str, _: usize) {
        self.end();
        self.0 = Some((name.into(), Instant::now()));
    }
    fn step(&mut self, done: usize, note: &str) {
        if !note.is_empty() {
            eprintln!("    {done}: {note}");
        }
    }
}

fn settings(row: &str, sparsity: f64, n_threads: usize) -> Settings {
    let mut s = Settings { sparsity, n_threads, ..Settings::default() };
    let (method, changes) = row.split_once(':').unwrap_or((row, ""));
    s.method = match method {
        "putri" => Method::Putri,
        pruned if pruned.ends_with(".gguf") => Method::Recovery,
        "paper" => Method::Paper,
        "2ssp" => Method::TwoStage,
        other => panic!("no method {other}"),
    };
    for change in changes.split(',').filter(|c| !c.is_empty()) {
        let (key, value) = change.split_once('=').unwrap_or((change, ""));
        let number = || value.parse::<f64>().unwrap_or_else(|_| panic!("{change}: not a number"));
        match key {
            "dense_target_weight" => s.blocks.dense_target_weight = number(),
            "token_weight" => s.blocks.token_weight = number(),
            "rescored" => s.head_search.rescored = Some(number() as usize),
            "ridge_stream" => s.blocks.ridge_stream = number(),
            "ridge_attn" => s.blocks.ridge_attn = number(),
            "ridge_ffn" => s.blocks.ridge_ffn = number(),
            "groups" => s.head_search.groups = Some(number() as usize),
            "head_tokens" => s.head_search.tokens = number() as usize,
            "head_ctx" => s.head_search.ctx = number() as usize,
            "curve_tokens" => s.widths.curve_tokens = number() as usize,
            "nll" => s.head_search.loss = Loss::Likelihood,
            "plain" => s.blocks.error_feedback = false,
            "attn_output" => s.types.attn_output = Some(Type::from_name(value).expect("type")),
            "ffn_down" => s.types.ffn_down = Some(Type::from_name(value).expect("type")),
            "sensitivity_tokens" => s.sensitivity.tokens = number() as usize,
            "resample_copies" => s.resample.copies = number() as usize,
            "resample_share" => s.resample.share = number(),
            "tune" => s.tune.passes = number() as usize,
            "tune_rate" => s.tune.rate = number(),
            "tune_limit" => s.tune.limit = number() as usize,
            "tune_tokens" => s.tune.tokens = number() as usize,
            "tune_resample_share" => s.tune.resample_share = number(),
            "least_width" => s.widths.least = number(),
            "recover" => s.recover.budget = Some(RecoverBudget::Tokens(number() as usize)),
            "rate" => s.recover.rate = number(),
            "vector_rate" => s.recover.vector_rate = number(),
            "step" => s.recover.tokens = Some(number() as usize),
            "first_resampled" => s.recover.first_resampled = number(),
            "least_resampled" => s.recover.resample_share[0] = number(),
            "most_resampled" => s.recover.resample_share[1] = number(),
            "likely" => s.recover.among = Among::Likely,
            "bf16" => s.recover.moves = Moves::Full(AdamState::Bf16),
            "factored" => s.recover.moves = Moves::Full(AdamState::Factored),
            "rank" => s.recover.moves = Moves::LowRank(number() as usize),
            "nobias" => s.blocks.biases = false,
            "criterion" => s.criterion = NeuronCriterion::named(value),
            "uniform" => s.widths.per_layer = false,
            other => panic!("no setting {other}"),
        }
    }
    s
}

/// Calibration windows: those in `--windows`, or new ones.
fn windows(args: &Args, job: &Job) -> Windows {
    if let Some(path) = args.windows.as_ref().filter(|p| p.exists()) {
        return read_windows(path);
    }
    let w = calibration(job, &mut Stages(None)).expect("calibration");
    if let Some(path) = &args.windows {
        let numbers = [w.n_ctx, w.n_fit, w.n_held_out, w.n_self].map(|n| n as Token);
        let bytes: Vec<u8> = numbers.iter().chain(&w.tokens).flat_map(|n| n.to_le_bytes()).collect();
        std::fs::write(path, bytes).expect("windows");
    }
    w
}

fn read_windows(path: &Path) -> Windows {
    let bytes = std::fs::read(path).expect("windows");
    let mut numbers = bytes.as_chunks().0.iter().map(|b| Token::from_le_bytes(*b));
    let [n_ctx, n_fit, n_held_out, n_self] =
        std::array::from_fn(|_| numbers.next().expect("four numbers before the tokens") as usize);
    let tokens: Vec<Token> = numbers.collect();
    assert_eq!(tokens.len(), n_ctx * (n_fit + n_held_out), "{}", path.display());
    Windows { n_ctx, tokens, n_fit, n_held_out, n_self }
}

fn main() {
    silence_logs();
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().expect("threads");
    let vocab = LlamaModel::load_vocab(&args.model).expect("model");
    let dense = Model::open(&args.model).expect("model");
    let mut judges: Vec<Judge> = args
        .judge
        .iter()
        .map(|path| {
            let files = std::slice::from_ref(path);
            let windows = file_windows(&vocab, files, args.judge_ctx, args.judge_windows).expect("judge");
            Judge::new(&dense, windows.concat(), args.judge_ctx, args.threads).expect("judge")
        })
        .collect();
    let scratch = tempfile::tempdir().expect("temporary folder");
    let folder = args.keep.clone().unwrap_or_else(|| scratch.path().to_path_buf());
    let mut job = Job {
        force: true,
        recipe: Recipe {
            n_ctx: args.ctx,
            n_windows: args.chunks,
            files: args.calibrate.clone(),
            self_share: args.self_share,
            chat_share: args.chat_share,
            n_threads: args.threads,
            ..Recipe::default()
        },
        ..Job::new(&args.model, "")
    };
    job.windows = Some(windows(&args, &job));

    let columns = |j: &PathBuf| {
        format!("ppl {0} | KL {0} | top-1 {0}", j.file_stem().unwrap_or_default().to_string_lossy())
    };
    let columns: Vec<_> = args.judge.iter().map(columns).collect();
    println!("| method | sparsity | reached | bytes | seconds | {} |", columns.join(" | "));
    println!("|---|---|---|---|---|{}", "---|---|---|".repeat(judges.len()));
    let cells = |results: Vec<Metrics>| {
        let cell = |r: &Metrics| format!("{:.2} | {:.4} | {:.1} %", r.ppl, r.kl.mean, r.top1 * 100.0);
        results.iter().map(cell).collect::<Vec<_>>().join(" | ")
    };
    let bytes = dense.file.n_bytes();
    let figures = judges.iter_mut().map(|j| j.dense().expect("evaluation")).collect();
    println!("| dense | 0 | 0 | {bytes} | | {} |", cells(figures));
    let mut compare = |model: &Model| -> Vec<Metrics> {
        judges.iter_mut().map(|j| j.compare(model).expect("evaluation")).collect()
    };
    for &sparsity in &args.sparsity {
        for row in &args.row {
            if row.ends_with(".gguf") {
                let model = Model::open(row.as_ref()).expect("a pruned model");
                println!("| {row} | | | {} | | {} |", model.file.n_bytes(), cells(compare(&model)));
                continue;
            }
            let output = folder.join(format!("{}-{sparsity}.gguf", row.replace([':', '=', ',', '/'], "_")));
            job.output.clone_from(&output);
            job.settings = settings(row, sparsity, args.threads);
            let pruned = row.split(':').next().filter(|path| path.ends_with(".gguf"));
            job.input = pruned.map_or(args.model.clone(), PathBuf::from);
            job.recover_from = pruned.map(|_| args.model.clone());
            eprintln!("{row} {sparsity}");
            let mut stages = Stages(None);
            let outcome = run(&job, &mut stages);
            stages.end();
            let outcome = match outcome {
                Ok(outcome) => outcome,
                Err(e) => {
                    println!("| {row} | {sparsity} | {} |", putri_gguf::with_causes(&e));
                    continue;
                }
            };
            let pruned = Model::open(&output).expect("our own output");
            let figures = compare(&pruned);
            let seconds = outcome.time.as_secs_f64();
            println!(
                "| {row} | {sparsity} | {:.4} | {} | {seconds:.0} | {} |",
                outcome.sparsity,
                outcome.after.bytes,
                cells(figures)
            );
            drop(pruned);
            if args.keep.is_none() {
                std::fs::remove_file(&output).expect("remove our own output");
            }
        }
    }
}
