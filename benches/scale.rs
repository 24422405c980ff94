//! How time grows and shrinks: with the number of threads, and with the size of a model.
//!
//!     cargo bench --bench scale -- --threads 1,2,4,8,16 MODEL
//!     cargo bench --bench scale -- --shape 1b --shape 8b --blocks 2
//!     cargo bench --bench scale -- --shape 8b --shape 70b --whole --threads 2,8,16
//!
//! With a model, it is pruned once per number of threads, each time by a process of its own, and a row per
//! stage says how many times as fast as with the first number it is, and what share of that many times as
//! many threads that is. Stages that only llama.cpp takes part in are not among them.
//!
//! With shapes, prints the cost of one block: time, memory, and the rate of its matrix products.
//! The models have a few blocks with random weights in the shapes of Llama 3, and are pruned on random
//! tokens. Prints a row per stage: time and operations of a block, memory at the stage's peak (without
//! mapped files), and the forecast from the shapes. The weights influence the number of removed neurons and
//! the steps of the head search, but hardly the cost of a block.

#[path = "../tests/common/test_model.rs"]
#[allow(dead_code)]
mod test_model;

use clap::{Parser, ValueEnum};
use putri_gguf::calibrate::{Recipe, Windows};
use putri_gguf::forward::chunk_tokens;
use putri_gguf::ggml::{RawGguf, Token, Type, devices, product_rate, silence_logs};
use putri_gguf::pipeline::{Observer, Settings};
use putri_gguf::report::{Timings, dry_run_table};
use putri_gguf::{Job, dry_run, run};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use test_model::{Rng, TestModel};

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    /// Llama 3.2 1B.
    #[value(name = "1b")]
    B1,
    /// Llama 3.2 3B.
    #[value(name = "3b")]
    B3,
    /// Llama 3.1 8B.
    #[value(name = "8b")]
    B8,
    /// Qwen 2.5 14B, as a Llama.
    #[value(name = "14b")]
    B14,
    /// Qwen 2.5 32B, as a Llama.
    #[value(name = "32b")]
    B32,
    /// Llama 3.1 70B.
    #[value(name = "70b")]
    B70,
}

impl Shape {
    /// n_embd, head_dim, and heads, KV heads and n_ff of a block.
    fn sizes(self) -> (usize, usize, (usize, usize, usize)) {
        match self {
            Shape::B1 => (2048, 64, (32, 8, 8192)),
            Shape::B3 => (3072, 128, (24, 8, 8192)),
            Shape::B8 => (4096, 128, (32, 8, 14336)),
            Shape::B14 => (5120, 128, (40, 8, 13824)),
            Shape::B32 => (5120, 128, (40, 8, 27648)),
            Shape::B70 => (8192, 128, (64, 8, 28672)),
        }
    }

    /// Blocks and vocabulary of the whole model.
    fn whole(self) -> (usize, usize) {
        match self {
            Shape::B1 => (16, 128_256),
            Shape::B3 => (28, 128_256),
            Shape::B8 => (32, 128_256),
            Shape::B14 => (48, 152_064),
            Shape::B32 => (64, 152_064),
            Shape::B70 => (80, 128_256),
        }
    }
}

#[derive(Clone, Parser)]
struct Args {
    /// Model to prune with each number of threads.
    #[arg(required_unless_present = "shape", conflicts_with_all = ["shape", "whole", "device"])]
    model: Option<PathBuf>,
    /// Calibration text for that model, instead of random tokens.
    #[arg(short, long, requires = "model")]
    file: Option<PathBuf>,
    /// Shapes.
    #[arg(long, value_enum)]
    shape: Vec<Shape>,
    /// Blocks.
    #[arg(long, default_value_t = 2)]
    blocks: usize,
    /// Share of the blocks' parameters to remove.
    #[arg(long, default_value_t = 0.25)]
    sparsity: f64,
    /// Tokens per calibration window.
    #[arg(long, default_value_t = 512)]
    ctx: usize,
    /// Calibration windows.
    #[arg(long, default_value_t = 32)]
    chunks: usize,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_values_t = [2])]
    threads: Vec<usize>,
    /// Devices, as `putri-gguf devices` names them, instead of the CPU; peak and memory stay those of the
    /// CPU.
    #[arg(long, value_delimiter = ',')]
    device: Vec<String>,
    /// Print the forecast of whole models of these shapes instead
    #[arg(long)]
    whole: bool,
    /// Memory limit of these models in GiB
    #[arg(long, requires = "whole")]
    max_memory: Option<f64>,
    /// Print the times of a single run with so many threads, for the process that compares them.
    #[arg(long, hide = true)]
    times: Option<usize>,
    /// Flag that `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Number of the current stage, for the thread that watches memory; 0 is before the first.
