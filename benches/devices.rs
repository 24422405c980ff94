//! Comparison of a model pruned on the CPU and on devices: the time of each stage, and whether the results
//! agree.
//!
//!     cargo bench --features cuda --bench devices -- MODEL.gguf --device CUDA0
//!
//! Prints Markdown to be pasted into an issue. Both runs are calibrated on the same text, which the model
//! generates once.

use clap::Parser;
use putri_gguf::calibrate::Recipe;
use putri_gguf::evaluate::speed;
use putri_gguf::ggml::{
    Device, DeviceInfo, LlamaModel, Offload, add_server, device_memory_peak, devices, silence_logs,
};
use putri_gguf::pipeline::{Observer, Settings};
use putri_gguf::report::{StageTimes, Timings};
use putri_gguf::{Job, Outcome, calibration, run};
use std::path::PathBuf;

#[derive(Parser)]
struct Args {
    /// Dense model.
    model: PathBuf,
    /// Devices, as `putri-gguf devices` names them; all of them if none is named.
    #[arg(long, value_delimiter = ',')]
    device: Vec<String>,
    /// Servers whose devices are used as well.
    #[arg(long, value_delimiter = ',')]
    rpc: Vec<String>,
    /// Sparsity.
    #[arg(long, default_value_t = 0.25)]
    sparsity: f64,
    /// Tokens per calibration window.
    #[arg(long, default_value_t = Recipe::default().n_ctx)]
    ctx: usize,
    /// Calibration windows.
    #[arg(long, default_value_t = Recipe::default().n_windows)]
    chunks: usize,
    /// Flag that `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Silent;

impl Observer for Silent {
    fn stage(&mut self, name: &str, _: usize) {
        eprintln!("{name}");
    }
    fn step(&mut self, _: usize, _: &str) {}
}

fn main() {
    silence_logs();
    let args = Args::parse();
    args.rpc.iter().for_each(|server| add_server(server).expect("a server"));
    let named = |d: &DeviceInfo| {
        args.device.is_empty() || args.device.iter().any(|name| name.eq_ignore_ascii_case(&d.name))
    };
    let there: Vec<DeviceInfo> = devices().into_iter().filter(named).collect();
    assert!(!there.is_empty(), "no such device: build with --features cuda, metal or vulkan, or name --rpc");
    let chosen: Vec<Device> = there.iter().map(|d| d.device).collect();

    let folder = tempfile::tempdir().expect("temporary folder");
    let recipe = Recipe { n_ctx: args.ctx, n_windows: args.chunks, ..Recipe::default() };
    let n_threads = recipe.n_threads;
    let settings = Settings { sparsity: args.sparsity, n_threads, ..Settings::default() };
    let job = Job { recipe, settings, ..Job::new(&args.model, folder.path().join("out.gguf")) };
    let windows = calibration(&job, &mut Silent).expect("calibration text");
    let job = Job { windows: Some(windows), force: true, ..job };

    let mut results: Vec<(Outcome, StageTimes)> = Vec::new();
    for used in [Vec::new(), chosen.clone()] {
        let job = Job { settings: Settings { devices: used, ..job.settings.clone() }, ..job.clone() };
        let mut silent = Silent;
        let mut timings = Timings::new(&mut silent);
        let outcome = run(&job, &mut timings).expect("a model that can be pruned");
        results.push((outcome, timings.finish()));
    }
    let offload = Offload { devices: chosen, n_layers: usize::MAX };
    let speeds = [LlamaModel::load(&args.model), LlamaModel::load_on(&args.model, &offload)]
        .map(|model| speed(&model.expect("a model that loads"), n_threads).expect("a model that runs"));

    println!("putri-gguf {}, {n_threads} threads", env!("CARGO_PKG_VERSION"));
    for d in &there {
        println!("- {}: {}, {} MiB, {} MiB free", d.name, d.description, d.total >> 20, d.free >> 20);
    }
    let name = args.model.file_name().unwrap_or_default().display();
    println!("- {name}, {} % removed, {} x {} tokens\n", args.sparsity * 100.0, args.chunks, args.ctx);
    println!("| | CPU | device | times |\n|---|---|---|---|");
    let row = |what: &str, [cpu, device]: [f64; 2], times: f64| {
        println!("| {what} | {cpu:.2} | {device:.2} | {times:.2} |");
    };
    let [(cpu, cpu_times), (device, device_times)] = &results[..] else { unreachable!("two runs") };
    for (a, b) in cpu_times.0.iter().zip(&device_times.0) {
        let seconds = [a.time.as_secs_f64(), b.time.as_secs_f64()];
        row(&format!("{}, s", a.name), seconds, seconds[0] / seconds[1]);
    }
    let seconds = [cpu, device].map(|o| o.time.as_secs_f64());
    row("in all, s", seconds, seconds[0] / seconds[1]);
    let ppl = [cpu, device].map(|o| o.quality.as_ref().map_or(f64::NAN, |q| q.held_out.ppl));
    row("perplexity", ppl, ppl[1] / ppl[0]);
    let prompt = [&speeds[0], &speeds[1]].map(|s| s.prompt);
    row("llama.cpp reads, tokens/s", prompt, prompt[1] / prompt[0]);
    let written = [&speeds[0], &speeds[1]].map(|s| s.written);
    row("llama.cpp writes, tokens/s", written, written[1] / written[0]);
    let same = cpu.kept_groups.iter().zip(&device.kept_groups).filter(|(a, b)| a == b).count();
    println!("\nThe same heads stay in {same} of {} blocks.", cpu.kept_groups.len());
    let foreseen = device.forecast.as_ref().map_or(0.0, |f| f.on_devices());
    println!(
        "On devices: {} MiB at most, {:.0} foreseen.",
        device_memory_peak() >> 20,
        foreseen / f64::from(1 << 20)
    );
}
