//! Report of a job, as JSON and for the page; `docs/report.md` explains its fields.

mod collect;
mod experts;

pub use experts::{ExpertStep, ExpertText, Experts, LayerExperts};

use crate::model::FfnUnit;
use serde::{Serialize, Serializer};
use std::path::Path;

/// Version of the layout. It increases when a field is renamed, removed or changes its meaning, not when one
/// is added.
pub const SCHEMA: u32 = 2;

/// Report of one finished job. [`Report::new`] collects it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of putri-gguf.
    pub version: &'static str,
    /// Version of ggml.
    pub engine: &'static str,
    /// The source file.
    pub input: Input,
    /// The written file.
    pub output: Output,
    /// Share of the prunable parameters that was removed, 0 to 1.
    pub sparsity: f64,
    /// Sizes of the source.
    pub before: Size,
    /// Sizes of the result.
    pub after: Size,
    /// Unit that was removed from FFNs, in the plural.
    #[serde(serialize_with = "plural")]
    pub ffn_unit: FfnUnit,
    /// One entry per block, in order.
    pub blocks: Vec<Block>,
    /// Choice of experts, if a mixture lost some or was narrowed through llama.cpp.
    pub experts: Option<Experts>,
    /// Memory that llama.cpp takes to run source and result, if it was measured.
    pub running: Option<Running>,
    /// Quality on held-out windows; absent if nothing was pruned.
    pub held_out: Option<HeldOut>,
    /// Continuations of one text, if the job asked for them.
    pub samples: Option<Samples>,
    /// The result and quantised files of about its size, if the job asked for them.
    pub quant_baselines: Vec<QuantBaseline>,
    /// Options of the job.
    pub options: Options,
    /// Criterion by which neurons were removed, `obs` or `magnitude`; absent if none was chosen.
    pub neuron_criterion: Option<String>,
    /// Description of the calibration text; absent if nothing was pruned.
    pub calibration: Option<String>,
    /// Wall time.
    pub seconds: Option<f64>,
    /// Largest resident memory of the process, if the system reports it.
    pub peak_memory_bytes: Option<u64>,
    /// Most memory that graphs and their weights took on all devices together.
    pub peak_device_memory_bytes: Option<u64>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// The source file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Input {
    /// Its path.
    pub path: String,
    /// SHA-256 in hex, over all parts of a split model in order; absent if nothing was pruned.
    pub sha256: Option<String>,
}

/// The written file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Output {
    /// Its path; the first part if it lies in several files.
    pub path: String,
    /// SHA-256 in hex.
    pub sha256: String,
    /// Name of its architecture.
    pub architecture: String,
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Size {
    /// Bytes of the file.
    pub bytes: u64,
    /// All parameters.
    pub parameters: usize,
    /// Parameters of the attention and FFN matrices of all blocks.
    pub block_parameters: usize,
}

/// One block.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Block {
    /// Its shape in the source.
    pub before: Shape,
    /// Its shape in the result.
    pub after: Shape,
    /// The source's KV heads that are kept.
    pub kept_groups: Vec<usize>,
    /// Estimated loss of the predictions by the width of this block alone, in nats of KL divergence, if
    /// known.
    pub loss: Option<f64>,
}

/// Shape of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Query heads.
    pub n_head: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Width of the FFN, or of each expert.
    pub n_ff: usize,
    /// Experts; 0 without.
    pub n_expert: usize,
}

/// Memory that llama.cpp takes to run source and result on a CPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Running {
    /// Tokens of context.
    pub ctx_size: usize,
    /// For the source.
    pub before: Memory,
    /// For the result.
    pub after: Memory,
    /// KV caches for other context lengths.
    pub kv_caches: Vec<KvCaches>,
}

/// Bytes of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights.
    pub weights: u64,
    /// Keys and values, in F16.
    pub kv_cache: u64,
    /// Buffers that a step computes in.
    pub compute: u64,
    /// Sum of these.
    pub bytes: u64,
}

/// Bytes of the KV caches of source and result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KvCaches {
    /// Tokens of context.
    pub ctx_size: usize,
    /// Bytes of the source's KV cache.
    pub before: u64,
    /// Bytes of the result's KV cache.
    pub after: u64,
}

/// Quality on held-out calibration windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// Tokens scored.
    pub tokens: usize,
    /// Perplexity of the source.
    pub ppl_before: f64,
    /// Perplexity of the result by putri-gguf's own forward pass.
    pub ppl_after: f64,
    /// Perplexity of the written file by llama.cpp; absent if it was not verified.
    pub ppl_after_llama_cpp: Option<f64>,
    /// Mean KL divergence from the source's predictions, in nats.
    pub kl_divergence: f64,
    /// Share of positions at which source and result rank the same token first, 0 to 1.
    pub top1: f64,
    /// Tokens fitted on.
    pub calibration_tokens: usize,
    /// Number of these tokens that the model generated itself.
    pub calibration_tokens_self_written: usize,
}

impl HeldOut {
    /// Perplexity of the result, by llama.cpp if that is known.
    pub fn ppl(&self) -> f64 {
        self.ppl_after_llama_cpp.unwrap_or(self.ppl_after)
    }
}

