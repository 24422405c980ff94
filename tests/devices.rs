//! Graphs on devices, compared with the same graphs on the CPU.
//!
//! By default, the devices are two RPC servers of this process on the loopback interface: real backends with
//! their own memory, behind a socket. PUTRI_TEST_DEVICE names another device, such as Vulkan0.

mod common;

use common::cli::Cli;
use common::mixture_models::MixtureModel;
use common::test_model::{Rng, TestModel};
use common::{TEXT, compare_logits, logits};
use putri_gguf::evaluate::{llama_losses, own_losses};
use putri_gguf::forward::{
    Block, BlockGradient, BlockOutputs, CHUNK_TOKENS, Collect, Forward, InputSquares, MatrixGradient,
    OnTheWay,
};
use putri_gguf::ggml::{
    Compute, Device, LlamaModel, Offload, Type, add_server, devices, serve, silence_logs,
};
use putri_gguf::model::Model;
use putri_gguf::numeric::Moments;
use putri_gguf::pipeline::{Calibration, Settings, forecast};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Names and numbers of the devices, and the arguments that select them.
struct Devices {
    all: Vec<Device>,
    args: Vec<String>,
    close: Close,
}

/// Largest deviations of a device's results from the CPU's.
struct Close {
    /// Deviation of sums for the algebra, and of gradients, relative to the largest value.
    sums: f64,
    gradients: f64,
    logits: f32,
    /// KL divergence of the predictions.
    kl: f64,
    /// Deviation of the losses of llama.cpp, whose activations have eight bits on some devices only.
    losses: f64,
}

/// Bounds for the same kernels on another machine, which may sum in another order.
const SAME_KERNELS: Close = Close { sums: 2e-5, gradients: 2e-5, logits: 1e-3, kl: 1e-5, losses: 5e-3 };

/// Bounds for graphics processors, which round the inputs of products to ten or eleven bits, whatever
/// precision is requested for sums. The error is up to 5e-4, and gradients go through several products.
const HALVED_INPUTS: Close = Close { sums: 1e-3, gradients: 2e-3, logits: 1e-2, kl: 1e-4, losses: 2e-2 };

/// Locks the devices for one test at a time, because a server has one client.
fn under_test() -> MutexGuard<'static, Devices> {
    static FOUND: OnceLock<Mutex<Devices>> = OnceLock::new();
    let found = FOUND.get_or_init(|| Mutex::new(find()));
    found.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find() -> Devices {
    silence_logs();
    if let Ok(name) = std::env::var("PUTRI_TEST_DEVICE") {
        let all: Vec<Device> = devices().iter().filter(|d| d.name == name).map(|d| d.device).collect();
        assert!(!all.is_empty(), "{name} is none of {:?}", devices());
        return Devices { all, args: vec!["--device".into(), name], close: HALVED_INPUTS };
    }
    let servers = [start_server(), start_server()];
    servers.iter().for_each(|s| add_server(s).unwrap());
    let all: Vec<Device> = devices().iter().map(|d| d.device).collect();
    assert_eq!(all.len(), 2, "{:?}", devices());
    Devices { all, args: vec!["--rpc".into(), servers.join(",")], close: SAME_KERNELS }
}

/// Serves this machine's CPU to the rest of the test and returns its address.
fn start_server() -> String {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("127.0.0.1:{port}");
    let served = endpoint.clone();
    std::thread::spawn(move || serve(&served, 1).unwrap());
    let up = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        TcpStream::connect(&endpoint).is_ok()
    });
    assert!(up, "{endpoint} does not answer");
    endpoint
}

impl Devices {
    fn compute(&self) -> Compute {
        Compute { n_threads: 2, devices: self.all.clone() }
    }
}

fn families() -> Vec<(&'static str, TestModel)> {
    let mut all = vec![
        ("llama", TestModel { blocks: vec![(6, 2, 160); 3], n_embd: 96, ..TestModel::default() }),
        ("gemma3", TestModel::gemma3()),
    ];
    all.extend(TestModel::variants());
    all.extend(TestModel::mixtures());
    all
}

