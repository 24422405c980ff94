//! A report from a job and its outcome.

use super::{
    Block, HeldOut, Input, KvCaches, Memory, Options, Output, QuantBaseline, Report, Running, SCHEMA,
    Samples, Shape, Size, Target,
};
use crate::ggml::{RunMemory, device_memory_peak};
use crate::model::{Arch, BlockShape, FfnUnit, Heads};
use crate::pipeline;
use crate::prune::RouterWeights;
use crate::report::peak_memory;
use crate::{Job, Outcome};
use std::borrow::Cow;
use std::path::Path;

impl Report {
    /// Collects the report of `job` and its outcome `o`, whose written file has the hash `output_sha256`, in
    /// hex.
    pub fn new(job: &Job, o: &Outcome, output_sha256: &str) -> Report {
        let provenance = o.provenance.as_ref();
        Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            engine: crate::ggml::engine_version(),
            input: Input { path: text(&job.input), sha256: provenance.map(|p| p.source_sha256.clone()) },
            output: Output {
                path: text(&o.output),
                sha256: output_sha256.into(),
                architecture: o.output_arch.clone(),
            },
            sparsity: o.sparsity,
            before: size(&o.before),
            after: size(&o.after),
            ffn_unit: o.ffn_unit,
            blocks: blocks(o),
            experts: o.experts.as_ref().map(Into::into),
            running: o.running.as_ref().map(running),
            held_out: o.quality.as_ref().map(held_out),
            samples: o.samples.as_ref().map(|s| Samples {
                prompt: s.prompt.clone(),
                before: s.before.clone(),
                after: s.after.clone(),
            }),
            quant_baselines: o.quant_baselines.iter().map(quant_baseline).collect(),
            options: options(job, provenance.map(|p| p.sparsity)),
            neuron_criterion: provenance
                .and_then(|p| p.of_stage("neuron_criterion")?.as_text())
                .map(Cow::into_owned),
            calibration: provenance.map(|p| p.calibration.clone()),
            seconds: Some(o.time.as_secs_f64()),
            peak_memory_bytes: peak_memory(),
            peak_device_memory_bytes: Some(device_memory_peak()),
            notes: o.warnings.clone(),
        }
    }
}

fn size(s: &crate::Size) -> Size {
    Size { bytes: s.bytes, parameters: s.params, block_parameters: s.block_params }
}

fn blocks(o: &Outcome) -> Vec<Block> {
    let shapes = o.before.blocks.iter().zip(&o.after.blocks);
    shapes
        .zip(&o.kept_groups)
        .enumerate()
        .map(|(il, ((before, after), kept_groups))| Block {
            before: shape(before),
            after: shape(after),
            kept_groups: kept_groups.clone(),
            loss: o.block_losses.as_ref().map(|losses| losses[il]),
        })
        .collect()
}

fn shape(b: &BlockShape) -> Shape {
    Shape { n_head: b.n_head, n_head_kv: b.n_head_kv, n_ff: b.n_ff, n_expert: b.n_expert }
}

fn running(r: &crate::Running) -> Running {
    let caches = |n| {
        let [before, after] = r.kv_caches?;
        Some(KvCaches { ctx_size: n, before: before.bytes(n), after: after.bytes(n) })
    };
    Running {
        ctx_size: r.n_ctx,
        before: memory(&r.before),
        after: memory(&r.after),
        kv_caches: contexts(r.n_ctx, r.n_ctx_train).filter_map(caches).collect(),
    }
}

fn memory(m: &RunMemory) -> Memory {
    Memory { weights: m.weights, kv_cache: m.kv_cache, compute: m.compute, bytes: m.total() }
}

/// Context lengths around `n`, in powers of two, up to the larger of `n` and `most`, the training context of
/// the model.
fn contexts(n: usize, most: usize) -> impl Iterator<Item = usize> {
    (0..5).map(move |i| (n.next_power_of_two() >> 2) << i).filter(move |&c| c > 0 && c <= most.max(n))
}

fn held_out(q: &crate::Quality) -> HeldOut {
    let (calibration_tokens, calibration_tokens_self_written) = q.fit_tokens;
    HeldOut {
        tokens: q.held_out_tokens,
        ppl_before: q.held_out.base_ppl,
        ppl_after: q.held_out.ppl,
        ppl_after_llama_cpp: q.file_ppl,
        kl_divergence: q.held_out.kl.mean,
        top1: q.held_out.top1,
        calibration_tokens,
        calibration_tokens_self_written,
    }
}

fn quant_baseline(b: &crate::QuantBaseline) -> QuantBaseline {
    QuantBaseline {
        name: b.name.clone(),
        bytes: b.bytes,
        ppl: b.metrics.ppl,
        kl_divergence: b.metrics.kl.mean,
        top1: b.metrics.top1,
    }
}

fn options(job: &Job, sparsity: Option<f64>) -> Options {
    let (s, r) = (&job.settings, &job.recipe);
    Options {
        sparsity,
        target: s.target.map(target),
        limit: job.limit.map(|limit| limit.to_string()),
        method: s.method.name(),
        heads: match s.heads {
            Heads::Auto => "auto",
            Heads::PerLayer => "per-layer",
            Heads::Uniform => "uniform",
            Heads::None => "none",
        },
        arch: match s.arch {
            Arch::Auto => "auto",
            Arch::Keep => "keep",
        },
        moe: match s.moe_unit {
            FfnUnit::Expert => "experts",
            FfnUnit::Neuron => "width",
        },
        expert_criterion: s.experts.criterion.name(),
        router_weights: match s.experts.weights {
            RouterWeights::Applied => "applied",
            RouterWeights::Normalised => "normalised",
        },
        protect: s.experts.protect,
        refine: s.experts.refine,
        refit_routers: s.experts.repair,
        drop_mtp: s.experts.drop_drafts,
        stats_in: job.stats_in.as_deref().map(text),
        text_weights: r.weights.clone(),
        to: job.quantise.map(|q| q.to.name()),
        tensor_type_attn_output: s.types.attn_output.map(|t| t.name()),
        tensor_type_ffn_down: s.types.ffn_down.map(|t| t.name()),
        resample_copies: s.resample.copies,
        tune: s.tune.passes,
        recover: s.recover.budget.map(|amount| amount.to_string()),
        ctx_size: r.n_ctx,
        chunks: r.n_windows,
        files: r.files.iter().map(|path| text(path)).collect(),
        self_share: r.self_share,
        chat_share: r.chat_share,
        seed: r.seed,
        threads: Some(s.n_threads),
        max_memory: job.max_memory,
        max_device_memory: job.max_device_memory,
        target_ram: job.target_ram,
        verify: job.verify,
    }
}

fn target(t: pipeline::Target) -> Target {
    match t {
        pipeline::Target::Bytes(n) => Target::Size(n),
        pipeline::Target::Params(n) => Target::Params(n),
        pipeline::Target::WithCache { bytes, .. } => Target::Ram(bytes),
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
