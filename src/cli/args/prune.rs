//! Arguments of pruning, in one struct, because clap does not support groups inside an optional group.

use super::DEFAULT_CTX;
use super::choices::{ArchArg, ExpertCriterionArg, HeadsArg, MethodArg, MoeArg, RouterWeightsArg};
use crate::cli::values::{Amount, amount_or_off, bytes, count, share};
use std::path::PathBuf;

/// Arguments of pruning.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The model to prune (GGUF, or ollama:NAME); never written to
    ///
    /// ollama:NAME, as in ollama:llama3.2:1b, finds a model in the local Ollama's store and checks its
    /// digest. Of a split model, give the first part.
    pub input: PathBuf,
    /// Path of the pruned model
    ///
    /// The file appears when it is complete and verified. --force replaces an existing one.
    pub output: PathBuf,

    /// Share of the layers' parameters to remove, as in 0.2 or 20%
    ///
    /// The share counts attention and feed-forward matrices; of a mixture, its experts. Embeddings and output
    /// head are kept, so the file shrinks by less. From 0 to below 1; 0 only copies the model. A chat model
    /// stays usable up to 0.1 to 0.25. Widths move in whole quantisation blocks, so slightly more than this
    /// share is removed. Required, unless --target-size, --target-params, --target-ram, --max-kld,
    /// --max-ppl-ratio or --nested is given.
    #[arg(
        long,
        value_name = "S",
        value_parser = share,
        required_unless_present_any = ["target_size", "target_params", "target_ram", "max_kld", "max_ppl_ratio", "nested"],
        conflicts_with_all = ["target_size", "target_params", "target_ram", "max_kld", "max_ppl_ratio", "nested"]
    )]
    pub sparsity: Option<f64>,
    /// Largest size of the file, as in 3.8G; removes as little as possible
    ///
    /// In bytes, or with K, M, G or T in powers of 1024. With --type, the limit is for the file in the new
    /// type; with --type and --dry-run, that size is not known.
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "nested")]
    pub target_size: Option<u64>,
    /// Largest number of parameters, as in 110M or 1.2e9; removes as little as possible
    ///
    /// Counts all parameters, embeddings included. K, M, B and T are powers of 1000.
    #[arg(
        long,
        value_name = "N",
        value_parser = count,
        conflicts_with_all = ["target_size", "max_kld", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub target_params: Option<u64>,
    /// Memory to run the result in, as in 4G; removes as little as possible
    ///
    /// The limit is for llama.cpp on a CPU: weights, KV cache (F16) for --target-ctx tokens, and compute
    /// buffers, as llama.cpp counts them. Vocabulary, program and operating system come on top. In bytes, or
    /// with K, M, G or T in powers of 1024.
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = bytes,
        conflicts_with_all = ["target_size", "target_params", "max_kld", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub target_ram: Option<u64>,
    /// Context length to run the result with, in tokens
    ///
    /// Goes with --target-ram, and sets the context of the memory shown in the summary. From 1 to 16777216.
    /// Default: 4096; --ctx-size if that is larger; the context that the model was trained for if that is
    /// smaller.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub target_ctx: Option<usize>,
    /// Quality limit: KL divergence from the source, in nats; removes as much as possible
    ///
    /// The search tries a few sparsities on one calibration and measures each on held-out windows. X is above
    /// 0. If no sparsity meets the limit, the exit code is 3. Needs --method putri; excludes --dry-run and
    /// --state-dir.
    #[arg(
        long,
        value_name = "X",
        conflicts_with_all = ["target_size", "max_ppl_ratio", "nested"],
        hide_short_help = true
    )]
    pub max_kld: Option<f64>,
    /// Quality limit: perplexity divided by the source's, as in 1.1; removes as much as possible
    ///
    /// X is above 1. The search, its requirements and the exit code are those of --max-kld.
    #[arg(long, value_name = "X", conflicts_with_all = ["target_size", "nested"], hide_short_help = true)]
    pub max_ppl_ratio: Option<f64>,
    /// Prune at several sparsities on one calibration, as in 0.1,0.2
    ///
    /// The shares lie between 0 and 1, in rising order. Names get the percentage: out.gguf becomes
    /// out-10.gguf and out-20.gguf; the paths of --report, --imatrix-out and --package change likewise. Needs
    /// --method putri; excludes --dry-run and --state-dir.
    #[arg(long, value_name = "S,S", value_delimiter = ',', value_parser = share, hide_short_help = true)]
    pub nested: Option<Vec<f64>>,

    /// Pruning method
    ///
    /// Use paper for comparisons only. Mixtures of experts, --max-kld, --max-ppl-ratio, --nested,
    /// --resample-copies and --tune need putri.
    #[arg(long, value_enum, default_value_t = MethodArg::Putri, help_heading = "Method", hide_short_help = true)]
    pub method: MethodArg,
    /// Which attention heads may be removed
    ///
    /// A KV head is removed together with its query heads. The number of heads removed depends on the
    /// FFN-to-attention size ratio. The first layer keeps at least one KV head; in architectures other than
    /// deci, every layer does.
    #[arg(long, value_enum, default_value_t = HeadsArg::Auto, help_heading = "Method", hide_short_help = true)]
    pub heads: HeadsArg,
    /// What is removed from mixtures of experts
    ///
    /// Both remove the same number in every layer. Whole experts are kept byte for byte, at least as many as
    /// a token uses, in any architecture that llama.cpp runs. Expert widths move in whole quantisation blocks:
    /// with K-quants in steps of 256 neurons. Needs --method putri. Dense models are unaffected.
    #[arg(
        long,
        alias = "experts",
        value_enum,
        default_value_t = MoeArg::Experts,
        help_heading = "Method",
        hide_short_help = true
    )]
    pub moe: MoeArg,
    /// Architecture of the result
    ///
    /// The command inspect shows the architecture that auto chooses, and the reason. With keep, programs that
    /// know the source's architecture only can load the result. Its layers then differ in size only where
    /// that architecture supports it, and all heads are kept where its loader takes no fewer.
    #[arg(long, value_enum, default_value_t = ArchArg::Auto, help_heading = "Method", hide_short_help = true)]
    pub arch: ArchArg,
    /// Extra copies of each calibration window with half the tokens resampled; reduces overfitting
    ///
    /// Tokens are resampled from the source's predictions at their positions. Layers are fitted to the
    /// windows and to their copies. From 0 to 100; more copies take more time, 0 saves time. Default: 1 with
    /// --method putri, which alone has this stage.
    #[arg(long, alias = "twins", value_name = "N", help_heading = "Method", hide_short_help = true)]
    pub resample_copies: Option<usize>,
    /// Passes over the calibration that tune norms and biases
    ///
    /// Tuning moves the pruned model's predictions closer to the source's. Changes that held-out windows do
    /// not confirm are undone. From 0 to 1000; 0 saves time. Default: 1 with --method putri, which alone has
    /// this stage; mixtures of experts are not tuned.
    #[arg(long, value_name = "N", help_heading = "Method", hide_short_help = true)]
    pub tune: Option<usize>,

    /// How long to train all kept weights at the end: off, tokens as in 250k, or time as in 2h
    ///
    /// Training moves the pruned model's predictions closer to the source's, by more than --tune can, and takes
    /// as long as given. What held-out windows do not confirm is undone. The command recover goes on with a
    /// finished file. Needs --method putri; not for mixtures of experts.
    #[arg(long, value_name = "AMOUNT", value_parser = amount_or_off, default_value = "off", help_heading = "Method", hide_short_help = true)]
    pub recover: Amount,

    /// Criterion by which whole experts are kept
    ///
    /// The choice that it makes is refined afterwards; see --refine.
    #[arg(long, value_enum, default_value_t = ExpertCriterionArg::Reap, help_heading = "Experts", hide_short_help = true)]
    pub expert_criterion: ExpertCriterionArg,
    /// Router weights that the criterion uses
    ///
    /// They differ only where a router does not divide the weights of a token by their sum. The statistics
    /// hold both.
    #[arg(long, value_enum, default_value_t = RouterWeightsArg::Applied, help_heading = "Experts", hide_short_help = true)]
    pub router_weights: RouterWeightsArg,
    /// Share of the experts that each text protects, as in 0.1 or 10%
    ///
    /// The experts that a text needs most stay, by its own statistics, even if all texts together would not
    /// keep them. It helps against a loss of languages or of tool calls that are a small part of the texts.
    #[arg(long, value_name = "SHARE", value_parser = share, default_value_t = 0.0, help_heading = "Experts", hide_short_help = true)]
    pub protect: f64,
    /// Work on refining the choice of experts, in passes over the calibration text
    ///
    /// The source is decoded with the experts masked that would go, and other choices are tried. From 0 to
    /// 1000; 0 keeps the criterion's choice.
    #[arg(long, value_name = "N", help_heading = "Experts", hide_short_help = true)]
    pub refine: Option<usize>,
    /// Passes over the calibration text that refit the routers to the experts that stay
    ///
    /// Only rows of the routers get new values. From 0 to 1000; 0 keeps them.
    #[arg(long, value_name = "N", help_heading = "Experts", hide_short_help = true)]
    pub refit_routers: Option<usize>,
    /// Leave out the layers that draft tokens (MTP)
    ///
    /// By default they lose experts like the others, chosen blindly, since their routers take no part in
    /// ordinary decoding. The output does not depend on them, only how many drafts are accepted.
    #[arg(long, help_heading = "Experts", hide_short_help = true)]
    pub drop_mtp: bool,
    /// Write the statistics of the experts to this file (JSON)
    ///
    /// Per text, layer and expert: tokens, near misses, router weights, and scores. --stats-in takes the file
    /// again, for any share and without decoding. It also shows which experts are worth a place on a GPU
    /// (llama.cpp's --override-tensor).
    #[arg(long, value_name = "FILE", help_heading = "Experts", hide_short_help = true)]
    pub stats_out: Option<PathBuf>,
    /// Take the statistics of the experts from this file instead of observing them
    ///
    /// A file with a ranking from elsewhere needs only schema, n_expert and scores.
    #[arg(long, value_name = "FILE", help_heading = "Experts", hide_short_help = true)]
    pub stats_in: Option<PathBuf>,
    /// Importance matrix of the source, from which --imatrix-out is cut
    ///
    /// In GGUF, as llama-imatrix writes it. Entries of experts that go are left out, so that llama-quantize
    /// takes the result for the pruned model.
    #[arg(
        long,
        value_name = "FILE",
        requires = "imatrix_out",
        help_heading = "Experts",
        hide_short_help = true
    )]
    pub imatrix: Option<PathBuf>,
    /// Weights of the --file texts, in their order, as in 2,1,1
    ///
    /// They set how many windows each text gives and how much its statistics count. Default: equal weights.
    #[arg(
        long,
        value_name = "W,W",
        value_delimiter = ',',
        requires = "file",
        help_heading = "Experts",
        hide_short_help = true
    )]
    pub text_weights: Vec<f64>,

    /// Quantise the whole model to this type of llama-quantize, as in Q4_K_M
    ///
    /// Pruning is fitted around the rounding of all tensors. The source has to be F16, BF16 or F32, or
    /// --allow-requantize given. Dense models only.
    #[arg(long = "type", value_name = "TYPE", help_heading = "Output")]
    pub to: Option<String>,
    /// Let --type quantise tensors that are quantised already
    ///
    /// Rounding twice costs quality. Prefer an F16 source.
    #[arg(long, requires = "to", help_heading = "Output", hide_short_help = true)]
    pub allow_requantize: bool,
    /// Type of attn_output or ffn_down, as in ffn_down=q8_0; may be given for both
    ///
    /// Only these two matrices get new values; all others keep their bytes. Default: their own type, or the
    /// type that llama-quantize falls back to where rows are no longer whole quantisation blocks.
    /// ffn_down=q8_0 lets widths of a K-quant move in steps of 32 instead of 256, for a larger matrix.
    #[arg(long, value_name = "TENSOR=TYPE", help_heading = "Output", hide_short_help = true)]
    pub tensor_type: Vec<String>,
    /// Also write the importance matrix of the pruned model
    ///
    /// llama-quantize reads it. The matrix of the source does not fit the pruned model. Dense models only.
    #[arg(long, value_name = "FILE", help_heading = "Output", hide_short_help = true)]
    pub imatrix_out: Option<PathBuf>,
    /// Also measure quantisation baselines of the same size
    ///
    /// The source is quantised to the two types of llama-quantize whose files are closest in size. Their
    /// perplexity and KL divergence on the held-out windows are shown beside the result's. Dense models only.
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub compare_quant: bool,
    /// Also write a report, as a page (.html) or as JSON (.json)
    ///
    /// The page is one file without network access: what is kept of each layer, and a text continued by both
    /// models. docs/report.md lists the JSON fields. Not with --dry-run.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Also write a Modelfile for ollama create: out.gguf gets out.Modelfile
    ///
    /// For a source ollama:NAME, the Modelfile has that model's template, system prompt, parameters and
    /// licences; otherwise it has the template of the GGUF.
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub modelfile: bool,
    /// Also create a model of this name in the local Ollama
    ///
    /// putri-gguf runs ollama create with the Modelfile that --modelfile writes. Excludes --nested,
    /// --keep-split and --dry-run.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["nested", "keep_split", "dry_run"], help_heading = "Output", hide_short_help = true)]
    pub ollama_create: Option<String>,
    /// Also make a folder for a device: model, Modelfile, report, licence notice, checksums
    ///
    /// Its README.md has a command line for llama.cpp and one for Ollama, and the memory that each takes. The
    /// same job writes the same bytes. Excludes --keep-split and --dry-run.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep_split", "dry_run"], help_heading = "Output", hide_short_help = true)]
    pub package: Option<PathBuf>,
    /// Write as many files as a split source has
    ///
    /// out.gguf becomes out-00001-of-00003.gguf and so on. By default the result is one file.
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub keep_split: bool,
    /// Replace existing outputs
    ///
    /// Without it, a run that would replace a file is refused before any work. The source is never replaced.
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Do not load and evaluate the result with llama.cpp
    ///
    /// By default the output gets its name only after llama.cpp has loaded it, and after its perplexity
    /// agrees with the one that putri-gguf computes.
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub no_verify: bool,

    /// Calibration text; may be given more than once
    ///
    /// Use text like the text that the model will be used on: UTF-8, or see --encoding. A part of the
    /// calibration is still generated by the model; see --self-share.
    #[arg(short, long, value_name = "TEXT", help_heading = "Calibration")]
    pub file: Vec<PathBuf>,
    /// Share of the calibration that the model generates itself, as in 0.5 or 50%
    ///
    /// From 0 to 1; below 1 it needs --file. Default: 0.5 with --file, else 1.
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Calibration", hide_short_help = true)]
    pub self_share: Option<f64>,
    /// Share of the generated text that is conversations in the model's chat template
    ///
    /// From 0 to 1. Above 0 it needs a --self-share above 0.
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = share,
        default_value_t = 0.0,
        help_heading = "Calibration",
        hide_short_help = true
    )]
    pub chat_share: f64,
    /// Encoding of --file texts without a byte-order mark
    ///
    /// The name is one of the WHATWG's labels, as in windows-1252, shift_jis or gb18030. UTF-8, UTF-16 and
    /// UTF-32 with a mark are recognised. Default: UTF-8.
    #[arg(
        long,
        value_name = "LABEL",
        requires = "file",
        help_heading = "Calibration",
        hide_short_help = true
    )]
    pub encoding: Option<String>,
    /// Parse names of special tokens in --file texts, such as <|im_end|>
    ///
    /// As llama-imatrix's option of this name does. By default such names are plain text.
    #[arg(long, requires = "file", help_heading = "Calibration", hide_short_help = true)]
    pub parse_special: bool,
    /// Tokens per calibration window
    ///
    /// From 16 to 32768. Longer windows show the model longer contexts; --ctx-size times --chunks is the
    /// number of tokens that layers are fitted to, before --resample-copies.
    #[arg(short, long, value_name = "N", default_value_t = DEFAULT_CTX, help_heading = "Calibration")]
    pub ctx_size: usize,
    /// Number of calibration windows
    ///
    /// From 1 to 1048576; 2 or more for a mixture of text files and generated text. Time grows with the
    /// number. Held-out windows come on top, one to eight per source of text.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Calibration")]
    pub chunks: usize,
    /// Seed of the generated text
    ///
    /// The same seed and the same options give the same calibration text. A seed is an integer from 0 on.
    #[arg(short, long, default_value_t = 1, help_heading = "Calibration", hide_short_help = true)]
    pub seed: u64,

    /// Number of threads, at most one per core [default: all cores]
    ///
    /// From 1 to 512. The number does not change the result.
    #[arg(short, long, value_name = "N", help_heading = "Run")]
    pub threads: Option<usize>,
    /// Memory limit, not counting the memory-mapped source, as in 8G
    ///
    /// Under a limit, residual streams and new matrices are kept in unnamed files beside the output, fewer
    /// windows pass through a layer at a time, and llama.cpp makes no faster copies of the weights. A limit
    /// that is too low is refused with the memory that the run needs. In bytes, or with K, M, G or T in
    /// powers of 1024. Default: no limit.
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Run")]
    pub max_memory: Option<u64>,
    /// Show what would be removed, and size, time and memory to expect; write nothing
    ///
    /// Excludes --max-kld, --max-ppl-ratio, --nested, --report and --json.
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,
    /// Keep checkpoints of the run in this folder, so that it can be resumed
    ///
    /// The folder holds the calibration text, heads, widths, the neuron criterion and finished layers.
    /// --resume continues an interrupted or killed run from there and writes the same bytes. A finished run
    /// empties the folder. Excludes --max-kld, --max-ppl-ratio and --nested.
    #[arg(long, value_name = "DIR", help_heading = "Run", hide_short_help = true)]
    pub state_dir: Option<PathBuf>,
    /// Continue the run in --state-dir
    ///
    /// The options have to be those of the interrupted run; --threads may differ. An empty folder starts a
    /// new run.
    #[arg(long, requires = "state_dir", help_heading = "Run", hide_short_help = true)]
    pub resume: bool,
    /// Also print the time and the matrix throughput of each stage
    ///
    /// The table follows the summary on stdout, with the forecast of each stage beside it. Excludes --json.
    #[arg(long, help_heading = "Run", hide_short_help = true)]
    pub timings: bool,
    /// Print events as JSON objects, one per line, instead of progress and summary
    ///
    /// Events are stage, step (with seconds_left and run_seconds_left where they are known) and, for each
    /// result, done with the report; docs/report.md lists its fields. Excludes --dry-run and --timings.
    #[arg(long, help_heading = "Run", hide_short_help = true, conflicts_with_all = ["dry_run", "timings"])]
    pub json: bool,
    /// Show no progress on stderr
    ///
    /// The summary on stdout and errors on stderr are still printed.
    #[arg(short, long, help_heading = "Run")]
    pub quiet: bool,

    /// Memory limit on each device, as in 6G
    ///
    /// Under a limit, fewer windows pass through a layer at a time; a limit that is too low is refused with
    /// the memory that the run needs. llama.cpp's own memory is not counted: see --n-gpu-layers. With
    /// --state-dir give a size, because --resume needs the same one. In bytes, or with K, M, G or T in powers
    /// of 1024. Default: four fifths of what is free. Needs --device.
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Devices", hide_short_help = true)]
    pub max_device_memory: Option<u64>,
}
