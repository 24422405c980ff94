//! What the user typed.

use clap::{Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Make a GGUF language model smaller and faster by structured pruning.
///
/// Removes whole attention heads and feed-forward neurons, refits what stays, and writes a GGUF that
/// stock llama.cpp and Ollama run. Without --file the model writes its own calibration text.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "putri-gguf",
    version = version(),
    max_term_width = 100,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    override_usage = "putri-gguf [OPTIONS] --sparsity <S> <INPUT> <OUTPUT>\n       putri-gguf inspect|eval|verify [OPTIONS] <MODEL>"
)]
pub struct Cli {
    /// What to do instead of pruning.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to prune.
    #[command(flatten)]
    pub prune: Option<Args>,
    /// Where to compute. Not part of the former: what is optional as a whole can have no such part.
    #[command(flatten)]
    pub devices: DeviceArgs,
}

/// Arguments of where to compute.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// (-dev) Compute on these devices instead of the CPU, as in Vulkan0; the command devices lists them
    #[arg(
        long,
        visible_alias = "dev",
        value_name = "NAME,NAME",
        value_delimiter = ',',
        help_heading = "Devices",
        hide_short_help = true
    )]
    pub device: Vec<String>,
    /// (-ngl) Layers that llama.cpp keeps on devices when it writes text and judges [default: all, with --device]
    #[arg(long, alias = "gpu-layers", value_name = "N", help_heading = "Devices", hide_short_help = true)]
    pub n_gpu_layers: Option<usize>,
    /// Other machines' devices, too: those where rpc-server runs
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        help_heading = "Devices",
        hide_short_help = true
    )]
    pub rpc: Vec<String>,
}

/// Other things than pruning.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Say what is in a model, and what could go, from its header alone
    Inspect {
        /// The model (GGUF)
        input: PathBuf,
        /// As a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Measure a file with llama.cpp: perplexity, speed, and how far it is from another
    Eval(EvalArgs),
    /// Check that a pruned file is sound, and does what it did when it was made
    Verify {
        /// The pruned file
        model: PathBuf,
        /// What it was made from
        #[arg(long, value_name = "MODEL")]
        source: Option<PathBuf>,
        /// Threads [default: all cores]
        #[arg(short, long, value_name = "N")]
        threads: Option<usize>,
        /// As a JSON object
        #[arg(long)]
        json: bool,
        /// No progress on stderr
        #[arg(short, long)]
        quiet: bool,
    },
    /// List the devices that --device takes
    Devices {
        /// Those of these machines, too
        #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
        rpc: Vec<String>,
    },
    /// Let other machines' --rpc compute on this one's CPU; for trusted networks only
    RpcServer {
        /// Where to listen
        #[arg(long, default_value = "127.0.0.1")]
        host: String,
        /// Port
        #[arg(short, long, default_value_t = 50052)]
        port: u16,
        /// Threads [default: all cores]
        #[arg(short, long, value_name = "N")]
        threads: Option<usize>,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff
    Man,
}

/// Arguments of measuring.
#[derive(clap::Args, Clone, Debug)]
pub struct EvalArgs {
    /// The file
    pub model: PathBuf,
    /// The file it is compared with, most often the one that it was made from
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
    /// Text to score; may be given more than once
    #[arg(short, long, value_name = "TEXT")]
    pub file: Vec<PathBuf>,
    /// Encoding of texts and tasks that have no byte-order mark, such as windows-1252 or shift_jis [default: utf-8]
    #[arg(long, value_name = "LABEL")]
    pub encoding: Option<String>,
    /// Which tokens are scored: as llama-perplexity does, or as papers do
    #[arg(long, value_enum, default_value_t = PplStyle::Llama)]
    pub ppl_style: PplStyle,
    /// Tokens per window
    #[arg(short, long, value_name = "N", default_value_t = DEFAULT_CTX)]
    pub ctx_size: usize,
    /// Windows at most [default: all]
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,
    /// Multiple-choice tasks in the format that llama-perplexity --hellaswag reads
    #[arg(long, value_name = "TASKS")]
    pub hellaswag: Option<PathBuf>,
    /// Tasks at most
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub hellaswag_tasks: usize,
    /// Do not measure tokens per second
    #[arg(long)]
    pub no_speed: bool,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    /// As a JSON object
    #[arg(long)]
    pub json: bool,
    /// No progress on stderr
    #[arg(short, long)]
    pub quiet: bool,
    /// Where to compute.
    #[command(flatten)]
    pub devices: DeviceArgs,
}

/// Names of [`putri_gguf::evaluate::Protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PplStyle {
    /// BOS at the start of each window where there is one; its second half is scored.
    Llama,
    /// No BOS; all tokens of a window but the first are scored.
    Hf,
}