struct Silent {
    peaks: Arc<Mutex<Vec<u64>>>,
    stage: Arc<AtomicUsize>,
}

impl Observer for Silent {
    fn stage(&mut self, _: &str, _: usize) {
        self.stage.fetch_add(1, Ordering::Relaxed);
    }
    fn step(&mut self, _: usize, _: &str) {}
}

fn main() {
    silence_logs();
    let mut args = Args::parse();
    args.shape.sort_unstable();
    if let Some(model) = args.model.clone() {
        return match args.times {
            Some(n) => time(&model, &Args { threads: vec![n], ..args }),
            None => compare(&args),
        };
    }
    let most = std::thread::available_parallelism().map_or(1, |n| n.get());
    let n = args.threads.iter().copied().max().expect("clap wants one").min(most);
    rayon::ThreadPoolBuilder::new().num_threads(n).build_global().expect("threads");
    let rate = product_rate().expect("engine");
    println!("Products of 2048 x 2048 floats on {n} threads: {:.0} GFLOP/s.\n", rate / 1e9);
    if args.whole {
        for shape in &args.shape {
            for &threads in &args.threads {
                // The rate of a thread is taken to be the same on any number of cores.
                let args = Args { threads: vec![threads], ..args.clone() };
                expect(*shape, &args, rate / n as f64 * threads as f64);
            }
        }
        return;
    }
    println!(
        "| shape | stage | seconds a block | GFLOP a block | expected | f64 | of peak | GiB | expected |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for shape in &args.shape {
        measure(*shape, &args, rate);
    }
}

/// Prunes `model` with the first number of threads, and prints a line per stage: name, seconds, seconds of
/// all processors.
fn time(model: &Path, args: &Args) {
    let n = args.threads[0];
    rayon::ThreadPoolBuilder::new().num_threads(n).build_global().expect("threads");
    let folder = tempfile::tempdir().expect("temporary folder");
    let job = job(args, model.into(), folder.path().join("out.gguf"));
    let job = match &args.file {
        Some(file) => {
            Job { recipe: Recipe { files: vec![file.clone()], self_share: 0.0, ..recipe(args) }, ..job }
        }
        None => {
            let found = putri_gguf::inspect(model).expect("a model");
            Job { windows: Some(random_windows(args, found.n_vocab)), ..job }
        }
    };
    let mut silent = Silent { peaks: Arc::default(), stage: Arc::default() };
    let mut watched = Timings::new(&mut silent);
    run(&job, &mut watched).expect("a pruned model");
    for stage in watched.finish().0 {
        let cpu = stage.cpu.unwrap_or_default().as_secs_f64();
        println!("{}\t{}\t{cpu}", stage.name, stage.time.as_secs_f64());
    }
}

/// Times of the stages of one run: name, seconds, seconds of all processors.
type Times = Vec<(String, f64, f64)>;

