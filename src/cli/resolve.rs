//! Conversion of arguments to a job.

use super::args::{ArchArg, Args, DeviceArgs, EvalArgs, HeadsArg, MethodArg, MoeArg, PplStyle};
use super::experts::experts;
use super::values::{quantise, tensor_types, threads};
use anyhow::{Context, Result, bail, ensure};
use putri_gguf::calibrate::Recipe;
use putri_gguf::evaluate::Protocol;
use putri_gguf::forward::chunk_tokens;
use putri_gguf::ggml::{self, Device, Offload};
use putri_gguf::model::{Arch, FfnUnit, Heads};
use putri_gguf::ollama::{self, OllamaError, Stored};
use putri_gguf::pipeline::{Method, RecoverSettings, ResampleSettings, Settings, Target, TuneSettings};
use putri_gguf::text::Encoding;
use putri_gguf::{EvalJob, Job, KeepState, QualityLimit, RUN_CTX};
use std::path::{Path, PathBuf};

/// Checks combinations of values, and fills in values that depend on the machine.
pub fn resolve(args: Args, devices: &DeviceArgs) -> Result<Job> {
    let target = args.target_size.map(Target::Bytes).or_else(|| args.target_params.map(Target::Params));
    let limit = limit(&args)?;
    several(&args, limit)?;
    // With a target or quality limit, the sparsity is found once the model is known. A very small sparsity
    // may meet a limit.
    let least = if limit.is_some() { 0.01 } else { Settings::default().sparsity };
    let s = args.sparsity.unwrap_or(least);
    ensure!((0.0..1.0).contains(&s), "--sparsity {s} is not a share from 0 to 1 (0.25 removes a quarter)");
    if s == 0.0 {
        goes_with_a_copy(&args)?;
    }
    let named = [
        ("--imatrix-out", &args.imatrix_out),
        ("--report", &args.report),
        ("--stats-out", &args.stats_out),
        ("--package", &args.package),
        ("--state-dir", &args.state_dir),
    ];
    let named = named.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?)));
    for (flag, path) in std::iter::once(("the output", &args.output)).chain(named) {
        let name = path.to_str().unwrap_or_default();
        ensure!(name != "-", "{flag}: - is no name; name a file or folder (./- if it shall be called so)");
        if let Some(model) = name.strip_prefix(OLLAMA) {
            bail!("{flag}: {name} is no file; write one, and --ollama-create {model} makes a model of it");
        }
    }
    ensure!(
        !args.file.iter().any(|path| path.as_os_str() == "-"),
        "--file - is no file; /dev/stdin is standard input"
    );
    if let Some(report) = &args.report {
        let kind = report.extension().and_then(|e| e.to_str());
        let name = report.display();
        ensure!(matches!(kind, Some("html" | "json")), "--report {name} ends in neither .html nor .json");
        ensure!(!args.dry_run, "--dry-run has nothing to report");
    }
    if let Some(share) = args.self_share {
        ensure!((0.0..=1.0).contains(&share), "--self-share {share} is not a share from 0 to 1");
        ensure!(
            share == 1.0 || !args.file.is_empty(),
            "--self-share {share} leaves a part to text files, but there is no --file"
        );
    }
    let share = args.chat_share;
    ensure!((0.0..=1.0).contains(&share), "--chat-share {share} is not a share from 0 to 1");
    ensure!(
        share == 0.0 || args.self_share != Some(0.0),
        "--chat-share {share} is a share of the self-written text, of which --self-share 0 leaves none"
    );
    ensure!(
        (target.is_none() && args.target_ram.is_none()) || !args.dry_run || args.to.is_none(),
        "--dry-run does not know sizes in other types: no --target-size, --target-params or --target-ram with --type there"
    );
    if let Some(n) = args.target_ctx {
        ensure!((1..=1 << 24).contains(&n), "--target-ctx {n} is not from 1 to 16777216");
    }
    ensure!(args.ctx_size >= 16, "--ctx-size {} is too small; 16 or more", args.ctx_size);
    ensure!(args.ctx_size <= 32768, "--ctx-size {} is too large; at most 32768", args.ctx_size);
    ensure!((1..=1 << 20).contains(&args.chunks), "--chunks {} is not from 1 to 1048576", args.chunks);
    let mixed = !args.file.is_empty() && args.self_share.is_none_or(|s| s > 0.0 && s < 1.0);
    ensure!(
        !mixed || args.chunks >= 2,
        "a mixture of text and self-written windows needs --chunks 2 or more"
    );
    let n_threads = threads(args.threads)?;
    let method = match args.method {
        MethodArg::Putri => Method::Putri,
        MethodArg::Paper => Method::Paper,
    };
    let ours = |flag, wanted: Option<usize>, default, most| {
        ensure!(
            method == Method::Putri || wanted.is_none_or(|n| n == 0),
            "{flag} goes with --method putri; the paper's method has no such step"
        );
        let n = wanted.unwrap_or(if method == Method::Putri { default } else { 0 });
        ensure!(n <= most, "{flag} {n} is not from 0 to {most}");
        Ok(n)
    };
    let resample_copies =
        ours("--resample-copies", args.resample_copies, Settings::default().resample.copies, 100)?;
    let tune = ours("--tune", args.tune, Settings::default().tune.passes, 1000)?;
    let budget = args.recover.0;
    ensure!(
        budget.is_none() || method == Method::Putri,
        "--recover goes with --method putri; the command recover trains a file of any method"
    );
    let experts = experts(&args)?;
    let offload = offload(devices)?;
    ensure!(
        args.max_device_memory.is_none() || !offload.devices.is_empty(),
        "--max-device-memory wants a --device"
    );
    Ok(Job {
        n_gpu_layers: offload.n_layers,
        imatrix_out: args.imatrix_out,
        imatrix_in: args.imatrix,
        stats_out: args.stats_out,
        stats_in: args.stats_in,
        quantise: args.to.map(|name| quantise(&name, args.allow_requantize)).transpose()?,
        state: args.state_dir.map(|folder| KeepState { folder, resume: args.resume }),
        keep_split: args.keep_split,
        samples: args.report.is_some() || args.package.is_some(),
        compare_quant: args.compare_quant,
        limit,
        target_ram: args.target_ram,
        run_ctx: args.target_ctx.or(Some(args.ctx_size).filter(|n| *n > RUN_CTX)),
        max_memory: args.max_memory,
        max_device_memory: args.max_device_memory,
        force: args.force,
        verify: !args.no_verify,
        recipe: Recipe {
            n_ctx: args.ctx_size,
            n_windows: args.chunks,
            self_share: args.self_share.unwrap_or(if args.file.is_empty() { 1.0 } else { 0.5 }),
            files: args.file,
            weights: args.text_weights,
            encoding: encoding(args.encoding.as_deref())?,
            parse_special: args.parse_special,
            chat_share: args.chat_share,
            seed: args.seed,
            n_threads,
            ..Recipe::default()
        },
        settings: Settings {
            sparsity: s,
            target,
            method,
            heads: match args.heads {
                HeadsArg::Auto => Heads::Auto,
                HeadsArg::PerLayer => Heads::PerLayer,
                HeadsArg::Uniform => Heads::Uniform,
                HeadsArg::None => Heads::None,
            },
            moe_unit: match args.moe {
                MoeArg::Experts => FfnUnit::Expert,
                MoeArg::Width => FfnUnit::Neuron,
            },
            experts,
            arch: match args.arch {
                ArchArg::Auto => Arch::Auto,
                ArchArg::Keep => Arch::Keep,
            },
            n_threads,
            chunk_tokens: chunk_tokens(n_threads),
            devices: offload.devices,
            resample: ResampleSettings { copies: resample_copies, ..ResampleSettings::default() },
            tune: TuneSettings { passes: tune, ..TuneSettings::default() },
            recover: RecoverSettings { budget, ..RecoverSettings::default() },
            types: tensor_types(&args.tensor_type)?,
            ..Settings::default()
        },
        ..Job::new(args.input, args.output)
    })
}

