//! Summary at the end of a run.

use super::plain;
use crate::ggml::RunMemory;
use crate::model::FfnUnit;
use crate::pipeline::experts::STATISTICS;
use crate::{ExpertsOutcome, Outcome, Size};
use std::fmt::Write;

/// Outcome as text for a terminal.
pub fn summary(o: &Outcome) -> String {
    let mut out = String::new();
    let mut line = |label: &str, before: String, after: String, change: String| {
        let _ = writeln!(out, "{label:<22} {before:>14} {after:>14}   {change}");
    };
    line("", "before".into(), "after".into(), String::new());
    line(
        "file",
        megabytes(o.before.bytes),
        megabytes(o.after.bytes),
        percent(o.before.bytes as f64, o.after.bytes as f64),
    );
    let (p, q) = (o.before.params, o.after.params);
    line("parameters", millions(p), millions(q), percent(p as f64, q as f64));
    let (p, q) = (o.before.block_params, o.after.block_params);
    line("  in blocks", millions(p), millions(q), percent(p as f64, q as f64));
    let heads = |s: &Size| s.blocks.iter().map(|b| b.n_head).sum::<usize>();
    let groups = |s: &Size| s.blocks.iter().map(|b| b.n_head_kv).sum::<usize>();
    let count = |s: &Size| format!("{} / {}", heads(s), groups(s));
    line(
        "heads / KV heads",
        count(&o.before),
        count(&o.after),
        percent(groups(&o.before) as f64, groups(&o.after) as f64),
    );
    let units = |s: &Size| s.blocks.iter().map(|b| b.n_units(o.ffn_unit)).sum::<usize>();
    let (p, q) = (units(&o.before), units(&o.after));
    let of_each =
        if o.ffn_unit == FfnUnit::Neuron && o.after.blocks[0].n_expert > 0 { " of an expert" } else { "" };
    let label = format!("{}{of_each}", o.ffn_unit.plural());
    line(&label, p.to_string(), q.to_string(), percent(p as f64, q as f64));
    if let Some(r) = &o.running {
        let mut memory = |label: &str, part: fn(&RunMemory) -> u64| {
            let (p, q) = (part(&r.before), part(&r.after));
            line(label, megabytes(p), megabytes(q), percent(p as f64, q as f64));
        };
        memory(&format!("to run {} tokens", r.n_ctx), RunMemory::total);
        memory("  KV cache", |m| m.kv_cache);
    }
    if let Some(q) = &o.quality {
        let h = &q.held_out;
        let after = q.file_ppl.unwrap_or(h.ppl);
        let times = format!("x {:.2}", after / h.base_ppl);
        line("perplexity", format!("{:.2}", h.base_ppl), format!("{after:.2}"), times);
        line("KL divergence", String::new(), format!("{:.4}", h.kl.mean), "nats".into());
        line("same top token", String::new(), format!("{:.1} %", h.top1 * 100.0), String::new());
        let judge = match q.file_ppl {
            Some(_) => {
                let who = if o.experts.is_some() {
                    "the source without these experts has"
                } else {
                    "our own forward of it says"
                };
                format!("the written file in llama.cpp; {who} {:.2}", h.ppl)
            }
            None if o.experts.is_some() => {
                "the source without these experts; the file was not verified".into()
            }
            None => "our own forward; the file was not verified".into(),
        };
        let (fit, own) = q.fit_tokens;
        let _ = writeln!(
            out,
            "\nPerplexity on {} held-out calibration tokens ({judge}).\nCalibrated on {fit} tokens, {own} of them written by the model itself.",
            q.held_out_tokens
        );
        match &o.experts {
            Some(e) => experts(&mut out, e),
            None => blocks(&mut out, o),
        }
    }
    if !o.quant_baselines.is_empty() {
        let _ = writeln!(
            out,
            "\nAs many bytes by quantisation alone, with the calibration's importance matrix (in llama.cpp, on the held-out windows):"
        );
        let _ = writeln!(
            out,
            "{:<10} {:>12} {:>12} {:>14} {:>15}",
            "", "file", "perplexity", "KL divergence", "same top token"
        );
        for r in &o.quant_baselines {
            let _ = writeln!(
                out,
                "{:<10} {:>12} {:>12.2} {:>14.4} {:>13.1} %",
                r.name,
                megabytes(r.bytes),
                r.metrics.ppl,
                r.metrics.kl.mean,
                r.metrics.top1 * 100.0
            );
        }
    }
    let memory = peak_memory().map_or(String::new(), |b| format!(", peak memory {}", megabytes(b)));
    let _ = writeln!(
        out,
        "\nSparsity {:.1} % of the blocks, architecture {}, {:.0} s{memory}.",
        o.sparsity * 100.0,
        o.output_arch,
        o.time.as_secs_f64()
    );
    for w in &o.warnings {
        let _ = writeln!(out, "note: {}", plain(w));
    }
    out
}

/// Steps of the choice of experts, and the quality on each text.
fn experts(out: &mut String, e: &ExpertsOutcome) {
    let _ = writeln!(
        out,
        "\n{} of {} experts stay in each layer, {} for a token. Divergence with the choice by each step:",
        e.n_keep, e.n_expert, e.n_used
    );
    for s in &e.steps {
        let name = if s.name == STATISTICS { format!("{} ({})", s.name, e.criterion) } else { s.name.into() };
        let undone = if s.kept { "" } else { "undone" };
        let _ = writeln!(out, "  {:<34} {}", format!("{name:<24} {:>9.4}", s.kl_divergence), undone);
    }
    let _ = writeln!(
        out,
        "\n{:<24} {:>12} {:>12} {:>14} {:>15}",
        "text, the worst first", "before", "after", "KL divergence", "same top token"
    );
    for t in &e.texts {
        let (name, m) = (plain(&t.name), &t.metrics);
        let _ = writeln!(
            out,
            "{name:<24} {:>12.2} {:>12.2} {:>14.4} {:>13.1} %",
            m.base_ppl,
            m.ppl,
            m.kl.mean,
            m.top1 * 100.0
        );
    }
}

/// KV heads and widths per block, ten blocks to a line.
fn blocks(out: &mut String, o: &Outcome) {
    let _ = writeln!(out, "\nKV heads and {} per block:", o.ffn_unit.plural());
    for (i, chunk) in o.after.blocks.chunks(10).enumerate() {
        let cells: Vec<String> =
            chunk.iter().map(|b| format!("{:>2}·{:<5}", b.n_head_kv, b.n_units(o.ffn_unit))).collect();
        let _ = writeln!(out, "{:>4}  {}", i * 10, cells.join(" ").trim_end());
    }
}

pub(super) fn megabytes(bytes: u64) -> String {
    let mib = bytes as f64 / (1024.0 * 1024.0);
    if mib >= 10_240.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

pub(super) fn millions(n: usize) -> String {
    let m = n as f64 / 1e6;
    if m >= 10_000.0 { format!("{:.2} B", m / 1e3) } else { format!("{m:.1} M") }
}

pub(super) fn percent(before: f64, after: f64) -> String {
    if before == 0.0 { String::new() } else { format!("{:+.1} %", (after / before - 1.0) * 100.0) }
}

/// Largest resident size of this process so far, in bytes, if the system reports it.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