/// Runs [`time`] with each number of threads in a process of its own, and prints a table.
fn compare(args: &Args) {
    let all: Vec<Times> = args.threads.iter().map(|&n| times(n)).collect();
    let first = args.threads[0];
    let numbers = args.threads.iter().map(|n| format!(" {n}, s |"));
    let ratios = args.threads[1..].iter().map(|n| format!(" {n}, times as fast | of {} |", ratio(*n, first)));
    println!("| stage |{}{}", numbers.collect::<String>(), ratios.collect::<String>());
    println!("|---|{}", "---|".repeat(args.threads.len() * 3 - 2));
    let sum = |times: &Times| times.iter().map(|t| t.1).sum::<f64>();
    let names = all[0].iter().map(|t| Some(&t.0)).chain([None]);
    for name in names {
        let seconds = |times: &Times| match name {
            None => sum(times),
            Some(name) => times.iter().filter(|t| t.0 == *name).map(|t| t.1).sum(),
        };
        let seconds: Vec<f64> = all.iter().map(seconds).collect();
        let cells = seconds.iter().map(|s| format!(" {s:.1} |"));
        let ratios = args.threads.iter().zip(&seconds).skip(1).map(|(n, s)| {
            let times = seconds[0] / s;
            format!(" {times:.2} | {:.0} % |", times * first as f64 / *n as f64 * 100.0)
        });
        let name = name.map_or("all", String::as_str);
        println!("| {name} |{}{}", cells.collect::<String>(), ratios.collect::<String>());
    }
}

/// Ratio of two numbers of threads, as a table shows it.
fn ratio(n: usize, first: usize) -> String {
    let ratio = n as f64 / first as f64;
    if n.is_multiple_of(first) { format!("{ratio:.0}") } else { format!("{ratio:.2}") }
}

/// Runs this program with the same arguments and `n` threads for the times of one run.
fn times(n: usize) -> Times {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    words.push(format!("--times={n}"));
    let me = std::env::current_exe().expect("this program");
    let done = std::process::Command::new(me).args(words).stderr(Stdio::inherit()).output().expect("itself");
    assert!(done.status.success(), "the run on {n} threads failed");
    let line = |line: &str| {
        let [name, seconds, cpu] = line.split('\t').collect::<Vec<_>>()[..] else { return None };
        Some((name.into(), seconds.parse().ok()?, cpu.parse().ok()?))
    };
    String::from_utf8_lossy(&done.stdout).lines().filter_map(line).collect()
}

/// Prints the forecast for a whole model, from a file that has a header and a hole for its tensors.
fn expect(shape: Shape, args: &Args, rate: f64) {
    let (n_embd, head_dim, block) = shape.sizes();
    let (n_layer, n_vocab) = shape.whole();
    let folder = tempfile::tempdir().expect("temporary folder");
    let input = folder.path().join("in.gguf");
    let model = TestModel {
        n_embd,
        head_dim,
        n_vocab,
        blocks: vec![block; n_layer],
        n_ctx_train: args.ctx,
        ty: Type::Q8_0,
        tied: false,
        ..TestModel::default()
    };
    let mut header = RawGguf::empty();
    model.metadata().iter().for_each(|(key, value)| header.set(key, value));
    let mut len = 0;
    for (name, ty, ne, _) in model.layout() {
        header.add_tensor(&name, ty, &ne);
        len += (ty.row_bytes(ne[0]) * ne[1..].iter().product::<usize>()).next_multiple_of(32);
    }
    let header = header.to_bytes();
    std::fs::write(&input, &header).expect("a header");
    let file = std::fs::File::options().write(true).open(&input).expect("our own file");
    file.set_len((header.len() + len) as u64).expect("a file with a hole");
    // Only its presence counts.
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "text").expect("a text");
    let job = Job {
        recipe: Recipe { files: vec![text], ..recipe(args) },
        max_memory: args.max_memory.map(|gib| (gib * f64::from(1 << 30)) as u64),
        ..job(args, input, folder.path().join("out.gguf"))
    };
    let found = match dry_run(&job) {
        Ok(found) => found,
        Err(e) => return println!("{shape:?}: {}\n", putri_gguf::with_causes(&e)),
    };
    println!(
        "{shape:?}, {n_layer} blocks, {} windows of {} tokens from a file, {} threads:\n",
        args.chunks, args.ctx, args.threads[0]
    );
    println!("{}", dry_run_table(&found, Some(rate)));
}