/// Prefix of the names of models in a local Ollama.
const OLLAMA: &str = "ollama:";

/// Finds the model of a local Ollama that `input` names, if it names one.
pub fn stored(input: &Path) -> Result<Option<Stored>, OllamaError> {
    match input.to_str().and_then(|name| name.strip_prefix(OLLAMA)) {
        Some(name) => ollama::find(&ollama::store()?, name).map(Some),
        None => Ok(None),
    }
}

/// Reads `--max-kld` and `--max-ppl-ratio`.
fn limit(args: &Args) -> Result<Option<QualityLimit>> {
    Ok(match (args.max_kld, args.max_ppl_ratio) {
        (Some(most), _) => {
            ensure!(most > 0.0 && most.is_finite(), "--max-kld {most} is not a positive number of nats");
            Some(QualityLimit::Kld(most))
        }
        (_, Some(most)) => {
            ensure!(most > 1.0 && most.is_finite(), "--max-ppl-ratio {most} is not above 1");
            Some(QualityLimit::PplRatio(most))
        }
        _ => None,
    })
}

/// Checks arguments for more than one sparsity.
fn several(args: &Args, limit: Option<QualityLimit>) -> Result<()> {
    if let Some(list) = &args.nested {
        let shares = list.iter().all(|s| *s > 0.0 && *s < 1.0);
        let rising = list.windows(2).all(|two| two[0] < two[1]);
        ensure!(shares && rising, "--nested wants shares between 0 and 1, rising, as in 0.1,0.2,0.3");
    }
    if limit.is_some() || args.nested.is_some() {
        ensure!(!args.dry_run, "--dry-run is about one sparsity; give --sparsity");
        ensure!(args.state_dir.is_none(), "--state-dir keeps the state of one sparsity; give --sparsity");
        ensure!(
            args.method == MethodArg::Putri,
            "--max-kld, --max-ppl-ratio and --nested go with --method putri"
        );
    }
    Ok(())
}