/// Largest difference, relative to the largest of `b`.
fn apart<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    let most = b.iter().map(|v| (*v).into().abs()).fold(f64::MIN_POSITIVE, f64::max);
    a.iter().zip(b).map(|(a, b)| ((*a).into() - (*b).into()).abs()).fold(0.0, f64::max) / most
}

#[test]
fn logits_are_those_of_the_cpu_in_every_family() {
    let devices = under_test();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (name, small) in families() {
        small.write(&path);
        let model = Model::open(&path).unwrap();
        let tokens: Vec<i32> = (0..50).map(|i| 3 + i * 7 % (small.n_vocab as i32 - 3)).collect();
        let [ours, theirs] =
            [1.into(), devices.compute()].map(|c| logits(&model, &tokens, c, |il| model.block(il).unwrap()));
        let (max, kl) = compare_logits(&ours, &theirs, model.hparams.n_vocab);
        println!("{name}: {max:e}, KL {kl:e}");
        // A token near the border between two experts may choose the other one.
        let bound = devices.close.logits * if small.experts.is_some() { 10.0 } else { 1.0 };
        assert!(max < bound && kl.abs() < devices.close.kl, "{name}: {max} {kl}");
    }
}

/// All results of a pass over a block, as one list of numbers per kind.
fn collected(forward: &Forward, block: &Block, x: &[f32], n_ff: usize) -> Vec<(&'static str, Vec<f64>)> {
    let n_embd = forward.n_embd();
    let scales: Vec<f32> = (0..x.len() / n_embd).map(|i| 0.5 + (i % 7) as f32 / 7.0).collect();
    let target: Vec<f32> = x.iter().map(|v| v * 0.9).collect();
    let mut found: Vec<(&'static str, Vec<f64>)> = Vec::new();
    let mut add = |what: [&'static str; 3], m: &Moments| {
        let gram = (0..m.gram.n()).flat_map(|i| m.gram.row(i).to_vec()).collect();
        found.extend(what.into_iter().zip([gram, m.cross.clone(), m.x.clone()]));
    };
    let width = forward.attn_out_input(block, x, None).unwrap().len() / scales.len();
    let [mut at_heads, mut at_neurons] = [width, n_ff].map(|n| forward.gathering(block, n, n_embd).unwrap());
    // Each part has two windows. There are more parts than a device adds up at a time.
    let two = 2 * forward.n_ctx() * n_embd;
    for part in (0..x.len()).step_by(two).map(|start| start..start + two) {
        let scales = &scales[part.start / n_embd..part.end / n_embd];
        let (x, target) = (&x[part.clone()], Some(&target[part]));
        let attn_out_input =
            forward.attn_out_input(block, x, Some(Collect { target, scales, into: &mut at_heads })).unwrap();
        let moments = Some(Collect { target, scales, into: &mut at_neurons });
        forward
            .from_attn_out_input(
                block,
                x,
                &attn_out_input,
                BlockOutputs { moments, ..BlockOutputs::default() },
            )
            .unwrap();
    }
    add(["Gram of heads", "cross of heads", "sums of heads"], &at_heads.finish());
    add(["Gram of neurons", "cross of neurons", "sums of neurons"], &at_neurons.finish());
    let (mut squares, mut out) = (InputSquares::default(), vec![0.0; x.len()]);
    forward.block_squares(block, x, &mut out, &mut squares).unwrap();
    found.push(("squares", [squares.qkv, squares.attn_output, squares.ffn, squares.ffn_down].concat()));
    let (mut grad, mut vectors, mut groups) = (target, BlockGradient::default(), Vec::new());
    let mut matrices = MatrixGradient::default();
    let on_the_way =
        OnTheWay { vectors: Some(&mut vectors), groups: Some(&mut groups), matrices: Some(&mut matrices) };
    forward.block_gradient(block, x, &mut grad, on_the_way).unwrap();
    for (name, part) in [
        ("gradient", grad),
        ("gradient of vectors", vectors.concat()),
        ("gradient of matrices", matrices.concat()),
        ("worth of groups", groups),
    ] {
        found.push((name, part.iter().map(|v| f64::from(*v)).collect()));
    }
    found
}

#[test]
fn sums_for_the_algebra_are_those_of_the_cpu() {
    let devices = under_test();
    const N_CTX: usize = 32;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (n_embd, n_ff) in [(64, 96), (96, 352), (128, 512)] {
        TestModel { n_embd, blocks: vec![(4, 2, n_ff); 2], ..TestModel::default() }.write(&path);
        let model = Model::open(&path).unwrap();
        let w = model.block(1).unwrap();
        let x = Rng(5).vec(20 * N_CTX * n_embd, 1.0);
        let [ours, theirs] = [1.into(), devices.compute()].map(|c| {
            let forward = Forward::new(&model, N_CTX, c).unwrap();
            let block = forward.upload(&w).unwrap();
            collected(&forward, &block, &x, n_ff)
        });
        for ((what, ours), (_, theirs)) in ours.iter().zip(&theirs) {
            let apart = apart(theirs, ours);
            println!("{n_embd} x {n_ff}, {what}: {apart:e}");
            let bound = match *what {
                "gradient" | "gradient of vectors" | "gradient of matrices" | "worth of groups" => {
                    devices.close.gradients
                }
                _ => devices.close.sums,
            };
            assert!(apart < bound, "{n_embd} x {n_ff}, {what}: {apart:e}");
        }
    }
}

#[test]
fn llama_cpp_predicts_the_same_there() {
    let there = under_test();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    TestModel { ty: Type::Q8_0, n_embd: 96, blocks: vec![(6, 2, 160); 3], ..TestModel::default() }
        .write(&path);
    let offload = Offload { devices: there.all.clone(), n_layers: usize::MAX };
    let tokens: Vec<i32> = (0..60).map(|i| 3 + i * 11 % 200).collect();
    let losses = |m: LlamaModel| llama_losses(&m, &tokens, 1).unwrap();
    let here = losses(LlamaModel::load(&path).unwrap());
    let off = apart(&losses(LlamaModel::load_on(&path, &offload).unwrap()), &here);
    assert!(off < there.close.losses, "{off}");
}

#[test]
fn what_the_command_makes_there_is_as_good() {
    let devices = under_test();
    let cli = Cli::new();
    TestModel { ty: Type::Q8_0, n_embd: 96, blocks: vec![(6, 3, 256); 4], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    std::fs::write(cli.path("text.txt"), TEXT.repeat(12)).unwrap();
    let quick =
        ["--sparsity", "0.4", "-f", "text.txt", "--self-share", "0", "-c", "64", "--chunks", "16", "-q"];
    let args: Vec<&str> = devices.args.iter().map(String::as_str).collect();
    cli.ok(&[&["in.gguf", "cpu.gguf", "--report", "cpu.json"][..], &quick].concat());
    cli.ok(&[&["in.gguf", "dev.gguf", "--report", "dev.json"][..], &args, &quick].concat());
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(cli.path(name)).unwrap()).unwrap()
    };
    let [cpu, dev] = ["cpu.json", "dev.json"].map(read);
    let groups = |r: &serde_json::Value| -> Vec<String> {
        r["blocks"].as_array().unwrap().iter().map(|b| b["kept_groups"].to_string()).collect()
    };
    assert_eq!(groups(&cpu), groups(&dev));
    let ppl = |r: &serde_json::Value| r["held_out"]["ppl_after"].as_f64().unwrap();
    let off = (ppl(&dev) / ppl(&cpu)).ln().abs();
    println!("{} on the CPU, {} there", ppl(&cpu), ppl(&dev));
    assert!(off < 0.01, "{} on the CPU, {} there", ppl(&cpu), ppl(&dev));
    // The record is the CPU's: devices may round to 16 bits.
    let model = Model::open(&cli.path("dev.gguf")).unwrap();
    let key = |key: &str| model.file.get(key).unwrap();
    let tokens = key("putri.check.tokens").as_unsigned_array().unwrap();
    let tokens: Vec<i32> = tokens.into_iter().map(|t| t as i32).collect();
    let recorded = key("putri.check.nll").as_f32_array().unwrap();
    let losses = own_losses(&model, &tokens, 1).unwrap();
    let apart = losses.iter().zip(&recorded).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
    assert!(losses.len() > 60 && apart < 1e-4, "{apart}");
    // The CPU, which made neither file, reproduces the measurements.
    cli.ok(&["verify", "dev.gguf", "--source", "in.gguf", "-q"]);
    let eval = ["eval", "dev.gguf", "-f", "text.txt", "-c", "64", "--no-speed", "--json", "-q"];
    let found = [&[][..], &args].map(|more| -> f64 {
        let said: serde_json::Value = serde_json::from_str(&cli.ok(&[&eval[..], more].concat())).unwrap();
        said["text"]["ppl"].as_f64().unwrap_or_else(|| panic!("{said}"))
    });
    assert!((found[0] / found[1]).ln().abs() < devices.close.losses, "{found:?}");
}