fn recipe(args: &Args) -> Recipe {
    Recipe {
        n_ctx: args.ctx,
        n_windows: args.chunks,
        self_share: 0.0,
        n_threads: args.threads[0],
        n_parallel: 1,
        ..Recipe::default()
    }
}

fn job(args: &Args, input: PathBuf, output: PathBuf) -> Job {
    let named = |name: &String| {
        let found = devices().into_iter().find(|d| d.name.eq_ignore_ascii_case(name));
        found.expect("no such device: build with --features cuda, metal or vulkan").device
    };
    let devices = args.device.iter().map(named).collect();
    let settings = Settings {
        sparsity: args.sparsity,
        n_threads: args.threads[0],
        chunk_tokens: chunk_tokens(args.threads[0]),
        devices,
        ..Settings::default()
    };
    Job { verify: false, recipe: recipe(args), settings, ..Job::new(input, output) }
}

/// Windows of random tokens of a vocabulary.
fn random_windows(args: &Args, n_vocab: usize) -> Windows {
    let n_held_out = (args.chunks / 8).max(1);
    let mut rng = Rng(1);
    let n_tokens = (args.chunks + n_held_out) * args.ctx;
    let tokens = (0..n_tokens).map(|_| 3 + (rng.next_u64() % (n_vocab as u64 - 3)) as Token);
    Windows { n_ctx: args.ctx, tokens: tokens.collect(), n_fit: args.chunks, n_held_out, n_self: 0 }
}

fn measure(shape: Shape, args: &Args, rate: f64) {
    let (n_embd, head_dim, block) = shape.sizes();
    let folder = tempfile::tempdir().expect("temporary folder");
    let [input, output] = ["in.gguf", "out.gguf"].map(|name| folder.path().join(name));
    let model = TestModel {
        n_embd,
        head_dim,
        blocks: vec![block; args.blocks],
        n_ctx_train: args.ctx,
        ty: Type::Q8_0,
        ..TestModel::default()
    };
    model.write(&input);
    let windows = random_windows(args, model.n_vocab);
    let job = Job { windows: Some(windows), ..job(args, input, output) };
    let mut silent = Silent { peaks: Arc::default(), stage: Arc::default() };
    let (peaks, stage) = (Arc::clone(&silent.peaks), Arc::clone(&silent.stage));
    let done = Arc::new(AtomicBool::new(false));
    let watch = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let at = stage.load(Ordering::Relaxed);
                let mut peaks = peaks.lock().expect("no panic");
                let n = peaks.len().max(at + 1);
                peaks.resize(n, 0);
                peaks[at] = peaks[at].max(anonymous_memory());
                drop(peaks);
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let mut watched = Timings::new(&mut silent);
    let outcome = run(&job, &mut watched).expect("a pruned model");
    let stages = watched.finish().0;
    done.store(true, Ordering::Relaxed);
    watch.join().expect("no panic");
    let forecast = outcome.forecast.expect("a model was pruned");
    let peaks = silent.peaks.lock().expect("no panic");
    for (i, stage) in stages.iter().enumerate() {
        let per_block = 1.0 / args.blocks as f64;
        let (seconds, operations) =
            (stage.time.as_secs_f64() * per_block, stage.operations as f64 * per_block);
        let expected = forecast.stages.iter().find(|e| e.name == stage.name);
        let [counted, algebra, memory] = expected.map_or([0.0; 3], |e| [e.operations, e.algebra, e.memory]);
        println!(
            "| {shape:?} | {} | {seconds:.1} | {:.0} | {:.0} | {:.0} | {:.0} % | {:.2} | {:.2} |",
            stage.name,
            operations / 1e9,
            counted * per_block / 1e9,
            algebra * per_block / 1e9,
            (operations + 2.0 * algebra * per_block) / seconds / rate * 100.0,
            peaks.get(i + 1).copied().unwrap_or(0) as f64 / f64::from(1 << 30),
            memory / f64::from(1 << 30),
        );
    }
}

/// Bytes of the process without mapped files.
fn anonymous_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