/// Rejects options that need a pruned model if nothing is removed.
fn goes_with_a_copy(args: &Args) -> Result<()> {
    for (given, flag) in [
        (args.imatrix_out.is_some(), "--imatrix-out"),
        (args.resample_copies.is_some_and(|n| n > 0), "--resample-copies"),
        (args.tune.is_some_and(|n| n > 0), "--tune"),
        (args.recover.0.is_some(), "--recover"),
        (args.dry_run, "--dry-run"),
        (args.state_dir.is_some(), "--state-dir"),
        (args.to.is_some(), "--type"),
        (args.report.is_some(), "--report"),
        (args.compare_quant, "--compare-quant"),
        (args.keep_split, "--keep-split"),
        (args.modelfile, "--modelfile"),
        (args.package.is_some(), "--package"),
        (args.ollama_create.is_some(), "--ollama-create"),
        (args.target_ctx.is_some(), "--target-ctx"),
        (args.json, "--json"),
    ] {
        ensure!(!given, "{flag} needs a model to prune; --sparsity 0 only copies");
    }
    Ok(())
}

/// Path of a file of one of the results of `--nested`: the removed share, in percent, is appended to the
/// name.
pub fn nested_name(path: &Path, share: f64) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or(String::new(), |e| format!(".{}", e.to_string_lossy()));
    // Rounds 0.07 to 7, not 7.000000000000001.
    let percent = (share * 1e6).round() / 1e4;
    path.with_file_name(format!("{stem}-{percent}{extension}"))
}

/// Converts the arguments of `eval` to a job.
pub fn resolve_eval(args: EvalArgs) -> Result<EvalJob> {
    ensure!(
        !args.file.is_empty() || args.hellaswag.is_some() || !args.no_speed,
        "there is nothing to measure: give --file or --hellaswag, or leave --no-speed out"
    );
    ensure!((16..=32768).contains(&args.ctx_size), "--ctx-size {} is not from 16 to 32768", args.ctx_size);
    ensure!(args.chunks != Some(0), "--chunks 0 leaves nothing to score");
    ensure!(args.hellaswag_tasks > 0, "--hellaswag-tasks 0 leaves nothing to do");
    Ok(EvalJob {
        model: args.model,
        base: args.base,
        texts: args.file,
        encoding: encoding(args.encoding.as_deref())?,
        protocol: match args.ppl_style {
            PplStyle::Llama => Protocol::Llama,
            PplStyle::Hf => Protocol::Hf,
        },
        n_ctx: args.ctx_size,
        n_windows: args.chunks.unwrap_or(usize::MAX),
        tasks: args.hellaswag.map(|path| (path, args.hellaswag_tasks)),
        speed: !args.no_speed,
        n_threads: threads(args.threads)?,
        offload: offload(&args.devices)?,
    })
}

