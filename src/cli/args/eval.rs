//! Arguments of `eval`, and of the choice of devices.

use super::DEFAULT_CTX;
use super::choices::PplStyle;
use std::path::PathBuf;

/// Arguments of `eval`.
#[derive(clap::Args, Clone, Debug)]
pub struct EvalArgs {
    /// The model to measure (GGUF, or ollama:NAME)
    pub model: PathBuf,
    /// Compare with this model, usually the source of the pruned one
    ///
    /// With --file, eval adds the KL divergence from this model's predictions (mean, median, 99th percentile,
    /// maximum) and the share of positions where both models rank the same token first. Tasks and speed are
    /// measured for both models. Both need the same vocabulary.
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
    /// Text to score; may be given more than once
    ///
    /// llama.cpp computes the perplexity of the text in windows of --ctx-size tokens. Use text that the model
    /// was not calibrated on. Without a text, eval measures speed and, with --hellaswag, tasks only.
    #[arg(short, long, value_name = "TEXT")]
    pub file: Vec<PathBuf>,
    /// Encoding of texts and tasks without a byte-order mark
    ///
    /// The name is one of the WHATWG's labels, as in windows-1252, shift_jis or gb18030. UTF-8, UTF-16 and
    /// UTF-32 with a mark are recognised. Default: UTF-8.
    #[arg(long, value_name = "LABEL")]
    pub encoding: Option<String>,
    /// Which tokens of a window are scored
    ///
    /// Perplexities of the two styles are not comparable.
    #[arg(long, value_enum, default_value_t = PplStyle::Llama)]
    pub ppl_style: PplStyle,
    /// Tokens per window
    ///
    /// From 16 to 32768. Larger windows give lower perplexities, so compare figures of one window size only.
    #[arg(short, long, value_name = "N", default_value_t = DEFAULT_CTX)]
    pub ctx_size: usize,
    /// Largest number of windows to score
    ///
    /// 1 or more. Default: all windows of the text.
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,
    /// Multiple-choice tasks to score
    ///
    /// The file has the format that llama-perplexity reads for HellaSwag. The score is the share of tasks
    /// whose correct ending is the most likely one per token. See --hellaswag-tasks.
    #[arg(long, value_name = "TASKS")]
    pub hellaswag: Option<PathBuf>,
    /// Largest number of tasks to score
    ///
    /// 1 or more; goes with --hellaswag.
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub hellaswag_tasks: usize,
    /// Do not measure tokens per second
    ///
    /// By default eval measures processed (pp) and generated (tg) tokens per second, as llama-bench does.
    #[arg(long)]
    pub no_speed: bool,
    /// Number of threads, at most one per core [default: all cores]
    ///
    /// From 1 to 512.
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    /// Print the result as a JSON object
    ///
    /// The object goes to stdout in place of the table.
    #[arg(long)]
    pub json: bool,
    /// Show no progress on stderr
    ///
    /// The result on stdout and errors on stderr are still printed.
    #[arg(short, long)]
    pub quiet: bool,
    /// Choice of devices.
    #[command(flatten)]
    pub devices: DeviceArgs,
}

/// Arguments of the choice of devices.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// Compute on these devices instead of the CPU, as in CUDA0 or Vulkan0; also -dev
    ///
    /// The command devices lists the names; none means the CPU. With several devices, each gets a share of
    /// the layers. The CPU still solves for new values and chooses heads and neurons. A device rounds sums
    /// differently, so a run writes another file than on the CPU, of about the same quality.
    #[arg(
        long,
        visible_alias = "dev",
        value_name = "NAME,NAME",
        value_delimiter = ',',
        help_heading = "Devices",
        hide_short_help = true
    )]
    pub device: Vec<String>,
    /// Layers that llama.cpp offloads when it generates text and evaluates; also -ngl
    ///
    /// Default: all layers with --device or --rpc, else none. Without --device, a number above 0 selects all
    /// devices there are.
    #[arg(long, alias = "gpu-layers", value_name = "N", help_heading = "Devices", hide_short_help = true)]
    pub n_gpu_layers: Option<usize>,
    /// Also use the devices of these machines
    ///
    /// On each machine, putri-gguf rpc-server or llama.cpp's rpc-server of the same version has to run. Name
    /// a machine as HOST:PORT. The protocol has no password: use it in trusted networks only.
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        help_heading = "Devices",
        hide_short_help = true
    )]
    pub rpc: Vec<String>,
}