/// Greedy continuations of one text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Samples {
    /// Beginning of the first held-out window.
    pub prompt: String,
    /// Continuation by the source.
    pub before: String,
    /// Continuation by the result.
    pub after: String,
}

/// A file and its quality on the held-out windows, by llama.cpp.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantBaseline {
    /// `pruned`, or the source's mix of types.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Perplexity.
    pub ppl: f64,
    /// Mean KL divergence from the source's predictions, in nats.
    pub kl_divergence: f64,
    /// Share of positions at which it ranks the same token first as the source, 0 to 1.
    pub top1: f64,
}

/// Options of a job, in the names of the command line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Options {
    /// Sparsity; for a target or quality limit, the one that was found.
    pub sparsity: Option<f64>,
    /// Size that the result was not to exceed.
    pub target: Option<Target>,
    /// Quality limit, in words.
    pub limit: Option<String>,
    /// `putri` or `paper`.
    pub method: &'static str,
    /// `auto`, `per-layer`, `uniform` or `none`.
    pub heads: &'static str,
    /// `auto` or `keep`.
    pub arch: &'static str,
    /// Unit that is removed from mixtures of experts: `experts` or `width`.
    pub moe: &'static str,
    /// Criterion of the first choice of experts: `reap`, `frequency` or `router-weight`.
    pub expert_criterion: &'static str,
    /// Router weights that the criterion uses: `applied` or `normalised`.
    pub router_weights: &'static str,
    /// Share of the experts that each text protects, 0 to 1.
    pub protect: f64,
    /// Refinement of the choice of experts, in passes over the calibration windows.
    pub refine: usize,
    /// Passes that refit routers.
    pub refit_routers: usize,
    /// Whether layers that draft tokens are left out.
    pub drop_mtp: bool,
    /// Statistics of experts that were read instead of observing them.
    pub stats_in: Option<String>,
    /// Weights of the text files; empty for equal weights.
    pub text_weights: Vec<f64>,
    /// Mix of types that the result is written in; absent for the source's types.
    #[serde(rename = "type")]
    pub to: Option<&'static str>,
    /// Type of `attn_output` if it gets new values.
    pub tensor_type_attn_output: Option<&'static str>,
    /// Type of `ffn_down` if it gets new values.
    pub tensor_type_ffn_down: Option<&'static str>,
    /// Resampled copies of each calibration window.
    pub resample_copies: usize,
    /// Passes of tuning over the calibration windows.
    pub tune: usize,
    /// Amount of recovery: a number of tokens, or a time.
    pub recover: Option<String>,
    /// Tokens per calibration window.
    pub ctx_size: usize,
    /// Calibration windows.
    pub chunks: usize,
    /// Text files that were calibrated on.
    pub files: Vec<String>,
    /// Share of calibration windows that the model generates itself, 0 to 1.
    pub self_share: f64,
    /// Share of those windows that use the chat template, 0 to 1.
    pub chat_share: f64,
    /// Seed of the calibration.
    pub seed: u64,
    /// Threads.
    pub threads: Option<usize>,
    /// Memory limit in bytes.
    pub max_memory: Option<u64>,
    /// Memory limit per device in bytes.
    pub max_device_memory: Option<u64>,
    /// Memory in bytes that llama.cpp may take to run the result.
    pub target_ram: Option<u64>,
    /// Whether llama.cpp loaded and scored the result.
    pub verify: bool,
}

/// Size that the result was not to exceed, named after the option: `{"size": 73400320}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Bytes of the file, `--target-size`.
    Size(u64),
    /// Parameters, `--target-params`.
    Params(u64),
    /// Bytes that llama.cpp takes to run it, `--target-ram`.
    Ram(u64),
}

impl Report {
    /// Copy without the fields that depend on when, where and how fast the result was made. The same job
    /// gives the same copy everywhere.
    pub fn portable(&self) -> Report {
        let mut report = self.clone();
        (report.seconds, report.peak_memory_bytes, report.peak_device_memory_bytes) = (None, None, None);
        let options = &mut report.options;
        (options.threads, options.max_memory, options.max_device_memory) = (None, None, None);
        let paths = [&mut report.input.path, &mut report.output.path].into_iter();
        let paths = paths.chain(&mut options.files).chain(&mut options.stats_in);
        paths.for_each(|path| *path = file_name(path));
        report
    }

    /// JSON text, indented, with a line end.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("field names are strings");
        text.push('\n');
        text
    }
}

fn plural<S: Serializer>(unit: &FfnUnit, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(unit.plural())
}

/// Last part of a path.
pub(super) fn file_name(path: &str) -> String {
    Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named_after_their_options() {
        let text = |target| serde_json::json!(target).to_string();
        let targets = [Target::Size(5), Target::Params(6), Target::Ram(7)];
        assert_eq!(targets.map(text), [r#"{"size":5}"#, r#"{"params":6}"#, r#"{"ram":7}"#]);
    }

    #[test]
    fn a_file_name_is_the_last_part_of_a_path() {
        assert_eq!(["models/in.gguf", "in.gguf", "/"].map(file_name), ["in.gguf", "in.gguf", ""]);
    }
}