/// Reads `--device` and `--n-gpu-layers` after servers were added to the devices.
pub(super) fn offload(args: &DeviceArgs) -> Result<Offload> {
    let n_layers = args.n_gpu_layers.unwrap_or(usize::MAX);
    if args.device.is_empty() && args.rpc.is_empty() && args.n_gpu_layers.is_none_or(|n| n == 0)
        || args.device == ["none"]
    {
        return Ok(Offload::default());
    }
    let there = ggml::devices();
    let why = ggml::gave_up().map(|why| format!(" ({why})")).unwrap_or_default();
    let names = || match there.is_empty() {
        true => format!("there are none{why}"),
        false => format!("there are {}", there.iter().map(|d| &*d.name).collect::<Vec<_>>().join(", ")),
    };
    let named = |name: &String| {
        let found = there.iter().find(|d| d.name.eq_ignore_ascii_case(name));
        found.map(|d| d.device).with_context(|| format!("--device {name} is not a device here; {}", names()))
    };
    let devices: Vec<Device> = if args.device.is_empty() {
        ensure!(!there.is_empty(), "--n-gpu-layers wants a device, and this build or machine has none{why}");
        there.iter().map(|d| d.device).collect()
    } else {
        args.device.iter().map(named).collect::<Result<_>>()?
    };
    Ok(Offload { devices, n_layers })
}