#[test]
fn memory_there_is_foreseen_and_kept_within() {
    let devices = under_test();
    let cli = Cli::new();
    let path = cli.path("in.gguf");
    TestModel { n_embd: 128, blocks: vec![(8, 4, 512); 3], n_vocab: 600, ..TestModel::default() }
        .write(&path);
    std::fs::write(cli.path("text.txt"), TEXT.repeat(60)).unwrap();
    let model = Model::open(&path).unwrap();
    let args: Vec<&str> = devices.args.iter().map(String::as_str).collect();
    let prune =
        ["in.gguf", "out.gguf", "--force", "--sparsity", "0.4", "-f", "text.txt", "--self-share", "0"];
    let prune = [&prune[..], &["-c", "128", "--chunks", "64", "-q", "--report", "r.json"], &args].concat();
    let c = Calibration { n_ctx: 128, n_fit: 56, n_held_out: 8 };
    let foreseen = [CHUNK_TOKENS, 1].map(|chunk_tokens| {
        let (sparsity, devices) = (0.4, devices.all.clone());
        let settings = Settings { sparsity, chunk_tokens, devices, ..Settings::default() };
        forecast(&model, &c, &settings).unwrap().on_devices()
    });
    assert!(foreseen[1] < 0.6 * foreseen[0], "{foreseen:?}");
    for foreseen in foreseen {
        // Slightly more memory may be needed than is foreseen.
        let limit = (foreseen * 1.2) as u64;
        cli.ok(&[&prune[..], &["--max-device-memory", &limit.to_string()]].concat());
        let report: serde_json::Value =
            serde_json::from_slice(&std::fs::read(cli.path("r.json")).unwrap()).unwrap();
        let taken = report["peak_device_memory_bytes"].as_f64().unwrap();
        println!("{foreseen} foreseen, {taken} taken");
        assert!(taken <= limit as f64 && taken > 0.5 * foreseen, "{foreseen} foreseen, {taken} taken");
    }
    let said = cli.ok(&[&prune[..prune.len() - args.len() - 2], &args, &["--dry-run"]].concat());
    assert!(said.contains("of theirs. 2048 tokens"), "{said}");
    cli.fails(
        &[&prune[..], &["--max-device-memory", "1M"]].concat(),
        1,
        &[
            "a device has too little memory: 0.00 GiB of memory on a device are not enough",
            "with one window at a time",
            "raise --max-device-memory",
            "--device",
        ],
    );
    cli.fails(
        &["in.gguf", "x.gguf", "--sparsity", "0.2", "--max-device-memory", "1G", "-q"],
        2,
        &["--max-device-memory wants a --device"],
    );
}

