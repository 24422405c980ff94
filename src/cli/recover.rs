//! Conversion of the arguments of `recover` to a job.

use super::args::{RecoverArgs, RecoverMethodArg};
use super::resolve::{encoding, offload};
use super::values::threads;
use anyhow::{Result, ensure};
use putri_gguf::calibrate::Recipe;
use putri_gguf::forward::chunk_tokens;
use putri_gguf::pipeline::{Method, Moves, RecoverBudget, RecoverSettings, Settings};
use putri_gguf::{Job, KeepState};

/// Number of tokens to train on, unless another amount is given.
const TOKENS: usize = 1_000_000;

/// Rank of the adapters.
const RANK: usize = 32;

/// Checks combinations of values, and fills in values that depend on the machine.
pub fn resolve_recover(args: RecoverArgs) -> Result<Job> {
    ensure!((16..=32768).contains(&args.ctx_size), "--ctx-size {} is not from 16 to 32768", args.ctx_size);
    ensure!((1..=1 << 20).contains(&args.chunks), "--chunks {} is not from 1 to 1048576", args.chunks);
    let share = args.self_share.unwrap_or(if args.file.is_empty() { 1.0 } else { 0.5 });
    ensure!((0.0..=1.0).contains(&share), "--self-share {share} is not a share from 0 to 1");
    ensure!(
        share == 1.0 || !args.file.is_empty(),
        "--self-share {share} leaves a part to text files, but there is no --file"
    );
    ensure!(
        (0.0..=1.0).contains(&args.chat_share),
        "--chat-share {} is not a share from 0 to 1",
        args.chat_share
    );
    let defaults = RecoverSettings::default();
    let rate = args.rate.unwrap_or(defaults.rate);
    ensure!(rate > 0.0 && rate <= 1.0, "--rate {rate} is not above 0 and at most 1");
    let budget = match args.time {
        Some(limit) => RecoverBudget::Time(limit),
        None => RecoverBudget::Tokens(args.tokens.unwrap_or(TOKENS)),
    };
    let moves = match args.recover_method {
        RecoverMethodArg::Full => defaults.moves,
        RecoverMethodArg::Lora => Moves::LowRank(RANK),
    };
    let n_threads = threads(args.threads)?;
    let offload = offload(&args.devices)?;
    Ok(Job {
        recover_from: Some(args.source),
        n_gpu_layers: offload.n_layers,
        state: args.state_dir.map(|folder| KeepState { folder, resume: args.resume }),
        samples: args.report.is_some(),
        max_memory: args.max_memory,
        force: args.force,
        verify: !args.no_verify,
        recipe: Recipe {
            n_ctx: args.ctx_size,
            n_windows: args.chunks,
            self_share: share,
            files: args.file,
            encoding: encoding(args.encoding.as_deref())?,
            parse_special: args.parse_special,
            chat_share: args.chat_share,
            seed: args.seed,
            n_threads,
            ..Recipe::default()
        },
        settings: Settings {
            sparsity: 0.0,
            method: Method::Recovery,
            n_threads,
            chunk_tokens: chunk_tokens(n_threads),
            devices: offload.devices,
            recover: RecoverSettings { budget: Some(budget), rate, vector_rate: rate, moves, ..defaults },
            ..Settings::default()
        },
        ..Job::new(args.input, args.output)
    })
}
