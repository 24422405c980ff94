//! The report as one page: no scripts, nothing from the network, light and dark.

use serde_json::Value;
use std::fmt::Write;

/// Sizes of the picture, in its own units: a cell of a group, the widest bar, the gap between rows.
const CELL: usize = 14;
const BAR: usize = 320;
const ROW: usize = 18;
const LABEL: usize = 34;

/// The page of a `report`.
pub fn page(report: &Value) -> String {
    let mut body = String::new();
    let name = file_name(&report["input"]["path"]);
    let number = |v: &Value| v.as_f64().unwrap_or(0.0);
    let percent = |v: f64| format!("{:.1} %", v * 100.0);
    let _ = write!(
        body,
        "<header><h1>{}</h1><p>{} of the blocks removed, written as {}</p></header>",
        escape(&name),
        percent(number(&report["sparsity"])),
        escape(report["output"]["architecture"].as_str().unwrap_or("?")),
    );
    tiles(&mut body, report);
    let _ = write!(body, "<section><h2>Blocks</h2>{}</section>", picture(report));
    rivals(&mut body, &report["rivals"]);
    samples(&mut body, &report["samples"]);
    let notes = report["notes"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !notes.is_empty() {
        let items: String =
            notes.iter().map(|n| format!("<li>{}</li>", escape(n.as_str().unwrap_or("")))).collect();
        let _ = write!(body, "<section><h2>Notes</h2><ul>{items}</ul></section>");
    }
    table(&mut body, "How it was made", &details(report));
    table(&mut body, "Options", &report["options"]);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{}: pruned by {}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n",
        escape(&name),
        percent(number(&report["sparsity"])),
    )
}

/// Large figures: what it was, what it is.
fn tiles(out: &mut String, report: &Value) {
    let number = |v: &Value| v.as_f64();
    let change = |a: f64, b: f64| format!("{:+.1} %", (b / a - 1.0) * 100.0);
    let megabytes = |v: f64| format!("{:.1} MiB", v / f64::from(1 << 20));
    let millions = |v: f64| format!("{:.1} M", v / 1e6);
    let mut tile = |label: &str, value: String, note: String| {
        let _ = write!(
            out,
            "<div class=\"tile\"><span>{label}</span><strong>{}</strong><small>{}</small></div>",
            escape(&value),
            escape(&note)
        );
    };
    let mut both = |label: &str, key: &str, shown: fn(f64) -> String| {
        if let (Some(a), Some(b)) = (number(&report["before"][key]), number(&report["after"][key])) {
            tile(label, shown(b), format!("{} before, {}", shown(a), change(a, b)));
        }
    };
    both("File", "bytes", megabytes);
    both("Parameters", "parameters", millions);
    if let (Some(n), Some(a), Some(b)) = (
        report["running"]["ctx_size"].as_u64(),
        number(&report["running"]["before"]["bytes"]),
        number(&report["running"]["after"]["bytes"]),
    ) {
        tile(
            &format!("To run {n} tokens"),
            megabytes(b),
            format!("{} before, {}", megabytes(a), change(a, b)),
        );
    }
    let q = &report["held_out"];
    let after = number(&q["ppl_after_llama_cpp"]).or(number(&q["ppl_after"]));
    if let (Some(a), Some(b)) = (number(&q["ppl_before"]), after) {
        tile("Perplexity", format!("{b:.2}"), format!("{a:.2} before, x {:.2}", b / a));
    }
    if let (Some(kl), Some(top1)) = (number(&q["kl_divergence"]), number(&q["top1"])) {
        tile("KL divergence", format!("{kl:.3}"), format!("same top token in {:.1} %", top1 * 100.0));
    }
    *out = out.replacen("<div class=\"tile\">", "<section class=\"tiles\"><div class=\"tile\">", 1);
    out.push_str("</section>");
}