/// Reads `--encoding`.
pub(super) fn encoding(label: Option<&str>) -> Result<Option<Encoding>> {
    let named = |label: &str| {
        let problem = || format!("--encoding {label} is not known; windows-1252, shift_jis and gb18030 are");
        Encoding::for_label(label).with_context(problem)
    };
    label.map(named).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;
    use putri_gguf::ggml::Type;

    fn job(extra: &[&str]) -> Result<Job> {
        let base = ["putri-gguf", "in.gguf", "out.gguf"];
        let cli = Cli::try_parse_from(base.iter().chain(extra))?;
        resolve(cli.prune.expect("arguments of pruning"), &cli.devices)
    }

    #[test]
    fn shares_follow_the_files() {
        assert_eq!(job(&["--sparsity", "0.2"]).unwrap().recipe.self_share, 1.0);
        assert_eq!(job(&["--sparsity", "0.2", "-f", "a.txt"]).unwrap().recipe.self_share, 0.5);
        assert_eq!(
            job(&["--sparsity", "0.2", "-f", "a.txt", "--self-share", "0"]).unwrap().recipe.self_share,
            0.0
        );
    }

    #[test]
    fn shares_may_be_percentages() {
        let sparsity = |text| job(&["--sparsity", text]).unwrap().settings.sparsity;
        assert_eq!([sparsity("0.25"), sparsity("25%"), sparsity("12.5 %")], [0.25, 0.25, 0.125]);
    }

    #[test]
    fn outputs_are_files() {
        for output in ["-", "ollama:small"] {
            let cli = Cli::try_parse_from(["putri-gguf", "in.gguf", output, "--sparsity", "0.2"]).unwrap();
            let said = resolve(cli.prune.unwrap(), &cli.devices).unwrap_err().to_string();
            assert!(said.contains("output"), "{said}");
        }
    }

    #[test]
    fn tensor_types_are_named_as_in_llama_quantize() {
        let types = job(&["--sparsity", "0.2", "--tensor-type", "ffn_down=Q8_0"]).unwrap().settings.types;
        assert_eq!((types.ffn_down, types.attn_output), (Some(Type::Q8_0), None));
    }

    #[test]
    fn types_are_named_as_in_llama_quantize() {
        let quantise = |name| job(&["--sparsity", "0.2", "--type", name]).unwrap().quantise.unwrap();
        assert_eq!((quantise("q4_k_m").to.name(), quantise("Q4_K").again), ("Q4_K_M", false));
        assert!(
            job(&["--sparsity", "0.2", "--type", "q8_0", "--allow-requantize"])
                .unwrap()
                .quantise
                .unwrap()
                .again
        );
    }

    #[test]
    fn memory_limits_are_bytes() {
        let limited = job(&["--sparsity", "0.2", "--max-memory", "1.5g"]).unwrap();
        assert_eq!((limited.max_memory, limited.target_ram), (Some(3 << 29), None));
    }

    #[test]
    fn nested_outputs_are_named_by_percent() {
        let names = [0.07, 0.125, 0.5].map(|share| nested_name(Path::new("a/out.gguf"), share));
        assert_eq!(
            names.map(|p| p.display().to_string()),
            ["a/out-7.gguf", "a/out-12.5.gguf", "a/out-50.gguf"]
        );
    }

    #[test]
    fn targets_are_bytes_or_parameters() {
        let target = |args: &[&str]| job(args).unwrap().settings.target;
        assert_eq!(target(&["--target-size", "80M"]), Some(Target::Bytes(80 << 20)));
        assert_eq!(target(&["--target-params", "1.2e9"]), Some(Target::Params(1_200_000_000)));
        assert_eq!(target(&["--target-params", "110M"]), Some(Target::Params(110_000_000)));
        assert_eq!(target(&["--sparsity", "0.2"]), None);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            &["--sparsity", "1.0"][..],
            &["--sparsity", "-0.1"],
            &["--sparsity", "25"],
            &["--sparsity", "25x%"],
            &["--sparsity", "%"],
            &["--sparsity", "NaN"],
            &["--sparsity", "0.2", "--self-share", "0.5"],
            &["--sparsity", "0.2", "-f", "a.txt", "--self-share", "2"],
            &["--sparsity", "0.2", "--ctx-size", "4"],
            &["--sparsity", "0.2", "--chunks", "0"],
            &["--sparsity", "0.2", "--threads", "0"],
            &["--sparsity", "0", "--imatrix-out", "i.gguf"],
            &["--sparsity", "0.2", "--chat-share", "2"],
            &["--sparsity", "0.2", "--chat-share", "0.5", "-f", "a.txt", "--self-share", "0"],
            &["--sparsity", "0.2", "--allow-requantize"],
            &["--sparsity", "0.2", "--type", "q99"],
            &["--sparsity", "0", "--type", "q8_0"],
            &["--sparsity", "0.2", "--target-size", "50M"],
            &["--target-params", "1M", "--target-size", "50M"],
            &["--target-size", "small"],
            &["--target-params", "1Q"],
            &["--sparsity", "0.2", "--max-kld", "0.1"],
            &["--max-ppl-ratio", "1.1", "--max-kld", "0.1"],
            &["--max-ppl-ratio", "0.9"],
            &["--max-kld", "-1"],
            &["--max-kld", "0.1", "--dry-run"],
            &["--nested", "0.2,0.1"],
            &["--nested", "0.1,1.1"],
            &["--nested", "0.1,0.2", "--state-dir", "s"],
            &["--nested", "0.1,0.2", "--method", "paper"],
            &["--sparsity", "0.2", "--max-memory", "much"],
            &["--sparsity", "0.2", "--max-memory", "8Q"],
            &["--sparsity", "0.2", "--max-memory", "-1G"],
            &["--sparsity", "0", "--dry-run"],
            &["--sparsity", "0", "--state-dir", "s"],
            &["--sparsity", "0.2", "--resume"],
            &["--sparsity", "0.2", "--encoding", "latin1"],
            &["--sparsity", "0.2", "-f", "a.txt", "--encoding", "klingon"],
            &["--sparsity", "0.2", "--parse-special"],
            &["--sparsity", "0.2", "--tensor-type", "q8_0"],
            &["--sparsity", "0.2", "--tensor-type", "ffn_down=q99"],
            &["--sparsity", "0.2", "--tensor-type", "ffn_down=i32"],
            &["--sparsity", "0.2", "--tensor-type", "attn_q=q8_0"],
            &[],
        ] {
            assert!(job(bad).is_err(), "{bad:?}");
        }
    }
}