/// Arguments of pruning.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The model to prune (GGUF, or ollama:NAME); never written to
    pub input: PathBuf,
    /// Where the pruned model goes
    pub output: PathBuf,
    /// Share of the blocks' parameters to remove, 0 to 1; 0.1 to 0.25 keeps a chat model usable
    #[arg(
        long,
        value_name = "S",
        value_parser = share,
        required_unless_present_any = ["target_size", "target_params", "target_ram", "max_kld", "max_ppl_ratio", "nested"],
        conflicts_with_all = ["target_size", "target_params", "target_ram", "max_kld", "max_ppl_ratio", "nested"]
    )]
    pub sparsity: Option<f64>,
    /// Remove as little as makes the file no larger than this, as in 3.8G
    #[arg(long, value_name = "SIZE", conflicts_with = "nested")]
    pub target_size: Option<String>,
    /// Remove as little as leaves no more parameters than this, as in 110M or 1.2e9
    #[arg(
        long,
        value_name = "N",
        conflicts_with_all = ["target_size", "max_kld", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub target_params: Option<String>,
    /// Remove as little as lets llama.cpp run it in so much memory, as in 4G: file, keys and values, and what it computes in
    #[arg(
        long,
        value_name = "SIZE",
        conflicts_with_all = ["target_size", "target_params", "max_kld", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub target_ram: Option<String>,
    /// Tokens of context that it is to run with, for --target-ram and the memory in the table [default: 4096, or
    /// --ctx-size if that is more, or what the model was trained for if that is less]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub target_ctx: Option<usize>,
    /// Remove as much as keeps the KL divergence from the source, on held-out text, at or below this
    #[arg(
        long,
        value_name = "X",
        conflicts_with_all = ["target_size", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub max_kld: Option<f64>,
    /// Remove as much as keeps the perplexity, divided by the source's, at or below this
    #[arg(long, value_name = "X", conflicts_with_all = ["target_size", "nested"], hide_short_help = true)]
    pub max_ppl_ratio: Option<f64>,
    /// Prune at several sparsities on one calibration, as in 0.1,0.2: out.gguf becomes out-10.gguf, out-20.gguf
    #[arg(long, value_name = "S,S", value_delimiter = ',', value_parser = share, hide_short_help = true)]
    pub nested: Option<Vec<f64>>,
    /// How to prune: our way, or the paper's as its authors' code does it
    #[arg(long, value_enum, default_value_t = MethodArg::Putri, help_heading = "Method", hide_short_help = true)]
    pub method: MethodArg,
    /// Which heads may go
    #[arg(long, value_enum, default_value_t = HeadsArg::Auto, help_heading = "Method", hide_short_help = true)]
    pub heads: HeadsArg,
    /// What mixtures of experts lose
    #[arg(long, value_enum, default_value_t = ExpertsArg::Whole, help_heading = "Method", hide_short_help = true)]
    pub experts: ExpertsArg,
    /// Which architecture the result may have
    #[arg(long, value_enum, default_value_t = ArchArg::Auto, help_heading = "Method", hide_short_help = true)]
    pub arch: ArchArg,
    /// Write the whole model in another mix of types, as llama-quantize would, such as Q4_K_M
    #[arg(long = "type", value_name = "TYPE", help_heading = "Output")]
    pub to: Option<String>,
    /// Let --type round again what is quantised already; costs quality
    #[arg(long, requires = "to", help_heading = "Output", hide_short_help = true)]
    pub allow_requantize: bool,
    /// Write attn_output or ffn_down in another type, as in ffn_down=q8_0; may be given for both
    #[arg(long, value_name = "TENSOR=TYPE", help_heading = "Output", hide_short_help = true)]
    pub tensor_type: Vec<String>,
    /// Also write the pruned model's importance matrix, for llama-quantize --imatrix
    #[arg(long, value_name = "FILE", help_heading = "Output", hide_short_help = true)]
    pub imatrix_out: Option<PathBuf>,
    /// Versions of each calibration window, with tokens drawn anew, to fit to besides; 0 saves time [default: 1]
    #[arg(long, value_name = "N", help_heading = "Method", hide_short_help = true)]
    pub twins: Option<usize>,
    /// Times to go over the calibration adjusting norms and biases; 0 saves time [default: 1]
    #[arg(long, value_name = "N", help_heading = "Method", hide_short_help = true)]
    pub tune: Option<usize>,
    /// Keep what is settled in this folder, step by step, so that an interrupted run can go on
    #[arg(long, value_name = "DIR", help_heading = "Run", hide_short_help = true)]
    pub state_dir: Option<PathBuf>,
    /// Go on with the run whose state is in --state-dir, if there is one
    #[arg(long, requires = "state_dir", help_heading = "Run", hide_short_help = true)]
    pub resume: bool,
    /// Also write a report, by its name as a page (.html) or for machines (.json)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Also write a Modelfile for `ollama create`: out.gguf gets out.Modelfile
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub modelfile: bool,
    /// Also make a model of that name in the local Ollama, by `ollama create`
    #[arg(long, value_name = "NAME", conflicts_with_all = ["nested", "keep_split", "dry_run"], help_heading = "Output", hide_short_help = true)]
    pub ollama_create: Option<String>,
    /// Also make this folder for a device: model, Modelfile, report, notice of the licence, how to run it, checksums
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep_split", "dry_run"], help_heading = "Output", hide_short_help = true)]
    pub package: Option<PathBuf>,
    /// Also measure what quantisation alone makes of as many bytes, on the held-out windows
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub compare_quant: bool,
    /// Write as many files as a split source has: out.gguf becomes out-00001-of-00003.gguf and so on
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub keep_split: bool,
    /// Replace existing outputs
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Do not load and judge the result with llama.cpp before it gets its name
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub no_verify: bool,

    /// Calibration text; may be given more than once
    #[arg(short, long, value_name = "TEXT", help_heading = "Calibration")]
    pub file: Vec<PathBuf>,
    /// Encoding of texts that have no byte-order mark, such as windows-1252 or shift_jis [default: utf-8]
    #[arg(
        long,
        value_name = "LABEL",
        requires = "file",
        help_heading = "Calibration",
        hide_short_help = true
    )]
    pub encoding: Option<String>,
    /// Read names of special tokens in texts, such as <|im_end|>, as these tokens
    #[arg(long, requires = "file", help_heading = "Calibration", hide_short_help = true)]
    pub parse_special: bool,
    /// Share of the calibration that the model writes itself, 0 to 1 [default: 0.5 with --file, else 1]
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Calibration", hide_short_help = true)]
    pub self_share: Option<f64>,
    /// Share of that which is conversations in the model's chat template, 0 to 1
    #[arg(long, value_name = "SHARE", value_parser = share, default_value_t = DEFAULT_CHAT_SHARE, help_heading = "Calibration", hide_short_help = true)]
    pub chat_share: f64,
    /// Tokens per calibration window
    #[arg(short, long, value_name = "N", default_value_t = DEFAULT_CTX, help_heading = "Calibration")]
    pub ctx_size: usize,
    /// Calibration windows in all
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNKS, help_heading = "Calibration")]
    pub chunks: usize,
    /// Seed of the self-written text
    #[arg(short, long, default_value_t = 1, help_heading = "Calibration", hide_short_help = true)]
    pub seed: u64,

    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", help_heading = "Run")]
    pub threads: Option<usize>,
    /// Do with so much memory, as in 8G: streams go into files beside the output where they must
    #[arg(long, value_name = "SIZE", help_heading = "Run")]
    pub max_memory: Option<String>,
    /// Do with so much memory of each device, as in 6G [default: most of what is free there]
    #[arg(long, value_name = "SIZE", help_heading = "Devices", hide_short_help = true)]
    pub max_device_memory: Option<String>,
    /// Only say what would be removed, and the size, time and memory to expect
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,
    /// Also print where the time went, and what the matrix products of each stage reached
    #[arg(long, help_heading = "Run", hide_short_help = true)]
    pub timings: bool,
    /// Print events as JSON objects, one per line, instead of progress and summary
    #[arg(long, help_heading = "Run", hide_short_help = true, conflicts_with_all = ["dry_run", "timings"])]
    pub json: bool,
    /// No progress on stderr
    #[arg(short, long, help_heading = "Run")]
    pub quiet: bool,
}

