//! Arguments of `recover`.

use super::DEFAULT_CTX;
use super::choices::RecoverMethodArg;
use super::eval::DeviceArgs;
use crate::cli::values::{bytes, share, time, tokens};
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `recover`.
#[derive(clap::Args, Clone, Debug)]
pub struct RecoverArgs {
    /// The pruned model (GGUF); never written to
    pub input: PathBuf,
    /// Path of the recovered model
    ///
    /// The file appears when it is complete and verified. --force replaces an existing one.
    pub output: PathBuf,
    /// The model that it was pruned from (GGUF, or ollama:NAME)
    ///
    /// Its predictions are what the pruned model learns. Vocabulary, tokenizer and n_embd have to be those of
    /// the pruned model; its type may be another, best the one with the most bits.
    #[arg(long, value_name = "MODEL")]
    pub source: PathBuf,
    /// How long to train, in tokens, as in 250k or 1M
    ///
    /// Gains grow with tokens, ever more slowly. Training ends sooner if held-out text shows no more gain.
    /// Default: 1M, unless --time is given.
    #[arg(long, value_name = "N", value_parser = tokens, conflicts_with = "time")]
    pub tokens: Option<usize>,
    /// How long to train, as in 45min or 2h
    ///
    /// The limit becomes a number of steps after the third one, so that the rate can fall in time. Reading and
    /// rounding take a few minutes more.
    #[arg(long, value_name = "T", value_parser = time)]
    pub time: Option<Duration>,
    /// Largest step of matrices, relative to the size of their values
    ///
    /// Norms and biases move likewise. Too high a rate harms text of other kinds first.
    #[arg(long, value_name = "R", hide_short_help = true)]
    pub rate: Option<f64>,
    /// How matrices move
    ///
    /// full gives the better result. lora needs memory for the adapters only, and merges them at the end.
    #[arg(long, value_enum, default_value_t = RecoverMethodArg::Full, hide_short_help = true)]
    pub recover_method: RecoverMethodArg,
    /// Replace existing outputs
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Do not load and evaluate the result with llama.cpp
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub no_verify: bool,
    /// Also write a report, as a page (.html) or as JSON (.json)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,

    /// Text to train on; may be given more than once
    ///
    /// Use text like the text that the model will be used on. A part of the training text is still generated
    /// by the source; see --self-share.
    #[arg(short, long, value_name = "TEXT", help_heading = "Calibration")]
    pub file: Vec<PathBuf>,
    /// Share of the training text that the source generates itself, as in 0.5 or 50%
    ///
    /// From 0 to 1; below 1 it needs --file. Default: 0.5 with --file, else 1.
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Calibration", hide_short_help = true)]
    pub self_share: Option<f64>,
    /// Share of the generated text that is conversations in the model's chat template
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = share,
        default_value_t = 0.0,
        help_heading = "Calibration",
        hide_short_help = true
    )]
    pub chat_share: f64,
    /// Encoding of --file texts without a byte-order mark, one of the WHATWG's labels
    #[arg(
        long,
        value_name = "LABEL",
        requires = "file",
        help_heading = "Calibration",
        hide_short_help = true
    )]
    pub encoding: Option<String>,
    /// Parse names of special tokens in --file texts, such as <|im_end|>
    #[arg(long, requires = "file", help_heading = "Calibration", hide_short_help = true)]
    pub parse_special: bool,
    /// Tokens per window, from 16 to 32768
    #[arg(short, long, value_name = "N", default_value_t = DEFAULT_CTX, help_heading = "Calibration")]
    pub ctx_size: usize,
    /// Number of windows of text; after the first pass they come back with tokens resampled
    ///
    /// From 1 to 1048576. Held-out windows come on top, one to eight per source of text.
    #[arg(long, value_name = "N", default_value_t = 128, help_heading = "Calibration")]
    pub chunks: usize,
    /// Seed of the generated text
    #[arg(short, long, default_value_t = 2, help_heading = "Calibration", hide_short_help = true)]
    pub seed: u64,

    /// Number of threads, at most one per core [default: all cores]
    ///
    /// From 1 to 512. The number does not change the result.
    #[arg(short, long, value_name = "N", help_heading = "Run")]
    pub threads: Option<usize>,
    /// Memory limit, not counting the memory-mapped models, as in 8G
    ///
    /// Under a limit, weights, the optimiser's state and residual streams are kept in unnamed files beside the
    /// output. In bytes, or with K, M, G or T in powers of 1024. Default: no limit.
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Run")]
    pub max_memory: Option<u64>,
    /// Keep checkpoints of the run in this folder, so that it can be resumed
    #[arg(long, value_name = "DIR", help_heading = "Run", hide_short_help = true)]
    pub state_dir: Option<PathBuf>,
    /// Continue the run in --state-dir
    #[arg(long, requires = "state_dir", help_heading = "Run", hide_short_help = true)]
    pub resume: bool,
    /// Show time and memory to expect; write nothing
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,
    /// Also print the time and the matrix throughput of each stage
    #[arg(long, help_heading = "Run", hide_short_help = true)]
    pub timings: bool,
    /// Print events as JSON objects, one per line, instead of progress and summary
    #[arg(long, help_heading = "Run", hide_short_help = true, conflicts_with_all = ["dry_run", "timings"])]
    pub json: bool,
    /// Show no progress on stderr
    #[arg(short, long, help_heading = "Run")]
    pub quiet: bool,
    /// Choice of devices.
    #[command(flatten)]
    pub devices: DeviceArgs,
}