#[test]
fn devices_are_listed_and_what_is_none_is_refused() {
    let there = under_test();
    let cli = Cli::new();
    TestModel::default().write(&cli.path("in.gguf"));
    let args: Vec<&str> = there.args.iter().map(String::as_str).collect();
    let prune = ["in.gguf", "out.gguf", "--sparsity", "0.2", "-q"];
    cli.fails(&[&prune[..], &["--device", "CUDA9"]].concat(), 2, &["--device CUDA9", "not a device here"]);
    cli.fails(&[&prune[..], &["--rpc", "127.0.0.1:1"]].concat(), 1, &["127.0.0.1:1", "refused"]);
    assert!(cli.ok(&["--list-devices"]).starts_with("Available devices:"));
    if args[0] == "--rpc" {
        let said = cli.ok(&[&["devices"][..], &args].concat());
        assert!(said.contains("RPC0: 127.0.0.1:") && said.contains("RPC1: "), "{said}");
        if devices().len() == 2 && !cli.ok(&["devices"]).contains("0: ") {
            cli.fails(&[&prune[..], &["-ngl", "9"]].concat(), 2, &["wants a device"]);
        }
    }
    // Only the CPU is used, whatever devices exist.
    cli.ok(&[&prune[..], &["--device", "none", "-c", "64", "--chunks", "8", "-ngl", "0"]].concat());
}

