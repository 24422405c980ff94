//! The report of a job as JSON; `docs/report.md` says what its fields mean.

use crate::ggml::{RunMemory, device_memory_peak};
use crate::model::BlockShape;
use crate::{Job, Outcome, Size};
use serde_json::{Value, json};

/// Number of the layout: it grows when a field changes its meaning or goes; new fields do not count.
const SCHEMA: u32 = 1;

/// Lengths of context around `n`, in powers of two, up to what a model was trained for, `most`, or is to run with.
fn contexts(n: usize, most: usize) -> impl Iterator<Item = usize> {
    (0..5).map(move |i| (n.next_power_of_two() >> 2) << i).filter(move |&c| c > 0 && c <= most.max(n))
}

/// A report without what depends on when, where and how fast it was made.
pub fn portable(report: &Value) -> Value {
    let mut report = report.clone();
    for key in ["seconds", "peak_memory_bytes", "peak_device_memory_bytes"] {
        report[key] = Value::Null;
    }
    for key in ["threads", "max_memory", "max_device_memory"] {
        report["options"][key] = Value::Null;
    }
    let name_only = |path: &mut Value| {
        let name = path.as_str().and_then(|p| std::path::Path::new(p).file_name());
        *path = name.map_or(Value::Null, |n| n.to_string_lossy().into());
    };
    name_only(&mut report["input"]["path"]);
    name_only(&mut report["output"]["path"]);
    report["options"]["files"].as_array_mut().into_iter().flatten().for_each(name_only);
    report
}

/// What came of `job`; `output_sha256` is of the file that it wrote.
pub fn report(job: &Job, o: &Outcome, output_sha256: &str) -> Value {
    let size =
        |s: &Size| json!({ "bytes": s.bytes, "parameters": s.params, "block_parameters": s.block_params });
    let shape = |b: &BlockShape| json!({ "n_head": b.n_head, "n_head_kv": b.n_head_kv, "n_ff": b.n_ff, "n_expert": b.n_expert });
    let blocks: Vec<Value> = o
        .before
        .blocks
        .iter()
        .zip(&o.after.blocks)
        .enumerate()
        .map(|(il, (before, after))| {
            json!({
                "before": shape(before),
                "after": shape(after),
                "kept_groups": o.kept_groups[il],
                "loss": o.block_losses.as_ref().map(|l| l[il]),
            })
        })
        .collect();
    let quality = o.quality.map(|q| {
        json!({
            "tokens": q.held_out_tokens,
            "ppl_before": q.held_out.dense_ppl,
            "ppl_after": q.held_out.pruned_ppl,
            "ppl_after_llama_cpp": q.file_ppl,
            "kl_divergence": q.held_out.kl,
            "top1": q.held_out.top1,
            "calibration_tokens": q.fit_tokens.0,
            "calibration_tokens_self_written": q.fit_tokens.1,
        })
    });
    let running = o.running.map(|r| {
        let memory = |m: &RunMemory| {
            json!({ "weights": m.weights, "kv_cache": m.kv_cache, "compute": m.compute, "bytes": m.total() })
        };
        let [before, after] = r.kv_caches;
        json!({
            "ctx_size": r.n_ctx,
            "before": memory(&r.before),
            "after": memory(&r.after),
            "kv_caches": contexts(r.n_ctx, r.n_ctx_train).map(|n| {
                json!({ "ctx_size": n, "before": before.bytes(n), "after": after.bytes(n) })
            }).collect::<Vec<_>>(),
        })
    });
    let samples =
        o.samples.as_ref().map(|s| json!({ "prompt": s.prompt, "before": s.before, "after": s.after }));
    let path = |p: &std::path::Path| p.display().to_string();
    let (s, r) = (&job.settings, &job.recipe);
    json!({
        "schema": SCHEMA,
        "version": env!("CARGO_PKG_VERSION"),
        "engine": crate::ggml::engine_version(),
        "input": { "path": path(&job.input), "sha256": o.provenance.as_ref().map(|p| &p.source_sha256) },
        "output": { "path": path(&o.output), "sha256": output_sha256, "architecture": o.carrier.name() },
        "sparsity": o.sparsity,
        "before": size(&o.before),
        "after": size(&o.after),
        "piece": o.piece.plural(),
        "blocks": blocks,
        "running": running,
        "held_out": quality,
        "samples": samples,
        "rivals": o.rivals.iter().map(|r| {
            json!({ "name": r.name, "bytes": r.bytes, "ppl": r.ppl, "kl_divergence": r.kl, "top1": r.top1 })
        }).collect::<Vec<_>>(),
        "options": {
            "sparsity": o.provenance.as_ref().map(|p| p.sparsity),
            "target": s.target.map(|t| format!("{t:?}")),
            "limit": job.limit.map(|l| l.to_string()),
            "method": format!("{:?}", s.method),
            "heads": format!("{:?}", s.heads),
            "arch": format!("{:?}", s.arch),
            "of_mixtures": s.of_mixtures.plural(),
            "type": job.quantise.map(|q| q.to.name()),
            "tensor_type_attn_output": s.types.attn_output.map(|t| t.name().to_string()),
            "tensor_type_ffn_down": s.types.ffn_down.map(|t| t.name().to_string()),
            "twins": s.twins,
            "tune": s.tune,
            "ctx_size": r.n_ctx,
            "chunks": r.n_windows,
            "files": r.files.iter().map(|f| path(f)).collect::<Vec<_>>(),
            "self_share": r.self_share,
            "chat_share": r.chat_share,
            "seed": r.seed,
            "threads": s.n_threads,
            "max_memory": job.max_memory,
            "max_device_memory": job.max_device_memory,
            "target_ram": job.target_ram,
            "verify": job.verify,
        },
        "neurons_by": o.provenance.as_ref().and_then(|p| p.neurons_by),
        "calibration": o.provenance.as_ref().map(|p| &p.calibration),
        "seconds": o.time.as_secs_f64(),
        "peak_memory_bytes": super::peak_memory(),
        "peak_device_memory_bytes": device_memory_peak(),
        "notes": o.warnings,
    })
}