/// Reads a share, as in 0.25 or 25%.
fn share(text: &str) -> Result<f64, String> {
    let (number, whole) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    match number.trim().parse::<f64>() {
        Ok(n) => Ok(n / whole),
        Err(_) => Err("is not a share, as in 0.25 or 25%".into()),
    }
}

/// Tokens per calibration window by default.
pub const DEFAULT_CTX: usize = 512;
/// Share of conversations in the self-written text by default.
pub const DEFAULT_CHAT_SHARE: f64 = 0.0;
/// Calibration windows by default.
pub const DEFAULT_CHUNKS: usize = 32;

/// Names of [`putri_gguf::pipeline::Method`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// Heads by lazy greedy search, widths per block, refit towards the dense model, norms and biases tuned.
    Putri,
    /// The paper's baseline; slow, for comparison.
    Paper,
}

/// Names of [`putri_gguf::model::Heads`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HeadsArg {
    /// As many from each block as suit it where an architecture holds that, else as many from every block.
    Auto,
    /// As many from each block as suit it, or refuse the model.
    PerLayer,
    /// As many from every block, and feed-forwards of one width, for programs that read one number only.
    Uniform,
    /// None: only feed-forwards shrink.
    None,
}

/// Names of [`putri_gguf::model::Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExpertsArg {
    /// Whole experts, those that do least for the tokens that choose them.
    Whole,
    /// Neurons, as many of every expert, which is refitted.
    Narrow,
}

/// Names of [`putri_gguf::model::Arch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArchArg {
    /// The one that holds most of what may go.
    Auto,
    /// The source's.
    Keep,
}

const EXAMPLES: &str = "\
Examples:
  putri-gguf inspect model.gguf
  putri-gguf model.gguf smaller.gguf --sparsity 0.2
  putri-gguf model.gguf smaller.gguf --target-size 3.8G --file notes.txt --file manual.txt
  putri-gguf eval smaller.gguf --base model.gguf --file other.txt";

/// Version, engine, backends and CPU features.
fn version() -> &'static str {
    static TEXT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| {
        format!(
            "{}\nengine: ggml {} (llama-cpp-sys-2 {})\nbackends: {}\nCPU features: {}",
            env!("CARGO_PKG_VERSION"),
            putri_gguf::ggml::engine_version(),
            env!("PUTRI_ENGINE_CRATE"),
            env!("PUTRI_BACKENDS"),
            putri_gguf::ggml::cpu_features().join(" ")
        )
    })
}