#[test]
fn experts_are_observed_there_as_here() {
    let devices = under_test();
    let cli = Cli::new();
    std::fs::write(cli.path("text.txt"), TEXT.repeat(12)).unwrap();
    let quick = ["-f", "text.txt", "--self-share", "0", "-c", "64", "--chunks", "8", "-q", "--force"];
    let work = ["--sparsity", "0.5", "--refine", "4", "--refit-routers", "1"];
    let args: Vec<&str> = devices.args.iter().map(String::as_str).collect();
    for name in ["qwen3moe", "gpt-oss", "glm4moe"] {
        MixtureModel::of(name).write(&cli.path("in.gguf"));
        let mut statistics = Vec::new();
        for (at, more) in [("cpu", &[][..]), ("dev", &args)] {
            let (file, stats) = (format!("{at}.gguf"), format!("{at}.json"));
            let own = ["in.gguf", &file, "--stats-out", &stats];
            cli.ok(&[&own[..], &work, &quick, more].concat());
            cli.ok(&["verify", &file, "--source", "in.gguf", "-q"]);
            let read: serde_json::Value =
                serde_json::from_slice(&std::fs::read(cli.path(&stats)).unwrap()).unwrap();
            statistics.push(read["scores"].clone());
        }
        let [cpu, dev] = &statistics[..] else { panic!("two runs") };
        for (layer, scores) in cpu.as_object().unwrap() {
            for (a, b) in scores.as_array().unwrap().iter().zip(dev[layer].as_array().unwrap()) {
                let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
                assert!((a - b).abs() < 0.05 * a.abs().max(0.1), "{name}, layer {layer}: {a} {b}");
            }
        }
    }
}

#[test]
fn a_machine_that_goes_away_leaves_the_statistics() {
    if std::env::var("PUTRI_TEST_DEVICE").is_ok() {
        return;
    }
    let cli = Cli::new();
    MixtureModel::of("qwen3moe").write(&cli.path("in.gguf"));
    std::fs::write(cli.path("text.txt"), TEXT.repeat(2000)).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let program = env!("CARGO_BIN_EXE_putri-gguf");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(program);
        command.args(args).current_dir(cli.dir.path());
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let mut server = run(&["rpc-server", "--port", &port, "-t", "1"]);
    let endpoint = format!("127.0.0.1:{port}");
    while TcpStream::connect(&endpoint).is_err() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let client = run(&[
        "in.gguf",
        "out.gguf",
        "--sparsity",
        "0.5",
        "-f",
        "text.txt",
        "--self-share",
        "0",
        "-c",
        "64",
        "--chunks",
        "1000",
        "-q",
        "--state-dir",
        "state",
        "--rpc",
        &endpoint,
        "-ngl",
        "99",
        "-t",
        "1",
    ]);
    while !cli.path("state/observed.gguf").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.kill().unwrap();
    server.wait().unwrap();
    let out = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("another machine went away") || said.contains("failed to decode"), "{said}");
    assert!(cli.path("state/observed.gguf").exists() && !cli.path("out.gguf").exists());
}
