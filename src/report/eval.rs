//! Output of `eval`.

use super::table::megabytes;
use crate::EvalOutcome;
use crate::evaluate::{Metrics, Protocol};
use serde_json::{Value, json};
use std::fmt::Write;

/// Outcome as text for a terminal, scored by `protocol`.
pub fn eval_table(o: &EvalOutcome, protocol: Protocol) -> String {
    let mut out = String::new();
    let compared = o.bytes.1.is_some();
    let mut line = |label: &str, own: String, other: Option<String>| {
        let _ = writeln!(out, "{label:<22} {own:>20} {:>14}", other.unwrap_or_default());
    };
    if compared {
        line("", "file".into(), Some("base".into()));
    }
    line("size", megabytes(o.bytes.0), o.bytes.1.map(megabytes));
    if let Some(e) = &o.evaluation {
        let base = e.compared.map(|m| format!("{:.4}", m.base_ppl));
        line("perplexity", format!("{:.4} +/- {:.5}", e.ppl, e.ppl_error), base);
        if let Some(m) = &e.compared {
            line("  ratio", format!("{:.4}", e.ppl / m.base_ppl), None);
            line("KL divergence, mean", format!("{:.6}", m.kl.mean), None);
            line("  median", format!("{:.6}", m.kl.median), None);
            line("  99 %", format!("{:.6}", m.kl.p99), None);
            line("  largest", format!("{:.6}", m.kl.max), None);
            line("same top token", format!("{:.3} %", m.top1 * 100.0), None);
        }
    }
    if let Some((own, base, _)) = o.accuracy {
        let percent = |share: f64| format!("{:.2} %", share * 100.0);
        line("tasks", percent(own), base.map(percent));
    }
    if let Some((own, base)) = &o.speed {
        let per_second = |n: f64| format!("{n:.1} tokens/s");
        line("reading", per_second(own.prompt), base.map(|b| per_second(b.prompt)));
        line("writing", per_second(own.written), base.map(|b| per_second(b.written)));
    }
    if let Some(e) = &o.evaluation {
        let how = match protocol {
            Protocol::Llama => {
                "as llama-perplexity scores: the second half of each window, after BOS where there is one"
            }
            Protocol::Hf => "as papers do: all tokens of a window but the first, without BOS",
        };
        let _ = writeln!(out, "\n{} tokens scored, {how}.", e.n_scored);
    }
    if let Some((.., n)) = o.accuracy {
        let _ = writeln!(out, "{n} tasks; chance is 25 %.");
    }
    out
}

/// Outcome as a JSON object.
pub fn eval_json(o: &EvalOutcome, protocol: Protocol) -> String {
    let evaluation = o.evaluation.map(|e| {
        let divergence = e.compared.map(|Metrics { kl, top1, .. }| {
            json!({ "mean": kl.mean, "median": kl.median, "p99": kl.p99, "max": kl.max, "top1": top1 })
        });
        json!({
            "ppl_style": if protocol == Protocol::Llama { "llama" } else { "hf" },
            "ppl": e.ppl,
            "ppl_error": e.ppl_error,
            "tokens": e.n_scored,
            "base_ppl": e.compared.map(|m| m.base_ppl),
            "kl_divergence": divergence,
        })
    });
    let pair = |own: Value, base: Option<Value>| json!({ "file": own, "base": base });
    let object = json!({
        "bytes": pair(json!(o.bytes.0), o.bytes.1.map(|b| json!(b))),
        "text": evaluation,
        "tasks": o.accuracy.map(|(own, base, n)| json!({ "n": n, "file": own, "base": base })),
        "tokens_per_second": o.speed.map(|(own, base)| {
            let speed = |s: crate::evaluate::Speed| json!({ "prompt": s.prompt, "generation": s.written });
            pair(speed(own), base.map(speed))
        }),
    });
    format!("{object:#}")
}