/// Per block: its groups, those that stay filled, a bar as wide as what stays of its feed-forward, and what that costs.
fn picture(report: &Value) -> String {
    let blocks = report["blocks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let count = |b: &Value, when: &str, key: &str| b[when][key].as_u64().unwrap_or(0) as usize;
    let experts = report["piece"] == "experts";
    let (key, what) = if experts { ("n_expert", "experts") } else { ("n_ff", "neurons") };
    let n_groups = blocks.iter().map(|b| count(b, "before", "n_head_kv")).max().unwrap_or(0);
    let widest = blocks.iter().map(|b| count(b, "before", key)).max().unwrap_or(1).max(1);
    // Many groups take smaller cells, so that a phone can show them.
    let cell = CELL.min(224 / n_groups.max(1)).max(3);
    let bars = LABEL + n_groups * cell + 12;
    let (width, height) = (bars + BAR + 4, blocks.len() * ROW + 4);
    let mut svg = format!(
        "<figure><svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"KV heads and {what} that stay in each block\">"
    );
    for (il, b) in blocks.iter().enumerate() {
        let y = il * ROW + 2;
        let _ = write!(svg, "<text x=\"{}\" y=\"{}\" class=\"n\">{il}</text>", LABEL - 8, y + 11);
        let kept: Vec<u64> =
            b["kept_groups"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        for g in 0..count(b, "before", "n_head_kv") {
            let class = if kept.contains(&(g as u64)) { "on" } else { "off" };
            let _ = write!(
                svg,
                "<rect x=\"{}\" y=\"{y}\" width=\"{}\" height=\"13\" rx=\"2\" class=\"{class}\"/>",
                LABEL + g * cell,
                (cell - 1).max(2)
            );
        }
        let (before, after) = (count(b, "before", key), count(b, "after", key));
        let scaled = |n: usize| n * BAR / widest;
        let loss = b["loss"].as_f64().map_or(String::new(), |l| format!(", costs about {l:.4} nats alone"));
        let _ = write!(
            svg,
            "<g><title>block {il}: {} of {} KV heads, {after} of {before} {what}{loss}</title>\
             <rect x=\"{bars}\" y=\"{y}\" width=\"{}\" height=\"13\" rx=\"2\" class=\"off\"/>\
             <rect x=\"{bars}\" y=\"{y}\" width=\"{}\" height=\"13\" rx=\"2\" class=\"ff\"/>\
             <text x=\"{}\" y=\"{}\" class=\"w\">{after}</text></g>",
            kept.len(),
            count(b, "before", "n_head_kv"),
            scaled(before),
            scaled(after),
            bars + 5,
            y + 11
        );
    }
    let _ = write!(
        svg,
        "</svg><figcaption>One row per block: KV heads with their query heads (filled: kept), and the {what} that stay.</figcaption></figure>"
    );
    let losses: Vec<f64> = blocks.iter().filter_map(|b| b["loss"].as_f64()).collect();
    if losses.len() == blocks.len() && !losses.is_empty() {
        svg += &curve(&losses);
    }
    svg
}

/// What each block's width costs the predictions, as columns.
fn curve(losses: &[f64]) -> String {
    let most = losses.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let (width, height) = (losses.len() * 12 + 4, 90);
    let mut svg = format!(
        "<figure><svg viewBox=\"0 0 {width} {}\" role=\"img\" aria-label=\"what the width of each block costs\">",
        height + 14
    );
    for (il, loss) in losses.iter().enumerate() {
        let tall = (loss.max(0.0) / most * f64::from(height)).max(1.0);
        let _ = write!(
            svg,
            "<rect x=\"{}\" y=\"{:.1}\" width=\"9\" height=\"{tall:.1}\" class=\"ff\"><title>block {il}: {loss:.4} nats</title></rect>",
            2 + il * 12,
            f64::from(height) - tall
        );
        if il % 5 == 0 {
            let _ = write!(svg, "<text x=\"{}\" y=\"{}\" class=\"s\">{il}</text>", 2 + il * 12, height + 11);
        }
    }
    let _ = write!(
        svg,
        "</svg><figcaption>What the predictions lose by the width of each block alone, about: {most:.4} nats of KL divergence at the highest.</figcaption></figure>"
    );
    svg
}

/// The result beside files of about its size that are only quantised.
fn rivals(out: &mut String, rivals: &Value) {
    let rivals = rivals.as_array().map(Vec::as_slice).unwrap_or_default();
    if rivals.is_empty() {
        return;
    }
    let number = |r: &Value, key: &str| r[key].as_f64().unwrap_or(f64::NAN);
    let rows: String = rivals
        .iter()
        .map(|r| {
            format!(
                "<tr><th>{}</th><td>{:.1} MiB</td><td>{:.2}</td><td>{:.4}</td><td>{:.1} %</td></tr>",
                escape(r["name"].as_str().unwrap_or("?")),
                number(r, "bytes") / f64::from(1 << 20),
                number(r, "ppl"),
                number(r, "kl_divergence"),
                number(r, "top1") * 100.0
            )
        })
        .collect();
    let _ = write!(
        out,
        "<section><h2>As many bytes by quantisation alone</h2><table><tr><th></th><th>file</th><th>perplexity</th>\
         <th>KL divergence</th><th>same top token</th></tr>{rows}</table></section>"
    );
}

fn samples(out: &mut String, samples: &Value) {
    let text = |key: &str| escape(samples[key].as_str().unwrap_or(""));
    if samples.is_object() {
        let _ = write!(
            out,
            "<section><h2>The same beginning, continued</h2><div class=\"pair\">\
             <div><h3>before</h3><p class=\"text\"><b>{0}</b>{1}</p></div>\
             <div><h3>after</h3><p class=\"text\"><b>{0}</b>{2}</p></div></div></section>",
            text("prompt"),
            text("before"),
            text("after"),
        );
    }
}

/// What is worth a row besides options.
fn details(report: &Value) -> Value {
    let q = &report["held_out"];
    serde_json::json!({
        "input": report["input"]["path"],
        "input SHA-256": report["input"]["sha256"],
        "output": report["output"]["path"],
        "output SHA-256": report["output"]["sha256"],
        "calibration": report["calibration"],
        "calibration tokens": q["calibration_tokens"],
        "held-out tokens": q["tokens"],
        "perplexity by our own forward": q["ppl_after"],
        "seconds": report["seconds"].as_f64().map(f64::round),
        "peak memory, MiB": report["peak_memory_bytes"].as_u64().map(|b| b >> 20),
        "putri-gguf": report["version"],
        "engine": report["engine"],
    })
}

fn table(out: &mut String, title: &str, fields: &Value) {
    let shown = |v: &Value| match v {
        Value::Null => None,
        Value::String(s) => Some(s.clone()),
        Value::Array(list) if list.is_empty() => None,
        other => Some(other.to_string()),
    };
    let fields = fields.as_object().into_iter().flatten();
    let rows: String = fields
        .filter_map(|(k, v)| Some(format!("<tr><th>{}</th><td>{}</td></tr>", escape(k), escape(&shown(v)?))))
        .collect();
    let _ = write!(out, "<section><h2>{title}</h2><table>{rows}</table></section>");
}

fn file_name(path: &Value) -> String {
    let path = std::path::Path::new(path.as_str().unwrap_or("?"));
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--ink:#1f2328;--soft:#667;--line:#e3e0d8;--on:#2f6f5e;\
--ff:#c98a2b;--off:#e6e2d8}\
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2025;--ink:#e6e8ea;--soft:#9aa4ad;--line:#2d333a;\
--on:#5fb89f;--ff:#d9a04a;--off:#30363d}}\
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
main{max-width:860px;margin:0 auto;padding:24px 16px 64px}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}\
header p{margin:4px 0 20px;color:var(--soft)}h2{font-size:1.1rem;margin:32px 0 12px}h3{font-size:.85rem;margin:0 0 6px;\
color:var(--soft);font-weight:600}\
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px}\
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;display:flex;\
flex-direction:column}.tile span,.tile small{color:var(--soft);font-size:.8rem}.tile strong{font-size:1.45rem;\
font-variant-numeric:tabular-nums}\
figure{margin:0 0 20px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}\
svg{width:100%;height:auto;display:block}figcaption{color:var(--soft);font-size:.8rem;margin-top:8px}\
.on{fill:var(--on)}.ff{fill:var(--ff)}.off{fill:var(--off)}svg text{font:10px system-ui,sans-serif;fill:var(--soft)}\
svg .n{text-anchor:end}svg .w{fill:#1b1f24}svg .s{font-size:8px}\
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:12px}\
.pair>div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}\
.text{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem}\
table{border-collapse:collapse;width:100%;font-size:.85rem}th{text-align:left;font-weight:500;color:var(--soft);\
padding:4px 12px 4px 0;vertical-align:top;white-space:nowrap}td{padding:4px 0;overflow-wrap:anywhere}\
tr+tr>*{border-top:1px solid var(--line)}@media(max-width:520px){th{white-space:normal;width:38%}}";
